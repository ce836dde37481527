"""One door: each verb as a function with its command's arguments. The command line and notebooks call nothing else.

Importing this package is cheap; what a verb needs is imported when it is called.
"""

from redepth.checkpoint.folder import DEFAULT_SHARD_SIZE
from redepth.surgery.plan import DEFAULT_ADAPTER, DEFAULT_STATE, GROUPS
from redepth.surgery.presets import PRESETS

from .making import Converted, Created, convert, create, plan, quantize
from .measuring import analyze, calibrate, evaluate, inspect, load, load_tokenizer, read_config, verify
from .serving import DRAIN_SECONDS, LIMITS, LOOPBACK, MAX_ROWS, MAX_TOKENS, play, serve
from .sharing import plan_publication, publish
from .training import heal, plan_healing, retrofit

__all__ = [
    "DEFAULT_ADAPTER",
    "DEFAULT_SHARD_SIZE",
    "DEFAULT_STATE",
    "DRAIN_SECONDS",
    "GROUPS",
    "LIMITS",
    "LOOPBACK",
    "MAX_ROWS",
    "MAX_TOKENS",
    "PRESETS",
    "Converted",
    "Created",
    "analyze",
    "calibrate",
    "convert",
    "create",
    "evaluate",
    "heal",
    "inspect",
    "load",
    "load_tokenizer",
    "plan",
    "plan_healing",
    "plan_publication",
    "play",
    "publish",
    "quantize",
    "read_config",
    "retrofit",
    "serve",
    "verify",
]
