"""Which runs may share a results folder."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path
from typing import Any

from experiments.robot.libero.controls import Control
from experiments.robot.libero.eval_config import DEFAULT_INITIAL_STATES, EvalConfig, EvalInputError
from prismatic.evidence.episodes import CONTENT_FACTS
from prismatic.evidence.hashes import file_hash, folder_hash
from prismatic.training.checkpoint_hash import checkpoint_hash
from prismatic.vla.datasets.format_table import folder_and_split


def checkpoint_fingerprint(path: str) -> str:
    """:func:`checkpoint_hash` of a checkpoint directory.

    Raises:
        EvalInputError: the directory does not exist or is empty.
    """
    found = checkpoint_hash(path)
    if found is None:
        what = "an empty directory" if Path(path).is_dir() else "no such directory"
        raise EvalInputError(f"--pretrained_checkpoint {path}: expected a checkpoint directory, found {what}")
    return found


def run_fingerprint(cfg: EvalConfig) -> tuple[str, str]:
    """(fingerprint of all that decides an episode's outcome besides task and initial state, checkpoint identity).

    Two runs with the same fingerprint may share a results folder. Raises EvalInputError for a missing checkpoint.
    """
    if cfg.control is Control.REPLAY:
        assert cfg.replay_dataset is not None  # `--control replay` needs it
        folder, split = folder_and_split(cfg.replay_dataset)
        content = folder_hash(folder)  # None: opening it says what is wrong
        data = f"{folder}@{content}" if content else folder
        data += f":{split}" if split is not None else ""
        checkpoint = f"replay:{data}#{'auto' if cfg.replay_episode is None else cfg.replay_episode}"
    else:
        checkpoint = f"{cfg.pretrained_checkpoint}@{checkpoint_fingerprint(cfg.pretrained_checkpoint)}"
    names: tuple[str, ...] = ("task_suite_name", "control", "seed", "num_open_loop_steps", "num_steps_wait")
    names += ("env_img_res", "initial_states_path", "render_mode", "reset_mode", "unnorm_key", "init_noise_mm")
    names += ("batch_inference",) if cfg.batch_inference else ()  # as the default, it changes nothing
    names += ("robot_platform",) if cfg.robot_platform is not None else ()  # else the checkpoint says it
    settings = {name: plain(getattr(cfg, name)) for name in names} | {"checkpoint": checkpoint.rpartition("@")[2]}
    held = contents(cfg)
    settings |= {flag: held[fact] for flag, fact in CONTENT_FACTS.items() if fact in held}
    settings["language_source"] = cfg.resolved_language_source().value
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16], checkpoint


def contents(cfg: EvalConfig) -> dict[str, str]:
    """What the files hold that flags name, for results.json: `initial_states` (DEFAULT, or the hash of the file) and,
    where a file says chunk and units of a head that does not, `data_set_hash`."""
    path = cfg.initial_states_path
    found = {"initial_states": path if path == DEFAULT_INITIAL_STATES else file_hash(path)}
    return found | ({"data_set_hash": file_hash(cfg.data_set_file)} if cfg.data_set_file is not None else {})


def plain(value: Any) -> Any:
    """Enums to their values, recursively through dicts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value
