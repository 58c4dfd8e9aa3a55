"""Checks of everything that is known to change LIBERO success rates without an error message."""
