"""Contracts 1 and 2 and the model's own promises, on every family."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import redepth
from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.modeling.loss import chunked_cross_entropy
from redepth.modeling.policy import sample_num_steps, split_num_steps
from redepth.modeling.state import position_noise
from redepth.surgery.convert import plan_conversion
from tests.test_golden import FOLDER as HUGINN
from tests.tolerance import tolerance
from tests.zoo import FAMILIES, random_ids

NUM_STEPS = 3
CLOSE = tolerance(layers=4 + 4 * NUM_STEPS, width=64)  # the Huginn; the others are smaller


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    """A converted model of every family, its adapter random, so that the state is carried on; a gated one; a Huginn."""
    states = ("noise", "embed", "zeros")
    converted = {
        name: plan_conversion(zoo[name], "0:2", "2:4", "5:6", adapter="random", state=states[i % 3]).model()
        for i, name in enumerate(sorted(zoo))
    }
    gated = plan_conversion(zoo["gemma3"], "0:2", "2:4", "5:6", adapter="gate:0.6", state="zeros").model()
    return converted | {"gated": gated, "huginn": redepth.load(HUGINN)}


@pytest.fixture(params=[*sorted(FAMILIES), "gated", "huginn"])
def model(request: pytest.FixtureRequest, models) -> RecurrentDepthForCausalLM:
    return models[request.param]


@torch.no_grad()
def whole(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(ids, num_steps=NUM_STEPS, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_chunks(model, ids: torch.Tensor, sizes: list[int], rule: str | None = None) -> torch.Tensor:
    cache = RecurrentDepthCache(model.config, rule)
    chunks = ids.split(sizes, dim=1)
    return torch.cat([model(chunk, num_steps=NUM_STEPS, past_key_values=cache).logits for chunk in chunks], dim=1)


def test_cached_equals_uncached(model) -> None:
    ids = random_ids(2, 19)
    wanted = whole(model, ids)
    for sizes in ([19], [1] * 19, [7, 12], [11, 1, 1, 6]):
        torch.testing.assert_close(in_chunks(model, ids, sizes), wanted, **CLOSE)


def pad(ids: torch.Tensor, length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    padding = torch.zeros(1, length - ids.shape[1], dtype=torch.long)
    mask = torch.ones_like(ids)
    order = (lambda a, b: [a, b]) if side == "left" else (lambda a, b: [b, a])
    return torch.cat(order(padding, ids), dim=1), torch.cat(order(padding, mask), dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_solo_runs(model, side: str) -> None:
    rows = [random_ids(1, length, seed=length) for length in (5, 18, 11)]
    padded, masks = zip(*(pad(row, 18, side) for row in rows), strict=True)
    logits = whole(model, torch.cat(padded), attention_mask=torch.cat(masks))
    for row, mask, got in zip(rows, masks, logits, strict=True):
        torch.testing.assert_close(got[mask[0].bool()], whole(model, row)[0], **CLOSE)


def test_padded_batch_generates_as_its_rows_alone(model) -> None:
    rows = [random_ids(1, length, seed=length) for length in (4, 9)]
    padded, masks = zip(*(pad(row, 9, "left") for row in rows), strict=True)
    options = {"num_steps": NUM_STEPS, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(torch.cat(padded), attention_mask=torch.cat(masks), **options)
    for row, got in zip(rows, together, strict=True):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(got[9:], alone[0, row.shape[1] :])


def test_packed_documents_equal_solo_runs(model) -> None:
    first, second = random_ids(1, 8, seed=1), random_ids(1, 13, seed=2)
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None]
    logits = whole(model, torch.cat([first, second], dim=1), position_ids=positions)
    torch.testing.assert_close(logits, torch.cat([whole(model, first), whole(model, second)], dim=1), **CLOSE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chunking_of_any_padded_batch(models, data: st.DataObject) -> None:
    model = models[data.draw(st.sampled_from(sorted(models)))]
    lengths = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=3))
    width = max(lengths)
    rows = [random_ids(1, length, seed=i) for i, length in enumerate(lengths)]
    padded, masks = zip(*(pad(row, width, "left") for row in rows), strict=True)
    ids, mask = torch.cat(padded), torch.cat(masks)
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=3))) if width > 1 else []
    cache = RecurrentDepthCache(model.config)
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
        with torch.no_grad():
            chunk = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, num_steps=NUM_STEPS)
        logits.append(chunk.logits)
    for row, row_mask, got in zip(rows, mask, torch.cat(logits, dim=1), strict=True):
        torch.testing.assert_close(got[row_mask.bool()], whole(model, row)[0], **CLOSE)


def test_cache_remembers_padding(models) -> None:
    model = models["llama"]
    ids, mask = pad(random_ids(1, 5), 8, "left")
    cache = RecurrentDepthCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, num_steps=2)
        got = model(random_ids(1, 1, seed=9), past_key_values=cache, num_steps=2).logits
        wanted = model(torch.cat([ids[mask.bool()][None], random_ids(1, 1, seed=9)], dim=1), num_steps=2).logits[:, -1:]
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_crop_and_rows_of_the_cache(model) -> None:
    ids, more = random_ids(2, 9), random_ids(2, 4, seed=5)
    cache = RecurrentDepthCache(model.config)
    with torch.no_grad():
        model(ids, num_steps=NUM_STEPS, past_key_values=cache)
        cache.activate_past_recording()
        model(random_ids(2, 6, seed=7), num_steps=NUM_STEPS, past_key_values=cache)
        cache.crop(-6)
        assert cache.get_seq_length() == 9
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        got = model(more, num_steps=NUM_STEPS, past_key_values=cache).logits
    wanted = whole(model, torch.cat([ids[[1, 0]], more], dim=1))[:, -4:]
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_full_rule_refuses_shallower_tokens(models) -> None:
    model = models["llama"]
    cache = RecurrentDepthCache(model.config, "full")
    with torch.no_grad():
        model(random_ids(1, 3), num_steps=2, past_key_values=cache)
        with pytest.raises(ValueError, match="cache_rule='latest'"):
            model(random_ids(1, 1), num_steps=4, past_key_values=cache)


def test_cache_memory_is_reported(models) -> None:
    model = models["llama"]
    cache = RecurrentDepthCache(model.config)
    with torch.no_grad():
        model(random_ids(2, 10), num_steps=3, past_key_values=cache)
    layers = 2 + 2 * 3 + 1
    assert cache.memory_bytes() == layers * 2 * 2 * 10 * model.config.num_key_value_heads * model.config.head_dim * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "at least 1"),
        ({"num_steps": (0, 0)}, "at least 1"),
        ({"num_steps": -2}, "at least 1"),
        ({"num_steps": 2.5}, "integer or a pair"),
        ({"attention_mask": torch.ones(2, 7)}, r"\[2, 7\].*\[2, 6\]"),
        ({"attention_mask": torch.ones(2, 6, 6)}, r"\[2, 6, 6\]"),
        ({"cache_rule": "rink-2", "use_cache": True}, "unknown cache rule 'rink-2'"),
        ({"output_attentions": True}, "not supported"),
    ],
)
def test_bad_arguments(models, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models["llama"](random_ids(2, 6), **kwargs)


def test_unknown_arguments_and_caches_are_refused(models) -> None:
    from transformers import DynamicCache

    model = models["llama"]
    with pytest.raises(TypeError, match="num_step'"):
        model(random_ids(1, 3), num_step=4)
    with pytest.raises(TypeError, match="is_causal'"):
        model(random_ids(1, 3), is_causal=False)
    with pytest.raises(TypeError, match="DynamicCache"):
        model(random_ids(1, 3), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="128 this model allows"):
        model(random_ids(1, 129))
    with pytest.raises(ValueError, match="4, 4"):
        models["gemma2"](random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="not supported"):
        model.generate(random_ids(1, 3), cache_implementation="static", max_new_tokens=2)


def test_noise_depends_on_seed_and_position_alone() -> None:
    positions = torch.arange(40)[None]
    noise = position_noise(3, positions, 64)
    assert torch.equal(noise[:, 17:18], position_noise(3, torch.tensor([[17]]), 64))
    assert not torch.equal(noise, position_noise(4, positions, 64))
    many = position_noise(0, torch.arange(500)[None], 400)
    assert many.abs().max() <= 3
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 0.9866) < 0.01  # of a normal cut at ±3
    neighbours = torch.corrcoef(torch.stack([many[0, :-1].flatten(), many[0, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01


def test_same_call_same_bytes_and_seed_as_argument(models) -> None:
    name = next(name for name, model in models.items() if model.config.initial_state_mode == "noise")
    model, ids = models[name], random_ids(2, 7)
    assert torch.equal(whole(model, ids), whole(model, ids))
    assert not torch.equal(whole(model, ids), whole(model, ids, state_seed=1))


def test_hidden_states_one_for_each_layer_of_each_step(models) -> None:
    with torch.no_grad():
        output = models["llama"](random_ids(1, 4), num_steps=3, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + 2 + 3 * 2 + 1
    assert output.stats == {"num_steps": 3}


@pytest.mark.parametrize("given_steps", [4, (0, 4), torch.tensor(4), torch.tensor([0, 4]), [0, 4]])
def test_num_steps_in_every_form(models, given_steps) -> None:
    model, ids = models["qwen2"], random_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids, num_steps=given_steps).logits, model(ids, num_steps=4).logits)
    assert split_num_steps((3, 4)) == (3, 4)


def test_sampled_depth_has_the_published_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [sample_num_steps(8, 3, generator) for _ in range(4000)]
    steps = torch.tensor([sum(draw) for draw in draws], dtype=torch.float64)
    assert abs(steps.mean() - 9) < 0.3
    assert abs(steps.var() - (8 + 64 * (torch.e**0.25 - 1))) < 3
    assert all(with_gradient == min(3, sum((without, with_gradient))) for without, with_gradient in draws)


@pytest.mark.parametrize("name", ["gemma3", "gated"])
def test_gradients_reach_every_parameter_and_truncate(models, name: str) -> None:
    model = models[name].train()
    ids = random_ids(2, 9)
    model(ids, labels=ids, num_steps=4).loss.backward()
    full = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in full.values())
    model.zero_grad()
    model(ids, labels=ids, num_steps=(0, 4)).loss.backward()
    assert all(torch.equal(parameter.grad, full[name]) for name, parameter in model.named_parameters())
    model.zero_grad()
    model(ids, labels=ids, num_steps=(3, 1)).loss.backward()
    adapter = model.transformer["adapter"].weight
    assert not torch.allclose(adapter.grad, full["transformer.adapter.weight"])
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_loss_in_chunks_equals_the_whole(models, monkeypatch, family, items) -> None:
    """Tied and soft-capped, and neither."""
    model, ids = models[family], random_ids(2, 13)
    labels = ids.clone()
    labels[0, :4] = -100
    kwargs = {} if items is None else {"num_items_in_batch": items}
    monkeypatch.setattr("redepth.modeling.loss.LOGITS_AT_ONCE", 7 * 101)
    results = []
    for loss_only in (False, True):
        output = model(ids, labels=labels, num_steps=2, loss_only=loss_only, use_cache=False, **kwargs)
        (output.loss * 3).backward()
        results.append((output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        model.zero_grad()
        assert (output.logits is None) == loss_only
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, **CLOSE, msg=name)


def test_loss_in_chunks_with_parts_frozen_and_in_bf16(monkeypatch) -> None:
    monkeypatch.setattr("redepth.modeling.loss.LOGITS_AT_ONCE", 5 * 50)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 16, generator=generator)
    head, labels = torch.nn.Linear(16, 50, bias=False), torch.randint(50, (2, 9), generator=generator)

    def gradients(learns_hidden: bool, learns_head: bool, bf16: bool = False) -> list[torch.Tensor | None]:
        states = hidden.clone().requires_grad_(learns_hidden)
        head.weight.requires_grad_(learns_head).grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = chunked_cross_entropy(states, labels, head, vocab_size=50, parameters=head.parameters())
        if learns_hidden or learns_head:
            loss.backward()
        return [loss.detach(), states.grad, head.weight.grad]

    whole = gradients(True, True)
    assert torch.equal(gradients(False, False)[0], whole[0])
    for learns in ((True, False), (False, True)):
        loss, *found = gradients(*learns)
        assert torch.equal(loss, whole[0])
        for wanted, gradient, learned in zip(whole[1:], found, learns, strict=True):
            assert torch.equal(gradient, wanted) if learned else gradient is None
    for wanted, gradient in zip(whole, gradients(True, True, bf16=True), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=2e-3)
