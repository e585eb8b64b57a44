"""Products of two activations, and attention.

What two factors make is shared: each gets half (AttnLRP's uniform rule, arXiv 2402.05602, eq. 12; LibraGrad's
for gated MLPs). Only attention probabilities are constants to LibraGrad (arXiv 2411.16760, §3), and so is any
softmax that weighs something, as that of a router of experts (ours: the paper has no experts).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipmapper.relevance.backward.rule import (
    kind_of,
    operator_name,
    scaled_gradient,
    tensors,
    varies,
    with_tensors,
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
    probable = [t for t in varying if is_probability(t)] if constant_probabilities else []
    share = 1 / len(varying)

    def changed(t: Tensor) -> Tensor:
        if len(probable) == 1:
            return t.detach() if t is probable[0] else t
        return scaled_gradient(t, share) if varies(t) else t

    given = (*args[:start], *with_tensors(factors, changed), *args[stop:])
    return func(*given, **{key: with_tensors(value, changed) for key, value in kwargs.items()})


# What is done to probabilities before they weigh something.
_STILL_PROBABILITIES = {
    "View", "UnsafeView", "ReshapeAlias", "Expand", "Clone", "ToCopy", "Alias", "Select", "Slice",
    "Unsqueeze", "Squeeze", "Transpose", "Permute", "Index", "IndexSelect", "Gather", "Topk", "Sort", "Div",
    "Mul", "Scatter", "MaskedFill", "Unbind", "Split", "Where", "CopyBackwards",
}  # fmt: skip
_STEPS = 16


def is_probability(x: Tensor) -> bool:
    """Whether x comes from a softmax, with nothing between but a choice, a change of shape or a scale."""
    node = x.grad_fn
    for _ in range(_STEPS):
        if node is None:
            return False
        kind = kind_of(node)
        if kind == "Softmax":
            return True
        further = [following for following, _ in node.next_functions if following is not None]
        if kind == "CopyBackwards":  # what was done in place: the last is what was copied
            further = further[-1:]
        if kind not in _STILL_PROBABILITIES or len(further) != 1:
            return False
        (node,) = further
    return False


def attention_of_libra(func: Callable, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
    """Values that do not vary, as of a context that is given, still leave what reads them in the graph."""
    if torch.is_grad_enabled() and not value.requires_grad:
        value = value.detach().requires_grad_()
    return func(query.detach(), key.detach(), value, *args, **kwargs)


def attention_of_attn_lrp(
    func: Callable, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
) -> Tensor:
    """Half to the values and half to the probabilities, whose softmax passes its plain gradient (the Taylor
    rule) to scores that are a product as well."""
    query, key = scaled_gradient(query, 0.25), scaled_gradient(key, 0.25)
    return func(query, key, scaled_gradient(value, 0.5), *args, **kwargs)
