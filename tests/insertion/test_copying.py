"""Tests of copies of networks in which a forward was set on an instance."""

import copy
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.insertion.copying import not_called
from qat_runner.insertion.modes import uncompiled

X = torch.randn(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.layer(x))
        return out


def doubled(x: Tensor, module: nn.Module) -> Tensor:
    return 2 * x


FOLLOWING: dict[str, Callable[[Net], Any]] = {
    "builtin": lambda net: torch.neg,
    "function": lambda net: F.relu,
    "lambda": lambda net: lambda x: 2 * x,
    "partial": lambda net: partial(F.leaky_relu, negative_slope=0.1),
    "partial of the module": lambda net: partial(doubled, module=net.act),
    "of another module": lambda net: nn.ReLU().forward,
    "method": lambda net: MethodType(lambda self, x: 3 * x, net.act),
    "wrapping partial": lambda net: update_wrapper(partial(doubled, module=net.act), net.act.forward),
    "compiled function": lambda net: torch.compile(F.relu, backend="eager"),
    "global with the name of an attribute": lambda net: lambda x: x.mT.mT if hasattr(x, "ORIGINAL") else x,
}


def run_copy(net: nn.Module) -> Tensor:
    again = copy.deepcopy(net)
    with uncompiled(), not_called(net, by=again):
        out: Tensor = again(X)
    return out


@pytest.mark.parametrize("make", FOLLOWING.values(), ids=FOLLOWING)
def test_a_forward_that_follows_the_copy(make: Callable[[Net], Any]) -> None:
    net = Net()
    net.act.forward = make(net)  # type: ignore[method-assign]
    with uncompiled():
        assert torch.equal(run_copy(net), net(X))


def test_modules_that_copies_share_may_be_called() -> None:
    net = Net()
    net.layer.__dict__["__deepcopy__"] = lambda memo: net.layer
    assert torch.equal(run_copy(net), net(X))


ORIGINAL: Any = None


def of_globals(net: Net) -> Callable[[Tensor], Tensor]:
    global ORIGINAL
    ORIGINAL = net.forward
    return lambda x: next(ORIGINAL(y) for y in [x])


REFERRING: dict[str, Callable[[Net], Any]] = {
    "closure": lambda net: (lambda forward: lambda x: forward(x))(net.forward),
    "global": of_globals,
    "default": lambda net: lambda x, forward=net.forward: forward(x),
    "default by name": lambda net: lambda x, *, forward=net.forward: forward(x),
    "object": lambda net: (lambda of: lambda x: of.net(x))(SimpleNamespace(net=net)),
    "decorated": lambda net: torch.no_grad()(net.forward),
    "compiled": lambda net: torch.compile(net.forward, backend="eager"),
}


@pytest.mark.parametrize("make", REFERRING.values(), ids=REFERRING)
def test_a_forward_that_would_run_the_original(make: Callable[[Net], Any]) -> None:
    net = Net()
    net.forward = make(net)  # type: ignore[method-assign]
    message = "a copy of the network would still run the original through a forward that was set on the instance of"
    with pytest.raises(ValueError, match=f"^{message} Net: .*, as a compiled one does"):
        run_copy(net)
    around = nn.Sequential(net)
    with pytest.raises(ValueError, match=f"^{message} 0: "):
        run_copy(around)
    del around.get_submodule("0").forward
    assert torch.equal(run_copy(around), around(X))
