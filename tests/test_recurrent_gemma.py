"""RecurrentGemma: transformers' class as the oracle, then what the oracle gets wrong: states, padding, documents."""

import copy
import gc
from typing import Any

import pytest
import torch
import transformers

import redepth
from redepth.griffin.cache import RecurrentGemmaCache
from redepth.griffin.model import (
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaModel,
)
from redepth.griffin.passes import attention_segments
from redepth.modeling.elementwise import BLOCK
from tests.tolerance import tolerance

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "attention_window_size": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
VARIANTS = {
    "published pattern": {},
    "attention first": {"block_types": ["attention", "recurrent"]},
    "recurrences only": {"block_types": ["recurrent"]},
    "attention only": {"block_types": ["attention"]},
    "wide recurrence": {"lru_width": 48},
    "narrow recurrence": {"lru_width": 16, "conv1d_width": 2},
    "grouped keys": {"num_key_value_heads": 2, "attention_bias": True},
    "one tap, window of one": {"conv1d_width": 1, "attention_window_size": 1},
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights far from the published start, biases and norms included, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 or "conv" in name else 0.15
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def make_model(seed: int = 0, attention: str = "sdpa", **changes: Any) -> RecurrentGemmaForCausalLM:
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**TINY | changes, attn_implementation=attention)).eval()
    randomise(model, seed)
    return model


def make_pair(seed: int = 0, **changes: Any) -> tuple[Any, RecurrentGemmaForCausalLM]:
    model = make_model(seed, **changes)
    oracle = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**TINY | changes)).eval()
    oracle.load_state_dict(model.state_dict())
    return oracle, model


def make_ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def assert_near(value: torch.Tensor, expected: torch.Tensor, **close: float) -> None:
    torch.testing.assert_close(value, expected, **close or tolerance(layers=TINY["num_hidden_layers"], width=48))


def read(model: RecurrentGemmaForCausalLM, ids: torch.Tensor, *cuts: int, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Logits of `ids` fed in pieces that end at `cuts`, and the cache."""
    cache, logits, start = inputs.pop("past_key_values", None), [], 0
    for stop in (*cuts, ids.shape[1]):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **inputs)
        logits.append(output.logits)
        cache, start = output.past_key_values, stop
    return torch.cat(logits, dim=1), cache


# Parity


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 40])
def test_logits_and_hidden_states_equal_transformers(variant, tokens):
    oracle, model = make_pair(**VARIANTS[variant])
    ids = make_ids(2, tokens)
    with torch.no_grad():
        expected = oracle(ids, use_cache=False, output_hidden_states=True)
        output = model(ids, output_hidden_states=True)
    assert_near(output.logits, expected.logits)
    assert len(output.hidden_states) == len(expected.hidden_states)
    for hidden, expected_hidden in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_near(hidden, expected_hidden)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [6, 21])
def test_loss_and_gradients_equal_transformers(variant, tokens):
    oracle, model = make_pair(**VARIANTS[variant])
    ids = make_ids(2, tokens)
    labels = ids.clone()
    labels[0, :2] = -100
    losses = []
    for each in (oracle, model):
        loss = each(ids, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert_near(losses[1], losses[0])
    gradients = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        assert gradients[name].grad is not None, name
        assert_near(gradients[name].grad, parameter.grad)


def test_gradients_reach_a_loss_on_logits_and_a_count_of_items():
    oracle, model = make_pair()
    ids = make_ids(2, 9)
    losses = []
    for each in (oracle, model):
        output = each(ids, labels=ids, use_cache=False, num_items_in_batch=torch.tensor(11))
        (output.loss + output.logits.square().mean()).backward()
        losses.append(output.loss)
        each(ids, use_cache=False).logits.sin().sum().backward()
    assert_near(losses[1], losses[0])
    gradients = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        assert_near(gradients[name].grad, parameter.grad, **tolerance(layers=3 * TINY["num_hidden_layers"], width=48))


def test_twenty_training_steps_equal_transformers():
    torch.manual_seed(0)
    oracle, model = make_pair(lru_width=48)
    losses: dict[int, list[float]] = {0: [], 1: []}
    for which, each in enumerate((oracle, model)):
        each.train()
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for step in range(20):
            ids = make_ids(2, 19, seed=step)
            loss = each(ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[which].append(loss.item())
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


def test_greedy_text_equals_transformers():
    oracle, model = make_pair()
    ids = make_ids(1, 12)
    expected = oracle.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)


def test_eager_attention_and_attentions_equal_transformers():
    oracle, _ = make_pair()
    oracle.set_attn_implementation("eager")
    model = make_model(attention="eager")
    ids = make_ids(2, 13)
    with torch.no_grad():
        expected = oracle(ids, use_cache=False, output_attentions=True)
        output = model(ids, output_attentions=True)
    assert_near(output.logits, expected.logits)
    for weights, expected_weights in zip(output.attentions, expected.attentions, strict=True):
        assert_near(weights, expected_weights)
    assert_near(make_model()(ids).logits, output.logits)


def test_other_call_arguments_equal_transformers():
    oracle, model = make_pair()
    ids = make_ids(2, 10)
    embedded = model.model.embed_tokens(ids)
    positions = torch.arange(3, 13)[None]
    indices = torch.tensor([1, 4])
    for inputs in ({"inputs_embeds": embedded}, {"input_ids": ids, "position_ids": positions}):
        for keep in (0, 3, indices):
            expected = oracle(**inputs, use_cache=False, logits_to_keep=keep).logits
            assert_near(model(**inputs, logits_to_keep=keep).logits, expected)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    assert_near(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    assert_near(as_tuple[0], model(ids).logits)


def test_start_of_fresh_weights_is_that_of_transformers():
    config = dict(TINY, hidden_size=256, lru_width=512, intermediate_size=512)
    torch.manual_seed(0)
    fresh = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**config)).state_dict()
    expected = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**config)).state_dict()
    assert list(fresh) == list(expected)
    for name, value in expected.items():
        assert fresh[name].shape == value.shape
        std = value.std().item()
        assert fresh[name].std().item() == pytest.approx(std, rel=0.25, abs=1e-6), name
        assert fresh[name].mean().item() == pytest.approx(value.mean().item(), abs=0.25 * std + 1e-6), name


def test_hub_format_loads_and_saves_for_transformers(tmp_path):
    oracle, _ = make_pair(lru_width=48)
    oracle.save_pretrained(tmp_path / "hub")
    model, report = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert isinstance(model.config, RecurrentGemmaConfig)
    ids = make_ids(1, 11)
    expected = oracle(ids, use_cache=False).logits
    assert_near(model.eval()(ids).logits, expected)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "hub" / "model.safetensors"
    ).read_bytes()
    assert not list((tmp_path / "again").glob("*.py"))
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(auto) is transformers.RecurrentGemmaForCausalLM
    assert_near(auto.eval()(ids, use_cache=False).logits, expected)
    stack = RecurrentGemmaModel.from_pretrained(tmp_path / "again").eval()
    assert_near(stack(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_half_precision_keeps_its_state_in_fp32():
    model = make_model().to(torch.bfloat16)
    ids = make_ids(2, 30)
    whole = model(ids).logits
    pieces, cache = read(model, ids, 7, 8, 19)
    assert whole.dtype == torch.bfloat16
    assert cache.layers[0].states.dtype == torch.float32
    assert_near(pieces.float(), whole.float(), atol=0.05, rtol=0)
    assert_near(whole.float(), make_model()(ids).logits, atol=0.15, rtol=0)


# State between calls


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [range(1, 40), (1,), (7,), (8, 9), (3, 20, 21, 39), (30,)])
@torch.no_grad()
def test_any_cutting_of_the_text_gives_the_same_logits(variant, cuts):
    model = make_model(**VARIANTS[variant])
    ids = make_ids(2, 40)
    pieces, cache = read(model, ids, *cuts)
    assert_near(pieces, model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_in_blocks_equals_the_whole(dtype):
    """Without a gradient a long prompt is worked on some tokens at a time, with and without a cache."""
    model, ids = make_model(lru_width=48).to(dtype), make_ids(2, 2 * BLOCK + 9)
    whole = model(ids, use_cache=False).logits
    close = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    with torch.no_grad():
        assert_near(model(ids, use_cache=False).logits, whole, **close)
        assert_near(read(model, ids, 3, BLOCK + 5)[0], whole, **close)


def test_two_interleaved_generations_do_not_meet():
    model = make_model()
    first, second = make_ids(1, 30, seed=1), make_ids(1, 30, seed=2)
    expected = [model(ids).logits for ids in (first, second)]
    caches: list[Any] = [None, None]
    logits: list[list[torch.Tensor]] = [[], []]
    for start in range(0, 30, 3):
        for which, ids in enumerate((first, second)):
            output = model(ids[:, start : start + 3], past_key_values=caches[which], use_cache=True)
            caches[which] = output.past_key_values
            logits[which].append(output.logits)
    for which in (0, 1):
        assert_near(torch.cat(logits[which], 1), expected[which])


@pytest.mark.parametrize("before", [3, 20])
@torch.no_grad()
def test_rows_can_be_reordered_selected_and_repeated(before):
    model = make_model()
    ids = make_ids(3, 30)
    expected = model(ids).logits[:, before:]
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        _, cache = read(model, ids[:, :before])
        change(cache)
        logits, _ = read(model, ids[rows][:, before:], 4, past_key_values=cache)
        assert_near(logits, expected[rows])


@pytest.mark.parametrize("kept", [0, 1, 5, 8, 25])
@pytest.mark.parametrize("removed", [0, 1, 6, 12])
@torch.no_grad()
def test_cropped_tokens_leave_no_trace(kept, removed):
    model = make_model()
    ids = make_ids(2, 50)
    expected = model(ids).logits
    cache = RecurrentGemmaCache(model.config)
    start = max(kept - 4, 0)
    if start:
        read(model, ids[:, :start], past_key_values=cache)
    cache.activate_past_recording()
    if kept > start:
        read(model, ids[:, start:kept], past_key_values=cache)
    if removed:
        read(model, make_ids(2, removed, seed=9), *range(1, removed), past_key_values=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == kept
    read(model, make_ids(2, 3, seed=8), past_key_values=cache)
    cache.crop(-3)
    logits, _ = read(model, ids[:, kept:], 1, past_key_values=cache)
    assert_near(logits, expected[:, kept:])


def test_crop_refuses_what_it_can_not_take_back():
    model = make_model()
    _, cache = read(model, make_ids(1, 6))
    with pytest.raises(ValueError, match="can't crop 2 tokens: 0 were recorded"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(2)
    cache.crop(0)


@pytest.mark.parametrize("tokens", [1_200, pytest.param(10_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_memory_stays_flat(tokens: int):
    model = make_model(num_hidden_layers=3)
    ids = make_ids(1, tokens)
    cache = RecurrentGemmaCache(model.config)
    for chunk in ids[:, : tokens - 200].split(1_000, dim=1):
        read(model, chunk, past_key_values=cache)
    sizes = set()
    for start in range(tokens - 200, tokens):
        output = model(ids[:, start : start + 1], past_key_values=cache)
        sizes.add(cache.memory_bytes())
    # The room beside the window is taken once.
    assert len(sizes) <= 2
    window, room, head_dim = 7, 16, 8
    assert cache.memory_bytes() <= 4 * (2 * (window + room) * head_dim + 2 * (3 + 1) * 32)
    gc.collect()
    assert_near(output.logits, model(ids, use_cache=False, logits_to_keep=1).logits)


def test_gradient_flows_through_the_cache():
    model = make_model()
    ids = make_ids(2, 24)
    whole = model(ids, use_cache=False).logits.square().mean()
    pieces = read(model, ids, 9, 10, 20)[0].square().mean()
    for expected, value in zip(
        torch.autograd.grad(whole, model.parameters()), torch.autograd.grad(pieces, model.parameters()), strict=True
    ):
        assert_near(value, expected)


def test_gradient_checkpointing_changes_nothing():
    model = make_model().train()
    ids = make_ids(2, 20)
    gradients = []
    for switch in (False, True):
        if switch:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_near(checkpointed, plain)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, use_cache=True)


# Padding and documents


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


ROWS = [make_ids(1, tokens, seed=tokens)[0] for tokens in (3, 17, 9, 1)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_solo_runs(variant, side, attention):
    model = make_model(attention=attention, **VARIANTS[variant])
    ids, mask = pad(ROWS, side)
    more = make_ids(len(ROWS), 12, seed=5)
    output = model(ids, attention_mask=mask, use_cache=True)
    # Then on with the cache: three tokens at once, and one by one, the mask given or left out.
    logits, cache = [output.logits], output.past_key_values
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 12)):
        mask = torch.cat([mask, mask.new_ones(len(ROWS), stop - start)], 1)
        given = {"attention_mask": mask} if start != 4 else {}
        output = model(more[:, start:stop], past_key_values=cache, **given)
        logits.append(output.logits)
    together = torch.cat(logits, 1)
    for index, row in enumerate(ROWS):
        solo = model(torch.cat([row, more[index]])[None]).logits[0]
        assert_near(together[index][mask[index].bool()], solo)


@torch.no_grad()
def test_padding_in_every_piece_equals_solo_runs():
    model = make_model()
    generator = torch.Generator().manual_seed(4)
    mask = (torch.rand(3, 40, generator=generator) < 0.6).long()
    mask[1, 10:25] = 0
    ids = make_ids(3, 40) * mask
    whole = model(ids, attention_mask=mask).logits
    cache, pieces = None, []
    for start, stop in ((0, 2), (2, 12), (12, 20), (20, 21), (21, 40)):
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    for logits in (whole, torch.cat(pieces, 1)):
        for index in range(3):
            kept = mask[index].bool()
            assert_near(logits[index][kept], model(ids[index][kept][None]).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part_in_training(side):
    model = make_model()
    ids, mask = pad(ROWS, side)
    labels = torch.where(mask.bool(), ids, -100)
    # A label right after padding would be asked of a padding column.
    labels[:, 1:][mask[:, :-1] == 0] = -100
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    padded = torch.autograd.grad(loss, model.parameters())
    total = sum(len(row) - 1 for row in ROWS)
    solo_loss = sum(
        model(row[None], labels=row[None], use_cache=False).loss * (len(row) - 1) / total
        for row in ROWS
        if len(row) > 1
    )
    solo = torch.autograd.grad(solo_loss, model.parameters())
    assert_near(loss, solo_loss)
    for value, expected in zip(padded, solo, strict=True):
        assert torch.isfinite(value).all()
        assert_near(value, expected)


@pytest.mark.parametrize("given_mask", [False, True])
@torch.no_grad()
def test_packed_documents_equal_solo_runs(given_mask):
    model = make_model()
    lengths = (2, 13, 1, 9)
    rows = [make_ids(1, length, seed=length) for length in lengths]
    ids = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = torch.cat([model(row).logits for row in rows], 1)
    mask = {"attention_mask": torch.ones_like(ids)} if given_mask else {}
    assert_near(model(ids, position_ids=positions, **mask).logits, expected)
    cache, pieces = None, []
    for start, stop in ((0, 7), (7, 14), (14, 15), (15, 18), (18, 19), (19, 25)):
        output = model(ids[:, start:stop], position_ids=positions[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_near(torch.cat(pieces, 1), expected)


# Generation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}])
def test_generation_of_a_padded_batch_equals_solo_runs(side, how):
    model = make_model()
    ids, mask = pad(ROWS, side)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=14, **how)[:, ids.shape[1] :]
    for index, row in enumerate(ROWS):
        solo = model.generate(row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=14, **how)
        assert torch.equal(together[index], solo[0, len(row) :])


def test_generation_with_and_without_cache_and_in_chunks():
    model = make_model()
    ids = make_ids(2, 21)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **settings), expected)
    first = model.generate(ids, **settings | {"max_new_tokens": 5}, return_dict_in_generate=True)
    cache = first.past_key_values
    again = {"attention_mask": torch.ones_like(first.sequences), "max_new_tokens": 7, "do_sample": False}
    assert torch.equal(model.generate(first.sequences, past_key_values=cache, **again), expected)
    torch.manual_seed(0)
    sampled = model.generate(ids, **settings | {"do_sample": True, "num_return_sequences": 2})
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **settings | {"do_sample": True, "num_return_sequences": 2}), sampled)


@pytest.mark.parametrize("draft", ["itself", "other", "prompt lookup"])
def test_assisted_decoding_equals_plain(draft):
    model = make_model()
    ids = make_ids(1, 11).repeat(1, 2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 25, "do_sample": False}
    expected = model.generate(ids, **settings)
    drafts = {
        "itself": {"assistant_model": copy.deepcopy(model)},
        "other": {"assistant_model": make_model(seed=7, num_hidden_layers=2)},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
    }
    assert torch.equal(model.generate(ids, **settings, **drafts[draft]), expected)


@pytest.mark.parametrize("draft", ["itself", "prompt lookup"])
def test_assisted_decoding_on_padded_prompts(draft):
    model, ids = make_model(), make_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, 7] = 0
    drafts = {"itself": {"assistant_model": copy.deepcopy(model)}, "prompt lookup": {"prompt_lookup_num_tokens": 3}}
    for inputs in ({"attention_mask": mask}, {}):
        settings = {"max_new_tokens": 12, "do_sample": False} | inputs
        assert torch.equal(model.generate(ids, **settings, **drafts[draft]), model.generate(ids, **settings))


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_window_size": 0}, "attention_window_size is 0"),
        ({"conv1d_width": 0}, "conv1d_width is 0"),
        ({"lru_width": 30}, r"lru_width \(30\) is not a multiple"),
        ({"hidden_size": 30}, r"hidden_size \(30\) is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"block_types": ["recurrent", "mamba"]}, "block_types holds .*mamba"),
    ],
)
def test_configs_that_no_model_can_have(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        RecurrentGemmaConfig(**TINY | changes)
    assert "\n" not in str(refusal.value)
    if "block_types" not in changes and changes.get("num_key_value_heads") is None:
        with pytest.raises(ValueError, match=message):
            RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**TINY | changes))


def test_bad_input_is_refused_in_one_line():
    model = make_model()
    ids = make_ids(2, 6)
    _, cache = read(model, ids)
    _, foreign = read(make_model(lru_width=48), ids)
    cases = [
        (ValueError, "needs? \\[2, 6\\]", {"input_ids": ids, "attention_mask": torch.ones(2, 5)}),
        (
            ValueError,
            "needs? \\[2, 12\\]",
            {"input_ids": ids, "attention_mask": torch.ones(2, 6), "past_key_values": cache},
        ),
        (ValueError, "supports no other kind", {"input_ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)}),
        (ValueError, "position_ids has shape", {"input_ids": ids, "position_ids": torch.arange(5)[None]}),
        (ValueError, "holds 2 rows", {"input_ids": ids[:1], "past_key_values": cache}),
        (ValueError, "other layers", {"input_ids": ids, "past_key_values": foreign}),
        (TypeError, "RecurrentGemmaCache", {"input_ids": ids, "past_key_values": transformers.DynamicCache()}),
        (TypeError, "unknown argument 'num_step'", {"input_ids": ids, "num_step": 3}),
        (ValueError, "either input_ids or inputs_embeds", {}),
        (ValueError, "needs eager attention", {"input_ids": ids, "output_attentions": True}),
        (
            ValueError,
            "differs from the one",
            {
                "input_ids": ids,
                "attention_mask": torch.tensor([[0] + [1] * 11, [1] * 12]),
                "past_key_values": read(model, ids)[1],
            },
        ),
    ]
    for kind, message, inputs in cases:
        with pytest.raises(kind, match=message) as refusal:
            model(**inputs)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 300, 1000])
@pytest.mark.parametrize("stored", [0, 5, 7])
def test_segments_cover_the_window_and_no_more(tokens, stored):
    window = 8
    query, key = torch.arange(stored, stored + tokens)[:, None], torch.arange(stored + tokens)
    expected = (key <= query) & (key > query - window)
    reached = torch.zeros_like(expected)
    for segment in attention_segments(tokens, stored, window, torch.device("cpu")):
        mask = segment.mask[0, 0] if segment.mask is not None else None
        if mask is None:
            rows, columns = segment.queries, segment.keys
            mask = expected[rows, columns] if tokens == 1 else torch.ones(tokens, tokens).tril().bool()[rows, columns]
        reached[segment.queries, segment.keys] = mask
    assert torch.equal(reached, expected)


@pytest.mark.slow
def test_compiled_model_equals_eager():
    model = make_model()
    compiled = torch.compile(model, dynamic=True)
    for tokens in (24, 33):
        ids = make_ids(1, tokens)
        with torch.no_grad():
            assert_near(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_load_gives_redepths_class_and_auto_transformers_own(tmp_path):
    oracle, model = make_pair()
    oracle.save_pretrained(tmp_path)
    loaded = redepth.load(tmp_path)
    assert type(loaded) is redepth.RecurrentGemmaForCausalLM
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.RecurrentGemmaForCausalLM
    ids = make_ids(1, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
