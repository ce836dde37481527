"""Accuracy on tasks by difficulty and number of steps, and the steps that adaptive exit takes for them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.folder import read_recipe
from redepth.checkpoint.load import load, load_tokenizer
from redepth.data.tasks import IGNORED, ArrayTask, Split, Task, TextEncoder, is_import_path, open_task
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.exits import ExitTest, Measure, find_exit_test

DEPTHS = (1, 2, 4, 8, 16)
PROBLEMS = 256  # of each split
MOST_LOGITS = 2**26  # entries in memory at once


@dataclass(frozen=True)
class AskedBatch:
    """B rows of T tokens with A answers, the n-th of which is foretold by N tokens (one in compact ids).

    Attributes:
        ids, attention_mask: `[B, T]`; the mask is None where nothing is padded.
        row, place, label, answer: `[N]`, for each token of an answer its row, the position whose logits foretell it,
            what it should be, and which of the batch's answers it belongs to.
        problem, difficulty: `[A]`.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor | None
    row: torch.Tensor
    place: torch.Tensor
    label: torch.Tensor
    answer: torch.Tensor
    problem: torch.Tensor
    difficulty: torch.Tensor

    def right(self, logits: torch.Tensor) -> torch.Tensor:
        """`[A]`, bool: which answers the likeliest tokens of `[B, T, V]` give in full."""
        hits = (logits[self.row, self.place].argmax(-1) == self.label).long()
        return torch.ones_like(self.difficulty).scatter_reduce(0, self.answer, hits, "amin").bool()

    def mean_steps(self, steps: torch.Tensor) -> torch.Tensor:
        """`[A]`: of `[B, T]`, steps by token, each answer's mean."""
        mean = torch.zeros(len(self.difficulty))
        return mean.scatter_reduce(0, self.answer, steps[self.row, self.place].float(), "mean", include_self=False)


@dataclass(frozen=True)
class ExitAccuracy:
    """Adaptive exit, run as it is in use.

    Attributes:
        num_steps: after which every token leaves.
        accuracy, mean_steps: by difficulty.
        overall, overall_fixed: accuracy over all answers, under the test and without it at `num_steps`.
        spearman: rank correlation of difficulty and steps over all answers.
    """

    criterion: str
    threshold: float | str
    num_steps: int
    accuracy: list[float]
    mean_steps: list[float]
    overall: float
    overall_fixed: float
    spearman: float


@dataclass(frozen=True)
class TaskAccuracy:
    """
    Attributes:
        task: its spec.
        trained_most: the most difficult answers of the splits train and held-out; what lies above is of the split harder.
        answers: how many, by difficulty.
        accuracy, standard_error: `[difficulty][num_steps]`; the error counts problems, not answers, as independent.
        exits: where a criterion was given.
    """

    task: str
    difficulties: list[int]
    trained_most: int
    answers: list[int]
    num_steps: list[int]
    accuracy: list[list[float]]
    standard_error: list[list[float]]
    exits: ExitAccuracy | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def task_accuracy(
    model: RecurrentDepthForCausalLM,
    task: Task,
    batches: Sequence[AskedBatch],
    trained_most: int,
    num_steps: Sequence[int] = DEPTHS,
    criterion: str | ExitTest | Measure | None = None,
    exit_threshold: float | str = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> TaskAccuracy:
    """Accuracy after each of `num_steps` steps; one pass to the deepest serves them all.

    Args:
        criterion: also run adaptive exit under this test, up to the deepest of `num_steps`.
        on_batch: called with (batches done, batches in all).
    """
    depths = sorted(set(num_steps))
    right: list[torch.Tensor] = []
    exit_right, exit_steps = [], []
    for number, batch in enumerate(batches, 1):
        found = []
        embedded, _ = model.embed_inputs(batch.ids, batch.attention_mask)
        state = model.initialize_state(embedded, _positions(batch))
        for step in range(1, depths[-1] + 1):
            state, _, _ = model.iterate_one_step(
                embedded, state, attention_mask=batch.attention_mask, current_step=step - 1
            )
            if step in depths:
                logits = model.predict_from_latents(state, batch.attention_mask).logits
                assert logits is not None
                found.append(batch.right(logits))
        right.append(torch.stack(found))
        if criterion is not None:
            output: Any = model(
                batch.ids,
                attention_mask=batch.attention_mask,
                num_steps=depths[-1],
                criterion=criterion,
                exit_threshold=exit_threshold,
            )
            exit_right.append(batch.right(output.logits))
            exit_steps.append(batch.mean_steps(output.stats["num_steps"]))
        if on_batch is not None:
            on_batch(number, len(batches))
    hits = torch.cat(right, 1).double()
    difficulty = torch.cat([batch.difficulty for batch in batches])
    problem = torch.cat([batch.problem for batch in batches])
    levels = difficulty.unique().tolist()
    of_level = [difficulty == level for level in levels]
    exits = None
    if criterion is not None:
        kept, steps = torch.cat(exit_right).double(), torch.cat(exit_steps)
        exits = ExitAccuracy(
            find_exit_test(criterion).name,
            exit_threshold,
            depths[-1],
            accuracy=[kept[chosen].mean().item() for chosen in of_level],
            mean_steps=[steps[chosen].mean().item() for chosen in of_level],
            overall=kept.mean().item(),
            overall_fixed=hits[-1].mean().item(),
            spearman=rank_correlation(difficulty.double(), steps.double()),
        )
    return TaskAccuracy(
        task.spec,
        levels,
        trained_most,
        answers=[int(chosen.sum()) for chosen in of_level],
        num_steps=depths,
        accuracy=[hits[:, chosen].mean(1).tolist() for chosen in of_level],
        standard_error=[standard_error(hits[:, chosen], problem[chosen]).tolist() for chosen in of_level],
        exits=exits,
    )


def _positions(batch: AskedBatch) -> torch.Tensor:
    if batch.attention_mask is None:
        return torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    return (batch.attention_mask.cumsum(1) - 1).clamp(min=0)


def standard_error(hits: torch.Tensor, problem: torch.Tensor) -> torch.Tensor:
    """Of the mean of `hits` `[R, A]` over answers, where those of one problem (numbered in `problem`, `[A]`) go together."""
    off = hits - hits.mean(1, keepdim=True)
    by_problem = torch.zeros(len(hits), int(problem.max()) + 1, dtype=hits.dtype, device=hits.device)
    return by_problem.index_add(1, problem, off).pow(2).sum(1).sqrt() / hits.shape[1]


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's ρ of two lists `[N]`; equal values share their mean rank. 0 where one of them never changes."""

    def ranks(values: torch.Tensor) -> torch.Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        middle = count.cumsum(0) - (count - 1) / 2
        return middle[place] - middle[place].mean()

    a, b = ranks(one), ranks(other)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def compact_batches(
    task: ArrayTask, limit: int, seed: int = 0, batch_size: int = 64, device: Any = "cpu"
) -> list[AskedBatch]:
    """`limit` problems of held-out, and as many harder ones of which only the harder answers count."""
    found, first_problem = [], 0
    for split, least in _splits(task):
        batch = task.batch(split, limit, seed)
        for rows in torch.arange(limit).split(batch_size):
            row, question = (batch.difficulty[rows] >= least).nonzero(as_tuple=True)
            asked = AskedBatch(
                ids=batch.ids[rows].to(device),
                attention_mask=None,
                row=row.to(device),
                place=batch.places[rows][row, question].to(device),
                label=batch.labels[rows][row, question].to(device),
                answer=torch.arange(len(row), device=device),
                problem=first_problem + row,
                difficulty=batch.difficulty[rows][row, question],
            )
            first_problem += len(rows)
            found.append(asked)
    return found


def text_batches(
    task: Task, tokenizer: Any, vocabulary: int, limit: int, seed: int = 0, device: Any = "cpu", questions: int = 1
) -> list[AskedBatch]:
    """As `compact_batches`, in words, with `questions` in each problem."""
    encode = TextEncoder(tokenizer, 0)
    found, first_problem = [], 0
    for split, least in _splits(task):
        texts = task.texts(split, limit, seed, questions)
        texts = [text for text in texts if max(answer.difficulty for answer in text.answers) >= least]
        # Texts of similar length go together, so that little is padded.
        texts.sort(key=lambda text: len(text.text))
        rows = max(1, MOST_LOGITS // (vocabulary * len(tokenizer(texts[-1].text)["input_ids"])))
        for start in range(0, len(texts), rows):
            encoded = encode(texts[start : start + rows])
            row, token = ((encoded.labels != IGNORED) & (encoded.difficulty >= least)).nonzero(as_tuple=True)
            named, answer = (row * questions + encoded.answer[row, token]).unique(return_inverse=True)
            difficulty = torch.zeros(len(named), dtype=torch.long)
            difficulty[answer] = encoded.difficulty[row, token]
            found.append(
                AskedBatch(
                    ids=encoded.ids.to(device),
                    attention_mask=encoded.attention_mask.to(device),
                    row=row.to(device),
                    place=(token - 1).to(device),
                    label=encoded.labels[row, token].to(device),
                    answer=answer.to(device),
                    problem=first_problem + named // questions,
                    difficulty=difficulty,
                )
            )
            first_problem += len(encoded.ids)
    return found


def _splits(task: Task) -> Iterator[tuple[Split, int]]:
    """The splits to measure, and from which difficulty on answers count there."""
    yield "held-out", 0
    if isinstance(task, ArrayTask):
        yield "harder", task.depth[1] + 1


def recorded_task(folder: str | Path) -> str | None:
    """The spec of the task that a small model was trained on from scratch; None for any other checkpoint."""
    return read_recipe(Path(folder)).get("train_on_task", {}).get("task") if Path(folder).is_dir() else None


def evaluate_task(
    checkpoint: str | Path,
    spec: str | None = None,
    num_steps: Sequence[int] = DEPTHS,
    criterion: str | ExitTest | Measure | None = None,
    exit_threshold: float | str = "auto",
    limit: int = PROBLEMS,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    on_batch: Callable[[int, int], None] | None = None,
    questions: int = 1,
) -> TaskAccuracy:
    """A checkpoint's accuracy on a task: in compact ids for a model made by `train_on_task`, else in words.

    Args:
        spec: the checkpoint's own task by default.
        limit: problems of each split.
        questions: in each problem in words; all but the last hide their answers.

    Raises:
        RedepthError: for a checkpoint that records no task where none is given, or records one by an import path that is
            not given, an unknown task, a task whose words are not the small model's, or a number of steps below 1.
    """
    if not num_steps or min(num_steps) < 1:
        raise RedepthError(f"num_steps must be at least 1, got {min(num_steps, default='none')}")
    if limit < 1:
        raise RedepthError(f"limit must be at least 1, got {limit}")
    if criterion is not None:
        find_exit_test(criterion)  # its mistakes are told before any compute
    own = recorded_task(checkpoint)
    if spec is None and own is None:
        raise RedepthError(f"checkpoint {str(checkpoint)!r} records no task; name one with --tasks")
    if own is not None and is_import_path(own) and (spec or "").partition("?")[0] != own.partition("?")[0]:
        # What a checkpoint says must not decide what code runs.
        raise RedepthError(
            f"checkpoint {str(checkpoint)!r} records a task by import path, {own!r}; if you trust that code, name it with "
            "--tasks"
        )
    task = open_task(spec or str(own))
    model: Any = load(checkpoint, dtype, device)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise RedepthError(f"checkpoint {str(checkpoint)!r} has no depth to measure by; convert it first")
    trained_most = task.depth[1] if isinstance(task, ArrayTask) else 0
    if own is not None:
        own_task = open_task(own)
        if not isinstance(own_task, ArrayTask) or not isinstance(task, ArrayTask) or task.words != own_task.words:
            raise RedepthError(
                f"checkpoint {str(checkpoint)!r} knows the words of {own!r} alone, not those of {spec!r}"
            )
        trained_most = own_task.depth[1]
        batches = compact_batches(task, limit, seed, device=model.device)
    else:
        tokenizer = load_tokenizer(checkpoint)
        batches = text_batches(task, tokenizer, model.config.vocab_size, limit, seed, model.device, questions)
    return task_accuracy(model, task, batches, trained_most, num_steps, criterion, exit_threshold, on_batch)
