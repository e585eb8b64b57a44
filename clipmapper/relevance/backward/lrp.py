"""Layer-wise relevance propagation by the rules of Chefer, Gur, Wolf (CVPR 2021, arXiv 2012.09838).

As gradients: the relevance of a tensor is the tensor times its gradient, R = x ⊙ ∂x, so that autograd's sums
over several readers are LRP's sums of relevance, and views, slices and means need no rule. The rules are
those of the released code (``modules/layers_ours.py``, α = 1):

- linear layers: z⁺, ``R_in = x⁺ (W⁺ᵀ S) + x⁻ (W⁻ᵀ S)``, ``S = R / (W⁺ x⁺ + W⁻ x⁻)``;
- norms and activations: relevance passes as it is;
- products (A V and Q Kᵀ): ``R / z`` times the gradient times the factor, halved for each of the two;
- products of two activations (gated MLPs, which the released code does not have): halved likewise;
- additions of two activations: the same, then both parts scaled so that they share R in the ratio of their
  absolute sums. The sums are taken per sample (the first axis); the released code explains one at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipmapper.relevance.trace import blind_queries

_SMALL = 1e-9  # of the released code's safe_divide


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where b is 0."""
    zero = b == 0
    return torch.where(zero, torch.zeros_like(a), a / (b + _SMALL).masked_fill(zero, 1.0))


def same_relevance(func: Callable, x: Tensor, *args, gate: Callable | None = None, **kwargs) -> Tensor:
    """Norms and activations: R_in = R_out (``gate`` is what other rules want to know of them)."""
    kwargs.pop("inplace", None)
    return _SameRelevance.apply(x, lambda t: func(t, *args, **kwargs))


class _SameRelevance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, func):
        result = func(x)
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        return _divide(gradient * result, x), None


def linear(func: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(x, weight, bias, func)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, func):
        result = func(x, weight, bias)
        ctx.save_for_backward(x, weight, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        x, weight, result = ctx.saved_tensors
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        share = _divide(gradient * result, x.clamp(min=0) @ positive.T + x.clamp(max=0) @ negative.T)
        # R_in / x: x⁺ / x is 1 where x is positive, x⁻ / x where it is negative.
        return (x > 0) * (share @ positive) + (x < 0) * (share @ negative), None, None, None


def add(func: Callable, first, second, *args, **kwargs) -> Tensor:
    """Two activations of one shape (a residual connection); whatever else is added is no business of LRP."""
    both = isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape
    if both and first.requires_grad and second.requires_grad and first.ndim > 2 and not args and not kwargs:
        return _Add.apply(first, second, func)
    return func(first, second, *args, **kwargs)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, func):
        ctx.save_for_backward(first, second)
        return func(first, second)

    @staticmethod
    def backward(ctx, gradient):
        total = [(part * gradient).flatten(1).sum(1) for part in ctx.saved_tensors]
        whole, sizes = total[0] + total[1], total[0].abs() + total[1].abs()
        factors = [_divide(_divide(t.abs(), sizes) * whole, t) for t in total]
        extra = (1,) * (gradient.ndim - 1)
        return gradient * factors[0].view(-1, *extra), gradient * factors[1].view(-1, *extra), None


def attention(
    func: Callable, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more
) -> Tensor:
    """Attention as two products with a softmax between them, which passes relevance as it is."""
    result = func(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **more
    )
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:  # shared by several heads: their relevance adds up, as at any tensor that is read twice
        key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
    return _Attention.apply(query, key, value, result, attn_mask, is_causal, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, result, mask, causal, scale):
        ctx.save_for_backward(query, key, value)
        ctx.options = mask, causal, scale
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        mask, causal, scale = ctx.options
        product = query @ key.mT
        scores = product * (query.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        probabilities = scores.softmax(dim=-1)
        if (blind := blind_queries(mask)) is not None:
            probabilities = probabilities.masked_fill(blind, 0)
        relevance = probabilities * (gradient @ value.mT) / 2
        share = _divide(relevance, product) / 2
        return share @ key, share.mT @ query, probabilities.mT @ gradient / 2, None, None, None, None
