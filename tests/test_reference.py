"""The reference page is written from the contracts; services execute what it says they do."""

import subprocess
import sys
from typing import get_args

from rbee_processes import REPOSITORY

from rbee_contracts.operations import OPERATIONS, OnHive
from rbee_contracts.results import RESULTS
from rbee_hive.check import HiveChecker
from rbee_hive.handlers import HiveHandlers
from rbee_hive.log_search import HiveLogs
from rbee_hive.models import ModelHandlers
from rbee_hive.supervisor.handlers import WorkerHandlers
from rbee_queen.fleet import Fleet
from rbee_queen.handlers import QueenHandlers


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "scripts/reference.py", "--check"]

    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0, "run: python scripts/reference.py"


def test_an_operation_has_a_result_where_and_only_where_a_service_executes_it() -> None:
    none: object = None
    tables = [
        HiveHandlers("h", none, none).table(),  # type: ignore[arg-type]
        WorkerHandlers(none, none).table(),  # type: ignore[arg-type]
        ModelHandlers(none, none).table(),  # type: ignore[arg-type]
        HiveChecker(none, none, "").table(),  # type: ignore[arg-type]
        HiveLogs(none, "", none).table(),  # type: ignore[arg-type]
    ]
    hive = {operation for table in tables for operation in table}
    assert len(hive) == sum(map(len, tables)), "an operation has two handlers, of which one is never called"
    queen = set(QueenHandlers(Fleet(lambda: 0.0), none).table())  # type: ignore[arg-type]

    assert hive | queen == set(RESULTS)
    assert queen >= hive, "the queen does not forward what a hive can do"
    assert hive <= set(get_args(OnHive)) | {OPERATIONS["infer"], OPERATIONS["openai"]}
