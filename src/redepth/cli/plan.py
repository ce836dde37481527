"""redepth plan"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import AsJson, Quiet, hush_libraries, print_json, progress_bar, results

if TYPE_CHECKING:
    from redepth.surgery.search import Candidate, PlanSearch

SHOWN = 6


def convert_command(source: str, candidate: "Candidate") -> str:
    plan = candidate.plan.slices()
    groups = plan if candidate.plan.dropped else {"core": plan["core"]}
    ranges = " ".join(f"--{group} {text}" for group, text in groups.items())
    return f"redepth convert {source} OUT {ranges} --adapter {candidate.adapter}"


def _layer_table(search: "PlanSearch", core_layers: int) -> Table:
    table = Table("layer", "influence", f"distance over {core_layers}", title="source layers", title_justify="left")
    for measure in search.layers:
        distance = "" if measure.distance is None else f"{measure.distance:.3f}"
        table.add_row(str(measure.layer), f"{measure.influence:.3f}", distance)
    return table


def _candidate_table(title: str, candidates: "list[Candidate]") -> Table:
    depths = list(candidates[0].losses)
    table = Table(
        "prelude", "core", "coda", "adapter", *(f"r = {depth}" for depth in depths), "mean", "movement",
        title=title, title_justify="left",
    )  # fmt: skip
    for one in candidates[:SHOWN]:
        losses = (f"{loss:.3f}" for loss in [*one.losses.values(), one.mean_loss])
        table.add_row(*one.plan.slices().values(), one.adapter, *losses, f"{one.movement:.3f}")
    return table


def command(
    source: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, smollm2-135m or gemma3-270m.")],
    data: Annotated[
        str, typer.Option(help="python-docs, a .txt, .jsonl or .parquet file, or a datasets id.")
    ] = "python-docs",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    core_layers: Annotated[
        int | None, typer.Option(help="Number of layers to loop; a fifth of the source's by default.")
    ] = None,
    drop_layers: Annotated[
        int | None,
        typer.Option(
            help="Number of layers that the plans of the second table drop, 0 for none; an eighth by default."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter start to try, inject or blend:α; repeat the flag for several.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text to measure on.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens in a row.")] = 256,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Losses within this many nats of the lowest count as equal.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Propose a plan: measure the layers and try candidates on text, without training.

    Example: redepth plan smollm2-135m --data python-docs --core-layers 6
    """
    hush_libraries()
    import torch

    from redepth.checkpoint.sources import open_source
    from redepth.data.rows import held_out_rows
    from redepth.data.text import open_text
    from redepth.errors import RedepthError
    from redepth.runtime import has_bf16, keep_freed_memory
    from redepth.surgery.plan import default_plan
    from redepth.surgery.search import ADAPTERS, TOLERANCE, check_search, search_plans

    if precision not in ("auto", "bf16", "fp32"):
        raise RedepthError(f"--precision {precision!r} is unknown; use auto, bf16 or fp32")
    opened = open_source(source)
    # A recurrent source has no such setting, and is refused below.
    num_layers = getattr(opened.config, "num_hidden_layers", 3)
    if core_layers is None:
        core_layers = len(default_plan(num_layers).core)
    if drop_layers is None:
        drop_layers = min(round(num_layers / 8), max(num_layers - 2 - core_layers, 0))
    check_search(opened, core_layers, drop_layers, adapter or ADAPTERS, sequence_length)
    if opened.tokenizer is None:
        raise RedepthError(f"source {source!r} has no tokenizer, so it can't be measured on text")
    stream = open_text(data, text_column)
    text, _ = held_out_rows(stream, opened.tokenizer, sequence_length, rows)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16())
    keep_freed_memory()
    with progress_bar(quiet) as update:
        search = search_plans(
            opened,
            text,
            core_layers,
            drop_layers,
            adapter or ADAPTERS,
            tolerance=TOLERANCE if tolerance is None else tolerance,
            autocast=torch.bfloat16 if bf16 else None,
            on_progress=update,
        )
    found = [kind for kind in (search.whole, search.dropping) if kind]
    commands = [convert_command(source, candidates[0]) for candidates in found]
    if as_json:
        print_json(
            {
                "source": source,
                "data": data,
                "tokens": search.tokens,
                "source_loss": search.source_loss,
                "layers": [vars(measure) for measure in search.layers],
                "whole": [one.to_dict() for one in search.whole],
                "dropping": [one.to_dict() for one in search.dropping],
                "command": commands[0],
            }
        )
        return
    if not quiet:
        results.print(_layer_table(search, core_layers))
        heading = f"nats per token on {search.tokens:,} tokens; {source} itself: {search.source_loss:.3f}"
        results.print(_candidate_table(f"every layer kept, {heading}", search.whole))
        if search.dropping:
            results.print(_candidate_table(f"{drop_layers} layers dropped, {heading}", search.dropping))
    for line in commands[: 1 if quiet else None]:
        results.print(line, soft_wrap=True, highlight=False)
