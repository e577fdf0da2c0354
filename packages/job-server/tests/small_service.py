"""A service in a process of its own, `small_service.py <port> <drain_timeout_s> [mode]`.

Prompts are commands.

Modes: `broken-off` gets a SIGTERM before it is ready, and becomes so only where it does not leave; `patient`
has all the time that it needs to end after a crash.
"""

import os
import signal
import sys
from importlib import import_module

import anyio

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.operations import HiveList, Infer, Status
from rbee_job_server import (
    CannotBind,
    JobContext,
    JobServer,
    ServeConfig,
    bind,
    build_app,
    configure_logging,
    narrate,
    serve,
)
from rbee_job_server.systemd import Notifier, Reporter


async def main(port: int, drain_timeout_s: float, mode: str) -> int:
    is_broken_off = mode == "broken-off"
    if mode == "patient":
        serving = import_module("rbee_job_server.serve")
        serving.CRASH_GRACE_S = serving.CRASH_EXIT_S = 600.0  # type: ignore[attr-defined]
    release, crash, left = anyio.Event(), anyio.Event(), anyio.Event()

    async def infer(operation: Infer, context: JobContext) -> dict[str, str]:
        prompt, output = str(operation.prompt), "OUTPUT-MARK"
        context.emit_token(output)
        if "reject" in prompt:
            raise InvalidRequest(f"No: {prompt}")
        if "crash" in prompt:
            raise ValueError(f"{prompt} {output}")
        if "hang" in prompt:
            await anyio.sleep_forever()
        if "wait" in prompt:
            await release.wait()
        return {"text": output}

    async def status(_: Status, __: JobContext) -> None:
        narrate("said", "Released.")
        release.set()

    async def hive_list(_: HiveList, __: JobContext) -> None:
        local = "LOCAL-MARK"
        crash.set()
        raise ZeroDivisionError(f"length {len(local)}")

    async def background() -> None:
        await crash.wait()
        raise RuntimeError("THE-CAUSE")

    async def on_listening() -> None:
        if is_broken_off:
            os.kill(os.getpid(), signal.SIGTERM)
            await left.wait()

    configure_logging(service="worker/w1")
    server = JobServer(
        service="worker", actor="worker/w1", handlers={Infer: infer, Status: status, HiveList: hive_list}
    )
    app = build_app(server, name="worker", service_id="w1", version="0")
    try:
        sock = bind("127.0.0.1", port)
    except CannotBind as exc:
        print(exc, file=sys.stderr)
        return 2
    config = ServeConfig(host="127.0.0.1", port=port, drain_timeout_s=drain_timeout_s)
    reporter = Reporter(Notifier.of(os.environ, os.getpid()), describe=lambda: "small")
    return await serve(
        app,
        server,
        sock,
        config,
        loops=[background],
        on_listening=on_listening,
        on_leave=left.set if is_broken_off else None,
        reporter=reporter,
    )


if __name__ == "__main__":
    raise SystemExit(anyio.run(main, int(sys.argv[1]), float(sys.argv[2]), "".join(sys.argv[3:])))
