"""The flags of `finetune.py`: grouped, explained, each default from one place, answered without torch."""

import subprocess
import sys
import typing
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest

from prismatic.command_line import UsageError, groups_of
from prismatic.craft.settings import PRESET_FIELDS, PRESETS, CRaFTConfig
from prismatic.training.command_line import parse_flags
from prismatic.training.config import FinetuneConfig

ROOT = Path(__file__).parents[2]
FLAGS = {entry.name: entry for entry in fields(FinetuneConfig)}


def test_every_flag_is_in_a_group_and_says_what_it_does():
    groups = groups_of(FinetuneConfig)
    assert "" not in groups and sum(map(len, groups.values())) == len(FLAGS)
    assert [name for name, entry in FLAGS.items() if not entry.metadata.get("help")] == []


def test_every_number_has_a_range():
    kinds = typing.get_type_hints(FinetuneConfig)
    numbers = [n for n, k in kinds.items() if n in FLAGS and {int, float} & {k, *typing.get_args(k)}]
    assert len(numbers) > 40
    assert [n for n in numbers if str(FLAGS[n].metadata["range"]) == "a finite number"] == []


@pytest.mark.parametrize(
    "words",
    [
        "--max_grad_norm -1",  # would turn gradients round
        "--max_grad_norm 0",  # would learn nothing
        "--lora_dropout nan --use_lora True",
        "--num_data_workers -1",
        "--learning_rate inf",
        "--learning_rate 1e30",
        "--max_steps 1e30",
        "--seed -1",
    ],
)
def test_numbers_that_would_train_something_else_are_refused(words):
    flag, value = words.split()[:2]
    with pytest.raises(UsageError, match=f"{flag} is .*{value[:2]}.*, expected .*(at least|more than)"):
        parse_flags(words.split())


@pytest.mark.parametrize("setting", [entry.name for entry in fields(CRaFTConfig) if entry.name != "aim"])
def test_a_flag_of_the_constraint_has_the_default_of_its_setting(setting):
    flag, default = FLAGS[f"craft_{setting}"], getattr(CRaFTConfig(), setting)
    if setting in PRESET_FIELDS:
        assert flag.default is None
        assert all(f"{name} " in flag.metadata["help"] for name in PRESETS)
    else:
        assert flag.default == (default.value if isinstance(default, Enum) else default)


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--batch_size", "0"], 2), (["--no_such", "1"], 2)])
def test_help_and_mistakes_are_answered_without_torch(words, code):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['finetune.py', *{words}]\n"
        "try:\n    runpy.run_path('vla-scripts/finetune.py', run_name='__main__')\n"
        "except SystemExit as end:\n    ended = end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(ended)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 0:
        assert "keeping what the start could do:" in done.stdout
