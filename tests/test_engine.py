"""The engine: what a request gets does not depend on what runs beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redepth import RecurrentDepthForCausalLM, load
from redepth.modeling import DepthPolicy
from redepth.serving.engine import Engine, Update
from redepth.serving.request import Request, Sampling
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids

CHUNK = 5
HUGINN = Path(__file__).parent / "golden" / "huginn-tiny"
NAMES = ("gemma2", "gemma3", "llama", "mistral", "olmo2", "smollm3", "huginn", "skip-adapter")
# Thresholds at which tokens of the tiny models leave at different steps.
MIDDLING = {"kl": 3e-4, "latent-diff": 0.03, "argmax-stability": 2}


def make(zoo: dict[str, Path], name: str) -> RecurrentDepthForCausalLM:
    if name == "huginn":
        return load(HUGINN)
    state = name if name == "skip-adapter" else "noise"
    source = zoo["qwen2" if name == "skip-adapter" else name]
    model = plan_conversion(source, "0:2", "2:4", "5:6", adapter="blend:0.4").model()
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
@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
