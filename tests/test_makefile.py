"""`make` says what it can do and what it does; `make test` runs all its parts and tells when one failed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(*words: str) -> list[str]:
    """Lines that `make` says."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def test_make_alone_lists_every_target_and_each_says_its_line_before_it_begins(tmp_path):
    listed = dict(re.fullmatch(r"make (\S+) +(\S.*)", line).groups() for line in make())
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert list(listed) == targets.split() and list(make("help")) == list(make())
    for name in ("python", "ruff", "mypy", "mkdocs"):
        program(tmp_path / "bin" / name, "echo ran")
    for stamp in (".installed", ".installed-docs"):
        (tmp_path / stamp).touch()
    for target in set(listed) - {"help", "setup", "clean"}:
        said = make(target, f"VENV={tmp_path}")
        assert said[0] == f"make {target}: {listed[target]}" and "ran" in said[1:]
    assert make("--dry-run", "clean", "VENV=none")[-1].startswith("rm -rf none ")


def test_set_up_counts_its_steps_and_hides_no_progress(tmp_path):
    pip = '#!/bin/sh\necho pip "$@"\n'
    program(
        tmp_path / "python",
        f"""[ "$1" != -m ] || {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
        printf '{pip}' > "$3/bin/pip"; chmod +x "$3/bin/pip"; }}""",
    )
    said = make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={tmp_path / 'python'}")
    assert [re.match(r"make setup, \d of 3|pip", line)[0] for line in said] == [
        "make setup, 1 of 3", "make setup, 2 of 3", "pip", "make setup, 3 of 3"
    ]  # fmt: skip
    assert "quiet" not in said[2] and ".[libero,dev]" in said[2]
    assert (tmp_path / "venv" / ".installed").exists() and make("setup", f"VENV={tmp_path / 'venv'}")[0].endswith(
        "'setup'."
    )


@pytest.mark.parametrize("failing", ["not alone", "alone", "neither"])
def test_one_failing_part_does_not_keep_the_other_from_running(tmp_path, failing):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {tmp_path}/ran\n[ "$last" != "{failing}" ]\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    done = subprocess.run(["make", "-C", str(ROOT), "test", f"VENV={tmp_path}"], capture_output=True, text=True)
    assert (tmp_path / "ran").read_text().splitlines() == ["not alone", "alone"], done.stderr
    assert (done.returncode == 0) == (failing == "neither")
