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

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from pages import replace_table

from redepth import RedepthError, load
from redepth.evaluation.loss import loss_by_depth
from redepth.healing.data import held_out_rows
from redepth.healing.trainer import processor_has_bf16
from redepth.loading import load_tokenizer


def rows_by_source(file: Path, tokenizer: Any, length: int, rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows of `length` tokens of each source that has two, documents laid end to end."""
    documents = Dataset(pq.read_table(file, columns=["text", "source"]))
    found = {}
    for source in documents.unique("source"):
        own = [number for number, name in enumerate(documents["source"]) if name == source]
        with contextlib.suppress(RedepthError):  # shorter than a single row
            found[source], _ = held_out_rows(documents.select(own).to_iterable_dataset(), tokenizer, length, rows)
    return {source: ids for source, ids in found.items() if len(ids) > 1}


def losses(model: str, texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss of every row, by source, of a model written as FOLDER:R."""
    folder, _, steps = model.rpartition(":")
    recurrent, depth = load(folder), int(steps)
    with torch.autocast("cpu", torch.bfloat16, enabled=processor_has_bf16()):
        return {
            source: torch.tensor([loss_by_depth(recurrent, row[None], (depth,))[depth] for row in ids])
            for source, ids in texts.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="FOLDER:R")
    parser.add_argument("--data", type=Path, required=True, help=".parquet with columns text and source")
    parser.add_argument("--rows", type=int, default=4, help="of each source, at most")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    options = parser.parse_args()
    for model in options.models:
        if not model.rpartition(":")[0] or not model.rpartition(":")[2].isdigit():
            parser.error(f"{model!r} is not FOLDER:R, such as ./retrofit:4")
    tokenizer = load_tokenizer(Path(options.models[0].rpartition(":")[0]))
    texts = rows_by_source(options.data, tokenizer, options.length, options.rows)
    measured = [losses(model, texts) for model in options.models]
    for found in measured:
        found["all"] = torch.cat([*found.values()])
    lines = ["| source of the text | " + " | ".join(f"`{model}`" for model in options.models) + " |"]
    lines.append("| --- |" + " --- |" * len(options.models))
    for source, reference in measured[0].items():
        cells = [f"{reference.mean():.3f}"]
        for found in measured[1:]:
            difference = found[source] - reference
            cells.append(f"{difference.mean():+.4f} ± {difference.std() / len(difference) ** 0.5:.4f}")
        lines.append(f"| {source} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if options.write is not None:
        replace_table(options.write, Path(__file__).name, "\n".join(lines))


if __name__ == "__main__":
    main()
