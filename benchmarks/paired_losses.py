"""Held-out loss of several models on the same rows, by source of the text, with the standard error of each difference.

    python benchmarks/paired_losses.py static:1 retrofit:1 retrofit:4 --data validation.parquet --write docs/results.md

Each model is FOLDER:R, a recurrent checkpoint at R steps. The first is the reference: it gets its loss, the others their
difference from it, paired row by row, ± one standard error over the rows. That error says how far another choice of rows would
move the figure; it says nothing of another seed of training.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from pages import replace_table

from redepth import RedepthError, load
from redepth.checkpoint.load import load_tokenizer
from redepth.data.rows import held_out_rows
from redepth.evaluation.loss import loss_by_depth
from redepth.runtime import has_bf16


def folder_and_steps(model: str) -> tuple[str, int]:
    """FOLDER:R in its two parts."""
    folder, _, steps = model.rpartition(":")
    if not folder or not steps.isdigit():
        raise argparse.ArgumentTypeError(f"{model!r} is not FOLDER:R, such as ./retrofit:4")
    return folder, int(steps)


def rows_by_source(file: Path, tokenizer: Any, length: int, rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows of `length` tokens of each source that has two, documents laid end to end."""
    table = pq.read_table(file, columns=["text", "source"])
    found = {}
    for source in table["source"].unique().to_pylist():
        documents = Dataset(table.filter(pc.field("source") == source)).to_iterable_dataset()
        with contextlib.suppress(RedepthError):  # shorter than a single row
            found[source], _ = held_out_rows(documents, tokenizer, length, rows)
    return {source: ids for source, ids in found.items() if len(ids) > 1}


def losses(folder: str, depths: list[int], texts: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Loss of every row, by depth and source, and of all rows."""
    model = load(folder)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
        rows = {source: [loss_by_depth(model, row[None], depths) for row in ids] for source, ids in texts.items()}
    rows["all"] = [row for of_source in rows.values() for row in of_source]
    return {
        depth: {source: torch.tensor([row[depth] for row in found]) for source, found in rows.items()}
        for depth in depths
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=folder_and_steps, help="FOLDER:R")
    parser.add_argument("--data", type=Path, required=True, help=".parquet with columns text and source")
    parser.add_argument("--rows", type=int, default=4, help="of each source, at most")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    options = parser.parse_args()
    texts = rows_by_source(options.data, load_tokenizer(Path(options.models[0][0])), options.length, options.rows)
    depths: dict[str, list[int]] = {}
    for folder, steps in options.models:
        depths.setdefault(folder, []).append(steps)
    by_folder = {folder: losses(folder, wanted, texts) for folder, wanted in depths.items()}
    first, *others = (by_folder[folder][steps] for folder, steps in options.models)
    lines = [
        "| source of the text | " + " | ".join(f"`{folder}:{steps}`" for folder, steps in options.models) + " |",
        "| --- |" + " --- |" * len(options.models),
    ]
    for source, reference in first.items():
        cells = [f"{reference.mean():.3f}"]
        for found in others:
            difference = found[source] - reference
            cells.append(f"{difference.mean():+.4f} ± {difference.std() / len(difference) ** 0.5:.4f}")
        lines.append(f"| {source} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    if options.write is not None:
        replace_table(options.write, Path(__file__).name, table)


if __name__ == "__main__":
    main()
