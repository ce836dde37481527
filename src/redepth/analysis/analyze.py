"""`redepth analyze`: texts through one checkpoint or two, and a folder with report, pictures and tables out."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from redepth.checkpoint.folder import CheckpointFolder, write_json
from redepth.checkpoint.load import is_recurrent, load, load_tokenizer, read_config
from redepth.data.rows import held_out_text
from redepth.errors import RedepthError, first_line
from redepth.evaluation.held_out import next_token_loss
from redepth.modeling import RecurrentDepthForCausalLM

from .contraction import Stretch
from .measure import Course, check_depth, measure_course, stretch_by_step
from .plots import require_matplotlib
from .report import write_report
from .summary import make_tables, summarise, verdict

# Steps at which the Jacobian is looked at, as far as the run goes.
STRETCHED_STEPS = (1, 2, 4, 8, 16, 32, 64)
SUMMARY_FILE = "summary.json"

OnPart = Callable[[str, float], None]


@dataclass(frozen=True)
class Analysis:
    """One checkpoint's answers.

    Attributes:
        name: as the user wrote it.
        courses: by text; empty for a model without a loop.
        figures: see `summary.summarise`; of a model without a loop `loss` alone, one value.
        verdict: in words.
    """

    name: str
    courses: list[Course]
    figures: dict[str, Any]
    verdict: str


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        RedepthError: for a prompt of fewer than two tokens.
    """
    texts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, texts, strict=True):
        if len(ids) < 2:
            raise RedepthError(
                f"prompt {prompt!r} has {len(ids)} tokens; give at least 2, so that one can be predicted"
            )
    return texts


def analyze_model(
    name: str,
    model: RecurrentDepthForCausalLM,
    texts: Sequence[Sequence[int]],
    tokenizer: Any,
    num_steps: int,
    on_part: OnPart | None = None,
) -> Analysis:
    """Every text through one model; contraction is looked at on the first."""
    courses = []
    for done, ids in enumerate(texts):
        courses.append(measure_course(model, ids, [tokenizer.decode([token]) for token in ids], num_steps))
        if on_part is not None:
            on_part(name, (done + 1) / (len(texts) + 1))
    stretches: dict[int, Stretch] = {}
    if not model.config.has_lru:  # whose scan has no forward-mode derivative
        steps = [step for step in STRETCHED_STEPS if step <= num_steps]
        stretches = stretch_by_step(model, texts[0], num_steps, steps)
    if on_part is not None:
        on_part(name, 1.0)
    figures = summarise(courses, stretches, num_steps)
    return Analysis(name, courses, figures, verdict(figures))


def _static_analysis(name: str, texts: Sequence[Sequence[int]], dtype: Any, device: str) -> Analysis:
    """A model without a loop: its loss, to hold the others' against."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise RedepthError(f"checkpoint {name!r} can't be read: {first_line(error)}") from None
    with torch.no_grad():
        total = sum(next_token_loss(model, torch.tensor([ids])) * (len(ids) - 1) for ids in texts)
    loss = total / sum(len(ids) - 1 for ids in texts)
    return Analysis(name, [], {"loss": [round(loss, 5)]}, f"No loop; the loss is {loss:.3f} nats.")


def analyze(
    checkpoint: str | Path,
    prompts: Sequence[str] = (),
    data: str | None = None,
    out: str | Path | None = None,
    num_steps: int = 32,
    compare: str | Path | None = None,
    text_column: str = "text",
    rows: int = 4,
    sequence_length: int = 128,
    dtype: str = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    on_part: OnPart | None = None,
) -> dict[str, Any]:
    """Look inside the loop on some texts, and write what is seen.

    The folder gets `report.html`, which needs nothing beside it; `pictures/` as PNG and SVG; `tokens.parquet`,
    `steps.parquet` and `attention.parquet`, whose columns are described in their metadata; and `summary.json`.

    Args:
        checkpoint: folder or hub id.
        prompts: texts; or `data`, held-out text as `redepth calibrate` takes it, of which `rows` rows of
            `sequence_length` tokens of column `text_column` are read.
        out: folder to write; the checkpoint's name with `-analysis` by default, where the command runs.
        num_steps: how deep to go, at least 7.
        compare: another checkpoint for the same texts, recurrent or not, with the same tokens.
        on_part: called with (checkpoint, share done).

    Returns:
        what `summary.json` holds: `verdict`, `figures`, and the same of `compare`.

    Raises:
        RedepthError: for neither or both kinds of texts, no tokenizer, a text that is too long, too few steps; before
            any compute.
    """
    if bool(prompts) == (data is not None):
        raise RedepthError("give either prompts or data to look at")
    if rows < 1 or sequence_length < 2:
        raise RedepthError(f"rows {rows} and sequence_length {sequence_length} must be at least 1 and 2")
    check_depth(num_steps)
    require_matplotlib()
    config, _ = read_config(checkpoint)
    with_loop = compare is not None and is_recurrent(compare)
    tokenizer = load_tokenizer(checkpoint)
    if compare is not None and load_tokenizer(compare).get_vocab() != tokenizer.get_vocab():
        raise RedepthError(f"{str(compare)!r} has other tokens than {str(checkpoint)!r}; their steps can't be compared")
    if data is None:
        texts = encode_prompts(tokenizer, prompts)
    else:
        texts = held_out_text(tokenizer, data, text_column, sequence_length, rows).tolist()
    longest = max(len(ids) for ids in texts)
    if longest > config.block_size:
        raise RedepthError(f"a text of {longest} tokens is more than the {config.block_size} this model allows")
    folder = Path(out) if out is not None else Path(f"{Path(checkpoint).name}-analysis")
    place = CheckpointFolder(folder)
    place.check_replaceable(overwrite)

    model: Any = load(checkpoint, dtype, device)
    found = [analyze_model(str(checkpoint), model, texts, tokenizer, num_steps, on_part)]
    precision = str(model.dtype).removeprefix("torch.")
    del model
    if with_loop:
        other: Any = load(str(compare), dtype, device)
        found.append(analyze_model(str(compare), other, texts, tokenizer, num_steps, on_part))
    elif compare is not None:
        found.append(_static_analysis(str(compare), texts, dtype, device))
    with place.replacing(overwrite) as beside:
        made_by = {
            "redepth": version("redepth"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "dtype": precision,
            "device": device,
            "texts": data if data is not None else "prompts",
        }
        summary: dict[str, Any] = {
            "checkpoint": found[0].name,
            "verdict": found[0].verdict,
            "figures": found[0].figures,
            "made_by": made_by,
        }
        if len(found) > 1:
            summary["compare"] = {"checkpoint": found[1].name, "verdict": found[1].verdict, "figures": found[1].figures}
        write_json(beside / SUMMARY_FILE, json.loads(json.dumps(summary)))
        for number, one in enumerate(found):
            if one.courses:
                for table, content in make_tables(one.courses).items():
                    pq.write_table(content, beside / f"{'compare-' * number}{table}.parquet")
        write_report(beside, found, tokenizer, made_by)
    return summary | {"out": str(folder)}
