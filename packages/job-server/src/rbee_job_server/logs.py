"""Logging of every service: structlog, JSON unless a person looks on, ids on every line."""

import json
import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

import msgspec
import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

from rbee_job_server.log_search import LogRing

LEVELS = ("debug", "info", "warning", "error")


def configure_logging(
    *,
    service: str,
    level: str = "info",
    stream: TextIO | None = None,
    ring: LogRing | None = None,
    **ids: str,
) -> None:
    """Send structlog's and the standard library's log to one stream, one event a line.

    Args:
        service: stands as `service` on every line, e.g. `hive/box1`.
        ids: stand on every line too, e.g. `hive_id`.
        stream: standard error by default; JSON where it is not a terminal.
        ring: keeps the newest lines, as JSON.
    """
    stream = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add({"service": service} | ids),
    ]
    # Tracebacks without local variables: those hold prompts and tokens.
    to_dicts = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    to_json = structlog.processors.JSONRenderer(_to_json)
    kept: list[Processor] = [] if ring is None else [ring]
    renderers: list[Processor] = [to_dicts, to_json, *kept]
    if stream.isatty():

        def keep(logger: Any, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
            if ring is not None:
                ring.keep(str(to_json(logger, name, to_dicts(logger, name, dict(event)))))
            return event

        to_person = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        renderers = [keep, to_person]
    # Ours goes straight to the stream: what vLLM imports sets the root logger's level as it likes.
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("httpx", "httpx2", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _to_json(event: object, default: Callable[[Any], Any]) -> str:
    """Write a line's facts as JSON, as `json.dumps` does; `default` gives what to write for what has none.

    msgspec takes a tenth of the time, and there are two lines for each job.
    """
    try:
        return msgspec.json.format(msgspec.json.encode(event, enc_hook=default), indent=0).decode()
    except (TypeError, ValueError, RecursionError):  # a key that is no text, half a character
        return json.dumps(event, default=default, ensure_ascii=False)


def _add(ids: dict[str, str]) -> Processor:
    def add(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**ids, **event}

    return add
