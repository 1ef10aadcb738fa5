"""Modules around a network that pass each call on to it."""

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside data parallelism and torch.compile, or the model itself if there are none around it."""
    compiling = sys.modules.get("torch._dynamo.eval_frame")
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif compiling is not None and isinstance(model, compiling.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the parameters of a model, by fully_shard."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    return sharding is not None and any(isinstance(module, sharding.FSDPModule) for module in model.modules())
