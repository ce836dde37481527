"""Verbs that make a checkpoint from another one, or from scratch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redepth.checkpoint.folder import DEFAULT_SHARD_SIZE
from redepth.errors import RedepthError
from redepth.surgery.plan import DEFAULT_ADAPTER, DEFAULT_STATE

from .measuring import load_tokenizer
from .progress import OnProgress, shares

if TYPE_CHECKING:
    import torch

    from redepth.checkpoint.cost import ParameterCount
    from redepth.modeling import RecurrentDepthConfig
    from redepth.surgery.convert import Conversion
    from redepth.surgery.search import PlanSearch
    from redepth.surgery.verify import Verification


@dataclass(frozen=True)
class Converted:
    """What `convert` did.

    Attributes:
        out: the folder that was written; None where none was asked for.
        conversion: the surgery: its source, plan, configuration and parameters; None where there was none.
        verification: how the result compares with its source, where that was asked for.
    """

    out: Path | None
    conversion: "Conversion | None" = None
    verification: "Verification | None" = None


@dataclass(frozen=True)
class Created:
    """A fresh model.

    Attributes:
        out: the folder that was written; None where none was asked for.
        parameters: how many each part has.
    """

    out: Path | None
    config: "RecurrentDepthConfig"
    parameters: "ParameterCount"


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    prelude: str | None = None,
    core: str | None = None,
    coda: str | None = None,
    adapter: str = DEFAULT_ADAPTER,
    state: str = DEFAULT_STATE,
    dtype: str | None = None,
    tie: bool | None = None,
    seed: int = 0,
    revision: str | None = None,
    family: str | Path | None = None,
    trust_remote_code: bool = False,
    keep_architecture: bool = False,
    verify: bool = False,
    device: "str | torch.device" = "auto",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    on_plan: "Callable[[Conversion], None] | None" = None,
    on_progress: OnProgress | None = None,
) -> Converted:
    """Turn a pretrained decoder into a depth-recurrent one; one that is recurrent already is re-saved, not cut.

    Tensors are read, fused and written one at a time; memory stays near one shard.

    Args:
        source: hub id, local folder, `.gguf` or `.pt` file, or built-in name.
        out: folder to write; with `overwrite`, a checkpoint that redepth wrote may be there. Without it the surgery is
            planned and nothing written.
        prelude, core, coda: source layers as Python slices, such as `"0:10"`. Without them every layer is kept and
            the middle fifth is the core; with only a core, prelude and coda are the layers before and after it.
        adapter: how e and the state are mixed at the start: `inject` [0 | I], `blend:α` [αI | (1−α)I], `gate:α` (the same, and a gate
            on the state, which published code has not), or `random`.
        state: s_0: `embed` (the prelude's output), `noise`, `zeros`, or `skip-adapter`, which is `embed` with a first step
            that leaves the adapter out: it equals its source at r = 1 whatever the adapter.
        dtype: `float32`, `bfloat16` or `float16`; the source's own by default (fp32 for GGUF).
        tie: tie the head to the embedding or not; as in the source by default.
        seed: of a random adapter.
        revision: branch, tag or commit of a hub repository; the commit is recorded.
        family: a YAML file that describes an architecture which redepth has no family for; docs/conversion.md has one.
        trust_remote_code: let modelling code that comes with the source run.
        keep_architecture: no surgery: write the source itself in transformers' format.
        verify: compare the result with its source when it is written, as `verify` does; on `device`.
        max_shard_size: such as `"2GB"`.
        on_plan: called with the surgery before it is carried out.
        on_progress: called with (part, share done).

    Raises:
        RedepthError: for a source, plan or option that does not fit; nothing is left at `out`.
    """
    from redepth.checkpoint.republish import republish
    from redepth.checkpoint.rewrite import rewrite
    from redepth.checkpoint.sources import open_source
    from redepth.surgery.convert import plan_conversion

    opened = open_source(source, revision, trust_remote_code)
    ranges = {"--prelude": prelude, "--core": core, "--coda": coda}
    given = [flag for flag, text in ranges.items() if text is not None]
    writing: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "max_shard_size": max_shard_size}
    if keep_architecture:
        given += ["--tie"] if tie is not None else []
        if given or out is None:
            raise RedepthError(f"--keep-architecture does no surgery; {_remedy(given)}")
        return Converted(rewrite(opened, out, **writing, on_tensor=shares(on_progress, "write")))
    if opened.config.model_type == "huginn_raven":
        if given or out is None:
            raise RedepthError(f"{source} is recurrent already, so it is re-saved; {_remedy(given)}")
        return Converted(republish(opened, out, **writing, tie=tie, on_tensor=shares(on_progress, "re-save")))
    conversion = plan_conversion(opened, prelude, core, coda, adapter, state, dtype, tie, seed, family=family)
    if on_plan is not None:
        on_plan(conversion)
    if out is None:
        return Converted(None, conversion)
    conversion.write(Path(out), overwrite, max_shard_size, shares(on_progress, "convert"))
    verification = None
    if verify:
        from redepth.surgery.verify import verify as verify_checkpoint

        verification = verify_checkpoint(out, opened, on_progress, device=device)
    return Converted(Path(out), conversion, verification)


def _remedy(given: list[str]) -> str:
    return f"leave {' and '.join(given)} out" if given else "name the folder to write, and leave --dry-run out"


def plan(
    source: str | Path,
    data: str = "python-docs",
    *,
    text_column: str = "text",
    core_layers: int | None = None,
    drop_layers: int | None = None,
    adapters: Sequence[str] = (),
    rows: int = 16,
    sequence_length: int = 256,
    tolerance: float | None = None,
    precision: str = "auto",
    revision: str | None = None,
    family: str | Path | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
) -> "PlanSearch":
    """Measure a source's layers, and try candidate plans on text without training.

    Args:
        data: python-docs, a .txt, .jsonl, .json or .parquet file, or a datasets id, with its `text_column`.
        core_layers: layers to loop; a fifth of the source's by default.
        drop_layers: layers left out in a second search, 0 for none; an eighth by default.
        adapters: starts to try, `inject` or `blend:α`; four of them by default.
        rows, sequence_length: how much text is read.
        tolerance: nats within which losses count as equal.
        precision: `auto`, `bf16` or `fp32`.
        revision, family, trust_remote_code: as for `convert`.
        on_progress: called with (part, share done).

    Raises:
        RedepthError: for a source, text or number that does not fit.
    """
    import torch

    from redepth.checkpoint.sources import open_source
    from redepth.data.rows import held_out_rows
    from redepth.data.text import open_text
    from redepth.runtime import has_bf16, keep_freed_memory
    from redepth.surgery.plan import default_plan
    from redepth.surgery.search import ADAPTERS, TOLERANCE, check_search, search_plans

    if precision not in ("auto", "bf16", "fp32"):
        raise RedepthError(f"--precision {precision!r} is unknown; use auto, bf16 or fp32")
    opened = open_source(source, revision, trust_remote_code)
    # A recurrent source has no such setting, and is refused below.
    num_layers = getattr(opened.config, "num_hidden_layers", 3)
    if core_layers is None:
        core_layers = len(default_plan(num_layers).core)
    if drop_layers is None:
        drop_layers = min(round(num_layers / 8), max(num_layers - 2 - core_layers, 0))
    starts = adapters or ADAPTERS
    check_search(opened, core_layers, drop_layers, starts, sequence_length, family)
    if opened.tokenizer is None:
        raise RedepthError(f"source {str(source)!r} has no tokenizer, so it can't be measured on text")
    text, _ = held_out_rows(open_text(data, text_column), opened.tokenizer, sequence_length, rows)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16("cpu"))
    keep_freed_memory()
    return search_plans(
        opened,
        text,
        core_layers,
        drop_layers,
        starts,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        autocast=torch.bfloat16 if bf16 else None,
        on_progress=on_progress,
        family=family,
    )


def create(
    out: str | Path | None = None,
    preset: str = "nano",
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
    **changes: Any,
) -> Created:
    """Make a fresh model with the published initialisation.

    Args:
        out: folder to write; with `overwrite`, a checkpoint that redepth wrote may be there. Without it parameters are
            counted and no weights made.
        preset: `nano`, `100m` or `huginn-3.5b`.
        tokenizer: folder or hub id to take a tokenizer from; sets the vocabulary.
        seed: of the random weights.
        changes: keys of `RecurrentDepthConfig`, laid over the preset's.

    Raises:
        RedepthError: for an unknown preset, changes that no model can have, or an `out` that must not be replaced.
    """
    from redepth.checkpoint.cost import count_parameters
    from redepth.runtime import parse_dtype
    from redepth.surgery.create import create as write
    from redepth.surgery.presets import preset_config

    wanted = parse_dtype(dtype)
    words = load_tokenizer(tokenizer) if tokenizer is not None else None
    vocabulary = {"vocab_size": len(words)} if words is not None else {}
    config = preset_config(preset, **vocabulary | changes)
    count = count_parameters(config)
    written = write(config, out, words, wanted, seed, overwrite) if out is not None else None
    return Created(written, config, count)


def quantize(
    checkpoint: str | Path,
    to: str | Path,
    *,
    bits: int = 8,
    kind: str | None = None,
    groups: str = "core",
    data: str = "python-docs",
    text_column: str = "text",
    rows: int = 8,
    sequence_length: int = 256,
    largest_loss: float | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write a copy of a recurrent checkpoint with its weights in 8 or 4 bits, and say what that costs at every depth.

    Args:
        checkpoint: folder or hub id.
        to: folder to write; with `overwrite`, a checkpoint that redepth wrote may be there.
        bits: 8 or 4.
        kind: `dynamic`, 8-bit products in the core, or `weight-only`; dynamic by default, with 4 bits weight-only.
        groups: `core`, or `all` layers.
        data: text to measure on: python-docs, a .txt, .jsonl, .json or .parquet file, or a datasets id, with its
            `text_column`.
        rows, sequence_length: how much text is read.
        largest_loss: nats of loss that it may cost at any measured depth, 0.02 by default.
        on_progress: called with (part, share done).

    Returns:
        what `quantization.json` holds: the choices, and for r = 1, 4, 16 and 32 `loss_before`, `loss`, `kl` and
        `top1_agreement`.

    Raises:
        RedepthError: for choices or a checkpoint that don't fit, and for a larger loss; nothing is left at `to` then.
    """
    import math

    from redepth.checkpoint.folder import CheckpointFolder
    from redepth.checkpoint.load import check_unquantized, read_config
    from redepth.checkpoint.sources import open_source
    from redepth.data.rows import held_out_text
    from redepth.evaluation.quantize import LARGEST_LOSS
    from redepth.evaluation.quantize import quantize as write
    from redepth.modeling.quantizer import DepthQuantizationConfig

    chosen = DepthQuantizationConfig(bits, kind, groups)
    allowed = LARGEST_LOSS if largest_loss is None else largest_loss
    if not (math.isfinite(allowed) and allowed >= 0):
        raise RedepthError(f"--largest-loss {allowed} must be a number of nats, at least 0")
    if rows < 1 or sequence_length < 2:
        raise RedepthError(f"--rows {rows} and --sequence-length {sequence_length} must be at least 1 and 2")
    config, _ = read_config(checkpoint)
    check_unquantized(checkpoint, config, "be quantised again")
    if sequence_length > config.block_size:
        raise RedepthError(
            f"--sequence-length {sequence_length} is more than the {config.block_size} this model allows"
        )
    source = open_source(checkpoint)
    target = CheckpointFolder(to)
    target.check_apart(source.folder)
    target.check_replaceable(overwrite)
    tokens = held_out_text(load_tokenizer(checkpoint), data, text_column, sequence_length, rows)
    told = shares(on_progress, "measuring")
    return write(source, Path(to), chosen, tokens, data, allowed, overwrite, on_row=told)
