"""The written-out backward pass of attention against plain autograd."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redepth.modeling import attention_backward, blocks
from redepth.modeling.attention_backward import ProcessorAttention, gains_from_own_backward
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids


def reference(query, key, value, mask, scaling: float) -> torch.Tensor:
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    seen = mask if mask is not None else torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value.repeat_interleave(groups, 1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    tokens=st.integers(1, 13),
    width=st.integers(1, 5),
    at_once=st.integers(1, 14),
    masked=st.sampled_from(["causal", "window", "documents"]),
)
def test_gradients_equal_autograd(batch, groups, per_group, tokens, width, at_once, masked) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def draw(heads: int) -> torch.Tensor:
        # Strided as the block's are: heads and tokens exchanged.
        drawn = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64)
        return drawn.transpose(1, 2).requires_grad_()

    inputs = draw(groups * per_group), draw(groups), draw(groups)
    mask = None
    if masked != "causal":
        where = torch.arange(tokens)
        mask = (where[:, None] >= where)[None, None]
        if masked == "window":
            mask = mask & (where[:, None] - where < 3)
        else:
            document = torch.randint(2, (batch, tokens), generator=generator).cumsum(-1)
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    grad = torch.randn(batch, groups * per_group, tokens, width, generator=generator, dtype=torch.float64)
    wanted = reference(*inputs, mask, 0.3)
    kept, attention_backward.QUERIES_AT_ONCE = attention_backward.QUERIES_AT_ONCE, at_once
    try:
        found = ProcessorAttention.apply(*inputs, mask, 0.3)
        torch.testing.assert_close(found, wanted)
        for ours, autograd in zip(
            torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
        ):
            torch.testing.assert_close(ours, autograd, **tolerance(layers=3, width=13))
    finally:
        attention_backward.QUERIES_AT_ONCE = kept


def test_only_where_it_gains() -> None:
    value = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    assert gains_from_own_backward("sdpa", value, None)
    assert gains_from_own_backward("sdpa", value, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert not gains_from_own_backward("sdpa", value, torch.zeros(1, 1, 3, 3))
    assert not gains_from_own_backward("eager", value, None)
    assert not gains_from_own_backward("sdpa", value.float(), None)
    assert not gains_from_own_backward("sdpa", value.detach(), None)
    with torch.no_grad():
        assert not gains_from_own_backward("sdpa", value, None)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "olmo2"])
def test_training_in_bf16_takes_it_and_agrees(zoo, monkeypatch, family: str) -> None:
    """With it and without it a bf16 step is about as far from the fp32 step."""
    model = plan_conversion(zoo[family], "0:2", "2:4", "5:6", adapter="random").model().train()
    ids, used = random_ids(2, 21), []

    class Counted(ProcessorAttention):
        @staticmethod
        def forward(ctx, *args):
            used.append(args[3] is None)
            return ProcessorAttention.forward(ctx, *args)

    monkeypatch.setattr(blocks, "ProcessorAttention", Counted)

    def gradients(bf16: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            model(ids, labels=ids, num_steps=(1, 2), loss_only=True).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients(bf16=False)
    assert not used
    ours = gradients(bf16=True)
    # Each layer that carries a gradient: prelude, core in the last two of three steps, coda.
    assert len(used) == 2 + 2 * 2 + 1
    monkeypatch.setattr(blocks, "gains_from_own_backward", lambda *args: False)
    torch_own = gradients(bf16=True)
    assert (ours - exact).norm() < 1.5 * (torch_own - exact).norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_are_no_further_from_fp32(zoo) -> None:
    model = plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="random").model().train()
    ids = random_ids(2, 21)

    def gradients(bf16: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            model(ids, labels=ids, num_steps=(1, 3), loss_only=True).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact, plain = gradients(bf16=False), gradients(bf16=True)
    for module in model.modules():
        if isinstance(module, blocks.Block):
            module.compile()
    assert (gradients(bf16=True) - exact).norm() < 1.5 * (plain - exact).norm()
