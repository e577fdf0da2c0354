"""Every setting of the hive: its name, its flag, what it may be and what it does.

A setting has one name everywhere: `workers.stall_s` in the file is `RBEE_WORKERS_STALL_S` in the environment.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from msgspec import Meta

from rbee_contracts.ids import HIVE_ID_PATTERN, ModelId
from rbee_job_server.logs import LEVELS
from rbee_job_server.tracing import (
    ENDPOINT_HELP,
    ENDPOINT_PATTERN,
    ENDPOINT_WORDS,
    STANDARD_ENDPOINT_VARIABLE,
)

Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=31_536_000)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65_535)]
WorkerPort: TypeAlias = Annotated[int, Meta(ge=1024, le=65_535)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0)]
LabelKey: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}\Z")]
LabelValue: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._/ -]{0,63}\Z")]
DeviceName: TypeAlias = Annotated[str, Meta(pattern=r"^(cpu|0|[1-9][0-9]{0,3})\Z")]

_SECONDS = "a number of seconds above 0"
_COUNT = "a whole number from 1"
_WORKER_PORT = "a port from 1024 to 65535"
SIZE_WORDS = "a number of bytes, or a size as '2 GiB'"


class Setting(NamedTuple):
    """One setting.

    Args:
        name: in the file, with its table: `workers.stall_s`.
        flag: on the command line.
        type: what msgspec must be able to make of a value.
        allowed: what may stand there, in words.
        help: what it does.
        default: None where it depends on the machine; `HiveConfig` says on what.
        is_size: a size in bytes may be written with a unit.
        is_url: an address whose host and port must be possible ones.
        repeats: the flag may be given several times; the environment separates by commas.
        also: another variable that stands in for the setting's own.
    """

    name: str
    flag: str
    type: Any
    allowed: str
    help: str
    default: Any = None
    is_size: bool = False
    is_url: bool = False
    repeats: bool = False
    also: str | None = None

    @property
    def variable(self) -> str:
        return "RBEE_" + self.name.upper().replace(".", "_")

    @property
    def dest(self) -> str:
        return self.name.replace(".", "_")


SETTINGS: tuple[Setting, ...] = (
    Setting("hive_id", "--hive-id", Annotated[str, Meta(pattern=HIVE_ID_PATTERN)],
            "1 to 64 letters, digits, '.', '_' and '-'", "unique in the cluster (default: the host's name)"),
    Setting("host", "--host", Annotated[str, Meta(min_length=1)], "an address", "address to listen on",
            "127.0.0.1"),
    Setting("port", "--port", Port, "a port from 0 to 65535", "0 takes a free one", 7835),
    Setting("queen_url", "--queen-url", Annotated[str, Meta(pattern=r"^(none|https?://[^/?#\s]+/?)\Z")],
            "http://HOST:PORT, or none for a hive on its own",
            "where the queen is; 'none' for a hive on its own", "http://127.0.0.1:7833", is_url=True),
    Setting("models_dir", "--models-dir", Annotated[str, Meta(min_length=1)], "a folder",
            "the models folder"),
    Setting("model_roots", "--model-root", list[Annotated[str, Meta(min_length=1)]], "a list of folders",
            "a further folder with models, which is only read; repeatable", [], repeats=True),
    Setting("preload", "--preload", list[ModelId], "a list of models",
            "a model that is loaded at the start; repeatable", [], repeats=True),
    Setting("state_dir", "--state-dir", Annotated[str, Meta(min_length=1)], "a folder",
            "worker logs and records are kept here"),
    Setting("drain_timeout_s", "--drain-timeout-s", Annotated[float, Meta(ge=0, le=86_400)],
            "a number of seconds from 0", "seconds for running jobs on SIGTERM", 30.0),
    Setting("log_level", "--log-level", Literal[LEVELS], "one of " + ", ".join(LEVELS),
            "least level that is logged", "info"),
    Setting("worker_engine", "--worker-engine", Literal["vllm", "sim"], "vllm or sim",
            "sim: workers model a GPU engine, for load tests", "vllm"),
    Setting("peers", "--peers", bool, "true or false", "take models from other hives, and give them", True),
    Setting("token_file", "--token-file", Annotated[str, Meta(min_length=1)], "a file",
            "holds the token that every caller must bring (default: the one in RBEE_TOKEN)"),
    Setting("allowed_hosts", "--allowed-host", list[Annotated[str, Meta(min_length=1)]],
            "a list of host names", "a name besides localhost under which this hive is used; repeatable "
            "(default: with a token any name)", [], repeats=True),
    Setting("max_body_bytes", "--max-body-bytes", Annotated[int, Meta(ge=1)], SIZE_WORDS,
            "largest body of a request", 1_000_000, is_size=True),
    Setting("otlp_endpoint", "--otlp-endpoint", Annotated[str, Meta(pattern=ENDPOINT_PATTERN)],
            ENDPOINT_WORDS, ENDPOINT_HELP, is_url=True, also=STANDARD_ENDPOINT_VARIABLE),
    Setting("hub.endpoint", "--hub-endpoint", Annotated[str, Meta(pattern=r"^https?://[^/?#\s@]+(/[^?#\s]*)?\Z")],
            "an http:// or https:// URL", "the model hub (default: the one of huggingface_hub)",
            is_url=True, also="HF_ENDPOINT"),
    Setting("hub.token_file", "--hub-token-file", Annotated[str, Meta(min_length=1)], "a file",
            "holds the token for the model hub (default: the one in HF_TOKEN)"),
    Setting("devices.use", "--use-device", list[int | str], "a list of GPU indexes or uuids",
            "a GPU that the hive uses, by index or uuid; repeatable (default: all)", repeats=True),
    Setting("devices.ignore", "--ignore-device", list[int | str], "a list of GPU indexes or uuids",
            "a GPU that the hive leaves alone, by index or uuid; repeatable", [], repeats=True),
    Setting("workers.startup_s", "--worker-startup-s", Seconds, _SECONDS,
            "seconds a worker may take to become ready", 1800.0),
    Setting("workers.stall_s", "--worker-stall-s", Seconds, _SECONDS,
            "seconds without an engine step, with requests running, until it is ended", 120.0),
    Setting("workers.silence_s", "--worker-silence-s", Seconds, _SECONDS,
            "seconds a worker may be alive without an answer until it is ended", 60.0),
    Setting("workers.probe_every_s", "--worker-probe-s", Seconds, _SECONDS,
            "seconds between one-token probes of an idle worker", 30.0),
    Setting("workers.probes_failed", "--worker-probes-failed", Count, _COUNT,
            "probes in a row that fail before it is ended", 3),
    Setting("workers.backoff_first_s", "--worker-backoff-first-s", Seconds, _SECONDS,
            "seconds before the first start again; doubles each time", 1.0),
    Setting("workers.backoff_most_s", "--worker-backoff-most-s", Seconds, _SECONDS,
            "the longest wait before a start again", 60.0),
    Setting("workers.start_limit", "--worker-start-limit", Count, _COUNT,
            "starts within the window after which a worker that ends is failed", 3),
    Setting("workers.start_window_s", "--worker-start-window-s", Seconds, _SECONDS,
            "see --worker-start-limit", 600.0),
    Setting("workers.hive_absence_s", "--hive-absence-s", Seconds, _SECONDS,
            "seconds a worker goes on without its hive", 900.0),
    Setting("workers.first_port", "--worker-first-port", WorkerPort, _WORKER_PORT,
            "workers get the lowest free port from here", 9300),
    Setting("workers.last_port", "--worker-last-port", WorkerPort, _WORKER_PORT, "up to here", 9999),
    Setting("workers.log_bytes", "--worker-log-bytes", Annotated[int, Meta(ge=65_536)],
            "a size from 64 KiB, as '16 MiB'", "a worker's log beyond this is moved aside", 16 << 20,
            is_size=True),
    Setting("workers.log_parts", "--worker-log-parts", Annotated[int, Meta(ge=0, le=1000)],
            "a whole number from 0", "moved parts of one log that are kept", 3),
    Setting("workers.logs_kept", "--worker-logs-kept", Annotated[int, Meta(ge=0, le=100_000)],
            "a whole number from 0", "logs of workers that are gone which are kept", 64),
)  # fmt: skip

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}

LABELS = "labels"
KEPT_FREE = "memory_kept_free"
