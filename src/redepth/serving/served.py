"""A model that is ready for requests: its runner, its tokenizer, its limits, and what they allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from redepth.checkpoint.load import load, load_tokenizer
from redepth.errors import RedepthError, first_line
from redepth.modeling import DepthPolicy, RecurrentDepthForCausalLM
from redepth.modeling.extensions import is_import_path

from .engine import Engine
from .limits import Limits, Refusal
from .runner import Runner


@dataclass
class Served:
    """One model behind its engine.

    Attributes:
        name: as requests call it.
        checkpoint: the folder or hub id that it came from.
    """

    name: str
    checkpoint: str
    model: Any
    tokenizer: Any
    runner: Runner
    limits: Limits

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        limits: Limits,
        *,
        name: str | None = None,
        max_rows: int,
        max_tokens: int,
        dtype: str = "auto",
        device: Any = "cpu",
    ) -> "Served":
        """Load a checkpoint and make its engine; the runner is not started.

        Raises:
            RedepthError: for a checkpoint without a tokenizer or without a depth, and as `load`.
        """
        tokenizer = load_tokenizer(checkpoint)
        model = load(checkpoint, dtype, device, few_token_kernels=True)
        if not isinstance(model, RecurrentDepthForCausalLM):
            raise RedepthError(f"checkpoint {str(checkpoint)!r} has no depth to serve; convert it with redepth convert")
        engine = Engine(model, max_rows=max_rows, max_tokens=max_tokens)
        return cls(name or usual_name(checkpoint), str(checkpoint), model, tokenizer, Runner(engine, limits), limits)

    @property
    def room(self) -> int:
        """The longest prompt that is accepted, in tokens."""
        return min(self.limits.prompt_tokens, self.model.config.block_size)

    @property
    def most_steps(self) -> int:
        return min(self.limits.num_steps, self.model.config.max_num_steps)

    def policy(self, **keywords: Any) -> DepthPolicy:
        """The policy that a request asks for.

        Raises:
            Refusal: for what `DepthPolicy.resolve` refuses, more steps than the limit, and an exit test by import path.
        """
        if keywords.get("draft_steps") is not None:
            raise Refusal("draft_steps is not supported by the server; leave it out", param="draft_steps")
        criterion = keywords.get("criterion")
        if isinstance(criterion, str) and is_import_path(criterion):
            # Importing runs code, which only the one who started the server may choose.
            raise Refusal(
                f"criterion {criterion!r} is an import path; name a test that the server has", param="criterion"
            )
        try:
            policy = DepthPolicy.resolve(self.model.config, **keywords)
        except ValueError as error:
            raise Refusal(first_line(error), param=_named_in(error, keywords)) from None
        if policy.num_steps > self.most_steps:
            raise Refusal(
                f"num_steps is {policy.num_steps}, but this server allows {self.most_steps}; ask for fewer",
                param="num_steps",
            )
        return policy

    def encode(self, text: str) -> list[int]:
        """A prompt as ids.

        Raises:
            Refusal: as `check_prompt`.
        """
        return self.check_prompt(self.tokenizer(text)["input_ids"])

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation as ids, through the chat template.

        Raises:
            Refusal: where there is no template, it fails, or as `check_prompt`.
        """
        if not self.tokenizer.chat_template:
            raise Refusal(f"model {self.name!r} has no chat template; use /v1/completions", param="messages")
        try:
            rendered = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise Refusal(
                f"the model's chat template refuses these messages: {first_line(error)}", param="messages"
            ) from None
        return self.check_prompt(rendered["input_ids"], "messages")

    def check_prompt(self, ids: Sequence[int], param: str = "prompt") -> list[int]:
        """The ids of a prompt that fits.

        Raises:
            Refusal: for an empty prompt, one that is too long, and ids that the model does not know.
        """
        if not ids:
            raise Refusal("the prompt is empty; give at least one token", param=param)
        if len(ids) > self.room:
            message = f"the prompt has {len(ids)} tokens, but {self.room} are allowed; shorten it"
            raise Refusal(message, code="context_length_exceeded", param=param)
        vocabulary = self.model.config.vocab_size
        strange = next((token for token in ids if not 0 <= token < vocabulary), None)
        if strange is not None:
            raise Refusal(f"token id {strange} is none of this model's, 0 to {vocabulary - 1}", param=param)
        return list(ids)

    def room_for(self, prompt: Sequence[int], asked: int | None, usual: int, param: str = "max_tokens") -> int:
        """How many tokens an answer may have: what is asked, or `usual`, as far as the model has room.

        Raises:
            Refusal: for more than the limit.
        """
        if asked is not None and asked > self.limits.new_tokens:
            raise Refusal(
                f"{param} is {asked}, but this server allows {self.limits.new_tokens}; ask for fewer", param=param
            )
        # The last token is not run, so it needs no room.
        left = self.model.config.block_size + 1 - len(prompt)
        return min(asked or usual, self.limits.new_tokens, left)


def usual_name(checkpoint: str | Path) -> str:
    """What a model is called where nobody says: its folder's name."""
    return Path(checkpoint).expanduser().resolve().name


def _named_in(error: Exception, keywords: dict[str, Any]) -> str | None:
    """The keyword that a message is about: the first that it mentions."""
    text = str(error)
    places = {name: text.find(name) for name in keywords if name in text}
    if places:
        return min(places, key=lambda name: places[name])
    return "exit_threshold" if "threshold" in text else None
