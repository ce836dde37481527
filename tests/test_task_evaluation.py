"""Accuracy on tasks against slow references, and small models from training to the command line."""

import json
import re

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from redepth import RecurrentDepthForCausalLM, RedepthError
from redepth.cli import app
from redepth.data.tasks import open_task
from redepth.evaluation.plots import plot_accuracy_by_depth
from redepth.evaluation.problems import compact_batches, recorded_task, text_batches
from redepth.evaluation.tasks import evaluate_task, rank_correlation, standard_error, task_accuracy
from redepth.healing.from_scratch import TaskTraining, save_task_model, task_config, train_on_task

SPEC = "task:roots?depth=0-2&nodes=7"


@pytest.fixture(scope="module")
def task():
    return open_task(SPEC)


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    """A folder with a small model after a few updates."""
    training = TaskTraining(updates=3, batch_size=8)
    model, record = train_on_task(task, task_config(task, width=16, num_steps=3), training)
    assert record.updates == 3 and record.tokens == 3 * 8 * 15
    return save_task_model(model, task, training, record, tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def model(task):
    torch.manual_seed(1)
    return RecurrentDepthForCausalLM(task_config(task, width=16, num_steps=3)).eval()


def test_accuracy_in_compact_ids_matches_one_answer_at_a_time(task, model):
    batches = compact_batches(task, 12, seed=3, batch_size=5)
    found = task_accuracy(model, task, batches, 2, (1, 3), "argmax-stability", 2)
    hits = {}
    for split in ("held-out", "harder"):
        batch = task.batch(split, 12, 3)
        for row in range(12):
            for steps in (1, 3, "exit"):
                ids = batch.ids[row : row + 1]
                chosen = {"num_steps": steps}
                if steps == "exit":
                    chosen = {"num_steps": 3, "criterion": "argmax-stability", "exit_threshold": 2}
                output = model(ids, **chosen)
                for place, label, difficulty in zip(
                    batch.places[row].tolist(), batch.labels[row].tolist(), batch.difficulty[row].tolist(), strict=True
                ):
                    if split == "harder" and difficulty <= 2:
                        continue
                    hit = output.logits[0, place].argmax().item() == label
                    taken = output.stats["num_steps"][0, place].item() if steps == "exit" else steps
                    hits.setdefault((difficulty, steps), []).append((hit, taken))
    for number, difficulty in enumerate(found.difficulties):
        for column, steps in enumerate((1, 3)):
            expected = [hit for hit, _ in hits[difficulty, steps]]
            assert found.answers[number] == len(expected)
            assert found.accuracy[number][column] == pytest.approx(sum(expected) / len(expected))
        ended = hits[difficulty, "exit"]
        assert found.exits.accuracy[number] == pytest.approx(sum(hit for hit, _ in ended) / len(ended))
        assert found.exits.mean_steps[number] == pytest.approx(sum(taken for _, taken in ended) / len(ended), rel=1e-6)
    assert found.difficulties == [0, 1, 2, 3, 4] and found.trained_most == 2


def test_an_exit_test_that_never_fires_changes_nothing(task, model):
    batches = compact_batches(task, 10)
    exits = task_accuracy(model, task, batches, 2, (4,), "argmax-stability", 9).exits
    assert exits.overall == exits.overall_fixed and set(exits.mean_steps) == {4.0} and exits.spearman == 0


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = [f" {letter}" for letter in "ABCDEFGH=?"] + list("abcdefghijklmnopqrstuvwxyz:;ABCDEFGH =") + ["\n"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(alphabet)}, unk_token=":"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" [A-Z?=]|[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=":", pad_token=";")


@pytest.mark.parametrize("questions", [1, 3])
def test_accuracy_in_words_matches_one_answer_at_a_time(task, model, tokenizer, questions):
    torch.manual_seed(2)
    config = type(model.config)(**(model.config.to_dict() | {"vocab_size": len(tokenizer)}))
    speaker = RecurrentDepthForCausalLM(config).eval()
    batches = text_batches(task, tokenizer, len(tokenizer), 10, seed=4, questions=questions)
    found = task_accuracy(speaker, task, batches, 2, (1, 2))
    hits = {}
    for split in ("held-out", "harder"):
        asked = [(text, answer) for text in task.texts(split, 10, 4, questions) for answer in text.answers]
        for text, answer in asked:
            if split == "harder" and answer.difficulty <= 2:
                continue
            ids = tokenizer(text.text[: answer.start], return_tensors="pt")["input_ids"]
            for steps in (1, 2):
                said = tokenizer.convert_ids_to_tokens(speaker(ids, num_steps=steps).logits[0, -1].argmax().item())
                hits.setdefault((answer.difficulty, steps), []).append(said == answer.right)
    for number, difficulty in enumerate(found.difficulties):
        for column, steps in enumerate((1, 2)):
            expected = hits[difficulty, steps]
            assert found.answers[number] == len(expected)
            assert found.accuracy[number][column] == pytest.approx(sum(expected) / len(expected))


def test_answers_of_one_problem_go_together_in_the_standard_error():
    hits = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    apart = standard_error(hits, torch.arange(6)).item()
    together = standard_error(hits, torch.tensor([0, 0, 1, 1, 2, 2])).item()
    assert apart == pytest.approx((2 / 3 * 1 / 3 / 6) ** 0.5)
    assert together == pytest.approx((2 / 3 * 1 / 3 / 3) ** 0.5)


def test_rank_correlation():
    one = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert rank_correlation(one, 10 * one.exp()) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, torch.ones(4)) == 0
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3.5, 3.5: covariance 2.25, sums of squares 4.5 and 4.5.
    assert rank_correlation(one, torch.tensor([5.0, 3.0, 6.0, 6.0])) == pytest.approx(2.25 / 4.5)


def test_each_supervision_learns_and_counts_its_work(task):
    for supervision, num_steps in (("every-step", 0), ("last", 0), ("last", 1), ("scratchpad", 1)):
        losses = []
        training = TaskTraining(supervision, num_steps, updates=40, batch_size=16, seed=1)
        config = task_config(task, width=32, num_steps=2)
        _, record = train_on_task(
            task, config, training, lambda done, note, losses=losses: losses.append(float(note.rpartition(" ")[2]))
        )
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
        assert record.flops > 0 and record.most_steps >= 1
        if num_steps:
            assert record.most_steps == num_steps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"updates": 0}, "updates=0"),
        ({"supervision": "scratchpad"}, "num_steps=0"),
        ({"num_steps": 1}, "at least window=2"),
    ],
)
def test_impossible_training(options, said):
    with pytest.raises(RedepthError, match=said):
        TaskTraining(**options)


def test_training_ends_on_time(task):
    training = TaskTraining(updates=10_000, seconds=0.5, batch_size=4)
    _, record = train_on_task(task, task_config(task, width=16), training)
    assert 0 < record.updates < 10_000 and record.seconds < 5


def test_a_folder_knows_its_task(trained):
    assert recorded_task(trained) == SPEC
    found = evaluate_task(trained, num_steps=(1, 2), limit=8)
    assert found.task == SPEC and found.num_steps == [1, 2] and len(found.accuracy) == 5
    with pytest.raises(RedepthError, match="knows the words of"):
        evaluate_task(trained, "task:roots?nodes=8&depth=0-2")
    with pytest.raises(RedepthError, match="at least 1"):
        evaluate_task(trained, num_steps=(0, 1))
    with pytest.raises(RedepthError, match="limit"):
        evaluate_task(trained, limit=0)


def test_the_command(trained, tmp_path):
    words = ["eval", str(trained), "--num-steps", "1,2", "--limit", "8", "--criterion", "kl", "--out", str(tmp_path)]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert "more difficult than anything trained" in run.output and "Spearman" in run.output
    (written,) = json.loads((tmp_path / "results.json").read_text())["tasks_by_difficulty"]
    assert written["task"] == SPEC and len(written["exits"]["mean_steps"]) == 5
    assert {file.suffix for file in tmp_path.glob("roots*")} == {".png", ".svg"}
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(as_json.stdout)["tasks_by_difficulty"][0]["accuracy"] == written["accuracy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-steps", "1,x"], "whole numbers"),
        (["--num-steps", "0"], "whole numbers"),
        (["--exit-threshold", "much"], "auto or a number"),
        (["--tasks", "task:rots"], "did you mean 'roots'"),
        (["--criterion", "entropy"], "entropy"),
    ],
)
def test_mistakes_on_the_command_line(trained, words, said):
    run = CliRunner().invoke(app, ["eval", str(trained), "--limit", "2", *words])
    assert isinstance(run.exception, ValueError) and re.search(said, str(run.exception))


def test_generate_answers_in_the_tasks_words(trained):
    run = CliRunner().invoke(
        app,
        ["generate", str(trained), "links: A>B B>B C>A D>D E>D F>F G>F C", "--num-steps", "2", "--max-new-tokens", "1"],
    )
    assert run.exit_code == 0, run.output


def test_the_heat_map_is_drawn(tmp_path):
    file = tmp_path / "map.png"
    controls = {"static": [1.0, 0.5, 0.2]}
    plot_accuracy_by_depth([[1, 1], [0, 1], [0, 0.4]], [0, 1, 2], [1, 2], file, "title", 1, [1.2, 1.9, 2.0], controls)
    assert file.read_bytes().startswith(b"\x89PNG")
