"""redepth chat"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated, Any

import typer
from rich.text import Text

import redepth
from redepth import api
from redepth.errors import RedepthError, first_line, is_mistake

from .colours import coloured, legend
from .console import Checkpoint, Device, Dtype, hush_libraries, number_or_word, results

HELP = {
    "/steps N": "passes through the core for each token; under an exit test, the most of them",
    "/exit TEST [THRESHOLD]": "let each token leave the loop when it has settled: kl, latent-diff, …; /exit off ends it",
    "/show": "the settings, and the last answer coloured by the steps of each token",
    "/clear": "forget the conversation",
    "/help": "this list",
    "/quit": "end the chat, as Ctrl-D does",
    "Ctrl-C": "stop an answer; what was said stays",
}


@dataclass
class Chat:
    """One conversation and how deep its answers go.

    Attributes:
        keywords: of `DepthPolicy.resolve`, as they stand.
        opening: what the conversation starts with.
    """

    checkpoint: str
    model: Any
    tokenizer: Any
    keywords: dict[str, Any]
    max_new_tokens: int
    opening: list[dict[str, str]]
    messages: list[dict[str, str]] = field(default_factory=list)
    last_ids: list[int] = field(default_factory=list)
    last_steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = redepth.DepthPolicy.resolve(self.model.config, **self.keywords)
        self.clear("")

    @property
    def prompt(self) -> str:
        test = self.policy.test
        return f"[r = {self.policy.num_steps}] > " if test is None else f"[r ≤ {self.policy.num_steps}, {test.name}] > "

    def obey(self, line: str) -> None:
        """Carry out a line that starts with a slash; a mistake is told, and nothing changes."""
        name, _, words = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/steps": self.set_steps,
            "/exit": self.set_exit,
            "/show": self.show,
            "/clear": self.clear,
            "/help": self.help,
        }
        if name not in commands:
            results.print(f"{name} is unknown; /help lists what there is", style="red", markup=False)
            return
        try:
            commands[name](words.strip())
        except ValueError as error:
            results.print(f"{error}; /help says how to write it", style="red", markup=False)

    def set_steps(self, words: str) -> None:
        if not words.lstrip("-").isdigit():
            raise ValueError(f"/steps takes a whole number, got {words!r}")
        self._change(self.keywords | {"num_steps": int(words)})

    def set_exit(self, words: str) -> None:
        test, *threshold = words.split()[:2] or [""]
        without = {name: value for name, value in self.keywords.items() if name not in ("criterion", "exit_threshold")}
        if test == "off":
            self._change(without)
        else:
            chosen = {"exit_threshold": number_or_word(threshold[0])} if threshold else {}
            self._change(without | {"criterion": test} | chosen)

    def _change(self, keywords: dict[str, Any]) -> None:
        self.policy = redepth.DepthPolicy.resolve(self.model.config, **keywords)
        self.keywords = keywords

    def show(self, words: str) -> None:
        results.print(str(self.policy), markup=False, highlight=False)
        if self.last_steps:
            results.print(coloured(self.tokenizer, self.last_ids, self.last_steps))
            mean = sum(self.last_steps) / len(self.last_steps)
            results.print(legend(max(self.last_steps)), Text(f"mean {mean:.1f} over {len(self.last_steps)} tokens"))

    def clear(self, words: str) -> None:
        self.messages = list(self.opening)

    def help(self, words: str) -> None:
        width = max(map(len, HELP))
        for usage, what in HELP.items():
            results.print(f"{usage:<{width}}  {what}", style="dim", markup=False, highlight=False)

    def answer(self, said: str) -> None:
        """Stream an answer; Ctrl-C ends it early."""
        from transformers import StoppingCriteriaList, TextStreamer

        messages = [*self.messages, {"role": "user", "content": said}]
        inputs = self._rendered(messages)
        start = inputs["input_ids"].shape[1]
        with stop_key() as is_stopped:
            output = self.model.generate(
                **inputs,
                policy=self.policy,
                max_new_tokens=self.max_new_tokens,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=StoppingCriteriaList([lambda ids, scores, **kwargs: is_stopped()]),
                return_dict_in_generate=True,
            )
        self.last_ids = output.sequences[0, start:].tolist()
        # A token is what the pass over the place before it came to.
        self.last_steps = output.stats["num_steps"][0, start - 1 :].tolist()
        answer = self.tokenizer.decode(self.last_ids, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _rendered(self, messages: list[dict[str, str]]) -> Any:
        from jinja2 import TemplateError

        try:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self.model.device)
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise RedepthError(f"{self.checkpoint}: its chat template fails: {first_line(error)}") from None
        if not inputs["input_ids"].numel():
            raise RedepthError(f"{self.checkpoint}: its chat template makes nothing of a message; use redepth generate")
        return inputs


@contextmanager
def stop_key() -> Iterator[Callable[[], bool]]:
    """For the block, Ctrl-C asks it to stop, which it can look up; a second one interrupts it as ever."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def command(
    checkpoint: Checkpoint,
    num_steps: Annotated[
        int | None, typer.Option(help="Passes through the core; the checkpoint's default where not given.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="Exit test by which each token leaves the loop when it has settled.")
    ] = None,
    exit_threshold: Annotated[
        str | None, typer.Option(help="Of the criterion: a number, auto for its default, or 99% as calibrated.")
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
    given = {
        "num_steps": num_steps,
        "criterion": criterion,
        "exit_threshold": number_or_word(exit_threshold) if exit_threshold is not None else None,
    }
    keywords: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    redepth.DepthPolicy.resolve(api.read_config(checkpoint), **keywords)
    if max_new_tokens < 1:
        raise RedepthError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    model: Any = api.load(checkpoint, dtype, device, few_token_kernels=True)
    tokenizer = api.load_tokenizer(checkpoint)
    if not tokenizer.chat_template:
        raise RedepthError(f"{checkpoint} has no chat template; use redepth generate")
    opening = [{"role": "system", "content": system}] if system else []
    chat = Chat(checkpoint, model, tokenizer, keywords, max_new_tokens, opening)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401  gives `input` its history and editing
    results.print("/help lists what you can change; Ctrl-C stops an answer", style="dim")
    while True:
        try:
            line = input(chat.prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            results.print("\n/quit or Ctrl-D ends the chat", style="dim")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            chat.obey(line)
        elif line:
            reply(chat, line)


def reply(chat: Chat, line: str) -> None:
    """Answer a line, or say why there is none; a template that fails will fail again, and ends the chat."""
    try:
        chat.answer(line)
    except RedepthError:
        raise
    except KeyboardInterrupt:
        results.print("\nstopped; the message is forgotten", style="dim")
    except Exception as error:
        if not is_mistake(error):
            raise
        results.print(f"{first_line(error)}; /clear forgets the conversation", style="red", markup=False)
