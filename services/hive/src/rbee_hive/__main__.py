"""`rbee-hive`: parse, configure logging, run, exit."""

import sys

import anyio

from rbee_hive.config import environment, parse
from rbee_hive.main import run
from rbee_job_server import CannotBind, configure_logging
from rbee_job_server.serve import EXIT_BAD_CONFIG


def main() -> None:
    environ = environment()
    config = parse(sys.argv[1:], environ)
    configure_logging(service=f"hive/{config.hive_id}", level=config.log_level, hive_id=config.hive_id)
    try:
        exit_code = anyio.run(run, config, environ, backend_options={"use_uvloop": True})
    except CannotBind as exc:
        print(f"rbee-hive: {exc}", file=sys.stderr)
        exit_code = EXIT_BAD_CONFIG
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
