"""The HTML report of an evaluation: sections from recorded runs. Files are read and written by `make_report.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.robot.libero.compare_evals import Comparison, format_ranges
from experiments.robot.libero.evaluation import PINNED_VERSIONS
from experiments.robot.libero.report_html import (
    Bar,
    Html,
    el,
    histogram,
    interval_text,
    join,
    number,
    page,
    percent,
    rate_bars,
    table,
    timeline,
)
from prismatic.evidence.episodes import EpisodeId, RecordedRun, protocol
from prismatic.evidence.statistics import mean_rate_interval, wilson_interval

Task = tuple[str, str, int]
CONTROL_LABELS = {
    "grey_images": "grey images",
    "frozen_image": "frozen image",
    "replay": "replay",
    "none": "policy",
}


@dataclass(frozen=True)
class Video:
    """Where an episode's recording is. embedded: data URI, or None; link: path relative to the report, or None; note:
    why it is not embedded, empty when it is."""

    embedded: str | None
    link: str | None
    note: str


@dataclass(frozen=True)
class ControlRun:
    """A control beside the policy. comparison: paired with the policy, A policy, B control; None without common
    episodes."""

    label: str
    run: RecordedRun
    comparison: Comparison | None


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. videos: per episode that has one; control_notes: controls that could not be read."""

    run: RecordedRun
    controls: tuple[ControlRun, ...]
    videos: dict[EpisodeId, Video]
    control_notes: tuple[str, ...] = ()


def counts_of(run: RecordedRun, task: Task | None = None) -> tuple[int, int]:
    """(successes, trials) of a run or of one of its tasks; errors are no trials."""
    statuses = [r["status"] for key, r in run.episodes.items() if task is None or key.task == task]
    return statuses.count("success"), statuses.count("success") + statuses.count("failure")


def tasks_of(run: RecordedRun, suite: str | None = None) -> list[Task]:
    """Tasks in ascending order, of one suite or of all."""
    return sorted({key.task for key in run.episodes if suite in (None, key.suite)})


def control_label(run: RecordedRun) -> str:
    """Name of a control run: its control, or the noise of its initial states."""
    names = [CONTROL_LABELS.get(name, name) for name in run.values("control")]
    noise = [value for value in protocol(run).get("init_noise_mm", []) if value not in ("0", "0.0", "null")]
    if noise:
        names = [name for name in names if name != "policy"] + [
            f"objects moved {', '.join(f'{float(value):g}' for value in noise)} mm"
        ]
    return ", ".join(names) or "control"


def bar_of(name: str, run: RecordedRun, task: Task | None, colour: int) -> Bar:
    """Rate and interval of a run, or of one task."""
    successes, trials = counts_of(run, task)
    if not trials:
        return Bar(name, None, None, colour)
    return Bar(name, successes / trials, wilson_interval(successes, trials), colour)


def rate_cell(bar: Bar) -> Html:
    """`98.0 [89.5, 99.6]`, in percent."""
    if bar.rate is None:
        return el("td", "-", class_="num")
    return el("td", f"{100 * bar.rate:.1f} {interval_text(bar.interval)}", class_="num")


def compose(data: ReportData) -> str:
    """The page."""
    run = data.run
    title = f"LIBERO evaluation: {', '.join(run.values('suite'))}"
    sections = [
        el("h1", title),
        el("p", ", ".join(run.values("checkpoint")) or "checkpoint not recorded", class_="soft"),
        *headline(run),
        *controls_section(data),
        *tasks_section(data),
        *suites_section(run),
        *failures_section(data),
        *episodes_section(data),
        *latency_section(run),
        *protocol_section(run),
        el("h2", "How to read it"),
        el(
            "p",
            "Intervals are 95 % Wilson intervals of the success probability over initial states; that of the mean over "
            "tasks combines them (Zou, Huang, Zhang 2009). They do not cover the variation between trainings. Episodes "
            "that ended in an error are no trials. Controls are compared on common episodes with the exact McNemar "
            "test; the p values are not corrected for their number.",
        ),
    ]
    return page(title, sections)


def headline(run: RecordedRun) -> list[Html]:
    """The rate, and whether it may be used."""
    successes, trials = counts_of(run)
    errors, problems = run.count("error"), list(run.notes)
    if errors:
        problems.append(f"{errors} episode(s) ended in an error: the run is not valid until they are run again.")
    if run.missing:
        problems.append(f"{run.missing} planned episode(s) have no record: the run is not complete.")
    if run.missing is None:
        problems.append("There is no results.json: whether the run is complete is not known.")
    rate = successes / trials if trials else None
    interval = wilson_interval(successes, trials) if trials else None
    parts = [
        el("b", percent(rate)),
        el("span", f"95 % interval {interval_text(interval)} %") if interval else None,
        el("span", f"{successes} of {trials} episodes in {len(tasks_of(run))} task(s)"),
    ]
    if problems:
        state = [el("div", *(el("p", text) for text in problems), class_="banner")]
    else:
        state = [el("p", "Complete, no episode ended in an error.", class_="banner ok")]
    return [el("p", *parts, class_="headline"), *state]


def controls_section(data: ReportData) -> list[Html]:
    """The controls' rates beside the policy's own."""
    notes = [el("p", note) for note in data.control_notes]
    head = el("h2", "Controls")
    if not data.controls:
        text = (
            "No control is shown. A success rate alone does not show that the policy looks at the scene: evaluate with "
            "--control grey_images, frozen_image or replay and give the folders as --controls."
        )
        return [head, el("p", text), *notes]
    rows = [_control_row(control_label(data.run), data.run, None, 0)]
    rows += [_control_row(c.label, c.run, c.comparison, i) for i, c in enumerate(data.controls, start=1)]
    heads = ["", "successes / trials", "rate [95 %], %", "0 to 100 %", "on common episodes"]
    return [head, *_control_warning(data.controls), table(heads, rows), *notes]


def _control_warning(controls: Sequence[ControlRun]) -> list[Html]:
    """Names the controls that do not see the scene and yet succeed as often as the policy, as far as the common
    episodes can tell."""
    equal = []
    for control in controls:
        found, blind = control.comparison, control.run.values("control") not in ([], ["none"])
        if blind and found is not None and (not found.distinguishable or found.difference > 0):
            equal.append(control.label)
    if not equal:
        return []
    text = (
        f"On the common episodes the policy's rate is not shown to be above that of: {', '.join(equal)}. "
        "On these episodes it does not show that the policy looks at the scene."
    )
    return [el("div", el("p", text), class_="banner")]


def _control_row(label: str, run: RecordedRun, comparison: Comparison | None, colour: int) -> list[object]:
    bar = bar_of(label, run, None, colour)
    successes, trials = counts_of(run)
    errors = run.count("error")
    text = f"{successes} / {trials}" + (f", {errors} error(s)" if errors else "")
    cells = [label, el("td", text, class_="num"), rate_cell(bar), rate_bars([bar], label)]
    return [*cells, el("td", _control_verdict(comparison) if colour else "", class_="words")]


def _control_verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return "no common episode"
    total = comparison.total
    text = (
        f"{total.pairs} pairs: {total.only_a} only the policy, {total.only_b} only the control, "
        f"p = {comparison.p_value:.2g}"
    )
    text += "" if comparison.distinguishable else ": not told apart"
    fields = [difference.field for difference in comparison.protocol if difference.decisive]
    return text + (f"; differs in {', '.join(fields)}" if fields else "")


def tasks_section(data: ReportData) -> list[Html]:
    """One row per task: counts, interval, bars, controls."""
    run, named = data.run, [(control_label(data.run), data.run)] + [(c.label, c.run) for c in data.controls]
    heads: list[object] = ["task", "instruction", "successes / trials", "rate [95 %], %", "0 to 100 %"]
    heads += [f"{label}, %" for label, _ in named[1:]] + ["mean steps", "errors"]
    rows = []
    for task in tasks_of(run):
        records = [record for key, record in run.episodes.items() if key.task == task]
        bars = [bar_of(label, other, task, colour) for colour, (label, other) in enumerate(named)]
        successes, trials = counts_of(run, task)
        steps = [r["steps"] for r in records if r["status"] != "error" and r.get("steps") is not None]
        cells: list[object] = [_task_text(task, run), el("td", records[0].get("instruction", ""), class_="words")]
        cells += [el("td", f"{successes} / {trials}", class_="num"), rate_cell(bars[0])]
        cells += [rate_bars(bars, _task_text(task, run))]
        cells += [number(None if bar.rate is None else 100 * bar.rate, 1) for bar in bars[1:]]
        cells += [number(sum(steps) / len(steps) if steps else None, 1)]
        errors = sum(record["status"] == "error" for record in records)
        rows.append([*cells, el("td", errors, class_="num error" if errors else "num")])
    return [el("h2", "Tasks"), legend([label for label, _ in named]), table(heads, rows)]


def legend(labels: Sequence[str]) -> Html:
    """Colours of the bars, in their order."""
    items = []
    for colour, label in enumerate(labels):
        square = el("rect", width=12, height=12, class_=f"fill{colour % 6}")
        items.append(el("li", el("svg", square, width=12, height=12, aria_hidden="true"), label))
    return el("ul", *items, class_="legend")


def _task_text(task: Task, run: RecordedRun) -> str:
    suite, perturbation, task_id = task
    several = len({(key.suite, key.perturbation) for key in run.episodes}) > 1
    return f"{suite} {perturbation} {task_id}".replace("  ", " ") if several else str(task_id)


def suites_section(run: RecordedRun) -> list[Html]:
    """Mean over episodes and over tasks, per suite and together."""
    suites = run.values("suite")
    rows = [_suite_row(suite, run, tasks_of(run, suite)) for suite in suites]
    if len(suites) > 1:
        rows.append(_suite_row("all", run, tasks_of(run)))
    heads = ["suite", "successes / trials", "over episodes", "95 % interval, %", "over tasks", "95 % interval, %"]
    return [el("h2", "Means"), table(heads, rows)]


def _suite_row(name: str, run: RecordedRun, tasks: Sequence[Task]) -> list[object]:
    counts = [pair for pair in (counts_of(run, task) for task in tasks) if pair[1]]
    successes, trials = sum(k for k, _ in counts), sum(n for _, n in counts)
    if not counts:
        return [name, "no finished episode", "", "", "", ""]
    macro = sum(k / n for k, n in counts) / len(counts)
    texts = [f"{successes} / {trials}", percent(successes / trials), interval_text(wilson_interval(successes, trials))]
    texts += [percent(macro), interval_text(mean_rate_interval(counts))]
    return [name, *(el("td", text, class_="num") for text in texts)]


def failures_section(data: ReportData) -> list[Html | None]:
    """Errors with their text, failures with their videos, then the videos of successes."""
    episodes = data.run.episodes
    parts: list[Html | None] = [el("h2", "Failures")]
    errors = [key for key, record in episodes.items() if record["status"] == "error"]
    failures = sorted(key for key, record in episodes.items() if record["status"] == "failure")
    if errors:
        rows = [[_episode_text(key, data.run), el("td", el("pre", _error_text(episodes[key])))] for key in errors]
        parts += [el("h3", f"Errors ({len(errors)})"), table(["episode", "error"], rows)]
    with_video = [key for key in failures if key in data.videos]
    if with_video:
        parts.append(el("div", *(_card(key, data) for key in with_video), class_="cards"))
    parts.append(_failures_without_video(data.run, [key for key in failures if key not in data.videos]))
    successes = [key for key, r in episodes.items() if r["status"] == "success" and key in data.videos]
    if successes:
        cards = el("div", *(_card(key, data) for key in successes), class_="cards")
        parts.append(el("details", el("summary", f"Videos of successful episodes ({len(successes)})"), cards))
    if not errors and not failures:
        parts.insert(1, el("p", "None."))
    return parts


def _failures_without_video(run: RecordedRun, keys: Sequence[EpisodeId]) -> Html | None:
    if not keys:
        return None
    rows = []
    for task in sorted({key.task for key in keys}):
        states = [key.init_idx for key in keys if key.task == task]
        rows.append([_task_text(task, run), number(len(states)), format_ranges(states)])
    return join([el("p", "Failures without a video:"), table(["task", "failures", "initial states"], rows)])


def _episode_text(key: EpisodeId, run: RecordedRun) -> str:
    return f"task {_task_text(key.task, run)}, initial state {key.init_idx}"


def _error_text(record: dict[str, Any]) -> str:
    return str(record.get("traceback") or record.get("error") or "no text recorded")


def _card(key: EpisodeId, data: ReportData) -> Html:
    record, video, name = data.run.episodes[key], data.videos[key], _episode_text(key, data.run)
    facts = [
        f"{record[field]} {word}" for field, word in (("steps", "steps"), ("n_queries", "queries")) if field in record
    ]
    parts: list[object] = [
        el("h3", name),
        el("p", record.get("instruction", "")),
        el("p", el("span", record["status"], class_=record["status"]), ", ", ", ".join(facts)),
    ]
    if record.get("error"):
        parts.append(el("p", f"retried after: {record['error']}"))
    if video.embedded:
        label = f"Video of {name}: {record['status']}"
        player = {"controls": True, "muted": True, "playsinline": True, "loop": True, "preload": "metadata"}
        parts.append(el("video", "This browser plays no MP4.", src=video.embedded, aria_label=label, **player))
    elif video.link:
        parts.append(el("p", el("a", "Video", href=video.link), f" ({video.note})"))
    else:
        parts.append(el("p", f"Video: {video.note}", class_="soft"))
    return el("div", *parts, class_="card")


def episodes_section(data: ReportData) -> list[Html]:
    """All episodes, sortable where scripts run."""
    several = len(data.run.values("suite")) > 1
    heads = ["task", "initial state", "outcome", "steps", "queries", "seconds", "attempts", "seed", "video"]
    heads = ["suite", *heads] if several else heads
    rows = []
    for key in sorted(data.run.episodes):
        record, video = data.run.episodes[key], data.videos.get(key)
        cells: list[object] = [key.suite] if several else []
        cells += [el("th", key.task_id, scope="row", data_value=key.task_id) if not several else number(key.task_id)]
        cells += [number(key.init_idx)]
        cells += [el("td", record["status"], class_=record["status"]), number(record.get("steps"))]
        cells += [number(record.get("n_queries")), number(record.get("wall_s"), 1), number(record.get("attempts"))]
        cells += [number(key.seed), _video_word(video)]
        rows.append(cells)
    body = table(heads, rows, class_="sortable wide")
    region = el("div", body, class_="tall", tabindex="0", role="region", aria_label="All episodes")
    return [el("h2", f"Episodes ({len(rows)})"), region]


def _video_word(video: Video | None) -> object:
    if video is None:
        return ""
    if video.embedded:
        return "above"
    return el("td", el("a", "file", href=video.link)) if video.link else video.note


def query_latencies_ms(record: dict[str, Any]) -> list[float]:
    """Milliseconds from each question of the episode to the policy's answer, from `query_latency_s`; empty without."""
    return [1000.0 * seconds for seconds in record.get("query_latency_s") or ()]


def latency_section(run: RecordedRun) -> list[Html]:
    """Policy latency where recorded, else that it is not; then the time per episode."""
    parts = [el("h2", "Time")]
    found = [values for values in map(query_latencies_ms, run.episodes.values()) if values]
    if found:
        queries = [value for values in found for value in values]
        parts.append(el("p", _spread(f"Policy, {len(queries)} queries", queries, "ms")))
        title = f"Milliseconds per policy query in {len(found)} episodes"
        columns = [(sorted(values)[len(values) // 2], max(values)) for values in found]
        parts += [timeline(columns, f"{title}: median and largest", "ms; dark: median, light: largest")]
        parts += [histogram(queries, f"Histogram: {title}", "ms")]
    else:
        parts.append(el("p", "The records hold no latency of the policy."))
    seconds = [float(r["wall_s"]) for r in run.episodes.values() if r["status"] != "error" and r.get("wall_s")]
    if seconds:
        parts.append(el("p", _spread("Episode with reset, rendering and policy", seconds, "s")))
        parts.append(timeline([(value, value) for value in seconds], f"Seconds of {len(seconds)} episodes", "seconds"))
    return parts


def _spread(name: str, values: Sequence[float], unit: str) -> str:
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return f"{name}: median {middle:.3g} {unit}, smallest {ordered[0]:.3g}, largest {ordered[-1]:.3g}."


def protocol_section(run: RecordedRun) -> list[Html]:
    """Versions and protocol as recorded; pinned versions are marked when they differ."""
    rows: list[list[object]] = []
    for name, values in protocol(run).items():
        pinned = PINNED_VERSIONS.get(name.removeprefix("versions."))
        odd = pinned is not None and values != [pinned]
        text = ", ".join("not set" if value == "null" else value for value in values)
        rows.append([name, el("td", f"{text} (published numbers: {pinned})", class_="error") if odd else text])
    identity = [("run", "run_id"), ("fingerprint", "fingerprint"), ("seed", "seed"), ("control", "control")]
    head = [[name, ", ".join(run.values(field)) or "not recorded"] for name, field in identity]
    return [el("h2", "Protocol and versions"), table(["field", "value"], [*head, *rows])]
