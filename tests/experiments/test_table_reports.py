"""Tables and figures from made-up records: numbers against an independent computation, marks against their rule."""

import csv
import io
import math
import random
import re
import shlex
import statistics
from pathlib import Path

import fake_records as fake
import matplotlib
import pytest
from PIL import Image

from craft_experiments.__main__ import main
from craft_experiments.cells import Kind
from craft_experiments.common_utils.log_parser import FailureCode
from craft_experiments.figures.cost import cost_ratios
from craft_experiments.jobs.plan import plan
from craft_experiments.records import RecordError, read_record, set_states, write_record
from craft_experiments.settings import RunConfig, resolve
from craft_experiments.table_csv import success_csv
from craft_experiments.table_data import load
from craft_experiments.table_entries import Column
from craft_experiments.table_formats import latex, latex_text, markdown
from craft_experiments.table_grids import budget_grid, success_grid
from craft_experiments.table_measures import retention_values
from craft_experiments.table_reports import run_command, write_table_reports
from craft_experiments.tables import TABLES, table
from prismatic.command_line import parse
from prismatic.evidence.statistics import holm_adjusted, mean_and_half_width

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [(task, start) for task in fake.TASKS for start in fake.STARTS]
COMMITTED = sorted((ROOT / "results").rglob("records/manifest.json"))


def first(count):
    """Outcomes of 20 episodes: the first `count` succeed."""
    return {pair: index < count for index, pair in enumerate(PAIRS)}


def write(s, name, counts, kind=Kind.STANDARD):
    """Evaluations of one kind: {method: {seed: successes of 20}}."""
    for job in plan(s, table(name, s.preset, s.methods)).values():
        if job.kind == "evaluate" and job.evaluation.kind is kind:
            count = counts.get(job.cell.method.key, {}).get(job.cell.seed)
            if count is not None:
                fake.evaluation(s, job, first(count))


def loaded(s, name):
    return load(s, table(name, s.preset, s.methods))


def small(folder, name="table1", **flags):
    return fake.settings(folder, name, suites="libero_spatial", **flags)


STANDARD = Column(Kind.STANDARD, "libero_spatial")
CLEAR = {"plain": {0: 10, 1: 11, 2: 9}, "craft": {0: 18, 1: 19, 2: 17}}


# --- Statistics ---------------------------------------------------------------------------------------------------


def test_half_width_is_that_of_the_printed_t_table():
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-5))
    assert mean_and_half_width([0.5]) == (0.5, None)
    assert mean_and_half_width([0.5] * 4) == (0.5, 0.0)


def test_holm_steps_down_and_stays_monotone():
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.6, 0.9]) == [1.0, 1.0] and holm_adjusted([]) == []
    with pytest.raises(ValueError, match="p_values"):
        holm_adjusted([1.5])


# --- Numbers ------------------------------------------------------------------------------------------------------


def test_means_and_intervals(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    entry = loaded(s, "table1").entries["craft", STANDARD]
    rates = [0.9, 0.95, 0.85]
    half = 4.302652729911275 * statistics.stdev(rates) / math.sqrt(3)
    assert (entry.mean, entry.half_width) == (pytest.approx(0.9), pytest.approx(half))
    assert entry.interval == (pytest.approx(0.9 - half), 1.0)  # a rate ends at 1
    assert (entry.successes, entry.trials) == (54, 60)
    # Wilson by hand: centre (p + z^2/2n) / (1 + z^2/n), and so on.
    z, n, p = 1.959964, 60, 0.9
    centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert entry.wilson == (
        pytest.approx((centre - width) / (1 + z * z / n)),
        pytest.approx((centre + width) / (1 + z * z / n)),
    )


def test_paired_comparison_counts_discordant_pairs(tmp_path):
    s = small(tmp_path, methods="plain,craft")
    write(s, "table1", {"plain": {0: 10, 1: 11, 2: 9}, "craft": {0: 18, 1: 19, 2: 7}})
    found = loaded(s, "table1").against_plain["craft", STANDARD]
    # The first n episodes succeed: 8 and 8 pairs for CRaFT, 2 for plain.
    assert (found.pairs, found.only_first, found.only_second, found.same_pairs) == (60, 16, 2, True)
    assert found.difference == pytest.approx(14 / 60)
    assert found.by_seed == {0: pytest.approx(0.4), 1: pytest.approx(0.4), 2: pytest.approx(-0.1)}
    tail = sum(math.comb(18, k) for k in range(3))
    assert found.p == found.p_holm == pytest.approx(2 * tail / 2**18)
    low, high = found.interval
    assert low < 14 / 60 < high


def test_unequal_seeds_are_compared_on_what_both_have(tmp_path):
    s = small(tmp_path, methods="plain,craft")
    write(s, "table1", {"plain": {0: 10, 1: 11}, "craft": {1: 19, 2: 20}})
    found = loaded(s, "table1").against_plain["craft", STANDARD]
    assert (found.pairs, found.only_first, found.same_pairs) == (20, 8, False)


# --- Bold ---------------------------------------------------------------------------------------------------------


def test_bold_where_every_condition_holds(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    text = "\n".join(markdown(success_grid(loaded(s, "table1"))))
    assert "| CRaFT, budget 0.01 | **90.0 ± 12.4** | - |" in text
    assert "| plain fine-tuning | 50.0 ± 12.4 | - |" in text


def test_not_bold_when_one_seed_has_the_other_sign(tmp_path):
    s = small(tmp_path)
    write(s, "table1", {"plain": CLEAR["plain"], "craft": {0: 20, 1: 20, 2: 8}})
    data = loaded(s, "table1")
    assert data.against_plain["craft", STANDARD].p < 0.001
    assert data.best == {}


def test_not_bold_when_holm_fails(tmp_path):
    """Six discordant pairs of six: p = 0.031 alone, 0.0625 as one of two."""
    counts = {"craft": {0: 16}, "plain": {0: 10}, "craft_no_dual": {0: 10}}
    two, three = (
        fake.settings(tmp_path / methods, "table4", seeds="0", methods=methods)
        for methods in ("craft,plain", "craft,plain,craft_no_dual")
    )
    for s in (two, three):
        write(s, "table4", counts)
    assert loaded(two, "table4").best == {STANDARD: "craft"}
    assert loaded(three, "table4").best == {}


def test_not_bold_while_a_row_is_incomplete(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR | {"plain": {0: 10, 1: 11}})
    assert loaded(s, "table1").best == {}


def test_controls_are_apart_and_never_bold(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR | {"blind": {0: 20}, "start": {0: 20}})
    data = loaded(s, "table1")
    assert data.best == {STANDARD: "craft"}
    lines = markdown(success_grid(data))
    # One seed is all that is asked for: no dagger.
    assert "| *trained without images* | 100.0 [83.9, 100.0] | - |" in lines
    assert "| *start checkpoint* | 100.0 [83.9, 100.0] | - |" in lines
    assert [line.startswith("| *") for line in lines[2:]] == [False, False, True, True, True]
    rows = latex(success_grid(data), "t", "t", []).splitlines()
    assert rows[rows.index(next(row for row in rows if "without images" in row)) - 1] == r"\midrule"
    assert {key for key, _ in data.against_plain} == {"craft"}


# --- Marks --------------------------------------------------------------------------------------------------------


def test_missing_failed_and_partial_cells_are_marked(tmp_path):
    s = small(tmp_path)
    write(s, "table1", {"plain": {0: 10, 2: 12}, "craft": {1: 18}})
    cells = {r.cell.name: r.cell for r in table("table1", s.preset).requests}
    failed = {name: FailureCode.TRAINING_FAILED for name, cell in cells.items() if cell.method.key == "blind"}
    set_states(s.records_dir, failed)
    data = loaded(s, "table1")
    text = "\n".join(markdown(success_grid(data)))
    assert "| plain fine-tuning | 55.0 ± 63.5 † 2 of 3 | - |" in text
    assert "| CRaFT, budget 0.01 | 90.0 [69.9, 97.2] † 1 of 3 | - |" in text
    assert "| *trained without images* | TRAINING_FAILED | TRAINING_FAILED |" in text
    assert "| *playback of a demonstration* | - | - |" in text
    assert data.complete == 0 and data.wanted == len(cells)


def test_a_table_of_failures_alone_is_a_table(tmp_path):
    s = small(tmp_path)
    set_states(s.records_dir, {"plain--spatial--seed0": FailureCode.NO_CHECKPOINT})
    paths = write_table_reports(s, table("table1", s.preset))
    assert "NO_CHECKPOINT" in (s.results_dir / "table1.md").read_text(encoding="utf-8")
    assert not [path for path in paths if path.suffix == ".png"]


def test_latex_escapes():
    assert latex_text("a_b 5 % & λ = 1, α ± 2 † R² #") == (
        r"a\_b 5 \% \& $\lambda$ = 1, $\alpha$ $\pm$ 2 $^{\dagger}$ R$^{2}$ \#"
    )
    assert latex_text("{\\}$^~") == r"\{\textbackslash{}\}\$\textasciicircum{}\textasciitilde{}"


def test_csv_parses_back(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    rows = list(csv.DictReader(io.StringIO(success_csv(loaded(s, "table1")))))
    row = next(row for row in rows if row["method"] == "craft" and row["kind"] == "standard")
    assert row["label"] == "CRaFT, budget 0.01"  # with its comma
    assert (row["seeds"], row["episodes"], row["successes"], row["bold"], row["interval"]) == (
        "3",
        "60",
        "54",
        "1",
        "t",
    )
    assert [float(pair.split(":")[1]) for pair in row["rates"].split()] == [0.9, 0.95, 0.85]
    assert float(row["half_width"]) == pytest.approx(0.124207, rel=1e-5)
    assert {row["state"] for row in rows} == {"complete", "missing"}


# --- Measures -----------------------------------------------------------------------------------------------------


def test_measures_of_training_and_retention(tmp_path):
    s = fake.settings(tmp_path, "retention", methods="craft,plain", seeds="0,1")
    report = fake.measured(random.Random(0))
    for job in plan(s, table("retention", s.preset, s.methods)).values():
        seconds = {"plain": 100.0, "craft": 150.0 + 10 * job.cell.seed}.get(job.cell.method.key, 1.0) if job.cell else 0
        if job.kind == "train":
            metrics = {"step": list(range(8)), "VLA Train/Loss": [1.0] * 6 + [0.1, 0.3]}
            if job.cell.method.key == "craft":
                metrics["CRaFT/Retention Loss"] = [None] * 4 + [1.0, 1.0, 1.0, 0.02]
                metrics["CRaFT/Lambda"] = [0.0] * 7 + [0.5]
            fake.training(s, job, metrics, seconds)
        elif job.kind == "measure":
            fake.retention(s, job, report)
        elif job.kind == "evaluate" and job.evaluation.kind is Kind.START_TASKS:
            fake.evaluation(s, job, first({"start": 18, "craft": 15, "plain": 6}.get(job.cell.method.key, 0)))
    data = loaded(s, "retention")
    training = next(t for key, t in data.values if key == "craft")
    assert data.value("craft", training, "action_loss") == {0: pytest.approx(0.2), 1: pytest.approx(0.2)}
    assert data.value("craft", training, "achieved_drift")[0] == pytest.approx(0.02)  # a quarter of four values
    assert data.value("craft", training, "final_lambda") == {0: 0.5, 1: 0.5}
    assert data.value("plain", training, "final_lambda") == {}
    assert data.value("craft", training, "lost") == {0: pytest.approx(15), 1: pytest.approx(15)}
    errors = report["action_l1"]
    assert data.value("craft", training, "forgetting")[1] == pytest.approx(errors["start_head"] - errors["start"])
    assert data.value("craft", training, "l1_target")[0] == errors["trained"]  # the same report for both data sets
    assert data.value("craft", training, "drift")[0] == report["drift"]["original"]["rel_mse"]["total"]
    assert data.value("craft", training, "cka_aq") == {}  # null: not defined
    assert budget_grid(data).rows[0].cells == ("0.01", "0.02 (0.02 to 0.02)", "100.0 %", "2 of 2")
    assert cost_ratios(data) == {"craft": [1.5, 1.6]}
    # 20 pairs for each of the two seeds, three of them lost.
    found = data.against_start["craft", Column(Kind.START_TASKS, "libero_object")]
    assert (found.pairs, found.only_first, found.only_second) == (40, 0, 6)
    assert {key for key, _ in data.values} <= {"plain", "craft", "blind"}
    assert data.value("blind", training, "lost") == {}


def test_a_retention_record_without_a_field_is_refused():
    report = fake.measured(random.Random(0))
    assert retention_values(report | {"probe": None}, "x").keys() >= {"drift", "l1_own_head"}
    del report["drift"]["original"]["rel_mse"]
    with pytest.raises(RecordError, match=r"x: retention\.drift\.original\.rel_mse: found nothing"):
        retention_values(report, "x")
    with pytest.raises(RecordError, match=r"cka\.raw: found 'high', expected a number"):
        retention_values(fake.measured(random.Random(0)) | {"cka": {"raw": "high", "aq": 1}}, "x")


# --- Records ------------------------------------------------------------------------------------------------------


def test_no_record_is_an_error_that_names_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `main` goes to the root of the repository
    flags = ["--records_dir", str(tmp_path / "nothing"), "--results_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(["report", "table2", *flags])
    assert f"{tmp_path / 'nothing'}: found no record of table2" in capsys.readouterr().err


def test_records_of_other_settings_are_refused(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    other = small(tmp_path, num_trials=50)
    with pytest.raises(RecordError, match=r"num_trials_per_task \d+ .now 50."):
        loaded(other, "table1")


def test_a_record_without_a_field_is_refused(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    job = next(j for j in plan(s, table("table1", s.preset)).values() if j.kind == "evaluate")
    record = read_record(job.record(s))
    del record["episodes"]
    write_record(job.record(s), record)
    with pytest.raises(RecordError, match="episodes: found nothing"):
        loaded(s, "table1")


@pytest.mark.parametrize("name", [name for name in TABLES if name != "keep"])
def test_half_of_the_records_make_a_page(tmp_path, name, monkeypatch):
    monkeypatch.setattr("craft_experiments.table_reports.write_figures", lambda data, folder: {})
    s = fake.settings(tmp_path, name, preset="tiny", seeds="0,1")
    fake.fill(s, name, share=0.5)
    write_table_reports(s, table(name, s.preset))
    text = (s.results_dir / f"{name}.md").read_text(encoding="utf-8")
    assert "†" in text and "hours of programs" in text and str(tmp_path) not in text
    assert (s.results_dir / f"{name}.tex").read_text(encoding="utf-8").count(r"\begin{table}") >= 2


def test_the_command_on_the_page_gives_the_same_settings(tmp_path):
    flags = {"suites": "libero_goal,libero_10", "seeds": "3", "task_ids": "0,1", "retention_budget": 0.02}
    flags |= {"num_trials": 2, "extra_train_args": "--a 1 --b 'c d'", "use_lora": True, "render_mode": "published"}
    s = fake.settings(tmp_path, "table1", controls=False, num_demos=4, shots="1,4", **flags)
    command = run_command(s, table("table1", s.preset))
    again = resolve(parse(RunConfig, command[5:]), "table1")
    assert again.preset == s.preset
    assert (again.controls, again.extra_train) == (s.controls, s.extra_train)
    plain = run_command(fake.settings(tmp_path, "table1"), table("table1", s.preset))
    assert shlex.join(plain) == "python -m craft_experiments run table1 --preset tiny-archive"


# --- Files --------------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_everything_is_written_again_byte_for_byte(tmp_path):
    s = fake.settings(tmp_path, "retention", seeds="0,1", methods="plain,craft,craft_budget_0.03,interpolate_0.5")
    fake.fill(s, "retention")
    wanted = table("retention", s.preset, s.methods)
    paths = write_table_reports(s, wanted)
    once = contents(s.results_dir)
    assert {str(path.relative_to(s.results_dir)) for path in paths} == once.keys()
    assert len([name for name in once if name.endswith((".png", ".pdf"))]) == 2 * 5
    assert (
        b"Software" in once["figures/retention_frontier.png"] and b"Date" not in once["figures/retention_frontier.pdf"]
    )
    write_table_reports(s, wanted)
    assert contents(s.results_dir) == once


def test_figures_that_lost_their_records_go(tmp_path):
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    stale = s.results_dir / "figures" / "table1_cost.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    write_table_reports(s, table("table1", s.preset))
    assert not stale.exists() and (s.results_dir / "figures" / "table1_success.png").exists()


def test_report_writes_every_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    s = small(tmp_path)
    write(s, "table1", CLEAR)
    flags = [
        "--preset",
        "tiny-archive",
        "--suites",
        "libero_spatial",
        "--records_dir",
        str(s.records_dir),
        "--results_dir",
        str(s.results_dir),
    ]
    assert main(["report", "table1", *flags]) == 0
    names = {"table1_results.log", "table1_formatted.md", "table1.md", "table1.csv", "table1_pairs.csv", "table1.tex"}
    assert names <= {path.name for path in s.results_dir.iterdir()}
    assert "table1.md" in capfd.readouterr().out


def committed_pages():
    for manifest in COMMITTED:
        folder = manifest.parents[1]
        for page in sorted(folder.rglob("*.md")):
            if page.stem in TABLES:
                yield page, manifest.parent


@pytest.mark.skipif(not COMMITTED, reason="no records of tables")
def test_committed_tables_follow_from_their_records(tmp_path, monkeypatch):
    """The command on each page, as `report` and with the folders added, writes the page, CSV and LaTeX again.

    Pixels depend on matplotlib: a PNG is compared when the version in its metadata is the one that is installed.
    """
    monkeypatch.chdir(tmp_path)  # `main` goes to the root of the repository
    version = f"Matplotlib version{matplotlib.__version__},"
    for number, (page, records) in enumerate(committed_pages()):
        command = shlex.split(re.search(r"```bash\n(.*)\n```", page.read_text(encoding="utf-8"))[1])
        out = tmp_path / str(number)
        main(["report", page.stem, *command[5:], "--records_dir", str(records), "--results_dir", str(out)])
        assert (out / page.name).exists()
        for path in [p for end in ("*.md", "*.csv", "*.tex", "figures/*.png") for p in out.glob(end)]:
            before = page.parent / path.relative_to(out)
            if path.suffix in (".md", ".csv", ".tex") or version in Image.open(before).info["Software"]:
                assert path.read_bytes() == before.read_bytes(), before
