"""Several processes on one run, one per GPU (or per few CPU cores), as started by torchrun.

With a single process, everything here has no effect.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from qat_runner.data.batches import WHOLE, Shard
from qat_runner.errors import ConfigError, QatError, RunError
from qat_runner.ranks import is_main, launched, local_rank

T = TypeVar("T")

BUCKET = 25 << 20
"""Bytes of gradients that DistributedDataParallel sends at once by default."""


@contextmanager
def group(timeout: float) -> Iterator[None]:
    """A context like `process_group` for processes that were launched together.

    It has no effect for a single process, or inside another such context.
    """
    with nullcontext() if not launched() or dist.is_initialized() else process_group(timeout):
        yield


@contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """A context in which processes can communicate, by nccl for tensors on GPUs. Each process has its own GPU.

    Args:
        timeout: seconds after which a process that waits for another one gives up with an error.

    Raises:
        RunError: the processes cannot connect to each other.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes could not connect to each other ({' '.join(str(error).split())})") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard() -> Shard:
    """Return the part of the data that belongs to this process."""
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def on_main(work: Callable[[], T]) -> T:
    """Run a function in the main process and return its result in all processes; if it fails, all processes fail."""
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except QatError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    found: T = outcome[0]
    return found


def all_gather(value: T) -> list[T]:
    """Return, in every process, the values of all processes in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(t: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


class Agreement:
    """The largest of the numbers that the processes request at each step, without waiting for one another.

    A request of one step is known in the next one: the message is sent in the meantime, on the CPU.
    """

    def __init__(self) -> None:
        self._asked = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def ask(self, wish: int) -> int:
        """Request a number, and return the largest of the previous requests, which is the same in all processes.

        In a single process, the request itself is returned.
        """
        if not dist.is_initialized():
            return wish
        granted = self.settle()
        self._asked = torch.tensor(wish)
        self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)
        return granted

    def settle(self) -> int:
        """Return the largest of the last requests. No message is pending afterwards."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._asked)


class DataParallel(DistributedDataParallel):
    """DistributedDataParallel for the parameters that have a gradient when it is created."""

    def __init__(self, model: nn.Module) -> None:
        without = idle(model)
        names = [*without, *(f".{name}" for name in without)]  # with a dot for parameters of the model itself
        names += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        super().__init__(model, gradient_as_bucket_view=True)
        self.idle = without
        """name -> parameter, of those that are not averaged"""

    def check(self) -> None:
        """Check the gradients after a backward pass.

        Raises:
            RunError: a parameter that is not averaged has a gradient.
        """
        if late := [name for name, p in self.idle.items() if p.grad is not None]:
            raise RunError(
                f"{late[0]}: had no gradient in the first step but has one now, which several processes cannot average"
            )


def idle(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that have no gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap a model so that it averages its gradients over all processes during the backward pass.

    Args:
        model: a model after a backward pass, whose gradients are averaged here. Only parameters that have a gradient
            are averaged from now on, since DistributedDataParallel would wait for the others. Buffers are not
            synchronized: each process has its own BatchNorm averages and clipping scalars.

    Raises:
        RunError: different parameters have gradients in other processes.
    """
    if not dist.is_initialized():
        return model
    mine = [*idle(model)]
    if any(theirs != mine for theirs in all_gather(mine)):
        raise RunError(
            "the processes have gradients of different parameters, as if the network skipped layers at random"
        )
    for p in model.parameters():
        if p.grad is not None:
            all_reduce(p.grad).div_(dist.get_world_size())
    return DataParallel(model)


def accumulating(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which the gradients of a model from `data_parallel` accumulate in each process separately, as those
    of other models always do."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def broadcast(module: nn.Module, parameters: bool = True) -> None:
    """Copy the buffers, and by default the parameters, of a module from the main process to all processes."""
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
    """BatchNorm over the batch of all processes together, on a CPU, which torch's own version for GPUs does not
    support."""

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


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Replace, in place, the BatchNorms of a model by ones that see the batch of all processes; returns the model.

    Raises:
        ConfigError: the model has a kind of BatchNorm that cannot be synchronized.
    """
    if any(p.is_cuda for p in model.parameters()):
        return _synchronized_by_torch(model)
    _refuse_others(model, (nn.BatchNorm2d,))
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return model


def _synchronized_by_torch(model: nn.Module) -> nn.Module:
    """Convert with torch, which replaces any BatchNorm by a plain one, or with timm, which keeps its activation
    function."""
    plain: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

        plain, convert = (*plain, BatchNormAct2d), convert_sync_batchnorm
    _refuse_others(model, plain)
    return convert(model)


def _refuse_others(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in kinds:
            raise ConfigError(
                f"sync_batchnorm=true: {name} is a {type(module).__name__}, which cannot be synchronized on this device"
            )
