"""Layer-wise relevance propagation by the rules of Chefer, Gur, Wolf (CVPR 2021, arXiv 2012.09838).

As gradients: the relevance of a tensor is the tensor times its gradient, R = x ⊙ ∂x, so that autograd's sums
over several readers are LRP's sums of relevance, and views, slices and means need no rule. The rules are
those of the released code (``modules/layers_ours.py``, α = 1):

- linear maps, whatever operator they are written with: z⁺, ``R_in = x⁺ (W⁺ᵀ S) + x⁻ (W⁻ᵀ S)``,
  ``S = R / (W⁺ x⁺ + W⁻ x⁻)``. Where that sum is 0, since every product is negative, the products that there
  are share R; the released code loses it there, and part of it where the sum is of the size of 1e-9;
- norms, activations and softmax: relevance passes as it is;
- products (A V and Q Kᵀ): ``R / z`` times the gradient times the factor, halved for each of the two;
- products of two activations (gated MLPs, which the released code does not have): halved likewise;
- additions of two activations: the same, then both parts scaled so that they share R in the ratio of their
  absolute sums. The sums are taken per sample; the released code explains one at a time. The samples are on
  the first axis, or where the recorder knows of tokens on the first axis, on the second.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipmapper.relevance.backward.elementwise import ELEMENTWISE, named, of_one_tensor
from clipmapper.relevance.backward.products import product
from clipmapper.relevance.backward.rule import (
    Rule,
    kept,
    kind_of,
    operator_name,
    tensors,
    variables,
    varies,
    with_value,
)
from clipmapper.relevance.backward.unknown import refused
from clipmapper.relevance.backward.z_plus import ADDED_FIRST, linear_map
from clipmapper.relevance.trace import blind_queries

_SMALL = 1e-9  # of the released code's safe_divide


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where b is 0."""
    divisor = b + _SMALL
    divisor.masked_fill_(divisor == 0, _SMALL).masked_fill_(b == 0, float("inf"))
    return a / divisor


def same_relevance(func: Callable, *args, gate: Callable | None = None, **kwargs) -> Tensor:
    """Norms, activations and softmax: R_in = R_out (``gate`` is what other rules want to know of them)."""
    kwargs.pop("inplace", None)
    of_one = gate is not None or operator_name(func) in ELEMENTWISE
    x = variables(args, kwargs)[0]  # (in 2 ** x behind a number)
    result = _SameRelevance.apply(x, of_one_tensor(func, x, args, kwargs), of_one)
    return named(result, operator_name(func), x, args)


class _SameRelevance(Rule):
    @staticmethod
    def forward(ctx, x, func, of_one):
        result = func(x)
        ctx.of_one_number = of_one
        ctx.save_for_backward(x, result)
        return result.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx, gradient):
        x, result = kept(ctx)
        return _divide(gradient * result, x), None, None


# Products number by number pass relevance as it is.
_SCALES = ("mul", "addcmul")


def multiplied(product: Callable) -> Callable:
    """z⁺ where weights multiply one activation, ``product`` where two activations are multiplied."""

    def rule(func: Callable, *args, **kwargs) -> Tensor:
        found = variables(args, kwargs)
        name = operator_name(func)
        if name == "addbmm" or (name in ADDED_FIRST and varies(args[0])):
            return _product_and_sum(rule, func, name, *args, **kwargs)
        if len(found) != 1 or name in _SCALES or sum(t is found[0] for t in tensors(args)) > 1:
            if name == "einsum" and any(t.is_floating_point() and not varies(t) for t in tensors(args)):
                return refused(func(*args, **kwargs), "an einsum of several activations and weights", "lrp")
            return product(func, *args, **kwargs)
        return linear_map(func, *args, **kwargs)

    return rule


def _product_and_sum(
    rule: Callable, func: Callable, name: str, added: Tensor, *factors: Tensor, beta=1, alpha=1, value=1
) -> Tensor:
    """An operator that adds something to a product, as the two operators that it is."""
    scale = alpha * value
    weighed = any(not varies(t) for t in factors)  # z⁺ heeds the sign of weights times scale
    given = [scale * t if weighed and not varies(t) else t for t in factors] if scale != 1 else factors
    second = rule(ADDED_FIRST.get(name, torch.bmm), *given)
    if name == "addbmm":
        second = second.sum(0)
    if scale != 1 and not weighed:
        second = second * scale
    first = added if beta == 1 else added * beta
    scales = {"value": value} if name == "addcmul" else {"beta": beta, "alpha": alpha}

    def exact(*_: Tensor) -> Tensor:
        return func(added, *factors, **scales)

    return (
        Add.apply(first, second, exact) if _are_residual(first, second) else with_value(first + second, exact)
    )


def add(func: Callable, first, second, *, alpha=1) -> Tensor:
    """Two activations of one shape (a residual connection); whatever else is added is no business of LRP."""
    more = {} if alpha == 1 else {"alpha": alpha}
    if _are_residual(first, second):
        scaled = second * alpha if more else second
        return Add.apply(first, scaled, lambda a, b: func(first, second, **more))
    return func(first, second, **more)


def subtract(func: Callable, first, second, *, alpha=1) -> Tensor:
    """A vector less its mean (a norm that is written out) passes relevance as it is; else as :func:`add`."""
    more = {} if alpha == 1 else {"alpha": alpha}
    if not more and _is_mean_of(second, first):
        return same_relevance(lambda t: func(t, second.detach()), first)
    if _are_residual(first, second):
        return Add.apply(first, -alpha * second, lambda a, b: func(first, second, **more))
    return func(first, second, **more)


def _are_residual(first: object, second: object) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.shape == second.shape and first.ndim > 2 and varies(first) and varies(second)


def _is_mean_of(mean: object, x: object) -> bool:
    """Whether the one is the other's mean: ``x.mean(-1)[..., None]``, ``x.sum(-1, keepdim=True) / width``."""
    if not (isinstance(mean, Tensor) and isinstance(x, Tensor) and varies(x)):
        return False
    if mean.ndim != x.ndim or mean.shape == x.shape:
        return False
    made, edge = mean.grad_fn, torch.autograd.graph.get_gradient_edge(x)
    divided = False
    while made is not None and made.next_functions:
        kind = kind_of(made)
        if kind == "Mean" or (kind == "Sum" and divided):
            return made.next_functions[0] == (edge.node, edge.output_nr)
        if kind not in _AROUND_A_SUM:
            return False
        divided |= kind in ("Div", "Mul")
        made = made.next_functions[0][0]
    return False


_AROUND_A_SUM = {"Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Div", "Mul"}


def reversed_subtract(func: Callable, first, second, *, alpha=1) -> Tensor:
    """``torch.rsub(first, second)``: the second less the first."""
    return subtract(torch.sub, second, first, alpha=alpha)


class Add(Rule):
    """``sample_axis`` of its node in the graph: the axis of both tensors on which the samples are."""

    of_one_number = True

    @staticmethod
    def forward(ctx, first, second, func):
        ctx.save_for_backward(first, second)
        ctx.sample_axis = 0
        return func(first, second)

    @staticmethod
    def backward(ctx, gradient):
        axes = [axis for axis in range(gradient.ndim) if axis != ctx.sample_axis]
        total = [(part * gradient).sum(axes, keepdim=True) for part in kept(ctx)]
        whole, sizes = total[0] + total[1], total[0].abs() + total[1].abs()
        factors = [_divide(_divide(t.abs(), sizes) * whole, t) for t in total]
        return gradient * factors[0], gradient * factors[1], None


def attention(
    func: Callable, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more
) -> Tensor:
    """Attention as two products with a softmax between them, which passes relevance as it is."""
    result = func(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **more
    )
    all_vary = varies(query) and varies(key) and varies(value)
    # Learned queries, a bias made of activations: the products, and the addition, have rules.
    if not all_vary or (attn_mask is not None and varies(attn_mask)):
        return _written_out(query, key, value, result, attn_mask, is_causal, scale)
    groups = query.shape[-3] // key.shape[-3] if query.ndim > 2 else 1
    if groups > 1:  # shared by several heads: their relevance adds up, as at any tensor that is read twice
        key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
    return _Attention.apply(query, key, value, result, attn_mask, is_causal, scale)


class _Attention(Rule):
    @staticmethod
    def forward(ctx, query, key, value, result, mask, causal, scale):
        ctx.save_for_backward(query, key, value)
        ctx.options = mask, causal, scale
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = kept(ctx)
        mask, causal, scale = ctx.options
        product = query @ key.mT
        scores = product * (query.shape[-1] ** -0.5 if scale is None else scale)
        probabilities = _masked(scores, mask, causal).softmax(dim=-1)
        if (blind := blind_queries(mask)) is not None:
            probabilities = probabilities.masked_fill(blind, 0)
        relevance = probabilities * (gradient @ value.mT) / 2
        share = _divide(relevance, product) / 2
        return share @ key, share.mT @ query, probabilities.mT @ gradient / 2, None, None, None, None


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if mask is not None:
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, float("-inf"))
        return add(torch.add, scores, mask)
    return scores


def _written_out(query, key, value, result: Tensor, mask, causal: bool, scale: float | None) -> Tensor:
    groups = query.shape[-3] // key.shape[-3] if query.ndim > 2 else 1
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
    multiply = multiplied(product)
    scores = multiply(torch.matmul, query, key.mT)
    scores = _masked(scores * (query.shape[-1] ** -0.5 if scale is None else scale), mask, causal)
    probabilities = same_relevance(torch.softmax, scores, -1) if varies(scores) else scores.softmax(-1)
    if (blind := blind_queries(mask)) is not None:
        probabilities = probabilities.masked_fill(blind, 0)
    return with_value(multiply(torch.matmul, probabilities, value), lambda: result)
