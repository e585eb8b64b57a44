"""Which samples are in the batch of every step, and in the batches of a validation."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np
from torch.utils.data import get_worker_info

from clipmapper.training.processes import Share, batches_of


def epochs(count: int, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """The numbers in the batch of every step: each of ``count`` once an epoch, in an order of its own."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def numbers_at(step: int) -> list[int]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return [int(order(place // count)[place % count]) for place in places]

    return numbers_at


def in_order(count: int, batch_size: int, share: Share) -> Iterator[range]:
    """The rows of batches; in a worker of a ``DataLoader``, which takes batches from its workers in turn,
    every so many of them."""
    worker = get_worker_info()
    first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
    yield from islice(batches_of(count, batch_size, share), first, None, stride)
