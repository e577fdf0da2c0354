"""Every client people have, and every request of a table, against real vLLM: straight, and through rbee."""

import json
import os
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest
from openai_table import (
    CHAT,
    COLOURS,
    EMBED,
    MESSAGES,
    ROWS,
    SAY,
    TEXT,
    TOOL,
    VLLM_PATHS,
    Row,
    collapsed,
    comparable,
)
from rbee_processes import MODELS, REPOSITORY, Cluster, Service, quickest, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TEXT_ARGS = [
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # A model this small would fill its tokens with white space.
    *("--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}'),
]
EMBED_ARGS = ["--runner", "pooling", "--convert", "embed"]

PATIENCE_S = 300.0
STRICT_TOOL: Any = {"type": "function", "function": TOOL["function"] | {"strict": True}}
QUIET = os.environ | {"LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
"""The environment of clients that would speak to others than us."""

GREEDY: Any = {"temperature": 0}

FREED_S = 1.0
"""What is promised; what a hive tells of its engine is up to half a second old."""


class Served(NamedTuple):
    """rbee with a worker of each model, and the same models straight, by model."""

    cluster: Cluster
    straight: dict[str, str]

    @property
    def url(self) -> str:
        return self.cluster.queen.url

    def running(self) -> int:
        """Requests in the engines, by what their hive last heard."""
        workers = self.cluster.run({"operation": "worker_list", "hive_id": self.cluster.hive_id})["workers"]
        return sum(worker["running"] + worker["waiting"] for worker in workers)

    def until_idle(self) -> None:
        until(lambda: self.running() == 0, "the engine is free")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openai")
    models = folder / "models"
    for name in (TEXT, EMBED):
        shutil.copytree(MODELS / "rbee-tiny", models / name)
    straight: dict[str, Service] = {}
    write_adapter(folder / "loud", models / TEXT)
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"loud={folder / 'loud'}"]
    args = {TEXT: [*TEXT_ARGS, *lora], EMBED: EMBED_ARGS}
    queen_args = ["--alias", f"gpt-4o={TEXT}", "--adapter", f"loud={TEXT}"]
    with Cluster(folder, models=models, queen_args=queen_args) as cluster:
        try:
            for name, extra in args.items():
                options = ["--port", "0", "--model", str(models / name), "--", *extra]
                straight[name] = Service("rbee-worker", options, folder / f"{name}.log", cluster.marker)
            for name, extra in args.items():
                cluster.spawn(name, *extra)
            for service in straight.values():
                until(partial(_is_ready, service.url), "vLLM is ready", 900)
            yield Served(cluster, {name: service.url for name, service in straight.items()})
        finally:
            for service in straight.values():
                service.terminate()


def write_adapter(folder: Path, model: Path) -> None:
    """Write a LoRA adapter that changes what the model says."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], 8
    head = config.get("head_dim") or hidden // heads
    numbers = random.Random(0)
    header: dict[str, Any] = {}
    data = array("f")
    for layer in range(config["num_hidden_layers"]):
        for part, shape in {"lora_A": (rank, hidden), "lora_B": (heads * head, rank)}.items():
            begin = len(data) * data.itemsize
            data.extend(numbers.gauss(0, 1) for _ in range(shape[0] * shape[1]))
            header[f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [begin, len(data) * data.itemsize],
            }
    folder.mkdir()
    head_bytes = json.dumps(header).encode()
    head_bytes += b" " * (-len(head_bytes) % 8)
    file = len(head_bytes).to_bytes(8, "little") + head_bytes + data.tobytes()
    (folder / "adapter_model.safetensors").write_bytes(file)
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(
        json.dumps(told | {"task_type": "CAUSAL_LM", "base_model_name_or_path": TEXT})
    )


def _is_ready(url: str) -> bool:
    return httpx.get(f"{url}/ready").status_code == 200


# --- the table -----------------------------------------------------------------------------------------


class Said(NamedTuple):
    status: int
    content_type: str
    answer: Any


def ask(url: str, path: str, body: dict[str, Any]) -> Said:
    answer = httpx.post(url + path, json=body, timeout=PATIENCE_S)
    content_type = answer.headers["content-type"]
    if content_type.startswith("text/event-stream"):
        return Said(answer.status_code, content_type, collapsed(_frames(answer.text)))
    return Said(answer.status_code, content_type, comparable(answer.json()))


def _frames(text: str) -> list[tuple[str, Any]]:
    frames = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line)
        assert set(fields) <= {"event", "data"}
        if fields.get("data") == "[DONE]":
            frames.append(("[DONE]", None))
        elif fields:
            frames.append((fields.get("event", ""), json.loads(fields["data"])))
    return frames


def test_the_table_is_large_and_its_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 90


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_vllm_says_the_same_straight_and_through_rbee(served: Served, row: Row) -> None:
    through = ask(served.url, row.path, row.body)
    straight = ask(served.straight[row.model], VLLM_PATHS.get(row.path, row.path), row.body)

    assert through == straight
    assert straight.status < 500 or straight.status == 501


# --- clients -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def job_of(served: Served, job_id: str) -> dict[str, Any]:
    record: dict[str, Any] = httpx.get(f"{served.url}/v1/jobs/{job_id}").json()
    return record


def test_openai_chat_streams_what_it_says_at_once(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=TEXT, messages=SAY, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=TEXT,
        messages=SAY,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def test_openai_tools_schema_logprobs_n_stop_and_seed(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    called = create(
        model=TEXT,
        messages=SAY,
        max_tokens=400,
        temperature=2,
        seed=1,
        tools=[STRICT_TOOL],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    )
    schema = create(
        model=TEXT,
        messages=SAY,
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": COLOURS}},
    )
    several = create(model=TEXT, messages=SAY, max_tokens=4, n=3, seed=5, logprobs=True, top_logprobs=2)
    again = create(model=TEXT, messages=SAY, max_tokens=4, n=3, seed=5, logprobs=True, top_logprobs=2)
    stopped = create(model=TEXT, messages=SAY, max_tokens=50, temperature=0, stop=["e"])

    calls: Any = called.choices[0].message.tool_calls
    assert json.loads(calls[0].function.arguments)["colour"] in ("red", "green")
    assert json.loads(schema.choices[0].message.content or "")["colour"] in ("red", "green")
    assert [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
    assert len(several.choices) == 3
    assert several.choices[0].logprobs is not None
    assert len(several.choices[0].logprobs.content or []) == 4
    assert stopped.choices[0].finish_reason == "stop"


def test_openai_completions_embeddings_responses_and_models(client: openai.OpenAI, served: Served) -> None:
    completion = client.completions.create(model=TEXT, prompt="A job is", max_tokens=5, temperature=0)
    pieces = client.completions.create(
        model=TEXT, prompt="A job is", max_tokens=5, temperature=0, stream=True
    )
    embedded = client.embeddings.create(model=EMBED, input=["A job", "A hive"])
    floats = client.embeddings.create(model=EMBED, input="A job", encoding_format="float")
    response = client.responses.create(model=TEXT, input="A job is", max_output_tokens=5, temperature=0)
    events = list(
        client.responses.create(model=TEXT, input="A job is", max_output_tokens=5, temperature=0, stream=True)
    )
    listed = {model.id: model for model in client.models.list()}
    # Right after an answer the hive's last heartbeat may still tell the worker as busy with it.
    until(lambda: client.models.retrieve("gpt-4o").model_dump()["state"] == "ready", "it is ready again")
    one = client.models.retrieve("gpt-4o")

    assert "".join(chunk.choices[0].text for chunk in pieces) == completion.choices[0].text
    assert len(embedded.data) == 2
    assert embedded.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-5)
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert response.output_text
    assert set(listed) == {TEXT, EMBED, "gpt-4o", "loud"}
    told = one.model_dump()
    assert (told["root"], told["max_model_len"]) == (TEXT, 2048)


def test_an_alias_is_answered_as_its_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=SAY, max_tokens=2)

    assert answer.model == TEXT


def test_an_adapter_is_asked_by_its_own_name(client: openai.OpenAI, served: Served) -> None:
    ask: Any = {"messages": SAY, "max_tokens": 20, "temperature": 0}
    plain = client.chat.completions.create(model=TEXT, **ask)
    loud = client.chat.completions.create(model="loud", **ask)
    straight = openai.OpenAI(base_url=f"{served.straight[TEXT]}/v1", api_key="none")
    with straight:
        expected = straight.chat.completions.create(model="loud", **ask)

    assert loud.model == "loud"
    assert loud.choices[0].message.content == expected.choices[0].message.content
    assert loud.choices[0].message.content != plain.choices[0].message.content


def test_a_request_is_a_job_with_its_usage(client: openai.OpenAI, served: Served) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=TEXT,
        messages=SAY,
        max_tokens=3,
        temperature=0,
        extra_headers={"X-Correlation-ID": "corr-openai-1"},
    )
    record = job_of(served, raw.headers["X-Job-ID"])

    assert raw.headers["X-Correlation-ID"] == record["correlation_id"] == "corr-openai-1"
    assert (record["operation"], record["model"], record["state"]) == ("openai", TEXT, "completed")
    assert record["usage"]["completion_tokens"] == 3
    assert "corr-openai-1" in raw.parse().id


def test_openai_errors_are_the_right_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean rbee-tiny") as missing:
        client.chat.completions.create(model="rbee-tin", messages=SAY)
    with pytest.raises(openai.BadRequestError, match="temperature must be non-negative") as bad:
        client.chat.completions.create(model=TEXT, messages=SAY, temperature=-1)

    assert missing.value.code == "model_not_found"
    assert bad.value.param == "temperature"


LONG: dict[str, Any] = {"model": TEXT, "messages": SAY, "max_tokens": 1900, "n": 32}
"""Half a minute of text, so that the engine is still at work when a busy machine comes to leave it."""


def long(client: openai.OpenAI, **fields: Any) -> Any:
    """Ask for more than anybody reads."""
    return client.chat.completions.create(**LONG, extra_body={"ignore_eos": True}, **fields)


def until_cancelled(served: Served, job_id: str) -> None:
    until(lambda: job_of(served, job_id)["state"] == "cancelled", "the job is cancelled")


def test_leaving_in_mid_stream_frees_the_engine(client: openai.OpenAI, served: Served) -> None:
    stream = long(client, stream=True)
    for _ in range(20):
        next(stream)
    job_id = stream.response.headers["X-Job-ID"]
    stream.close()

    until_cancelled(served, job_id)
    served.until_idle()


def test_a_clients_timeout_frees_the_engine(client: openai.OpenAI, served: Served) -> None:
    correlation_id = "timed-out"
    with pytest.raises(openai.APITimeoutError):
        long(client, timeout=3.0, extra_headers={"X-Correlation-ID": correlation_id})

    def job_id() -> str | None:
        jobs = httpx.get(f"{served.url}/v1/jobs?operation=openai").json()["jobs"]
        return next((job["job_id"] for job in jobs if job["correlation_id"] == correlation_id), None)

    until_cancelled(served, until(job_id, "the job is there"))
    served.until_idle()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_the_engine_is_free_a_second_after_its_client_has_left(
    client: openai.OpenAI, served: Served, stream: bool
) -> None:
    body = json.dumps(LONG | {"ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body

    def leave() -> float:
        with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)) as caller:
            caller.sendall(request)
            until(lambda: served.running() > 0, "the engine is at work")
        left = time.monotonic()
        served.until_idle()
        return time.monotonic() - left

    assert quickest(leave(), FREED_S, leave) < FREED_S


def test_delete_ends_a_stream_with_an_error_the_client_raises(client: openai.OpenAI, served: Served) -> None:
    stream = long(client, stream=True)
    next(stream)
    job_id = stream.response.headers["X-Job-ID"]
    assert httpx.delete(f"{served.url}/v1/jobs/{job_id}").status_code == 200

    with pytest.raises(openai.APIError, match="Cancelled on request"):
        list(stream)
    served.until_idle()


@pytest.mark.anyio
@pytest.mark.parametrize("transport", ["httpx", "aiohttp"])
async def test_openai_async(served: Served, transport: str) -> None:
    http = openai.DefaultAioHttpClient() if transport == "aiohttp" else openai.DefaultAsyncHttpxClient()
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/openai/v1", api_key="none", max_retries=0, http_client=http
    ) as client:
        whole = await client.chat.completions.create(model=TEXT, messages=SAY, max_tokens=8, temperature=0)
        stream = await client.chat.completions.create(
            model=TEXT, messages=SAY, max_tokens=8, temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=TEXT, messages=SAY, top_p=7)

    assert text == whole.choices[0].message.content


def test_anthropic(served: Served) -> None:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        whole = client.messages.create(model=TEXT, max_tokens=8, messages=SAY, extra_body=GREEDY)
        with client.messages.stream(model=TEXT, max_tokens=8, messages=SAY, extra_body=GREEDY) as stream:
            text = "".join(stream.text_stream)
            usage = stream.get_final_message().usage
        counted = client.messages.count_tokens(model=TEXT, messages=SAY)
        listed = [model.id for model in client.models.list()]
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(model="rbee-tin", max_tokens=8, messages=SAY)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model=TEXT, max_tokens=8, messages=SAY, extra_body={"temperature": -1})

    block = whole.content[0]
    assert block.type == "text"
    assert text == block.text
    assert usage.output_tokens == whole.usage.output_tokens == 8
    assert counted.input_tokens == whole.usage.input_tokens
    assert TEXT in listed
    body: Any = missing.value.body
    assert body["error"]["type"] == "not_found_error"


def test_litellm(served: Served) -> None:
    script = """
import json, sys, litellm
url = sys.argv[1]
ask = dict(model="openai/rbee-tiny", api_base=url + "/v1", api_key="none", max_tokens=8, temperature=0,
           messages=[{"role": "user", "content": "A job is an event stream:"}], num_retries=0)
whole = litellm.completion(**ask)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
embedded = litellm.embedding(
    model="openai/rbee-embed", input=["A job"], api_base=url + "/v1", api_key="none", encoding_format="float"
)
try:
    litellm.completion(**ask | {"model": "openai/rbee-tin"})
except litellm.NotFoundError as exc:
    missing = str(exc)
print(json.dumps([whole.choices[0].message.content, "".join(pieces), len(embedded.data), missing]))
"""
    whole, pieces, vectors, missing = run_python(script, served.url)

    assert (pieces, vectors) == (whole, 1)
    assert "Did you mean rbee-tiny" in missing


def test_langchain(served: Served) -> None:
    script = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
url = sys.argv[1] + "/v1"
chat = ChatOpenAI(model="rbee-tiny", base_url=url, api_key="none", max_tokens=8, temperature=0, max_retries=0)
whole = chat.invoke("A job is an event stream:")
pieces = "".join(chunk.content for chunk in chat.stream("A job is an event stream:"))
vectors = OpenAIEmbeddings(
    model="rbee-embed", base_url=url, api_key="none", check_embedding_ctx_length=False
).embed_documents(["A job", "A hive"])
print(json.dumps([whole.content, pieces, len(vectors), whole.usage_metadata["output_tokens"]]))
"""
    whole, pieces, vectors, tokens = run_python(script, served.url)

    assert (pieces, vectors, tokens) == (whole, 2, 8)


def run_python(script: str, url: str) -> Any:
    """Run a client in a process of its own: what it warns of when imported is not ours."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, url],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=QUIET,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_openai_for_node(served: Served) -> None:
    folder = REPOSITORY / "tests/conformance/openai"
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm (Debian: nodejs, npm)")
    install_node_modules(folder, npm)
    done = subprocess.run(
        [node, str(folder / "client.mjs"), f"{served.url}/v1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)

    assert told["pieces"] == told["whole"]
    assert told["colour"] in ("red", "green")
    assert told["vectors"] == 2
    assert told["missing"] == {"status": 404, "code": "model_not_found", "name": "NotFoundError"}
    assert told["bad"] == {"status": 400, "param": "temperature"}
    assert told["models"] == [EMBED, TEXT, "gpt-4o", "loud"]
    until_cancelled(served, told["left"])
    served.until_idle()


def install_node_modules(folder: Path, npm: str) -> None:
    lock, installed = folder / "package-lock.json", folder / "node_modules/.package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=5"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installed.touch()


def test_no_request_or_answer_is_in_a_log_or_in_the_store(served: Served) -> None:
    body = {"model": TEXT, "messages": [{"role": "wizard", "content": "Heffalump zanzibar"}], "max_tokens": 5}
    for path in (CHAT, MESSAGES):
        httpx.post(served.url + path, json=body, timeout=PATIENCE_S)
        httpx.post(served.url + path, json=body | {"messages": [{"role": "user", "content": "Heffalump"}]})

    files = list(served.cluster.folder.rglob("*"))
    logs, stores = ([file for file in files if file.suffix == suffix] for suffix in (".log", ".db"))
    assert logs
    assert stores
    for file in logs:
        assert b"Heffalump" not in file.read_bytes(), file
    for file in stores:
        # What was erased may stay in the log of the database for a while, and not in the database.
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
            assert b"Heffalump" not in store.serialize(), file


# --- the page ------------------------------------------------------------------------------------------


def example(served: Served, name: str, folder: Path, **environ: str) -> str:
    """Run an example of the page as it stands, but for the queen's address; give its output."""
    page = (REPOSITORY / "docs/openai.md").read_text()
    found = re.search(rf"<!-- test: {name} -->\n```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    suffix, program = {
        "bash": ("sh", "bash"),
        "python": ("py", sys.executable),
        "javascript": ("mjs", "node"),
    }[found[1]]
    script = folder / f"example.{suffix}"
    script.write_text(found[2].replace("http://localhost:7833", served.url))
    done = subprocess.run(
        [program, str(script)],
        cwd=folder,
        env=QUIET | environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pages_curl_examples(served: Served, client: openai.OpenAI, tmp_path: Path) -> None:
    assert json.loads(example(served, "openai-curl", tmp_path))["usage"]["completion_tokens"] == 20
    assert json.loads(example(served, "openai-job", tmp_path))["job_id"].startswith("job-")
    stream = long(client, stream=True)
    job_id = stream.response.headers["X-Job-ID"]
    cancelled = example(served, "openai-cancel", tmp_path, JOB_ID=job_id)
    stream.close()

    assert json.loads(cancelled) == {"job_id": job_id, "status": "cancelled"}
    served.until_idle()


@pytest.mark.parametrize("name", ["openai-python", "openai-anthropic", "openai-litellm", "openai-langchain"])
def test_the_pages_python_examples(served: Served, tmp_path: Path, name: str) -> None:
    assert len(example(served, name, tmp_path)) > 20


def test_the_pages_node_example(served: Served, tmp_path: Path) -> None:
    folder = REPOSITORY / "tests/conformance/openai"
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm (Debian: nodejs, npm)")
    install_node_modules(folder, npm)
    (tmp_path / "node_modules").symlink_to(folder / "node_modules")

    assert len(example(served, "openai-node", tmp_path)) > 20
