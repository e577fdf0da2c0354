"""Exit with 0 when the service of this container can take work, else with 1 and the reason.

healthcheck.py URL    asks URL/ready
"""

import os
import sys
import urllib.error
import urllib.request

from rbee_contracts.access import read_token

TIMEOUT_S = 4.0


def main() -> None:
    token = read_token(None, os.environ)
    request = urllib.request.Request(f"{sys.argv[1]}/ready")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=TIMEOUT_S) as answer:
            print(answer.read().decode())
    except urllib.error.HTTPError as exc:
        sys.exit(exc.read().decode(errors="replace"))
    except OSError as exc:
        sys.exit(f"no answer: {exc}")


if __name__ == "__main__":
    main()
