"""Products of two activations, and attention.

What two factors make is shared: each gets half (AttnLRP's uniform rule, arXiv 2402.05602, eq. 12; LibraGrad's
for gated MLPs). Only attention probabilities are constants to LibraGrad (arXiv 2411.16760, §3), and so is any
softmax that weighs something, as that of a router of experts (ours: the paper has no experts).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipmapper.relevance.backward.probabilities import weighing
from clipmapper.relevance.backward.rule import (
    ScaledGradient,
    kind_of,
    operator_name,
    scaled_gradient,
    tensors,
    varies,
    with_tensors,
    with_value,
)

# Operators that multiply some of their arguments, and which: others are only added, or no tensors.
MULTIPLICATIONS: dict[str, slice] = {
    **dict.fromkeys(
        (
            "mul",
            "matmul",
            "mm",
            "bmm",
            "mv",
            "dot",
            "vdot",
            "inner",
            "outer",
            "ger",
            "tensordot",
            "einsum",
            "kron",
        ),
        slice(None),
    ),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), slice(2)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), slice(2)),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "addcmul", "addr"), slice(1, None)),
}


def product(func: Callable, *args, **kwargs) -> Tensor:
    """Each of several factors gets its share of the gradient; one that is alone gets all of it."""
    return _shared(func, args, kwargs, False)


def product_of_libra(func: Callable, *args, **kwargs) -> Tensor:
    return _shared(func, args, kwargs, True)


def _shared(func: Callable, args: tuple, kwargs: dict, constant_probabilities: bool) -> Tensor:
    start, stop, _ = MULTIPLICATIONS[operator_name(func)].indices(len(args))
    factors = args[start:stop]
    varying = [t for t in tensors((*factors, *kwargs.values())) if varies(t)]
    if len(varying) < 2:  # (x · x has two factors)
        return func(*args, **kwargs)
    probable = weighing(varying) if constant_probabilities else []
    if operator_name(func) == "mul" and (gate := gate_of(*varying)) is not None:
        probable = [gate]
    share = 1 / len(varying)

    def changed(t: Tensor) -> Tensor:
        if len(probable) == 1:
            return t.detach() if t is probable[0] else t
        return scaled_gradient(t, share) if varies(t) else t

    given = (*args[:start], *with_tensors(factors, changed), *args[stop:])
    return func(*given, **{key: with_tensors(value, changed) for key, value in kwargs.items()})


def gated_linear_unit(activation: Callable) -> Callable:
    """``F.glu(x, dim)``: the product of one half and the sigmoid of the other."""

    def rule(func: Callable, x: Tensor, dim: int = -1) -> Tensor:
        value, gate = x.chunk(2, dim)
        composed = product(torch.mul, value, activation(torch.sigmoid, gate))
        return with_value(composed, lambda: func(x, dim))

    return rule


# How far a graph is followed.
_STEPS = 16

# Functions of one number, of what comes with constants; and those that are the number times a constant.
_OF_ONE_NUMBER = {"Mul", "Div", "Add", "Sub", "Rsub", "Neg", "Clone", "ToCopy", "Alias"}
_TIMES_A_CONSTANT = {"Mul", "Div", "Neg", "Clone", "ToCopy", "Alias"}


def gate_of(one: Tensor, other: Tensor) -> Tensor | None:
    """Return which of two factors is the gate of the other: a function of the same number, by which that is
    multiplied. (GELU written out is ``0.5 x · (1 + tanh(…x…))``: halved, what goes to the 1 would be lost.)
    """
    number, same = (_number(torch.autograd.graph.get_gradient_edge(x)) for x in (one, other))
    if number == same:
        return None  # x · x
    if _is_of(other, number):
        return other
    return one if _is_of(one, same) else None


def _number(edge: tuple) -> tuple:
    """The number that an edge of the graph is a constant times."""
    edge = (edge[0], edge[1])
    for _ in range(_STEPS):
        further = [following for following in edge[0].next_functions if following[0] is not None]
        scaled = getattr(edge[0], "_forward_cls", None) is ScaledGradient
        if len(further) != 1 or not (scaled or kind_of(edge[0]) in _TIMES_A_CONSTANT):
            break
        edge = further[0]
    return edge


def _is_of(x: Tensor, number: tuple) -> bool:
    """Whether x is a function of one number and of constants alone."""
    start = torch.autograd.graph.get_gradient_edge(x)
    waiting, seen = [(start.node, start.output_nr)], set()
    while waiting:
        edge = waiting.pop()
        if edge == number or edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        further = [following for following in node.next_functions if following[0] is not None]
        made = getattr(node, "_forward_cls", None)
        if made is None:
            of_one = kind_of(node) in _OF_ONE_NUMBER
        else:
            of_one = getattr(node, "of_one_number", made.of_one_number)
        if not of_one or not further or len(seen) > _STEPS:
            return False
        waiting += further
    return True


def attention_of_libra(
    func: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args, **kwargs
) -> Tensor:
    """Values that do not vary, as of a context that is given, still leave what reads them in the graph."""
    if torch.is_grad_enabled() and not value.requires_grad:
        value = value.detach().requires_grad_()
    mask = mask if mask is None else mask.detach()
    return func(query.detach(), key.detach(), value, mask, *args, **kwargs)


def attention_of_attn_lrp(
    func: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args, **kwargs
) -> Tensor:
    """Half to the values and half to the probabilities, whose softmax passes its plain gradient (the Taylor
    rule) to scores that are a product as well. One that does not vary has no share."""
    scores, biased = varies(query) + varies(key), mask is not None and varies(mask)
    half = 0.5 if (scores or biased) and varies(value) else 1.0
    of_scores = half / max(scores, 1)
    query, key = scaled_gradient(query, of_scores), scaled_gradient(key, of_scores)
    mask = scaled_gradient(mask, half) if biased else mask  # a bias that is made of activations
    return func(query, key, scaled_gradient(value, half), mask, *args, **kwargs)
