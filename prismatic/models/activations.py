"""What a mixed-precision forward pass keeps for its backward pass: as little as can be had without a second product.

Under autocast the results of matrix products are kept, and what follows from them cheaply (norms, activation functions,
gated products) is made again when it is asked for. Values are those of the plain formulas: sums in float32, one
rounding at the end. Without autocast, and in compiled passes, whose compiler decides for itself, nothing here differs
from the plain formulas.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product_dtype(x: Tensor) -> torch.dtype | None:
    """dtype of matrix products on this tensor's device under autocast, None without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def as_stream(x: Tensor) -> Tensor:
    """The residual stream in the precision of the step: bf16 under bf16 autocast, else as it is (fp16 overflows)."""
    return x.bfloat16() if product_dtype(x) is torch.bfloat16 else x


# ------------------------------------------------------------------------------------------- what is made again


class _Again:
    """A tensor that is made again instead of kept."""

    last: tuple[_Again, Tensor] | None = None  # several products read one tensor, one after another

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute

    def value(self) -> Tensor:
        if _Again.last is None or _Again.last[0] is not self:
            _Again.last = None  # before the next one takes its memory
            with torch.no_grad():
                _Again.last = self, self._compute()
        return _Again.last[1]


class _Pass:
    """The tensors of one forward pass that can be made again, by their storage."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, _Again]] = {}

    def remember(self, tensor: Tensor, compute: Callable[[], Tensor]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        # The entry ends with the storage: its address may then be given to another one.
        self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None)), _Again(compute)

    def pack(self, tensor: Tensor) -> Tensor | tuple:
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            return tensor.detach()  # a result that its own function keeps would hold itself
        return known[1], tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again, dtype, *layout = packed
        return again.value().view(dtype).as_strided(*layout)


_passes: list[_Pass] = []


def fewer_kept() -> AbstractContextManager:
    """Context of a forward pass: tensors that `made_again` knows are not kept. Nothing without autocast."""
    on = any(torch.is_autocast_enabled(kind) for kind in ("cuda", "cpu"))
    if not on or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return _fewer_kept()


@contextmanager
def _fewer_kept() -> Iterator[None]:
    _Again.last = None
    _passes.append(_Pass())
    try:
        with torch.autograd.graph.saved_tensors_hooks(_passes[-1].pack, _Pass.unpack):
            yield
    finally:
        _passes.pop()


def made_again(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """compute(*inputs), contiguous; in `fewer_kept` products that read it do not keep it.

    compute must give the same values again and be cheap; what its own derivative keeps should be the inputs alone.
    """
    out = compute(*inputs)
    if _passes and out.requires_grad:
        kept = [value.detach() for value in inputs]
        _passes[-1].remember(out, lambda: compute(*kept))
    return out


# ------------------------------------------------------------------------------------------------- cheap functions


def activated(name: str, x: Tensor) -> Tensor:
    """The named activation of a product: "gelu" (erf), "gelu_tanh" or "quick_gelu" (x * sigmoid(1.702 x))."""
    if name == "quick_gelu":
        return made_again(lambda h: h * torch.sigmoid(1.702 * h), x)
    return made_again(lambda h: F.gelu(h, approximate="tanh" if name == "gelu_tanh" else "none"), x)


class _Gated(torch.autograd.Function):
    """silu(gate) * up, keeping the two products alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two products of one shape and dtype."""
    return F.silu(gate) * up if not _is_lean(gate) else made_again(_Gated.apply, gate, up)


class _LayerNorm(torch.autograd.Function):
    """Layer norm in float32 of a stream of any dtype, keeping the stream as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gradients = torch.ops.aten.native_layer_norm_backward(
            grad.float(), x.float(), weight.shape, mean, rstd, weight.float(), bias.float(), ctx.needs_input_grad[:3]
        )
        return (
            *(None if g is None else g.to(t.dtype) for g, t in zip(gradients, (x, weight, bias), strict=True)),
            None,
            None,
        )


class _RMSNorm(torch.autograd.Function):
    """weight * x / rms(x) in float32 of a stream of any dtype, keeping the stream as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd * weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad, scaled = grad.float(), x.float() * rstd
        by_weight = (grad * scaled).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        by_x = rstd * (grad - scaled * (grad * scaled).mean(-1, keepdim=True))
        return by_x.to(x.dtype), by_weight, None, None


def _is_lean(x: Tensor) -> bool:
    return product_dtype(x) is not None and not torch.compiler.is_compiling()


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A layer norm over the last axis, for products: under autocast in their dtype."""
    if not _is_lean(x):
        return norm(x)
    eps, dtype = norm.eps, product_dtype(x)
    return made_again(lambda x, weight, bias: _LayerNorm.apply(x, weight, bias, eps, dtype), x, norm.weight, norm.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A root-mean-square norm over the last axis under autocast, for products and in their dtype."""
    dtype = product_dtype(x)
    return made_again(lambda x, weight: _RMSNorm.apply(x, weight, eps, dtype), x, weight)
