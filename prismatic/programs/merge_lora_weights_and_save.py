"""Merge the adapters of a LoRA checkpoint into its base model, verify the result and save it.

python vla-scripts/merge_lora_weights_and_save.py --lora_finetuned_checkpoint_dir runs/...--20000_chkpt

The merged VLM (trained action queries included) is written into the checkpoint folder, or into a copy of it named by
`--output_dir`, read back, and compared with the adapted model on a fixed batch; the largest difference is printed and
stored in `craft_checkpoint.json`. Runs on the CPU with at most one more copy of the model in memory.

`--adapter_scale` below 1 merges a part of what the adapters learned; action queries and head stay as trained
(`interpolate_weights.py` moves them as well).
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from prismatic.command_line import bad_input_in_one_line, flag, parse
from prismatic.evidence.files import write_json
from prismatic.model_files import BASE_CHECKPOINT, has_weights, read_json
from prismatic.output_folder import check_folder, held
from prismatic.progress import Progress
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_files import read_manifest
from prismatic.training.checkpoint_folder import CARD, LISTING, MANIFEST, PUBLISHED, TRAINING_STATE, publish, seal
from prismatic.training.checkpoints import add_merged_model, load_checkpoint, load_unmerged
from prismatic.training.folder_kinds import check_is_checkpoint
from prismatic.training.interpolation import check_scale, scale_adapters
from prismatic.training.model_card import write_card
from prismatic.training.published import check_exportable, export_published


@dataclass
class MergeConfig:
    """Flags."""

    lora_finetuned_checkpoint_dir: str = ""
    base_checkpoint: str = flag("", BASE_CHECKPOINT)
    output_dir: str = ""
    tolerance: float = flag(1e-3, "of a normalised action", at_least=0)
    adapter_scale: float = flag(1.0, "factor on what the adapters add; other than 1 needs --output_dir", at_least=0)
    export_published_layout: bool = flag(False, "also write {folder}--published/ for the public evaluation code")


def merge(cfg: MergeConfig) -> None:
    """Merge, verify, report; ValueError when the folder is merged already or the outputs differ."""
    if not cfg.lora_finetuned_checkpoint_dir:
        raise ValueError("--lora_finetuned_checkpoint_dir is missing: name the LoRA checkpoint to merge")
    source = check_is_checkpoint(cfg.lora_finetuned_checkpoint_dir)
    if has_weights(source):
        raise ValueError(f"--lora_finetuned_checkpoint_dir {source}: holds a whole model already")
    if check_scale(cfg.adapter_scale) != 1 and not cfg.output_dir:
        raise ValueError(
            f"--adapter_scale {cfg.adapter_scale} needs --output_dir: in {source} itself the merged weights would not "
            "be those of the adapters beside them"
        )
    folder = Path(cfg.output_dir) if cfg.output_dir else source
    check_folder(folder.parent, "--output_dir")  # beside it the files are written first
    check_folder(folder, "--output_dir")
    with held(folder, "--output_dir" if cfg.output_dir else "--lora_finetuned_checkpoint_dir"):
        _merge(cfg, source, folder)


def _merge(cfg: MergeConfig, source: Path, folder: Path) -> None:
    if cfg.output_dir and folder.exists():
        raise FileExistsError(f"--output_dir {folder} exists already")
    with Progress(3 + cfg.export_published_layout, "merging", "steps", note="reads adapters and base") as progress:
        difference, exported = _merge_in_steps(cfg, source, folder, progress)
    print(f"merged into {folder}: largest difference of a normalised action {difference:.3g} (allowed {cfg.tolerance})")
    if exported is not None:
        print(f"exported to {exported}")


def _merge_in_steps(cfg: MergeConfig, source: Path, folder: Path, progress: Progress) -> tuple[float, Path | None]:
    """(largest difference of a normalised action, folder of the export)."""
    given = cfg.base_checkpoint or None
    adapted = load_unmerged(source, given)
    scale_adapters(adapted.model.vla, cfg.adapter_scale)
    if cfg.export_published_layout:
        check_exportable(adapted.model)
    progress.advance(note="writes the merged model and compares")
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work, ignore=shutil.ignore_patterns(TRAINING_STATE, LISTING))
    difference = add_merged_model(adapted.model, work, cfg.tolerance)
    _record_scale(work, cfg.adapter_scale)
    _record_base(work, folder, BaseModel.from_dict(adapted.manifest["base"], source).find(source, given))
    write_card(work)
    progress.advance(note="hashes its files")
    _publish(work, folder)
    progress.advance(note="exports" if cfg.export_published_layout else "")
    if not cfg.export_published_layout:
        return difference, None
    suffix = adapted.manifest["file_suffix"]
    exported = export_published(load_checkpoint(folder), f"{folder}{PUBLISHED}", suffix)
    progress.advance(note="")
    return difference, exported


def _record_scale(work: Path, scale: float) -> None:
    """Note the scale in the manifest, and give it to the copied adapters, which then still equal the merged model."""
    manifest = read_manifest(work)
    write_json(work / MANIFEST, manifest | {"merge": manifest["merge"] | {"adapter_scale": scale}})
    if scale != 1:
        file = work / "lora_adapter" / "adapter_config.json"
        config = read_json(file)
        write_json(file, config | {"lora_alpha": config["lora_alpha"] * scale})


def _record_base(work: Path, folder: Path, place: Path) -> None:
    """Note where the base is, seen from the folder that the files go to."""
    manifest = read_manifest(work)
    base = replace(BaseModel.from_dict(manifest["base"], work / MANIFEST), path=os.path.abspath(place))
    write_json(work / MANIFEST, manifest | {"base": base.to_dict(folder)})


def _publish(work: Path, folder: Path) -> None:
    """Move the verified files into place; an existing folder keeps what it has, the manifest comes last."""
    if not folder.exists():
        publish(work, folder)
        return
    (folder / LISTING).unlink(missing_ok=True)  # of the files before the merge
    for file in (*sorted(work.glob("model*")), work / "config.json", work / CARD, work / MANIFEST):
        file.replace(folder / file.name)
    seal(folder)
    shutil.rmtree(work)


def main() -> None:
    """Parse and merge."""
    with bad_input_in_one_line("merge_lora_weights_and_save.py"):
        merge(parse(MergeConfig, description=__doc__))


if __name__ == "__main__":
    main()
