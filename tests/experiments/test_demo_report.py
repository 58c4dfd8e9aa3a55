import importlib.util
import json
import sys
from pathlib import Path

import pytest

from craft_experiments.common_utils.plots import moving_average, plot_training_curves
from craft_experiments.common_utils.results import (
    ResultFormatError,
    TrainingMetrics,
    compare_paired,
    read_evaluation,
    read_metrics,
)

SCRIPT = Path(__file__).parents[2] / "craft_experiments" / "00_demo" / "make_report.py"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report_module():
    spec = importlib.util.spec_from_file_location("demo_make_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
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


def write_metrics(path, craft):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(0, 100, 5):
        row = {"step": step, "VLA Train/Loss": 1 / (1 + step), "VLA Train/Curr Action L1 Loss": 0.5 / (1 + step)}
        row["samples_seen"] = 16 * (step + 1)
        if craft:
            row |= {"CRaFT/Retention Loss": 0.001 * step, "CRaFT/Lambda": 1 - 0.001 * step}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def demo(tmp_path):
    rows = {
        ("start", "target"): [0] * 10,
        ("plain", "target"): [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        ("craft", "target"): [1, 1, 1, 1, 1, 1, 1, 0, 1, 0],
        ("grey", "target"): [0] * 10,
        ("replay", "target"): [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        ("start", "retention"): [1] * 10,
        ("plain", "retention"): [0] * 10,
        ("craft", "retention"): [1] * 10,
    }
    evaluations = []
    for (row, column), outcomes in rows.items():
        place = {} if column == "target" else {"suite": "libero_object", "task_id": 3}
        facts = {"wall_s": 30.0, "versions": {"mujoco": "3.3.0"}, "overall": {"successes": sum(outcomes), "trials": 10}}
        write_evaluation(tmp_path / "evaluations" / f"{row}-{column}", outcomes, facts=facts, **place)
        evaluations.append({"row": row, "column": column, "results_dir": f"evaluations/{row}-{column}"})
    for name in ("plain", "craft"):
        write_metrics(tmp_path / "metrics" / f"{name}.jsonl", craft=name == "craft")
    video = tmp_path / "videos" / "v.mp4"
    video.parent.mkdir()
    video.touch()
    manifest = {
        "runs": [{"name": n, "metrics": f"metrics/{n}.jsonl"} for n in ("plain", "craft")],
        "evaluations": evaluations,
        "seconds": {"train-plain": 310.2},
        "commands": {"train-plain": "python vla-scripts/finetune.py --max_steps 100"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_report_has_the_table_the_figures_and_the_sources(demo, report_module):
    text = report_module.make_report(demo).read_text()
    assert "| policy | fine-tuned task (libero_spatial task 0) | retention task (libero_object task 3) |" in text
    assert "| plain fine-tuning | 8/10 = 0.80 [0.49, 0.94] | 0/10 = 0.00 [0.00, 0.28] |" in text
    assert "| control: open-loop replay | 2/10 = 0.20 [0.06, 0.51] | - |" in text
    assert "| plain fine-tuning | 96 | 1,536 |" in text and "5 min 10 s" in text
    assert "Wall time of all evaluations together: 4 min 00 s." in text
    for piece in ("(videos/v.mp4)", "python vla-scripts/finetune.py --max_steps 100", "| mujoco | 3.3.0 |"):
        assert piece in text
    for name in ("training_curves.png", "success_rates.png"):
        assert f"({name})" in text
        assert (demo / name).read_bytes().startswith(PNG_HEAD)
    assert not list(demo.glob(".*.tmp"))


def test_overlapping_intervals_show_no_difference(demo, report_module):
    text = report_module.make_report(demo).read_text()
    target, retention = text.split("**retention task")
    equal = next(line for line in target.splitlines() if line.startswith("- CRaFT against plain"))
    assert "+0.00, no difference shown" in equal
    assert "1 succeed only with CRaFT, 1 only with plain fine-tuning, exact McNemar p = 1.000" in equal
    better = next(line for line in retention.splitlines() if line.startswith("- CRaFT against plain"))
    assert "+1.00, higher (the 95 % intervals do not overlap)" in better and "p = 0.002" in better
    worse = next(line for line in retention.splitlines() if line.startswith("- plain fine-tuning against start"))
    assert "-1.00, lower" in worse


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
    paired = compare_paired(first, second)
    assert (paired.pairs, paired.only_first, paired.only_second, paired.p_value) == (4, 2, 1, 1.0)
    assert compare_paired(first, read_evaluation(write_evaluation(tmp_path / "c", [1], suite="other"))) is None


def test_moving_average():
    assert moving_average([1, 2, 3, 4, 5], 2) == [1, 1.5, 2.5, 3.5, 4.5]
    assert moving_average([1, 2], 10) == [1, 1.5]


def test_curves_without_any_metric_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the metrics"):
        plot_training_curves([TrainingMetrics("r", [{"step": 0}])], tmp_path / "p.png")
