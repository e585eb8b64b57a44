"""Quiet about what Lightning says at every start."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def less_noise() -> Iterator[None]:
    """Keep away what Lightning says at every start and a user can do nothing about."""
    # Some of what Fabric says at the start of several processes, the trainer's logger says.
    loggers = [logging.getLogger(f"lightning.{speaker}") for speaker in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
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
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
