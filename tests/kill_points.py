"""Kills a piece of work before each call that changes the file system, one after the other, and lets it go on.

For scripts that tests start: they are forked, so they must have no threads.
"""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink")


def ends_with(work: Callable[[], None], kill_at: int | None = None) -> int:
    """Run `work` in a process of its own that dies before its call number `kill_at`; how it ended, as of `os.wait`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        if kill_at is not None:
            kill_at_call(kill_at)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_at_call(number: int, names: Sequence[str] = CALLS) -> None:
    """Let this process die before its call number `number` of these functions of `os`."""
    calls: list[str] = []

    def patch(name: str) -> None:
        original = getattr(os, name)

        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, wrapped)

    for name in names:
        patch(name)


def kills(work: Callable[[int], None], check: Callable[[int], None]) -> int:
    """Kill `work(n)` at its n-th call, let `work(n)` run again to its end, and `check(n)`, for n from 1 on.

    Returns:
        The number of kills; `work` ended by itself at the last.
    """
    for number in itertools.count(1):
        if ends_with(partial(work, number), number) != signal.SIGKILL:
            return number - 1
        status = ends_with(partial(work, number))
        assert status == 0, f"the run after kill {number} failed: {status}"
        check(number)
    raise AssertionError("unreachable")
