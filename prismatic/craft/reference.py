"""theta_0: how the frozen start weights are kept, and how features under them are computed.

All kinds give the same features. They differ in memory and in what they touch:

| kind | memory beside the model | how |
|---|---|---|
| online_swap | the trainable weights | exchanges storage pointers for the duration of the pass |
| disable_adapter | the trainable weights outside adapters | LoRA starts at B = 0: without adapters it is theta_0 |
| functional | the trainable weights | `torch.func.functional_call` with the snapshot; nothing is exchanged by us |
| frozen_copy | the trainable weights | a second module that shares the frozen weights |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from prismatic.craft.settings import AnchorKind

T = TypeVar("T")

if TYPE_CHECKING:

    class AdapterLayer(nn.Module):
        """What is used of PEFT's layers with adapters. For types only: this package does not import PEFT."""

        adapter_layer_names: tuple[str, ...]
        cast_input_dtype_enabled: bool
        disable_adapters: bool

        def enable_adapters(self, enabled: bool) -> None: ...


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


class CRaFTWeightManager:
    """Holds the weights theta_0 of trainable parameters and lends them to the anchor pass.

    Swapping exchanges storage pointers: no element is copied, the optimizer (which is keyed by parameter object) and
    DDP (whose buckets hold gradients) are untouched. A swap between a forward pass and its backward pass would give
    wrong gradients without any error, so swaps are refused inside `live_graph()`; use `initial_weights()`, which
    always swaps back.

    Args:
        module: the module being trained; a DDP wrapper is removed.
        reaches: which trainable parameters to snapshot, by name; None takes all.
    """

    def __init__(self, module: nn.Module, reaches: Callable[[str], bool] | None = None) -> None:
        named = unwrap(module).named_parameters()
        self._parameters = {n: p for n, p in named if p.requires_grad and (reaches is None or reaches(n))}
        self._initial = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._current: dict[str, Tensor] | None = None
        self._graph_is_alive = False

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the snapshot."""
        return sum(t.numel() for t in self._initial.values())

    @property
    def is_swapped(self) -> bool:
        """True while the initial weights are in place."""
        return self._current is not None

    @contextmanager
    def live_graph(self) -> Iterator[None]:
        """Marks the time from a forward pass with gradients to the end of its backward pass: no swap may happen."""
        before, self._graph_is_alive = self._graph_is_alive, True
        try:
            yield
        finally:
            self._graph_is_alive = before

    def require_no_graph(self) -> None:
        """RuntimeError between a forward pass with gradients and the end of its backward pass."""
        if self._graph_is_alive:
            raise RuntimeError(
                "weights must not be exchanged between a forward pass and its backward pass: the gradients would be "
                "wrong without any error"
            )

    def save_current_weights(self) -> None:
        """Remember the weights now in place.

        Raises RuntimeError while the initial weights are in place, or between a forward pass and its backward pass.
        """
        if self.is_swapped:
            raise RuntimeError("the initial weights are already in place; nested swaps would lose the current weights")
        self.require_no_graph()
        self._current = {name: p.data for name, p in self._parameters.items()}

    def swap_to_initial(self) -> None:
        """Put theta_0 in place of the current weights."""
        self.save_current_weights()
        for name, p in self._parameters.items():
            p.data = self._initial[name]
        torch.clear_autocast_cache()  # it holds low-precision copies of the weights that were in place

    def swap_to_current(self) -> None:
        """Put the remembered weights back; does nothing when they are in place."""
        if self._current is None:
            return
        for name, p in self._parameters.items():
            p.data = self._current[name]
        self._current = None
        torch.clear_autocast_cache()

    @contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Context with theta_0 in place. The current weights come back however the body ends."""
        self.swap_to_initial()
        try:
            yield
        finally:
            self.swap_to_current()

    def state_dict(self) -> dict[str, Tensor]:
        """theta_0 by parameter name."""
        return dict(self._initial)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace theta_0, for instance by that of the interrupted run; names and shapes must match."""
        missing, unexpected = sorted(self._initial.keys() - state.keys()), sorted(state.keys() - self._initial.keys())
        if missing or unexpected:
            raise ValueError(f"CRaFT anchor does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}")
        for name, tensor in self._initial.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"CRaFT anchor {name}: found {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])


class Anchor:
    """Runs a function on the module as it was at theta_0. This class is `online_swap`; the others override `run`.

    Args:
        module: the module being trained; a DDP wrapper is removed.
        reaches: which trainable parameters reach the features, by name; None means all.
    """

    kind = AnchorKind.ONLINE_SWAP

    def __init__(self, module: nn.Module, reaches: Callable[[str], bool] | None = None) -> None:
        self.module = unwrap(module)
        self.weights = CRaFTWeightManager(self.module, reaches)

    def run(self, compute: Callable[[nn.Module], T]) -> T:
        """`compute` of the module under theta_0. The current weights are in place afterwards, however it ends."""
        with self.weights.initial_weights():
            return compute(self.module)


class DisableAdapterAnchor(Anchor):
    """theta_0 = base weights without adapters, plus the snapshot of what is trained beside them.

    Raises ValueError when the model has no adapters or they do not start at zero.
    """

    kind = AnchorKind.DISABLE_ADAPTER

    def __init__(self, module: nn.Module, reaches: Callable[[str], bool] | None = None) -> None:
        self._layers = adapter_layers(unwrap(module))
        if not self._layers:
            raise ValueError("CRaFT anchor disable_adapter: the model has no adapters; use --use_lora True")
        if not adapters_start_at_zero(unwrap(module)):
            raise ValueError(
                "CRaFT anchor disable_adapter: the adapters do not start at zero, so the model without them is not the "
                "start model; use functional or online_swap"
            )
        adapter_names = adapter_parameter_names(unwrap(module))
        super().__init__(module, lambda name: name not in adapter_names and (reaches is None or reaches(name)))

    def run(self, compute: Callable[[nn.Module], T]) -> T:
        with self.weights.initial_weights(), self._disabled():
            return compute(self.module)

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        # `enable_adapters` also sets requires_grad, which is not ours to change: it is put back as it was.
        flags = [(p, p.requires_grad) for layer in self._layers for p in layer.parameters()]
        enabled = [layer for layer in self._layers if not layer.disable_adapters]
        for layer in enabled:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class FunctionalAnchor(Anchor):
    """theta_0 is passed to the module for one call; the module's own parameters are not written."""

    kind = AnchorKind.FUNCTIONAL

    def run(self, compute: Callable[[nn.Module], T]) -> T:
        # The parametrisation replaces module attributes, which a checkpointed layer reads again in backward.
        self.weights.require_no_graph()
        snapshot = {f"module.{name}": tensor for name, tensor in self.weights.state_dict().items()}
        value: T = torch.func.functional_call(_Call(self.module, compute), snapshot, ())
        return value


class FrozenCopyAnchor(Anchor):
    """A second module for theta_0. Its weights are the snapshot, its frozen weights those of the model itself."""

    kind = AnchorKind.FROZEN_COPY

    def __init__(self, module: nn.Module, reaches: Callable[[str], bool] | None = None) -> None:
        super().__init__(module, reaches)
        snapshot = self.weights.state_dict()
        memo = {id(buffer): buffer for buffer in self.module.buffers()}
        for name, p in self.module.named_parameters():
            memo[id(p)] = nn.Parameter(snapshot.get(name, p.detach()), requires_grad=False)
        self._copy = copy.deepcopy(self.module, memo)

    def run(self, compute: Callable[[nn.Module], T]) -> T:
        self._copy.eval()
        return compute(self._copy)


class _Call(nn.Module):
    """Makes a function of a module the forward pass of a module, as `functional_call` wants it."""

    def __init__(self, module: nn.Module, compute: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.module, self._compute = module, compute

    def forward(self) -> Any:
        return self._compute(self.module)


ANCHORS = {c.kind: c for c in (Anchor, DisableAdapterAnchor, FunctionalAnchor, FrozenCopyAnchor)}


def build_anchor(kind: AnchorKind, module: nn.Module, reaches: Callable[[str], bool] | None = None) -> Anchor:
    """The anchor of a kind; `auto` disables adapters that start at zero and swaps otherwise, which costs the least.

    Raises ValueError for `disable_adapter` without such adapters.
    """
    if kind is AnchorKind.AUTO:
        has_fresh_adapters = adapter_layers(unwrap(module)) and adapters_start_at_zero(unwrap(module))
        kind = AnchorKind.DISABLE_ADAPTER if has_fresh_adapters else AnchorKind.ONLINE_SWAP
    return ANCHORS[kind](module, reaches)


def extract_anchor_features_online(
    module: nn.Module, compute_features: Callable[[nn.Module], T], anchor: Anchor | CRaFTWeightManager
) -> T:
    """Features of the same batch under theta_0: no gradient, no dropout, RNG untouched, current weights restored.

    Args:
        module: the trained module; its DDP wrapper is bypassed, so that no collective is started.
        compute_features: called with a bare module.
        anchor: any kind, or a weight manager whose snapshot is swapped in.
    """
    module = unwrap(module)
    swapped = anchor.initial_weights() if isinstance(anchor, CRaFTWeightManager) else nullcontext()
    with quiet_pass(module), swapped:
        return compute_features(module) if isinstance(anchor, CRaFTWeightManager) else anchor.run(compute_features)


@contextmanager
def quiet_pass(module: nn.Module) -> Iterator[None]:
    """Context of a measuring pass: no gradient, eval mode, and the random state as before afterwards."""
    # Dropout in the anchor would make L_ret(theta_0) > 0. Flags are restored one by one: frozen parts may be in eval.
    training_modules = [m for m in module.modules() if m.training]
    devices = sorted({p.device.index for p in module.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for m in training_modules:
                m.training = True


@contextmanager
def noise_free(module: nn.Module) -> Iterator[None]:
    """Context of a pass with gradients that draws nothing: eval mode, but with gradient checkpointing where it is on.

    The flags must be the same when a checkpointed layer runs again, so the backward pass belongs inside.
    """
    training_modules = [m for m in module.modules() if m.training]
    checkpointed = [m for m in training_modules if getattr(m, "gradient_checkpointing", False)]
    module.eval()
    for m in checkpointed:  # the flag of the layer itself decides; what could draw is among its children
        m.training = True
    try:
        yield
    finally:
        for m in training_modules:
            m.training = True


def adapter_layers(module: nn.Module) -> list[AdapterLayer]:
    """All layers with adapters: those with PEFT's switch and PEFT's list of what belongs to adapters."""
    found = [m for m in module.modules() if hasattr(m, "enable_adapters") and hasattr(m, "adapter_layer_names")]
    return cast("list[AdapterLayer]", found)


def adapter_parameter_names(module: nn.Module) -> set[str]:
    """Names of the parameters that belong to adapters."""
    names: set[str] = set()
    layers = set(adapter_layers(module))
    for prefix, layer in module.named_modules():
        if layer in layers:
            owned = [n for n, _ in layer.named_parameters() if n.split(".")[0] in layer.adapter_layer_names]
            names.update(f"{prefix}.{n}" if prefix else n for n in owned)
    return names


def adapters_start_at_zero(module: nn.Module) -> bool:
    """Whether every LoRA B matrix is zero, so that the adapters change nothing."""
    matrices = [p for n, p in module.named_parameters() if "lora_B" in n or "lora_embedding_B" in n]
    return bool(matrices) and not any(bool(p.any()) for p in matrices)
