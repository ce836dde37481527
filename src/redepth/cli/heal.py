"""redepth heal"""

import inspect
import os
import types
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.table import Table

from redepth import HealRecipe, api

from .console import AsJson, Checkpoint, Quiet, hush_libraries, loss_table, print_json, progress_bar, remarks, results

if TYPE_CHECKING:
    from redepth.healing.clock import Progress
    from redepth.healing.preflight import Preflight


def note(record: "Progress") -> str:
    if record.loss is None or record.mean_recurrence is None:
        return ""
    rate = f", {record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""
    return f"step {record.step}, loss {record.loss:.3f}, mean r {record.mean_recurrence:.1f}{rate}"


def listener(update: Any, quiet: bool) -> Any:
    """What shows a run's records: remarks as lines, the rest on the bar."""

    def listen(record: "Progress") -> None:
        if record.remark:
            if not quiet:
                remarks.print(record.remark, highlight=False)
        else:
            update(record.part, record.done, note(record))

    return listen


def show_preflight(plan: "Preflight") -> None:
    """Show what a run will be before it starts."""
    table = Table("part", "trains", "frozen", title="parameters", title_justify="left")
    for part in plan.trainable | plan.frozen:
        table.add_row(part, f"{plan.trainable.get(part, 0):,}", f"{plan.frozen.get(part, 0):,}")
    results.print(table)
    results.print(
        f"{plan.tokens:,} tokens in {plan.steps:,} steps, {plan.mean_steps:.1f} steps of the core on average, "
        f"{plan.flops:.2e} FLOPs in the layers"
    )
    if plan.memory is not None:
        parts = ", ".join(
            f"{name} {getattr(plan.memory, name) / 2**30:.2f}"
            for name in ("weights", "gradients", "optimizer", "activations", "teacher")
        )
        results.print(f"about {plan.memory.total / 2**30:.2f} GiB: {parts}")
    if plan.seconds is not None:
        results.print(f"about {plan.seconds / 60:.1f} minutes of forward and backward passes, if no time limit ends it")
    results.print(loss_table("held-out loss of the untouched conversion", {"before": plan.loss_before}))


def _flag_type(annotation: Any) -> Any:
    """What a flag takes for a recipe's key; phases, a list of tables, are for YAML alone."""
    if isinstance(annotation, types.UnionType):
        annotation = get_args(annotation)[0]
    if annotation in (str, int, float, bool):
        return annotation
    listed = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return str if listed is int or get_origin(listed) is Literal else None


def with_recipe_flags(command: Any) -> Any:
    """A flag for every key of the recipe, in place of the command's `**changes`."""
    parameters = list(inspect.signature(command).parameters.values())[:-1]
    for name, field in HealRecipe.model_fields.items():
        kind = _flag_type(field.annotation)
        if kind is not None:
            shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            default = "" if shown is None else f" \\[default: {shown}]"
            flag = f"--{name.replace('_', '-')}"
            names = (f"{flag}/--no-{flag.removeprefix('--')}",) if kind is bool else (flag,)
            option = typer.Option(*names, help=f"{field.description}{default}", rich_help_panel="Recipe")
            annotation: Any = Annotated[(kind | None, option)]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@with_recipe_flags
def command(
    checkpoint: Checkpoint,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with a section 'heal'.")] = None,
    to: Annotated[Path | None, typer.Option(help="Write the healed model here instead of in place.")] = None,
    further: Annotated[
        bool, typer.Option("--further", help="Heal in place what is healed already; the records of all runs are kept.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Describe the run, and stop before it trains.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    **changes: Any,
) -> None:
    """Train a recurrent model so that it makes use of its depth.

    Flags override the recipe; docs/healing.md explains both. To resume an interrupted run, run the same command again.

    Example: redepth heal ./smollm2-recurrent --data python-docs --recipe recipes/demo.yaml
    """
    hush_libraries()
    if os.environ.get("RANK", "0") != "0":
        as_json, quiet = False, True  # one process reports for all
    with progress_bar(quiet) as update:
        listen = listener(update, quiet)
        if dry_run:
            plan = api.plan_healing(checkpoint, recipe, on_progress=listen, **changes)
        else:
            told = None if quiet or as_json else show_preflight
            healing = api.heal(
                checkpoint, recipe, to, further=further, on_progress=listen, on_preflight=told, **changes
            )
    if dry_run:
        print_json(asdict(plan)) if as_json else show_preflight(plan)
    elif as_json:
        print_json(asdict(healing))
    elif not quiet:
        title = f"held-out loss in nats per token, {healing.tokens:,} tokens in {healing.minutes:.1f} minutes"
        results.print(loss_table(title, {"before": healing.loss_before, "after": healing.loss_after}))
