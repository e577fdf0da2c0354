"""`rbee-hive`: load the configuration, print it or run with it, exit."""

import sys

import anyio

from rbee_hive.config import environment, load
from rbee_hive.main import run
from rbee_hive.models import UnusableHub
from rbee_hive.supervisor.state_lock import StateInUse, state_lock
from rbee_job_server import CannotBind, configure_logging
from rbee_job_server.serve import EXIT_BAD_CONFIG


def main() -> None:
    environ = environment()
    loaded = load(sys.argv[1:], environ)
    if loaded.is_shown:
        print(loaded.text, end="")
        return
    config = loaded.config
    configure_logging(service=f"hive/{config.hive_id}", level=config.log_level, hive_id=config.hive_id)
    try:
        with state_lock(config.state_dir):
            exit_code = anyio.run(run, config, environ, backend_options={"use_uvloop": True})
    except (CannotBind, StateInUse, UnusableHub) as exc:
        print(f"rbee-hive: {exc}", file=sys.stderr)
        exit_code = EXIT_BAD_CONFIG
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
