"""Quantised weights: every kernel beside the plain product, checkpoints that keep their bytes, and what is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import redepth
from redepth.checkpoint.sources import open_source
from redepth.errors import RedepthError
from redepth.evaluation.quantize import DEPTHS, quantize
from redepth.healing.recipe import HealRecipe
from redepth.modeling.quantized_linear import (
    ACTIVATION_LEVELS,
    DYNAMIC,
    KERNELS,
    WEIGHT_ONLY,
    HalfHead,
    QuantizedLinear,
    measured_choice,
    plain_product,
    plain_weights,
)
from redepth.modeling.quantized_weights import dequantize, int4_levels, to_int4, to_int8
from redepth.modeling.quantizer import QUANTIZATIONS, DepthQuantizationConfig, linears, quantize_model
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids

SOME_FAMILIES = ("gemma2", "griffin", "llama", "olmo2", "qwen2")
ALL_KINDS = [
    DepthQuantizationConfig(**how, groups=groups) for how in QUANTIZATIONS.values() for groups in ("core", "all")
]


@pytest.fixture(scope="module", params=SOME_FAMILIES)
def model(zoo, request):
    return plan_conversion(zoo[request.param], "0:2", "2:4", "4:6", adapter="blend:0.5", state="embed").model().eval()


def quantized_copy(model, config):
    made = copy.deepcopy(model)
    quantize_model(made, config)
    return made


def test_eight_bits_round_to_the_nearest_level() -> None:
    weight = torch.randn(5, 37)
    weight[2] = 0
    stored = to_int8(weight)
    assert stored.weight.dtype == torch.int8
    assert ((dequantize(stored, 37) - weight).abs() <= stored.scale[:, None] * 0.5001).all()
    assert (stored.weight.abs().amax(-1) == torch.tensor([127, 127, 0, 127, 127])).all()


@pytest.mark.parametrize("inputs", [32, 37, 70])
def test_four_bits_are_no_worse_than_the_whole_span(inputs: int) -> None:
    weight = torch.randn(6, inputs)
    weight[1] = 0.3
    stored = to_int4(weight, 32)
    assert int4_levels(stored).max() <= 15
    assert stored.weight.shape == (6, -(-inputs // 32) * 16)
    for group in range(0, inputs, 32):
        part = weight[:, group : group + 32]
        low, step = part.amin(-1, keepdim=True), (part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)) / 15
        naive = low + ((part - low) / step.clamp(min=1e-9)).round() * step
        error = (dequantize(stored, inputs)[:, group : group + 32] - part).square().sum(-1)
        # Scale and offset are stored in bf16, which the naive ones are not.
        assert (error <= (naive - part).square().sum(-1) * 1.3 + 1e-4).all()


@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
@pytest.mark.parametrize(("kind", "bits", "is_bf16"), KERNELS)
def test_every_kernel_agrees_with_the_plain_product(kind: str, bits: int, is_bf16: bool, tokens: int) -> None:
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    linear = nn.Linear(64, 48).to(dtype)
    x = (torch.randn(tokens, 64) * torch.linspace(0.1, 30, tokens)[:, None]).to(dtype)
    x[-1, 3] = 200.0  # an outlier in one token is none of the others' business
    for kernel in KERNELS[kind, bits, is_bf16]:
        layer = QuantizedLinear.of(linear, kind, bits, 32)
        wanted = plain_product(x, plain_weights(layer.stored(), 64, kind, dtype), kind) + linear.bias
        try:
            layer.pack(kernel)
        except RuntimeError as error:
            pytest.skip(f"not built for this processor: {error}")
        got = layer(x)
        assert got.dtype == dtype
        error = (got - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
        assert error.max() < (2e-2 if is_bf16 else 2e-4), kernel
        exact = linear(x).float()
        assert ((got.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < (0.12 if bits == 4 else 0.03)


def test_rounded_activations_differ_by_half_a_level_at_most() -> None:
    """The readable form itself, written once more: whole numbers, multiplied as whole numbers."""
    linear, x = nn.Linear(40, 8, bias=False), torch.randn(3, 40)
    layer = QuantizedLinear.of(linear, DYNAMIC, 8, 32)
    stored = layer.stored()
    scale = x.abs().amax(-1, keepdim=True) / ACTIVATION_LEVELS
    sums = (x / scale).round().long() @ stored.weight.long().T
    wanted = sums.float() * scale * stored.scale
    layer.pack("plain")
    assert torch.allclose(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ALL_KINDS, ids=str)
def test_a_model_computes_with_its_stored_weights(model, config) -> None:
    """Beside a model of plain layers that hold the dequantised weights; dynamic layers round their activations as well."""
    quantized, plain = quantized_copy(model, config), copy.deepcopy(model)
    replaced = list(linears(plain, config))
    assert {name.split(".")[1] for name, *_ in replaced} >= {"adapter", "core_block"}
    for name, linear, how in replaced:
        stored = quantized.get_submodule(name).stored()
        linear.weight.data = plain_weights(stored, linear.in_features, how["kind"], torch.float32)
        if how["kind"] == DYNAMIC:
            product = QuantizedLinear.of(linear, **how)
            product._hold(stored)
            product.pack("plain")
            plain.set_submodule(name, product)
    ids = random_ids(2, 9)
    with torch.inference_mode():
        got, wanted, before = (one(ids, num_steps=3).logits for one in (quantized, plain, model))
    near, far = (got - wanted).norm() / wanted.norm(), (got - before).norm() / before.norm()
    # A rounding of the last bit can move an activation by a level, in one of the layers.
    assert near < (3e-3 if config.kind == DYNAMIC else 2e-3)
    assert 1e-4 < far < (0.7 if config.bits == 4 else 0.08)


@pytest.mark.parametrize("config", ALL_KINDS[:1] + ALL_KINDS[-1:], ids=str)
def test_cached_is_uncached(model, config) -> None:
    quantized, ids = quantized_copy(model, config), random_ids(2, 8)
    with torch.inference_mode():
        whole = quantized(ids, num_steps=3).logits
        cache, parts = None, []
        for part in ids.split([5, 1, 2], dim=1):
            out = quantized(part, num_steps=3, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, dim=1) - whole).norm() / whole.norm() < 3e-3


def test_depth_policies_work(model) -> None:
    quantized, ids = quantized_copy(model, DepthQuantizationConfig()), random_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "attention_mask": ids > 0}
    plain = quantized.generate(ids, num_steps=4, **options)
    never = quantized.generate(
        ids, num_steps=4, criterion="latent-diff", exit_threshold=1e-12, cache_rule="latest", **options
    )
    assert torch.equal(plain.sequences, never.sequences)
    early = quantized.generate(ids, num_steps=4, criterion="latent-diff", exit_threshold=10.0, **options)
    assert (early.stats["num_steps"] == 2).all()


def test_torch_compiles_no_quantised_core(model, monkeypatch) -> None:
    quantized = quantized_copy(model, DepthQuantizationConfig())
    monkeypatch.setattr(quantized.transformer, "use_few_token_kernels", lambda: False)
    assert quantized.compile_core() is False
    assert not quantized.transformer.core_is_compiled


def test_another_dtype_keeps_the_stored_tensors() -> None:
    linear = nn.Linear(64, 16)
    for kind, bits in ((DYNAMIC, 8), (WEIGHT_ONLY, 8), (WEIGHT_ONLY, 4), (WEIGHT_ONLY, 16)):
        layer = QuantizedLinear.of(linear, kind, bits, 32)
        layer.pack()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer = copy.deepcopy(layer).to(torch.bfloat16)
        after = layer.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in layer.stored_names)
        assert all(after[name].dtype == before[name].dtype for name in layer.stored_names)
        assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_the_kernel_is_the_one_that_was_measured(monkeypatch) -> None:
    """A kernel that this processor lacks, or that is slower, gives way to a plain product with the same numbers."""
    import redepth.modeling.quantized_linear as module

    linear, x = nn.Linear(64, 16, bias=False), torch.randn(3, 64)
    described = (DYNAMIC, 8, 32, 16, 64, torch.float32, torch.get_num_threads())
    ordinary = QuantizedLinear.of(linear, DYNAMIC, 8, 32)
    ordinary.pack("plain")

    class Missing:
        def __init__(self, *arguments) -> None:
            raise RuntimeError("no such engine")

    for kernels, slow, kernel_is_used in (((Missing,), False, False), (KERNELS[DYNAMIC, 8, False], True, False)):
        measured_choice.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(KERNELS, (DYNAMIC, 8, False), kernels)
            if slow:  # the plain product is timed first
                times = iter([1.0] * 4 + [5.0] * 4)
                patch.setattr(module, "best_time", lambda *_, times=times: next(times))
            _, prefers_plain = measured_choice(*described)
            assert all(prefers_plain) is not kernel_is_used
            layer = QuantizedLinear.of(linear, DYNAMIC, 8, 32)
            layer.pack()
            assert torch.allclose(layer(x), ordinary(x), atol=1e-5)
        measured_choice.cache_clear()


@pytest.fixture(scope="module")
def unquantized(zoo, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantization") / "out"
    redepth.convert(zoo["llama"], out, prelude="0:2", core="2:4", coda="4:6", adapter="blend:0.5")
    return out


@pytest.fixture(scope="module")
def stored(unquantized):
    out = unquantized.parent / "stored"
    record = quantize(open_source(unquantized), out, DepthQuantizationConfig(), random_ids(2, 12), "random", 1.0)
    assert list(record["depths"]) == list(DEPTHS)
    return out


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_what_is_stored_loads_and_saves_to_the_same_bytes(unquantized, stored, tmp_path) -> None:
    tensors = load_file(stored / "model.safetensors")
    assert tensors["transformer.core_block.0.mlp.fc.weight"].dtype == torch.int8
    assert tensors["transformer.adapter.weight"].dtype == torch.float16
    assert "lm_head.weight" not in tensors
    loaded, as_loaded = redepth.load(stored), redepth.load(unquantized, quantization="int8")
    ids = random_ids(2, 7)
    with torch.inference_mode():
        assert torch.allclose(loaded(ids, num_steps=3).logits, as_loaded(ids, num_steps=3).logits, atol=1e-4)
    for name, one in (("first", loaded), ("second", as_loaded)):
        one.save_pretrained(tmp_path / name)
        assert load_file(tmp_path / name / "model.safetensors").keys() == tensors.keys()
        again = redepth.load(tmp_path / name)
        again.save_pretrained(tmp_path / f"{name} again")
        assert weights_of(tmp_path / f"{name} again") == weights_of(tmp_path / name) == weights_of(stored)
    redepth.convert(stored, tmp_path / "republished", dtype="bfloat16")
    republished = load_file(tmp_path / "republished" / "model.safetensors")
    for name, tensor in tensors.items():
        kept = tensor if tensor.dtype != torch.float32 or name.endswith(".scale") else tensor.bfloat16()
        assert torch.equal(republished[name], kept), name
    redepth.load(tmp_path / "republished")


def test_folder_card_and_inspect_say_it(stored) -> None:
    assert json.loads((stored / "config.json").read_text())["quantization_config"]["quant_method"] == "redepth"
    assert redepth.inspect(stored)["quantization"] == "8 bits, dynamic, the core"
    card = (stored / "README.md").read_text()
    assert "Weights in 8 bits, dynamic, in core" in card
    assert "| r = 32 |" in card


def test_what_a_quantised_checkpoint_is_not_for(stored, tmp_path) -> None:
    out = tmp_path / "out"
    for verb in (
        lambda: redepth.heal(stored, HealRecipe(max_steps=1), out),
        lambda: redepth.verify(stored),
        lambda: redepth.quantize(stored, out),
    ):
        with pytest.raises(RedepthError, match="is quantised and can't .*; start from the one that it was made from"):
            verb()
        assert not (out / "config.json").exists()


def test_too_large_a_loss_is_refused(unquantized, tmp_path) -> None:
    config = DepthQuantizationConfig(4)
    with pytest.raises(RedepthError, match=r"4 bits, weight-only, the core raises the loss by -?\d.*--largest-loss"):
        quantize(open_source(unquantized), tmp_path / "out", config, random_ids(1, 8), "random", -10.0)
    assert not (tmp_path / "out").exists()


def test_the_head_of_all_groups_reads_half_precision(zoo) -> None:
    model = plan_conversion(zoo["llama"], "0:2", "2:4", "4:6").model().eval()
    quantized = quantized_copy(model, DepthQuantizationConfig(groups="all"))
    head, x = quantized.lm_head, torch.randn(1, 3, 24)
    assert isinstance(head, HalfHead)
    assert head.weight is quantized.transformer.wte.weight
    with torch.inference_mode():
        assert torch.allclose(head(x), model.lm_head(x), rtol=1e-2, atol=1e-2)
        quantized.resize_token_embeddings(7)
        assert quantized.lm_head(x).shape == (1, 3, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits=3; use 8 or 4"),
        ({"kind": "static"}, "kind='static'; use dynamic or weight-only"),
        ({"groups": "coda"}, "groups='coda'; use core or all"),
        ({"bits": 4, "kind": "dynamic"}, "4 bits is weight-only"),
        ({"largest_loss": -1.0}, "--largest-loss -1.0"),
        ({"rows": 0}, "--rows 0"),
        ({"sequence_length": 4096}, "more than the 128"),
    ],
)
def test_bad_choices_end_in_one_line(unquantized, tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        redepth.quantize(unquantized, tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_configurations_end_in_one_line(zoo, unquantized) -> None:
    with pytest.raises(ValueError, match="unknown quantization 'int9'; use int8, int8-weight-only, int4"):
        redepth.load(unquantized, quantization="int9")
    with pytest.raises(ValueError, match="group_size=31"):
        DepthQuantizationConfig(4, group_size=31)
    with pytest.raises(ValueError, match="recurrent in depth, not a RecurrentGemmaForCausalLM"):
        redepth.load(zoo["griffin"], quantization="int8")
    twice = redepth.load(unquantized, quantization="int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(twice, DepthQuantizationConfig())


def test_damaged_scales_are_refused(stored, tmp_path) -> None:
    model = redepth.load(stored)
    layer = model.transformer.core_block[0].mlp.fc
    layer._hold(layer.stored())
    layer.scale.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.pack()


@pytest.mark.slow
def test_without_redepth_the_folder_loads_by_its_own_code(stored, tmp_path) -> None:
    script = f"""
import sys, torch
sys.modules["redepth"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(stored)!r}, trust_remote_code=True)
assert "QuantizedLinear" in type(model.transformer.core_block[0].mlp.fc).__name__
torch.save(model(torch.arange(3, 12)[None], num_steps=3).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    with torch.inference_mode():
        wanted = redepth.load(stored)(torch.arange(3, 12)[None], num_steps=3).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-3)
