"""What users of transformers expect of a causal language model."""

import copy
from pathlib import Path

import pytest
import torch

import redepth
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import VOCABULARY, random_ids

CLOSE = tolerance(layers=4 + 2 * 3)


@pytest.fixture
def model(zoo) -> redepth.RecurrentDepthForCausalLM:
    return plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="random", state="noise").model()


def gradients(model, num_steps, **kwargs) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 9)
    model.train()
    model.zero_grad()
    model(ids, labels=ids, num_steps=num_steps, state_seed=1, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_steps", [3, (2, 2)])
def test_gradient_checkpointing_gives_the_same_gradients(model, num_steps) -> None:
    plain = gradients(model, num_steps)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, num_steps)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    with pytest.raises(ValueError, match="use_cache=False"):
        gradients(model, num_steps, use_cache=True)


def test_resize_token_embeddings(model, tmp_path: Path) -> None:
    ids = random_ids(1, 7)
    with torch.no_grad():
        before = model(ids, num_steps=2).logits
        model.resize_token_embeddings(VOCABULARY + 6)
        after = model(ids, num_steps=2).logits
    assert after.shape[-1] == VOCABULARY + 6
    torch.testing.assert_close(after[..., :VOCABULARY], before, **CLOSE)
    assert model.lm_head.weight.data_ptr() == model.transformer["wte"].weight.data_ptr()
    model.save_pretrained(tmp_path)
    assert redepth.load(tmp_path).config.vocab_size == VOCABULARY + 6
    model(torch.tensor([[VOCABULARY + 2]]), labels=torch.tensor([[3]]), num_steps=1)


def test_device_map(model, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    ids = random_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(placed(ids, num_steps=2).logits, model(ids, num_steps=2).logits)


def test_inputs_embeds(model) -> None:
    ids = random_ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds, num_steps=2).logits, model(ids, num_steps=2).logits)
    options = {"num_steps": 2, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 6:])
    with pytest.raises(ValueError, match="not both"):
        model(ids, inputs_embeds=embeds)


def test_tuple_output_and_logits_to_keep(model) -> None:
    ids = random_ids(1, 6)
    with torch.no_grad():
        output = model(ids, num_steps=2)
        assert torch.equal(model(ids, num_steps=2, return_dict=False)[0], output.logits)
        kept = model(ids, num_steps=2, logits_to_keep=2).logits
        torch.testing.assert_close(kept, output.logits[:, -2:], **CLOSE)
        kept = model(ids, num_steps=2, logits_to_keep=torch.tensor([0, 3])).logits
        torch.testing.assert_close(kept, output.logits[:, [0, 3]], **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(zoo, tmp_path: Path, implementation: str) -> None:
    for name in ("qwen2", "gemma3"):
        redepth.convert(zoo[name], tmp_path / name, core="2:4", adapter="random", state="zeros", overwrite=True)
        model = redepth.RecurrentDepthForCausalLM.from_pretrained(
            tmp_path / name, attn_implementation=implementation
        ).eval()
        assert model.config._attn_implementation == implementation
        ids = random_ids(2, 17)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, num_steps=2).logits
            wanted = redepth.load(tmp_path / name)(ids, attention_mask=mask, num_steps=2).logits
        torch.testing.assert_close(logits[mask.bool()], wanted[mask.bool()], **CLOSE)


def test_peft_lora_on_the_fused_projections(model, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = copy.deepcopy(model)
    with torch.no_grad():
        untuned = base(random_ids(2, 8), num_steps=3).logits
    config = LoraConfig(r=2, target_modules=["Wqkv", "fc", "proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    ids = random_ids(2, 8)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.5)
    for _ in range(3):
        loss = tuned(input_ids=ids, labels=ids, num_steps=3).loss
        loss.backward()
        trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name in trained)
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        tuned_logits = tuned(input_ids=ids, num_steps=3).logits
        assert torch.equal(again(input_ids=ids, num_steps=3).logits, tuned_logits)
    assert not torch.allclose(tuned_logits, untuned)
    out = tuned.generate(input_ids=ids, num_steps=2, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 8


def test_plain_trainer_trains_it(model, tmp_path: Path) -> None:
    """transformers' Trainer as it is: the depth of each step is drawn by the model."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    before = model.transformer["adapter"].weight.clone()
    arguments = TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.transformer["adapter"].weight, before)


def test_the_base_model_is_the_model_without_its_head(model) -> None:
    ids = random_ids(2, 6)
    with torch.no_grad():
        output, wanted = model.base_model(ids, num_steps=3), model(ids, num_steps=3)
    torch.testing.assert_close(model.logits(output.last_hidden_state), wanted.logits)
    torch.testing.assert_close(output.latent_states, wanted.latent_states)
    assert model.base_model(ids, num_steps=2, return_dict=False)[0].shape == (2, 6, model.config.n_embd)
    with torch.no_grad(), pytest.raises(ValueError, match="reads logits, which need a head"):
        model.base_model(ids, num_steps=2, criterion="kl")
    assert model.base_model(ids, num_steps=2, policy=None).past_key_values.get_seq_length() == 6


def test_the_base_model_alone(model, tmp_path: Path) -> None:
    """transformers' AutoModel reads it out of a language model's folder."""
    model.save_pretrained(tmp_path)
    stack, ids = redepth.modeling.RecurrentStack.from_pretrained(tmp_path).eval(), random_ids(1, 5)
    with torch.no_grad():
        wanted = model.base_model(ids, num_steps=3).last_hidden_state
        assert torch.equal(stack(ids, num_steps=3).last_hidden_state, wanted)


def test_a_classifier_of_sequences(model, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    model.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), redepth.modeling.RecurrentStack)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    classifier.config.pad_token_id = 0
    ids = random_ids(2, 6)
    padded = torch.nn.functional.pad(ids, (0, 2))
    mask = (padded != 0).long()
    output = classifier(padded, attention_mask=mask, labels=torch.tensor([0, 2]), num_steps=3)
    output.loss.backward()
    assert classifier.transformer.adapter.weight.grad.abs().sum() > 0
    with torch.no_grad():
        last = model.base_model(ids, num_steps=3).last_hidden_state[:, -1]
        torch.testing.assert_close(output.logits, classifier.score(last), atol=2e-5, rtol=1e-4)


def test_a_classifier_of_sequences_by_its_own_class(model, tmp_path: Path) -> None:
    """transformers takes the number of labels at loading, as it does any field of the config."""
    model.save_pretrained(tmp_path)
    classifier = redepth.RecurrentDepthForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier.config.num_labels == classifier.score.out_features == 5


def test_attention_maps_are_refused_alike(model) -> None:
    told = copy.deepcopy(model)
    told.config._attn_implementation = "eager"
    told.config.output_attentions = True
    for one, keywords in ((model, {"output_attentions": True}), (told, {})):
        with pytest.raises(ValueError, match="one attention map for each step"):
            one(random_ids(1, 3), num_steps=1, **keywords)


def test_cache_layers_show_what_is_written(model) -> None:
    """Storage doubles, but nothing that was never written is seen."""
    cache = redepth.RecurrentDepthCache(model.config, "full")
    with torch.no_grad():
        for ids in random_ids(2, 7).split([4, 1, 1, 1], dim=1):
            model(ids, num_steps=2, past_key_values=cache)
    assert len(cache.layers) == 2 + 2 * 2 + 1
    for layer in cache.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.get_seq_length() == 7
    assert cache.memory_bytes() > sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_config_overrides_are_checked(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    load = redepth.RecurrentDepthForCausalLM.from_pretrained
    assert load(tmp_path, cache_rule="latest", num_steps=2).config.default_num_steps == 2
    assert load(tmp_path, initial_state_mode="random").config.initial_state_mode == "noise"
    for override, message in (
        ({"cache_rule": "latests"}, "did you mean 'latest'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": "8"}, "num_steps is '8'"),
        ({"initial_state_mode": "fog"}, "'fog'"),
        ({"state_std": -1.0}, "state_std is -1.0"),
        ({"norm_placement": "before"}, "must be one of pre, post"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path, **override)
        assert "\n" not in str(caught.value)


BAD_VALUES = [None, "x", [], {}, 0, -1, 1.5, float("nan"), True]


def test_no_field_of_a_config_takes_what_no_model_can_have() -> None:
    """Every field with every bad value: fine, or one line that names the field."""
    small = {"n_embd": 16, "n_heads": 4, "intermediate_size": 16, "vocab_size": 32, "n_layers_in_prelude": 1}
    small |= {"n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1}
    fields = [*small, "num_key_value_heads", "head_dim", "mean_recurrence", "mean_backprop_depth", "block_size"]
    fields += ["norm_placement", "norm_weight", "norm_eps", "activation", "qk_norm", "qkv_bias", "qk_bias", "rope_base"]
    fields += ["rope_parameters", "rope_style", "rope_layers", "layer_types", "sliding_window", "conv1d_width"]
    fields += ["query_scale", "attn_logit_softcapping", "norm_before_coda", "initial_state_mode", "state_std"]
    fields += ["state_seed", "cache_rule", "num_steps", "max_num_steps", "depth_profile", "init_values"]
    for field in fields:
        refused = 0
        for value in BAD_VALUES:
            refusal = None
            try:
                config = redepth.RecurrentDepthConfig(**small | {field: value})
            except ValueError as error:
                refusal = str(error)
            if refusal is not None:
                refused += 1
                assert "\n" not in refusal, field
                continue
            with torch.device("meta"):
                redepth.RecurrentDepthForCausalLM(config)
        assert refused >= 3, field
    with pytest.raises(ValueError, match=r"qk_bias is true, but num_key_value_heads \(2\) is not n_heads \(4\)"):
        redepth.RecurrentDepthConfig(**small, num_key_value_heads=2, qk_bias=True)


@pytest.mark.slow
def test_torch_compile(model) -> None:
    compiled = torch.compile(model, fullgraph=False)
    ids = random_ids(2, 16)
    with torch.no_grad():
        for num_steps in (2, 3):
            torch.testing.assert_close(
                compiled(ids, num_steps=num_steps, use_cache=False).logits,
                model(ids, num_steps=num_steps, use_cache=False).logits,
                **CLOSE,
            )
