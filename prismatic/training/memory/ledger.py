"""The account of live tensor memory: every storage from its first tensor to its last, by what it is for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

_READ_BACK = torch.ops.aten._local_scalar_dense.default


def _attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    flops: int = flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    flops: int = flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return flops


# The registry lacks the fused attention of CPUs; its formulas are those of the CUDA kernels.
_FLOPS = flop_counter.flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is active, and their largest sum.

    Works on real and on fake tensors alike. A number that is read back from a fake tensor is 1, so that a step can be
    run which looks at its losses.

    Attributes:
        kind: what the storages that are made now are for.
        now, peak: live bytes, and their largest sum so far.
        by_kind, peak_by_kind: the same by kind.
        flops: of matrix products, convolutions and attention; elementwise work is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "other"
        self.now = self.peak = self.flops = 0
        self.by_kind: Counter[str] = Counter()
        self.peak_by_kind: Counter[str] = Counter()
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _READ_BACK and isinstance(args[0], FakeTensor):
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        self._note(out)
        if (count := _FLOPS.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _note(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self.enter(out)
        elif isinstance(out, (tuple, list)):
            for value in out:
                self._note(value)

    def enter(self, tensor: Tensor) -> None:
        """Take up the storage of a tensor that was made before, or outside."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = weakref.ref(storage, lambda _: self._leave(key)), size, self.kind
        self._add(size, self.kind)

    def _leave(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self.now -= size
        self.by_kind[kind] -= size

    def _add(self, size: int, kind: str) -> None:
        self.now += size
        self.by_kind[kind] += size
        if self.now > self.peak:
            self.peak, self.peak_by_kind = self.now, self.by_kind.copy()

    def reclassify(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of live storages what they are for."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                reference, size, before = self._live[key]
                self._live[key] = reference, size, kind
                self.by_kind[before] -= size
                self.by_kind[kind] += size

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_by_kind = self.now, self.by_kind.copy()

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """What is made in this context is for `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def follow(self, module: nn.Module, kind: str) -> list[RemovableHandle]:
        """What a module makes in its forward pass is for `kind`, but for what its own followed parts make.

        Returns the handles of its hooks.
        """
        outer: list[str] = []

        def begin(*_: Any) -> None:
            outer.append(self.kind)
            self.kind = kind

        def end(*_: Any) -> None:
            self.kind = outer.pop()

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
