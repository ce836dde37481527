"""Healing: optimisers, what trains, distillation, memory savers, the guard, and what is known beforehand."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import redepth
from redepth.checkpoint.cost import count_parameters, training_flops_per_token
from redepth.errors import RedepthError
from redepth.healing.curriculum import backprop_depth, depth_of_step
from redepth.healing.distillation import Teacher, open_teacher
from redepth.healing.guard import FEWEST, SpikeGuard
from redepth.healing.heal import heal, plan_healing
from redepth.healing.memory import peak_bytes
from redepth.healing.optim import (
    LAYER_MATRICES,
    MuonWithAdamW,
    is_inner_matrix,
    muon_with_adamw,
    set_trainable,
)
from redepth.healing.preflight import depths_of_run
from redepth.healing.prepare import prepare
from redepth.healing.recipe import HealRecipe
from redepth.healing.trainer import HealTrainer
from redepth.runtime import has_bf16
from redepth.surgery.convert import plan_conversion
from redepth.surgery.presets import preset_config
from tests.test_healing import SHORT, byte_tokenizer
from tests.zoo import FAMILIES, random_ids, save_source


@pytest.fixture(scope="module")
def source(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "source"
    shutil.copytree(zoo["gemma2"], folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    redepth.convert(source, tmp_path / "recurrent", core="2:4")
    return tmp_path / "recurrent"


def changed_tensors(before: Path, after: Path) -> set[str]:
    first, second = redepth.load(before).state_dict(), redepth.load(after).state_dict()
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("adapter", {"transformer.adapter"}),
        ("core", {"transformer.core_block"}),
        ("core+adapter", {"transformer.adapter", "transformer.core_block"}),
        ("lora", {"transformer.adapter", "transformer.core_block"}),
    ],
)
def test_only_what_is_chosen_trains(checkpoint: Path, tmp_path: Path, train: str, trained: set[str]) -> None:
    heal(checkpoint, HealRecipe(**SHORT | {"train": train, "max_steps": 3, "lora_rank": 2}), out=tmp_path / "out")
    changed = changed_tensors(checkpoint, tmp_path / "out")
    assert {".".join(name.split(".")[:2]) for name in changed} == trained
    if train == "lora":
        matrices = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
        assert matrices == {"Wqkv", "proj", "fc", "adapter"}


@pytest.mark.parametrize(
    "changes",
    [{"train": "lora", "lora_groups": ("prelude", "core")}, {"optimizer": "muon"}, {"distill": 0.5, "train": "core"}],
    ids=["lora", "muon", "distilled"],
)
def test_every_kind_of_run_is_taken_up_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    recipe = HealRecipe(**SHORT | {"save_every": 2} | changes)
    unbroken = heal(checkpoint, recipe, out=tmp_path / "unbroken")
    whole = HealTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(HealTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(checkpoint, recipe, out=tmp_path / "resumed")
    monkeypatch.setattr(HealTrainer, "compute_loss", whole)
    resumed = heal(checkpoint, recipe, out=tmp_path / "resumed")
    assert resumed.loss_after == pytest.approx(unbroken.loss_after, abs=1e-6)
    assert "lora" not in " ".join(redepth.load(tmp_path / "resumed").state_dict())


def test_adamw_remembers_as_long_as_the_recipe_says(checkpoint: Path, tmp_path: Path) -> None:
    trainer = prepare(checkpoint, HealRecipe(**SHORT | {"adam_beta2": 0.9}), tmp_path, lambda record: None).trainer
    assert {group["betas"] for group in trainer.create_optimizer().param_groups} == {(0.9, 0.9)}


def test_muon_trains_matrices_and_adamw_the_rest(checkpoint: Path) -> None:
    """Against torch's two optimisers, each on its own parameters, and through a save and load in the middle."""
    recipe = HealRecipe(optimizer="muon", learning_rate=1e-3, muon_learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.9)
    models = [redepth.load(checkpoint, dtype="float32").train() for _ in range(2)]
    names = [name for name, _ in models[0].named_parameters()]
    decays = {name for name in names if "norm" not in name and "ln_f" not in name}
    inner = {name for name in names if models[0].get_parameter(name).ndim == 2 and "wte" not in name}
    ours = muon_with_adamw(models[0], recipe, decays)

    def pick(keep: set[str]) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in models[1].named_parameters() if name in keep]

    muon = torch.optim.Muon(pick(inner), lr=1e-2, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [{"params": pick(decays - inner), "weight_decay": 0.1}, {"params": pick(set(names) - decays - inner)}],
        lr=1e-3,
        betas=(0.9, 0.9),
        weight_decay=0.0,
        fused=True,  # as ours: a last bit's difference here would become 1e-4 in Muon's bf16
    )
    for step in range(4):
        if step == 2:
            saved = ours.state_dict()
            ours = muon_with_adamw(models[0], recipe, decays)
            assert isinstance(ours, MuonWithAdamW)
            ours.load_state_dict(saved)
        for model in models:
            model.zero_grad()
            model(tokens := random_ids(2, 12, seed=step), labels=tokens, num_steps=2).loss.backward()
        ours.step()
        muon.step()
        adamw.step()
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7, msg=name)


def test_muon_heals(checkpoint: Path) -> None:
    healing = heal(checkpoint, HealRecipe(**SHORT | {"optimizer": "muon", "max_steps": 12}))
    assert healing.loss_after[4] < healing.loss_before[4]


@pytest.mark.parametrize(
    ("name", "message"),
    [("adam", "unknown; use adamw, muon"), ("lomo", "lomo_optim.*or use adamw"), ("galore_adamw", "galore_torch")],
)
def test_optimizers_that_are_not_there(checkpoint: Path, name: str, message: str) -> None:
    with pytest.raises(RedepthError, match=message) as said:
        heal(checkpoint, HealRecipe(**SHORT | {"optimizer": name}))
    assert "\n" not in str(said.value)
    assert not (checkpoint / "healing").exists()


def test_distilled_loss_equals_the_written_out_one(checkpoint: Path, source: Path) -> None:
    model = redepth.load(checkpoint, dtype="float32").train()
    teacher = open_teacher(checkpoint, HealRecipe(distill=0.3, temperature=2.0), model.config.vocab_size, torch.float32)
    tokens = random_ids(3, 17)
    labels = tokens.masked_fill(random_ids(3, 17, seed=1) % 5 == 0, -100)
    loss = model(tokens, labels=labels, num_steps=(1, 2), loss_only=True, token_loss=teacher.token_loss(tokens)).loss
    taught = plan_conversion(source).source.reference_model()(tokens).logits[:, :-1]
    learnt = model(tokens, num_steps=3).logits[:, :-1]
    counted = labels[:, 1:] != -100
    plain = F.cross_entropy(learnt[counted], tokens[:, 1:][counted])
    p, q = (logits[counted].div(2.0).softmax(-1) for logits in (taught, learnt))
    divergence = (p * (p / q).log()).sum(-1).mean()
    assert loss.item() == pytest.approx((0.7 * plain + 0.3 * 4.0 * divergence).item(), abs=1e-5)


def test_distillation_follows_the_source(checkpoint: Path, tmp_path: Path) -> None:
    """A full cover is its own teacher's equal at r = 1, so the pure divergence starts at zero there."""
    model = redepth.load(checkpoint, dtype="float32")
    teacher = open_teacher(checkpoint, HealRecipe(distill=1.0), model.config.vocab_size, torch.float32)
    tokens = random_ids(2, 9)
    loss = model(tokens, labels=tokens, num_steps=1, loss_only=True, token_loss=teacher.token_loss(tokens)).loss
    assert abs(loss.item()) < 1e-5
    healing = heal(checkpoint, HealRecipe(**SHORT | {"distill": 0.5, "max_steps": 10}), out=tmp_path / "out")
    assert healing.loss_after[4] < healing.loss_before[4]


def test_every_family_is_its_own_teachers_equal(family: str, zoo) -> None:
    """Whatever the source does to its logits, soft caps of all names included: KL 0 at r = 1 of a full cover."""
    conversion = plan_conversion(zoo[family], adapter="blend:0.5", state="embed")
    model, teacher = conversion.model(), Teacher(conversion.source.reference_model(), 1.0, 1.0)
    tokens = random_ids(2, 9)
    loss = model(tokens, labels=tokens, num_steps=1, loss_only=True, token_loss=teacher.token_loss(tokens)).loss
    assert abs(loss.item()) < 1e-5


def test_teacher_of_another_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    other = save_source("llama", tmp_path / "other", vocab_size=120)
    with pytest.raises(RedepthError, match="a different vocabulary"):
        open_teacher(checkpoint, HealRecipe(distill=0.5, teacher=str(other)), 101, torch.float32)
    (checkpoint / "recipe.yaml").unlink()
    with pytest.raises(RedepthError, match="--teacher"):
        open_teacher(checkpoint, HealRecipe(distill=0.5), 101, torch.float32)


def gradients(model: Any, num_steps: tuple[int, int]) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(
        tokens := random_ids(2, 12), labels=tokens, num_steps=num_steps, loss_only=True, use_cache=False
    ).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_checkpointing_by_step_keeps_less_and_changes_nothing(checkpoint: Path) -> None:
    model = redepth.load(checkpoint, dtype="float32")
    plain = gradients(model, (1, 4))
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.transformer["core_block"][0].register_forward_hook(count)
    model.transformer.checkpoint_steps = True
    again = gradients(model, (1, 4))
    handle.remove()
    assert calls == 1 + 4 + 4  # without gradient, forward, and again in the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"activation_checkpointing": "step"}, {"activation_checkpointing": "layer"}])
def test_memory_savers_give_the_same_run(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = heal(checkpoint, HealRecipe(**SHORT), out=tmp_path / "plain")
    saving = heal(checkpoint, HealRecipe(**SHORT | changes), out=tmp_path / "saving")
    assert saving.loss_after == pytest.approx(plain.loss_after, abs=1e-6)


def test_preflight_measures_what_the_memory_savers_leave(source: Path, tmp_path: Path) -> None:
    """The probe runs as training will: what fits only with checkpointing is not ended by the probe itself."""
    redepth.convert(source, tmp_path / "out", core="1:5")
    held = {}
    for kind in ("none", "step", "layer"):
        recipe = HealRecipe(**SHORT | {"sequence_length": 64, "activation_checkpointing": kind, "mean_recurrence": 8.0})
        memory = plan_healing(tmp_path / "out", recipe).memory
        assert memory is not None
        held[kind] = memory.activations
    assert held["layer"] < held["none"] / 3 and held["step"] < held["none"] / 2


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    kept = torch.zeros(1000)

    def work() -> None:
        first = kept + 1
        kept.mul_(2)
        second = first.view(10, 100) * 2
        del first
        third = second + 1
        del second, third
        torch.zeros(1500)

    assert peak_bytes(work, kept.device) == 8000


@pytest.mark.slow
def test_compiled_layers_give_the_same_run(checkpoint: Path, tmp_path: Path) -> None:
    plain = heal(checkpoint, HealRecipe(**SHORT), out=tmp_path / "plain")
    compiled = heal(checkpoint, HealRecipe(**SHORT | {"compile": True}), out=tmp_path / "compiled")
    assert compiled.loss_after == pytest.approx(plain.loss_after, abs=1e-4)


def test_backprop_depth_grows() -> None:
    recipe = HealRecipe(backprop_depth=8, backprop_start=2, backprop_curriculum="linear", backprop_fraction=0.5)
    assert [backprop_depth(recipe, progress) for progress in (0, 0.25, 0.5, 1)] == [2, 5, 8, 8]
    assert backprop_depth(HealRecipe(backprop_depth=8), 0) == 8
    deep = recipe.model_copy(update={"mean_recurrence": 30.0, "curriculum": "constant"})
    assert {depth_of_step(deep, step, 0.0)[1] for step in range(20)} == {2}


def test_guard_skips_spikes_and_ends_a_lost_run() -> None:
    guard = SpikeGuard(factor=4.0, max_skipped=3)
    assert guard.judge(1, 100.0, 50.0) is None  # nothing to compare with yet
    for step in range(2, FEWEST + 1):
        assert guard.judge(step, 2.0, 1.0) is None
    assert "loss 9 is over 4 times the median 2" in str(guard.judge(21, 9.0, 1.0))
    assert "gradient norm 5" in str(guard.judge(22, 2.0, 5.0))
    resumed = SpikeGuard(factor=4.0, max_skipped=3)
    resumed.load_state(guard.state())
    with pytest.raises(RedepthError, match="3 steps in a row"):
        resumed.judge(23, math.nan, 1.0)
    assert guard.judge(23, 2.0, 1.0) is None
    assert guard.judge(24, math.inf, 1.0) == "loss is inf"
    assert guard.skipped == [21, 22, 24]


def test_a_skipped_step_leaves_the_weights(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, weights, records = HealTrainer.compute_loss, [], []

    def spoilt(self, model, *args, **kwargs):
        weights.append(model.transformer["adapter"].weight.detach().clone())
        loss = whole(self, model, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(HealTrainer, "compute_loss", spoilt)
    recipe = HealRecipe(**SHORT | {"micro_batch_size": 4})
    healing = heal(checkpoint, recipe, out=tmp_path / "out", on_progress=records.append)
    assert healing.skipped_steps == [3]
    assert any("step 3 is skipped, its loss is nan" in record.remark for record in records)
    same = [torch.equal(first, second) for first, second in itertools.pairwise(weights)]
    assert same == [False, False, True, False, False]


def test_preflight_says_what_the_run_will_be(checkpoint: Path) -> None:
    recipe = HealRecipe(**SHORT | {"max_steps": 20, "backprop_depth": 2, "train": "core+adapter"})
    plan = plan_healing(checkpoint, recipe)
    config = redepth.load(checkpoint).config
    count = count_parameters(config)
    assert plan.tokens == 20 * 4 * 16
    assert set(plan.trainable) == {"core", "adapter"}
    assert sum(plan.trainable.values()) == count.core
    assert plan.trainable["core"] + sum(plan.frozen.values()) + plan.trainable["adapter"] == count.total
    r_and_s = depths_of_run(recipe)
    assert plan.flops == pytest.approx(
        sum(
            6 * (count.prelude + with_ * count.core + count.coda + without * count.core / 3) * 64
            for without, with_ in r_and_s
        )
    )
    assert plan.memory is not None and plan.seconds is not None
    assert plan.memory.optimizer == 2 * plan.memory.gradients == 8 * count.core
    assert set(plan.loss_before) == {1, 4}
    assert not (checkpoint / "healing").exists()


def test_long_runs_are_sampled() -> None:
    short = depths_of_run(HealRecipe(max_steps=7))
    assert short == [depth_of_step(HealRecipe(max_steps=7), step, step / 7) for step in range(7)]
    assert len(depths_of_run(HealRecipe(max_steps=10**9, depth_sampling="fixed"))) == 20_000


def test_emulated_bf16_is_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older GPUs only emulate it, slower than fp32 and with less precision."""
    monkeypatch.setattr("redepth.runtime.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bf16("cuda")


def test_published_formula() -> None:
    count = count_parameters(preset_config("nano"))
    per_token = training_flops_per_token(count, 3, 2)
    assert per_token == pytest.approx(6 * (count.prelude + 2 * count.core + count.coda + 3 * count.core / 3))


def test_adapter_without_layers_to_train_is_refused(checkpoint: Path) -> None:
    model = redepth.load(checkpoint)
    model.transformer["prelude"] = torch.nn.ModuleList()
    with pytest.raises(RedepthError, match="'prelude'"):
        set_trainable(model, HealRecipe(train="lora", lora_groups=("prelude",)))


def test_families_are_all_known_to_peft_and_muon(zoo) -> None:
    """Every matrix inside every family's layers is one that LoRA and Muon take."""
    for family in FAMILIES:
        model = plan_conversion(zoo[family]).model()
        inner = {name for name, parameter in model.named_parameters() if is_inner_matrix(name, parameter)}
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert inner == linear - {"lm_head.weight"}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and any(part in name for part in ("prelude", "core", "coda")):
                assert name.rpartition(".")[2] in LAYER_MATRICES


def test_teacher_is_frozen(source: Path) -> None:
    teacher = Teacher(plan_conversion(source).source.reference_model(), 0.5, 1.0)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
