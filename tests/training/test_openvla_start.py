"""Fine-tuning from a folder laid out as OpenVLA is published: its VLM is read, everything else is new."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import micro
import numpy as np
import pytest
import torch
from openvla_fixtures import QUERIES, make_openvla_folder
from published_fixtures import make_published_folder
from safetensors.torch import load_file, save_file

from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.policy_facts import check_flags, read_policy_facts
from experiments.robot.policy import VLAPolicy
from prismatic.evidence.files import write_json
from prismatic.model_files import CheckpointError, MissingFileError
from prismatic.models.presets import PRESETS
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_folder import LISTING, MANIFEST, read_json
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.interpolation import interpolate_checkpoint
from prismatic.training.lora import fixed_batch
from prismatic.vla.prompts import PromptKind

ROOT = Path(__file__).resolve().parents[2]
LORA = {"use_lora": True, "lora_rank": 2}
FEATURES = {"use_craft": True, "craft_preset": "keep", "craft_signal": "features", "craft_retention_budget": 1e-3}


@pytest.fixture(scope="module")
def original(tmp_path_factory, llama_tokenizer):
    return make_openvla_folder(tmp_path_factory.mktemp("openvla") / "openvla-small", llama_tokenizer)


@pytest.fixture
def openvla(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / original.name))


@pytest.fixture
def make(make_trainer, openvla):
    """Runs of two steps that start from the folder."""

    def build(name: str = "run", **flags):
        return make_trainer(name, **({"config_file_path": str(openvla), "use_minivlm": False, "max_steps": 2} | flags))

    return build


@pytest.fixture
def keep_features(tmp_path):
    file = tmp_path / "old.txt"
    file.write_text("open the oven\nclose the oven\n")
    return FEATURES | {"craft_memory_instructions": str(file)}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}


def act(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(fixed_batch(model)).actions


def chunk(folder: Path) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    policy = VLAPolicy.from_checkpoint(folder, unnorm_key="libero_mini")
    return policy.predict(image, image[::-1], np.full(8, 0.1), "Pick up the bowl")


def refused(kind: type, call, *words: str) -> str:
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


# ------------------------------------------------------------------------------------------------ the start


def test_weights_are_read_and_the_rest_is_drawn_from_the_seed(make, openvla):
    trainer, same, other = make("a"), make("b"), make("c", seed=8)
    weights, state = stored(openvla), trainer.bare_model.vla.state_dict()
    assert QUERIES not in weights and weights.keys() == state.keys() - {QUERIES}
    assert all(
        state[name].dtype == torch.float32 and torch.equal(state[name], weights[name].float()) for name in weights
    )
    for name, value in trainer.bare_model.named_parameters():
        if not name.startswith("vla.") or name.endswith(QUERIES):
            assert torch.equal(value, same.bare_model.get_parameter(name)), name
    for module in ("vla.action_queries", "action_head.model.fc2", "proprio_projector.fc1"):
        mine, theirs = (t.bare_model.get_submodule(module).weight for t in (trainer, other))
        assert mine.std() > 0 and not torch.equal(mine, theirs), module
    assert trainer.setup.origin == "vlm" and not trainer.bare_model.legacy_slices


def test_units_are_those_of_the_data_and_images_those_of_the_flag(make):
    setup = make().setup
    assert list(setup.statistics) == ["libero_mini_no_noops"] and setup.model.vla.norm_stats is None
    assert [make(f"n{n}", num_images_in_input=n).bare_model.num_images for n in (1, 2)] == [1, 2]
    assert make("default").bare_model.num_images == 1


def test_stored_action_queries_are_of_another_head(make, openvla, capsys):
    expected = make().bare_model.vla.action_queries.weight
    edit(openvla, lambda state: state.update({QUERIES: torch.ones_like(expected)}))
    assert torch.equal(make("again").bare_model.vla.action_queries.weight, expected)
    assert f"not used: {QUERIES} (1)" in capsys.readouterr().out


def test_prompts_are_openvlas(make, llama_tokenizer):
    trainer = make()
    batch = next(trainer.batches())
    ids, (query, *_) = batch["input_ids"][0], batch["action_mask"][0].nonzero()[:, 0]
    instruction = batch["instructions"][0].lower()
    assert ids[0] == llama_tokenizer.bos_token_id
    question = f"In: What action should the robot take to {instruction}?"
    assert llama_tokenizer.decode(ids[1:query]) == f"{question}\nOut: "
    assert llama_tokenizer.convert_ids_to_tokens(int(ids[query - 1])) == "▁"


def test_the_prompt_flag_must_agree_with_the_body(make, make_trainer, monkeypatch):
    refused(ValueError, lambda: make(use_minivlm=True), "--use_minivlm True", "was made with False")
    assert make(use_minivlm=None).bare_model.prompt_kind is PromptKind.OPENVLA_TEXT
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    refused(ValueError, lambda: make_trainer("q", use_minivlm=False), "--use_minivlm False", "was made with True")


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("tuning", ["all", "adapters", "keep"])
def test_two_steps_then_resumed_loaded_and_asked(make, tmp_path, openvla, keep_features, tuning):
    flags = {"all": {}, "adapters": LORA, "keep": LORA | keep_features}[tuning]
    trainer = make(**flags)
    head = trainer.bare_model.vla.get_output_embeddings().weight.clone()
    trainer.fit()
    folder = tmp_path / "runs" / "run--2_chkpt"
    manifest = read_json(folder / MANIFEST)
    assert manifest["prompt_kind"] == "openvla_text" and manifest["origin"] == "vlm"
    assert manifest["start"]["kind"] == "vlm" and (manifest["base"] is not None) == (tuning != "all")
    assert torch.equal(trainer.bare_model.vla.get_output_embeddings().weight, head)  # nothing reaches it
    loaded = load_checkpoint(folder)
    assert torch.allclose(act(loaded.model), act(trainer.bare_model), atol=1e-5)
    assert loaded.model.prompt_kind is PromptKind.OPENVLA_TEXT
    actions = chunk(folder)
    assert actions.shape == (8, 7) and np.isfinite(actions).all()
    resumed = make(**flags, resume=True)
    assert resumed.step == 2
    again = make("next", config_file_path=str(folder), use_minivlm=False, **flags)
    again.fit()
    assert load_checkpoint(tmp_path / "runs" / "next--2_chkpt").manifest["origin"] == "craft"


def test_adapters_are_merged_and_a_changed_or_missing_base_is_named(make, tmp_path, openvla):
    trainer = make(**LORA, merge_lora_during_training=True)
    trainer.fit()
    make("bare", **LORA).fit()
    merged, bare = (tmp_path / "runs" / f"{name}--2_chkpt" for name in ("run", "bare"))
    assert torch.allclose(act(load_checkpoint(merged).model), act(trainer.bare_model), atol=1e-5)
    moved = openvla.rename(tmp_path / "runs" / openvla.name)  # beside the checkpoint: found
    load_checkpoint(bare)
    shard = sorted(moved.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    refused(CheckpointError, lambda: load_checkpoint(bare), "base model", "sha256")
    shutil.rmtree(moved)
    refused(MissingFileError, lambda: load_checkpoint(bare), "--base_checkpoint")
    load_checkpoint(merged)


def test_the_base_is_known_by_the_shards_that_its_index_names(tmp_path, openvla):
    """Whatever they are called; an index whose shards are gone is said to be that."""
    index = openvla / "model.safetensors.index.json"
    content = read_json(index)
    shards = {key: name.replace("model-", "part-") for key, name in content["weight_map"].items()}
    for file in openvla.glob("model-*"):
        file.rename(file.with_name(file.name.replace("model-", "part-")))
    write_json(index, content | {"weight_map": shards})
    adapted = tmp_path / "runs" / "run--2_chkpt"
    base = BaseModel.from_dict(BaseModel.of_vlm(openvla).to_dict(adapted), adapted)
    assert base.find(adapted) == openvla
    first = sorted(openvla.glob("part-*"))[0]
    first.unlink()
    refused(MissingFileError, lambda: BaseModel.of_vlm(openvla), f"{first} does not exist")
    refused(CheckpointError, lambda: base.find(adapted), f"{openvla}: {first} does not exist", "--base_checkpoint")


def test_a_new_head_has_no_skill_to_keep(make, keep_features):
    refused(
        ValueError,
        lambda: make(**keep_features | {"craft_signal": "actions"}),
        "--craft_signal actions",
        "new action head",
    )


def test_the_language_model_alone_can_be_interpolated(make, tmp_path):
    make(**LORA).fit()
    folder = tmp_path / "runs" / "run--2_chkpt"
    refused(ValueError, lambda: interpolate_checkpoint(folder, 0.5), "has no action head", "--parts vlm or llm")
    assert interpolate_checkpoint(folder, 0.5, parts="llm").model.prompt_kind is PromptKind.OPENVLA_TEXT


@pytest.mark.slow
def test_the_command_line(openvla, tmp_path):
    words = [
        sys.executable, "vla-scripts/finetune.py", "--config_file_path", str(openvla), "--use_minivlm", "False",
        "--data_root_dir", "tests/golden/rlds_mini", "--dataset_name", "libero_mini_no_noops", "--device", "cpu",
        "--run_root_dir", str(tmp_path / "runs"), "--run_id_override", "run", "--batch_size", "1", "--max_steps", "2",
    ]  # fmt: skip

    def finetune(*more: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([*words, *more], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)

    wrong = finetune("--use_minivlm", "True")
    assert wrong.returncode == 2 and "--use_minivlm True: the start model" in wrong.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    done = finetune()
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.isfinite(chunk(tmp_path / "runs" / "run--2_chkpt")).all()


# ------------------------------------------------------------------------------------------------ what is refused


def edit(folder: Path, change) -> None:
    """Write all weights into one file, changed."""
    state = stored(folder)
    for file in folder.glob("model*"):
        file.unlink()
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_keys_are_named_others_are_listed_by_pattern(make, openvla, capsys):
    layers = [f"language_model.model.layers.{i}.self_attn." for i in range(2)]
    edit(openvla, lambda state: state.update({f"{name}rotary_emb.inv_freq": torch.ones(4) for name in layers}))
    make()
    assert "not used: language_model.model.layers.*.self_attn.rotary_emb.inv_freq (2)" in capsys.readouterr().out
    edit(openvla, lambda state: state.update({f"{name}q_proj.bias": torch.ones(32) for name in layers}))
    unknown = "unknown: language_model.model.layers.*.self_attn.q_proj.bias (2)"
    refused(CheckpointError, make, "--config_file_path", str(openvla), unknown)
    gone = "language_model.lm_head.weight"
    edit(openvla, lambda state: [state.pop(name) for name in (gone, *(f"{name}q_proj.bias" for name in layers))])
    refused(CheckpointError, make, f"1 missing: {gone}")


def test_another_geometry_is_named_before_weights_are_read(make, openvla):
    config = read_json(openvla / "config.json")
    write_json(openvla / "config.json", config | {"text_config": config["text_config"] | {"intermediate_size": 64}})
    refused(CheckpointError, make, "6 of another shape", "mlp.down_proj.weight is (32, 48), expected (32, 64)")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_a_file_that_is_not_there_is_named(make, openvla, name):
    (openvla / name).unlink()
    refused(MissingFileError, make, "--config_file_path", name)


def test_a_tokenizer_without_bos_is_refused(make, openvla):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (openvla / name).exists():
            write_json(openvla / name, {k: v for k, v in read_json(openvla / name).items() if k != "bos_token"})
    refused(CheckpointError, make, "tokenizer_config.json", "no BOS token")


def test_there_is_nothing_to_evaluate(openvla):
    refused(CheckpointError, lambda: load_checkpoint(openvla), str(openvla), "without an action head")


def test_a_recorded_prompt_that_is_not_the_bodys_is_refused(make, tmp_path):
    make().fit()
    folder = tmp_path / "runs" / "run--2_chkpt"
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"prompt_kind": "qwen_chat"})
    (folder / LISTING).unlink()
    refused(CheckpointError, lambda: load_checkpoint(folder), "prompt_kind is 'qwen_chat', expected 'openvla_text'")


def test_openvla_ofts_layout_is_another_model(tmp_path):
    folder = make_published_folder(tmp_path / "oft")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, lambda: load_checkpoint(folder), str(folder), "OpenVLA-OFT")


def test_the_evaluation_flag_must_agree_with_the_checkpoint(make, tmp_path):
    make().fit()
    facts = read_policy_facts(VLAPolicy.from_checkpoint(tmp_path / "runs" / "run--2_chkpt", unnorm_key="libero_mini"))
    for value in (None, False):
        check_flags(EvalConfig(pretrained_checkpoint="x", use_minivlm=value), facts)
    wrong = EvalConfig(pretrained_checkpoint="x", use_minivlm=True)
    refused(EvalInputError, lambda: check_flags(wrong, facts), "--use_minivlm True", "use_minivlm = False")
