"""Every call of a library's loader says what it trusts: no code, no pickle, nothing from the network.

The calls are found in the sources, so that a new one cannot forget it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("prismatic", "experiments", "craft_experiments", "vla-scripts", "benchmarks", "examples")
FROM_PRETRAINED = {"trust_remote_code": False, "local_files_only": True}
# Loaders by name: what each call must state, None where no call is allowed.
LOADERS = {
    "from_pretrained": FROM_PRETRAINED,
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
    "torch.hub.load": None,
    "torch.jit.load": None,
    "load_state_dict_from_url": None,
    "hf_hub_download": None,
    "snapshot_download": None,
    "get_kernel": None,
    "load_adapter": None,
    "pipeline": None,
    "eval": None,
    "exec": None,
    "pickle.load": None,
    "pickle.loads": None,
    "joblib.load": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
}


def trees():
    files = sorted(file for place in PLACES for file in (ROOT / place).rglob("*.py"))
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def own_names(modules) -> set[str]:
    """Classes and functions of ours that are called like a loader, but are none of a library."""
    names = set()
    for tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                names |= {f"{node.name}.{name}" for name in methods & LOADERS.keys()}
            elif isinstance(node, ast.FunctionDef) and node.name in LOADERS:
                names.add(node.name)
    return names


def dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def untrusted(tree: ast.AST, own: set[str] = frozenset()) -> list[str]:
    """Calls of loaders in a module that do not state what they must."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        ends = (name, ".".join(name.split(".")[-2:]), name.split(".")[-1])
        loader = next((end for end in ends if end in LOADERS), None)
        if loader is None or ends[1] in own or ends[2] in own or (loader in ("eval", "exec") and name != loader):
            continue
        stated = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        wanted = LOADERS[loader]
        if wanted is None or any(stated.get(key, "unsaid") is not value for key, value in wanted.items()):
            found.append(f"line {call.lineno}: {name} must state {wanted}" if wanted else f"line {call.lineno}: {name}")
    return found


def test_all_calls_of_loaders_state_their_trust():
    modules = trees()
    own = own_names(modules.values())
    problems = [f"{file.relative_to(ROOT)} {line}" for file, tree in modules.items() for line in untrusted(tree, own)]
    assert not problems, "\n".join(problems)


def test_the_calls_are_found():
    """The rule is worth something only where there are calls: those of weights, and of nothing else of transformers."""
    calls = [
        (file.name, dotted(node.func))
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func).endswith((".from_pretrained", "torch.load"))
    ]
    assert ("checkpoint_files.py", "OpenVLAForActionPrediction.from_pretrained") in calls
    assert ("published.py", "torch.load") in calls
    assert not [name for _, name in calls if name.startswith(("Auto", "PeftModel", "AutoPeft"))]


@pytest.mark.parametrize(
    "text",
    [
        "AutoTokenizer.from_pretrained(path)",
        "transformers.AutoModel.from_pretrained(path, trust_remote_code=False)",
        "AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=flag)",
        "Model.from_pretrained(path, **options)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file)",
        "pickle.load(stream)",
        "huggingface_hub.snapshot_download(name)",
        "eval(text)",
    ],
)
def test_a_call_that_says_nothing_fails(text):
    assert untrusted(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "Model.from_pretrained(path, local_files_only=True, trust_remote_code=False, dtype=x)",
        "torch.load(file, map_location='cpu', weights_only=True)",
        "model.eval()",
        "json.load(stream)",
    ],
)
def test_a_call_that_says_it_passes(text):
    assert not untrusted(ast.parse(text))
