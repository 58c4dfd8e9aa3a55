"""Published folders: loading, fine-tuning, merging, exporting."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published_fixtures import make_published_folder
from safetensors.torch import load_file, save_file

from experiments.robot.policy import VLAPolicy
from prismatic.command_line import parse
from prismatic.model_files import CheckpointError
from prismatic.training.checkpoint_files import MANIFEST
from prismatic.training.checkpoints import load_checkpoint, load_unmerged
from prismatic.training.lora import fixed_batch, merged_state_dict
from prismatic.training.published import check_exportable, export_published


@pytest.fixture
def published(tmp_path):
    return make_published_folder(tmp_path / "published")


def act(model) -> torch.Tensor:
    with torch.no_grad():
        return model(fixed_batch(model)).actions


def chunk(folder, **options) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    policy = VLAPolicy.from_checkpoint(folder, unnorm_key="libero_mini", **options)
    return policy.predict(image, image[::-1], np.full(8, 0.1), "Pick up the bowl")


@pytest.mark.parametrize("pro", [False, True])
def test_everything_the_folder_does_not_say_is_derived_and_recorded(tmp_path, pro):
    loaded = load_checkpoint(make_published_folder(tmp_path / "p", pro))
    manifest = loaded.manifest
    assert manifest["origin"] == "published" and manifest["legacy_slices"] and loaded.model.legacy_slices
    assert manifest["action_head"]["use_pro_version"] is pro
    assert manifest["action_head"]["rope_mode"] == "legacy"
    assert (manifest["num_images"], manifest["use_proprio"], manifest["action_spec"]["chunk_len"]) == (2, True, 8)
    assert manifest["image_spec"] == {"size": 96, "jpeg_quality": 95, "center_crop": True, "crop_area": 0.9}
    assert act(loaded.model).isfinite().all()


def test_sharded_and_bf16_weights_load_alike(published, tmp_path):
    model = load_checkpoint(published).model
    sharded = tmp_path / "sharded"
    shutil.copytree(published, sharded, ignore=shutil.ignore_patterns("model.safetensors"))
    model.vla.save_pretrained(sharded, max_shard_size="2MB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(act(load_checkpoint(sharded).model), act(model))
    state = {key: value.bfloat16() for key, value in load_file(published / "model.safetensors").items()}
    save_file(state, published / "model.safetensors", metadata={"format": "pt"})
    assert next(load_checkpoint(published).model.vla.parameters()).dtype == torch.float32


def test_the_number_of_images_comes_from_the_config_the_flag_or_an_error(tmp_path):
    folder = make_published_folder(tmp_path / "p", num_images_in_input=None)
    with pytest.raises(ValueError, match="pass --num_images_in_input"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, num_images=1).model.num_images == 1
    assert load_checkpoint(folder, num_images=2).model.action_head.geometry.num_task_tokens == 72


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "action_head--checkpoint.pt", "proprio_projector--checkpoint.pt"]
)
def test_keys_that_do_not_fit_are_listed(published, kind, file):
    is_model = file.startswith("model")
    state = load_file(published / file) if is_model else torch.load(published / file, weights_only=True)
    key = "projector.fc1.bias" if is_model else next(k for k in state if k.endswith("fc2.bias"))
    if kind == "missing":
        del state[key]
    else:
        key = "module.extra.weight"
        state[key] = torch.zeros(2)
    save_file(state, published / file, metadata={"format": "pt"}) if is_model else torch.save(state, published / file)
    with pytest.raises(ValueError, match=key.removeprefix("module.")):
        load_checkpoint(published)


def test_two_head_files_and_a_pickle_are_refused(published):
    shutil.copy(published / "action_head--checkpoint.pt", published / "action_head--5_checkpoint.pt")
    with pytest.raises(ValueError, match="exactly one action_head.*5_checkpoint"):
        load_checkpoint(published)
    (published / "action_head--5_checkpoint.pt").unlink()
    torch.save({"model": torch.nn.Linear(2, 2)}, published / "action_head--checkpoint.pt")
    with pytest.raises(CheckpointError, match="action_head--checkpoint.pt: expected tensors alone"):
        load_checkpoint(published)


@pytest.mark.slow
@pytest.mark.parametrize("pro", [False, True])
def test_load_predict_finetune_save_merge_load_predict(make_trainer, tmp_path, pro):
    start = make_published_folder(tmp_path / "p", pro)
    before = chunk(start)
    flags = {"use_lora": True, "lora_rank": 4, "max_steps": 2, "use_craft": True, "craft_retention_budget": 1e-3}
    trainer = make_trainer("run", config_file_path=str(start), merge_lora_during_training=True, **flags)
    trainer.fit()
    folder = tmp_path / "runs" / "run--2_chkpt"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["origin"] == "published" and manifest["legacy_slices"]
    assert 0 <= manifest["merge"]["max_difference"] <= manifest["merge"]["tolerance"]
    trained = trainer.bare_model.eval()
    assert torch.allclose(act(load_checkpoint(folder).model), act(trained), atol=1e-5)
    assert torch.equal(
        load_checkpoint(folder).model.vla.action_queries.weight, trained.vla.get_base_model().action_queries.weight
    )
    after = chunk(folder)
    assert after.shape == before.shape and not np.array_equal(after, before)


@pytest.mark.slow
@pytest.mark.alone
def test_the_published_size_loads_trains_merges_and_loads_again(make_trainer, tmp_path):
    """1.25 billion random weights; no number of images in the configuration, as in published folders."""
    start = make_published_folder(tmp_path / "p", preset="qwen25-0_5b", num_images_in_input=None)
    trainer = make_trainer(
        "run", config_file_path=str(start), use_lora=True, lora_rank=4, batch_size=1, max_steps=2,
        merge_lora_during_training=True, save_training_state=False,
    )  # fmt: skip
    assert trainer.bare_model.num_images == 2 and trainer.setup.origin == "published"
    trainer.fit()
    shutil.rmtree(start)
    del trainer
    loaded = load_checkpoint(tmp_path / "runs" / "run--2_chkpt")
    merge = loaded.manifest["merge"]
    assert 0 <= merge["max_difference"] <= merge["tolerance"]
    assert act(loaded.model).isfinite().all()
    shutil.rmtree(tmp_path / "runs")  # 5 GB


def test_the_merge_tool_equals_the_adapted_model_and_keeps_the_source(make_trainer, tmp_path, published):
    trainer = make_trainer("run", config_file_path=str(published), use_lora=True, lora_rank=4, max_steps=2)
    trainer.fit()
    folder, target = tmp_path / "runs" / "run--2_chkpt", tmp_path / "merged"
    merge(f"--lora_finetuned_checkpoint_dir {folder} --output_dir {target}")
    shutil.rmtree(published)  # a merged folder needs no base
    merged = load_checkpoint(target)
    assert torch.allclose(act(merged.model), act(trainer.bare_model.eval()), atol=1e-5)
    assert not (folder / "model.safetensors").exists() and not target.with_name("merged.tmp").exists()
    with pytest.raises(FileNotFoundError, match="published"):
        load_unmerged(folder)
    with pytest.raises(ValueError, match="holds a whole model already"):
        merge(f"--lora_finetuned_checkpoint_dir {target}")


def test_a_merge_that_changes_the_outputs_is_an_error_and_leaves_no_folder(
    make_trainer, tmp_path, published, monkeypatch
):
    trainer = make_trainer("run", config_file_path=str(published), use_lora=True, lora_rank=4, max_steps=2)
    trainer.fit()
    folder, target = tmp_path / "runs" / "run--2_chkpt", tmp_path / "merged"
    wrong = lambda base: {key: value + 0.01 for key, value in merged_state_dict(base).items()}  # noqa: E731
    monkeypatch.setattr("prismatic.training.checkpoints.merged_state_dict", wrong)
    with pytest.raises(ValueError, match="differ from the adapted model"):
        merge(f"--lora_finetuned_checkpoint_dir {folder} --output_dir {target}")
    assert not target.exists()


def test_export_and_reload_is_the_same_policy(published, tmp_path):
    loaded = load_checkpoint(published)
    before = act(loaded.model)
    folder = export_published(loaded, tmp_path / "out", "20_checkpoint", torch.float32)
    assert {"action_head--20_checkpoint.pt", "proprio_projector--20_checkpoint.pt"} <= {
        f.name for f in folder.iterdir()
    }
    keys = torch.load(folder / "action_head--20_checkpoint.pt", weights_only=True)
    assert all(key.startswith("module.model.") for key in keys)
    again = load_checkpoint(folder)
    assert again.manifest["step"] == 20 and torch.equal(act(again.model), before)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_prismatic.OpenVLAConfig"
    assert config["architectures"] == ["OpenVLAForActionPrediction"]


def test_what_the_public_code_cannot_express_is_refused_before_training(make_trainer):
    trainer = make_trainer("new")
    with pytest.raises(ValueError, match="shifted.*bf16.*learned rows.*film_gen"):
        check_exportable(trainer.bare_model)
    with pytest.raises(ValueError, match="--export_published_layout"):
        make_trainer("export", export_published_layout=True)


def test_legacy_slices_of_the_start_model_are_kept(make_trainer, published):
    with pytest.raises(ValueError, match="--legacy_slices False"):
        make_trainer("x", config_file_path=str(published), legacy_slices=False)
    trainer = make_trainer("full", config_file_path=str(published), max_steps=1)
    trainer.fit()
    again = load_checkpoint(trainer.setup.run_dir.parent / "full--1_chkpt")
    assert again.manifest["origin"] == "published" and again.model.legacy_slices
    assert again.model.action_head.geometry.rope_mode.value == "legacy"


def merge(arguments: str) -> None:
    script = load_script("merge_lora_weights_and_save")
    script.merge(parse(script.MergeConfig, arguments.split()))


def load_script(name: str):
    path = Path(__file__).parents[2] / "vla-scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
