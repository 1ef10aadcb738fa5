from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_runner.data import Batch
from qat_runner.insertion import quantize_model, quantized_tensors
from qat_runner.quant import kernels
from qat_runner.quant.kernels import newton
from qat_runner.tasks import TASKS
from qat_runner.training.measure import evaluate
from tests.training.watch import Watch

CPU = torch.device("cpu")
TASK = TASKS["classification"]


def network(**how: Any) -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 7)
    )
    return quantize_model(layers, bits=4, example=torch.randn(2, 3, 8, 8), **how)


def batches(*sizes: int) -> list[Batch]:
    return [Batch((torch.randn(n, 3, 8, 8),), torch.randint(0, 7, (n,))) for n in sizes]


def test_evaluation_over_uneven_batches() -> None:
    model, data = network(), batches(10, 10, 3)
    totals = TASK.totals(CPU)
    evaluate(TASK, model, data, totals, "none")
    result = totals.read()
    logits = torch.cat([model(x) for (x,), _ in data]).detach()
    labels = torch.cat([y for _, y in data])
    assert result["samples"] == 23
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    hits = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert result["top5"] == pytest.approx(100 * hits)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"clipping": "max"},
        {"clipping": "percentile", "q": 90.0},
        {"clipping": "mse_sweep"},
        {"format": "int_affine"},
        {"format": "int_affine", "clipping": "percentile", "q": 90.0},
        {"range": "oriented"},
        {"missing_code": True},
        {"refine": 8},
    ],
    ids=str,
)
def test_what_is_not_finite_is_named(how: dict[str, Any], backend: str) -> None:
    with kernels.using(backend):
        model, data = network(**how), batches(4, 4)
        for bad in (torch.nan, torch.inf, -torch.inf):
            data[1].inputs[0][2, 1, 4, 5] = bad
            with pytest.raises(ValueError, match=r"^0\.input: x of shape \[4, 3, 8, 8\] holds NaN or infinity"):
                evaluate(TASK, model, data, TASK.totals(CPU), "none")
        assert all(t.quantizer.checks for t in quantized_tensors(model))


@pytest.mark.parametrize("clipping", ["octav", "max", "percentile", "mse_sweep"])
def test_a_batch_waits_once(clipping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds for any number of quantizers; on a CPU, solvers may read their state, because nothing waits there."""
    solve = newton.solve
    monkeypatch.setattr(newton, "solve", lambda *args, **options: solve(*args, **options | {"look": False}))
    model, data = network(clipping=clipping), batches(4, 4, 4)
    with kernels.using("eager"), Watch() as watch:
        evaluate(TASK, model, data, TASK.totals(CPU), "none")
    assert watch.waited == ["aten.is_nonzero.default"] * 3


def test_autocast_changes_the_precision() -> None:
    model, data = network(), batches(4)
    totals = {amp: TASK.totals(CPU) for amp in ("none", "bf16")}
    for amp, sums in totals.items():
        evaluate(TASK, model, data, sums, amp)
    exact, rounded = totals["none"].read(), totals["bf16"].read()
    assert exact["loss"] != rounded["loss"]
    assert exact["loss"] == pytest.approx(rounded["loss"], rel=0.05)
