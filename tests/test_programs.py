"""Every program: `--help` exits with 0, most without torch, and a mistake is one line, exit code 2 and nothing written.

The programs are found: every file that can be run, and the entry points. They run in forks of one process each for what
they may import, so that nothing is imported twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
ROOMS = ("prismatic", "experiments", "craft_experiments", "vla-scripts", "benchmarks", "examples")
NO_PROGRAMS = {
    "benchmarks/tfdata_pipeline.py": "a part of data_loading.py, which starts it with a Python that has TensorFlow",
    "examples/async_client.py": "to be read; it runs where `openpi-client` is",
}
"""Files that can be run and are not looked at -> why."""
BY_PATH_TOO = ("experiments/robot/libero/run_libero_eval.py", "craft_experiments/common_utils/log_parser.py")
"""Modules that the documentation also starts by their path."""
DEMO, BUDGET, CONTROLLER, LANGUAGE = (
    f"craft_experiments/{name}" for name in ("00_demo", "04_budget", "05_controller", "07_language")
)
MISTAKES = {
    "experiments.robot.libero.run_libero_eval": ["--pretrained_checkpoint", "no/such"],
    "experiments.robot.libero.collect_demos": ["--task_suite_name", "libero_object"],
    "experiments.robot.libero.compare_evals": ["no", "such"],
    "experiments.robot.libero.make_report": ["no/such"],
    "experiments.robot.libero.merge_shards": ["no/such", "--output", "out"],
    "experiments.robot.libero.suites": ["libero_object"],
    "experiments.robot.doctor": ["--data", "no/such"],
    "experiments.robot.doctor.render_reference": ["now"],
    "experiments.robot.serve": ["--pretrained_checkpoint", "no/such"],
    "experiments.robot.serve_vla_eval": [],
    "prismatic.vla.datasets.inspect": ["no/such"],
    "prismatic.models.tiny_tokenizer": ["now"],
    "prismatic.training.memory": ["--config", "no/such"],
    "prismatic.programs.finetune": ["--lora_rank", "8"],
    "prismatic.programs.merge_lora_weights_and_save": ["--lora_finetuned_checkpoint_dir", "no/such"],
    "prismatic.programs.interpolate_weights": ["--checkpoint", "no/such", "--output", "out"],
    "prismatic.programs.model_card": ["no/such"],
    "prismatic.programs.watch": ["no/such"],
    "prismatic.programs.measure_retention": [
        *("--checkpoint", "no/such", "--start", "no/such", "--dataset_name", "x", "--output", "out.json")
    ],
    "craft_experiments": ["run", "table9"],
    "craft_experiments.paired_seeds": ["--seeds", "1"],
    "craft_experiments.table_flags": ["now"],
    "craft_experiments.common_utils.log_parser": ["rate", "no/such"],
    f"{DEMO}/run_demo.py": ["--rows", "kept"],
    f"{DEMO}/make_report.py": ["no/such"],
    f"{DEMO}/compare_records.py": ["no/such"],
    f"{BUDGET}/run_budget.py": ["--budgets", "0.01,nan"],
    f"{BUDGET}/make_report.py": ["no/such"],
    f"{CONTROLLER}/run_controller.py": ["--lambdas", "inf"],
    f"{CONTROLLER}/make_report.py": ["no/such"],
    f"{LANGUAGE}/run_language.py": ["--rows", "frozzen"],
    f"{LANGUAGE}/measure_language.py": ["--tokens", "1"],
    f"{LANGUAGE}/make_report.py": ["no/such"],
    "benchmarks/bf16_curves.py": ["--sizes", "huge"],
    "benchmarks/craft_overhead.py": ["--rows", "plain,fast"],
    "benchmarks/data_loading.py": ["--data_root", "no/such"],
    "benchmarks/episode_sources.py": ["--side", "65"],
    "benchmarks/eval_throughput.py": ["--checkpoint", "no/such"],
    "benchmarks/full_size.py": ["--steps", "0"],
    "benchmarks/gpu_check.py": ["--parts", "speed"],
    "benchmarks/inference.py": ["--rounds", "0"],
    "benchmarks/memory_table.py": ["--rows", "fast"],
    "benchmarks/real_files.py": ["compare", "no/such"],
    "benchmarks/serving_load.py": ["--clients", "0"],
    "benchmarks/synthetic_data.py": ["--shards", "0"],
    "benchmarks/train_step.py": ["--tuning", "half"],
    "examples/make_own_data.py": ["."],
    "examples/notebooks.py": ["--output_dir", "/dev/null/no"],
    "examples/own_data.py": ["no/such"],
}
"""Program -> a command line that cannot be used."""
HELP_LOADS_TORCH = {
    "prismatic.models.tiny_tokenizer",
    "prismatic.programs.merge_lora_weights_and_save",
    "prismatic.programs.interpolate_weights",
    "prismatic.programs.measure_retention",
    *(f"benchmarks/{name}.py" for name in ("bf16_curves", "craft_overhead", "full_size", "gpu_check")),
    *(f"benchmarks/{name}.py" for name in ("inference", "memory_table", "train_step")),
}
HELP, UNKNOWN = ["--help"], ["--no_such_flag", "1"]
SIMULATOR = {"mujoco", "robosuite", "libero", "bddl", "imageio_ffmpeg", "OpenGL", "vla_eval"}
TORCH = {"torch", "transformers"}
Job = tuple[str, list[str]]
LARGE = ["prismatic.training.setup"]
"""Imports torch and most of what the programs share; before the forks, once."""

# Runs [program, words, folder] in a fork each. A module runs as with `-m`, `module:function` as an entry point does.
FORKS = """
import atexit, importlib, json, os, runpy, sys, traceback
jobs, blocked, loaded = json.loads(sys.stdin.read())
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
for name in loaded:
    importlib.import_module(name)

def run(program, words):
    sys.argv = [program, *words]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    elif ":" in program:
        module, _, function = program.partition(":")
        sys.exit(getattr(importlib.import_module(module), function)())
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)

def code_of(program, words):
    try:
        run(program, words)
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    return 1

codes = []
for program, words, folder in jobs:
    child = os.fork()
    if not child:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT), number)
        code = code_of(program, words)
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def programs() -> list[str]:
    """Modules, files outside packages, and entry points as `module:function`."""
    files = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    names = [path.relative_to(ROOT).as_posix() for path in files if _can_be_run(path)]
    return [_module(name) or name for name in names if name not in NO_PROGRAMS] + [*BY_PATH_TOO, *entry_points()]


def _can_be_run(path: Path) -> bool:
    return path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def _module(file: str) -> str | None:
    """The module of a file; None outside packages."""
    if not (ROOT / file).with_name("__init__.py").exists():
        return None
    return file.removesuffix(".py").removesuffix("/__main__").replace("/", ".")


def entry_points() -> list[str]:
    if sys.version_info < (3, 11):
        return []
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"].values())


def named(program: str) -> str:
    """The program's name in MISTAKES: fronts and entry points share that of the module behind them."""
    if program.startswith("vla-scripts/"):
        return "prismatic.programs." + Path(program).stem
    if ":" in program:
        return program.partition(":")[0].removesuffix(".__main__")
    return (_module(program) if program.endswith(".py") else None) or program


def run(jobs: list[Job], blocked: Iterable[str], loaded: list[str], folder: Path) -> list[tuple]:
    """(code, stdout, stderr, names of files that were left) of each job, run in an empty folder of its own."""
    folders = [folder / str(number) for number in range(len(jobs))]
    for each in folders:
        each.mkdir(parents=True)
    paths = [str(ROOT / program) if program.endswith(".py") else program for program, _ in jobs]
    content = [(path, words, str(each)) for path, (_, words), each in zip(paths, jobs, folders, strict=True)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        input=json.dumps([content, sorted(blocked), loaded]),
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    said = [[Path(f"{each}.{name}").read_text(encoding="utf-8") for name in ("out", "err")] for each in folders]
    left = [[path.name for path in each.iterdir()] for each in folders]
    return list(zip(json.loads(done.stdout), *zip(*said, strict=True), left, strict=True))


def test_every_program_is_found_and_has_a_mistake_to_make():
    found = programs()
    assert len(found) == len(set(found)) and {named(program) for program in found} == set(MISTAKES)
    assert all((ROOT / name).is_file() for name in NO_PROGRAMS) and set(MISTAKES) >= HELP_LOADS_TORCH


def faults(jobs: list[Job], blocked: Iterable[str], loaded: list[str], folder: Path) -> list[tuple]:
    """The jobs that did not end as they must, with what they did."""
    ended = zip(jobs, run(jobs, blocked, loaded, folder), strict=True)
    return [(*job, *outcome) for job, outcome in ended if not _is_right(job, outcome)]


def _is_right(job: Job, outcome: tuple[int, str, str, list[str]]) -> bool:
    (program, words), (code, out, err, left) = job, outcome
    if words == HELP:
        return (code, err, left) == (0, "", []) and len(out) > 50
    is_named = UNKNOWN[0] not in words or "no_such_flag" in err or "serve_vla_eval" in program  # which has no package
    return (code, out, left) == (2, "", []) and err.count("\n") == 1 and "error: " in err and is_named


@pytest.mark.slow
def test_help_exits_with_0_without_simulator_and_torch(tmp_path):
    jobs = [(program, HELP) for program in programs() if named(program) not in HELP_LOADS_TORCH]
    assert faults(jobs, SIMULATOR | TORCH, ["numpy"], tmp_path) == []


@pytest.mark.slow
def test_a_mistake_is_one_line_and_code_2_and_an_unknown_flag_is_named(tmp_path):
    jobs = [(program, [*MISTAKES[named(program)], *UNKNOWN]) for program in programs()]
    jobs += MISTAKES.items()  # of fronts and entry points the flag will do: the rest is the module's
    jobs += [(program, HELP) for program in programs() if named(program) in HELP_LOADS_TORCH]
    assert faults(jobs, SIMULATOR, LARGE, tmp_path) == []
