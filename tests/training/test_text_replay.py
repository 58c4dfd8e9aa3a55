"""Replay of text: the language model's own loss on a text is part of the step, the same after a resume."""

import json

import micro
import pytest
import torch
import torch.nn.functional as F

from prismatic.models.presets import PRESETS
from prismatic.training.retention.text import WINDOW, TextReplay

WORDS = "The robot puts the black bowl on the plate and takes the cup from the drawer beside the stove. "


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 40)
    return file


def losses(trainer):
    return [json.loads(line) for line in (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()]


def next_token_loss(model, tokens) -> float:
    """Independent of the method: cross entropy of the token after each of the first windows."""
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        logits = model.vla.language_model(input_ids=windows).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize("flags", [{}, {"grad_accumulation_steps": 2}])
def test_the_text_is_learned_beside_the_actions_and_without_it_it_is_not(make_trainer, text, flags):
    found = {}
    for name, own in {"plain": {}, "text": {"replay_text": str(text), "replay_text_weight": 1.0}}.items():
        trainer = make_trainer(name, max_steps=20, batch_size=1, learning_rate=1e-2, **own, **flags)
        tokens = TextReplay.read(str(text), trainer.setup.processor.tokenizer)
        before = next_token_loss(trainer.bare_model, tokens)
        trainer.fit()
        found[name] = before - next_token_loss(trainer.bare_model, tokens)
        assert ("VLA Train/Text Loss" in losses(trainer)[-1]) == (name == "text")
    assert found["text"] > 0.5 > 0.2 > found["plain"]


def test_the_term_is_the_weighted_loss_of_the_library_and_windows_differ(make_trainer, text):
    trainer = make_trainer("run", replay_text=str(text), replay_text_weight=0.5)
    retention, model = trainer.retention.at(0), trainer.bare_model.vla.language_model
    window = retention._draw()
    assert window.shape == (1, WINDOW + 1)
    expected = 0.5 * model(input_ids=window, labels=window).loss
    term = retention.at(0).loss_term(None, 1.0, 1.0)
    assert torch.allclose(term, expected, rtol=1e-5)
    term.backward()
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.norm()) > 0
    assert not torch.equal(retention._draw(), window)  # of the next micro-batch
    assert not torch.equal(retention.at(1)._draw(), window)
    assert make_trainer("plain").retention is None


def test_a_resumed_run_draws_the_same_windows(make_trainer, text):
    flags = {"replay_text": str(text), "save_freq": 2, "wandb_log_freq": 1}
    whole = make_trainer("whole", max_steps=4, **flags)
    whole.fit()
    make_trainer("parts", max_steps=2, **flags).fit()
    again = make_trainer("parts", max_steps=4, resume=True, **flags)
    again.fit()
    name = "VLA Train/Text Loss"
    assert [line[name] for line in losses(again)] == [line[name] for line in losses(whole)]


def test_adapters_learn_the_text(make_trainer, text):
    start = make_trainer("start", max_steps=1)
    start.fit()
    folder = str(start.setup.run_dir.parent / "start--1_chkpt")
    trainer = make_trainer(
        "lora", config_file_path=folder, use_lora=True, lora_rank=4, replay_text=str(text), replay_text_weight=1.0,
        max_steps=12, batch_size=1, learning_rate=1e-2,
    )  # fmt: skip
    trainer.fit()
    lines = losses(trainer)
    assert lines[-1]["VLA Train/Text Loss"] < lines[0]["VLA Train/Text Loss"]


def test_bad_input_names_the_flag(make_trainer, tmp_path, text):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FileNotFoundError, match="--replay_text .*no such file"):
        make_trainer("a", replay_text=str(tmp_path / "none"))
    for file, words in ((short, "tokens, expected more than the 128"), (binary, "not UTF-8")):
        with pytest.raises(ValueError, match=f"--replay_text {file}.*{words}"):
            make_trainer("a", replay_text=str(file))
    for flags, words in (
        ({"retention_method": "l2sp"}, "excludes method l2sp"),
        ({"use_craft": True}, "excludes method craft"),
        ({"use_fz": True}, "--use_fz True trains no language model"),
        ({"replay_data": "x", "replay_labels": "start"}, "excludes --replay_labels start"),
    ):
        with pytest.raises(ValueError, match=f"--replay_text .*{words}"):
            make_trainer("a", replay_text=str(text), **flags)
    with pytest.raises(ValueError, match="--replay_text_weight"):
        make_trainer("a", replay_text_weight=0.5)
