"""CRaFT: fine-tune a vision-language-action policy and keep what it could do before.

import craft_vla

start, data = "pretrained_models/tiny-libero-object", "libero_spatial_scripted_no_noops"
flags = {"use_craft": True, "craft_preset": "keep", "batch_size": 16, "learning_rate": 3.5e-4, "max_steps": 800}
folder = craft_vla.finetune(config_file_path=start, data_root_dir="datasets/rlds", dataset_name=data, **flags)
policy = craft_vla.load_policy(folder, unnorm_key=data)  # whose statistics: those of the new task
actions = policy.predict({"image": front, "wrist_image": wrist}, state, "put the bowl on the plate")  # (8, 7)

`help(craft_vla.load_policy)` and `help(craft_vla.finetune)` say what goes in and what comes out.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from craft_vla.policy import Observation, Policy, load_policy
    from craft_vla.training import finetune

_HOMES = {"Observation": "policy", "Policy": "policy", "finetune": "training", "load_policy": "policy"}
__all__ = ["Observation", "Policy", "finetune", "load_policy"]

try:
    __version__ = version("craft-vla")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'craft_vla' has no attribute {name!r}")
    return getattr(import_module(f"craft_vla.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What `help` lists and an editor completes."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
