"""Verdicts on H1 to H3 against numbers whose answer is known beforehand."""

import fake_records as fake
import pytest

from craft_experiments.hypotheses import PairedTest, closest, page, verdicts
from craft_experiments.jobs.plan import plan
from craft_experiments.table_data import load, training_of
from craft_experiments.table_grids import trade_off_grid
from craft_experiments.tables import table

SEEDS = (0, 1, 2)
BEFORE = 0.10  # error of the start model on its own tasks


def decide(tmp_path, forgetting, error, drift):
    """Verdicts where the methods forget, err on the target and drift (in units of the budget) as the functions say."""
    s = fake.settings(tmp_path, "retention", seeds="0,1,2")
    wanted = table("retention", s.preset)
    for job in plan(s, wanted).values():
        if job.kind == "train":
            budget = float(job.cell.method.train.get("craft_retention_budget", 1.0))
            value = budget * drift(job.cell.method.key, job.cell.seed)
            fake.training(
                s, job, {"step": [1, 2], "VLA Train/Loss": [0.1, 0.1], "CRaFT/Retention Loss": [value] * 2}, 9.0
            )
        elif job.kind == "measure":
            key, seed = job.cell.method.key, job.cell.seed
            errors = {"start": BEFORE, "trained": error(key, seed), "start_head": BEFORE + forgetting(key, seed)}
            fake.retention(s, job, fake.measured(fake.random.Random(0)) | {"action_l1": errors})
    data = load(s, wanted)
    return data, verdicts(data, training_of(wanted.requests[0].cell))


def jitter(seed, size=0.001):
    return size * (seed - 1)


def craft_is_better(key, seed):
    low = key.startswith("craft") or key == "penalty_1"
    return (0.02 if low else 0.2) + jitter(seed) * (1 if low else -1)


def test_clear_data_supports_all_three(tmp_path):
    original_misses = lambda key, seed: 1.9 if key == "craft_original" else 1.0 + 0.05 * (seed - 1)  # noqa: E731
    errors = lambda key, seed: 0.1 + jitter(seed, 1e-4) * (1 + ("craft" in key))  # noqa: E731
    _, found = decide(tmp_path, craft_is_better, errors, original_misses)
    assert [verdict.decision for verdict in found] == ["supported"] * 3
    text = page(found)
    assert "median 5.0%" in text and "original rule: median 90.0%" in text
    assert "CRaFT minus `penalty_1`" in text


@pytest.mark.parametrize("case", ["no difference", "worse on the target", "one seed against"])
def test_h2_needs_both_halves(tmp_path, case):
    def forgetting(key, seed):
        if case == "no difference":
            return 0.1 + jitter(seed) * (1 if key == "craft" else -1)
        if case == "one seed against" and seed == 2 and key == "craft":
            return 0.4
        return craft_is_better(key, seed)

    def error(key, seed):
        return 0.1 * (1.2 if case == "worse on the target" and key == "craft" else 1.0) + jitter(seed, 1e-4)

    _, found = decide(tmp_path, forgetting, error, lambda key, seed: 1.0)
    assert found[1].decision == "not supported"
    assert found[0].decision == "not supported"  # the budget is met, but no better than by the original rule


def test_rivals_are_chosen_by_their_error_on_the_first_seed_and_judged_on_the_others(tmp_path):
    def error(key, seed):
        near = key in ("penalty_10", "interpolate_0.5") if seed == 0 else key in ("penalty_1", "interpolate_0.75")
        return 0.1 if near or key == "craft" else 0.3

    def forgetting(key, seed):
        return 5.0 if seed == 0 else craft_is_better(key, seed)

    data, found = decide(tmp_path, forgetting, error, lambda key, seed: 1.0)
    training = next(t for key, t in data.values if key == "craft")
    assert closest(data, training, "penalty_") == "penalty_10"
    assert closest(data, training, "interpolate_") == "interpolate_0.5"
    assert all("(2 seeds)" in line for line in found[2].lines)


def test_missing_runs_leave_the_question_open(tmp_path):
    s = fake.settings(tmp_path, "retention", seeds="0")
    wanted = table("retention", s.preset)
    job = next(job for job in plan(s, wanted).values() if job.kind == "train")
    fake.training(s, job, {"step": [1], "VLA Train/Loss": [0.1]}, 1.0)
    found = verdicts(load(s, wanted), training_of(wanted.requests[0].cell))
    assert [verdict.decision for verdict in found] == ["open"] * 3
    assert "## H3, against simpler means: open" in page(found)


def test_paired_test_is_the_textbook_one():
    # t = -0.5 / (0.1 / sqrt(3)) = -8.66 with 2 degrees of freedom.
    assert PairedTest((-0.4, -0.5, -0.6), 0.0).p == pytest.approx(0.00655, abs=1e-4)
    assert PairedTest((-0.4, -0.5, -0.6), -0.5).p == pytest.approx(0.5)
    assert PairedTest((0.0, 0.0), 0.0).p == 1.0 and PairedTest((-1.0, -1.0), 0.0).p == 0.0


def test_rows_that_learn_more_and_forget_less_are_named(tmp_path):
    forgets = {"plain": 0.3, "craft": 0.2, "frozen": 0.1}
    errs = {"plain": 0.1, "craft": 0.2, "frozen": 0.15}
    data, _ = decide(
        tmp_path,
        forgetting=lambda key, seed: forgets.get(key, 0.5) + jitter(seed),
        error=lambda key, seed: errs.get(key, 0.5) - jitter(seed),
        drift=lambda key, seed: 1.0,
    )
    grid = trade_off_grid(data)
    assert [row.label for row in grid.rows][:3] == ["plain fine-tuning", "frozen VLM", "CRaFT, budget 0.01"]
    better = [set(row.cells[2].split("; ")) for row in grid.rows]
    assert better[:3] == [{"none"}, {"none"}, {"frozen VLM"}]
    assert len(better) > 3 and all(
        names == {"plain fine-tuning", "frozen VLM", "CRaFT, budget 0.01"} for names in better[3:]
    )
    assert grid.rows[0].cells[:2] == ("0.1 ± 0.0025", "0.3 ± 0.0025")
