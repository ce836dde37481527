"""Plans of any depth: groups are in order, disjoint, and written as they are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redepth.errors import RedepthError
from redepth.surgery.plan import Plan, default_plan, make_plan


@given(st.integers(1, 200))
def test_default_plan_keeps_every_layer(num_layers: int) -> None:
    plan = default_plan(num_layers)
    assert plan.is_full_cover
    assert 1 <= len(plan.core) <= max(num_layers / 4, 1)
    assert abs(len(plan.prelude) - len(plan.coda)) <= 1


@given(st.data())
def test_ranges_are_python_slices(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 60))
    bounds = sorted(data.draw(st.lists(st.integers(0, num_layers), min_size=6, max_size=6)))
    layers = list(range(num_layers))
    prelude, core, coda = (slice(bounds[i], bounds[i + 1]) for i in (0, 2, 4))
    if not layers[core]:
        return
    texts = [f"{part.start}:{part.stop}" for part in (prelude, core, coda)]
    plan = make_plan(num_layers, *texts)
    assert (list(plan.prelude), list(plan.core), list(plan.coda)) == (layers[prelude], layers[core], layers[coda])
    assert sorted(plan.layers + plan.dropped) == layers
    assert make_plan(num_layers, **plan.slices()) == plan
    assert plan.full_cover().is_full_cover


def test_open_and_negative_ends() -> None:
    plan = make_plan(10, ":3", "-6:-4", "8:")
    assert (plan.prelude, plan.core, plan.coda) == ((0, 1, 2), (4, 5), (8, 9))
    assert make_plan(10, core="4:6") == make_plan(10, "0:4", "4:6", "6:10")


@given(st.sets(st.integers(0, 29), min_size=3))
def test_layers_left_out_within_a_group(kept: set[int]) -> None:
    layers = tuple(sorted(kept))
    third = len(layers) // 3
    plan = Plan(layers[:third], layers[third : 2 * third], layers[2 * third :], 30)
    assert make_plan(30, **plan.slices()) == plan
    assert sorted(plan.layers + plan.dropped) == list(range(30))


def test_slices_with_commas() -> None:
    plan = make_plan(10, core="2:4,5:7")
    assert (plan.prelude, plan.core, plan.coda) == ((0, 1), (2, 3, 5, 6), (7, 8, 9))
    assert plan.dropped == (4,) and plan.slices()["core"] == "2:4,5:7"
    for wrong in ("2:4,", "5:7,2:4", "2:4,3:5", "2,3"):
        with pytest.raises(RedepthError):
            make_plan(10, core=wrong)
