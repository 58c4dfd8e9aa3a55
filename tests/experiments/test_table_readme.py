"""Shell script, PowerShell script and README list the flags of the tables as `RunConfig` has them."""

from craft_experiments.table_flags import VARIABLES, pages, rows


def test_scripts_and_readme_are_what_the_command_writes():
    assert {file.name: file.read_text(encoding="utf-8") for file in pages()} == {
        file.name: text for file, text in pages().items()
    }


def test_every_flag_has_a_meaning():
    assert len(rows()) == len(VARIABLES)
    assert not [row for row in rows() if row.endswith("|  |")]
