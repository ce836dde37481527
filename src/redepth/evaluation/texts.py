"""Loss on any text by number of steps, per token and by source of the text, beside other models'."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch.nn import functional as F

from redepth.data.rows import held_out_rows, held_out_text
from redepth.errors import RedepthError, first_line
from redepth.modeling import RecurrentDepthForCausalLM

from .loss import token_losses

PREFIX = "text:"
NO_LOOP = "no loop"


@dataclass(frozen=True)
class TextSpec:
    """`text:FILE?column=text&source=source&rows=4&length=512`.

    Attributes:
        data: as `held_out_text` takes it.
        column: that holds the text.
        source: that names each text's source, in a parquet file; where it is not there, all is one source.
        rows: of each source, at most.
        length: tokens in a row.
    """

    data: str
    column: str = "text"
    source: str = "source"
    rows: int = 4
    length: int = 512

    @classmethod
    def parse(cls, spec: str) -> "TextSpec":
        """
        Raises:
            RedepthError: for an unknown option, a number below 1 or a length below 2.
        """
        data, _, options = spec.removeprefix(PREFIX).partition("?")
        given: dict[str, Any] = dict(part.partition("=")[::2] for part in options.split("&") if part)
        for name in given:
            if name not in ("column", "source", "rows", "length"):
                raise RedepthError(f"{spec!r} has an unknown option {name!r}; use column, source, rows or length")
        for name, least in (("rows", 1), ("length", 2)):
            if name in given:
                if not given[name].isdigit() or int(given[name]) < least:
                    raise RedepthError(f"{spec!r}: {name} must be at least {least}, got {given[name]!r}")
                given[name] = int(given[name])
        return cls(data, **given)

    def rows_by_source(self, tokenizer: Any) -> dict[str, torch.Tensor]:
        """Ids `[rows, length]` of each source that has a row, documents laid end to end.

        Raises:
            RedepthError: for a file that is not there or can't be read, and for too little text.
        """
        file = Path(self.data)
        if file.suffix == ".parquet" and file.is_file():
            try:
                columns = pq.read_schema(file).names
                if {self.column, self.source} <= set(columns):
                    return self._by_column(pq.read_table(file, columns=[self.column, self.source]), tokenizer)
            except OSError as error:
                raise RedepthError(f"data file {self.data!r} can't be read: {first_line(error)}") from None
        return {file.name: held_out_text(tokenizer, self.data, self.column, self.length, self.rows)}

    def _by_column(self, table: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
        found = {}
        for source in table[self.source].unique().to_pylist():
            texts = table.filter(pc.field(self.source) == source).rename_columns({self.column: "text"})
            with contextlib.suppress(RedepthError):  # shorter than a single row
                stream = Dataset(texts.select(["text"])).to_iterable_dataset()
                found[str(source)], _ = held_out_rows(stream, tokenizer, self.length, self.rows)
        if not found:
            raise RedepthError(f"no source in {self.data!r} has a row of {self.length} tokens; give a shorter length")
        return found


@dataclass(frozen=True)
class TextLoss:
    """The loss of a model at one depth on a source's rows.

    Attributes:
        loss: nats per token; the perplexity is e to its power.
        standard_error: over rows; NaN for a single one.
        difference, difference_error: from the first model at its first depth, paired by row.
    """

    text: str
    source: str
    model: str
    depth: str
    loss: float
    standard_error: float
    difference: float
    difference_error: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": math.exp(min(self.loss, 700))}


# {(model, depth): {source: [rows, tokens - 1]}}
Losses = dict[tuple[str, str], dict[str, torch.Tensor]]


@torch.no_grad()
def losses_of(
    name: str,
    model: Any,
    rows: Mapping[str, torch.Tensor],
    num_steps: Sequence[int],
    on_row: Callable[[int, int], None] | None = None,
) -> Losses:
    """Each token's loss in nats, at each depth, or once for a model without a loop."""
    found: Losses = {}
    done, total = 0, sum(len(ids) for ids in rows.values())
    for source, ids in rows.items():
        for row in ids.split(1):
            if isinstance(model, RecurrentDepthForCausalLM):
                by_depth = {f"r={depth}": loss for depth, loss in token_losses(model, row, num_steps).items()}
            else:
                logits = model(row.to(model.device), use_cache=False).logits[0, :-1].float()
                by_depth = {NO_LOOP: F.cross_entropy(logits, row[0, 1:].to(model.device), reduction="none")[None].cpu()}
            for depth, loss in by_depth.items():
                before = found.setdefault((name, depth), {}).get(source)
                found[name, depth][source] = loss if before is None else torch.cat([before, loss])
            done += 1
            if on_row is not None:
                on_row(done, total)
    return found


def summarise(text: str, losses: Losses) -> list[TextLoss]:
    """A line for each source, model and depth, and for all sources together."""
    found = []
    first = next(iter(losses))
    together = {key: {**by_source, "all": torch.cat(list(by_source.values()))} for key, by_source in losses.items()}
    sources = list(together[first])
    for source in sources if len(sources) > 2 else sources[:1]:
        for (model, depth), by_source in together.items():
            rows, apart = by_source[source].mean(1), (by_source[source] - together[first][source]).mean(1)
            count = len(rows)
            error, apart_error = (
                (one.std().item() / count**0.5 if count > 1 else math.nan) for one in (rows.double(), apart.double())
            )
            found.append(
                TextLoss(
                    text,
                    source,
                    model,
                    depth,
                    rows.mean().item(),
                    error,
                    apart.mean().item(),
                    apart_error,
                    by_source[source].numel(),
                )
            )
    return found


def token_table(losses: Losses, rows: Mapping[str, torch.Tensor], tokenizer: Any) -> Any:
    """A parquet table with a line for each predicted token: source, row, place, token, and the loss by model and depth."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"source": [], "row": [], "place": [], "token_id": [], "token": []}
    for source, ids in rows.items():
        for number, row in enumerate(ids.tolist()):
            for place, token in enumerate(row[1:], 1):
                for name, value in zip(columns, (source, number, place, token, tokenizer.decode([token])), strict=True):
                    columns[name].append(value)
    table = pa.table(columns)
    for (model, depth), by_source in losses.items():
        values = torch.cat([by_source[source].flatten() for source in rows])
        table = table.append_column(f"{model} {depth}", pa.array(values.numpy()))
    return table
