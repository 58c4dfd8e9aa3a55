"""Checkpoints of real (small) runs: what is in them, what is refused, and what a resumed run continues from."""

import json
import resource
import shutil

import micro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prismatic.models.presets import PRESETS
from prismatic.training.checkpoint_folder import (
    CARD,
    LATEST,
    LISTING,
    CheckpointError,
    CheckpointWriteError,
    check_files,
    find_checkpoints,
    seal,
)
from prismatic.training.checkpoints import CpuCopies, load_checkpoint
from prismatic.training.training_state import generator_states, restore_generators, restore_training_state
from prismatic.vla.datasets.dataset import VLADataset


@pytest.fixture
def trainer_of(make_trainer, tmp_path, monkeypatch):
    """make_trainer with the micro model and the flags of `micro.flags`."""
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    return lambda name="run", **flags: make_trainer(name, **(micro.flags(tmp_path / "runs", name) | flags))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def metrics(trainer) -> list[dict]:
    lines = (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in micro.MEASURED} for line in lines]


def hashes(folder) -> dict[str, str]:
    """sha256 of everything that must not differ between two runs."""
    files = json.loads((folder / LISTING).read_text())["files"]
    return {n: f["sha256"] for n, f in files.items() if n.endswith(".safetensors") or "generators" in n}


def steps_on_disk(tmp_path) -> list[int]:
    return [step for step, _ in find_checkpoints(tmp_path / "runs", "run")]


# ------------------------------------------------------------------------------------------------ saving


def test_the_pointer_the_retention_policy_and_the_list_of_files(trainer_of, tmp_path):
    trainer = trainer_of(max_steps=8, save_freq=1, keep_last=2, keep_every=3)
    trainer.fit()
    assert steps_on_disk(tmp_path) == [3, 6, 7, 8]
    assert (trainer.setup.run_dir / LATEST).read_text() == "run--8_chkpt\n"
    assert all(check_files(folder, training_state=True) for _, folder in find_checkpoints(tmp_path / "runs", "run"))
    assert not [p for p in (tmp_path / "runs").iterdir() if p.suffix in (".tmp", ".old", ".deleted")]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_asynchronous_saves_equal_synchronous_ones(trainer_of, tmp_path, tuning):
    flags = {"max_steps": 4, "save_freq": 1}
    if tuning == "lora":
        trainer_of("start", max_steps=1).fit()
        start = str(tmp_path / "runs" / "start--1_chkpt")
        flags |= {"config_file_path": start, "use_lora": True, "lora_rank": 2, "lora_dropout": 0.1}
    for name, is_async in (("sync", False), ("async", True)):
        trainer_of(name, async_save=is_async, **flags).fit()
    for step in range(1, 5):
        sync, other = (tmp_path / "runs" / f"{name}--{step}_chkpt" for name in ("sync", "async"))
        assert hashes(sync) == hashes(other)
        assert check_files(other, training_state=True)


def test_copies_keep_tied_weights_tied_and_do_not_follow_the_original():
    table = torch.nn.Parameter(torch.ones(3, 2))
    copies = CpuCopies()
    first, second, part = copies(table), copies(table), copies(table[:1])
    assert first.data_ptr() == second.data_ptr() != part.data_ptr()
    with torch.no_grad():
        table.fill_(5)
    assert torch.equal(first, torch.ones(3, 2)) and not first.requires_grad


def test_the_run_folder_may_be_the_checkpoint(trainer_of):
    flags = {"save_latest_checkpoint_only": True, "max_steps": 4, "save_freq": 1}
    whole = trainer_of("whole", **flags)
    whole.fit()
    trainer_of("run", **flags | {"max_steps": 2, "lr_schedule": "constant"}).fit()
    assert [line["step"] for line in metrics(whole)] == [1, 2, 3, 4]
    resumed = trainer_of("whole", **flags | {"max_steps": 5}, resume="auto")
    assert resumed.step == 4
    resumed.fit()
    assert [line["step"] for line in metrics(resumed)] == [1, 2, 3, 4, 5]
    assert (resumed.setup.run_dir / LATEST).read_text() == "whole\n"
    load_checkpoint(resumed.setup.run_dir)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoint(trainer_of, tmp_path, monkeypatch, is_async):
    trainer = trainer_of(max_steps=4, save_freq=2, async_save=is_async)
    train, limits = trainer._train_one_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk_after_the_first_save(batches):
        if trainer.step == 2:
            trainer.saver.wait()
        if trainer.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return train(batches)

    monkeypatch.setattr(trainer, "_train_one_step", fill_the_disk_after_the_first_save)
    try:
        with pytest.raises(
            CheckpointWriteError, match=r"run--4_chkpt.*could not be written.*GiB of this disk are free"
        ):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["run", "run--2_chkpt"]
    assert (trainer.setup.run_dir / LATEST).read_text() == "run--2_chkpt\n"
    assert check_files(tmp_path / "runs" / "run--2_chkpt", training_state=True)
    resumed = trainer_of(max_steps=4, save_freq=2, resume="auto")
    resumed.fit()
    assert steps_on_disk(tmp_path) == [2, 4]


def test_an_error_of_the_writing_thread_stops_the_run_at_the_next_step(trainer_of, monkeypatch):
    from prismatic.training import saving

    trainer = trainer_of(max_steps=50, save_freq=2, async_save=True)

    def fail(*_args):
        raise CheckpointWriteError("no space")

    monkeypatch.setattr(saving, "write_checkpoint", fail)
    train = trainer._train_one_step

    def wait_for_the_failure(batches):
        if trainer.step == 2:
            trainer.saver._writing.exception()
        return train(batches)

    monkeypatch.setattr(trainer, "_train_one_step", wait_for_the_failure)
    with pytest.raises(CheckpointWriteError, match="no space"):
        trainer.fit()
    assert trainer.step == 3


# ------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_run_equals_an_uninterrupted_one(trainer_of, tmp_path):
    flags = {"max_steps": 6, "save_freq": 3}
    whole = trainer_of("whole", **flags)
    whole.fit()
    trainer_of("run", **flags).fit()
    shutil.rmtree(tmp_path / "runs" / "run--6_chkpt")
    resumed = trainer_of("run", **flags, resume="auto")
    assert resumed.step == 3
    resumed.fit()
    assert hashes(tmp_path / "runs" / "whole--6_chkpt") == hashes(tmp_path / "runs" / "run--6_chkpt")
    assert metrics(whole) == metrics(resumed)


def test_auto_starts_afresh_and_true_does_not(trainer_of, capsys):
    assert trainer_of(resume="auto").step == 0
    assert "No checkpoint of run run" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nothing to resume from"):
        trainer_of(resume=True)


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.json", "state.json", "craft.json"])
def test_auto_passes_over_a_damaged_checkpoint_with_a_warning(trainer_of, tmp_path, capsys, file):
    trainer_of(max_steps=3, save_freq=1).fit()
    damaged = tmp_path / "runs" / "run--3_chkpt" / "training_state" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "runs" / "run--2_chkpt" / "model.safetensors").unlink()
    assert trainer_of(resume="auto").step == 1
    out = capsys.readouterr().out
    assert "WARNING: run--3_chkpt is passed over" in out and file in out
    assert "WARNING: run--2_chkpt is passed over" in out and "model.safetensors" in out
    for flags in ({"resume": True}, {"resume": "auto", "resume_step": 3}):
        with pytest.raises(CheckpointError, match=f"{file}: size is"):
            trainer_of(**flags)
    assert trainer_of(resume=True, resum_vla_path=str(tmp_path / "runs" / "run--1_chkpt")).step == 1


def test_changed_data_is_refused(trainer_of, monkeypatch):
    trainer_of(max_steps=1).fit()
    found = trainer_of(resume="auto").setup.dataset.fingerprints
    assert found.keys() == {"libero_mini_no_noops"}
    monkeypatch.setattr(VLADataset, "fingerprints", property(lambda _self: {"libero_mini_no_noops": "other"}))
    for resume in (True, "auto"):
        with pytest.raises(CheckpointError, match="state.json: the data is not what.*libero_mini_no_noops is other"):
            trainer_of(max_steps=2, resume=resume)


def test_another_choice_of_samples_or_another_seed_is_refused(trainer_of):
    trainer_of(max_steps=1).fit()
    with pytest.raises(ValueError, match="sampler state has sizes"):
        trainer_of(max_steps=2, resume=True, frame_stride=2)
    with pytest.raises(ValueError, match="sampler state has seed 7, expected 8"):
        trainer_of(max_steps=2, resume=True, seed=8)


def test_another_batch_size_continues_at_the_next_sample(trainer_of):
    trainer_of(max_steps=3).fit()
    resumed = trainer_of(max_steps=4, resume=True, batch_size=2, grad_accumulation_steps=1)
    assert resumed.samples_seen == 6 and resumed.sampler.state_dict(6)["samples"] == 6
    resumed.fit()
    assert metrics(resumed)[-1]["samples_seen"] == 8


def test_another_number_of_processes_is_said(trainer_of, tmp_path, capsys):
    trainer_of(max_steps=1).fit()
    folder = tmp_path / "runs" / "run--1_chkpt"
    file = folder / "training_state" / "generators.json"
    ranks = json.loads(file.read_text())["ranks"]
    file.write_text(json.dumps({"ranks": ranks * 3}))
    seal(folder)
    assert trainer_of(max_steps=2, resume=True).step == 1
    assert "was saved by 3 processes, this run has 1" in capsys.readouterr().out


def test_generators_go_on_where_they_were():
    import random

    import numpy as np

    state = json.loads(json.dumps(generator_states()))
    first = random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002
    restore_generators(state)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first  # noqa: NPY002


def test_a_folder_of_an_earlier_version_resumes(trainer_of, tmp_path):
    """Pickled optimizer and torch generator, no list of files, no position in the data."""
    import base64

    whole = trainer_of("run", max_steps=4, save_freq=2)
    whole.fit()
    expected = weights(whole)
    half = trainer_of("run", max_steps=4, save_freq=2, resume=True, resume_step=2)
    folder = tmp_path / "runs" / "run--2_chkpt"
    state = folder / "training_state"
    (folder / LISTING).unlink()
    torch.save(half.optimizer.state_dict(), state / "optimizer.pt")
    for name in ("optimizer.json", "optimizer.safetensors"):
        (state / name).unlink()
    rank = json.loads((state / "generators.json").read_text())["ranks"][0]
    generator = torch.frombuffer(bytearray(base64.b64decode(rank["torch"])), dtype=torch.uint8)
    torch.save({"torch": generator, "cuda": []}, state / "rng.pt")
    (state / "generators.json").write_text(json.dumps({"python": rank["python"], "numpy": rank["numpy"]}))
    counters = json.loads((state / "state.json").read_text())
    kept = {k: counters[k] for k in ("step", "samples_seen", "constraint_metrics")}
    (state / "state.json").write_text(json.dumps(kept))
    resumed = trainer_of("run", max_steps=4, save_freq=2, resume=True, resume_step=2)
    resumed.fit()
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


# ------------------------------------------------------------------------------------------------ damaged folders


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of the micro model, and the trainer that wrote it."""
    from accelerate import Accelerator

    from prismatic.training.config import FinetuneConfig
    from prismatic.training.loop import Trainer
    from prismatic.training.setup import build_setup

    root = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", micro.MICRO)
        cfg = FinetuneConfig(**micro.flags(root) | {"max_steps": 1})
        trainer = Trainer(cfg, build_setup(cfg), Accelerator(cpu=True))
        trainer.fit()
    return root / "run--1_chkpt", trainer


def damage(data, content: bytes) -> bytes:
    """A change of up to eight bytes, a cut, or bytes put in."""
    position = data.draw(st.integers(0, len(content) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=8))
    kind = data.draw(st.sampled_from(["cut", "change", "insert"]))
    if kind == "cut":
        return content[:position]
    return content[:position] + piece + content[position + (len(piece) if kind == "change" else 0) :]


def restore(folder, trainer) -> None:
    restore_training_state(folder, trainer.setup, trainer._state())


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_recognised_before_anything_is_built(small, data):
    folder, _ = small
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / CARD)  # the card is its owner's to change
    file = data.draw(st.sampled_from(sorted(files)))
    content = file.read_bytes()
    damaged = damage(data, content)
    try:
        file.write_bytes(damaged)
        if damaged == content:
            assert check_files(folder, training_state=True)
            return
        with pytest.raises(CheckpointError, match=str(folder)):
            check_files(folder, training_state=True)
            # Another hash in the list itself belongs to a file that is not hashed, or to a key that nobody reads.
            assert file.name == LISTING
            raise CheckpointError(str(folder))
    finally:
        file.write_bytes(content)


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_without_a_list_of_files_a_damaged_state_is_read_or_refused(small, data):
    folder, trainer = small
    file = data.draw(st.sampled_from(sorted((folder / "training_state").iterdir())))
    content, listing = file.read_bytes(), (folder / LISTING).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        (folder / LISTING).unlink()
        file.write_bytes(damage(data, content))
        # An allocation by a damaged length would fail here.
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 2**29, limits[1]))
        try:
            restore(folder, trainer)
        except CheckpointError as error:
            assert "training_state" in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        file.write_bytes(content)
        (folder / LISTING).write_bytes(listing)


def _address_space() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_without_a_list_of_files_a_damaged_policy_is_read_or_refused(small, data):
    folder, _ = small
    names = ["craft_checkpoint.json", "dataset_statistics.json", "model.safetensors", "tokenizer.json"]
    file = data.draw(
        st.sampled_from([folder / name for name in names] + sorted(folder.glob("*_checkpoint.safetensors")))
    )
    content, listing = file.read_bytes(), (folder / LISTING).read_bytes()
    try:
        (folder / LISTING).unlink()
        file.write_bytes(damage(data, content))
        try:
            load_checkpoint(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
    finally:
        file.write_bytes(content)
        (folder / LISTING).write_bytes(listing)


@pytest.mark.parametrize("is_async", [False, True])
def test_averaged_weights_are_the_policy_and_both_kinds_go_on(trainer_of, tmp_path, is_async):
    flags = {"max_steps": 6, "save_freq": 3, "ema_decay": 0.9, "async_save": is_async}
    whole = trainer_of("whole", **flags)
    whole.fit()
    with whole.ema.averaged_weights():
        average = {name: tensor.clone() for name, tensor in whole.bare_model.state_dict().items()}
    loaded = load_checkpoint(tmp_path / "runs" / "whole--6_chkpt").model.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in loaded.items())
    assert any(not torch.equal(tensor, average[name]) for name, tensor in weights(whole).items())
    trainer_of("run", **flags).fit()
    resumed = trainer_of("run", **flags, resume="auto", resume_step=3)
    resumed.fit()
    assert hashes(tmp_path / "runs" / "whole--6_chkpt") == hashes(tmp_path / "runs" / "run--6_chkpt")
