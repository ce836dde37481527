"""redepth plan"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from redepth import api

from .console import (
    AsJson,
    FamilyFile,
    Quiet,
    Revision,
    TrustRemoteCode,
    hush_libraries,
    print_json,
    progress_bar,
    results,
)

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
    revision: Revision = None,
    family: FamilyFile = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Propose a plan: measure the layers and try candidates on text, without training.

    Example: redepth plan smollm2-135m --data python-docs --core-layers 6
    """
    hush_libraries()
    with progress_bar(quiet) as update:
        search = api.plan(
            source,
            data,
            text_column=text_column,
            core_layers=core_layers,
            drop_layers=drop_layers,
            adapters=adapter or (),
            rows=rows,
            sequence_length=sequence_length,
            tolerance=tolerance,
            precision=precision,
            revision=revision,
            family=family,
            trust_remote_code=trust_remote_code,
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
        results.print(_layer_table(search, len(search.whole[0].plan.core)))
        heading = f"nats per token on {search.tokens:,} tokens; {source} itself: {search.source_loss:.3f}"
        results.print(_candidate_table(f"every layer kept, {heading}", search.whole))
        if search.dropping:
            results.print(
                _candidate_table(f"{len(search.dropping[0].plan.dropped)} layers dropped, {heading}", search.dropping)
            )
    for line in commands[: 1 if quiet else None]:
        results.print(line, soft_wrap=True, highlight=False)
