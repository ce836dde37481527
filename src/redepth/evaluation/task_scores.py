"""Several models on the problems of a task: answers kept as they come, rows of the table, and paired differences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .answers import Answer, Answers, key_of
from .models import Column, Entrant
from .problems import AskedBatch, AskedTask
from .scores import Difference, Score, Work
from .tasks import Marks, TaskAccuracy, accuracy_of, mark_batch, standard_error

METRIC = "acc"


@dataclass
class TaskRun:
    """One task, asked of one model after another; the answers stand in the same order for all.

    Attributes:
        limit: problems of each split.
        runs: (model, depth, its marks over all batches), in the order of asking.
        accuracies: of each model.
        scores: rows of the table, one for each split, model and depth.
    """

    asked: AskedTask
    limit: int
    seed: int
    questions: int
    runs: list[tuple[str, str, Marks]] = field(default_factory=list)
    accuracies: list[TaskAccuracy] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    _batches: list[AskedBatch] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What it depends on."""
        form = "compact ids" if self.asked.compact else "words"
        settings = {"problems": self.limit, "seed": self.seed, "questions": self.questions}
        return {"task": self.asked.task.spec, "form": form} | settings

    def ask(
        self,
        one: Entrant,
        model: Any,
        tokenizer: Any,
        answers: Answers,
        identity: str,
        exit_threshold: float | str,
        told: Callable[[int, int], None],
    ) -> None:
        """
        Args:
            identity: what keeps this model's answers from another's.
            told: called with (batches done, batches in all).
        """
        batches = self.asked.batches(
            tokenizer, model.config.vocab_size, self.limit, self.seed, model.device, self.questions
        )
        parts = []
        for number, batch in enumerate(batches, 1):
            parts.append(_kept_marks(model, batch, one.columns, answers, identity))
            told(number, len(batches))
        marks = [Marks.joined(of_column) for of_column in zip(*parts, strict=True)]
        self._batches = batches
        self.runs += [(one.name, column.name, of) for column, of in zip(one.columns, marks, strict=True)]
        pairs = [(column.policy, of) for column, of in zip(one.columns, marks, strict=True)]
        self.accuracies.append(
            accuracy_of(self.asked.task.spec, self.asked.trained_most, batches, pairs, exit_threshold, one.name)
        )
        work = Work.of(model)
        for place, column in enumerate(one.columns):
            self.scores += self._scores(one.name, column, [of_batch[place] for of_batch in parts], work)

    def _scores(self, model: str, column: Column, marks: Sequence[Marks], work: Work) -> list[Score]:
        """A row for each split; of `marks` there is one for each batch."""
        found = []
        for split in dict.fromkeys(batch.split for batch in self._batches):
            own = [(batch, of) for batch, of in zip(self._batches, marks, strict=True) if batch.split == split]
            joined = Marks.joined([of for _, of in own])
            answers, problems = len(joined.right), sum(len(batch.ids) for batch, _ in own)
            if not answers:
                continue
            hits, problem = joined.right.double()[None], torch.cat([batch.problem for batch, _ in own])
            steps, tokens = joined.token_steps / joined.tokens, joined.tokens / problems
            found.append(
                Score(
                    model,
                    column.name,
                    self.asked.task.spec,
                    METRIC,
                    split,
                    hits.mean().item(),
                    standard_error(hits, problem).item(),
                    answers,
                    steps,
                    tokens,
                    work.flops_per_token(steps),
                    work.flops_per_token(steps) * tokens,
                    work.effective_parameters(steps),
                )
            )
        return found

    def differences(self) -> list[Difference]:
        """Every later run against every earlier one on the same problems, by split; problems are independent."""
        problem = torch.cat([batch.problem for batch in self._batches])
        splits = [batch.split for batch in self._batches for _ in range(len(batch.problem))]
        found = []
        for split in dict.fromkeys(splits):
            chosen = torch.tensor([one == split for one in splits])
            for number, (model, depth, marks) in enumerate(self.runs):
                for model_from, depth_from, earlier in self.runs[:number]:
                    apart = (marks.right[chosen].double() - earlier.right[chosen].double())[None]
                    found.append(
                        Difference(
                            self.asked.task.spec,
                            METRIC,
                            split,
                            model,
                            depth,
                            model_from,
                            depth_from,
                            apart.mean().item(),
                            standard_error(apart, problem[chosen]).item(),
                            apart.shape[1],
                        )
                    )
        return found

    def table(self) -> Any:
        """A line for each model, depth and answer."""
        split = [batch.split for batch in self._batches for _ in range(len(batch.problem))]
        problem = torch.cat([batch.problem for batch in self._batches]).tolist()
        difficulty = torch.cat([batch.difficulty for batch in self._batches]).tolist()
        count = len(split)
        tables = [
            pa.table(
                {
                    "task": [self.asked.task.spec] * count,
                    "model": [model] * count,
                    "depth": [depth] * count,
                    "split": split,
                    "problem": problem,
                    "difficulty": difficulty,
                    "right": marks.right.tolist(),
                    "steps": marks.steps.tolist(),
                }
            )
            for model, depth, marks in self.runs
        ]
        return pa.concat_tables(tables)


def write_answers(runs: Sequence[TaskRun], file: Path) -> None:
    """Every answer of some tasks as parquet, from which any other comparison can be made."""
    pq.write_table(pa.concat_tables([run.table() for run in runs]), file)


def _kept_marks(
    model: Any, batch: AskedBatch, columns: Sequence[Column], answers: Answers, identity: str
) -> list[Marks]:
    """A batch's marks at each column; what `answers` hold is not computed again."""
    asked = [
        batch.ids.tolist(),
        None if batch.attention_mask is None else batch.attention_mask.tolist(),
        batch.row.tolist(),
        batch.place.tolist(),
        batch.label.tolist(),
    ]
    keys = [key_of(identity, str(column.policy), "problems", asked) for column in columns]
    known = {key: answer for key in keys if (answer := answers.find(key)) is not None}
    todo = [place for place, key in enumerate(keys) if key not in known]
    made = {}
    for place, marks in zip(todo, mark_batch(model, batch, [columns[place].policy for place in todo]), strict=True):
        said = [marks.right.int().tolist(), marks.steps.tolist()]
        made[keys[place]] = Answer(said, marks.tokens, marks.token_steps / marks.tokens)
    answers.keep(made.items())
    known |= made
    return [
        Marks(
            torch.tensor(answer.said[0], dtype=torch.bool),
            torch.tensor(answer.said[1], dtype=torch.float),
            answer.tokens,
            answer.mean_steps * answer.tokens,
        )
        for answer in (known[key] for key in keys)
    ]
