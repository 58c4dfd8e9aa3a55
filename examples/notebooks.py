"""Build the notebooks `use_a_policy.ipynb` and `keep_a_skill.ipynb` from the examples, and execute them.

    python examples/notebooks.py --output_dir FOLDER

Prints the files it wrote, with their outputs. A notebook has no code of its own: `# %% TITLE` begins a cell of an
example. Needs the extra `docs`.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from prismatic.command_line import OneLineParser, bad_input_in_one_line, require_package
from prismatic.evidence.files import write_text
from prismatic.output_folder import check_folder

EXAMPLES = Path(__file__).parent
NOTEBOOKS = {
    "use_a_policy": ("inference",),
    "keep_a_skill": ("constrain_your_model", "finetune_from_python"),
}
"""Notebook -> the examples that it consists of."""


def assemble(name: str) -> Any:
    """A notebook without outputs: the first lines of each example as text, and its cells."""
    from nbformat import v4

    cells = []
    for example in NOTEBOOKS[name]:
        text = (EXAMPLES / f"{example}.py").read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(text)) or ""
        cells.append(v4.new_markdown_cell(f"# {said}"))
        for title, code in re.findall(r"^# %% (.*)\n((?:(?!# %% ).*\n)*)", text, re.MULTILINE):
            cells += [v4.new_markdown_cell(f"## {title}"), v4.new_code_cell(code.strip("\n"))]
    for number, cell in enumerate(cells):
        cell.id = f"{name}-{number}"  # the same each time
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(notebook: Any) -> Any:
    """The notebook with its outputs, run in the folder of the repository."""
    from nbclient import NotebookClient
    from traitlets.config import Config

    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm misses a package for moving bars
    sockets = Config({"KernelManager": {"transport": "ipc"}})  # no ports
    place = {"metadata": {"path": str(EXAMPLES.parent)}}
    return NotebookClient(notebook, timeout=900, coalesce_streams=True, resources=place, config=sockets).execute()


def main() -> None:
    """Assemble, execute and write both."""
    parser = OneLineParser(prog="notebooks.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write to")
    with bad_input_in_one_line("notebooks.py"):
        folder = parser.parse_args().output_dir
        check_folder(folder, "--output_dir")
        require_package("notebooks.py", "nbclient", "docs")
    import nbformat

    for name in NOTEBOOKS:
        notebook = execute(assemble(name))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.ipynb", nbformat.writes(notebook))
        print(folder / f"{name}.ipynb")


if __name__ == "__main__":
    main()
