"""Triton's kernels: compilation, numbers of launches, and training steps compared with the eager reference.

Without a GPU they run in Triton's interpreter, one program after another, or in threads where programs meet.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion.layers import convert, give_quantizers
from qat_runner.quant import IntAffineFormat, IntFormat, Octav, Quantizer, Range
from qat_runner.quant.kernels import eager, using
from qat_runner.quant.kernels.cost import Search, cost_of
from qat_runner.quant.kernels.remembered import Remembered
from tests.quant.oracles import interval_cost

pytest.importorskip("triton")

from triton.runtime import interpreter

from qat_runner.quant.kernels import triton as ours
from qat_runner.quant.kernels import triton_intervals as intervals
from qat_runner.quant.kernels import triton_kernels as kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
interpreted = pytest.mark.skipif(GPU, reason="needs Triton's interpreter")


def remembered(shape: tuple[int, ...], known: bool = True) -> Remembered:
    s, running = 0.5 + torch.rand(2, *shape, device=DEVICE)
    return Remembered(s.clone(), running.clone(), torch.tensor(3, device=DEVICE), 0.1, known)


def copied(state: Remembered) -> Remembered:
    return state._replace(s=state.s.clone(), running_s=state.running_s.clone(), batches=state.batches.clone())


def same_as_eager(x: Tensor, format: IntFormat, state: Remembered, missing_code: bool = False) -> Tensor:
    """Compare a training step with the reference, and return s."""
    x = x.to(DEVICE)
    dims = tuple(range(1 if state.s.numel() > 1 else 0, x.ndim))
    cost, search, reference = cost_of(format, missing_code, None), Search(dims, 12, 1e-6), copied(state)
    s, q = ours.octav_and_quantize(x, cost, format, search, state, True)
    expected, _ = eager.octav_and_quantize(x, cost, format, search, reference, True)
    finite = expected.isfinite()
    assert torch.equal(s.isfinite(), finite) and s.shape == expected.shape and s.dtype == expected.dtype
    torch.testing.assert_close(s[finite], expected[finite], rtol=1e-4, atol=0)
    for ours_, theirs in zip(state[:3], reference[:3], strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=0)
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    assert q.is_contiguous(memory_format=layout) and q.dtype == x.dtype
    rounded = eager.fake_quantize(x.cpu(), s.cpu(), format).to(DEVICE)  # division by a number is inexact on CUDA
    if x.dtype == torch.bfloat16 and not GPU:  # the interpreter does not round
        torch.testing.assert_close(q, rounded, rtol=torch.finfo(x.dtype).eps, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(q, rounded, rtol=0, atol=0, equal_nan=True)
    return s


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat rows as long from 1025 elements on, with short tiles, since the interpreter is slow."""
    monkeypatch.setattr(ours, "REGISTERS", {1024: 4})
    monkeypatch.setattr(ours, "BLOCK", 512)
    monkeypatch.setattr(ours, "WARPS", 1)
    ours._table.cache_clear()  # its tables are for other tile sizes, and addresses may be reused


STEPS = [
    *((True, torch.float32), (False, torch.bfloat16)),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in ((True, torch.bfloat16), (False, torch.float32))),
]
"""Whether there are scalars from a previous step, and the dtype of the tensor."""


@pytest.mark.parametrize(("known", "dtype"), STEPS)
@pytest.mark.parametrize(
    ("shape", "scalars"),
    [
        ((70, 1, 3, 3), (70, 1, 1, 1)),  # many rows per program, and several programs
        ((3, 8, 5, 5), (3, 1, 1, 1)),
        ((6, 4, 5, 3), ()),
        ((1,), ()),
        ((2, 1500), (2, 1)),  # more than fits into registers under `small`
    ],
)
@pytest.mark.usefixtures("small")
def test_a_step(shape: tuple[int, ...], scalars: tuple[int, ...], known: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for format in (IntFormat(4), IntFormat(3, False), IntFormat(8, True, Range.FULL)):
        same_as_eager(x, format, remembered(scalars, known))
    if x.ndim == 4:
        same_as_eager(x.to(memory_format=torch.channels_last), IntFormat(3), remembered(scalars, known), True)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, which the interpreter uses
@pytest.mark.parametrize("n", [50, 1500])
def test_a_step_of_special_values(n: int) -> None:
    for bad in (torch.nan, torch.inf):
        x, state = torch.randn(3, n), remembered((3, 1))
        before = copied(state)
        x[1, 7] = bad
        s = same_as_eager(x, IntFormat(4), state)
        assert s.isfinite().flatten().tolist() == [True, False, True] and state.s[1] == before.s[1]
        same_as_eager(x, IntFormat(4), remembered((3, 1), known=False))
    for x in (torch.zeros(3, n), torch.full((3, n), -2.5), torch.randn(3, n) * 1e-30, torch.rand(3, n) * 3e38):
        same_as_eager(x, IntFormat(4), remembered((3, 1), known=False))


SKEWED = [((70, 1, 3, 3), (1, 2, 3)), ((6, 4, 5, 3), (0, 1, 2, 3)), ((2, 1500), (1,)), ((1,), (0,))]
"""Shapes and the dimensions that an interval spans: short rows, and rows that are long under `small`."""


@pytest.mark.parametrize(("shape", "dims"), SKEWED)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, which the interpreter uses
def test_intervals(shape: tuple[int, ...], dims: tuple[int, ...], dtype: torch.dtype) -> None:
    """Test a cold start, a close one, and one far from x, with rows of different magnitudes."""
    x = nn.functional.gelu(2 * torch.randn(shape))
    if len(dims) < len(shape):
        x *= torch.logspace(-20, 20, shape[0]).reshape(-1, *[1] * len(dims))
    x, search = x.to(DEVICE, dtype), Search(dims, 30, 1e-5)
    for bits in (3, 8):
        noise = IntAffineFormat(bits).rounding_noise
        expected = eager.octav_interval(x.double(), noise, None, search)
        least = interval_cost(x, expected, noise, dims)
        starts = (1.2, 1e-9) if bits == 3 else (1e9,)
        for guess in (None, *(expected * factor for factor in starts)):
            found = ours.octav_interval(x, noise, guess, search)
            assert found.shape == expected.shape and found.dtype == torch.float32
            dearer = (interval_cost(x, found, noise, dims) / least)[least > 0]
            assert (dearer < 1.01).double().mean() > 0.9 and (dearer < 2).all()  # J of few elements has several minima
            assert x.numel() < 1000 or (dearer < 1.01).all()
            if guess is None and dims[-1] == len(dims) - 1:
                torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, which the interpreter uses
@pytest.mark.parametrize("n", [50, 1500])
def test_intervals_of_special_values(n: int) -> None:
    search, noise = Search((1,), 6, 1e-3), IntAffineFormat(4).rounding_noise
    x = torch.randn(4, n)
    x[1, 7], x[2, 7], x[3, 7] = torch.nan, torch.inf, -torch.inf
    for guess in (None, torch.tensor([-2.0, 2.0]).reshape(2, 1, 1).expand(2, 4, 1).to(DEVICE)):
        found = ours.octav_interval(x.to(DEVICE), noise, guess, search)
        assert found.isfinite().all(0).flatten().tolist() == [True, False, False, False]
    assert not ours.octav_interval(torch.zeros(2, n, device=DEVICE), noise, None, search).any()
    for x, one_sided in ((torch.rand(2, n) + 0.1, 0), (-torch.rand(2, n) - 0.1, 1)):
        for guess in (None, torch.tensor([[-0.9, 0.0], [0.0, 0.9]])[one_sided].reshape(2, 1, 1).expand(2, 2, 1)):
            guess = None if guess is None else guess.to(DEVICE)
            found = ours.octav_interval(x.to(DEVICE), noise, guess, search)
            assert not found[one_sided].any() and (found[1 - one_sided].abs() > 0.5).all()


def test_what_is_left_to_eager() -> None:
    for x, scalars in (
        (torch.randn(30, dtype=torch.float64), ()),
        (torch.randn(5, 6, 7), (1, 6, 1)),
    ):
        dims = tuple(d for d in range(x.ndim) if d != 1 or not scalars)
        state, format = remembered(scalars), IntFormat(4)
        x = x.to(DEVICE)
        s, q = ours.octav_and_quantize(x, cost_of(format, False, None), format, Search(dims, 9, 1e-6), state, True)
        assert torch.equal(q, eager.fake_quantize(x, s, format)) and state.batches == 4


@pytest.mark.parametrize("shape", [(), (5, 1), (1500, 1)])
@pytest.mark.parametrize("known", [True, False])
def test_remember(shape: tuple[int, ...], known: bool) -> None:
    state, s = remembered(shape, known), torch.rand(shape, device=DEVICE)
    if shape:
        s[1], s[2] = torch.nan, torch.inf
    for momentum in (0.1, 0.9):
        state = state._replace(momentum=momentum)
        reference, version = copied(state), state.batches._version
        ours.remember(s, state)
        eager.remember(s, reference)
        for found, expected in zip(state[:3], reference[:3], strict=True):
            torch.testing.assert_close(found, expected)
        assert state.batches._version > version
    ours.remember(s.double(), state)
    assert state.batches == 6


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that have been launched."""
    seen: list[str] = []
    for module in (kernels, intervals):
        for name, kernel in vars(module).items():
            if isinstance(kernel, interpreter.InterpretedFunction) and not name.startswith("_"):
                monkeypatch.setattr(module, name, Counted(name, kernel, seen))
    return seen


class Counted:
    """A kernel that records its launches."""

    def __init__(self, name: str, kernel: object, seen: list[str]) -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.seen.append(self.name)
        return self.kernel[grid]  # type: ignore[index, no-any-return]


@interpreted
@pytest.mark.parametrize(
    ("shape", "scalars", "kernel"),
    [((4, 70, 60), (), "solve_long"), ((64, 3, 3), (64, 1, 1), "solve_rows")],  # an activation, a weight
)
@pytest.mark.usefixtures("small")
def test_launches_of_a_training_step(
    shape: tuple[int, ...], scalars: tuple[int, ...], kernel: str, launches: list[str]
) -> None:
    x, state = torch.randn(shape), remembered(scalars)
    format, dims = IntFormat(4, True, Range.FULL), tuple(range(1 if scalars else 0, x.ndim))
    s, _ = ours.octav_and_quantize(x, cost_of(format, False, None), format, Search(dims, 6, 1e-4), state, True)
    assert launches == [kernel]
    ours.fake_quantize(x, s, format)
    ours.fake_quantize_backward(x, x, s, format, "mad")
    assert launches[1:] == ["fake_quantize", "fake_quantize_backward"]


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("side", "solver"), [(11, "intervals_of_rows"), (40, "intervals_of_long")])
def test_launches_of_an_affine_activation(side: int, solver: str, launches: list[str]) -> None:
    quantizer, x = Quantizer(IntAffineFormat(4), Octav()), torch.randn(1, 4, side, side)
    with using("triton"):
        for _ in range(2):
            launches.clear()
            quantizer(x.requires_grad_()).sum().backward()
    assert launches == [solver, "remember", "fake_quantize", "fake_quantize_backward"]


MIXED = [((70, 1, 3, 3), (70, 1, 1, 1)), ((6, 400), (6, 1)), ((2, 1500), (2, 1)), ((5, 700), ()), ((3, 9), ())]
"""Shapes of tensors and of their scalars: rows that are short, longer, and long under `small`."""


@pytest.mark.parametrize(("known", "dtype"), STEPS)
@pytest.mark.usefixtures("small")
def test_steps_of_many(known: bool, dtype: torch.dtype) -> None:
    """Results are the same as for each tensor alone: scalars up to rounding errors, gradients bit for bit."""
    xs = [torch.randn(shape).to(DEVICE, dtype) for shape, _ in MIXED]
    xs[0] = xs[0].reshape(7, 10, 3, 3).to(memory_format=torch.channels_last).reshape(70, 1, 3, 3)
    states = [remembered(scalars, known) for _, scalars in MIXED]
    expected, format = [copied(state) for state in states], IntFormat(4, True, Range.FULL)
    searches = [Search(tuple(range(1 if s else 0, len(x))), 40, 1e-6) for x, s in MIXED]
    cost = cost_of(format, False, None)
    ss, outs = ours.octav_and_quantize_all(xs, cost, format, searches, states, True)
    for x, search, s, out, state, before in zip(xs, searches, ss, outs, states, expected, strict=True):
        theirs, _ = ours.octav_and_quantize(x, cost, format, search, before, True)
        torch.testing.assert_close(s, theirs, rtol=1e-6, atol=0)
        for found, wanted in zip(state[:3], before[:3], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(out, ours.fake_quantize(x, s, format), rtol=0, atol=0)
        assert out.shape == x.shape and out.stride() == x.stride() and not out._is_view()
    grads = [torch.randn_like(x) for x in xs]
    for gradient in ("ste", "pwl", "mad"):
        passed = ours.fake_quantize_backward_all(grads, xs, ss, format, gradient)
        for grad, x, s, found in zip(grads, xs, ss, passed, strict=True):
            torch.testing.assert_close(found, ours.fake_quantize_backward(grad, x, s, format, gradient), rtol=0, atol=0)


def test_many_that_are_not_alike() -> None:
    """Other dtypes, gaps in memory and other granularities are handled one by one."""
    format = IntFormat(4)
    for x, scalars in (
        (torch.randn(5, 6, device=DEVICE, dtype=torch.float64), ()),
        (torch.randn(6, 5, device=DEVICE).T, ()),
        (torch.randn(5, 6, device=DEVICE), (1, 6)),
    ):
        xs, states = [torch.randn(4, 4, device=DEVICE), x], [remembered(()), remembered(scalars)]
        searches = [Search((0, 1), 9, 1e-6), Search((0, 1) if not scalars else (0,), 9, 1e-6)]
        ss, outs = ours.octav_and_quantize_all(xs, cost_of(format, False, None), format, searches, states, True)
        for x, s, out, state in zip(xs, ss, outs, states, strict=True):
            assert torch.equal(out, eager.fake_quantize(x, s, format)) and state.batches == 4
        passed = ours.fake_quantize_backward_all(outs, xs, ss, format, "mad")
        for x, s, grad, found in zip(xs, ss, outs, passed, strict=True):
            torch.testing.assert_close(found, eager.fake_quantize_backward(grad, x, s, format, "mad"))


@interpreted
@pytest.mark.usefixtures("small")
def test_launches_of_all_weights(launches: list[str]) -> None:
    """Five or twenty weights take the same number of launches, including gradients."""
    format = IntFormat(4, True, Range.FULL)
    for times in (1, 4):
        launches.clear()
        xs = [torch.randn(shape) for shape, _ in MIXED * times]
        states = [remembered(scalars) for _, scalars in MIXED * times]
        searches = [Search(tuple(range(1 if s else 0, len(x))), 2, 1e-4) for x, s in MIXED * times]
        cost = cost_of(format, False, None)
        ss, outs = ours.octav_and_quantize_all(xs, cost, format, searches, states, True)
        ours.fake_quantize_backward_all(outs, xs, ss, format, "mad")
        assert launches == ["solve_rows_of_many"] * 2 + ["solve_long", "fake_quantize_backward_of_many"]


@pytest.fixture
def traffic(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes of bfloat16 tensors that each launched kernel reads and writes."""
    seen: dict[str, int] = dict.fromkeys(("solve_rows", "solve_long", "fake_quantize", "fake_quantize_backward"), 0)

    def counted(access: Callable[..., object], at_mask: int) -> Callable[..., object]:
        def counting(pointers: interpreter.TensorHandle, *args: interpreter.TensorHandle) -> object:
            if pointers.get_element_ty() == kernels.tl.bfloat16:
                seen[launches[-1]] += 2 * int(args[at_mask].data.sum())
            return access(pointers, *args)

        return counting

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "create_masked_load", counted(builder.create_masked_load, 0))
    monkeypatch.setattr(builder, "create_masked_store", counted(builder.create_masked_store, 1))
    return seen


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("side", "solver"), [(15, "solve_rows"), (40, "solve_long")])
def test_bytes_that_an_element_of_an_activation_costs(side: int, solver: str, traffic: dict[str, int]) -> None:
    """Bytes in addition to full precision, forward and backward, as stated in docs/performance.md."""
    reads = 3  # reads of a long row for these batches
    quantizer, layer = Quantizer(4, Octav()), nn.Conv2d(4, 2, 1, bias=False).bfloat16()
    convert(layer)
    give_quantizers(layer, {"weight": None, "input": quantizer})
    x = torch.randn(2, 1, 4, side, side).bfloat16()
    with using("triton"):
        for batch in x:  # the second starts from the scalar of the first
            traffic |= dict.fromkeys(traffic, 0)
            layer(batch.requires_grad_()).sum().backward()
    assert {kernel: count / x[0].numel() for kernel, count in traffic.items() if count} == {
        solver: 4 if solver == "solve_rows" else 2 * reads + 4,
        "fake_quantize": 4,  # for the gradient of the weight
        "fake_quantize_backward": 6,
    }


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("known", [True, False])
def test_programs_that_meet(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run two programs for each of two rows at the same time, as threads with their own index."""
    here, builder, programs = threading.local(), interpreter.interpreter_builder, 4

    def index(axis: int) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(interpreter.np.array([here.index], dtype="int32"), kernels.tl.int32)

    class AtOnce(interpreter.GridExecutor):  # type: ignore[misc]
        def __init__(self, fn: Callable[..., None], arg_names: list[str], grid: tuple[int, ...], hooks: object) -> None:
            def run(i: int, arguments: dict[str, object]) -> None:
                here.index = i
                fn(**arguments)

            def together(**arguments: object) -> None:
                threads = [threading.Thread(target=run, args=(i, arguments)) for i in range(programs)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            assert grid == (programs,)
            super().__init__(fn, arg_names, (1,), hooks)
            together.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
            together.__globals__.update(tl=kernels.tl)
            self.fn = together

    monkeypatch.setattr(ours, "_resident", lambda where: programs)
    monkeypatch.setattr(builder, "create_get_program_id", index)
    monkeypatch.setattr(interpreter, "GridExecutor", AtOnce)
    same_as_eager(torch.randn(2, 1500), IntFormat(4), remembered((2, 1), known))
    x, search, noise = torch.randn(2, 1500) + 1, Search((1,), 12, 1e-6), IntAffineFormat(4).rounding_noise
    expected = eager.octav_interval(x, noise, None, search)
    found = ours.octav_interval(x, noise, 1.1 * expected if known else None, search)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, which the interpreter uses
def test_programs_that_do_not_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after another, so the first one waits in vain."""
    monkeypatch.setattr(ours, "_resident", lambda where: 2)
    monkeypatch.setattr(ours, "POLLS", 3)
    format, state = IntFormat(4), remembered(())
    before, x = copied(state), torch.randn(1500)
    s, q = ours.octav_and_quantize(x, cost_of(format, False, None), format, Search((0,), 6, 1e-4), state, True)
    assert s.isnan() and q.isnan().any()
    assert state.s == before.s and state.running_s.isfinite()
    assert ours.octav_interval(x, IntAffineFormat(4).rounding_noise, None, Search((0,), 6, 1e-4)).isnan().all()


@pytest.mark.slow
def test_kernels_compile_for_gpus() -> None:
    """Compile to machine code of two GPU generations without a device, to find errors that the interpreter ignores."""
    script = textwrap.dedent(
        """
        import json
        import triton
        from triton.backends.compiler import GPUTarget
        from qat_runner.quant.kernels import triton as ours
        from qat_runner.quant.kernels import triton_intervals as intervals
        from qat_runner.quant.kernels import triton_kernels as kernels

        NUMBERS = ("n", "rows", "blocks", "programs", "groups", "iterations")

        def build(kernel, x, out=None, n="i32", **constants):
            options = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
            if "maxnreg" in options:
                options["launch_cooperative_grid"] = True
            types = dict.fromkeys(NUMBERS, "i32") | {"n": n, "arrived_ptr": "*i32"}
            types |= dict.fromkeys(("batches_ptr", "table_ptr", "tiles_ptr"), "*i64")
            types |= dict.fromkeys(("x_ptr", "grad_ptr"), x)
            if "quantize" in kernel.__name__ or "solve" in kernel.__name__ or "learned" in kernel.__name__:
                types["out_ptr"] = out or x
            types |= dict.fromkeys(constants, "constexpr")
            signature = {n: types.get(n, "*fp32" if n.endswith("_ptr") else "fp32") for n in kernel.arg_names}
            source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
            return [
                len(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm["cubin"])
                for sm in (80, 90)
            ]

        sizes = []
        meeting = {"num_warps": ours.WARPS, "maxnreg": ours.MAXNREG, "PROGRAMS": ours.PROGRAMS, "POLLS": ours.POLLS}
        for x, lanes in (("*fp32", 1024), ("*bf16", 2048), ("*fp16", 2048)):
            kinds = ((1, 0, 0, 1), (0, 0, 0, 0), (1, 1, 0, 1), (1, 1, 1, 0))
            for signed, sided, pointed, step in kinds if x == "*fp32" else kinds[:1]:
                kind = {"SIGNED": bool(signed), "SIDED": bool(sided), "POINTED": bool(pointed), "STEP": bool(step)}
                sizes += build(kernels.solve_rows, x, **kind, COLD=bool(pointed), ROWS=32, BLOCK=16)
                long = {"COLD": not step, "UNROLL": 4, "LANES": lanes} | meeting
                sizes += build(kernels.solve_long, x, **kind, MANY=False, **long)
                if step and not pointed:
                    sizes += build(kernels.solve_long, "*i64", x, **kind, MANY=True, **long)
                    some = {"SIGNED": bool(signed), "SIDED": bool(sided), "COLD": bool(sided)}
                    sizes += build(kernels.solve_rows_of_many, x, x, **some, ROWS=8, BLOCK=64)
            tile = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8}
            for signed in (True, False):
                sizes += build(kernels.fake_quantize_backward, x, SIGNED=signed, MAD=signed, ENDS=False, **tile)
                sizes += build(kernels.fake_quantize_backward, x, SIGNED=signed, MAD=signed, ENDS=True, **tile)
                sizes += build(kernels.fake_quantize, x, AFFINE=signed, **tile)
                sizes += build(kernels.learned_backward, x, SIGNED=signed, AFFINE=False, ROUNDING=signed, **tile)
                sizes += build(kernels.learned_backward, x, SIGNED=signed, AFFINE=True, ROUNDING=True, **tile)
                many = {"SIGNED": signed, "MAD": signed, "BLOCK": 4096, "num_warps": 8}
                sizes += build(kernels.fake_quantize_backward_of_many, x, **many)
            for cold in (True, False):
                sizes += build(intervals.intervals_of_rows, x, COLD=cold, ROWS=32, BLOCK=16)
                sizes += build(intervals.intervals_of_long, x, COLD=cold, UNROLL=4096 // lanes, LANES=lanes, **meeting)
            sizes += build(kernels.overhang_part, x, BLOCK=4096)
            kind = {"SIGNED": True, "SIDED": False, "POINTED": False, "STEP": True}  # more elements than int32 counts
            long = {"COLD": False, "UNROLL": 4, "LANES": lanes} | meeting
            sizes += build(kernels.solve_long, x, n="i64", **kind, MANY=False, **long)
            sizes += build(kernels.fake_quantize, x, n="i64", AFFINE=False, **tile)
            sizes += build(kernels.fake_quantize_backward, x, n="i64", SIGNED=True, MAD=True, ENDS=False, **tile)
        for stays in (True, False):
            sizes += build(kernels.orient_row, "*fp32", STAYS=stays, PROGRAMS=512)
        sizes += build(kernels.remember, "*fp32", BLOCK=1024)
        print(json.dumps(sizes))
        """
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 166 and min(sizes) > 1000
