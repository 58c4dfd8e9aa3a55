"""Write the model card of a checkpoint folder anew, with the evaluations that are named.

craft-card CHECKPOINT --results RESULTS_DIR RESULTS_DIR

`README.md` in the folder is as the Hugging Face Hub reads it. A training writes it with every checkpoint; this adds the
table of success rates. What its owner wrote into it about licence and base model, and below its last line, stays. No
hash changes: evaluations go on as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prismatic.command_line import MISTAKES, OneLineParser, bad_input_in_one_line

PROGRAM = "craft-card"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the card; exit code 2 for folders that cannot be used."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint of this code")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="DIR", help="results folders of craft-eval; none: no table"
    )
    args = parser.parse_args(argv)
    with bad_input_in_one_line(PROGRAM, MISTAKES):
        folder, manifest = args.checkpoint, _manifest(args.checkpoint)
        from prismatic.output_folder import check_folder
        from prismatic.training.card_results import read_results
        from prismatic.training.model_card import write_card

        check_folder(folder, "CHECKPOINT")
        places = [place for word in args.results for place in word.split(",")]
        print(write_card(folder, [read_results(place, folder) for place in places], manifest))


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What an export does not say of itself: the manifest of the checkpoint beside it. None for a checkpoint."""
    from prismatic.model_files import CheckpointError
    from prismatic.training.checkpoint_files import read_manifest
    from prismatic.training.checkpoint_folder import MANIFEST, PUBLISHED
    from prismatic.training.folder_kinds import check_is_checkpoint

    check_is_checkpoint(folder)
    if (folder / MANIFEST).exists():
        return None
    path = folder.resolve()
    source = path.with_name(path.name.removesuffix(PUBLISHED))
    if source == path or not (source / MANIFEST).exists():
        raise CheckpointError(
            f"{folder} is a published folder without {MANIFEST}, expected a checkpoint of this code, or its export "
            f"NAME{PUBLISHED} beside it"
        )
    return read_manifest(source)


if __name__ == "__main__":
    main()
