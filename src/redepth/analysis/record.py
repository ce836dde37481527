"""Recording what happens inside the loop, by (layer, step)."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from redepth.errors import RedepthError
from redepth.modeling.passes import PassContext

from .watch import (
    ATTENTION_MAP,
    BY_LAYER,
    LOGITS,
    PARTS,
    STATE,
    WITH_A_MAP,
    Watcher,
    check_numbers,
    check_part,
    watching,
)

MOST_BYTES = 2 * 1024**3


class Key(NamedTuple):
    """What was recorded: a part, the layer that it is of (None where it is of no layer), and the step (0 outside the core)."""

    part: str
    layer: int | None
    step: int


@dataclass
class _Piece:
    """One pass's values at one key.

    Attributes:
        values: `[rows, tokens, …]` where every cell is a token, else `[cells, …]`; None once they lie in `file`.
        rows, tokens: of each cell; None where every cell is a token.
        first_row, first_token: of the first cell, where every cell is a token.
    """

    values: torch.Tensor | None
    rows: torch.Tensor | None
    tokens: torch.Tensor | None
    first_row: int = 0
    first_token: int = 0
    file: Path | None = None
    name: str = ""

    def of_row(self, row: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The row's values `[cells, …]` and their tokens `[cells]`."""
        if self.rows is None or self.tokens is None:
            values = self._read()
            if not 0 <= row - self.first_row < len(values):
                return None
            mine = values[row - self.first_row]
            return mine, torch.arange(self.first_token, self.first_token + len(mine))
        here = self.rows == row
        return (self._read()[here], self.tokens[here]) if bool(here.any()) else None

    def _read(self) -> torch.Tensor:
        if self.values is not None:
            return self.values
        assert self.file is not None
        with safe_open(self.file, framework="pt") as stored:
            return stored.get_tensor(self.name)


class Record(Watcher):
    """What `record` captured. Rows are numbered over all calls; padding is left out.

    Attributes:
        parts, layers, steps: what is captured; None for all layers and all steps.
        folder: where what outgrew the memory lies; None while nothing did.
    """

    def __init__(
        self,
        model: Any,
        parts: Sequence[str] = (STATE,),
        steps: Sequence[int] | int | None = None,
        layers: Sequence[int] | int | None = None,
        most_bytes: int = MOST_BYTES,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(model)
        chosen = (parts,) if isinstance(parts, str) else tuple(parts)
        if not chosen:
            raise RedepthError(f"parts names nothing; choose from {', '.join(PARTS)}")
        self.parts = frozenset(check_part(part, PARTS) for part in chosen)
        self.steps = check_numbers("steps", steps)
        self.layers = check_numbers("layers", layers, model.config.n_layers)
        attention = model.config._attn_implementation
        if ATTENTION_MAP in self.parts and attention not in WITH_A_MAP:
            raise RedepthError(
                f"{ATTENTION_MAP} can't be recorded with attention {attention!r}; load the model with {WITH_A_MAP[0]!r}"
            )
        if most_bytes < 0:
            raise RedepthError(f"most_bytes must be 0 or more, got {most_bytes}")
        self.most_bytes = most_bytes
        self.folder = Path(folder) if folder is not None else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._pieces: dict[Key, list[_Piece]] = {}
        self._bytes = 0
        self._files = 0
        # Of every row: which columns are tokens, in batches, and how deep each token ran.
        self._columns: dict[int, torch.Tensor] = {}
        self._depths: dict[int, torch.Tensor] = {}

    def start_pass(
        self, hidden: torch.Tensor, context: PassContext, num_steps: int, attention_mask: torch.Tensor | None
    ) -> None:
        """See `Watcher.start_pass`; raises RedepthError for steps that the pass will not run."""
        beyond = [step for step in self.steps or () if step > num_steps]
        if beyond:
            raise RedepthError(
                f"step {max(beyond)} was asked to be recorded, but num_steps is {num_steps}; run deeper, or record fewer"
            )
        super().start_pass(hidden, context, num_steps, attention_mask)
        for row, columns in enumerate(self.columns, self.first_row):
            self._columns[row] = columns
            ran = self._depths.get(row, torch.zeros(0, dtype=torch.long))
            self._depths[row] = torch.nn.functional.pad(ran, (0, int(columns.sum()) - len(ran)))

    def wants(self, part: str, layer: int | None, step: int) -> bool:
        """Whether this part is captured at this layer and step."""
        return (
            part in self.parts
            and (self.steps is None or step in self.steps)
            and (self.layers is None or layer is None or layer in self.layers)
        )

    def __call__(
        self, part: str, layer: int | None, step: int, value: torch.Tensor, context: PassContext
    ) -> torch.Tensor:
        if part == STATE:
            self._note_depth(step, context)
        if self.wants(part, layer, step):
            self._keep(Key(part, layer, step), value.detach(), context)
        if part == STATE and step > 0 and self.wants(LOGITS, None, step):
            # A context without watchers, so that the coda's layers are not recorded at every step.
            unseen = replace(context, watchers=())
            self._keep(Key(LOGITS, None, step), self.model.read_logits(value, unseen).detach(), context)
        return value

    def _note_depth(self, step: int, context: PassContext) -> None:
        rows, tokens, real = self.cells(context)
        for row in rows[:, 0].tolist():
            here = rows[:, 0] == row
            self._depths[self.first_row + row][tokens[here][real[here]]] = step

    def _keep(self, key: Key, values: torch.Tensor, context: PassContext) -> None:
        if key.part == ATTENTION_MAP:
            values = values.transpose(1, 2)  # [B, T, heads, columns]
        rows, tokens, real = self.cells(context)
        if context.subset is None and bool(self.real.all()) and bool((self.index[:, 0] == self.index[0, 0]).all()):
            piece = _Piece(values, None, None, self.first_row, int(self.index[0, 0]))
        else:
            chosen = real.to(values.device)
            piece = _Piece(values[chosen], rows[real] + self.first_row, tokens[real])
        self._pieces.setdefault(key, []).append(piece)
        self._bytes += values.numel() * values.element_size()
        if self._bytes > self.most_bytes:
            self._write_out()

    def _write_out(self) -> None:
        """Move what is in memory to a file."""
        if self.folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="redepth-record-")
            self.folder = Path(self._temporary.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"record-{self._files:05d}.safetensors"
        if file.exists():
            raise RedepthError(f"{file} is there already; give another folder to record into")
        waiting, tensors, storages = [], {}, set()
        for key, pieces in self._pieces.items():
            for number, piece in enumerate(pieces):
                if piece.values is None:
                    continue
                name = f"{key.part}.layer-{key.layer}.step-{key.step}.{number}"
                values = piece.values.contiguous()
                # A file holds no tensor twice; a step's state is its last layer's output.
                if values.untyped_storage().data_ptr() in storages:
                    values = values.clone()
                storages.add(values.untyped_storage().data_ptr())
                tensors[name] = values
                waiting.append((piece, name))
        save_file(tensors, file)
        for piece, name in waiting:
            piece.values, piece.file, piece.name = None, file, name
        self._files += 1
        self._bytes = 0

    @property
    def rows(self) -> int:
        """How many rows were seen."""
        return len(self._columns)

    def keys(self) -> list[Key]:
        """What was captured, in the order in which it was first seen."""
        return list(self._pieces)

    def steps_run(self, row: int = 0) -> torch.Tensor:
        """How many steps each token of a row ran, `[tokens]`."""
        self._check_row(row)
        return self._depths[row]

    def get(self, part: str, step: int = 0, layer: int | None = None, row: int = 0) -> torch.Tensor:
        """A row's values at one place, tokens first.

        Args:
            step: from 1 in the core; 0 for the initial state and for layers outside the core.
            layer: counted over the whole stack from 0; None for parts of no layer.

        Returns:
            `[tokens, width]`; logits `[tokens, vocabulary]`; an attention map `[tokens, heads, tokens]`. NaN where a
            token had left the loop before the step.

        Raises:
            RedepthError: for what was not captured.
        """
        check_part(part, PARTS)
        self._check_row(row)
        key = Key(part, layer, step)
        if key not in self._pieces:
            raise RedepthError(f"{_words(key)} was not recorded; {self._why(key)}")
        found = [mine for piece in self._pieces[key] if (mine := piece.of_row(row)) is not None]
        columns = self._columns[row]
        tokens = int(columns.sum())
        if not found:
            raise RedepthError(f"no token of row {row} ran step {step}; the deepest ran {int(self._depths[row].max())}")
        if part == ATTENTION_MAP:
            found = [(_to_columns(values, columns), which) for values, which in found]
        values = found[0][0]
        if len(found) == 1 and len(values) == tokens:
            return values
        result = values.new_full((tokens, *values.shape[1:]), float("nan"))
        for values, which in found:
            result[which.to(values.device)] = values
        return result

    def trajectory(self, row: int = 0) -> torch.Tensor:
        """A row's states at every recorded step in order, `[tokens, steps, width]`."""
        steps = sorted(key.step for key in self._pieces if key.part == STATE)
        if not steps:
            raise RedepthError(f"no state was recorded; give parts=({STATE!r},)")
        return torch.stack([self.get(STATE, step, row=row) for step in steps], dim=1)

    def _check_row(self, row: int) -> None:
        if row not in self._columns:
            raise RedepthError(f"row {row} was not recorded; {self.rows} rows were seen, from 0")

    def _why(self, key: Key) -> str:
        if key.part not in self.parts:
            return f"add {key.part!r} to parts"
        if (key.part in BY_LAYER) != (key.layer is not None):
            return f"give {'a' if key.layer is None else 'no'} layer with {key.part!r}"
        places = sorted({f"{other.step}" for other in self._pieces if other[:2] == key[:2]}, key=int)
        return f"its steps are {', '.join(places)}" if places else "it is at no recorded step"


def _words(key: Key) -> str:
    return key.part + (f" of layer {key.layer}" if key.layer is not None else "") + f" at step {key.step}"


def _to_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Attention `[cells, heads, columns so far]` to the row's tokens, without padding; later ones are 0."""
    padded = torch.nn.functional.pad(values, (0, len(columns) - values.shape[-1]))
    return padded[..., columns.to(values.device)]


@contextmanager
def record(
    model: Any,
    steps: Sequence[int] | int | None = None,
    layers: Sequence[int] | int | None = None,
    parts: Sequence[str] = (STATE,),
    most_bytes: int = MOST_BYTES,
    folder: str | Path | None = None,
) -> Iterator[Record]:
    """Capture the passes of a model inside the block, `forward` and plain `generate` alike.

    Args:
        steps: which steps, 0 for the initial state and the layers outside the core; all by default.
        layers: which layers, counted over the whole stack from 0; all by default.
        parts: `state` s_i; `embedded` e; `layer`, the stream after a layer; `attention` and `mlp`, their own output;
            `logits`, what coda and head make of each step's state; `attention-map`, the probabilities. Logits cost a coda
            and a head at every step, maps a second attention; the others are kept as the model makes them.
        most_bytes: what is captured beyond this many bytes goes to disk.
        folder: for what goes to disk; by default a temporary folder, removed together with the record.

    Raises:
        RedepthError: for a part, layer or step that does not exist; before any compute.

    Example:
        with redepth.record(model, parts=("state", "mlp")) as rec:
            model(input_ids, num_steps=8)
        rec.trajectory()  # [tokens, 9, width]
        rec.get("mlp", step=3, layer=12)
    """
    made = Record(model, parts, steps, layers, most_bytes, folder)
    with watching(made.model, made):
        yield made
