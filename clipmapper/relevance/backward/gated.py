"""Backward rules of operators of the form ``x · gate(x)``: the gate counts as a constant.

The forward is the operator itself, so its values do not change in the last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gated(func: Callable, x: Tensor, *args, gate: Callable | None = None, **kwargs) -> Tensor:
    """GELU, SiLU (recognised by the operator's name), or any ``func`` with its ``gate``."""
    kwargs.pop("inplace", None)
    if gate is None:
        gate = _silu_gate if func.__name__ == "silu" else _GELU_GATES[kwargs.get("approximate", "none")]
    return _Gated.apply(x, lambda t: func(t, *args, **kwargs), gate)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, func, gate):
        ctx.save_for_backward(x)
        ctx.gate = gate
        return func(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * ctx.gate(x), None, None


def quick_gelu_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * x)


def new_gelu_gate(x: Tensor) -> Tensor:
    """Return the gate of GELU's approximation by tanh (GPT-2)."""
    return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _gelu_gate(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 2**-0.5))


def _silu_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


_GELU_GATES = {"none": _gelu_gate, "tanh": new_gelu_gate}


def detached_norm(
    func: Callable,
    x: Tensor,
    shape,
    weight: Tensor | None = None,
    bias_or_eps=None,
    eps: float | None = None,
    *args,
    **kwargs,
) -> Tensor:
    """``torch.layer_norm(x, shape, weight, bias, eps)`` or ``torch.rms_norm(x, shape, weight, eps)``."""
    if func.__name__ == "layer_norm":
        return _DetachedLayerNorm.apply(x, func, shape, weight, bias_or_eps, 1e-5 if eps is None else eps)
    return _DetachedRMSNorm.apply(x, func, shape, weight, bias_or_eps)


class _DetachedLayerNorm(torch.autograd.Function):
    """∂x = (g γ − mean(g γ)) / σ: the mean is differentiated, σ is not."""

    @staticmethod
    def forward(ctx, x, func, shape, weight, bias, eps):
        ctx.axes = tuple(range(-len(shape), 0))
        ctx.save_for_backward((x.var(ctx.axes, unbiased=False, keepdim=True) + eps).rsqrt(), weight)
        return func(x, shape, weight, bias, eps)

    @staticmethod
    def backward(ctx, gradient):
        inverse, weight = ctx.saved_tensors
        if weight is not None:
            gradient = gradient * weight
        return (gradient - gradient.mean(ctx.axes, keepdim=True)) * inverse, None, None, None, None, None


class _DetachedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, func, shape, weight, eps):
        axes = tuple(range(-len(shape), 0))
        added = torch.finfo(x.dtype).eps if eps is None else eps
        ctx.save_for_backward((x.square().mean(axes, keepdim=True) + added).rsqrt(), weight)
        return func(x, shape, weight, eps)

    @staticmethod
    def backward(ctx, gradient):
        inverse, weight = ctx.saved_tensors
        return (gradient if weight is None else gradient * weight) * inverse, None, None, None, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by ``factor`` on its way back."""
    return _ScaledGradient.apply(x, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None
