"""Recurrent in time and in depth: a converted RecurrentGemma, beyond the contracts that every family is held to."""

import shutil
from pathlib import Path

import pytest
import torch

import redepth
from redepth import RecurrentDepthCache, RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.checkpoint.inspect import cache_bytes_per_token, recurrent_bytes
from redepth.errors import RedepthError
from redepth.healing.heal import heal
from redepth.healing.recipe import HealRecipe
from redepth.modeling.elementwise import BLOCK
from redepth.modeling.lru_scan import linear_scan_reference
from redepth.modeling.lru_state import LruState
from redepth.surgery.convert import plan_conversion
from redepth.surgery.weights import to_source
from tests.test_cache_rules import ByDefinition, decode, step_read
from tests.test_healing import SHORT, byte_tokenizer
from tests.test_recurrent_gemma import VARIANTS
from tests.test_recurrent_gemma import make_model as make_recurrent_gemma
from tests.tolerance import tolerance
from tests.zoo import random_ids, save_source

CLOSE = tolerance(layers=4 + 2 * 8)  # the deepest token runs 8 steps
OPTIONS = {"num_steps": 3, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    """Prelude, core and coda with a recurrence each, and attention in two of them."""
    return {
        name: plan_conversion(zoo[name], "0:2", "2:4", "4:6", adapter="blend:0.4", state="noise").model()
        for name in ("griffin", "griffin-attention-first", "hawk")
    }


@pytest.fixture(params=["griffin", "griffin-attention-first", "hawk"])
def model(request, models) -> RecurrentDepthForCausalLM:
    return models[request.param]


@pytest.mark.parametrize("variant", [name for name, change in VARIANTS.items() if not change.get("attention_bias")])
def test_full_cover_equals_redepths_own_recurrent_gemma(variant, tmp_path: Path) -> None:
    source = make_recurrent_gemma(**VARIANTS[variant])
    source.save_pretrained(tmp_path / "source")
    ids = random_ids(2, 21) % 61
    for adapter, depths in (("inject", (1, 3)), ("blend:0.25", (1,))):
        converted = plan_conversion(tmp_path / "source", core="1:3", adapter=adapter).model()
        with torch.no_grad():
            wanted = source(ids, use_cache=False).logits
            for num_steps in depths:
                got = converted(ids, num_steps=num_steps, use_cache=False).logits
                assert (got - wanted).square().mean() <= 1e-10


def test_text_longer_than_the_window_in_any_chunks(model) -> None:
    ids = random_ids(2, 40)
    with torch.no_grad():
        wanted = model(ids, num_steps=4, use_cache=False).logits
        for sizes in ([1] * 40, [17, 1, 1, 21], [39, 1]):
            cache = RecurrentDepthCache(model.config)
            parts = [model(part, num_steps=4, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **CLOSE)


@pytest.mark.parametrize("rule", ["full", "latest", "ring-2"])
def test_padding_between_tokens_and_in_later_calls(tmp_path: Path, rule: str) -> None:
    """A row padded on the right goes on in the next call, which brings padding of its own."""
    # A window that no row fills: transformers' masks count it in columns, padding included.
    source = save_source("griffin", tmp_path / "source", attention_window_size=64)
    model = plan_conversion(source, "0:2", "2:4", "4:6", adapter="blend:0.4").model()
    rows = [random_ids(1, 12, seed=1), random_ids(1, 7, seed=2)]
    first = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])
    second = torch.tensor([[1] * 4, [0] + [1] * 3])
    ids = torch.zeros(2, 12, dtype=torch.long)
    mask = torch.cat([first, second], dim=1)
    for row, tokens in enumerate(rows):
        ids[row, mask[row].bool()] = tokens[0]
    cache = RecurrentDepthCache(model.config, rule)
    with torch.no_grad():
        logits = [
            model(ids[:, :8], attention_mask=first, num_steps=4, past_key_values=cache).logits,
            model(ids[:, 8:], attention_mask=mask, num_steps=4, past_key_values=cache).logits,
        ]
        for row, tokens in enumerate(rows):
            solo = RecurrentDepthCache(model.config, rule)
            split = int(first[row].sum())
            wanted = [
                model(part, num_steps=4, past_key_values=solo).logits[0]
                for part in (tokens[:, :split], tokens[:, split:])
            ]
            got = torch.cat(logits, dim=1)[row, mask[row].bool()]
            torch.testing.assert_close(got, torch.cat(wanted), **CLOSE)


def test_a_depth_of_its_own_in_every_chunk_equals_token_by_token(model) -> None:
    """Under `latest`, shallow tokens stand in at the deeper steps of later ones, however they were cut."""
    ids, depths = random_ids(2, 12), [4] * 5 + [2] * 3 + [6] * 1 + [3] * 3
    cuts = {"whole chunks": [5, 3, 1, 3], "token by token": [1] * 12}
    results = []
    for sizes in cuts.values():
        cache, start, logits = RecurrentDepthCache(model.config, "latest"), 0, []
        for part in ids.split(sizes, dim=1):
            with torch.no_grad():
                logits.append(model(part, num_steps=depths[start], past_key_values=cache).logits)
            start += part.shape[1]
        results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*results, **CLOSE)


class RecurrentByDefinition(ByDefinition):
    """Keeps what every token wrote at every step, and makes each memory anew from what the rule shows of it."""

    stands_in = True

    @property
    def lru_slots(self):
        return self

    def lru_state(self, layer_idx, step, timeline):
        self._steps_in_pass = max(self._steps_in_pass, step)
        self.step, memory = step, LruState(self.taps)
        for token, ran in enumerate(self.ran[: self.length]):
            written = self.kept[layer_idx, step_read(self.definition, ran, step) if step else 0, token]
            memory.with_inputs(written.inputs)
            memory.store_states(linear_scan_reference(written.added, written.decay, memory.state())[0])
        return memory

    def write(self, layer, written):
        self.kept[layer, self.step, self.length] = written


@pytest.mark.parametrize(
    ("rule", "depths"),
    [
        ("latest", [3, 5, 2, 4, 1, 6]),
        ("full", [4] * 5),
        ("ring-3", [5, 3, 7, 4, 8]),
        ("first-2-then-last", [5, 3, 7, 4, 8]),
    ],
)
def test_states_follow_the_rules_definition(model, rule: str, depths: list[int]) -> None:
    ids = random_ids(1, len(depths))
    by_definition = RecurrentByDefinition(model.config, rule)
    by_definition.taps = model.config.conv1d_width
    wanted = decode(model, ids, depths, by_definition)
    torch.testing.assert_close(decode(model, ids, depths, RecurrentDepthCache(model.config, rule)), wanted, **CLOSE)


def test_what_can_not_go_with_a_state_is_refused(models) -> None:
    model, ids = models["griffin"], random_ids(1, 4)
    for rule in ("skip", "latest+ring-3", "skip+first-2-then-last"):
        with pytest.raises(ValueError, match="can't go with recurrent layers"):
            model(ids, num_steps=2, cache_rule=rule, use_cache=True)
    for options in ({"draft_steps": 2}, {"sampler": "wavefront"}):
        with pytest.raises(ValueError, match="recurrent layers"):
            model.generate(ids, **OPTIONS | options)


def test_a_refused_rule_is_answered_with_one_that_works(models) -> None:
    model, ids = models["griffin"], random_ids(1, 4)
    options = OPTIONS | {"criterion": "latent-diff"}
    with pytest.raises(ValueError, match="use 'latest'"):
        model.generate(ids, **options, cache_rule="ring-2")
    model.generate(ids, **options, cache_rule="latest")


def test_step_calls_equal_forward(model) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        wanted = model(ids, num_steps=3).logits
        for cache in (None, RecurrentDepthCache(model.config)):
            embedded, layers = model.embed_inputs(ids, past_key_values=cache)
            state, step = model.initialize_state(embedded), 0
            for _ in range(3):
                state, layers, step = model.iterate_one_step(
                    embedded, state, past_key_values=cache, block_idx=layers, current_step=step
                )
            got = model.predict_from_latents(state, past_key_values=cache).logits
            torch.testing.assert_close(got, wanted, **CLOSE)


def test_assisted_decoding_equals_plain(models, zoo) -> None:
    model, ids = models["griffin"], random_ids(1, 6)
    assistant = plan_conversion(zoo["griffin"], "0:2", "2:4", "5:6", adapter="inject").model()
    plain = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, **OPTIONS, assistant_model=assistant), plain)
    assert torch.equal(model.generate(ids, **OPTIONS, prompt_lookup_num_tokens=2), plain)


def test_assisted_decoding_on_padded_prompts(models, zoo) -> None:
    """Padding on the left, and a prompt that holds the padding's id as a token, which generate takes for padding."""
    model, ids = models["griffin"], random_ids(1, 9)
    ids[0, 5] = 0
    assistant = plan_conversion(zoo["griffin"], "0:2", "2:4", "5:6", adapter="inject").model()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for inputs in ({"attention_mask": padded}, {"pad_token_id": 0}):
        plain = model.generate(ids, **OPTIONS, **inputs)
        assert torch.equal(model.generate(ids, **OPTIONS, **inputs, assistant_model=assistant), plain)
        assert torch.equal(model.generate(ids, **OPTIONS, **inputs, prompt_lookup_num_tokens=2), plain)


def test_crop_under_latest_takes_back_what_stood_in(model) -> None:
    ids = random_ids(2, 8)
    cache = RecurrentDepthCache(model.config, "latest")
    with torch.no_grad():
        model(ids, num_steps=5, past_key_values=cache)
        wanted = model(ids[:, :3], num_steps=5, past_key_values=cache).logits
        cache.activate_past_recording()
        with pytest.raises(ValueError, match=r"can't crop 3 tokens.*activate_past_recording"):
            cache.crop(-3)
        model(ids[:, 3:], num_steps=2, past_key_values=cache)
        cache.crop(-5)
        got = model(ids[:, 4:6], num_steps=5, past_key_values=cache).logits
        again = RecurrentDepthCache(model.config, "latest")
        model(ids, num_steps=5, past_key_values=again)
        torch.testing.assert_close(model(ids[:, :3], num_steps=5, past_key_values=again).logits, wanted, **CLOSE)
        torch.testing.assert_close(model(ids[:, 4:6], num_steps=5, past_key_values=again).logits, got, **CLOSE)


def test_states_do_not_grow_with_the_text(models) -> None:
    model = models["hawk"]
    cache = RecurrentDepthCache(model.config)
    sizes = []
    with torch.no_grad():
        for part in random_ids(1, 90).split(30, dim=1):
            model(part, num_steps=3, past_key_values=cache)
            sizes.append(cache.memory_bytes())
    layers, width, taps = 2 + 2 * 3 + 2, model.config.lru_width, model.config.conv1d_width
    # One state and the convolution's last inputs for each layer of each step, and no keys at all.
    assert set(sizes) == {layers * width * taps * 4}
    assert (recurrent_bytes(model.config, 3), cache_bytes_per_token(model.config, 3)) == (sizes[0], 0)


@pytest.mark.parametrize("rule", ["full", "ring-2"])
def test_memory_is_predicted(model, rule: str) -> None:
    cache = RecurrentDepthCache(model.config, rule)
    with torch.no_grad():
        model(random_ids(2, 9), num_steps=5, past_key_values=cache)
    predicted = 2 * (recurrent_bytes(model.config, 5, rule) + 9 * cache_bytes_per_token(model.config, 5, rule))
    assert cache.memory_bytes() == predicted


def test_another_document_beside_padding_is_refused(models) -> None:
    model, ids = models["griffin"], random_ids(1, 8)
    positions, mask = torch.tensor([[0, 0, 1, 0, 1, 2, 3, 4]]), torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="another document in a row with padding"):
        model(ids, position_ids=positions, num_steps=1, attention_mask=mask)


def test_a_cache_of_another_model_is_refused(models, zoo) -> None:
    other = plan_conversion(zoo["llama"], core="2:4").model()
    for model, config in ((models["hawk"], other.config), (other, models["hawk"].config)):
        with pytest.raises(ValueError, match="made for a model with other layers"):
            model(random_ids(1, 3), num_steps=1, past_key_values=RecurrentDepthCache(config))


def gradients(model, num_steps, **inputs) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 11)
    model.zero_grad()
    model(ids, labels=ids, num_steps=num_steps, use_cache=False, **inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["griffin", "hawk"])
def test_gradients_equal_the_sources(zoo, name: str) -> None:
    """Full cover through `inject`: the gradients of transformers' class, tensor by tensor."""
    conversion = plan_conversion(zoo[name], core="2:4", adapter="inject")
    source, ids = conversion.source.reference_model(), random_ids(2, 11)
    source(ids, labels=ids, use_cache=False).loss.backward()
    wanted = {key: parameter.grad for key, parameter in source.named_parameters()}
    got = gradients(conversion.model().train(), 1)
    for key, gradient in to_source(conversion.table, got.__getitem__):
        torch.testing.assert_close(gradient, wanted[key], **CLOSE, msg=key)


def test_gradient_checkpointing_gives_the_same_gradients(zoo) -> None:
    model = plan_conversion(zoo["griffin"], "0:2", "2:4", "4:6", adapter="blend:0.4").model().train()
    plain = gradients(model, (1, 2))
    model.gradient_checkpointing_enable()
    for key, gradient in gradients(model, (1, 2)).items():
        torch.testing.assert_close(gradient, plain[key], msg=key)


def test_a_long_prompt_in_blocks_equals_the_whole(models) -> None:
    model, ids = models["hawk"], random_ids(1, 2 * BLOCK + 5)
    model.config.block_size = 4096
    whole = model(ids, num_steps=2, use_cache=False).logits
    with torch.no_grad():
        for rule in ("full", "latest"):
            got = model(ids, num_steps=2, cache_rule=rule).logits
            torch.testing.assert_close(got, whole, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers_in_recurrent_block": 0}, "the core needs at least 1 layer"),
        ({"lru_width": 25}, r"lru_width \(25\) is not a multiple of n_heads \(4\)"),
        ({"conv1d_width": 0}, "conv1d_width is 0"),
        ({"layer_types": ["linear_attention"] * 3}, "3 entries, but the model has 4"),
    ],
)
def test_configs_that_no_model_can_have(changes: dict, message: str) -> None:
    shape = {"n_embd": 16, "n_heads": 4, "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2}
    shape |= {"n_layers_in_coda": 1, "layer_types": ["linear_attention"] * 4}
    with pytest.raises(ValueError, match=message):
        RecurrentDepthConfig(**shape | changes)


def test_a_source_with_biased_attention_is_refused(tmp_path: Path) -> None:
    save_source("griffin", tmp_path / "source", attention_bias=True)
    with pytest.raises(RedepthError, match="attention_bias=True"):
        redepth.convert(tmp_path / "source", tmp_path / "out")


def test_heal_then_generate_with_adaptive_exit(zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo["griffin"], tmp_path / "source")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "source")
    out = tmp_path / "deep"
    redepth.convert(tmp_path / "source", out, core="2:4")
    (tmp_path / "text.jsonl").write_text('{"text": "over and over and over "}\n' * 50)
    recipe = HealRecipe(**SHORT | {"max_steps": 40, "learning_rate": 3e-3, "data": str(tmp_path / "text.jsonl")})
    healing = heal(out, recipe)
    assert all(healing.loss_after[depth] < healing.loss_before[depth] - 0.3 for depth in (1, 4))

    model = redepth.load(out)
    ids = tokenizer("over and over", return_tensors="pt")["input_ids"]
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_steps=16,
        criterion="latent-diff",
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    steps = written.past_key_values.steps_run
    assert steps.shape == (1, ids.shape[1] + 7)
    assert int(steps.max()) < 16 or len(steps.unique()) > 1


def test_fresh_models_of_both_recurrences_train_in_bfloat16() -> None:
    torch.manual_seed(0)
    config = RecurrentDepthConfig(
        vocab_size=31,
        n_embd=16,
        n_heads=4,
        intermediate_size=24,
        n_layers_in_prelude=1,
        n_layers_in_recurrent_block=2,
        n_layers_in_coda=1,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    )
    model = RecurrentDepthForCausalLM(config).train()
    ids = torch.randint(31, (2, 19))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, num_steps=(1, 2), loss_only=True).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
