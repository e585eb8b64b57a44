"""Norms, and division: by what something is divided counts as a constant.

LibraGrad's rule for norms (arXiv 2411.16760, §3) and AttnLRP's (arXiv 2402.05602, §3.3): the standard
deviation is a constant, the mean is not. lxt, AttnLRP's library, has the same for a vector divided by its
length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipmapper.relevance.backward.products import product
from clipmapper.relevance.backward.rule import Rule, kept, scaled_gradient, with_value
from clipmapper.relevance.backward.weights import note_of_weights, of_weights


def layer_norm(
    func: Callable,
    x: Tensor,
    shape,
    weight: Tensor | None = None,
    bias=None,
    eps: float = 1e-5,
    *args,
    **kwargs,
) -> Tensor:
    """``torch.layer_norm(x, shape, weight, bias, eps)``."""
    return _LayerNorm.apply(x, func, shape, weight, bias, eps)


def rms_norm(
    func: Callable, x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``torch.rms_norm(x, shape, weight, eps)``."""
    return _RMSNorm.apply(x, func, shape, weight, eps)


class _LayerNorm(Rule):
    """∂x = (g γ − mean(g γ)) / σ: the mean is differentiated, σ is not."""

    @staticmethod
    def forward(ctx, x, func, shape, weight, bias, eps):
        ctx.axes = tuple(range(-len(shape), 0))
        ctx.save_for_backward((x.var(ctx.axes, unbiased=False, keepdim=True) + eps).rsqrt(), weight)
        return func(x, shape, weight, bias, eps)

    @staticmethod
    def backward(ctx, gradient):
        inverse, weight = kept(ctx)
        if weight is not None:
            gradient = gradient * weight
        return (gradient - gradient.mean(ctx.axes, keepdim=True)) * inverse, None, None, None, None, None


class _RMSNorm(Rule):
    @staticmethod
    def forward(ctx, x, func, shape, weight, eps):
        axes = tuple(range(-len(shape), 0))
        added = torch.finfo(x.dtype).eps if eps is None else eps
        ctx.save_for_backward((x.square().mean(axes, keepdim=True) + added).rsqrt(), weight)
        return func(x, shape, weight, eps)

    @staticmethod
    def backward(ctx, gradient):
        inverse, weight = kept(ctx)
        return (gradient if weight is None else gradient * weight) * inverse, None, None, None, None


def group_norm(
    func: Callable, x: Tensor, groups: int, weight: Tensor | None = None, bias=None, eps: float = 1e-5, *args
) -> Tensor:
    """``torch.group_norm(x [batch, channels, ...], groups, weight, bias, eps)``."""
    parts = x.unflatten(1, (groups, -1)).flatten(2)
    deviation = (parts.var(-1, unbiased=False, keepdim=True) + eps).sqrt().detach()
    composed = ((parts - parts.mean(-1, keepdim=True)) / deviation).view_as(x)
    if weight is not None:
        composed = composed * weight.view(-1, *(1,) * (x.ndim - 2))
    return with_value(composed, lambda: func(x, groups, weight, bias, eps, *args))


def instance_norm(func: Callable, x: Tensor, weight, bias, mean, variance, of_input: bool, *args) -> Tensor:
    """``torch.instance_norm(x [batch, channels, ...], ...)``: a group norm with a group for each channel."""
    given = (weight, bias, mean, variance, of_input, *args)
    if not of_input:  # fixed statistics
        return func(x, *given)
    with torch.no_grad():
        exact = func(x, *given)
    composed = group_norm(torch.group_norm, x, x.shape[1], weight, bias, args[1])
    return with_value(composed, lambda: exact)


def divided(func: Callable, x, by, *args, **kwargs) -> Tensor:
    """x / ``by``: the second is a constant, also of a constant x (a gain divided by a length)."""
    result = func(x, by.detach() if isinstance(by, Tensor) else by, *args, **kwargs)
    if isinstance(x, Tensor) and of_weights(x):
        note_of_weights(result)
    return result


def half_variance(func: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    """A variance is a sum of products, each of which is halved for its two factors."""
    return func(scaled_gradient(x, 0.5), *args, **kwargs)


def cosine_similarity(func: Callable, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The product of two vectors, each divided by its length."""
    units = [x / x.detach().norm(dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2)]
    composed = product(torch.mul, *units).sum(dim)
    return with_value(composed, lambda: func(x1, x2, dim, eps))
