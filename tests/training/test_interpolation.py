"""Interpolation with the start model after training: `interpolate_weights.py` and `--adapter_scale` of the merge."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from published_fixtures import make_published_folder
from safetensors.torch import load_file, save_file

from prismatic.command_line import parse
from prismatic.training import checkpoints
from prismatic.training.checkpoint_files import MANIFEST, weights_hash
from prismatic.training.checkpoint_folder import LISTING
from prismatic.training.checkpoints import load_checkpoint, load_unmerged
from prismatic.training.interpolation import Parts, interpolate_checkpoint, save_policy, scale_adapters
from prismatic.training.lora import fixed_batch

TUNING = {"full": {}, "frozen": {"use_fz": True}, "lora": {"use_lora": True, "lora_rank": 4}}
LEARNED_BESIDE_ADAPTERS = ("vla.action_queries.", "action_head.", "proprio_projector.")


@pytest.fixture
def start(make_trainer) -> Path:
    """A checkpoint of the tiny preset after one step."""
    trainer = make_trainer("start", max_steps=1, save_training_state=False)
    trainer.fit()
    return trainer.setup.run_dir.parent / "start--1_chkpt"


@pytest.fixture
def train(make_trainer):
    """train(start, kind): a checkpoint two steps away from the start model."""

    def run(start: Path, kind: str) -> Path:
        flags = {"config_file_path": str(start), "max_steps": 2, "save_training_state": False} | TUNING[kind]
        trainer = make_trainer(kind, **flags)
        trainer.fit()
        return trainer.setup.run_dir.parent / f"{kind}--2_chkpt"

    return run


def act(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(fixed_batch(policy.model)).actions


def tensors(policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


def run_script(monkeypatch, name: str, function: str, arguments: str) -> None:
    path = Path(__file__).parents[2] / "vla-scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    config = getattr(module, f"{function.capitalize()}Config")
    getattr(module, function)(parse(config, arguments.split()))


def interpolate(monkeypatch, arguments: str) -> None:
    run_script(monkeypatch, "interpolate_weights", "interpolate", arguments)


def edit_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))
    (folder / LISTING).unlink()  # of the files as they were written


# ------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize("kind", TUNING)
def test_scale_one_is_the_trained_policy_and_zero_the_start(start, train, kind):
    folder = train(start, kind)
    trained, begin = load_checkpoint(folder), load_checkpoint(start)
    assert (act(trained) - act(begin)).abs().max() > 1e-3
    for scale, expected in ((1.0, trained), (0.0, begin)):
        policy = interpolate_checkpoint(folder, scale)
        assert torch.equal(act(policy), act(expected))
        different = [name for name, value in tensors(expected).items() if not torch.equal(tensors(policy)[name], value)]
        assert different == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_tensor_is_linear_in_the_scale_also_beyond_one(start, train, kind):
    folder = train(start, kind)
    first, last = tensors(load_checkpoint(start)), tensors(load_checkpoint(folder))
    for scale in (0.5, 1.5):
        middle = tensors(interpolate_checkpoint(folder, scale))
        assert middle.keys() == last.keys()
        for name, value in middle.items():
            torch.testing.assert_close(value, first[name] + scale * (last[name] - first[name]), atol=1e-6, rtol=1e-5)
    assert not torch.equal(first["action_head.model.fc1.weight"], last["action_head.model.fc1.weight"])


def test_adapters_are_scaled_as_peft_does(start, train):
    folder = train(start, "lora")
    policy = interpolate_checkpoint(folder, 0.3, parts="vlm")
    adapted = load_unmerged(folder)
    queries = adapted.model.vla.get_base_model().action_queries.weight
    begin = load_checkpoint(start).model.vla.action_queries.weight
    with torch.no_grad():
        queries.copy_(begin + 0.3 * (queries - begin))
    unscaled = act(adapted)
    with rescale_adapter_scale(adapted.model.vla, 0.3):
        expected = act(adapted)
    torch.testing.assert_close(act(policy), expected, atol=2e-6, rtol=1e-5)
    assert (unscaled - expected).abs().max() > 1e-4
    scale_adapters(adapted.model.vla, 0.3)
    assert torch.equal(act(adapted), expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_parts_vlm_keeps_head_and_proprio_projector_as_trained(start, train, kind):
    folder = train(start, kind)
    policy = tensors(interpolate_checkpoint(folder, 0.5, parts=Parts.VLM))
    both, last = tensors(interpolate_checkpoint(folder, 0.5)), tensors(load_checkpoint(folder))
    for name, value in policy.items():
        kept = name.startswith(("action_head.", "proprio_projector."))
        assert torch.equal(value, last[name] if kept else both[name]), name
    assert not torch.equal(policy["vla.action_queries.weight"], last["vla.action_queries.weight"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_parts_llm_moves_the_language_model_alone(start, train, kind):
    folder = train(start, kind)
    found = tensors(interpolate_checkpoint(folder, 0.5, parts="llm"))
    both, last = tensors(interpolate_checkpoint(folder, 0.5)), tensors(load_checkpoint(folder))
    for name, value in found.items():
        moved = name.startswith("vla.language_model.")
        assert torch.equal(value, both[name] if moved else last[name]), name
    # The training moved every part, so that keeping one says something.
    parts = ("vision_backbone.", "projector.", "language_model.", "action_queries.")
    for prefix in (*(f"vla.{part}" for part in parts), "action_head.", "proprio_projector."):
        assert any(not torch.equal(both[name], last[name]) for name in last if name.startswith(prefix)), prefix


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_parts_llm_ends_at_the_start_language_model_and_at_the_trained_policy(start, train, kind):
    folder = train(start, kind)
    first, last = load_checkpoint(start), load_checkpoint(folder)
    assert torch.equal(act(interpolate_checkpoint(folder, 1.0, parts="llm")), act(last))
    policy = interpolate_checkpoint(folder, 0.0, parts="llm")
    assert policy.manifest["interpolation"]["parts"] == "llm"
    last.model.vla.language_model.load_state_dict(first.model.vla.language_model.state_dict())
    assert torch.equal(act(policy), act(last))
    assert not torch.equal(act(policy), act(first))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_parts_head_at_scale_zero_is_the_start_head_on_the_trained_vlm(start, train, kind):
    folder = train(start, kind)
    policy = interpolate_checkpoint(folder, 0.0, parts=Parts.HEAD)
    found, last, first = tensors(policy), tensors(load_checkpoint(folder)), tensors(load_checkpoint(start))
    for name, value in found.items():
        expected = first if name.startswith(("action_head.", "proprio_projector.")) else last
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(last[name], value) for name, value in first.items() if name.startswith("vla."))
    assert not torch.equal(found["action_head.model.fc1.weight"], last["action_head.model.fc1.weight"])
    assert policy.manifest["interpolation"]["parts"] == "head"
    whole = interpolate_checkpoint(folder, 1.0, parts=Parts.HEAD)
    assert [name for name, value in tensors(whole).items() if not torch.equal(value, last[name])] == []
    assert torch.equal(act(whole), act(load_checkpoint(folder)))


def test_published_folders_can_be_both_ends(make_trainer, tmp_path, train):
    begin = make_published_folder(tmp_path / "published")
    folder = train(begin, "full")
    last = load_checkpoint(folder)
    assert torch.equal(act(interpolate_checkpoint(folder, 1.0)), act(last))
    # A published folder as the trained end: it does not say where it started.
    with pytest.raises(ValueError, match="--base is missing"):
        interpolate_checkpoint(begin, 0.0)
    policy = interpolate_checkpoint(begin, 0.0, base=folder)
    assert torch.equal(act(policy), act(last))
    again = load_checkpoint(save_policy(policy, tmp_path / "out"))
    assert again.manifest["origin"] == "published" and again.model.legacy_slices
    assert torch.equal(act(again), act(last))


def test_adapters_on_a_native_model_move_alone(start, train, monkeypatch):
    folder = train(start, "lora")
    edit_manifest(folder, base={"kind": "native", "path": str(start), "sha256": "of the native file"})

    def load_native(vla, path):
        state = {k: v for k, v in load_file(Path(path) / "model.safetensors").items() if "action_queries" not in k}
        vla.load_state_dict(state, strict=False)
        return SimpleNamespace(sha256="of the native file")

    monkeypatch.setattr(checkpoints, "load_native_weights", load_native)
    for parts in (Parts.ALL, Parts.HEAD):
        with pytest.raises(ValueError, match="the VLM.*--parts vlm or llm"):
            interpolate_checkpoint(folder, 0.5, parts=parts)
    policy = tensors(interpolate_checkpoint(folder, 0.0, parts="vlm"))
    first, last = tensors(load_checkpoint(start)), tensors(load_checkpoint(folder))
    for name, value in policy.items():
        assert torch.equal(value, last[name] if name.startswith(LEARNED_BESIDE_ADAPTERS) else first[name]), name
    for name, value in tensors(interpolate_checkpoint(folder, 0.0, parts="llm")).items():
        assert torch.equal(value, first[name] if name.startswith("vla.language_model.") else last[name]), name


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_output_is_an_ordinary_checkpoint_to_start_from(start, train, make_trainer, tmp_path, monkeypatch, kind):
    folder, out = train(start, kind), tmp_path / "out"
    interpolate(monkeypatch, f"--checkpoint {folder} --adapter_scale 0.5 --output {out}")
    assert not out.with_name("out.tmp").exists() and not (out / "lora_adapter").exists()
    expected, policy = interpolate_checkpoint(folder, 0.5), load_checkpoint(out)
    assert torch.equal(act(policy), act(expected))
    assert policy.statistics == load_checkpoint(folder).statistics
    assert (policy.manifest["tuning"], policy.manifest["base"], policy.manifest["step"]) == ("full", None, 2)
    assert policy.manifest["interpolation"] == {
        "adapter_scale": 0.5,
        "parts": "all",
        "base": str(start),
        "base_sha256": weights_hash(start),
        "checkpoint": str(folder),
    }
    trainer = make_trainer("next", config_file_path=str(out), max_steps=1, **TUNING["lora"])
    trainer.fit()
    manifest = json.loads((trainer.setup.run_dir.parent / "next--1_chkpt" / MANIFEST).read_text())
    expected = {"kind": "checkpoint", "path": str(out), "relative": "../../out", "sha256": weights_hash(out)}
    assert manifest["base"] == expected


def test_a_moved_start_model_is_named_by_the_flag_and_its_hash_is_checked(start, train, tmp_path, monkeypatch):
    folder = train(start, "lora")
    moved = start.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="start--1_chkpt.*--base"):
        interpolate_checkpoint(folder, 0.5)
    out = tmp_path / "out"
    interpolate(monkeypatch, f"--checkpoint {folder} --base {moved} --adapter_scale 0.25 --parts vlm --output {out}")
    record = load_checkpoint(out).manifest["interpolation"]
    assert (record["base"], record["parts"], record["adapter_scale"]) == (str(moved), "vlm", 0.25)
    file = moved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="sha256"):
        interpolate_checkpoint(folder, 0.5, base=moved)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_merge_tool_scales_the_adapters_only(start, train, tmp_path, monkeypatch, scale):
    folder, out = train(start, "lora"), tmp_path / "merged"
    arguments = f"--lora_finetuned_checkpoint_dir {folder} --output_dir {out} --adapter_scale {scale}"
    run_script(monkeypatch, "merge_lora_weights_and_save", "merge", arguments)
    adapted = load_unmerged(folder)
    with rescale_adapter_scale(adapted.model.vla, scale):
        expected = act(adapted)
    merged = load_checkpoint(out)
    torch.testing.assert_close(act(merged), expected, atol=2e-6, rtol=1e-5)
    assert merged.manifest["merge"]["adapter_scale"] == scale
    assert merged.manifest["merge"]["max_difference"] < 1e-5
    # The adapters in the output say the same as the weights beside them.
    torch.testing.assert_close(act(load_unmerged(out)), expected, atol=2e-6, rtol=1e-5)
    beside = tensors(load_checkpoint(folder))
    for name, value in tensors(merged).items():
        assert torch.equal(value, beside[name]) or not name.startswith(LEARNED_BESIDE_ADAPTERS)


def test_a_scaled_merge_needs_a_folder_of_its_own(start, train, monkeypatch):
    folder = train(start, "lora")
    with pytest.raises(ValueError, match="--adapter_scale 0.5 needs --output_dir"):
        arguments = f"--lora_finetuned_checkpoint_dir {folder} --adapter_scale 0.5"
        run_script(monkeypatch, "merge_lora_weights_and_save", "merge", arguments)
    assert not (folder / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("scale", ["nan", "inf", "-0.1"])
@pytest.mark.parametrize("script", ["interpolate_weights", "merge_lora_weights_and_save"])
def test_a_scale_that_is_no_finite_number_from_zero_is_refused(tmp_path, monkeypatch, script, scale):
    function, arguments = {
        "interpolate_weights": ("interpolate", f"--checkpoint x --output {tmp_path / 'out'}"),
        "merge_lora_weights_and_save": ("merge", "--lora_finetuned_checkpoint_dir x --output_dir y"),
    }[script]
    with pytest.raises(ValueError, match=rf"--adapter_scale is {scale}, expected (a finite number, )?at least 0"):
        run_script(monkeypatch, script, function, f"{arguments} --adapter_scale={scale}")


def test_flags_that_are_missing_or_unknown_are_named(start, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--checkpoint is missing"):
        interpolate(monkeypatch, f"--output {out}")
    with pytest.raises(ValueError, match="--output is missing"):
        interpolate(monkeypatch, f"--checkpoint {start}")
    with pytest.raises(ValueError, match="--parts is 'queries', expected one of vlm, llm, head, all"):
        interpolate(monkeypatch, f"--checkpoint {start} --output {out} --parts queries")
    with pytest.raises(ValueError, match="--base is missing.*config_file_path is 'tiny'"):
        interpolate(monkeypatch, f"--checkpoint {start} --output {out}")
    with pytest.raises(FileNotFoundError, match="nowhere.*--base"):
        interpolate(monkeypatch, f"--checkpoint {start} --output {out} --base nowhere")
    with pytest.raises(FileNotFoundError, match="no_such_checkpoint"):
        interpolate(monkeypatch, f"--checkpoint no_such_checkpoint --output {out} --base {start}")
    assert not out.exists() and not out.with_name("out.tmp").exists()
    out.mkdir()
    with pytest.raises(FileExistsError, match=f"--output {out} exists"):
        interpolate(monkeypatch, f"--checkpoint {start} --output {out} --base {start}")
    with pytest.raises(FileExistsError, match="exists"):
        save_policy(interpolate_checkpoint(start, 0.5, base=start), out)


def test_a_checkpoint_without_its_adapters_is_refused(start, train):
    folder = train(start, "lora")
    shutil.rmtree(folder / "lora_adapter")
    with pytest.raises(FileNotFoundError, match="lora_adapter does not exist"):
        interpolate_checkpoint(folder, 0.5)


def copy_with(start: Path, **changes) -> Path:
    """A copy of a checkpoint with other entries in its manifest."""
    folder = start.with_name("changed")
    shutil.copytree(start, folder)
    edit_manifest(folder, **changes)
    return folder


def trim(file: Path, name: str, size: int, dim: int = 0) -> None:
    state = load_file(file)
    state[name] = state[name].narrow(dim, 0, size).contiguous()
    save_file(state, file, metadata={"format": "pt"})


def test_a_head_of_another_kind_is_refused_with_parts_all(start, make_trainer):
    trainer = make_trainer("other", max_steps=1, use_pro_version=False, save_training_state=False)
    trainer.fit()
    other = trainer.setup.run_dir.parent / "other--1_chkpt"
    with pytest.raises(
        ValueError, match=r"other--1_chkpt/action_head--1_.*start--1_chkpt.*action_head.*missing \['model"
    ):
        interpolate_checkpoint(start, 0.5, base=other)
    interpolate_checkpoint(start, 0.5, base=other, parts="vlm")  # the heads are not touched


def test_another_shape_is_named_with_file_key_and_shapes(start):
    spec = json.loads((start / MANIFEST).read_text())["action_spec"]
    other = copy_with(start, action_spec=spec | {"proprio_dim": 6})
    trim(other / "proprio_projector--1_checkpoint.safetensors", "fc1.weight", 6, dim=1)
    message = r"changed/proprio_projector--1_checkpoint.*projector.fc1.weight is \(\d+, 6\), expected \(\d+, 8\)"
    with pytest.raises(ValueError, match=message):
        interpolate_checkpoint(start, 0.5, base=other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_action_queries": 8}))
    trim(other / "model.safetensors", "action_queries.weight", 8)
    with pytest.raises(ValueError, match=r"changed, start model.*vla.action_queries.weight is \(8, \d+\), expected"):
        interpolate_checkpoint(start, 0.5, base=other, parts="vlm")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("use_proprio", False, "changed: proprio projector is missing, expected one"),
        ("legacy_slices", True, "changed: legacy_slices is True, expected False"),
    ],
)
def test_a_head_with_other_conventions_is_refused_with_parts_all(start, entry, value, message):
    other = copy_with(start, **{entry: value})
    for parts in ("all", "head"):
        with pytest.raises(ValueError, match=message):
            interpolate_checkpoint(start, 0.5, base=other, parts=parts)
    interpolate_checkpoint(start, 0.5, base=other, parts="vlm")
