"""Starting several processes that form one group, each with one thread."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from qat_runner import distributed


def together(work: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Call work(*args) in `world` processes; return their results, tensors and plain values, by rank.

    Even a single process forms a group here, which qat-run would not create for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (work, world, port, folder, args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _process(rank: int, work: Callable[..., Any], world: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **address}
    with distributed.process_group(timeout=60):
        torch.save(work(*args), folder / f"{rank}.pt")
