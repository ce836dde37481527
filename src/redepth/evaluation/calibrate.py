"""Choosing r: what each step of depth buys, measured once and kept in the checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from redepth.checkpoint.card import write_card
from redepth.checkpoint.folder import CONFIG_FILE, CheckpointFolder, read_json, write_json
from redepth.checkpoint.load import load, local_checkpoint
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.exit_heads import features, to_text
from redepth.modeling.exits import EXIT_TESTS, ExitTest, find_exit_test
from redepth.modeling.tokens import check_numbers

from .exit_heads import fit_head, main_directions

WANTED_AGREEMENTS = {"99%": 0.99, "95%": 0.95}
ENOUGH = 0.005  # nats: the default depth is the shallowest whose loss is this close to the lowest
SOUND = 0.1  # nats: depths whose loss is this close to the lowest are in the valid range
CANDIDATES = 400  # thresholds tried for each test
TOKENS_AT_ONCE = 64  # whose logits are widened to fp32


@dataclass
class Measurement:
    """What one pass over the text gives: sums over tokens by step, and each token's course over the steps. R steps, N tokens.

    Attributes:
        tests: by name, those whose courses were followed.
        losses, divergences: `[R]`, summed over tokens, in nats; divergences are KL(p_R ‖ p_i).
        picks: for each row of text `[R, tokens]`, the likeliest token after each step.
        courses: by test, for each row of text `[R − 1, tokens]`, its measure at steps 2 … R.
        directions: of the exit heads, `[K, D]`; None where there is no second step.
        features: for each row of text `[R − 1, tokens, K + 1]`, what the exit heads look at.
    """

    tests: dict[str, ExitTest]
    losses: torch.Tensor
    divergences: torch.Tensor
    predicted: int = 0
    picks: list[torch.Tensor] = field(default_factory=list)
    directions: torch.Tensor | None = None
    features: list[torch.Tensor] = field(default_factory=list)
    courses: dict[str, list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.courses = {name: [] for name in self.tests}


def calibrated_tests(criteria: Sequence[str] | None = None) -> dict[str, ExitTest]:
    """redepth's own exit tests and those of `criteria`, by the names under which their thresholds are stored.

    Raises:
        ValueError: as `find_exit_test`.
    """
    return EXIT_TESTS | {name: find_exit_test(name) for name in criteria or ()}


@torch.no_grad()
def measure_depths(
    model: RecurrentDepthForCausalLM,
    tokens: torch.Tensor,
    most_steps: int,
    on_row: Callable[[int, int], None] | None = None,
    tests: dict[str, ExitTest] = EXIT_TESTS,
) -> Measurement:
    """Iterate the core to `most_steps` once, and run coda and head after every step.

    Args:
        tokens: `[rows, tokens]`, without padding.
        on_row: called with (rows done, rows in all).

    Raises:
        RedepthError: for a loss that is not finite.
        ValueError: where the model's logits are NaN.
    """
    found = Measurement(tests, *torch.zeros(2, most_steps, dtype=torch.float64))
    for row, ids in enumerate(tokens.to(model.device).split(1), 1):
        states = list(model.states_by_step(ids, most_steps))
        deepest = _logits_of(model, states[-1])
        picks: list[torch.Tensor] = []
        courses: dict[str, list[torch.Tensor]] = {name: [] for name in tests}
        old = None
        for step in range(1, most_steps + 1):
            logits = _logits_of(model, states[step]) if step < most_steps else deepest
            loss, divergence = _loss_and_divergence(logits, deepest, ids[0, 1:])
            if not math.isfinite(loss):
                raise RedepthError(
                    f"the loss of row {row} after {step} steps is {loss}, so there is nothing to compare; stay below that "
                    "with --most-steps, or look at the checkpoint"
                )
            found.losses[step - 1] += loss
            found.divergences[step - 1] += divergence
            picks.append(logits.argmax(-1).cpu())
            if old is not None:
                for name, test in tests.items():
                    new_old = (logits, old) if test.of_logits else (states[step][0], states[step - 1][0])
                    parts = zip(*(tensor.split(TOKENS_AT_ONCE) for tensor in new_old), strict=True)
                    courses[name].append(torch.cat([test.compare(a.float(), b.float()) for a, b in parts]).cpu())
            old = logits
        found.picks.append(torch.stack(picks))
        if most_steps > 1:
            if found.directions is None:
                found.directions = main_directions([state[0] for state in states[1:]])
            pairs = zip(states[2:], states[1:-1], strict=True)
            seen = [features(new[0].float(), old[0].float(), found.directions) for new, old in pairs]
            found.features.append(torch.stack(seen).cpu())
        for name, course in courses.items():
            found.courses[name].append(torch.stack(course) if course else torch.zeros(0, ids.shape[1]))
        found.predicted += ids.shape[1] - 1
        if on_row is not None:
            on_row(row, len(tokens))
    return found


def _logits_of(model: RecurrentDepthForCausalLM, state: torch.Tensor) -> torch.Tensor:
    """`[T, V]` from a state `[1, T, D]`, in the model's dtype."""
    logits = model.predict_from_latents(state).logits
    assert logits is not None
    check_numbers(logits)
    return logits[0]


def _loss_and_divergence(logits: torch.Tensor, deepest: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Summed over tokens, in nats, made in fp32 for a few tokens at a time.

    Args:
        logits, deepest: `[T, V]`.
        targets: `[T − 1]`, the tokens that follow.
    """
    loss = divergence = 0.0
    for first in range(0, len(logits), TOKENS_AT_ONCE):
        part = slice(first, first + TOKENS_AT_ONCE)
        log_p, log_deepest = (F.log_softmax(table[part].float(), dim=-1) for table in (logits, deepest))
        divergence += F.kl_div(log_p, log_deepest, reduction="sum", log_target=True).item()
        loss += F.nll_loss(log_p[: len(targets[part])], targets[part], reduction="sum").item()
    return loss, divergence


def exit_steps(test: ExitTest, course: torch.Tensor, threshold: float) -> torch.Tensor:
    """The step after which each token leaves, as `ExitTracker` decides it.

    Args:
        course: `[R − 1, tokens]`, the test's measure at steps 2 … R.

    Returns:
        `[tokens]`, from 2 to R (1 where there is no second step).
    """
    streak_needed = test.streak if test.streak is not None else threshold
    passed = course < (threshold if test.streak is not None else 0.5)
    streak = torch.zeros(course.shape[1])
    left = torch.full((course.shape[1],), len(course) + 1)
    for step, ok in enumerate(passed, 2):
        streak = torch.where(ok, streak + 1, 0.0)
        left = torch.where((left == len(course) + 1) & (streak >= streak_needed), step, left)
    return left


def _candidates(test: ExitTest, course: torch.Tensor) -> list[float]:
    """Thresholds from the strictest to the loosest."""
    if test.streak is None:
        return [float(count) for count in range(len(course), 0, -1)]
    values = course[(course > 0) & course.isfinite()]
    if not len(values):
        return []
    low, high = float(values.min().log10()), float(values.max().log10())
    return torch.logspace(low - 0.01, high + 0.01, CANDIDATES, dtype=torch.float64).tolist()


def loosest_threshold(
    test: ExitTest, course: torch.Tensor, picks: torch.Tensor, wanted: float
) -> tuple[float | None, float | None]:
    """The loosest threshold at which, and at every stricter one, tokens leave with the deepest step's pick often enough.

    Args:
        course, picks: `[R − 1, tokens]` and `[R, tokens]`.
        wanted: share of tokens.

    Returns:
        the threshold and the mean steps there; None and None where no threshold does.
    """
    best: tuple[float | None, float | None] = (None, None)
    for threshold in _candidates(test, course):
        left = exit_steps(test, course, threshold)
        agreement = (picks.gather(0, (left - 1)[None])[0] == picks[-1]).double().mean()
        if agreement < wanted:
            break
        best = (float(f"{threshold:.3g}"), float(left.double().mean()))
    return best


def depth_profile(found: Measurement, data: str) -> dict[str, Any]:
    """What is stored in the checkpoint; lists are by number of steps, from 1.

    Threshold figures are from whole rows run to the deepest step: they leave out the effect of an exited token's keys
    and values standing in for its
    deeper ones.
    """
    picks = torch.cat(found.picks, dim=1)
    loss = (found.losses / found.predicted).tolist()
    lowest = min(loss)
    default = next(step for step, value in enumerate(loss, 1) if value <= lowest + ENOUGH)
    least = most = default
    while least > 1 and loss[least - 2] <= lowest + SOUND:
        least -= 1
    while most < len(loss) and loss[most] <= lowest + SOUND:
        most += 1
    thresholds: dict[str, dict[str, float | None]] = {}
    mean_steps: dict[str, dict[str, float | None]] = {}
    rates = {}
    for name, test in found.tests.items():
        course = torch.cat(found.courses[name], dim=1)
        chosen = {label: loosest_threshold(test, course, picks, wanted) for label, wanted in WANTED_AGREEMENTS.items()}
        thresholds[name] = {label: threshold for label, (threshold, _) in chosen.items()}
        mean_steps[name] = {label: steps and round(steps, 2) for label, (_, steps) in chosen.items()}
        left = exit_steps(test, course, test.threshold)
        rates[name] = [round(float((left <= step).double().mean()), 4) for step in range(1, len(loss) + 1)]
    return {
        "num_steps": default,
        "valid_range": [least, most],
        "loss": [round(value, 5) for value in loss],
        "kl_to_deepest": [
            float(f"{value:.4g}") for value in (found.divergences / picks.shape[1]).clamp(min=0).tolist()
        ],
        "agreement": [round(float((row == picks[-1]).double().mean()), 4) for row in picks],
        "thresholds": thresholds,
        "mean_steps": mean_steps,
        "exit_rates": rates,
        "exit_heads": fitted_heads(found, picks),
        "tokens": picks.shape[1],
        "data": data,
    }


def fitted_heads(found: Measurement, picks: torch.Tensor) -> dict[str, Any] | None:
    """An exit head for each test of logits, with its own thresholds; None where there is no second step.

    Args:
        picks: `[R, tokens]`.
    """
    if found.directions is None:
        return None
    directions, seen = found.directions.cpu(), torch.cat(found.features, dim=1)
    tests: dict[str, Any] = {}
    for name, test in found.tests.items():
        if not test.of_logits:
            continue
        measured = torch.cat(found.courses[name], dim=1)
        head = fit_head(test, directions, seen.flatten(0, 1), measured.flatten())
        as_test = replace(test, of_logits=False, measure=head, streak=1, remembers=None)
        course = seen @ head.weights
        chosen = {
            label: loosest_threshold(as_test, course, picks, wanted) for label, wanted in WANTED_AGREEMENTS.items()
        }
        tests[name] = {
            "weights": [float(f"{weight:.4g}") for weight in head.weights.tolist()],
            "thresholds": {label: threshold for label, (threshold, _) in chosen.items()},
            "mean_steps": {label: steps and round(steps, 2) for label, (_, steps) in chosen.items()},
        }
    return {"directions": to_text(directions), "tests": tests}


def calibrate(
    checkpoint: str | Path,
    tokens: torch.Tensor,
    data: str,
    most_steps: int | None = None,
    criteria: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    on_row: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint at every depth and store the result in its config, as `depth_profile`.

    Args:
        checkpoint: local folder.
        tokens: held-out text, `[rows, tokens]`.
        data: what the text is, for the record.
        most_steps: the deepest r; by default twice the trained depth, at least 16.
        criteria: exit tests beside redepth's own, by registered name or import path.

    Returns:
        the profile: `num_steps`, the default from now on; `valid_range`; `thresholds` and the `mean_steps` they take,
        by exit test and wanted agreement with the deepest step; and by number of steps `loss`, `kl_to_deepest`,
        `agreement` and `exit_rates` at the tests' default thresholds; `exit_heads`, which stand in for tests of logits.

    Raises:
        RedepthError: for a checkpoint that is not a local folder, most_steps below 2, or losses that are not finite.
    """
    tests = calibrated_tests(criteria)
    folder = local_checkpoint(checkpoint)
    model: Any = load(checkpoint, dtype, device)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise RedepthError(f"checkpoint {str(checkpoint)!r} has no depth to calibrate; convert it first")
    steps = most_steps if most_steps is not None else max(2 * model.config.mean_recurrence, 16)
    if steps < 2:
        raise RedepthError(f"most_steps must be at least 2, got {steps}; there is nothing to compare")
    profile = depth_profile(measure_depths(model, tokens, steps, on_row, tests), data)
    with CheckpointFolder(folder).updating() as stage:
        write_json(stage / CONFIG_FILE, (read_json(folder / CONFIG_FILE) or {}) | {"depth_profile": profile})
        write_card(stage, base=folder)
    return profile
