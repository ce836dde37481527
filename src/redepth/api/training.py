"""Verbs that train."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redepth.errors import RedepthError

if TYPE_CHECKING:
    from redepth.evaluation.held_out import Evaluation
    from redepth.healing.clock import Progress
    from redepth.healing.heal import Healing
    from redepth.healing.preflight import Preflight
    from redepth.healing.recipe import HealRecipe
    from redepth.healing.retrofit import RetrofitRecipe


def heal(
    checkpoint: str | Path,
    recipe: "HealRecipe | str | Path | None" = None,
    to: str | Path | None = None,
    *,
    further: bool = False,
    on_progress: "Callable[[Progress], None] | None" = None,
    on_preflight: "Callable[[Preflight], None] | None" = None,
    **changes: Any,
) -> "Healing":
    """Train a recurrent checkpoint so that it makes use of its depth; the same call resumes an interrupted run.

    Args:
        checkpoint: folder of a recurrent checkpoint: converted, new, published, or healed before; or a hub id, with `to`.
        recipe: a YAML file with a section `heal`, or its content; the defaults of `HealRecipe` if left out.
        to: folder for the healed model, instead of healing in place.
        further: heal in place a checkpoint that is healed already; the records of all runs are kept.
        on_progress: called with each record of the run.
        on_preflight: called once, before the training, unless the run is taken up again.
        changes: keys of the recipe, laid over it.

    Raises:
        RedepthError: for a checkpoint, data or recipe that does not fit or has changed since the run began, a folder
            that can't be written, or a run that goes wrong.
        HealingInterrupted: after SIGTERM.
    """
    from redepth.healing.heal import heal as run

    return run(checkpoint, _heal_recipe(recipe, changes), to, on_progress, on_preflight, further)


def plan_healing(
    checkpoint: str | Path,
    recipe: "HealRecipe | str | Path | None" = None,
    *,
    on_progress: "Callable[[Progress], None] | None" = None,
    **changes: Any,
) -> "Preflight":
    """What `heal` would do, without doing it; nothing is left behind. Arguments and errors are those of `heal`."""
    from redepth.healing.heal import plan_healing as look

    return look(checkpoint, _heal_recipe(recipe, changes), on_progress)


def _heal_recipe(recipe: "HealRecipe | str | Path | None", changes: dict[str, Any]) -> "HealRecipe":
    from redepth.healing.recipe import HealRecipe, fill, laid_over, read_heal_recipe

    if isinstance(recipe, HealRecipe):
        return fill(HealRecipe, laid_over(recipe.model_dump(exclude_unset=True), changes), "healing recipe")
    return read_heal_recipe(Path(recipe) if recipe is not None else None, **changes)


def retrofit(
    recipe: "RetrofitRecipe | str | Path",
    out: str | Path | None = None,
    *,
    on_progress: "Callable[[Progress], None] | None" = None,
    on_preflight: "Callable[[Preflight], None] | None" = None,
    report: bool = True,
    **changes: Any,
) -> "Evaluation":
    """Convert, verify, heal, calibrate and evaluate by one recipe; finished parts are not repeated.

    The folder then holds the model with its card and records, and a report: `healing.png`, the curve of the healing, and
    `report.html`, a look inside the loop on held-out text.

    Args:
        recipe: a YAML file with sections `convert`, `heal`, `calibrate` and `evaluate`, or its content.
        out: folder to write; the file's name by default.
        on_progress, on_preflight: as for `heal`.
        report: write the report, which needs matplotlib.
        changes: keys of the section `heal`, laid over it.

    Raises:
        RedepthError: where a part fails, or `out` holds what another recipe made.
    """
    from redepth.healing.retrofit import RetrofitRecipe, read_retrofit_recipe
    from redepth.healing.retrofit import retrofit as run
    from redepth.runtime import require

    from .reporting import write_retrofit_report

    if report:
        require("matplotlib", "plots")
    if not isinstance(recipe, RetrofitRecipe):
        settings, folder = read_retrofit_recipe(recipe, **changes), Path(out or Path(recipe).stem)
    elif out is None or changes:
        raise RedepthError(
            "a recipe that is not a file has no name and takes no changes; give out, and put the changes into the recipe"
        )
    else:
        settings, folder = recipe, Path(out)
    evaluation = run(settings, folder, on_progress, on_preflight)
    if report:
        write_retrofit_report(settings, folder.expanduser(), on_progress)
    return evaluation
