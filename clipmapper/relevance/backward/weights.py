"""Tensors that are weights: parameters, their views, and what a model computes from weights alone.

``F.normalize(weight)``, ``logit_scale.exp()``, the weight of ``weight_norm`` or of LoRA merged on the fly: a
model multiplies its activations by them, and a map must not depend on whether the model may still be trained.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_NOTE = "_clipmapper_of_weights"
_SCALED = ("mul", "div")  # by a mask of pruning, say


def of_weights(x: Tensor) -> bool:
    """Whether x is a parameter, was noted to be computed from parameters alone, or is a view of one."""
    return _is_weight(x) or (x._base is not None and _is_weight(x._base))


def note_weights(result: Any, name: str, given: Sequence[Tensor]) -> None:
    """Note that the result of operator ``name`` is of weights, where all that it was ``given`` is.

    Beside weights it may have been given vectors that do not vary (those of ``spectral_norm``), and
    been multiplied by what does not change its shape. A matrix that does not vary may hold tokens, and
    integers may name them: what is looked up in weights (an embedding) is an activation.
    """
    weights = [x for x in given if of_weights(x)]
    if not weights:
        return
    shapes = {x.shape for x in weights if x.ndim > 1}
    for value in result if isinstance(result, list | tuple) else (result,):
        if not isinstance(value, Tensor):
            continue
        same = name in _SCALED and value.shape in shapes
        if all(x is value or of_weights(x) or _is_constant(x, same) for x in given):
            setattr(value, _NOTE, True)


def note_activation(x: Tensor) -> None:
    """Note that x is of weights no more: something was written into it."""
    for changed in (x, x._base):
        if changed is not None and getattr(changed, _NOTE, False):
            setattr(changed, _NOTE, False)


def _is_weight(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or getattr(x, _NOTE, False)


def _is_constant(x: Tensor, scaled: bool) -> bool:
    return not x.requires_grad and x.is_floating_point() and (x.ndim < 2 or scaled)
