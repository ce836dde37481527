"""The published code's own tensors for a tiny Huginn checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import redepth

FOLDER = Path(__file__).parent / "golden" / "huginn-tiny"
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture
def model() -> redepth.RecurrentDepthForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_forward(model, golden, num_steps: int) -> None:
    with torch.no_grad():
        output = model(golden["input_ids"], input_states=golden["input_states"], num_steps=num_steps)
    torch.testing.assert_close(output.logits, golden[f"logits_steps{num_steps}"], **TOLERANCE)
    torch.testing.assert_close(output.latent_states, golden[f"latent_states_steps{num_steps}"], **TOLERANCE)


def test_step_calls(model, golden) -> None:
    with torch.no_grad():
        embedded, layers = model.embed_inputs(golden["input_ids"])
        torch.testing.assert_close(embedded, golden["embed_inputs"], **TOLERANCE)
        state, layers, steps = model.iterate_one_step(embedded, golden["input_states"], block_idx=layers)
        torch.testing.assert_close(state, golden["one_step_state"], **TOLERANCE)
        assert (layers, steps) == (6, 1)
        output = model.predict_from_latents(state)
    torch.testing.assert_close(output.logits, golden["predict_from_latents"], **TOLERANCE)


def decode(model, ids: torch.Tensor, rule: str, depths: list[int]) -> torch.Tensor:
    cache = redepth.RecurrentDepthCache(model.config, rule)
    zeros = torch.zeros(1, 1, model.config.n_embd)
    logits = []
    with torch.no_grad():
        for token, depth in zip(ids.split(1, dim=1), depths, strict=True):
            output = model(token, input_states=zeros, num_steps=depth, past_key_values=cache)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("rule", ["full", "compress-s4", "compress-s8"])
def test_cached_decoding(model, golden, rule: str) -> None:
    ids = golden["input_ids"][:1]
    logits = decode(model, ids, rule, [6] * ids.shape[1])
    torch.testing.assert_close(logits, golden[f"decode_{rule}_steps6_zero_state"], **TOLERANCE)


def test_depth_for_each_token(model, golden) -> None:
    depths = golden["varied_depth"].tolist()
    logits = decode(model, golden["input_ids"][:1], "latest-m4", depths)
    torch.testing.assert_close(logits, golden["decode_latest_varied_depth"], **TOLERANCE)


def test_greedy_generation(model, golden) -> None:
    model.config.initial_state_mode = "zeros"
    ids = model.generate(golden["input_ids"][:1], num_steps=5, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(ids, golden["greedy_steps5_zero_state"])
