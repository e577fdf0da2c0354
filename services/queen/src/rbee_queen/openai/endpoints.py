"""Which paths the front door has, and whose way of speaking each of them follows."""

from enum import Enum

PREFIXES = ("", "/openai")
"""Where the front door's paths, which begin with `/v1`, stand."""


class Dialect(Enum):
    """How errors look: OpenAI's way or Anthropic's."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


AUDIO = "/v1/audio/transcriptions"
MODELS = "/v1/models"

ENDPOINTS: dict[str, Dialect] = {
    AUDIO: Dialect.OPENAI,
    "/v1/chat/completions": Dialect.OPENAI,
    "/v1/completions": Dialect.OPENAI,
    "/v1/detokenize": Dialect.OPENAI,
    "/v1/embeddings": Dialect.OPENAI,
    "/v1/messages": Dialect.ANTHROPIC,
    "/v1/messages/count_tokens": Dialect.ANTHROPIC,
    "/v1/rerank": Dialect.OPENAI,
    "/v1/responses": Dialect.OPENAI,
    "/v1/score": Dialect.OPENAI,
    "/v1/tokenize": Dialect.OPENAI,
}
"""What is passed on to a worker, all by POST."""


def dialect_of(path: str) -> Dialect | None:
    """Give how to speak on a path; None where it is no path of the front door."""
    inner = path.removeprefix("/openai")
    if inner in ENDPOINTS:
        return ENDPOINTS[inner]
    if inner == MODELS or inner.startswith(f"{MODELS}/") or inner != path:
        return Dialect.OPENAI
    return None
