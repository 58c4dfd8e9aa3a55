"""Controls beside a rate: which runs are accepted, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_libero_world import LANGUAGES, FakeBackend

from experiments.robot.libero.control_results import control_lines
from experiments.robot.libero.controls import Control
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.video import SaveVideos


def run(folder: Path, name: str, backend: FakeBackend | None = None, **changes) -> dict:
    checkpoint = folder / "chkpt"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "weights").write_text(changes.pop("weights", "x"))
    options = {
        "pretrained_checkpoint": str(checkpoint),
        "task_suite_name": "toy_suite",
        "num_trials_per_task": 2,
        "local_log_dir": str(folder / "logs"),
        "run_id_note": name,
        "results_dir": str(folder / name),
        "save_videos": SaveVideos.NONE,
    }
    return evaluate(EvalConfig(**{**options, **changes}), backend or FakeBackend())


def test_short_names_of_the_controls():
    assert Control("blind") is Control.GREY_IMAGES and Control("frozen") is Control.FROZEN_IMAGE
    assert Control("grey_images") is Control.GREY_IMAGES
    with pytest.raises(ValueError, match="deaf"):
        Control("deaf")


def test_rates_of_controls_are_listed_beside_the_policy(tmp_path):
    run(tmp_path, "blind", FakeBackend(speed=0.0), control=Control.GREY_IMAGES)
    results = run(tmp_path, "own", control_results=str(tmp_path / "blind"))
    (control,) = results["controls"]
    assert (control["control"], control["trials"], control["success_rate"]) == ("grey_images", 6, 0.0)
    stored = json.loads((tmp_path / "own" / "results.json").read_text())
    assert stored["controls"][0]["results"] == str(tmp_path / "blind")
    lines = control_lines(results)
    assert lines[0].startswith("policy: 1.0000 of 6") and lines[1].startswith("grey_images: 0.0000 of 6")


def test_a_rate_without_controls_says_so(tmp_path):
    results = run(tmp_path, "own")
    assert results["controls"] == [] and results["init_noise_mm"] == 0.0
    assert results["language_source"] == "filename" and "none given" in control_lines(results)[-1]


def test_other_trials_are_pointed_out(tmp_path):
    run(tmp_path, "frozen", control=Control.FROZEN_IMAGE, num_trials_per_task=1)
    results = run(tmp_path, "own", control_results=str(tmp_path / "frozen"))
    assert "other tasks or numbers of trials" in control_lines(results)[1]


def test_runs_that_are_no_control_of_this_one_are_refused(tmp_path):
    run(tmp_path, "plain")
    run(tmp_path, "other", weights="y", control=Control.GREY_IMAGES)
    with pytest.raises(EvalInputError, match="--control or --init_noise_mm"):
        run(tmp_path, "a", control_results=str(tmp_path / "plain"))
    with pytest.raises(EvalInputError, match="checkpoint: expected"):
        run(tmp_path, "b", control_results=str(tmp_path / "other"))
    with pytest.raises(EvalInputError, match="readable results.json"):
        run(tmp_path, "c", control_results=str(tmp_path / "nowhere"))
    blind = json.loads((tmp_path / "other" / "results.json").read_text())
    (tmp_path / "other" / "results.json").write_text(json.dumps(blind | {"suite": "libero_goal"}))
    with pytest.raises(EvalInputError, match="suite: expected toy_suite, found libero_goal"):
        run(tmp_path, "d", control_results=str(tmp_path / "other"))


def test_language_and_noise_are_part_of_the_run(tmp_path, monkeypatch):
    from experiments.robot.libero import episode

    monkeypatch.setattr(
        episode, "displace_objects", lambda env, radius, key, or_less: {"bowl": [radius, float(key[2])]}
    )
    plain, noisy = run(tmp_path, "plain"), run(tmp_path, "noisy", init_noise_mm=20.0)
    assert plain["fingerprint"] != noisy["fingerprint"]
    records = [json.loads(line) for line in (tmp_path / "noisy" / "episodes.jsonl").read_text().splitlines()]
    assert records[1]["init_offsets_mm"] == {"bowl": [20.0, 1.0]} and records[1]["language_source"] == "filename"
    first = json.loads((tmp_path / "plain" / "episodes.jsonl").read_text().splitlines()[0])
    assert first["init_offsets_mm"] is None
    results = run(tmp_path, "own", control_results=str(tmp_path / "noisy"))
    assert control_lines(results)[1].startswith("init_noise (20 mm): ") and "policy's" not in control_lines(results)[1]


class OtherSimulator(FakeBackend):
    def versions(self):
        return super().versions() | {"mujoco": "3.3.7", "numpy": "1.26.0"}


def test_a_control_of_another_protocol_is_pointed_out(tmp_path, monkeypatch):
    """Whatever decides how an episode goes; not where its files lie, nor flags that only the policy has."""
    monkeypatch.setattr("experiments.robot.libero.episode.displace_objects", lambda *_, **__: {})
    demos = SimpleNamespace(
        metadata=None,
        num_episodes=3,
        episode=lambda i: SimpleNamespace(instruction=LANGUAGES[i], actions=np.tile([0.05, 0, 0, 0, 0, 0, 1], (9, 1))),
    )
    states = tmp_path / "states.json"
    entry = {f"demo_{i}": {"success": True, "initial_state": [0.0, 0.0]} for i in range(2)}
    states.write_text(json.dumps({language.replace(" ", "_"): entry for language in LANGUAGES}))
    copy = tmp_path / "copy.json"
    copy.write_bytes(states.read_bytes())
    replay = {"control": Control.REPLAY, "replay_dataset": "d", "pretrained_checkpoint": ""}
    same = {"render_mode": RenderMode.LAZY, "seed": 3, "init_noise_mm": 20.0, "initial_states_path": str(copy)}
    runs = {
        "same": (replay | same | {"num_workers": 0, "device": "cpu"}, FakeBackend(demos=demos)),
        "other": (replay | {"num_steps_wait": 3, "initial_state_offset": 1}, OtherSimulator(demos=demos)),
    }
    for name, (flags, backend) in runs.items():
        run(tmp_path, name, backend, **flags)
    policy = same | {"initial_states_path": str(states), "use_proprio": True}
    results = run(tmp_path, "own", **policy, control_results=f"{tmp_path / 'same'},{tmp_path / 'other'}")
    _, line, other = control_lines(results)
    assert line.startswith("replay (20 mm): ") and "policy" not in line
    for note in (
        "render_mode published, the policy's lazy",
        "num_steps_wait 3, the policy's 10",
        "seed 7, the policy's 3",
        "initial_state_offset 1, the policy's 0",
        "init_noise_mm 0.0, the policy's 20.0",
        "initial_states_path DEFAULT, the policy's ",
        "versions.mujoco 3.3.7, the policy's 3.3.0",
    ):
        assert note in other
    assert "numpy" not in other and "proprio" not in other
