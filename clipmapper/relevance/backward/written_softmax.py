"""Softmaxes that are written out, which no rule for softmax would know."""

from collections.abc import Mapping, Sequence

from torch.autograd.graph import Node

from clipmapper.relevance.backward.elementwise import divides
from clipmapper.relevance.backward.rule import behind, kind_of

_SUMS = {"Sum", "Mean", "LinalgVectorNorm", "Norm", "Nansum", "Cumsum"}
_SUMS_OF_PRODUCTS = {"Mm", "Mv", "Bmm", "Dot", "_Map", "_TokenwiseMap"}
_CHOOSES = {"Slice", "Select", "Index", "Unbind", "Split", "Gather", "IndexSelect"}
# What may stand between exponentials and their sum, or between the sum and what is divided by it.
_BETWEEN = _CHOOSES | {
    "Unsqueeze", "Expand", "View", "UnsafeView", "ReshapeAlias", "Clone", "Mul", "MaskedFill", "Where",
    "Tril", "Triu", "ToCopy", "Transpose", "Permute", "Squeeze", "T", "NanToNum", "Alias", "Div",
}  # fmt: skip
_BEHIND_A_SUM = _BETWEEN | {"_OwnGate", "_SameRelevance", "ScaledGradient", "ClampMin", "Clamp"}
_TIMES_A_CONSTANT = {"Mul", "Div", "Neg", "Sub", "Rsub", "Add", "Clone", "ToCopy", "Alias"}
_STEPS = 12


def writes_softmax(name: str, args: Sequence, kwargs: Mapping) -> bool:
    """Whether an operator ends a softmax that is written out: it divides by a sum of exponentials, or takes
    ``exp(log_softmax(x))`` or ``exp(x - log(exp(x).sum()))``.

    What adds exponentials of one number (``cosh``) is none.
    """
    if name == "exp":
        made = getattr(args[0], "grad_fn", None) if args else None
        return made is not None and (kind_of(made) == "LogSoftmax" or _less_a_logarithm(made))
    if name == "div":
        by = args[1] if len(args) > 1 else kwargs.get("other")
    elif divides(name, args, kwargs):
        by = args[0] if args else kwargs.get("input")
    else:
        return False
    made = getattr(by, "grad_fn", None)
    return made is not None and _sums_exponentials(made)


def _less_a_logarithm(node: Node) -> bool:
    """Whether a node is something less the logarithm of a sum of exponentials."""
    if kind_of(node) not in ("Sub", "Add"):
        return False
    for further in behind(node)[1:]:
        for _ in range(_STEPS):
            if getattr(further, "operator", "") == "log":
                return any(map(_sums_exponentials, behind(further)))
            if kind_of(further) not in _BETWEEN | {"Neg"} or len(behind(further)) != 1:
                break
            (further,) = behind(further)
    return False


def _sums_exponentials(node: Node, steps: int = _STEPS) -> bool:
    """Whether a node is a sum of exponentials, or little more."""
    further, kind = behind(node), kind_of(node)
    if not further or not steps:
        return False
    if kind in _SUMS or (kind in _SUMS_OF_PRODUCTS and len(further) == 1):  # (with ones, or with a mask)
        return _exponent(further[0]) is not None or _sums_exponentials(further[0], steps - 1)
    if kind == "Add" and len(further) > 1:
        exponents = [_exponent(_without_constants(each)) for each in further]
        if None not in exponents:
            return len(set(exponents)) > 1
        return any(_sums_exponentials(each, steps - 1) for each in further)
    if kind == "Add" or kind in _BEHIND_A_SUM:
        return len(further) == 1 and _sums_exponentials(further[0], steps - 1)
    return False


def _without_constants(node: Node) -> Node:
    """What constants are added to there."""
    while kind_of(node) == "Add" and len(behind(node)) == 1:
        (node,) = behind(node)
    return node


def _exponent(node: Node) -> object | None:
    """Return what a node is the exponential of: the number that is scaled there, or the choice of one; None
    of what is no exponential."""
    chosen = None
    for _ in range(_STEPS):
        further = behind(node)
        if getattr(node, "operator", "") in ("exp", "exp2"):
            break
        if kind_of(node) in _CHOOSES:
            chosen = chosen or node
        if kind_of(node) not in _BETWEEN or len(further) != 1:
            return None
        (node,) = further
    else:
        return None
    if chosen is not None:
        return chosen
    for _ in range(_STEPS):
        further = behind(node)
        if len(further) != 1:
            break
        (node,) = further
        if kind_of(node) not in _TIMES_A_CONSTANT or len(behind(node)) != 1:
            break
    return node
