"""A job server that plays a queen with two hives, `scripted_service.py <port>`.

What a real hive shows only with a GPU, a hub or bad luck, it shows always; names of models are commands.
"""

import sys

import anyio
import msgspec

from rbee_contracts import nodes
from rbee_contracts import operations as ops
from rbee_contracts.errors import Conflict, NotFound, Unavailable
from rbee_contracts.events import DownloadProgress, FileProgress
from rbee_contracts.operations import Operation
from rbee_job_server import (
    JobContext,
    JobServer,
    ServeConfig,
    bind,
    build_app,
    configure_logging,
    serve,
)

HOSTILE = "evil\x1b]0;owned\x07\x1b[2J\x9b31m\nnext\u202eline"
GIB = 2**30
TOTAL = 3_400_000_000

H200 = nodes.Device(
    kind="cuda",
    index=0,
    name="NVIDIA H200",
    uuid="GPU-0",
    memory_total=140 * GIB,
    memory_used=35 * GIB,
    memory_reserved=70 * GIB,
    memory_kept_free=2 * GIB,
    utilization=93,
    temperature=71,
    power=640,
    driver="580.1",
    processes=[
        nodes.DeviceProcess(pid=4711, memory=34 * GIB, worker_id="w-ready"),
        nodes.DeviceProcess(pid=666, memory=GIB),
    ],
    health="degraded",
    issues=["Xid 63: a row of memory was remapped; reset the GPU when it is idle."],
)
MIG = nodes.Device(
    kind="cuda", index=1, name="H200 MIG 1g.18gb", memory_total=18 * GIB, memory_used=0, mig_uuid="GPU-0"
)
CPU = nodes.Device(
    kind="cpu",
    index=0,
    name="AMD EPYC 9654 96-Core Processor",
    memory_total=GIB * 512,
    memory_used=0,
    cores=96,
)

READY = nodes.WorkerInfo(
    worker_id="w-ready",
    model="meta-llama/Llama-3.1-70B-Instruct",
    state="busy",
    pid=4711,
    port=9300,
    running=12,
    waiting=3,
    kv_cache_usage=0.42,
    worker="cuda",
    devices=[0],
    started_at="2026-01-02T03:04:05Z",
    max_model_len=131_072,
    restarts=1,
    adopted=True,
    tokens_per_second=1234.5,
    prefix_cache_hit_rate=0.31,
    memory_reserved=70 * GIB,
    memory_estimate=nodes.MemoryEstimate(weights=30 * GIB, kv_cache=GIB, overhead=GIB),
    memory_used=34 * GIB,
)
FAILED = nodes.WorkerInfo(
    worker_id="w-failed",
    model="org/broken",
    state="failed",
    pid=4712,
    port=9301,
    running=0,
    waiting=0,
    kv_cache_usage=0,
    worker="cuda",
    devices=[0, 1],
    started_at="2026-01-02T03:04:05Z",
    signal=9,
    cause="The engine could not load org/broken: no file named config.json.",
    log_tail=["INFO loading", f"ERROR {HOSTILE}"],
    restarts=5,
)

LLAMA = nodes.ModelInfo(
    model="meta-llama/Llama-3.1-70B-Instruct",
    size=141_000_000_000,
    files=3,
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    max_model_len=131_072,
    size_on_disk=141_000_100_000,
    revision="0123456789abcdef0123456789abcdef01234567",
    last_used_at="2026-01-02T03:04:05Z",
    used_by=["w-ready"],
)
SMALL = nodes.ModelInfo(model="small", size=1_841_368, files=2, format="gguf")
FILES = [
    nodes.ModelFile(path="config.json", size=712, sha256="ab" * 32),
    nodes.ModelFile(path=f"odd {HOSTILE}.safetensors", size=141_000_000_000),
]

DISK = nodes.Disk(total=2 * 10**12, free=10**12, reserved=3 * 10**9, models=5 * 10**11)
HIVES = [
    nodes.HiveInfo(
        hive_id="box1",
        url="http://10.0.0.7:7835",
        state="online",
        version="0.1.0",
        last_seen_s=0.4,
        devices=[H200, MIG, CPU],
        workers=[READY, FAILED],
        models=[LLAMA, SMALL],
        disk=DISK,
        labels={"rack": "3", "fast": ""},
        boot="b1",
    ),
    nodes.HiveInfo(
        hive_id="box2",
        url="http://10.0.0.8:7835",
        state="online",
        version="0.1.0",
        last_seen_s=0.7,
        devices=[CPU],
        models=[SMALL],
        draining=True,
        boot="b2",
    ),
    nodes.HiveInfo(
        hive_id="box3", url="http://10.0.0.9:7835", state="lost", version="0.1.0", last_seen_s=7300, boot="b3"
    ),
]

OURS = nodes.WorkerProcessInfo(
    pid=4711,
    ppid=4700,
    kind="engine",
    name="VLLM::EngineCore",
    user="rbee",
    started_at="2026-01-02T03:04:05Z",
    memory=9 * GIB,
    devices={0: 34 * GIB},
    worker_id="w-ready",
)
FOREIGN = nodes.WorkerProcessInfo(
    pid=666, ppid=1, kind="foreign", name=HOSTILE, user="mallory", memory=GIB, devices={0: None}
)

GOOD = nodes.Finding(check="disk", status="ok", message="1 TB of 2 TB are free.")
ODD = nodes.Finding(
    check="gpu cuda:0",
    status="warning",
    message="A row of memory was remapped.",
    remedy="Reset the GPU when it is idle: nvidia-smi --gpu-reset -i 0",
)
BAD = nodes.Finding(
    check="hub",
    status="failed",
    message=f"No answer: {HOSTILE}",
    remedy="Set HF_ENDPOINT to a hub you can reach.",
)


def hive(operation: ops.HiveOperation) -> nodes.HiveInfo:
    """Give the hive that an operation names."""
    if operation.hive_id is None:
        raise Conflict("There are several hives.", code="hive_id_needed")
    return hive_named(operation.hive_id)


def hive_named(hive_id: str) -> nodes.HiveInfo:
    for each in HIVES:
        if each.hive_id == hive_id:
            if each.state == "lost":
                raise Unavailable(f"Hive {hive_id!r} does not answer.", code="hive_unreachable")
            return each
    raise NotFound(f"No hive {hive_id!r}.", code="hive_not_found")


def worker(operation: ops.WorkerGet | ops.WorkerDrain | ops.WorkerStop | ops.WorkerLog) -> nodes.WorkerInfo:
    for each in hive(operation).workers:
        if each.worker_id == operation.worker_id:
            return each
    raise NotFound(f"No worker {operation.worker_id!r}.", code="no_such_worker")


class Scripted:
    """The handlers; what is changed by one is seen by the next."""

    def __init__(self) -> None:
        self.draining = False
        self.searches = 0

    async def status(self, _: ops.Status, __: JobContext) -> nodes.StatusResult:
        return nodes.StatusResult(version="0.1.0", uptime_s=61, hives=HIVES)

    async def hive_list(self, _: ops.HiveList, __: JobContext) -> nodes.HiveListResult:
        return nodes.HiveListResult(hives=HIVES)

    async def hive_get(self, op: ops.HiveGet, _: JobContext) -> nodes.HiveInfo:
        return hive_named(op.hive_id)

    async def hive_forget(self, op: ops.HiveForget, _: JobContext) -> nodes.HiveInfo:
        found = {each.hive_id: each for each in HIVES}[op.hive_id]
        if found.state != "lost":
            raise Conflict(f"Hive {found.hive_id} is {found.state}, not lost.", code="hive_not_lost")
        return found

    async def hive_drain(self, op: ops.HiveDrain, _: JobContext) -> nodes.HiveDrained:
        hive(op)
        return nodes.HiveDrained(draining=op.draining, running=2 if op.draining else 0)

    async def hive_check(self, op: ops.HiveCheck, context: JobContext) -> nodes.CheckResult:
        found = [GOOD, ODD, BAD] if hive(op).hive_id == "box1" else [GOOD]
        for finding in found[:2]:
            context.narrate("hive_check", finding.message, finding)
        return nodes.CheckResult(ok=BAD not in found, findings=found)

    async def queen_check(self, _: ops.QueenCheck, context: JobContext) -> nodes.CheckResult:
        context.narrate("queen_check", GOOD.message, GOOD)
        return nodes.CheckResult(ok=True, findings=[GOOD])

    async def device_list(self, op: ops.DeviceList, _: JobContext) -> nodes.DeviceListResult:
        return nodes.DeviceListResult(devices=hive(op).devices)

    async def worker_list(self, op: ops.WorkerList, _: JobContext) -> nodes.WorkerListResult:
        return nodes.WorkerListResult(workers=hive(op).workers)

    async def worker_get(self, op: ops.WorkerGet, _: JobContext) -> nodes.WorkerInfo:
        return worker(op)

    async def worker_drain(self, op: ops.WorkerDrain, _: JobContext) -> nodes.WorkerInfo:
        return msgspec.structs.replace(worker(op), state="draining" if op.draining else "ready")

    async def worker_log(self, op: ops.WorkerLog, context: JobContext) -> nodes.WorkerLogResult:
        worker(op)
        lines = [f"line {number} {HOSTILE if number == 1 else ''}".rstrip() for number in range(op.lines)]
        context.narrate("worker_log", "\n".join(lines), lines=len(lines))
        if op.follow:
            await anyio.sleep_forever()
        return nodes.WorkerLogResult(worker_id=op.worker_id, lines=op.lines)

    async def log_search(self, op: ops.LogSearch, _: JobContext) -> nodes.LogSearchResult:
        """Tell one line more each time; `quiet` is a request that nobody knows."""
        self.searches += 1
        lines = [
            nodes.LogLine(
                timestamp="2026-01-02T03:04:05.678901Z",
                service="queen",
                level="info",
                event="job_accepted",
                facts={"job_id": "job-1", "code": None, "details": f"two words {HOSTILE}"},
            ),
            nodes.LogLine(
                timestamp="2026-01-02T03:04:05.700Z",
                service="worker/w-ready",
                level="error",
                event="job_failed",
                facts={"worker_id": "w-ready", "hive_id": "box1", "count": 3},
            ),
            *(
                nodes.LogLine(timestamp="", service="hive/box1", level="info", event=f"poll {n}")
                for n in range(self.searches)
            ),
        ]
        return nodes.LogSearchResult(
            correlation_id=op.correlation_id,
            lines=[] if op.correlation_id == "quiet" else lines,
            silent={"box2": "It has been silent for 7 s."},
            notes=["queen has its own lines since 03:00."],
        )

    async def process_list(self, op: ops.WorkerProcessList, _: JobContext) -> nodes.WorkerProcessListResult:
        return nodes.WorkerProcessListResult(processes=[OURS, FOREIGN] if hive(op).workers else [])

    async def process_get(self, op: ops.WorkerProcessGet, _: JobContext) -> nodes.WorkerProcessInfo:
        hive(op)
        for each in (OURS, FOREIGN):
            if each.pid == op.pid:
                return each
        raise NotFound(f"No process {op.pid}.", code="process_not_found")

    async def process_delete(self, op: ops.WorkerProcessDelete, _: JobContext) -> nodes.WorkerProcessInfo:
        if op.pid == FOREIGN.pid:
            raise Conflict(f"Process {op.pid} is not this hive's.", code="not_ours")
        return OURS

    async def model_list(self, op: ops.ModelList, _: JobContext) -> nodes.ModelListResult:
        return nodes.ModelListResult(models=hive(op).models)

    async def model_get(self, op: ops.ModelGet, _: JobContext) -> nodes.ModelInfo:
        return msgspec.structs.replace(LLAMA if op.model == LLAMA.model else SMALL, file_list=FILES)

    async def model_delete(self, op: ops.ModelDelete, _: JobContext) -> nodes.ModelDeleted:
        return nodes.ModelDeleted(model=op.model, freed=1_841_368)

    async def model_load(self, _: ops.ModelLoad, context: JobContext) -> nodes.WorkerInfo:
        context.narrate("worker_wake", "Waking w-ready.")
        return READY

    async def model_unload(self, op: ops.ModelUnload, _: JobContext) -> nodes.ModelUnloaded:
        return nodes.ModelUnloaded(model=op.model, workers=[READY])

    async def model_download(self, op: ops.ModelDownload, context: JobContext) -> nodes.ModelInfo:
        """Fetch three files in 17 steps; `endless` stops at half, `broken` fails there."""
        context.narrate("model_download_start", f"Fetching {op.model}: 3 files, 3.4 GB.")
        for step in range(1, 18):
            done = step * TOTAL // 17
            names = ["model-00001-of-00002.safetensors", f"{HOSTILE}/model-00002-of-00002.safetensors"]
            current = [
                FileProgress(path=name, bytes_done=done // 2, bytes_total=TOTAL // 2)
                for name in names[: 2 if step < 9 else 1]
            ]
            context.narrate(
                "model_download_progress",
                f"{op.model}: {done} of {TOTAL} bytes.",
                DownloadProgress(
                    model=op.model,
                    bytes_done=done,
                    bytes_total=TOTAL,
                    rate=45_600_000,
                    eta_s=(TOTAL - done) / 45_600_000,
                    files_done=1 if step < 9 else 2,
                    files_total=3,
                    current=current if step < 17 else [],
                ),
            )
            await anyio.sleep(0.05)
            if step == 8 and "endless" in op.model:
                await anyio.sleep_forever()
            if step == 8 and "broken" in op.model:
                raise Unavailable("The hub answered 503. Try again later.", code="hub_unavailable")
        context.narrate("model_download_complete", f"{op.model} is complete.")
        return nodes.ModelInfo(model=op.model, size=TOTAL, files=3)

    def handlers(self) -> dict[type[Operation], object]:
        return {
            ops.Status: self.status,
            ops.HiveList: self.hive_list,
            ops.HiveGet: self.hive_get,
            ops.HiveForget: self.hive_forget,
            ops.HiveDrain: self.hive_drain,
            ops.HiveCheck: self.hive_check,
            ops.QueenCheck: self.queen_check,
            ops.DeviceList: self.device_list,
            ops.WorkerList: self.worker_list,
            ops.WorkerGet: self.worker_get,
            ops.WorkerDrain: self.worker_drain,
            ops.WorkerLog: self.worker_log,
            ops.LogSearch: self.log_search,
            ops.WorkerProcessList: self.process_list,
            ops.WorkerProcessGet: self.process_get,
            ops.WorkerProcessDelete: self.process_delete,
            ops.ModelList: self.model_list,
            ops.ModelGet: self.model_get,
            ops.ModelDelete: self.model_delete,
            ops.ModelLoad: self.model_load,
            ops.ModelUnload: self.model_unload,
            ops.ModelDownload: self.model_download,
        }


async def main(port: int) -> int:
    configure_logging(service="queen")
    server = JobServer(service="queen", actor="queen", handlers=Scripted().handlers())  # type: ignore[arg-type]
    app = build_app(server, name="queen", service_id="queen", version="0")
    config = ServeConfig(host="127.0.0.1", port=port, drain_timeout_s=0.1)
    return await serve(app, server, bind("127.0.0.1", port), config)


if __name__ == "__main__":
    raise SystemExit(anyio.run(main, int(sys.argv[1])))
