"""What one call of `rbee` was asked: where to speak to, and how to print. Read once."""

import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from rbee_contracts.access import read_token

DEFAULT_QUEEN_URL = "http://127.0.0.1:7833"
QUEEN_URL_VARIABLE = "RBEE_QUEEN_URL"

_is_url = re.compile(r"https?://[^/?#\s@]+\Z").match


class Options(Struct, frozen=True, kw_only=True):
    """The options that every command has, as given before or after its name."""

    queen: str | None = None
    hive: str | None = None
    token_file: Path | None = None
    json: bool = False

    def over(self, earlier: "Options | None") -> "Options":
        """Give these options, completed by those given earlier on the line."""
        if earlier is None:
            return self
        return Options(
            queen=self.queen or earlier.queen,
            hive=self.hive or earlier.hive,
            token_file=self.token_file or earlier.token_file,
            json=self.json or earlier.json,
        )


class Settings(Struct, frozen=True, kw_only=True):
    """Where to speak to, a queen or one hive directly, and the cluster's token, where there is one."""

    url: str
    is_hive: bool
    token: str | None = None


def resolve(options: Options, environ: Mapping[str, str]) -> Settings:
    """Decide whom to speak to.

    Raises:
        ValueError: it cannot be told; the message is for the person who typed it.
    """
    if options.queen is not None and options.hive is not None:
        raise ValueError("give --queen or --hive, not both")
    token = read_token(options.token_file, environ)
    if options.hive is not None:
        return Settings(url=_url(options.hive, "--hive"), is_hive=True, token=token)
    if options.queen is not None:
        return Settings(url=_url(options.queen, "--queen"), is_hive=False, token=token)
    url = environ.get(QUEEN_URL_VARIABLE) or DEFAULT_QUEEN_URL
    return Settings(url=_url(url, QUEEN_URL_VARIABLE), is_hive=False, token=token)


def _url(given: str, source: str) -> str:
    url = (given if "://" in given else f"http://{given}").rstrip("/")
    if not _is_url(url):
        raise ValueError(f"{source} {given!r} is not of the form http://HOST:PORT")
    return url
