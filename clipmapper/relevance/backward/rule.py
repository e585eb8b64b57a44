"""The base of what stands in autograd's graph in place of an operator of torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipmapper.relevance.backward.weights import of_weights
from clipmapper.relevance.modes import in_place_changes_named

HALVES = (torch.float16, torch.bfloat16)
IN_HALF_PRECISION = (
    "rules='lrp' is not defined in half precision (LRP divides by sums that cancel out): "
    "run the model in float32"
)


class Rule(torch.autograd.Function):
    """A rule of the backward pass. ``tokenwise``: it leaves every token where it is. ``of_one_number``: so it
    does with every number."""

    tokenwise, of_one_number = True, False


def kept(ctx: Any) -> tuple[Tensor | None, ...]:
    """The tensors that a rule's forward saved.

    Raises ``UserError`` where the model has changed one of them in place since.
    """
    with in_place_changes_named():
        return ctx.saved_tensors


def varies(x: Tensor) -> bool:
    """Whether a gradient is wanted of x, and x is no weight of the model's, nor computed from weights."""
    return x.requires_grad and not of_weights(x)


def variables(args: Sequence, kwargs: Mapping) -> list[Tensor]:
    """Return the different tensors among the arguments that vary."""
    found = {id(value): value for value in tensors((*args, *kwargs.values())) if varies(value)}
    return list(found.values())


def tensors(values: Sequence) -> Iterator[Tensor]:
    """All tensors, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def kind_of(node: Any) -> str:
    """The operator of a node of autograd's graph: Add of AddBackward0."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


# Nodes that multiply matrices (einsum and matmul are made of them).
MATRIX_PRODUCTS = frozenset({"Mm", "Bmm", "Mv", "Dot", "Addmm", "Addmv", "Addbmm", "Baddbmm", "Linear"})


def behind(node: Any) -> list[Any]:
    """The nodes that gradients go on to from a node. (Any: torch.jit's are no Node to Python.)"""
    return [following for following, _ in node.next_functions if following is not None]


def walk(start: Any, is_end: Callable[[Any], bool]) -> Iterator[Any]:
    """A node and all behind it, each once, as far as ``is_end``, whose nodes are not among them."""
    met, waiting = set(), [start]
    while waiting:
        node = waiting.pop()
        if node in met or is_end(node):
            continue
        met.add(node)
        yield node
        waiting += behind(node)


def with_tensors(value: object, changed: Callable[[Tensor], Tensor]) -> object:
    """The same value, or list or tuple of values, whose tensors are changed."""
    if isinstance(value, Tensor):
        return changed(value)
    return type(value)(with_tensors(v, changed) for v in value) if type(value) in (list, tuple) else value


# Other names of operators.
_ALIASES = {
    "multiply": "mul", "true_divide": "div", "divide": "div", "subtract": "sub", "clip": "clamp",
    "linalg_matmul": "matmul",
}  # fmt: skip


def operator_name(func: Callable) -> str:
    """The operator's name, also of one that works in place; "" for what has none."""
    name = getattr(func, "__name__", "")
    if works_in_place(func):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def works_in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by ``factor`` on its way back."""
    return ScaledGradient.apply(x, factor)


class ScaledGradient(Rule):
    of_one_number = True

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def with_value(composed: Tensor, value: Callable[[], Tensor]) -> Tensor:
    """The gradient of ``composed``, the same written out, and exactly the ``value`` of the operator."""
    with torch.no_grad():
        exact = value()
    return _WithValue.apply(composed, exact)


class _WithValue(Rule):
    @staticmethod
    def forward(ctx, composed, exact):
        return exact

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
