"""Requests, valid and invalid, that are answered alike by vLLM's own server and through rbee."""

from typing import Any, NamedTuple

TEXT = "rbee-tiny"
EMBED = "rbee-embed"

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
SCORE = "/v1/score"
RERANK = "/v1/rerank"
TOKENIZE = "/v1/tokenize"
DETOKENIZE = "/v1/detokenize"

VLLM_PATHS = {TOKENIZE: "/tokenize", DETOKENIZE: "/detokenize"}
"""Where vLLM has what the front door has below `/v1`."""


class Row(NamedTuple):
    """One request; its name is unique."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.body.get("model") or TEXT)


SAY: Any = [{"role": "user", "content": "A job is an event stream:"}]
COLOURS: Any = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "paint", "description": "Paint it", "parameters": COLOURS},
}


def chat(name: str, **fields: Any) -> Row:
    body = {"model": TEXT, "messages": SAY, "max_tokens": 8, "temperature": 0} | fields
    return Row(f"chat {name}", CHAT, body)


def completion(name: str, **fields: Any) -> Row:
    body = {"model": TEXT, "prompt": "A job is", "max_tokens": 8, "temperature": 0} | fields
    return Row(f"completion {name}", COMPLETIONS, body)


def embedding(name: str, **fields: Any) -> Row:
    return Row(f"embedding {name}", EMBEDDINGS, {"model": EMBED, "input": "A job"} | fields)


def response(name: str, **fields: Any) -> Row:
    body = {"model": TEXT, "input": "A job is", "max_output_tokens": 8, "temperature": 0} | fields
    return Row(f"response {name}", RESPONSES, body)


def message(name: str, **fields: Any) -> Row:
    body = {"model": TEXT, "messages": SAY, "max_tokens": 8, "temperature": 0} | fields
    return Row(f"message {name}", MESSAGES, body)


ROWS: list[Row] = [
    # valid
    chat("plain"),
    chat(
        "system and turns",
        messages=[{"role": "system", "content": "x"}, *SAY, {"role": "assistant", "content": "y"}, *SAY],
    ),
    chat("parts", messages=[{"role": "user", "content": [{"type": "text", "text": "A job"}]}]),
    chat("stream", stream=True),
    chat("stream with usage", stream=True, stream_options={"include_usage": True}),
    chat(
        "stream with running usage",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ),
    chat("logprobs", logprobs=True, top_logprobs=3),
    chat("stream of logprobs", logprobs=True, top_logprobs=2, stream=True),
    chat("n", n=3, temperature=0.8, seed=7),
    chat("stream of n", n=2, temperature=0.8, seed=7, stream=True),
    chat("seed", temperature=1.0, seed=11),
    chat("stop", stop=["e"], max_tokens=30),
    chat("stop list, included", stop=["e", "a"], include_stop_str_in_output=True, max_tokens=30),
    chat(
        "json schema",
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": COLOURS}},
        max_tokens=40,
    ),
    chat("structured choice", structured_outputs={"choice": ["red", "green"]}),
    chat("structured regex", structured_outputs={"regex": "[ab]{3}"}),
    chat(
        "a named tool",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "paint"}},
        max_tokens=40,
    ),
    chat("a required tool", tools=[TOOL], tool_choice="required", max_tokens=60),
    chat(
        "a named tool, streamed",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "paint"}},
        max_tokens=40,
        stream=True,
    ),
    chat("tools left alone", tools=[TOOL], tool_choice="none"),
    chat("penalties", frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.2),
    chat("top p and k", temperature=0.9, top_p=0.5, top_k=3, min_p=0.01, seed=3),
    chat("logit bias", logit_bias={"5": -100, "6": 50}),
    chat("bad words", bad_words=["the"]),
    chat("minimum tokens", min_tokens=5, max_tokens=6),
    chat("end ignored", ignore_eos=True, max_tokens=20),
    chat("echo", echo=True),
    chat("token ids returned", return_token_ids=True),
    chat("max_completion_tokens", max_tokens=None, max_completion_tokens=4),
    chat("priority of the default", priority=0),
    chat("a field nobody knows", no_such_field={"a": [1, 2]}),
    completion("plain"),
    completion("stream", stream=True),
    completion("of token ids", prompt=[5, 6, 7]),
    completion("of two prompts", prompt=["A job", "A hive"]),
    completion("of two prompts, streamed", prompt=["A job", "A hive"], stream=True),
    completion("logprobs", logprobs=2),
    completion("echo with logprobs", echo=True, logprobs=1, max_tokens=2),
    completion("n", n=2, temperature=0.7, seed=5),
    completion("suffix of stop", stop="\n", max_tokens=20),
    completion("prompt logprobs", prompt_logprobs=1, max_tokens=2),
    completion("unicode", prompt="ü 漢 🦀"),
    embedding("plain"),
    embedding("of two", input=["A job", "A hive"]),
    embedding("of token ids", input=[5, 6, 7]),
    embedding("base64", encoding_format="base64"),
    Row("score", SCORE, {"model": EMBED, "text_1": "A job", "text_2": ["A job", "A hive"]}),
    Row("rerank", RERANK, {"model": EMBED, "query": "A job", "documents": ["A hive", "A job"], "top_n": 1}),
    response("plain"),
    response("of messages", input=SAY, instructions="x"),
    response("stream", stream=True),
    message("plain"),
    message("with system", system="x"),
    message("stream", stream=True),
    message("stop sequences", stop_sequences=["e"], max_tokens=30),
    Row("count of tokens", COUNT, {"model": TEXT, "messages": SAY}),
    Row("tokenize a prompt", TOKENIZE, {"model": TEXT, "prompt": "A job"}),
    Row("tokenize messages", TOKENIZE, {"model": TEXT, "messages": SAY, "return_token_strs": True}),
    Row("detokenize", DETOKENIZE, {"model": TEXT, "tokens": [5, 6, 7]}),
    # invalid: vLLM's own words come back
    chat("temperature too low", temperature=-1),
    chat("temperature no number", temperature="warm"),
    chat("top_p too high", top_p=2),
    chat("n of none", n=0),
    chat("too many tokens", max_tokens=100_000),
    chat("max_tokens negative", max_tokens=-1),
    chat("no messages", messages=None),
    chat("messages no list", messages="hello"),
    chat("a role nobody knows", messages=[{"role": "wizard", "content": 7}]),
    chat(
        "an image for a text model",
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}],
            }
        ],
    ),
    chat("too many logprobs", logprobs=True, top_logprobs=1000),
    chat("top_logprobs without logprobs", top_logprobs=3),
    chat("stream options without a stream", stream_options={"include_usage": True}),
    chat(
        "a schema that is none",
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "nonsense"}}},
    ),
    chat(
        "a tool that is not there",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "other"}},
    ),
    chat("logit bias out of range", logit_bias={"99999999": 1}),
    chat("empty stop", stop=[""]),
    chat("an error before a stream", temperature=-1, stream=True),
    completion("no prompt", prompt=None),
    completion("too long a prompt", prompt="A job is " * 3000),
    completion("token out of range", prompt=[10**9]),
    completion("best_of", best_of=3, n=3),
    embedding("no input", input=None),
    embedding("dimensions", dimensions=8),
    embedding("too long an input", input="A job is " * 3000),
    embedding("a format nobody knows", encoding_format="yaml"),
    Row("score without texts", SCORE, {"model": EMBED}),
    Row("rerank without documents", RERANK, {"model": EMBED, "query": "x"}),
    Row("embedding of a text model", EMBEDDINGS, {"model": TEXT, "input": "x"}),
    Row("chat with an embedding model", CHAT, {"model": EMBED, "messages": SAY}),
    response("no input", input=None),
    response("temperature too high", temperature=99),
    message("no max_tokens", max_tokens=None),
    message("no messages", messages=[]),
    Row("count without messages", COUNT, {"model": TEXT}),
    Row("tokenize nothing", TOKENIZE, {"model": TEXT}),
    Row("detokenize words", DETOKENIZE, {"model": TEXT, "tokens": ["a"]}),
]

NAMES_DIFFER = {"id", "created", "created_at", "completed_at", "item_id", "call_id", "request_id"}
"""Ids and times, by name."""

GROWING = {"content", "text", "arguments", "delta", "partial_json", "reasoning"}
"""What a stream tells in pieces, which are cut as the engine's steps and the reader's turns fall."""


def comparable(value: Any) -> Any:
    """Give an answer without what differs between any two runs."""
    match value:
        case dict():
            return {k: comparable(v) for k, v in value.items() if k not in NAMES_DIFFER}
        case list():
            return [comparable(item) for item in value]
        case _:
            return value


def collapsed(frames: list[tuple[str, Any]]) -> dict[str, Any]:
    """Give a stream's frames put together: texts joined by their place, everything else as last told."""
    told: dict[str, Any] = {}
    events = [event for event, _ in frames]
    for _, frame in frames:
        _gather(comparable(frame), "", told)
    order = [event for at, event in enumerate(events) if at == 0 or event != events[at - 1]]
    return {"events": order, "told": told}


def _gather(value: Any, place: str, told: dict[str, Any]) -> None:
    match value:
        case dict():
            index = f"[{value['index']}]" if "index" in value else ""
            for key, inner in value.items():
                if key in ("sequence_number",) or place.endswith("usage"):
                    continue
                _gather(inner, f"{place}{index}.{key}", told)
            if place.endswith("usage"):
                told[place] = value
        case list() if ".logprobs" in place:
            told[place] = [*told.get(place, ()), *value]
        case list():
            for at, inner in enumerate(value):
                _gather(
                    inner, place if isinstance(inner, dict) and "index" in inner else f"{place}[{at}]", told
                )
        case str() if place.rpartition(".")[2] in GROWING:
            told[place] = told.get(place, "") + value
        case None:
            told.setdefault(place, None)
        case _:
            told[place] = value
