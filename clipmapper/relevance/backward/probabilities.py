"""Which factor of a product is an attention probability, by the graph that it comes from."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.autograd.graph import Node

from clipmapper.relevance.backward.rule import MATRIX_PRODUCTS, ScaledGradient, kind_of

_LINEAR_MAPS = MATRIX_PRODUCTS | {"Convolution"}
_NORMS = {"NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "Rms_norm"}
# What leaves weights being weights. (What is looked up in them may be a token.)
_VIEWS = {
    "T", "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Expand", "Unsqueeze", "Squeeze",
    "Slice", "Select", "Split", "Unbind", "Clone", "ToCopy", "Alias", "Mul", "Div", "Neg",
}  # fmt: skip
_NODES = 64
_WEIGHT = -1


def weighing(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors of a product that are made of softmaxes alone: LibraGrad's constants.

    A softmax that is masked, scaled, mixed over heads, or subtracted from another is as constant as the
    softmax is. Where several factors are, it is those with the fewest matrix products behind the softmax: the
    values of attention may themselves be made of the probabilities of an earlier one.
    """
    found = [(t, _distance(t.grad_fn, [_NODES])) for t in factors]
    nearest = min((d for _, d in found if d is not None and d >= 0), default=None)
    return [t for t, d in found if d is not None and d == nearest]


def _distance(node: Node | None, left: list[int]) -> int | None:
    """The matrix products between a node and softmaxes, ``_WEIGHT`` of a weight, None of an activation."""
    left[0] -= 1
    if node is None or left[0] < 0:
        return None
    kind = kind_of(node)
    if kind == "Softmax":
        return 0
    if kind == "AccumulateGrad":
        return _WEIGHT if isinstance(node.variable, nn.Parameter) else None
    made = getattr(node, "_forward_cls", None)
    if (
        made is not None
        and made is not ScaledGradient
        and not getattr(node, "of_one_number", made.of_one_number)
    ):
        return None
    if kind in _NORMS or kind.startswith("Embedding"):
        return None
    further = [following for following, _ in node.next_functions]
    if kind == "CopyBackwards":  # what was done in place: the last is what was copied
        further = further[-1:]
    varying = [following for following in further if following is not None]
    if not varying:
        return None
    distances = []
    for following in varying:
        distance = _distance(following, left)
        if distance is None:
            return None
        distances.append(distance)
    farthest = max(distances)
    if farthest == _WEIGHT:
        return _WEIGHT if kind in _VIEWS and len(varying) == len(further) else None
    return farthest + (kind in _LINEAR_MAPS and sum(d >= 0 for d in distances) == 1)
