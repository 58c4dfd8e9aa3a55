"""One choice of numerical kernels, whatever the processor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def fixed_kernels() -> dict[str, str]:
    """Environment in which numpy's OpenBLAS takes the same kernels on all processors with AVX2 under Linux; else {}.

    By default the library takes the widest kernels that the processor has. They round differently, robosuite's
    controller passes that on, and contacts amplify it: the same command gave other demonstrations on another processor.
    The library reads the variable when it is loaded, so it is for processes that are started afterwards.
    """
    processor = Path("/proc/cpuinfo")  # numpy names its features differently in each version
    has_avx2 = processor.is_file() and "avx2" in processor.read_text().split()
    return {"OPENBLAS_CORETYPE": "Haswell"} if has_avx2 else {}


@contextlib.contextmanager
def kernels_for_children() -> Iterator[None]:
    """Processes started inside take the fixed kernels; what the user set wins.

    Afterwards the environment is as before: a later child must not compute otherwise than this process.
    """
    added = {name: value for name, value in fixed_kernels().items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
