"""`rbee-hive`: load the configuration, print it, run with it or end what it has left; exit."""

import faulthandler
import os
import sys

import anyio

from rbee_hive.config import environment, load
from rbee_hive.main import run
from rbee_hive.models import UnusableHub
from rbee_hive.supervisor.leftovers import end_left
from rbee_hive.supervisor.state_lock import StateInUse, state_lock
from rbee_job_server import CannotBind, configure_logging
from rbee_job_server.log_search import LogRing
from rbee_job_server.serve import EXIT_BAD_CONFIG, EXIT_CRASHED, EXIT_OK
from rbee_job_server.systemd import Notifier


def main() -> None:
    environ = environment()
    loaded = load(sys.argv[1:], environ)
    if loaded.is_shown:
        print(loaded.text, end="")
        return
    config = loaded.config
    logs, name = LogRing(), f"hive/{config.hive_id}"
    configure_logging(service=name, level=config.log_level, ring=logs, hive_id=config.hive_id)
    notifier = Notifier.of(environ, os.getpid())
    if notifier.watchdog_s is not None:
        faulthandler.enable()  # tells where it was stuck when it is ended for that
    try:
        with state_lock(config.state_dir):
            if loaded.ends_workers:
                exit_code = EXIT_OK if anyio.run(end_left, config.state_dir) else EXIT_CRASHED
            else:
                exit_code = anyio.run(
                    run, config, environ, notifier, logs, backend_options={"use_uvloop": True}
                )
    except (CannotBind, StateInUse, UnusableHub) as exc:
        print(f"rbee-hive: {exc}", file=sys.stderr)
        exit_code = EXIT_BAD_CONFIG
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
