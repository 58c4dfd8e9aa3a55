"""How much memory a run takes, found without running it: the step is traced on tensors that have a size and no content.

`python -m prismatic.training.memory` answers for the flags of `finetune.py`. `ledger.py` keeps the account of live
tensors, `trace.py` runs the step, `start_shape.py` says what the start model looks like, `report.py` which card is
enough.
"""
