"""Few new tokens on a processor, each block in one call of the kernels in `few_tokens.cpp`.

torch's products of few tokens with a matrix read memory at a third of what it gives, and many small operations lie between
them. The kernels are compiled once a machine, in some seconds, and kept beside other caches.

Shapes: B batch, T new tokens, M = B · T, S stored and new tokens, D width, K inputs, N outputs.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .cache import RecurrentDepthCache
from .passes import PassContext
from .quantization import DYNAMIC
from .quantized_linear import ACTIVATION_LEVELS, HalfHead, QuantizedLinear

logger = logging.get_logger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("few_tokens.cpp", "few_tokens_products.h")]
# So many tokens at most: what was measured. Longer passes are prompts, which are bound by arithmetic.
MOST_TOKENS = 64
MOST_QUANTIZED = 32  # with weights in 8 or 4 bits, whose products torch has good kernels for
GROUPS_OF = 16  # a vector of 4-bit weights lies in one group
# What torch calls the processor's abilities, and how a compiler is told of them.
INSTRUCTIONS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}
PLACEMENTS = ("pre", "post", "sandwich", "huginn")
ROPES = {"half": 1, "interleaved": 2}
HEAD_NORMS = {None: 0, "head": 1, "full": 2}
GELU = {"silu": 0, "gelu_pytorch_tanh": 1}
FLOAT32, FLOAT16, INT8, INT4 = range(4)
KINDS = {16: FLOAT16, 8: INT8, 4: INT4}


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    """A structure's fields, from names side by side and the type that they share."""
    return [(name, kind) for names, kind in groups for name in names.split()]


class Matrix(ctypes.Structure):
    """`Matrix` of few_tokens_products.h."""

    _fields_ = _fields(
        ("weight scale offset bias", ctypes.c_void_p),
        ("outputs inputs", ctypes.c_int64),
        ("kind group levels", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """`Layer` of few_tokens.cpp."""

    _fields_ = _fields(
        ("qkv proj fc down", Matrix),
        ("norms", ctypes.c_void_p * 4),
        ("q_norm k_norm qk_bias", ctypes.c_void_p),
        ("width heads kv_heads head_dim hidden placement one_plus gelu rope rotated head_norm", ctypes.c_int32),
        ("eps scaling soft_cap", ctypes.c_float),
    )


class Call(ctypes.Structure):
    """`Call` of few_tokens.cpp."""

    _fields_ = _fields(
        ("x out cos sin keys values mask cache_rows places real", ctypes.c_void_p),
        ("rows tokens past stored rope_row row_stride head_stride mask_row mask_token", ctypes.c_int64),
        ("mask_is_added threads", ctypes.c_int32),
    )


@lru_cache
def library() -> ctypes.CDLL:
    """The kernels, compiled for this processor where that has not been done yet.

    Raises:
        OSError: where there is no source (in an exported checkpoint), no compiler, or the compiler fails; in one line.
    """
    if not SOURCES[0].exists():
        raise OSError("an exported checkpoint has none; install redepth")
    compiler = os.environ.get("CXX", "c++")
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), "")
    command = [compiler, "-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w", *instructions.split()]
    described = [*command, platform.machine(), *(source.read_text(encoding="utf-8") for source in SOURCES)]
    name = hashlib.sha256("\n".join(described).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "redepth"
    place = folder / f"few_tokens-{name}.so"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / place.name
            compile_it = [*command, str(SOURCES[0]), "-o", str(made)]
            try:
                done = subprocess.run(compile_it, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                raise OSError(
                    f"there is no {compiler!r}; install a C++ compiler such as g++, or name one in CXX"
                ) from None
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise OSError(f"{compiler} failed: {said[0]}")
            made.replace(place)
    kernels = ctypes.CDLL(str(place))
    kernels.redepth_linear.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int32,
    ]
    kernels.redepth_block.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    kernels.redepth_linear.restype = kernels.redepth_block.restype = None
    return kernels


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers lie in this processor's memory, one after another."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _matrix(linear: Any) -> Matrix | None:
    """A linear layer as the kernels take it; None for one that they can't read."""
    if type(linear) is QuantizedLinear and linear.dtype == torch.float32:
        if linear.bits == 4 and linear.group_size % GROUPS_OF:
            return None
        linear.keep_stored()
        described = (KINDS[linear.bits], linear.group_size, ACTIVATION_LEVELS if linear.kind == DYNAMIC else 0)
        scale, offset = getattr(linear, "scale", None), getattr(linear, "offset", None)
        weight = linear.weight
    elif type(linear) in (nn.Linear, HalfHead) and linear.weight.dtype == torch.float32:
        weight, scale, offset = linear.weight, None, None
        described = (FLOAT32, 0, 0)
        if type(linear) is HalfHead and weight.device.type == "cpu":
            weight, described = linear.half_weight(), (FLOAT16, 0, 0)
    else:
        return None
    tensors = (weight, scale, offset, linear.bias)
    if not all(tensor is None or _is_plain(tensor) for tensor in tensors):
        return None
    return Matrix(*map(_pointer, tensors), linear.out_features, linear.in_features, *described)


class Bound:
    """A module as its kernels take it, and what has to stay as it was for that to be so; a copy of a module has none."""

    def __init__(self, module: nn.Module, made: Any) -> None:
        self.made = made
        self.modules = list(module.modules())
        self.children = [(part._modules, name, child) for part in self.modules for name, child in part._modules.items()]
        self.tensors = [
            (part._parameters, name, tensor, _pointer(tensor))
            for part in self.modules
            for name, tensor in part._parameters.items()
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def stands(self) -> bool:
        """Whether modules and tensors are the same, the tensors lie where they lay, and nobody waits for a module's call."""
        return (
            all(children.get(name) is child for children, name, child in self.children)
            and all(
                held.get(name) is tensor and _pointer(tensor) == address for held, name, tensor, address in self.tensors
            )
            and not any(
                part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in self.modules
            )
        )


def _bound(module: nn.Module, make: Any) -> Any:
    bound = module.__dict__.get("few_token_bound")
    if bound is None or not bound.stands():
        bound = module.__dict__["few_token_bound"] = Bound(module, make(module))
        if not bound.stands():  # somebody waits for its call
            bound.made = None
    return bound.made


def _layer(block: Any) -> Layer | None:
    """A block as the kernels take it; None for one that they can't run."""
    attention = getattr(block, "attn", None)
    if attention is None or attention.config.activation not in GELU:
        return None
    config = attention.config
    matrices = [_matrix(part) for part in (attention.Wqkv, attention.proj, block.mlp.fc, block.mlp.proj)]
    norms = [getattr(block, f"norm_{i}", None) for i in (1, 2, 3, 4)]
    held = [norm.weight for norm in norms if norm is not None]
    small = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    small = [norm.weight if norm is not None else None for norm in small] + [getattr(attention, "qk_bias", None)]
    small_ones = [tensor for tensor in (*held, *small) if tensor is not None]
    if None in matrices or not all(_is_plain(tensor) and tensor.dtype == torch.float32 for tensor in small_ones):
        return None
    layer = Layer(*matrices)
    layer.norms[:] = [norm.weight.data_ptr() if norm is not None else 0 for norm in norms]
    layer.q_norm, layer.k_norm, layer.qk_bias = map(_pointer, small)
    layer.width, layer.heads, layer.kv_heads = config.n_embd, config.n_heads, attention.kv_heads
    layer.head_dim, layer.hidden = attention.head_dim, config.intermediate_size
    layer.placement, layer.one_plus = PLACEMENTS.index(block.placement), config.norm_weight == "one_plus"
    layer.gelu, layer.head_norm = GELU[config.activation], HEAD_NORMS[config.qk_norm]
    layer.rope = ROPES[config.rope_style] if attention.has_rope else 0
    layer.eps, layer.scaling, layer.soft_cap = config.norm_eps, attention.scaling, attention.soft_cap or 0.0
    return layer


def _call(x: torch.Tensor, context: PassContext, kind: str, interleaved: bool) -> tuple[Call, int, Any] | None:
    """What the layers of one kind share in a pass over `x` `[B, T, D]`, the channels that turn, and the tensors that it points to."""
    rows, tokens, _ = x.shape
    past, subset = context.cache.get_seq_length(), context.subset
    stored = past + (tokens if subset is None else subset.tokens)
    cos, sin = (part.contiguous() for part in context.rotations[kind])
    mask = context.masks[kind]
    shapes = [(many, 1, tokens, stored) for many in (1, rows)]
    if mask is None:
        if subset is not None or (tokens > 1 and context.attention != "sdpa"):
            return None
    elif not isinstance(mask, torch.Tensor) or mask.shape not in shapes or mask.dtype not in (torch.bool, x.dtype):
        return None
    elif mask.stride(-1) != 1:
        mask = mask.contiguous()
    call = Call(cos=cos.data_ptr(), sin=sin.data_ptr(), mask=_pointer(mask), rows=rows, tokens=tokens, past=past)
    call.stored = stored
    places = None
    if subset is not None:
        places = (subset.rows.contiguous(), past + subset.positions, subset.real.contiguous())
        call.cache_rows, call.places, call.real = map(_pointer, places)
    call.rope_row = cos.stride(0) if len(cos) > 1 else 0
    if mask is not None:
        call.mask_row = mask.stride(0) if len(mask) > 1 else 0
        call.mask_token = mask.stride(2)
        call.mask_is_added = mask.dtype == torch.float32
    call.threads = torch.get_num_threads()
    return call, cos.shape[-1] * (2 if interleaved else 1), (cos, sin, mask, places)


def can_run(stack: Any) -> bool:
    """Whether the kernels know a stack's layers and can be compiled here; where only a compiler is missing, one line says so."""
    blocks = [*stack.prelude, *stack.core_block, *stack.coda]
    if stack.device.type != "cpu" or any(_bound(block, _layer) is None for block in blocks):
        return False
    try:
        library()
    except OSError as error:
        logger.warning(f"no kernels for few tokens, so decoding is slower: {error}")
        return False
    return True


def suits(x: torch.Tensor) -> bool:
    """Whether the kernels may run on `x` `[…, D]`: few tokens in fp32 on a processor, and no gradient wanted."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() <= MOST_TOKENS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _has_few(x: torch.Tensor, matrix: Matrix) -> bool:
    return matrix.kind not in (INT8, INT4) or x.numel() <= MOST_QUANTIZED * x.shape[-1]


def product_by(linear: nn.Module, kernels: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer as a function, `[…, K]` → `[…, N]`, by the kernels where they are wanted and can."""
    return partial(product, linear) if kernels else linear


def product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, `[…, K]` → `[…, N]`, by the kernels where they can."""
    matrix = _bound(linear, _matrix) if suits(x) else None
    if matrix is None or not _has_few(x, matrix):
        return linear(x)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], matrix.outputs)
    tokens = x.numel() // matrix.inputs
    library().redepth_linear(ctypes.byref(matrix), x.data_ptr(), tokens, y.data_ptr(), torch.get_num_threads())
    return y


def run_block(block: Any, x: torch.Tensor, context: PassContext, step: int) -> torch.Tensor | None:
    """`block(x, context, step)` on `x` `[B, T, D]`; None where the kernels can't: see `suits`, and a pass with a cache that
    nobody watches."""
    cache = context.cache
    plain = context.attend is None and not context.watchers
    if not plain or type(cache) is not RecurrentDepthCache or not suits(x):
        return None
    layer = _bound(block, _layer)
    if layer is None or not _has_few(x, layer.fc):
        return None
    attention = block.attn
    shared = context.calls.get(attention.layer_type)
    if shared is None:
        shared = context.calls[attention.layer_type] = _call(x, context, attention.layer_type, layer.rope == 2)
        if shared is None:
            return None
    call, layer.rotated, _ = shared
    x = x.contiguous()
    opened = cache.open_layer(attention.layer_idx, step, x, layer.kv_heads, layer.head_dim, context.subset)
    if opened is None:
        return None
    keys, values = opened
    out = torch.empty_like(x)
    call.x, call.out, call.keys, call.values = x.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr()
    call.row_stride, call.head_stride = keys.stride(0), keys.stride(1)
    library().redepth_block(ctypes.byref(layer), ctypes.byref(call))
    return out
