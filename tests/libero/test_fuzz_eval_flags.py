"""Any value of any number or text flag of `run_libero_eval.py` ends in a result or in one line."""

import typing
from dataclasses import fields

import pytest
from fake_libero_world import FakeBackend

from experiments.robot.libero import evaluation, run_libero_eval
from experiments.robot.libero.eval_config import EvalConfig

NUMBERS = ("0", "-1", "0.5", "nan", "-inf", "inf", "1e30", "1e-300", "99999999999999999999", "", "abc", "None", "0x1")
TEXTS = (
    "",
    "0",
    "nan",
    "None",
    "a/b",
    "../b",
    "/dev/null",
    "a\nb",
    "\x1b[31m",
    "{}",
    "ä 'x' \"y\" #z",
    "x" * 5000,
    ",",
)
HINTS = typing.get_type_hints(EvalConfig)


def flags_of(*kinds: type) -> list[str]:
    return [f.name for f in fields(EvalConfig) if {*kinds} & {*(typing.get_args(HINTS[f.name]) or (HINTS[f.name],))}]


def ends_well(cfg, name: str, value: str, folder, capsys) -> None:
    """Run the program in the toy world, in its own folder, and judge how it ends."""
    folder.mkdir()
    base = {"pretrained_checkpoint": cfg.pretrained_checkpoint, "task_suite_name": "toy_suite", "save_videos": "none"}
    base |= {"num_trials_per_task": 1, "rollout_dir": "rollouts", "local_log_dir": "logs", "task_ids": "0"}
    words = [word for flag, text in (base | {name: value}).items() for word in (f"--{flag}", str(text))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run_libero_eval.py", *words])
        patch.setattr(evaluation, "LiberoBackend", FakeBackend)
        patch.chdir(folder)
        try:
            code = run_libero_eval.main()
        except SystemExit as end:
            code = end.code
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 0 or (code in (1, 2) and len(error) == 1 and len(error[0]) < 20_000), (name, value, code, error)


@pytest.mark.parametrize("name", flags_of(int, float))
def test_numbers(cfg, name, tmp_path, capsys):
    for number, value in enumerate(NUMBERS):
        ends_well(cfg, name, value, tmp_path / str(number), capsys)


@pytest.mark.parametrize("name", flags_of(str))
def test_texts(cfg, name, tmp_path, capsys):
    for number, value in enumerate(TEXTS):
        ends_well(cfg, name, value, tmp_path / str(number), capsys)
