"""The gate of the projection: it opens while the averaged retention loss is above gamma * eps."""

from __future__ import annotations

from prismatic.craft.fields import CRaFTFields, When


class Gate:
    """Follows the retention loss: mean <- nu mean + (1 - nu) loss; the first loss is the first mean."""

    def __init__(self, config: CRaFTFields) -> None:
        self.config = config
        self.loss_mean: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether the averaged loss is above gamma * eps."""
        return self.loss_mean is not None and self.loss_mean > self.config.projection_gamma * self.config.loss_budget

    @property
    def is_open(self) -> bool:
        """Whether projection is on: always, or while the averaged loss is above gamma * eps."""
        return self.config.projection_when is When.ALWAYS or self.is_active

    def step(self, loss: float) -> None:
        """Take in the loss of a step, a finite number."""
        nu = self.config.dual_nu
        self.loss_mean = loss if self.loss_mean is None else nu * self.loss_mean + (1 - nu) * loss
