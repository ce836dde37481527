"""A recurrent model at one depth as an ordinary deep one, under transformers' own batching."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, ContinuousBatchingConfig

from redepth import RecurrentDepthForCausalLM
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
# transformers would take most of the machine's memory for its cache.
SMALL = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=32)


def make(zoo: dict[str, Path], name: str) -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo[name], "0:2", "2:4", "5:6", adapter="blend:0.4", state="noise").model()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2", "smollm3"])
def test_logits_and_generate_equal_the_looped_model(zoo, name: str) -> None:
    model, ids = make(zoo, name), random_ids(2, 9)
    unrolled = model.unrolled(num_steps=3)
    assert unrolled.config.num_hidden_layers == len(unrolled.config.layer_types) == 2 + 3 * 2 + 1
    assert {id(part) for part in unrolled.parameters()} == {id(part) for part in model.parameters()}
    with torch.no_grad():
        torch.testing.assert_close(unrolled(ids).logits, model(ids, num_steps=3).logits, **tolerance(layers=9))
    assert torch.equal(unrolled.generate(ids, **GREEDY), model.generate(ids, num_steps=3, **GREEDY))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_transformers_own_batching_gives_what_generate_gives(zoo, name: str) -> None:
    model = make(zoo, name)
    unrolled = model.unrolled(num_steps=3)
    unrolled.generation_config.eos_token_id = -1
    prompts = [random_ids(1, length, seed=length) for length in (3, 11, 6)]
    outputs = unrolled.generate_batch(
        [ids[0].tolist() for ids in prompts], max_new_tokens=5, continuous_batching_config=SMALL
    )
    assert len(outputs) == len(prompts)
    for ids, output in zip(prompts, outputs.values(), strict=True):
        assert output.error is None
        assert output.generated_tokens == model.generate(ids, num_steps=3, **GREEDY)[0, ids.shape[1] :].tolist()


def test_scores_that_can_not_be_capped_are_refused(zoo, caplog) -> None:
    unrolled = make(zoo, "gemma2").unrolled(num_steps=2)
    with caplog.at_level(logging.CRITICAL):
        outputs = unrolled.generate_batch([[5, 6]], max_new_tokens=2, continuous_batching_config=SMALL)
    assert [("soft-cap" in output.error, output.generated_tokens) for output in outputs.values()] == [(True, [])]


def test_mistakes_and_defaults(zoo) -> None:
    model = make(zoo, "llama")
    assert model.unrolled().config.num_steps == model.config.default_num_steps
    with pytest.raises(ValueError, match="at least 1"):
        model.unrolled(num_steps=0)
    with pytest.raises(ValueError, match="recurrent in time"):
        make(zoo, "griffin").unrolled(2)
    with pytest.raises(ValueError, match="128 this model allows"):
        model.unrolled(2)(random_ids(1, 129))


def test_saved_and_loaded(zoo, tmp_path) -> None:
    model, ids = make(zoo, "llama"), random_ids(1, 6)
    unrolled = model.unrolled(num_steps=2)
    unrolled.save_pretrained(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        again = auto_class.from_pretrained(tmp_path, trust_remote_code=True)
        # The code that came with the folder.
        assert type(again).__module__.startswith("transformers_modules")
        with torch.no_grad():
            hidden = again(ids)[0]
            logits = hidden if auto_class is AutoModelForCausalLM else unrolled.lm_head(hidden)
            assert torch.equal(logits, unrolled(ids).logits)
