"""Plan search: what it measures without converting equals what the converted model gives."""

import pytest
import torch

from redepth.checkpoint.sources import open_source
from redepth.errors import RedepthError
from redepth.evaluation.loss import loss_by_depth
from redepth.surgery.convert import plan_conversion
from redepth.surgery.plan import Plan
from redepth.surgery.search import Candidate, plans_of, ranked, search_plans
from tests.zoo import FAMILIES, random_ids

DEPTHS = (1, 2, 4)
UNLIKE = ("gemma3", "llama", "olmo2", "qwen2")  # in norms, windows and biases; the other families are slow tests


@pytest.mark.parametrize(
    "family",
    [name if name in UNLIKE else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)],
)
def test_losses_equal_the_converted_models(zoo, family: str) -> None:
    source, rows = open_source(zoo[family]), random_ids(5, 17)
    search = search_plans(source, rows, 2, 1, ["inject", "blend:0.5"], DEPTHS)
    assert len({one.plan for one in search.whole}) == 3
    assert len({one.plan for one in search.dropping}) == 4
    for one in [*search.whole, *search.dropping]:
        groups = one.plan.slices()
        converted = plan_conversion(source, *groups.values(), adapter=one.adapter, dtype="float32").model()
        assert one.losses == pytest.approx(loss_by_depth(converted, rows, DEPTHS), abs=1e-5)
        if not one.plan.dropped:
            assert one.losses[1] == pytest.approx(search.source_loss, abs=1e-5)
        assert (one.movement == 0) == (one.adapter == "inject")


def test_losses_in_bf16_equal_the_converted_models(zoo) -> None:
    source, rows = open_source(zoo["llama"]), random_ids(5, 17)
    search = search_plans(source, rows, 2, 1, ["blend:0.2", "blend:0.9"], DEPTHS, autocast=torch.bfloat16)
    for one in [*search.whole, *search.dropping]:
        converted = plan_conversion(source, *one.plan.slices().values(), adapter=one.adapter, dtype="float32").model()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert one.losses == pytest.approx(loss_by_depth(converted, rows, DEPTHS), abs=0.02)


def test_layer_measures_equal_transformers_hidden_states(zoo) -> None:
    source, rows = open_source(zoo["qwen3"]), random_ids(3, 11)
    search = search_plans(source, rows, 3, 0, ["blend:0.5"], (1, 2))
    model = source.reference_model()
    kept = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    assert search.source_loss == pytest.approx(loss.item(), abs=1e-5)
    assert search.dropping == []
    for measure in search.layers:
        before, after = kept[measure.layer]
        cosine = torch.cosine_similarity(before, after, dim=-1)
        assert measure.influence == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
        if measure.layer + 3 > 6:
            assert measure.distance is None
            continue
        cosine = torch.cosine_similarity(before, kept[measure.layer + 2][1], dim=-1)
        assert measure.distance == pytest.approx((cosine.arccos() / torch.pi).mean().item(), abs=1e-5)


def test_order_of_choice() -> None:
    def candidate(name: str, loss: float, movement: float, core: int = 2) -> Candidate:
        layers = tuple(range(8))
        return Candidate(
            Plan(layers[:2], layers[2 : 2 + core], layers[2 + core :], 8), name, {1: loss, 4: loss}, movement
        )

    still = candidate("still", 3.0, 0.0)
    lowest = candidate("lowest", 3.001, 0.1)
    lively = candidate("lively", 3.004, 0.2)
    longer = candidate("longer", 3.005, 0.05, core=3)
    hurt = candidate("hurt", 3.2, 0.9)
    names = [one.adapter for one in ranked([hurt, still, lowest, lively, longer], tolerance=0.005)]
    assert names == ["longer", "lively", "lowest", "hurt", "still"]


def test_candidate_plans_lie_within_the_source() -> None:
    for dropped in range(4):
        plans = plans_of(9, 3, dropped)
        assert len(set(plans)) == len(plans) > 0
        for plan in plans:
            assert plan.prelude[0] == 0
            assert plan.coda[-1] == 8
            assert len(plan.core) == 3
            assert len(plan.dropped) == dropped
            assert list(plan.layers) == sorted(set(plan.layers))


@pytest.mark.parametrize(
    ("core_layers", "drop_layers", "adapter", "named"),
    [
        (5, 0, "inject", "--core-layers 5"),
        (0, 0, "inject", "--core-layers 0"),
        (3, 2, "inject", "--drop-layers 2"),
        (2, -1, "inject", "--drop-layers -1"),
        (2, 0, "random", "--adapter random"),
        (2, 0, "blend:2", "'blend:2'"),
    ],
)
def test_what_does_not_fit_is_refused(zoo, core_layers: int, drop_layers: int, adapter: str, named: str) -> None:
    with pytest.raises(RedepthError, match=named):
        search_plans(open_source(zoo["llama"]), random_ids(2, 9), core_layers, drop_layers, [adapter])
