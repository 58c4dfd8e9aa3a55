"""What flags name is compared by what it holds: where a file lies does not count, and another content is noticed."""

import dataclasses
import re
import shutil

import pytest

from craft_experiments.cells import Role
from craft_experiments.jobs.evaluate import Evaluate
from craft_experiments.jobs.train import Train
from craft_experiments.records import _NO_SETTINGS, CONTENT, RecordError, check_settings, contents_of
from craft_experiments.settings import RunConfig, resolve
from craft_experiments.tables import table
from experiments.robot.libero.eval_config import EvalConfig
from prismatic.programs.interpolate_weights import InterpolateConfig
from prismatic.programs.measure_retention import MeasureConfig
from prismatic.training.config import FinetuneConfig


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "one" / "data.py"
    path.parent.mkdir()
    path.write_text("register()")
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "start"
    (path / "training_state").mkdir(parents=True)
    (path / "weights").write_bytes(b"12")
    (path / "training_state" / "optimizer").write_bytes(b"3")
    return path


def record(**flags):
    return {"flags": flags, "content": contents_of(flags)}


def agrees(made, **now) -> bool:
    try:
        check_settings("file", made, now)
    except RecordError as error:
        assert str(error).startswith("file was made with other settings: --")
        return False
    return True


def test_a_file_that_moved_is_the_same_and_another_content_is_not(file, tmp_path):
    flags = {"data_set_file": str(file), "seed": "0"}
    made, copy = record(**flags), flags | {"data_set_file": str(shutil.copy(file, tmp_path / "copy.py"))}
    assert agrees(made, **flags) and agrees(made, **copy) and not agrees(made, **flags | {"seed": "1"})
    file.write_text("register(2)")
    assert not agrees(made, **flags) and agrees(made, **copy)
    with pytest.raises(RecordError, match=rf"--data_set_file {file} \(now {file}, another content\)"):
        check_settings("file", made, flags)
    file.unlink()
    assert agrees(made, **flags)  # it can no longer be looked at: its name counts
    assert not agrees(made, seed="0")


def test_a_folder_counts_as_its_files_without_the_training_state(folder, tmp_path):
    flags = {"config_file_path": str(folder)}
    made = record(**flags)
    shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(folder / "training_state")
    assert agrees(made, **flags) and agrees(made, config_file_path=str(tmp_path / "moved"))
    (folder / "weights").write_bytes(b"13")
    assert not agrees(made, **flags)


def test_of_several_places_each_counts(folder, file):
    flags = {"replay_data": f"{folder},{file}"}
    made = record(**flags)
    assert made["content"]["replay_data"].count(",") == 1
    file.write_text("")
    assert not agrees(made, **flags)


def test_a_name_that_is_no_place_is_compared_as_text():
    made = record(config_file_path="tiny-preset", data_set_file="")
    assert made["content"] == {}
    assert agrees(made, config_file_path="tiny-preset", data_set_file="")
    assert not agrees(made, config_file_path="other-preset", data_set_file="")


def test_records_of_earlier_versions_know_names_alone(file):
    flags = {"data_set_file": str(file)}
    made = {"flags": flags}
    file.write_text("another content")
    assert agrees(made, **flags) and not agrees(made, data_set_file="elsewhere.py")


def test_jobs_record_what_their_start_holds(folder, tmp_path):
    s = resolve(RunConfig(config_file_path=str(folder), work_dir=str(tmp_path / "work")), "table1")
    requests = {request.cell.method.role: request for request in table("table1", s.preset, ()).requests}
    trained, start = requests[Role.TRAINED], requests[Role.START]
    of_start = Evaluate(start.cell, start.evaluations[0])
    for job, flag in ((Train(trained.cell), "config_file_path"), (of_start, "pretrained_checkpoint")):
        made = job.facts(s, {"seconds": 1.0}, job.content(s))
        assert made["content"].keys() == {flag} and agrees(made, **job.flags(s))
        (folder / "weights").write_bytes(flag.encode())
        assert not agrees(made, **job.flags(s))


@pytest.mark.parametrize("program", [FinetuneConfig, EvalConfig, MeasureConfig, InterpolateConfig])
def test_every_flag_that_names_a_place_counts_by_content_or_not_at_all(program):
    ends = "_path|_file|_dir|_data|_dataset|_checkpoint|_instructions|_results"
    place = re.compile(rf".*({ends})|checkpoint|start|base|output")
    texts = [field.name for field in dataclasses.fields(program) if "str" in str(field.type)]
    assert [name for name in texts if place.fullmatch(name) and name not in {*CONTENT, *_NO_SETTINGS}] == []
