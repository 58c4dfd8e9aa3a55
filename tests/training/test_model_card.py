"""The model card: front matter as the hub reads it, what the folder records, foreign texts as texts, hashes kept."""

import json
import math
import re
import shutil
from pathlib import Path

import micro
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from published_fixtures import make_published_folder

from craft_experiments.records import contents_of
from experiments.robot.libero.eval_fingerprint import checkpoint_fingerprint
from prismatic.command_line import parse
from prismatic.evidence.cells import markdown_block, markdown_code, one_line, table_row
from prismatic.evidence.files import write_json
from prismatic.models.presets import PRESETS
from prismatic.programs.merge_lora_weights_and_save import MergeConfig, merge
from prismatic.programs.model_card import main
from prismatic.training.checkpoint_folder import CARD, LISTING, MANIFEST, check_files
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.model_card import END, card_text, write_card
from prismatic.training.shortest_command import shortest_command

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "pretrained_models" / "tiny-libero-object"
EVIL = '`` | </td><script>alert(1)</script> ![x](http://t) [y](javascript:z)\n---\nlicense: mit\n# H it\'s "q": <!-- '


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint with everything but real weights."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in SHIPPED.iterdir():
        if file.name not in ("training_metrics.jsonl", CARD):
            shutil.copy(file, copy)
    return copy


def front(text: str) -> dict:
    head = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(head[1])


def tables(text: str) -> list[list[list[str]]]:
    """Cells of the tables, as a reader of Markdown sees them."""
    found, tokens = [], MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
    for number, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(part.content for part in tokens[number + 1].children))
    return found


def results(folder: Path, checkpoint: Path, outcomes: dict, **fields) -> Path:
    """A results folder; outcomes: {(suite, task): "ssfe"}."""
    folder.mkdir()
    rows = [
        {"suite": suite, "task_id": task, "init_idx": number, "seed": 7, "control": "none"}
        | {"status": {"s": "success", "f": "failure", "e": "error"}[letter]}
        | {"checkpoint_hash": checkpoint_fingerprint(str(checkpoint))}
        | fields
        for (suite, task), letters in outcomes.items()
        for number, letter in enumerate(letters)
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "results.json", {"missing": 2})
    return folder


def test_every_checkpoint_of_a_run_has_a_card_with_drift_and_verdict(make_trainer, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    flags = {"use_craft": True, "craft_preset": "budget", "craft_retention_budget": 1e-9, "save_freq": 2}
    trainer = make_trainer("run", max_steps=4, learning_rate=1e-2, **flags)
    trainer.fit()
    for step in (2, 4):
        folder = trainer.setup.run_dir.parent / f"run--{step}_chkpt"
        text = (folder / CARD).read_text()
        assert text.startswith("---\n") and f"| optimizer steps | {step} of 4 |" in text
        assert front(text)["license"] == "unknown" and front(text)["datasets"] == ["libero_mini_no_noops"]
        assert check_files(folder, training_state=True)
        assert CARD not in json.loads((folder / LISTING).read_text())["files"]
    method = dict(tables(text)[1][1:])
    record = json.loads((folder / MANIFEST).read_text())["craft"]
    assert method["achieved drift"].startswith(f"{record['achieved_drift']:.4g},") and record["achieved_drift"] > 0
    assert method["budget"] == f"1e-09 ({trainer.retention.unit})" and method["verdict"] == "exceeded"
    assert method["trained weights"] == "full" and method["preset"] == "budget"
    words = re.search(r"```bash\n(craft-finetune .*)\n```", text)[1].split()
    assert parse(FinetuneConfig, words[1:]).to_dict() == trainer.cfg.to_dict()


def test_a_plain_run_has_no_drift(folder):
    text = write_card(folder).read_text()
    assert "drift" not in text and "| method | `none` |" in text and "None is recorded here" in text


def test_the_hub_reads_the_front_matter(folder):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(write_card(folder))
    assert card.data.license == "unknown" and card.data.library_name == "craft-vla"
    assert card.data.datasets == ["libero_object_scripted_no_noops"] and "vla" in card.data.tags
    assert card.data.base_model is None and card.data.pipeline_tag == "robotics"


@pytest.mark.parametrize(("path", "expected"), [
    ("/home/x/hub/models--openvla--openvla-7b/snapshots/31f090d05236101ebfc381b6", "openvla/openvla-7b"),
    ("C:\\hub\\models--a--b.c\\snapshots\\1", "a/b.c"),
    ("/home/x/openvla--openvla-7b", None),
])  # fmt: skip
def test_a_base_model_is_named_when_its_place_says_which_one_it_is(path, expected):
    text = card_text({"start": {"path": path}}, {})
    assert front(text).get("base_model") == expected


def test_the_table_is_that_of_the_records(folder, tmp_path, capsys):
    first = results(tmp_path / "new", folder, {("libero_spatial", 9): "sssff", ("libero_spatial", 3): "fe"})
    second = results(
        tmp_path / "old", folder, {("libero_object", 0): "ssss", ("libero_goal", 1): "f"}, control="grey_images"
    )
    main([str(folder), "--results", str(first), str(second)])
    assert capsys.readouterr().out == f"{folder / CARD}\n"
    text = (folder / CARD).read_text()
    head, *rows = tables(text)[2]
    assert head == ["evaluation", "suite", "tasks", "successes", "trials", "rate", "95 % interval"]
    assert [row[:6] for row in rows] == [
        ["new", "libero_spatial", "2", "3", "6", "50.0 %"],
        ["old, control grey_images", "libero_goal", "1", "0", "1", "0.0 %"],
        ["old, control grey_images", "libero_object", "1", "4", "4", "100.0 %"],
    ]
    # Wilson's interval of 3 of 6, of 0 of 1 and of 4 of 4, from its formula.
    z = 1.959963984540054
    for row in rows:
        k, n = int(row[3]), int(row[4])
        centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
        assert row[6] == f"{100 * (centre - half) + 0:.1f} to {100 * (centre + half):.1f} %"
    assert (
        "`new`: episodes that ended in an error, which are no trials: 1." in text
        and "`old`: planned episodes that are missing: 2." in text
    )
    assert "could not be checked" not in text


def test_a_card_changes_no_hash(folder):
    """The fingerprint of an evaluation, and that of a start in a table's record."""
    hashes = lambda: (checkpoint_fingerprint(str(folder)), contents_of({"config_file_path": str(folder)}))  # noqa: E731
    before = hashes()
    write_card(folder)
    assert hashes() == before
    (folder / CARD).write_text("mine")
    assert hashes() == before
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / CARD).write_text("PEFT's")  # always counted
    assert checkpoint_fingerprint(str(folder)) != before[0]


def test_in_a_published_folder_a_readme_counts_as_before(folder):
    (folder / MANIFEST).unlink()
    before = checkpoint_fingerprint(str(folder)), contents_of({"config_file_path": str(folder)})
    (folder / CARD).write_text("theirs")
    assert checkpoint_fingerprint(str(folder)) != before[0]
    assert contents_of({"config_file_path": str(folder)}) != before[1]


def test_what_the_owner_wrote_stays(folder):
    card = write_card(folder)
    text = card.read_text().replace(
        "license: unknown", "license: other\nlicense_name: ours\nbase_model: a/b\ntags: [x]"
    )
    card.write_text(text.replace("# Vision", "# Mine: Vision") + "\n## Notes\n\nSee you.\n")
    once = write_card(folder).read_text()
    assert write_card(folder).read_text() == once
    assert front(once) | {"license": "other", "license_name": "ours", "base_model": "a/b"} == front(once)
    assert "vla" in front(once)["tags"] and "# Mine" not in once and once.endswith(f"{END}\n\n## Notes\n\nSee you.\n")


@pytest.mark.parametrize(
    "damaged",
    ["---\nlicense: [\n---\n", "---\n- 1\n---\n", "---\nlicense: {a: 1}\n---\n", "\0", "", "---\n&a [*a]\n---\n"],
)
def test_a_damaged_card_is_replaced(folder, damaged):
    (folder / CARD).write_text(damaged)
    assert front(write_card(folder).read_text())["license"] == "unknown"
    (folder / CARD).write_bytes(b"\xff\xfe")
    assert front(write_card(folder).read_text())["license"] == "unknown"


# ---------------------------------------------------------------------------------------------------- mistakes


def code_and_line(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_results_of_other_weights_are_refused(folder, tmp_path, capsys):
    place = results(tmp_path / "r", folder, {("libero_spatial", 9): "s"}, checkpoint_hash="0123456789abcdef")
    write_card(folder)
    before = (folder / CARD).read_text()
    said = code_and_line(capsys, folder, "--results", place)
    assert "0123456789abcdef" in said and checkpoint_fingerprint(str(folder)) in said
    assert (folder / CARD).read_text() == before


def test_what_cannot_be_compared_is_said(folder, tmp_path):
    place = results(tmp_path / "r", folder, {("libero_spatial", 9): "s"}, checkpoint_hash="0123456789abcdef")
    write_json(folder / LISTING, {"files": {"training_state/state.json": {"size": 1, "sha256": ""}}})
    main([str(folder), "--results", str(place)])
    assert "whether the records are of these weights could not be checked" in (folder / CARD).read_text()


def test_folders_may_be_separated_by_commas_and_the_use_names_the_new_tasks_statistics(folder, tmp_path):
    statistics, manifest = (json.loads((folder / name).read_text()) for name in ("dataset_statistics.json", MANIFEST))
    trained = manifest["training"]["dataset_name"]
    write_json(folder / "dataset_statistics.json", {"a_start": statistics[trained]} | statistics)
    places = [results(tmp_path / name, folder, {("libero_spatial", 9): "s"}) for name in ("a", "b")]
    main([str(folder), "--results", ",".join(map(str, places))])
    text = (folder / CARD).read_text()
    assert [row[0] for row in tables(text)[2][1:]] == ["a", "b"] and f"unnorm_key='{trained}'" in text.replace('"', "'")
    write_json(folder / MANIFEST, manifest | {"conventions": {trained: {"libero": False, "control_hz": None}}})
    main([str(folder)])
    assert "1 is open" not in (folder / CARD).read_text().split("`a_start`")[-1]


def test_other_mistakes_are_one_line(folder, tmp_path, capsys):
    assert "no/such" in code_and_line(capsys, "no/such")
    assert "episodes.jsonl" in code_and_line(capsys, folder, "--results", tmp_path / "none")
    (folder / "dataset_statistics.json").write_text("[")
    assert "dataset_statistics.json" in code_and_line(capsys, folder)
    (folder / MANIFEST).unlink()
    (folder / "action_head--3_checkpoint.pt").write_bytes(b"1")
    assert "published folder" in code_and_line(capsys, folder)


# ------------------------------------------------------------------------------------------- what others wrote


def markup(text: str) -> set[str]:
    """Kinds of tokens that a foreign text must not make."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(text)
    tokens += [child for token in tokens for child in token.children or ()]
    return {token.type for token in tokens} & {"link_open", "image", "html_inline", "html_block"}


evil = st.text() | st.just(EVIL) | st.text("`|\\<>[]()!#-_*\n\t &;:~\x1b\u2028", max_size=12)


@given(evil)
@example("a ` [y](z) <b> | `` | ` b")
def test_a_foreign_text_is_code_wherever_it_stands(text):
    shown = one_line(text) if one_line(text).strip() else None  # blanks alone may be stripped
    row = f"| a | b |\n|---|---|\n{table_row([markdown_code(text), 'end'])}\n"
    for page in (f"- {markdown_code(text)}\n", row):
        spans = [t for t in MarkdownIt("commonmark").enable("table").parse(page) if t.type == "inline"]
        [code] = spans[-2 if page is row else 0].children
        assert code.type == "code_inline" and shown in (None, code.content)
    assert [t.content for t in spans][-1] == "end" and len(spans) == 4
    block, end = [t for t in MarkdownIt("commonmark").parse(markdown_block(text) + "\n\nend\n") if t.content]
    assert block.type == "fence" and end.content == "end" or not text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | evil,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(evil, inner, max_size=2),
    max_leaves=4,
)
NAMES = ("step", "samples_seen", "tuning", "start", "action_spec", "num_images", "use_proprio", "cameras", "datasets")
NAMES += ("instructions", "craft", "training", "versions", "interpolation", "merge")
INNER = (
    "path",
    "achieved_drift",
    "unit",
    "verdict",
    "landing",
    "scale",
    "drift",
    "adapter_scale",
    "parts",
    "chunk_len",
)
INNER += ("action_dim", "dataset_name", "retention_method", "craft_preset", "replay_data", "lora_rank", "use_lora")
entries = st.dictionaries(st.sampled_from(INNER) | evil, values, max_size=4)


@given(
    manifest=st.dictionaries(st.sampled_from(NAMES), values | entries, max_size=8),
    statistics=st.dictionaries(evil, values | st.just({"num_trajectories": 3}), max_size=3),
)
def test_whatever_a_folder_records_the_card_has_its_form(manifest, statistics):
    text = card_text(manifest, statistics)
    head = front(text)
    assert head["license"] == "unknown" and set(head) <= {
        "license",
        "library_name",
        "pipeline_tag",
        "tags",
        "datasets",
        "base_model",
    }
    assert len(head["datasets"]) == len({*head["datasets"]}) or len(statistics) > 1
    assert markup(text.partition("\n---\n")[2].replace(END, "")) == set()
    sections = [
        t.content for t in MarkdownIt().parse(text.partition("\n---\n")[2]) if t.type == "inline" and t.level == 1
    ]
    assert [s for s in sections if s in ("Use", "Actions", "Data", "Method", "Evaluation", "Reproduce")] == [
        "Use", "Actions", "Data", "Method", "Evaluation", "Reproduce"
    ]  # fmt: skip


def test_evil_names_reach_no_yaml_and_no_python(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"instructions": {EVIL: [EVIL]}, "datasets": {EVIL: None}, "cameras": {EVIL: [EVIL, '"); import os']}}
    text = card_text(manifest, {EVIL: {}, "b": {}})
    assert front(text)["license"] == "unknown" and front(text)["datasets"] == sorted([one_line(EVIL), "b"])
    write_json(folder / MANIFEST, manifest | {"instructions": {"a": ["half a pair: \ud800"]}})
    assert "half a pair: ?" in write_card(folder).read_text(encoding="utf-8")
    code = re.search(r"(`{3,})python\n(.*?)\n\1", text, re.DOTALL)[2]
    names = [node for node in compile(code, "card", "exec").co_names]
    assert "os" not in names and "craft_vla" in names


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": 0.04},
        {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": math.inf, "craft_memory": "batch"},
        {"use_lora": True, "lora_rank": 4, "dataset_name": "libero_a, libero_b:2", "resume": "auto"},
        {"retention_method": "l2sp", "lr_schedule": "multistep", "lr_decay_steps": "3,4", "max_grad_norm": 1.0},
        {"run_root_dir": "--odd", "gradient_checkpointing": "llm,head"},
    ],
)
def test_the_shortest_command_resolves_to_the_same_flags(flags):
    cfg = FinetuneConfig(**flags)
    words, resolves = shortest_command(json.loads(json.dumps(cfg.to_dict())))
    assert resolves and words[0] == "craft-finetune"
    assert parse(FinetuneConfig, words[1:]).to_dict() == cfg.to_dict()
    assert {word[2:].partition("=")[0] for word in words if word.startswith("--")} == {*flags}


def test_flags_of_another_version_are_given_as_recorded():
    words, resolves = shortest_command({"seed": 3, "lora_rank": 32, "gone": 1})
    assert not resolves and words == ["craft-finetune", "--seed", "3", "--lora_rank", "32"]


def test_interpolated_and_merged_folders_have_cards_of_their_own(folder, tmp_path):
    from prismatic.training.interpolation import save_policy

    loaded = load_checkpoint(folder)
    loaded.manifest["interpolation"] = {"adapter_scale": 0.5, "parts": "all"}
    text = (save_policy(loaded, tmp_path / "half") / CARD).read_text()
    assert "| interpolated | 0.5 of the way from the start to the trained weights (`all`)" in text


def test_a_merged_folder_needs_no_base_and_keeps_its_licence(make_trainer, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    base = make_trainer("base", max_steps=1)
    base.fit()
    start = base.setup.run_dir.parent / "base--1_chkpt"
    trainer = make_trainer("lora", max_steps=1, use_lora=True, lora_rank=4, config_file_path=str(start))
    trainer.fit()
    folder = trainer.setup.run_dir.parent / "lora--1_chkpt"
    text = (folder / CARD).read_text()
    assert 'base="START_FOLDER"' in text and "| trained weights | `lora` |" in text and "| LoRA rank | 4 |" in text
    (folder / CARD).write_text(text.replace("license: unknown", "license: mit"))
    merge(MergeConfig(lora_finetuned_checkpoint_dir=str(folder)))
    text = (folder / CARD).read_text()
    assert "START_FOLDER" not in text and front(text)["license"] == "mit" and check_files(folder)


def test_an_export_has_a_card_of_its_own_that_keeps_hash_and_licence(make_trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prismatic.training.setup.check_exportable", lambda model: None)  # towers of another size
    start = make_published_folder(tmp_path / "start")
    flags = {"use_lora": True, "lora_rank": 4, "config_file_path": str(start), "export_published_layout": True}
    trainer = make_trainer("run", max_steps=1, save_latest_checkpoint_only=True, **flags)
    trainer.fit()
    export = trainer.setup.run_dir.with_name("run--published")
    assert not [path for path in export.rglob("*") if path.is_dir() or path.name.startswith(".")]
    assert {path.suffix for path in export.iterdir()} == {".json", ".md", ".pt", ".safetensors"}
    text = (export / CARD).read_text()
    assert "START_FOLDER" not in text and "layout of published VLA-Adapter checkpoints" in text
    before = checkpoint_fingerprint(str(export)), contents_of({"config_file_path": str(export)})
    (export / CARD).write_text(text.replace("license: unknown", "license: mit") + "\n## Notes\n")
    place = results(tmp_path / "new", export, {("libero_spatial", 9): "ssf"})
    main([str(export), "--results", str(place)])
    assert tables((export / CARD).read_text())[2][1][:6] == ["new", "libero_spatial", "1", "2", "3", "66.7 %"]
    assert (checkpoint_fingerprint(str(export)), contents_of({"config_file_path": str(export)})) == before
    trainer.save()
    recorded = json.loads((trainer.setup.run_dir / MANIFEST).read_text())
    assert recorded["conventions"] == {name: {"libero": True, "control_hz": 20.0} for name in recorded["cameras"]}
    for folder in (export, trainer.setup.run_dir):
        kept = (folder / CARD).read_text()
        assert front(kept)["license"] == ("mit" if folder == export else "unknown")
    assert (export / CARD).read_text().endswith(f"{END}\n\n## Notes\n")
    alone = shutil.copytree(export, tmp_path / "alone--published")
    capsys.readouterr()
    assert "its export NAME--published beside it" in code_and_line(capsys, alone)
