"""The models of an evaluation: the checkpoint, and what it is held against."""

import hashlib
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.folder import RECIPE_FILE, CheckpointFolder
from redepth.checkpoint.load import is_recurrent, load, load_tokenizer, read_config
from redepth.checkpoint.sources import BUILT_INS, open_source
from redepth.errors import RedepthError
from redepth.modeling import DepthPolicy
from redepth.modeling.exits import ExitTest, Measure
from redepth.runtime import parse_dtype

from .texts import NO_LOOP


@dataclass(frozen=True)
class Column:
    """One depth of one model: its name in tables, and how deep it goes; no policy for a model without a loop."""

    name: str
    policy: DepthPolicy | None

    @property
    def order(self) -> tuple[bool, int]:
        """By depth, exit tests last, so that a batch's pass only ever goes deeper."""
        return (True, 0) if self.policy is None else (self.policy.test is not None, self.policy.num_steps)


@dataclass(frozen=True)
class Entrant:
    """A model that takes part.

    Attributes:
        name: as the user wrote it, without the depth.
        columns: the depths to measure at.
    """

    name: str
    columns: tuple[Column, ...]

    @property
    def has_loop(self) -> bool:
        return self.columns[0].policy is not None

    def num_steps(self) -> list[int]:
        """Its fixed depths."""
        return [
            column.policy.num_steps for column in self.columns if column.policy is not None and not column.policy.test
        ]


def entrant(
    name: str,
    num_steps: Sequence[int],
    criterion: str | ExitTest | Measure | None = None,
    exit_threshold: float | str = "auto",
) -> Entrant:
    """A checkpoint at some depths, and with a criterion also under adaptive exit with the deepest as the most.

    Raises:
        RedepthError: where there is no such checkpoint, or a depth is below 1 or above what it allows.
        ValueError: for a criterion that does not exist.
    """
    config, _ = read_config(name)
    depths = sorted(set(num_steps))
    columns = [Column(f"r={steps}", DepthPolicy.resolve(config, num_steps=steps)) for steps in depths]
    if criterion is not None:
        policy = DepthPolicy.resolve(config, num_steps=depths[-1], criterion=criterion, exit_threshold=exit_threshold)
        assert policy.test is not None
        columns.append(Column(policy.test.name, policy))
    return Entrant(name, tuple(columns))


def rival(text: str, num_steps: Sequence[int]) -> Entrant:
    """What `--compare` names: a recurrent checkpoint at the same depths, `FOLDER:R` at one, or a model without a loop.

    Raises:
        RedepthError: where there is no such model.
    """
    name, _, steps = text.rpartition(":")
    if name and steps.isdigit():
        return entrant(name, [int(steps)])
    if text not in BUILT_INS and not Path(text).expanduser().is_file() and is_recurrent(text):
        return entrant(text, num_steps)
    open_source(text)
    return Entrant(text, (Column(NO_LOOP, None),))


def merged(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Each model once, with all the depths that it is named for."""
    columns: dict[str, dict[str, Column]] = {}
    for one in entrants:
        columns.setdefault(one.name, {}).update({column.name: column for column in one.columns})
    return [
        Entrant(name, tuple(sorted(by_name.values(), key=lambda column: column.order)))
        for name, by_name in columns.items()
    ]


def open_tokenizer(one: Entrant) -> Any:
    """
    Raises:
        RedepthError: where there is none.
    """
    if one.has_loop:
        return load_tokenizer(one.name)
    tokenizer = open_source(one.name).tokenizer
    if tokenizer is None:
        raise RedepthError(f"source {one.name!r} has no usable tokenizer; leave it out of --compare")
    return tokenizer


def open_model(one: Entrant, dtype: str | torch.dtype, device: str) -> Any:
    """In eval mode; a model without a loop in `dtype`, which is never `auto` then."""
    if one.has_loop:
        return load(one.name, dtype, device)
    model = open_source(one.name).reference_model()
    return model.to(device, parse_dtype(dtype) if isinstance(dtype, str) else dtype).eval()


def fingerprint(one: Entrant) -> dict[str, Any]:
    """What tells this very checkpoint from any other: a hub commit, or the hash of the local files."""
    folder = Path(one.name).expanduser()
    if folder.is_dir():
        weights = CheckpointFolder(folder).weights() or [file.name for file in sorted(folder.glob("*.safetensors"))]
        said = {"sha256": _sha256([folder / name for name in ("config.json", "tokenizer.json", *weights)])}
        if (folder / RECIPE_FILE).is_file():
            said["recipe_sha256"] = _sha256([folder / RECIPE_FILE])
        return said
    source = open_source(one.name)
    if source.commit is not None:
        return {"commit": source.commit}
    return {"sha256": _sha256([source.location])}


def _sha256(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as content:
                whole.update(hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    named = ("redepth", "lm_eval", "torch", "transformers", "tokenizers", "datasets")
    found = {name: version(name) for name in named if importlib.util.find_spec(name) is not None}
    return found | {"python": platform.python_version()}
