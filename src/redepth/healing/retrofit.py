"""A retrofit: convert, heal, calibrate and evaluate as one recipe, each part done once."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from redepth.checkpoint.card import write_card
from redepth.checkpoint.folder import (
    EVALUATION_FILE,
    RECIPE_FILE,
    VERIFICATION_FILE,
    CheckpointFolder,
    read_json,
    read_recipe,
    write_json,
)
from redepth.checkpoint.load import load_tokenizer, read_config
from redepth.data.mixture import training_and_held_out
from redepth.data.source import PYTHON_DOCS
from redepth.errors import RedepthError
from redepth.evaluation.calibrate import calibrate
from redepth.evaluation.held_out import Evaluation, evaluate_held_out
from redepth.surgery.convert import plan_conversion
from redepth.surgery.plan import DEFAULT_ADAPTER, DEFAULT_STATE
from redepth.surgery.verify import verify

from .clock import Progress
from .heal import finished_run, heal
from .preflight import Preflight
from .recipe import HealRecipe, fill, heal_runs, laid_over, read_yaml
from .record import read_heal_recipes

# Written by redepth into a checkpoint's recipe.yaml, which is a recipe itself.
RECORDS = {"source", "made_with"}
SECTIONS = {"convert", "heal", "calibrate", "evaluate"}


class ConvertRecipe(BaseModel):
    """The section `convert`: the arguments of `redepth.convert`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    prelude: str | None = None
    core: str | None = None
    coda: str | None = None
    revision: str | None = None
    family: str | None = None
    adapter: str = DEFAULT_ADAPTER
    state: str = DEFAULT_STATE
    dtype: str | None = None
    tie: bool | None = None
    seed: int = 0


class EvaluateRecipe(BaseModel):
    """The section `evaluate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depths: tuple[int, ...] = Field((1, 2, 4, 8, 16, 32), description="numbers of steps")
    rows: int | None = Field(None, ge=1, description="held-out rows; the healing's by default")


class CalibrateRecipe(BaseModel):
    """The section `calibrate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    most_steps: int | None = Field(None, ge=2, description="the deepest r; twice the trained depth by default")
    rows: int = Field(8, ge=1, description="of the healing's held-out rows, at most")


@dataclass(frozen=True)
class RetrofitRecipe:
    """
    Attributes:
        heal: the runs, in turn.
    """

    convert: ConvertRecipe
    heal: tuple[HealRecipe, ...]
    calibrate: CalibrateRecipe
    evaluate: EvaluateRecipe


def read_retrofit_recipe(file: str | Path, **changes: Any) -> RetrofitRecipe:
    """A recipe file's sections, with `changes` (those that are not None) laid over `heal`.

    Raises:
        RedepthError: for a missing file or section, an unknown section or key, or a value that does not fit.
    """
    content = read_yaml(file)
    unknown = set(content) - SECTIONS - RECORDS
    if unknown:
        raise RedepthError(
            f"recipe {file} has an unknown section {min(map(str, unknown))!r}; use {', '.join(sorted(SECTIONS))}"
        )
    if not isinstance(content.get("convert"), dict):
        raise RedepthError(f"recipe {file} has no section 'convert'; name the source in it")
    runs = heal_runs(content, file)
    if len(runs) > 1 and any(value is not None for value in changes.values()):
        raise RedepthError(f"recipe {file} has {len(runs)} runs in its section 'heal'; change them there, not by flags")
    return RetrofitRecipe(
        fill(ConvertRecipe, content["convert"], f"{file}: convert"),
        tuple(fill(HealRecipe, laid_over(run, changes), f"{file}: heal") for run in runs),
        fill(CalibrateRecipe, content.get("calibrate") or {}, f"{file}: calibrate"),
        fill(EvaluateRecipe, content.get("evaluate") or {}, f"{file}: evaluate"),
    )


def retrofit(
    recipe: RetrofitRecipe,
    out: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    on_preflight: Callable[[Preflight], None] | None = None,
) -> Evaluation:
    """Convert, verify, heal, calibrate and evaluate into `out`; what an earlier call has finished is not repeated.

    Raises:
        RedepthError: where a part fails, or `out` holds what another recipe made.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RedepthError("retrofit is for one process; convert first, then run redepth heal in several")
    target = CheckpointFolder(out)
    folder = target.path
    tell = on_progress or (lambda record: None)
    with target.locked():
        _convert(recipe.convert, folder, tell)
        finished_run(target)
        done = [fill(HealRecipe, run, f"{folder / RECIPE_FILE}: heal") for run in read_heal_recipes(folder)]
        if tuple(done) != recipe.heal[: len(done)]:
            raise RedepthError(f"{folder} was healed by another recipe; give another folder")
        for number in range(len(done), len(recipe.heal)):
            heal(folder, recipe.heal[number], on_progress=tell, on_preflight=on_preflight, further=number > 0)
        if read_config(folder)[0].depth_profile is None:
            _calibrate(recipe, folder, tell)
        return _evaluate(recipe, folder, tell)


def _convert(recipe: ConvertRecipe, folder: Path, tell: Callable[[Progress], None]) -> None:
    conversion = plan_conversion(**recipe.model_dump())
    if not (folder / "config.json").exists():
        conversion.write(folder, on_tensor=lambda done, total: tell(Progress("convert", done / total)))
    elif read_recipe(folder).get("convert") != conversion.recipe()["convert"]:
        raise RedepthError(f"{folder} holds another conversion; give another folder")
    if not (folder / VERIFICATION_FILE).exists():
        tell(Progress("verify", 0.0))
        if not verify(folder, conversion.source).passed:
            (folder / VERIFICATION_FILE).unlink()
            raise RedepthError(f"{folder} does not pass verification; redepth verify {folder} shows the figures")
        tell(Progress("verify", 1.0))


def held_out_texts(healing: HealRecipe, folder: Path, texts: int = 2, tokens: int = 96) -> list[str]:
    """The beginnings of some of the healing's held-out rows, in words."""
    rows, _ = _held_out(healing, folder)
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(row[:tokens], skip_special_tokens=True) for row in rows[:texts]]


def _held_out(healing: HealRecipe, folder: Path) -> tuple[torch.Tensor, str]:
    """The healing's held-out rows, `[eval_rows, tokens]`, and what they are of."""
    _, rows = training_and_held_out(load_tokenizer(folder), healing)
    return rows, healing.validation or f"held-out documents of {healing.data_names}"


def _calibrate(recipe: RetrofitRecipe, folder: Path, tell: Callable[[Progress], None]) -> None:
    held_out, name = _held_out(recipe.heal[-1], folder)
    calibrate(
        folder,
        held_out[: recipe.calibrate.rows],
        name,
        recipe.calibrate.most_steps,
        device="auto",
        on_row=lambda number, total: tell(Progress("calibrate", number / total)),
    )


def _evaluate(recipe: RetrofitRecipe, folder: Path, tell: Callable[[Progress], None]) -> Evaluation:
    wanted, healing = recipe.evaluate, recipe.heal[-1]
    rows = wanted.rows or healing.eval_rows
    if rows > healing.eval_rows and healing.validation is None and healing.data_names != PYTHON_DOCS:
        raise RedepthError(
            f"evaluate: rows = {rows} would reach into the training text, of which {healing.eval_rows} rows are held "
            "out; name held-out text with heal's validation"
        )
    done = read_json(folder / EVALUATION_FILE)
    if done is not None and done["rows"] == rows and set(done["loss"]) == set(map(str, wanted.depths)):
        return Evaluation(**done | {"loss": {int(depth): loss for depth, loss in done["loss"].items()}})
    held_out, name = _held_out(healing.model_copy(update={"eval_rows": rows}), folder)
    evaluation = evaluate_held_out(
        folder,
        held_out,
        name,
        wanted.depths,
        on_row=lambda number, total: tell(Progress("evaluate", number / total)),
    )
    with CheckpointFolder(folder).updating() as stage:
        write_json(stage / EVALUATION_FILE, asdict(evaluation))
        write_card(stage, base=folder)
    return evaluation
