"""CRaFT: fine-tune a vision-language-action policy and keep what it could do before.

policy = craft_vla.load_policy("runs/my_run--1000_chkpt")
actions = policy.predict({"image": front, "wrist_image": wrist}, state, "put the bowl on the plate")
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from craft_vla.policy import Observation, Policy, load_policy

__all__ = ["Observation", "Policy", "load_policy"]

try:
    __version__ = version("craft-vla")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'craft_vla' has no attribute {name!r}")
    from craft_vla import policy

    return getattr(policy, name)
