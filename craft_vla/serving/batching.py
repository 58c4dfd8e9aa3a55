"""Requests that wait together are one forward pass of the policy, in one worker thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)


class Answering(Protocol):
    """The parts of `craft_vla.Policy` that are asked. Both are only called in the worker thread."""

    def check(self, observation: Any) -> None:
        """ValueError for an observation that cannot be answered."""

    def predict_many(self, observations: Sequence[Any]) -> list[np.ndarray]:
        """Chunks (K, A) of checked observations in their order."""


class BusyError(RuntimeError):
    """More requests wait than the server keeps, or one has waited too long. Ask again."""


class PolicyError(RuntimeError):
    """The policy failed on a request that was checked: a fault of the server. Its log has the traceback."""


@dataclass(eq=False)
class _Request:
    observation: Any
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """The queue before a policy.

    Args:
        policy: what is asked.
        max_batch: most requests of a forward pass.
        max_waiting: most requests that wait.
        seconds: after which a request is given up.
        shown: changes chunks (K, A) before they are sent, for instance to a simulator's convention.

    A request is checked before it joins a batch, and a batch that fails is asked one by one: nobody gets an error for
    the request of another. A request whose time is over before its batch begins is not computed.
    """

    def __init__(
        self,
        policy: Answering,
        max_batch: int,
        max_waiting: int,
        seconds: float,
        shown: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self._policy, self._shown = policy, shown
        self._max_batch, self._max_waiting, self._seconds = max_batch, max_waiting, seconds
        self._waiting: deque[_Request] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "policy")
        self._is_running = False
        self._began: float | None = None  # the batch that is worked on

    def trouble(self) -> str | None:
        """Why nobody is answered, in one line; None as long as nothing is known to be wrong."""
        if not self._is_running:
            return "the policy's thread has ended, expected it to run: restart the server"
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        if seconds > self._seconds:
            return f"the policy has worked on one batch for {seconds:.0f} s, expected at most {self._seconds:g} s"
        return None

    async def ask(self, observation: Any) -> np.ndarray:
        """The chunk (K, A) for an observation.

        Raises ValueError for one that cannot be answered, BusyError for too many or too late, PolicyError.
        """
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests wait, expected fewer: ask again later")
        request = _Request(observation, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._wake.set()
        try:
            return await asyncio.wait_for(request.answer, self._seconds)
        except asyncio.TimeoutError:
            raise BusyError(f"no answer within {self._seconds:g} s: ask again later") from None

    async def run(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        self._is_running = True
        try:
            while True:
                await self._wake.wait()
                batch = self._take()
                if not batch:
                    self._wake.clear()
                    continue
                observations = [request.observation for request in batch]
                self._began = time.monotonic()
                outcomes = await loop.run_in_executor(self._thread, self._work, observations)
                self._began = None
                for request, outcome in zip(batch, outcomes, strict=True):
                    if request.answer.done():
                        continue
                    if isinstance(outcome, Exception):
                        request.answer.set_exception(outcome)
                    else:
                        request.answer.set_result(outcome)
                del observations, outcomes, batch, request, outcome  # images; the next batch may be hours away
        finally:
            self._is_running = False
            self._thread.shutdown(wait=False)

    def _take(self) -> list[_Request]:
        batch: list[_Request] = []
        while self._waiting and len(batch) < self._max_batch:
            request = self._waiting.popleft()
            if not request.answer.done():
                batch.append(request)
        return batch

    def _work(self, observations: Sequence[Any]) -> list[np.ndarray | Exception]:
        """A chunk or an error for each; nothing is raised."""
        outcomes: list[np.ndarray | Exception | None] = [self._fault(one) for one in observations]
        good = [i for i, fault in enumerate(outcomes) if fault is None]
        answers = self._answers([observations[i] for i in good])
        for i, answer in zip(good, answers, strict=True):
            outcomes[i] = answer
        return [outcome for outcome in outcomes if outcome is not None]

    def _fault(self, observation: Any) -> Exception | None:
        try:
            self._policy.check(observation)
        except ValueError as error:
            return ValueError(str(error))  # without the traceback, which holds the images
        except Exception as error:
            return self._failed(error)
        return None

    def _answers(self, observations: Sequence[Any]) -> list[np.ndarray | Exception]:
        if not observations:
            return []
        try:
            chunks = [self._shown(chunk) for chunk in self._policy.predict_many(observations)]
            if len(chunks) != len(observations) or not all(np.isfinite(chunk).all() for chunk in chunks):
                raise ArithmeticError(f"{len(chunks)} chunks for {len(observations)}, expected one each, all finite")
            return list(chunks)
        except Exception as error:
            if len(observations) == 1:
                return [self._failed(error)]
        return [self._answers([one])[0] for one in observations]

    @staticmethod
    def _failed(error: Exception) -> PolicyError:
        logger.error("the policy failed", exc_info=error)
        # Messages of libraries name files of this machine; the kind of error will do for the client.
        return PolicyError(f"the policy failed with {type(error).__name__}; the log of the server says more")
