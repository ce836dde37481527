"""The problems of the package `reasoning-gym`, by name."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redepth.errors import RedepthError, first_line

from .arrays import HELD_OUT_SHARE, MOST_DRAWS, is_held_out
from .protocol import SPLITS, Answer, Split, Task, TaskText, check_split


@dataclass(frozen=True)
class ReasoningGym(Task):
    """Text alone: no compact ids, and no intermediate result but the answer itself.

    A problem's difficulty is that of its metadata where it is one number there, and 1 elsewhere; so there is no split
    `harder` unless options ask for it in a spec of its own.

    Attributes:
        dataset: its name there.
        options: its own options and their values in text, passed on to it.
    """

    short_name: ClassVar[str] = "reasoning-gym"
    dataset: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def check(self) -> None:
        self._create(1, 0)

    @property
    def spec(self) -> str:
        options = "&".join(f"{name}={value}" for name, value in self.options)
        return f"task:{self.short_name}/{self.dataset}" + (f"?{options}" if options else "")

    def _create(self, size: int, seed: int) -> Any:
        try:
            import reasoning_gym
            import yaml
        except ImportError:
            raise RedepthError(
                f"{self.spec!r} needs the package reasoning-gym; install it with pip install 'redepth[eval]'"
            ) from None
        options = {name: yaml.safe_load(value) for name, value in self.options}
        try:
            return reasoning_gym.create_dataset(self.dataset, size=size, seed=seed, **options)
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            raise RedepthError(f"{self.spec!r} can't be made: {first_line(error)}") from None

    def texts(self, split: Split, count: int, seed: int = 0, questions: int = 1) -> list[TaskText]:
        """As every task, with one question each.

        Raises:
            RedepthError: for the split `harder`, several questions, or too few different problems.
        """
        check_split(split)
        if split == "harder":
            raise RedepthError(f"{self.spec!r} has no split 'harder'; write a second spec with harder options")
        if questions != 1:
            raise RedepthError(f"{self.spec!r} asks one question a problem, not {questions}")
        found: list[TaskText] = []
        share = 1 if split == "train" else HELD_OUT_SHARE
        for attempt in range(MOST_DRAWS):
            size = int((count - len(found)) * share * 1.2) + 8
            draw_seed = int(np.random.SeedSequence([seed, SPLITS.index(split), attempt]).generate_state(1)[0])
            for problem in self._create(size, draw_seed):
                codes = np.frombuffer(problem["question"].encode(), dtype=np.uint8)
                if len(found) < count and is_held_out(codes[None])[0] == (split != "train"):
                    found.append(_text_of(problem))
            if len(found) == count:
                return found
        raise RedepthError(f"{self.spec!r} has too few different problems for its split {split!r}; widen its options")

    def scratchpads(self, split: Split, count: int, seed: int = 0) -> list[TaskText]:
        raise RedepthError(f"{self.spec!r} has no intermediate results to write out")


def _text_of(problem: dict[str, Any]) -> TaskText:
    asked = problem["question"].rstrip() + "\nAnswer:"
    said = " " + str(problem["answer"])
    difficulty = problem.get("metadata", {}).get("difficulty")
    needed = difficulty if isinstance(difficulty, int) and not isinstance(difficulty, bool) else 1
    return TaskText(asked + said, (Answer(len(asked), len(asked) + len(said), needed, (said,)),))
