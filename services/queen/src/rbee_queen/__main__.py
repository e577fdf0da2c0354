"""`rbee-queen`: parse, configure logging, run, exit."""

import faulthandler
import os
import sys

import anyio

from rbee_job_server import CannotBind, configure_logging
from rbee_job_server.log_search import LogRing
from rbee_job_server.serve import EXIT_BAD_CONFIG
from rbee_job_server.systemd import Notifier
from rbee_queen.config import parse
from rbee_queen.main import run
from rbee_queen.store import StoreFailed


def main() -> None:
    environ = dict(os.environ)
    config = parse(sys.argv[1:], environ)
    logs = LogRing()
    configure_logging(service="queen", level=config.log_level, ring=logs)
    notifier = Notifier.of(environ, os.getpid())
    if notifier.watchdog_s is not None:
        faulthandler.enable()  # tells where it was stuck when it is ended for that
    try:
        exit_code = anyio.run(run, config, notifier, logs, backend_options={"use_uvloop": True})
    except (CannotBind, StoreFailed) as exc:
        print(f"rbee-queen: {exc}", file=sys.stderr)
        exit_code = EXIT_BAD_CONFIG
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
