"""What a retrofit ends in, besides its card and evaluation: the curve of its healing, and a look inside its loop."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redepth.healing.clock import Progress
    from redepth.healing.retrofit import RetrofitRecipe

CURVE_FILE, REPORT_FILE = "healing.png", "report.html"
DEPTH_LOOKED_AT = 16


def write_retrofit_report(
    recipe: "RetrofitRecipe", folder: Path, on_progress: "Callable[[Progress], None] | None" = None
) -> None:
    """Put `healing.png` and `report.html` beside a retrofitted model, where they are not there yet.

    Raises:
        RedepthError: where the folder can't be written.
    """
    from redepth.analysis.analyze import analyze
    from redepth.checkpoint.folder import HEALING_LOG_FILE, CheckpointFolder, read_jsonl
    from redepth.checkpoint.load import read_config
    from redepth.evaluation.plots import plot_healing
    from redepth.healing.clock import Progress
    from redepth.healing.record import read_healing
    from redepth.healing.retrofit import held_out_texts

    if (folder / REPORT_FILE).is_file() and (folder / CURVE_FILE).is_file():
        return
    healing = read_healing(folder)
    assert healing is not None

    def tell(name: str, done: float) -> None:
        if on_progress is not None:
            on_progress(Progress("report", done))

    depth = min(DEPTH_LOOKED_AT, read_config(folder)[0].max_num_steps)
    losses = {"before": healing.loss_before, "after": healing.loss_after}
    with tempfile.TemporaryDirectory() as work:
        looked = Path(work) / "analysis"
        texts = [text for text in held_out_texts(recipe.heal[-1], folder) if text.strip()]
        analyze(str(folder), texts, out=looked, num_steps=depth, on_part=tell)
        with CheckpointFolder(folder).updating() as stage:
            shutil.copy(looked / REPORT_FILE, stage / REPORT_FILE)
            curve = read_jsonl(folder / HEALING_LOG_FILE)
            plot_healing(curve, losses, stage / CURVE_FILE, f"{folder.name}: {healing.steps} steps of healing")
