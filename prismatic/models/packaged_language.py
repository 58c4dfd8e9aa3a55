"""A language model that a Python package ships as one GGUF file, which is read as data: no package is imported."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prismatic.command_line import is_installed
from prismatic.model_files import CheckpointError, MissingFileError, reading, regular_file
from prismatic.models.quiet_library import quiet_library

_COMPARED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class PackagedModel:
    """Where a language model lies.

    module: of the package, not imported. file: in its folder. install: the command that installs package and reader.
    """

    module: str
    file: str
    install: str

    def find(self) -> Path:
        """The file. MissingFileError, which names the command, when it or the package that reads it is not there."""
        for module in ("gguf", self.module):
            if not is_installed(module):
                raise MissingFileError(f"the Python package {module} is not installed: {self.install}")
        spec = importlib.util.find_spec(self.module)
        folders = [] if spec is None else spec.submodule_search_locations or []
        for folder in folders:
            if (path := Path(folder) / self.file).exists():
                return regular_file(path)
        raise MissingFileError(f"{self.file} is not in the package {self.module} at {list(folders)}: {self.install}")


@torch.no_grad()
def load_language_model_(model: PreTrainedModel, file: Path) -> None:
    """Fill a causal language model of the library with the dequantised weights of a GGUF file, in place.

    model: with `config`, as `AutoModelForCausalLM.from_config` makes it, in fp32. Raises CheckpointError, which names
    the file, for one that cannot be read or is of another geometry; the model is then as it was.
    """
    with reading(file), quiet_library():
        found: Any = type(model).from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_kernels=False,
            use_safetensors=True,
            weights_only=True,
        )
    _compare(found.config, model.config, file)
    state, own = found.state_dict(), model.state_dict()
    if state.keys() != own.keys():
        raise CheckpointError(f"{file}: other tensors than the model has: {sorted(state.keys() ^ own.keys())[:8]}")
    wrong = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if wrong:
        raise CheckpointError(f"{file}: {wrong[0]} holds NaN or infinity, expected finite values")
    for name, value in state.items():
        own[name].copy_(value)


def load_packaged_tokenizer(file: Path, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file; its special tokens are those whose ids the language model's `config` names.

    Raises CheckpointError, which names the file, for one that cannot be read or lacks one of these tokens.
    """
    with reading(file), quiet_library():
        read: Any = PreTrainedTokenizerFast.from_pretrained(
            file.parent,
            gguf_file=file.name,
            local_files_only=True,
            trust_remote_code=False,
            use_kernels=False,
            use_safetensors=True,
            weights_only=True,
        )
        core = read.backend_tokenizer
    tokens = {role: core.id_to_token(getattr(config, f"{role}_id")) for role in ("bos_token", "eos_token", "pad_token")}
    if missing := [role for role, token in tokens.items() if token is None]:
        raise CheckpointError(f"{file}: the tokenizer has no {missing[0]} of the id that the configuration names")
    longest = config.max_position_embeddings
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=longest, clean_up_tokenization_spaces=False, **tokens
    )


def _compare(found: PretrainedConfig, expected: PretrainedConfig, file: Path) -> None:
    is_, should = _facts(found), _facts(expected)
    for name in _COMPARED:
        same = is_[name] == should[name]
        if isinstance(should[name], float) and isinstance(is_[name], float):
            same = math.isclose(is_[name], should[name], rel_tol=1e-5)  # the file holds it in single precision
        if not same:
            raise CheckpointError(f"{file}: {name} is {is_[name]!r}, expected {should[name]!r}")


def _facts(config: PretrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {name: (values | (values.get("rope_parameters") or {})).get(name) for name in _COMPARED}
