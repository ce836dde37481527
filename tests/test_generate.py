"""transformers' own generate, with num_steps passed through."""

import pytest
import torch
from transformers import TextIteratorStreamer

from redepth import RecurrentDepthForCausalLM
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids


@pytest.fixture(scope="module")
def model(zoo) -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo["gemma2"], "0:2", "2:4", "5:6", adapter="random", state="noise").model()


OPTIONS = {"num_steps": 3, "max_new_tokens": 7, "eos_token_id": None}


def slow_greedy(model, ids: torch.Tensor, tokens: int, num_steps: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(ids, num_steps=num_steps, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_equals_a_slow_loop(model) -> None:
    ids = random_ids(2, 6)
    for num_steps in (1, 2, 5):
        got = model.generate(ids, **OPTIONS | {"num_steps": num_steps}, do_sample=False)
        assert torch.equal(got, slow_greedy(model, ids, 7, num_steps))


def test_depth_changes_the_text(model) -> None:
    ids = random_ids(1, 6)
    outputs = {tuple(model.generate(ids, **OPTIONS | {"num_steps": r}, do_sample=False)[0].tolist()) for r in (1, 8)}
    assert len(outputs) == 2


def test_beams_with_and_without_cache(model) -> None:
    ids = random_ids(2, 5)
    cached, uncached = (
        model.generate(ids, **OPTIONS, num_beams=3, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_sampling_is_seeded_and_cache_independent(model) -> None:
    ids = random_ids(2, 5)
    outputs = []
    for use_cache in (True, False, True):
        torch.manual_seed(4)
        outputs.append(model.generate(ids, **OPTIONS, do_sample=True, top_k=20, use_cache=use_cache))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[1])


def test_several_sequences_chunked_prefill_and_stopping(model) -> None:
    ids = random_ids(1, 11)
    several = model.generate(ids, **OPTIONS, do_sample=True, num_return_sequences=3)
    assert several.shape == (3, 18)
    greedy = model.generate(ids, **OPTIONS, do_sample=False)
    assert torch.equal(model.generate(ids, **OPTIONS, do_sample=False, prefill_chunk_size=4), greedy)
    stop = int(greedy[0, 13])
    stopped = model.generate(ids, **OPTIONS | {"eos_token_id": stop}, do_sample=False)
    assert stopped.shape[1] <= 14
    assert stopped[0, -1] == stop


def test_continuing_from_a_returned_cache(model) -> None:
    ids = random_ids(1, 6)
    whole = model.generate(ids, **OPTIONS | {"max_new_tokens": 8}, do_sample=False)
    first = model.generate(ids, **OPTIONS | {"max_new_tokens": 4}, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences, **OPTIONS | {"max_new_tokens": 4}, do_sample=False, past_key_values=first.past_key_values
    )
    assert torch.equal(second, whole)


def test_assisted_decoding_equals_plain_greedy(model, zoo) -> None:
    ids = random_ids(1, 6)
    plain = model.generate(ids, **OPTIONS, do_sample=False)
    assistant = plan_conversion(zoo["gemma2"], "0:2", "2:4", "5:6", adapter="inject").model()
    assert torch.equal(model.generate(ids, **OPTIONS, do_sample=False, assistant_model=assistant), plain)
    assert torch.equal(model.generate(ids, **OPTIONS, do_sample=False, prompt_lookup_num_tokens=2), plain)


def test_streamer(model) -> None:
    class Digits:
        def decode(self, ids, **kwargs) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Digits(), timeout=30)
    ids = model.generate(random_ids(1, 3), **OPTIONS, do_sample=False, streamer=streamer)
    assert "".join(streamer).split() == [str(i) for i in ids[0].tolist()]


def test_wrong_arguments_stop_generation(model) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(random_ids(1, 3), num_steps=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="num_step"):
        model.generate(random_ids(1, 3), num_step=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="128 this model allows"):
        model.generate(random_ids(1, 129), max_new_tokens=2)
