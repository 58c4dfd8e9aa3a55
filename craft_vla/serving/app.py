"""The server's surface: openpi's websocket at `/`, OpenVLA-OFT's `POST /act`, `GET /metadata`, `GET /healthz`.

A client's mistake is answered, and the connection stays: over the websocket with a text frame, which makes an
unmodified `openpi_client` raise a RuntimeError with its text, over HTTP with a status and `{"error": text}`. A fault of
the server is answered alike, and then the websocket is closed with code 1011.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from craft_vla.policy import Observation
from craft_vla.serving.batching import Batcher, BusyError, PolicyError
from craft_vla.serving.limits import Limits
from craft_vla.serving.messages import MessageError, from_json, pack, to_json, unpack
from craft_vla.serving.observations import read_observation

LONGEST_ERROR = 500
"""Characters of a message to a client."""
LARGE_BYTES = 1 << 18
"""Of a JSON body: above, it is decoded in a thread of its own. Below, it takes a few milliseconds."""
_INTERNAL_ERROR = 1011


class Service:
    """One policy behind all routes. It keeps nothing of a client between two requests.

    Args:
        batcher: what answers.
        cameras: names of the policy's cameras.
        metadata: what clients are told; `unnorm_key` is read here.
        limits: of the clients.
        token: that clients must show, None for none.
    """

    def __init__(
        self, batcher: Batcher, cameras: tuple[str, ...], metadata: Mapping[str, Any], limits: Limits, token: str | None
    ) -> None:
        self.batcher, self.cameras, self.metadata, self.limits = batcher, cameras, dict(metadata), limits
        self._token = None if token is None else hashlib.sha256(token.encode()).digest()
        self._open = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            WebSocketRoute("/", self.robot),
            Route("/act", self.act, methods=["POST"]),
            Route("/metadata", self.tell, methods=["GET"]),
            Route("/healthz", self.health, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._running)

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            worker.cancel()

    # ------------------------------------------------------------------------------------------------ who may ask

    def refusal(self, connection: HTTPConnection) -> tuple[int, str] | None:
        """Status and message for a client that is not answered at all."""
        headers = connection.headers
        if "origin" in headers:  # a web page, which any site can make ask a server on this machine
            return 403, f"found the header Origin {headers['origin'][:100]!r}, expected a program, not a web page"
        if self._token is not None:
            scheme, _, shown = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(shown.strip().encode("utf-8", "replace")).digest()
            if scheme.lower() not in ("api-key", "bearer") or not hmac.compare_digest(digest, self._token):
                return 401, "no valid token, expected the header Authorization: Api-Key TOKEN"
        if self._open >= self.limits.max_connections:
            return 503, f"{self._open} clients are connected, expected fewer: ask again later"
        return None

    @contextmanager
    def _place(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    # -------------------------------------------------------------------------------------------------- websocket

    async def robot(self, websocket: WebSocket) -> None:
        """Metadata first, then an answer for every message."""
        if refused := self.refusal(websocket):
            await websocket.send_denial_response(_error(*refused))
            return
        with self._place():
            try:
                await websocket.accept()
                await websocket.send_bytes(pack(self.metadata))
                await self._converse(websocket)
            except (WebSocketDisconnect, OSError):  # left, or did not take its answers
                return

    async def _converse(self, websocket: WebSocket) -> None:
        last_seconds: float | None = None
        while True:
            try:
                event = await asyncio.wait_for(websocket.receive(), self.limits.seconds_idle)
            except asyncio.TimeoutError:
                await websocket.close(1001, f"nothing was asked for {self.limits.seconds_idle:g} s")
                return
            if event["type"] == "websocket.disconnect":
                return
            await asyncio.sleep(websocket.state.pace.seconds_to_wait())
            began = time.monotonic()
            try:
                answer = await self._answer_packed(event, began, last_seconds)
            except (ValueError, BusyError) as error:
                await websocket.send_text(_line(error))
                continue
            except PolicyError as error:
                await websocket.send_text(_line(error))
                await websocket.close(_INTERNAL_ERROR, _line(error)[:100])
                return
            finally:
                del event  # images; the next message may be hours away
            await websocket.send_bytes(answer)
            last_seconds = time.monotonic() - began

    async def _answer_packed(self, event: Mapping[str, Any], began: float, last_seconds: float | None) -> bytes:
        if event.get("bytes") is None:
            raise MessageError("message: found text, expected msgpack in a binary message")
        actions = await self._actions(unpack(event["bytes"]))
        timing = {"infer_ms": 1000 * (time.monotonic() - began)}
        if last_seconds is not None:
            timing["prev_total_ms"] = 1000 * last_seconds
        return pack({"actions": actions, "server_timing": timing})

    async def _actions(self, message: Any) -> np.ndarray:
        arguments = read_observation(message, self.cameras, self.metadata["unnorm_key"])
        return await self.batcher.ask(Observation(**arguments))

    # ------------------------------------------------------------------------------------------------------- HTTP

    async def act(self, request: Request) -> Response:
        """Actions of the next chunk: a JSON list of K arrays (A,) in json-numpy's form.

        The body is an observation, or `{"encoded": TEXT}` with an observation in the text; the answer is then such a
        text as well.
        """
        refused = self.refusal(request) or _unfit(request)
        if refused:
            return _error(*refused)
        with self._place():
            await asyncio.sleep(request.state.pace.seconds_to_wait())
            try:
                body = await self._body(request)
                if body is None:
                    return _error(413, f"body of more than {self.limits.message_bytes} bytes, expected at most these")
                # A large body takes long to decode; meanwhile this thread serves the other clients.
                is_large = len(body) > LARGE_BYTES
                message, is_encoded = await asyncio.to_thread(_decoded, body) if is_large else _decoded(body)
                answer = to_json(list(await self._actions(message)))
            except ValueError as error:
                return _error(400, _line(error))
            except BusyError as error:
                return _error(503, _line(error))
            except PolicyError as error:
                return _error(500, _line(error))
        return Response(to_json(answer) if is_encoded else answer, media_type="application/json")

    async def _body(self, request: Request) -> bytes | None:
        """The body; None for one that is too large, of which no more is read."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.message_bytes:
                return None
            parts.append(part)
        return b"".join(parts)

    async def tell(self, request: Request) -> Response:
        """The metadata as JSON."""
        refused = self.refusal(request)
        return _error(*refused) if refused else JSONResponse(self.metadata)

    async def health(self, request: Request) -> Response:
        """OK; status 503 and why when nobody is answered."""
        trouble = self.batcher.trouble()
        return PlainTextResponse("OK\n") if trouble is None else PlainTextResponse(f"{trouble}\n", 503)


def _decoded(body: bytes) -> tuple[Any, bool]:
    """The message in a body, and whether it was text in `encoded`."""
    message = from_json(body)
    if not isinstance(message, dict) or set(message) != {"encoded"}:
        return message, False
    if not isinstance(message["encoded"], str):
        raise MessageError(f"encoded is {type(message['encoded']).__name__}, expected JSON as text")
    return from_json(message["encoded"]), True


def _unfit(request: Request) -> tuple[int, str] | None:
    """Status and message for headers that no body is read for."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return 415, f"Content-Type is {kind[:100]!r}, expected application/json"
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":  # a few bytes may unpack to gigabytes
        return 415, f"Content-Encoding is {coding[:100]!r}, expected a body that is not compressed"
    return None


def _error(status: int, message: str) -> Response:
    # The rest of a body may still be on its way: the connection cannot be used again.
    headers = {"connection": "close"} if status != 400 else {}
    if status == 401:
        headers["www-authenticate"] = "Api-Key"
    return JSONResponse({"error": message}, status, headers)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:LONGEST_ERROR]
