"""Everything that a run needs, checked and put together before its first step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import default_data_collator

from redepth.checkpoint.folder import read_recipe
from redepth.checkpoint.load import load, load_tokenizer, read_config
from redepth.data.mixture import columns_of, tasks_of, training_and_held_out
from redepth.data.survey import count_licenses
from redepth.errors import RedepthError, one_line
from redepth.modeling.tokens import check_ids
from redepth.runtime import has_bf16, keep_freed_memory

from .clock import Progress
from .distillation import open_teacher
from .memory import use_memory_savers
from .optim import check_optimizer, set_trainable
from .recipe import HealRecipe
from .trainer import HealTrainer, training_arguments

MADE: dict[str, int | None] = {"made for the run": None}  # problems of a task


@dataclass(frozen=True)
class Prepared:
    """
    Attributes:
        dtype: that the checkpoint is saved in.
    """

    trainer: HealTrainer
    bf16: bool
    dtype: torch.dtype


def survey_sources(recipe: HealRecipe, on_progress: Callable[[Progress], None]) -> list[dict[str, Any]]:
    """The record of the training text, all of which is read for it.

    Raises:
        RedepthError: naming the file and the row that can't be read.
    """
    columns = columns_of(recipe)
    stated = {source.data: source.license for _, sources in recipe.timetable() for source in sources}
    licenses: dict[str, dict[str, int | None]] = dict.fromkeys(tasks_of(recipe), MADE)
    for number, (data, column) in enumerate(columns.items()):

        def tell(share: float, before: int = number) -> None:
            on_progress(Progress("reading", (before + share) / len(columns)))

        licenses[data] = count_licenses(data, column, stated[data], tell)
    return [
        {
            "data": source.data,
            "weight": source.weight,
            "until": round(end, 6),
            "licenses": licenses.get(source.data, MADE),
        }
        for end, sources in recipe.timetable()
        for source in sources
    ]


def prepare(folder: Path, recipe: HealRecipe, work: Path, on_progress: Callable[[Progress], None]) -> Prepared:
    """The trainer of a run, with nothing written outside the work folder.

    Raises:
        RedepthError: for a checkpoint, recipe and machine that don't fit together.
    """
    config, _ = read_config(folder)
    read_recipe(folder)  # which the end adds to
    tokenizer = load_tokenizer(folder)
    if recipe.sequence_length > config.block_size:
        raise RedepthError(
            f"sequence_length {recipe.sequence_length} is more than the {config.block_size} tokens the model allows"
        )
    if recipe.precision == "bf16" and not has_bf16():
        raise RedepthError("precision bf16 asked for, but this processor has no bf16 matrix products; use auto or fp32")
    bf16 = recipe.precision != "fp32" and has_bf16()
    arguments = training_arguments(recipe, work, bf16)
    if arguments.n_gpu > 1:
        raise RedepthError(
            f"{arguments.n_gpu} GPUs are visible to one process; use torchrun --nproc-per-node {arguments.n_gpu} -m "
            "redepth heal …, or set CUDA_VISIBLE_DEVICES to one"
        )
    rows, held_out = training_and_held_out(tokenizer, recipe)
    check_ids(held_out, config.vocab_size, "the held-out text")

    if not torch.cuda.is_available():
        keep_freed_memory()
    model: Any = load(folder, torch.float32)
    use_memory_savers(model, recipe)
    teacher = None
    if recipe.distill:
        teacher = open_teacher(folder, recipe, config.vocab_size, torch.bfloat16 if bf16 else torch.float32)
        teacher.model.to(arguments.device)
    trained = set_trainable(model, recipe)
    check_optimizer(recipe, arguments, model)
    try:
        trainer = HealTrainer(
            recipe,
            # One process reports for all.
            on_progress if arguments.process_index == 0 else lambda record: None,
            held_out,
            teacher,
            model=trained,
            args=arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
        )
    except (RuntimeError, ValueError) as error:  # what Trainer raises for a tracker that is not there
        if recipe.report_to in ("auto", "none"):
            raise
        raise RedepthError(f"report_to {recipe.report_to!r}: {one_line(error)}") from None
    if trainer.is_fsdp_enabled and recipe.train == "lora":
        raise RedepthError(
            "train: lora can't be sharded by FSDP; run it without, by torchrun alone, or train core+adapter"
        )
    return Prepared(trainer, bf16, config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
