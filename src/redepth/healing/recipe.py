"""What a healing run does: one table of defaults, filled by a YAML file and then by flags."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redepth.errors import RedepthError, first_line


class HealRecipe(BaseModel):
    """
    Attributes:
        data: `python-docs`, a .txt, .jsonl or .parquet file, or a `datasets` id.
        text_column: column of jsonl, parquet and hub data that holds the text.
        validation: held-out text, given like `data`; without it the first documents of `data` are held out.
        sequence_length: tokens in a row.
        batch_size: rows in an optimiser step.
        micro_batch_size: rows in memory at once.
        max_steps: optimiser steps.
        max_minutes: end after this time if that comes first; schedules then run on time.
        learning_rate, weight_decay, max_grad_norm: of AdamW.
        warmup, decay: fractions of the run; the rate rises linearly over the one and falls linearly over the other.
        mean_recurrence: mean of the sampled number of steps at the end of the curriculum.
        curriculum: how the mean gets there, from `curriculum_start` over `curriculum_fraction` of the run.
        backprop_depth: how many of the last steps carry a gradient.
        precision: `auto` is bf16 where the processor has it.
        eval_depths, eval_rows: numbers of steps, and held-out rows, of the losses before and after.
        save_every: optimiser steps between checkpoints to resume from.
        seed: of the data order, the sampled depths and the noise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "python-docs"
    text_column: str = "text"
    validation: str | None = None
    sequence_length: int = Field(512, ge=8)
    batch_size: int = Field(8, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    max_steps: int = Field(500, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    learning_rate: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    decay: float = Field(0.3, ge=0, le=1)
    mean_recurrence: float = Field(4.0, ge=1)
    curriculum: Literal["constant", "linear", "one-minus-sqrt"] = "one-minus-sqrt"
    curriculum_start: float = Field(1.0, ge=1)
    curriculum_fraction: float = Field(0.5, gt=0, le=1)
    backprop_depth: int = Field(8, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    eval_depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    eval_rows: int = Field(16, ge=1)
    save_every: int = Field(100, ge=1)
    seed: int = 0


def read_heal_recipe(file: str | Path | None = None, **changes: Any) -> HealRecipe:
    """The recipe in the `heal` section of a YAML file, with `changes` (those that are not None) laid over it.

    Raises:
        RedepthError: for a missing file or section, an unknown key, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    where = "healing recipe"
    if file is not None:
        where = str(file)
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RedepthError(f"recipe {where} does not exist; see recipes/ for examples") from None
        except yaml.YAMLError as error:
            raise RedepthError(f"recipe {where} is not valid YAML: {first_line(error)}") from None
        if not isinstance(content, dict) or not isinstance(content.get("heal"), dict):
            raise RedepthError(f"recipe {where} has no section 'heal'; put the healing settings under it")
        values = content["heal"]
    values = values | {key: value for key, value in changes.items() if value is not None}
    try:
        recipe = HealRecipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RedepthError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from None
    if recipe.batch_size % recipe.micro_batch_size:
        raise RedepthError(
            f"{where}: batch_size {recipe.batch_size} is not a multiple of micro_batch_size {recipe.micro_batch_size}"
        )
    return recipe
