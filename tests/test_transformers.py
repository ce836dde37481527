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
