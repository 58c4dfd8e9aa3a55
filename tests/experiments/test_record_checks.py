"""Records as data: whoever wrote them, readers give records of the declared types or an error with file and line."""

import gzip
import json
import os

import pytest

from craft_experiments.common_utils.drift_runs import DRIFT, read_runs
from craft_experiments.records import RecordError, read_manifest, read_record, write_record
from experiments.robot.libero import compare_evals, make_report, merge_shards
from experiments.robot.libero.eval_log import EpisodeRecord, EpisodeStatus, EpisodeStore, read_episode_lines
from prismatic.evidence.checks import RECORD, check_episode, parse_object, read_text
from prismatic.evidence.episodes import RecordsError, read_run
from prismatic.evidence.results import ResultFormatError, read_evaluation, read_metrics

GOOD = EpisodeRecord(
    run_id="r",
    fingerprint="f",
    checkpoint="c@h",
    suite="libero_goal",
    control="none",
    task_id=0,
    task_name="open_it",
    instruction="open it",
    init_idx=1,
    seed=7,
    status=EpisodeStatus.SUCCESS,
    steps=10,
    n_queries=2,
    wall_s=1.5,
    render_mode="lazy",
    versions={"mujoco": "3.3.0"},
    query_latency_s=[0.1, 0.2],
    init_offsets_mm={"bowl": [1.0, -2.0]},
)
DAMAGE = {
    "task_id": ["0", 0.5, -1, True, None, [0], 10**30],
    "init_idx": ["1", -1, {}],
    "seed": ["7", 1.5, False],
    "suite": [None, 3, ["libero_goal"]],
    "status": ["won", None, 1, ["success"]],
    "steps": ["10", -3, 2.5, None],
    "wall_s": ["1", -1.0, "NaN", None, [1]],
    "instruction": [1, ["open it"], {}],
    "versions": [["mujoco"], {"mujoco": 3}, "3.3.0"],
    "query_latency_s": [0.5, ["0.1"], [-1], {"a": 1}],
    "init_offsets_mm": [[1, 2], {"bowl": 3}, {"bowl": [1]}, {"bowl": [1, "2"]}],
    "video": [1, ["v.mp4"]],
    "error": [{"text": "x"}],
    "policy_wait_share": ["1", -0.1],
}
CASES = [(name, value) for name, values in DAMAGE.items() for value in values]
RAW = {
    "NaN": GOOD.to_json().replace("1.5", "NaN"),
    "infinity": GOOD.to_json().replace("1.5", "-Infinity"),
    "too large": GOOD.to_json().replace("1.5", "1e999"),
    "thousands of digits": GOOD.to_json().replace('"steps": 10', '"steps": ' + "9" * 6000),
    "deep": GOOD.to_json().replace('"open it"', "[" * (RECORD.levels + 2) + "]" * (RECORD.levels + 2)),
    "very deep": "[" * 200_000,
    "half a pair": GOOD.to_json().replace("open it", "\\ud800"),
    "a list": "[1]",
    "a number": "3",
    "no JSON": "{'a': 1}",
}


def folder_with(tmp_path, line, name="run"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    other = json.dumps({**json.loads(GOOD.to_json()), "init_idx": 0})
    (folder / "episodes.jsonl").write_text(f"{other}\n{line}\n", encoding="utf-8")
    return folder


def changed(name, value):
    return json.dumps({**json.loads(GOOD.to_json()), name: value})


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_field_of_another_type_is_named_with_file_and_line(tmp_path, name, value):
    folder = folder_with(tmp_path, changed(name, value))
    where = r"episodes.jsonl(:|: line )2: "
    for reader, error in (
        (read_run, RecordsError),
        (read_evaluation, ResultFormatError),
        (lambda place: read_episode_lines(place / "episodes.jsonl"), ValueError),
        (lambda place: EpisodeStore(place / "episodes.jsonl", "f"), ValueError),
    ):
        with pytest.raises(
            error, match=where + (f"{name}: found" if value != 10**30 else "found a number of 31 digits")
        ):
            reader(folder)


@pytest.mark.parametrize("kind", RAW)
def test_a_line_that_is_no_record_is_named(tmp_path, kind):
    folder = folder_with(tmp_path, RAW[kind])
    for reader in (read_run, read_evaluation, lambda place: read_episode_lines(place / "episodes.jsonl")):
        with pytest.raises(ValueError, match=r"episodes.jsonl(:|: line )2: "):
            reader(folder)


@pytest.mark.parametrize("content", [b"\xff\n", b'{"suite": "\xe4"}\n'])
def test_bytes_that_are_no_text_are_named(tmp_path, content):
    (tmp_path / "episodes.jsonl").write_bytes(GOOD.to_json().encode() + b"\n" + content)
    for reader in (read_run, read_evaluation, lambda place: read_episode_lines(place / "episodes.jsonl")):
        with pytest.raises(ValueError, match="line 2|:2: "):
            reader(tmp_path)


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b\x0bc", "quotes \" and \\ and '", "\U0001f916 \u0645", "a\nb"])
def test_any_text_survives_every_reader(tmp_path, text):
    raw = json.dumps(json.loads(changed("instruction", text)), ensure_ascii=False)  # as an evaluation writes it
    folder = folder_with(tmp_path, raw)
    (record,) = [r for r in read_episode_lines(folder / "episodes.jsonl")[0] if r.init_idx == 1]
    assert record.instruction == text
    assert text in {row["instruction"] for row in read_run(folder).episodes.values()}
    assert read_evaluation(folder).trials == 2
    assert len(EpisodeStore(folder / "episodes.jsonl", "f").records) == 2


def test_unknown_fields_are_others_business():
    check_episode({"a field of tomorrow": [object()]}, "x")


def test_special_files_are_no_records(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="expected a file"):
            read_text(place)
    with pytest.raises(ValueError, match="found 16777217 characters"):
        parse_object(" " * ((1 << 24) + 1), "x")


@pytest.mark.parametrize(
    "facts", ["[]", '{"missing": "3"}', '{"config": [1]}', '{"controls": ["a"]}', '{"a": NaN}', "{"]
)
@pytest.mark.parametrize("program", ["compare", "report"])
def test_the_programs_end_with_one_line(tmp_path, capsys, facts, program):
    folder = folder_with(tmp_path, GOOD.to_json())
    (folder / "results.json").write_text(facts)
    main = {"compare": compare_evals.main, "report": make_report.main}[program]
    arguments = [str(folder), str(folder)] if program == "compare" else [str(folder)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "results.json" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", '{"run_id": "../../up", "suite": "s", "config": {}}'),
        ("results.json", '{"run_id": "/etc/x", "suite": "s"}'),
        ("results.json", '{"run_id": 3, "suite": "s"}'),
        ("results.json", '{"suite": "s"}'),
        ("results.json", '{"run_id": "r", "suite": "s", "config": "x"}'),
        ("plan.json", "[3]"),
        ("plan.json", '[{"task_id": "0", "name": "a", "instruction": "b", "episodes": []}]'),
        (
            "plan.json",
            '[{"task_id": 0, "name": "a", "instruction": "b", "episodes": [{"init_idx": 0.5, "number": 1}]}]',
        ),
        ("plan.json", "[" * 100_000),
        ("episodes.jsonl", changed("steps", "10") + "\n"),
    ],
)
def test_merge_names_the_file_and_writes_nothing(tmp_path, capsys, file, content):
    folder = folder_with(tmp_path, GOOD.to_json())
    (folder / "results.json").write_text('{"run_id": "r", "suite": "s", "config": null}')
    plan = [{"task_id": 0, "name": "a", "instruction": "b", "episodes": [{"init_idx": 0, "number": 1}]}]
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / file).write_text(content)
    assert merge_shards.main([str(folder), "--output", str(tmp_path / "out" / "merged")]) == 2
    error = capsys.readouterr().err
    assert file in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 1.5},
        {"rate": "0.5"},
        {"rate": float("nan")},
        {"seconds": -1},
        {"processor_seconds": -1},
        {"processor_seconds": "3"},
        {"episodes": [[0, 1, 2, 3]]},
        {"episodes": [["0", 1, 1, 3]]},
        {"metrics": []},
        {"command": [1]},
    ],
)
def test_records_of_tables_are_checked(tmp_path, change):
    path = tmp_path / "x.json.gz"
    good = {"rate": 0.5, "seconds": 3.0, "episodes": [[0, 1, 1, 30]], "metrics": {}, "command": ["python"]}
    write_record(path, good)
    assert read_record(path)["rate"] == 0.5
    write_record(path, good | change)
    with pytest.raises(RecordError, match="x.json.gz"):
        read_record(path)


# The time of a gzip file would be part of the test's name, and two processes of one test run would know other tests.
@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"{}", mtime=0)[:-6], gzip.compress(b"[" * 100_000, mtime=0)]
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "x.json.gz").write_bytes(content)
    with pytest.raises(RecordError, match="x.json.gz"):
        read_record(tmp_path / "x.json.gz")


def test_a_record_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("craft_experiments.records.MAX_RECORD_BYTES", 1 << 20)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b" " * (1 << 21)))
    with pytest.raises(RecordError, match="found more than 1 MiB"):
        read_record(tmp_path / "x.json.gz")


@pytest.mark.parametrize("entry", [3, {"state": 1}, {"state": "failed", "code": "LOST"}, {"code": "EVAL_FAILED"}])
def test_states_are_checked(tmp_path, entry):
    (tmp_path / "manifest.json").write_text(json.dumps({"cell": entry}))
    with pytest.raises(RecordError, match="manifest.json: cell"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**12},
        {"steps": "4"},
        {"steps": 400},
        {"averaged": {"after": 2, "over": 0}},
        {"averaged": 3},
        {"all_losses": ["1"]},
        {"all_losses": []},
        {DRIFT: [1.0, float("inf"), 1.0]},
        {DRIFT: [1.0, None, 1.0]},
        {"CRaFT/Lambda": [1.0, None, 1.0]},
        {"variant": 3},
        {"seed": True},
        {"seed": "0"},
        {"budget": 0},
        {"budget": "0.1"},
    ],
)
def test_records_of_drift_are_checked(tmp_path, change):
    good = {"steps": 4, "averaged": {"after": 2, "over": 2}, "all_losses": [1.0, 2.0, 3.0], DRIFT: [1.0, 1.0, 2.0]}
    good |= {"variant": "a", "seed": 0, "budget": None, "CRaFT/Lambda": [0.0, 1.0, 2.0], "other": [None, 1.0, 1.0]}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text(json.dumps(good))
    assert read_runs(tmp_path, ("CRaFT/Lambda",))[0]["achieved"] == 2.0
    (tmp_path / "runs" / "a.json").write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match="a.json"):
        read_runs(tmp_path, ("CRaFT/Lambda",))


def test_metrics_of_a_training_that_diverged_are_read(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": NaN}\n')
    assert read_metrics("x", tmp_path / "m.jsonl").series("loss")[0] == [1, 2]
    (tmp_path / "m.jsonl").write_text('{"step": true}\n')
    with pytest.raises(ResultFormatError, match="line 1: step"):
        read_metrics("x", tmp_path / "m.jsonl")
