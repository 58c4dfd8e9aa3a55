"""What a traced step means for a run: how much memory it needs, and which cards have it."""

from __future__ import annotations

from prismatic.training.memory.trace import BATCH, KEPT, OPTIMIZER, PARTS, TEMPORARY, WEIGHTS, Trace

GIB = 2**30
CARDS = (10, 12, 16, 24, 32, 48, 80)
"""GiB of common cards."""
CONTEXT = 0.75 * GIB
"""Allowance for the CUDA context, kernels and the libraries' workspaces."""
FRAGMENTATION = 0.03
"""Allowance for what the allocator holds beyond the tensors, as a share of them."""
_FIXED = (WEIGHTS, OPTIMIZER, KEPT)


def allowance(tensors: float) -> float:
    """Bytes beyond the tensors that are allowed for. An estimate, not a measurement."""
    return CONTEXT + FRAGMENTATION * tensors


def peak_at(trace: Trace, traced_batch: int, batch: int) -> float:
    """Bytes of tensors at another batch size, from the trace at one.

    The backward pass gives up what a part keeps, which grows with the batch, and makes its gradients, which do not:
    with a large batch the peak is at its beginning, with a small one after the head or at the end.
    """

    def highest(size: float) -> float:
        fixed = sum(trace.by_kind[kind] for kind in _FIXED)
        by_batch = size / traced_batch
        here = fixed + by_batch * (trace.by_kind[BATCH] + trace.by_kind[TEMPORARY] + sum(trace.kept.values()))
        stages = [here]
        for part in PARTS:
            here += trace.gradients[part] - by_batch * trace.kept[part]
            stages.append(here)
        return max(stages)

    return highest(batch) + trace.peak - highest(traced_batch)


def largest_batch(trace: Trace, traced_batch: int, card: float) -> int:
    """The largest batch size that fits a card of so many GiB; 0 when none does."""
    batch = 0
    while batch < 4096 and (need := peak_at(trace, traced_batch, batch + 1)) + allowance(need) <= card * GIB:
        batch += 1
    return batch


def lines(trace: Trace, batch: int, precision: str) -> list[str]:
    """The prediction for people; `precision` is the run's mixed precision."""
    extra = allowance(trace.peak)
    shares = [f"  {kind:<24}{size / GIB:7.2f}" for kind, size in trace.by_kind.items() if size >= 0.005 * GIB]
    cards = [(card, largest_batch(trace, batch, card)) for card in CARDS]
    fits = [f"  {card:>3} GB: " + (f"batch size up to {most}" if most else "does not fit") for card, most in cards]
    return [
        f"parameters: {trace.parameters:,}, trained: {trace.trained:,}",
        f"work per step: {trace.flops / 1e12:.2f} TFLOP (products, convolutions, attention)",
        f"predicted peak of tensors, batch size {batch}, mixed precision {precision}: {trace.peak / GIB:.2f} GiB; what "
        "the forward pass keeps is listed by its part",
        *shares,
        f"allowance for CUDA context, workspaces and fragmentation: {extra / GIB:.2f} GiB; in all "
        f"{(trace.peak + extra) / GIB:.2f} GiB",
        "cards, each for one process, other batch sizes estimated from this one:",
        *fits,
    ]
