"""redepth: depth-recurrent language models, from surgery to generation.

Importing it registers the published `huginn_raven` format with transformers' Auto classes. For `recurrent_gemma` they
still give transformers' own class; `redepth.load` gives redepth's. The import itself is cheap: what a name stands for is
imported when it is first asked for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .errors import RedepthError
from .registration import register_with_libraries

if TYPE_CHECKING:
    from .analysis.patch import patch
    from .analysis.record import record
    from .api import (
        analyze,
        calibrate,
        convert,
        create,
        evaluate,
        heal,
        inspect,
        load,
        plan,
        play,
        publish,
        quantize,
        retrofit,
        serve,
        verify,
    )
    from .griffin import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RecurrentGemmaModel
    from .healing.recipe import HealRecipe
    from .modeling import (
        DepthPolicy,
        RecurrentDepthCache,
        RecurrentDepthConfig,
        RecurrentDepthForCausalLM,
        RecurrentStack,
    )
    from .modeling.classification import RecurrentDepthForSequenceClassification

__version__ = version("redepth")

# Where each name lives.
_MODULES = {
    **dict.fromkeys(
        (
            "analyze",
            "calibrate",
            "convert",
            "create",
            "evaluate",
            "heal",
            "inspect",
            "load",
            "plan",
            "play",
            "publish",
            "quantize",
            "retrofit",
            "serve",
            "verify",
        ),
        "api",
    ),
    **dict.fromkeys(
        ("RecurrentGemmaCache", "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", "RecurrentGemmaModel"), "griffin"
    ),
    **dict.fromkeys(
        (
            "DepthPolicy",
            "RecurrentDepthCache",
            "RecurrentDepthConfig",
            "RecurrentDepthForCausalLM",
            "RecurrentStack",
        ),
        "modeling",
    ),
    "HealRecipe": "healing.recipe",
    "RecurrentDepthForSequenceClassification": "modeling.classification",
    "patch": "analysis.patch",
    "record": "analysis.record",
}

__all__ = [
    "DepthPolicy",
    "HealRecipe",
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthForSequenceClassification",
    "RecurrentGemmaCache",
    "RecurrentGemmaConfig",
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaModel",
    "RecurrentStack",
    "RedepthError",
    "__version__",
    "analyze",
    "calibrate",
    "convert",
    "create",
    "evaluate",
    "heal",
    "inspect",
    "load",
    "patch",
    "plan",
    "play",
    "publish",
    "quantize",
    "record",
    "retrofit",
    "serve",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'redepth' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_libraries()
