"""The two readers of a response's usage and errors: Envoy's script, and the service's reader."""

from typing import Final, Protocol

from flowcontrol_server.requests.response_reader import ResponseReader
from flowcontrol_server.requests.usage import COUNTS, tokens
from tests.support.envoy_lua import read_of

_MS_NS: Final = 1_000_000
_BEGIN_NS: Final = 1_000_000_000


class Reader(Protocol):
    """Reads a response that arrives in chunks."""

    __name__: str

    def __call__(
        self, *chunks: bytes, kind: bytes = b"text/event-stream", chunk_ms: int = 0
    ) -> dict[str, float]:
        """Return its tokens, the status of an error, and the delay of the first token.

        Args:
            chunks: chunks of the response's body.
            kind: content type of the response.
            chunk_ms: time between chunks.
        """


def read_by_envoy(
    *chunks: bytes, kind: bytes = b"text/event-stream", chunk_ms: int = 0
) -> dict[str, float]:
    """Read with the script of the generated configuration."""
    found = read_of(*chunks, kind=kind, chunk_ms=chunk_ms)
    counts = [found.pop(name, None) for name in COUNTS]
    return _reported(*tokens([None if each is None else int(each) for each in counts])) | found


def read_here(
    *chunks: bytes, kind: bytes = b"text/event-stream", chunk_ms: int = 0
) -> dict[str, float]:
    """Read with a `ResponseReader`."""
    reader = ResponseReader({":status": "200", "content-type": kind.decode()})
    now_ns = _BEGIN_NS
    for chunk in chunks:
        reader.take(chunk, now_ns, is_end=False)
        now_ns += chunk_ms * _MS_NS
    reader.end(now_ns)
    entry = reader.report(_BEGIN_NS, now_ns)
    found = _reported(entry.input_tokens, entry.cached_tokens, entry.output_tokens)
    if entry.status != 200:
        found["error"] = entry.status
    if entry.ttft_us:
        found["first_token_late_ms"] = entry.ttft_us // 1000
    return found


def cut_into(content: bytes, size: int) -> list[bytes]:
    """Return a body in chunks of that size."""
    return [content[at : at + size] for at in range(0, len(content), size)]


def _reported(*counts: int | None) -> dict[str, float]:
    names = ("input_tokens", "cached_tokens", "output_tokens")
    return {name: each for name, each in zip(names, counts, strict=True) if each is not None}


READERS: Final[tuple[Reader, ...]] = (read_by_envoy, read_here)
