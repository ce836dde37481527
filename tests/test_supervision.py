"""What a training step asks of which steps: losses and gradients, labels and their places, stages and earned depths."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import redepth
from redepth.data.mixture import training_and_held_out
from redepth.data.tasks import open_task
from redepth.errors import RedepthError
from redepth.healing.curriculum import depth_of_step
from redepth.healing.heal import heal
from redepth.healing.optim import set_adapter_rate
from redepth.healing.recipe import HealRecipe, read_heal_recipe
from redepth.healing.supervision import AnswerTally, EarnedDepth, supervised_inputs
from tests.test_healing import SHORT, byte_tokenizer
from tests.zoo import random_ids

TASK = "task:roots?depth=1-3&nodes=6"
TASKS = SHORT | {"data": TASK, "sequence_length": 96, "questions": 3, "step_targets": "own-result"}


def batch_of(recipe: HealRecipe, rows: int) -> dict[str, torch.Tensor]:
    training, _ = training_and_held_out(byte_tokenizer(), recipe)
    taken = list(itertools.islice(training, rows))
    return {name: torch.stack([row[name] for row in taken]) for name in taken[0]}


@pytest.mark.parametrize(("supervision", "asked"), [("last", 1), ("sampled-steps", 2), ("every-step", 3)])
def test_supervised_steps_match_a_loop_over_them(supervision: str, asked: int) -> None:
    model = recurrent_model()
    recipe = HealRecipe(**TASKS | {"supervision": supervision, "step_weight_growth": 2.0, "answer_weight": 1.5})
    batch = batch_of(recipe, 3)
    without, with_gradient = 1, 3
    model.train()

    embedded, _ = model.embed_inputs(batch["input_ids"], position_ids=batch["position_ids"])
    state, parts = model.initialize_state(embedded, batch["position_ids"]), []
    for step in range(without + with_gradient):
        with torch.set_grad_enabled(step >= without):
            state, _, _ = model.iterate_one_step(embedded, state, batch["position_ids"], current_step=step)
        if step >= without + with_gradient - asked:
            logits = model.predict_from_latents(state, position_ids=batch["position_ids"]).logits[:, :-1]
            labels = batch["step_labels"][:, min(step, 2), 1:]
            parts.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    weights = [2.0**number for number in range(asked)]
    wanted = 1.5 * sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    tally = AnswerTally()
    loss = model(**supervised_inputs(recipe, batch, (without, with_gradient), tally=tally), use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert tally.mean == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def recurrent_model() -> redepth.RecurrentDepthForCausalLM:
    torch.manual_seed(0)
    config = redepth.RecurrentDepthConfig(
        vocab_size=99,
        n_embd=32,
        n_heads=4,
        intermediate_size=48,
        n_layers_in_prelude=1,
        n_layers_in_recurrent_block=1,
        n_layers_in_coda=1,
        block_size=128,
        norm_placement="pre",
        norm_before_coda=False,
        initial_state_mode="embed",
    )
    return redepth.RecurrentDepthForCausalLM(config)


def test_a_step_that_leaves_early_has_limits() -> None:
    model, ids = recurrent_model().train(), random_ids(1, 8)
    with pytest.raises(ValueError, match="supervised_steps=3 must be from 1 to num_steps=2"):
        model(ids, step_labels=ids[:, None].expand(1, 3, 8), num_steps=2, loss_only=True)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, step_labels=ids[:, None].expand(1, 2, 8), num_steps=2, loss_only=True, use_cache=True)


def test_labels_lie_on_the_answers_and_nowhere_else() -> None:
    tokenizer = byte_tokenizer()
    recipe = HealRecipe(**TASKS | {"sequence_length": 150})
    row = next(iter(training_and_held_out(tokenizer, recipe)[0]))
    texts = open_task(TASK).texts("train", 32, recipe.seed_of(0) * 1_000_003, questions=3)
    at, number = 0, 0
    while at < 150 and row["position_ids"][at] == 0 and number < len(texts):
        text = texts[number]
        tokens = len(text.text)
        if at + tokens > 150:
            break
        spelt = text.text.replace("\n", "?!")  # a letter that it does not know
        assert tokenizer.decode(row["input_ids"][at : at + tokens]) == spelt
        for answer in text.answers:
            places = slice(at + answer.start, at + answer.end)
            assert tokenizer.decode(row["labels"][places]) == answer.right
            assert set(row["difficulty"][places].tolist()) == {answer.difficulty}
            for step in (1, 2, 3):
                assert tokenizer.decode(row["step_labels"][step - 1][places]) == answer.after(step)
        at, number = at + tokens, number + 1
    assert number == 2  # whole texts alone
    answered = sum(answer.end - answer.start for text in texts[:number] for answer in text.answers)
    assert int((row["labels"] != -100).sum()) == answered
    assert int((row["difficulty"] >= 0).sum()) == answered


def test_text_beside_a_task_keeps_its_labels_at_every_step(tmp_path: Path) -> None:
    documents = "".join(json.dumps({"text": "abcdefgh " * 40}) + "\n" for _ in range(8))
    (tmp_path / "a.jsonl").write_text(documents)
    recipe = HealRecipe(**TASKS | {"data": [{"data": TASK}, {"data": str(tmp_path / "a.jsonl")}], "eval_rows": 1})
    training, held_out = training_and_held_out(byte_tokenizer(), recipe)
    assert training.held_out_labels is None
    assert held_out.shape == (1, 96)
    rows = list(itertools.islice(training, 12))
    text = [row for row in rows if bool((row["difficulty"] < 0).all())]
    assert 0 < len(text) < 12
    for row in text:
        assert all(torch.equal(labels, row["labels"]) for labels in row["step_labels"])


def test_rows_of_a_mixture_go_on_from_any_place(tmp_path: Path) -> None:
    stages = [{"share": 0.5, "difficulty": 1}, {"share": 0.5, "difficulty": 3}]
    recipe = HealRecipe(**TASKS | {"stages": stages, "max_steps": 4, "batch_size": 4, "micro_batch_size": 4})
    unbroken = list(itertools.islice(training_and_held_out(byte_tokenizer(), recipe)[0], 16))
    hardest = [int(row["difficulty"].max()) for row in unbroken]
    assert max(hardest[:8]) == 1 and max(hardest[8:]) == 3
    first, _ = training_and_held_out(byte_tokenizer(), recipe)
    list(itertools.islice(first, 11))
    again, _ = training_and_held_out(byte_tokenizer(), recipe)
    again.go_to(first.position(11))
    for row, wanted in zip(again, unbroken[11:], strict=False):
        assert all(torch.equal(row[name], wanted[name]) for name in wanted)


def test_depths_follow_difficulty() -> None:
    stages = [{"share": 0.5, "difficulty": 1}, {"share": 0.5, "difficulty": 3}]
    table = TASKS | {"stages": stages, "steps_beyond": 1, "backprop_depth": 2}
    tied = HealRecipe(**table | {"depth_sampling": "difficulty"})
    assert depth_of_step(tied, 0, 0.2) == (0, 2)
    assert depth_of_step(tied, 0, 0.9) == (2, 2)
    drawn = HealRecipe(**table | {"depth_sampling": "up-to-difficulty"})
    assert {sum(depth_of_step(drawn, step, 0.9)) for step in range(60)} == {1, 2, 3, 4}
    earned = HealRecipe(**TASKS | {"depth_sampling": "earned", "newest_share": 0.5})
    depths = [sum(depth_of_step(earned, step, 0.9, earned=4)) for step in range(200)]
    assert set(depths) == {1, 2, 3, 4}
    assert 90 < depths.count(4) < 160  # 0.5 + 0.5 / 4 of them


def test_depth_is_earned() -> None:
    recipe = HealRecipe(**TASKS | {"depth_sampling": "earned", "learned_loss": 0.5, "steps_beyond": 0})
    earned = EarnedDepth(recipe)
    assert not earned.note(2, 0.0) and not earned.note(1, None) and not earned.note(1, 1.0)
    assert not earned.note(1, 0.2)  # 0.7 · 1 + 0.3 · 0.2
    again = EarnedDepth(recipe)
    again.load_state(earned.state())
    assert [again.note(1, 0.0) for _ in range(2)] == [False, True]
    assert again.depth == 2
    assert [again.note(depth, 0.0) for depth in (2, 3, 3)] == [True, False, False]  # 3 is the deepest


def test_the_adapter_has_a_rate_of_its_own() -> None:
    model = recurrent_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    set_adapter_rate(optimizer, model, HealRecipe(learning_rate=1e-3, adapter_rate_factor=10))
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rate_of[id(parameter)] == pytest.approx(1e-2 if ".adapter." in name else 1e-3)


def test_healing_on_a_task_learns_it_and_records_it(zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo["qwen3"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    redepth.convert(tmp_path / "source", tmp_path / "out", core="2:4")
    recipe = HealRecipe(
        **TASKS
        | {"max_steps": 6, "depth_sampling": "earned", "supervision": "sampled-steps", "backprop_depth": 2}
        | {"adapter_rate_factor": 3.0, "learned_loss": 9.0, "eval_depths": (1, 2), "learning_rate": 3e-3}
    )
    healing = heal(tmp_path / "out", recipe)
    assert healing.loss_after[1] < healing.loss_before[1]
    assert healing.sources[0]["licenses"] == {"made for the run": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": [{"share": 1, "difficulty": 2}]}, "stages is for tasks"),
        ({"depth_sampling": "earned"}, "depth_sampling earned is for tasks"),
        ({"step_targets": "own-result"}, "step_targets is for tasks"),
        ({"data": TASK, "separate_documents": False}, "leave separate_documents on"),
        ({"data": TASK, "stages": [{"share": 0.5, "difficulty": 2}]}, "add up to 0.5"),
        ({"optimizer": "muon", "adapter_rate_factor": 2.0}, "adapter_rate_factor is AdamW's"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RedepthError, match=said):
        read_heal_recipe(None, **changes)


def test_a_text_longer_than_a_row_is_refused() -> None:
    recipe = HealRecipe(**TASKS | {"sequence_length": 40})
    with pytest.raises(RedepthError, match="raise sequence_length, or ask fewer questions"):
        training_and_held_out(byte_tokenizer(), recipe)
