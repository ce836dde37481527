"""What a run does when a step goes wrong: a stated rule, kept in the checkpoints."""

import math
from collections import deque
from statistics import median

from redepth.errors import RedepthError

REMEMBERED = 100  # steps
FEWEST = 20  # steps before a median is trusted


class SpikeGuard:
    """Decides which optimiser steps to skip.

    A step is skipped where its loss or its gradient norm is not finite, or exceeds `factor` times the median over the
    last `REMEMBERED` steps that were taken, once there have been `FEWEST` of them. Its gradients are dropped; weights,
    moments and the step count of the optimiser stay as they are, while data, depth and schedules move on. After
    `max_skipped` such steps in a row the run ends.
    """

    def __init__(self, factor: float, max_skipped: int) -> None:
        self.factor = factor
        self.max_skipped = max_skipped
        self.in_a_row = 0
        self.skipped: list[int] = []
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._norms: deque[float] = deque(maxlen=REMEMBERED)

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Why to skip this step; None to take it.

        Raises:
            RedepthError: after too many in a row.
        """
        trouble = self._trouble("loss", loss, self._losses) or self._trouble("gradient norm", norm, self._norms)
        if trouble is None:
            self._losses.append(loss)
            self._norms.append(norm)
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.skipped.append(step)
        if self.in_a_row >= self.max_skipped:
            raise RedepthError(
                f"{self.in_a_row} steps in a row were skipped, the last, step {step}, since its {trouble}; lower the "
                "learning rate or look at the data"
            )
        return trouble

    def _trouble(self, name: str, value: float, seen: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(seen) >= FEWEST and value > self.factor * median(seen):
            return f"{name} {value:.3g} is over {self.factor:g} times the median {median(seen):.3g}"
        return None

    def state(self) -> dict[str, object]:
        return {
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state(self, state: dict[str, object]) -> None:
        self.in_a_row = state["in_a_row"]  # type: ignore[assignment]
        self.skipped = list(state["skipped"])  # type: ignore[call-overload]
        self._losses.extend(state["losses"])  # type: ignore[arg-type]
        self._norms.extend(state["norms"])  # type: ignore[arg-type]
