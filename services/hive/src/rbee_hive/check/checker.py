"""The operation `hive_check`: gathers the facts in turn and narrates what they mean."""

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime

import anyio.to_thread

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import CheckResult, Finding, ServiceInfo
from rbee_contracts.operations import HiveCheck
from rbee_hive.check.facts import (
    QUEEN_S,
    EngineFacts,
    ask_hub,
    bounded,
    engine_facts,
    free_ports,
    look,
    open_files_limit,
    shm_size,
)
from rbee_hive.check.findings import (
    of_clock,
    of_devices,
    of_driver,
    of_engine,
    of_hub,
    of_models,
    of_open_files,
    of_ports,
    of_queen,
    of_shm,
    of_state,
)
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Devices
from rbee_job_client import JobClient
from rbee_job_server import Handlers, JobContext
from rbee_job_server.guards import FILES_BESIDE_CONNECTIONS


class HiveChecker:
    """Looks at everything in turn and narrates each finding. Changes nothing.

    Args:
        hub_endpoint: where models are downloaded from.
        engine: tells what is installed.
    """

    def __init__(
        self,
        config: HiveConfig,
        devices: Devices,
        hub_endpoint: str,
        engine: Callable[[], EngineFacts] = engine_facts,
    ) -> None:
        self._config = config
        self._devices = devices
        self._hub_endpoint = hub_endpoint
        self._engine = engine

    def table(self) -> Handlers:
        return {HiveCheck: self.run}

    async def run(self, _: HiveCheck, context: JobContext) -> CheckResult:
        """Check the hive, narrating each finding as it is made."""
        findings: list[Finding] = []
        for step in self._steps():
            for finding in await step():
                findings.append(finding)
                text = f"{finding.check}: {finding.message}"
                if finding.remedy is not None:
                    text += f" {finding.remedy}"
                context.narrate("hive_check", text, finding)
        return CheckResult(ok=all(finding.status != "failed" for finding in findings), findings=findings)

    def _steps(self) -> Iterable[Callable[[], Awaitable[Iterable[Finding]]]]:
        return (
            self._check_engine,
            self._check_devices,
            self._check_folders,
            self._check_machine,
            self._check_queen,
            self._check_hub,
        )

    async def _check_engine(self) -> Iterable[Finding]:
        is_sim = self._config.worker_engine == "sim"
        facts = await anyio.to_thread.run_sync(self._engine)
        devices = await bounded(lambda: self._devices.last)
        gpus = [device for device in devices or [] if device.kind == "cuda"]
        return [
            *of_engine(facts, is_sim=is_sim),
            *of_driver(
                facts,
                driver=self._devices.driver,
                cuda=self._devices.cuda,
                why_none=self._devices.why_no_nvml,
                gpus=len(gpus),
                is_sim=is_sim,
            ),
        ]

    async def _check_devices(self) -> Iterable[Finding]:
        return of_devices(await bounded(self._devices.read))

    async def _check_folders(self) -> Iterable[Finding]:
        config = self._config
        models = await look(config.models_dir)
        roots = [(root, await look(root)) for root in config.model_roots]
        return [*of_models(models, roots), *of_state(await look(config.state_dir))]

    async def _check_machine(self) -> Iterable[Finding]:
        ports = self._config.worker_ports
        needed = self._config.limits.max_connections + FILES_BESIDE_CONNECTIONS
        return [
            *of_ports(ports, await anyio.to_thread.run_sync(free_ports, ports)),
            *of_open_files(open_files_limit(), needed),
            *of_shm(shm_size()),
            *of_clock(datetime.now(UTC)),
        ]

    async def _check_queen(self) -> Iterable[Finding]:
        url = self._config.queen_url
        info: ServiceInfo | None = None
        error: RbeeError | None = None
        if url is not None:
            try:
                async with JobClient(url, token=self._config.access.token) as queen:
                    info = await queen.get_json("/v1/info", ServiceInfo, timeout_s=QUEEN_S)
            except RbeeError as exc:
                error = exc
        return of_queen(url, info, error)

    async def _check_hub(self) -> Iterable[Finding]:
        return of_hub(self._hub_endpoint, await ask_hub(self._hub_endpoint))
