"""Arithmetic circuits: what does this gate give?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redepth.errors import RedepthError

from .arrays import END, ArrayTask, Problems
from .variables import ask_lines, pick_source
from .words import digits, letters


@dataclass(frozen=True)
class Circuits(ArrayTask):
    """Inputs such as `C=2`, then gates such as `F=C+A` and `H=F*C`, each using what stands above it, modulo a number.

    Difficulty is the depth of the gate. After step i the result is the gate's value as it is if all gates held 0 before
    and were then worked out i times at once, each from what the others held; the right one from step `depth` on. In
    compact ids each gate asks for itself, at its last token.

    Attributes:
        inputs, gates: how many a problem has.
        modulus: values are from 0 to modulus − 1.
    """

    short_name: ClassVar[str] = "circuits"
    inputs: int = 4
    gates: int = 16
    modulus: int = 3

    def check(self) -> None:
        super().check()
        letters(self.inputs + self.gates)
        longest = max(self.depth[1], self.harder[1])
        if self.gates < longest or self.depth[0] < 1:
            raise RedepthError(
                f"options depth={self.depth[0]}-{self.depth[1]} and gates={self.gates} of 'circuits' don't fit; depth starts "
                f"at 1 and needs a gate for each (here {longest})"
            )
        if self.inputs < 1:
            raise RedepthError(f"option inputs={self.inputs} of 'circuits' must be at least 1")
        if not 2 <= self.modulus <= 10:
            raise RedepthError(
                f"option modulus={self.modulus} of 'circuits' must be from 2 to 10, so that values are digits"
            )

    def usual_harder(self) -> tuple[int, int]:
        return self.depth[1] + 1, min(2 * self.depth[1], self.gates)

    @property
    def answer_words(self) -> list[str]:
        return digits(self.modulus)

    @property
    def other_words(self) -> list[str]:
        return [*letters(self.inputs + self.gates), "=", "+", "*", END]

    @property
    def usual_questions(self) -> int:
        return self.gates

    def draw(self, rng: np.random.Generator, count: int, least: int, most: int, questions: int) -> Problems:
        inputs, things = self.inputs, self.inputs + self.gates
        depth = np.zeros((count, things), dtype=int)
        left, right = np.zeros((2, count, self.gates), dtype=int)
        eagerness = rng.random((count, 1)) * 2
        for gate in range(self.gates):
            so_far = depth[:, : inputs + gate]
            left[:, gate] = pick_source(rng, so_far, most, eagerness)
            right[:, gate] = pick_source(rng, so_far, most, np.zeros((count, 1)))
            used = np.stack([left[:, gate], right[:, gate]], 1)
            depth[:, inputs + gate] = np.take_along_axis(so_far, used, 1).max(1) + 1
        asked = ask_lines(rng, depth[:, inputs:], least, most, questions)
        arrays = {
            "name": rng.random((count, things)).argsort(1),
            "input": rng.integers(0, self.modulus, (count, inputs)),
            "times": rng.integers(0, 2, (count, self.gates)),
            "left": left,
            "right": right,
            "asked": asked,
        }
        content = np.concatenate([arrays[name] for name in ("name", "input", "times", "left", "right")], 1)
        return Problems(content, np.take_along_axis(depth[:, inputs:], asked, 1), arrays)

    def values(self, problems: Problems, num_steps: int) -> np.ndarray:
        """`[num_steps + 1, B, gates]`: every gate's result after 0 … num_steps steps."""
        found = [np.zeros_like(problems["left"])]
        for _ in range(num_steps):
            held = np.concatenate([problems["input"], found[-1]], 1)
            one, other = (np.take_along_axis(held, problems[side], 1) for side in ("left", "right"))
            found.append(np.where(problems["times"] == 1, one * other, one + other) % self.modulus)
        return np.stack(found)

    def results(self, problems: Problems, num_steps: int) -> np.ndarray:
        asked = np.broadcast_to(problems["asked"], (num_steps + 1, *problems["asked"].shape))
        return np.take_along_axis(self.values(problems, num_steps), asked, 2)

    def statement(self, problems: Problems) -> np.ndarray:
        names, signs = self.modulus + problems["name"], self.modulus + self.inputs + self.gates
        of_inputs = names[:, : self.inputs]
        given = np.stack([of_inputs, np.full_like(of_inputs, signs), problems["input"]], 2)
        used = [np.take_along_axis(names, problems[side], 1) for side in ("left", "right")]
        gates = np.stack([names[:, self.inputs :], used[0], signs + 1 + problems["times"], used[1]], 2)
        return np.concatenate([given.reshape(len(problems), -1), gates.reshape(len(problems), -1)], 1)

    def places_in_statement(self, problems: Problems) -> np.ndarray:
        return 3 * self.inputs + 4 * problems["asked"] + 3

    def asked(self, problems: Problems) -> np.ndarray:
        return self.modulus + np.take_along_axis(problems["name"], self.inputs + problems["asked"], 1)[..., None]

    def scratchpad(self, problems: Problems) -> tuple[np.ndarray, np.ndarray]:
        """The values of all gates in order, up to the one that is asked for."""
        right = self.values(problems, self.gates)[-1]
        asked = problems["asked"]
        return np.broadcast_to(right[:, None], (*asked.shape, self.gates)), asked + 1

    def say_statement(self, problems: Problems, row: int) -> str:
        names = [letters(self.inputs + self.gates)[name] for name in problems["name"][row]]
        said = [f"{name}={value}" for name, value in zip(names, problems["input"][row], strict=False)]
        for gate, name in enumerate(names[self.inputs :]):
            one, other = (names[problems[side][row, gate]] for side in ("left", "right"))
            said.append(f"{name}={one}{'+*'[problems['times'][row, gate]]}{other}")
        return "\n".join([f"modulo {self.modulus}:", *said])

    def say_question(self, problems: Problems, row: int, question: int) -> str:
        thing = self.inputs + problems["asked"][row, question]
        return f"{letters(self.inputs + self.gates)[problems['name'][row, thing]]} ->"

    def say(self, result: int) -> str:
        return str(result)
