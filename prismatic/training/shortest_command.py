"""The command that makes a run, from the flags that its checkpoint records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from prismatic.command_line import parse
from prismatic.craft.settings import plain_values
from prismatic.training.config import FinetuneConfig

PROGRAM = "craft-finetune"


def shortest_command(recorded: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Words of a command line whose flags resolve to the recorded ones, without those that say nothing new; True.

    A record holds resolved flags, among them what a preset says; each flag goes that changes nothing. Records of other
    versions, whose flags do not resolve here, give all that are not at their default, and False.
    """
    defaults = plain_values({entry.name: entry.default for entry in fields(FinetuneConfig)})
    given = {name: value for name, value in recorded.items() if name in defaults and value != defaults[name]}
    wanted = _resolved(given)
    for name in list(given) if wanted is not None else ():
        fewer = {other: value for other, value in given.items() if other != name}
        if _resolved(fewer) == wanted:
            given = fewer
    return [PROGRAM, *_words(given)], wanted is not None


def _words(flags: Mapping[str, Any]) -> list[str]:
    return [
        part
        for name, value in flags.items()
        for part in ([f"--{name}={value}"] if str(value).startswith("--") else [f"--{name}", str(value)])
    ]


def _resolved(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return parse(FinetuneConfig, _words(flags)).to_dict()
    except ValueError:
        return None
