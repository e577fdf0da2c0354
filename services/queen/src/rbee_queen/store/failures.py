"""What went wrong with a database, in one line that says what to do; never with the text of a request.

The drivers' own messages may quote rows, so of those only what is known to quote none is passed on.
"""

from sqlalchemy.exc import DBAPIError

from rbee_queen.store.base import StoreFailed

_SQLITE = (
    ("SQLITE_NOTADB", "this is not a SQLite database", "name another file, or move this one away"),
    (
        "SQLITE_CORRUPT",
        "the file is damaged",
        "restore a backup, or save what is left with `sqlite3 FILE .recover`",
    ),
    ("SQLITE_FULL", "the disk is full", "free some space"),
    ("SQLITE_READONLY", "the file cannot be written", "check the owner of the file and its folder"),
    ("SQLITE_CANTOPEN", "the file cannot be opened", "check the owner of the file and its folder"),
    ("SQLITE_PERM", "the file cannot be opened", "check the owner of the file and its folder"),
    ("SQLITE_BUSY", "another program holds it", "end that program; only the queen may write here"),
    ("SQLITE_LOCKED", "another program holds it", "end that program; only the queen may write here"),
    ("SQLITE_IOERR", "the disk reports an error", "check free space and the system's log"),
)
_POSTGRES = (
    ("28", "the login is refused", "check user and password"),
    ("3D", "this database does not exist", "create it with `createdb`"),
    ("42501", "the user may not do this", "make the user the owner of the database"),
    ("53100", "the disk of the server is full", "free some space there"),
    ("53300", "the server takes no more connections", "raise its max_connections"),
    ("55P03", "another session holds a lock on the tables", "end that session"),
    ("25006", "the server is read-only", "name the primary server"),
)


def explain_sqlite(where: str, exc: Exception) -> StoreFailed:
    original = exc.orig if isinstance(exc, DBAPIError) else exc
    name = getattr(original, "sqlite_errorname", None) or type(original).__name__
    for prefix, cause, remedy in _SQLITE:
        if name.startswith(prefix):
            return StoreFailed(f"{where}: {cause} ({name}); {remedy}.")
    return StoreFailed(f"{where}: SQLite refuses with {name}; the tables may have been changed by hand.")


def explain_postgres(where: str, exc: Exception) -> StoreFailed:
    original = exc.orig if isinstance(exc, DBAPIError) else exc
    state = getattr(original, "sqlstate", None) or ""
    said = getattr(getattr(original, "diag", None), "message_primary", None) or type(original).__name__
    for prefix, cause, remedy in _POSTGRES:
        if state.startswith(prefix):
            return StoreFailed(f"{where}: {cause} ({_line(said)}); {remedy}.")
    if state.startswith(("08", "57P")) or (not state and type(original).__name__ == "OperationalError"):
        return unreachable(where, said)
    return StoreFailed(f"{where}: PostgreSQL refuses with {state or 'an error'}: {_line(said)}.")


def explain_connecting(where: str, exc: Exception) -> StoreFailed:
    """Explain why there is no connection; nothing has been sent yet that could be quoted."""
    text = _line(str(exc.orig if isinstance(exc, DBAPIError) else exc))
    for sign, (_, cause, remedy) in (
        ("authentication failed", _POSTGRES[0]),
        ("no password supplied", _POSTGRES[0]),
        ("role ", _POSTGRES[0]),
        ("does not exist", _POSTGRES[1]),
        ("too many", _POSTGRES[4]),
        ("remaining connection slots", _POSTGRES[4]),
    ):
        if sign in text:
            return StoreFailed(f"{where}: {cause} ({text}); {remedy}.")
    return unreachable(where, text)


def unreachable(where: str, said: str) -> StoreFailed:
    return StoreFailed(f"{where}: the server cannot be reached ({_line(said)}); check address and server.")


def explain_system(where: str, exc: OSError) -> StoreFailed:
    return StoreFailed(f"{where}: {exc.strerror or exc}; check owner and free space, or name another file.")


def _line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")
