"""Fine-tuning that starts from a native Prismatic VLM (`--vlm_path`)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_native import native_components, write_native

from prismatic.models.presets import build_config, build_processor, build_vla
from prismatic.training.checkpoint_files import MANIFEST
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.lora import fixed_batch, unused_targets


@pytest.fixture
def native(tmp_path):
    """(path of the native run, its weights as our state dict, tiny geometry)."""
    vla, _, _ = build_vla("tiny", seed=11)
    run = tmp_path / "native_vlm"
    write_native(run, native_components(vla.state_dict()))
    names = ("vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy", "llm_max_length")
    (run / "config.json").write_text(json.dumps({"model": {name: getattr(vla.config, name) for name in names}}))
    return run, vla.state_dict()


def act(model) -> torch.Tensor:
    with torch.no_grad():
        return model(fixed_batch(model)).actions


def test_native_weights_with_new_queries_and_head(make_trainer, native):
    run, weights = native
    trainer = make_trainer("run", vlm_path=str(run))
    state = trainer.bare_model.vla.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items() if name != "action_queries.weight")
    assert state["action_queries.weight"].std() > 0
    assert trainer.setup.origin == "native" and not trainer.bare_model.legacy_slices


def test_configuration_may_come_from_a_folder_without_weights(make_trainer, native, tmp_path):
    run, weights = native
    configs = tmp_path / "configs"
    build_config("tiny").save_pretrained(configs)
    build_processor("tiny").save_pretrained(configs)
    model = make_trainer("run", vlm_path=str(run), config_file_path=str(configs), num_images_in_input=1).bare_model
    assert model.num_images == 1 and model.action_head.geometry.num_task_tokens == 36
    assert torch.equal(model.vla.projector.fc1.weight, weights["projector.fc1.weight"])
    (configs / "model.safetensors").touch()
    with pytest.raises(ValueError, match="no weights"):
        make_trainer("run2", vlm_path=str(run), config_file_path=str(configs))


def test_adapters_on_a_native_base_are_found_again_and_a_changed_base_is_refused(make_trainer, native, tmp_path):
    run, _ = native
    trainer = make_trainer("run", vlm_path=str(run), use_lora=True, lora_rank=4, max_steps=2)
    trainer.fit()
    folder = tmp_path / "runs" / "run--2_chkpt"
    assert json.loads((folder / MANIFEST).read_text())["base"]["kind"] == "native"
    assert torch.allclose(act(load_checkpoint(folder).model), act(trainer.bare_model.eval()), atol=1e-5)
    write_native(run, native_components(build_vla("tiny", seed=12)[0].state_dict()))
    with pytest.raises(ValueError, match="sha256"):
        load_checkpoint(folder)


def test_legacy_conventions_on_a_new_head_keep_the_trained_policy_through_an_export(make_trainer, native, tmp_path):
    """The public code expects shifted slices and bf16 angles; a policy trained with them is exported as it is."""
    run, _ = native
    flags = {"use_lora": True, "lora_rank": 4, "max_steps": 1, "legacy_slices": True, "lora_emit_unused": True}
    with pytest.raises(ValueError, match="vision towers have a geometry of their own"):  # tiny is no published size
        make_trainer("export", vlm_path=str(run), export_published_layout=True, **flags)
    trainer = make_trainer("run", vlm_path=str(run), **flags)
    trainer.fit()
    head = trainer.bare_model.action_head.geometry
    assert trainer.bare_model.legacy_slices and head.rope_mode.value == "legacy" and head.published_layout
    folder = tmp_path / "runs" / "run--1_chkpt"
    assert torch.allclose(act(load_checkpoint(folder).model), act(trainer.bare_model.eval()), atol=1e-5)
    adapter = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    base = trainer.bare_model.vla.get_base_model()
    for name in unused_targets(base):
        assert not adapter[f"base_model.model.{name}.lora_A.weight"].any()
    assert "base_model.model.language_model.lm_head.base_layer.weight" in adapter
