"""A policy behind a port: socket, token and the loop that serves until it is told to stop."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from craft_vla.serving.app import Service
from craft_vla.serving.batching import Answering, Batcher
from craft_vla.serving.limits import Limits
from craft_vla.serving.protocols import connection_classes

TOKEN_VARIABLE = "CRAFT_SERVE_TOKEN"
SHORTEST_TOKEN = 16
_HEADER_BYTES = 16384
_GRACE_SECONDS = 5


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(host: str, file: str) -> str | None:
    """The token that clients must show: from a file, else from the environment, else None.

    Raises ValueError for one that is too short or no header could hold, and for none where other machines can ask;
    OSError for a file that cannot be read.
    """
    where = f"--token_file {file}" if file else f"environment variable {TOKEN_VARIABLE}"
    text = Path(file).read_text("utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE)
    if text is None:
        if not is_loopback(host):
            raise ValueError(
                f"--host {host} lets other machines ask: found no token, expected --token_file FILE or the environment "
                f"variable {TOKEN_VARIABLE}"
            )
        return None
    if len(text) < SHORTEST_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(
            f"{where}: found {len(text)} characters, expected a token of at least {SHORTEST_TOKEN} ASCII characters "
            "without blanks"
        )
    return text


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ValueError that names flag and reason."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        expected = "expected an address of this machine with a free port"
        raise ValueError(f"--host {host} --port {port}: {reason}, {expected}") from None


def make_server(
    policy: Answering,
    cameras: tuple[str, ...],
    metadata: Mapping[str, Any],
    limits: Limits,
    token: str | None = None,
    shown: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> uvicorn.Server:
    """A server for `run(sockets=[listen(...)])`; setting its `should_exit` ends it.

    Args:
        policy: what is asked, in one thread.
        cameras, metadata, token: as `Service` takes them.
        limits: of the clients.
        shown: as `Batcher` takes it.
    """
    batcher = Batcher(policy, limits.max_batch, limits.waiting, limits.seconds_to_answer, shown)
    http, websocket = connection_classes(limits)
    config = uvicorn.Config(
        Service(batcher, cameras, metadata, limits, token).app(),
        http=http,
        ws=websocket,
        ws_max_size=limits.message_bytes,
        ws_per_message_deflate=False,  # a few bytes may unpack to gigabytes
        ws_ping_timeout=60.0,  # a client may be busy for long
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=max(1, int(limits.seconds_to_send)),
        timeout_graceful_shutdown=_GRACE_SECONDS,
        lifespan="on",
        log_level="error",  # anybody can cause a warning
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    return uvicorn.Server(config)
