"""The model that adapters belong to: how it is recorded, and where it is looked for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.evidence.hashes import sha256_of
from prismatic.model_files import CheckpointError, MissingFileError, weight_files
from prismatic.training.checkpoint_files import load_tensors, tensors_hash, weights_hash
from prismatic.training.folder_kinds import is_checkpoint, is_vlm

_KINDS = ("checkpoint", "native", "vlm")
_NOTHING = "not there"


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint folder, the folder of a VLM or the file of a native one, and the hash of its weights.

    path: absolute; of folders written by earlier versions as it was typed. relative: the path seen from the checkpoint
    that belongs to it, None where there is none yet.
    """

    kind: str
    path: str
    sha256: str
    relative: str | None = None

    @classmethod
    def of_checkpoint(cls, path: Path) -> BaseModel:
        """Identity of a checkpoint folder (LoRA checkpoints count with their adapters)."""
        adapter = Path(path) / "lora_adapter" / "adapter_model.safetensors"
        digest = weights_hash(path) or tensors_hash(load_tensors(adapter))
        return cls("checkpoint", os.path.abspath(path), digest)

    @classmethod
    def of_vlm(cls, path: Path) -> BaseModel:
        """Identity of a folder with a VLM alone; MissingFileError without its weights."""
        return cls("vlm", os.path.abspath(path), sha256_of(*weight_files(path)))

    @classmethod
    def of_native(cls, file: Path, sha256: str) -> BaseModel:
        """Identity of a native VLM's file."""
        return cls("native", os.path.abspath(file), sha256)

    def to_dict(self, folder: Path) -> dict[str, str]:
        """JSON-ready fields for the manifest of the checkpoint `folder`."""
        relative = os.path.relpath(self.path, os.path.abspath(folder))
        return {"kind": self.kind, "path": self.path, "relative": relative, "sha256": self.sha256}

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None, source: Path) -> BaseModel:
        """Inverse of `to_dict`; CheckpointError naming `source` when the entry is missing or of another kind."""
        if not values:
            raise CheckpointError(f"{source}: base is missing: the adapter cannot be applied to anything")
        expected = {"kind", "path", "sha256"}
        texts = all(isinstance(value, str) and value and "\0" not in value for value in values.values())
        if not expected <= values.keys() <= expected | {"relative"} or not texts or values["kind"] not in _KINDS:
            raise CheckpointError(
                f"{source}: base is {str(values)[:200]}, expected kind ({' or '.join(_KINDS)}), path and sha256"
            )
        return cls(**values)

    def places(self, adapted: Path) -> list[Path]:
        """Where it may be, in the order of trying, for the checkpoint folder `adapted` that belongs to it.

        They may have moved together (the relative path) or apart (the absolute one), or into one folder. Earlier
        versions recorded a path relative to the working directory, as a rule a folder above the checkpoint.
        """
        folder = Path(os.path.abspath(adapted))
        found = [] if self.relative is None else [Path(os.path.normpath(folder / self.relative))]
        if os.path.isabs(self.path):
            found.append(Path(self.path))
        else:
            found += [Path(os.path.abspath(self.path)), *(above / self.path for above in folder.parents)]
        name = re.split(r"[/\\]", self.path.rstrip("/\\"))[-1]
        return list(dict.fromkeys([*found, folder.parent / name]))

    def find(self, adapted: Path, given: str | Path | None = None, chain: tuple[Path, ...] = ()) -> Path:
        """Where it is now: `given` (`--base_checkpoint`), or the first of `places` with the recorded weights.

        chain: resolved folders of the checkpoints whose base is looked for, outermost first. The hash of a native VLM
        is compared by who loads it.

        Raises CheckpointError with what was found at each place, MissingFileError when nothing was anywhere.
        """
        found: dict[Path, str] = {}
        for place in self.places(adapted) if given is None else [Path(given)]:
            found[place] = self._what_is_at(place, (*chain, Path(adapted).resolve()))
            if found[place] == self.sha256:
                return place
        nothing = set(found.values()) == {_NOTHING}
        looked = "; ".join(f"{place}: {what}" for place, what in found.items())
        advice = "name its folder with --base_checkpoint (--base of interpolate_weights.py)"
        if chain:
            advice = f"merge the adapters of {adapted} first (merge_lora_weights_and_save.py)"
        raise (MissingFileError if nothing else CheckpointError)(
            f"the base model of {adapted} was not found: {looked}; expected weights with sha256 "
            f"{self.sha256}. {advice[0].upper()}{advice[1:]}"
        )

    def _what_is_at(self, place: Path, chain: tuple[Path, ...]) -> str:
        """The hash of the weights, or why there is none."""
        if not place.exists():
            return _NOTHING
        if self.kind == "native":
            return self.sha256
        if place.resolve() in chain:
            raise CheckpointError(
                f"{chain[-1]}: the checkpoint is its own base: {' -> '.join(map(str, chain))} -> {place}"
            )
        try:
            if self.kind == "vlm":
                return BaseModel.of_vlm(place).sha256 if is_vlm(place) else "no VLM without a head"
            return BaseModel.of_checkpoint(place).sha256 if is_checkpoint(place) else "no checkpoint"
        except CheckpointError as error:  # incomplete: it may be whole elsewhere
            return str(error)
