"""Self-speculative decoding: the output of plain decoding, for every row of every batch."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TextIteratorStreamer

from redepth import RecurrentDepthForCausalLM
from redepth.modeling import RecurrentStack, drafting
from redepth.modeling.drafting import NarrowHead, drafter_of, dynamic, in_half, in_int8
from redepth.modeling.ragged import RaggedRows
from redepth.modeling.speculation import MOST_DRAFTED, draft_length
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

OPTIONS = {"num_steps": 7, "max_new_tokens": 18, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    """Soft caps, windows and noise states among them; shallow and deep steps agree on some tokens and not on others."""
    made = {}
    for name in ("llama", "gemma2", "gemma3", "qwen2"):
        made[name] = plan_conversion(zoo[name], "0:2", "2:4", "5:6", adapter="blend:0.5", state="noise").model()
        made[name].config.state_std = 1.0
    return made


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :], mask[row, width - length :] = random_ids(1, length, seed=length + row)[0], 1
    return {"inputs": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2"])
@pytest.mark.parametrize("draft_tokens", [None, 1, 5])
def test_greedy_is_token_for_token_plain(models, name: str, draft_tokens: int | None) -> None:
    model, batch = models[name], batch_of([4, 9, 6])
    plain = model.generate(**batch, **OPTIONS)
    for draft_steps, rule in ((1, "full"), (3, "latest"), (6, "full")):
        output = model.generate(
            **batch,
            **OPTIONS,
            draft_steps=draft_steps,
            draft_tokens=draft_tokens,
            cache_rule=rule,
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, plain)
        # No round gives a row more than it accepted and one token; some were accepted, and some not.
        assert 0 < output.stats["accepted"] < output.stats["drafted"]
        assert output.stats["accepted"] + 3 * output.stats["rounds"] >= 3 * 17
        assert torch.equal(output.stats["num_steps"], torch.full((3, 26), 7))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    draft_steps=st.integers(1, 4),
    draft_tokens=st.integers(1, 7),
    new=st.integers(1, 9),
)
def test_any_batch_at_any_draft(models, lengths: list[int], draft_steps: int, draft_tokens: int, new: int) -> None:
    options = OPTIONS | {"num_steps": 5, "max_new_tokens": new}
    for name in ("llama", "gemma3"):
        batch = batch_of(lengths)
        drafted = models[name].generate(**batch, **options, draft_steps=draft_steps, draft_tokens=draft_tokens)
        assert torch.equal(drafted, models[name].generate(**batch, **options))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_narrow_drafts_change_nothing_but_the_time(models, name: str) -> None:
    """Whatever kernel drafts, and for one row as for several, the deep pass decides."""
    model = models[name]
    for batch in (batch_of([4, 9, 6]), batch_of([7])):
        plain = model.generate(**batch, **OPTIONS)
        for make in (None, in_half, in_int8, dynamic):
            with forced(model, make):
                drafted = model.generate(**batch, **OPTIONS, draft_steps=2, draft_bits=8, return_dict_in_generate=True)
            assert torch.equal(drafted.sequences, plain)
            assert drafted.stats["accepted"] > 0


@contextmanager
def forced(model, make):
    """Twins whose products are all made in one way, without their measured choice; None leaves the choice."""
    drafting._TWINS.pop(model, None)
    chosen = drafting.fastest

    def wherever_it_fits(weight: torch.Tensor):
        try:
            return make(weight)
        except RuntimeError:  # a kernel may take whole blocks of inputs alone
            return drafting.unchanged(weight)

    if make is not None:
        drafting.fastest = lambda *shape: wherever_it_fits
    try:
        yield
    finally:
        drafting.fastest = chosen
        drafting._TWINS.pop(model, None)


def test_a_twin_shares_all_but_the_weights_it_reads(models) -> None:
    model = models["qwen2"]
    names, output = list(model.state_dict()), model(random_ids(1, 5), num_steps=3).logits
    twin = drafter_of(model, 8)
    assert twin is not model
    assert drafter_of(model, None) is model
    assert drafter_of(model, 8) is twin
    assert twin.transformer.wte.weight is model.transformer.wte.weight
    assert list(model.state_dict()) == names
    assert torch.equal(model(random_ids(1, 5), num_steps=3).logits, output)
    narrow = twin(random_ids(1, 5), num_steps=3).logits
    assert 0 < (narrow - output).norm() < 0.1 * output.norm()
    with torch.no_grad():
        model.transformer.coda[0].mlp.fc.weight += 0
    assert drafter_of(model, 8) is not twin


@pytest.mark.parametrize("make", [in_half, in_int8, dynamic])
def test_narrow_products_are_near_the_plain_ones(make) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(3, 64)
    plain = x @ weight.T
    assert (make(weight)(x) - plain).norm() < 0.03 * plain.norm()


def test_the_likeliest_tokens_have_their_own_logits() -> None:
    torch.manual_seed(0)
    head, x = torch.nn.Linear(64, 500, bias=False), torch.randn(2, 3, 64)
    with torch.no_grad():
        got, plain = NarrowHead(head, by_kernels=False)(x), head(x)
    assert torch.equal(got.argmax(-1), plain.argmax(-1))
    top = plain.topk(8, dim=-1)
    torch.testing.assert_close(got.gather(-1, top.indices), top.values)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_single_row_takes_the_way_of_plain_decoding(models, monkeypatch, name: str) -> None:
    """Beside the general way over ragged rows, which is its reference; windows are shorter than the text."""
    batch = {"inputs": random_ids(1, 9, seed=3)}
    quick = models[name].generate(**batch, **OPTIONS, draft_steps=2, return_dict_in_generate=True)
    monkeypatch.setattr(RaggedRows, "following_context", lambda *places: None)
    slow = models[name].generate(**batch, **OPTIONS, draft_steps=2, return_dict_in_generate=True)
    assert torch.equal(quick.sequences, slow.sequences)
    assert {name: quick.stats[name] for name in ("rounds", "accepted")} == {
        name: slow.stats[name] for name in ("rounds", "accepted")
    }
    caches = [output.past_key_values for output in (quick, slow)]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 26
    for place, slot in caches[0].slots.items():
        torch.testing.assert_close(slot.keys, caches[1].slots[place].keys, **tolerance(layers=17))


def test_a_round_in_which_all_is_right_gives_one_token_more(zoo, monkeypatch) -> None:
    """A model whose depths are all one; the last token of a round reaches the deep pass without a coda of its own."""
    model, codas = plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="inject").model(), []
    run = RecurrentStack.run_coda
    monkeypatch.setattr(
        RecurrentStack, "run_coda", lambda self, state, *more: codas.append(state.shape[1]) or run(self, state, *more)
    )
    output = model.generate(
        random_ids(1, 5),
        **OPTIONS | {"max_new_tokens": 19},
        draft_steps=1,
        draft_tokens=5,
        return_dict_in_generate=True,
    )
    assert output.stats["rounds"] == 3
    assert output.stats["accepted"] == output.stats["drafted"] == 15
    assert codas == [5] + 3 * [1, 1, 1, 1, 1, 6]


def test_the_deep_pass_goes_on_from_the_draft(models, monkeypatch) -> None:
    """The core runs each step of a token once, whether it was drafted or not, and the draft's steps are never repeated."""
    model, steps = models["llama"], []
    run = RecurrentStack.step

    def counting(self, embedded, state, context, step, record=None):
        steps.append((step, embedded.shape[1]))
        return run(self, embedded, state, context, step, record)

    monkeypatch.setattr(RecurrentStack, "step", counting)
    model.generate(random_ids(1, 5), **OPTIONS, draft_steps=3, draft_tokens=4)
    after_prefill = steps[7:]
    assert {step for step, tokens in after_prefill if tokens == 1 and step <= 3} == {1, 2, 3}
    assert all(step > 3 for step, tokens in after_prefill if tokens > 1)


def test_end_of_text_and_processors_row_by_row(models) -> None:
    model, batch = models["gemma2"], batch_of([4, 9, 6, 2])
    ids = model.generate(**batch, **OPTIONS)
    stops = [int(ids[0, 13]), int(ids[2, 18])]
    for extra in (
        {"eos_token_id": stops},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 9},
    ):
        options = OPTIONS | {"pad_token_id": 0} | extra
        plain = model.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options, draft_steps=2), plain)


def test_going_on_from_the_cache_it_leaves(models) -> None:
    """Rows that ended early are padding in it."""
    model, batch = models["llama"], batch_of([5, 8])
    first = model.generate(**batch, **OPTIONS | {"max_new_tokens": 6})
    stop = int(first[0, 10])
    options = OPTIONS | {"eos_token_id": stop, "pad_token_id": 0, "max_new_tokens": 6}
    output = model.generate(**batch, **options, draft_steps=2, return_dict_in_generate=True)
    cache, more = output.past_key_values, random_ids(2, 3, seed=9)
    length = cache.get_seq_length()
    with torch.no_grad():
        got = model(more, num_steps=7, past_key_values=cache).logits
        for row in range(2):
            real = cache.padding_mask[row, :length].bool() if cache.padding_mask is not None else slice(None)
            solo = torch.cat([output.sequences[row, :length][real], more[row]])[None]
            torch.testing.assert_close(got[row], model(solo, num_steps=7).logits[0, -3:], **tolerance(layers=3 + 2 * 7))


def test_a_given_cache_and_chunked_prefill(models) -> None:
    model, ids = models["qwen2"], random_ids(1, 11)
    plain = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, **OPTIONS, draft_steps=2, prefill_chunk_size=4), plain)
    half = model.generate(ids, **OPTIONS | {"max_new_tokens": 9}, draft_steps=2, return_dict_in_generate=True)
    rest = OPTIONS | {"max_new_tokens": 9}
    again = model.generate(half.sequences, **rest, draft_steps=2, past_key_values=half.past_key_values)
    assert torch.equal(again, plain)


def test_sampling_keeps_the_distribution(models) -> None:
    """Three sampled tokens of 4,000 rows against their exact probabilities."""
    model, prompt, top = models["gemma2"], random_ids(1, 5), 3
    torch.manual_seed(1)
    options = {"num_steps": 5, "max_new_tokens": 3, "do_sample": True, "top_k": top, "temperature": 1.3}
    ids = prompt.expand(4000, -1)
    drawn = model.generate(ids, **options, eos_token_id=None, draft_steps=1, draft_tokens=3)[:, 5:]
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        prefixes = list(exact)
        rows = torch.cat([prompt.expand(len(prefixes), -1), torch.tensor(prefixes).long()], dim=1)
        with torch.no_grad():
            values, tokens = (model(rows, num_steps=5).logits[:, -1] / 1.3).topk(top)
        exact = {
            (*prefix, int(token)): exact[prefix] * float(p)
            for prefix, ps, ts in zip(prefixes, values.softmax(-1), tokens, strict=True)
            for p, token in zip(ps, ts, strict=True)
        }
    counts = dict.fromkeys(exact, 0)
    for sequence in drawn.tolist():
        counts[tuple(sequence)] += 1
    chi_square = sum((counts[key] - 4000 * p) ** 2 / (4000 * p) for key, p in exact.items())
    assert chi_square < 54, "beyond the 99.9 % point for 26 degrees of freedom"


def test_streamer(models) -> None:
    class Digits:
        def decode(self, ids, **kwargs) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Digits(), timeout=30)
    ids = models["llama"].generate(random_ids(1, 3), **OPTIONS, streamer=streamer, draft_steps=2)
    assert "".join(streamer).split() == [str(i) for i in ids[0].tolist()]


def test_draft_length_follows_the_acceptance() -> None:
    lengths = [draft_length(rate, draft_cost=8, verify_cost=100) for rate in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert lengths[-1] == MOST_DRAFTED
    assert draft_length(0.8, 50, 10) < draft_length(0.8, 5, 100)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"draft_steps": 7}, "between 1 and num_steps - 1"),
        ({"draft_steps": 0}, "between 1 and num_steps - 1"),
        ({"draft_steps": 2, "draft_tokens": 0}, "draft_tokens must be at least 1"),
        ({"draft_tokens": 3}, "needs draft_steps"),
        ({"draft_bits": 8}, "draft_bits needs draft_steps"),
        ({"draft_steps": 2, "draft_bits": 4}, "draft_bits must be 8"),
        ({"draft_steps": 2, "criterion": "kl"}, "can't go with criterion"),
        ({"draft_steps": 2, "continuous_compute": True}, "can't go with continuous_compute"),
        ({"draft_steps": 2, "use_cache": False}, "can't go with use_cache=False"),
        ({"draft_steps": 2, "sampler": "wavefront"}, "can't go with draft_steps"),
        ({"draft_steps": 2, "cache_rule": "ring-2"}, "can't go with cache rule 'ring-2'"),
        ({"draft_steps": 2, "num_beams": 2}, "num_beams=2"),
        ({"draft_steps": 2, "return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    ],
)
def test_mistakes_stop_before_any_compute(models, monkeypatch, kwargs: dict, message: str) -> None:
    monkeypatch.setattr(RecurrentStack, "run_layers", None)
    with pytest.raises(ValueError, match=message):
        models["llama"].generate(random_ids(1, 3), **OPTIONS | kwargs)


def test_more_tokens_than_the_model_allows(models) -> None:
    ids = models["llama"].generate(random_ids(1, 120), **OPTIONS, draft_steps=2)
    # The last one is not run.
    assert torch.equal(ids, models["llama"].generate(random_ids(1, 120), **OPTIONS | {"max_new_tokens": 9}))
    with pytest.raises(ValueError, match="128 this model allows"):
        models["llama"].generate(random_ids(1, 130), **OPTIONS, draft_steps=2)
