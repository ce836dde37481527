"""Calibration: one pass measures every depth, and the checkpoint keeps and obeys what it found."""

import copy
import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import redepth
from redepth.errors import RedepthError
from redepth.evaluation.calibrate import calibrate, depth_profile, exit_steps, loosest_threshold, measure_depths
from redepth.evaluation.loss import loss_by_depth
from redepth.modeling.exits import EXIT_TESTS, ExitTracker
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids

MOST = 9


@pytest.fixture(scope="module", params=["griffin", "llama"])
def model(zoo, request):
    model = plan_conversion(zoo[request.param], "0:2", "2:4", "5:6", adapter="blend:0.5", state="noise").model()
    model.config.state_std = 1.0
    return model


@pytest.fixture(scope="module")
def found(model):
    return measure_depths(model, random_ids(3, 20), MOST)


def test_one_pass_equals_separate_runs(model, found) -> None:
    ids = random_ids(3, 20)
    profile = depth_profile(found, "random")
    wanted = loss_by_depth(model, ids, range(1, MOST + 1))
    assert profile["loss"] == pytest.approx(list(wanted.values()), abs=2e-5)
    with torch.no_grad():
        runs = [model(ids, num_steps=r, use_cache=False).logits for r in range(1, MOST + 1)]
    for run, kl, agreement in zip(runs, profile["kl_to_deepest"], profile["agreement"], strict=True):
        p, q = runs[-1].log_softmax(-1), run.log_softmax(-1)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-6)
        assert agreement == pytest.approx(float((run.argmax(-1) == runs[-1].argmax(-1)).float().mean()), abs=1e-4)
    assert profile["tokens"] == 60


def test_broken_weights_are_not_measured(model) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        measure_depths(broken, random_ids(1, 6), 2)


@pytest.mark.parametrize("name", sorted(EXIT_TESTS))
def test_exits_are_those_of_the_policy(model, found, name: str) -> None:
    """What calibration works out from the recorded courses is what `ExitTracker` decides step by step."""
    test, ids = EXIT_TESTS[name], random_ids(3, 20)
    course = torch.cat(found.courses[name], dim=1)
    threshold = 2.0 if test.streak is None else float(course.median())
    tracker = ExitTracker(test, threshold, 1)
    left = torch.full((60,), MOST)
    with torch.no_grad():
        embedded, _ = model.embed_inputs(ids)
        state = model.initialize_state(embedded)
        for step in range(1, MOST):
            state = model.iterate_one_step(embedded, state)[0]
            looked_at = model.predict_from_latents(state).logits if test.of_logits else state
            settled = tracker.settled(looked_at.flatten(0, 1), torch.arange(60), step)
            left = torch.where(settled & (left == MOST), step, left)
    got = exit_steps(test, course, threshold)
    assert len(got.unique()) > 1
    # Each row by itself and the batch differ in the last bit, which a token at the very threshold may feel.
    assert (got != left).sum() <= 1


@pytest.mark.parametrize("name", sorted(EXIT_TESTS))
def test_thresholds_keep_the_wanted_agreement(found, name: str) -> None:
    test, course, picks = EXIT_TESTS[name], torch.cat(found.courses[name], dim=1), torch.cat(found.picks, dim=1)
    steps = []
    for wanted in (1.0, 0.9, 0.5):
        threshold, mean_steps = loosest_threshold(test, course, picks, wanted)
        assert threshold is not None
        left = exit_steps(test, course, threshold)
        agreement = (picks.gather(0, (left - 1)[None])[0] == picks[-1]).double().mean()
        assert agreement >= wanted - 1 / 60
        steps.append(mean_steps)
    assert steps == sorted(steps, reverse=True)
    assert loosest_threshold(test, course, picks, 1.1) == (None, None)


def test_the_checkpoint_keeps_and_obeys_it(zoo, tmp_path, caplog) -> None:
    out = tmp_path / "out"
    redepth.convert(zoo["llama"], out, prelude="0:2", core="2:4", coda="4:6", adapter="blend:0.4")
    before = (out / "config.json").read_bytes()
    with pytest.raises(RedepthError, match="at least 2"):
        calibrate(out, random_ids(2, 16), "random", 1)
    assert (out / "config.json").read_bytes() == before
    profile = calibrate(out, random_ids(2, 16), "random", 6)
    # Depths chosen by hand, so that what obeys them can be told from what does not.
    profile |= {"num_steps": 3, "valid_range": [2, 5]}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"depth_profile": profile}))
    model, ids = redepth.load(out), random_ids(1, 7)
    assert model.config.depth_profile == profile
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, num_steps=3).logits)
    wanted = model.generate(ids, num_steps=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    told = transformers.AutoModelForCausalLM.from_pretrained(out, num_steps=4)
    with torch.no_grad():
        assert torch.equal(told(ids).logits, model(ids, num_steps=4).logits)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        transformers.AutoModelForCausalLM.from_pretrained(out, num_steps=0)(ids)

    for num_steps, warnings in ((2, 0), (5, 0), (6, 1), (6, 1), (1, 2)):
        with caplog.at_level(logging.WARNING):
            model.generate(ids, num_steps=num_steps, max_new_tokens=2)
        assert sum("outside 2 to 5" in record.getMessage() for record in caplog.records) == warnings

    threshold = profile["thresholds"]["latent-diff"]["95%"]
    with torch.no_grad():
        calibrated, by_hand = (
            model(ids, num_steps=6, criterion="latent-diff", exit_threshold=value) for value in ("95%", threshold)
        )
    assert torch.equal(calibrated.stats["num_steps"], by_hand.stats["num_steps"])
    for criterion, value in (("latent-diff", "90%"), (F.pairwise_distance, "99%")):
        with pytest.raises(ValueError, match="has no threshold"):
            model.generate(ids, num_steps=6, criterion=criterion, exit_threshold=value)
    model.save_pretrained(tmp_path / "again")
    assert redepth.load(tmp_path / "again").config.depth_profile == profile


def test_refusals(tmp_path) -> None:
    with pytest.raises(RedepthError, match="is no local folder"):
        calibrate("someone/some-model", random_ids(1, 8), "random")


def test_what_is_no_number_is_not_calibrated(zoo, tmp_path) -> None:
    out = tmp_path / "out"
    redepth.convert(zoo["llama"], out, core="2:4")
    file = out / "model.safetensors"
    config, tensors = (out / "config.json").read_bytes(), load_file(file)
    for value, message in (
        (float("nan"), "NaN or infinite in tensor"),
        (1e38, "loss of row 1 after 1 steps is|logits are NaN"),
    ):
        save_file(tensors | {"transformer.ln_f.weight": torch.full((24,), value)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            calibrate(out, random_ids(2, 8), "random", 3)
    assert (out / "config.json").read_bytes() == config
