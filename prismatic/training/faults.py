"""Faults outside the training code, as one sentence that says what to do: dead data workers, lost processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from prismatic.craft import NonFiniteRetentionError
from prismatic.training.checkpoint_folder import CheckpointWriteError
from prismatic.training.config import FinetuneConfig
from prismatic.training.step import NonFiniteLossError
from prismatic.vla.datasets.source import DataSetError

# What gloo, NCCL and the store say when another process is gone or silent.
_LOST = re.compile(
    r"gloo|NCCL|ProcessGroup|Connection (closed|reset|refused)|Broken pipe|Timed out|recvValue|[Tt]imeout|DistStore",
)


class DataWorkerError(RuntimeError):
    """A process that prepares batches died."""


class LostProcessError(RuntimeError):
    """Another process of a distributed run is gone or did not answer in time."""


FAULTS = (
    NonFiniteLossError,
    NonFiniteRetentionError,
    DataSetError,  # an image that breaks behind its header is found when it is decoded
    DataWorkerError,
    LostProcessError,
    CheckpointWriteError,
)
"""How a training can end by no mistake of this code; the message says what to do."""


def batches_of(loader: DataLoader[Any]) -> Iterator[dict[str, Any]]:
    """The loader's batches; its workers end with the iteration.

    Their own clean-up comes too late after an error, whose traceback holds on to the iterator: until then torch raises
    the death of a worker again, wherever the main thread is.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        end_workers = getattr(iterator, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()


@contextmanager
def explained_faults(cfg: FinetuneConfig, num_processes: int) -> Iterator[None]:
    """Raise DataWorkerError and LostProcessError instead of what torch says; other errors pass unchanged.

    Of a DataSetError from a data worker the traceback is left out.
    """
    try:
        yield
    except DataSetError as error:
        raise DataSetError(str(error).strip().splitlines()[-1].rpartition("DataSetError: ")[2]) from error
    except (RuntimeError, EOFError, ConnectionError) as error:
        # A worker that dies while it hands over a batch shows as a broken connection to it.
        is_broken = cfg.num_data_workers > 0 and isinstance(error, (EOFError, ConnectionError))
        if is_broken or "DataLoader worker" in str(error):
            reason = str(error) or type(error).__name__
            raise DataWorkerError(
                f"a data worker died ({reason}). Usually the memory was exhausted: lower --num_data_workers (it is "
                f"{cfg.num_data_workers}). --resume auto continues from the last checkpoint"
            ) from error
        if num_processes > 1 and _LOST.search(str(error)):
            raise LostProcessError(
                f"another of the {num_processes} processes is gone or did not answer within --ddp_timeout "
                f"{cfg.ddp_timeout:g} s ({str(error).splitlines()[0]}). Its own output says why; --resume auto "
                "continues from the last checkpoint"
            ) from error
        raise
