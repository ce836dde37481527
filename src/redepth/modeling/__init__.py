"""The depth-recurrent model. Its modules travel verbatim inside checkpoints: torch and transformers only."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


# What needs neither torch nor transformers: enough to look at a checkpoint.
PLAIN = ("cache_rules", "config_checks", "errors", "fields", "published_kinds", "quantization")


class _AutoClassesFirst(MetaPathFinder):
    """Has transformers' Auto classes loaded whole before any module here that uses transformers is begun.

    Its layers need them, and when they are loaded they ask for this package, see `redepth.registration`. For the same
    reason names are imported when they are first asked for.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name in PLAIN or "transformers.models.auto.modeling_auto" in sys.modules:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadedAfterwards(spec.loader)
        return spec


class _LoadedAfterwards(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        import transformers.models.auto.modeling_auto  # noqa: F401

        self.found = sys.modules.get(spec.name)  # where the Auto classes asked for this very module
        return self.found if self.found is not None else self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        if module is not self.found:
            self.loader.exec_module(module)


sys.meta_path.insert(0, _AutoClassesFirst())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'redepth.modeling' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
