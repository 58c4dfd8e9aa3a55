"""Any value of any number or text flag of `finetune.py` ends in a run or in one line: never in a traceback."""

import shutil
import typing
from dataclasses import fields
from pathlib import Path

import micro
import pytest
from accelerate.state import AcceleratorState

from experiments.robot.libero.eval_config import EvalConfig
from prismatic.command_line import parse_or_exit
from prismatic.models.presets import PRESETS
from prismatic.programs import finetune
from prismatic.training.config import FinetuneConfig

SHIPPED = Path(__file__).parents[2] / "datasets" / "rlds"
OLD = str(SHIPPED / "libero_object_scripted_no_noops")
NUMBERS = ("0", "-1", "0.5", "nan", "-inf", "inf", "1e30", "1e-300", "99999999999999999999", "", "abc", "None", "0x1")
TEXTS = ("", "0", "nan", "None", "a/b", "../b", "/dev/null", "/proc/1/mem", "a\nb", "\x1b[31m", "{}", "ä 'x' \"y\" #z")
TEXTS += ("x" * 300, "x" * 5000, "a:b", ",", "a,,b")
# What makes a flag matter.
SWITCHES = {
    "lora_": {"use_lora": True},
    "craft_": {"use_craft": True},
    "craft_memory_data": {"use_craft": True, "craft_memory": "data", "craft_signal": "features"},
    "craft_probe_size": {"use_craft": True, "craft_probe_data": str(micro.DATA / "libero_mini_no_noops")},
    "replay_": {"replay_data": OLD},
    "l2sp_": {"retention_method": "l2sp"},
    "val_": {"use_val_set": True, "val_fraction": "0.5"},
    "resume_step": {"resume": True},
    "resum_vla_path": {"resume": True},
    "keep_every": {"keep_last": 1},
    "compile_backend": {"compile": True},
}


def flags_of(kind: type) -> list[str]:
    hints = typing.get_type_hints(FinetuneConfig)
    return [f.name for f in fields(FinetuneConfig) if kind in (typing.get_args(hints[f.name]) or (hints[f.name],))]


def ends_well(name: str, value: str, folder: Path, capsys) -> None:
    """Run the program in this process and judge how it ends."""
    base = {"config_file_path": "tiny", "data_root_dir": micro.DATA, "dataset_name": "libero_mini_no_noops"}
    base |= {
        "run_root_dir": folder / "runs",
        "run_id_override": "run",
        "batch_size": 1,
        "max_steps": 1,
        "device": "cpu",
    }
    base |= {"save_training_state": False, "image_aug": False}
    for prefix, switch in SWITCHES.items():
        base |= switch if name.startswith(prefix) else {}
    words = [word for flag, text in (base | {name: value}).items() for word in (f"--{flag}", str(text))]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["finetune.py", *words])
        patch.setitem(PRESETS, "tiny", micro.MICRO)
        patch.chdir(folder)
        try:
            finetune.main()
            code = 0
        except SystemExit as end:
            code = end.code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune.py:")]
    if code:
        assert code in (1, 2) and len(error) == 1 and len(error[0]) < 20_000, (name, value, code, error)
    shutil.rmtree(folder / "runs", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*flags_of(int), *flags_of(float)}))
def test_numbers(name, tmp_path, capsys):
    for value in NUMBERS:
        ends_well(name, value, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", flags_of(str))
def test_texts(name, tmp_path, capsys):
    for value in TEXTS:
        ends_well(name, value, tmp_path, capsys)


@pytest.mark.parametrize("kind", [FinetuneConfig, EvalConfig])
def test_names_that_are_nearly_flags(kind, capsys, monkeypatch):
    names = {f.name for f in fields(kind)}
    for name in names:
        middle = len(name) // 2
        for near in {name[:-1], name + "s", name[:middle] + name[middle + 1 :]} - names:
            monkeypatch.setattr("sys.argv", ["program", f"--{near}", "1"])
            with pytest.raises(SystemExit) as ended:
                parse_or_exit(kind)
            (line,) = capsys.readouterr().err.splitlines()
            assert ended.value.code == 2
            message = f"--{near}: no such flag; did you mean --"
            assert message in line and line.split(message)[1].split("?")[0] in names
