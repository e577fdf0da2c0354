"""Jobs and inferences in numbers, taken once for each job, after its end.

The registry finds ended jobs in its sweep, once a second, and a scrape sweeps before it tells: so a request
pays for no more than the count of its submit, and a token for nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, TypeAlias

import anyio
import msgspec
from msgspec import Meta, Struct
from prometheus_client.metrics_core import Metric as Family

from rbee_contracts.codes import CODES
from rbee_contracts.operations import Infer, OpenAI
from rbee_job_server.metrics.spec import OTHER, ByLabels, Metric

if TYPE_CHECKING:
    from rbee_job_server.jobs import Job

KNOWN = CODES | {"ok"}
"""What the label `code` may be; `ok` stands for a job that has completed."""

MAX_MODELS = 256
"""Names of models that a label of this process may have in its life; beyond it they are `other`."""

LEARN_EVERY_S = 1.0
"""How often it is looked up which models are loaded, at most: unknown names cost nothing more."""

LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0),
)
TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5),
)
DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
DELAY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

SUBMITTED = Metric(
    name="rbee_jobs_submitted_total",
    kind="counter",
    help="Jobs that this service has accepted.",
    labels=("operation",),
)
FINISHED = Metric(
    name="rbee_jobs_finished_total",
    kind="counter",
    help="Jobs that have ended here: their state, and the code of their error or of their cancellation; "
    "`ok` where they completed.",
    labels=("operation", "state", "code"),
)
CURRENT = Metric(
    name="rbee_jobs",
    kind="gauge",
    help="Jobs that have not ended: `pending` ones wait for their first reader, `running` ones are executed. "
    "Operations without any are left out, but for inferences.",
    labels=("operation", "state"),
)
DURATION = Metric(
    name="rbee_job_duration_seconds",
    kind="histogram",
    help="From a job's start to its end, however it ended.",
    labels=("operation",),
    buckets=DURATION_BUCKETS,
)
FIRST_TOKEN = Metric(
    name="rbee_inference_time_to_first_token_seconds",
    kind="histogram",
    help="From an inference's start at this service until its first output was here. Answers of the OpenAI "
    "routes that are not streamed are left out.",
    labels=("operation", "model"),
    buckets=LATENCY_BUCKETS,
)
PER_TOKEN = Metric(
    name="rbee_inference_time_per_output_token_seconds",
    kind="histogram",
    help="The mean time between two output tokens of a completed inference: from its first output at this "
    "service to its end, by the tokens after the first one; pieces of output stand for tokens where the "
    "result tells no usage.",
    labels=("operation", "model"),
    buckets=TOKEN_BUCKETS,
)
ENGINE_QUEUE = Metric(
    name="rbee_inference_engine_queue_seconds",
    kind="histogram",
    help="How long a completed `infer` waited in the engine's queue, as the engine told.",
    labels=("operation", "model"),
    buckets=LATENCY_BUCKETS,
)
TOKENS = Metric(
    name="rbee_inference_tokens_total",
    kind="counter",
    help="Tokens of completed inferences whose result tells their usage, which a stream of the OpenAI routes "
    "does only where it was asked for; `kind` is `prompt` or `output`.",
    labels=("operation", "model", "kind"),
)
LOOP_DELAY = Metric(
    name="rbee_event_loop_delay_seconds",
    kind="histogram",
    help="How much later than due a timer of this service ran, looked at once a second: what is read waits "
    "about that long for its turn.",
    buckets=DELAY_BUCKETS,
)

JOB_METRICS = (
    SUBMITTED,
    FINISHED,
    CURRENT,
    DURATION,
    FIRST_TOKEN,
    PER_TOKEN,
    ENGINE_QUEUE,
    TOKENS,
    LOOP_DELAY,
)


_Tokens: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
"""What no engine tells is no count: a float would take more as infinite, or not at all."""


class _Usage(Struct, frozen=True):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens


class _Timings(Struct, frozen=True):
    queue_ms: Annotated[float, Meta(ge=0, le=1e10)]


class _Told(Struct, frozen=True):
    """What is read of an inference's result."""

    usage: _Usage | None = None
    timings: _Timings | None = None


_decoder = msgspec.json.Decoder(_Told)


class JobMetrics:
    """Counts and measures the jobs of one service. Only its job server calls `submitted` and `ended`.

    Args:
        models: gives the label of each name by which a loaded model may be asked for.
        now: monotonic seconds.

    `otherwise` is the label of every other name; a service of one model sets it to that.
    """

    def __init__(
        self,
        models: Callable[[], Mapping[str, str]] = dict,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = models
        self.otherwise = OTHER
        self._now = now
        self._labels: dict[str, str] = {}
        self._learnt_at = -LEARN_EVERY_S
        self._submitted = ByLabels(SUBMITTED.counter())
        self._finished = ByLabels(FINISHED.counter())
        self._duration = ByLabels(DURATION.histogram())
        self._first_token = ByLabels(FIRST_TOKEN.histogram())
        self._per_token = ByLabels(PER_TOKEN.histogram())
        self._engine_queue = ByLabels(ENGINE_QUEUE.histogram())
        self._tokens = ByLabels(TOKENS.counter())
        self._loop_delay = LOOP_DELAY.histogram()

    def collect(self) -> Iterator[Family]:
        """Give all that was counted and measured."""
        for metric in (
            self._submitted.metric,
            self._finished.metric,
            self._duration.metric,
            self._first_token.metric,
            self._per_token.metric,
            self._engine_queue.metric,
            self._tokens.metric,
            self._loop_delay,
        ):
            yield from metric.collect()

    def submitted(self, job: "Job") -> None:
        """A job was accepted."""
        self._submitted[job.operation.name,].inc()

    def ended(self, job: "Job") -> None:
        """A job has ended: called once for each, soon after."""
        if job.had_ended:
            return  # and was counted then
        operation = job.operation.name
        code = job.end_code if job.end_code in KNOWN else OTHER
        self._finished[operation, job.state, code].inc()
        if job.started is None or job.finished is None:
            return
        self._duration[operation,].observe(job.finished - job.started)
        if isinstance(job.operation, Infer | OpenAI):
            self._inference(job, operation, job.started, job.finished)

    def _inference(self, job: "Job", operation: str, started: float, finished: float) -> None:
        labels = (operation, self._model_of(job))
        told = _told(job)
        if told.usage is not None:
            self._tokens[*labels, "prompt"].inc(told.usage.prompt_tokens)
            self._tokens[*labels, "output"].inc(told.usage.completion_tokens)
        if told.timings is not None:
            self._engine_queue[labels].observe(told.timings.queue_ms / 1000)
        outputs = job.outputs
        if job.spoke_at is None or (isinstance(job.operation, OpenAI) and outputs < 2):
            return
        self._first_token[labels].observe(job.spoke_at - started)
        tokens = outputs if told.usage is None else told.usage.completion_tokens
        if job.state == "completed" and tokens > 1:
            self._per_token[labels].observe((finished - job.spoke_at) / (tokens - 1))

    def _model_of(self, job: "Job") -> str:
        """Give a job's model as a label: names that callers make up, or leave out, are all one."""
        asked = getattr(job.operation, "model", None) or ""
        label = self._labels.get(asked)
        if label is None and self._now() - self._learnt_at >= LEARN_EVERY_S:
            self._learnt_at = self._now()
            for name, model in self.models().items():
                if len(self._labels) < MAX_MODELS:
                    self._labels[name] = model
            label = self._labels.get(asked)
        return label or self.otherwise

    async def sleep(self, seconds: float) -> None:
        """Sleep, and take in how late the end of it came."""
        due = anyio.current_time() + seconds
        await anyio.sleep(seconds)
        self._loop_delay.observe(max(0.0, anyio.current_time() - due))


def _told(job: "Job") -> _Told:
    if job.result is None:
        return _Told()
    try:
        return _decoder.decode(job.result)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Told()  # of an engine that tells other things
