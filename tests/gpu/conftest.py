"""Test devices: a GPU with `make test-gpu`; the CPU with all other tests, which keeps the GPU tests working."""

import pytest
import torch

MISSING = "no CUDA device here"


def _cuda(number: int) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(MISSING)
    if number >= torch.cuda.device_count():
        pytest.skip("one CUDA device only")
    return torch.device("cuda", number)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test."""
    return torch.device("cpu") if request.param == "cpu" else _cuda(0)


@pytest.fixture(params=["cpu", *(pytest.param(number, marks=pytest.mark.gpu) for number in (0, 1))])
def each_device(request: pytest.FixtureRequest) -> torch.device:
    """As `device`, but also a second GPU while the first one is the current device."""
    return torch.device("cpu") if request.param == "cpu" else _cuda(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """A GPU, for tests without a counterpart on a CPU."""
    return _cuda(0)
