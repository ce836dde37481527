"""Source families: strict data files in `families/`, each a row of switches and one weight table."""

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from redepth.errors import RedepthError


class Derived(BaseModel):
    """A config value computed from one of the source's."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    source: str
    via: Literal["inverse_sqrt", "booleans"]

    def __init__(self, **data: Any) -> None:
        if "from" in data:  # a reserved word in Python, the natural one in YAML
            data["source"] = data.pop("from")
        super().__init__(**data)

    def apply(self, value: Any) -> Any:
        return value**-0.5 if self.via == "inverse_sqrt" else [bool(entry) for entry in value]


class Switches(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    norm_placement: Literal["pre", "post", "sandwich"]
    norm_weight: Literal["plain", "one_plus"]
    activation: Literal["silu", "gelu_pytorch_tanh"]
    qk_norm: Literal["head", "full"] | None
    qkv_bias: bool


class Family(BaseModel):
    """
    Attributes:
        config: redepth's config key ← the source's, as it is or derived.
        switches: what the family's blocks look like, in the config's words.
        embed_scale: factor on the token embedding.
        windows: which layers attend through the sliding window.
        requires: source config values without which the block would not be the same; any other is refused.
        outer, layer: the weight table, redepth's tensor ← the source's, several where redepth fuses them (rows stacked
            in the order given). Read backwards it splits them again.
        layer_prefix: where the source keeps its layers.
        ignored: endings of tensors that hold no weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    covers: str
    model_type: str
    config: dict[str, str | Derived]
    switches: Switches
    embed_scale: Literal["one", "sqrt_width"]
    windows: Literal["none", "by_layer", "every_layer"]
    requires: dict[str, list[Any]]
    outer: dict[str, str]
    layer_prefix: str
    layer: dict[str, str | list[str]]
    ignored: list[str]

    def layer_sources(self, target: str) -> list[str]:
        """The source's tensors, by their names within a layer, that make redepth's `target`."""
        sources = self.layer[target]
        return [sources] if isinstance(sources, str) else sources


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
