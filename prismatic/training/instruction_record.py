"""The instructions a policy was trained on, as `craft_checkpoint.json` records them: {data set name: [sentence]}."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismatic.model_files import CheckpointError

_ENTRY = "instructions"


def recorded_instructions(manifest: Mapping[str, Any], source: Path) -> dict[str, list[str]]:
    """The entry of a checkpoint's manifest; {} for one without it (older and published checkpoints).

    CheckpointError naming `source`, the file it was read from, for an entry of another form.
    """
    recorded = manifest.get(_ENTRY, {})
    lists = recorded.values() if isinstance(recorded, dict) else [None]
    if not all(isinstance(found, list) and all(isinstance(text, str) for text in found) for found in lists):
        raise CheckpointError(f"{source}: {_ENTRY} is {recorded!r}, expected {{data set name: [sentence, ...]}}")
    checked: dict[str, list[str]] = recorded
    return checked


def with_trained_on(
    recorded: Mapping[str, list[str]], data: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, list[str]]:
    """`recorded` and the instructions of the kept episodes of the training data, distinct and sorted per data set.

    `data` is `manifest()` of the data set, {name: {"episodes": {instruction: ids}}}; a known name is united.
    """
    new = {name: sorted({*recorded.get(name, []), *entry["episodes"]}) for name, entry in data.items()}
    return {**recorded, **new}
