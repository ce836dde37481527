"""Source families: strict data files in `families/`, each a row of switches and one weight table."""

from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from redepth.errors import RedepthError
from redepth.modeling.configuration import LRU_LAYER


class Derived(BaseModel):
    """A config value computed from one of the source's."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    source: str
    via: Literal["inverse_sqrt", "booleans", "half", "griffin_layers"]

    def __init__(self, **data: Any) -> None:
        if "from" in data:  # a reserved word in Python, the natural one in YAML
            data["source"] = data.pop("from")
        super().__init__(**data)

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
        layer_of_type: what layers of a type have beside `layer`, by redepth's layer type.
        layer_prefix: where the source keeps its layers.
        ignored: endings of tensors that hold no weights.
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


def parse_family(data: dict[str, Any]) -> Family:
    """Validate one family's merged data.

    Raises:
        RedepthError: naming the first field that does not fit.
    """
    requires = {key: allowed for key, allowed in data.get("requires", {}).items() if allowed is not None}
    try:
        return Family(**{**data, "requires": requires})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RedepthError(f"family {data.get('model_type')!r}: {where}: {first['msg']}") from None


@cache
def families() -> dict[str, Family]:
    """Every family, by the source's `model_type`."""
    files = sorted(entry.name for entry in (resources.files("redepth.surgery") / "families").iterdir())
    parsed = [parse_family(_read(name.removesuffix(".yaml"))) for name in files if name.endswith(".yaml")]
    return {family.model_type: family for family in parsed}


def family_of(model_type: str) -> Family:
    """The family of a source config's `model_type`.

    Raises:
        RedepthError: for a model type that no family covers.
    """
    if model_type not in families():
        remedy = "; convert its text model instead" if model_type == "gemma3" else ""
        known = ", ".join(sorted(families()))
        raise RedepthError(f"no family for model type {model_type!r}{remedy}; redepth converts {known}")
    return families()[model_type]
