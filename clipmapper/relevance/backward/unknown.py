"""Operators without a rule: an error where their gradient is asked for, never the plain one silently."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rule import MATRIX_PRODUCTS, Rule, behind, kind_of, tensors, walk

# Nodes of autograd's graph that are linear in what they get, or pick of it: they keep input × gradient.
_LINEAR = {
    "AccumulateGrad", "Add", "Sub", "Rsub", "Neg", "Positive", "View", "UnsafeView", "ReshapeAlias",
    "Reshape", "Clone", "ToCopy", "Alias", "Expand", "Select", "Slice", "Index", "IndexSelect", "Gather",
    "Scatter", "ScatterAdd", "ScatterReduce", "Permute", "Transpose", "T", "Unsqueeze", "Squeeze", "Cat",
    "Stack", "Unbind", "Split", "SplitWithSizes", "Chunk", "Narrow", "Repeat", "Roll", "Flip", "Sum",
    "Nansum", "Mean", "Cumsum", "MaskedFill", "MaskedSelect", "MaskedScatter", "Where", "IndexPut",
    "IndexAdd", "IndexCopy", "IndexFill", "IndexReduce", "SliceScatter", "SelectScatter", "DiagonalScatter",
    "Copy", "CopyBackwards", "CopySlices", "AsStrided", "AsStridedScatter", "Triu", "Tril", "Diagonal",
    "DiagEmbed", "Trace", "Constant", "Pad", "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D",
    "ReflectionPad3D", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "AvgPool1D", "AvgPool2D",
    "AvgPool3D", "AdaptiveAvgPool1D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D",
    "MaxPool2DWithIndices", "MaxPool3DWithIndices", "MaxPool1D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
    "UpsampleBilinear2D", "UpsampleBilinear2DAa", "UpsampleBicubic2D", "UpsampleBicubic2DAa",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleLinear1D", "UpsampleTrilinear3D", "PixelShuffle",
    "PixelUnshuffle", "ChannelShuffle", "Unfold", "Im2Col", "Col2Im", "Max", "Min", "Amax", "Amin", "Topk",
    "Sort", "Median", "Kthvalue", "Maximum", "Minimum", "Take", "NanToNum", "FftR2C", "FftC2R", "FftC2C",
    "ViewAsReal", "ViewAsComplex", "Real", "Imag", "Conj", "ConjPhysical", "Complex", "Unflatten", "Relu",
    "Abs", "LinalgVectorNorm", "Norm", "Std", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm",
    "NativeDropout", "Lift", "LiftFresh", "Detach",
}  # fmt: skip
# Linear in each of two; by rules of their own where both vary.
_BILINEAR = MATRIX_PRODUCTS | {"Mul", "Div", "Addcmul", "Addcdiv", "Lerp"}
# A softmax that nothing is multiplied by: the plain gradient, which is AttnLRP's rule for it.
_SOFTMAX = frozenset({"Softmax", "LogSoftmax"})


def guarded(result: object, before: Iterable[Node | None], func: Callable, rules: str) -> object:
    """What ``func`` gave, in the graph of which an error stands where it computed what has no rule.

    ``before``: the nodes of what it was given.
    """
    known = {node for node in before if node is not None}
    for value in tensors((result,)):
        made = value.grad_fn
        if made is not None and not all(has_rule(node, rules) for node in walk(made, known.__contains__)):
            return _refused(result, getattr(func, "__name__", str(func)), rules)
    return result


def foreign(x: Tensor) -> bool:
    """Whether x is made by a function with a backward of its own."""
    made = getattr(x.grad_fn, "_forward_cls", None)
    return made is not None and not issubclass(made, Rule)


def refused(x: Tensor, name: str, rules: str) -> Tensor:
    """x, the gradient at which is an error that names what it is made by."""
    return _NoRule.apply(x, name, rules)


def has_rule(node: Any, rules: str) -> bool:
    """Whether relevance may pass a node of autograd's graph as its gradient does."""
    made = getattr(node, "_forward_cls", None)
    if made is not None:
        return issubclass(made, Rule)
    kind = kind_of(node)
    if kind in _BILINEAR:
        return len(behind(node)) < 2 and not (rules == "lrp" and kind in MATRIX_PRODUCTS)
    return kind in _LINEAR or (kind in _SOFTMAX and rules != "lrp")


def _refused(result: object, name: str, rules: str) -> object:
    if isinstance(result, Tensor):
        return refused(result, name, rules) if result.requires_grad else result
    if isinstance(result, list | tuple):
        return type(result)([_refused(value, name, rules) for value in result])
    return result


class _NoRule(Rule):
    tokenwise = False

    @staticmethod
    def forward(ctx, x, name, rules):
        ctx.said = name, rules
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        name, rules = ctx.said
        raise UserError(
            f"{name}: the backward rules {rules!r} have no rule for it, so that relevance can't pass; "
            "methods by the plain gradient (weighted, gae, rollout, ...) are defined for this model"
        )
