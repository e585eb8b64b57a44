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

from clipmapper.relevance.backward.rule import (
    Rule,
    kind_of,
    operator_name,
    tensors,
    variables,
    varies,
    with_tensors,
)
from clipmapper.relevance.trace import blind_queries

_SMALL = 1e-9  # of the released code's safe_divide
# Sums of z⁺ that are a smaller share of the sum of absolute products are not taken as a difference to it.
_CANCELLED = 0.01
_PRECISE = 1e-6  # of float32 and better; nor are those of coarser numbers


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where b is 0."""
    divisor = b + _SMALL
    divisor.masked_fill_(divisor == 0, _SMALL).masked_fill_(b == 0, float("inf"))
    return a / divisor


def same_relevance(func: Callable, x: Tensor, *args, gate: Callable | None = None, **kwargs) -> Tensor:
    """Norms, activations and softmax: R_in = R_out (``gate`` is what other rules want to know of them)."""
    kwargs.pop("inplace", None)
    return _SameRelevance.apply(x, lambda t: func(t, *args, **kwargs))


class _SameRelevance(Rule):
    @staticmethod
    def forward(ctx, x, func):
        result = func(x)
        ctx.save_for_backward(x, result)
        return result.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        return _divide(gradient * result, x), None


# Of operators that add a bias to a linear map: the same map without it.
_ADDED_FIRST = {"addmm": torch.mm, "addmv": torch.mv, "baddbmm": torch.bmm}
# Products number by number pass relevance as it is.
_SCALES = ("mul", "addcmul")
# Maps that leave a token where it is when a matrix stands behind them.
_TOKENWISE = ("linear", "matmul", "mm", "addmm")


def linear_map(func: Callable, *args, **kwargs) -> Tensor:
    """The z⁺ rule for any operator that multiplies one activation with weights."""
    name, unbiased = operator_name(func), func
    factors, more = args, dict(kwargs)
    if name in _ADDED_FIRST:
        factors, unbiased = args[1:], _ADDED_FIRST[name]
        more = {key: value for key, value in kwargs.items() if key not in ("beta", "alpha", "out_dtype")}
    elif name == "linear" or name.startswith("conv"):
        factors = (*args[:2], None, *args[3:])
        more.pop("bias", None)
    (x,) = variables(factors, more)

    def with_part(t: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The map of t, of whose weights only the positive or the negative part is there."""

        def changed(value: Tensor) -> Tensor:
            return t if value is x else part(value) if value.is_floating_point() else value

        return unbiased(
            *with_tensors(factors, changed), **{k: with_tensors(v, changed) for k, v in more.items()}
        )

    if name in _TOKENWISE and factors[0] is x and factors[1].ndim == 2:
        weight = factors[1].T if name == "linear" else factors[1]
        bias = None
        if name == "linear":
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
        elif name == "addmm":
            bias, weight = kwargs.get("beta", 1) * args[0], kwargs.get("alpha", 1) * weight
        return _TokenwiseMap.apply(x, lambda t: func(*args, **kwargs), with_part, weight, bias)
    return _Map.apply(x, lambda t: func(*args, **kwargs), with_part)


class _Map(Rule):
    tokenwise = False

    @staticmethod
    def forward(ctx, x, func, with_part):
        result = func(x)
        ctx.save_for_backward(x, result)
        ctx.with_part = with_part
        return result.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        return _passed(ctx.with_part, x, gradient * result, result), None, None


def _passed(with_part: Callable, x: Tensor, relevance: Tensor, result: Tensor) -> Tensor:
    """R_in / x."""
    passed, missing = _passed_by(with_part, x, relevance, 1)
    if bool((missing & (result != 0)).any()):
        others, _ = _passed_by(with_part, x, relevance.masked_fill(~missing, 0), -1)
        passed = passed + others
    return passed


def _passed_by(with_part: Callable, x: Tensor, relevance: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """R_in / x by the products of x and weights that are positive (``sign`` −1: negative), and where none is.

    Divided by their sums as they are, however small: with the released code's ``safe_divide`` relevance is
    lost where all products but a few tiny ones are negative.
    """
    parts = [x.detach().clamp(min=0).requires_grad_(), x.detach().clamp(max=0).requires_grad_()]
    bounds = ({"min": 0}, {"max": 0})[::sign]
    with torch.enable_grad():
        sums = [
            with_part(part, lambda weight, bound=bound: weight.detach().clamp(**bound))
            for part, bound in zip(parts, bounds, strict=True)
        ]
    total = (sums[0] + sums[1]).detach().abs()
    limits = torch.finfo(x.dtype)
    missing = total < limits.tiny / limits.eps  # (what is divided by less may be infinite)
    share = (sign * relevance / total).masked_fill(missing, 0)
    first, second = torch.autograd.grad(sums, parts, (share, share))
    return (x > 0) * first + (x < 0) * second, missing


class _TokenwiseMap(_Map):
    """The same of x W (+ bias), W (in, out), by three products instead of four.

    ``x⁺ W⁺ + x⁻ W⁻ = (x W + |x| |W|) / 2``, and x W is there.
    """

    tokenwise = True

    @staticmethod
    def forward(ctx, x, func, with_part, weight, bias):
        ctx.weights = weight, bias
        return _Map.forward(ctx, x, func, with_part)

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        shape, (weight, bias) = x.shape, ctx.weights
        reached = gradient.flatten(0, -2).any(dim=1) if gradient.ndim > 1 else None
        # Behind the last attention only the tokens that are read have any.
        few = reached is not None and 2 * int(reached.sum()) < len(reached)
        if few:
            x, result, gradient = (t.flatten(0, -2)[reached] for t in (x, result, gradient))
        passed = _by_three_products(x, result, gradient * result, weight, bias)
        if passed is None:
            passed = _passed(ctx.with_part, x, gradient * result, result)
        if few:
            passed = passed.new_zeros(len(reached), shape[-1]).masked_scatter_(reached[:, None], passed)
        return passed.view(shape), None, None, None, None


def _by_three_products(
    x: Tensor, result: Tensor, relevance: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """R_in / x, or None where the sums would be differences of much larger numbers."""
    if torch.finfo(x.dtype).eps > _PRECISE:
        return None
    absolute = weight.abs()
    size = x.abs() @ absolute
    twice = result + size if bias is None else (result - bias).add_(size)
    bound = 0 if bias is None else 2 * _CANCELLED * float(bias.abs().max())
    if not bool((torch.sub(twice, size, alpha=2 * _CANCELLED) > bound).all()):
        return None
    share = relevance / twice
    sign = x.sign()  # (0 at 0)
    return (share @ weight.T).mul_(sign).add_(share @ absolute.T).mul_(sign)


def multiplied(product: Callable) -> Callable:
    """z⁺ where weights multiply one activation, ``product`` where two activations are multiplied."""

    def rule(func: Callable, *args, **kwargs) -> Tensor:
        found = variables(args, kwargs)
        name = operator_name(func)
        if len(found) != 1 or name in _SCALES or sum(t is found[0] for t in tensors(args)) > 1:
            return product(func, *args, **kwargs)
        return linear_map(func, *args, **kwargs)

    return rule


def add(func: Callable, first, second, *args, **kwargs) -> Tensor:
    """Two activations of one shape (a residual connection); whatever else is added is no business of LRP."""
    if _are_residual(first, second) and not args and not kwargs:
        return Add.apply(first, second, func)
    return func(first, second, *args, **kwargs)


def subtract(func: Callable, first, second, *args, **kwargs) -> Tensor:
    """A vector less its mean (a norm that is written out) passes relevance as it is; else as :func:`add`."""
    if not args and not kwargs:
        if _is_mean_of(second, first):
            return same_relevance(lambda t: func(t, second.detach()), first)
        if _are_residual(first, second):
            return Add.apply(first, -second, lambda a, b: func(a, -b))
    return func(first, second, *args, **kwargs)


def _are_residual(first: object, second: object) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.shape == second.shape and first.ndim > 2 and varies(first) and varies(second)


def _is_mean_of(mean: object, x: object) -> bool:
    if not (isinstance(mean, Tensor) and isinstance(x, Tensor) and varies(x)):
        return False
    made = mean.grad_fn
    if made is None or kind_of(made) != "Mean":
        return False
    edge = torch.autograd.graph.get_gradient_edge(x)
    return made.next_functions[0] == (edge.node, edge.output_nr) and mean.ndim == x.ndim


class Add(Rule):
    """``sample_axis`` of its node in the graph: the axis of both tensors on which the samples are."""

    @staticmethod
    def forward(ctx, first, second, func):
        ctx.save_for_backward(first, second)
        ctx.sample_axis = 0
        return func(first, second)

    @staticmethod
    def backward(ctx, gradient):
        axes = [axis for axis in range(gradient.ndim) if axis != ctx.sample_axis]
        total = [(part * gradient).sum(axes, keepdim=True) for part in ctx.saved_tensors]
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
    groups = query.shape[-3] // key.shape[-3]
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
