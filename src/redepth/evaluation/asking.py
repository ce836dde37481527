"""A list of lm-eval's tasks asked of one model at each of its depths."""

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from redepth.checkpoint.load import read_config
from redepth.checkpoint.sources import open_source
from redepth.errors import RedepthError

from .answers import Answers
from .models import Column, Entrant
from .presets import TaskList
from .quiet import quiet

BOOTSTRAP = 1000  # draws for the errors that have no formula
# lm-eval's own: of python, of numpy and torch, and of the examples in the prompt.
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
SPECIAL_TOKENS = 8  # more than any tokenizer puts around a text


def language_model(model: Any, tokenizer: Any, batch_size: int, answers: Answers, identity: str) -> Any:
    """A `RedepthLM` that keeps its answers."""
    from .harness import RedepthLM

    with quiet():
        lm = RedepthLM(model, tokenizer=tokenizer, batch_size=batch_size)
    lm.answers, lm.identity = answers, identity
    return lm


def flat(tasks: Sequence[Any]) -> dict[str, Any]:
    """lm-eval's `tasks` and `groups` by name."""
    from lm_eval.tasks import TaskManager

    loaded: Any = TaskManager(include_defaults=False).load(list(tasks))
    return loaded


def set_examples(task: Any, num_fewshot: int | None) -> None:
    """As lm-eval's `simple_evaluate` does it: a task that says 0 itself keeps 0."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])


def prompt_options(asked: TaskList) -> dict[str, Any]:
    return {
        "system_instruction": asked.system_instruction,
        "apply_chat_template": asked.chat,
        "fewshot_as_multiturn": asked.multiturn,
    }


def ask(
    lm: Any,
    one: Entrant,
    tasks: Sequence[Any],
    asked: TaskList,
    limit: int | None,
    told: Callable[[str], Callable[[int, int], None]],
) -> Iterator[tuple[Column, dict[str, Any], dict[str, Any]]]:
    """For each of a model's depths: lm-eval's results, and the costs by task.

    Args:
        lm: the model's `RedepthLM`.
        told: gives for a part's name what to call with (done, in all).
    """
    from lm_eval.evaluator import evaluate

    lm.add_bos_token = asked.add_bos_token
    lm.set_max_length(asked.max_length)
    lm.policies = [column.policy for column in one.columns]
    chosen = flat(tasks)
    for column in one.columns:
        lm.policy = column.policy
        lm.costs.clear()
        lm.on_batch = partial(_pass_on, told, column.name)
        for task in chosen["tasks"].values():
            set_examples(task, asked.num_fewshot)
        random.seed(SEEDS["python"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        with quiet():
            results: Any = evaluate(lm, chosen, limit=limit, bootstrap_iters=BOOTSTRAP, **prompt_options(asked))
        yield column, results, dict(lm.costs)


def _pass_on(told: Callable[[str], Callable[[int, int], None]], column: str, kind: str, done: int, total: int) -> None:
    # Likelihoods are computed for all depths at once.
    told(kind if kind == "likelihoods" else f"{kind} {column}")(done, total)


def check_fits(
    tasks: Sequence[Any], asked: TaskList, limit: int | None, entrants: Sequence[Entrant], tokenizers: Sequence[Any]
) -> None:
    """Make every prompt, and see that each model can read it.

    Raises:
        RedepthError: for a prompt that is too long, which lm-eval would cut, or that can't be made.
    """
    for number, (one, tokenizer) in enumerate(zip(entrants, tokenizers, strict=True)):
        most = min(asked.max_length or longest_text(one), longest_text(one))
        for task in flat(tasks)["tasks"].values():
            if asked.chat or number == 0:
                set_examples(task, asked.num_fewshot)
                template = {"chat_template": partial(in_chat, tokenizer)} if asked.chat else {}
                try:
                    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # where it draws a bar
                        task.build_all_requests(limit=limit, **prompt_options(asked), **template)
                except Exception as error:  # of the task's own code, and of rows that are not what it expects
                    raise RedepthError(
                        f"task {task.config.task!r} can't make its prompts, {type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}; are its rows as on the hub?"
                    ) from None
            for request in task.instances:
                check_length(request, tokenizer, most)


def in_chat(tokenizer: Any, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A chat as the tokenizer's template writes it."""
    text: str = tokenizer.apply_chat_template(
        chat_history,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    return text


def longest_text(one: Entrant) -> int:
    """Tokens that a model reads at most."""
    if one.has_loop:
        return read_config(one.name)[0].block_size
    return int(getattr(open_source(one.name).config, "max_position_embeddings", None) or 2**31)


def check_length(request: Any, tokenizer: Any, most: int) -> None:
    """
    Raises:
        RedepthError: for a request of more than `most` tokens, room to answer included.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    if request.request_type == "loglikelihood":
        room, text = -1, "".join(request.args)  # the last token is only predicted
    elif request.request_type == "generate_until":
        room, text = normalize_gen_kwargs(request.args[1])["max_gen_toks"], request.args[0]
    else:
        return
    # No tokenizer makes more tokens than bytes, so most requests need no closer look.
    if len(text.encode()) + SPECIAL_TOKENS + room <= most:
        return
    tokens = len(tokenizer(text, verbose=False)["input_ids"]) + room
    if tokens > most:
        for_answer = f", {room} of them for the answer," if room > 0 else ""
        raise RedepthError(
            f"task {request.task_name!r}, document {request.doc_id}: {tokens} tokens{for_answer} are more than the {most} "
            "that the model reads; give fewer examples (--num-fewshot) or leave the task out"
        )
