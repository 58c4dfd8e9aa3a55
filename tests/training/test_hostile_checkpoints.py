"""Checkpoints from strangers: descriptions are data with limits, nothing they name is run, nothing hangs."""

import json
import math
import os
import shutil
import sys

import pytest
import torch
from published_fixtures import make_published_folder
from small_checkpoints import LORA, act, train

from prismatic.evidence.files import write_json
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor
from prismatic.model_files import CheckpointError, check_numbers, read_json, regular_file
from prismatic.training.checkpoint_files import load_processor
from prismatic.training.checkpoint_folder import LISTING, MANIFEST, check_files
from prismatic.training.checkpoints import load_checkpoint

STATISTICS, CONFIG = "dataset_statistics.json", "config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A full checkpoint, one with adapters on it, and a published folder; without lists of files, as a stranger's."""
    root = tmp_path_factory.mktemp("made")
    start = train(root, "start", save_training_state=False)
    train(root, "lora", config_file_path=str(start), save_training_state=False, **LORA)
    make_published_folder(root / "published")
    for folder in root.iterdir():
        (folder / LISTING).unlink(missing_ok=True)
    return root


@pytest.fixture
def full(made, tmp_path):
    return shutil.copytree(made / "start--1_chkpt", tmp_path / "start--1_chkpt")


@pytest.fixture
def lora(made, full, tmp_path):
    return shutil.copytree(made / "lora--1_chkpt", tmp_path / "lora--1_chkpt")


@pytest.fixture
def published(made, tmp_path):
    return shutil.copytree(made / "published", tmp_path / "published")


def edit(file, path: str, value) -> None:
    """Set the entry at a dotted path of a JSON file."""
    content = json.loads(file.read_text())
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    file.write_text(json.dumps(content))


MANIFESTS = [
    ("file_suffix", "../../outside"),
    ("file_suffix", ""),
    ("file_suffix", ["x"]),
    ("tuning", 5),
    ("num_images", "2"),
    ("num_images", True),
    ("num_images", -1),
    ("num_images", 10**400),
    ("use_proprio", 1),
    ("legacy_slices", "no"),
    ("step", 1.5),
    ("cameras", {"x": 5}),
    ("conventions", {"x": 5}),
    ("conventions", {"x": {"libero": 1}}),
    ("conventions", {"x": {"libero": True, "control_hz": float("inf")}}),
    ("cameras", {"x": ["front", None]}),
    ("datasets", []),
    ("datasets", {"x": 5}),
    ("datasets", {"x": {"render_mode": ["lazy"]}}),
    ("datasets", {"x": {"jpeg_quality": 10**6}}),
    ("datasets", {"x": {"tasks": {"3": {"episodes": -1}}}}),
    ("action_spec", [8, 7, 8]),
    ("action_spec.chunk_len", 10**9),
    ("action_spec.chunk_len", 9),  # another one than the head's
    ("action_spec.normalization", "sideways"),
    ("action_head.hidden_dim", 1e308),
    ("action_head.num_blocks", 10**6),
    ("action_head.hidden_dim", 1 << 19),  # would be gigabytes
    ("action_head.start_noise_std", math.nan),
    ("action_head.code", "x"),
    ("image_spec.size", 10**8),
    ("image_spec.crop_area", math.inf),
]


@pytest.mark.parametrize(("path", "value"), MANIFESTS, ids=[f"{p}={str(v)[:12]}" for p, v in MANIFESTS])
def test_the_manifest_is_checked(full, path, value):
    edit(full / MANIFEST, path, value)
    with pytest.raises(CheckpointError, match=str(full)):
        load_checkpoint(full)


@pytest.mark.parametrize("value", [1e308, math.nan, -math.inf, 10**30, 1e11])
@pytest.mark.parametrize("kind", ["full", "published"])
def test_a_statistic_no_robot_has_is_refused(full, published, kind, value):
    folder = {"full": full, "published": published}[kind]
    edit(folder / STATISTICS, "libero_mini_no_noops.action.q99.3", value)
    with pytest.raises(CheckpointError, match=rf"{STATISTICS}\.libero_mini_no_noops\.action\.q99\[3\] is"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["{}", '{"a": 5}', "[]", '{"a":' * 2000 + "1" + "}" * 2000, "[" * 99999, "\xff"])
def test_statistics_of_another_shape_are_refused(full, content):
    (full / STATISTICS).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=STATISTICS):
        load_checkpoint(full)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "llama"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.vocab_size", 10**12),
        ("vision_towers.0.depth", 10**7),
        ("num_action_queries", 10**9),
        ("text_config", 5),
    ],
)
def test_the_configuration_is_checked_before_a_model_is_built(full, path, value):
    edit(full / CONFIG, path, value)
    with pytest.raises(CheckpointError, match=CONFIG):
        load_checkpoint(full)


def test_what_is_too_large_or_too_deep_is_not_read(tmp_path):
    file = tmp_path / "x.json"
    with file.open("wb") as stream:
        stream.write(b"{")
        stream.truncate(1 << 33)
    with pytest.raises(CheckpointError, match="x.json: found 8192 MiB, expected at most 64"):
        read_json(file)
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested"):
        check_numbers(deep, "x", 1)
    check_numbers({"a": [True, None, "1e308", 0.5]}, "x", 1)


def test_code_that_the_files_name_is_never_asked_for_and_never_run(full, published, tmp_path, monkeypatch):
    """`auto_map`, attention kernels and class names, in every description of a folder, with the code beside them."""
    marker = tmp_path / "was_run"
    code = f"open({str(marker)!r}, 'w').close()\n"
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "y")
    expected = act(load_checkpoint(full).model)
    for folder in (full, published):
        for name in ("evil", "configuration_prismatic", "modeling_prismatic", "processing_prismatic"):
            (folder / f"{name}.py").write_text(code)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        autos = ("AutoConfig", "AutoModelForVision2Seq", "AutoProcessor", "AutoImageProcessor")
        hostile = {"auto_map": dict.fromkeys(autos, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        for file in (CONFIG, "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
            (folder / file).write_text(json.dumps(read_json(folder / file) | hostile))
        edit(folder / "tokenizer_config.json", "tokenizer_class", "EvilTokenizer")
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            edit(folder / CONFIG, key, "evil/kernels")
            edit(folder / CONFIG, f"text_config.{key}", "evil/kernels")
        load_checkpoint(folder)
    assert torch.equal(act(load_checkpoint(full).model), expected)
    assert not marker.exists() and not questions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "ADALORA"),
        ("target_modules", "(a+)+$"),
        ("target_modules", []),
        ("r", 10**9),
        ("r", True),
        ("lora_alpha", 1e308),
        ("lora_alpha", math.nan),
        ("lora_dropout", "0"),
        ("modules_to_save", ["language_model"]),
        ("layer_replication", [[0, 1]]),
        ("rank_pattern", {"q_proj": 9}),
        ("megatron_config", {"x": 1}),
    ],
)
def test_the_description_of_adapters_is_checked(lora, name, value):
    edit(lora / "lora_adapter" / "adapter_config.json", name, value)
    with pytest.raises(CheckpointError, match="lora_adapter"):
        load_checkpoint(lora)


def test_modules_and_models_named_by_adapters_are_not_looked_up(lora, tmp_path, monkeypatch):
    expected = act(load_checkpoint(lora).model)
    (tmp_path / "evil_module.py").write_text("raise SystemExit('was run')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    file = lora / "lora_adapter" / "adapter_config.json"
    for key, value in {
        "base_model_name_or_path": "evil/model",
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"},
        "megatron_core": "evil_module",
        "init_lora_weights": "pissa",
    }.items():
        edit(file, key, value)
    assert torch.equal(act(load_checkpoint(lora).model), expected)


def test_adapters_that_lack_weights_are_refused(lora):
    from safetensors.torch import load_file, save_file

    file = lora / "lora_adapter" / "adapter_model.safetensors"
    state = load_file(file)
    del state[sorted(state)[0]]
    save_file(state, file)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: no weights of the adapters"):
        load_checkpoint(lora)


def test_whole_weights_beside_an_adapter_description_are_refused(full):
    """The library would follow the base model it names."""
    (full / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model", "peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="adapter_config.json lies beside whole weights"):
        load_checkpoint(full)


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json", MANIFEST, "*_checkpoint.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_pipes_devices_and_loops_end_in_an_error(full, place, kind):
    file = sorted(full.glob(place))[0]
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file.name)
    with pytest.raises(CheckpointError, match=file.name):
        load_checkpoint(full)


@pytest.mark.parametrize("content", [b"x" * 100, b"\x08" + b"\0" * 7 + b"{}      "])
def test_truncated_weights_are_named(full, content):
    file = full / "model.safetensors"
    for damaged in (content, file.read_bytes()[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            load_checkpoint(full)


def test_a_pipe_beside_the_configuration_is_not_opened(full):
    (full / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(full / "generation_config.json")
    with pytest.raises(CheckpointError, match="generation_config.json is a device, pipe or socket"):
        load_checkpoint(full)


def test_a_pipe_in_the_list_of_files_is_not_opened(full):
    os.mkfifo(full / "pipe")
    write_json(full / LISTING, {"files": {"pipe": {"size": 0, "sha256": "x"}}})
    with pytest.raises(CheckpointError, match="pipe is a device, pipe or socket"):
        check_files(full)
    with pytest.raises(CheckpointError, match="pipe is a device, pipe or socket"):
        regular_file(full / "pipe")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(full):
    vla = load_checkpoint(full).model.vla
    load_processor(full, vla)
    vla.config.text_config.vocab_size = 400
    with pytest.raises(CheckpointError, match="tokenizer.json: 500 tokens, expected at most the 400"):
        load_processor(full, vla)


@pytest.mark.parametrize(
    "changes",
    [
        {"stds": [[0.0, 1, 1]] * 2},
        {"means": [[math.nan, 0, 0]] * 2},
        {"stds": [[1e308, 1, 1]] * 2},
        {"input_sizes": [[3, 10**6, 10**6]] * 2},
        {"means": [[0.5]] * 2},
    ],
)
def test_the_image_processor_takes_numbers_of_images(changes):
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        PrismaticImageProcessor(**changes)
