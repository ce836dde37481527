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

from redepth.checkpoint.folder import CheckpointFolder, write_json
from redepth.checkpoint.load import load, load_tokenizer, read_config
from redepth.data.tasks import is_task
from redepth.errors import RedepthError
from redepth.evaluation.models import Entrant, open_model, open_tokenizer, rival
from redepth.evaluation.problems import AskedTask, recorded_task
from redepth.modeling import RecurrentDepthForCausalLM

from .contraction import Stretch
from .measure import Course, check_depth, measure_course, stretch_by_step
from .plots import require_matplotlib
from .report import write_report
from .summary import make_tables, summarise, verdict
from .texts import Text, held_out, loss_and_right, problems
from .texts import prompts as prompt_texts

# Steps at which the Jacobian is looked at, as far as the run goes.
STRETCHED_STEPS = (1, 2, 4, 8, 16, 32, 64)
SUMMARY_FILE = "summary.json"

OnPart = Callable[[str, float], None]


@dataclass(frozen=True)
class Analysis:
    """One checkpoint's answers.

    Attributes:
        name: as the user wrote it.
        courses: by text; empty for a model without a loop, or at a single depth.
        figures: see `summary.summarise`; without courses only `loss` and, of a task, `right`, one value each.
        verdict: in words.
    """

    name: str
    courses: list[Course]
    figures: dict[str, Any]
    verdict: str


def analyze_model(
    name: str,
    model: RecurrentDepthForCausalLM,
    texts: Sequence[Text],
    num_steps: int,
    on_part: OnPart | None = None,
) -> Analysis:
    """Every text through one model; contraction is looked at on the first."""
    courses = []
    for done, text in enumerate(texts):
        courses.append(measure_course(model, text, num_steps))
        if on_part is not None:
            on_part(name, (done + 1) / (len(texts) + 1))
    stretches: dict[int, Stretch] = {}
    if not model.config.has_lru:  # whose scan has no forward-mode derivative
        steps = [step for step in STRETCHED_STEPS if step <= num_steps]
        stretches = stretch_by_step(model, texts[0].ids, num_steps, steps)
    if on_part is not None:
        on_part(name, 1.0)
    figures = summarise(courses, stretches, num_steps)
    return Analysis(name, courses, figures, verdict(figures))


@torch.no_grad()
def _at_one_depth(one: Entrant, model: Any, texts: Sequence[Text]) -> Analysis:
    """A model without a loop, or at a single depth: its loss and right answers, to hold the others' against."""
    policy = one.columns[0].policy
    depth = {} if policy is None else {"policy": policy}
    loss, right, known = 0.0, 0, 0
    for text in texts:
        logits = model(torch.tensor([text.ids], device=model.device), use_cache=False, **depth).logits[0]
        added = loss_and_right(logits, text)
        loss, right, known = loss + added[0], right + added[1], known + added[2]
    figures: dict[str, Any] = {"loss": [round(loss / known, 5)]}
    said = f"{'No loop' if policy is None else f'Run at r = {policy.num_steps} alone'}; "
    if texts[0].difficulty is None:
        return Analysis(one.name, [], figures, f"{said}the loss is {loss / known:.3f} nats.")
    figures |= {"answers": known, "right": [round(right / known, 4)]}
    return Analysis(one.name, [], figures, f"{said}of {known} answers {right / known:.0%} are right.")


def _texts(
    checkpoint: str | Path, tokenizer: Any, given: Sequence[str], data: str | None, column: str, rows: int, length: int
) -> list[Text]:
    if data is None:
        return prompt_texts(tokenizer, given)
    if not is_task(data):
        return held_out(tokenizer, data, column, length, rows)
    return problems(AskedTask.of(checkpoint, data), tokenizer, read_config(checkpoint)[0].vocab_size, rows)


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
            `sequence_length` tokens of column `text_column` are read, or a `task:` spec, of which `rows` held-out problems
            are. A small model's own task by default.
        out: folder to write; the checkpoint's name with `-analysis` by default, where the command runs.
        num_steps: how deep to go, at least 7.
        compare: another model for the same texts, with the same tokens: a recurrent checkpoint, one at another depth as
            `FOLDER:R`, or a model without a loop. Of the last two only loss and right answers are told.
        on_part: called with (checkpoint, share done).

    Returns:
        what `summary.json` holds: `verdict`, `figures`, and the same of `compare`.

    Raises:
        RedepthError: for neither or both kinds of texts, no tokenizer, a text that is too long, too few steps; before
            any compute.
    """
    if not prompts and data is None:
        data = recorded_task(checkpoint)
    if bool(prompts) == (data is not None):
        raise RedepthError("give either prompts or data to look at")
    if rows < 1 or sequence_length < 2:
        raise RedepthError(f"rows {rows} and sequence_length {sequence_length} must be at least 1 and 2")
    check_depth(num_steps)
    require_matplotlib()
    config, _ = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    other = rival(str(compare), [num_steps]) if compare is not None else None
    if other is not None and open_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        raise RedepthError(f"{other.name!r} has other tokens than {str(checkpoint)!r}; their steps can't be compared")
    texts = _texts(checkpoint, tokenizer, prompts, data, text_column, rows, sequence_length)
    longest = max(len(text.ids) for text in texts)
    if longest > config.block_size:
        raise RedepthError(f"a text of {longest} tokens is more than the {config.block_size} this model allows")
    folder = Path(out) if out is not None else Path(f"{Path(checkpoint).name}-analysis")
    place = CheckpointFolder(folder)
    place.check_replaceable(overwrite)

    model: Any = load(checkpoint, dtype, device)
    found = [analyze_model(str(checkpoint), model, texts, num_steps, on_part)]
    precision = model.dtype
    del model
    if other is not None:
        held: Any = open_model(other, precision, device)
        # A depth that was named is the one to look at; from seven steps on there is a course to see.
        if other.num_steps() == [num_steps]:
            found.append(analyze_model(other.name, held, texts, num_steps, on_part))
        else:
            found.append(_at_one_depth(other, held, texts))
        del held
    with place.replacing(overwrite) as beside:
        made_by = {
            "redepth": version("redepth"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "dtype": str(precision).removeprefix("torch."),
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
