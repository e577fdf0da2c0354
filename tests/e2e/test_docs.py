"""Every example in the README and the docs, run as it stands but for the queen's address."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from rbee_processes import REPOSITORY, Cluster, stream

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RUNNABLE = {"bash", "sh", "python", "javascript"}
ELSEWHERE = {
    *("activate", "make-demo", "rbee-up", "rbee-status", "rbee-infer", "workers", "jobs", "scripts"),
    *("models", "machines"),
}
"""Run by test_commands.py."""

WITH_CLIENTS = {
    *(
        "openai-curl",
        "openai-python",
        "openai-node",
        "openai-anthropic",
        "openai-litellm",
        "openai-langchain",
    ),
    *("openai-cancel", "openai-job"),
}
"""Run by test_openai_vllm.py."""

WITH_A_TOKEN = {"token-make", "token-curl"}
"""Run by test_access_faults.py."""

WITH_COMPOSE = {"compose-up", "compose-chat", "compose-status", "compose-stop"}
"""Run by containers/test_compose.py."""


class Block(NamedTuple):
    name: str | None
    language: str
    code: str
    page: str


def blocks() -> list[Block]:
    """Give every fenced block, with the name in the `<!-- test: NAME -->` before it."""
    fence = re.compile(
        r"^(?P<indent> *)(?:<!-- test: (?P<name>[a-z-]+) -->\n(?P=indent))?```(?P<language>\w*)[^\n]*\n"
        r"(?P<code>.*?)^(?P=indent)```$",
        re.MULTILINE | re.DOTALL,
    )
    return [
        Block(found["name"], found["language"], textwrap.dedent(found["code"]), page.name)
        for page in PAGES
        for found in fence.finditer(page.read_text())
    ]


def block(name: str) -> Block:
    (found,) = [block for block in blocks() if block.name == name]
    return found


def run(cluster: Cluster, name: str, tmp_path: Path, *args: str, **environ: str) -> str:
    """Run a block in an empty folder; give its output."""
    found = block(name)
    code = found.code.replace("http://localhost:7833", cluster.queen.url)
    assert cluster.queen.url in code or "localhost" not in code
    suffix, program = {
        "bash": (".sh", "bash"),
        "python": (".py", sys.executable),
        "javascript": (".mjs", "node"),
    }[found.language]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    script = tmp_path / f"example{suffix}"
    script.write_text(code)
    done = subprocess.run(
        [program, str(script), *args],
        cwd=tmp_path,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


EXPECTED = " it starts when somebody reads it, every event in it has a number"


@pytest.mark.parametrize("name", ["client-python", "client-javascript"])
def test_a_complete_client_prints_the_answer(cluster: Cluster, tmp_path: Path, name: str) -> None:
    assert run(cluster, name, tmp_path).startswith(EXPECTED)


def test_the_curl_client_shows_the_events(cluster: Cluster, tmp_path: Path) -> None:
    output = run(cluster, "client-curl", tmp_path)

    assert '"action":"token"' in output
    assert output.rstrip().endswith("data: [DONE]")


def test_the_readmes_three_calls(cluster: Cluster, tmp_path: Path) -> None:
    job_id = json.loads(run(cluster, "readme-submit", tmp_path))["job_id"]
    streamed = run(cluster, "readme-stream", tmp_path, JOB_ID=job_id)
    assert '"message":" it"' in streamed

    job_id = json.loads(run(cluster, "submit", tmp_path))["job_id"]
    cancelled = json.loads(run(cluster, "readme-cancel", tmp_path, JOB_ID=job_id))
    assert cancelled == json.loads(run(cluster, "cancel", tmp_path, JOB_ID=job_id))
    assert cancelled == {"job_id": job_id, "status": "cancelled"}


def test_the_metrics_are_there_to_look_at(cluster: Cluster, tmp_path: Path) -> None:
    assert "rbee_build_info{" in run(cluster, "metrics-curl", tmp_path)


def test_the_resuming_reader(cluster: Cluster, tmp_path: Path) -> None:
    job_id = json.loads(run(cluster, "readme-submit", tmp_path))["job_id"]

    assert run(cluster, "resume-python", tmp_path, job_id).startswith(EXPECTED)
    with stream(cluster.queen.url, job_id) as frames:
        assert [event for _, event in frames][-1]["action"] == "execute_complete"


def test_the_backup_of_a_running_queen(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run({"operation": "status"})
    state = tmp_path / ".local/state/rbee"
    state.mkdir(parents=True)
    port = cluster.queen.url.rpartition(":")[2]
    (state / "queen-7833").symlink_to(cluster.folder / f"q/queen-{port}")
    run(cluster, "backup", tmp_path, HOME=str(tmp_path))

    with contextlib.closing(sqlite3.connect(tmp_path / "queen-backup.db")) as backup:
        (jobs,) = backup.execute("SELECT count(*) FROM jobs").fetchone()
    assert jobs > 0


def test_every_named_example_is_run_here_or_says_where() -> None:
    source = Path(__file__).read_text()
    runnable = [block for block in blocks() if block.language in RUNNABLE and block.page != "README.md"]
    named = [block.name for block in blocks() if block.name]

    assert [block.code for block in runnable if block.name is None and "JOB_ID" not in block.code] == []
    assert len(named) == len(set(named))
    assert [name for name in named if f'"{name}"' not in source] == []


def test_every_error_code_in_the_docs_is_one_that_the_code_gives() -> None:
    page = (REPOSITORY / "docs/architecture/job-based-pattern.md").read_text()
    sources = "".join(path.read_text() for path in REPOSITORY.glob("*/*/src/**/*.py"))
    tables = page[page.index("## Errors when you submit") : page.index("## Best practices")]
    codes = {
        code
        for row in re.findall(r"^\| (`[^|]+) \|", tables, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", row)
    }

    assert len(codes) > 20
    assert [code for code in sorted(codes) if f'"{code}"' not in sources] == []
