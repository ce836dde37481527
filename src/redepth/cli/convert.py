"""redepth convert"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from redepth.checkpoint.republish import republish
from redepth.checkpoint.rewrite import rewrite
from redepth.checkpoint.shards import DEFAULT_SHARD_SIZE
from redepth.checkpoint.sources import Source, open_source
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig
from redepth.surgery.convert import DEFAULT_ADAPTER, DEFAULT_STATE, Conversion, plan_conversion

from .console import AsJson, Quiet, hush_libraries, print_json, progress_bar, remarks, results

SHOWN_DEPTHS = (1, 4, 8, 16, 32)


def summary(conversion: Conversion) -> dict[str, object]:
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


def show(conversion: Conversion) -> None:
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


def _republish(
    source: Source,
    out: Path | None,
    plan: tuple[str | None, ...],
    dtype: str | None,
    tie: bool | None,
    overwrite: bool,
    max_shard_size: str,
    dry_run: bool,
    quiet: bool,
) -> None:
    """A source that is recurrent already is written anew, not cut."""
    if any(part is not None for part in plan) or dry_run:
        raise RedepthError(f"{source.name} is recurrent already; leave --prelude, --core, --coda and --dry-run out")
    if out is None:
        raise RedepthError("OUT is missing; name the folder to write")
    with progress_bar(quiet) as update:
        republish(
            source,
            out,
            dtype=dtype,
            tie=tie,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            on_tensor=lambda done, total: update("re-save", done / total),
        )


def command(
    source: Annotated[
        str, typer.Argument(help="Hub id, local folder, .gguf or .pt file, smollm2-135m or gemma3-270m.")
    ],
    out: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    prelude: Annotated[str | None, typer.Option(help="Source layers before the core, such as 0:4 or 0:2,3:5.")] = None,
    core: Annotated[str | None, typer.Option(help="Source layers to loop; the middle fifth by default.")] = None,
    coda: Annotated[str | None, typer.Option(help="Source layers after the core.")] = None,
    adapter: Annotated[str, typer.Option(help="How the adapter starts: inject, blend:α or random.")] = DEFAULT_ADAPTER,
    state: Annotated[str, typer.Option(help="Initial state: embed, noise or zeros.")] = DEFAULT_STATE,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the source's by default.")] = None,
    tie: Annotated[
        bool | None, typer.Option("--tie/--untie", help="Tie head and embedding; as in the source by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a random adapter.")] = 0,
    verify: Annotated[bool, typer.Option(help="Compare with the source when done.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weights file.")] = DEFAULT_SHARD_SIZE,
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
    hush_libraries()
    from redepth.surgery.verify import verify as verify_checkpoint

    from .verify import show as show_verification

    if out is None and not dry_run:
        raise RedepthError("OUT is missing; name the folder to write, or add --dry-run to see the plan alone")
    opened = open_source(source)
    if keep_architecture:
        if any(part is not None for part in (prelude, core, coda, tie)) or dry_run:
            raise RedepthError(
                "--keep-architecture does no surgery; leave --prelude, --core, --coda, --tie and --dry-run out"
            )
        assert out is not None
        with progress_bar(quiet) as update:
            rewrite(
                opened,
                out,
                dtype=dtype,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                on_tensor=lambda done, total: update("write", done / total),
            )
        return
    if opened.config.model_type == RecurrentDepthConfig.model_type:
        _republish(opened, out, (prelude, core, coda), dtype, tie, overwrite, max_shard_size, dry_run, quiet)
        return
    conversion = plan_conversion(opened, prelude, core, coda, adapter, state, dtype, tie, seed)
    report = summary(conversion)
    if not quiet and not as_json:
        show(conversion)
    verification = None
    if out is not None and not dry_run:
        with progress_bar(quiet) as update:
            conversion.write(out, overwrite, max_shard_size, lambda done, total: update("convert", done / total))
        if conversion.source.tokenizer is None and not quiet:
            remarks.print("The source has no tokenizer, so none was written.")
        if verify:
            with remarks.status("verify") as status:
                verification = verify_checkpoint(
                    out, conversion.source, on_check=lambda part: status.update(f"verify: {part}")
                )
            report["verification"] = verification.to_dict()
    if as_json:
        print_json(report)
    elif verification is not None and not quiet:
        show_verification(verification)
    if verification is not None and not verification.passed:
        raise RedepthError(f"{out} was written but does not pass verification; see verification.json in it")
