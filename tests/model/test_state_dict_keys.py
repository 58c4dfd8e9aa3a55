"""Parameter names and shapes of the published geometry, built without memory on the meta device."""

import json

import pytest
import torch

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.presets import build_config, head_options
from prismatic.models.projectors import ProprioProjector


@pytest.fixture(scope="module")
def config():
    return build_config("qwen25-0_5b")


@pytest.fixture(scope="module")
def full_model(config):
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


def stored(golden_dir, name):
    return json.loads((golden_dir / "keys" / f"{name}.json").read_text())


def shapes(module):
    return {k: list(v.shape) for k, v in module.state_dict().items()}


def test_model_keys(golden_dir, full_model):
    expected, summary = stored(golden_dir, "merged_model"), stored(golden_dir, "summary")["merged_model"]
    assert shapes(full_model) == expected
    assert len(expected) == summary["keys_in_memory"]
    parts = {
        "unique_parameters": full_model,
        "vision_backbone.featurizer": full_model.vision_backbone.featurizer,
        "vision_backbone.fused_featurizer": full_model.vision_backbone.fused_featurizer,
        "projector": full_model.projector,
        "language_model": full_model.language_model,
        "action_queries": full_model.action_queries,
    }
    for name, module in parts.items():
        assert sum(p.numel() for p in module.parameters()) == summary[name], name


def test_lm_head_is_tied(full_model):
    assert full_model.language_model.lm_head.weight is full_model.get_input_embeddings().weight


@pytest.mark.parametrize("pro", [False, True])
def test_head_keys(golden_dir, config, pro):
    with torch.device("meta"):
        head = L1RegressionActionHead(**head_options("qwen25-0_5b", config, use_pro_version=pro))
    name = "pro_head" if pro else "plain_head"
    assert shapes(head) == stored(golden_dir, name)
    assert sum(p.numel() for p in head.parameters()) == stored(golden_dir, "summary")[name]["parameters"]


def test_dead_head_parameters_are_optional(golden_dir, config):
    with torch.device("meta"):
        head = L1RegressionActionHead(**head_options("qwen25-0_5b", config, published_layout=False))
    total = sum(p.numel() for p in head.parameters())
    assert total == stored(golden_dir, "summary")["pro_head"]["parameters_without_film_gen"]


def test_proprio_projector_keys(golden_dir, config):
    projector = ProprioProjector(config.text_config.hidden_size, 8)
    assert shapes(projector) == stored(golden_dir, "proprio_projector")


def test_unreached_modules_exist(full_model):
    names = full_model.unreached_module_names()
    assert all(full_model.get_submodule(name) is not None for name in names)
    assert "vision_backbone.featurizer.blocks.23" in names
    assert "vision_backbone.fused_featurizer.blocks.26" in names
    assert "vision_backbone.fused_featurizer.attn_pool" in names
