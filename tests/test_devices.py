"""Models spread over devices, as far as a processor can show it: the meta device is the second one, and disk a third.

Nothing can come back from meta, so what is looked at is that every tensor gets there: an operation between two devices
raises.
"""

from pathlib import Path

import pytest
import torch
from accelerate import disk_offload, dispatch_model

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.modeling import state as state_module
from redepth.modeling.passes import pass_context
from redepth.modeling.state import position_noise
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids

# llama: adapter and plain masks; gemma3: windows and two rotary bases; griffin: recurrent layers.
NAMES = ("llama", "gemma3", "griffin")


def make(zoo, name: str) -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo[name], "0:2", "2:4", "5:6", adapter="random", state="noise").model()


@pytest.mark.parametrize("name", NAMES)
def test_core_and_coda_on_another_device(zoo, monkeypatch, name: str) -> None:
    model = make(zoo, name)
    # It reads a number, which meta does not have.
    monkeypatch.setattr(RecurrentDepthCache, "check_steps", lambda self, num_steps: None)
    # The head's weight is the embedding's where the two are tied, and stays with it.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parts = {f"transformer.{part}": "meta" for part in ("adapter", "core_block", "coda", "ln_f")}
    places = {"transformer.wte": "cpu", "transformer.prelude": "cpu", "lm_head": "meta"} | parts
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True, skip_keys="past_key_values")
    # What comes out is sent back to where the input was, which meta can't.
    model._hf_hook.io_same_device = False
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        cache = RecurrentDepthCache(model.config, "full")
        first = model(random_ids(2, 6), attention_mask=mask, num_steps=3, past_key_values=cache)
        second = model(random_ids(2, 2), num_steps=3, past_key_values=cache)
    assert first.logits.device.type == second.logits.device.type == "meta"
    assert second.logits.shape == (2, 2, model.config.vocab_size)


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_disk(zoo, tmp_path: Path, name: str) -> None:
    model, ids = make(zoo, name), random_ids(2, 6)
    options = {"num_steps": 2, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        wanted, text = model(ids, num_steps=3).logits, model.generate(ids, **options)
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(ids, num_steps=3).logits, wanted)
        assert torch.equal(model.generate(ids, **options), text)


def test_a_context_moves_once(zoo) -> None:
    model = make(zoo, "griffin")
    context = pass_context(model.config, torch.zeros(1, 4, 24))
    assert context.to("cpu") is context
    moved = context.to("meta")
    assert moved is context.to("meta")
    assert moved.position_ids.device.type == "meta"
    assert {part.device.type for pair in moved.rotations.values() for part in pair} == {"meta"}


def test_noise_where_there_is_no_double_precision(monkeypatch) -> None:
    """The same numbers, made on the processor."""
    positions = torch.arange(7)[None]
    wanted = position_noise(3, positions, 5)
    answers = iter([True, False])
    monkeypatch.setattr(state_module, "lacks_fp64", lambda device: next(answers))
    assert torch.equal(position_noise(3, positions, 5), wanted)
    assert not list(answers)
