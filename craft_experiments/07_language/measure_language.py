"""What fine-tuning left of a policy's language model, and what the policy does: one JSON file.

    python craft_experiments/07_language/measure_language.py --checkpoint runs/x--200_chkpt \
        --start runs/start--100_chkpt --output out.json

| measure | of what |
|---|---|
| perplexity | the language model alone, on each of the held-out texts (`english_texts.py`), in windows of 256 tokens |
| action error | L1 of normalised actions on held-out windows of the new task, and on windows of the old ones |
| feature drift | relative squared drift of C_AQ on the new windows: the unit of the budget |
| action drift | root mean square change of the normalised actions on the new windows, asked old instructions |

Drift is measured against the start, which is its own reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from english_texts import held_out_texts

from prismatic.command_line import bad_input_in_one_line, flag, parse
from prismatic.evidence.files import write_json
from prismatic.output_folder import check_file, held

WINDOW = 256
BATCH = 8
HELD_OUT = 0.15
"""Share of the episodes of the new task that no training sees."""


@dataclass
class MeasureConfig:
    """Flags."""

    checkpoint: str = ""
    start: str = ""
    data_root_dir: str = "datasets/rlds"
    new: str = "libero_spatial_scripted_no_noops"
    old: str = "libero_object_scripted_no_noops"
    output: str = ""
    tokens: int = flag(2048, "of each text, from its beginning", at_least=WINDOW)
    samples: int = flag(24, "windows of the new task; of the old ones half as many", at_least=2)


def main() -> None:
    """Measure and write."""
    with bad_input_in_one_line("measure_language.py"):
        cfg = parse(MeasureConfig, description=__doc__)
        for name in ("checkpoint", "start", "output"):
            if not getattr(cfg, name):
                raise ValueError(f"--{name} is missing")
        check_file(cfg.output, "--output")
        with held(Path(cfg.output), "--output"):
            write_json(cfg.output, {"flags": asdict(cfg)} | measure(cfg), allow_nan=False)


def measure(cfg: MeasureConfig) -> dict[str, Any]:
    """All measures, JSON-ready. Raises what `load_checkpoint` and `VLADataset` do."""
    import torch

    from prismatic.training.checkpoint_files import package_versions, tensors_hash
    from prismatic.training.checkpoints import load_checkpoint

    texts = held_out_texts()
    start = load_checkpoint(cfg.start)
    trained = start if cfg.checkpoint == cfg.start else load_checkpoint(cfg.checkpoint)
    with torch.inference_mode():
        return {
            "policy_sha256": tensors_hash(trained.model.state_dict()),
            "start_sha256": tensors_hash(start.model.state_dict()),
            "texts": {text.name: text.facts() for text in texts},
            "perplexity": {text.name: perplexity(trained, text.content, cfg.tokens) for text in texts},
            **Policies(start, trained, cfg).measures(),
            "versions": package_versions(),
        }


def perplexity(loaded: Any, content: str, tokens: int) -> float:
    """exp of the mean cross entropy of the next token, over all but the first token of each window.

    The language model runs alone, as it was pretrained. ValueError for a text of fewer tokens.
    """
    import torch
    import torch.nn.functional as F

    ids = loaded.processor.tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"--tokens is {tokens}, but a text has {len(ids)}")
    windows = torch.tensor(ids[: tokens // WINDOW * WINDOW]).view(-1, WINDOW)
    model, total = loaded.model.vla.language_model, 0.0
    for window in windows.split(1):
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), window[0, 1:], reduction="sum"))
    return float(torch.tensor(total / (windows.numel() - len(windows)), dtype=torch.float64).exp())


class Policies:
    """A trained policy beside its start, on the same samples."""

    def __init__(self, start: Any, trained: Any, cfg: MeasureConfig) -> None:
        from prismatic.craft import AnchorType, CRaFTConfig
        from prismatic.training.retention.signals import PolicyFeatures
        from prismatic.vla.datasets.collator import VLACollator

        self._start, self._trained, self._cfg = start, trained, cfg
        config = CRaFTConfig.from_preset("budget", anchor_type=AnchorType.AQ_ONLY)
        self._features = PolicyFeatures(config, nullcontext)
        self._collate = VLACollator.of_policy(start.processor, start.model)

    def measures(self) -> dict[str, Any]:
        """Action errors and drifts, means over samples."""
        cfg = self._cfg
        old, asked = self._samples(cfg.old, cfg.samples // 2, 0.0), _Instructions(self._start)
        sums = {"new": 0.0, "features": 0.0, "actions": 0.0}
        new = self._samples(cfg.new, cfg.samples, HELD_OUT)
        for samples in _batches(new):
            batch = self._collate(samples)
            first, now = (self._run(loaded, batch) for loaded in (self._start, self._trained))
            sums["new"] += _l1(now.actions, batch) * len(samples)
            drift = self._features.signal.loss(*(self._features.value_of(output) for output in (now, first)))
            sums["features"] += float(drift) * len(samples)
            old_question = self._collate([sample | {"instruction": asked.next()} for sample in samples])
            first, now = (self._run(loaded, old_question) for loaded in (self._start, self._trained))
            sums["actions"] += float((now.actions - first.actions).square().mean()) * len(samples)
        error = 0.0
        for samples in _batches(old):
            batch = self._collate(samples)
            error += _l1(self._run(self._trained, batch).actions, batch) * len(samples)
        return {
            "action_error": {"new": sums["new"] / len(new), "old": error / len(old)},
            "feature_drift": sums["features"] / len(new),
            "action_drift": (sums["actions"] / len(new)) ** 0.5,
            "samples": {"new": len(new), "old": len(old)},
        }

    def _run(self, loaded: Any, batch: dict[str, Any]) -> Any:
        return loaded.model(batch, self._features.request)

    def _samples(self, name: str, count: int, held_out: float) -> list[dict[str, Any]]:
        """Windows evenly spread over the held-out share of the episodes, or over all, normalised as in training."""
        from prismatic.training.data_sets import open_data
        from prismatic.training.representation import evenly_spread
        from prismatic.vla.action_spec import ActionSpec
        from prismatic.vla.datasets.dataset import DatasetSettings
        from prismatic.vla.images import ImageSpec

        manifest, where = self._start.manifest, ("--new" if held_out else "--old", self._cfg.data_root_dir, name)
        settings = DatasetSettings(
            ActionSpec.from_dict(manifest["action_spec"]),
            ImageSpec.from_dict(manifest["image_spec"]),
            self._start.model.num_images,
            image_aug=False,
            subset_seed=0,
            val_fraction=held_out,
            known_statistics=self._trained.statistics,
        )
        data = open_data(*where, settings)
        if held_out:  # the start knows no statistics of the new task: they are those of the episodes trained on
            data = open_data(*where, replace(settings, part="val", normalizer=data.normalizers), data.warnings)
        chosen = evenly_spread(data.window_counts[data.data_set_names[0]], count, 0)
        return [data[(0, index)] for index in chosen]


class _Instructions:
    """The instructions that the start was trained on, one after the other, again and again."""

    def __init__(self, start: Any) -> None:
        recorded = start.manifest.get("instructions") or {}
        self._all = sorted({sentence for sentences in recorded.values() for sentence in sentences})
        if not self._all:
            raise ValueError(f"--start {start.path} records no instructions that it was trained on")
        self._next = 0

    def next(self) -> str:
        self._next += 1
        return self._all[self._next % len(self._all)]


def _batches(samples: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, len(samples), BATCH):
        yield samples[first : first + BATCH]


def _l1(actions: Any, batch: dict[str, Any]) -> float:
    return float((actions.float() - batch["actions"]).abs().mean())


if __name__ == "__main__":
    main()
