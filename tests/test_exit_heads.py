"""Exit heads: what calibration fits in place of a test of logits, and what it saves."""

import pytest
import torch

from redepth.evaluation.calibrate import calibrate, depth_profile, measure_depths
from redepth.evaluation.exit_heads import fit_weights, main_directions
from redepth.modeling import DepthPolicy
from redepth.modeling.exit_heads import ExitHead, features, from_text, to_text
from redepth.modeling.exits import EXIT_TESTS, ExitTest
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

MOST = 9
OF_LOGITS = sorted(name for name, test in EXIT_TESTS.items() if test.of_logits)


@pytest.fixture(scope="module", params=["griffin", "llama"])
def model(zoo, request):
    model = plan_conversion(zoo[request.param], "0:2", "2:4", "5:6", adapter="blend:0.5", state="noise").model().eval()
    model.config.state_std = 1.0
    model.config.depth_profile = depth_profile(measure_depths(model, random_ids(4, 24), MOST), "random")
    return model


@pytest.fixture
def coda_runs(model, monkeypatch):
    runs = []
    whole = model.transformer.run_coda
    monkeypatch.setattr(model.transformer, "run_coda", lambda *args: runs.append(1) or whole(*args))
    return runs


def test_features_are_the_whole_change() -> None:
    new, old = torch.randn(5, 12), torch.randn(5, 12)
    directions = torch.linalg.qr(torch.randn(12, 12)).Q[:4]
    found = features(new, old, directions)
    change = (new - old) / new.norm(dim=-1, keepdim=True)
    assert torch.allclose(found.sum(-1), change.square().sum(-1), atol=1e-5)
    assert torch.allclose(found[:, 1], (change @ directions[1]).square(), atol=1e-5)
    head = ExitHead(directions, torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0]))
    assert torch.allclose(head(new, old), 2 * found[:, 1])


def test_a_quadratic_form_is_found_again() -> None:
    torch.manual_seed(1)
    seen = torch.rand(500, 5) * torch.logspace(-6, 0, 500)[:, None]
    weights = torch.tensor([3.0, 0.5, 0.1, 1.0, 0.2])
    found = fit_weights(EXIT_TESTS["kl"], seen, seen @ weights)
    told, wanted = seen @ found, seen @ weights
    assert ((told / wanted).log().abs()).mean() < 0.1
    rates = fit_weights(EXIT_TESTS["argmax-stability"], seen, (torch.rand(500) < seen.sum(-1) / 5).float())
    assert 0.5 < (seen @ rates).sum() / (seen.sum() / 5) < 2


def test_directions_survive_being_written() -> None:
    directions = main_directions([torch.randn(9, 20) for _ in range(4)])
    assert directions.shape == (16, 20)
    assert torch.equal(from_text(to_text(directions), 20), directions)
    for damaged in ("zz", "00", to_text(directions)[:-2]):
        with pytest.raises(ValueError, match="exit_heads that are damaged; calibrate again"):
            from_text(damaged, 20)


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_a_wanted_agreement_is_decided_without_the_coda(model, coda_runs, criterion: str) -> None:
    found = model.config.depth_profile["exit_heads"]["tests"][criterion]
    policy = DepthPolicy.resolve(model.config, num_steps=MOST, criterion=criterion, exit_threshold="95%")
    assert policy.threshold == found["thresholds"]["95%"]
    ids = random_ids(2, 11, seed=5)
    with torch.no_grad():
        output = model(ids, policy=policy, use_cache=False)
    assert len(coda_runs) == 1
    # The same by hand: the head as a test of one's own.
    own = ExitTest(criterion, False, 1.0, policy.test.measure)
    with torch.no_grad():
        by_hand = model(ids, num_steps=MOST, criterion=own, exit_threshold=policy.threshold, use_cache=False)
    assert torch.equal(output.stats["num_steps"], by_hand.stats["num_steps"])
    assert len(coda_runs) == 2
    with torch.no_grad():
        model(ids, num_steps=4, criterion=criterion, exit_threshold=1e-30 if criterion != "argmax-stability" else 9)
    assert len(coda_runs) == 2 + 4  # the exact test looks after each of the first three steps


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_contracts_hold_with_a_head(model, criterion: str) -> None:
    policy = DepthPolicy.resolve(model.config, num_steps=4, criterion=criterion, exit_threshold="95%")
    ids, close = random_ids(2, 8), tolerance(layers=30)
    never = ExitTest(criterion, False, 1.0, policy.test.measure)
    with torch.no_grad():
        output = model(ids, num_steps=4, criterion=never, exit_threshold=1e-30)
        torch.testing.assert_close(output.logits, model(ids, num_steps=4).logits, **close)
        whole = model(ids, policy=policy)
        cache, logits, steps = None, [], []
        for token in ids.split(1, dim=1):
            one = model(token, policy=policy, past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            logits.append(one.logits)
            steps.append(one.stats["num_steps"])
    assert torch.equal(torch.cat(steps, dim=1), whole.stats["num_steps"])
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **close)


def test_steps_that_can_not_end_the_loop_are_not_looked_at(model, coda_runs) -> None:
    with torch.no_grad():
        output = model(
            random_ids(2, 5), num_steps=MOST, criterion="kl", exit_threshold=1e9, min_steps=6, use_cache=False
        )
    assert (output.stats["num_steps"] == 6).all()
    assert len(coda_runs) == 3  # after steps 5 and 6, and at the end


def test_padding_may_leave_before_the_first_look(model) -> None:
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    options = {"num_steps": MOST, "criterion": "kl", "exit_threshold": 1e-3, "min_steps": 4, "use_cache": False}
    with torch.no_grad():
        both = model(ids, attention_mask=mask, **options)
        alone = model(ids[1:, 3:], **options)
    assert torch.equal(both.stats["num_steps"][1, 3:], alone.stats["num_steps"][0])


def test_tables_are_looked_at_a_few_tokens_at_a_time(model) -> None:
    """A prefill longer than one part of it, beside a tracker that sees the whole."""
    ids = random_ids(1, 100)
    widths = []
    whole = model.lm_head.forward
    model.lm_head.forward = lambda x: widths.append(x.numel() // x.shape[-1]) or whole(x)
    try:
        with torch.no_grad():
            model(ids, num_steps=4, criterion="kl", exit_threshold=1e-30, use_cache=False, logits_to_keep=1)
    finally:
        del model.lm_head.forward
    assert max(widths) == 64


def test_what_is_stored_is_obeyed(zoo, tmp_path) -> None:
    import redepth

    out = tmp_path / "out"
    redepth.convert(zoo["llama"], out, prelude="0:2", core="2:4", coda="4:6", adapter="blend:0.4")
    profile = calibrate(out, random_ids(2, 16), "random", 6)
    model = redepth.load(out)
    policy = DepthPolicy.resolve(model.config, num_steps=6, criterion="kl", exit_threshold="95%")
    assert not policy.test.of_logits
    assert policy.threshold == profile["exit_heads"]["tests"]["kl"]["thresholds"]["95%"]
    assert DepthPolicy.resolve(model.config, num_steps=6, criterion="kl", exit_threshold=1e-3).test.of_logits
