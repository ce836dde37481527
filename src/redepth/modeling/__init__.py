"""The depth-recurrent model. Its modules travel verbatim inside checkpoints: torch and transformers only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded whole before any module here is begun: transformers' own layers need it, and when it is loaded it asks for this
# package, see `redepth.registration`. For the same reason names are imported when they are first asked for.
import transformers.models.auto.modeling_auto  # noqa: F401

if TYPE_CHECKING:
    from .cache import RecurrentDepthCache
    from .configuration import RecurrentDepthConfig
    from .model import RecurrentDepthForCausalLM, RecurrentDepthOutput
    from .policy import DepthPolicy
    from .stack import RecurrentStack

__all__ = [
    "DepthPolicy",
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthOutput",
    "RecurrentStack",
]

_MODULES = {
    "DepthPolicy": "policy",
    "RecurrentDepthCache": "cache",
    "RecurrentDepthConfig": "configuration",
    "RecurrentDepthForCausalLM": "model",
    "RecurrentDepthOutput": "model",
    "RecurrentStack": "stack",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'redepth.modeling' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
