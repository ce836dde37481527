"""redepth generate"""

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import redepth
from redepth import api
from redepth.errors import RedepthError

from .colours import coloured, legend
from .console import (
    SEEDS,
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    Quiet,
    hush_libraries,
    number_or_word,
    print_json,
    remarks,
    results,
)


def command(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    num_steps: Annotated[
        list[int] | None, typer.Option(help="Passes through the core; repeat the flag to compare depths.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to add.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", **SEEDS)] = 0,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="Adaptive exit: kl, entropy-diff, latent-diff, cosine, argmax-stability or package.module:name."
        ),
    ] = None,
    exit_threshold: Annotated[
        str,
        typer.Option(
            help="Threshold of the criterion or sampler: a number, auto for its default, or 99% or 95% as calibrated."
        ),
    ] = "auto",
    min_steps: Annotated[
        int | None, typer.Option(help="With --criterion: steps that every token runs at least.")
    ] = None,
    show_steps: Annotated[bool, typer.Option("--show-steps", help="Colour each token by the steps it took.")] = False,
    continuous_compute: Annotated[
        bool, typer.Option("--continuous-compute", help="Start each token from the state of the one before.")
    ] = False,
    cache_rule: Annotated[
        str | None, typer.Option(help="full, latest, skip, ring-4, latest+ring-4, …; the checkpoint's by default.")
    ] = None,
    draft_steps: Annotated[
        int | None, typer.Option(help="Draft tokens at this depth and verify them at num_steps: the same text, sooner.")
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(help="Tokens drafted at a time; by default it follows how many were accepted.")
    ] = None,
    draft_bits: Annotated[
        int | None,
        typer.Option(help="8: draft with a copy of the weights in 8 bits; the same text, sooner, more memory."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="wavefront: many tokens advance at once; not lossless, reports its agreement.")
    ] = None,
    headway: Annotated[int | None, typer.Option(help="Wavefront: positions opened in each pass.")] = None,
    inner_steps: Annotated[int | None, typer.Option(help="Wavefront: steps of the core in each pass.")] = None,
    noise_mix: Annotated[float | None, typer.Option(help="Wavefront: share of fresh initial state mixed in.")] = None,
    max_wavefront: Annotated[int | None, typer.Option(help="Wavefront: maximum number of open positions.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text at one depth, streaming, or at several, side by side.

    Example: redepth generate ./smollm2-recurrent "The capital of France is" --num-steps 1 --num-steps 16

    Example: redepth generate ./smollm2-recurrent "Depth is" --num-steps 32 --criterion kl --show-steps
    """
    hush_libraries()
    import torch
    from transformers import TextStreamer

    given = {
        "criterion": criterion,
        "exit_threshold": number_or_word(exit_threshold) if criterion or sampler else None,
        "min_steps": min_steps,
        "continuous_compute": continuous_compute or None,
        "cache_rule": cache_rule,
        "draft_steps": draft_steps,
        "draft_tokens": draft_tokens,
        "draft_bits": draft_bits,
        "sampler": sampler,
        "headway": headway,
        "inner_steps": inner_steps,
        "noise_mix": noise_mix,
        "max_wavefront": max_wavefront,
        "report_agreement": True if sampler else None,
    }
    policy: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    of_the_sampler = ("headway", "inner_steps", "noise_mix", "max_wavefront")
    for name in (*of_the_sampler, "min_steps"):
        needed = "--sampler wavefront" if name in of_the_sampler else "--criterion"
        if name in policy and not (sampler if name in of_the_sampler else criterion):
            raise RedepthError(f"--{name.replace('_', '-')} needs {needed}")
    if max_new_tokens < 1:
        raise RedepthError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise RedepthError(f"--temperature {temperature} and --top-p {top_p} must be ≥ 0 and in (0, 1]")
    config = api.read_config(checkpoint)
    depths = num_steps or [config.default_num_steps]
    for depth in depths:
        redepth.DepthPolicy.resolve(config, **policy, num_steps=depth)
    model: Any = api.load(checkpoint, dtype, device, few_token_kernels=True)
    tokenizer = api.load_tokenizer(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    start = inputs["input_ids"].shape[1]
    if start == 0:
        raise RedepthError("the prompt is empty; give some text to continue")
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}

    streams = len(depths) == 1 and not as_json and not show_steps
    outputs = {}
    for depth in depths:
        torch.manual_seed(seed)
        outputs[depth] = model.generate(
            **inputs,
            **policy,
            **sampling,
            num_steps=depth,
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if streams else None,
            return_dict_in_generate=True,
        )
    continued = {depth: output.sequences[0, start:] for depth, output in outputs.items()}
    texts = {depth: tokenizer.decode(ids, skip_special_tokens=True) for depth, ids in continued.items()}
    # A token is what the pass over the place before it came to.
    steps = {depth: output.stats["num_steps"][0, start - 1 :].tolist() for depth, output in outputs.items()}
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "continuations": texts,
                "mean_steps": {depth: sum(taken) / len(taken) for depth, taken in steps.items()},
                "steps": steps,
                "stats": {
                    depth: {name: value for name, value in output.stats.items() if name != "num_steps"}
                    for depth, output in outputs.items()
                },
            }
        )
        return
    notes = {depth: _note(output.stats, steps[depth], policy) for depth, output in outputs.items()}
    if not streams:
        heads = [f"r {'≤' if criterion else '='} {depth}" for depth in depths]
        table = Table(*heads, title=prompt if not quiet else None, title_justify="left")
        if show_steps:
            table.add_row(*(coloured(tokenizer, continued[depth].tolist(), steps[depth]) for depth in depths))
        else:
            table.add_row(*(Text(texts[depth]) for depth in depths))
        if any(notes.values()) and not quiet:
            table.add_section()
            table.add_row(*notes.values())
        results.print(table)
        if show_steps and not quiet:
            remarks.print(legend(max(max(taken) for taken in steps.values())))
    elif notes[depths[0]] and not quiet:
        remarks.print(notes[depths[0]], style="dim")


def _note(stats: dict[str, Any], steps: list[int], policy: dict[str, Any]) -> str:
    """What a policy did, in a few words, and whether the model's room cut the text short."""
    did = _deeds(stats, steps, policy)
    cut = "the text ends where the model's room does (block_size)" if stats["is_full"] else ""
    return "; ".join(filter(None, (did, cut)))


def _deeds(stats: dict[str, Any], steps: list[int], policy: dict[str, Any]) -> str:
    if "draft_steps" in policy:
        return f"{stats['accepted']} of {stats['drafted']} drafted tokens kept, {stats['rounds']} deep passes"
    if "sampler" in policy:
        agreement = f"{stats['agreement']:.0%} of the tokens are plain decoding's own choice"
        return f"not lossless: {agreement}; {stats['passes']} passes for {len(steps)} tokens"
    if "criterion" in policy:
        return f"{sum(steps) / len(steps):.1f} steps a token on average"
    return ""
