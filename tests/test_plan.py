"""Plans of any depth: groups are in order, disjoint, and written as they are read."""

from hypothesis import given
from hypothesis import strategies as st

from redepth.surgery.plan import default_plan, make_plan


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
