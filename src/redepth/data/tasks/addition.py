"""Column addition: which digit is here once the carries have been added?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redepth.errors import RedepthError

from .arrays import END, ArrayTask, Problems
from .variables import ask_lines
from .words import digits


@dataclass(frozen=True)
class Addition(ArrayTask):
    """Two numbers of equal length are added; each place of the sum is a question.

    Difficulty is how many places to the right decide the carry into a place: one where the next pair of digits does it
    alone, one more for each pair in between that adds up to 9, none at the last place. After step i the result is the
    digit as it is if only the i places to its right are counted. In compact ids a token is the pair of digits of one
    place, from the last place to the first, and asks for its own digit.

    Attributes:
        places: digits of each number.
    """

    short_name: ClassVar[str] = "addition"
    core_reads_places: ClassVar[bool] = True
    depth: tuple[int, int] = (0, 8)
    places: int = 16

    def check(self) -> None:
        super().check()
        longest = max(self.depth[1], self.harder[1])
        if self.places < longest + 1:
            raise RedepthError(
                f"option places={self.places} of 'addition' must be at least {longest + 1}, one above the depth"
            )

    def usual_harder(self) -> tuple[int, int]:
        return self.depth[1] + 1, min(2 * self.depth[1], self.places - 1)

    @property
    def answer_words(self) -> list[str]:
        return digits(10)

    @property
    def other_words(self) -> list[str]:
        return [*(f"{one}+{other}" for one in range(10) for other in range(10)), *self._place_names(), END]

    def _place_names(self) -> list[str]:
        return [f"place-{place}" for place in range(self.places)]

    @property
    def usual_questions(self) -> int:
        return self.places

    def draw(self, rng: np.random.Generator, count: int, least: int, most: int, questions: int) -> Problems:
        places = self.places
        # Pairs that decide a carry give one as often as not, so that no guess is better than another.
        one, other = deciding_pairs(rng, (count, places))
        # Runs of pairs that add up to 9 hand a carry on; by chance alone they would hardly ever be long.
        runs = rng.random((count, places)) < rng.random((count, 1))
        runs[:, 0] = False
        digit = rng.integers(0, 10, (count, places))
        one, other = np.where(runs, digit, one), np.where(runs, 9 - digit, other)
        distance = carry_distance(one + other)
        for place in range(1, places):
            too_far = distance[:, place] > most
            one[too_far, place - 1], other[too_far, place - 1] = deciding_pairs(rng, (int(too_far.sum()),))
            distance = carry_distance(one + other)
        asked = ask_lines(rng, distance, least, most, questions)
        arrays = {"one": one, "other": other, "asked": asked}
        return Problems(np.concatenate([one, other], 1), np.take_along_axis(distance, asked, 1), arrays)

    def values(self, problems: Problems, num_steps: int) -> np.ndarray:
        """`[num_steps + 1, B, places]`: every place's digit after 0 … num_steps steps."""
        pair = problems["one"] + problems["other"]
        total, found = pair, [pair % 10]
        for _ in range(num_steps):
            # A place's carry, were the places more than so many steps to its right empty.
            carried = np.concatenate([np.zeros_like(pair[:, :1]), total[:, :-1] >= 10], 1)
            total = pair + carried
            found.append(total % 10)
        return np.stack(found)

    def results(self, problems: Problems, num_steps: int) -> np.ndarray:
        asked = np.broadcast_to(problems["asked"], (num_steps + 1, *problems["asked"].shape))
        return np.take_along_axis(self.values(problems, num_steps), asked, 2)

    def statement(self, problems: Problems) -> np.ndarray:
        return 10 + 10 * problems["one"] + problems["other"]

    def places_in_statement(self, problems: Problems) -> np.ndarray:
        return problems["asked"]

    def asked(self, problems: Problems) -> np.ndarray:
        return 110 + problems["asked"][..., None]

    def scratchpad(self, problems: Problems) -> tuple[np.ndarray, np.ndarray]:
        """The digits from the last place to the one that is asked for."""
        right = self.values(problems, self.places)[-1]
        asked = problems["asked"]
        return np.broadcast_to(right[:, None], (*asked.shape, self.places)), asked + 1

    def say_statement(self, problems: Problems, row: int) -> str:
        return "+".join("".join(map(str, problems[name][row, ::-1])) for name in ("one", "other"))

    def say_question(self, problems: Problems, row: int, question: int) -> str:
        """Places are counted from the right, the last one being 0."""
        return f"place {problems['asked'][row, question]} ->"

    def say(self, result: int) -> str:
        return str(result)


def deciding_pairs(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two digits for each entry of `shape` that add up to 10 or more, or to 8 or less, with even odds."""
    low, share = rng.integers(0, 9, shape), rng.random(shape)
    # one + other ≤ 8, and the same with both taken from 9 where there is a carry.
    other = (share * (9 - low)).astype(int)
    carries = rng.random(shape) < 0.5
    return np.where(carries, 9 - low, low), np.where(carries, 9 - other, other)


def carry_distance(pair: np.ndarray) -> np.ndarray:
    """`[B, places]`: how many places to the right decide each place's carry, from the sums of the pairs of digits."""
    distance = np.zeros_like(pair)
    for place in range(1, pair.shape[1]):
        handed_on = (pair[:, place - 1] == 9) & (place > 1)
        distance[:, place] = 1 + np.where(handed_on, distance[:, place - 1], 0)
    return distance
