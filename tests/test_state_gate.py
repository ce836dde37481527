"""A gate on the state, against its definition."""

import pytest
import torch

import redepth
from redepth import RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.checkpoint.cost import count_parameters
from redepth.errors import RedepthError
from redepth.healing.optim import set_trainable
from redepth.healing.recipe import HealRecipe
from redepth.modeling.state import gate_start
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids


def gated_and_plain(zoo, state: str = "embed") -> tuple[RecurrentDepthForCausalLM, RecurrentDepthForCausalLM]:
    """The same conversion with a gate and without."""
    return tuple(
        plan_conversion(zoo["llama"], core="2:4", adapter=f"{kind}:0.5", state=state).model()
        for kind in ("gate", "blend")
    )  # type: ignore[return-value]


@torch.no_grad()
def test_each_step_goes_a_share_of_the_way(zoo) -> None:
    gated, plain = gated_and_plain(zoo)
    ids = random_ids(2, 7)
    share = torch.sigmoid(gated.transformer.state_gate.weight)
    embedded, _ = plain.embed_inputs(ids)
    state = embedded
    for step in range(4):
        reached, _, _ = plain.iterate_one_step(embedded, state, current_step=step)
        state = reached if step == 0 else share * reached + (1 - share) * state
        wanted = plain.predict_from_latents(state).logits
        torch.testing.assert_close(gated(ids, num_steps=step + 1).logits, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_exit_that_never_comes_changes_nothing(zoo) -> None:
    gated, _ = gated_and_plain(zoo)
    ids = random_ids(2, 7)
    adaptive = gated(ids, num_steps=4, criterion="latent-diff", exit_threshold=1e-30).logits
    torch.testing.assert_close(adaptive, gated(ids, num_steps=4).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_state_that_is_carried_on_passes_the_gate(zoo) -> None:
    """One row starts from a state that a pass left; its first step then is a step like any other."""
    gated, plain = gated_and_plain(zoo)
    ids = random_ids(1, 5)
    embedded, _ = plain.embed_inputs(ids)
    before = embedded + 1
    share = torch.sigmoid(gated.transformer.state_gate.weight)
    reached, _, _ = plain.iterate_one_step(embedded, before, current_step=0)
    output = gated(ids, num_steps=1, input_states=before)
    wanted = plain.predict_from_latents(share * reached + (1 - share) * before).logits
    torch.testing.assert_close(output.logits, wanted, rtol=1e-4, atol=1e-5)


def test_shares_are_spread_evenly(zoo) -> None:
    shares = gate_start(64).sigmoid().sort().values
    assert (shares.diff() < 0.06).all() and shares[0] < 0.06 and shares[-1] > 0.94
    config = RecurrentDepthConfig(**plan_conversion(zoo["llama"], core="2:4", adapter="gate:0.5").config.to_dict())
    fresh = RecurrentDepthForCausalLM(config)
    torch.testing.assert_close(fresh.transformer.state_gate.weight.data, gate_start(config.n_embd))


def test_it_trains_with_the_adapter_and_counts_with_the_core(zoo) -> None:
    gated, plain = gated_and_plain(zoo)
    set_trainable(gated, HealRecipe(train="adapter"))
    trained = {name for name, parameter in gated.named_parameters() if parameter.requires_grad}
    assert trained == {"transformer.adapter.weight", "transformer.state_gate.weight"}
    assert count_parameters(gated.config).core - count_parameters(plain.config).core == gated.config.n_embd


def test_it_is_verified_and_not_searched_for(zoo, tmp_path) -> None:
    redepth.convert(zoo["llama"], tmp_path / "out", core="2:4", adapter="gate:0.5")
    assert redepth.verify(tmp_path / "out").passed
    with pytest.raises(RedepthError, match="gate:0.5 is not tried"):
        redepth.plan(zoo["llama"], adapters=["gate:0.5"])
