"""The healing run from end to end: check, look before, train, look after, save."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.card import write_card
from redepth.checkpoint.checked import check_finite
from redepth.checkpoint.folder import (
    EVALUATION_FILE,
    HEALING_FILE,
    HEALING_LOG_FILE,
    MANIFEST_FILE,
    CheckpointFolder,
    is_weights,
    write_json,
    write_jsonl,
    write_recipe,
)
from redepth.checkpoint.load import check_unquantized, read_config
from redepth.checkpoint.lock import WORK_FOLDER as LOCK_FOLDER
from redepth.checkpoint.sources import open_source
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM

from .begun import BEFORE_FILE, WORK_FOLDER, Begun, clear, read_begun, take_fingerprints
from .checkpoints import last_whole, sweep
from .clock import Progress
from .memory import FP32_BYTES
from .preflight import Preflight, preflight
from .prepare import Prepared, prepare, survey_sources
from .recipe import HealRecipe
from .record import Healing, curve_record, read_healing, recipe_record, runs_of

Listener = Callable[[Progress], None]


class HealingInterrupted(RedepthError):
    """A run that SIGTERM ended early, with a checkpoint to resume from."""

    exit_code = 143


def plan_healing(
    checkpoint: str | Path, recipe: HealRecipe | None = None, on_progress: Listener | None = None
) -> Preflight:
    """What `heal` would do, without doing it; nothing is left behind.

    Raises:
        RedepthError: as `heal`.
    """
    recipe = (recipe or HealRecipe()).model_copy(update={"report_to": "none"})
    tell = on_progress or (lambda record: None)
    with tempfile.TemporaryDirectory(prefix="redepth-") as work:
        survey_sources(recipe, tell)
        prepared = prepare(_local_folder(checkpoint), recipe, Path(work), tell)
        return _look_before(prepared)


def heal(
    checkpoint: str | Path,
    recipe: HealRecipe | None = None,
    out: str | Path | None = None,
    on_progress: Listener | None = None,
    on_preflight: Callable[[Preflight], None] | None = None,
    further: bool = False,
) -> Healing:
    """Train a recurrent checkpoint so that it makes use of its depth.

    Checkpoints to resume from lie in `healing/` inside the folder that the healed model is for, while the run lasts;
    the same call after an interruption resumes from the last complete one and gives what the uninterrupted run would
    have given.
    At the end the healed model takes its place, written whole.

    Args:
        checkpoint: folder or hub id of a recurrent checkpoint: converted, new, published, or healed before.
        recipe: the defaults of `HealRecipe` if left out.
        out: folder for the healed model, instead of healing in place.
        on_progress: called with each record of the run.
        on_preflight: called once, before the training, unless the run is resumed.
        further: heal in place a checkpoint that is healed already.

    Raises:
        RedepthError: for a checkpoint, data or recipe that does not fit or has changed since the run began, a folder that
            can't be written, or a run that goes wrong.
        HealingInterrupted: after SIGTERM.
    """
    recipe = recipe or HealRecipe()
    tell = on_progress or (lambda record: None)
    if out is None and not Path(checkpoint).expanduser().exists():
        read_config(checkpoint)
        raise RedepthError(f"{str(checkpoint)!r} is on the hub; name a folder for the healed model with --to")
    folder = _local_folder(checkpoint)
    check_unquantized(checkpoint, read_config(folder)[0], "be healed")
    target = CheckpointFolder(out if out is not None else folder)
    work = target.path / WORK_FOLDER
    is_first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        if is_first:
            stack.enter_context(target.locked())
        begun = read_begun(work)
        before = read_healing(folder)
        if begun is not None:
            done = finished_run(target)
            if done is not None:
                return done
            begun.check_recipe(work, recipe)
        else:
            _check_target(folder, target.path, before, further)
            if is_first:
                target.check_writable(_least_bytes(folder))
                if not work.exists():
                    # What goes wrong before the first checkpoint leaves nothing behind.
                    stack.callback(_remove_unless_begun, work)
        sources = survey_sources(recipe, tell) if begun is None else begun.sources
        fingerprints = take_fingerprints(folder, recipe)
        if begun is not None:
            begun.check_fingerprints(work, fingerprints)
        prepared = prepare(folder, recipe, work, tell)
        if begun is None:
            plan = _look_before(prepared)
            if on_preflight is not None and is_first:
                on_preflight(plan)
            begun = Begun(recipe.model_dump(mode="json"), fingerprints, sources, plan.flops, plan.loss_before)
            if is_first:
                begun.write(work)
        healing = _train(prepared, begun, work, is_first, runs_of(before))
        model = prepared.trainer.whole_model()
        if is_first:
            check_finite(model, "the trained model")
            _save(model.to(prepared.dtype), folder, target, healing, recipe, prepared.trainer.state.log_history)  # type: ignore[arg-type]
            clear(work)
        prepared.trainer.accelerator.wait_for_everyone()
    return healing


def finished_run(target: CheckpointFolder) -> Healing | None:
    """The run that was killed when only cleaning up was left, which is done now; None where there is none."""
    work = target.path / WORK_FOLDER
    begun, done = read_begun(work), read_healing(target.path)
    if begun is None or done is None or begun.run != done.run:
        return None
    clear(work)
    return done


def _local_folder(checkpoint: str | Path) -> Path:
    """The folder that a checkpoint lies in, absolute; one of the hub's is fetched."""
    if Path(checkpoint).expanduser().exists():
        return CheckpointFolder(checkpoint).path
    read_config(checkpoint)
    return open_source(str(checkpoint)).folder


def _check_target(folder: Path, target: Path, before: Healing | None, further: bool) -> None:
    """Check for anything that would keep the end of the run from being written.

    Raises:
        RedepthError: naming it.
    """
    if target == folder:
        if before is not None and not further:
            raise RedepthError(
                f"{folder} is healed already; --further heals it further in place, --to OTHER in another folder"
            )
        return
    CheckpointFolder(target).check_apart(folder)
    if target.is_dir() and {entry.name for entry in target.iterdir()} - {LOCK_FOLDER, WORK_FOLDER}:
        raise RedepthError(f"{target} already exists; give another folder for the healed model")


def _least_bytes(folder: Path) -> int:
    """The least that a run writes: the new weights, and two checkpoints with weights in fp32."""
    weights = sum((folder / name).stat().st_size for name in CheckpointFolder(folder).weights())
    dtype = read_config(folder)[0].dtype
    return weights + 2 * weights * FP32_BYTES // (dtype.itemsize if isinstance(dtype, torch.dtype) else FP32_BYTES)


def _look_before(prepared: Prepared) -> Preflight:
    """Losses and memory of the run to come.

    Raises:
        RedepthError: for losses that are not finite, or a parameter that gets no gradient.
    """
    trainer = prepared.trainer
    losses = _losses(prepared, "loss before")
    _check_losses(losses, "before anything is trained; try precision fp32, shallower eval_depths, or another plan")
    batch = next(iter(torch.utils.data.DataLoader(trainer.train_dataset, trainer.args.per_device_train_batch_size)))
    model: Any = trainer.model
    return preflight(
        model,
        trainer.plain_model().config,
        trainer.recipe,
        batch,
        losses,
        trainer.teacher,
        prepared.bf16,
        processes=trainer.args.world_size,
        # A model that is to be sharded may not fit in one place.
        measure=not trainer.is_fsdp_enabled,
    )


def _losses(prepared: Prepared, part: str) -> dict[int, float]:
    trainer = prepared.trainer
    return trainer.held_out_losses(on_row=lambda done, total: trainer.on_progress(Progress(part, done / total)))


def _check_losses(losses: dict[int, float], what_then: str) -> None:
    for depth, loss in losses.items():
        if not math.isfinite(loss):
            raise RedepthError(f"the held-out loss after {depth} steps is {loss} {what_then}")


def _train(prepared: Prepared, begun: Begun, work: Path, is_first: bool, earlier: list[dict[str, Any]]) -> Healing:
    """Train to the end, from the last whole checkpoint where there is one.

    Raises:
        RedepthError: for a run that goes wrong, or learns nothing.
        HealingInterrupted: after SIGTERM.
    """
    trainer = prepared.trainer
    last = last_whole(work, trainer.say)
    trainer.accelerator.wait_for_everyone()
    if is_first:
        sweep(work)
    trainer.accelerator.wait_for_everyone()
    trainer.resume(last)
    steps, skipped = trainer.state.global_step, trainer.guard.skipped
    if trainer.clock.terminated and trainer.clock.progress < 1:
        raise HealingInterrupted(
            f"stopped by SIGTERM after step {steps}, which is saved; run the same command again to resume"
        )
    start_over = f"nothing is saved as healed; change the recipe and remove {work} to start over"
    if len(skipped) >= steps:
        raise RedepthError(
            f"all {steps} steps were skipped because losses or gradients were not finite, so {start_over}"
        )
    after = _losses(prepared, "loss after")
    _check_losses(after, f"after the training, so {start_over}")
    recipe = trainer.recipe
    return Healing(
        data=recipe.data_names,
        sources=begun.sources,
        tokens=steps * recipe.batch_size * recipe.sequence_length,
        steps=steps,
        minutes=trainer.clock.elapsed / 60,
        flops=begun.flops,
        precision="bf16" if prepared.bf16 else "fp32",
        seed=recipe.seed,
        skipped_steps=skipped,
        loss_before=begun.loss_before,
        loss_after=after,
        run=begun.run,
        earlier=earlier,
    )


def _remove_unless_begun(work: Path) -> None:
    if work.is_dir() and not (work / BEFORE_FILE).exists():
        shutil.rmtree(work)


def _save(
    model: RecurrentDepthForCausalLM,
    folder: Path,
    target: CheckpointFolder,
    healing: Healing,
    recipe: HealRecipe,
    curve: list[dict[str, Any]],
) -> None:
    """Write the healed checkpoint whole: new weights, records and card beside the folder's other files."""
    model.config.mean_recurrence = round(recipe.mean_recurrence)
    model.config.mean_backprop_depth = recipe.backprop_depth
    model.config.use_cache = True
    model.config.depth_profile = None  # of the weights as they were
    outdated = [EVALUATION_FILE]
    with target.updating(outdated) as stage:
        if target.path != folder:
            for file in folder.iterdir():
                if file.is_file() and not is_weights(file.name) and file.name not in (*outdated, MANIFEST_FILE):
                    shutil.copy2(file, stage / file.name)
        model.save_pretrained(stage)
        write_json(stage / HEALING_FILE, asdict(healing))
        write_jsonl(stage / HEALING_LOG_FILE, curve_record(folder, curve, len(healing.earlier)))
        write_recipe(stage, recipe_record(folder, recipe))
        runs = target.path / WORK_FOLDER / "runs"  # of the trackers
        if runs.is_dir():
            shutil.copytree(runs, stage / "runs")
        write_card(stage, target.path.name, folder, outdated)
