"""Tasks: their results against slow references, their splits, their renderings."""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redepth import RedepthError
from redepth.data.tasks import IGNORED, SPLITS, TASKS, Task, TaskText, TextEncoder, open_task
from redepth.data.tasks.arrays import is_held_out

SPECS = {
    "iterate": "task:iterate?depth=1-4&nodes=9",
    "roots": "task:roots?depth=0-4&nodes=10",
    "circuits": "task:circuits?depth=1-4&inputs=3&gates=8",
    "addition": "task:addition?depth=0-3&places=8",
    "variables": "task:variables?depth=0-4&lines=9&modulus=7",
}
seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None)


def read_table(statement):
    """`f: A B; C D` as a dictionary."""
    return dict(pair.split() for pair in statement.partition(":")[2].split(";"))


def iterate_reference(statement, question, step):
    times, letter = re.fullmatch(r"f(\d+) (\w) =", question).groups()
    for _ in range(min(step, int(times))):
        letter = read_table(statement)[letter]
    return " " + letter


def roots_reference(statement, question, step):
    node = question.split()[1]
    for _ in range(step):
        node = read_table(statement)[node]
    return " " + node


def lines_of(statement):
    modulo, *lines = statement.split("\n")
    return int(re.search(r"\d+", modulo)[0]), dict(line.split("=") for line in lines)


def circuits_reference(statement, question, step):
    modulus, lines = lines_of(statement)

    def value(name, steps):
        said = lines[name]
        if said.isdigit():
            return int(said)
        if steps == 0:
            return 0
        one, sign, other = said
        values = value(one, steps - 1), value(other, steps - 1)
        return (values[0] * values[1] if sign == "*" else sum(values)) % modulus

    return str(value(question.split()[0], step))


def variables_reference(statement, question, step):
    modulus, lines = lines_of(statement)
    name, total = question.split()[0], 0
    for _ in range(step + 1):
        used, plus, constant = lines[name].rpartition("+")
        total += int(constant)
        if not plus:
            break
        name = used
    return str(total % modulus)


def addition_reference(statement, question, step):
    place = int(question.split()[1])
    start = max(place - step, 0)
    numbers = [int(number[len(number) - place - 1 : len(number) - start]) for number in statement.split("+")]
    return str(sum(numbers) // 10 ** (place - start) % 10)


REFERENCES = {
    "iterate": iterate_reference,
    "roots": roots_reference,
    "circuits": circuits_reference,
    "addition": addition_reference,
    "variables": variables_reference,
}


def test_every_task_has_its_reference():
    assert set(SPECS) == set(REFERENCES) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
@few
@given(seed=seeds, split=st.sampled_from(SPLITS))
def test_results_of_each_step_match_a_slow_reference(name, seed, split):
    task = open_task(SPECS[name])
    least, most = task.range_of(split)
    for text in task.texts(split, 4, seed, questions=2):
        *statement, _, _ = text.text.split("\n")
        for answer in text.answers:
            question = text.text[: answer.start].rpartition("\n")[2]
            for step in range(most + 3):
                assert answer.after(step) == REFERENCES[name]("\n".join(statement), question, step)
            assert answer.difficulty == len(answer.results) - 1 <= most
        assert split != "harder" or max(answer.difficulty for answer in text.answers) >= least
        last = text.answers[-1]
        assert text.text[last.start : last.end] == last.right and text.text[last.end :] == ""


@pytest.mark.parametrize("name", TASKS)
@few
@given(seed=seeds, split=st.sampled_from(SPLITS))
def test_compact_ids_ask_the_same_as_the_text(name, seed, split):
    task = open_task(SPECS[name])
    problems = task.problems(split, 3, seed)
    batch = task.batch(split, 3, seed, num_steps=6)
    assert batch.ids.max() < len(task.words) and batch.ids.min() >= 0
    assert batch.answer_mask.sum(1).tolist() == [len(set(row)) for row in batch.places.tolist()]
    assert batch.step_labels.shape == (6, *batch.labels.shape)
    for row in range(3):
        statement = task.say_statement(problems, row)
        for question in range(batch.labels.shape[1]):
            said = task.say_question(problems, row, question)
            for step in range(1, 7):
                label = int(batch.step_labels[step - 1, row, question])
                assert task.say(label) == REFERENCES[name](statement, said, step)
            right = task.say(int(batch.labels[row, question]))
            assert right == REFERENCES[name](statement, said, int(batch.difficulty[row, question]))
            assert right == REFERENCES[name](statement, said, 50)


@pytest.mark.parametrize("name", TASKS)
def test_scratchpads_end_in_the_answer(name):
    task = open_task(SPECS[name])
    for written, asked in zip(task.scratchpads("train", 20, 1), task.texts("train", 20, 1), strict=True):
        (answer,) = written.answers
        assert asked.text.startswith(written.text[: answer.start])
        assert answer.right.endswith(asked.answers[0].right + ".")


@pytest.mark.parametrize("name", ["roots", "iterate"])
def test_a_scratchpad_is_the_way_to_the_answer(name):
    task = open_task(SPECS[name])
    for written, asked in zip(task.scratchpads("train", 20, 1), task.texts("train", 20, 1), strict=True):
        results = asked.answers[0].results
        assert written.answers[0].right == "".join(results[1:] or results) + "."


@pytest.mark.parametrize("name", TASKS)
def test_scratchpad_batches_show_each_segment_itself_and_the_statement(name):
    task = open_task(SPECS[name])
    batch = task.scratchpad_batch("train", 3, 5)
    rows, answers, prompt = batch.prompts.shape
    each = int(task.asked(task.problems("train", 3, 5)).shape[2])
    told = prompt - each
    length = (batch.ids.shape[1] - told) // answers
    for answer in range(answers):
        start = told + answer * length
        for row in range(rows):
            assert batch.ids[row, start : start + each].tolist() == batch.prompts[row, answer, told:].tolist()
            labels = batch.labels[row, start : start + length]
            said = labels[labels != IGNORED].tolist()
            assert said[-1] == task.end_id and said[-2] == batch.right[row, answer]
            # What is foretold is what comes next.
            after = batch.ids[row, start + each : start + length].tolist()
            assert said[:-1] == after[: len(said) - 1]
        seen = batch.attention_mask[0, 0, start + length - 1].nonzero()[:, 0].tolist()
        assert seen == [*range(told), *range(start, start + length)]
        assert batch.position_ids[0, start] == told


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_problem(name):
    task = open_task(SPECS[name])
    contents = {split: task.problems(split, 300, 3).content for split in SPLITS}
    assert not is_held_out(contents["train"]).any()
    assert is_held_out(contents["held-out"]).all() and is_held_out(contents["harder"]).all()
    rows = {split: {tuple(row) for row in content.tolist()} for split, content in contents.items()}
    assert not rows["train"] & (rows["held-out"] | rows["harder"]) and not rows["held-out"] & rows["harder"]
    hardest = task.problems("held-out", 300, 3).difficulty.max(), task.problems("harder", 300, 3).difficulty.max(1)
    assert hardest[0] <= task.depth[1] and (hardest[1] > task.depth[1]).all()
    assert {int(d) for d in np.unique(task.problems("held-out", 300, 3).difficulty)} >= set(
        range(max(task.depth[0], 1), task.depth[1] + 1)
    )


@pytest.mark.parametrize("name", ["roots", "iterate", "variables"])
def test_no_step_before_the_last_leaves_a_result_as_it_was(name):
    for text in open_task(SPECS[name]).texts("train", 60, 4):
        results = text.answers[0].results
        assert all(one != other for one, other in itertools.pairwise(results))


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_give_the_same_problems(name):
    task = open_task(SPECS[name])
    again = open_task(task.spec)
    assert again == task
    assert task.texts("train", 5, 7) == again.texts("train", 5, 7) != task.texts("train", 5, 8)
    assert torch.equal(task.batch("train", 4, 7).ids, again.batch("train", 4, 7).ids)


@pytest.mark.parametrize("split", SPLITS)
def test_a_carry_from_afar_comes_as_often_as_not(split):
    task = open_task("task:addition?depth=0-4&places=9")
    problems = task.problems(split, 2000, 0)
    digits, alone = task.results(problems, 9)[-1], task.results(problems, 0)[0]
    for difficulty in range(1, task.range_of(split)[1] + 1):
        chosen = problems.difficulty == difficulty
        share = (digits != alone)[chosen].mean()
        assert abs(share - 0.5) < 4 * 0.5 / chosen.sum() ** 0.5


def test_a_narrower_depth_for_a_curriculum():
    batch = open_task("task:roots?depth=0-8&nodes=12").batch("train", 64, 0, depth=(0, 2))
    assert batch.difficulty.max() == 2


@pytest.mark.parametrize("name", TASKS)
def test_words_are_told_apart(name):
    words = open_task(SPECS[name]).words
    assert len(set(words)) == len(words) and not any(re.search(r"\s", word) for word in words)


@dataclass(frozen=True)
class Echo(Task):
    """A user's own task, by import path."""

    depth: tuple[int, int] = (1, 3)

    def texts(self, split, count, seed=0, questions=1):
        return [TaskText("echo", ())] * count

    def scratchpads(self, split, count, seed=0):
        return self.texts(split, count, seed)


def test_a_task_of_ones_own_by_import_path():
    task = open_task(f"task:{__name__}:Echo?depth=2-5")
    assert type(task).__name__ == "Echo" and task.depth == (2, 5)
    assert open_task(task.spec) == task


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("task:itterate", "did you mean 'iterate'"),
        ("roots", "write task:NAME"),
        ("task:roots?node=3", "did you mean 'nodes'"),
        ("task:roots?nodes=many", "should be a number"),
        ("task:roots?depth=a-b", "should be a range such as 1-8"),
        ("task:roots?nodes", "has no value"),
        ("task:roots?nodes=16&nodes=17", "twice"),
        ("task:roots?depth=5-2", "is no range"),
        ("task:roots?depth=0-9&nodes=8", "nodes=8"),
        ("task:roots?depth=0-4&harder=3-6", "must start above"),
        ("task:roots?nodes=80", "52 at most"),
        ("task:variables?modulus=12", "from 2 to 10"),
        ("task:circuits?depth=0-3", "depth starts at 1"),
        ("task:addition?places=3", "places=3"),
        ("task:no_such_module:Task", "can't be imported"),
        ("task:json:JSONDecoder", "derives from redepth.data.tasks.Task"),
    ],
)
def test_mistakes_in_a_spec_are_one_line(spec, said):
    with pytest.raises(RedepthError, match=said) as caught:
        open_task(spec)
    assert "\n" not in str(caught.value)


def test_too_few_different_problems():
    with pytest.raises(RedepthError, match="too few different problems"):
        open_task("task:iterate?depth=1-1&nodes=2").problems("held-out", 1000, 0)


def test_unknown_split():
    with pytest.raises(RedepthError, match="split 'test' is unknown"):
        open_task("task:roots").texts("test", 1)


def test_reasoning_gym_is_an_extra():
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        with pytest.raises(RedepthError, match=r"redepth\[eval\]"):
            open_task("task:reasoning-gym/chain_sum")
        return
    task = open_task("task:reasoning-gym/chain_sum?max_terms=3")
    texts = {split: {text.text for text in task.texts(split, 20)} for split in ("train", "held-out")}
    assert not texts["train"] & texts["held-out"]
    text = task.texts("train", 1)[0]
    assert text.text.endswith(text.answers[0].right)


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each letter with the space before it, each digit, and each other character."""
    alphabet = (
        [f" {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ?="] + [chr(code) for code in range(32, 127)] + ["\n"]
    )
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(alphabet)}, unk_token="~"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" [A-Z?=]|[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="~", pad_token="|")


def words_of(tokenizer):
    return lambda ids: "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


@pytest.mark.parametrize("name", TASKS)
def test_encoded_texts_have_the_labels_of_each_step(name, tokenizer):
    texts = open_task(SPECS[name]).texts("train", 6, 2, questions=3)
    encoded, words = TextEncoder(tokenizer, 5)(texts), words_of(tokenizer)
    for row, text in enumerate(texts):
        assert words(encoded.ids[row][encoded.attention_mask[row] == 1]) == text.text
        for number, answer in enumerate(text.answers):
            here = encoded.answer[row] == number
            assert words(encoded.labels[row][here]) == answer.right
            assert encoded.difficulty[row][here].unique().tolist() == [answer.difficulty]
            for step in range(1, 6):
                assert words(encoded.step_labels[step - 1, row][here]) == answer.after(step)
        off = encoded.answer[row] < 0
        assert (encoded.labels[row][off] == IGNORED).all() and (encoded.step_labels[:, row][:, off] == IGNORED).all()


def test_an_answer_that_runs_into_its_text_is_an_error(tokenizer):
    text = open_task(SPECS["roots"]).texts("train", 1)[0]
    answer = text.answers[0]
    broken = TaskText(text.text, (type(answer)(answer.start - 1, answer.end - 1, answer.difficulty, answer.results),))
    with pytest.raises(RedepthError, match="runs into the text"):
        TextEncoder(tokenizer, 2)([broken])


def test_results_of_another_length_are_an_error(tokenizer):
    text = open_task(SPECS["roots"]).texts("train", 1)[0]
    answer = text.answers[0]
    broken = TaskText(text.text, (type(answer)(answer.start, answer.end, 1, (" AB", *answer.results[-1:])),))
    with pytest.raises(RedepthError, match="takes 2 tokens where its place has 1"):
        TextEncoder(tokenizer, 1)(
            [TaskText(broken.text, (type(answer)(answer.start, answer.end, 1, (" A", " AB", answer.right)),))]
        )
    assert TextEncoder(tokenizer, 1)([broken]).labels.max() >= 0
