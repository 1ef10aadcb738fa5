"""Worker processes, which live from one epoch to the next."""

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
    """Batches, as the (seed, index) of their items: how a picture is augmented depends on these two alone.

    Each is made when its turn comes: all of an epoch together would take more memory than the names of its pictures.
    """

    numbers: Sequence[int] = ()
    """of the batches"""
    batch: Callable[[int], list[tuple[int, int]]] = lambda number: []
    """the items of each"""

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, self.numbers)


class Workers:
    """The processes that read one split. They live from one epoch to the next; each has its own order all the same.

    Args:
        items: of the split, by (seed, index).
        most: how many there may be; 0 reads in this process.
        collate: makes a batch of a list of items; None: as PyTorch does, by stacking.
    """

    def __init__(self, items: Dataset[Any], most: int, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self._items, self._most, self._collate = items, min(most, _processors()), collate
        self._order = Order()  # which the loader asks for anew at the start of each epoch
        self._loader: Any = None
        self._busy = False

    def batches(self, order: Order) -> Iterator[Any]:
        """Batches of items, each given as the (seed, index) of its items. Any number of calls may be under way."""
        workers = min(self._most, len(order))
        if workers == 0 or self._busy:  # the latter: those that live on are in the midst of another call
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
            generator=torch.Generator(),  # else starting the workers would draw from the global one
            worker_init_fn=partial(_obey, os.getpid()),
            **options,
        )


def _obey(reader: int, worker: int) -> None:
    """Have a worker pass over the signals that its whole group gets: the process that reads from it still has to save.

    Terminals, `timeout`, shells and job schedulers send those. PyTorch's own workers die of any SIGTERM that is not
    their parent's, and reading from them fails. Where it cannot be known whose it is, as on macOS, so do these.
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
    """Those that this process may use: more workers would only stand in each other's way."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
