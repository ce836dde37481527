"""Proof of the surgery: the same code path, full cover, against the source's own logits."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from redepth.checkpoint.card import write_card
from redepth.checkpoint.folder import (
    FAMILY_FILE,
    HEALING_FILE,
    VERIFICATION_FILE,
    CheckpointFolder,
    read_recipe,
    write_json,
)
from redepth.checkpoint.load import check_unquantized, load, read_config
from redepth.checkpoint.sources import Source, open_source, recorded_source
from redepth.data.python_docs import python_docs
from redepth.errors import RedepthError
from redepth.runtime import choose_device

from .convert import plan_conversion
from .plan import Plan

log = logging.getLogger(__name__)

TOLERANCE = 1e-10
ROWS, TOKENS = 2, 128
DEPTHS = (1, 4)


@dataclass(frozen=True)
class Check:
    """One comparison of logits in fp32 over all tokens.

    Attributes:
        kl: mean over tokens of KL(source ‖ checked), in nats.
        verdict: `equal`, `differs`, or `reported` where neither is required.
        passed: whether the verdict is the wanted one.
    """

    name: str
    num_steps: int
    mse: float
    largest_difference: float
    kl: float
    top1_agreement: float
    verdict: str
    passed: bool


@dataclass(frozen=True)
class Verification:
    checks: list[Check]
    text: str
    num_tokens: int
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def compare(name: str, num_steps: int, wanted: torch.Tensor, got: torch.Tensor, must: str | None = "equal") -> Check:
    """Compare logits `[batch, tokens, vocabulary]`.

    Args:
        must: `equal` or `differs` to pass, or None to report only.
    """
    difference = got - wanted
    mse = difference.square().mean().item()
    verdict = "equal" if mse <= TOLERANCE else "differs"
    log_wanted, log_got = F.log_softmax(wanted, dim=-1), F.log_softmax(got, dim=-1)
    return Check(
        name=name,
        num_steps=num_steps,
        mse=mse,
        largest_difference=difference.abs().max().item(),
        kl=(log_wanted.exp() * (log_wanted - log_got)).sum(-1).mean().item(),
        top1_agreement=(wanted.argmax(-1) == got.argmax(-1)).float().mean().item(),
        verdict=verdict if must is not None else "reported",
        passed=must is None or verdict == must,
    )


def sample_tokens(source: Source, length: int = TOKENS) -> tuple[torch.Tensor, str]:
    """Real text for the comparison, `[ROWS, length]`, and what it is; seeded tokens where there is no tokenizer."""
    length = min(length, getattr(source.config, "max_position_embeddings", length))
    tokenizer, vocabulary = source.tokenizer, source.config.get_text_config().vocab_size
    why = "has no tokenizer"
    if tokenizer is not None:
        text = "\n\n".join(python_docs(held_out=True)[:40])
        try:
            stream = tokenizer(text, verbose=False)["input_ids"][: ROWS * length]
        except Exception as error:  # tokenizers written in Rust raise nothing more special
            log.debug("the source's tokenizer fails: %s", error)
            stream = []
        if len(stream) == ROWS * length and max(stream) < vocabulary:
            return torch.tensor(stream).view(ROWS, length), "Python's documentation"
        why = "has a tokenizer that gives too few tokens for English text, or some outside its vocabulary"
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (ROWS, length), generator=generator), f"random tokens (the source {why})"


def _cut(model: Any, plan: Plan) -> Any:
    """A transformers model with its layer list cut to the plan's layers, in place."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[layer] for layer in plan.layers)
    config = model.model.config
    if getattr(config, "block_types", None) is not None:
        # A pattern that repeats, from which RecurrentGemma's config derives its layer types.
        config.block_types = [config.block_types[layer % len(config.block_types)] for layer in plan.layers]
    elif getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in plan.layers]
    config.num_hidden_layers = len(plan.layers)
    return model


def _round_to(model: Any, dtype: torch.dtype) -> None:
    """Round every weight to `dtype` and back, so that a checkpoint saved in it can be compared exactly."""
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()


@torch.no_grad()
def verify(
    out: str | Path,
    against: str | Path | Source | None = None,
    on_progress: Callable[[str, float], None] | None = None,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Compare a converted checkpoint, and its full-cover twin, with the source; write the figures into the folder.

    One model is in memory at a time, in fp32. The full cover goes through the same code path as `out` did, adapter
    included. The negative control exchanges two layers and must differ. `out` itself is compared at r = 1 with the
    source, its layer list cut the same way and its weights rounded to `out`'s dtype.

    Args:
        out: folder made by `redepth convert`.
        against: the source; the one in the folder's recipe by default.
        on_progress: called with (`verify`, share done).
        device: where to compare; `auto` takes a GPU where there is one.
        revision: of a source on the hub; the recorded commit by default.
        trust_remote_code: let modelling code that comes with the source run.

    Raises:
        RedepthError: if `out` was not made by redepth, or not from such a source.
    """
    folder = Path(out)
    recipe = read_recipe(folder).get("convert")
    if recipe is None:
        raise RedepthError(f"{folder} was not made by redepth convert, so there is no source to compare it with")
    chosen = choose_device(device)
    check_unquantized(out, read_config(folder)[0], "equal its source")
    CheckpointFolder(folder).check_writable()
    source: Source | None
    if isinstance(against, Source):
        source = against
    elif against is not None:
        source = open_source(against, revision, trust_remote_code)
    else:
        source = recorded_source(folder)
    assert source is not None
    conversion = plan_conversion(
        source,
        recipe["prelude"],
        recipe["core"],
        recipe["coda"],
        adapter=recipe["adapter"],
        state=recipe["state"],
        dtype=recipe["dtype"],
        tie=recipe["tie"],
        seed=recipe["seed"],
        family=folder / FAMILY_FILE if (folder / FAMILY_FILE).exists() else None,
    )
    tell = on_progress or (lambda part, done: None)
    ids, text = sample_tokens(source)
    ids = ids.to(chosen)
    is_healed = (folder / HEALING_FILE).exists()

    tell("verify", 0.0)
    reference = source.reference_model().to(chosen)
    wanted = reference(ids, use_cache=False).logits
    _round_to(reference, conversion.dtype)
    wanted_of_out = _cut(reference, conversion.plan)(ids, use_cache=False).logits
    del reference

    checks = []
    # A start that is not meant to equal its source is checked through one that is: the layers are the same.
    exact = conversion if conversion.starts_equal else replace(conversion, adapter="inject")
    tell("verify", 0.25)
    full = exact.with_plan(conversion.plan.full_cover(), torch.float32)
    model: Any = full.model()
    model.to(chosen)
    for num_steps in DEPTHS if full.equal_at_every_depth else DEPTHS[:1]:
        logits = model(ids, num_steps=num_steps, use_cache=False).logits
        checks.append(compare(f"full cover, {full.adapter}", num_steps, wanted, logits))
    del model
    if conversion.plan.num_layers > 1:
        tell("verify", 0.5)
        wrong: Any = full.with_plan(full.plan.with_two_layers_swapped()).model()
        wrong.to(chosen)
        logits = wrong(ids, num_steps=1, use_cache=False).logits
        checks.append(compare("two layers swapped (control)", 1, wanted, logits, must="differs"))
        del wrong

    tell("verify", 0.75)
    checkpoint: Any = load(folder, torch.float32, chosen)
    if checkpoint.config.vocab_size != wanted.shape[-1]:
        raise RedepthError(
            f"{folder} has a vocabulary of {checkpoint.config.vocab_size}, but source {source.name!r} has "
            f"{wanted.shape[-1]}; name the source it was converted from"
        )
    logits = checkpoint(ids, num_steps=1, use_cache=False).logits
    cut = "" if conversion.plan.is_full_cover else " cut the same way"
    must = "equal" if conversion.starts_equal and not is_healed else None
    checks.append(compare(f"checkpoint against source{cut}", 1, wanted_of_out, logits, must))

    tell("verify", 1.0)
    verification = Verification(checks, text, ids.numel())
    with CheckpointFolder(folder).updating() as stage:
        write_json(stage / VERIFICATION_FILE, verification.to_dict())
        write_card(stage, base=folder)
    return verification
