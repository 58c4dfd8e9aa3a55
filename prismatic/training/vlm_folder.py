"""Folders with a whole VLM and no policy, as OpenVLA is published: a start that gets a new head.

    config.json                       model_type openvla, text_config of the body
    model.safetensors, or shards with model.safetensors.index.json
    tokenizer and preprocessor files

OpenVLA's own actions are text tokens: its language model is read, its token decoding, `norm_stats` in config.json and
dataset_statistics.json are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.model_files import CheckpointError, reading, weight_files
from prismatic.training.checkpoint_files import load_vla, read_config

_QUERIES = "action_queries.weight"
_LM_HEAD = "language_model.lm_head.weight"
# Derived from the configuration; old versions of the library stored them.
_DERIVED = re.compile(r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_SHOWN = 8


def load_vlm(path: Path, num_images: int | None = None) -> tuple[OpenVLAForActionPrediction, list[str]]:
    """The VLM of a folder in fp32, and the patterns of stored keys that are not used.

    Keys and shapes are compared before weights are read. The action queries are left to the caller, statistics are
    dropped. `num_images` replaces the configured number of images. Raises MissingFileError without weights;
    CheckpointError naming the missing keys and the shapes that do not fit, and unknown keys by pattern.
    """
    unused = _compare(path, read_config(path))
    vla = load_vla(path, num_images, new={_QUERIES})
    vla.norm_stats = None
    return vla, unused


def _compare(path: Path, config: OpenVLAConfig) -> list[str]:
    """Patterns of keys that are not used; CheckpointError unless all others are those of the model."""
    found = _stored_shapes(path)
    with reading(path / "config.json"), torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in OpenVLAForActionPrediction(config).state_dict().items()}
    new = {_QUERIES, _LM_HEAD} if config.tie_word_embeddings else {_QUERIES}
    missing = sorted(expected.keys() - found.keys() - new)
    unused = {name for name in found if name == _QUERIES or _DERIVED.fullmatch(name)}
    unknown = _patterns(found.keys() - expected.keys() - unused)
    shapes = {name: (found[name], expected[name]) for name in sorted(found.keys() & expected.keys())}
    wrong = [f"{name} is {is_}, expected {shape}" for name, (is_, shape) in shapes.items() if is_ != shape]
    problems = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    words = [f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}" for kind, keys in problems.items() if keys]
    if words:
        raise CheckpointError(f"{path}: the weights do not fit config.json: {'; '.join(words)}")
    return _patterns(unused)


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the folder's weight files; their headers are read alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        with reading(file), safe_open(file, "pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


def _patterns(names: Iterable[str]) -> list[str]:
    """`a.0.b`, `a.1.b` -> `a.*.b (2)`, sorted."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return [f"{pattern} ({count})" for pattern, count in sorted(counts.items())]
