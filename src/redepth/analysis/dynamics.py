"""What the state does as the core is looped: pure functions of recorded states.

Shapes: `states` is `[tokens, steps, width]` with the initial state first, so that index i is s_i; any array or tensor.
Distances are relative to the length of the last state. After Geiping et al. 2025, sections 7.1 to 7.4.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from redepth.errors import RedepthError

Floats = npt.NDArray[np.floating[Any]]

# Two equal states are this far apart in the logarithm; fp32 resolves less than it.
CLOSEST = 1e-8
# A state within this share of its own length of the last one counts as arrived.
SETTLED = 0.05

FIXED_POINT, ORBIT, SLIDER, DRIFTING = "fixed point", "orbit", "slider", "drifting"
ENDINGS = (FIXED_POINT, ORBIT, SLIDER, DRIFTING)


@dataclass(frozen=True)
class EndingTests:
    """The thresholds by which the tail of a trajectory shows what it ends in.

    Attributes:
        tail: share of the steps, from the end, that count as the tail.
        fixed_extent: a fixed point's tail stays within this distance of its mean (root mean square, relative to the
            length of the mean).
        fixed_shrink: or it is still arriving: the second half of the tail moves less than this share of the first half.
        orbit_return: an orbit comes back: for some number of steps p ≥ 2, states p apart are closer (mean squared
            distance) than this share of states fewer steps apart.
        slider_line: a slider moves along a line: a straight course at even speed explains this share of the variance of
            its tail.
    """

    tail: float = 0.6
    fixed_extent: float = 0.03
    fixed_shrink: float = 0.5
    orbit_return: float = 0.5
    slider_line: float = 0.8


# Fewer steps show neither a course nor a return.
FEWEST_STEPS = 8
# A mean over fewer pairs of states says little about a return.
FEWEST_PAIRS = 4


def _array(states: Any, dimensions: str) -> Floats:
    """As fp64, with as many dimensions as are named.

    Raises:
        RedepthError: for another number of dimensions.
    """
    if hasattr(states, "detach"):
        states = states.detach().double().cpu().numpy()
    found = np.asarray(states, dtype=np.float64)
    if found.ndim != len(dimensions.split(",")):
        raise RedepthError(f"an array has shape {list(found.shape)}, but [{dimensions}] is needed")
    return found


def _log(distances: Floats, lengths: Floats) -> Floats:
    return np.log10(np.maximum(distances / np.maximum(lengths, CLOSEST), CLOSEST))


def distance_to_last(states: Any) -> Floats:
    """log10 ‖s_i − s_R‖ / ‖s_R‖, `[tokens, R + 1]`; the last column is log10 of `CLOSEST`."""
    s = _array(states, "tokens, steps, width")
    return _log(np.linalg.norm(s - s[:, -1:], axis=-1), np.linalg.norm(s[:, -1:], axis=-1))


def distance_to_next(states: Any) -> Floats:
    """log10 ‖s_{i+1} − s_i‖ / ‖s_{i+1}‖, `[tokens, R]`: what the exit test `latent-diff` looks at."""
    s = _array(states, "tokens, steps, width")
    return _log(np.linalg.norm(np.diff(s, axis=1), axis=-1), np.linalg.norm(s[:, 1:], axis=-1))


def settling_step(states: Any, tolerance: float = SETTLED) -> npt.NDArray[np.int64]:
    """The first step from which on the state stays within `tolerance` of the last one, `[tokens]`, from 0 to R."""
    away = distance_to_last(states) > np.log10(tolerance)
    steps = away.shape[1]
    return np.where(away.any(1), steps - np.argmax(away[:, ::-1], axis=1), 0)


def principal_components(states: Any, components: int = 6, per_token: bool = False) -> tuple[Floats, Floats]:
    """Trajectories in the directions in which they vary most.

    Args:
        components: how many directions; no more than width and states allow are given.
        per_token: each trajectory about its own mean and in its own directions, in place of all in the same.

    Returns:
        coordinates `[tokens, steps, components]`, and the share of the variance that each direction explains:
        `[components]`, or `[tokens, components]` with `per_token`.
    """
    s = _array(states, "tokens, steps, width")
    tokens, steps, width = s.shape
    if per_token:
        found = [principal_components(one[None], components) for one in s]
        return np.concatenate([place for place, _ in found]), np.stack([share for _, share in found])
    flat = s.reshape(-1, width)
    flat = flat - flat.mean(0)
    left, sizes, _ = np.linalg.svd(flat, full_matrices=False)
    kept = min(components, len(sizes))
    share = sizes**2 / max(float((sizes**2).sum()), CLOSEST**2)
    return (left[:, :kept] * sizes[:kept]).reshape(tokens, steps, kept), share[:kept]


@dataclass(frozen=True)
class Endings:
    """What each trajectory ends in, with the figures that decided it.

    Attributes:
        names: `[tokens]`, of `ENDINGS`.
        extent, shrink, line, back: `[tokens]`, what `EndingTests` holds against its thresholds.
        period: `[tokens]`, steps of an orbit's round; 0 for the others.
    """

    names: npt.NDArray[np.str_]
    extent: Floats
    shrink: Floats
    line: Floats
    back: Floats
    period: npt.NDArray[np.int64]

    def share(self, ending: str) -> float:
        """The share of tokens that end so."""
        return float(np.mean(self.names == ending))


def classify_endings(states: Any, tests: EndingTests | None = None) -> Endings:
    """Classify each as fixed point, orbit, slider or none of them by the tests of `EndingTests`, in this order.

    Raises:
        RedepthError: for fewer than `FEWEST_STEPS` states, which show no ending.
    """
    tests = tests if tests is not None else EndingTests()
    s = _array(states, "tokens, steps, width")
    if s.shape[1] < FEWEST_STEPS:
        raise RedepthError(
            f"{s.shape[1]} states are too few to tell what they end in; run at least {FEWEST_STEPS - 1} steps"
        )
    kept = max(round(tests.tail * s.shape[1]), FEWEST_STEPS)
    tail = s[:, -kept:]
    mean = tail.mean(1, keepdims=True)
    centred = tail - mean
    variance = (centred**2).sum((1, 2))
    extent = np.sqrt(variance / kept) / np.maximum(np.linalg.norm(mean[:, 0], axis=-1), CLOSEST)

    moved = np.sqrt((np.diff(tail, axis=1) ** 2).sum(-1))
    half = moved.shape[1] // 2
    before, after = (np.sqrt((part**2).mean(1)) for part in (moved[:, :half], moved[:, -half:]))
    shrink = after / np.maximum(before, CLOSEST)

    clock = np.linspace(-1.0, 1.0, kept)
    slope = np.einsum("t,ntd->nd", clock, centred) / (clock**2).sum()
    line = (slope**2).sum(-1) * (clock**2).sum() / np.maximum(variance, CLOSEST**2)

    back, period = _returns(tail)
    names = np.select(
        [
            (extent < tests.fixed_extent) | (shrink < tests.fixed_shrink),
            line > tests.slider_line,
            back < tests.orbit_return,
        ],
        [FIXED_POINT, SLIDER, ORBIT],
        DRIFTING,
    )
    return Endings(names, extent, shrink, line, back, np.where(names == ORBIT, period, 0))


def _returns(tail: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """How close states come again to where they were, and after how many steps, each `[tokens]`."""
    lags = range(1, max(tail.shape[1] - FEWEST_PAIRS, 2) + 1)
    apart = np.stack([((tail[:, lag:] - tail[:, :-lag]) ** 2).sum(-1).mean(1) for lag in lags], axis=1)
    farthest_before = np.maximum.accumulate(apart, axis=1)[:, :-1]
    ratio = apart[:, 1:] / np.maximum(farthest_before, CLOSEST**2)
    best = ratio.argmin(1)
    return ratio[np.arange(len(ratio)), best], best + 2


def spread_over_starts(runs: Any) -> Floats:
    """Path independence: how far apart runs from different initial states are, step by step.

    Args:
        runs: `[starts, tokens, steps, width]`.

    Returns:
        log10 of the root mean squared distance from the runs' mean relative to the mean's length, `[tokens, steps]`: it
        falls to the precision where the ending does not depend on the start (Anil et al. 2022).

    Raises:
        RedepthError: for a single start.
    """
    s = _array(runs, "starts, tokens, steps, width")
    if len(s) < 2:
        raise RedepthError(f"path independence compares starts, got {len(s)}; give at least 2")
    mean = s.mean(0)
    apart = np.sqrt(((s - mean) ** 2).sum(-1).mean(0))
    return _log(apart, np.linalg.norm(mean, axis=-1))
