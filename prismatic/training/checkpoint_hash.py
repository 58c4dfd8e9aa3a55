"""The hash by which evaluations know a checkpoint: of all its files but what is only said about them."""

from __future__ import annotations

import json
from pathlib import Path

from prismatic.evidence.checks import FOREIGN, parse_object
from prismatic.evidence.hashes import files_hash
from prismatic.training.checkpoint_folder import CARD, MANIFEST, has_own_card


def checkpoint_hash(path: str | Path) -> str | None:
    """16 hexadecimal digits of names, sizes and contents of a checkpoint's files; None for no folder or an empty one.

    The instructions that `craft_checkpoint.json` records do not count, nor does the model card beside it: they decide
    nothing that the policy does, and a card is written anew after an evaluation. Published folders count as a whole,
    but for a card of ours.
    """
    root = Path(path)
    manifest = root / MANIFEST
    files = sorted(item for item in root.rglob("*") if item.is_file()) if root.is_dir() else []
    if not files:
        return None
    counted = [file for file in files if file != root / CARD or not has_own_card(root)]
    replaced = {manifest: _without_instructions(manifest.read_bytes())} if manifest in files else None
    return files_hash(root, counted, replaced)


def _without_instructions(manifest: bytes) -> bytes:
    """The file as it was before the entry came: records of those checkpoints stay those of the same policy."""
    try:
        values = parse_object(manifest.decode(), MANIFEST, finite=False, limits=FOREIGN)
    except ValueError:
        return manifest
    if "instructions" not in values:
        return manifest
    del values["instructions"]
    return (json.dumps(values, indent=2) + "\n").encode()
