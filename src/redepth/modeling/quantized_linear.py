"""Linear layers whose weights are held in 16, 8 or 4 bits, by torch's own kernels, and which kernel this processor wants.

A looped core's weights are read at every step of every token, so the bytes they take are most of the time at small batches.

Shapes: M tokens, K inputs, N outputs.
"""

import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .errors import UserError
from .quantization import DYNAMIC, WEIGHT_ONLY
from .quantized_weights import QuantizedWeights, dequantize, int4_levels, quantize, round_activations, stored_shapes

# Numbers of tokens at which kernels are timed; each stands for those around it, see `_bucket`.
TIMED_TOKENS = (1, 8, 64, 512)
BUCKET_ENDS = (2, 22, 181)
CLEARLY = 1.1  # a plain product takes over where it is this many times as fast
TIMED_RUNS = 5
# Without VNNI instructions, sums of two 8-bit products overflow 16 bits; activations of 7 bits are safe.
ACTIVATION_LEVELS = 127 if torch.cpu._is_vnni_supported() else 63
INT8_KERNEL_BLOCK = 32
INT4_KERNEL_GROUPS = (32, 64, 128, 256)

# Some inputs `[M, K]` in, their product with the weights `[M, N]` out, in the inputs' dtype.
Product = Callable[[torch.Tensor], torch.Tensor]


def _packed(op: str, *arguments: Any) -> Any:
    """A weight matrix in the layout of torch's fbgemm kernels."""
    engine = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        return getattr(torch.ops.quantized, op)(*arguments, None)
    finally:
        torch.backends.quantized.engine = engine


class DynamicInt8:
    """8-bit weights and activations, whole-number products: the activations of each token are scaled by their largest."""

    def __init__(self, stored: QuantizedWeights, inputs: int, dtype: torch.dtype) -> None:
        assert stored.scale is not None
        with warnings.catch_warnings():  # of quantised tensors, the only ones that this kernel packs
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(stored.scale), dtype=torch.long)
            made = torch._make_per_channel_quantized_tensor(stored.weight, stored.scale.double(), zeros, 0)
            self.packed = _packed("linear_prepack", made)
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        if len(wide) == 1:
            return self.product(wide, largest.item() / ACTIVATION_LEVELS, ACTIVATION_LEVELS + 1, self.packed).to(
                x.dtype
            )
        # The kernel knows one scale for all tokens; with each divided by its largest, one serves them all.
        y = self.product(wide / largest, 1 / ACTIVATION_LEVELS, ACTIVATION_LEVELS + 1, self.packed)
        return y.mul_(largest).to(x.dtype)

    def stored(self) -> QuantizedWeights:
        """What it was made of, so that it need not be held twice."""
        weight, _ = torch.ops.quantized.linear_unpack(self.packed)
        return QuantizedWeights(weight.int_repr(), weight.q_per_channel_scales().float())


class Half:
    """The weights in fp16, activations and sums in fp32."""

    def __init__(self, stored: QuantizedWeights, inputs: int, dtype: torch.dtype) -> None:
        self.packed = _packed("linear_prepack_fp16", dequantize(stored, inputs))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)


class PackedInt8:
    """8-bit weights, bf16 activations."""

    def __init__(self, stored: QuantizedWeights, inputs: int, dtype: torch.dtype) -> None:
        assert stored.scale is not None
        if inputs % INT8_KERNEL_BLOCK:
            raise RuntimeError("the kernel reads whole blocks of inputs, and beyond the end of others")
        self.weight, self.scale = stored.weight, stored.scale.bfloat16()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


class PackedInt4:
    """4-bit weights, bf16 activations."""

    def __init__(self, stored: QuantizedWeights, inputs: int, dtype: torch.dtype) -> None:
        assert stored.scale is not None
        assert stored.offset is not None
        levels = int4_levels(stored).int()
        self.group_size = levels.shape[1] // stored.scale.shape[1]
        if levels.shape[1] != inputs or self.group_size not in INT4_KERNEL_GROUPS:
            raise RuntimeError("the kernel takes whole groups of certain sizes")
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        self.scales = torch.stack([stored.scale, stored.offset], dim=-1).transpose(0, 1).contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales)


# Kernels by kind, bits and whether activations are bf16. Those of one entry compute with the same numbers.
KERNELS: dict[tuple[str, int, bool], tuple[Any, ...]] = {
    (WEIGHT_ONLY, 16, False): (Half,),
    (WEIGHT_ONLY, 16, True): (Half,),
    (DYNAMIC, 8, False): (DynamicInt8,),
    (DYNAMIC, 8, True): (DynamicInt8,),
    (WEIGHT_ONLY, 8, False): (Half,),
    (WEIGHT_ONLY, 8, True): (PackedInt8, Half),
    (WEIGHT_ONLY, 4, False): (Half,),
    (WEIGHT_ONLY, 4, True): (PackedInt4, Half),
}


def plain_weights(stored: QuantizedWeights, inputs: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The weights as every kernel of the kind reads them, `[N, K]`."""
    weight = dequantize(stored, inputs)
    return (weight.half() if kind == WEIGHT_ONLY else weight).to(dtype)


def plain_product(x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """`[M, K]` times `[N, K]`, with activations rounded as the kind rounds them: the readable form of every kernel."""
    if kind == WEIGHT_ONLY:
        return F.linear(x, weight)
    rounded, scale = round_activations(x.float(), ACTIVATION_LEVELS)
    return (F.linear(rounded.to(x.dtype), weight) * scale).to(x.dtype)


def _bucket(tokens: int) -> int:
    """Which of TIMED_TOKENS stands for so many."""
    return sum(tokens > end for end in BUCKET_ENDS)


@lru_cache
def measured_choice(
    kind: str, bits: int, group_size: int, outputs: int, inputs: int, dtype: torch.dtype, threads: int
) -> tuple[Any, tuple[bool, ...]]:
    """The fastest kernel for a shape on this processor, and for which of TIMED_TOKENS an unquantised product is faster.

    Args:
        threads: how many torch uses, on which the answer depends.

    Returns:
        the kernel, None where none runs here; and an answer for each of TIMED_TOKENS.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    stored = quantize(weight, bits, group_size)
    products: dict[Any, Product] = {None: lambda x: F.linear(x, plain)}
    plain = weight.to(dtype)
    x = torch.randn(max(TIMED_TOKENS), inputs, generator=generator).to(dtype)
    for kernel in KERNELS.get((kind, bits, dtype == torch.bfloat16), ()):
        try:
            product = kernel(stored, inputs, dtype)
            product(x[:1]), product(x[:8])
        except (RuntimeError, AttributeError):  # not built for this processor, or not for this shape
            continue
        products[kernel] = product
    times = {
        kernel: [best_time(product, x[:tokens]) for tokens in TIMED_TOKENS] for kernel, product in products.items()
    }
    plain_times = times.pop(None)
    if not times:
        return None, (True,) * len(TIMED_TOKENS)
    best = min(times, key=lambda kernel: sum(a / b for a, b in zip(times[kernel], plain_times, strict=True)))
    return best, tuple(own > CLEARLY * other for own, other in zip(times[best], plain_times, strict=True))


@torch.inference_mode()
def best_time(product: Product, x: torch.Tensor) -> float:
    """Seconds of the fastest of a few runs, so that other work on the machine counts little."""
    best = float("inf")
    for _ in range(TIMED_RUNS + 1):
        started = time.perf_counter()
        product(x)
        best = min(best, time.perf_counter() - started)
    return best


class QuantizedLinear(nn.Module):
    """A linear layer with weights in 16, 8 or 4 bits.

    It is made empty, in the shapes in which a checkpoint stores it, and `pack` gives it a kernel when its tensors are
    there. Its state dict holds the stored tensors, packed or not.

    Args:
        kind: `dynamic` rounds activations to 8 bits as well, `weight-only` doesn't.
        bits: of a weight; `dynamic` takes 8.
        group_size: inputs that share a scale, in 4 bits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        kind: str,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.bits, self.group_size = kind, bits, group_size
        self.dtype = dtype
        shapes = stored_shapes(bits, out_features, in_features, group_size)
        self.stored_names = tuple(shapes)
        for name, (shape, stored_dtype) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=stored_dtype), requires_grad=False))
        bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)
        self.kernel: Any = None
        self.plain: torch.Tensor | None = None
        self.prefers_plain: tuple[bool, ...] = ()

    @classmethod
    def of(cls, linear: nn.Linear, kind: str, bits: int, group_size: int) -> "QuantizedLinear":
        """A layer's weights quantised; `pack` is still to be called."""
        weight = linear.weight.detach()
        with torch.device("meta"):
            made = cls(
                linear.in_features, linear.out_features, linear.bias is not None, kind, bits, group_size, weight.dtype
            )
        made._hold(quantize(weight, bits, group_size))
        made.bias = linear.bias.requires_grad_(False) if linear.bias is not None else None
        return made

    def pack(self, kernel: Any = None) -> None:
        """Choose how to multiply.

        Args:
            kernel: one of KERNELS; or `plain`, an unquantised product; by default what `measured_choice` says.

        Raises:
            ValueError: for scales that are not numbers.
        """
        stored = self.stored()
        for tensor in (stored.weight, stored.scale, stored.offset):
            if tensor is not None and not tensor.isfinite().all():
                raise UserError("a quantised layer has values that are NaN or infinite; quantise the checkpoint again")
        is_plain = (kernel == "plain",) * len(TIMED_TOKENS)
        if kernel is None:
            described = (self.kind, self.bits, self.group_size, self.out_features, self.in_features, self.dtype)
            kernel, is_plain = measured_choice(*described, torch.get_num_threads())
        on_processor = stored.weight.device.type == "cpu"
        self.kernel = kernel(stored, self.in_features, self.dtype) if on_processor and not all(is_plain) else None
        self.prefers_plain = is_plain
        # Elsewhere than on a processor, weights are held small and widened for each product.
        if any(is_plain) and on_processor:
            self.plain = plain_weights(stored, self.in_features, self.kind, self.dtype)
        if hasattr(self.kernel, "stored"):
            self.weight = self.scale = None

    def stored(self) -> QuantizedWeights:
        """The tensors that a checkpoint holds."""
        if self.weight is None:
            return self.kernel.stored()
        return QuantizedWeights(**{name: getattr(self, name).detach() for name in self.stored_names})

    def keep_stored(self) -> None:
        """Hold the stored tensors themselves, beside what a kernel made of them, for whoever reads them where they lie."""
        if self.weight is None:
            for name, tensor in vars(self.stored()).items():
                if name in self.stored_names:
                    setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def _hold(self, stored: QuantizedWeights) -> None:
        """The opposite of `pack`."""
        for name in self.stored_names:
            setattr(self, name, nn.Parameter(getattr(stored, name), requires_grad=False))
        self.kernel = self.plain = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, K]` → `[…, N]`, in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        if self.kernel is not None and not self.prefers_plain[_bucket(len(flat))]:
            y = self.kernel(flat.to(self.dtype).contiguous()).to(x.dtype)
        else:
            weight = self.plain
            if weight is None:
                weight = plain_weights(self.stored(), self.in_features, self.kind, x.dtype)
            y = plain_product(flat.to(weight.dtype), weight, self.kind).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self.stored()
        for name in self.stored_names:
            destination[prefix + name] = getattr(stored, name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        """To another device or dtype: the stored tensors keep their own dtypes, whatever the layer computes in."""
        was_packed = self.kernel is not None or self.plain is not None
        self._hold(self.stored())
        dtypes = {name: parameter.dtype for name, parameter in self.named_parameters() if name != "bias"}
        before = {name: getattr(self, name).data for name in dtypes}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            if getattr(self, name).dtype != dtype:
                kept = before[name].to(getattr(self, name).device)
                setattr(self, name, nn.Parameter(kept, requires_grad=False))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if was_packed:
            self.pack()
        return self

    def extra_repr(self) -> str:
        kernel = type(self.kernel).__name__ if self.kernel is not None else "plain"
        return f"{self.in_features}, {self.out_features}, {self.bits} bits, {self.kind}, kernel={kernel}"


class HalfHead(nn.Linear):
    """A head whose product reads an fp16 copy of its weights, which stay as they are, tied to the embedding or not."""

    def __init__(self, head: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(head.in_features, head.out_features, bias=False)
        self.weight = head.weight
        self.packed: tuple[int, Any] | None = None
        self.halved: tuple[int, torch.Tensor] | None = None

    def half_weight(self) -> torch.Tensor:
        """The fp16 copy by itself, `[N, K]`, for whoever reads it where it lies."""
        if self.halved is None or self.halved[0] != self.weight.data_ptr():
            self.halved = self.weight.data_ptr(), self.weight.detach().half()
        return self.halved[1]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[…, K]` → `[…, N]`, in the dtype of the input."""
        tokens = input.numel() // self.in_features
        kind = (WEIGHT_ONLY, 16, 2, self.out_features, self.in_features, self.weight.dtype)
        if self.weight.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(input)
        kernel, prefers_plain = measured_choice(*kind, torch.get_num_threads())
        if kernel is None or prefers_plain[_bucket(tokens)]:
            return super().forward(input)
        # Made anew where the weights are others, as after a change of the vocabulary's size.
        if self.packed is None or self.packed[0] != self.weight.data_ptr():
            stored = QuantizedWeights(self.weight.detach().half())
            self.packed = self.weight.data_ptr(), kernel(stored, self.in_features, self.weight.dtype)
        return self.packed[1](input.reshape(-1, self.in_features)).unflatten(0, input.shape[:-1])
