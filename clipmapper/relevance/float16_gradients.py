"""Gradients of a model in float16, which must neither vanish nor overflow on their way back."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node as Function

# The largest number of a gradient is brought to this where it enters the model: 2^8 below what float16 can
# hold, for it may grow on its way back, and 2^32 above the smallest (bfloat16 has float32's range).
_LARGEST = 2.0**8
_ATTEMPTS = 4
_SPREAD = 2.0**6  # samples whose largest gradients differ more than that are scaled apart
_MOST = 2.0**15  # the largest power of two of float16

# Given what every scalar is multiplied by, and how large a gradient may be where it enters the model: the
# gradients, and what they were multiplied by besides.
Run = Callable[[Tensor, float], tuple[list[Tensor | None], float]]


def scaled_gradients(
    run: Run, count: int, device: torch.device, by_sample: Callable[[Tensor], Tensor | None]
) -> tuple[list[Tensor | None], Float[Tensor, "scalars"]]:
    """Gradients, and by what each scalar's are too large.

    ``by_sample``: from a gradient to its largest number for each scalar, None where it does not tell them
    apart. Where gradients are not finite, or the scalars' are of very different size, they are made again.
    """
    scale, largest_at_first = torch.ones(count, device=device, dtype=torch.float32), _LARGEST
    for attempt in range(_ATTEMPTS):
        found, besides = run(scale, largest_at_first)
        tops = [by_sample(g) for g in found if g is not None]
        tops = [top.float() for top in tops if top is not None]
        if not tops or attempt == _ATTEMPTS - 1:
            break
        largest = torch.stack(tops).amax(dim=0)
        if not bool(largest.isfinite().all()):
            largest_at_first *= 2.0**-8
            continue
        reached = largest[largest > 0]
        if not len(reached) or bool(reached.max() / reached.min() <= _SPREAD):
            break
        change = reached.max() / largest.masked_fill(largest == 0, float(reached.max()))
        scale = (scale * 2 ** change.log2().round()).clamp(max=_MOST)
    return found, scale * besides


class Rescued:
    """Rescales a gradient on the part of its way that all of it goes: from y to the first branching.

    There the factors of y are (a probability, a weight of 1e-8), and half precision would lose the gradient
    before it enters the model. Powers of two, so that nothing is rounded; ``factor`` is their product.
    """

    def __init__(self, y: Tensor, recorded: Collection[Function], largest: float) -> None:
        self.factor, self._largest = 1.0, largest
        self._handles = []
        function = y.grad_fn
        while function is not None and function not in recorded:
            self._handles.append(function.register_prehook(self._rescale))
            following = [f for f, _ in function.next_functions if f is not None]
            function = following[0] if len(following) == 1 else None

    def __enter__(self) -> "Rescued":
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _rescale(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        gradient = gradients[0]
        if gradient is None:
            return None
        top = float(gradient.abs().amax())
        if top == 0 or not math.isfinite(top):
            return None
        factor = 2.0 ** round(math.log2(self._largest / top))
        self.factor *= factor
        return (gradient * factor, *gradients[1:])
