"""The healing run from end to end: prepare, look before, train, look after, save."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import default_data_collator

from redepth.checkpoint.card import write_card
from redepth.checkpoint.folder import (
    HEALING_FILE,
    read_json,
    read_recipe,
    recover,
    whole_folder,
    write_json,
    write_jsonl,
    write_recipe,
)
from redepth.checkpoint.load import load, load_tokenizer, read_config
from redepth.data.mixture import training_and_held_out
from redepth.data.survey import count_licenses
from redepth.data.tasks import is_task
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.runtime import has_bf16, keep_freed_memory

from .checkpoints import last_whole, sweep
from .distillation import open_teacher
from .optim import check_optimizer, set_trainable
from .preflight import Preflight, preflight
from .recipe import HealRecipe
from .trainer import HealTrainer, Progress, training_arguments, use_memory_savers

WORK_FOLDER = "healing"
BEFORE_FILE = "before.json"
LOG_FILE = "healing-log.jsonl"
MADE: dict[str, int | None] = {"made for the run": None}  # problems of a task
# What may change when a run is taken up again: it has no part in what is learnt, or only rounds differently.
FREE_TO_CHANGE = {
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
    "eval_every",
    "save_every",
    "report_to",
    "max_skipped",
}


@dataclass(frozen=True)
class Healing:
    """What a run did; kept as `healing.json` beside the weights, with its curve in `healing-log.jsonl`.

    Attributes:
        sources: of the training text: name, weight, phase, and documents by licence.
        flops: as planned; see `Preflight`.
        skipped_steps: optimiser steps that were left out, see `SpikeGuard`.
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


class HealingInterrupted(RedepthError):
    """A run that SIGTERM ended early, with a checkpoint to go on from."""

    exit_code = 143


@dataclass(frozen=True)
class _Prepared:
    trainer: HealTrainer
    sources: list[dict[str, Any]]
    bf16: bool
    dtype: torch.dtype


def _prepare(folder: Path, recipe: HealRecipe, work: Path, on_progress: Callable[[Progress], None]) -> _Prepared:
    """Everything that a run needs, checked, with nothing written outside the work folder."""
    config, _ = read_config(folder)
    if (folder / HEALING_FILE).exists():
        raise RedepthError(f"{folder} is healed already; convert its source again, or heal another folder")
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
    sources = _sources(recipe)
    rows, held_out = training_and_held_out(tokenizer, recipe)

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
            # One process speaks for all.
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
        raise RedepthError(f"report_to {recipe.report_to!r}: {' '.join(str(error).split())}") from None
    return _Prepared(trainer, sources, bf16, config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)


def _losses(prepared: _Prepared, part: str) -> dict[int, float]:
    trainer = prepared.trainer
    return trainer.held_out_losses(on_row=lambda done, total: trainer.on_progress(Progress(part, done / total)))


def _preflight(prepared: _Prepared, loss_before: dict[int, float]) -> Preflight:
    trainer = prepared.trainer
    batch = next(iter(torch.utils.data.DataLoader(trainer.train_dataset, trainer.args.per_device_train_batch_size)))
    model: Any = trainer.model
    return preflight(
        model,
        trainer.plain_model().config,
        trainer.recipe,
        batch,
        loss_before,
        trainer.teacher,
        prepared.bf16,
        processes=trainer.args.world_size,
        # A model that is to be sharded may not fit in one place.
        measure=not trainer.is_fsdp_enabled,
    )


def plan_healing(
    checkpoint: str | Path, recipe: HealRecipe | None = None, on_progress: Callable[[Progress], None] | None = None
) -> Preflight:
    """What `heal` would do, without doing it; nothing is left behind.

    Raises:
        RedepthError: as `heal`.
    """
    with tempfile.TemporaryDirectory(prefix="redepth-") as work:
        quiet = (recipe or HealRecipe()).model_copy(update={"report_to": "none"})
        prepared = _prepare(Path(checkpoint), quiet, Path(work), on_progress or (lambda record: None))
        return _preflight(prepared, _losses(prepared, "loss before"))


def heal(
    checkpoint: str | Path,
    recipe: HealRecipe | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_preflight: Callable[[Preflight], None] | None = None,
) -> Healing:
    """Train a recurrent checkpoint so that it makes use of its depth.

    Checkpoints to resume from lie in `healing/` inside the folder while the run goes on; the same call after an
    interruption goes on from the last whole one and gives what the unbroken run would have given. At the end the healed
    model takes its place, written whole.

    Args:
        checkpoint: folder of a recurrent checkpoint: converted, new or published.
        recipe: the defaults of `HealRecipe` if left out.
        out: folder for the healed model, instead of healing in place.
        on_progress: called with each record of the run.
        on_preflight: called once, before the training, unless the run is taken up again.

    Raises:
        RedepthError: for a checkpoint, data or recipe that does not fit, or a run that goes wrong step after step.
        HealingInterrupted: after SIGTERM.
    """
    recipe = recipe or HealRecipe()
    folder = Path(checkpoint)
    target = Path(out) if out is not None else folder
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        recover(target)
    if target != folder and target.exists():
        raise RedepthError(f"{target} already exists; give another folder for the healed model")
    work = folder / WORK_FOLDER
    settings = recipe.model_dump(mode="json")
    begun = read_json(work / BEFORE_FILE)
    if begun is not None:
        changed = [key for key in settings if key not in FREE_TO_CHANGE and begun["recipe"].get(key) != settings[key]]
        if changed:
            raise RedepthError(
                f"{work} holds a run with another recipe, {changed[0]} = {begun['recipe'].get(changed[0])!r}; finish "
                "that one, or remove the folder to start over"
            )
    with ExitStack() as stack:
        if begun is None and is_first:
            # What goes wrong before the first checkpoint leaves nothing behind.
            stack.callback(_remove_unless_begun, work)
        prepared = _prepare(folder, recipe, work, on_progress or (lambda record: None))
        trainer = prepared.trainer
        if begun is None:
            plan = _preflight(prepared, _losses(prepared, "loss before"))
            if on_preflight is not None and is_first:
                on_preflight(plan)
            begun = {"recipe": settings, "loss_before": plan.loss_before, "flops": plan.flops}
            if is_first:
                work.mkdir(exist_ok=True)
                write_json(work / BEFORE_FILE, begun)

    last = last_whole(work, trainer.say)
    trainer.accelerator.wait_for_everyone()
    if is_first:
        sweep(work)
    trainer.accelerator.wait_for_everyone()
    trainer.resume(last)
    if trainer.clock.terminated and trainer.clock.progress < 1:
        raise HealingInterrupted(
            f"stopped by SIGTERM after step {trainer.state.global_step}, which is saved; the same command goes on"
        )

    after = _losses(prepared, "loss after")
    healing = Healing(
        data=recipe.data_names,
        sources=prepared.sources,
        tokens=trainer.state.global_step * recipe.batch_size * recipe.sequence_length,
        steps=trainer.state.global_step,
        minutes=trainer.clock.elapsed / 60,
        flops=begun["flops"],
        precision="bf16" if prepared.bf16 else "fp32",
        seed=recipe.seed,
        skipped_steps=trainer.guard.skipped,
        loss_before={int(depth): loss for depth, loss in begun["loss_before"].items()},
        loss_after=after,
    )
    model = trainer.whole_model()
    if is_first:
        _save(model.to(prepared.dtype), folder, target, healing, recipe, trainer.state.log_history)  # type: ignore[arg-type]
    trainer.accelerator.wait_for_everyone()
    return healing


def _remove_unless_begun(work: Path) -> None:
    if work.is_dir() and not (work / BEFORE_FILE).exists():
        shutil.rmtree(work)


def _sources(recipe: HealRecipe) -> list[dict[str, Any]]:
    """The record of the training text, all of which is read for it.

    Raises:
        RedepthError: naming the file and the row that can't be read.
    """
    surveyed = {
        source.data: count_licenses(source.data, source.text_column or recipe.text_column, source.license)
        for _, sources in recipe.timetable()
        for source in sources
        if not is_task(source.data)
    }
    return [
        {
            "data": source.data,
            "weight": source.weight,
            "until": round(end, 6),
            "licenses": surveyed.get(source.data, MADE),
        }
        for end, sources in recipe.timetable()
        for source in sources
    ]


def _save(
    model: RecurrentDepthForCausalLM,
    folder: Path,
    target: Path,
    healing: Healing,
    recipe: HealRecipe,
    curve: list[dict[str, Any]],
) -> None:
    """Write the healed checkpoint whole: the folder's other files, new weights, records and card."""
    model.config.mean_recurrence = round(recipe.mean_recurrence)
    model.config.mean_backprop_depth = recipe.backprop_depth
    model.config.use_cache = True
    model.config.depth_profile = None  # of the weights as they were
    work = folder / WORK_FOLDER
    with whole_folder(target, overwrite=target == folder) as beside:
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy2(file, beside / file.name)
        model.save_pretrained(beside)
        write_json(beside / HEALING_FILE, asdict(healing))
        write_jsonl(beside / LOG_FILE, curve)
        if (work / "runs").is_dir():
            shutil.copytree(work / "runs", beside / "runs")
        write_recipe(beside, read_recipe(folder) | {"heal": recipe.model_dump(mode="json")})
        write_card(beside, target.resolve().name)
    shutil.rmtree(work, ignore_errors=True)
