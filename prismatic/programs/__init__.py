"""The programs around training, one file each; `vla-scripts/` has a front for each of them."""
