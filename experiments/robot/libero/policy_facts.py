"""What a loaded policy says about itself, and the flags that must agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.modes import RenderMode
from prismatic.vla.prompts import PromptKind

DEFAULT_IMAGE_SIZE = 256


@dataclass(frozen=True)
class PolicyFacts:
    """Facts from the checkpoint; None where it does not state them.

    render_modes, image_sizes: distinct values recorded with its training data (demonstrations collected in a simulator
    record theirs, the published data sets record none).
    """

    num_images_in_input: int | None = None
    use_proprio: bool | None = None
    use_pro_version: bool | None = None
    center_crop: bool | None = None
    chunk_len: int | None = None
    render_modes: tuple[str, ...] = ()
    image_sizes: tuple[int, ...] = ()
    use_minivlm: bool | None = None


def read_policy_facts(policy: Any) -> PolicyFacts:
    """Facts of a `VLAPolicy`, or of any object with some of `metadata`, `image_spec` and `action_spec`.

    `metadata` keys used: num_images, use_proprio, action_head.use_pro_version, prompt_kind and
    datasets.<name>.render_mode, datasets.<name>.image_size.
    """
    metadata = getattr(policy, "metadata", None) or {}
    kind = metadata.get("prompt_kind")
    recorded = [data for data in (metadata.get("datasets") or {}).values() if data]
    return PolicyFacts(
        num_images_in_input=metadata.get("num_images"),
        use_proprio=metadata.get("use_proprio"),
        use_pro_version=(metadata.get("action_head") or {}).get("use_pro_version"),
        use_minivlm=None if kind is None else kind == PromptKind.QWEN_CHAT.value,
        center_crop=getattr(getattr(policy, "image_spec", None), "center_crop", None),
        chunk_len=getattr(getattr(policy, "action_spec", None), "chunk_len", None),
        render_modes=tuple(sorted({data["render_mode"] for data in recorded if "render_mode" in data})),
        image_sizes=tuple(sorted({data["image_size"] for data in recorded if "image_size" in data})),
    )


def check_flags(cfg: EvalConfig, facts: PolicyFacts) -> None:
    """Refuse flags that contradict the checkpoint; a flag left at None follows it.

    Raises:
        EvalInputError: naming the flag, its value and the checkpoint's.
    """
    for name in ("num_images_in_input", "use_proprio", "use_pro_version", "use_minivlm", "center_crop"):
        wanted, found = getattr(cfg, name), getattr(facts, name)
        if wanted is not None and found is not None and wanted != found:
            raise EvalInputError(f"--{name} {wanted}: the checkpoint {cfg.pretrained_checkpoint} has {name} = {found}")
    if facts.chunk_len is not None and cfg.num_open_loop_steps > facts.chunk_len:
        raise EvalInputError(
            f"--num_open_loop_steps {cfg.num_open_loop_steps}: the checkpoint {cfg.pretrained_checkpoint} predicts "
            f"chunks of {facts.chunk_len} actions"
        )


def resolve_render_mode(cfg: EvalConfig, facts: PolicyFacts) -> RenderMode:
    """The flag, else the mode of the training data, else published.

    Raises:
        EvalInputError: no flag, and the training data name several modes or an unknown one.
    """
    if cfg.render_mode is not None:
        return cfg.render_mode
    name = _single("render_mode", facts.render_modes, RenderMode.PUBLISHED.value)
    try:
        return RenderMode(name)
    except ValueError:
        known = [mode.value for mode in RenderMode]
        raise EvalInputError(
            f"--render_mode: the training data record {name!r}, expected one of {known}; choose one of them"
        ) from None


def resolve_image_size(cfg: EvalConfig, facts: PolicyFacts) -> int:
    """The flag, else the size of the training data's images, else 256. Raises EvalInputError for several sizes."""
    if cfg.env_img_res is not None:
        return cfg.env_img_res
    return _single("env_img_res", facts.image_sizes, DEFAULT_IMAGE_SIZE)


def _single(flag: str, found: tuple, default: Any) -> Any:
    if len(found) > 1:
        raise EvalInputError(f"--{flag}: the checkpoint's data sets were rendered with {list(found)}; choose one")
    return found[0] if found else default
