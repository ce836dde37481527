"""Dynamics whose answer is known: classification, distances, principal components, path independence, contraction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redepth import RedepthError
from redepth.analysis.contraction import largest_stretch
from redepth.analysis.dynamics import (
    CLOSEST,
    DRIFTING,
    ENDINGS,
    FIXED_POINT,
    ORBIT,
    SLIDER,
    classify_endings,
    distance_to_last,
    distance_to_next,
    principal_components,
    settling_step,
    spread_over_starts,
)

STEPS, WIDTH = 33, 24


def unit(generator: np.random.Generator, rows: int = 1) -> np.ndarray:
    """Orthonormal directions `[rows, WIDTH]`."""
    return np.linalg.qr(generator.normal(size=(WIDTH, rows)))[0].T


def made_up(ending: str, seed: int, noise: float = 0.01) -> np.ndarray:
    """A trajectory `[STEPS, WIDTH]` about a point of length 1 that ends as named, seen with noise of that length."""
    generator = np.random.default_rng(seed)
    clock = np.arange(STEPS)[:, None]
    centre, (first, second) = unit(generator)[0], unit(generator, 2)
    approach = unit(generator) * generator.uniform(0.3, 2) * generator.uniform(0.2, 0.6) ** clock
    if ending == FIXED_POINT:
        angle = generator.uniform(0, 2) * clock
        shrink = generator.uniform(0.1, 0.85) ** clock
        course = generator.uniform(0.3, 2) * shrink * (np.cos(angle) * first + np.sin(angle) * second)
    elif ending == ORBIT:
        angle = 2 * np.pi * clock / generator.uniform(2, 12) + generator.uniform(0, 6)
        size = generator.uniform(0.1, 1)
        course = size * (np.cos(angle) * first + generator.uniform(0.3, 1) * np.sin(angle) * second) + approach
    elif ending == SLIDER:
        course = generator.uniform(0.02, 0.3) * clock * first + approach
    else:
        course = generator.uniform(0.1, 0.3) * generator.normal(size=(STEPS, WIDTH)).cumsum(0) / WIDTH**0.5
    return centre + course + noise * generator.normal(size=(STEPS, WIDTH)) / WIDTH**0.5


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02])
def test_made_up_dynamics_are_told_apart(noise: float) -> None:
    right = {}
    for ending in ENDINGS:
        states = np.stack([made_up(ending, seed, noise) for seed in range(150)])
        right[ending] = classify_endings(states).share(ending)
    assert min(right.values()) >= 0.95, right


def test_a_random_walk_in_many_dimensions_is_no_orbit() -> None:
    # Its principal components look like one: they are cosines of the step.
    walk = np.random.default_rng(0).normal(size=(50, 33, 300)).cumsum(1)
    endings = classify_endings(walk)
    assert endings.share(DRIFTING) == 1.0
    assert (endings.period == 0).all()


@given(period=st.integers(2, 10), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_an_orbit_has_its_period(period: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    one_round = generator.normal(size=(period, WIDTH))
    states = 5 * unit(generator) + np.tile(one_round, (6 + 40 // period, 1))[:41]
    endings = classify_endings(states[None])
    assert endings.names[0] == ORBIT
    assert endings.period[0] == period


def test_a_change_of_scale_or_of_axes_changes_no_ending() -> None:
    states = np.stack([made_up(ending, seed) for ending in ENDINGS for seed in range(10)])
    turned = 37.0 * states @ np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    assert (classify_endings(states).names == classify_endings(turned).names).all()


def test_distances_of_a_halving_state() -> None:
    target, offset = np.ones(4), np.array([1.0, 0, 0, 0])
    states = torch.tensor(np.stack([target + offset * 0.5**i for i in range(10)])[None])
    to_last = distance_to_last(states)
    assert to_last.shape == (1, 10)
    assert to_last[0, -1] == np.log10(CLOSEST)
    length = np.linalg.norm(target + offset * 0.5**9)
    np.testing.assert_allclose(to_last[0, :3], np.log10([(0.5**i - 0.5**9) / length for i in range(3)]))
    expected = [0.5 ** (i + 1) / np.linalg.norm(target + offset * 0.5 ** (i + 1)) for i in range(9)]
    np.testing.assert_allclose(distance_to_next(states)[0], np.log10(expected))


def test_settling_step() -> None:
    steps = np.array([[1.0, 2.0, 1.0, 1.01, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0, 1.0]])
    assert settling_step(steps[..., None]).tolist() == [2, 0, 4]


def test_principal_components_keep_distances_of_a_plane() -> None:
    generator = np.random.default_rng(0)
    flat = generator.normal(size=(3, 9, 2)) * [2.0, 0.5]
    states = flat @ unit(generator, 2) + 3
    found, share = principal_components(states, 4)
    np.testing.assert_allclose(share[:2].sum(), 1)
    assert share[0] > share[1]
    apart = np.linalg.norm(flat[0, 0] - flat[2, 5])
    np.testing.assert_allclose(np.linalg.norm(found[0, 0] - found[2, 5]), apart)
    own, shares = principal_components(states, 2, per_token=True)
    np.testing.assert_allclose(own.mean(1), 0, atol=1e-12)
    assert shares.shape == (3, 2)


def test_path_independence_sees_where_starts_meet_and_where_not() -> None:
    generator = np.random.default_rng(0)
    starts = generator.normal(size=(4, 2, 1, 8))
    clock = 0.5 ** np.arange(30)[:, None]
    runs = 1 + starts * clock
    runs[:, 1] = 1 + starts[:, 1] * np.ones((30, 1))  # the second token keeps its start
    spread = spread_over_starts(runs)
    assert spread.shape == (2, 30)
    np.testing.assert_allclose(np.diff(spread[0, 5:20]), np.log10(0.5), atol=0.02)
    assert spread[1, -1] > -0.5
    with pytest.raises(RedepthError, match="at least 2"):
        spread_over_starts(runs[:1])


def test_the_stretch_of_a_linear_map_is_its_largest_singular_value() -> None:
    left, right = (torch.linalg.qr(torch.randn(12, 12))[0] for _ in range(2))
    sizes = torch.linspace(3.0, 0.1, 12)
    weight = left @ torch.diag(sizes) @ right
    found = largest_stretch(lambda s: s @ weight.T, torch.randn(1, 12), iterations=200, tolerance=1e-6)
    assert found.converged
    assert found.largest == pytest.approx(3.0, rel=1e-3)
    assert not largest_stretch(lambda s: s @ weight.T, torch.randn(1, 12), iterations=1).converged


def test_the_stretch_of_a_curved_map_is_that_of_its_jacobian() -> None:
    weight, state = torch.randn(6, 6), torch.randn(1, 6)
    jacobian = torch.autograd.functional.jacobian(lambda s: torch.tanh(s @ weight), state).reshape(6, 6)
    found = largest_stretch(lambda s: torch.tanh(s @ weight), state, iterations=300, tolerance=1e-7)
    assert found.largest == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-3)


def test_arrays_that_do_not_fit_end_in_one_line() -> None:
    with pytest.raises(RedepthError, match=r"\[3, 4\].*\[tokens, steps, width\]"):
        classify_endings(np.zeros((3, 4)))
    with pytest.raises(RedepthError, match="too few"):
        classify_endings(np.zeros((3, 4, 2)))
    with pytest.raises(RedepthError, match="iterations"):
        largest_stretch(lambda s: s, torch.ones(3), iterations=0)
