"""Contracts 3 and 7 on every family: conversions are exact, and what does not fit is refused by name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import redepth
from redepth.errors import RedepthError
from redepth.surgery.convert import plan_conversion
from redepth.surgery.families import families, parse_family
from redepth.surgery.plan import Plan
from redepth.surgery.verify import TOLERANCE
from redepth.surgery.weights import adapter_weight, to_source
from tests.zoo import COMMON, FAMILIES, make_model, random_ids, save_source


@torch.no_grad()
def logits_of_source(source: Path, ids: torch.Tensor) -> torch.Tensor:
    from redepth.checkpoint.sources import open_source

    return open_source(str(source)).reference_model()(ids, use_cache=False).logits


@torch.no_grad()
def mse(model, ids: torch.Tensor, wanted: torch.Tensor, num_steps: int) -> float:
    return (model(ids, num_steps=num_steps, use_cache=False).logits - wanted).square().mean().item()


@pytest.mark.parametrize(
    ("adapter", "state", "depths"),
    [
        ("inject", "embed", (1, 2, 5)),
        pytest.param("blend:0.25", "embed", (1,), marks=pytest.mark.slow),
        pytest.param("blend:1", "embed", (1,), marks=pytest.mark.slow),
        ("gate:0.25", "embed", (1,)),
        ("random", "skip-adapter", (1,)),
        pytest.param("inject", "skip-adapter", (1, 2), marks=pytest.mark.slow),
    ],
)
def test_full_cover_equals_source_in_the_saved_file(
    source: Path, tmp_path: Path, adapter: str, state: str, depths
) -> None:
    redepth.convert(source, tmp_path / "out", core="2:4", adapter=adapter, state=state)
    model = redepth.load(tmp_path / "out")
    ids = random_ids(2, 33)
    wanted = logits_of_source(source, ids)
    for num_steps in depths:
        assert mse(model, ids, wanted, num_steps) <= TOLERANCE


def test_swapped_layers_fail(source: Path) -> None:
    conversion = plan_conversion(source, core="2:4")
    ids = random_ids(2, 33)
    wanted = logits_of_source(source, ids)
    swapped = conversion.with_plan(conversion.plan.with_two_layers_swapped())
    assert mse(conversion.model(), ids, wanted, 1) <= TOLERANCE < mse(swapped.model(), ids, wanted, 1)


def test_dropped_layers_equal_the_cut_source(source: Path, tmp_path: Path) -> None:
    redepth.convert(source, tmp_path / "out", prelude="0:1", core="2:4", coda="5:6")
    verification = redepth.verify(tmp_path / "out", source)
    assert verification.passed
    by_name = {check.name: check for check in verification.checks}
    assert by_name["checkpoint against source cut the same way"].mse <= TOLERANCE
    assert by_name["two layers swapped (control)"].verdict == "differs"
    record = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert record["passed"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "two layers swapped" in card
    assert "`2:4`" in card


def test_verify_notices_a_wrong_checkpoint(zoo, tmp_path: Path) -> None:
    redepth.convert(zoo["llama"], tmp_path / "out", core="2:4")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    first, second = (f"transformer.prelude.{layer}.mlp.proj.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file, metadata={"format": "pt"})
    assert not redepth.verify(tmp_path / "out", zoo["llama"]).passed


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "qwen2"])
def test_sliding_windows_are_honoured(zoo, name: str) -> None:
    conversion = plan_conversion(zoo[name], core="2:4")
    ids = random_ids(1, 40)
    wanted = logits_of_source(zoo[name], ids)
    assert "sliding_attention" in conversion.config.layer_types
    assert mse(conversion.model(), ids, wanted, 1) <= TOLERANCE
    conversion.config.sliding_window = 1000  # as good as full attention on 40 tokens
    assert mse(conversion.model(), ids, wanted, 1) > TOLERANCE


def test_weight_table_reads_backwards(source: Path) -> None:
    conversion = plan_conversion(source, core="2:4")
    recurrent = dict(conversion.tensors())
    back = dict(to_source(conversion.table, recurrent.__getitem__))
    original = {name: conversion.source.read(name) for name in conversion.source.tensor_names()}
    if conversion.config.tie_embeddings:
        original.pop("lm_head.weight", None)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("adapter", ["blend:0.125", "blend:0.1"])
def test_bfloat16_conversion_is_the_rounded_source(zoo, tmp_path: Path, adapter: str) -> None:
    redepth.convert(zoo["qwen3"], tmp_path / "out", core="1:3", dtype="bfloat16", adapter=adapter)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert redepth.verify(tmp_path / "out").passed


@given(st.floats(0, 1, exclude_min=True), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_both_parts_of_a_blend_are_exact_and_add_up_to_one(alpha: float, dtype: torch.dtype) -> None:
    state, embedded = adapter_weight(f"blend:{alpha!r}", 1, dtype).to(dtype).double().flatten().tolist()
    assert state + embedded == 1
    assert abs(state - alpha) <= torch.finfo(dtype).eps / 2
    assert state > 0
    assert (embedded > 0) == (alpha < 1)


def test_untie_and_tie(zoo, tmp_path: Path) -> None:
    redepth.convert(zoo["llama"], tmp_path / "untied", core="2:4", tie=False)
    model = redepth.load(tmp_path / "untied")
    assert not model.config.tie_embeddings
    assert model.lm_head.weight.data_ptr() != model.transformer["wte"].weight.data_ptr()
    assert torch.equal(model.lm_head.weight, model.transformer["wte"].weight)
    assert redepth.verify(tmp_path / "untied", zoo["llama"]).passed
    with pytest.raises(RedepthError, match=r"lm_head\.weight.*leave --tie out"):
        redepth.convert(zoo["llama-untied"], tmp_path / "tied", core="2:4", tie=True)
    assert not (tmp_path / "tied").exists()


def test_skip_adapter_is_verified_as_it_is(zoo, tmp_path: Path) -> None:
    redepth.convert(zoo["qwen3"], tmp_path / "out", core="2:4", adapter="random", state="skip-adapter")
    verification = redepth.verify(tmp_path / "out")
    assert verification.passed
    assert verification.checks[-1].verdict == "equal"
    model, ids = redepth.load(tmp_path / "out"), random_ids(1, 9)
    assert not torch.allclose(model(ids, num_steps=1).logits, model(ids, num_steps=2).logits, atol=1e-2)


@pytest.mark.parametrize("state", ["noise", "zeros"])
def test_random_start_is_verified_through_the_surgery_alone(zoo, tmp_path: Path, state: str) -> None:
    redepth.convert(zoo["olmo2"], tmp_path / "out", core="2:4", adapter="random", state=state)
    verification = redepth.verify(tmp_path / "out")
    assert verification.passed
    assert verification.checks[-1].verdict == "reported"


def test_sharded_source_and_output(zoo, tmp_path: Path) -> None:
    make_model("olmo2").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    redepth.convert(tmp_path / "source", tmp_path / "out", core="2:4", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert redepth.verify(tmp_path / "out", zoo["olmo2"]).passed


def test_no_layer_before_or_after_the_core(zoo, tmp_path: Path) -> None:
    redepth.convert(zoo["llama"], tmp_path / "out", core="0:6")
    model = redepth.load(tmp_path / "out")
    assert len(model.transformer["prelude"]) == len(model.transformer["coda"]) == 0
    assert redepth.verify(tmp_path / "out").passed
    ids = model.generate(random_ids(1, 5), num_steps=3, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > 5


def test_output_folder_is_complete(zoo, tmp_path: Path) -> None:
    redepth.convert(zoo["gemma2"], tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    modelling = {
        "errors.py",
        "fields.py",
        "blocks.py",
        "cache.py",
        "cache_rules.py",
        "cache_slots.py",
        "config_checks.py",
        "configuration.py",
        "elementwise.py",
        "exits.py",
        "extensions.py",
        "generation.py",
        "passes.py",
        "policy.py",
        "pretrained.py",
        "published.py",
        "published_kinds.py",
        "rotary.py",
        "stack.py",
        "tokens.py",
        "loss.py",
        "model.py",
        "adaptive.py",
        "attention.py",
        "attention_backward.py",
        "compiled.py",
        "drafting.py",
        "exit_heads.py",
        "few_tokens.py",
        "quantization.py",
        "quantized_linear.py",
        "quantized_weights.py",
        "quantizer.py",
        "unrolled.py",
        "lru_slots.py",
        "lru_state.py",
        "lru_mixer.py",
        "lru_scan.py",
        "speculation.py",
        "state.py",
        "ragged.py",
        "wavefront.py",
    }
    records = {
        ".redepth.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
    }
    assert names == modelling | records


def test_unmatched_and_leftover_tensors_are_named(zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo["qwen3"], tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    extra = tensors | {"model.layers.0.self_attn.gate.weight": torch.zeros(2)}
    save_file(extra, file, metadata={"format": "pt"})
    with pytest.raises(RedepthError, match=r"model\.layers\.0\.self_attn\.gate\.weight"):
        redepth.convert(tmp_path / "source", tmp_path / "out")
    del tensors["model.layers.3.self_attn.k_norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RedepthError, match=r"lacks tensor 'model\.layers\.3\.self_attn\.k_norm\.weight'"):
        redepth.convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_truncated_and_pickled_weights(zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo["llama"], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RedepthError, match="cut short"):
        redepth.convert(tmp_path / "cut", tmp_path / "out")
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(RedepthError, match=r"\.bin.*save_pretrained"):
        redepth.convert(tmp_path / "cut", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disk_full_leaves_nothing(zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("redepth.checkpoint.shards.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        redepth.convert(zoo["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_kept_unless_told(zoo, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RedepthError, match="already exists"):
        redepth.convert(zoo["llama"], tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(RedepthError, match="was not written by redepth"):
        redepth.convert(zoo["llama"], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "2:9"}, "has 6 layers"),
        ({"core": "3:3"}, "holds no layer"),
        ({"core": "2-4"}, "START:STOP"),
        ({"prelude": "0:3", "core": "2:4"}, "twice or out of order"),
        ({"prelude": "0:3"}, "need --core"),
        ({"adapter": "blend:1.5"}, "blend:α"),
        ({"adapter": "identity"}, "inject, random"),
        ({"state": "ones"}, "embed, noise, zeros"),
        ({"dtype": "int8"}, "float32"),
        ({"max_shard_size": "big"}, "500MB"),
    ],
)
def test_bad_options(zoo, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(RedepthError, match=message) as caught:
        redepth.convert(zoo["llama"], tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_redepth_has_not_are_refused(tmp_path: Path) -> None:
    save_source("llama", tmp_path / "biased", attention_bias=True)
    with pytest.raises(RedepthError, match="attention_bias=True"):
        redepth.convert(tmp_path / "biased", tmp_path / "out")
    save_source(
        "llama", tmp_path / "dynamic", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(RedepthError, match="dynamic"):
        redepth.convert(tmp_path / "dynamic", tmp_path / "out")


def test_wrong_family_and_missing_source(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RedepthError, match="'gpt2'.*redepth converts gemma"):
        redepth.convert(tmp_path / "gpt2", tmp_path / "out")
    with pytest.raises(RedepthError, match="does not exist"):
        redepth.convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(RedepthError, match="could not be fetched"):
        redepth.convert("nobody/nothing", tmp_path / "out")


def test_every_family_is_covered_and_strict() -> None:
    model_types = {make_model(name).config.model_type for name in FAMILIES}
    assert set(families()) == model_types
    data = families()["llama"].model_dump()
    assert parse_family(data) == families()["llama"]
    for wrong in ({"windowz": "none"}, {"windows": "some"}, {"switches": {"norm_placement": "pre"}}):
        with pytest.raises(RedepthError, match="family 'llama'"):
            parse_family(data | wrong)


def test_source_license_reaches_the_card(zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo["llama"], tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    redepth.convert(tmp_path / "source", tmp_path / "out")
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_full_cover_of_a_plan() -> None:
    plan = Plan((0, 1), (4, 5), (9,), 10)
    assert plan.full_cover() == Plan((0, 1, 2, 3), (4, 5), (6, 7, 8, 9), 10)
    assert plan.dropped == (2, 3, 6, 7, 8)
    assert COMMON["num_hidden_layers"] == 6


@pytest.mark.slow
def test_conversion_holds_one_shard_in_memory(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "conversion_memory.py"
    words = ["--billions", "0.2", "--shard-gb", "0.6", "--max-shard-size", "100MB", "--folder", str(tmp_path / "made")]
    done = subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True, text=True)
    size, taken = (float(number) for number in re.findall(r"(?:source|conversion) (\d+\.\d+) GB", done.stdout))
    assert size > 0.5
    # The shard in hand and the next tensor, here the embedding and the head of 0.13 GB each; never the model.
    assert taken < 0.4
