"""Methods of keeping what the start model could do (`methods.py`), and the protocol the optimizer step talks to."""
