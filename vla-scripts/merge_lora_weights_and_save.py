"""Merge the adapters of a LoRA checkpoint into its base model, verify the result and save it.

python vla-scripts/merge_lora_weights_and_save.py --lora_finetuned_checkpoint_dir runs/...--20000_chkpt

The merged VLM (trained action queries included) is written into the checkpoint folder, or into a copy of it named by
`--output_dir`, read back, and compared with the adapted model on a fixed batch; the largest difference is printed and
stored in `craft_checkpoint.json`. Runs on the CPU with at most one more copy of the model in memory.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import draccus

from prismatic.training.checkpoint_files import MANIFEST, has_weights
from prismatic.training.checkpoints import add_merged_model, load_checkpoint, load_unmerged
from prismatic.training.published import check_exportable, export_published


@dataclass
class MergeConfig:
    """Flags. `base_checkpoint`: where the base model is now, when it moved; its weights must have the recorded hash."""

    lora_finetuned_checkpoint_dir: str = ""
    base_checkpoint: str = ""
    output_dir: str = ""
    tolerance: float = 1e-3  # of a normalised action
    export_published_layout: bool = False  # also write {folder}--published/ for the public evaluation code


@draccus.wrap()
def merge(cfg: MergeConfig) -> None:
    """Merge, verify, report; ValueError when the folder is merged already or the outputs differ."""
    if not cfg.lora_finetuned_checkpoint_dir:
        raise ValueError("--lora_finetuned_checkpoint_dir is missing: name the LoRA checkpoint to merge")
    source = Path(cfg.lora_finetuned_checkpoint_dir)
    if has_weights(source):
        raise ValueError(f"--lora_finetuned_checkpoint_dir {source}: holds a whole model already")
    adapted = load_unmerged(source, cfg.base_checkpoint or None)
    if cfg.export_published_layout:
        check_exportable(adapted.model)
    folder = Path(cfg.output_dir) if cfg.output_dir else source
    if cfg.output_dir and folder.exists():
        raise FileExistsError(f"--output_dir {folder} exists already")
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work, ignore=shutil.ignore_patterns("training_state"))
    difference = add_merged_model(adapted.model, work, cfg.tolerance)
    _publish(work, folder)
    print(f"merged into {folder}: largest difference of a normalised action {difference:.3g} (allowed {cfg.tolerance})")
    if cfg.export_published_layout:
        suffix = adapted.manifest["file_suffix"]
        print(f"exported to {export_published(load_checkpoint(folder), f'{folder}--published', suffix)}")


def _publish(work: Path, folder: Path) -> None:
    """Move the verified files into place; an existing folder keeps what it has, the manifest comes last."""
    if not folder.exists():
        work.rename(folder)
        return
    for file in (*sorted(work.glob("model*")), work / "config.json", work / MANIFEST):
        file.replace(folder / file.name)
    shutil.rmtree(work)


if __name__ == "__main__":
    merge()
