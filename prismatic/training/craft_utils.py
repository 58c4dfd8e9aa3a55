"""The documented names of the constraint. Their home is `prismatic.craft`."""

from prismatic.craft import *  # noqa: F403
from prismatic.craft import __all__ as __all__
