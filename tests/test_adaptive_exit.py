"""Adaptive exit: each token leaves when its own test says so, in batches, against slow references."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.modeling import DepthPolicy, exits
from redepth.modeling.exits import EXIT_TESTS, ExitTracker
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

MOST = 12
CLOSE = tolerance(layers=3 + 2 * MOST)
# Thresholds at which tokens of the tiny models leave at different steps.
MIDDLING = {"kl": 3e-4, "entropy-diff": 3e-3, "latent-diff": 0.03, "cosine": 3e-4, "argmax-stability": 2}
NAMES = ["gemma2", "griffin", "hawk", "llama", "olmo2", "qwen2"]
OF_STATES = sorted(name for name, test in EXIT_TESTS.items() if not test.of_logits)


def make(source, family_core: float = 0.4) -> RecurrentDepthForCausalLM:
    """A model whose state settles: the adapter lets only a part of the old state through."""
    model = plan_conversion(source, "0:2", "2:4", "5:6", adapter=f"blend:{family_core}", state="noise").model()
    model.config.state_std = 1.0
    return model


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    return {name: make(zoo[name]) for name in NAMES}


@pytest.fixture(params=NAMES)
def model(request, models) -> RecurrentDepthForCausalLM:
    return models[request.param]


@torch.no_grad()
def adaptive(model, ids, criterion: str, threshold: float | str | None = None, **kwargs):
    threshold = MIDDLING[criterion] if threshold is None else threshold
    return model(ids, num_steps=MOST, criterion=criterion, exit_threshold=threshold, **kwargs)


@pytest.mark.parametrize("criterion", sorted(EXIT_TESTS))
def test_a_test_that_never_fires_is_fixed_depth(model, criterion: str) -> None:
    # Few steps: later on, states settle to the last bit and any test is right to fire.
    ids, num_steps = random_ids(2, 9), 4
    never = num_steps + 1 if criterion == "argmax-stability" else 1e-30
    with torch.no_grad():
        output = model(ids, num_steps=num_steps, criterion=criterion, exit_threshold=never)
        wanted = model(ids, num_steps=num_steps)
    torch.testing.assert_close(output.logits, wanted.logits, **CLOSE)
    assert torch.equal(output.stats["num_steps"], torch.full((2, 9), num_steps))
    assert output.stats["core_passes"] == 2 * 9 * num_steps


@pytest.mark.parametrize("criterion", ["kl", "cosine"])
def test_a_test_that_always_fires_leaves_at_the_first_comparison(model, criterion: str) -> None:
    ids = random_ids(2, 9)
    for min_steps, left_at in ((1, 2), (5, 5)):
        output = adaptive(model, ids, criterion, 1e9, min_steps=min_steps)
        with torch.no_grad():
            wanted = model(ids, num_steps=left_at)
        torch.testing.assert_close(output.logits, wanted.logits, **CLOSE)
        assert torch.equal(output.stats["num_steps"], torch.full((2, 9), left_at))


@pytest.mark.parametrize("criterion", sorted(EXIT_TESTS))
def test_one_token_equals_a_slow_reference(model, criterion: str) -> None:
    """A decoded token leaves at the step that separate runs at every depth point to, with that run's logits."""
    prompt, token = random_ids(3, 7), random_ids(3, 1, seed=8)
    cache = RecurrentDepthCache(model.config, "latest")
    with torch.no_grad():
        model(prompt, num_steps=MOST, past_key_values=cache)
        runs = [model(token, num_steps=r, past_key_values=copy.deepcopy(cache)) for r in range(1, MOST + 1)]
    test = EXIT_TESTS[criterion]
    output = adaptive(model, token, criterion, past_key_values=cache)
    for row in range(3):
        looked_at = [(run.logits if test.of_logits else run.latent_states)[row, 0].float() for run in runs]
        streak, left_at = 0, MOST
        for step in range(2, MOST + 1):
            new, old = looked_at[step - 1], looked_at[step - 2]
            value = slow_measure(criterion, new, old)
            passed = value == 0 if criterion == "argmax-stability" else value < MIDDLING[criterion]
            streak = streak + 1 if passed else 0
            if streak >= (MIDDLING[criterion] if criterion == "argmax-stability" else 1):
                left_at = step
                break
        assert output.stats["num_steps"][row, 0] == left_at
        torch.testing.assert_close(output.logits[row], runs[left_at - 1].logits[row], **CLOSE)
    assert output.stats["core_passes"] == output.stats["num_steps"].sum()


def slow_measure(criterion: str, new: torch.Tensor, old: torch.Tensor) -> float:
    p, q = (torch.softmax(x.double(), -1) for x in (new, old))
    new, old = new.double(), old.double()
    if criterion == "kl":
        return float((p * (p.log() - q.log())).sum())
    if criterion == "entropy-diff":
        return float(abs((q * q.log()).sum() - (p * p.log()).sum()))
    if criterion == "latent-diff":
        return float((new - old).norm() / new.norm())
    if criterion == "cosine":
        return float(1 - F.cosine_similarity(new, old, dim=0))
    return float(new.argmax() != old.argmax())


@pytest.mark.parametrize("criterion", OF_STATES)
def test_whole_equals_token_by_token(model, criterion: str) -> None:
    """Tests of the state see the same in a prefill as in decoding; tests of logits pass through the coda, which in a
    prefill reads its neighbours' unfinished states."""
    ids = random_ids(2, 10)
    whole = adaptive(model, ids, criterion)
    assert len(whole.stats["num_steps"].unique()) > 1, "the threshold must tell tokens apart"
    assert whole.stats["core_passes"] < ids.numel() * MOST
    for sizes in (1, 4):
        cache = RecurrentDepthCache(model.config, "latest")
        parts = [adaptive(model, part, criterion, past_key_values=cache) for part in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole.logits, **CLOSE)
        assert torch.equal(cache.steps_run, whole.stats["num_steps"])


@pytest.mark.parametrize(
    ("criterion", "side"),
    [*((criterion, "left") for criterion in sorted(EXIT_TESTS)), ("kl", "right")]
    + [pytest.param(one, "right", marks=pytest.mark.slow) for one in sorted(EXIT_TESTS) if one != "kl"],
)
def test_padded_batch_equals_solo_runs(model, criterion: str, side: str) -> None:
    rows = [random_ids(1, length, seed=length) for length in (4, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(11 - tokens.shape[1], 11) if side == "left" else slice(0, tokens.shape[1])
        ids[row, place], mask[row, place] = tokens[0], 1
    together = adaptive(model, ids, criterion, attention_mask=mask)
    for row, tokens in enumerate(rows):
        alone = adaptive(model, tokens, criterion)
        real = mask[row].bool()
        assert torch.equal(together.stats["num_steps"][row, real], alone.stats["num_steps"][0])
        torch.testing.assert_close(together.logits[row, real], alone.logits[0], **CLOSE)


@pytest.mark.parametrize("criterion", ["kl", "latent-diff"])
def test_generated_batch_equals_solo_runs(models, criterion: str) -> None:
    model = models["llama"]
    options = {
        "num_steps": MOST,
        "criterion": criterion,
        "exit_threshold": MIDDLING[criterion],
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    ids = random_ids(3, 6)
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    steps = together.past_key_values.steps_run
    assert steps.shape == (3, 11)
    assert len(steps.unique()) > 1
    for row in range(3):
        alone = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 6), **options)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert torch.equal(alone.past_key_values.steps_run[0], steps[row])


def test_without_cache_and_beams(models) -> None:
    model, ids = models["qwen2"], random_ids(2, 7)
    cached, uncached = (adaptive(model, ids, "cosine", use_cache=use_cache) for use_cache in (True, False))
    assert uncached.past_key_values is None
    torch.testing.assert_close(uncached.logits, cached.logits, **CLOSE)
    out = model.generate(ids, num_steps=6, criterion="latent-diff", num_beams=2, max_new_tokens=4, eos_token_id=None)
    assert out.shape == (2, 11)


def test_a_callable_and_the_defaults(models) -> None:
    model, ids = models["llama"], random_ids(1, 6)
    largest = adaptive(model, ids, lambda new, old: (new - old).abs().amax(-1), 0.05)
    assert largest.stats["num_steps"].max() <= MOST
    for criterion in EXIT_TESTS:
        output = adaptive(model, ids, criterion, "auto")
        assert output.stats["num_steps"].min() >= 2
    assert DepthPolicy.resolve(model.config, criterion="kl").threshold == 5e-4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": "kll"}, "did you mean 'kl'"),
        ({"criterion": "magic"}, "use kl, entropy-diff"),
        ({"criterion": "kl", "exit_threshold": 0.0}, "above 0"),
        ({"criterion": "kl", "exit_threshold": "low"}, "'auto' or above 0"),
        ({"criterion": "kl", "min_steps": 9}, "between 1 and num_steps"),
        ({"criterion": "kl", "cache_rule": "ring-2"}, "use 'latest.ring-2'"),
        ({"criterion": "kl", "output_hidden_states": True}, "output_hidden_states"),
        ({"criterion": "kl", "num_steps": (2, 2)}, "one number"),
    ],
)
def test_mistakes(models, kwargs: dict, message: str) -> None:
    model, ids = models["llama"], random_ids(1, 3)
    with pytest.raises(ValueError, match=message):
        model(ids, **{"num_steps": 4} | kwargs)
    if "output_hidden_states" not in kwargs:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=2, **{"num_steps": 4} | kwargs)


def test_training_is_refused(models) -> None:
    model = models["olmo2"].train()
    with pytest.raises(ValueError, match="for inference"):
        model(random_ids(1, 3), num_steps=3, criterion="kl")
    model.eval()


@pytest.mark.parametrize("criterion", [name for name, test in EXIT_TESTS.items() if test.of_logits])
@pytest.mark.parametrize("largest", [0, 2**40], ids=["logits made again", "a table kept"])
def test_few_logits_at_once_decide_what_whole_tables_decide(monkeypatch, criterion: str, largest: int) -> None:
    """150 tokens, of which fewer and fewer are left; the reference holds every step's logits in fp32."""
    monkeypatch.setattr(exits, "LARGEST_TABLE", largest)
    torch.manual_seed(3)
    test, table = EXIT_TESTS[criterion], torch.randn(37, 8)
    states = [torch.randn(150, 8)]
    for step in range(5):
        states.append(states[-1] + torch.randn(150, 8) * 0.5 ** (step + torch.rand(150, 1) * 4))
    logits = [(state @ table.T).float() for state in states]
    measured = [test.compare(new, old) for old, new in pairwise(logits)]
    threshold = 2 if test.streak is None else 1.001 * float(measured[1].median())
    tracker, left = ExitTracker(test, threshold, 1), torch.arange(150)
    streak, gone = torch.zeros(150), 0
    most = 0

    def head(part: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(part))
        return part @ table.T

    for step, state in enumerate(states, 1):
        settled = tracker.settled(state[left], left, step, head)
        if step > 1:
            streak = torch.where(measured[step - 2] < tracker.threshold, streak + 1, 0.0)
        assert torch.equal(settled, (streak[left] >= tracker.streak_needed) & (step > 1))
        left, gone = left[~settled], gone + int(settled.sum())
    assert gone > 20
    assert most <= exits.TOKENS_AT_ONCE


def test_what_is_remembered_is_small(monkeypatch) -> None:
    """No table of tokens by vocabulary: entropies, picks, or what the coda left."""
    monkeypatch.setattr(exits, "LARGEST_TABLE", 1000)
    for criterion, numbers in (("kl", 8), ("entropy-diff", 1), ("argmax-stability", 1)):
        tracker = ExitTracker(EXIT_TESTS[criterion], 5, 1)
        tracker.settled(torch.randn(90, 8), torch.arange(90), 1, lambda part: part @ torch.randn(8, 1_000))
        assert tracker._old.numel() == 90 * numbers
