"""Accuracy on tasks by difficulty and number of steps, and the steps that adaptive exit takes for them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.load import load, load_tokenizer
from redepth.data.tasks import Task
from redepth.errors import RedepthError
from redepth.modeling import DepthPolicy, RecurrentDepthForCausalLM
from redepth.modeling.exits import ExitTest, Measure, find_exit_test

from .problems import PROBLEMS, AskedBatch, AskedTask

DEPTHS = (1, 2, 4, 8, 16)
Policies = Sequence[DepthPolicy | None]


@dataclass(frozen=True)
class Marks:
    """What a model at one depth made of some batches, A answers in all.

    Attributes:
        right: `[A]`, bool.
        steps: `[A]`, mean steps of an answer's tokens.
        tokens, token_steps: that were run, and the steps summed over them.
    """

    right: torch.Tensor
    steps: torch.Tensor
    tokens: int
    token_steps: float

    @classmethod
    def joined(cls, parts: Sequence["Marks"]) -> "Marks":
        return cls(
            torch.cat([part.right for part in parts]),
            torch.cat([part.steps for part in parts]),
            sum(part.tokens for part in parts),
            sum(part.token_steps for part in parts),
        )


@torch.no_grad()
def mark_batch(model: Any, batch: AskedBatch, policies: Policies) -> list[Marks]:
    """A batch's answers at each policy, None for a model without a loop; one pass to the deepest serves all fixed depths."""
    fixed = {policy.num_steps: policy for policy in policies if policy is not None and policy.test is None}
    right: dict[int, torch.Tensor] = {}
    if fixed:
        embedded, _ = model.embed_inputs(batch.ids, batch.attention_mask)
        state = model.initialize_state(embedded, batch.positions())
        for step in range(1, max(fixed) + 1):
            state, _, _ = model.iterate_one_step(
                embedded, state, attention_mask=batch.attention_mask, current_step=step - 1
            )
            if step in fixed:
                right[step] = batch.right(model.predict_from_latents(state, batch.attention_mask).logits)
    return [
        _even(batch, right[policy.num_steps], policy.num_steps)
        if policy is not None and policy.test is None
        else _marks_of_pass(model, batch, policy)
        for policy in policies
    ]


def _even(batch: AskedBatch, right: torch.Tensor, steps: int) -> Marks:
    return Marks(right, torch.full(right.shape, float(steps)), batch.tokens, float(batch.tokens * steps))


def _marks_of_pass(model: Any, batch: AskedBatch, policy: DepthPolicy | None) -> Marks:
    """By one call of the model: under an exit test, or of a model without a loop."""
    depth = {} if policy is None else {"policy": policy.one_pass()}
    output: Any = model(batch.ids, attention_mask=batch.attention_mask, **depth)
    right = batch.right(output.logits)
    if policy is None:
        return _even(batch, right, 0)
    steps = output.stats["num_steps"]
    run = steps if batch.attention_mask is None else steps * batch.attention_mask
    return Marks(right, batch.mean_steps(steps), batch.tokens, float(run.sum()))


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
        num_steps: the depths; 0 for a model without a loop.
        accuracy, standard_error: `[difficulty][num_steps]`; the error counts problems, not answers, as independent.
        exits: where a criterion was given.
        model: as the user named it.
    """

    task: str
    difficulties: list[int]
    trained_most: int
    answers: list[int]
    num_steps: list[int]
    accuracy: list[list[float]]
    standard_error: list[list[float]]
    exits: ExitAccuracy | None = None
    model: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy_of(
    spec: str,
    trained_most: int,
    batches: Sequence[AskedBatch],
    marks: Sequence[tuple[DepthPolicy | None, Marks]],
    exit_threshold: float | str = "auto",
    model: str = "",
) -> TaskAccuracy:
    """A model's marks by difficulty.

    Args:
        marks: by policy, the fixed depths in order and a criterion last; over all `batches`.
        exit_threshold: as the user gave it.
    """
    difficulty = torch.cat([batch.difficulty for batch in batches])
    problem = torch.cat([batch.problem for batch in batches])
    levels = difficulty.unique().tolist()
    of_level = [difficulty == level for level in levels]
    fixed = [(policy, one) for policy, one in marks if policy is None or policy.test is None]
    hits = torch.stack([one.right for _, one in fixed]).double()
    exits = None
    for policy, one in marks:
        if policy is not None and policy.test is not None:
            kept = one.right.double()
            exits = ExitAccuracy(
                policy.test.name,
                exit_threshold,
                policy.num_steps,
                accuracy=[kept[chosen].mean().item() for chosen in of_level],
                mean_steps=[one.steps[chosen].mean().item() for chosen in of_level],
                overall=kept.mean().item(),
                overall_fixed=hits[-1].mean().item(),
                spearman=rank_correlation(difficulty.double(), one.steps.double()),
            )
    return TaskAccuracy(
        spec,
        levels,
        trained_most,
        answers=[int(chosen.sum()) for chosen in of_level],
        num_steps=[0 if policy is None else policy.num_steps for policy, _ in fixed],
        accuracy=[hits[:, chosen].mean(1).tolist() for chosen in of_level],
        standard_error=[standard_error(hits[:, chosen], problem[chosen]).tolist() for chosen in of_level],
        exits=exits,
        model=model,
    )


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
    policies = [DepthPolicy.resolve(model.config, num_steps=steps) for steps in depths]
    if criterion is not None:
        policies.append(
            DepthPolicy.resolve(model.config, num_steps=depths[-1], criterion=criterion, exit_threshold=exit_threshold)
        )
    parts = []
    for number, batch in enumerate(batches, 1):
        parts.append(mark_batch(model, batch, policies))
        if on_batch is not None:
            on_batch(number, len(batches))
    marks = [Marks.joined(of_policy) for of_policy in zip(*parts, strict=True)]
    return accuracy_of(task.spec, trained_most, batches, list(zip(policies, marks, strict=True)), exit_threshold)


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
        RedepthError: as `AskedTask.of`, and for a number of steps below 1.
    """
    if not num_steps or min(num_steps) < 1:
        raise RedepthError(f"num_steps must be at least 1, got {min(num_steps, default='none')}")
    if limit < 1:
        raise RedepthError(f"limit must be at least 1, got {limit}")
    if criterion is not None:
        find_exit_test(criterion)  # its mistakes are told before any compute
    asked = AskedTask.of(checkpoint, spec)
    model: Any = load(checkpoint, dtype, device)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise RedepthError(f"checkpoint {str(checkpoint)!r} has no depth to measure by; convert it first")
    tokenizer = None if asked.compact else load_tokenizer(checkpoint)
    batches = asked.batches(tokenizer, model.config.vocab_size, limit, seed, model.device, questions)
    return task_accuracy(model, asked.task, batches, asked.trained_most, num_steps, criterion, exit_threshold, on_batch)
