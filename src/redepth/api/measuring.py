"""Verbs that look at a checkpoint, or load it for use."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redepth.errors import RedepthError

from .progress import OnProgress, shares

if TYPE_CHECKING:
    import torch

    from redepth.evaluation.across_depths import DepthEvaluation
    from redepth.griffin import RecurrentGemmaForCausalLM
    from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM
    from redepth.modeling.exits import ExitTest, Measure
    from redepth.surgery.verify import Verification


def verify(
    out: str | Path,
    against: str | Path | None = None,
    *,
    device: "str | torch.device" = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
) -> "Verification":
    """Compare a converted checkpoint, and its full-cover twin, with the source; write the figures into the folder.

    Args:
        out: folder made by `redepth convert`.
        against: the source; the one in the folder's recipe by default.
        device: where to compare, in fp32; `auto` takes a GPU where there is one.
        revision: of a source on the hub; the recorded commit by default.
        trust_remote_code: let modelling code that comes with the source run.
        on_progress: called with (part, share done).

    Returns:
        every check with its figures, and whether all have `passed`.

    Raises:
        RedepthError: if `out` was not made by redepth, or not from such a source.
    """
    from redepth.surgery.verify import verify as verify_checkpoint

    return verify_checkpoint(
        out, against, on_progress, device=device, revision=revision, trust_remote_code=trust_remote_code
    )


def calibrate(
    checkpoint: str | Path,
    data: str = "python-docs",
    *,
    text_column: str = "text",
    most_steps: int | None = None,
    rows: int = 16,
    sequence_length: int = 256,
    criteria: Sequence[str] | None = None,
    dtype: str = "auto",
    device: "str | torch.device" = "auto",
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint at every depth and store the result in its config, as `depth_profile`.

    Args:
        checkpoint: local folder.
        data: held-out text: python-docs, a .txt, .jsonl, .json or .parquet file, or a datasets id, with its `text_column`.
        most_steps: the deepest r; twice the trained depth by default, and 16 at the least.
        rows, sequence_length: how much text is read.
        criteria: exit tests to calibrate beside redepth's own, by registered name or import path `package.module:name`.
        on_progress: called with (part, share done).

    Returns:
        the profile; see `redepth.evaluation.calibrate`.

    Raises:
        RedepthError: for a checkpoint that is not a local folder, or text or numbers that do not fit.
    """
    from redepth.checkpoint.folder import CheckpointFolder
    from redepth.checkpoint.load import load_tokenizer, local_checkpoint, read_config
    from redepth.data.rows import held_out_text
    from redepth.evaluation.calibrate import calibrate as measure
    from redepth.evaluation.calibrate import calibrated_tests
    from redepth.runtime import choose_device

    choose_device(device)
    calibrated_tests(criteria)
    if most_steps is not None and most_steps < 2:
        raise RedepthError(f"--most-steps must be at least 2, got {most_steps}; there is nothing to compare")
    if rows < 1 or sequence_length < 2:
        raise RedepthError(f"--rows {rows} and --sequence-length {sequence_length} must be at least 1 and 2")
    config, _ = read_config(local_checkpoint(checkpoint))
    CheckpointFolder(checkpoint).check_writable()
    if most_steps is not None and most_steps > config.max_num_steps:
        raise RedepthError(f"--most-steps {most_steps} is more than this model's max_num_steps, {config.max_num_steps}")
    if sequence_length > config.block_size:
        raise RedepthError(
            f"--sequence-length {sequence_length} is more than the {config.block_size} this model allows"
        )
    tokens = held_out_text(load_tokenizer(checkpoint), data, text_column, sequence_length, rows)
    return measure(checkpoint, tokens, data, most_steps, criteria, dtype, device, shares(on_progress, "calibrating"))


def evaluate(
    checkpoint: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    preset: str | None = None,
    num_steps: Sequence[int] | None = None,
    criterion: "str | ExitTest | Measure | None" = None,
    exit_threshold: float | str = "auto",
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    questions: int = 1,
    batch_size: int = 8,
    compare: Sequence[str | Path] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: "str | torch.device" = "auto",
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> "DepthEvaluation":
    """Measure a checkpoint at several depths: accuracy on tasks, and the loss on texts.

    Args:
        tasks: names of lm-eval's tasks, such as `arc_easy`; `task:iterate?depth=1-8`, problems by difficulty; and
            `text:FILE?rows=4&length=512`, the loss on a text. The task that a small model was trained on by default.
        preset: `huginn` or `retrofit`, the tasks and settings under which these models were published; `tasks` then
            names some of its own.
        num_steps: 1, 2, 4, 8 and 16 by default, or the preset's.
        criterion, exit_threshold: also run adaptive exit under this test, as `DepthPolicy.resolve` takes them.
        limit: documents of each of lm-eval's tasks, all by default; of `task:`, problems of each split, 256 by default.
        num_fewshot: examples in each prompt of lm-eval's tasks; each task's own number by default.
        data_dir: folder with the rows of lm-eval's tasks, `arc_easy.jsonl` and so on, in the schema of the hub.
        questions: in each problem of `task:` in words; all but the last hide their answers.
        batch_size: of lm-eval's requests.
        compare: other models for the same tasks and texts: folder or hub id of a recurrent checkpoint, with `:R` for
            one depth, or a model without a loop.
        seed: of the problems of `task:`.
        dtype: as saved by default, or the preset's.
        out: folder to write; an evaluation that was killed in it goes on. The checkpoint's name with `-evaluation` by
            default.
        on_progress: called with (part, share done).

    Raises:
        RedepthError: for a task, a model or a number that does not fit, before any compute.
    """
    from redepth.data.source import is_task
    from redepth.evaluation.across_depths import Settings, evaluate_across_depths
    from redepth.evaluation.presets import TaskList, find_preset, narrowed
    from redepth.evaluation.tasks import DEPTHS
    from redepth.evaluation.texts import PREFIX
    from redepth.runtime import choose_device

    published = find_preset(preset) if preset is not None else None
    depths = tuple(num_steps) if num_steps is not None else published.num_steps if published else DEPTHS
    texts = [task for task in tasks or () if task.startswith(PREFIX)]
    problems: list[str | None] = [task for task in tasks or () if is_task(task)]
    named = [task for task in tasks or () if not (task.startswith(PREFIX) or is_task(task))]
    if published is None:
        lists = [TaskList(tuple(named), num_fewshot)] if named else []
    elif num_fewshot is not None:
        raise RedepthError(f"preset {preset!r} says how many examples a prompt has; leave num_fewshot out")
    else:
        lists = narrowed(published.lists, named) if named else list(published.lists)
    if not tasks and published is None:
        problems = [None]
    settings = Settings(
        depths,
        criterion,
        exit_threshold,
        limit,
        batch_size,
        Path(data_dir).expanduser() if data_dir is not None else None,
        tuple(map(str, compare or ())),
        dtype or (published.dtype if published else "auto"),
        str(choose_device(device)),
        preset,
        seed,
        questions,
    )
    folder = Path(out) if out is not None else Path(f"{Path(checkpoint).name}-evaluation")
    return evaluate_across_depths(str(checkpoint), lists, texts, settings, folder, on_progress, problems)


def analyze(
    checkpoint: str | Path,
    prompts: Sequence[str] = (),
    data: str | None = None,
    *,
    out: str | Path | None = None,
    num_steps: int = 32,
    compare: str | Path | None = None,
    text_column: str = "text",
    rows: int = 4,
    sequence_length: int = 128,
    dtype: str = "auto",
    device: "str | torch.device" = "auto",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Look inside the loop on some texts, and write a report with pictures and tables.

    Args:
        checkpoint: folder or hub id.
        prompts: texts; or `data`, held-out text as for `calibrate`, or a `task:` spec for `rows` of its held-out problems.
            The task that a small model was trained on by default.
        out: folder to write; the checkpoint's name with `-analysis` by default.
        num_steps: how deep to go, at least 7.
        compare: another model for the same texts, with the same tokens: a recurrent checkpoint, one at a single depth as
            `FOLDER:R`, or a model without a loop.
        overwrite: replace a folder that redepth wrote.
        on_progress: called with (checkpoint, share done).

    Returns:
        what `summary.json` holds: `verdict`, `figures`, and the same of `compare`.

    Raises:
        RedepthError: for texts or numbers that do not fit; before any compute.
    """
    from redepth.analysis.analyze import analyze as look
    from redepth.runtime import choose_device

    return look(
        checkpoint,
        prompts,
        data,
        out,
        num_steps,
        compare,
        text_column,
        rows,
        sequence_length,
        dtype,
        str(choose_device(device)),
        overwrite,
        on_progress,
    )


def inspect(
    checkpoint: str | Path, num_steps: Sequence[int] = (1, 4, 8, 16, 32), cache_rule: str | None = None
) -> dict[str, Any]:
    """Kind, plan, parameters by part, memory by depth, and the depth a checkpoint was trained for.

    Args:
        checkpoint: folder or hub id.
        num_steps: depths for which to give the size of the cache.
        cache_rule: the rule for which to give it; the config's by default.

    Raises:
        RedepthError: where there is no such checkpoint.
    """
    from redepth.checkpoint.inspect import inspect as look

    return look(checkpoint, tuple(num_steps), cache_rule)


def load(
    name: str | Path, dtype: "str | torch.dtype" = "auto", device: "str | torch.device" = "cpu", **options: Any
) -> "RecurrentDepthForCausalLM | RecurrentGemmaForCausalLM":
    """A model recurrent in depth (`huginn_raven`) or in time (`recurrent_gemma`), in eval mode.

    No code that comes with the checkpoint is run: redepth's own takes its place.

    Args:
        name: folder or hub id.
        dtype: `auto` (as saved), a torch dtype or its name.
        device: where to put it; `auto` takes a GPU where there is one.
        options: `revision`, `device_map` and `attn_implementation`, as transformers takes them; `quantization`, `int8`,
            `int8-weight-only`, `int4` or a configuration, to quantise the core as it is loaded; `few_token_kernels`, to
            decode by compiled kernels where they know the model, as the commands that write text do.

    Raises:
        RedepthError: where there is no such checkpoint, it is of another kind, its weights don't fit or are not numbers,
            or there is no such device.
    """
    from redepth.checkpoint.load import load as read

    return read(name, dtype, device, **options)


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        RedepthError: where there is none.
    """
    from redepth.checkpoint.load import load_tokenizer as read

    return read(name, revision)


def read_config(name: str | Path, revision: str | None = None) -> "RecurrentDepthConfig":
    """A checkpoint's configuration, complete.

    Raises:
        RedepthError: where there is no such checkpoint, or it fits no kind.
    """
    from redepth.checkpoint.load import read_config as read

    return read(name, revision)[0]
