"""Where the settings' values come from: flag, environment, file or default; and how they are shown.

Whatever its source, a value passes the same check, and is refused with one line that names it.
"""

import argparse
import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from rbee_hive.devices.sizes import parse_bytes, show_bytes
from rbee_hive.settings import (
    BY_NAME,
    KEPT_FREE,
    LABELS,
    SETTINGS,
    SIZE_WORDS,
    Bytes,
    DeviceName,
    LabelKey,
    LabelValue,
    Setting,
)

NO_FILE = "none"
"""Given as the file's name, it means that no file is read."""

DEVICES = "devices"

END_WORKERS = "end-workers"
COMMANDS = ("config", END_WORKERS)


class BadSetting(Exception):
    """A value that cannot be used; the message is the one line for who started the hive."""


class Value(Struct, frozen=True):
    """A setting's value and where it came from, in words."""

    value: Any
    source: str


class Values(Struct, frozen=True, kw_only=True):
    """All settings as they are in effect.

    Args:
        of: by name; a setting without a value is not there.
        labels: the hive's labels.
        kept_free: bytes that are kept free on a device, by `cpu` or its index.
        file: the file that was read.
    """

    of: Mapping[str, Value]
    labels: Mapping[str, Value]
    kept_free: Mapping[str, Value]
    file: Path | None

    def get(self, name: str) -> Any:
        """Give a setting's value; None for one without."""
        found = self.of.get(name)
        return None if found is None else found.value


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(prog: str, description: str) -> Parser:
    """Give the parser of all flags. A flag that was not given is not in what it parses."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "command",
        nargs="*",
        default=[],
        metavar=f"config|{END_WORKERS}",
        help="config: print the settings in effect, and end; "
        f"{END_WORKERS}: end the workers that a hive has left, and end",
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"the settings' file, in TOML; '{NO_FILE}' reads none"
    )
    for setting in SETTINGS:
        words = setting.help + _default_text(setting)
        if setting.type is bool:
            parser.add_argument(
                setting.flag, dest=setting.dest, action=argparse.BooleanOptionalAction, help=words
            )
        else:
            action = "append" if setting.repeats else "store"
            metavar = setting.flag.rsplit("-", 1)[-1].upper()
            parser.add_argument(setting.flag, dest=setting.dest, action=action, metavar=metavar, help=words)
    parser.add_argument(
        "--label", dest=LABELS, action="append", metavar="KEY=VALUE", help="a label of this hive; repeatable"
    )
    parser.add_argument(
        "--kept-free",
        dest=KEPT_FREE,
        action="append",
        metavar="DEVICE=SIZE",
        help="memory that no worker gets on a device ('cpu' or a GPU's index), as 0=2GiB; repeatable",
    )
    return parser


def parse_flags(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; what is not known is refused with a near name.

    Raises:
        SystemExit: with status 2 and one line.
    """
    args, extra = parser.parse_known_args(argv)
    unknown = next((text for text in extra if text.startswith("-")), None)
    if unknown is not None:
        name = unknown.partition("=")[0]
        known = [setting.flag for setting in SETTINGS] + [
            "--config",
            "--label",
            "--kept-free",
        ]
        near = difflib.get_close_matches(name, known, n=1)
        parser.error(f"there is no flag {name}." + (f" Did you mean {near[0]}?" if near else ""))
    if args.command and args.command not in ([name] for name in COMMANDS):
        given = " ".join(args.command)[:100]
        near = difflib.get_close_matches(given, COMMANDS, n=1) or ["config"]
        parser.error(f"there is no command {given}. Did you mean {near[0]}?")
    return args


def read_values(args: argparse.Namespace, environ: Mapping[str, str], files: Sequence[Path]) -> Values:
    """Give every setting from the first source that has it: flag, environment, file, default.

    Args:
        args: of `build_parser`.
        files: where the file is looked for when none is named; the first that is there is read.

    Raises:
        BadSetting: one cannot be used.
    """
    given = vars(args)
    named = given.get("config") or environ.get("RBEE_CONFIG") or None
    path, tables = _read_file(named, files)
    in_file = dict(_flatten(path, tables))
    of: dict[str, Value] = {}
    for setting in SETTINGS:
        value = _resolve(setting, given, environ, in_file, path)
        if value is not None:
            of[setting.name] = value
    labels = _resolve_pairs(LABELS, "--label", given, environ, tables.get(LABELS, {}), path, _label)
    in_devices = {
        name: table[KEPT_FREE]
        for name, table in tables.get(DEVICES, {}).items()
        if isinstance(table, dict) and KEPT_FREE in table
    }
    kept_free = _resolve_pairs(KEPT_FREE, "--kept-free", given, environ, in_devices, path, _kept_free)
    return Values(of=of, labels=labels, kept_free=kept_free, file=path)


def show(values: Values, *, note: Sequence[str] = ()) -> str:
    """Give the settings in effect as TOML, each with where it came from. Passwords in URLs are hidden."""
    lines = [f"# {line}" for line in note]
    tables: dict[str, list[tuple[str, Value]]] = {}
    for name, value in values.of.items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, []).append((key, value))
    for device, value in values.kept_free.items():
        tables.setdefault(f"{DEVICES}.{device}", []).append((KEPT_FREE, value))
    tables[LABELS] = [(_key(key), value) for key, value in values.labels.items()]
    for table in sorted(tables):
        if not tables[table]:
            continue
        if table:
            lines += ["", f"[{table}]"]
        lines += [f"{key} = {_toml(value.value)}  # {value.source}" for key, value in tables[table]]
    return "\n".join(lines) + "\n"


# --- sources -------------------------------------------------------------------------------------------


def _read_file(named: str | None, files: Sequence[Path]) -> tuple[Path | None, dict[str, Any]]:
    if named == NO_FILE:
        return None, {}
    path = Path(named).expanduser() if named else next((file for file in files if file.is_file()), None)
    if path is None:
        return None, {}
    try:
        return path, tomllib.loads(path.read_text())
    except OSError as exc:
        raise BadSetting(f"{path} cannot be read: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadSetting(f"{path} is no TOML: {exc}.") from exc


def _flatten(path: Path | None, tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give the file's settings by name, labels and devices' tables left out, after a look at every key."""
    known_tables = {name.partition(".")[0] for name in BY_NAME if "." in name} | {LABELS}
    for key, value in tables.items():
        if key not in known_tables:
            if key not in BY_NAME:
                raise _unknown(path, key, [*BY_NAME, *known_tables])
            yield key, value
            continue
        if not isinstance(value, dict):
            raise BadSetting(f"{path}: {key} = {_shown(value)} is not allowed: a table, [{key}].")
        if key == LABELS:
            continue
        for inner, entry in value.items():
            name = f"{key}.{inner}"
            if name in BY_NAME:
                yield name, entry
            elif key == DEVICES and isinstance(entry, dict):
                _check_device_table(path, name, inner, entry)
            else:
                raise _unknown(path, name, list(BY_NAME))


def _check_device_table(path: Path | None, name: str, device: str, table: Mapping[str, Any]) -> None:
    try:
        msgspec.convert(device, DeviceName)
    except msgspec.ValidationError as exc:
        raise BadSetting(f"{path}: [{name}] is not allowed: [devices.cpu] or [devices.INDEX].") from exc
    for key in table:
        if key != KEPT_FREE:
            raise _unknown(path, f"{name}.{key}", [f"{name}.{KEPT_FREE}"])


def _unknown(path: Path | None, name: str, known: Sequence[str]) -> BadSetting:
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        last = {candidate.rpartition(".")[2]: candidate for candidate in known}
        near = [last[each] for each in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)]
    hint = f" Did you mean {near[0]}?" if near else ""
    return BadSetting(f"{path}: there is no setting {name}.{hint}")


def _resolve(
    setting: Setting,
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    in_file: Mapping[str, Any],
    path: Path | None,
) -> Value | None:
    if setting.dest in given:
        return Value(
            _converted(setting, given[setting.dest], f"{setting.flag} ", from_text=True),
            f"flag {setting.flag}",
        )
    for variable in (setting.variable, setting.also):
        if variable is not None and environ.get(variable):
            text: Any = environ[variable]
            if setting.repeats:
                text = [part.strip() for part in text.split(",") if part.strip()]
            return Value(_converted(setting, text, f"{variable}=", from_text=True), f"environment {variable}")
    if setting.name in in_file:
        prefix = f"{path}: {setting.name} = "
        return Value(_converted(setting, in_file[setting.name], prefix, from_text=False), f"file {path}")
    return None if setting.default is None else Value(setting.default, "default")


def _converted(setting: Setting, value: Any, prefix: str, *, from_text: bool) -> Any:
    """Check a value. `prefix` is what stands before it in the line that refuses it."""
    made = value
    if setting.is_size and isinstance(value, str):
        made = parse_bytes(value)
    elif from_text and setting.repeats and setting.type == list[int | str]:
        made = [int(part) if part.isdecimal() else part for part in value]
    try:
        converted = msgspec.convert(made, setting.type, strict=not from_text)
        if setting.is_url:
            _ = urlsplit(converted).port  # raises for one that cannot be
        return converted
    except ValueError as exc:  # msgspec's too
        shown = _plain(value) if from_text else _shown(value)
        raise BadSetting(f"{prefix}{shown} is not allowed: {setting.allowed}.") from exc


def _resolve_pairs(
    name: str,
    flag: str,
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    in_file: Mapping[str, Any],
    path: Path | None,
    check: Callable[[str, Any, str], tuple[str, Any]],
) -> dict[str, Value]:
    """Give the pairs of a setting that is a table; each pair from the first source that has it."""
    variable = "RBEE_" + name.upper()
    found: dict[str, Value] = {}
    for key, value in in_file.items():
        key, made = check(key, value, f"{path}: {name}.{key} = {_shown(value)}")
        found[key] = Value(made, f"file {path}")
    texts = [(part.strip(), f"{variable}=", f"environment {variable}")
             for part in environ.get(variable, "").split(",") if part.strip()]  # fmt: skip
    texts += [(text, f"{flag} ", f"flag {flag}") for text in given.get(name, [])]
    for text, prefix, source in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadSetting(f"{prefix}{_plain(text)} is not allowed: KEY=VALUE.")
        key, made = check(key.strip(), value.strip(), prefix + _plain(text))
        found[key] = Value(made, source)
    return found


def _label(key: str, value: Any, shown: str) -> tuple[str, str]:
    try:
        return msgspec.convert(key, LabelKey), msgspec.convert(value, LabelValue)
    except msgspec.ValidationError as exc:
        raise BadSetting(
            f"{shown} is not allowed: at most 63 letters, digits, '.', '_', '/', '-' (and spaces in a value)."
        ) from exc


def _kept_free(device: str, value: Any, shown: str) -> tuple[str, int]:
    made = parse_bytes(value) if isinstance(value, str) else value
    try:
        return msgspec.convert(device, DeviceName), msgspec.convert(made, Bytes)
    except msgspec.ValidationError as exc:
        raise BadSetting(f"{shown} is not allowed: {SIZE_WORDS}, for 'cpu' or a GPU's index.") from exc


# --- words ---------------------------------------------------------------------------------------------


def _default_text(setting: Setting) -> str:
    if "(default" in setting.help or setting.default is None or setting.default == []:
        return ""
    if setting.is_size:
        return f" (default: {show_bytes(setting.default)})"
    return f" (default: {_plain(setting.default)})"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))[:100]
    return f"{value:g}" if isinstance(value, float) else str(value)[:100]


def _shown(value: Any) -> str:
    try:
        return _toml(value)[:100]
    except TypeError:
        return str(value)[:100]


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(_without_password(value), ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _without_password(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    authority = rest.partition("/")[0]
    return f"{scheme}://…@{rest.partition('@')[2]}" if separator and "@" in authority else text


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)
