import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from craft_experiments.common_utils.plots import moving_average, plot_drift
from prismatic.evidence.pairing import PairedCounts, paired
from prismatic.evidence.results import (
    ResultFormatError,
    TrainingMetrics,
    read_evaluation,
    read_metrics,
)

SCRIPT = Path(__file__).parents[2] / "craft_experiments" / "00_demo" / "make_report.py"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report_module():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a program
    spec = importlib.util.spec_from_file_location("demo_make_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules[spec.name]


def write_evaluation(folder, outcomes, suite="libero_spatial", task_id=0, errors=(), facts=None):
    folder.mkdir(parents=True)
    rows = [
        {"suite": suite, "task_id": task_id, "init_idx": i, "status": "success" if ok else "failure"}
        for i, ok in enumerate(outcomes)
    ]
    rows += [{"suite": suite, "task_id": task_id, "init_idx": i, "status": "error"} for i in errors]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if facts is not None:
        (folder / "results.json").write_text(json.dumps(facts))
    return folder


def write_run(folder, row, budget=None, drift=0.0, steps=800, signal="actions"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(10, steps + 1, 10):
        line = {"step": step, "VLA Train/Curr Action L1 Loss": 0.5 / step, "samples_seen": 16 * step}
        if budget is not None:
            line |= {"CRaFT/Retention Loss": drift, "CRaFT/Lambda": 2.5}
            line |= {"CRaFT/Out Of Reach": float(step > steps / 2)} if drift > budget else {"CRaFT/Out Of Reach": 0.0}
        lines.append(json.dumps(line))
    (folder / f"{row}.jsonl").write_text("\n".join(lines) + "\n")
    flags = {"use_craft": budget is not None, "craft_retention_budget": 0.1 if budget is None else budget}
    flags |= {"craft_signal": signal, "craft_retention_metric": "mse"}
    (folder / f"{row}.json").write_text(json.dumps({"training": flags}))
    return {"name": row, "metrics": f"metrics/{row}.jsonl", "checkpoint": f"metrics/{row}.json"}


@pytest.fixture
def demo(tmp_path):
    rows = {
        ("start", "target"): [0] * 10,
        ("plain", "target"): [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        ("keep", "target"): [1, 1, 1, 1, 1, 1, 1, 0, 1, 0],
        ("grey", "target"): [0] * 10,
        ("playback", "target"): [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        ("start", "memory"): [1] * 10,
        ("plain", "memory"): [0] * 10,
        ("keep", "memory"): [1] * 10,
        ("features", "memory"): [0] * 10,
    }
    evaluations = []
    for (row, column), outcomes in rows.items():
        place = {} if column == "target" else {"suite": "libero_object", "task_id": 3}
        facts = {"wall_s": 30.0, "versions": {"mujoco": "3.3.0"}, "overall": {"successes": sum(outcomes), "trials": 10}}
        write_evaluation(tmp_path / "evaluations" / f"{row}-{column}", outcomes, facts=facts, **place)
        evaluations.append({"row": row, "column": column, "results_dir": f"evaluations/{row}-{column}"})
    video = tmp_path / "videos" / "v.mp4"
    video.parent.mkdir()
    video.touch()
    manifest = {
        "settings": {"old_init_noise_mm": 0.0},
        "runs": [
            write_run(tmp_path / "metrics", "plain"),
            write_run(tmp_path / "metrics", "keep", budget=0.03, drift=0.0321),
            write_run(tmp_path / "metrics", "features", budget=1e-3, drift=2e-3, signal="features"),
        ],
        "evaluations": evaluations,
        "seconds": {"train-plain": 310.2, "train-keep": 372.24, "all": 1200.0},
        "commands": {"train-plain": "python vla-scripts/finetune.py --max_steps 800"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def report_of(report_module, folder) -> str:
    report_module.make_report(folder)
    return (folder / "report.md").read_text()


def test_report_begins_with_the_table_and_has_figures_and_sources(demo, report_module):
    text = report_of(report_module, demo)
    assert text.splitlines()[2] == (
        "| policy | new task (libero_spatial task 0) | old task in memory (libero_object task 3) |"
    )
    assert "| plain | 8/10 = 0.80 [0.49, 0.94] | 0/10 = 0.00 [0.00, 0.28] |" in text
    assert "| control: playback of a demonstration | 2/10 = 0.20 [0.06, 0.51] | - |" in text
    assert "Wall time of all evaluations together: 4 min 30 s." in text and "the last: 20 min 00 s." in text
    for piece in ("(videos/v.mp4)", "python vla-scripts/finetune.py --max_steps 800", "| mujoco | 3.3.0 |"):
        assert piece in text
    for name in ("drift.png", "success_rates.png"):
        assert f"({name})" in text
        assert (demo / name).read_bytes().startswith(PNG_HEAD)
    assert not list(demo.glob(".*.tmp"))
    assert "Too small" not in text


def test_the_trainings_are_told_with_their_budgets(demo, report_module):
    text = report_of(report_module, demo)
    plain, keep, features = (
        next(line for line in text.splitlines() if line.startswith(f"| {label} | 800 |"))
        for label in ("plain", "CRaFT keep, no old data", "CRaFT on features")
    )
    assert plain.endswith("| - | - | - | - | - | 5 min 10 s (1.00 x plain) |") and "| 12,800 |" in plain
    assert "| 0.0321 | 0.03 | RMS of normalised actions | 2.5 | 50% of the logged steps, also at the end |" in keep
    assert keep.endswith("(1.20 x plain) |")
    assert "| 0.002 | 0.001 | mse of features |" in features
    assert "- CRaFT keep, no old data meets its budget: drift 0.0321, budget 0.03 (RMS of normalised actions)." in text
    assert "- CRaFT on features exceeds its budget: drift 0.002, budget 0.001 (mse of features)." in text


def test_the_summary_says_what_the_intervals_show(demo, report_module):
    text = report_of(report_module, demo)
    assert "- **plain**: new task 8 of 10, old task in memory 0 of 10 (start 10 of 10: lower)." in text
    assert (
        "- **CRaFT keep, no old data**: new task 8 of 10 (plain 8 of 10: no difference shown), "
        "old task in memory 10 of 10 (start 10 of 10: no difference shown)."
    ) in text


def test_pairs_of_rows_are_compared_on_their_common_states(demo, report_module):
    new, old = report_of(report_module, demo).split("**old task in memory (")
    assert "| CRaFT keep, no old data | plain | +0.00 | no difference shown | 10 | 1 | 1 | 1.000 |" in new
    assert "| CRaFT keep, no old data | plain | +1.00 | higher | 10 | 10 | 0 | 0.002 |" in old
    assert "| plain | start | -1.00 | lower | 10 | 0 | 10 | 0.002 |" in old
    assert "| control" not in old


def test_records_of_a_setting_stand_together_by_seed(demo, report_module, tmp_path_factory, monkeypatch):
    """Two seeds of one setting share a table; another budget is another setting."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    compare_records = importlib.import_module("compare_records")
    for name in ("compare_records", "picture", "make_report", "run_demo"):  # other experiments have a make_report, too
        del sys.modules[name]
    root = tmp_path_factory.mktemp("records")
    for name, settings in (
        ("b", {"seed": 8}),
        ("a", {"seed": 7, "work_dir": "elsewhere"}),
        ("c", {"seed": 7, "action_budget": 0.05}),
    ):
        shutil.copytree(demo, root / name)
        manifest = json.loads((demo / "manifest.json").read_text())
        manifest["settings"] = {"start": "starts/mine", "max_steps": 800, **settings}
        (root / name / "manifest.json").write_text(json.dumps(manifest))
    (root / "b" / "evaluations" / "keep-target").rename(root / "b" / "old")
    write_evaluation(root / "b" / "evaluations" / "keep-target", [1] * 10)
    compare_records.write_page(root)
    light, dark = ((root / f"picture_{theme}.svg").read_bytes() for theme in ("light", "dark"))
    compare_records.write_page(root)
    assert light == (root / "picture_light.svg").read_bytes() != dark  # the same records, the same bytes
    together, apart = (root / "report.md").read_text().split("\n## ")[1:]
    assert together.startswith("mine, 800 steps\n\nSeeds 7, 8: [a](a/report.md), [b](b/report.md).")
    assert apart.startswith("mine, 800 steps, action_budget `0.05`\n\nSeeds 7: [c]")
    assert (
        "| CRaFT keep, no old data | 8, 10 of 10 (0.90 ± 1.27) | 10, 10 of 10 (1.00 ± 0.00) | 0.0321, 0.0321 |"
        in together
    )
    assert "| 0.03 | 2 of 2 | 1.20, 1.20 |" in together and "| 0.03 | 1 of 1 | 1.20 |" in apart
    assert "- CRaFT keep, no old data: new task +0.10 ± 1.27 against plain of the same seed." in together
    assert "against plain of" not in apart
    for wrong in ({}, {"seed": "7"}, {"seed": 7, "start": 3}):
        (root / "b" / "manifest.json").write_text(json.dumps(manifest | {"settings": wrong}))
        with pytest.raises(ValueError, match=f"{root / 'b' / 'manifest.json'}: settings"):
            compare_records.write_page(root)
    with pytest.raises(FileNotFoundError, match="found no manifest.json below it"):
        compare_records.write_page(root / "a" / "metrics")


def test_a_small_demo_says_so_and_a_displaced_one_too(demo, report_module):
    manifest = json.loads((demo / "manifest.json").read_text())
    manifest["runs"][0] = write_run(demo / "metrics", "plain", steps=80)
    manifest["settings"]["old_init_noise_mm"] = 50.0
    (demo / "manifest.json").write_text(json.dumps(manifest))
    text = report_of(report_module, demo)
    assert "Too small to judge the methods by: 80 training steps, 10 trials in the smallest cell" in text
    assert "every object is displaced by up to 50 mm" in text


def test_crashed_episodes_make_a_cell_invalid(demo, report_module, tmp_path):
    write_evaluation(tmp_path / "e", [1, 0], errors=(2, 3))
    evaluation = read_evaluation(tmp_path / "e")
    assert (evaluation.successes, evaluation.trials, evaluation.errors) == (1, 2, 2)
    assert "1/2 = 0.50" in report_module.format_cell(evaluation) and "2 errors: not valid" in report_module.format_cell(
        evaluation
    )


def test_rows_of_a_column_must_share_their_tasks(demo, report_module):
    write_evaluation(demo / "other", [1], task_id=5)
    manifest = json.loads((demo / "manifest.json").read_text())
    manifest["evaluations"][0]["results_dir"] = "other"
    (demo / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="column target: the rows were evaluated on different tasks"):
        report_module.make_report(demo)


def test_manifest_errors_name_the_entry(demo, report_module, tmp_path):
    (demo / "manifest.json").write_text(json.dumps({"runs": [{"name": "plain"}], "evaluations": []}))
    with pytest.raises(KeyError, match=r"runs\[0\]: missing \['metrics'\]"):
        report_module.make_report(demo)
    with pytest.raises(FileNotFoundError, match="manifest not found"):
        report_module.make_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("manifest.json", ["runs", 0], 3),
        ("manifest.json", ["runs", 0], "name metrics"),
        ("manifest.json", ["runs", 0, "name"], ["plain"]),
        ("manifest.json", ["evaluations", 0, "row"], {}),
        ("manifest.json", ["evaluations", 0, "column"], None),
        ("manifest.json", ["evaluations", 0, "results_dir"], "a\0b"),
        ("manifest.json", ["title"], 3),
        ("manifest.json", ["settings"], []),
        ("manifest.json", ["settings", "old_init_noise_mm"], "wide"),
        ("manifest.json", ["settings", "rows"], ["start"]),
        ("manifest.json", ["seconds", "all"], "long"),
        ("manifest.json", ["commands", "train-plain"], ["python"]),
        ("metrics/keep.json", ["training"], []),
        ("metrics/keep.json", ["training", "craft_retention_budget"], "0.03"),
        ("metrics/keep.jsonl", ["CRaFT/Retention Loss"], "small"),
        ("metrics/keep.jsonl", ["samples_seen"], "many"),
        ("evaluations/start-target/results.json", ["versions"], []),
        ("evaluations/start-target/results.json", ["wall_s"], "long"),
    ],
)
def test_a_record_with_a_value_of_another_kind_is_named(demo, report_module, file, place, value):
    *lines, last = (demo / file).read_text().splitlines()
    content = inner = json.loads(last)
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (demo / file).write_text("\n".join([*lines, json.dumps(content)]))
    with pytest.raises(ValueError, match=f"{file}: .*{place[0]}.*(found|expected)"):
        report_module.make_report(demo)
    assert not (demo / "report.md").exists()


def test_a_superseded_error_does_not_count_and_a_repeat_is_an_error(tmp_path):
    folder = write_evaluation(tmp_path / "e", [])
    row = {"suite": "s", "task_id": 0, "init_idx": 4}
    lines = [row | {"status": "error"}, row | {"status": "success"}]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = read_evaluation(folder)
    assert (evaluation.outcomes, evaluation.errors) == ({("s", 0, 4): True}, 0)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[1]]))
    with pytest.raises(ResultFormatError, match="line 3: .* recorded twice"):
        read_evaluation(folder)


def test_results_json_must_agree_with_the_episodes(tmp_path):
    folder = write_evaluation(tmp_path / "e", [1, 0], facts={"overall": {"successes": 2, "trials": 2}})
    with pytest.raises(ResultFormatError, match="successes: found 2, episodes.jsonl gives 1"):
        read_evaluation(folder)


@pytest.mark.parametrize("status", ["Success", None])
def test_unknown_status_is_an_error(tmp_path, status):
    folder = write_evaluation(tmp_path / "e", [1])
    (folder / "episodes.jsonl").write_text(
        json.dumps({"suite": "s", "task_id": 0, "init_idx": 0, "status": status}) + "\n"
    )
    with pytest.raises(ResultFormatError, match="line 1: status"):
        read_evaluation(folder)


@pytest.mark.parametrize("text", ["", '{"loss": 1}\n', '{"step": 3}\n{"step": 3}\n', '{"step": 1}\n{"st'])
def test_bad_metric_files_name_file_and_line(tmp_path, text):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ResultFormatError, match="m.jsonl: "):
        read_metrics("plain", tmp_path / "m.jsonl")


def test_series_and_tail_mean_skip_rows_without_the_key():
    run = TrainingMetrics("r", [{"step": 0}, {"step": 1, "x": 1.0}, {"step": 5, "x": 3.0}])
    assert run.series("x") == ([1, 5], [1.0, 3.0])
    assert run.tail_mean("x") == 3.0 and run.tail_mean("x", share=1.0) == 2.0 and run.tail_mean("y") is None


def test_paired_comparison_uses_common_episodes_only(tmp_path):
    first = read_evaluation(write_evaluation(tmp_path / "a", [1, 1, 1, 0, 1]))
    second = read_evaluation(write_evaluation(tmp_path / "b", [0, 1, 0, 1]))
    counts = PairedCounts.of(paired(first.outcomes, second.outcomes, lambda key: key[:2])["libero_spatial", 0])
    assert (counts.pairs, counts.only_a, counts.only_b, counts.p_value) == (4, 2, 1, 1.0)
    other = read_evaluation(write_evaluation(tmp_path / "c", [1], suite="other"))
    assert paired(first.outcomes, other.outcomes, lambda key: key[:2]) == {}


def test_moving_average():
    assert moving_average([1, 2, 3, 4, 5], 2) == [1, 1.5, 2.5, 3.5, 4.5]
    assert moving_average([1, 2], 10) == [1, 1.5]


def test_a_drift_that_was_never_logged_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="run r: found no metric"):
        plot_drift([(TrainingMetrics("r", [{"step": 0}]), 0.1)], tmp_path / "p.png")


def test_records_that_count_steps_from_0_are_read_as_those_that_count_from_1(tmp_path):
    for name, first in (("old", 0), ("new", 1)):
        rows = [{"step": step, "x": 1.0} for step in (first, first + 9)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics("a", tmp_path / "old") == read_metrics("a", tmp_path / "new")
