"""The settings under which published recurrent models were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from redepth.errors import RedepthError

from .published import HUGINN, PublishedTable


@dataclass(frozen=True)
class TaskList:
    """Tasks of lm-eval that are asked in the same way.

    Attributes:
        tasks: their names.
        num_fewshot: examples in each prompt; None for each task's own number.
        chat: whether prompts are put into the tokenizer's chat template.
        multiturn: whether examples are turns of the chat, not text in one turn.
        add_bos_token: whether a text begins with the tokenizer's first token; None for what the tokenizer does.
        max_length: tokens that the model is given at most; None for what it allows.
        changes: by task, keys of lm-eval's configuration that differ.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    system_instruction: str | None = None
    chat: bool = False
    multiturn: bool = False
    add_bos_token: bool | None = None
    max_length: int | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        lists: what is asked.
        num_steps: the depths of the published rows.
        dtype: that the published runs used.
        source: where the settings stand.
        published: what was measured so, where the figures are known here.
    """

    lists: tuple[TaskList, ...]
    num_steps: tuple[int, ...]
    dtype: str
    source: str
    published: PublishedTable | None = None


PRESETS: dict[str, Preset] = {
    "huginn": Preset(
        (
            TaskList(
                ("arc_easy", "arc_challenge", "hellaswag", "mmlu", "openbookqa", "piqa", "sciq", "winogrande"),
                num_fewshot=0,
            ),
            TaskList(
                ("gsm8k_cot",),
                system_instruction="You are a helpful assistant that can assist users with mathematical reasoning.",
                chat=True,
                multiturn=True,
            ),
        ),
        (4, 8, 16, 32),
        "bfloat16",
        "Geiping et al. 2025, arXiv:2502.05171, table 1; invocations in the README of "
        "github.com/seal-rg/recurrent-pretraining, section Reproducing Benchmark Scores",
        HUGINN,
    ),
    "retrofit": Preset(
        (
            TaskList(
                (
                    "lambada_openai",
                    "hellaswag",
                    "arc_easy",
                    "arc_challenge",
                    "mmlu",
                    "openbookqa",
                    "piqa",
                    "social_iqa",
                    "winogrande",
                    "asdiv",
                ),
                add_bos_token=True,
            ),
            TaskList(
                ("gsm8k_cot", "minerva_math"),
                num_fewshot=1,
                add_bos_token=True,
                max_length=1024,
                changes={"gsm8k_cot": {"doc_to_text": "Q: {{question}}\nA: Let's think step by step."}},
            ),
        ),
        (1, 2, 4, 8, 16, 32),
        "float32",
        "McLeish et al. 2025, arXiv:2511.07384; shells/eval.sh and eval_yamls/gsm8k-cot-sean.yaml of "
        "github.com/mcleish7/retrofitting-recurrence",
    ),
}


def find_preset(name: str) -> Preset:
    """
    Raises:
        RedepthError: for a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise RedepthError(f"preset {name!r} is unknown; use {' or '.join(PRESETS)}")
    return PRESETS[name]


def narrowed(lists: Sequence[TaskList], names: Sequence[str]) -> list[TaskList]:
    """Only those tasks of some lists that are named.

    Raises:
        RedepthError: for a name that is in none of them.
    """
    known = [task for one in lists for task in one.tasks]
    for name in names:
        if name not in known:
            raise RedepthError(f"task {name!r} is not in the preset; it has {', '.join(known)}")
    kept = [(one, tuple(task for task in one.tasks if task in names)) for one in lists]
    return [TaskList(**{**vars(one), "tasks": tasks}) for one, tasks in kept if tasks]
