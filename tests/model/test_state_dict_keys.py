"""Properties of the published geometry, built without memory on the meta device."""

import pytest
import torch

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.presets import build_config


@pytest.fixture(scope="module")
def full_model():
    with torch.device("meta"):
        return OpenVLAForActionPrediction(build_config("qwen25-0_5b"))


def test_lm_head_is_tied(full_model):
    assert full_model.language_model.lm_head.weight is full_model.get_input_embeddings().weight


def test_unreached_modules_exist(full_model):
    names = full_model.unreached_module_names()
    assert all(full_model.get_submodule(name) is not None for name in names)
    assert "vision_backbone.featurizer.blocks.23" in names
    assert "vision_backbone.fused_featurizer.blocks.26" in names
    assert "vision_backbone.fused_featurizer.attn_pool" in names
