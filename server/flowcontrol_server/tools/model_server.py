"""A simulated model server: OpenAI's HTTP API and vLLM's metrics for the model of the simulation.

It computes no model. It answers in real time at the speed of `flowcontrol.simulation.model_server`,
under any model name, with one word per token, and fails on command (POST /control/fail). Each
request is one job with a queue of its tokens. If a client disconnects, its handler is cancelled,
which aborts the job.
"""

import asyncio
import contextlib
import json
import reprlib
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from http import HTTPStatus
from itertools import count
from typing import Literal, NoReturn, TypeVar

import structlog
import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from flowcontrol.simulation.model_server import ModelServer, ModelServerConfig, TokenEvent
from flowcontrol_server.common.listening import naming
from flowcontrol_server.common.signals import STOP_SIGNALS

CHARACTERS_PER_TOKEN = 4  # For the estimate of a prompt's length: OpenAI's rule for English.
OUTPUT_TOKENS_DEFAULT = 64  # If the request sets no limit.
REQUEST_BYTES_MAX = 16 * 2**20  # Larger bodies are refused with 413.
SHUTDOWN_TIMEOUT_S = 0.1  # Then unfinished answers are cut, which is no loss.

_SENTENCE = "This answer is simulated: each word is one token, timed as one step of the engine."
_WORDS = [word + " " for word in _SENTENCE.split()]
_RULES = {
    "extra_forbidden": "absent",
    "json_invalid": "JSON",
    "missing": "present",
    "too_short": "not empty",
}
_STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_ENGINE: web.AppKey["_Engine"] = web.AppKey("engine")
_Body = TypeVar("_Body", bound=BaseModel)


def run(host: str, port: int, model: str, config: ModelServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then return; unfinished answers are cut.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0: a free one, which is logged.
        model: Name in answers and metrics.
        config: Size and speed of the engine.

    Raises:
        ListenError: The address cannot be opened.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_model(host, port, model, config))


async def serve_model(host: str, port: int, model: str, config: ModelServerConfig) -> None:
    """Do the same as `run`, on the loop of the main thread."""
    stop = asyncio.Event()
    for signal_number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    application = model_application(model, config)
    runner = web.AppRunner(
        application, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
    )
    await runner.setup()
    try:
        with naming(f"{host}:{port}"):
            await web.TCPSite(runner, host, port).start()
        port = runner.addresses[0][1]
        structlog.get_logger().info("model_server_listening", host=host, port=port, model=model)
        ends = {asyncio.create_task(stop.wait()), application[_ENGINE].driver}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await runner.cleanup()  # Raises the exception that ended the driver, if any.


def model_application(model: str, config: ModelServerConfig) -> web.Application:
    """Return the application; run it with `handler_cancellation=True`, as TestServer does."""
    application = web.Application(middlewares=[_refusals], client_max_size=REQUEST_BYTES_MAX)
    application[_ENGINE] = engine = _Engine(config)
    application.cleanup_ctx.append(engine.driven)
    service = _Service(engine, model)
    application.router.add_post("/v1/chat/completions", partial(service.answer, _Chat))
    application.router.add_post("/v1/completions", partial(service.answer, _Text))
    application.router.add_post("/control/fail", service.fail)
    application.router.add_get("/v1/models", service.models)
    application.router.add_get("/health", service.health)
    application.router.add_get("/metrics", service.metrics)
    return application


class _Engine:
    """Runs the model in real time and passes each job its tokens. Owner: the event loop."""

    driver: asyncio.Task[None]

    def __init__(self, config: ModelServerConfig) -> None:
        self.model = ModelServer(config)
        self._tokens: dict[int, asyncio.Queue[TokenEvent]] = {}
        self._job_ids = count()
        self._submitted = asyncio.Event()

    async def driven(self, _application: web.Application) -> AsyncIterator[None]:
        """Run the driver while the application runs; raise its exception at the end."""
        self.driver = asyncio.create_task(self.drive())
        yield
        self.driver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.driver

    async def drive(self) -> None:
        """Advance the model at the end of each step, and sleep until then.

        Nothing else needs to wake it: neither a submission nor an abort moves the end of a step.
        """
        while True:
            wakeup_ns = self.model.next_wakeup_ns()
            if wakeup_ns is None:
                self._submitted.clear()
                await self._submitted.wait()
                continue
            await asyncio.sleep(max(0, wakeup_ns - time.monotonic_ns()) / 1e9)
            for token in self.model.advance(time.monotonic_ns()):
                self._tokens[token.job_id].put_nowait(token)
                if token.is_last:
                    del self._tokens[token.job_id]

    @contextlib.contextmanager
    def job(self, prompt_tokens: int, output_tokens: int) -> Iterator[asyncio.Queue[TokenEvent]]:
        """Submit a job and yield its tokens; 400 if it can never run. An early exit aborts it."""
        job_id = next(self._job_ids)
        try:
            self.model.submit(job_id, prompt_tokens, output_tokens, time.monotonic_ns())
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        self._submitted.set()
        tokens = self._tokens[job_id] = asyncio.Queue()
        try:
            yield tokens
        finally:
            if self._tokens.pop(job_id, None) is not None:
                self.model.abort(job_id)


class _Generation(BaseModel):
    """Fields of both generation requests. Fields that do not affect the timing are ignored."""

    model_config = ConfigDict(strict=True)
    n: Literal[1] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    stream: bool | None = None
    stream_options: dict[str, bool | None] | None = None

    @property
    def output_tokens(self) -> int:
        """Length of the answer; the newer name has precedence."""
        return self.max_completion_tokens or self.max_tokens or OUTPUT_TOKENS_DEFAULT


class _Message(BaseModel):
    """One message of a conversation; parts that are not text do not count."""

    content: str | list[dict[str, object]] | None = None

    @property
    def size(self) -> int:
        """Characters of text."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(str(part.get("text", ""))) for part in self.content or ())


class _Chat(_Generation):
    """Body of POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)

    @property
    def prompt_tokens(self) -> int:
        """Estimated length of the messages' text, at least 1."""
        return max(1, sum(message.size for message in self.messages) // CHARACTERS_PER_TOKEN)


class _Text(_Generation):
    """Body of POST /v1/completions."""

    prompt: str | list[int]

    @property
    def prompt_tokens(self) -> int:
        """Estimated length of the prompt, or the number of its token ids, at least 1."""
        return max(1, len(self.prompt) // (CHARACTERS_PER_TOKEN if type(self.prompt) is str else 1))


class _Failure(BaseModel):
    """Body of POST /control/fail, and the state that it sets."""

    model_config = ConfigDict(strict=True, extra="forbid")
    mode: Literal["none", "status", "reset", "hang"]
    status: int = Field(default=503, ge=400, le=599)
    count: int | None = Field(default=1, ge=1)

    def take(self) -> str:
        """Return the mode for the next generation request, and count it."""
        if self.count == 0:
            return "none"
        self.count = None if self.count is None else self.count - 1
        return self.mode


class _Service:
    """The HTTP handlers of one engine, and its metrics under vLLM's names."""

    def __init__(self, engine: _Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._failure = _Failure(mode="none")
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Return the current state of the engine."""
        engine, gauge, counter = self._engine.model, GaugeMetricFamily, CounterMetricFamily
        for family, name, text, value in (
            (gauge, "num_requests_running", "Requests in the batch.", engine.running_count),
            (gauge, "num_requests_waiting", "Requests in the queue.", engine.waiting_count),
            (gauge, "kv_cache_usage_perc", "KV cache in use, 0 to 1.", engine.kv_usage),
            (counter, "prompt_tokens", "Prompt tokens prefilled.", engine.prompt_tokens_total),
            (counter, "generation_tokens", "Tokens generated.", engine.generated_tokens_total),
            (counter, "num_preemptions", "Sequences preempted.", engine.preemptions_total),
        ):
            metric = family(f"vllm:{name}", text, labels=["model_name"])
            metric.add_metric([self._model], value)
            yield metric
        labels = ["model_name", "block_size", "num_gpu_blocks"]
        info = gauge("vllm:cache_config_info", "What the KV cache holds.", labels=labels)
        info.add_metric([self._model, "1", str(engine.kv_tokens)], 1)
        yield info

    async def metrics(self, _request: web.Request) -> web.Response:
        """GET /metrics."""
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def health(self, _request: web.Request) -> web.Response:
        """GET /health."""
        return web.Response()

    async def models(self, _request: web.Request) -> web.Response:
        """GET /v1/models."""
        entry = {"id": self._model, "object": "model", "created": int(time.time())}
        return web.json_response({"object": "list", "data": [entry | {"owned_by": "flowcontrol"}]})

    async def fail(self, request: web.Request) -> web.Response:
        """POST /control/fail."""
        self._failure = await _parsed(request, _Failure)
        return web.json_response(self._failure.model_dump())

    async def answer(self, shape: type[_Chat | _Text], request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions and /v1/completions: run one job, or fail as configured."""
        generation = await _parsed(request, shape)
        mode = self._failure.take()
        if mode == "status":
            return _error(self._failure.status, "failed on command")
        if mode == "hang":
            await _until_disconnected()
        stream = web.StreamResponse(headers=_STREAM_HEADERS) if generation.stream else None
        with self._engine.job(generation.prompt_tokens, generation.output_tokens) as tokens:
            answer = _Answer(request, self._model, generation)
            if stream:
                await stream.prepare(request)
            while not (token := await tokens.get()).is_last or mode == "reset":
                if stream:
                    await stream.write(answer.event(token))
                if mode == "reset":
                    await _reset(request)
        if stream is None:
            return web.json_response(answer.whole(generation.output_tokens))
        await stream.write_eof(answer.event(token))
        return stream


class _Answer:
    """Encodes one answer; the parts of a stream's chunks beside the word are encoded once."""

    def __init__(self, request: web.Request, model: str, generation: _Chat | _Text) -> None:
        name = request.headers.get("X-Request-Id") or uuid.uuid4().hex  # As vLLM does.
        self._is_chat = isinstance(generation, _Chat)
        self._frame: dict[str, object] = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{name}",
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.output_tokens,
            "total_tokens": generation.prompt_tokens + generation.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        self._is_usage_streamed = (generation.stream_options or {}).get("include_usage")
        self._head, self._tail = self._event("\0").split(b'"\\u0000"')

    def whole(self, output_tokens: int) -> dict[str, object]:
        """Return the body of an answer that is not streamed."""
        text = "".join(_WORDS[index % len(_WORDS)] for index in range(output_tokens))
        choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": "length"}
        message = {"role": "assistant", "content": text}
        choice |= {"message": message} if self._is_chat else {"text": text}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._frame | {"object": kind, "choices": [choice], "usage": self._usage}

    def event(self, token: TokenEvent) -> bytes:
        """Return the server-sent event of a token; the last one includes the end of the stream."""
        word = _WORDS[token.token_index % len(_WORDS)]
        if token.token_index > 0 and not token.is_last:
            return self._head + json.dumps(word).encode() + self._tail
        event = self._event(word, is_first=token.token_index == 0, is_last=token.is_last)
        if token.is_last and self._is_usage_streamed:
            event += _encoded(self._frame | {"choices": [], "usage": self._usage})
        return event + b"data: [DONE]\n\n" if token.is_last else event

    def _event(self, word: str, *, is_first: bool = False, is_last: bool = False) -> bytes:
        """Return the server-sent event of one word."""
        delta = ({"role": "assistant"} if is_first else {}) | {"content": word}
        reason = "length" if is_last else None
        choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": reason}
        choice |= {"delta": delta} if self._is_chat else {"text": word}
        usage = {"usage": None} if self._is_usage_streamed else {}  # As OpenAI does.
        return _encoded(self._frame | {"choices": [choice]} | usage)


def _encoded(body: dict[str, object]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Write refusals in OpenAI's format."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, error.text or error.reason)
    except ConnectionResetError:  # the client has just disconnected; the cancellation follows
        await _until_disconnected()


def _error(status: int, message: str) -> web.Response:
    """Return OpenAI's error object."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


async def _parsed(request: web.Request, shape: type[_Body]) -> _Body:
    """Return the request's body in that shape, or answer 400 with every problem."""
    try:
        return shape.model_validate_json(await request.read())
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'body'} must be "
            f"{_RULES.get(problem['type'], problem['msg'].removeprefix('Input should be '))}, "
            f"got {reprlib.repr(problem['input'])}"
            for problem in error.errors(include_url=False)
        ]
        raise web.HTTPBadRequest(text="; ".join(problems)) from None


async def _reset(request: web.Request) -> NoReturn:
    """Close the connection with a TCP reset, after the data already written."""
    transport = request.transport
    if transport is not None:
        # Lingering for 0 s makes close() send RST instead of FIN.
        linger, connection = struct.pack("ii", 1, 0), transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.close()
    await _until_disconnected()


async def _until_disconnected() -> NoReturn:
    """Wait for the cancellation that follows when the client disconnects."""
    await asyncio.Event().wait()
    raise AssertionError
