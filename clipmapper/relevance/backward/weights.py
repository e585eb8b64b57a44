"""Tensors that are weights: parameters, their views, and what a model computes from weights alone.

``F.normalize(weight)``, ``logit_scale.exp()``, the weight of ``weight_norm`` or of LoRA merged on the fly: a
model multiplies its activations by them, and a map must not depend on whether the model may still be trained.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

_NOTE = "_clipmapper_of_weights"
_MAPS = ("linear", "conv1d", "conv2d", "conv3d", "bilinear")
_LOOKS_UP = ("embedding", "embedding_bag", "__getitem__", "index_select", "gather", "take")
_JOINS = ("cat", "concat", "concatenate", "stack", "vstack", "hstack")


def of_weights(x: Tensor) -> bool:
    """Whether x is a parameter, was noted to be computed from parameters alone, or is a view of one."""
    return _is_weight(x) or (x._base is not None and _is_weight(x._base))


def note_of_weights(x: Tensor) -> None:
    """Note that x, in whose graph there are no activations, is of weights."""
    setattr(x, _NOTE, True)


def note_weights(made: Iterable[Tensor], name: str, given: Sequence[Tensor]) -> None:
    """Note that what operator ``name`` has ``made`` is of weights, where all that it was ``given`` is.

    Beside weights it may have been given what does not vary: vectors (those of ``spectral_norm``), and
    whatever leaves the shape of a weight as it is (a mask, an identity), or is joined to one. But the input
    of a linear map or a convolution that does not vary may be pixels, a row of tokens may have positions
    added to it, and integers may name words: what is made of weights and of those is an activation.
    """
    weights = [x for x in given if of_weights(x)]
    if not weights or name in _LOOKS_UP:
        return
    shapes = {x.shape for x in weights if x.ndim > 1}
    for value in made:
        joined = name in _JOINS and value.ndim < 3
        as_they_are = joined or (name not in _MAPS and value.shape in shapes and not _is_one_row(value))
        if all(x is value or of_weights(x) or _is_constant(x, as_they_are) for x in given):
            note_of_weights(value)


def note_activation(x: Tensor) -> None:
    """Note that x is of weights no more: something was written into it."""
    for changed in (x, x._base):
        if changed is not None and getattr(changed, _NOTE, False):
            setattr(changed, _NOTE, False)


def _is_weight(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or getattr(x, _NOTE, False)


def _is_constant(x: Tensor, as_they_are: bool) -> bool:
    return not x.requires_grad and (as_they_are or (x.is_floating_point() and x.ndim < 2))


def _is_one_row(x: Tensor) -> bool:
    """Whether x has the shape of the tokens of one sample."""
    return x.ndim == 3 and len(x) == 1
