"""Every call of a library's loader says what it trusts: no code, no pickle, nothing from the network.

The calls are found in the sources, under whatever name a module was imported, so that a new one cannot forget it.
"""

import ast
import builtins
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("prismatic", "experiments", "craft_experiments", "vla-scripts", "benchmarks", "examples")
OUR_MODULES = ("prismatic", "experiments", "craft_experiments", "benchmarks")
ANY = object()
# What a setting has to be in any call that states it.
SETTINGS = {
    "trust_remote_code": False,
    "local_files_only": True,
    "use_kernels": False,
    "use_safetensors": True,
    "weights_only": True,
    "allow_pickle": False,
    "shell": False,
}
# Functions by their full names: what each call states.
FUNCTIONS = {
    "torch.load": {"weights_only": True},
    "numpy.load": {"allow_pickle": False},
    "numpy.lib.format.read_array": {"allow_pickle": False},
    "av.open": {"options": {"protocol_whitelist": "file"}},
    "PIL.Image.open": {"formats": ANY},
    "pyarrow.parquet.ParquetFile": {"page_checksum_verification": True},
    "h5py.File": {"locking": ANY},
}
# Methods of any class but ours, by name.
METHODS = {
    "from_pretrained": {name: SETTINGS[name] for name in list(SETTINGS)[:5]},
    "from_config": {"trust_remote_code": False},
}
# What nobody calls or hands on: modules, functions by their full names, methods.
NO_MODULES = ("cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch.hub", "torch.package")
NO_MODULES += ("http.client", "httpx", "requests", "urllib.request", "xml", "kernels", "gdown", "datasets")
NO_FUNCTIONS = ("torch.jit.load", "torch.export.load", "numpy.lib.format.open_memmap", "os.system", "os.popen")
NO_FUNCTIONS += ("eval", "exec", "__import__", "runpy.run_path", "runpy.run_module", "shutil.unpack_archive")
NO_FUNCTIONS += ("pyarrow.deserialize", "pyarrow.PyExtensionType", "pyarrow.parquet.read_table")
NO_FUNCTIONS += ("torch.serialization.add_safe_globals", "torch.serialization.safe_globals", "transformers.pipeline")
NO_FUNCTIONS += tuple(
    f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")
)
NO_METHODS = ("load_state_dict_from_url", "hf_hub_download", "snapshot_download", "get_kernel", "extractall")
NO_METHODS += ("load_adapter", "read_pickle", "exec_module")
ERRORS = ("pickle.UnpicklingError",)
# Files that may do what the others may not, and what of it.
ALLOWED = {
    "prismatic/evidence/checks.py": {"json.loads"},  # what all readers of JSON use
    "prismatic/output_folder.py": {"json.loads"},  # a lock, of which it reads 1000 bytes
    "benchmarks/serving_load.py": {"http.client.HTTPConnection"},  # asks the server that it started
    "prismatic/vla/datasets/index_reader.py": {"json.loads"},  # a cache with a checksum
    "prismatic/vla/datasets/hdf5_source.py": {"h5py.File"},  # it looks at links to other files
    "prismatic/vla/datasets/registry.py": {"exec_module"},  # the user's own --data_set_file
    # Holds every `torch.load` of a public LIBERO to arrays.
    "experiments/robot/libero/libero_package.py": {"torch.load", "torch.serialization.safe_globals"},
}
ONLY_THERE = ("h5py.File", "json.load", "json.loads")
READERS = ("prismatic", "experiments", "craft_experiments", "vla-scripts")  # benchmarks read what they wrote


@functools.cache
def trees():
    files = sorted(file for place in PLACES for file in (ROOT / place).rglob("*.py"))
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def own_methods(modules) -> set[str]:
    """`Class.method` of our classes that have a method of a loader's name."""
    classes = [node for tree in modules for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {f"{c.name}.{item.name}" for c in classes for item in c.body if isinstance(item, ast.FunctionDef)}


def imported(tree: ast.AST) -> dict[str, str]:
    """Name in this module -> full name."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Full name of `a.b.c`; what is not imported, and no function of Python, begins with a dot."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    name = node.id if isinstance(node, ast.Name) else ""
    parts.append(names.get(name, name if hasattr(builtins, name) else f".{name}".rstrip(".")))
    return ".".join(reversed(parts))


class Module:
    """What one module trusts."""

    def __init__(self, tree: ast.AST, own: frozenset[str] = frozenset(), file: str = "") -> None:
        self.own, self.file = own, file
        self.nodes, self.names = list(ast.walk(tree)), imported(tree)
        self.defined = {node.name for node in self.nodes if isinstance(node, ast.FunctionDef)}
        self.only_there = ONLY_THERE if file.startswith(READERS) or not file else ONLY_THERE[:1]
        copies = [node for node in self.nodes if isinstance(node, ast.Call) and self._is_copy(node)]
        self.copies = {id(node.func) for node in copies}
        self.problems: list[str] = []

    def untrusted(self) -> list[str]:
        calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        for call in calls:
            self._look_at_call(call)
        called = {id(call.func) for call in calls}
        inner = {id(node.value) for node in self.nodes if isinstance(node, ast.Attribute)}
        for node in self.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
                self._look_at_name(node, id(node) in called)
        return self.problems

    def _say(self, node: ast.expr, text: str) -> None:
        self.problems.append(f"{self.file} line {node.lineno}: {text}")

    def _is_ours(self, name: str) -> bool:
        return name.startswith(OUR_MODULES) or name.removeprefix(".") in self.defined

    def _look_at_call(self, call: ast.Call) -> None:
        stated = {keyword.arg: value_of(keyword.value) for keyword in call.keywords}
        for name, value in SETTINGS.items():
            if name in stated and stated[name] != value:
                self._say(call, f"{name} must be {value}")
        name = dotted(call.func, self.names)
        head, _, last = name.rpartition(".")
        wanted = FUNCTIONS.get(name, METHODS.get(last, {}) if head and not self._is_own_method(name) else {})
        missing = [key for key, value in wanted.items() if key not in stated or value not in (ANY, stated[key])]
        if missing:
            self._say(call, f"{name} must state {missing}")

    def _is_copy(self, call: ast.Call) -> bool:
        """`json.loads(json.dumps(value))`."""
        inner = call.args[0] if len(call.args) == 1 else None
        return isinstance(inner, ast.Call) and dotted(inner.func, self.names) == "json.dumps"

    def _is_own_method(self, name: str) -> bool:
        return ".".join(name.split(".")[-2:]) in self.own

    def _look_at_name(self, node: ast.Name | ast.Attribute, is_called: bool) -> None:
        name = dotted(node, self.names)
        allowed = ALLOWED.get(self.file, ())
        head, _, last = name.rpartition(".")
        if name in allowed or last in allowed or name in ERRORS or id(node) in self.copies:
            return
        forbidden = name in NO_FUNCTIONS or any(f"{name}.".startswith(f"{module}.") for module in NO_MODULES)
        forbidden |= last in NO_METHODS and not self._is_ours(name)
        if forbidden or name in self.only_there or (name in FUNCTIONS and not is_called):
            self._say(node, f"{name} is not allowed here")


def value_of(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None  # decided elsewhere


def test_all_calls_of_loaders_state_their_trust():
    modules = trees()
    own = frozenset(own_methods(modules.values()))
    found = [Module(tree, own, str(file.relative_to(ROOT))).untrusted() for file, tree in modules.items()]
    assert not sum(found, []), "\n".join(sum(found, []))


def test_the_calls_are_found():
    """The rule is worth something only where there are calls: those of weights, and of nothing else of transformers."""
    modules = [(file, tree, imported(tree)) for file, tree in trees().items()]
    calls = [
        (file.name, dotted(node.func, names))
        for file, tree, names in modules
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    ends = {(file, ".".join(name.split(".")[-2:])) for file, name in calls}
    assert ("checkpoint_files.py", "OpenVLAForActionPrediction.from_pretrained") in ends
    assert {("published.py", "torch.load"), ("hdf5_source.py", "h5py.File"), ("lerobot_video.py", "av.open")} <= ends
    assert {("lerobot_tables.py", "parquet.ParquetFile"), ("images.py", "Image.open")} <= ends
    loaders = [name for _, name in calls if name.endswith(".from_pretrained")]
    assert not [name for name in loaders if name.split(".")[-2].startswith(("Auto", "Peft"))]


FULL = "local_files_only=True, trust_remote_code=False, use_kernels=False, use_safetensors=True, weights_only=True"


@pytest.mark.parametrize(
    "text",
    [
        "AutoTokenizer.from_pretrained(path)",
        f"Model.from_pretrained(path, {FULL.replace('use_kernels=False, ', '')})",
        f"Model.from_pretrained(path, {FULL.replace('use_safetensors=True, ', '')})",
        f"Model.from_pretrained(path, {FULL.replace('False', 'flag')})",
        "Model.from_pretrained(path, **options)",
        "AutoModelForCausalLM.from_config(config)",
        "anything(path, trust_remote_code=True)",
        "anything(path, shell=True)",
        "import torch\ntorch.load(file)",
        "import torch as t\nt.load(file, weights_only=False)",
        "from torch import load as read\nread(file)",
        "from functools import partial\nimport torch\npartial(torch.load, weights_only=False)",
        "import torch\nread = torch.load",
        "import numpy as np\nnp.load(file)",
        "import numpy\nnumpy.load(file, allow_pickle=True)",
        "import pickle\npickle.load(stream)",
        "from pickle import Unpickler\nUnpickler(stream)",
        "import pandas\npandas.read_pickle(file)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import json\njson.load(stream)",
        "import h5py\nh5py.File(path, 'r', locking=False)",
        "import pyarrow.parquet as pq\npq.read_table(path)",
        "import pyarrow.parquet as pq\npq.ParquetFile(path)",
        "import av\nav.open(path)",
        "from PIL import Image\nImage.open(path)",
        "import huggingface_hub\nhuggingface_hub.snapshot_download(name)",
        "import urllib.request\nurllib.request.urlopen(address)",
        "model.load_adapter(path)",
        "archive.extractall(folder)",
        "eval(text)",
    ],
)
def test_a_call_that_says_nothing_fails(text):
    assert Module(ast.parse(text)).untrusted()


@pytest.mark.parametrize(
    "text",
    [
        f"Model.from_pretrained(path, dtype=x, {FULL})",
        "import torch\ntorch.load(file, map_location='cpu', weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import pickle\ntry:\n    x()\nexcept pickle.UnpicklingError:\n    pass",
        "def load_adapter(path): pass\nload_adapter(path)",
        "from prismatic.training.lora import load_adapter\nload_adapter(path)",
        "model.eval()",
        "import json\njson.loads(json.dumps(value))",
    ],
)
def test_a_call_that_says_it_passes(text):
    assert not Module(ast.parse(text)).untrusted()
