"""The engine: what a request gets does not depend on what runs beside it."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as models_of_words
from transformers import PreTrainedTokenizerFast

from redepth import RecurrentDepthForCausalLM, load
from redepth.errors import RedepthError
from redepth.modeling import DepthPolicy
from redepth.serving.engine import Engine, Update, end_tokens
from redepth.serving.request import Request, Sampling
from redepth.serving.stops import TextStream
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

CHUNK = 5
HUGINN = Path(__file__).parent / "golden" / "huginn-tiny"
NAMES = ("gemma2", "gemma3", "llama", "mistral", "olmo2", "smollm3", "huginn", "skip-adapter", "gate")
# Thresholds at which tokens of the tiny models leave at different steps.
MIDDLING = {"kl": 3e-4, "latent-diff": 0.03, "argmax-stability": 2}


def make(zoo: dict[str, Path], name: str) -> RecurrentDepthForCausalLM:
    if name == "huginn":
        return load(HUGINN)
    state = name if name == "skip-adapter" else "noise"
    source = zoo.get(name, zoo["qwen2"])
    adapter = "gate:0.4" if name == "gate" else "blend:0.4"
    model = plan_conversion(source, "0:2", "2:4", "5:6", adapter=adapter).model()
    model.config.initial_state_mode = state
    model.config.state_std = 1.0
    return model


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    return {name: make(zoo, name) for name in NAMES}


@dataclass(frozen=True)
class Asked:
    """One request, and when it comes and goes, in ticks."""

    length: int
    seed: int
    policy: tuple[tuple[str, Any], ...]
    new: int
    arrives: int
    cancelled: int | None


def slow(model: RecurrentDepthForCausalLM, asked: Asked) -> tuple[list[int], list[int], list[float]]:
    """The tokens that `generate` gives this request alone, their steps, and how far each led the next likeliest one."""
    ids = random_ids(1, asked.length, asked.seed)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asked.new,
        do_sample=False,
        eos_token_id=None,
        prefill_chunk_size=CHUNK,
        return_dict_in_generate=True,
        output_scores=True,
        **dict(asked.policy),
    )
    leads = [float(-scores[0].topk(2).values.diff()) for scores in output.scores]
    return (
        output.sequences[0, asked.length :].tolist(),
        output.stats["num_steps"][0, asked.length - 1 :].tolist(),
        leads,
    )


def run(engine: Engine, *requests: Request) -> list[Update]:
    """Ticks until nothing is left to do, and all requests have ended."""
    updates = []
    for _ in range(2000):
        if not engine.has_work:
            break
        updates += engine.step()
    assert all(request.is_finished for request in requests)
    return updates


fixed = st.fixed_dictionaries(
    {"num_steps": st.integers(1, 7), "cache_rule": st.sampled_from(["full", "ring-2", "latest", "first-2-then-last"])}
)
adaptive = st.fixed_dictionaries(
    {
        "num_steps": st.just(7),
        "criterion": st.sampled_from(sorted(MIDDLING)),
        "min_steps": st.integers(1, 3),
        "cache_rule": st.sampled_from(["latest", "latest+ring-2", "latest+first-2-then-last", "skip", "skip+ring-3"]),
    }
)
policies = st.one_of(fixed, adaptive).map(
    lambda policy: tuple(
        (policy | ({"exit_threshold": MIDDLING[policy["criterion"]]} if "criterion" in policy else {})).items()
    )
)
requests = st.builds(
    Asked,
    length=st.integers(1, 12),
    seed=st.integers(0, 3),
    policy=policies,
    new=st.integers(1, 20),
    arrives=st.integers(0, 12),
    cancelled=st.none() | st.integers(1, 40),
)


@given(name=st.sampled_from(NAMES), asked=st.lists(requests, min_size=2, max_size=6), rows=st.integers(1, 5))
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_traffic_gives_each_request_what_it_gets_alone(models, name: str, asked: list[Asked], rows: int) -> None:
    model = models[name]
    # Little room, so that requests wait for it.
    engine = Engine(model, max_rows=rows, max_tokens=40 * 7, prefill_chunk=CHUNK)
    sent: dict[Asked, list[Request]] = {}
    tick = 0
    coming = sorted(asked, key=lambda one: one.arrives)
    while coming or engine.has_work:
        while coming and coming[0].arrives <= tick:
            one = coming.pop(0)
            policy = DepthPolicy.resolve(model.config, **dict(one.policy))
            prompt = random_ids(1, one.length, one.seed)[0].tolist()
            sent.setdefault(one, []).append(engine.submit(prompt, policy, Sampling(one.new, stop_ids=())))
        for one, same in sent.items():
            if one.cancelled is not None and tick == one.arrives + one.cancelled:
                for request in same:
                    engine.cancel(request)
        engine.step()
        tick += 1
        assert tick < 3000
    assert engine.pool.used == engine.pool.promised == 0
    for one, same in sent.items():
        tokens, steps, leads = slow(model, one)
        # Where two tokens are all but equally likely, either may win, and the texts part.
        clear = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(leads))
        for request in same:
            got = [token.id for token in request.tokens]
            assert got[:clear] == tokens[: len(got)][:clear]
            assert [token.steps for token in request.tokens][:clear] == steps[: len(got)][:clear]
            assert request.finish_reason == "length" or (request.finish_reason == "cancelled" and one.cancelled)
            assert len(got) == one.new or request.finish_reason == "cancelled"


def submit(
    engine: Engine, length: int = 4, new: int = 5, seed: int = 0, sampling: Any = None, **policy: Any
) -> Request:
    """A request with a random prompt."""
    resolved = DepthPolicy.resolve(engine.config, **{"num_steps": 3} | policy)
    prompt = random_ids(1, length, seed)[0].tolist()
    return engine.submit(prompt, resolved, sampling or Sampling(new, stop_ids=()))


def ids_of(request: Request) -> list[int]:
    return [token.id for token in request.tokens]


def test_sampled_tokens_are_those_of_a_seeded_generate(models) -> None:
    model = models["llama"]
    engine = Engine(model)
    settings_of = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    sent = [submit(engine, seed=i, sampling=Sampling(6, seed=i, stop_ids=(), **settings_of)) for i in range(3)]
    run(engine, *sent)
    for i, request in enumerate(sent):
        torch.manual_seed(i)
        ids = torch.tensor([request.prompt])
        wanted = model.generate(ids, num_steps=3, max_new_tokens=6, do_sample=True, eos_token_id=None, **settings_of)
        assert ids_of(request) == wanted[0, 4:].tolist()


def test_a_state_carried_over_is_that_of_generate(models) -> None:
    for name in ("huginn", "skip-adapter", "gate"):
        engine = Engine(models[name])
        request = submit(engine, continuous_compute=True, num_steps=2)
        run(engine, request, submit(engine, seed=1, num_steps=5))
        ids = torch.tensor([request.prompt])
        wanted = models[name].generate(
            ids, num_steps=2, continuous_compute=True, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        assert ids_of(request) == wanted[0, 4:].tolist()


def test_log_probabilities_are_the_models_own(models) -> None:
    model = models["llama"]
    engine = Engine(model)
    request = submit(engine, sampling=Sampling(2, temperature=2.0, top_k=1, logprobs=3, stop_ids=()))
    run(engine, request)
    with torch.no_grad():
        wanted = model(torch.tensor([request.prompt]), num_steps=3).logits[0, -1].log_softmax(-1)
    first = request.tokens[0]
    assert first.logprob == pytest.approx(float(wanted[first.id]), abs=1e-4)
    assert [token for token, _ in first.top_logprobs] == wanted.topk(3).indices.tolist()
    assert first.top_logprobs[0][1] == pytest.approx(first.logprob)


def test_stop_tokens_and_the_models_own_end(models) -> None:
    model = models["llama"]
    engine = Engine(model)
    whole = submit(engine, new=6)
    run(engine, whole)
    third = whole.tokens[2].id
    first_place = ids_of(whole).index(third)
    stopped = submit(engine, sampling=Sampling(6, stop_ids=(third,)))
    run(engine, stopped)
    assert stopped.finish_reason == "stop"
    assert ids_of(stopped) == ids_of(whole)[: first_place + 1]
    assert end_tokens(model) == (2,)


def test_a_text_ends_where_the_models_room_does(models) -> None:
    engine = Engine(models["llama"])
    request = submit(engine, length=126, new=50, num_steps=1)
    run(engine, request)
    assert (len(request.tokens), request.finish_reason) == (3, "length")
    with pytest.raises(ValueError, match="128 this model allows"):
        submit(engine, length=129)


def test_rows_wait_for_room_in_the_order_they_came(models) -> None:
    """The first in line is not overtaken by one that would fit."""
    engine = Engine(models["llama"], max_tokens=40)
    # Room for 3 · 16 tokens at depth 1, five planes each: 15 blocks.
    assert engine.pool.blocks == 15
    first, second, third = (submit(engine, num_steps=r) for r in (3, 4, 1))
    engine.step()
    assert [request.state for request in (first, second, third)] == ["running", "waiting", "waiting"]
    assert (engine.pool.used, engine.waiting) == (9, 2)
    order = list(dict.fromkeys(update.request for update in run(engine, first, second, third)))
    assert order[0] is first
    assert engine.pool.used == engine.pool.promised == engine.pool_tokens == 0
    with pytest.raises(RedepthError, match="room in the pool"):
        submit(engine, num_steps=200)


def test_mistakes_are_refused_and_nothing_is_queued(models, zoo) -> None:
    engine = Engine(models["llama"])
    for wrong, message in (
        ({"draft_steps": 1}, "draft_steps is not supported"),
        ({"sampler": "wavefront"}, "wavefront.* is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            submit(engine, **wrong)
    policy = DepthPolicy.resolve(engine.config)
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.submit([], policy)
    with pytest.raises(ValueError, match="vocabulary has 101"):
        engine.submit([101], policy)
    assert not engine.has_work
    with pytest.raises(ValueError, match="top_p=0"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        Engine(models["llama"], max_rows=0)
    griffin = plan_conversion(zoo["griffin"], "0:2", "2:4", "5:6").model()
    with pytest.raises(ValueError, match="recurrent in time"):
        Engine(griffin)


def test_a_fault_in_one_request_ends_that_one_alone(models) -> None:
    def breaks(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such luck")

    engine = Engine(models["llama"])
    sound, broken = submit(engine), submit(engine, criterion=breaks)
    run(engine, sound, broken)
    assert (broken.finish_reason, broken.error) == ("error", "no such luck")
    alone = submit(engine)
    run(engine, alone)
    assert ids_of(sound) == ids_of(alone)


def test_packed_weights_are_in_use_during_ticks_alone(models) -> None:
    model, ids = models["olmo2"], random_ids(1, 5)
    with torch.no_grad():
        before = model(ids, num_steps=2).logits
        engine = Engine(model)
        with engine.linears.in_use():
            packed = model(ids, num_steps=2).logits
        assert torch.equal(model(ids, num_steps=2).logits, before)
    torch.testing.assert_close(packed, before, **tolerance(layers=7))
    assert not Engine(model, pack=False).linears.forwards
    assert not any("forward" in vars(module) for module in model.modules())


def test_numbers_that_are_none_spoil_no_other_row(models) -> None:
    """What a row with NaN leaves in its blocks must not reach the next that gets them."""
    model = models["llama"]
    engine = Engine(model)
    sound = submit(engine, seed=1)
    run(engine, sound)
    weight = model.transformer.wte.weight
    before = weight[50].clone()
    with torch.no_grad():
        weight[50] = float("nan")
    broken = engine.submit([50, 7], DepthPolicy.resolve(model.config, num_steps=3))
    beside = submit(engine, seed=1)
    run(engine, broken, beside)
    with torch.no_grad():
        weight[50] = before
    assert broken.finish_reason == "error"
    assert "NaN" in str(broken.error)
    after = submit(engine, seed=1)
    run(engine, after)
    assert ids_of(sound) == ids_of(after)


def test_a_tick_that_fails_ends_what_ran_and_leaves_what_waits(models, monkeypatch) -> None:
    engine = Engine(models["llama"], max_rows=1)
    running, waiting = submit(engine), submit(engine)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.stack, "step", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        engine.step()
    assert (running.finish_reason, running.error, waiting.state) == ("error", "no room", "waiting")
    run(engine, waiting)
    assert waiting.finish_reason == "length"


def test_cancelled_before_it_began_and_after_it_ended(models) -> None:
    engine = Engine(models["llama"], max_rows=1)
    first, second = submit(engine), submit(engine)
    engine.step()
    engine.cancel(second)
    assert [update for update in engine.step() if update.token is None] == [Update(second, None)]
    run(engine, first)
    engine.cancel(first)
    assert engine.step() == []
    assert (first.finish_reason, second.finish_reason) == ("length", "cancelled")


class Letters:
    """A tokenizer for the tests: token i is one byte of a text, 0 ends it."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if i or not skip_special_tokens]
        return bytes(kept).decode("utf-8", errors="replace")


@given(text=st.text("abñ€😀 ", max_size=12), stops=st.lists(st.text("abñ€ ", min_size=1, max_size=3), max_size=3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_text_comes_in_whole_characters_and_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(Letters(), tuple(stops))
    pieces = [stream.put(byte) for byte in text.encode()]
    held = stream.end()
    found = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    # The stop string that is complete first ends the text.
    wanted = text if not found else text[: min(found)[0] - len(min(found)[1])]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + held == stream.text
    assert (stream.stopped_by is not None) == bool(found)
    if len({end for end, _ in found}) == len(found):
        assert stream.text == wanted


def sentence_pieces() -> Any:
    """A tokenizer as Llama 2's: words carry their space, single bytes make up the rest, a text's first space is dropped."""
    words = {"<s>": 0, "▁": 1, "▁is": 2, "▁Paris": 3, "is": 4, "a": 5}
    pieces = models_of_words.BPE(words | {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}, [], byte_fallback=True)
    tokenizer = Tokenizer(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


EURO = [6 + byte for byte in "€".encode()]
PIECES = st.lists(st.sampled_from([[0], [1], [2], [3], [4], [5], EURO]), max_size=6)


@given(before=PIECES, said=PIECES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_answer_that_goes_on_in_a_text_keeps_its_first_space(before: list[list[int]], said: list[list[int]]) -> None:
    tokenizer = sentence_pieces()
    prompt, answer = [0, 5, *chain(*before)], list(chain(*said))
    stream = TextStream(tokenizer, after=prompt)
    streamed = "".join(map(stream.put, answer)) + stream.end()
    whole = tokenizer.decode(prompt + answer, skip_special_tokens=True)
    assert streamed == whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]


def test_an_answer_of_its_own_begins_without_a_space() -> None:
    for after, text in (([5, 2], " Paris is"), ([], "Paris is"), ([0], "Paris is"), ([5, EURO[0]], "Paris is")):
        stream = TextStream(sentence_pieces(), after=after)
        assert stream.put(3) + stream.put(2) + stream.end() == text
