"""The first batch beside the metrics: what the policy gets, once per run, and never the end of a training."""

import micro
import numpy as np
import pytest
from PIL import Image

from prismatic.models.presets import PRESETS
from prismatic.training import loop
from prismatic.training.first_batch import pixels_of, write_first_batch


@pytest.fixture(autouse=True)
def micro_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)


def test_the_picture_shows_the_images_of_the_samples(make_trainer):
    trainer = make_trainer("run", batch_size=2, max_steps=1)
    batch = next(trainer.batches())
    images = np.stack([trainer.setup.dataset[key]["images"] for key in batch["keys"]])
    assert np.array_equal(pixels_of(batch["pixel_values"], trainer.setup.processor.image_processor), images)
    trainer.fit()
    sheet = np.asarray(Image.open(trainer.setup.run_dir / "first_batch.png"))
    sides = [image for sample in images for image in sample]
    drawn = {bytes(np.asarray(Image.fromarray(image).resize((224, 224), 0))[:, 0].tobytes()) for image in sides}
    left = [bytes(sheet[top : top + 224, x].tobytes()) for x in (6, 236) for top in range(len(sheet) - 223)]
    assert len(drawn) == 4 and drawn <= set(left)


def test_the_text_has_instructions_and_the_ranges_of_normalised_actions(make_trainer):
    trainer = make_trainer("run", batch_size=3, max_steps=1)
    batch = next(trainer.batches())
    trainer.fit()
    lines = (trainer.setup.run_dir / "first_batch.txt").read_text().splitlines()
    actions = batch["actions"].numpy().reshape(-1, 7)
    first = [
        float(word)
        for word in lines[lines.index("actions: 7 dimensions of 24 rows (least, mean, greatest)") + 1].split()[1:]
    ]
    assert first == pytest.approx([actions[:, 0].min(), actions[:, 0].mean(), actions[:, 0].max()], abs=1e-4)
    for number, instruction in enumerate(batch["instructions"]):
        episode, step = batch["sample_ids"][number]
        assert f"{number}: {instruction}  [libero_mini_no_noops, episode {episode}, step {step}]" in lines
    assert "cameras image, wrist_image, 32 x 32 pixels" in lines[1]


def test_grey_images_are_shown_grey(make_trainer):
    trainer = make_trainer("run", max_steps=1, blind_images=True)
    trainer.fit()
    sheet = np.asarray(Image.open(trainer.setup.run_dir / "first_batch.png"))
    assert len(np.unique(sheet[60:200, 10:200].reshape(-1, 3), axis=0)) == 1


def test_a_run_that_is_continued_leaves_it_and_its_samples_are_the_same(make_trainer):
    make_trainer("run", max_steps=4, save_freq=2).fit()
    resumed = make_trainer("run", max_steps=6, resume=True)
    for name in ("first_batch.png", "first_batch.txt"):
        (resumed.setup.run_dir / name).write_text("mine")
    resumed.fit()
    assert (resumed.setup.run_dir / "first_batch.txt").read_text() == "mine"
    assert (resumed.setup.run_dir / "first_batch.png").read_text() == "mine"


def test_what_fails_there_is_a_warning(make_trainer, monkeypatch, capsys):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_first_batch", full)
    trainer = make_trainer("run", max_steps=2)
    trainer.fit()
    assert trainer.step == 2 and capsys.readouterr().out.count("WARNING: the first batch is not shown (OSError") == 1


def test_long_and_foreign_instructions_and_many_samples_fit(make_trainer, tmp_path):
    trainer = make_trainer("run", batch_size=2, max_steps=1)
    batch = next(trainer.batches())
    many = {
        name: batch[name].repeat(20, *[1] * (batch[name].ndim - 1)) for name in ("pixel_values", "actions", "proprio")
    }
    many |= {name: batch[name] * 20 for name in ("dataset_names", "sample_ids")}
    many["instructions"] = ["take \u7897 \x1b[2J and " + "the red bowl " * 40] * 40
    write_first_batch(tmp_path, many, trainer.setup.processor.image_processor, ["a", "b"])
    sheet = Image.open(tmp_path / "first_batch.png")
    assert sheet.width < 500 and 16 * 230 < sheet.height < 16 * 310
    text = (tmp_path / "first_batch.txt").read_text()
    assert "shows the first 16" in text and "\x1b" not in text and text.count("\u7897") == 40


def test_the_files_of_a_run_that_shares_its_folder_with_the_checkpoint_stay(make_trainer):
    trainer = make_trainer("run", max_steps=4, save_freq=2, save_latest_checkpoint_only=True)
    trainer.fit()
    names = {path.name for path in trainer.setup.run_dir.iterdir()}
    assert {"first_batch.png", "first_batch.txt", "flags.json", "metrics.jsonl", "README.md"} <= names
