"""What healing leaves behind: the record of a run, and of those before it, beside the weights."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redepth.checkpoint.folder import HEALING_FILE, HEALING_LOG_FILE, read_json, read_jsonl, read_recipe
from redepth.errors import RedepthError

from .recipe import HealRecipe


@dataclass(frozen=True)
class Healing:
    """What a run did; kept as `healing.json` beside the weights, with its curve in `healing-log.jsonl`.

    Attributes:
        sources: of the training text: name, weight, phase, and documents by licence.
        flops: as planned; see `Preflight`.
        skipped_steps: optimiser steps that were left out, see `SpikeGuard`.
        run: tells this run from every other.
        earlier: the records of the runs that the checkpoint had gone through before, oldest first.
    """

    data: str
    sources: list[dict[str, Any]]
    tokens: int
    steps: int
    minutes: float
    flops: float
    precision: str
    seed: int
    skipped_steps: list[int]
    loss_before: dict[int, float]
    loss_after: dict[int, float]
    run: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)


def read_healing(folder: Path) -> Healing | None:
    """The record of a checkpoint's last run; None where it was never healed.

    Raises:
        RedepthError: for a file that is no such record.
    """
    values = read_json(folder / HEALING_FILE)
    if values is None:
        return None
    try:
        losses = {key: _by_depth(values[key]) for key in ("loss_before", "loss_after")}
        return Healing(**values | losses)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RedepthError(
            f"{folder / HEALING_FILE} is not the record of a healing run; restore or remove it"
        ) from None


def runs_of(healing: Healing | None) -> list[dict[str, Any]]:
    """The records of all runs, oldest first, as they go into the next one's `earlier`."""
    if healing is None:
        return []
    last = {key: value for key, value in asdict(healing).items() if key != "earlier"}
    return [*healing.earlier, last]


def read_heal_recipes(folder: Path) -> list[dict[str, Any]]:
    """The recipes of the runs that a checkpoint went through, oldest first."""
    recorded = read_recipe(folder).get("heal", [])
    return recorded if isinstance(recorded, list) else [recorded]


def recipe_record(folder: Path, recipe: HealRecipe) -> dict[str, Any]:
    """A checkpoint's `recipe.yaml` after one more run; several runs make a list of the section `heal`."""
    recipes = [*read_heal_recipes(folder), recipe.model_dump(mode="json")]
    return read_recipe(folder) | {"heal": recipes if len(recipes) > 1 else recipes[0]}


def curve_record(folder: Path, curve: list[dict[str, Any]], earlier_runs: int) -> list[dict[str, Any]]:
    """The lines of `healing-log.jsonl` after one more run; those of a second and later run say which it is."""
    if not earlier_runs:
        return curve
    return read_jsonl(folder / HEALING_LOG_FILE) + [{"run": earlier_runs + 1} | record for record in curve]


def _by_depth(losses: dict[Any, float]) -> dict[int, float]:
    return {int(depth): loss for depth, loss in losses.items()}
