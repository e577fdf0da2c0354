"""`rbee-worker`: parse, configure logging, run, exit."""

import os
import sys

import anyio

from rbee_job_server import CannotBind, configure_logging
from rbee_job_server.serve import EXIT_BAD_CONFIG
from rbee_worker.config import parse
from rbee_worker.main import run


def main() -> None:
    config = parse(sys.argv[1:], dict(os.environ))
    configure_logging(
        service=f"worker/{config.worker_id}", level=config.log_level, worker_id=config.worker_id
    )
    try:
        exit_code = anyio.run(run, config, backend_options={"use_uvloop": True})
    except CannotBind as exc:
        print(f"rbee-worker: {exc}", file=sys.stderr)
        exit_code = EXIT_BAD_CONFIG
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
