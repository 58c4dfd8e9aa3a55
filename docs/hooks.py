"""What mkdocs.yml cannot say: files of the repository, notebooks and formulas as parts of the site.

Pages link to files outside docs/ as they do in the repository. Linked Markdown becomes a page below `files/`, linked
code a page that shows it, a linked folder its README.md or the list of its files; anything else is copied. So do the
links of these pages. Notebooks in build/notebooks, executed, become pages. Formulas become MathML, so that no script
has to draw them.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "build" / "notebooks"
IN_NAV = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages outside docs/ that the navigation names."""
CODE = {".py": "python", ".sh": "bash", ".ps1": "powershell", ".toml": "toml", ".yml": "yaml"}
FENCES = re.compile(r"^( *)(```+|~~~+)[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
VIDEO = re.compile(r"\[([^]]*)\]\((videos/[^)\s]+)\)")
FLAG = re.compile(r"<code>(--[^<]{1,38})</code>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

# ------------------------------------------------------------------------------------------------------- repository


def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks, and the files of the repository that pages link to."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for file in notebook(path, config):
            files.append(file)
    ends = [(home_of(file.src_uri), file.content_string) for file in files.documentation_pages()]
    ends.append(("README.md", "".join(f"[]({name})" for name in IN_NAV)))
    while ends:
        for path in linked(*ends.pop()):
            if not path.startswith("docs/") and files.get_file_from_path(src_uri_of(path)) is None:
                file = repository_file(path, config)
                files.append(file)
                if file.is_documentation_page() and Path(path).suffix not in CODE:
                    ends.append((home_of(file.src_uri), file.content_string))
    return files


def home_of(src_uri: str) -> str:
    """Where in the repository a page of the site lies: its links start there."""
    if src_uri.startswith("files/"):
        return src_uri.removeprefix("files/")
    return src_uri.replace("notebooks/", "examples/") if src_uri.startswith("notebooks/") else f"docs/{src_uri}"


def src_uri_of(path: str) -> str:
    """What a file or folder of the repository is called among the files of the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"files/{path}/README.md"
    return f"files/{path}.md" if Path(path).suffix in CODE else f"files/{path}"


def linked(place: str, text: str) -> Iterator[str]:
    """The files and folders of the repository that a page at `place` links to, as paths from the repository's root."""
    for target in LINK.findall(FENCES.sub("", text)):
        path = resolved(place, target)
        if path is not None:
            yield path


def resolved(place: str, target: str) -> str | None:
    """A relative link as a path from the repository's root; None where nothing is."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
    return None if path.startswith("..") or not (ROOT / path).exists() else path


def repository_file(path: str, config: Any) -> File:
    """A page that shows the file or folder, or the file itself."""
    place, name = ROOT / path, src_uri_of(path)
    inclusion = InclusionLevel.UNDEFINED if path in IN_NAV else InclusionLevel.NOT_IN_NAV
    if place.is_dir() and not (place / "README.md").exists():
        inside = sorted(file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file())
        text = f"# {path}\n\n" + "\n".join(f"- `{file}`" for file in inside)
        return File.generated(config, name, content=text, inclusion=inclusion)
    if place.is_dir():
        place = place / "README.md"
    if place.suffix in CODE:
        text = f"# {path}\n\n```{CODE[place.suffix]}\n{place.read_text(encoding='utf-8')}```\n"
        return File.generated(config, name, content=text, inclusion=inclusion)
    return File.generated(config, name, abs_src_path=str(place), inclusion=inclusion)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the site's pages, and leave records and code out of the search."""
    name = page.file.src_uri
    if name.startswith("files/") and name.removeprefix("files/") not in IN_NAV:
        page.meta.setdefault("search", {"exclude": True})
        # Records name the videos of their runs; not all were kept.
        markdown = VIDEO.sub(lambda video: video[0] if resolved(home_of(name), video[2]) else video[1], markdown)

    def link(match: re.Match[str]) -> str:
        path = resolved(home_of(name), match[1])
        return match[1] if path is None else posixpath.relpath(src_uri_of(path), posixpath.dirname(name))

    parts, end = [], 0
    for fence in FENCES.finditer(markdown):
        parts += [LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join(parts) + LINK.sub(link, markdown[end:])


# --------------------------------------------------------------------------------------------- notebooks, formulas


def notebook(path: Path, config: Any) -> list[File]:
    """The page of an executed notebook, and its pictures."""
    text, resources = MarkdownExporter().from_filename(str(path))
    pictures = []
    for name, content in resources["outputs"].items():
        text = text.replace(f"]({name})", f"]({path.stem}_{name})")
        pictures.append(File.generated(config, f"notebooks/{path.stem}_{name}", content=content))
    return [File.generated(config, f"notebooks/{path.stem}.md", content=text), *pictures]


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, and flags that stay on one line."""
    return FLAG.sub(r'<code class="flag">\1</code>', FORMULA.sub(formula, content))


def formula(match: re.Match[str]) -> str:
    """The MathML of one formula, in the line or on lines of its own."""
    text = html.unescape(match[3]).strip()
    if match[2] == "(":
        return convert(text)
    return f'<span class="formula">{convert(text, display="block")}</span>'
