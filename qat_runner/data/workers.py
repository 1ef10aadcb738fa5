"""Worker processes that persist from one epoch to the next."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


@dataclass
class Order:
    """Batches as lists of the (seed, index) of their items; the augmentation of an image depends only on these two.

    Each list is created when it is needed: all lists of an epoch would take more memory than the names of its images.
    """

    numbers: Sequence[int] = ()
    """numbers of the batches"""
    batch: Callable[[int], list[tuple[int, int]]] = lambda number: []
    """returns the items of a batch, given its number"""

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, self.numbers)


class Workers:
    """The processes that read one split. They persist from one epoch to the next; every epoch has its own order.

    Args:
        items: items of the split, addressed by (seed, index).
        most: maximum number of processes; 0 reads in this process.
        collate: makes a batch of a list of items; None: PyTorch's default, which stacks them.
    """

    def __init__(self, items: Dataset[Any], most: int, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self._items, self._most, self._collate = items, min(most, _processors()), collate
        self._order = Order()  # the loader iterates over it again at the start of each epoch
        self._loader: Any = None
        self._busy = False

    def batches(self, order: Order) -> Iterator[Any]:
        """Yield the batches of an order. Several calls may be in progress at the same time."""
        workers = min(self._most, len(order))
        if workers == 0 or self._busy:  # busy: the persistent workers are serving another call
            yield from self._made(order, workers)
            return
        if self._loader is None or self._loader.num_workers < workers:
            self._loader = self._made(self._order, workers, persistent_workers=True)
        self._order.numbers, self._order.batch = order.numbers, order.batch
        self._busy = True
        try:
            yield from self._loader
        except Exception:
            self._loader = None  # a worker may have died
            raise
        finally:
            self._busy = False

    def _made(self, order: Order, workers: int, **options: Any) -> Any:
        return DataLoader(
            self._items,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=self._collate,
            pin_memory=self._collate is None and torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise starting the workers would draw from the global generator
            worker_init_fn=partial(_ignore_group_signals, os.getpid()),
            **options,
        )


def _ignore_group_signals(reader: int, worker: int) -> None:
    """Make a worker ignore signals that are sent to its whole process group.

    Terminals, `timeout`, shells and job schedulers send such signals, but the reading process still needs its workers
    until it has saved. Standard PyTorch workers end on a SIGTERM from any process other than their parent, and reading
    from them then fails. So do these workers where the sender of a signal is unknown, as on macOS.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_word_of, args=(reader,), daemon=True).start()


def _wait_for_word_of(reader: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (reader, os.getppid()):
        pass
    os._exit(0)


def _processors() -> int:
    """Return the number of CPUs that this process may use; more workers would only slow each other down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
