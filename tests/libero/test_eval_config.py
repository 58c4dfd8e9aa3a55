"""Flags: published spellings, validation, agreement with the checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_libero_world import FakePolicy

from experiments.robot.libero.controls import Control
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError, parse_flags
from experiments.robot.libero.initial_states import read_initial_states
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.policy_facts import (
    PolicyFacts,
    check_flags,
    read_policy_facts,
    resolve_image_size,
    resolve_render_mode,
)
from experiments.robot.libero.suite_names import BASE_SUITES, nearest_suite
from experiments.robot.libero.tasks import UnknownSuiteError, max_episode_steps
from prismatic import command_line
from prismatic.command_line import UsageError
from prismatic.evidence.episodes import _NO_PROTOCOL
from prismatic.training.flags import TrackingFlags
from prismatic.training.writers import WRITERS

PUBLISHED_COMMAND = (
    "--use_proprio True --num_images_in_input 2 --use_film False --pretrained_checkpoint runs/x--20000_chkpt "
    "--task_suite_name libero_object --use_pro_version True --center_crop True --use_l1_regression True "
    "--use_minivlm True --num_trials_per_task 50 --save_version vla-adapter --run_id_note note --seed 7"
)


def parse(text: str) -> EvalConfig:
    return parse_flags(text.split())


def test_published_command_parses_and_validates():
    cfg = parse(PUBLISHED_COMMAND)
    cfg.validate()
    assert (cfg.use_proprio, cfg.num_images_in_input, cfg.center_crop, cfg.use_pro_version) == (True, 2, True, True)
    assert cfg.num_trials_per_task == 50 and cfg.num_open_loop_steps == 8 and cfg.num_steps_wait == 10
    assert cfg.local_log_dir == "./experiments/logs" and cfg.initial_states_path == "DEFAULT"


def test_new_flags_parse():
    cfg = parse("--task_ids 0,3 --render_mode lazy --control grey_images --save_videos failures --num_workers 2")
    assert cfg.task_id_list(10) == [0, 3] and cfg.render_mode is RenderMode.LAZY and cfg.control is Control.GREY_IMAGES
    assert parse("--task_ids 4").task_id_list(10) == [4] and parse("").task_id_list(3) == [0, 1, 2]


@pytest.mark.parametrize("text", ["0,a", "10", "1,1", "-1", ","])
def test_bad_task_ids_are_named(text):
    with pytest.raises(EvalInputError, match="--task_ids"):
        EvalConfig(task_ids=text).task_id_list(10)


@pytest.mark.parametrize(
    "flags",
    [
        {"use_l1_regression": False},
        {"use_film": True},
        {"load_in_8bit": True},
        {"phase": "Training"},
        {"num_trials_per_task": 0},
        {"num_open_loop_steps": 0},
        {"initial_state_offset": -1},
        {"num_workers": -1},
        {"shard": "0/2"},
        {"shard": "3/2"},
        {"shard": "2"},
        {"shard": ""},
        {"shard": "\u00b2/3"},
        {"shard": "1/2/3"},
        {"shard": "1/9999999999999999999999"},
        {"task_ids": "0,x"},
        {"task_ids": "\u00b2"},
        {"task_ids": "1,,2"},
        {"task_ids": "9" * 5000},
        {"device": "gpu 0"},
        {"device": ""},
        {"results_dir": ""},
        {"results_dir": __file__},
        {"results_dir": __file__ + "/below"},
        {"results_dir": "n" * 300},
        {"local_log_dir": "/dev/null"},
        {"rollout_dir": __file__},
        {"initial_states_path": "."},
        {"run_id_note": "a/b"},
        {"model_family": ".."},
        {"save_version": "../../x"},
        {"replay_dataset": "somewhere"},
        {"control": Control.REPLAY},
        {"resume": True},
        {"pretrained_checkpoint": ""},
        {"pretrained_checkpoint": "run--image_aug--1_chkpt", "center_crop": False},
        {"initial_states_path": "no/such.json"},
    ],
)
def test_unusable_flags_are_errors_naming_the_flag(flags):
    cfg = EvalConfig(**{"pretrained_checkpoint": "x", **flags})
    with pytest.raises(EvalInputError) as caught:
        cfg.validate()
    assert any(f"--{name}" in str(caught.value) for name in [*flags, "control"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words", ["--init_noise_mm nan", "--init_noise_mm inf", "--init_noise_mm -1", "--seed -1", "--env_img_res 1e30"]
)
def test_numbers_that_would_run_something_else_are_refused(words):
    flag, value = words.split()
    with pytest.raises(UsageError, match=f"{flag} is .*{value}.*, expected .*at least"):
        parse(words)


@pytest.mark.parametrize(
    ("flag", "package", "extra"),
    [(f"--use_{name} True", writer.package, name) for name, writer in WRITERS.items()]
    + [("--save_videos first", "imageio_ffmpeg", "libero")],
)
def test_a_package_that_a_flag_needs_is_asked_for_with_the_flags(monkeypatch, flag, package, extra):
    monkeypatch.setattr(command_line, "is_installed", lambda name: name != package)
    with pytest.raises(UsageError, match=rf"{flag} needs {package}.*pip install 'craft-vla\[{extra}\]'"):
        parse(f"--pretrained_checkpoint x --save_videos none {flag}").validate()


def test_services_have_the_flags_that_they_have_in_training():
    for name in (*(f"use_{service}" for service in WRITERS), "wandb_entity", "wandb_project"):
        ours, theirs = (config.__dataclass_fields__[name] for config in (EvalConfig, TrackingFlags))
        assert (ours.type, ours.default, ours.metadata) == (theirs.type, theirs.default, theirs.metadata)
        assert name in _NO_PROTOCOL


@pytest.mark.parametrize(
    ("words", "switch"),
    [
        ("--replay_episode 3", "--control replay"),
        ("--replay_dataset d --control blind", "--control replay"),
        ("--batch_inference True", "--num_workers 2 or more"),
        ("--batch-inference True --num_workers 1", "--num_workers 2 or more"),
        ("--worker_timeout_s 3600", "--num_workers N"),  # also at its default value
        ("--max_videos 2 --save_videos none", "--save_videos all, first or failures"),
        ("--video_frame_interval 1 --save_videos NONE", "--save_videos all, first or failures"),
    ],
)
def test_a_flag_without_its_switch_is_refused(words, switch):
    name = words.split()[0].replace("-", "_").replace("__", "--")
    with pytest.raises(EvalInputError, match=f"{name} .* has no effect: it needs {switch}"):
        parse(words)


def test_a_flag_with_its_switch_or_one_that_is_off_is_taken():
    parse("--batch_inference False --max_videos 2")
    assert parse("--batch_inference True --num_workers 2 --worker_timeout_s 60").batch_inference
    parse("--control replay --replay_dataset d --replay_episode 3 --save_videos none").validate()
    with pytest.raises(EvalInputError, match="--replay_episode 3 has no effect"):
        EvalConfig(pretrained_checkpoint="x", replay_episode=3).validate()  # an object of Python code


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("libero_long", "libero_10"),
        ("LIBERO_OBJECT", "libero_object"),
        ("LIBERO-Spatial", "libero_spatial"),
        ("libero_object_no_noops", "libero_object"),
        ("libero_10_scripted_no_noops", "libero_10"),
        ("libero_spatial_no_noops_lerobot", "libero_spatial"),
        ("goal", "libero_goal"),
        ("long", "libero_10"),
        ("libero_loong", "libero_10"),
        ("libero90", "libero_90"),
        ("libero_spatail", "libero_spatial"),
        ("libero_goal_swp", "libero_goal_swap"),
    ],
)
def test_near_misses_of_suite_names_get_the_nearest_one(name, meant):
    known = [*BASE_SUITES, "libero_goal_swap", "libero_10_swap"]
    assert nearest_suite(name, known).startswith(f"; did you mean {meant}?")


def test_a_name_like_no_suite_says_where_all_are():
    assert nearest_suite("calvin", BASE_SUITES) == "; python -m experiments.robot.libero.suites lists all"
    with pytest.raises(UnknownSuiteError, match="did you mean libero_10"):
        max_episode_steps("LIBERO_LONG")


METADATA = {"num_images": 2, "use_proprio": True, "action_head": {"use_pro_version": False}, "datasets": {"a": None}}
METADATA |= {"prompt_kind": "qwen_chat"}
FACTS = read_policy_facts(FakePolicy(metadata=METADATA))


def test_facts_of_a_policy():
    assert PolicyFacts(2, True, False, True, 8, use_minivlm=True) == FACTS
    demos = {"a": {"render_mode": "lazy", "image_size": 96}, "b": {"render_mode": "lazy", "image_size": 128}}
    facts = read_policy_facts(FakePolicy(metadata={"datasets": demos}))
    assert facts.render_modes == ("lazy",) and facts.image_sizes == (96, 128)
    assert read_policy_facts(object()) == PolicyFacts()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_images_in_input", 1),
        ("use_proprio", False),
        ("use_pro_version", True),
        ("use_minivlm", False),
        ("center_crop", False),
    ],
)
def test_contradicting_the_checkpoint_is_an_error_naming_both(name, value):
    check_flags(EvalConfig(), FACTS)  # flags left alone follow the checkpoint
    check_flags(EvalConfig(**{name: getattr(FACTS, name)}), FACTS)
    with pytest.raises(EvalInputError) as caught:
        check_flags(EvalConfig(**{name: value}), FACTS)
    assert f"--{name} {value}" in str(caught.value) and f"{name} = {getattr(FACTS, name)}" in str(caught.value)


def test_open_loop_steps_beyond_the_chunk_are_an_error():
    with pytest.raises(EvalInputError, match="chunks of 8"):
        check_flags(EvalConfig(num_open_loop_steps=9), FACTS)


def test_render_settings_flag_then_training_data_then_published():
    demos = PolicyFacts(render_modes=("lazy",), image_sizes=(96,))
    assert resolve_render_mode(EvalConfig(), FACTS) is RenderMode.PUBLISHED
    assert resolve_render_mode(EvalConfig(), demos) is RenderMode.LAZY
    assert resolve_render_mode(EvalConfig(render_mode=RenderMode.PUBLISHED), demos) is RenderMode.PUBLISHED
    assert [resolve_image_size(EvalConfig(), facts) for facts in (FACTS, demos)] == [256, 96]
    assert resolve_image_size(EvalConfig(env_img_res=256), demos) == 256
    mixed = PolicyFacts(render_modes=("lazy", "published"), image_sizes=(96, 256))
    with pytest.raises(EvalInputError, match="--render_mode"):
        resolve_render_mode(EvalConfig(), mixed)
    with pytest.raises(EvalInputError, match="--env_img_res"):
        resolve_image_size(EvalConfig(), mixed)
    with pytest.raises(EvalInputError, match="cheap"):
        resolve_render_mode(EvalConfig(), PolicyFacts(render_modes=("cheap",)))


@pytest.mark.parametrize(
    ("suite", "key", "expected"),
    [
        ("libero_goal", "", "libero_goal"),
        ("libero_goal_swap", "", "libero_goal"),
        ("libero_10_task", "", "libero_10"),
        ("libero_goal", "mine", "mine"),
        ("other", "", "other"),
    ],
)
def test_statistics_key(suite, key, expected):
    assert EvalConfig(task_suite_name=suite, unnorm_key=key).statistics_key() == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"toy": []}',
        b'{"toy": {"demo_0": 3}}',
        b'{"toy": {"demo_0": {"success": "false", "initial_state": [1]}}}',
        b'{"toy": {"demo_0": {"success": true, "initial_state": ["a"]}}}',
        b'{"toy": {"demo_0": {"success": true, "initial_state": [[1], [2, 3]]}}}',
        b'{"toy": {"demo_0": {"success": true, "initial_state": [NaN]}}}',
        b'{"toy": {"demo_0": {"success": true, "initial_state": null}}}',
    ],
)
def test_a_file_of_initial_states_that_is_none_is_named(tmp_path, content):
    file = tmp_path / "states.json"
    file.write_bytes(content)
    cfg = EvalConfig(initial_states_path=str(file), num_trials_per_task=1)
    with pytest.raises(EvalInputError, match="states.json") as caught:
        read_initial_states(cfg, SimpleNamespace(language="toy", init_states=[]))
    assert len(str(caught.value)) < 1000
