"""The language bench: what its rows differ in, what it measures, and that its verdict follows from the records."""

import importlib.util
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from craft_experiments.common_utils.drift_runs import RunFailed
from prismatic.evidence.files import write_json
from prismatic.training.command_line import parse_flags
from prismatic.training.config import RetentionMethod, TuningMode

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "craft_experiments" / "07_language"
RESULTS = ROOT / "results" / "language"
DATA = str(ROOT / "tests" / "golden" / "rlds_mini")


def load(name: str, folder: Path = FOLDER):
    """A file of the folder, which finds those beside it."""
    spec = importlib.util.spec_from_file_location(f"language_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for beside in ("english_texts", "run_language"):
            patch.delitem(sys.modules, beside, raising=False)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts():
    return load("english_texts")


@pytest.fixture(scope="module")
def driver():
    return load("run_language")


@pytest.fixture(scope="module")
def measure():
    return load("measure_language")


@pytest.fixture(scope="module")
def pages():
    return load("make_report")


# ----------------------------------------------------------------------------------------------------------- the texts


def test_the_texts_are_prose_of_some_thousand_words_and_nothing_is_replayed_that_is_measured(texts):
    reference, licence = texts.held_out_texts()
    replayed = texts.replayed_text()
    paragraphs = [set(text.content.split("\n\n")) for text in (reference, licence, replayed)]
    assert all(len(text.content.split()) > 3000 for text in (reference, licence, replayed))
    for i, one in enumerate(paragraphs):
        assert all(len(paragraph.split()) >= texts.WORDS and paragraph.endswith(".") for paragraph in one)
        assert all(not one & other for other in paragraphs[i + 1 :])
    assert "free software" in licence.content and "exception" in reference.content
    assert [text.sha256 for text in texts.held_out_texts()] == [reference.sha256, licence.sha256]


def test_code_tables_and_short_lines_are_no_prose(texts):
    prose = "A sentence of the reference goes on for long enough, " * 4 + "and then it ends."
    assert texts._paragraphs(f"{prose}\n\nNote:\n\n   x = f(1) + {{2: 3}}\n\n{prose[:-1]}") == [prose]


# -------------------------------------------------------------------------------------------------------- the commands


def test_rows_differ_in_their_method_alone_and_a_stopped_bench_has_whole_seeds(driver):
    cfg = driver.LanguageConfig()
    planned = driver.rows(cfg)
    features = [f"features {budget:g}" for budget in cfg.budgets]
    assert [row.method for row in planned if row.seed == 0] == ["plain", *features, *driver.OTHERS]
    assert [row.method for row in planned if row.seed == 2] == ["plain", *features]
    assert [row.seed for row in planned] == sorted(row.seed for row in planned)
    assert len({row.name for row in planned}) == len(planned)
    plain = parse_flags(driver.training(cfg, planned[0])[1:])
    for row in planned:
        flags = parse_flags(driver.training(cfg, row)[1:])
        others = {"full": TuningMode.FULL, "l2sp": TuningMode.FULL, "frozen": TuningMode.FROZEN}
        expected = others.get(row.method, TuningMode.LORA)
        assert (flags.tuning_mode, flags.seed) == (expected, row.seed)
        assert (flags.replay_text is not None) == (row.method == "text replay")
        for name in ("config_file_path", "max_steps", "learning_rate", "batch_size", "subset_seed", "val_fraction"):
            assert getattr(flags, name) == getattr(plain, name)
        if row.method.startswith("features"):
            craft = flags.craft_config()
            found = craft.signal.value, craft.anchor_type.value, craft.dual_kind, craft.rule, craft.retention_budget
            assert found == ("features", "aq_only", "share", "off", row.budget)
        if row.method == "actions":
            assert flags.craft_config().signal.value == "actions" and flags.memories == ["instructions"]
        assert (flags.retention is RetentionMethod.L2SP) == (row.method == "l2sp")
    start = parse_flags(driver.start_training(cfg)[1:])
    assert (start.tuning_mode, start.config_file_path) == (TuningMode.FROZEN, "smollm2-135m")


def test_driver_and_measurement_hold_out_the_same_episodes(driver, measure):
    cfg = driver.LanguageConfig()
    flags = parse_flags(driver.training(cfg, driver.rows(cfg)[0])[1:])
    assert (flags.val_fraction, flags.subset_seed) == (measure.HELD_OUT, 0)


def test_an_unknown_row_is_named(driver):
    cfg = driver.LanguageConfig(rows="plain, fetures 0.1")
    with pytest.raises(ValueError, match="--rows: found 'fetures 0.1', expected some of plain, features 0.3"):
        driver.rows(cfg)
    assert {row.method for row in driver.rows(replace(cfg, rows="plain,frozen"))} == {"plain", "frozen"}


# ----------------------------------------------------------------------------------------------- running and recording

TRAINING = """import json, pathlib, sys
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flag.get("--retention_method") == "l2sp":
    sys.exit("no room")
root, name = pathlib.Path(flag["--run_root_dir"]), flag["--run_id_override"]
(root / name).mkdir(parents=True, exist_ok=True)
(root / f"{name}--{flag['--max_steps']}_chkpt").mkdir(exist_ok=True)
with (root / "started").open("a") as started:
    started.write(name + "\\n")
with (root / name / "metrics.jsonl").open("w") as lines:
    for step in range(1, int(flag["--max_steps"]) + 1):
        row = {"step": step, "VLA Train/Loss": step}
        if "--use_craft" in flag:
            row |= {"CRaFT/Retention Loss": step, "CRaFT/Measured Step": step - step % 2}
        lines.write(json.dumps(row) + "\\n")
"""
MEASURING = """import json, pathlib, sys
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert pathlib.Path(flag["--checkpoint"]).is_dir() and pathlib.Path(flag["--start"]).is_dir()
found = {"perplexity": {"a": 9.0}, "action_error": {"new": 0.2, "old": 0.1}, "feature_drift": 0.5, "action_drift": 0.1}
found |= {"start_sha256": START, "texts": {"a": {}}, "samples": {}, "versions": {}, "flags": {"tokens": 256}}
pathlib.Path(flag["--output"]).write_text(json.dumps(found))
"""


@pytest.fixture
def stubbed(driver, tmp_path, monkeypatch):
    """Config of a bench with stub programs, and what was trained so far."""

    def stub(name: str, program: str, text: str):
        file, real = tmp_path / f"{name}.py", getattr(driver, program)
        file.write_text(text)
        monkeypatch.setattr(driver, program, lambda *words: [str(file), *real(*words)[1:]])

    stub("train", "training", TRAINING)
    stub("start", "start_training", TRAINING)
    stub("measure", "measuring", MEASURING.replace("START", "'s' if 'other' not in sys.argv[0] else 'o'"))
    cfg = driver.LanguageConfig(
        work_dir=str(tmp_path / "work"), results_dir=str(tmp_path / "results"), start_steps=2, max_steps=20, seeds=(0,),
        budgets=(0.1,), rows="plain,features 0.1",
    )  # fmt: skip
    return cfg, lambda: (tmp_path / "work" / "started").read_text().split()


def test_a_row_is_recorded_once_and_its_weights_go_while_the_start_stays(driver, stubbed):
    cfg, trained = stubbed
    driver.run_missing(cfg, driver.rows(cfg))
    assert trained() == ["start", "plain--seed_0", "features_0.1--seed_0"]
    files = {file.stem: json.loads(file.read_text()) for file in Path(cfg.results_dir, "runs").glob("*.json")}
    plain, features = files["plain--seed_0"], files["features_0.1--seed_0"]
    assert plain["series"] == {"loss": [5.5, 15.5]}
    assert features["series"]["drift"] == [6, 16]  # of the steps that measured
    assert (plain["budget"], features["budget"], features["method"]) == (None, 0.1, "features 0.1")
    assert plain["before"]["perplexity"] == {"a": 9.0} and "--overwrite" not in plain["command"]
    assert sorted(path.name for path in Path(cfg.work_dir).glob("*_chkpt")) == ["start--2_chkpt"]
    assert Path(cfg.work_dir, "replayed.txt").stat().st_size > 10_000
    driver.run_missing(cfg, driver.rows(cfg))
    assert len(trained()) == 3


def test_the_start_is_made_again_where_only_records_are(driver, stubbed):
    """As on a fresh machine."""
    cfg, trained = stubbed
    driver.run_missing(replace(cfg, rows="plain"), driver.rows(replace(cfg, rows="plain")))
    Path(cfg.work_dir, "start--2_chkpt").rmdir()
    driver.run_missing(replace(cfg, rows="plain"), driver.rows(replace(cfg, rows="plain")))
    assert trained() == ["start", "plain--seed_0"]
    driver.run_missing(cfg, driver.rows(cfg))
    assert trained()[2:] == ["start", "features_0.1--seed_0"]


def test_a_failed_row_is_named_and_the_others_are_recorded(driver, stubbed):
    cfg, _ = stubbed
    cfg = replace(cfg, rows="plain,l2sp")
    with pytest.raises(RunFailed, match=r"(?s)language/l2sp--seed_0: TRAINING_FAILED\n.*no room"):
        driver.run_missing(cfg, driver.rows(cfg))
    assert [file.stem for file in Path(cfg.results_dir, "runs").glob("*.json")] == ["plain--seed_0"]


def test_measurements_of_two_starts_make_no_record(driver):
    found = {"start_sha256": "a", "texts": {}, "samples": {}}
    with pytest.raises(ValueError, match="start_sha256 is a in the measurement of the start, b in the row's"):
        driver.record(driver.LanguageConfig(), driver.Row("plain", 0), [], (found, found | {"start_sha256": "b"}))


# ----------------------------------------------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Folders of a small start and of what came of it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from prismatic.models.presets import PRESETS
    from prismatic.training.config import FinetuneConfig
    from prismatic.training.loop import Trainer
    from prismatic.training.setup import build_setup

    root = tmp_path_factory.mktemp("runs")

    def train(start: str, name: str, **flags) -> str:
        cfg = FinetuneConfig(
            config_file_path=start, data_root_dir=DATA, dataset_name="libero_mini_no_noops", max_steps=2,
            run_root_dir=str(root), run_id_override=name, batch_size=2, learning_rate=1e-2, device="cpu", **flags,
        )  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(cfg, build_setup(cfg), Accelerator(cpu=True)).fit()
        return str(root / f"{name}--2_chkpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", load("micro", ROOT / "tests" / "training").MICRO)
        start = train("tiny", "start")
        return start, train(start, "full"), train(start, "frozen", use_fz=True)


def config(measure, checkpoint: str, start: str):
    names = {"new": "libero_mini_no_noops", "old": "libero_mini_no_noops", "data_root_dir": DATA}
    return measure.MeasureConfig(checkpoint=checkpoint, start=start, tokens=512, samples=4, **names)


def test_the_start_has_no_drift_and_frozen_language_keeps_its_perplexity(measure, policies):
    start, full, frozen = policies
    own, moved, still = (measure.measure(config(measure, checkpoint, start)) for checkpoint in (start, full, frozen))
    assert (own["feature_drift"], own["action_drift"]) == (0, 0)
    assert own["policy_sha256"] == own["start_sha256"] == moved["start_sha256"] != moved["policy_sha256"]
    assert still["perplexity"] == own["perplexity"] != moved["perplexity"]
    assert min(moved["feature_drift"], moved["action_drift"], still["action_drift"]) > 0
    assert still["feature_drift"] > 0  # action queries are trained, and are features
    assert own["samples"] == {"new": 4, "old": 2} and own["texts"].keys() == own["perplexity"].keys()
    json.dumps(own, allow_nan=False)


def test_perplexity_is_the_librarys_loss_window_by_window(measure, policies):
    from prismatic.training.checkpoints import load_checkpoint

    loaded = load_checkpoint(policies[0])
    text = "The robot puts the bowl on the plate. " * 200
    ids = loaded.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        model, losses = loaded.model.vla.language_model, []
        for first in (0, 256):
            window = torch.tensor([ids[first : first + 256]])
            losses.append(float(model(input_ids=window, labels=window).loss))
        found = measure.perplexity(loaded, text, 600)
    assert math.log(found) == pytest.approx(sum(losses) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="--tokens is 100000, but a text has"):
        measure.perplexity(loaded, text, 100_000)


# --------------------------------------------------------------------------------------------------------- the verdict


def run(method, seed, perplexity, error, drift=0.1, start="s" * 64):
    """A record of one text whose perplexity was 10."""
    after = {"perplexity": {"a": perplexity}, "action_error": {"new": error, "old": 0.5}}
    before = {"perplexity": {"a": 10.0}, "action_error": {"new": 0.6, "old": 0.2}}
    drifts = {"feature_drift": drift, "action_drift": drift}
    return {
        "method": method, "budget": None, "seed": seed, "start_sha256": start, "seconds": 60.0, "steps": 200,
        "texts": {"a": {"source": "a book", "sha256": "0" * 64}}, "samples": {"new": 32, "old": 16}, "tokens": 4096,
        "before": before | {"feature_drift": 0.0, "action_drift": 0.0}, "after": after | drifts,
    }  # fmt: skip


PLAIN = [run("plain", seed, 40.0 + seed, 0.20 + 0.01 * seed) for seed in range(3)]


KEPT, LOST = (12.0, 12.5, 12.2), (41.0, 40.0, 42.5)  # perplexities
EQUAL, DEARER = (0.201, 0.211, 0.219), (0.222, 0.222, 0.222)  # action errors; plain's mean is 0.21


def features(perplexities=KEPT, errors=EQUAL, budget=0.03):
    values = enumerate(zip(perplexities, errors, strict=True))
    return [run(f"features {budget:g}", seed, p, e) for seed, (p, e) in values]


@pytest.fixture
def written(pages, tmp_path):
    def write(runs):
        for one in runs:
            write_json(tmp_path / "runs" / f"{one['method']}--{one['seed']}.json", one)
        return pages.read_runs(tmp_path)

    return write


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        # The tightest budget at equal error is judged, whatever the others keep.
        ({0.3: (LOST, EQUAL), 0.1: (KEPT, EQUAL), 0.03: (KEPT, DEARER)}, "**H8: supported.** `features 0.1` is"),
        ({0.3: (KEPT, EQUAL), 0.1: (LOST, EQUAL), 0.03: (KEPT, DEARER)}, "**H8: not supported.** `features 0.1` is"),
        ({0.3: (KEPT, DEARER), 0.1: (KEPT, DEARER), 0.03: (KEPT, DEARER)}, "error of every budget is more than 5 %"),
        # One seed of three that loses everything.
        (
            {0.3: (KEPT, EQUAL), 0.1: (KEPT, EQUAL), 0.03: ((10, 60, 11), EQUAL)},
            "**H8: not supported.** `features 0.03`",
        ),
    ],
)
def test_h8_is_decided_as_registered(pages, written, budgets, words):
    runs = [one for budget, (perplexities, errors) in budgets.items() for one in features(perplexities, errors, budget)]
    assert words in pages.report(written(PLAIN + runs))


def test_a_missing_budget_or_seed_leaves_h8_open(pages, written):
    runs = written(PLAIN + [one for budget in (0.3, 0.1, 0.03) for one in features(budget=budget)])
    assert "open, seeds are missing" not in pages.report(runs)
    for missing in runs:
        assert "open, seeds are missing" in pages.report([one for one in runs if one is not missing])


def test_a_row_is_compared_on_the_seeds_that_plain_has_too(pages, written):
    text = pages.report(written([PLAIN[0], run("features 0.03", 0, 12.0, 0.2), run("features 0.03", 1, 13.0, 0.2)]))
    assert f"| features 0.03 | {math.log(12 / 40):+.2f}, 1 pair | +0.0000, 1 pair |" in text


def test_the_rise_is_in_nats_a_token_and_paired_over_seeds(pages, written):
    runs = written(PLAIN + features((12, 12, 12), (0.2, 0.2, 0.2)))
    assert runs[0]["rise"] == pytest.approx(math.log(12 / 10))
    (pair,) = pages.pairs(pages.by_method(runs))
    assert pair.rise == pytest.approx([math.log(12 / value) for value in (40, 41, 42)])
    assert pair.error == pytest.approx([0, -0.01, -0.02])


def test_missing_rows_and_other_starts_are_said(driver, pages, written):
    planned = driver.rows(driver.LanguageConfig())
    whole = [run(row.method, row.seed, 20.0, 0.2) for row in planned]
    assert pages.gaps(whole) == []
    assert "16 of 17 rows are missing" in pages.gaps(whole[:1])[0]
    assert pages.gaps(whole[:-1])[0] == (
        f"**Not finished: 1 of 17 rows are missing. Seed 2 lacks {planned[-1].method}.**"
    )
    assert "one start" in pages.report(written(PLAIN))
    assert "2 starts" in pages.report(written([*PLAIN, run("frozen", 0, 10.0, 0.3, start="t" * 64)]))


def test_records_that_cannot_be_compared_are_refused(pages, written, tmp_path):
    with pytest.raises(FileNotFoundError, match="no row has been recorded"):
        pages.read_runs(tmp_path)
    with pytest.raises(ValueError, match=r"plain--1.json: texts is .*as in .*plain--0.json"):
        written([PLAIN[0], PLAIN[1] | {"texts": {"a": {"source": "another book", "sha256": "1" * 64}}}])
    with pytest.raises(ValueError, match=r"plain--1.json: after: perplexity: found .*expected a number from 1"):
        written([PLAIN[0], run("plain", 1, 0.5, 0.2)])
    with pytest.raises(ValueError, match=r"plain--1.json: found no seconds"):
        written([PLAIN[0], {name: value for name, value in PLAIN[1].items() if name != "seconds"}])


def test_the_page_follows_from_the_files_and_the_figure_is_drawn(pages, written, tmp_path, monkeypatch, capsys):
    runs = PLAIN + features((12, 12.5, 12.2), (0.2, 0.21, 0.22)) + [run("frozen", 0, 10.0, 0.5)]
    written(runs)
    monkeypatch.setattr(sys, "argv", ["make_report.py", str(tmp_path)])
    pages.main()
    text = (tmp_path / "language.md").read_text()
    assert "| plain | adapters of rank 32, no constraint | 3 | 41.00 (40.00 to 42.00) |" in text
    assert "| frozen | head, proprio projector and action queries alone | 1 | 10.00 | 0.00 | 0.5000 |" in text
    assert (tmp_path / "language.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------- what is committed


@pytest.mark.skipif(not (RESULTS / "language.md").exists(), reason="results/language is not there")
def test_the_committed_page_and_commands_follow_from_the_records_and_the_driver(driver, pages):
    runs = pages.read_runs(RESULTS)
    assert (RESULTS / "language.md").read_text() == pages.report(runs)
    cfg = driver.LanguageConfig()
    planned = {tuple(["python", *driver.training(cfg, row)]) for row in driver.rows(cfg)}
    assert {tuple(shlex.split(one["command"])) for one in runs} <= planned
    assert {tuple(shlex.split(one["start_command"])) for one in runs} == {("python", *driver.start_training(cfg))}
