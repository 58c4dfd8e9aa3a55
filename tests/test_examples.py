"""The examples do what they say: the library keeps an old task, and the short step is the step of the training loop."""

import ast
import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prismatic.training.step import optimizer_step

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "notebooks.py"})
START = "pretrained_models/tiny-libero-object"


@pytest.fixture
def below(tmp_path, monkeypatch):
    """The temporary folder of an example, which runs in the folder of the repository and draws without a display."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(ROOT / "examples"), *sys.path])
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    yield tmp_path
    pyplot.close("all")


def example(name: str, **numbers: object) -> dict:
    """What an example leaves behind, with other values of constants: NAME=VALUE, or a flag "name": VALUE."""
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    for constant, value in numbers.items():
        text, count = re.subn(rf'(\b{constant}=|"{constant}": )[^,)}}]+', rf"\g<1>{value!r}", text)
        assert count == 1, constant
    names = {"__name__": name}
    exec(compile(text, f"{name}.py", "exec"), names)
    return names


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_an_example_fits_on_one_page_and_says_how_to_run_it(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 68
    said = ast.get_docstring(ast.parse(text))
    assert f"python examples/{page.name}" in said or "__main__" not in text and "# %%" not in text


def test_a_policy_follows_a_demonstration_in_both_ways(below, capsys):
    names = example("inference")
    actions, ways = names["actions"], names["ways"]
    assert names["chunk"].shape == (8, 7) and set(ways) == {"open loop", "ensembling"}
    for taken in ways.values():
        assert taken.shape == actions.shape
        assert np.abs(taken - actions).mean() < np.abs(actions - actions.mean(axis=0)).mean() / 2
    np.testing.assert_array_equal(ways["open loop"][:8], names["chunk"])
    jump = {name: np.abs(np.diff(taken, axis=0)).mean() for name, taken in ways.items()}
    assert jump["ensembling"] < jump["open loop"]
    assert Path(names["picture"]).read_bytes().startswith(b"\x89PNG") and below in Path(names["picture"]).parents
    said = capsys.readouterr().out
    assert f"Policy of {START}" in said and said.endswith("actions.png\n")


@pytest.mark.slow
def test_a_policy_is_fine_tuned_from_python_and_moves_less_with_keep(below, capsys):
    names = example("finetune_from_python", max_steps=12, batch_size=4)
    drift = {name: np.abs(names["chunks"][name] - names["chunks"]["start"]).mean() for name in ("plain", "kept")}
    assert 0 < drift["kept"] < drift["plain"]
    assert [line["step"] for line in names["lines"]] == [1, 4, 8, 12]
    card = (names["kept"] / "README.md").read_text(encoding="utf-8")
    assert "`keep`" in card and "0.03 (`RMS of normalised actions`)" in card and "12 of 12" in card
    assert below in names["kept"].parents and Path(names["folder"], "drift.png").is_file()
    said = capsys.readouterr().out
    assert f"plain: actions moved by {drift['plain']:.3f}" in said and "CRaFT: budget 0.03" in said


def run_example(name: str, *words: str, **variables: str) -> str:
    """What an example prints, as a program of its own in the folder of the repository."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    words = [sys.executable, "-W", "error::UserWarning", f"examples/{name}.py", *words]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_data_of_ones_own_is_inspected_and_trained_on(tmp_path, below, monkeypatch):
    run_example("make_own_data", str(tmp_path / "data" / "my_arm"))
    said = run_example("own_data", str(tmp_path / "data" / "my_arm"), TMPDIR=str(tmp_path))
    assert "warnings       0\n" in said and "control rate   30 Hz" in said and "conventions    own" in said
    assert "180 samples" in said and "('front', 'wrist')" in said and "actions (16, 6)" in said

    import craft_vla
    from prismatic.vla.datasets import registry

    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    data = {"data_set_file": "examples/own_data.py", "data_root_dir": tmp_path / "data", "dataset_name": "my_arm"}
    run = {"config_file_path": "tiny", "max_steps": 2, "batch_size": 2, "run_root_dir": tmp_path / "runs"}
    policy = craft_vla.load_policy(craft_vla.finetune(**data, **run), "cpu")
    assert policy.cameras == ("front", "wrist") and len(policy.instructions) == 2
    view = np.zeros((120, 160, 3), np.uint8)
    actions = policy.predict({"front": view, "wrist": view}, np.zeros(6), policy.instructions[0])
    assert actions.shape == (16, 6)


@pytest.mark.slow
@pytest.mark.simulator
def test_a_policy_is_evaluated_from_python(below, capsys):
    """And the episode ends as that of the record does; one, since the simulator takes seconds."""
    pytest.importorskip("libero")
    names = example("evaluate", num_trials_per_task=1)
    assert names["results"]["valid"] and names["overall"]["trials"] == 1
    comparison = names["comparison"]
    assert comparison.total.pairs == 1 and comparison.difference == 0
    said = capsys.readouterr().out
    assert f"{names['overall']['successes']} of 1 episodes succeed; 95 % interval (Wilson) " in said
    assert (below / Path(names["folder"]).name / "policy" / "episodes.jsonl").read_text().count("\n") == 1


def test_a_notebook_is_the_code_of_the_examples_and_all_of_it(below):
    pytest.importorskip("nbformat")
    notebooks = runpy.run_path(str(ROOT / "examples" / "notebooks.py"))
    for name, pages in notebooks["NOTEBOOKS"].items():
        notebook = notebooks["assemble"](name)
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        texts = [(ROOT / "examples" / f"{page}.py").read_text(encoding="utf-8") for page in pages]
        assert all(any(cell in text for text in texts) for cell in code)
        statements = [
            ast.unparse(line) for text in texts for line in ast.parse(text).body[1:]
        ]  # without the first lines
        assert [ast.unparse(line) for cell in code for line in ast.parse(cell).body] == statements
        first = [cell.source for cell in notebook.cells if cell.source.startswith("# ")]
        assert first[0].splitlines()[0][2:] == ast.get_docstring(ast.parse(texts[0])).splitlines()[0]
        assert len(first) == len(pages)
        assert [cell.id for cell in notebook.cells] == [cell.id for cell in notebooks["assemble"](name).cells]


def test_the_constraint_keeps_the_old_task_at_little_cost(below):
    module = example("constrain_your_model")
    (old_start, new_start, _), (old_plain, new_plain, _), (old, new, drift) = module["results"].values()
    assert old_start < 0.05 < 0.2 < new_start, "the start model knows the old task only"
    assert new_plain < new_start / 5 and old_plain > 10 * old_start, "plain training learns and forgets"
    assert old < old_plain / 5 and new < new_start / 5
    assert 0 < drift < 1.25 * module["BUDGET"]


def test_the_short_step_is_the_step_of_the_training_loop_bit_for_bit(make_trainer):
    trainer, twin = (make_trainer(name, use_craft=True) for name in ("loop", "example"))
    policy, craft_step = twin.bare_model, example("craft_step_in_60_lines")["craft_step"]
    theta_0, lam, batches = copy.deepcopy(policy).eval(), 1.0, trainer.batches()
    trainer.model.train(), policy.train()
    conflicts, drifts = [], []
    for step in range(4):
        batch = next(batches)
        metrics = optimizer_step(trainer.step_context(), [batch], step)
        lam, l_act, l_ret = craft_step(policy, twin.optimizer, batch, theta_0, lam)
        assert (l_act, l_ret) == (metrics["VLA Train/Loss"], metrics["CRaFT/Retention Loss"])
        assert lam == trainer.retention.constraint.dual.get_lambda()
        weights, expected = policy.state_dict(), trainer.bare_model.state_dict()
        assert [name for name, value in expected.items() if not torch.equal(weights[name], value)] == []
        conflicts.append(metrics["CRaFT/Conflict Ratio"])
        drifts.append(l_ret)
    # Nothing was equal for want of work: the features moved, and there were tensors with a conflict and without.
    assert drifts[0] == 0 < min(drifts[1:])
    assert any(0 < ratio < 1 for ratio in conflicts)


def test_the_loop_of_the_documentation_holds_a_model():
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    held, plain = drift_after(code), drift_after(re.sub(r"\n *constraint\.\w+\(.*", "", code))
    assert 0 < held < plain / 5


def drift_after(code: str) -> float:
    """Root mean square of the change of a small network's outputs on old inputs, after running the code."""
    torch.manual_seed(0)
    old_inputs, inputs = torch.randn(2, 64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    start = copy.deepcopy(model)
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loss_function": nn.functional.mse_loss,
        "new_data": [(inputs, inputs[:, :4])] * 100,
        "old_data": [old_inputs] * 100,
    }
    exec(code, names)
    return (model(old_inputs) - start(old_inputs)).square().mean().sqrt().item()
