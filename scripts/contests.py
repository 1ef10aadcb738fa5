"""Benchmark contests: operations, or training steps of networks, that are timed in turns."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torchvision.models import VisionTransformer
from transformers import BertConfig, BertForQuestionAnswering

from qat_runner import distributed, ranks
from qat_runner.data import Batch
from qat_runner.insertion import calibrate, quantize_model
from qat_runner.insertion.insert import weights_together
from qat_runner.models import build_model
from qat_runner.tasks import TASKS

Contest = dict[str, Callable[[], object]]

BERTS = {"minilm": (6, 384), "bert_base": (12, 768), "bert_tiny": (1, 24)}
"""name -> (layers, hidden size)"""
VITS = {"vit_s": (16, 12, 384, 6), "vit_tiny": (4, 1, 24, 2)}
"""name -> (side of a patch in pixels, layers, hidden size, heads)"""
MODES = ("full precision", "static", "max", "octav")
LEARNED = ("full precision", "octav", "lsq", "pact")
GRIDS: dict[str, dict[str, Any]] = {
    "two's complement": {},
    "two's complement, missing_code": {"missing_code": True},
    "full": {"range": "full"},
    "oriented": {"range": "oriented"},
    "oriented, refine=64": {"range": "oriented", "refine": 64},
    "oriented weights, affine activations": {"weight_range": "oriented", "activation_format": "int_affine"},
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contest: Contest, rounds: int, device: torch.device, beside: str | None = None
) -> dict[str, dict[str, float]]:
    """Time each contestant in milliseconds: the median and the spread (third minus first quartile) over the rounds.

    With `beside`, the name of a contestant, also return the time of each relative to that one: the median over the
    rounds and its standard error. This is for differences that are small compared with the machine's own variation.
    """
    for _ in range(3):  # allocate, compile, let memory settle
        for run in contest.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contest}
    for _ in range(rounds):
        for name, run in contest.items():
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - began))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    figures = {name: {"ms": q[1], "spread": q[2] - q[0]} for name, q in quartiles.items()}
    for name, values in times.items() if beside else ():
        ratios = [a / b for a, b in zip(values, times[beside or name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        error = 1.25 * (high - low) / 1.35 / math.sqrt(rounds)  # of the median of a nearly normal distribution
        figures[name] |= {f"x {beside}": middle, "standard error": error}
    return figures


def most_allocated(run: Callable[[], object]) -> int:
    """Return the peak bytes of tensors on a CPU, not counting those that existed before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        highest = max(highest, held)
    return highest


def vision(which: tuple[str, int, int], device: torch.device) -> tuple[nn.Module, Batch, dict[str, Any]]:
    """Return a network, a batch of random images, and the options for quantizing the network."""
    name, size, batch = which
    model = vision_transformer(name, size) if name in VITS else build_model(name, 100, size)
    model = model.to(device).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    return model, Batch((x,), torch.randint(0, 100, (batch,), device=device)), {}


def vision_transformer(name: str, size: int) -> nn.Module:
    """Return torchvision's vision transformer in a size of VITS, for images of size x size pixels."""
    patch, layers, hidden, heads = VITS[name]
    model: nn.Module = VisionTransformer(size, patch, layers, heads, hidden, 4 * hidden, num_classes=100)
    return model


def bert(which: tuple[str, int, int], device: torch.device) -> tuple[nn.Module, Batch, dict[str, Any]]:
    """Return a BERT with random weights, a batch of random tokens, and the options for quantizing the network."""
    name, length, batch = which
    layers, hidden = BERTS[name]
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=12
    )
    model: nn.Module = BertForQuestionAnswering(config)
    ids = torch.randint(1000, 30000, (batch, length), device=device)
    targets = torch.randint(0, length, (batch, 2), device=device)
    options = {"first_last_bits": None, "linear_granularity": "channel", "quantize_head": False}
    return model.to(device), Batch((ids, torch.ones_like(ids)), targets), options


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def make_step(
    which: tuple[str, int, int],
    mode: str,
    device: torch.device,
    amp: bool,
    wrap: Callable[[nn.Module], Any] = _as_it_is,
    together: bool = True,
) -> Callable[[], object]:
    """Return a training step: forward, backward, and SGD, or AdamW for a BERT.

    The first step runs the network without `wrap`, as in `qat-run`.

    Args:
        which: (model, image size or number of tokens, batch size).
        mode: "full precision", "static", a clipping method, a name in GRIDS, or "brevitas".
        amp: whether to compute in bfloat16.
        wrap: applied to the network after its first step, for example torch.compile.
        together: whether all weights are solved together if the network is not compiled, as in `qat-run`.
    """
    torch.manual_seed(0)
    is_bert = which[0] in BERTS
    task = TASKS["question_answering" if is_bert else "classification"]
    model, batch, options = (bert if is_bert else vision)(which, device)
    if mode == "brevitas":
        model = brevitas_model(model).to(memory_format=torch.channels_last)
    elif mode in GRIDS:
        quantize_model(model, 4, "octav", example=tuple(t[:2] for t in batch.inputs), **options, **GRIDS[mode])
    elif mode != "full precision":
        clipping = "octav" if mode == "static" else mode
        example = tuple(t[:2] for t in batch.inputs)
        quantize_model(model, 4, clipping, example=example, dynamic=mode != "static", **options)
    if mode in ("static", "lsq", "pact"):
        calibrate(model, [batch.inputs])
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-5, capturable=device.type == "cuda")  # for CUDA graphs
        if is_bert
        else torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    )

    trained: nn.Module = model
    weights = weights_together(model, distributed.BUCKET if ranks.launched() else None)
    together = together and wrap is _as_it_is

    def step() -> None:
        nonlocal trained
        with (
            weights.quantized() if together else nullcontext(),
            torch.autocast(device.type, torch.bfloat16) if amp else nullcontext(),
        ):
            loss = task.loss(task.compute(trained, batch.inputs), batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if trained is model:
            trained = distributed.data_parallel(wrap(model))
        optimizer.step()

    return step


def brevitas_model(model: nn.Module) -> nn.Module:
    """Replace each layer by Brevitas' default quantized layer for training, whose scales are learned."""
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    quantizers = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": Int8ActPerTensorFloat}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
                made = QuantConv2d(**{key: getattr(child, key) for key in keys}, bias=False, **quantizers)
            elif type(child) is nn.Linear:
                made = QuantLinear(child.in_features, child.out_features, bias=True, **quantizers)
            else:
                continue
            made.weight.data.copy_(child.weight)
            setattr(module, name, made)
    return model
