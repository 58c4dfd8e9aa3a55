"""The HTML report: content, escaping, videos, controls; and the page in a real headless Chromium."""

from __future__ import annotations

import html.parser
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from headless_browser import Browser, find_browser

from experiments.robot.libero.make_report import VideoFinder, VideoShelf, is_mp4, main, make_report
from experiments.robot.libero.report_html import Html, el, histogram, number, table, timeline
from experiments.robot.libero.report_page import query_latencies_ms

ROOT = Path(__file__).parents[2]
EVALUATIONS = ROOT / "results" / "demo" / "evaluations"
NASTY = "<script>console.log('x')</script> & \"put\" <img src=x onerror=alert(1)>"


def record(task_id: int, init_idx: int, status: str, **more) -> dict:
    fields = {"run_id": "r", "fingerprint": "f", "checkpoint": "c@1", "suite": "libero_goal", "control": "none"}
    fields |= {"task_id": task_id, "task_name": f"task_{task_id}", "instruction": f"open drawer {task_id}"}
    fields |= {"init_idx": init_idx, "seed": 7, "status": status, "steps": 100 + init_idx, "n_queries": 13}
    fields |= {"wall_s": 2.0 + init_idx, "render_mode": "lazy", "attempts": 1, "error": None, "video": None}
    return fields | {"versions": {"mujoco": "3.3.0"}} | more


def write(folder: Path, rows: list[dict], facts: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"missing": 0, "config": {"seed": 7}} | (facts or {})))
    return folder


def noise_video(path: Path, seed: int, frames: int = 12) -> str:
    pytest.importorskip("imageio_ffmpeg")
    from experiments.robot.libero.video import write_video

    rng = np.random.default_rng(seed)
    images = [np.full((96, 96, 3), 30 + 12 * i, np.uint8) for i in range(frames)]
    for image in images:
        image[rng.integers(0, 80) :][:12, 20:60] = rng.integers(0, 255, 3)
    write_video(str(path), images, fps=10)
    return str(path)


@pytest.fixture
def evaluation(tmp_path):
    """Two tasks with successes, failures with videos, an error, a strange instruction, a control and latencies."""
    folder = tmp_path / "run"
    videos = [noise_video(folder / "videos" / f"{i}.mp4", i) for i in range(3)]
    rows = [record(0, i, "success", query_latency_s=[0.020, 0.030 + i / 1000, 0.090]) for i in range(11)]
    rows += [record(3, i, "failure", instruction=NASTY, video=videos[i], query_latency_s=[0.025]) for i in range(2)]
    rows += [record(3, 2, "failure", instruction=NASTY, steps=220), record(3, 3, "error", error=f"Boom: {NASTY}")]
    rows += [record(3, 4, "success", instruction=NASTY, video=videos[2])]
    write(folder, rows)
    control = [
        record(t, i, "failure", control="grey_images", instruction=NASTY if t else "open drawer 0")
        for t, n in ((0, 11), (3, 5))
        for i in range(n)
    ]
    return folder, write(tmp_path / "grey", control)


class Outline(html.parser.HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.open, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    assert not found.open
    return found


def test_report_shows_rates_controls_failures_and_escapes_everything(evaluation):
    folder, grey = evaluation
    path = make_report(str(folder), [str(grey)])
    assert path == folder / "report.html"
    text = path.read_text()
    found = outline(text)
    assert found.tags.count("script") == 1 and "img" not in found.tags
    assert not [item for item in found.attributes if item[1].startswith("on")]
    assert "80.0 %" in text and "12 of 15 episodes" in text
    assert "1 episode(s) ended in an error: the run is not valid" in text
    assert "15 pairs: 12 only the policy, 0 only the control" in text
    assert text.index("Errors (1)") < text.index("Video of task 3, initial state 0") < text.index("successful episodes")
    assert text.count("data:video/mp4;base64,") == 3
    assert "Policy, 35 queries: median" in text
    sources = [value for _, name, value in found.attributes if name in ("src", "href")]
    assert sources and all(value.startswith("data:") for value in sources)
    assert path.read_text() == make_report(str(folder), [str(grey)]).read_text()


def test_large_videos_are_linked_relative_and_missing_ones_named(evaluation, tmp_path):
    folder, _ = evaluation
    text = make_report(str(folder), [], tmp_path / "out" / "r.html", limits_mb=(0.0, 0.0)).read_text()
    assert 'href="../run/videos/0.mp4"' in text and "data:video" not in text
    shutil.move(folder / "videos", tmp_path / "moved #1")
    text = make_report(str(folder), [], folder / "r.html").read_text()
    assert "file not found" in text and "No control is shown" in text
    text = make_report(str(folder), [], folder / "r.html", [tmp_path / "moved #1"], (0.0, 1.0)).read_text()
    assert 'href="../moved%20%231/1.mp4"' in text


def test_the_total_limit_goes_to_failures_first(evaluation):
    folder, _ = evaluation
    sizes = [(folder / "videos" / f"{i}.mp4").stat().st_size for i in range(3)]
    limit = (sizes[0] + sizes[1] + 10) / (1 << 20)
    text = make_report(str(folder), [], limits_mb=(1.0, limit)).read_text()
    assert text.count("data:video") == 2 and 'href="videos/2.mp4"' in text


def test_recorded_runs_and_command_line(tmp_path, capsys):
    output = tmp_path / "demo.html"
    controls = f"{EVALUATIONS / 'grey-target'},{EVALUATIONS / 'playback-target'}"
    assert main([str(EVALUATIONS / "plain-target"), "--controls", controls, "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    text = output.read_text()
    outline(text)
    assert "not shown to be above that of: grey images" in text and "data:video" not in text
    videos = str(ROOT / "results" / "demo" / "videos")
    assert main([str(EVALUATIONS / "keep-memory"), "--videos", videos, "--output", str(output)]) == 0
    assert output.read_text().count("data:video") == 1
    capsys.readouterr()
    assert main([str(tmp_path)]) == 2 and "expected a results folder" in capsys.readouterr().err


def test_a_run_with_moved_objects_is_no_blind_control(tmp_path):
    rows = [record(0, i, "success") for i in range(4)]
    folder = write(tmp_path / "a", rows)
    moved = write(tmp_path / "b", rows, {"config": {"init_noise_mm": 20.0}})
    text = make_report(str(folder), [str(moved)]).read_text()
    assert "objects moved 20 mm" in text and "not told apart" in text and "not shown to be above" not in text


def test_controls_named_in_results_are_used_and_missing_ones_said(evaluation, tmp_path):
    folder, grey = evaluation
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    named = [{"control": "grey_images", "results": str(grey)}, {"control": "replay", "results": "gone"}]
    write(folder, rows, {"controls": named, "missing": 2})
    text = make_report(str(folder)).read_text()
    assert "grey images" in text and "Control not found: gone" in text
    assert "2 planned episode(s) have no record" in text


def test_odd_versions_are_marked(tmp_path):
    folder = write(tmp_path / "a", [record(0, 0, "success", versions={"mujoco": "3.9.0"})])
    assert "3.9.0 (published numbers: 3.3.0)" in make_report(str(folder)).read_text()


def test_a_run_of_errors_only_and_of_several_suites(tmp_path):
    errors = write(tmp_path / "a", [record(0, 0, "error", error="gone")])
    text = make_report(str(errors)).read_text()
    assert "no finished episode" in text
    other = write(tmp_path / "b", [record(1, 0, "success", suite="libero_object")])
    text = make_report(f"{errors},{other}").read_text()
    assert "libero_goal, libero_object" in text and '<th scope="row">all</th>' in text
    outline(text)


def test_latency_is_taken_from_the_field_the_runner_writes():
    assert query_latencies_ms({"query_latency_s": [0.5, 0.001]}) == [500.0, 1.0]
    assert query_latencies_ms({"query_latency_s": []}) == query_latencies_ms({}) == []


def test_building_blocks():
    assert el("p", "a<b", Html("<b></b>"), None, class_="x", hidden=True, id=None) == (
        '<p class="x" hidden>a&lt;b<b></b></p>'
    )
    assert 'data-value="-1"' in number(None)
    assert '<th scope="col" class="num">' in table(["a", "b"], [["x", number(1)]])
    outline(timeline([(0.0, 0.0)], "t", "s") + histogram([0.0], "t", "s"))


def test_videos_are_found_where_recorded_then_above_then_by_name(tmp_path):
    for name in ("a/x.mp4", "b/x.mp4", "run/v/x.mp4", "run/secret.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    assert VideoFinder([tmp_path / "b"]).find(str(tmp_path / "b" / "x.mp4")) == tmp_path / "b" / "x.mp4"
    assert VideoFinder([tmp_path / "b"]).find(str(tmp_path / "run" / "v" / "x.mp4")) == tmp_path / "b" / "x.mp4"
    assert VideoFinder([tmp_path / "empty"]).find(str(tmp_path / "b" / "x.mp4")) is None
    assert VideoFinder([tmp_path / "a"]).find("run/v/x.mp4") == tmp_path / "run" / "v" / "x.mp4"
    assert VideoFinder([tmp_path / "a", tmp_path / "b"]).find("elsewhere/x.mp4") == tmp_path / "a" / "x.mp4"
    assert VideoFinder([tmp_path]).find("elsewhere/y.mp4") is None
    assert VideoFinder([tmp_path]).find(str(tmp_path / "run" / "secret.txt")) is None


def box(kind: bytes, content: bytes = b"") -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


MP4 = box(b"ftyp", b"isom\0\0\0\0") + box(b"moov", b"x") + box(b"mdat", b"frames")
SECRET = b"-----BEGIN PRIVATE KEY-----"


@pytest.mark.parametrize(
    "content",
    [b"", SECRET, MP4[8:] + SECRET, MP4[:16] + SECRET, MP4 + SECRET, box(b"ftyp", b"isom"), b"\0\0\0\x08ftyp" + SECRET],
)
def test_only_what_is_an_mp4_file_goes_into_a_report(tmp_path, content):
    folder = write(tmp_path / "run", [record(0, 0, "failure", video="v.mp4")])
    (folder / "v.mp4").write_bytes(MP4)
    assert is_mp4(folder / "v.mp4") and "data:video/mp4" in make_report(str(folder)).read_text()
    (folder / "v.mp4").write_bytes(content)
    for limits in ((3.0, 40.0), (0.0, 0.0)):  # to embed, to link
        text = make_report(str(folder), limits_mb=limits).read_text()
        assert "v.mp4 is no MP4 file" in text and "data:video" not in text and "<a" not in text


@pytest.mark.parametrize(
    "name", ["v.mp4", "videos/v.mp4", "{absolute}/v.mp4", "../outside/v.mp4", "{outside}/../run/v.mp4"]
)
@pytest.mark.parametrize("target", ["key.pem", "film.mp4"])
def test_links_and_dots_do_not_lead_out_of_the_folder(tmp_path, monkeypatch, name, target):
    outside, folder = tmp_path / "outside", write(tmp_path / "run", [])
    outside.mkdir()
    (outside / target).write_bytes(MP4 if target == "film.mp4" else SECRET)
    (folder / "v.mp4").symlink_to(outside / target)
    (folder / "videos").symlink_to(outside)
    (outside / "v.mp4").symlink_to(target)
    monkeypatch.chdir(folder)
    write(folder, [record(0, 0, "failure", video=name.format(absolute=folder, outside=outside))])
    assert VideoShelf(folder, [folder], 1e6, 1e6).place(name.format(absolute=folder, outside=outside)).embedded is None
    text = make_report(str(folder)).read_text()
    assert "data:video" not in text and "<a" not in text


def test_a_link_within_the_folder_is_followed(tmp_path):
    folder = write(tmp_path / "run", [record(0, 0, "failure", video="v.mp4")])
    (folder / "real.mp4").write_bytes(MP4)
    (folder / "v.mp4").symlink_to("real.mp4")
    assert "data:video/mp4" in make_report(str(folder)).read_text()


def test_no_text_field_can_bring_markup_into_the_page(tmp_path):
    texts = ("run_id", "fingerprint", "checkpoint", "suite", "instruction", "error", "render_mode", "video")
    rows = []
    for i, status in enumerate(("success", "failure", "error")):
        rows.append(record(0, i, status, versions={NASTY: NASTY}, **dict.fromkeys(texts, f"{NASTY}{i}")))
    facts = {"config": {NASTY: NASTY}, "controls": [{"results": NASTY}]}
    found = outline(make_report(str(write(tmp_path / "a", rows, facts))).read_text())
    assert found.tags.count("script") == 1 and "img" not in found.tags
    assert not [item for item in found.attributes if item[1].startswith("on")]


COLUMN = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[%d].textContent)"
DECODED = (
    "Promise.all([...document.querySelectorAll('.cards video')].map(v => new Promise(done => {"
    " const tell = () => done(v.error ? v.error.message : v.videoWidth);"
    " v.readyState >= 1 || v.error ? tell() : (v.onloadedmetadata = v.onerror = tell); v.load(); })))"
)


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH and CRAFT_TEST_BROWSER is not set")
def test_page_in_a_real_browser(evaluation, tmp_path):
    folder, grey = evaluation
    path = make_report(str(folder), [str(grey)])
    with Browser(find_browser(), tmp_path / "profile") as browser:
        browser.open(path)
        assert browser.evaluate("document.title") == "LIBERO evaluation: libero_goal"
        browser.screenshot(tmp_path / "light.png")
        assert (tmp_path / "light.png").stat().st_size > 20_000
        assert browser.evaluate("document.querySelectorAll('script').length") == 1
        assert browser.evaluate(
            "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 5)"
        )

        press = "document.querySelectorAll('table.sortable thead button')[%d].click()"
        browser.evaluate(press % 3)  # steps
        steps = [int(text) for text in browser.evaluate(COLUMN % 3)]
        assert steps == sorted(steps) and len(steps) == 16
        browser.evaluate(press % 3)
        assert [int(text) for text in browser.evaluate(COLUMN % 3)] == sorted(steps, reverse=True)
        sorted_heads = browser.evaluate("document.querySelectorAll('th[aria-sort=descending]').length")
        assert sorted_heads == 1

        decoded = browser.evaluate(DECODED)
        assert decoded == [96, 96, 96]

        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        browser.screenshot(tmp_path / "dark.png")
        browser.call("Emulation.setEmulatedMedia", media="print", features=[])
        assert browser.evaluate("getComputedStyle(document.querySelector('.tall')).overflowY") == "visible"
        browser.call("Emulation.setEmulatedMedia", media="screen")
        browser.screenshot(tmp_path / "narrow.png", width=390)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390

        assert browser.complaints() == []
        assert browser.requests() == [path.resolve().as_uri()]


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH and CRAFT_TEST_BROWSER is not set")
def test_page_without_scripts(evaluation, tmp_path):
    path = make_report(str(evaluation[0]), [])
    with Browser(find_browser(), tmp_path / "profile") as browser:
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(path)
        count = "document.querySelectorAll('table.sortable %s').length"
        assert browser.evaluate(count % "tbody tr") == 16 and browser.evaluate(count % "button") == 0
        assert browser.requests() == [path.resolve().as_uri()]
