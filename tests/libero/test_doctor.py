"""The doctor names the fault it is given. Faults are injected into the adapter and the checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.doctor import __main__ as command
from experiments.robot.doctor import installation, render_reference
from experiments.robot.doctor.checkpoint_checks import Wanted, checkpoint_checks, statistics_reach
from experiments.robot.doctor.conventions import convention_checks
from experiments.robot.doctor.data_checks import best_match, data_checks
from experiments.robot.doctor.demonstrations import (
    DemonstrationPolicy,
    open_data_set,
    recorded_starts,
)
from experiments.robot.doctor.findings import Check, Finding, Status, exit_code
from experiments.robot.libero import controls, simulator
from prismatic.training.checkpoints import load_checkpoint
from prismatic.vla.datasets.registry import standardize_libero
from prismatic.vla.images import decode_jpeg

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "pretrained_models" / "tiny-libero-object"
OBJECT_DATA = ROOT / "datasets" / "rlds" / "libero_object_scripted_no_noops"
SPATIAL_DATA = ROOT / "datasets" / "rlds" / "libero_spatial_scripted_no_noops"


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def object_data():
    return open_data_set(OBJECT_DATA)


@pytest.fixture(scope="module")
def spatial_data():
    return open_data_set(SPATIAL_DATA)


def run(checks: list[Check], name: str) -> Finding:
    return next(check for check in checks if check.name == name).run()


def fold(quat):
    """The antipodal normalisation of other conversions."""
    quat = np.asarray(quat)
    return UNFOLDED(-quat if quat[3] < 0 else quat)


UNFOLDED = simulator.quat_to_axis_angle


# -- findings -------------------------------------------------------------------------------------------------------


def test_a_finding_says_what_was_found_expected_and_lost():
    finding = Check("x", "3", "10 points", lambda: (Status.FAIL, "4")).run()
    assert finding.line() == "FAIL  x: 4; expected: 3; when wrong: 10 points"
    assert finding.to_dict()["status"] == "fail" and exit_code([finding]) == 1
    assert exit_code([dataclasses.replace(finding, status=Status.WARN)]) == 0


def test_a_broken_check_is_a_failure_that_hides_no_other():
    finding = Check("x", "3", "10 points", lambda: 1 / 0).run()
    assert finding.status is Status.FAIL and "ZeroDivisionError" in finding.found


# -- versions and conventions ---------------------------------------------------------------------------------------


def test_wrong_mujoco_version_is_named(monkeypatch):
    real = installation.installed_version
    monkeypatch.setattr(installation, "installed_version", lambda name: "3.8.1" if name == "mujoco" else real(name))
    finding = run(installation.version_checks(), "mujoco version")
    assert finding.status is Status.FAIL and finding.found == "3.8.1" and finding.expected == "3.3.0"
    assert "98 -> 12 %" in finding.cost


def test_other_torch_is_a_warning(monkeypatch):
    monkeypatch.setattr(installation, "installed_version", lambda name: "2.6.0" if name == "torch" else "0")
    assert run(installation.version_checks(), "other versions").status is Status.WARN


def test_conventions_hold():
    assert [check.run().status for check in convention_checks()] == [Status.OK, Status.OK]


def test_folded_quaternion_is_named(monkeypatch):
    monkeypatch.setattr(simulator, "quat_to_axis_angle", fold)
    finding = run(convention_checks(), "quaternion")
    assert finding.status is Status.FAIL and "folded to w >= 0" in finding.found and "95 -> 56 %" in finding.cost


def test_inverted_gripper_is_named(monkeypatch):
    monkeypatch.setattr(controls, "to_simulator_actions", lambda a: np.where(np.arange(7) == 6, np.sign(2 * a - 1), a))
    finding = run(convention_checks(), "gripper sign")
    assert finding.status is Status.FAIL and finding.found == "open -> +1, close -> -1"


# -- checkpoint -----------------------------------------------------------------------------------------------------


def test_the_shipped_checkpoint_is_healthy(checkpoint, object_data):
    wanted = Wanted("libero_object", None, object_data.name, object_data.statistics())
    statuses = {check.name: check.run().status for check in checkpoint_checks(checkpoint, wanted)}
    assert statuses.pop("statistics against data") is Status.WARN  # the shipped data are a part of the training data
    assert set(statuses.values()) == {Status.OK}, statuses


def test_missing_statistics_key_is_named(checkpoint):
    finding = run(checkpoint_checks(checkpoint, Wanted(unnorm_key="libero_goal")), "statistics key")
    assert finding.status is Status.FAIL
    assert "libero_goal" in finding.found and "libero_object_scripted_no_noops" in finding.found


def test_the_key_is_that_of_the_data_where_the_suite_names_none(checkpoint, object_data):
    """A checkpoint that was trained on after its start has the statistics of both."""
    name, other = "libero_object_my_no_noops", "libero_spatial_scripted_no_noops"
    for keys, data, found in [
        ((name, other), name, name),
        ((name, other), other, other),
        ((name, other), "unknown", name),  # the only one of the suite
        ((name, name + "_2"), name, name),
        ((name, name + "_2"), "unknown", None),
        (("libero_object_no_noops", name), name, "libero_object_no_noops"),  # what the evaluation takes by itself
    ]:
        several = dataclasses.replace(checkpoint, statistics=dict.fromkeys(keys, object_data.statistics()))
        finding = run(checkpoint_checks(several, Wanted("libero_object", None, data)), "statistics key")
        assert (finding.status is Status.OK) == (found is not None), finding
        assert finding.found.startswith(found) if found else "--unnorm_key names one" in finding.found, finding
        assert found in (None, "libero_object_no_noops") or f"--unnorm_key {found}" in finding.found


def test_wrong_statistics_key_is_named(checkpoint, object_data, spatial_data):
    """Two sets of statistics, and the one of the other suite is asked for."""
    statistics = checkpoint.statistics | {"libero_spatial_no_noops": spatial_data.statistics()}
    both = dataclasses.replace(checkpoint, statistics=statistics)
    wanted = Wanted(None, "libero_spatial", object_data.name, object_data.statistics())
    finding = run(checkpoint_checks(both, wanted), "statistics against data")
    assert finding.status is Status.FAIL
    assert "units of libero_spatial_no_noops" in finding.found and "those of libero_object_scripted" in finding.found


def test_own_statistics_reach_one(object_data):
    statistics = object_data.statistics()
    assert statistics_reach(statistics, statistics)[0] == pytest.approx(1.0)
    short = copy.deepcopy(statistics)
    short["action"]["q01"] = short["action"]["q01"][:6]
    assert statistics_reach(short, statistics) == (float("inf"), "action: 6 dimensions against 7")


def with_manifest(checkpoint, **changes):
    return dataclasses.replace(checkpoint, manifest=checkpoint.manifest | changes)


def test_missing_crop_is_named(checkpoint):
    spec = checkpoint.manifest["image_spec"] | {"center_crop": False}
    finding = run(checkpoint_checks(with_manifest(checkpoint, image_spec=spec), Wanted()), "centre crop")
    assert finding.status is Status.FAIL and finding.found == "center_crop False, trained with image_aug True"


def test_unknown_augmentation_is_a_warning(checkpoint):
    published = with_manifest(checkpoint, training=None)
    assert run(checkpoint_checks(published, Wanted()), "centre crop").status is Status.WARN


def test_wrong_number_of_images_is_named(checkpoint):
    finding = run(checkpoint_checks(with_manifest(checkpoint, num_images=1), Wanted()), "number of images")
    assert finding.status is Status.FAIL and finding.found == "description 1, model 2, head 2"


def test_bidirectional_attention_is_named(checkpoint, monkeypatch):
    layers = checkpoint.model.vla.language_model.model.layers
    for layer in layers:
        forward = layer.forward

        def mixed(hidden, *args, forward=forward, **kwargs):
            kept = forward(hidden, *args, **kwargs)
            states = kept[0] if isinstance(kept, tuple) else kept
            leaked = states + 0.1 * hidden.mean(dim=1, keepdim=True)
            return (leaked, *kept[1:]) if isinstance(kept, tuple) else leaked

        monkeypatch.setattr(layer, "forward", mixed)
    finding = run(checkpoint_checks(checkpoint, Wanted()), "attention mask")
    assert finding.status is Status.FAIL and "earlier queries do not see later ones" in finding.found


# -- data -----------------------------------------------------------------------------------------------------------


def test_starts_are_those_of_the_collection(object_data, spatial_data):
    starts = recorded_starts(object_data)
    assert [start.task_id for start in starts] == [9, 3] and starts[0].start.standard_state is None
    states = [start.start.standard_state for start in recorded_starts(spatial_data)]
    assert len(states) == 14 and set(states) <= set(range(20, 50))


def test_orientation_of_synthetic_views():
    rng = np.random.default_rng(0)
    views = {"image": rng.uniform(0, 255, (8, 8, 3)), "wrist_image": rng.uniform(0, 255, (8, 8, 3))}
    assert best_match(views, [views["image"]])[:2] == ("image", "upright")
    assert best_match(views, [views["image"][::-1, ::-1]])[:2] == ("image", "rotated by 180 degrees")
    assert best_match(views, [views["wrist_image"][::-1]])[:2] == ("wrist_image", "mirrored top-bottom")
    assert best_match(views, [views["image"][:, ::-1]])[:2] == ("image", "mirrored left-right")


def test_demonstration_policy_acts_on_what_it_recognises_and_on_nothing_else(object_data):
    episode = object_data.reader.episode(1)
    actions, states = standardize_libero(episode.actions, episode.state)
    image, wrist = (decode_jpeg(episode.images[name][40]) for name in ("image", "wrist_image"))
    policy = DemonstrationPolicy(episode)
    np.testing.assert_allclose(policy.predict(image, wrist, states[40], "x"), actions[40:48], atol=1e-6)
    assert policy.problem is None
    assert (policy.predict(image[::-1, ::-1], wrist, states[40], "x")[:, :6] == 0).all()
    assert policy.problem.startswith("at query 2: image differs by")
    swapped, turned = DemonstrationPolicy(episode), DemonstrationPolicy(episode)
    swapped.predict(wrist, image, states[40], "x")
    assert "image differs" in swapped.problem and "wrist_image differs" in swapped.problem
    turned.predict(image, wrist, states[40] - np.eye(8)[3] * 2 * np.pi, "x")
    assert "state[3] is -3." in turned.problem


def test_largest_colour_difference_keeps_its_sign():
    stored = {"image": [10.0, 20.0, 30.0], "wrist_image": [10.0, 20.0, 30.0]}
    found = stored | {"wrist_image": [10.0, 5.0, 31.0]}
    assert render_reference.largest_difference(found, stored) == (-15.0, "wrist_image")
    reference = render_reference.load_reference()
    assert reference["versions"]["mujoco"] == "3.3.0"
    assert set(reference["modes"]) == {mode.value for mode in render_reference.MODES}


# -- command --------------------------------------------------------------------------------------------------------


def test_command_prints_and_writes_findings(monkeypatch, tmp_path, capsys):
    checks = [Check("a", "1", "much", lambda: (Status.OK, "1")), Check("b", "1", "much", lambda: (Status.FAIL, "2"))]
    monkeypatch.setattr(command, "collect_checks", lambda args: checks)
    assert command.main(["--json", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 ok, 0 warn, 1 fail, 0 skip"
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["healthy"] is False and content["findings"][1]["found"] == "2"
    monkeypatch.setattr(command, "collect_checks", lambda args: checks[:1])
    assert command.main([]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "no/such"], "expected a folder with dataset_info.json"),
        (["--suite", "libero_long"], "--suite.*did you mean libero_10"),
        (["--json", "no/such/x.json"], "--json no/such/x.json"),
        (["--num_images_in_input", "0"], "--num_images_in_input.*found .0.*at least 1"),
        (["--checkpont", "x"], "did you mean --checkpoint"),
        (["--checkpoint", "no/such"], "no/such"),
    ],
)
def test_unusable_arguments_are_named_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    assert re.search(said, shown.err)


# -- with the simulator ---------------------------------------------------------------------------------------------


@pytest.fixture
def orientation(spatial_data):
    pytest.importorskip("libero")
    return lambda: run(data_checks(spatial_data), "images against data")


@pytest.mark.simulator
@pytest.mark.slow
def test_images_agree_with_the_data(orientation):
    assert orientation().status is Status.OK


@pytest.mark.simulator
@pytest.mark.slow
def test_flipped_image_is_named(orientation, monkeypatch):
    monkeypatch.setattr(simulator, "_rotate180", np.ascontiguousarray)
    finding = orientation()
    assert finding.status is Status.FAIL
    assert finding.found.count("rotated by 180 degrees") == 2, finding.found


@pytest.mark.simulator
@pytest.mark.slow
def test_swapped_cameras_are_named(orientation, monkeypatch):
    monkeypatch.setattr(simulator, "CAMERAS", simulator.CAMERAS[::-1])
    finding = orientation()
    assert finding.status is Status.FAIL
    assert "image <- wrist_image, upright" in finding.found and "wrist_image <- image, upright" in finding.found


@pytest.mark.simulator
@pytest.mark.slow
def test_physics_and_gripper_of_the_installed_simulator():
    pytest.importorskip("libero")
    from experiments.robot.doctor.simulator_checks import physics_checks

    assert [check.run().status for check in physics_checks()] == [Status.OK, Status.OK]
