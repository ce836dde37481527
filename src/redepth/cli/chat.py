"""redepth chat"""

from typing import Annotated, Any

import typer

import redepth
from redepth import api
from redepth.errors import RedepthError, first_line

from .console import Checkpoint, Device, Dtype, hush_libraries, results

HELP = "/steps N changes the depth, /reset forgets the conversation, /quit ends it."


def command(
    checkpoint: Checkpoint,
    num_steps: Annotated[
        int | None, typer.Option(help="Passes through the core; the checkpoint's default where not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in an answer.")] = 256,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model through its chat template, at a depth you can change between answers.

    Example: redepth chat ./smollm2-recurrent --num-steps 8
    """
    hush_libraries()
    from jinja2 import TemplateError
    from transformers import TextStreamer

    config = api.read_config(checkpoint)
    depth = redepth.DepthPolicy.resolve(config, num_steps=num_steps).num_steps
    if max_new_tokens < 1:
        raise RedepthError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    model: Any = api.load(checkpoint, dtype, device)
    tokenizer = api.load_tokenizer(checkpoint)
    if not tokenizer.chat_template:
        raise RedepthError(f"{checkpoint} has no chat template; use redepth generate")
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    results.print(HELP, style="dim")
    while True:
        try:
            said = input(f"[r = {depth}] > ").strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/reset":
            messages = list(opening)
        elif said.startswith("/steps"):
            try:
                depth = redepth.DepthPolicy.resolve(model.config, num_steps=int(said.removeprefix("/steps"))).num_steps
            except ValueError as error:
                results.print(f"{error}; {HELP}", style="red")
        elif said.startswith("/"):
            results.print(HELP, style="dim")
        elif said:
            messages.append({"role": "user", "content": said})
            try:
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                ).to(model.device)
            except (TemplateError, ValueError, TypeError, IndexError) as error:
                raise RedepthError(f"{checkpoint}: its chat template fails: {first_line(error)}") from None
            if not inputs["input_ids"].numel():
                raise RedepthError(f"{checkpoint}: its chat template makes nothing of a message; use redepth generate")
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            ids = model.generate(**inputs, num_steps=depth, max_new_tokens=max_new_tokens, streamer=streamer)
            answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
