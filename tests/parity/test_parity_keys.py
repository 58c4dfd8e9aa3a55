"""Names and shapes of the published geometry, built without memory on the meta device."""

import re
from types import SimpleNamespace

import pytest
import torch
from parity_fixtures import golden_model, read_json
from peft import get_peft_model_state_dict
from safetensors import safe_open

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.presets import PROPRIO_DIM, build_config, head_options
from prismatic.models.projectors import ProprioProjector
from prismatic.training.config import FinetuneConfig
from prismatic.training.lora import lora_targets, unused_targets, with_unused_targets
from prismatic.training.setup import apply_tuning

PRESET = "qwen25-0_5b"
ADAPTER_PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "keys"


@pytest.fixture(scope="module")
def summary(folder):
    return read_json(folder / "summary.json")


@pytest.fixture(scope="module")
def config():
    return build_config(PRESET)


def build_vla(config):
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


@pytest.fixture(scope="module")
def full_model(config):
    return build_vla(config)


def shapes(state):
    return {name: list(tensor.shape) for name, tensor in state.items()}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The model


def test_model_in_memory(folder, summary, full_model):
    found = shapes(full_model.state_dict())
    assert found == read_json(folder / "merged_model.json")
    assert len(found) == summary["merged_model"]["keys_in_memory"]


def test_parameters_per_part_of_the_model(summary, full_model):
    facts = summary["merged_model"]
    assert count(full_model) == facts["unique_parameters"]
    parts = [n for n in facts if n not in ("keys_in_memory", "keys_in_file", "dropped_in_file", "unique_parameters")]
    assert parts
    for name in parts:
        assert count(full_model.get_submodule(name)) == facts[name], name


def test_keys_dropped_in_a_file_are_the_tied_ones(summary, full_model):
    state = full_model.state_dict(keep_vars=True)
    owners = {id(parameter): name for name, parameter in full_model.named_parameters()}
    dropped = [name for name, parameter in state.items() if owners.get(id(parameter), name) != name]
    assert dropped == summary["merged_model"]["dropped_in_file"] == list(full_model._tied_weights_keys)
    assert len(state) - len(dropped) == summary["merged_model"]["keys_in_file"]


def test_saving_drops_exactly_these_keys(golden_dir, summary, tmp_path):
    model = golden_model(golden_dir / "prismatic_tiny")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 -- not a mapping
    kept = shapes(model.state_dict())
    for name in summary["merged_model"]["dropped_in_file"]:
        del kept[name]
    assert saved == kept


# The heads and the proprio projector


@pytest.mark.parametrize("kind", ["plain", "pro"])
def test_head(folder, summary, config, kind):
    with torch.device("meta"):
        head = L1RegressionActionHead(**head_options(PRESET, config, use_pro_version=kind == "pro"))
    facts = summary[f"{kind}_head"]
    assert shapes(head.state_dict()) == read_json(folder / f"{kind}_head.json")
    assert (len(head.state_dict()), count(head)) == (facts["keys"], facts["parameters"])


def test_head_without_the_parameters_that_nothing_reads(folder, summary, config):
    with torch.device("meta"):
        head = L1RegressionActionHead(**head_options(PRESET, config, use_pro_version=True, published_layout=False))
    full = read_json(folder / "pro_head.json")
    assert shapes(head.state_dict()) == {name: shape for name, shape in full.items() if ".film_gen." not in name}
    assert count(head) == summary["pro_head"]["parameters_without_film_gen"]


def test_proprio_projector(folder, summary, config):
    projector = ProprioProjector(config.text_config.hidden_size, PROPRIO_DIM)
    assert shapes(projector.state_dict()) == read_json(folder / "proprio_projector.json")
    facts = summary["proprio_projector"]
    assert (len(projector.state_dict()), count(projector)) == (facts["keys"], facts["parameters"])


# LoRA adapters


@pytest.fixture(scope="module")
def adapter(folder, summary):
    """(published table, its summary, rank)."""
    (file,) = folder.glob("lora_*adapter.json")
    table = read_json(file)
    ranks = {shape[0] for name, shape in table.items() if ".lora_A." in name}
    (rank,) = ranks | {shape[1] for name, shape in table.items() if ".lora_B." in name}
    return table, summary[file.stem], rank


@pytest.fixture(scope="module")
def adapted(config, adapter):
    """The model with adapters as training puts them; a model of its own, because it is changed."""
    policy = SimpleNamespace(vla=build_vla(config))
    apply_tuning(policy, FinetuneConfig(use_lora=True, lora_rank=adapter[2]))
    return policy.vla


@pytest.fixture(scope="module")
def adapter_state(adapted):
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def modules(table):
    """Adapted module names of an adapter table."""
    names = (re.fullmatch(rf"{re.escape(ADAPTER_PREFIX)}(.+)\.lora_[AB]\.weight", key) for key in table)
    return {match[1] for match in names if match}


def without_gradient(names):
    """The adapted modules whose output no loss depends on: LM head, attention pools, last block of each tower."""
    blocks = {}
    for name in names:
        if match := re.match(r"(vision_backbone\.\w+\.blocks)\.(\d+)\.", name):
            blocks[match[1]] = max(int(match[2]), blocks.get(match[1], 0))
    discarded = tuple(f"{prefix}.{last}." for prefix, last in blocks.items())
    assert discarded
    return {n for n in names if n == "language_model.lm_head" or ".attn_pool." in n or n.startswith(discarded)}


def test_adapter_table_counts(adapter):
    table, facts, _ = adapter
    lora = [shape for name, shape in table.items() if ".lora_" in name]
    assert (len(table), len(lora)) == (facts["keys"], facts["lora_tensors"])
    assert sum(torch.Size(shape).numel() for shape in lora) == facts["lora_parameters"]
    assert sorted(set(table) - {n for n in table if ".lora_" in n}) == sorted(facts["extra_keys"])


def test_adapters_are_the_published_ones_that_can_receive_a_gradient(adapter, adapter_state):
    table, _, _ = adapter
    excluded = without_gradient(modules(table))
    expected = {
        name: shape
        for name, shape in table.items()
        if ".lora_" in name and name.removeprefix(ADAPTER_PREFIX).split(".lora_")[0] not in excluded
    }
    assert shapes(adapter_state) == expected


def test_targets_and_unused_targets_together_are_the_published_ones(adapter, full_model):
    published = modules(adapter[0])
    assert set(unused_targets(full_model)) == without_gradient(published)
    assert set(lora_targets(full_model)) == published - without_gradient(published)


def test_adapter_file_with_unused_targets_is_the_published_one(adapter, adapted, adapter_state):
    table, _, rank = adapter
    assert shapes(with_unused_targets(adapter_state, adapted.get_base_model(), rank)) == table


def test_adapter_settings(adapter, adapted):
    table, facts, rank = adapter
    found = adapted.peft_config["default"]
    assert (found.r, found.lora_alpha) == (rank, facts["lora_alpha"])
    assert {name.rsplit(".", 1)[-1] for name in modules(table)} == set(facts["target_modules"])
