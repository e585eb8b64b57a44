"""Modes for a while: of a model's parts, of its parameters' gradients, and of torch's errors."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from clipmapper.errors import UserError


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


@contextmanager
def without_parameter_gradients(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the parameters of these modules themselves take no gradient.

    What only the weights' gradients need is then not kept.
    """
    taken = [
        p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad
    ]
    for parameter in taken:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taken:
            parameter.requires_grad_(True)


@contextmanager
def in_place_changes_named() -> Iterator[None]:
    """Inside, torch's errors about tensors that are changed in place are a ``UserError`` of one line."""
    try:
        yield
    except RuntimeError as error:
        if "inplace operation" not in str(error) and "in-place operation" not in str(error):
            raise
        raise UserError(
            "the model changes in place (x += ..., x.add_(...)) what its gradient is made of, as torch says: "
            "write x = x + ..."
        ) from error
