"""How long a boot may wait: one budget for everything, and growing, random pauses between tries.

The network may come up late, a verifier may be restarting, and a hundred VMs of one host may start in the same second.
So each try has its own deadline, no try outlives the budget of the boot, and nobody's pauses are in step with another's.
Import budget: the standard library and the error tree.
"""

from __future__ import annotations

import math
import time
from random import SystemRandom
from typing import TYPE_CHECKING

from kagimori_protocol.errors import KagimoriError, NetworkError

if TYPE_CHECKING:
    from collections.abc import Callable

_random = SystemRandom().random


class Budget:
    """The seconds that a boot may spend on getting an answer, counted from now. ``math.inf`` waits forever."""

    def __init__(self, total_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start counting; ``clock`` gives seconds that never run backwards."""
        self._clock = clock
        self._total_s = total_s
        self._end = clock() + total_s

    def remaining_s(self) -> float:
        """Give the seconds that are left, never less than 0."""
        return max(0.0, self._end - self._clock())

    def words(self) -> str:
        """Say what is left."""
        return "without end" if math.isinf(self._total_s) else f"{self.remaining_s():.0f} s left"

    def attempt_s(self, most_s: float) -> float:
        """Give the seconds that one attempt may take: ``most_s``, or what is left. Raises as ``require`` does."""
        self.require()
        return min(most_s, self.remaining_s())

    def require(self, last: KagimoriError | None = None) -> None:
        """Raise NetworkError with code ``budget.spent`` if nothing is left; ``last`` is what failed until then."""
        # Asked this way round, a total that is no number at all is spent too.
        if self.remaining_s() > 0:
            return
        raise self.spent(last)

    def spent(self, last: KagimoriError | None = None) -> NetworkError:
        """Make the error that ends the waiting; ``last`` is what failed until then, and stays its cause."""
        if isinstance(last, NetworkError) and last.code == "budget.spent":
            return last
        error = NetworkError(
            "The time that a boot may wait for an answer is over.",
            code="budget.spent",
            expected=f"an answer within {self._total_s:g} s",
            found="none" if last is None else " ".join(filter(None, (last.what, last.found))),
            todo=(last.todo if last else None)
            or "Is the network up, and does a verifier run? `kagimori-agent doctor` looks.",
        )
        error.__cause__ = last
        return error


class Backoff:
    """Pauses of random length whose bound doubles from ``min_s`` up to ``max_s`` (full jitter).

    Each pause is drawn evenly between nothing and the bound: what failed together does not come back together.
    """

    def __init__(self, min_s: float, max_s: float, random: Callable[[], float] = _random) -> None:
        """Begin with a bound of ``min_s``; ``random`` draws from 0 to 1."""
        self._bound_s = min_s
        self._max_s = max_s
        self._random = random

    def next_s(self) -> float:
        """Draw the next pause in seconds."""
        bound_s = min(self._bound_s, self._max_s)
        self._bound_s = min(bound_s * 2, self._max_s)
        return self._random() * bound_s
