"""Problems of a task as batches for a model, in compact ids or in words, and which of the two a checkpoint reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.folder import read_recipe
from redepth.data.tasks import IGNORED, ArrayTask, Split, Task, TextEncoder, is_import_path, open_task
from redepth.errors import RedepthError

PROBLEMS = 256  # of each split
MOST_LOGITS = 2**26  # entries in memory at once


@dataclass(frozen=True)
class AskedBatch:
    """B rows of T tokens with A answers, the n-th of which is foretold by N tokens (one in compact ids).

    Attributes:
        split: `held-out` or `harder`.
        ids, attention_mask: `[B, T]`; the mask is None where nothing is padded.
        row, place, label, answer: `[N]`, for each token of an answer its row, the position whose logits foretell it,
            what it should be, and which of the batch's answers it belongs to.
        problem, difficulty: `[A]`, on the CPU.
    """

    split: Split
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
        hits = (logits[self.row, self.place].argmax(-1) == self.label).long().cpu()
        return torch.ones_like(self.difficulty).scatter_reduce(0, self.answer.cpu(), hits, "amin").bool()

    def mean_steps(self, steps: torch.Tensor) -> torch.Tensor:
        """`[A]`: of `[B, T]`, steps by token, each answer's mean."""
        mean, taken = torch.zeros(len(self.difficulty)), steps[self.row, self.place].float().cpu()
        return mean.scatter_reduce(0, self.answer.cpu(), taken, "mean", include_self=False)

    @property
    def tokens(self) -> int:
        """How many are run, padding left out."""
        return self.ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def positions(self) -> torch.Tensor:
        """Of the tokens, `[B, T]` or `[1, T]`."""
        if self.attention_mask is None:
            return torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)


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
                split=split,
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
                    split=split,
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


@dataclass(frozen=True)
class AskedTask:
    """A task as one checkpoint reads it.

    Attributes:
        compact: whether in compact ids, of a small model trained on the task's words alone; else in words.
        trained_most: the most difficult answers of the splits train and held-out.
    """

    task: Task
    compact: bool
    trained_most: int

    @classmethod
    def of(cls, checkpoint: str | Path, spec: str | None = None) -> "AskedTask":
        """
        Args:
            spec: the checkpoint's own task by default.

        Raises:
            RedepthError: for a checkpoint that records no task where none is given, or records one by an import path that
                is not given, an unknown task, or a task whose words are not the small model's.
        """
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
        if own is None:
            return cls(task, False, task.depth[1] if isinstance(task, ArrayTask) else 0)
        own_task = open_task(own)
        if not isinstance(own_task, ArrayTask) or not isinstance(task, ArrayTask) or task.words != own_task.words:
            raise RedepthError(
                f"checkpoint {str(checkpoint)!r} knows the words of {own!r} alone, not those of {task.spec!r}"
            )
        return cls(task, True, own_task.depth[1])

    def check_reads(self, other: str) -> None:
        """
        Raises:
            RedepthError: for another model that can't be asked the same problems in the same form.
        """
        if not self.compact and recorded_task(other) is None:
            return
        if not self.compact or recorded_task(other) is None:
            form = "compact ids" if self.compact else "words"
            raise RedepthError(
                f"{self.task.spec!r} is asked in {form} here, which {other!r} can't read; leave it out of --compare"
            )
        type(self).of(other, self.task.spec)

    def batches(
        self,
        tokenizer: Any,
        vocabulary: int,
        limit: int = PROBLEMS,
        seed: int = 0,
        device: Any = "cpu",
        questions: int = 1,
    ) -> list[AskedBatch]:
        """`limit` problems of held-out, and as many harder ones of which only the harder answers count.

        Args:
            tokenizer, vocabulary: of the model that is asked; of no account in compact ids.
            questions: in each problem in words; all but the last hide their answers.
        """
        if self.compact:
            assert isinstance(self.task, ArrayTask)
            return compact_batches(self.task, limit, seed, device=device)
        return text_batches(self.task, tokenizer, vocabulary, limit, seed, device, questions)
