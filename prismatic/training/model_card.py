"""The model card of a checkpoint folder: `README.md` as the Hugging Face Hub reads it, made of what the folder records.

The hub reads the YAML at the beginning. Which licence the weights have is for their owner to say: the card says
`unknown` until the line is edited. What the owner writes into the YAML about licence and base model, and below the last
line of the card, stays when the card is written anew.

Texts of others (names, instructions, flags) stand as code or as quoted YAML: nothing in them is markup.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prismatic.evidence.cells import markdown_block, markdown_code, one_line, table_row
from prismatic.evidence.checks import is_integer, is_number
from prismatic.evidence.files import write_text
from prismatic.model_files import read_json
from prismatic.training.card_results import Results, results_section
from prismatic.training.checkpoint_folder import CARD, LARGEST_CARD, MANIFEST
from prismatic.training.checkpoint_folder import CARD_END as END
from prismatic.training.recorded_convention import recorded_convention
from prismatic.training.shortest_command import shortest_command
from prismatic.vla.datasets.registry import expand_data_set_names

_OWNERS = ("license", "license_name", "license_link", "base_model")
_EXPORTED = "exported"
"""Entry beside those of the manifest: the folder is an export in the published layout, with merged weights."""
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")
_MOST_SENTENCES = 40
_LIBERO = (
    "position and rotation (axis-angle) deltas as LIBERO's controller takes them, then the gripper in [0, 1], where "
    "1 is open. LIBERO's own gripper command is -1 for open and 1 for closed."
)
_OWN = (
    "as the configuration with which they were registered made them (`--data_set_file`): its units, its frame, and its "
    "convention of the gripper."
)


def write_card(
    folder: Path,
    results: Sequence[Results] = (),
    manifest: Mapping[str, Any] | None = None,
    earlier: Path | None = None,
) -> Path:
    """Write the card of a checkpoint folder of ours and return its path.

    Args:
        folder: with `dataset_statistics.json`, and `craft_checkpoint.json` unless it is an export.
        results: evaluations for its table.
        manifest: of an export in the published layout: that of the checkpoint it was made of.
        earlier: the folder that this one will replace, whose card may have an owner's words. None: this one.

    Raises MissingFileError and CheckpointError for files that cannot be read, OSError when the card cannot be written.
    """
    facts = read_json(folder / MANIFEST) if manifest is None else {**manifest, _EXPORTED: True}
    statistics = _utf8(read_json(folder / "dataset_statistics.json"))
    owners, below = _kept((earlier or folder) / CARD)
    write_text(folder / CARD, card_text(_utf8(facts), statistics, results, owners) + below)
    return folder / CARD


def card_text(
    manifest: Mapping[str, Any],
    statistics: Mapping[str, Any],
    results: Sequence[Results] = (),
    owners: Mapping[str, Any] | None = None,
) -> str:
    """The card, from the contents of the two files; `owners`: entries of the YAML that its owner wrote."""
    training = _object(manifest.get("training"))
    sections = [
        _front_matter(manifest, statistics, owners or {}),
        _introduction(manifest, training),
        _section("Use", _use(manifest, statistics)),
        _section("Actions", _actions(manifest, training, statistics)),
        _section("Data", _data(manifest, training, statistics)),
        _section("Method", _method(manifest, training)),
        _section("Evaluation", results_section(results)),
        _section("Reproduce", _reproduce(manifest, training)),
        END,
    ]
    return "\n\n".join(sections) + "\n"


def _kept(card: Path) -> tuple[dict[str, Any], str]:
    """(entries of the YAML, text below the card) that the owner of an earlier card wrote."""
    try:
        if not card.is_file() or card.stat().st_size > LARGEST_CARD:
            return {}, ""
        text = card.read_text(encoding="utf-8")
        front = _FRONT.match(text)
        values = yaml.safe_load(front[1]) if front else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}, ""  # another's file, or one that was damaged
    owners = {name: _object(values).get(name) for name in _OWNERS}
    below = text.partition(f"\n{END}\n")[2].lstrip("\n")  # a whole line, which no text of others can be
    return {name: value for name, value in owners.items() if _is_text(value)}, f"\n{below}" if below else ""


def _is_text(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


# ------------------------------------------------------------------------------------------------------- the sections


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _front_matter(manifest: Mapping[str, Any], statistics: Mapping[str, Any], owners: Mapping[str, Any]) -> str:
    base = _HUB_CACHE.search(str(_object(manifest.get("start")).get("path")).replace("\\", "/"))
    values: dict[str, Any] = {"license": "unknown", "library_name": "craft-vla", "pipeline_tag": "robotics"}
    values |= {"tags": ["robotics", "vision-language-action", "vla", f"tuning-{manifest.get('tuning')}"]}
    values |= {"base_model": f"{base[1]}/{base[2]}"} if base else {}
    values |= {"datasets": sorted({*_object(manifest.get("datasets")), *statistics})}
    values |= owners
    clean = {name: list(map(one_line, v)) if isinstance(v, list) else one_line(v) for name, v in values.items()}
    return f"---\n{yaml.safe_dump(clean, sort_keys=False, allow_unicode=True, width=float('inf'))}---"


def _introduction(manifest: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    names = ", ".join(markdown_code(name) for name in _trained_on(training)) or "data that it does not record"
    return (
        f"# Vision-language-action policy, step {_number(manifest.get('step'))}\n\n"
        f"A policy that turns camera images, the robot's state and an instruction into a chunk of actions, fine-tuned "
        f"with CRaFT's training code on {names}. This page is made of what the folder records.\n\n"
        "**Licence:** the front matter says `unknown` until the owner of the weights edits it. What the start model "
        "and the data allow decides; the licence of the training code says nothing about the weights."
        + "\n\nThe files have the layout of published VLA-Adapter checkpoints."
        * bool(manifest.get(_EXPORTED))
    )


def _use(manifest: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
    spec = _object(manifest.get("action_spec"))
    keys, cameras = list(statistics), next(iter(_object(manifest.get("cameras")).values()), None)
    names = cameras if isinstance(cameras, list) else ["image", "wrist_image"]
    count = manifest.get("num_images")
    names = [str(name) for name in names][: count if is_integer(count) else None]
    trained = [key for key in _trained_on(_object(manifest.get("training"))) if key in keys]
    options = f", unnorm_key={_python((trained or keys)[0])}" if len(keys) > 1 else ""
    is_adapter = manifest.get("tuning") == "lora" and not manifest.get("merge") and not manifest.get(_EXPORTED)
    options += ', base="START_FOLDER"' if is_adapter else ""
    images = "{" + ", ".join(f"{_python(name)}: image_{n}" for n, name in enumerate(names, start=1)) + "}"
    code = [
        "import craft_vla",
        "",
        f'policy = craft_vla.load_policy("FOLDER"{options})  # where this folder is',
        f'actions = policy.predict({images}, state, "the task in words")'
        f"  # ({_number(spec.get('chunk_len'))}, {_number(spec.get('action_dim'))})",
    ]
    state = f"state: {_number(spec.get('proprio_dim'))} numbers" if manifest.get("use_proprio") else "state: None"
    lines = [markdown_block("\n".join(code), "python"), "", f"Images: uint8 RGB, upright, one per camera; {state}."]
    if is_adapter:
        lines += ["", "The folder holds LoRA adapters: their base is needed too, or `craft-merge` first."]
    return [*lines, "", 'To upload: `hf upload ORGANISATION/NAME FOLDER --exclude "training_state/*"`.']


def _actions(manifest: Mapping[str, Any], training: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
    spec = _object(manifest.get("action_spec"))
    lines = [
        f"Chunks of {_number(spec.get('chunk_len'))} actions of {_number(spec.get('action_dim'))} numbers, normalised "
        f"with {markdown_code(spec.get('normalization'))} in training and returned in the units of the data.",
        "",
    ]
    libero = [name for name in statistics if (recorded_convention(manifest, name) or {}).get("libero") is True]
    others = [name for name in statistics if name not in libero]
    for names, words in ((libero, _LIBERO), (others, _OWN)):
        if names:
            lines.append(f"- {', '.join(map(markdown_code, names))}: {words}")
    return lines


def _data(manifest: Mapping[str, Any], training: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
    trained = _trained_on(training)
    lines = ["| statistics key | trained on | episodes | steps |", "|---|---|---:|---:|"]
    for key, entry in statistics.items():
        facts = _object(entry)
        when = "in this run" if key in trained else "by the start model, or replayed"
        counts = (_number(facts.get("num_trajectories")), _number(facts.get("num_transitions")))
        lines.append(table_row([markdown_code(key), when, *counts]))
    for name, sentences in _object(manifest.get("instructions")).items():
        if isinstance(sentences, list) and sentences:
            lines += ["", f"Instructions of {markdown_code(name)}:", ""]
            lines += [f"- {markdown_code(sentence)}" for sentence in sentences[:_MOST_SENTENCES]]
            lines += [f"- and {len(sentences) - _MOST_SENTENCES} more"] * (len(sentences) > _MOST_SENTENCES)
    return lines


def _method(manifest: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    rows = [("trained weights", markdown_code(manifest.get("tuning")))]
    rows += [("LoRA rank", _number(training.get("lora_rank")))] if training.get("use_lora") else []
    rows += [("method", markdown_code(training.get("retention_method") or "none"))]
    rows += _drift_rows(_object(manifest.get("craft")), training)
    rows += [("replayed", markdown_code(training["replay_data"]))] if training.get("replay_data") else []
    rows += [("optimizer steps", f"{_number(manifest.get('step'))} of {_number(training.get('max_steps'))}")]
    rows += [("samples seen", _number(manifest.get("samples_seen")))]
    found = _object(manifest.get("interpolation"))
    if found:
        scale, parts = _number(found.get("adapter_scale")), markdown_code(found.get("parts"))
        way = f"{scale} of the way from the start to the trained weights ({parts})"
        rows.append(("interpolated", f"{way}; drift and budget are of the trained ones"))
    return ["| | |", "|---|---|", *map(table_row, rows)]


def _drift_rows(craft: Mapping[str, Any], training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Budget, drift and verdict, as far as the method measures them."""
    if "achieved_drift" not in craft:
        return []
    unit = f" ({markdown_code(craft['unit'])})" if craft.get("unit") else ""
    rows = [
        ("preset", markdown_code(training.get("craft_preset"))),
        ("held", f"{markdown_code(training.get('craft_signal'))} on {markdown_code(training.get('craft_memory'))}"),
        ("budget", f"{_number(training.get('craft_retention_budget'))}{unit}"),
        ("achieved drift", f"{_number(craft['achieved_drift'])}, averaged over the last constrained steps"),
    ]
    rows += [("verdict", markdown_code(craft["verdict"]))] if craft.get("verdict") else []
    landing = _object(craft.get("landing"))
    if is_number(landing.get("scale")):
        scale, drift = _number(landing["scale"]), _number(landing.get("drift"))
        rows.append(("landed", f"at {scale} of the way from the start weights, drift {drift}"))
    return rows


def _reproduce(manifest: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{markdown_code(f'{name} {v}')}" for name, v in _object(manifest.get("versions")).items())
    words, resolves = shortest_command(training)
    said = "The shortest command with the recorded settings:" if resolves else "Flags of another version, as recorded:"
    command = shlex.join(words) if training else "# the folder records no flags"
    return [said, "", markdown_block(command, "bash"), "", f"Versions: {versions or 'not recorded'}."]


# -------------------------------------------------------------------------------------------------------- small things


def _trained_on(training: Mapping[str, Any]) -> list[str]:
    try:
        return list(expand_data_set_names(str(training.get("dataset_name") or "")))
    except ValueError:
        return []


def _utf8(value: Any) -> Any:
    """JSON values whose texts can be written: escapes can make text that is no UTF-8."""
    if isinstance(value, dict):
        return {_utf8(name): _utf8(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_utf8(entry) for entry in value]
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    """A number as text. Infinite ones are recorded as text."""
    if is_integer(value):
        return f"{value:,}" if abs(value) < 10**18 else "?"
    return f"{value:.4g}" if is_number(value) else ("inf" if value == "inf" else "not recorded")


def _python(text: str) -> str:
    return json.dumps(one_line(text), ensure_ascii=False)
