"""The wrong folder ends every program with one line on stderr, exit code 2, and nothing written."""

import importlib.util
import sys
from pathlib import Path

import pytest

from prismatic.training.checkpoint_folder import LATEST, MANIFEST

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = "experiments/robot/libero/run_libero_eval.py"
PROGRAMS = {  # the flags beside the wrong folder
    "vla-scripts/finetune.py": ("--config_file_path", "--run_root_dir out"),
    EVALUATION: ("--pretrained_checkpoint", "--local_log_dir out --rollout_dir out"),
    "vla-scripts/merge_lora_weights_and_save.py": ("--lora_finetuned_checkpoint_dir", "--output_dir out"),
    "vla-scripts/interpolate_weights.py": ("--checkpoint", "--output out"),
    "vla-scripts/measure_retention.py": ("--checkpoint", "--start x --dataset_name libero_x --output out"),
    "experiments/robot/doctor/__main__.py": ("--checkpoint", "--quick"),
}


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """`runs/a` of a run whose newest checkpoint is `runs/a--7_chkpt`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a--7_chkpt").mkdir(parents=True)
    (tmp_path / "runs/a--7_chkpt" / MANIFEST).write_text("{}")
    (tmp_path / "runs/a").mkdir()
    (tmp_path / "runs/a" / LATEST).write_text("a--7_chkpt\n")
    return tmp_path


def exit_code(monkeypatch, program: str, words: str) -> int:
    name = Path(program).stem.replace("__main__", "doctor_main")
    spec = importlib.util.spec_from_file_location(name, ROOT / program)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("sys.argv", [program, *words.split()])
    spec.loader.exec_module(module)
    main = module.main if hasattr(module, "main") else module.finetune
    try:
        return main() or 0
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/a", "is the folder of a run; its newest checkpoint is runs/a--7_chkpt"),
        ("runs", "a folder of runs with 1 checkpoints; the newest is runs/a--7_chkpt"),
        ("some-lab/Policy", "hf download some-lab/Policy"),
        ("runs/a--7_chkpt", "config.json does not exist"),
    ],
)
def test_the_wrong_folder_is_one_line_and_exit_code_2(run_folder, monkeypatch, capsys, program, path, words):
    flag, others = PROGRAMS[program]
    assert exit_code(monkeypatch, program, f"{flag} {path} {others}") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (run_folder / "out").exists()
