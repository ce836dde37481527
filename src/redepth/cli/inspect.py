"""redepth inspect"""

from typing import Annotated, Any

import typer
from rich.table import Table

from redepth import api

from .console import AsJson, Checkpoint, hush_libraries, print_json, results


def command(
    checkpoint: Checkpoint,
    num_steps: Annotated[
        list[int] | None, typer.Option(help="Depth to give the size of the cache for; repeat the flag for several.")
    ] = None,
    cache_rule: Annotated[
        str | None, typer.Option(help="Cache rule to give it for, such as latest+ring-4; the checkpoint's by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is: kind, plan, parameters, memory by depth, and the depth it was trained for.

    Example: redepth inspect ./smollm2-recurrent --num-steps 8
    """
    hush_libraries()
    chosen: dict[str, Any] = {"num_steps": num_steps} if num_steps else {}
    report = api.inspect(checkpoint, cache_rule=cache_rule, **chosen)
    if as_json:
        print_json(report)
        return
    table = Table("part", "layers", "from source layers", "parameters", title=report["kind"], title_justify="left")
    for part, count in report["parameters"].items():
        layers = report["layers"].get(part, "")
        taken = report["source_layers"].get(part, "") if report["source_layers"] else ""
        table.add_row(part, str(layers), taken, f"{count:,}" if count or part != "head" else "tied")
    results.print(table)
    block = ", ".join(f"{key} {value}" for key, value in report["block"].items() if value is not None)
    results.print(f"block: {block}")
    results.print(f"initial state {report['initial_state']}, {report['dtype']}, up to {report['max_tokens']:,} tokens")
    weights = report["weights"]
    if weights:
        results.print(
            f"weights: {weights['bytes']:,} bytes, {weights['tensors']:,} tensors in {weights['files']} files"
        )
    if report["verified"] is not None:
        results.print("verified against its source" if report["verified"] else "failed to verify against its source")
    if report["quantization"]:
        results.print(f"quantised: {report['quantization']}")
    healed = f", healed on {report['healed_tokens']:,} tokens" if report["healed_tokens"] else ""
    results.print(f"trained for a mean of {report['mean_recurrence']} steps{healed}")
    profile = report["depth_profile"]
    if profile is None:
        results.print(f"not calibrated; runs {report['default_num_steps']} steps unless told otherwise")
    else:
        least, most = profile["valid_range"]
        results.print(
            f"calibrated on {profile['tokens']:,} tokens: runs {profile['num_steps']} steps, usable from {least} to {most}"
        )
    costs = Table(
        "",
        *(f"r = {depth}" for depth in report["cache_bytes_per_token"]),
        title=f"bytes per token, rule {report['cache_rule']}",
    )
    costs.add_row("cache", *(f"{size:,}" for size in report["cache_bytes_per_token"].values()))
    costs.add_row("state", *(f"{report['state_bytes_per_token']:,}" for _ in report["cache_bytes_per_token"]))
    results.print(costs)
    if any(report["recurrent_bytes_per_row"].values()):
        row = ", ".join(f"{size:,} at r = {depth}" for depth, size in report["recurrent_bytes_per_row"].items())
        results.print(f"recurrent states, bytes per row of any length: {row}")
