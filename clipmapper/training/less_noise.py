"""Quiet about what Lightning says at every start."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def less_noise(speaker: str = "lightning.pytorch") -> Iterator[None]:
    """Keep away what Lightning says at every start and a user can do nothing about."""
    logger = logging.getLogger(speaker)
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for expected in (
            "Found .* module.* in eval mode",  # the frozen encoder is meant to be
            "Checkpoint directory .* exists and is not empty",  # of a run that is resumed
            ".*does not have many workers",  # batches are rows of a cache: a worker would only copy them
            "You're using the WeightAveraging callback with a model that overrides",  # which makes no layers
            "FSDP2-wrapped module .* returned a view",  # which nothing here changes in place
            "It is recommended to use .self.log.*sync_dist",  # metrics are the same in all processes already
            ".broadcast_buffers. is deprecated",  # what replaces it is not in all releases that will do
            ".*isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's own use of torch
        ):
            warnings.filterwarnings("ignore", expected)
        try:
            yield
        finally:
            logger.setLevel(level)
