"""Tasks whose problems are arrays: drawn, sorted into splits and rendered many at a time."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from redepth.errors import RedepthError

from .protocol import SPLITS, Answer, ScratchpadBatch, Split, Task, TaskBatch, TaskText, check_split

HELD_OUT_SHARE = 8  # one problem in so many is held out
MOST_DRAWS = 200  # rounds without enough problems of a split, before giving up
END = "."  # ends a scratchpad


@dataclass(frozen=True)
class Problems:
    """B problems with A questions each; every array has B rows.

    Attributes:
        content: `[B, K]`, what makes two problems the same, whatever is asked about them.
        difficulty: `[B, A]`.
        arrays: what the task needs to render them.
    """

    content: np.ndarray
    difficulty: np.ndarray
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.content)

    def take(self, rows: np.ndarray) -> "Problems":
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return replace(self, content=self.content[rows], difficulty=self.difficulty[rows], arrays=arrays)


def join(parts: list[Problems]) -> Problems:
    return Problems(
        content=np.concatenate([part.content for part in parts]),
        difficulty=np.concatenate([part.difficulty for part in parts]),
        arrays={name: np.concatenate([part[name] for part in parts]) for name in parts[0].arrays},
    )


def is_held_out(content: np.ndarray) -> np.ndarray:
    """`[B]`, bool, a function of each row of `content` alone: no problem is both held out and trained on."""
    hashed = np.full(len(content), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in content.T.astype(np.uint64):
        hashed = (hashed ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        hashed ^= hashed >> np.uint64(29)
    return (hashed >> np.uint64(32)) % np.uint64(HELD_OUT_SHARE) == 0


@dataclass(frozen=True)
class ArrayTask(Task):
    """Options that every such task has.

    Attributes:
        depth: least and most difficulty of what is asked in training and held out.
        harder: the same for the split `harder`; (0, 0) stands for the same range moved up by `most`, at most doubled.
        questions: how many a problem asks in compact ids; 0 for the task's own number.
    """

    depth: tuple[int, int] = (1, 8)
    harder: tuple[int, int] = (0, 0)
    questions: int = 0

    # Whether a step looks at neighbours by their places, rather than for what they are.
    core_reads_places: ClassVar[bool] = False

    # --- what a task says of itself ------------------------------------------------------------------------------
    @property
    @abstractmethod
    def answer_words(self) -> list[str]:
        """The compact word of each result; their ids are 0, 1, …"""

    @property
    @abstractmethod
    def other_words(self) -> list[str]:
        """The other compact words, whose ids follow; none with white space."""

    @property
    @abstractmethod
    def usual_questions(self) -> int:
        """How many a problem asks in compact ids where the option is 0."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int, least: int, most: int, questions: int) -> Problems:
        """Problems of which the questions have difficulties from `least` to `most`, as evenly as the task allows."""

    @abstractmethod
    def results(self, problems: Problems, num_steps: int) -> np.ndarray:
        """`[num_steps + 1, B, A]`: each answer's intermediate result after 0 … num_steps steps."""

    @abstractmethod
    def statement(self, problems: Problems) -> np.ndarray:
        """`[B, T]`, ids."""

    @abstractmethod
    def asked(self, problems: Problems) -> np.ndarray:
        """`[B, A, Q]`, ids: what asks each question after the statement."""

    def places_in_statement(self, problems: Problems) -> np.ndarray | None:
        """`[B, A]`, where the statement itself has a place for each answer and compact ids need no questions."""
        return None

    @abstractmethod
    def say_statement(self, problems: Problems, row: int) -> str:
        """In words, without a line break at the end."""

    @abstractmethod
    def say_question(self, problems: Problems, row: int, question: int) -> str:
        """In words, up to where the answer follows."""

    @abstractmethod
    def say(self, result: int) -> str:
        """A result in words, with its leading space if it has one."""

    def scratchpad(self, problems: Problems) -> tuple[np.ndarray, np.ndarray]:
        """What a scratchpad writes: results `[B, A, L]`, and how many of them count, `[B, A]`; the last is the answer.

        The intermediate results of steps 1, 2 … unless a task writes more useful ones.
        """
        most = max(1, int(problems.difficulty.max()))
        written = np.moveaxis(self.results(problems, most), 0, -1)[..., 1:]
        return written, np.maximum(problems.difficulty, 1)

    # --- what follows from it --------------------------------------------------------------------------------------
    def check(self) -> None:
        for name in ("depth", "harder"):
            least, most = getattr(self, name)
            if not 0 <= least <= most:
                raise RedepthError(f"option {name}={least}-{most} of {self.name()!r} is no range from 0 up")
        if self.harder[1] and self.harder[0] <= self.depth[1]:
            raise RedepthError(
                f"option harder={self.harder[0]}-{self.harder[1]} of {self.name()!r} must start above depth={self.depth[1]}"
            )
        if self.questions < 0:
            raise RedepthError(f"option questions={self.questions} of {self.name()!r} must be 0 or more")

    @property
    def words(self) -> list[str]:
        """The compact vocabulary, by id."""
        return [*self.answer_words, *self.other_words]

    @property
    def end_id(self) -> int:
        """Of the word that ends a scratchpad."""
        return self.words.index(END)

    def range_of(self, split: Split) -> tuple[int, int]:
        """Least and most difficulty of what a split asks."""
        check_split(split)
        if split != "harder":
            return self.depth
        return self.harder if self.harder[1] else self.usual_harder()

    def usual_harder(self) -> tuple[int, int]:
        return self.depth[1] + 1, 2 * max(self.depth[1], 1)

    def problems(
        self, split: Split, count: int, seed: int = 0, questions: int = 0, depth: tuple[int, int] | None = None
    ) -> Problems:
        """`count` problems of a split.

        Args:
            depth: a narrower range than the split's, for a curriculum.

        Raises:
            RedepthError: for a split in which the options leave too few problems.
        """
        least, most = depth if depth is not None else self.range_of(split)
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        asked = questions or self.questions or self.usual_questions
        found: list[Problems] = []
        missing = count
        for _ in range(MOST_DRAWS):
            share = 1.0 if split == "train" else HELD_OUT_SHARE
            drawn = self.draw(rng, int(missing * share * 1.2) + 8, least, most, asked)
            fits = is_held_out(drawn.content) == (split != "train")
            if split == "harder":
                fits &= drawn.difficulty.max(1) > self.depth[1]
            found.append(drawn.take(fits.nonzero()[0][:missing]))
            missing -= len(found[-1])
            if not missing:
                return join(found)
        raise RedepthError(f"{self.spec!r} has too few different problems for its split {split!r}; widen its options")

    def batch(
        self,
        split: Split,
        count: int,
        seed: int = 0,
        num_steps: int | None = None,
        depth: tuple[int, int] | None = None,
    ) -> TaskBatch:
        """`count` problems as compact ids, with the intermediate results of `num_steps` steps (as many as any needs)."""
        problems = self.problems(split, count, seed, depth=depth)
        steps = num_steps if num_steps is not None else max(1, int(problems.difficulty.max()))
        results = self.results(problems, max(steps, int(problems.difficulty.max())))
        ids = self.statement(problems)
        places = self.places_in_statement(problems)
        if places is None:
            asked = self.asked(problems)
            each = asked.shape[2]
            places = np.broadcast_to(ids.shape[1] + each * np.arange(1, asked.shape[1] + 1) - 1, asked.shape[:2])
            ids = np.concatenate([ids, asked.reshape(len(ids), -1)], 1)
        return TaskBatch(*map(_tensor, (ids, places, results[-1], results[1 : steps + 1], problems.difficulty)))

    def scratchpad_batch(
        self, split: Split, count: int, seed: int = 0, depth: tuple[int, int] | None = None
    ) -> ScratchpadBatch:
        """`count` problems with their intermediate results written out."""
        problems = self.problems(split, count, seed, depth=depth)
        written, lengths = self.scratchpad(problems)
        written = np.concatenate([written, np.full_like(written[..., :1], self.end_id)], 2)
        statement, asked = self.statement(problems), self.asked(problems)
        (rows, told), (_, number, each) = statement.shape, asked.shape
        at = np.arange(written.shape[2])
        written = np.where(at < lengths[..., None], written, self.end_id)
        segments = np.concatenate([asked, written], 2)
        # Within a segment each token from the question's last on foretells the next, up to the end.
        labels = np.full(segments.shape, -100)
        foretold = np.arange(written.shape[2]) <= lengths[..., None]
        labels[:, :, each - 1 : -1] = np.where(foretold, written, -100)
        length = segments.shape[2]
        segment_of = np.concatenate([np.zeros(told, int), np.repeat(np.arange(1, number + 1), length)])
        sees = (segment_of[None] == segment_of[:, None]) | (segment_of[None] == 0)
        sees &= np.tri(len(sees), dtype=bool)
        positions = np.concatenate([np.arange(told), np.tile(told + np.arange(length), number)])
        prompts = np.concatenate([np.repeat(statement[:, None], number, 1), asked], 2)
        flat = segments.reshape(rows, -1)
        return ScratchpadBatch(
            ids=_tensor(np.concatenate([statement, flat], 1)),
            labels=_tensor(np.concatenate([np.full((rows, told), -100), labels.reshape(rows, -1)], 1)),
            position_ids=_tensor(positions)[None].expand(rows, -1),
            attention_mask=torch.from_numpy(sees)[None, None].expand(rows, 1, -1, -1),
            prompts=_tensor(prompts),
            right=_tensor(self.results(problems, max(1, int(problems.difficulty.max())))[-1]),
            difficulty=_tensor(problems.difficulty),
        )

    def texts(self, split: Split, count: int, seed: int = 0, questions: int = 1) -> list[TaskText]:
        problems = self.problems(split, count, seed, questions)
        results = self.results(problems, max(1, int(problems.difficulty.max())))
        found = []
        for row in range(count):
            text, answers = self.say_statement(problems, row), []
            for question in range(questions):
                text += "\n" + self.say_question(problems, row, question)
                needed = int(problems.difficulty[row, question])
                said = tuple(self.say(int(result)) for result in results[: needed + 1, row, question])
                shown = said[-1] if question == questions - 1 else " ?" if said[-1].startswith(" ") else "?"
                answers.append(Answer(len(text), len(text) + len(shown), needed, said))
                text += shown
            found.append(TaskText(text, tuple(answers)))
        return found

    def scratchpads(self, split: Split, count: int, seed: int = 0) -> list[TaskText]:
        problems = self.problems(split, count, seed, 1)
        written, lengths = self.scratchpad(problems)
        found = []
        for row in range(count):
            asked = f"{self.say_statement(problems, row)}\n{self.say_question(problems, row, 0)}"
            said = "".join(self.say(int(result)) for result in written[row, 0, : lengths[row, 0]]) + END
            answer = Answer(len(asked), len(asked) + len(said), int(problems.difficulty[row, 0]), (said,))
            found.append(TaskText(asked + said, (answer,)))
        return found


def pick_by_difficulty(
    rng: np.random.Generator, difficulty: np.ndarray, least: int, most: int, questions: int
) -> np.ndarray:
    """For each problem `[B, N]`, `questions` of its N things, `[B, questions]`, with difficulties drawn evenly.

    Where nothing has a difficulty that was drawn, the nearest one is asked.
    """
    count, things = difficulty.shape
    wanted = rng.integers(least, most + 1, (count, questions))
    far = np.abs(difficulty[:, None] - wanted[..., None])
    return (far + rng.random((count, questions, things)) * 0.9).argmin(2)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))
