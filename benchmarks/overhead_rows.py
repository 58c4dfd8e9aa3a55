"""The settings that `craft_overhead.py` compares."""

from __future__ import annotations

from dataclasses import dataclass, field

from prismatic.craft import CRaFTConfig, Plan, SignalKind


@dataclass(frozen=True)
class Row:
    """One setting. `plan` is what its constrained steps must do; `craft` are overrides of the preset.

    `instructions` is the size of the memory `instructions`, as a share of the batch; 0: the memory is the batch itself.
    Method `bare` is the plain step after three passes over as many samples, without anything of CRaFT's.
    """

    label: str
    method: str = "craft"
    frozen: bool = False
    every: int = 1
    plan: Plan | None = None
    preset: str = "budget"
    craft: dict = field(default_factory=dict)
    instructions: float = 0.0

    @property
    def config(self) -> CRaFTConfig:
        """Settings of the constraint."""
        return CRaFTConfig.from_preset(self.preset, **self.craft)

    @property
    def holds_actions(self) -> bool:
        """Whether the actions are held, not the features."""
        return self.method in ("craft", "bare") and self.config.signal is SignalKind.ACTIONS

    @property
    def raw_only(self) -> bool:
        """Whether C_R alone is anchored."""
        return self.craft.get("anchor_type") == "raw_only"

    @property
    def baseline(self) -> str:
        """The plain row that trains the same weights."""
        return "frozen_plain" if self.frozen else "plain"


# The multiplier is held still (dual_lr 0), so that each row keeps its plan.
OPEN = {"retention_budget": 1e-12, "retention_weight": 0.0, "dual_lr": 0.0}
CLOSED = {"retention_budget": 1e12, "retention_weight": 0.0, "dual_lr": 0.0}
PRICED = {"retention_budget": 1e12, "retention_weight": 0.5, "dual_lr": 0.0}
RAW = {"anchor_type": "raw_only"}


def _rows(frozen: bool) -> dict[str, Row]:
    where = ", vision frozen" * frozen
    budget, raw = "preset `budget`", "C_R only"

    def craft(label: str, plan: Plan, settings: dict, every: int = 1, preset: str = "budget") -> Row:
        label += f", `craft_every` {every}" * (every > 1) + where
        return Row(label, "craft", frozen, every, plan, preset, settings)

    def keep(memory: str, instructions: float = 0.0, every: int = 1) -> Row:
        is_preset = (every, instructions) == (2, 0.25)
        what = "preset `keep`" if is_preset else "`keep`" if every > 1 else "constrained step of `keep`"
        label = f"{what}, {memory}" + f", `craft_every` {every}" * (every > 1) + where
        return Row(label, "craft", frozen, every, Plan.SEPARATE, "keep", instructions=instructions)

    def bare(instructions: float, every: int = 1) -> Row:
        size = {0.25: "a quarter", 1.0: "the whole"}[instructions]
        label = f"plain step and bare passes over {size} of the batch" + f", every {every} steps" * (every > 1) + where
        return Row(label, "bare", frozen, every, preset="keep", instructions=instructions)

    rows = {
        "plain": Row(f"plain{where}", "plain", frozen),
        "plain_logits": Row(f"plain that also computes the logits{where}", "logits", frozen),
        "procedure": Row(f"original procedure{where}", "procedure", frozen),
        "original": craft("preset `original`", Plan.SEPARATE, {}, preset="original"),
        "open": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN),
        "priced": craft(f"{budget}, gate closed, lambda > 0", Plan.FUSED, PRICED),
        "closed": craft(f"{budget}, gate closed, lambda 0", Plan.MEASURE, CLOSED),
        "open_every2": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN, 2),
        "open_every4": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN, 4),
        "open_every10": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN, 10),
        "priced_every4": craft(f"{budget}, gate closed, lambda > 0", Plan.FUSED, PRICED, 4),
        "raw_open": craft(f"{raw}, gate open", Plan.SEPARATE, OPEN | RAW),
        "raw_priced": craft(f"{raw}, gate closed, lambda > 0", Plan.FUSED, PRICED | RAW),
        "raw_closed": craft(f"{raw}, gate closed, lambda 0", Plan.MEASURE, CLOSED | RAW),
        "raw_open_every4": craft(f"{raw}, gate open", Plan.SEPARATE, OPEN | RAW, 4),
        "keep_quarter": keep("instructions on a quarter of the batch", 0.25),
        "keep_quarter_every2": keep("instructions on a quarter of the batch", 0.25, 2),
        "keep_half_every2": keep("instructions on half of the batch", 0.5, 2),
        "keep_whole": keep("instructions on the whole batch", 1.0),
        "keep_batch": keep("memory `batch`"),
    }
    if not frozen:  # else the towers would run twice
        rows |= {f"bare_{size}": bare(share) for size, share in (("quarter", 0.25), ("whole", 1.0))}
        rows["bare_quarter_every2"] = bare(0.25, 2)
    return {("frozen_" if frozen else "") + name: row for name, row in rows.items()}


ROWS = _rows(frozen=False) | _rows(frozen=True)
