"""redepth generate"""

from typing import Annotated, Any

import typer
from rich.table import Table

from .console import AsJson, Checkpoint, Device, Dtype, Quiet, hush_libraries, print_json, remarks, results


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def command(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    num_steps: Annotated[
        list[int] | None, typer.Option(help="Passes through the core; give it several times to compare depths.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    criterion: Annotated[
        str | None, typer.Option(help="Adaptive exit: kl, entropy-diff, latent-diff, cosine or argmax-stability.")
    ] = None,
    exit_threshold: Annotated[str, typer.Option(help="Of the criterion; auto is its default.")] = "auto",
    min_steps: Annotated[int, typer.Option(help="Steps that every token runs under a criterion.")] = 1,
    cache_rule: Annotated[str | None, typer.Option(help="full, latest or ring-N; the checkpoint's by default.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text at one depth, streaming, or at several, side by side.

    Example: redepth generate ./smollm2-recurrent "The capital of France is" --num-steps 1 --num-steps 16
    """
    hush_libraries()
    import torch
    from transformers import TextStreamer

    from redepth.errors import RedepthError
    from redepth.loading import load, load_tokenizer
    from redepth.modeling.cache import parse_cache_rule
    from redepth.modeling.depth import split_num_steps
    from redepth.modeling.exits import ExitPolicy

    for steps in num_steps or []:
        split_num_steps(steps)
    if cache_rule is not None:
        parse_cache_rule(cache_rule)
    if criterion is not None:
        for steps in num_steps or []:
            ExitPolicy(criterion, _threshold(exit_threshold), min_steps, steps)
    if max_new_tokens < 1:
        raise RedepthError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise RedepthError(f"--temperature {temperature} and --top-p {top_p} must be ≥ 0 and in (0, 1]")
    model: Any = load(checkpoint, dtype, device)
    tokenizer = load_tokenizer(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise RedepthError("the prompt is empty; give some text to continue")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cache_rule": cache_rule}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    depths = num_steps or [model.config.mean_recurrence]
    streams = len(depths) == 1 and not as_json
    if criterion is not None:
        options |= {"criterion": criterion, "exit_threshold": _threshold(exit_threshold), "min_steps": min_steps}
    texts, mean_steps = {}, {}
    for depth in depths:
        torch.manual_seed(seed)
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if streams else None
        output = model.generate(**inputs, num_steps=depth, streamer=streamer, return_dict_in_generate=True, **options)
        texts[depth] = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        mean_steps[depth] = output.past_key_values.steps_run.float().mean().item()
    if as_json:
        print_json({"prompt": prompt, "continuations": texts, "mean_steps": mean_steps})
    elif streams and criterion is not None and not quiet:
        remarks.print(f"{mean_steps[depths[0]]:.1f} steps a token on average, at most {depths[0]}", style="dim")
    elif not streams:
        heads = [f"r {'≤' if criterion else '='} {depth}" for depth in depths]
        table = Table(*heads, title=prompt if not quiet else None, title_justify="left")
        table.add_row(*texts.values())
        if criterion is not None:
            table.add_section()
            table.add_row(*(f"{mean:.1f} steps on average" for mean in mean_steps.values()))
        results.print(table)
