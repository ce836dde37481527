"""What a run began with, kept in its work folder, so that it resumes with the same, or not at all."""

import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redepth.checkpoint.folder import CheckpointFolder, read_json, write_json
from redepth.checkpoint.sources import TOKENIZER_FILES
from redepth.data.mixture import columns_of
from redepth.data.survey import fingerprint, fingerprint_text
from redepth.errors import RedepthError

from .checkpoints import checkpoints_in
from .distillation import teacher_source
from .recipe import HealRecipe

WORK_FOLDER = "healing"
BEFORE_FILE = "before.json"
# What may change when a run is resumed: it does not affect what is learnt, apart from rounding.
FREE_TO_CHANGE = {
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
    "eval_every",
    "save_every",
    "report_to",
    "max_skipped",
}


@dataclass(frozen=True)
class Begun:
    """
    Attributes:
        recipe: every key of it.
        fingerprints: of what the run learns from, by a name for it; None where it is not stored here.
        sources, flops: as in `Healing`.
        run: an id of this run.
    """

    recipe: dict[str, Any]
    fingerprints: dict[str, str | None]
    sources: list[dict[str, Any]]
    flops: float
    loss_before: dict[int, float]
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def write(self, work: Path) -> None:
        work.mkdir(exist_ok=True)
        write_json(work / BEFORE_FILE, asdict(self))

    def check_recipe(self, work: Path, recipe: HealRecipe) -> None:
        """Raises:
        RedepthError: naming a key that may not have changed.
        """
        for key, value in recipe.model_dump(mode="json").items():
            if key not in FREE_TO_CHANGE and self.recipe.get(key) != value:
                raise RedepthError(
                    f"{work} holds a run with another recipe, {key} = {self.recipe.get(key)!r}; finish that one, or remove "
                    "the folder to start over"
                )

    def check_fingerprints(self, work: Path, fingerprints: dict[str, str | None]) -> None:
        """Raises:
        RedepthError: naming what has changed.
        """
        for name, value in fingerprints.items():
            if self.fingerprints.get(name) != value:
                raise RedepthError(
                    f"{name} changed since the run in {work} began; put back what was there, or remove that folder to start "
                    "over"
                )


def read_begun(work: Path) -> Begun | None:
    """What the run in a work folder began with; None where none has begun.

    Raises:
        RedepthError: for a file that is no such record.
    """
    values = read_json(work / BEFORE_FILE)
    if values is None:
        return None
    try:
        losses = {int(depth): loss for depth, loss in values["loss_before"].items()}
        return Begun(**values | {"loss_before": losses})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RedepthError(
            f"{work / BEFORE_FILE} is not what this redepth writes when a run begins; finish the run with the version that "
            "began it, or remove the folder to start over"
        ) from None


def clear(work: Path) -> None:
    """Remove what a run wrote into its work folder, the record of its beginning last; the rest is not redepth's."""
    for folder in [*checkpoints_in(work), work / "runs"]:
        shutil.rmtree(folder, ignore_errors=True)
    (work / BEFORE_FILE).unlink(missing_ok=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def take_fingerprints(folder: Path, recipe: HealRecipe) -> dict[str, str | None]:
    """Of all that the run learns from: weights, tokenizer, text, and teacher."""
    names = [*CheckpointFolder(folder).weights(), *TOKENIZER_FILES]
    present = [folder / name for name in names if (folder / name).is_file()]
    found: dict[str, str | None] = {f"the model in {folder}": fingerprint(*present)}
    texts = [*columns_of(recipe), *([recipe.validation] if recipe.validation else [])]
    found |= {f"data {text!r}": fingerprint_text(text) for text in texts}
    if recipe.distill:
        source = teacher_source(folder, recipe)
        weights = [source.location] if source.location.is_file() else source.location.glob("*.safetensors")
        found[f"teacher {source.name!r}"] = fingerprint(*weights)
    return found
