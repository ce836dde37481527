"""Every published kind loads, runs and round-trips; the oracle of the retrofits is transformers' own layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import redepth
from redepth.checkpoint.cost import count_parameters
from redepth.checkpoint.inspect import cache_bytes_per_token, inspect
from redepth.checkpoint.republish import republish
from redepth.errors import RedepthError
from redepth.modeling.published_kinds import RETROFIT_STATE_STD
from redepth.surgery.create import create
from redepth.surgery.presets import preset_config
from tests.test_golden import FOLDER as HUGINN
from tests.test_healing import byte_tokenizer
from tests.tolerance import tolerance
from tests.zoo import VOCABULARY, make_model, random_ids

PRELUDE, CORE, CODA = (0, 1), (2, 3), (4, 5)
RETROFITS = ("gemma2", "llama", "llama-untied", "olmo2")


def published_config(config: Any, **changes: Any) -> dict[str, Any]:
    """The keys that a retrofitted upload's config has; none of redepth's switches."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
        "n_embd": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "n_layers_in_prelude": len(PRELUDE),
        "n_layers_in_recurrent_block": len(CORE),
        "n_layers_in_coda": len(CODA),
        "mean_recurrence": 4,
        "mean_backprop_depth": 8,
        "block_size": 64,
        "vocab_size": VOCABULARY,
        "tie_embeddings": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "qk_bias": False,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": "float32",
    } | changes


def published_tensors(model: Any, adapter: torch.Tensor) -> dict[str, torch.Tensor]:
    source = model.state_dict()
    tensors = {
        "transformer.wte.weight": source["model.embed_tokens.weight"],
        "transformer.ln_f.weight": source["model.norm.weight"],
        "transformer.adapter.weight": adapter,
        "lm_head.weight": source["lm_head.weight"],
        "freqs_cis": torch.randn(1, 64, 1, 4, 2),
    }
    sandwich = "model.layers.0.pre_feedforward_layernorm.weight" in source
    post = not sandwich and "model.layers.0.post_feedforward_layernorm.weight" in source
    norms = ("post_attention", "post_feedforward") if post else ("input", "post_attention")
    if sandwich:
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for group, layers in (("prelude", PRELUDE), ("core_block", CORE), ("coda", CODA)):
        for position, layer in enumerate(layers):
            of = {
                name.removeprefix(f"model.layers.{layer}."): tensor
                for name, tensor in source.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            block = {
                **{f"norm_{place}": of[f"{name}_layernorm.weight"] for place, name in enumerate(norms, 1)},
                "attn.Wqkv": torch.cat([of[f"self_attn.{part}_proj.weight"] for part in "qkv"]),
                "attn.proj": of["self_attn.o_proj.weight"],
                "mlp.fc": torch.cat([of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]]),
                "mlp.proj": of["mlp.down_proj.weight"],
            }
            if post:
                block |= {f"attn.{part}_norm": of[f"self_attn.{part}_norm.weight"] for part in "qk"}
            tensors |= {f"transformer.{group}.{position}.{name}.weight": tensor for name, tensor in block.items()}
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def write_published(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(params=sorted(RETROFITS))
def retrofit(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, torch.Tensor, Path]:
    """A transformers model, an adapter, and the checkpoint that a retrofit of the two would be."""
    return make_retrofit(request.param, tmp_path / "published")


def make_retrofit(name: str, folder: Path, **changes: Any) -> tuple[Any, torch.Tensor, Path]:
    # A published Gemma 2 leaves its caps and windows to the family.
    family = {"attn_logit_softcapping": 50.0, "sliding_window": 128} if name == "gemma2" else {}
    model = make_model(name, **family)
    width = model.config.hidden_size
    adapter = torch.randn(width, 2 * width) / (2 * width) ** 0.5
    if name == "gemma2":
        changes = {"query_pre_attn_scalar": model.config.query_pre_attn_scalar} | changes
    folder = write_published(folder, published_tensors(model, adapter), published_config(model.config, **changes))
    return model, adapter, folder


@pytest.fixture(autouse=True)
def _random_weights_know_no_english(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "chance" not in request.node.name:
        monkeypatch.setattr("redepth.checkpoint.load.check_inferred", lambda name, model: None)


@torch.no_grad()
def oracle(
    model: Any, adapter: torch.Tensor, ids: torch.Tensor, state: torch.Tensor | str, num_steps: int
) -> torch.Tensor:
    """Prelude, adapter, the core layers num_steps times and coda, from transformers' own decoder layers."""
    tokens = ids.shape[1]
    positions = torch.arange(tokens)[None]
    # Gemma 2's embedding brings its scale along.
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, positions)
    mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]

    def run(layers: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = model.model.layers[layer](x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return x

    embedded = run(PRELUDE, hidden)
    first = 0
    if isinstance(state, str):
        # The published words for a start from e; `skip-adapter` also runs its first step on e itself.
        first, state = (1, run(CORE, embedded)) if state == "skip-adapter" else (0, embedded)
    for _ in range(first, num_steps):
        state = run(CORE, torch.cat([state, embedded], dim=-1) @ adapter.T)
    logits = model.lm_head(model.model.norm(run(CODA, state)))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_retrofits_equal_transformers_layers(retrofit, num_steps: int) -> None:
    source, adapter, folder = retrofit
    ids = random_ids(2, 23)
    state = torch.randn(2, 23, source.config.hidden_size)
    for model in (redepth.load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()):
        with torch.no_grad():
            logits = model(ids, num_steps=num_steps, input_states=state).logits
        torch.testing.assert_close(
            logits, oracle(source, adapter, ids, state, num_steps), **tolerance(layers=4 + 2 * num_steps)
        )


def test_retrofits_start_from_their_noise(retrofit) -> None:
    _, _, folder = retrofit
    model = redepth.load(folder)
    state = model.initialize_state(torch.zeros(4, 60, model.config.n_embd))
    assert abs(state.std().item() / (0.9866 * RETROFIT_STATE_STD) - 1) < 0.05
    assert model.config.embed_scale == (24**0.5 if model.config.norm_placement == "sandwich" else 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"init_values": {"std": 0.5}}))
    state = redepth.load(folder).initialize_state(torch.zeros(4, 60, model.config.n_embd))
    assert abs(state.std().item() / (0.9866 * 0.5) - 1) < 0.05


@pytest.fixture
def huginn(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    config = json.loads((HUGINN / "config.json").read_text())
    return load_file(HUGINN / "model.safetensors"), config, tmp_path


def logits_of(folder: Path, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return redepth.load(folder, **kwargs)(random_ids(1, 12), num_steps=3).logits


def test_huginn_uploads_of_every_shape(huginn) -> None:
    tensors, config, folder = huginn
    wanted = logits_of(HUGINN)
    twice = tensors | {
        "lm_head.weight": tensors["transformer.wte.weight"].clone(),
        "freqs_cis": torch.randn(1, 256, 1, 8, 2),
    }
    assert torch.equal(logits_of(write_published(folder / "twice", twice, config)), wanted)
    assert torch.equal(logits_of(write_published(folder / "sharded", twice, config, shards=3)), wanted)
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    folder = write_published(folder / "bf16", halved, config | {"torch_dtype": "bfloat16"})
    assert redepth.load(folder).dtype == torch.bfloat16
    for dtype in ("auto", "float32"):
        error = logits_of(folder, dtype=dtype).float() - wanted
        assert error.std() < 0.05 * wanted.std()


@pytest.mark.parametrize("mode", ["embed-init", "skip-adapter"])
def test_published_starts_from_e(tmp_path: Path, mode: str) -> None:
    """In forward, cached, one token at a time, by the step calls, in drafts and in the wavefront."""
    source, adapter, folder = make_retrofit("llama", tmp_path / "published", initial_state_mode=mode)
    model, ids = redepth.load(folder), random_ids(2, 7)
    for num_steps in (1, 2, 4):
        wanted = oracle(source, adapter, ids, mode, num_steps)
        with torch.no_grad():
            torch.testing.assert_close(model(ids, num_steps=num_steps).logits, wanted, atol=2e-5, rtol=1e-4)
            cache, rows = None, []
            for token in ids.split(1, dim=1):
                output = model(token, num_steps=num_steps, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(output.logits)
            torch.testing.assert_close(torch.cat(rows, dim=1), wanted, atol=2e-5, rtol=1e-4)
            *_, state = model.states_by_step(ids, num_steps)
            torch.testing.assert_close(model.predict_from_latents(state).logits, wanted, atol=2e-5, rtol=1e-4)
    options = {"num_steps": 4, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, draft_steps=2, draft_tokens=3), plain)
    settled = {"criterion": "latent-diff", "exit_threshold": 1e-30}
    assert torch.equal(model.generate(ids, **options, **settled), plain)
    ring = model.generate(ids, **options, cache_rule="ring-1")
    slow = {"sampler": "wavefront", "exit_threshold": 1e-30, "inner_steps": 4, "max_wavefront": 1}
    assert torch.equal(model.generate(ids, **options, **slow), ring)


def test_random_is_a_noise_state(tmp_path: Path) -> None:
    _, _, folder = make_retrofit("llama", tmp_path / "published", initial_state_mode="random", test_time_noise=0)
    model = redepth.load(folder)
    assert model.config.initial_state_mode == "noise"
    assert model.initialize_state(torch.zeros(1, 9, model.config.n_embd)).std() > 0


def test_a_carried_state_goes_through_the_adapter(tmp_path: Path) -> None:
    """Under `skip-adapter` only s_0 = e leaves the adapter out; a state that the caller gives does not."""
    source, adapter, folder = make_retrofit("llama", tmp_path / "published", initial_state_mode="skip-adapter")
    model, ids = redepth.load(folder), random_ids(1, 5)
    state = torch.randn(1, 5, model.config.n_embd)
    with torch.no_grad():
        got = model(ids, num_steps=2, input_states=state).logits
    torch.testing.assert_close(got, oracle(source, adapter, ids, state, 2), atol=2e-5, rtol=1e-4)


def test_what_was_inferred_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, folder = make_retrofit("gemma2", tmp_path / "published", sliding_window=16)
    model = redepth.load(folder)
    assert model.config.norm_placement == "sandwich"
    assert model.config.embed_scale == model.config.n_embd**0.5
    assert "taken for a retrofitted gemma2" in caplog.text
    assert "final_logit_softcapping=30.0" in caplog.text
    assert "sliding_window=16 has no layer_types" in caplog.text


def test_inferred_blocks_no_better_than_chance_are_refused(tmp_path: Path) -> None:
    _, _, folder = make_retrofit("gemma2", tmp_path / "published")
    write_tokenizer(folder)
    with pytest.raises(RedepthError, match="no better than chance"):
        redepth.load(folder)


def write_tokenizer(folder: Path) -> None:
    """One that gives a token a character, within the tiny vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(code): code - 28 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_what_fits_no_kind_is_refused_by_name(huginn) -> None:
    tensors, config, folder = huginn
    strange = tensors | {"transformer.core_block.0.attn.gate.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"nearest huginn: no place for \['attn\.gate\.weight'\]"):
        redepth.load(write_published(folder / "strange", strange, config))
    fewer = {name: tensor for name, tensor in tensors.items() if "norm_4" not in name}
    with pytest.raises(ValueError, match=r"missing \['norm_4\.weight'\]"):
        redepth.load(write_published(folder / "fewer", fewer, config))
    with pytest.raises(ValueError, match=r"no place for \['vision\.weight'\]"):
        redepth.load(write_published(folder / "outer", tensors | {"vision.weight": torch.zeros(3)}, config))
    with pytest.raises(ValueError, match="initial_state_mode is 'fog'"):
        redepth.load(write_published(folder / "state", tensors, config | {"state_init": "fog"}))


def test_published_kinds_save_and_load_alike(retrofit, tmp_path: Path) -> None:
    for number, folder in enumerate((retrofit[2], HUGINN)):
        first, second = tmp_path / f"first{number}", tmp_path / f"second{number}"
        redepth.load(folder).save_pretrained(first)
        redepth.load(first).save_pretrained(second)
        assert torch.equal(logits_of(folder), logits_of(first))
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes(), file.name
        assert "auto_map" in json.loads((first / "config.json").read_text())


def test_model_card_of_huginn(tmp_path: Path) -> None:
    """The calls that the published card prints, as it prints them."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(HUGINN, dtype=torch.bfloat16)
    model.eval()
    ids = tokenizer.encode("The capital of Westphalia is", return_tensors="pt", add_special_tokens=True)[:, :-1]
    model(ids, num_steps=32)
    config = GenerationConfig(
        max_length=60,
        stop_strings=["?!"],
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=319,
        pad_token_id=0,
    )
    outputs = model.generate(ids, config, tokenizer=tokenizer, num_steps=8)
    assert ids.shape[1] < outputs.sequences.shape[1] <= 60
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model.generate(
        tokenizer.encode(chat, return_tensors="pt", add_special_tokens=False), config, num_steps=8, tokenizer=tokenizer
    )

    adaptive = model.generate_with_adaptive_compute(
        ids,
        config,
        num_steps=16,
        tokenizer=tokenizer,
        criterion="entropy-diff",
        exit_threshold="auto",
        cache_kwargs={"lookup_strategy": "latest-m4"},
        continuous_compute=False,
    )
    assert adaptive.past_key_values.steps_run.max() <= 16
    plain = model.generate_with_adaptive_compute(ids, config, num_steps=8, tokenizer=tokenizer, criterion="none")
    assert torch.equal(plain.sequences, outputs.sequences)
    warm = model.generate_with_adaptive_compute(ids, config, num_steps=4, tokenizer=tokenizer, continuous_compute=True)
    assert warm.sequences.shape[1] > ids.shape[1]
    with pytest.raises(ValueError, match="'lookup'"):
        model.generate_with_adaptive_compute(ids, config, cache_kwargs={"lookup": "full"})

    first = model(input_ids=ids, use_cache=True, num_steps=8)
    second = model(ids[:, -1:], use_cache=True, past_key_values=first.past_key_values, num_steps=8)
    fields = ("loss", "logits", "log_ppl", "past_key_values", "latent_states", "hidden_states", "stats")
    assert all(hasattr(second, field) for field in fields)
    embedded, block_idx = model.embed_inputs(ids)
    states = model.initialize_state(embedded)
    for step in range(8):
        states, block_idx, _ = model.iterate_one_step(embedded, states, block_idx=block_idx, current_step=step)
    torch.testing.assert_close(model.predict_from_latents(states).logits, first.logits)


def test_fresh_model_starts_as_published() -> None:
    config = redepth.RecurrentDepthConfig(
        n_embd=200, n_heads=4, intermediate_size=300, vocab_size=500, mean_recurrence=6, block_size=64
    )
    model = redepth.RecurrentDepthForCausalLM(config)
    std = (2 / (5 * 200)) ** 0.5
    narrow = std / (2 * (2 + 2 + 4 * 6)) ** 0.5
    layer = model.transformer["core_block"][1]
    gate, up = layer.mlp.fc.weight.chunk(2)
    for weight, deviation in (
        (layer.attn.Wqkv.weight, std),
        (gate, std),
        (model.transformer["adapter"].weight, std),
        (model.transformer["wte"].weight, std),
        (up, narrow),
        (layer.attn.proj.weight, narrow),
        (layer.mlp.proj.weight, narrow),
    ):
        assert abs(weight.std().item() / (0.9866 * deviation) - 1) < 0.03
        assert weight.abs().max() <= 3 * deviation * 1.001
    assert layer.attn.qk_bias.abs().sum() == 0


def test_republished_checkpoints_are_whole(retrofit, tmp_path: Path) -> None:
    """Repaired repos: switches written out, one embedding, no rope table, the modelling files beside."""
    for number, folder in enumerate((retrofit[2], HUGINN)):
        out = tmp_path / f"out{number}"
        (folder / "README.md").write_text("# mine\n") if folder != HUGINN else None
        republish(folder, out)
        assert torch.equal(logits_of(out), logits_of(folder))
        written = load_file(out / "model.safetensors")
        assert "freqs_cis" not in written
        assert ("lm_head.weight" in written) != redepth.load(out).config.tie_embeddings
        assert (out / "model.py").exists()
        assert (out / "README.md").exists() == (folder != HUGINN)
        republish(out, tmp_path / f"again{number}")
        for file in out.iterdir():
            assert file.read_bytes() == (tmp_path / f"again{number}" / file.name).read_bytes(), file.name
    republish(HUGINN, tmp_path / "bf16", dtype="bfloat16", tie=False)
    model = redepth.load(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16
    assert not model.config.tie_embeddings
    assert torch.equal(model.lm_head.weight, model.transformer["wte"].weight)


def test_republish_refuses_to_lose_a_head(huginn) -> None:
    tensors, config, folder = huginn
    source = write_published(folder / "source", tensors | {"lm_head.weight": torch.randn(320, 64)}, config)
    with pytest.raises(RedepthError, match=r"lm_head\.weight"):
        republish(source, folder / "out")
    assert not (folder / "out").exists()


def test_inspect_says_what_it_is(retrofit) -> None:
    report = inspect(retrofit[2], (1, 5))
    kind = retrofit[0].config.model_type
    assert report["kind"] == f"published, retrofitted {kind}"
    model = redepth.load(retrofit[2])
    assert report["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    cache = redepth.RecurrentDepthCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 8), num_steps=5, past_key_values=cache)
    assert report["cache_bytes_per_token"][5] * 8 == cache.memory_bytes()
    assert cache_bytes_per_token(model.config, 5, "ring-2") < report["cache_bytes_per_token"][5]
    assert inspect(HUGINN)["kind"] == "published, huginn"
    assert inspect(HUGINN)["mean_recurrence"] == 8


def test_presets(tmp_path: Path) -> None:
    count = count_parameters(preset_config("huginn-3.5b"))
    assert 3.4e9 < count.total < 4.0e9
    assert 1.4e9 < count.core < 1.7e9
    assert 1.4e9 < count.prelude + count.coda < 1.7e9
    assert 0.3e9 < count.embedding < 0.6e9
    assert 0.9e8 < count_parameters(preset_config("100m")).total < 1.3e8
    with pytest.raises(RedepthError, match="nano, 100m"):
        preset_config("micro")
    create(preset_config("nano", vocab_size=97), tmp_path / "nano", seed=3)
    create(preset_config("nano", vocab_size=97), tmp_path / "same", seed=3)
    first, second = (redepth.load(tmp_path / name) for name in ("nano", "same"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    ids = torch.randint(97, (2, 9))
    first(ids, labels=ids, num_steps=3).loss.backward()
    assert all(parameter.grad is not None for parameter in first.parameters())
