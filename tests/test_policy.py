"""The depth policy: resolved once from config, generation config and keywords, with every message of its own."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.modeling import DepthPolicy
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(zoo) -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="random", state="noise").model()


def steps_of(output: Any) -> set[int]:
    return set(output.stats["num_steps"].flatten().tolist())


def generated(model, **arguments: Any) -> Any:
    return model.generate(random_ids(1, 5), return_dict_in_generate=True, **OPTIONS | arguments)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"num_steps": 3, "state_seed": 7},
        {"num_steps": (1, 2)},
        {"num_steps": 6, "criterion": "kl", "exit_threshold": 0.01, "min_steps": 2, "cache_rule": "latest+ring-2"},
    ],
)
def test_a_policy_is_its_keywords(model, keywords: dict) -> None:
    policy, ids = DepthPolicy.resolve(model.config, **keywords), random_ids(2, 6)
    with torch.no_grad():
        got, wanted = model(ids, policy=policy), model(ids, **keywords)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(model.generate(ids, policy=policy, **OPTIONS), model.generate(ids, **keywords, **OPTIONS))
    assert "\n" not in str(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.num_steps = 2  # type: ignore[misc]


def test_it_says_itself_in_the_words_of_its_keywords(model) -> None:
    policy = DepthPolicy.resolve(model.config, num_steps=8, criterion="kl", state_seed=3)
    said = "num_steps=8 criterion=kl exit_threshold=0.0005 min_steps=1 cache_rule=latest state_seed=3"
    assert str(policy) == said
    assert "draft_steps=2 draft_tokens=adapted" in str(DepthPolicy.resolve(model.config, num_steps=4, draft_steps=2))
    assert "sampler=wavefront headway=2" in str(DepthPolicy.resolve(model.config, sampler="wavefront", headway=2))


def test_drafts_and_samplers_by_policy(model) -> None:
    ids = random_ids(2, 5)
    for keywords in ({"draft_steps": 1}, {"sampler": "wavefront", "inner_steps": 2}):
        policy = DepthPolicy.resolve(model.config, num_steps=3, **keywords)
        wanted = model.generate(ids, num_steps=3, **keywords, **OPTIONS)
        assert torch.equal(model.generate(ids, policy=policy, **OPTIONS), wanted)


def test_a_generation_config_is_honoured(model) -> None:
    assert steps_of(generated(model, generation_config=GenerationConfig(num_steps=5))) == {5}
    adaptive = GenerationConfig(num_steps=6, criterion="latent-diff", exit_threshold=1e9)
    assert steps_of(generated(model, generation_config=adaptive)) == {2}
    ring = generated(model, generation_config=GenerationConfig(num_steps=4, cache_rule="ring-2"))
    assert ring.past_key_values.rule.name == "ring-2"
    drafted = generated(model, generation_config=GenerationConfig(num_steps=4, draft_steps=2))
    assert drafted.stats["drafted"] > 0


def test_the_nearest_setting_counts(model) -> None:
    own = copy.deepcopy(model)
    own.generation_config.num_steps = 7
    assert steps_of(generated(own)) == {7}
    assert steps_of(generated(own, generation_config=GenerationConfig(num_steps=5))) == {5}
    assert steps_of(generated(own, generation_config=GenerationConfig(num_steps=5), num_steps=3)) == {3}
    assert steps_of(generated(own, generation_config=GenerationConfig(top_k=5))) == {7}


def test_numbers_of_numpy_and_torch(model) -> None:
    for number in (np.int64(3), np.int32(3), torch.tensor(3), torch.tensor([3]), torch.tensor([1, 2])):
        assert DepthPolicy.resolve(model.config, num_steps=number).num_steps == 3


def test_it_is_resolved_once_a_call(model, monkeypatch) -> None:
    resolve, calls = DepthPolicy.resolve.__func__, []

    def counting(cls, *args: Any, **kwargs: Any) -> DepthPolicy:
        calls.append(kwargs)
        return resolve(cls, *args, **kwargs)

    monkeypatch.setattr(DepthPolicy, "resolve", classmethod(counting))
    for keywords in ({}, {"criterion": "kl"}, {"draft_steps": 1}, {"sampler": "wavefront"}):
        calls.clear()
        model.generate(random_ids(1, 4), num_steps=3, **keywords, **OPTIONS)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_steps": 0}, "at least 1"),
        ({"num_steps": 2.0}, "integer or a pair"),
        ({"num_steps": "8"}, "integer or a pair"),
        ({"num_steps": True}, "integer or a pair"),
        ({"num_steps": (1, 2, 3)}, "integer or a pair"),
        ({"num_steps": 10**9}, "max_num_steps is 4096"),
        ({"criterion": "klx"}, "did you mean 'kl'"),
        ({"criterion": 3}, "unknown exit criterion 3"),
        ({"criterion": "kl", "exit_threshold": float("nan")}, "'auto' or above 0"),
        ({"criterion": "kl", "exit_threshold": "99%"}, "run redepth calibrate"),
        ({"criterion": "kl", "min_steps": 2.5}, "min_steps must be between"),
        ({"exit_threshold": 0.1}, "needs a criterion"),
        ({"min_steps": 1}, "needs a criterion"),
        ({"headway": 2}, "needs sampler='wavefront'"),
        ({"cache_rule": "ful"}, "did you mean 'full'"),
        ({"cache_rule": 4}, "unknown cache rule 4"),
        ({"state_seed": "x"}, "state_seed takes an integer"),
        ({"draft_steps": "2"}, "draft_steps must be between"),
        ({"sampler": "wavefront", "noise_mix": "x"}, "noise_mix must be"),
    ],
)
def test_wrong_values_end_in_one_line(model, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DepthPolicy.resolve(model.config, **keywords)
    assert "\n" not in str(caught.value)


def test_a_policy_and_keywords_or_caches_that_contradict_it(model) -> None:
    policy, ids = DepthPolicy.resolve(model.config, num_steps=2), random_ids(1, 3)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="either a policy or num_steps"):
            call(ids, policy=policy, num_steps=3)
    cache = RecurrentDepthCache(model.config, "latest")
    with pytest.raises(ValueError, match="resolve the policy with cache_rule='latest'"):
        model(ids, policy=policy, past_key_values=cache)
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match="cache_rule='ring-2' does not fit the given cache, whose rule is 'latest'"
        ):
            call(ids, num_steps=2, cache_rule="ring-2", past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_broken_logits_end_a_generation(model) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = float("nan")
    for keywords in ({}, {"do_sample": True}, {"draft_steps": 1}, {"sampler": "wavefront"}):
        with pytest.raises(ValueError, match="logits are NaN"):
            broken.generate(random_ids(1, 4), num_steps=2, **OPTIONS | keywords)


def test_a_text_ends_where_the_room_ends(model, caplog) -> None:
    small = copy.deepcopy(model)
    small.config.block_size = 9
    ids = random_ids(2, 6)
    whole = model.generate(ids, num_steps=2, **OPTIONS | {"max_new_tokens": 8})
    for keywords in ({}, {"use_cache": False}, {"draft_steps": 1, "draft_tokens": 3}, {"num_beams": 1}):
        caplog.clear()
        arguments = {"num_steps": 2, "return_dict_in_generate": True} | OPTIONS | {"max_new_tokens": 8} | keywords
        output = small.generate(ids, **arguments)
        # The last token that is generated is not run.
        assert torch.equal(output.sequences, whole[:, :10])
        assert output.stats["is_full"]
        assert "allows 9 tokens" in caplog.text
    few = OPTIONS | {"max_new_tokens": 3}
    assert not small.generate(ids, num_steps=2, return_dict_in_generate=True, **few).stats["is_full"]
    with pytest.raises(ValueError, match="9 this model allows"):
        small.generate(random_ids(1, 11), num_steps=1, **OPTIONS)
