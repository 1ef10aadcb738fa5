"""Compare each backend with float64: the three operations, per tensor and per row, in every dtype and layout.

Without a GPU, Triton's kernels run in its interpreter, which tests/conftest.py turns on.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qat_runner.cache import cache_folder
from qat_runner.quant import IntAffineFormat, IntFormat, Range, fake_quantize, kernels, octav
from qat_runner.quant.kernels import (
    backend,
    choose_backend,
    compiled,
    eager,
    load_backend,
    newton,
    set_backend,
    using,
)
from qat_runner.quant.kernels.cost import Search, cost_of
from qat_runner.quant.kernels.remembered import Remembered
from tests.quant.oracles import octav_by_sorting, quantize_by_hand

GPU = torch.cuda.is_available()
DEVICES = {"eager": "cpu", "compiled": "cpu", "triton": "cuda" if GPU else "cpu"}
needs_compiler = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler here")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
names = pytest.mark.parametrize(
    "name", ["eager", pytest.param("compiled", marks=needs_compiler), pytest.param("triton", marks=needs_triton)]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def on(name: str, x: Tensor) -> Tensor:
    return x.to(DEVICES[name])


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_octav(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = (torch.randn(6, 4, 5, 3) * torch.logspace(-3, 3, 6)[:, None, None, None]).to(dtype).to(memory_format=layout)
    x[1, 2] = 0
    x[4] = 0
    with using(name, DEVICES[name]):
        for signed in (True, False):
            for bits in (2, 4, 8):
                k = 4.0**-bits / (3 if signed else 12)
                a = x.double().abs() if signed else x.double().clamp(min=0)
                rows = torch.tensor([octav_by_sorting(row.flatten(), k) for row in a])
                found = octav(on(name, x), IntFormat(bits, signed), dim=0, iterations=20)
                assert found.shape == (6, 1, 1, 1) and found.dtype == torch.float32
                torch.testing.assert_close(found.flatten().cpu().double(), rows.double(), rtol=1e-4, atol=0)
                whole = octav(on(name, x), IntFormat(bits, signed), iterations=20)
                assert whole.shape == ()
                assert whole.item() == pytest.approx(octav_by_sorting(a.flatten(), k), rel=1e-4)


@names
def test_octav_of_special_rows(name: str) -> None:
    with using(name, DEVICES[name]):
        tiny = torch.randn(2, 70) * 1e-30
        for x in (torch.randn(20, 9), torch.zeros(4, 5), tiny, tiny * 1e-10, torch.full((3, 8), -2.5)):
            for bits in (2, 4, 8):
                expected = torch.tensor([octav_by_sorting(row.double(), 4.0**-bits / 3) for row in x])
                s = octav(on(name, x), bits, dim=0).flatten().cpu()
                torch.testing.assert_close(s.double(), expected.double(), rtol=1e-4, atol=0)
        assert octav(on(name, torch.zeros(0)), 4).item() == 0
        assert octav(on(name, torch.randn(5, 6, 7)), 4, dim=1).shape == (1, 6, 1)  # falls back to eager
        assert octav(on(name, torch.randn(30, dtype=torch.float64)), 4).dtype == torch.float64  # likewise
        assert octav(on(name, torch.rand(50) * 3e38), 4).isfinite()


@names
@pytest.mark.parametrize("n", [4096, 40_001, pytest.param(100_000, marks=pytest.mark.slow)])
def test_octav_of_long_rows(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "triton" and not GPU:  # larger blocks, since each one is slow in the interpreter
        monkeypatch.setattr(load_backend("triton"), "BLOCK", 4096)
        monkeypatch.setattr(load_backend("triton"), "PROGRAMS", 4)
        n = min(n, 50_000)
    x = torch.randn(2, n).mul_(torch.tensor([[1.0], [1e-3]]))
    x[0, :5] = 40.0
    with using(name, DEVICES[name]):
        for signed in (True, False):
            a = x.double().abs() if signed else x.double().clamp(min=0)
            expected = torch.tensor([octav_by_sorting(row, 4.0**-4 / (3 if signed else 12)) for row in a]).double()
            cold = octav(on(name, x), IntFormat(4, signed), dim=0).flatten().cpu()
            torch.testing.assert_close(cold.double(), expected, rtol=1e-4, atol=0)
            for off in (1.02, 0.5, 30.0):
                guess = on(name, (expected * off).float().reshape(2, 1))
                warm = octav(on(name, x), IntFormat(4, signed), 0, 8, guess, tolerance=1e-4).flatten().cpu()
                torch.testing.assert_close(warm.double(), expected, rtol=1e-4, atol=0)


@names
def test_one_iteration_is_one_step_of_the_reference(name: str) -> None:
    """The same sums lead to the same proposal from any start; this covers the branches of `newton.advance`."""
    for x in (torch.randn(5000), torch.randn(10_000).relu(), torch.randn(12), torch.tensor([3.0, 0, 0, -1])):
        for start in (0.01, 0.7, 2.0, 2.9, 3.5, 6.0, 100.0):
            for iterations in (1, 2, 3):
                with using("eager"):
                    expected = octav(x.double(), 8, None, iterations, start, tolerance=0)
                with using(name, DEVICES[name]):
                    found = octav(on(name, x), 8, None, iterations, start, tolerance=0)
                assert found.item() == pytest.approx(expected.item(), rel=2e-3), (len(x), start, iterations)


@names
def test_rows_do_not_influence_each_other(name: str) -> None:
    """Programs of a GPU solve several rows at a time; each row takes the branches of `newton.advance` for itself."""
    x = torch.randn(40, 33)
    x[:, 0] = 350 * x[:, 0].sign()
    for start in (0.01, 0.5, 3.0, 300.0):
        for iterations in (1, 2, 3, 10):
            with using("eager"):
                alone = [octav(row, 2, None, iterations, start, tolerance=0) for row in x.double()]
            with using(name, DEVICES[name]):
                found = octav(on(name, x), 2, 0, iterations, torch.full((40, 1), start), tolerance=0).cpu()
            torch.testing.assert_close(found.flatten().double(), torch.stack(alone), rtol=2e-3, atol=0)


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(6, 4, 5, 3).to(dtype).to(memory_format=layout)
    x[0, 0, 0, 0] = 0
    for shape in ([], [6, 1, 1, 1]):
        s = torch.rand(shape) + 0.5
        for signed in (True, False):
            with using(name, DEVICES[name]):
                q = fake_quantize(on(name, x), s, IntFormat(4, signed))
            wide = s.double().expand(6, 1, 1, 1)
            expected = torch.cat(
                [quantize_by_hand(row[None], v.item(), 4, signed) for row, v in zip(x, wide, strict=True)]
            )
            torch.testing.assert_close(
                q.cpu(), expected.to(dtype), rtol=0, atol=0.13 * float(s.max()) if dtype != torch.float32 else 1e-6
            )
            assert q.stride() == x.stride()
            if not (dtype == torch.bfloat16 and name == "triton" and not GPU):  # the interpreter does not round
                assert torch.equal(q.cpu(), eager.fake_quantize(x, s, IntFormat(4, signed)))  # bit for bit
            for gradient in ("ste", "pwl", "mad"):
                expected = grad("eager", x, s, signed, gradient)
                tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(grad(name, x, s, signed, gradient), expected, **tolerance)


def grad(name: str, x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor:
    x = on(name, x).clone().requires_grad_()
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype)
    with using(name, DEVICES[name]):
        fake_quantize(x, s, IntFormat(4, signed), gradient).backward(on(name, upstream))
    assert x.grad is not None
    return x.grad.cpu()


GRIDS = [
    *((IntFormat(bits, signed), True) for bits in (2, 4, 8) for signed in (True, False)),
    (IntFormat(3, True, Range.ORIENTED), True),
    *((IntAffineFormat(4, signed), True) for signed in (True, False)),
    *((IntFormat(4, signed, Range.FULL), rounding) for signed in (True, False) for rounding in (True, False)),
]


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_learned_grids(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(6, 4, 5, 3).to(dtype).to(memory_format=layout)
    x[0, 0] = 0
    upstream = torch.randn(6, 4, 5, 3).to(dtype)
    for format, rounding in GRIDS:
        for shape in ((), (6, 1, 1, 1)):
            s = torch.rand(shape) + 0.5
            s = -s if format.oriented else s
            s = torch.stack([-s * 0.7 * format.signed, s]) if format.parts == 2 else s
            wide = upstream.double(), x.double(), s.double()
            of_x, of_s = eager.learned_backward(*wide, format, rounding)
            with using(name, DEVICES[name]):
                args = (on(name, t) for t in (upstream, x, s))
                found, sums = backend(on(name, x)).learned_backward(*args, format, rounding)
            assert found.dtype == dtype and sums.dtype == torch.float32 and sums.shape == s.shape
            assert torch.equal(found.cpu().double(), of_x)
            torch.testing.assert_close(sums.cpu().double(), of_s, rtol=1e-5, atol=1e-4)


@names
def test_gradients_of_learned_grids_of_long_rows_and_none(name: str) -> None:
    x, upstream, s = torch.randn(2, 70_001), torch.randn(2, 70_001), torch.tensor(1.2)
    with using(name, DEVICES[name]):
        ask = backend(on(name, x)).learned_backward
        for of_one in (s, torch.tensor([[1.2], [0.3]])):
            found, sums = ask(on(name, upstream), on(name, x), on(name, of_one), IntFormat(4), True)
            expected, total = eager.learned_backward(upstream.double(), x.double(), of_one.double(), IntFormat(4), True)
            assert torch.equal(found.cpu().double(), expected)
            torch.testing.assert_close(sums.cpu().double(), total, rtol=1e-4, atol=1e-2)
        found, sums = ask(on(name, x[:0]), on(name, x[:0]), on(name, s), IntFormat(4), True)
        assert found.shape == (0, 70_001) and sums.item() == 0
        zeros = torch.zeros(5)
        found, sums = ask(on(name, zeros + 1), on(name, zeros), on(name, s * 0), IntFormat(4), True)
        assert sums.item() == 0 and found.tolist() == [1] * 5  # a step size of 0 is replaced by 1


@names
def test_many_blocks_nan_and_gaps(name: str) -> None:
    with using(name, DEVICES[name]):
        for x in (torch.randn(3, 70_001), torch.randn(64, 900).T, torch.randn(8, 9, 4, 4)[:, ::2]):
            for s in (torch.tensor(1.5), torch.rand(x.shape[0], *[1] * (x.ndim - 1)) + 0.5):
                assert torch.equal(fake_quantize(on(name, x), s, 4).cpu(), eager.fake_quantize(x, s, IntFormat(4)))
        broken = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
        found = fake_quantize(on(name, broken), 2.0, 4).cpu()
        torch.testing.assert_close(found, torch.tensor([1, torch.nan, 1.75, -2]), equal_nan=True)
        assert fake_quantize(on(name, broken[:1]), 0.0, 4).item() == 0


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_full_range(name: str, dtype: torch.dtype, signed: bool) -> None:
    """Steps that are not powers of two; results equal those of ONNX for a step size, bit for bit."""
    x = (torch.randn(6, 40) * 2).to(dtype)
    for bits in (2, 3, 4, 8, 16):
        grid = IntFormat(bits, signed, Range.FULL)
        top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        assert (grid.lowest, grid.highest, grid.levels_per_scalar) == (-top if signed else 0, top, top)
        assert grid.rounding_noise == pytest.approx((1 / top) ** 2 / 12)
        for s in (torch.tensor(1.7), torch.rand(6, 1) + 0.5):
            with using(name, DEVICES[name]):
                found = backend(on(name, x)).fake_quantize(on(name, x), on(name, s), grid).cpu()
            wide = s.double()
            expected = (x.double() / wide * top).clamp(grid.lowest, top).round() * wide / top
            size = torch.finfo(dtype).eps * x.abs().max().item() + float(s.max()) / top  # between two codes
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=size)
            scale = s / top
            codes = (x.float() / scale).round().clamp(grid.lowest, top)
            if not (dtype == torch.bfloat16 and name == "triton" and not GPU):  # the interpreter does not round
                assert torch.equal(found, (codes * scale).to(dtype))
                assert found.max() <= (s * (1 + 1e-6)).max().to(dtype)


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_half_precision_costs_no_more_than_its_rounding(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Compare clipping and gradients with float64; the scalars have more digits than x."""
    x, upstream, s = (torch.randn(6, 500) * 2).to(dtype), torch.randn(6, 500).to(dtype), 1 + torch.rand(shape)
    eps = torch.finfo(dtype).eps
    for signed in (True, False):
        with using(name, DEVICES[name]):
            q = fake_quantize(on(name, x), on(name, s), IntFormat(4, signed)).cpu()
        assert torch.allclose(q.double(), fake_quantize(x.float(), s, IntFormat(4, signed)).double(), rtol=eps, atol=0)
        a, low = x.double(), -s.double() if signed else torch.zeros_like(s).double()
        clipped = torch.minimum(torch.maximum(a, low), s.double())
        for gradient, factor in (
            ("ste", torch.ones_like(a)),
            ("pwl", (clipped == a).double()),
            ("mad", torch.where(a == 0, 1.0, clipped / a)),
        ):
            leaf = on(name, x).clone().requires_grad_()
            with using(name, DEVICES[name]):
                fake_quantize(leaf, on(name, s), IntFormat(4, signed), gradient).backward(on(name, upstream))
            assert leaf.grad is not None and leaf.grad.dtype == dtype
            found, expected = leaf.grad.cpu().double(), upstream.double() * factor
            assert torch.equal(found == 0, expected.to(dtype) == 0)
            torch.testing.assert_close(found, expected, rtol=eps, atol=torch.finfo(dtype).tiny)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Test every operation on few and many long rows, which threads share, and on short ones."""
    shapes = ((1, 70_003), (3, 40_001), (20, 5000), (64, 600))
    tensors = [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            results.append([t for x in tensors for t in by_all_operations(x)])
        finally:
            torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def by_all_operations(x: Tensor) -> Iterator[Tensor]:
    """Yield the results of all operations of the library on [rows, n], with one scalar or one per row."""
    format, affine = IntFormat(4, True, Range.ORIENTED), IntAffineFormat(4)
    for dim in (None, 0):
        s, ends = octav(x, format, dim), octav(x, affine, dim)
        yield from (
            s,
            ends,
            octav(x, affine, dim, init=1.1 * ends),
            octav(x, 8, dim, refine=8),
            fake_quantize(x, s, format),
        )
        yield compiled.orient(x, s, None, 0.5, 0.0)
        for gradient in ("mad", "pwl"):
            yield compiled.fake_quantize_backward(x, x, s, format, gradient)
        yield from compiled.learned_backward(x, x, s, format, True)
        yield from compiled.learned_backward(x, x, ends, affine, True)
    xs, plain = [x, x[:, :700].contiguous()], IntFormat(4)
    states = [Remembered(torch.ones(len(x), 1), torch.ones(len(x), 1), torch.tensor(1), 0.1, True) for x in xs]
    searches = [Search((1,), 6, 1e-4)] * 2
    ss, outs = compiled.octav_and_quantize_all(xs, cost_of(plain, False, None), plain, searches, states, True)
    yield from (*ss, *outs, *compiled.fake_quantize_backward_all(xs, xs, ss, plain, "mad"))


@needs_compiler
def test_the_library_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library is built again only if the cached file cannot be used."""
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    commands: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command) or run(command, **how))
    path = compiled._cached()
    path.parent.mkdir()
    path.write_bytes(b"cut short")
    compiled._loaded(), compiled._loaded()
    assert len([command for command in commands if "-shared" in command]) == 1
    assert [*path.parent.iterdir()] == [path] and path.stat().st_size > 10_000


@needs_compiler
def test_without_threads_loops_are_over_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler without OpenMP still vectorizes loops."""
    real = compiled.compiler()
    without = tmp_path / "c++"
    without.write_text(f'#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1;; esac\nexec {real} "$@"\n')
    without.chmod(0o755)
    monkeypatch.setenv("CXX", str(without))
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    commands: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command) or run(command, **how))
    compiled._loaded()
    assert {"-march=native", "-fopenmp-simd"} <= {*commands[-1]}


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    compiled.library.cache_clear()
    x = torch.randn(100)
    try:
        with using("compiled"):
            with pytest.warns(RuntimeWarning, match=r"using eager instead \(no such thing\)"):
                s = octav(x, 4)
            q = fake_quantize(x, s, 4)  # no second warning
    finally:
        compiled.library.cache_clear()
    with using("eager"):
        assert torch.equal(q, fake_quantize(x, octav(x, 4), 4))
    assert not list((tmp_path / "cache").iterdir())


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_backend("eager") == "eager"
    with pytest.raises(ValueError, match="backend=cuda: must be one of auto, eager, compiled, triton"):
        set_backend("cuda")
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert set_backend("auto") == "eager"
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found, using eager instead"):
        assert set_backend("compiled") == "eager"
    assert backend(torch.zeros(1)) is eager
    monkeypatch.setattr(compiled, "available", lambda: True)
    assert set_backend("auto") == "compiled"
    with pytest.raises(ValueError, match="backend=compiled: must be auto, triton or eager on a CUDA device"):
        choose_backend("compiled", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend=triton: must be auto, compiled or eager on the CPU"):
        choose_backend("triton", "cpu")


START = """
import sys, torch
from qat_runner import quantize_model
from qat_runner.quant import octav
from qat_runner.quant.kernels import backend, compiled
x = torch.randn(1000)
print(compiled.library.cache_info().currsize)
octav(x, 4)
print(backend(x).__name__.rpartition(".")[2], compiled.library.cache_info().currsize)
"""


def in_a_new_process(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", START],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_compiler
def test_a_process_starts_with_the_fast_backend_and_compiles_at_first_use() -> None:
    assert in_a_new_process() == ["0", "compiled", "1"]


def test_a_process_without_a_compiler_starts_with_eager_and_says_nothing(tmp_path: Path) -> None:
    assert in_a_new_process(PATH=str(tmp_path), CXX="") == ["0", "eager", "0"]


@needs_triton
@pytest.mark.parametrize(
    ("asked", "cpu", "cuda"),
    [
        ("auto", "compiled", "triton"),
        ("compiled", "compiled", "triton"),
        ("triton", "compiled", "triton"),
        ("eager", "eager", "eager"),
    ],
)
def test_each_device_has_its_own(asked: str, cpu: str, cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_backend("triton")  # while TRITON_INTERPRET is set: kernels read it when created, for all later tests
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compiled, "available", lambda: True)
    with using(asked, "cuda" if asked == "triton" else "cpu"):
        assert [backend(fake).__name__.rpartition(".")[2] for fake in map(OnDevice, ("cpu", "cuda"))] == [cpu, cuda]
        assert backend(OnDevice("mps")) is eager


class OnDevice(Tensor):
    """An empty tensor that reports a given device."""

    def __new__(cls, kind: str) -> "OnDevice":
        made = torch.zeros(0).as_subclass(cls)
        made.kind = kind
        return made

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


@needs_triton
def test_choosing_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", "cuda") == "triton"
    assert choose_backend("eager", "cuda") == "eager"
    if GPU:
        return
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # Triton finds no driver for this GPU
    kernels._no_triton.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"Triton cannot start \(.*\): using eager instead"):
            assert choose_backend("auto", "cuda") == "eager"
        with pytest.raises(ValueError, match="backend=triton: Triton cannot start"):
            choose_backend("triton", "cuda")
    finally:
        kernels._no_triton.cache_clear()


@needs_compiler
@pytest.mark.parametrize("tracer", ["jit", "make_fx"])
def test_a_trace_holds_operations_not_results(tracer: str) -> None:
    def quantized(x: Tensor) -> Tensor:
        return fake_quantize(x, 2.0, 4)

    with using("compiled"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, but still in use
        example = torch.randn(50)
        traced = (
            torch.jit.trace(quantized, example, check_trace=False) if tracer == "jit" else make_fx(quantized)(example)
        )
        x = torch.randn(50)
        torch.testing.assert_close(traced(x), quantized(x))


@needs_compiler
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    folder = cache_folder()
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0  # no other user can put a library there


def test_power_of_two() -> None:
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([1.0, 1.5, 2.0, 0.3, 1e-45, 3e38], dtype=dtype)
        p = newton.power_of_two(t)
        mantissa, _ = torch.frexp(p)
        assert (mantissa == 0.5).all()
        assert ((p[:4] <= t[:4]) & (t[:4] < 2 * p[:4])).all()
        assert (1 / p).isfinite().all()
