"""The linear recurrence: the fast form against its definition, and its gradients against numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redepth.modeling import lru_scan as scan_module
from redepth.modeling.lru_scan import linear_scan, linear_scan_reference
from tests.tolerance import tolerance

CLOSE = tolerance(layers=1, width=1000)  # a state is a sum over the tokens before it


def make_inputs(
    batch: int, tokens: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator)
    # A decay for every temper: forgetting at once, hardly ever, and all between.
    a = (
        torch.rand(batch, tokens, channels, generator=generator)
        ** torch.tensor([0.01, 1.0, 20.0]).repeat(channels)[:channels]
    )
    h0 = torch.randn(batch, channels, generator=generator)
    return x.to(dtype), a.to(dtype), h0.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.one_of(st.integers(0, 100), st.sampled_from([511, 512, 513, 1000])),
    channels=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    carried=st.booleans(),
    reset_rate=st.sampled_from([None, 0.0, 0.1, 1.0]),
)
def test_fast_scan_equals_its_definition(batch, tokens, channels, seed, dtype, carried, reset_rate):
    x, a, h0 = make_inputs(batch, tokens, channels, seed, dtype)
    h0 = h0 if carried else None
    reset = None if reset_rate is None else torch.rand(batch, tokens) < reset_rate
    h, last = linear_scan(x, a, h0, reset)
    # Against fp64: with a near 1 the rounding of either order of sums adds up over the tokens.
    carried_state = None if h0 is None else h0.double()
    expected, expected_last = linear_scan_reference(x.double(), a.double(), carried_state, reset)
    assert h.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(h.double(), expected, **CLOSE)
    torch.testing.assert_close(last.double(), expected_last, **CLOSE)


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 40), with_reset=st.booleans(), seed=st.integers(0, 100))
def test_gradients_against_numbers(tokens, with_reset, seed):
    inputs = [value.requires_grad_() for value in make_inputs(2, tokens, 2, seed, torch.float64)]
    reset = torch.rand(2, tokens) < 0.2 if with_reset else None
    assert torch.autograd.gradcheck(lambda x, a, h0: linear_scan(x, a, h0, reset), inputs)


@pytest.mark.parametrize("tokens", [2, 31, 33, 600])
def test_gradients_equal_those_of_the_definition(tokens):
    reset = torch.rand(2, tokens, generator=torch.Generator().manual_seed(3)) < 0.05
    gradients = []
    for scan in (linear_scan, linear_scan_reference):
        inputs = [value.requires_grad_() for value in make_inputs(2, tokens, 6, dtype=torch.float64)]
        h, last = scan(*inputs, reset)
        (h.sin().sum() + last.square().sum()).backward()
        gradients.append([value.grad for value in inputs])
    for fast, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, exact, **tolerance(layers=20, width=600, dtype=torch.float64))


@pytest.mark.parametrize("cut", [1, 17, 32, 63, 99])
def test_state_carries_over_a_cut(cut):
    x, a, h0 = make_inputs(2, 100, 4)
    whole, last = linear_scan(x, a, h0)
    first, middle = linear_scan(x[:, :cut], a[:, :cut], h0)
    second, end = linear_scan(x[:, cut:], a[:, cut:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **CLOSE)
    torch.testing.assert_close(end, last, **CLOSE)


def test_resets_make_documents_independent():
    x, a, h0 = make_inputs(1, 90, 4)
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, [0, 35]] = True
    packed, _ = linear_scan(x, a, h0, reset)
    torch.testing.assert_close(packed[:, :35], linear_scan(x[:, :35], a[:, :35])[0], **CLOSE)
    torch.testing.assert_close(packed[:, 35:], linear_scan(x[:, 35:], a[:, 35:])[0], **CLOSE)


@pytest.mark.parametrize("decay", [0.0, 1e-30, 1.0 - 1e-7, 1.0])
def test_extreme_decays_stay_exact(decay):
    x, _, h0 = make_inputs(1, 2000, 3)
    a = torch.full_like(x, decay)
    h, _ = linear_scan(x, a, h0)
    expected, _ = linear_scan_reference(x.double(), a.double(), h0.double())
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=2e-4)


def test_strided_inputs():
    x, a, h0 = make_inputs(2, 70, 8)
    h, _ = linear_scan(x.transpose(1, 2).contiguous().transpose(1, 2), a[..., ::2].repeat_interleave(2, -1), h0)
    expected, _ = linear_scan_reference(x, a[..., ::2].repeat_interleave(2, -1), h0)
    torch.testing.assert_close(h, expected, **CLOSE)


def test_backward_keeps_only_a_and_h():
    x, a, h0 = (value.requires_grad_() for value in make_inputs(2, 300, 8))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        linear_scan(x, a, h0)
    assert sum(kept) <= 2 * x.numel() + h0.numel()


def test_compiled_graph_holds_one_scan_at_any_length():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, a, h0: linear_scan(x, a, h0)[0] * 2, backend=counter, fullgraph=True)
    for tokens in (64, 256):
        x, a, h0 = make_inputs(1, tokens, 4)
        torch.testing.assert_close(compiled(x, a, h0), linear_scan_reference(x, a, h0)[0] * 2, **CLOSE)
    for graph in counter.graphs:
        assert len(graph.graph.nodes) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x and a must both be"),
        ({"a": torch.zeros(2, 4, 3)}, "x and a must both be"),
        ({"h0": torch.zeros(2, 4)}, r"h0 must be \[2, 3\]"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must be bool \[2, 5\]"),
        ({"reset": torch.zeros(2, 5)}, r"reset must be bool \[2, 5\]"),
    ],
)
def test_bad_shapes_are_refused_in_one_line(change, message):
    inputs = {"x": torch.zeros(2, 5, 3), "a": torch.zeros(2, 5, 3)} | change
    with pytest.raises(ValueError, match=message) as refusal:
        linear_scan(**inputs)
    assert "\n" not in str(refusal.value)


def test_operator_check():
    torch.library.opcheck(
        scan_module._scan_op,
        tuple(value.requires_grad_() for value in make_inputs(1, 20, 2)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_gpu():
    x, a, h0 = make_inputs(2, 777, 32)
    h, _ = linear_scan(x.cuda(), a.cuda(), h0.cuda())
    torch.testing.assert_close(h.cpu(), linear_scan_reference(x, a, h0)[0], **CLOSE)
