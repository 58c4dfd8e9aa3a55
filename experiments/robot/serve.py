"""Serve a checkpoint to robots: openpi's websocket protocol, and OpenVLA-OFT's HTTP.

    craft-serve --pretrained_checkpoint DIR --unnorm_key libero_object_no_noops

Clients of this machine alone can ask. For others: --host ADDRESS and a token (--token_file, or the environment variable
CRAFT_SERVE_TOKEN). docs/serving.md says how to ask, and what is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from craft_vla.serving.limits import Limits
from experiments.robot.libero.controls import to_simulator_actions
from prismatic.command_line import bad_input_in_one_line, flag, parse, require_package
from prismatic.model_files import BASE_CHECKPOINT, ROBOT_PLATFORM
from prismatic.progress import Progress

if TYPE_CHECKING:
    import socket

    import uvicorn

PROGRAM = "craft-serve"


@dataclass
class ServeConfig(Limits):
    """Flags."""

    pretrained_checkpoint: str = flag("", "checkpoint folder, ours or published")
    unnorm_key: str = flag("", "data set whose statistics are used; empty: the only one")
    device: str | None = flag(None, "None: cuda when there is one, else cpu")
    data_set_file: str | None = flag(None, "Python file that registers data sets of your own (docs/datasets.md)")
    robot_platform: str | None = flag(None, ROBOT_PLATFORM)
    base_checkpoint: str | None = flag(None, BASE_CHECKPOINT)
    gripper: str = flag(
        "data",
        "convention of the last action. data: as trained, for LIBERO 0 to 1 with 1 = open; simulator: as LIBERO's "
        "robots take it, -1 = open, +1 = close",
        choices=("data", "simulator"),
    )
    host: str = flag("127.0.0.1", "address to listen on; another than this machine's own needs a token")
    port: int = flag(8000, "0: a free one, which is printed", at_least=0, at_most=65535)
    token_file: str = flag("", "file with the token that clients must show")


def prepare(cfg: ServeConfig) -> tuple[uvicorn.Server, socket.socket]:
    """Server and listening socket. ValueError, KeyError or OSError name the flag or the file that does not fit."""
    if not cfg.pretrained_checkpoint:
        raise ValueError("--pretrained_checkpoint is missing: name the folder")
    require_package(PROGRAM, "uvicorn", "serve")
    from craft_vla.policy import load_policy
    from craft_vla.serving.metadata import describe, is_libero
    from craft_vla.serving.server import listen, make_server, read_token
    from prismatic.vla.datasets.registry import load_data_set_file

    token = read_token(cfg.host, cfg.token_file)
    if cfg.data_set_file is not None:
        load_data_set_file(cfg.data_set_file)
    given: dict[str, Any] = {"base": cfg.base_checkpoint, "robot": cfg.robot_platform}
    with Progress(2, "starting", "steps", note="reads the policy") as progress:
        policy = load_policy(cfg.pretrained_checkpoint, cfg.device, cfg.unnorm_key or None, **given)
        as_simulator = cfg.gripper == "simulator"
        if as_simulator and not is_libero(policy):
            raise ValueError(
                f"--gripper simulator: found data {policy.unnorm_key!r}, whose gripper has a convention of its own, "
                "expected data registered as LIBERO's; use --gripper data"
            )
        place = listen(cfg.host, cfg.port)
        progress.advance(note="measures how fast it answers")
        metadata = describe(policy, cfg, as_simulator)
        progress.advance()
    shown = {"shown": to_simulator_actions} if as_simulator else {}
    return make_server(policy, policy.cameras, metadata, cfg, token, **shown), place


def main() -> None:
    """Serve until interrupted."""
    with bad_input_in_one_line(PROGRAM):
        server, place = prepare(parse(ServeConfig, description=__doc__))
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{PROGRAM}: ws://{shown}:{port} (openpi), http://{shown}:{port}/act; Ctrl-C ends", flush=True)
    try:
        server.run(sockets=[place])
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
