"""The HTTP side of the gate, in front of SGLang's app: models by name, errors with their status, secrets masked."""

import traceback
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import orjson
from sglang.srt.entrypoints.http_request_decompression import RequestDecompressionMiddleware
from sglang.srt.entrypoints.http_server import app, get_global_state
from sglang.srt.environ import envs
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdlora_sglang.serving.gate.asked import Asked, ask
from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.families import Family, family_of
from bdlora_sglang.serving.gate.names import ModelNames
from bdlora_sglang.serving.gate.routes import ROUTES, is_ours


class GateMiddleware:
    """Resolves ``model`` and ``lora_path`` of a JSON body, and answers a `RequestError` with its status.

    Args:
        app: what comes next.
        names: gives the names of this server.
        check_body: raises `RequestError` for a wrong body of SGLang's own API.
        metrics: gives what comes after SGLang's own metrics.
        routes: an app for the paths that ``is_ours`` accepts.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Callable[[], ModelNames],
        check_body: Callable[[dict[str, Any]], None],
        metrics: Callable[[], Awaitable[bytes]],
        routes: ASGIApp,
        is_ours: Callable[[Scope], bool],
    ) -> None:
        self._app, self._names, self._check_body, self._metrics = app, names, check_body, metrics
        self._routes, self._is_ours = routes, is_ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].rstrip("/") == "/metrics":
            # As plain text, uncompressed: ours is put after it.
            scope = {**scope, "headers": [h for h in scope["headers"] if h[0] not in (b"accept", b"accept-encoding")]}
            await self._app(scope, receive, _Appended(send, self._metrics).send)
            return
        app = self._routes if self._is_ours(scope) else self._app
        family = family_of(scope["path"])
        answer = _Answer(send, family)
        try:
            if scope["method"] in ("POST", "PUT") and _is_json(scope):
                receive = await self._resolve(family, receive)
            await app(scope, receive, answer.send)
        except RequestError as error:
            if answer.started:
                raise
            await answer.error(error.status_code, str(error), error.field)
        except Exception as error:
            if answer.started:
                raise
            if family is Family.OLLAMA and isinstance(error, ValueError):
                # From a stream of SGLang's, which does not look for it.
                await answer.error(HTTPStatus.BAD_REQUEST, str(error), None)
            elif _while_reading_the_body(error):
                # SGLang's own validators trip over types that they do not expect, which would be called its fault.
                await answer.error(HTTPStatus.BAD_REQUEST, f"body: found values of wrong types ({error!r})", None)
            else:
                raise

    async def _resolve(self, family: Family, receive: Receive) -> Receive:
        """Note which adapter the body asks for; returns what gives the body again."""
        body = await _whole(receive)
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            fields = None  # SGLang says what is wrong with it.
        if isinstance(fields, dict):
            model = fields.get("model")
            if family.names_models and isinstance(model, str) and model:
                adapter = self._names().adapter(model)
                if adapter is None:
                    self._names().check_adapters(fields.get("lora_path"))
                ask(Asked(adapter if adapter is not None else fields.get("lora_path")))
                if family is Family.RESPONSES and model not in self._names().listed():
                    # SGLang's endpoint knows no other names.
                    body = orjson.dumps({**fields, "model": adapter or self._names().served()})
            elif family is Family.NATIVE and "lora_name" not in fields:
                self._names().check_adapters(fields.get("lora_path"))
                if "sampling_params" in fields:
                    self._check_body(fields)
        return _again(body, receive)


class _Answer:
    """Sends an answer. A stream starts with its first part, so that an error before it still has its own status."""

    def __init__(self, send: Send, family: Family) -> None:
        self._send, self._family = send, family
        self._start: Message | None = None
        self._is_error = False
        self.started = False

    async def send(self, message: Message) -> None:
        if self._is_error:
            return
        if message["type"] == "http.response.start" and _is_stream(message):
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            if (error := _error_in(message.get("body", b""))) is not None:
                self._is_error = True
                status = error.get("code")
                await self.error(status if isinstance(status, int) else 400, str(error.get("message")), None)
                return
            await self._pass_on(start)
        await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        self.started = True
        await self._send(message)

    async def error(self, status: int, message: str, field: str | None) -> None:
        body = orjson.dumps(self._family.error(status, message, field))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._pass_on({"type": "http.response.start", "status": status, "headers": headers})
        await self._pass_on({"type": "http.response.body", "body": body})


class _Appended:
    """Sends an answer with more at its end."""

    def __init__(self, send: Send, more: Callable[[], Awaitable[bytes]]) -> None:
        self._send, self._more = send, more
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        if self._start["status"] == HTTPStatus.OK:
            self._parts.append(await self._more())
        body = b"".join(self._parts)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _while_reading_the_body(error: Exception) -> bool:
    """Whether FastAPI was making the arguments of an endpoint of the request."""
    return any(frame.name == "solve_dependencies" for frame in traceback.extract_tb(error.__traceback__))


def _is_json(scope: Scope) -> bool:
    kind = Headers(scope=scope).get("content-type", "application/json").lower()
    return "json" in kind


def _is_stream(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return kind.startswith(("text/event-stream", "application/x-ndjson"))


def _error_in(event: bytes) -> dict[str, Any] | None:
    """The error that an event of SGLang's streams holds."""
    if not event.startswith(b'data: {"error":'):
        return None
    error = orjson.loads(event.partition(b"\n")[0][len(b"data: ") :])["error"]
    return error if isinstance(error, dict) else None


async def _whole(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives ``body``, and then what comes after it: that the client is gone."""
    given = False

    async def give() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


def add_gate() -> None:
    """Put the gate in front of SGLang's app, as SGLang does with its own middleware, before the server starts."""

    def manager() -> Any:
        return get_global_state().tokenizer_manager

    app.add_middleware(
        GateMiddleware,
        names=lambda: manager().names,
        check_body=lambda fields: manager().check_body(fields),
        metrics=lambda: manager().adapter_metrics(),
        routes=ROUTES,
        is_ours=is_ours,
    )
    if envs.SGLANG_ENABLE_REQUEST_DECOMPRESSION.get():
        app.add_middleware(RequestDecompressionMiddleware)
