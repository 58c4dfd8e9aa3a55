"""The old instructions a policy is held on: from a file, or those that the start checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prismatic.progress import say
from prismatic.training.config import FinetuneConfig
from prismatic.training.training_setup import TrainingSetup

_FLAG = "--craft_memory_instructions"


def old_instructions(cfg: FinetuneConfig, setup: TrainingSetup, shown: Iterable[str] = ()) -> list[str]:
    """Distinct sentences, those of the new task left out with a warning.

    `shown` are those that a memory of data has images of. They are left out too, and said: on their own images the
    start's answer is a skill, on others it may be a guess, which costs the new task more than it keeps. None may be
    left.

    Raises FileNotFoundError for a missing file, ValueError for one that is empty, for a start without recorded
    instructions and no file, and when nothing is left; each names the flag, what was found and what to do.
    """
    if cfg.craft_memory_instructions is not None:
        source = f"{_FLAG} {cfg.craft_memory_instructions}"
        sentences = read_instructions(cfg.craft_memory_instructions)
    else:
        source = f"the instructions recorded in {cfg.config_file_path}"
        recorded = setup.start_instructions
        sentences = list(dict.fromkeys(sentence for name in recorded for sentence in recorded[name]))
        if not sentences:
            raise ValueError(
                f"--craft_memory instructions: {cfg.config_file_path} records no instructions it was trained on; give "
                f"them with {_FLAG} FILE, one a line"
            )
    new = {_plain(sentence) for sentence in _trained_on(setup.dataset.manifest())}
    dropped = [sentence for sentence in sentences if _plain(sentence) in new]
    for sentence in dropped:
        say(f"Warning: {source}: {sentence!r} is an instruction of the new task and is left out")
    kept = [sentence for sentence in sentences if sentence not in dropped]
    if not kept:
        raise ValueError(f"{source}: all {len(sentences)} are of the new task, expected at least one old instruction")
    seen = {_plain(sentence) for sentence in shown}
    asked = [sentence for sentence in kept if _plain(sentence) not in seen]
    if len(asked) < len(kept):
        held = f"{len(kept) - len(asked)} of {len(kept)}"
        say(f"CRaFT: {held} old instructions are in --craft_memory_data and held there alone")
    return asked


def read_instructions(path: str) -> list[str]:
    """One sentence a line; blank lines are left out, and repetitions with a warning."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{_FLAG} {path}: no such file, expected a text file with one instruction a line")
    try:
        lines = [" ".join(line.split()) for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{_FLAG} {path}: not UTF-8 text ({error}), expected one instruction a line") from None
    sentences: dict[str, str] = {}
    for line in filter(None, lines):
        if _plain(line) in sentences:
            say(f"Warning: {_FLAG} {path}: {line!r} stands there more than once, its repetition is left out")
        sentences.setdefault(_plain(line), line)
    if not sentences:
        raise ValueError(f"{_FLAG} {path}: empty, expected one instruction a line")
    return list(sentences.values())


def _trained_on(manifest: dict[str, dict[str, Any]]) -> Iterable[str]:
    new = [entry for entry in manifest.values() if not entry.get("replay")]
    return (sentence for entry in new for sentence in entry["episodes"])


def _plain(sentence: str) -> str:
    """What decides whether two instructions are the same: the words, not their case or the blanks."""
    return " ".join(sentence.lower().split())
