"""`redepth eval`: tasks and texts at every depth of a checkpoint, beside other models, into a folder."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from redepth.checkpoint.folder import write_json
from redepth.checkpoint.load import read_config
from redepth.errors import RedepthError
from redepth.modeling.exits import ExitTest, Measure, find_exit_test
from redepth.runtime import require

from .answers import Answers, key_of
from .asking import SEEDS, ask, check_fits, language_model
from .models import Column, Entrant, entrant, fingerprint, merged, open_model, open_tokenizer, rival, versions
from .presets import TaskList, find_preset
from .problems import PROBLEMS, AskedTask
from .published import PublishedTable
from .scores import Difference, Samples, Score, Work, differences, samples_of, scores_of
from .stock_tasks import check_known, load_tasks, local_files
from .tables import TextTable, accuracy_tables, published_table, score_tables, text_tables
from .task_scores import TaskRun, write_answers
from .tasks import TaskAccuracy
from .texts import PREFIX, TextLoss, TextSpec, losses_of, summarise, token_table

RESULTS_FILE, ANSWERS_FILE, TABLE_FILE = "results.json", "answers.sqlite", "table.md"
DOCUMENTS_FILE, PROBLEMS_FILE = "documents.parquet", "problems.parquet"
HARNESS_FOLDER = "lm-eval"

OnPart = Callable[[str, float], None]


@dataclass
class DepthEvaluation:
    """
    Attributes:
        by_difficulty: of `task:` specs, one for each task and model.
        scores, differences: of tasks; the differences are between any two rows of the table.
        texts: of `text:` specs.
        manifest: what the figures depend on.
        out: the folder they were written to.
    """

    by_difficulty: list[TaskAccuracy] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    texts: list[TextLoss] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None

    def tables(self) -> list[TextTable]:
        """Of tasks, of their problems by difficulty, and of texts."""
        tasks = score_tables(self.scores, self.differences) + accuracy_tables(self.by_difficulty)
        published = self._published()
        beside = published_table(self.scores, published, self.manifest["limit"]) if published else None
        return tasks + ([beside] if beside else []) + text_tables(self.texts)

    def _published(self) -> PublishedTable | None:
        preset = self.manifest.get("preset")
        return find_preset(preset).published if preset is not None else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "tasks_by_difficulty": [one.as_dict() for one in self.by_difficulty],
            "scores": [one.as_dict() for one in self.scores],
            "differences": [one.as_dict() for one in self.differences],
            "texts": [one.as_dict() for one in self.texts],
            "published": published.as_dict() if (published := self._published()) else None,
            "manifest": self.manifest,
        }


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        limit: documents of each task, from the first on, None for all; or problems of each split, None for `PROBLEMS`.
        data_dir: a folder with the rows of each task, in place of the hub.
        compare: further models; see `models.rival`.
        preset: the name of the preset that the lists come from.
        seed, questions: of the problems of `task:` specs, and in each of them in words.
    """

    num_steps: tuple[int, ...]
    criterion: str | ExitTest | Measure | None = None
    exit_threshold: float | str = "auto"
    limit: int | None = None
    batch_size: int = 8
    data_dir: Path | None = None
    compare: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "cpu"
    preset: str | None = None
    seed: int = 0
    questions: int = 1

    def check(self) -> None:
        """
        Raises:
            RedepthError: for a number that does not fit, and an exit test or a folder that does not exist.
        """
        for name, value in (("num_steps", min(self.num_steps, default=0)), ("batch_size", self.batch_size)):
            if value < 1:
                raise RedepthError(f"{name} must be at least 1, got {value}")
        if self.limit is not None and self.limit < 1:
            raise RedepthError(f"limit must be at least 1, got {self.limit}")
        if self.criterion is not None:
            find_exit_test(self.criterion)
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise RedepthError(f"--data-dir {str(self.data_dir)!r} is no folder; give the one with the tasks' rows")


def check_out(out: Path) -> None:
    """
    Raises:
        RedepthError: for a file, and for a folder with something in it that `redepth eval` did not write.
    """
    if out.exists() and not out.is_dir():
        raise RedepthError(f"{out} is a file, not a folder; give another --out")
    entries = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if entries and not entries & {RESULTS_FILE, ANSWERS_FILE}:
        raise RedepthError(f"{out} holds something else than an evaluation; give another --out")


def evaluate_across_depths(
    checkpoint: str,
    lists: Sequence[TaskList],
    texts: Sequence[str],
    settings: Settings,
    out: Path,
    on_part: OnPart | None = None,
    problems: Sequence[str | None] = (),
) -> DepthEvaluation:
    """Every task and text at every depth, and of every model to compare with.

    Args:
        lists: tasks of lm-eval.
        texts: `text:` specs.
        out: folder to write; one that an earlier call began is gone on with.
        problems: `task:` specs; None for the task that a small model was trained on.

    Raises:
        RedepthError: for anything that does not fit, before any compute.
    """
    settings.check()
    own = entrant(checkpoint, settings.num_steps, settings.criterion, settings.exit_threshold)
    entrants = merged([own, *(rival(text, settings.num_steps) for text in settings.compare)])
    check_out(out)
    require("matplotlib", "plots")
    task_runs = _task_runs(checkpoint, problems, entrants, settings)
    names = [name for one in lists for name in one.tasks]
    if names:
        check_known(names)
        if settings.data_dir is not None:
            local_files(names, settings.data_dir)
    tokenizers = [open_tokenizer(one) for one in entrants]
    for one in lists:
        for each, tokenizer in zip(entrants, tokenizers, strict=True):
            if one.chat and tokenizer.chat_template is None:
                raise RedepthError(f"{each.name!r} has no chat template, which {one.tasks[0]!r} is asked in here")
    rows = _rows(texts, entrants, tokenizers)
    loaded = [load_tasks(one.tasks, settings.data_dir, one.changes) for one in lists]
    for tasks, one in zip(loaded, lists, strict=True):
        check_fits(tasks, one, settings.limit, entrants, tokenizers)
    found = DepthEvaluation(out=out)
    found.manifest = _manifest(checkpoint, entrants, lists, texts, task_runs, settings)
    out.mkdir(parents=True, exist_ok=True)
    answers = Answers(out / ANSWERS_FILE)
    runs: list[tuple[str, str, Samples]] = []
    losses: list[dict[Any, Any]] = [{} for _ in texts]
    dtype: Any = settings.dtype
    for each, tokenizer in zip(entrants, tokenizers, strict=True):
        model = open_model(each, dtype, settings.device)
        dtype = model.dtype  # the others are measured as the first is
        found.manifest["models"][each.name]["dtype"] = str(dtype).removeprefix("torch.")
        told = _told(on_part, Path(each.name).name)
        known = {name: value for name, value in found.manifest["models"][each.name].items() if name != "columns"}
        identity = key_of(known, settings.device, settings.batch_size)
        for run in task_runs:
            run.ask(each, model, tokenizer, answers, identity, settings.exit_threshold, told("problems"))
        if names:
            lm = language_model(model, tokenizer, settings.batch_size, answers, identity)
            for number, (tasks, asked) in enumerate(zip(loaded, lists, strict=True)):
                for column, results, costs in ask(lm, each, tasks, asked, settings.limit, told):
                    found.scores += scores_of(results, costs, Work.of(model), each.name, column.name)
                    runs.append((each.name, column.name, samples_of(results)))
                    found.manifest["tasks"] |= results["versions"]
                    _write_harness(out, each, column, number if len(lists) > 1 else None, results, found.manifest)
        for kept, by_source in zip(losses, rows, strict=True):
            kept |= losses_of(each.name, model, by_source, each.num_steps(), told("texts"))
        del model
    answers.close()
    found.differences = differences(runs)
    for run in task_runs:
        found.scores += run.scores
        found.differences += run.differences()
        found.by_difficulty += run.accuracies
    for spec, kept, by_source in zip(texts, losses, rows, strict=True):
        found.texts += summarise(spec, kept)
        pq.write_table(token_table(kept, by_source, tokenizers[0]), out / f"{_file_name(spec)}.parquet")
    _write_documents(out, runs)
    if task_runs:
        write_answers(task_runs, out / PROBLEMS_FILE)
    _draw(found, out)
    (out / TABLE_FILE).write_text("\n\n".join(table.as_markdown() for table in found.tables()) + "\n", encoding="utf-8")
    write_json(out / RESULTS_FILE, found.as_dict())
    return found


def _draw(found: DepthEvaluation, out: Path) -> None:
    from .plots import plot_accuracy_against_flops, write_heat_maps

    if found.scores:
        for kind in ("png", "svg"):
            plot_accuracy_against_flops(found.scores, out / f"accuracy.{kind}")
    write_heat_maps(found.by_difficulty, out)


def _task_runs(
    checkpoint: str, specs: Sequence[str | None], entrants: Sequence[Entrant], settings: Settings
) -> list[TaskRun]:
    limit = PROBLEMS if settings.limit is None else settings.limit
    found = []
    for spec in specs:
        asked = AskedTask.of(checkpoint, spec)
        for one in entrants[1:]:
            asked.check_reads(one.name)
        found.append(TaskRun(asked, limit, settings.seed, settings.questions))
    return found


def _rows(
    texts: Sequence[str], entrants: Sequence[Entrant], tokenizers: Sequence[Any]
) -> list[dict[str, torch.Tensor]]:
    for one, tokenizer in zip(entrants, tokenizers, strict=True):
        if texts and tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise RedepthError(
                f"{one.name!r} has other tokens than {entrants[0].name!r}; their losses can't be compared, so leave {PREFIX} or "
                "that model out"
            )
    found = []
    for text in texts:
        spec = TextSpec.parse(text)
        most = min((read_config(one.name)[0].block_size for one in entrants if one.has_loop), default=spec.length)
        if spec.length > most:
            raise RedepthError(
                f"{text!r}: rows of {spec.length} tokens are longer than the {most} that the model reads"
            )
        found.append(spec.rows_by_source(tokenizers[0]))
    return found


def _told(on_part: OnPart | None, model: str) -> Callable[[str], Callable[[int, int], None]]:
    def of(part: str) -> Callable[[int, int], None]:
        def share(done: int, total: int) -> None:
            if on_part is not None:
                on_part(f"{model[-14:]} {part}", done / total)

        return share

    return of


def _manifest(
    checkpoint: str,
    entrants: Sequence[Entrant],
    lists: Sequence[TaskList],
    texts: Sequence[str],
    task_runs: Sequence[TaskRun],
    settings: Settings,
) -> dict[str, Any]:
    """What the figures depend on; versions of tasks and dtypes are added as they are known."""
    config, _ = read_config(checkpoint)
    return {
        "checkpoint": checkpoint,
        "models": {
            one.name: fingerprint(one)
            | {"columns": {column.name: str(column.policy) if column.policy else None for column in one.columns}}
            for one in entrants
        },
        "versions": versions(),
        "tasks": {},
        "prompts": [one.as_dict() for one in lists],
        "problems": [one.as_dict() for one in task_runs],
        "texts": list(texts),
        "preset": settings.preset,
        "limit": settings.limit,
        "data_dir": str(settings.data_dir) if settings.data_dir is not None else None,
        "batch_size": settings.batch_size,
        "device": settings.device,
        "seeds": SEEDS,
        "state_seed": config.state_seed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in text).strip("-")


def _write_harness(
    out: Path, one: Entrant, column: Column, part: int | None, results: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """lm-eval's own JSON, as `lm_eval --output_path` writes it, with the manifest for its `config`."""
    from lm_eval.utils import handle_non_serializable

    folder = out / HARNESS_FOLDER / _file_name(Path(one.name).name)
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in results.items() if name != "samples"}
    config = {"model": "redepth", "model_args": {"pretrained": one.name, "policy": str(column.policy)}}
    content["config"] = config | {"manifest": manifest}
    name = _file_name(column.name) + (f"-{part + 1}" if part is not None else "")
    write_json(folder / f"{name}.json", json.loads(json.dumps(content, default=handle_non_serializable)))


def _write_documents(out: Path, runs: Sequence[tuple[str, str, Samples]]) -> None:
    """Every document's own value, from which any other comparison can be made."""
    if not runs:
        return
    names = ("model", "depth", "task", "metric", "filter", "document", "value")
    rows = [
        (model, depth, *key, document, value)
        for model, depth, samples in runs
        for key, by_document in samples.items()
        for document, value in by_document.items()
    ]
    table = pa.table({name: [row[number] for row in rows] for number, name in enumerate(names)})
    pq.write_table(table, out / DOCUMENTS_FILE)
