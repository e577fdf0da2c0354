"""`rbee`: parse, run, exit."""

import sys


def main() -> None:
    """Run the command line of this process; its exit status tells how it went."""
    try:
        from rbee_keeper.app import build_app

        build_app()(prog_name="rbee")
    except KeyboardInterrupt:
        # Ctrl-C while Python was still importing; there is no job yet that would have to be cancelled.
        sys.exit(130)


if __name__ == "__main__":
    main()
