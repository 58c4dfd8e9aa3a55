"""uvicorn's connections with an end to patience: a client that stops in the middle of something is let go.

uvicorn times the silence between requests. It waits without end for the rest of a header, a body or a websocket
message and until its answer is taken, and takes any number of connections, fragments and pings.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from craft_vla.serving.limits import Limits, Pace

MAX_FRAGMENTS = 1024
"""Of one websocket message. Each takes more memory than its bytes."""
_MAX_UNSENT = 1 << 20
_SPARE = 16
"""Connections beyond the limit that are told so; one more is closed without a word."""


class _Clock:
    """Closes a connection unless it is stopped in time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self, transport: asyncio.Transport) -> None:
        """Begin, unless it runs."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, transport.abort)

    def stop(self) -> None:
        """What was waited for is there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Timed(asyncio.Protocol):
    """Both kinds of connection: an answer is to be taken in `seconds_to_send`. `clock` is for what the client sends."""

    limits = Limits()
    transport: asyncio.Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock, self.unread = _Clock(self.limits.seconds_to_send), _Clock(self.limits.seconds_to_send)

    def pause_writing(self) -> None:
        """Answers pile up: the client is to take them in time."""
        super().pause_writing()
        self.unread.start(self.transport)

    def resume_writing(self) -> None:
        """The client takes its answers."""
        self.unread.stop()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self.clock.stop()
        self.unread.stop()
        super().connection_lost(exc)


class TimedHttp(_Timed, H11Protocol):
    """A request is to be there in `seconds_to_send` from its first byte, the first one from the connection on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = self.app_state | {"pace": Pace(self.limits.requests_per_second)}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections + _SPARE:
            transport.abort()
        self.clock.start(transport)

    def data_received(self, data: bytes) -> None:
        """Wait on unless the request is whole."""
        self.clock.start(self.transport)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self.clock.stop()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """The header was whole; the websocket has a clock of its own."""
        self.clock.stop()
        super().handle_websocket_upgrade(event)

    def timeout_keep_alive_handler(self) -> None:
        """A farewell, which the client is to take in time."""
        super().timeout_keep_alive_handler()
        self.clock.start(self.transport)

    def on_response_complete(self) -> None:
        """The rest of a body that was refused is not awaited for long."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.clock.start(self.transport)


class TimedWebSocket(_Timed, WebSocketsSansIOProtocol):
    """A message is to be there in `seconds_to_send` from its first byte, in at most `MAX_FRAGMENTS` parts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_whole = False

    def data_received(self, data: bytes) -> None:
        """Begin to wait for the rest when these bytes end nothing."""
        self.is_whole = False
        super().data_received(data)
        if not self.is_whole:
            self.clock.start(self.transport)

    def on_task_complete(self, task: Any) -> None:
        """The conversation is over. uvicorn would wait without end until the last answer is taken."""
        super().on_task_complete(task)
        self.clock.start(self.transport)

    def handle_connect(self, event: Any) -> None:
        """The opening request, which uvicorn hands over whole."""
        self.is_whole = True
        super().handle_connect(event)

    def handle_ping(self) -> None:
        """Answered, unless the client takes no answers."""
        self.is_whole = True
        if self.transport.get_write_buffer_size() > _MAX_UNSENT:
            self.transport.abort()
        super().handle_ping()

    def handle_pong(self, event: Any) -> None:
        """A client that is still there."""
        self.is_whole = True
        super().handle_pong(event)

    def handle_cont(self, event: Any) -> None:
        """One more part of a message."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.transport.abort()
            return
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        """A whole message. Text is refused whatever it says, and need not be UTF-8 for that."""
        self.is_whole = True
        self.clock.stop()
        if self.curr_msg_data_type == "text":
            self.frames = [b""]
        super().send_receive_event_to_app()


def connection_classes(limits: Limits) -> tuple[type[TimedHttp], type[TimedWebSocket]]:
    """The classes for `uvicorn.Config(http=, ws=)`. `scope["state"]["pace"]` is the `Pace` of the connection."""
    given = {"limits": limits}
    return type("Http", (TimedHttp,), given), type("WebSocket", (TimedWebSocket,), given)
