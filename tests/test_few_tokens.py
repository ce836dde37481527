"""The kernels for few tokens: the plain pass's numbers for every family, and the same bits for however many tokens."""

import copy
import gc
import pickle
import subprocess
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from redepth import RecurrentDepthCache, RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.modeling import few_tokens
from redepth.modeling.blocks import Attention
from redepth.modeling.quantization import DYNAMIC, WEIGHT_ONLY
from redepth.modeling.quantized_linear import ACTIVATION_LEVELS, HalfHead, QuantizedLinear, plain_product, plain_weights
from redepth.modeling.quantizer import DepthQuantizationConfig, quantize_model
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import FAMILIES, random_ids

CLOSE = tolerance(layers=4 + 2 * 3, width=64)
ATTENTION_ALONE = [name for name in FAMILIES if "griffin" not in name and name != "hawk"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def kernels() -> None:
    try:
        few_tokens.library()
    except OSError as error:
        pytest.skip(f"no kernels here: {error}")


def made(zoo, name: str, **settings: Any) -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo[name], "0:2", "2:4", "4:6", adapter="blend:0.5", **settings).model().eval()


def huginn() -> RecurrentDepthForCausalLM:
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_heads": 3, "intermediate_size": 37, "vocab_size": 101, "block_size": 128}
    layers = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1}
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**shape, **layers, qk_bias=True)).eval()
    for block in model.transformer.core_block:
        nn.init.normal_(block.attn.qk_bias)
    return model


def read(model: RecurrentDepthForCausalLM, parts: list[torch.Tensor], **settings: Any) -> torch.Tensor:
    """Logits of a text that is read part by part through one cache, `[B, tokens, V]`."""
    cache = RecurrentDepthCache(model.config, settings.get("cache_rule"))
    with torch.inference_mode():
        return torch.cat(
            [model(part, past_key_values=cache, num_steps=3, use_cache=True, **settings).logits for part in parts],
            dim=1,
        )


def calls_of(monkeypatch) -> list[int]:
    """Grows by one entry for every block that runs by the kernels."""
    calls: list[int] = []
    run = few_tokens.library().redepth_block

    class Counting:
        redepth_linear = few_tokens.library().redepth_linear

        @staticmethod
        def redepth_block(*arguments: Any) -> None:
            calls.append(1)
            run(*arguments)

    monkeypatch.setattr(few_tokens, "library", Counting)
    return calls


@pytest.mark.parametrize("name", [*ATTENTION_ALONE, "huginn"])
def test_every_family_by_tokens_and_chunks(zoo, monkeypatch, name: str) -> None:
    model = huginn() if name == "huginn" else made(zoo, name)
    ids = random_ids(2, 13)
    parts = list(ids.split([6, 1, 1, 4, 1], dim=1))
    wanted = read(model, parts)
    assert model.use_few_token_kernels()
    calls = calls_of(monkeypatch)
    torch.testing.assert_close(read(model, parts), wanted, **CLOSE)
    assert len(calls) == len(parts) * sum(
        len(model.transformer[part]) * steps for part, steps in (("prelude", 1), ("core_block", 3), ("coda", 1))
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_padded_batches_and_other_attention(zoo, monkeypatch, name: str, attention: str) -> None:
    model, ids = made(zoo, name), random_ids(3, 7)
    if name == "gemma2" and attention == "sdpa":
        pytest.skip("soft caps need eager attention")
    model.set_attn_implementation(attention)
    mask = (torch.arange(7) >= torch.tensor([0, 2, 5])[:, None]).long()
    ways: list[dict[str, Any]] = [{}, {"criterion": "latent-diff", "exit_threshold": 0.4}, {"cache_rule": "ring-1"}]
    for way in [
        *ways,
        {"draft_steps": 1, "draft_tokens": 3},
        {"draft_steps": 1, "draft_bits": 8},
        {"cache_rule": "latest"},
    ]:
        wanted = model.generate(ids, attention_mask=mask, num_steps=3, **GREEDY, **way)
        assert model.use_few_token_kernels()
        with monkeypatch.context() as patched:
            calls = calls_of(patched)
            assert torch.equal(model.generate(ids, attention_mask=mask, num_steps=3, **GREEDY, **way), wanted)
            assert calls
        model.use_few_token_kernels(False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3"])
def test_tokens_at_different_places_run_by_the_kernels_too(zoo, monkeypatch, name: str) -> None:
    """Where some tokens have left the loop, and where rows of a batch are at different lengths."""
    model, ids = made(zoo, name), random_ids(3, 11)
    parts = list(ids.split([4, 1, 5, 1], dim=1))
    exits = {"criterion": "latent-diff", "exit_threshold": 0.5, "cache_rule": "latest"}
    mask = (torch.arange(11) >= torch.tensor([0, 2, 5])[:, None]).long()
    ways: list[dict[str, Any]] = [{"draft_steps": 1}, {"sampler": "wavefront", "inner_steps": 2}, exits]
    settings = {"attention_mask": mask, "num_steps": 4, **GREEDY}
    wanted = [read(model, parts, **exits), read(model, parts, **exits | {"cache_rule": "skip"})]
    texts = [model.generate(ids, **settings, **way) for way in ways]
    steps_run = model(ids, num_steps=4, **exits).stats["num_steps"]
    assert len(steps_run.unique()) > 1
    assert model.use_few_token_kernels()
    monkeypatch.setattr(Attention, "forward", None)
    torch.testing.assert_close(read(model, parts, **exits), wanted[0], **CLOSE)
    torch.testing.assert_close(read(model, parts, **exits | {"cache_rule": "skip"}), wanted[1], **CLOSE)
    for way, text in zip(ways, texts, strict=True):
        assert torch.equal(model.generate(ids, **settings, **way), text)


def test_a_mask_for_each_head_goes_the_plain_way(zoo, monkeypatch) -> None:
    model, ids = made(zoo, "llama"), random_ids(1, 5)
    mask = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)).gt(0.4) | torch.eye(5, dtype=torch.bool)
    with torch.inference_mode():
        wanted = model(ids, attention_mask=mask, num_steps=2).logits
        assert model.use_few_token_kernels()
        calls = calls_of(monkeypatch)
        torch.testing.assert_close(model(ids, attention_mask=mask, num_steps=2).logits, wanted, **CLOSE)
        assert not calls
        model(ids, attention_mask=mask[:, :1], num_steps=2)
        assert calls


def test_the_same_bits_for_any_number_of_tokens_rows_and_threads(zoo) -> None:
    """So that a token verified in a round is the one that plain decoding writes."""
    model, ids = made(zoo, "llama"), random_ids(1, 12)
    assert model.use_few_token_kernels()
    one_by_one = read(model, list(ids.split(1, dim=1)))
    for sizes in ([12], [5, 7], [1, 2, 3, 6]):
        assert torch.equal(read(model, list(ids.split(sizes, dim=1))), one_by_one)
    assert torch.equal(read(model, list(ids.expand(2, -1).split(3, dim=1)))[1:], one_by_one)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(read(model, [ids]), one_by_one)
    finally:
        torch.set_num_threads(threads)


def test_long_texts_are_read_in_stretches(zoo) -> None:
    model = made(zoo, "llama")
    model.config.block_size = 2_000
    ids = random_ids(1, 700)
    parts = [ids, *random_ids(1, 6, seed=1).split([1, 5], dim=1)]
    wanted = read(model, parts)[:, 700:]
    model.use_few_token_kernels()
    torch.testing.assert_close(read(model, parts)[:, 700:], wanted, **CLOSE)


@settings(deadline=None, max_examples=60)
@given(
    kind_and_bits=st.sampled_from([(WEIGHT_ONLY, 16), (WEIGHT_ONLY, 8), (WEIGHT_ONLY, 4), (DYNAMIC, 8), (None, 32)]),
    tokens=st.integers(1, 33),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 70),
    group=st.sampled_from([2, 10, 32, 64]),
    bias=st.booleans(),
)
def test_products_of_any_shape(kind_and_bits, tokens: int, inputs: int, outputs: int, group: int, bias: bool) -> None:
    kind, bits = kind_and_bits
    torch.manual_seed(inputs)
    linear, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(tokens, inputs)
    if kind is None:
        layer: nn.Module = linear
        wanted = nn.functional.linear(x, linear.weight, linear.bias)
    else:
        layer = QuantizedLinear.of(linear, kind, bits, group)
        wanted = plain_product(x, plain_weights(layer.stored(), inputs, kind, torch.float32), kind)
        wanted = wanted + linear.bias if bias else wanted
    with torch.inference_mode():
        got = few_tokens.product(layer, x)
    # A half weight is exact here, and an 8-bit one is rounded to half by the plain form.
    near = {"atol": 2e-3 * inputs**0.5, "rtol": 2e-3} if kind is not None else tolerance(1, inputs)
    torch.testing.assert_close(got, wanted.detach(), **near)


def test_8_bits_are_multiplied_as_they_are() -> None:
    """Against the readable form in whole numbers, which rounds nothing."""
    linear, x = nn.Linear(96, 40, bias=False), torch.randn(5, 96)
    for kind in (DYNAMIC, WEIGHT_ONLY):
        layer = QuantizedLinear.of(linear, kind, 8, 32)
        levels, scale = layer.stored().weight.double(), layer.stored().scale.double()
        token_scale = x.abs().amax(-1, keepdim=True).double() / ACTIVATION_LEVELS
        inputs = (x / token_scale.float()).round().double() * token_scale if kind == DYNAMIC else x.double()
        with torch.inference_mode():
            got = few_tokens.product(layer, x)
        torch.testing.assert_close(got.double(), inputs @ levels.T * scale, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [DYNAMIC, WEIGHT_ONLY])
def test_quantised_models(zoo, monkeypatch, bits: int, kind: str) -> None:
    if bits == 4 and kind == DYNAMIC:
        pytest.skip("4 bits are weight-only")
    model, ids = made(zoo, "llama"), random_ids(2, 9)
    quantize_model(model, DepthQuantizationConfig(bits=bits, kind=kind, groups="all"))
    assert isinstance(model.lm_head, HalfHead)
    parts = list(ids.split([6, 1, 2], dim=1))
    exact, wanted = read(made(zoo, "llama"), parts), read(model, parts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.compile_core()
    assert not model.transformer.core_is_compiled
    calls = calls_of(monkeypatch)
    got = read(model, parts)
    assert calls
    # As near to the unquantised model; to each other only as near as two ways to round activations are.
    assert (got - exact).norm() < 1.3 * (wanted - exact).norm()
    assert (got - wanted).norm() < (3e-2 if kind == DYNAMIC else 5e-3) * wanted.norm()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_whatever_changes_the_layers_is_seen(zoo) -> None:
    """New weights, another module in a layer's place, a hook, a watcher: the kernels never answer from before."""
    plain, ids = made(zoo, "llama"), random_ids(1, 5)
    fast = copy.deepcopy(plain)
    assert fast.use_few_token_kernels()

    def equal() -> None:
        torch.testing.assert_close(read(fast, [ids]), read(plain, [ids]), **CLOSE)

    equal()
    for model in (plain, fast):
        with torch.no_grad():
            model.transformer.core_block[0].mlp.fc.weight.mul_(1.5)
            model.transformer.coda[0].attn.proj.weight = nn.Parameter(torch.ones(24, 24) * 0.1)
            model.transformer.prelude[0].norm_1.weight.data = torch.full((24,), 0.5)
    equal()

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for model in (plain, fast):
        doubled = Doubled(24, 24, bias=False)
        doubled.weight = model.transformer.core_block[1].attn.proj.weight
        model.transformer.core_block[1].attn.proj = doubled
    equal()
    heard: list[int] = []
    hook = fast.transformer.coda[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    equal()
    assert heard
    hook.remove()
    equal()
    assert len(heard) == 1


def test_a_model_can_be_copied_saved_and_forgotten(zoo) -> None:
    model, ids = made(zoo, "llama"), random_ids(1, 5)
    model.use_few_token_kernels()
    logits = read(model, [ids])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.transformer.few_token_kernels
        assert torch.equal(read(other, [ids]), logits)
    seen = weakref.ref(model.transformer.core_block[0])
    del model
    gc.collect()
    assert seen() is None


def test_gradients_and_other_dtypes_go_the_plain_way(zoo, monkeypatch) -> None:
    model, ids = made(zoo, "llama"), random_ids(1, 5)
    assert model.use_few_token_kernels()
    calls = calls_of(monkeypatch)
    model(ids, num_steps=2, use_cache=True).logits.sum().backward()
    assert model.transformer.core_block[0].attn.Wqkv.weight.grad is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(ids, num_steps=2)
    with torch.inference_mode():
        model(ids, num_steps=2, use_cache=False)
        model(random_ids(3, 22), num_steps=2)
        assert not calls
        model.bfloat16()(ids, num_steps=2)
    assert not calls
    assert not model.use_few_token_kernels()


def test_without_a_compiler_one_line_says_so(zoo, monkeypatch, tmp_path) -> None:
    model, said = made(zoo, "llama"), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    monkeypatch.setattr(few_tokens.logger, "warning", said.append)
    few_tokens.library.cache_clear()
    try:
        assert not model.use_few_token_kernels()
        assert len(said) == 1
        assert "a-compiler-that-is-not-there" in said[0]
        assert "\n" not in said[0]
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho 'no such flag' >&2\necho more >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        assert not model.use_few_token_kernels()
        assert "no such flag" in said[1]
        assert "\n" not in said[1]
        assert not list((tmp_path / "redepth").iterdir())
    finally:
        few_tokens.library.cache_clear()


def test_they_are_compiled_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few_tokens.library.cache_clear()
    try:
        few_tokens.library()
        few_tokens.library.cache_clear()
        monkeypatch.setattr(subprocess, "run", None)
        few_tokens.library()
        assert [file.suffix for file in (tmp_path / "redepth").iterdir()] == [".so"]
    finally:
        few_tokens.library.cache_clear()
