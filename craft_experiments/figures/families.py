"""Methods that differ by one number."""

from __future__ import annotations

from craft_experiments.cells import Method, Role


def family(method: Method) -> tuple[str, float | None]:
    """Methods that differ by one number form a family; (name, that number)."""
    if method.role is Role.INTERPOLATED:
        return "interpolation, α", method.scale
    for prefix, name, flag in (
        ("penalty_", "fixed penalty, λ", "craft_fixed_lambda"),
        ("l2sp_", "L2-SP, weight", "l2sp_weight"),
        ("craft_budget_", "CRaFT, budget", "craft_retention_budget"),
    ):
        if method.key.startswith(prefix):
            return name, float(method.train[flag])
    if method.key == "craft":
        return "CRaFT, budget", float(method.train["craft_retention_budget"])
    return method.label, None
