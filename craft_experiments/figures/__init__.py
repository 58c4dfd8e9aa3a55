"""Figures of a table, from the same numbers as its text. One file per figure; `write.py` lists them."""
