"""English prose from packages that every installation has: what the language model is tested on, and what is replayed.

| text | kind | from |
|---|---|---|
| reference | technical prose | half of the topics of Python's language reference (`pydoc_data.topics`) |
| licence | legal prose | the GNU General Public License, version 3, among numpy's licences |
| replayed | as `reference` | paragraphs of the other half of the topics that are not in `reference` |

A paragraph counts as prose when it has 25 words or more, ends with a full stop and is nearly all letters. The first two
are never trained on. Other versions of Python have other texts: a record names each text by its SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pydoc_data.topics
import re
from collections.abc import Iterable
from dataclasses import dataclass

WORDS = 25
LETTERS = 0.9
_LICENCE = re.compile(r"GNU GENERAL PUBLIC LICENSE\s+Version 3.*?END OF TERMS AND CONDITIONS", re.DOTALL)


@dataclass(frozen=True)
class Text:
    """A text, where it comes from, and its hash."""

    name: str
    source: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def facts(self) -> dict[str, str | int]:
        """For a record."""
        return {"source": self.source, "characters": len(self.content), "sha256": self.sha256}


def held_out_texts() -> list[Text]:
    """The two texts that perplexity is measured on. ValueError when numpy's licences hold no such licence."""
    reference = Text("reference", "pydoc_data.topics, every second topic", _joined(_reference(0)))
    return [reference, Text("licence", "numpy's licence files: GPL 3", _joined(_paragraphs(_licence())))]


def replayed_text() -> Text:
    """The text for `--replay_text`."""
    held_out = set(_reference(0))
    rest = (paragraph for paragraph in _reference(1) if paragraph not in held_out)
    return Text("replayed", "pydoc_data.topics, the other topics", _joined(rest))


def _reference(first: int) -> list[str]:
    topics = sorted(pydoc_data.topics.topics)[first::2]
    return [paragraph for topic in topics for paragraph in _paragraphs(pydoc_data.topics.topics[topic])]


def _licence() -> str:
    files = importlib.metadata.files("numpy") or []
    for file in sorted(files, key=str):
        if file.name.startswith("LICENSE") and (found := _LICENCE.search(file.read_text(encoding="utf-8"))):
            return found[0]
    raise ValueError("the licence files of numpy hold no GNU General Public License: install numpy from its wheel")


def _joined(paragraphs: Iterable[str]) -> str:
    return "\n\n".join(dict.fromkeys(paragraphs))


def _paragraphs(text: str) -> list[str]:
    """The prose of a text, a line each."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if _is_prose(block)]


def _is_prose(block: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in block)
    return len(block.split()) >= WORDS and block.endswith(".") and letters >= LETTERS * len(block)
