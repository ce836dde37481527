"""redepth convert"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from redepth import api
from redepth.errors import RedepthError

from .console import (
    SEEDS,
    AsJson,
    Device,
    FamilyFile,
    Quiet,
    Revision,
    TrustRemoteCode,
    hush_libraries,
    print_json,
    progress_bar,
    remarks,
    results,
)
from .verify import show as show_verification

if TYPE_CHECKING:
    from redepth.surgery.convert import Conversion

SHOWN_DEPTHS = (1, 4, 8, 16, 32)


def summary(conversion: "Conversion") -> dict[str, object]:
    """What a conversion would make: plan, dropped layers, parameters, and FLOPs per token by depth."""
    count = conversion.parameters()
    return {
        "source": conversion.source.name,
        "family": conversion.family.name,
        "plan": conversion.plan.slices(),
        "dropped_layers": list(conversion.plan.dropped),
        "adapter": conversion.adapter,
        "state": conversion.config.initial_state_mode,
        "dtype": str(conversion.dtype).removeprefix("torch."),
        "parameters": count.by_part(),
        "forward_flops_per_token": {depth: count.forward_flops_per_token(depth) for depth in SHOWN_DEPTHS},
    }


def show(conversion: "Conversion") -> None:
    plan, count = conversion.plan, conversion.parameters()
    table = Table("part", "source layers", "parameters", title=f"{conversion.source.name}, {conversion.family.name}")
    for group in ("prelude", "core", "coda"):
        table.add_row(group, plan.slices()[group], f"{getattr(count, group):,}")
    table.add_row("embedding", "", f"{count.embedding:,}")
    table.add_row("head", "", f"{count.head:,}" if count.head else "tied")
    table.add_row("total", f"{len(plan.layers)} of {plan.num_layers} layers", f"{count.total:,}")
    results.print(table)
    dropped = ", ".join(map(str, plan.dropped)) or "none"
    results.print(f"dropped layers: {dropped}")
    results.print(f"adapter {conversion.adapter}, state {conversion.config.initial_state_mode}, {conversion.dtype}")
    costs = Table(*(f"r = {depth}" for depth in SHOWN_DEPTHS), title="forward FLOPs per token, layers only")
    costs.add_row(*(f"{count.forward_flops_per_token(depth):.2e}" for depth in SHOWN_DEPTHS))
    results.print(costs)


def command(
    source: Annotated[
        str, typer.Argument(help="Hub id, local folder, .gguf or .pt file, smollm2-135m or gemma3-270m.")
    ],
    out: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    prelude: Annotated[str | None, typer.Option(help="Source layers before the core, such as 0:4 or 0:2,3:5.")] = None,
    core: Annotated[str | None, typer.Option(help="Source layers to loop; the middle fifth by default.")] = None,
    coda: Annotated[str | None, typer.Option(help="Source layers after the core.")] = None,
    adapter: Annotated[
        str, typer.Option(help="How the adapter starts: inject, blend:α, gate:α or random.")
    ] = api.DEFAULT_ADAPTER,
    state: Annotated[str, typer.Option(help="Initial state: embed, noise, zeros or skip-adapter.")] = api.DEFAULT_STATE,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the source's by default.")] = None,
    tie: Annotated[
        bool | None, typer.Option("--tie/--untie", help="Tie head and embedding; as in the source by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a random adapter.", **SEEDS)] = 0,
    verify: Annotated[bool, typer.Option(help="Compare with the source when done.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that redepth wrote.")] = False,
    revision: Revision = None,
    family: FamilyFile = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weights file.")] = api.DEFAULT_SHARD_SIZE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its price; write nothing.")] = False,
    keep_architecture: Annotated[
        bool, typer.Option("--keep-architecture", help="No surgery: write the source itself in transformers' format.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn a pretrained decoder into a depth-recurrent one, without training, or re-save a recurrent one.

    Example: redepth convert smollm2-135m ./smollm2-recurrent --core 12:18
    """
    if out is None and not dry_run:
        raise RedepthError("OUT is missing; name the folder to write, or add --dry-run to see the plan alone")
    hush_libraries()
    with progress_bar(quiet) as update:
        made = api.convert(
            source,
            None if dry_run else out,
            prelude=prelude,
            core=core,
            coda=coda,
            adapter=adapter,
            state=state,
            dtype=dtype,
            tie=tie,
            seed=seed,
            revision=revision,
            family=family,
            trust_remote_code=trust_remote_code,
            keep_architecture=keep_architecture,
            verify=verify,
            device=device,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            on_plan=None if quiet or as_json else show,
            on_progress=update,
        )
    if made.conversion is None:
        return
    if made.out is not None and made.conversion.source.tokenizer is None and not quiet:
        remarks.print("The source has no tokenizer, so none was written.")
    report = summary(made.conversion)
    if made.verification is not None:
        report["verification"] = made.verification.to_dict()
    if as_json:
        print_json(report)
    elif made.verification is not None and not quiet:
        show_verification(made.verification)
    if made.verification is not None and not made.verification.passed:
        raise RedepthError(f"{out} was written but does not pass verification; see verification.json in it")
