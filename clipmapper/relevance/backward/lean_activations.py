"""Activations whose graph keeps less, with the gradient of autograd to the last bit."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.backward.rule import Rule

_SLOPE = 1.702


class _QuickGELU(Rule):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gate(x).mul_(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            return torch.autograd.grad(x * torch.sigmoid(_SLOPE * x), x, gradient, create_graph=True)[0]
        # The operations of autograd, so that the last bit is the same; in place where a gradient of many y at
        # once (torch.vmap) allows it.
        gate = _gate(x)
        of_gate = torch.ops.aten.sigmoid_backward(gradient * x, gate)
        return of_gate.mul_(_SLOPE).add_(gradient * gate)


def _gate(x: Tensor) -> Tensor:
    return (_SLOPE * x).sigmoid_()


def lean_quick_gelu(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """``x · σ(1.702 x)``, of which the graph keeps x alone."""
    return _QuickGELU.apply(x)
