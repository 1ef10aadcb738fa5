"""Measuring a model: accuracy and loss over a data set, and the quantization noise of each of its tensors."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.data import Batch
from qat_runner.insertion import quantized_tensors
from qat_runner.quant import Quantizer, maximum, measure


@dataclass
class Totals:
    """Sums over samples, kept on the device: adding a batch waits for nothing, reading does."""

    sums: Tensor  # float64 [4]: loss, correct, correct among five, samples

    @classmethod
    def on(cls, device: torch.device) -> "Totals":
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """loss: mean over the batch, []; logits [N, classes]; labels [N]."""
        n = len(labels)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        batch = torch.stack(
            [loss.detach().float() * n, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, n, dtype=torch.float32)]
        )
        self.sums += batch

    def read(self) -> dict[str, float]:
        """loss (mean), top1 and top5 (percent), samples."""
        loss, top1, top5, n = self.sums.tolist()
        return {"loss": loss / max(n, 1), "top1": 100 * top1 / max(n, 1), "top5": 100 * top5 / max(n, 1), "samples": n}


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """The precision that a forward pass runs in: amp is none, bf16 or fp16."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    amp: str,
    seen: Callable[[int, Totals], object] = lambda images, totals: None,
) -> dict[str, float]:
    """Loss, top1, top5 (see Totals.read) of the model in eval mode; `seen` is told of each batch and the totals."""
    model.eval()
    totals = Totals.on(device)
    for pictures, labels in batches:
        with autocast(device, amp):
            logits = model(pictures)
        totals.add(F.cross_entropy(logits.float(), labels), logits, labels)
        seen(len(labels), totals)
    return totals.read()


@dataclass(frozen=True)
class LayerNoise:
    """A row of layers.csv, without its epoch."""

    layer: str
    tensor: str
    bits: int
    signed: bool
    granularity: str
    s: float
    """clipping scalar, the mean over the rows where there are several"""
    mse: float
    sqnr_db: float
    clipped_fraction: float
    max_sqnr_db: float
    """what max-scaling gives on the same tensor"""


@torch.no_grad()
def measure_noise(model: nn.Module, batches: Iterable[Batch], device: torch.device, amp: str) -> list[LayerNoise]:
    """Noise of every quantized tensor, averaged over the batches (SQNR: in dB), the model in eval mode."""
    names = {t.quantizer: (t.layer, t.tensor) for t in quantized_tensors(model)}
    figures: dict[Quantizer, list[Tensor]] = {quantizer: [] for quantizer in names}

    def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, Quantizer) and quantizer.last_s is not None
        x, s = args[0].detach(), quantizer.last_s
        noise = measure(x, s, quantizer.bits, quantizer.signed)
        best = measure(
            x,
            maximum(x, quantizer.bits, quantizer.signed, quantizer.dim, check=False),
            quantizer.bits,
            quantizer.signed,
        )
        figures[quantizer].append(torch.stack([s.double().mean(), *noise, best.sqnr_db]))

    handles = [quantizer.register_forward_hook(hook) for quantizer in names]
    model.eval()
    try:
        for pictures, _ in batches:
            with autocast(device, amp):
                model(pictures)
    finally:
        for handle in handles:
            handle.remove()
    seen = [(q, torch.stack(rows).mean(0)) for q, rows in figures.items() if rows]
    return [
        LayerNoise(*names[q], q.bits, q.signed, q.granularity, *values)
        for (q, _), values in zip(seen, torch.stack([v for _, v in seen]).tolist() if seen else [], strict=True)
    ]


class WarmStartExcess:
    """How much MSE the warm-started scalars of training steps cost over converged ones. Slow: for trials.

    Args:
        model: its dynamic quantizers are watched while they train.
    """

    def __init__(self, model: nn.Module) -> None:
        self._step: list[Tensor] = []
        for tensor in quantized_tensors(model):
            tensor.quantizer.register_forward_hook(self._measure)

    def _measure(self, quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, Quantizer)
        if not (quantizer.training and quantizer.warm_iterations):
            return
        x, s = args[0].detach(), quantizer.last_s
        assert s is not None
        converged = quantizer.solve(x, quantizer.bits, quantizer.signed, quantizer.dim, check=False)
        ours, best = (measure(x, t, quantizer.bits, quantizer.signed).mse for t in (s, converged))
        self._step.append(torch.where(best > 0, ours / best - 1, 0.0))

    def take(self) -> Tensor:
        """Relative excess of the tensors quantized since the last call: mean and largest, [2], float64."""
        excess = torch.stack(self._step) if self._step else torch.zeros(1, dtype=torch.float64)
        self._step.clear()
        return torch.stack([excess.mean(), excess.max()])
