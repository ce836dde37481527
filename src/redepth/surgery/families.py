"""Source families: strict data files in `families/`, each a row of switches and one weight table."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redepth.errors import RedepthError, one_line
from redepth.modeling.fields import LRU_LAYER


class Derived(BaseModel):
    """A config value computed from one of the source's."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    source: str = Field(alias="from")  # a reserved word in Python, the natural one in YAML
    via: Literal["inverse_sqrt", "booleans", "half", "griffin_layers"]

    def apply(self, value: Any) -> Any:
        if self.via == "inverse_sqrt":
            return value**-0.5
        if self.via == "half":
            return value // 2
        if self.via == "booleans":
            return [bool(entry) for entry in value]
        # Some versions of transformers give the names of the checkpoint, some their own.
        return [{"recurrent": LRU_LAYER, "attention": "sliding_attention"}.get(entry, entry) for entry in value]


class Switches(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    norm_placement: Literal["pre", "post", "sandwich"]
    norm_weight: Literal["plain", "one_plus"]
    activation: Literal["silu", "gelu_pytorch_tanh"]
    qk_norm: Literal["head", "full"] | None
    qkv_bias: bool
    proj_bias: bool = False
    mlp_bias: bool = False


class Family(BaseModel):
    """
    Attributes:
        config: redepth's config key ← the source's, as it is or derived.
        switches: what the family's blocks look like, in the config's words.
        embed_scale: factor on the token embedding.
        windows: which layers attend through the sliding window.
        max_tokens: the longest text, where the source's config has no limit.
        requires: source config values without which the block would not be the same; any other is refused.
        outer, layer: the weight table, redepth's tensor ← the source's, several where redepth fuses them (rows stacked
            in the order given). Read backwards it splits them again.
        layer_of_type: what layers of a type have in addition to `layer`, by redepth's layer type.
        layer_prefix: where the source keeps its layers.
        ignored: endings of tensors that hold no weights.
        file: where a user's own family was read from; None for redepth's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    covers: str
    model_type: str
    config: dict[str, str | Derived]
    switches: Switches
    embed_scale: Literal["one", "sqrt_width", "sqrt_width_in_bfloat16"]
    windows: Literal["none", "by_layer", "every_layer"]
    max_tokens: int | None = None
    requires: dict[str, list[Any]]
    outer: dict[str, str]
    layer_prefix: str
    layer: dict[str, str | list[str]]
    layer_of_type: dict[str, dict[str, str | list[str]]] = {}
    ignored: list[str]
    file: Path | None = Field(None, exclude=True)

    def to_yaml(self) -> str:
        """The family as a file that `read_family` reads, complete in itself."""
        return yaml.safe_dump(self.model_dump(by_alias=True), sort_keys=False, allow_unicode=True)

    def layer_sources(self, layer_type: str | None = None) -> dict[str, list[str]]:
        """redepth's tensors of a layer, and the source's, by their names within a layer, that make each.

        Args:
            layer_type: the tensors of any type by default.
        """
        types = self.layer_of_type if layer_type is None else [layer_type]
        tables = [self.layer, *(self.layer_of_type.get(kind, {}) for kind in types)]
        return {
            target: [sources] if isinstance(sources, str) else sources
            for table in tables
            for target, sources in table.items()
        }

    def embed_factor(self, width: int) -> float:
        """Factor on the token embedding of a model `width` wide."""
        if self.embed_scale == "sqrt_width_in_bfloat16":
            return float(torch.tensor(width**0.5, dtype=torch.bfloat16))
        return 1.0 if self.embed_scale == "one" else width**0.5


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, dictionaries key by key. A null in `requires` lifts the base's requirement."""
    merged = dict(base)
    for key, value in change.items():
        merged[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def _read(stem: str) -> dict[str, Any]:
    text = (resources.files("redepth.surgery") / "families" / f"{stem}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    base = data.pop("extends", None)
    return merge(_read(base), data) if base is not None else data


def parse_family(data: dict[str, Any], file: Path | None = None) -> Family:
    """Validate one family's merged data.

    Raises:
        RedepthError: naming the first field that does not fit.
    """
    said = f"family {data.get('model_type')!r}" + (f" in {file}" if file is not None else "")
    requires = data.get("requires") or {}
    if not isinstance(requires, dict):
        raise RedepthError(f"{said}: requires is {requires!r}, but it is a table of allowed values by config key")
    lifted = {key: allowed for key, allowed in requires.items() if allowed is not None}
    try:
        return Family(**{**data, "requires": lifted, "file": file})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RedepthError(f"{said}: {where}: {first['msg']}") from None
    except TypeError:
        raise RedepthError(f"{said}: a key is no word; quote it") from None


def read_family(file: str | Path) -> Family:
    """A user's family; `extends` names one of redepth's to start from.

    Raises:
        RedepthError: for a file that is missing, no YAML table, or does not fit.
    """
    path = Path(file).expanduser()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RedepthError(f"family file {str(file)!r} can't be read: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise RedepthError(f"family file {str(file)!r} is not a table of keys; docs/conversion.md shows one")
    base = data.pop("extends", None)
    if base is not None:
        stems = [name.removesuffix(".yaml") for name in _family_files()]
        if base not in stems:
            raise RedepthError(f"family file {str(file)!r} extends {base!r}; use one of {', '.join(stems)}")
        data = merge(_read(base), data)
    return parse_family(data, path.resolve())


def _family_files() -> list[str]:
    names = (entry.name for entry in (resources.files("redepth.surgery") / "families").iterdir())
    return sorted(name for name in names if name.endswith(".yaml"))


@cache
def families() -> dict[str, Family]:
    """Every family, by the source's `model_type`."""
    parsed = [parse_family(_read(name.removesuffix(".yaml"))) for name in _family_files()]
    return {family.model_type: family for family in parsed}


def family_of(model_type: str, file: str | Path | None = None) -> Family:
    """The family of a source config's `model_type`.

    Args:
        file: a user's own family, in place of redepth's.

    Raises:
        RedepthError: for a model type that no family covers, or a file that is of another one.
    """
    if file is not None:
        family = read_family(file)
        if family.model_type != model_type:
            raise RedepthError(
                f"family file {str(file)!r} is for {family.model_type!r}, but the source is {model_type!r}"
            )
        return family
    if model_type not in families():
        remedy = "; convert its text model instead" if model_type == "gemma3" else ""
        known = ", ".join(sorted(families()))
        raise RedepthError(
            f"no family for model type {model_type!r}{remedy}; redepth converts {known}, and others by --family FILE"
        )
    return families()[model_type]
