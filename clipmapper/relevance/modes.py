"""Training and evaluation mode of the parts of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all parts of the model are in evaluation mode; behind it each is in its own again.

    (``model.train(model.training)`` would put parts into training mode that were not, such as norms that keep
    their statistics.)
    """
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
