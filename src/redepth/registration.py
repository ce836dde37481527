"""Tells transformers' Auto classes about `huginn_raven`, and lm-eval about its model class: at once where they are loaded,
otherwise as soon as they are.

Loading them takes seconds, since torch comes along; a program that only wants redepth's version, or a command's help,
should not wait for that.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def register_config() -> None:
    from transformers import AutoConfig

    from .modeling.configuration import RecurrentDepthConfig

    AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig, exist_ok=True)


def register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    # From where they are, since their package may be half imported at this moment.
    from .modeling.classification import RecurrentDepthForSequenceClassification
    from .modeling.configuration import RecurrentDepthConfig
    from .modeling.model import RecurrentDepthForCausalLM
    from .modeling.stack import RecurrentStack

    for auto_class, model_class in (
        (AutoModel, RecurrentStack),
        (AutoModelForCausalLM, RecurrentDepthForCausalLM),
        (AutoModelForSequenceClassification, RecurrentDepthForSequenceClassification),
    ):
        auto_class.register(RecurrentDepthConfig, model_class, exist_ok=True)


def register_with_lm_eval() -> None:
    from lm_eval.api.registry import model_registry

    if "redepth" not in model_registry:
        model_registry.register("redepth", target="redepth.evaluation.harness:RedepthLM")


# What to register in each of other libraries' modules once it is loaded.
REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_models,
    "lm_eval.models": register_with_lm_eval,
}


def register_with_libraries() -> None:
    for module, register in REGISTRATIONS.items():
        if module in sys.modules:
            register()
        elif not any(isinstance(finder, _Follow) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _Follow(module, register))


class _Follow(MetaPathFinder):
    """Lets the import system find a module as usual, and calls `then` when the module has been loaded."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module = module
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # so that the next line does not come back here
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowedLoader(spec.loader, self.then)
        return spec


class _FollowedLoader(Loader):
    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self.loader = loader
        self.then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.then()
