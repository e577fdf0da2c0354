"""The load client: many streams at once, in a process of its own that is cheap and not counted.

Reads a `Load` from standard input and writes a `LoadResult` to standard output. While streams run it only
stores what arrives and when; tokens are read from that afterwards. The sim engine's tokens are numbered, so
one that is lost, doubled or out of order is seen by its content.

    echo '{...}' | python -m benchmarks.load
"""

import asyncio
import re
import sys
import time
from bisect import bisect_left
from collections import Counter
from itertools import pairwise
from typing import Literal, cast

import msgspec
import uvloop
from msgspec import Struct

from benchmarks.measure import Usage, percentile, usages

TOKEN = re.compile(rb'" tok(\d+)"')
VOCABULARY = 1000
END = b"\r\n0\r\n\r\n"
PROMPT = "hello " * 50


class Load(Struct, frozen=True, kw_only=True):
    """What to do.

    Args:
        protocol: `openai`: one streamed chat completion; `jobs`: submit, then read the job's stream.
        tokens: of each stream; at most the sim engine's vocabulary.
        stagger_ms: between the starts of two streams.
        probes: short streams of two tokens, one after the other and before the load, for time to first token.
        services: the processes whose CPU time and memory are read; name to ids.
    """

    port: int
    protocol: Literal["openai", "jobs"]
    model: str
    streams: int
    tokens: int
    stagger_ms: float = 1.0
    probes: int = 0
    services: dict[str, list[int]] = {}
    timeout_s: float = 60.0


class ServiceCost(Struct, frozen=True, kw_only=True):
    """CPU seconds over the whole load; and while every stream ran and none had ended."""

    cpu_s: float
    steady_cpu_s: float
    rss_bytes: int


class LoadResult(Struct, frozen=True, kw_only=True):
    """What came of it. Times in milliseconds; to first token, of the probes where there were any."""

    streams: int
    failed: list[str]
    tokens: int
    lost: int
    doubled: int
    disordered: int
    elapsed_s: float
    tokens_per_s: float
    steady_s: float
    steady_tokens: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    services: dict[str, ServiceCost]


class Stream(asyncio.Protocol):
    """One request, from its connection to the end of its answer."""

    def __init__(self, load: Load, tokens: int, run: "Run") -> None:
        self._load = load
        self._tokens = tokens
        self._run = run
        self._transport: asyncio.WriteTransport | None = None
        self._accepted: bytes | None = b"" if load.protocol == "jobs" else None
        self._has_token = False
        self.sent = 0.0
        self.times: list[float] = []
        self.parts: list[bytes] = []
        self.ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport is none of asyncio's classes.
        self._transport = writer = cast(asyncio.WriteTransport, transport)
        path, body = request_of(self._load, self._tokens)
        self.sent = time.perf_counter()
        writer.write(_post(path, body))

    def data_received(self, data: bytes) -> None:
        if self._accepted is not None:
            self._take_accepted(data)
            return
        self.times.append(time.perf_counter())
        self.parts.append(data)
        if not self._has_token and b'" tok' in data:
            self._has_token = True
            self._run.on_first_token()
        if data.endswith(END) or (len(data) < len(END) and b"".join(self.parts[-8:]).endswith(END)):
            answer = self.parts[0]
            self._end(None if b" 200 " in answer[:16] else f"answered {answer[:200]!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection lost: {exc}")

    def _take_accepted(self, data: bytes) -> None:
        assert self._transport is not None
        self._accepted = (self._accepted or b"") + data
        head, found, body = self._accepted.partition(b"\r\n\r\n")
        if not found or not body.endswith(b"}"):
            return
        if b" 200 " not in head[:16]:
            self._end(f"not accepted: {self._accepted[:300]!r}")
            return
        url = msgspec.json.decode(body)["sse_url"]
        self._accepted = None
        self._transport.write(b"GET %b HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % url.encode())

    def _end(self, failure: str | None) -> None:
        if not self.ended.done():
            self._run.on_end()
            self.ended.set_result(failure)
            if self._transport is not None:
                self._transport.close()


class Run:
    """One load: its streams, and what the services had used at its four moments."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.moments: dict[str, tuple[float, dict[str, Usage]]] = {}
        self._waiting_for_token = load.streams

    def mark(self, moment: str) -> None:
        if moment not in self.moments:
            self.moments[moment] = (time.perf_counter(), usages(self.load.services))

    def on_first_token(self) -> None:
        self._waiting_for_token -= 1
        if self._waiting_for_token == 0:
            self.mark("all_run")

    def on_end(self) -> None:
        self.mark("one_ended")

    async def stream(self, tokens: int, after_s: float = 0.0) -> tuple[Stream, str | None]:
        await asyncio.sleep(after_s)
        stream = Stream(self.load, tokens, self)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: stream, "127.0.0.1", self.load.port)
            async with asyncio.timeout(self.load.timeout_s):
                return stream, await stream.ended
        except (OSError, TimeoutError) as exc:
            return stream, repr(exc)


async def probe(load: Load) -> list[float]:
    """Give the times to first token of streams that run alone."""
    times = []
    for _ in range(load.probes):
        stream, failure = await Run(msgspec.structs.replace(load, services={})).stream(2)
        tokens = read_tokens(stream)
        if failure is None and tokens:
            times.append((tokens[0][1] - stream.sent) * 1000)
    return sorted(times)


async def run_load(load: Load) -> LoadResult:
    """Carry out a load."""
    probed = await probe(load)
    run = Run(load)
    run.mark("begin")
    stagger_s = load.stagger_ms / 1000
    done = await asyncio.gather(*(run.stream(load.tokens, i * stagger_s) for i in range(load.streams)))
    run.mark("end")
    begin, begin_usage = run.moments["begin"]
    end, end_usage = run.moments["end"]
    steady_from, from_usage = run.moments.get("all_run", run.moments["end"])
    steady_to, to_usage = run.moments.get("one_ended", run.moments["end"])
    if steady_to < steady_from:
        steady_from, from_usage = steady_to, to_usage

    ttft, gaps, steady_tokens, count = [], [], 0, 0
    lost = doubled = disordered = 0
    answers = [read_tokens(stream) for stream, _ in done]
    first = Counter(tokens[0][0] for tokens in answers if tokens).most_common(1)
    for (stream, _), tokens in zip(done, answers, strict=True):
        places = [(number - first[0][0]) % VOCABULARY for number, _ in tokens] if first else []
        count += len(places)
        lost += load.tokens - len({place for place in places if place < load.tokens})
        doubled += len(places) - len(set(places))
        disordered += sum(later <= earlier for earlier, later in pairwise(places))
        steady_tokens += sum(steady_from < at <= steady_to for _, at in tokens)
        gaps += [(later - earlier) * 1000 for (_, earlier), (_, later) in pairwise(tokens)]
        if tokens:
            ttft.append((tokens[0][1] - stream.sent) * 1000)
    gaps.sort()
    ttft = probed or sorted(ttft)
    return LoadResult(
        streams=load.streams,
        failed=[
            failure or f"no token in {stream.parts[-1][-300:]!r}"
            for (stream, failure), tokens in zip(done, answers, strict=True)
            if failure is not None or not tokens
        ],
        tokens=count,
        lost=lost,
        doubled=doubled,
        disordered=disordered,
        elapsed_s=end - begin,
        tokens_per_s=count / (end - begin),
        steady_s=steady_to - steady_from,
        steady_tokens=steady_tokens,
        ttft_p50_ms=percentile(ttft, 0.5),
        ttft_p99_ms=percentile(ttft, 0.99),
        itl_p50_ms=percentile(gaps, 0.5),
        itl_p99_ms=percentile(gaps, 0.99),
        services={
            name: ServiceCost(
                cpu_s=end_usage[name].cpu_s - begin_usage[name].cpu_s,
                steady_cpu_s=to_usage[name].cpu_s - from_usage[name].cpu_s,
                rss_bytes=to_usage[name].rss_bytes,
            )
            for name in load.services
        },
    )


def request_of(load: Load, tokens: int) -> tuple[str, bytes]:
    """Give the path and the body that ask for a stream of exactly `tokens` tokens."""
    common = {"model": load.model, "max_tokens": tokens, "ignore_eos": True}
    if load.protocol == "jobs":
        return "/v1/jobs", msgspec.json.encode(common | {"operation": "infer", "prompt": PROMPT})
    messages = [{"role": "user", "content": PROMPT}]
    return "/v1/chat/completions", msgspec.json.encode(common | {"messages": messages, "stream": True})


def read_tokens(stream: Stream) -> list[tuple[int, float]]:
    """Give the number of each token of an answer, and when its last byte had arrived."""
    raw = b"".join(stream.parts)
    arrived, total = [], 0
    for part in stream.parts:
        total += len(part)
        arrived.append(total)
    payload, ends, raw_ends = [], [], []
    size = 0
    at = raw.find(b"\r\n\r\n") + 4
    if b"transfer-encoding: chunked" not in raw[:at].lower():
        return []
    while (line_end := raw.find(b"\r\n", at)) > 0:
        length = int(raw[at:line_end], 16)
        begin, at = line_end + 2, line_end + 4 + length
        size += length
        payload.append(raw[begin : begin + length])
        ends.append(size)
        raw_ends.append(begin + length)
    tokens = []
    for match in TOKEN.finditer(b"".join(payload)):
        chunk = bisect_left(ends, match.end())
        position = raw_ends[chunk] - (ends[chunk] - match.end())
        tokens.append((int(match[1]), stream.times[min(bisect_left(arrived, position), len(arrived) - 1)]))
    return tokens


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(run_load(load))))


if __name__ == "__main__":
    main()
