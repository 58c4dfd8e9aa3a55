"""Faults outside the training code, as one sentence that says what to do: dead data workers, lost processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from prismatic.training.config import FinetuneConfig

# What gloo, NCCL and the store say when another process is gone or silent.
_LOST = re.compile(
    r"gloo|NCCL|ProcessGroup|Connection (closed|reset|refused)|Broken pipe|Timed out|recvValue|[Tt]imeout|DistStore",
)


class DataWorkerError(RuntimeError):
    """A process that prepares batches died."""


class LostProcessError(RuntimeError):
    """Another process of a distributed run is gone or did not answer in time."""


@contextmanager
def explained_faults(cfg: FinetuneConfig, num_processes: int) -> Iterator[None]:
    """Raise DataWorkerError and LostProcessError instead of what torch says; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise DataWorkerError(
                f"a data worker died ({error}). Usually the memory was exhausted: lower --num_data_workers (it is "
                f"{cfg.num_data_workers}). --resume auto continues from the last checkpoint"
            ) from error
        if num_processes > 1 and _LOST.search(str(error)):
            raise LostProcessError(
                f"another of the {num_processes} processes is gone or did not answer within --ddp_timeout "
                f"{cfg.ddp_timeout:g} s ({str(error).splitlines()[0]}). Its own output says why; --resume auto "
                "continues from the last checkpoint"
            ) from error
        raise
