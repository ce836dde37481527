"""Continuous compute: each decoded token starts from the state of the one before."""

import pytest
import torch

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

OPTIONS = {"num_steps": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(zoo) -> RecurrentDepthForCausalLM:
    model = plan_conversion(zoo["gemma2"], "0:2", "2:4", "5:6", adapter="blend:0.6", state="noise").model()
    model.config.state_std = 1.0
    return model


@torch.no_grad()
def slow_warm_greedy(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """By hand, through `input_states`."""
    cache, states, new = RecurrentDepthCache(model.config, kwargs.pop("rule", None)), None, ids
    for _ in range(OPTIONS["max_new_tokens"]):
        output = model(new, num_steps=3, input_states=states, past_key_values=cache, **kwargs)
        states, new = output.latent_states[:, -1:], output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


def test_warm_start_equals_states_handed_on(model) -> None:
    ids = random_ids(3, 6)
    warm = model.generate(ids, **OPTIONS, continuous_compute=True)
    assert torch.equal(warm, slow_warm_greedy(model, ids))
    assert not torch.equal(warm, model.generate(ids, **OPTIONS))


def test_warm_start_with_a_criterion(model) -> None:
    ids = random_ids(2, 6)
    settings = {"criterion": "latent-diff", "exit_threshold": 0.2}
    warm = model.generate(ids, **OPTIONS, **settings, continuous_compute=True)
    assert torch.equal(warm, slow_warm_greedy(model, ids, rule="latest", **settings))


@pytest.mark.parametrize("rule", ["latest", "ring-2", "first-1-then-last", "latest+ring-2"])
def test_warm_start_under_cache_rules(model, rule: str) -> None:
    ids = random_ids(2, 6)
    warm = model.generate(ids, **OPTIONS, cache_rule=rule, continuous_compute=True)
    assert torch.equal(warm, slow_warm_greedy(model, ids, rule=rule))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_carry_their_own_state(model, side: str) -> None:
    short, long = random_ids(1, 4, seed=1), random_ids(1, 7, seed=2)
    place = slice(3, 7) if side == "left" else slice(0, 4)
    ids, mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), long]), torch.ones(2, 7, dtype=torch.long)
    mask[0] = 0
    ids[0, place], mask[0, place] = short[0], 1
    together, alone = (RecurrentDepthCache(model.config) for _ in range(2))
    with torch.no_grad():
        model(ids, attention_mask=mask, num_steps=3, past_key_values=together)
        model(short, num_steps=3, past_key_values=alone)
    torch.testing.assert_close(together.last_state[:1], alone.last_state, **tolerance(layers=3 + 2 * 3))


def test_beams_select_states(model) -> None:
    cache = RecurrentDepthCache(model.config)
    with torch.no_grad():
        latents = model(random_ids(2, 5), num_steps=2, past_key_values=cache).latent_states
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    assert torch.equal(cache.last_state, latents[[1, 0, 0, 1], -1:])


def test_what_it_cannot_go_with(model) -> None:
    with pytest.raises(ValueError, match="needs a cache"):
        model(random_ids(1, 3), use_cache=False, continuous_compute=True)
    cache = RecurrentDepthCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 5), num_steps=2, past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match="cropped"):
        model(random_ids(1, 1), num_steps=2, past_key_values=cache, continuous_compute=True)
