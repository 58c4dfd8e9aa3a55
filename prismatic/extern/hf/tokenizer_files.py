"""Tokenizer files as data: `tokenizer.json` is the tokenizer, `tokenizer_config.json` says what its tokens are for.

Class names in the files are not followed. transformers 4 and 5 write different ones, and each refuses the other's; an
`auto_map` names code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from prismatic.model_files import (
    CheckpointError,
    MissingFileError,
    existing,
    nothing_there,
    read_json,
    reading,
    regular_file,
)

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_OTHERS = ("additional_special_tokens", "extra_special_tokens")  # of transformers 4 and 5
_SIDES = ("right", "left")
_NO_LIMIT = 1_000_000
_QWEN_PAD = "<|endoftext|>"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder, written by transformers 4 or 5.

    Only `tokenizer.json` is needed. Raises MissingFileError and CheckpointError, naming the file.
    """
    if not Path(folder).exists():
        raise MissingFileError(nothing_there(str(folder), "a folder with tokenizer.json"))
    folder = existing(Path(folder))
    file = folder / TOKENIZER_FILE
    if not file.exists():
        found = sorted(path.name for path in folder.glob("*") if path.is_file())[:20] if folder.is_dir() else "a file"
        raise MissingFileError(f"{file} does not exist: the tokenizer is missing; expected {file.name}, found {found}")
    with reading(regular_file(file)):
        core = Tokenizer.from_file(str(file))
    settings = _settings(folder)
    if core.token_to_id(_QWEN_PAD) is not None:  # what the prompts are padded with when no file says it
        settings = {"pad_token": _QWEN_PAD} | settings
    with reading(file):
        return PreTrainedTokenizerFast(tokenizer_object=core, **settings)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files; both supported versions of transformers, and older ones, read them."""
    tokenizer.save_pretrained(str(folder))
    file = folder / TOKENIZER_CONFIG
    if not (folder / TOKENIZER_FILE).exists():  # a tokenizer written in Python, which only its own class reads
        return
    values = {name: value for name, value in read_json(file).items() if name not in ("backend", "is_local", "auto_map")}
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", _OTHERS[0]: _others(values, file), _OTHERS[1]: {}}
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings(folder: Path) -> dict[str, Any]:
    """What the tokenizer is made with, from the two descriptions of the folder; tokenizer_config.json wins."""
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        file = folder / name
        if not (file.exists() or file.is_symlink()):
            continue
        values = read_json(file)
        settings |= {role: _token(values[role], f"{file}: {role}") for role in _ROLES if values.get(role) is not None}
        if others := _others(values, file):
            settings["additional_special_tokens"] = others
        settings |= _limits(values, file)
    return settings


def _limits(values: dict, file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    side, longest, tidy = (values.get(n) for n in ("padding_side", "model_max_length", "clean_up_tokenization_spaces"))
    if side is not None:
        if side not in _SIDES:
            raise CheckpointError(f"{file}: padding_side is {side!r}, expected one of {', '.join(_SIDES)}")
        found["padding_side"] = side
    if longest is not None:
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise CheckpointError(f"{file}: model_max_length is {longest!r}, expected a positive number")
        if longest <= _NO_LIMIT:  # 1e30 stands for none
            found["model_max_length"] = int(longest)
    if isinstance(tidy, bool):
        found["clean_up_tokenization_spaces"] = tidy
    return found


def _others(values: dict, file: Path) -> list[str]:
    tokens: dict[str, None] = {}
    for name in _OTHERS:
        entry = values.get(name) or []
        if not isinstance(entry, list | dict):
            raise CheckpointError(f"{file}: {name} is {entry!r}, expected a list of tokens")
        entries = entry.values() if isinstance(entry, dict) else entry
        tokens |= dict.fromkeys(_token(token, f"{file}: {name}") for token in entries)
    return list(tokens)


def _token(value: Any, where: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{where} is {value!r}, expected a token")
    return text
