"""Several processes on one run, one for each GPU (or for a few CPU cores), as torchrun starts them.

Gradients are averaged after the backward pass rather than during it, as DistributedDataParallel would: where weights
are quantized once for several parts of a batch, their gradients come outside of any backward pass that it would see.
Everything here does nothing where there is one process.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat_runner.data.batches import WHOLE, Shard
from qat_runner.errors import QatError, RunError
from qat_runner.ranks import is_main, launched, local_rank

T = TypeVar("T")
BUCKET = 2**23
"""Elements of gradients that travel together."""


@contextmanager
def group(timeout: float) -> Iterator[None]:
    """While open, the processes that were launched together can talk to each other; inside of another one, nothing.

    Args:
        timeout: seconds after which a process that waits for another gives up, with an error.

    Raises:
        RunError: they do not find each other.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes did not find each other ({' '.join(str(error).split())})") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard() -> Shard:
    """The part of the data that is this process's."""
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def on_main(work: Callable[[], T]) -> T:
    """What the main process finds, told to all; if it fails, all fail."""
    if not dist.is_initialized():
        return work()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = work()
        except QatError as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def all_gather(value: T) -> list[T]:
    """The value of every process, in order of rank, known to all."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(t: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def all_reduce_max(wish: int) -> int:
    """The largest of the numbers that the processes ask for; waits for the other processes, not for a device."""
    if not dist.is_initialized():
        return wish
    t = torch.tensor(wish)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return int(t)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        flat = all_reduce(flat).div_(dist.get_world_size())
        for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(mean.view(g.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and (t.dtype != bucket[0].dtype or sum(u.numel() for u in bucket) + t.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


@torch.no_grad()
def broadcast(module: nn.Module, parameters: bool = True) -> None:
    """Make the buffers, and by default the parameters, of a module those of the main process everywhere."""
    if dist.is_initialized():
        for t in [*(module.parameters() if parameters else ()), *module.buffers()]:
            dist.broadcast(t.data, 0)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return all_reduce(t.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce(gradients[0].contiguous().clone())


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes together; torch's own does so on GPUs alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        x = input.to(self.running_mean.dtype)
        shape = (1, -1, 1, 1)
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        variance = _Sum.apply((x - mean.view(shape)).square().sum((0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * total / (total - 1), momentum)
        out = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None and self.bias is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        normalized: Tensor = out.to(input.dtype)
        return normalized


def synchronize_batchnorm(model: nn.Module) -> None:
    """Let every BatchNorm2d of a model see the batch of all processes, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
