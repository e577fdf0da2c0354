"""Which result each operation gives: the `data` of its `execute_complete`.

An operation that is not here has no handler anywhere in this version; it is 501.
"""

from typing import Any

from rbee_contracts import events, nodes, operations
from rbee_contracts.operations import Operation

RESULTS: dict[type[Operation], Any] = {
    operations.Infer: events.InferResult,
    operations.OpenAI: events.OpenAIResult,
    operations.Status: nodes.StatusResult,
    operations.HiveList: nodes.HiveListResult,
    operations.HiveGet: nodes.HiveInfo,
    operations.HiveForget: nodes.HiveInfo,
    operations.ScheduleExplain: events.Decision,
    operations.WorkerSpawn: events.SpawnedWorker,
    operations.WorkerList: nodes.WorkerListResult,
    operations.WorkerGet: nodes.WorkerInfo,
    operations.WorkerStop: nodes.WorkerInfo,
    operations.WorkerDrain: nodes.WorkerInfo,
    operations.WorkerLog: nodes.WorkerLogResult,
    operations.LogSearch: nodes.LogSearchResult,
    operations.WorkerProcessList: nodes.WorkerProcessListResult,
    operations.WorkerProcessGet: nodes.WorkerProcessInfo,
    operations.WorkerProcessDelete: nodes.WorkerProcessInfo,
    operations.DeviceList: nodes.DeviceListResult,
    operations.ModelList: nodes.ModelListResult,
    operations.ModelGet: nodes.ModelInfo,
    operations.ModelDownload: nodes.ModelInfo,
    operations.ModelDelete: nodes.ModelDeleted,
    operations.ModelLoad: nodes.WorkerInfo,
    operations.ModelUnload: nodes.ModelUnloaded,
    operations.HiveDrain: nodes.HiveDrained,
    operations.HiveCheck: nodes.CheckResult,
    operations.QueenCheck: nodes.CheckResult,
}
