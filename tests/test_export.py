"""torch.export and whole graphs: no shortcut asks a traced tensor, and a cache comes apart into plain values and tensors."""

import copy

import pytest
import torch
from transformers.exporters.exporter_dynamo import register_pytree_node
from transformers.exporters.utils import _map_leaf_tensors

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.surgery.convert import plan_conversion
from tests.test_recurrent_gemma import make_ids
from tests.test_recurrent_gemma import make_model as make_recurrent_gemma
from tests.zoo import random_ids

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


@pytest.fixture(params=["llama", "griffin"])
def model(request, zoo) -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo[request.param], "0:2", "2:4", "5:6", adapter="random", state="noise").model()


@torch.no_grad()
def test_export_with_a_mask_and_a_cache(model) -> None:
    register_pytree_node(RecurrentDepthCache)
    ids, more = random_ids(2, 9), random_ids(2, 1)
    inputs = {"attention_mask": padding(ids), "num_steps": 2}
    wanted = model(ids, **inputs)
    after = model(more, num_steps=2, past_key_values=copy.deepcopy(wanted.past_key_values)).logits
    got = torch.export.export(model, (ids,), inputs, strict=False).module()(ids, **inputs)
    torch.testing.assert_close(got.logits[padding(ids).bool()], wanted.logits[padding(ids).bool()], **CLOSE)
    again = model(more, num_steps=2, past_key_values=got.past_key_values).logits
    torch.testing.assert_close(again, after, **CLOSE)


@torch.no_grad()
def test_an_exporter_may_walk_through_a_cache(model) -> None:
    ids, more = random_ids(2, 9), random_ids(2, 1)
    cache = model(ids, num_steps=2).past_key_values
    walked = _map_leaf_tensors(copy.deepcopy(cache), torch.clone)
    got, wanted = (model(more, num_steps=2, past_key_values=one).logits for one in (walked, cache))
    torch.testing.assert_close(got, wanted, **CLOSE)


@torch.no_grad()
def test_export_of_recurrent_gemma() -> None:
    model, ids = make_recurrent_gemma(), make_ids(2, 12)
    inputs = {"attention_mask": padding(ids), "use_cache": False}
    got = torch.export.export(model, (ids,), inputs, strict=False).module()(ids, **inputs)
    real = padding(ids).bool()
    torch.testing.assert_close(got.logits[real], model(ids, **inputs).logits[real], **CLOSE)


@pytest.mark.slow
def test_no_graph_breaks_with_a_mask(model) -> None:
    ids = random_ids(2, 9)
    for one in (model, make_recurrent_gemma()):
        keywords = {"num_steps": 2} if one is model else {}

        def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return one(ids, attention_mask=mask, use_cache=False, **keywords).logits  # noqa: B023

        torch._dynamo.reset()
        assert torch._dynamo.explain(logits)(ids.clamp(max=60), padding(ids)).graph_break_count == 0
