"""The command line of a training program: flags that need a switch, and bad input in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import draccus
from draccus.utils import DecodingError, ParsingError

from prismatic.training.config import FinetuneConfig

_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, KeyError, DecodingError, ParsingError)


def parse_flags(args: Sequence[str] | None = None) -> FinetuneConfig:
    """The flags of `finetune.py`, from `args` or the command line.

    Raises ValueError for a flag without its switch, also when it was given its default value, and for all that
    `FinetuneConfig` refuses.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        cfg = draccus.parse(FinetuneConfig, args=as_typed(words))
    except ParsingError as error:
        if isinstance(error.__cause__, ValueError):  # what `FinetuneConfig` says, without the parser's wrapping
            raise error.__cause__ from None
        raise
    cfg.check_switches({word[2:].partition("=")[0] for word in words if word.startswith("--")})
    return cfg


def as_typed(words: Sequence[str]) -> list[str]:
    """The words with the values of text flags in quotes: the parser reads values as YAML, where `off` is False."""
    texts = {f"--{f.name}" for f in fields(FinetuneConfig) if f.type in ("str", "str | None")}
    quoted: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if before in texts and word != "None":
            quoted.append(json.dumps(word, ensure_ascii=False))
        elif equals and name in texts and value != "None":
            quoted.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
        else:
            quoted.append(word)
    return quoted


@contextmanager
def bad_input_in_one_line(program: str) -> Iterator[None]:
    """Flags and files that do not fit end the program with one line and exit code 2, as argparse does."""
    try:
        yield
    except _BAD_INPUT as error:
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(2)
