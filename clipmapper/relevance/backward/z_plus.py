"""The z⁺ rule of LRP (see ``lrp.py``) for linear maps, whatever operator they are written with."""

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clipmapper.relevance.backward.rule import (
    Rule,
    kept,
    operator_name,
    tensors,
    variables,
    varies,
    with_tensors,
)

# Sums of z⁺ that are a smaller share of the sum of absolute products are not taken as a difference to it.
_CANCELLED = 0.01
# Of operators that add something to a product: the product alone.
ADDED_FIRST = {
    "addmm": torch.mm,
    "addmv": torch.mv,
    "baddbmm": torch.bmm,
    "addcmul": torch.mul,
    "addr": torch.outer,
}
# Maps that leave a token where it is when a matrix stands behind them.
_TOKENWISE = ("linear", "matmul", "mm", "addmm")


def linear_map(func: Callable, *args, **kwargs) -> Tensor:
    """The z⁺ rule for any operator that multiplies one activation with weights."""
    name, unbiased = operator_name(func), func
    factors, more = args, dict(kwargs)
    if name in ADDED_FIRST:
        factors, unbiased, alpha = args[1:], ADDED_FIRST[name], kwargs.get("alpha", 1)
        more = {}
        if alpha != 1:
            factors = tuple(t if varies(t) else alpha * t for t in factors)
    elif name == "linear" or name.startswith("conv"):
        factors = (*args[:2], None, *args[3:])
        more.pop("bias", None)
    (x,) = variables(factors, more)
    weights = sum(_is_weight(t, x) for t in tensors((*factors, *more.values())))
    if not weights:  # an einsum that sums, or exchanges axes
        return func(*args, **kwargs)

    def sum_of(parts: Mapping[int, Tensor], sign: int) -> Tensor:
        """The sum of the positive (``sign`` −1: negative) products; ``parts``: of x, by their signs.

        Of several weights (in one einsum) a product is positive where an even number of factors is negative.
        """

        def with_parts(of_x: int, *of_weights: int) -> Tensor:
            left = iter(of_weights)

            def changed(value: Tensor) -> Tensor:
                if value is x:
                    return parts[of_x]
                return _part(value.detach(), next(left)) if _is_weight(value, x) else value

            return unbiased(
                *with_tensors(factors, changed), **{k: with_tensors(v, changed) for k, v in more.items()}
            )

        signs = itertools.product((1, -1), repeat=1 + weights)
        return sum(with_parts(*each) for each in signs if math.prod(each) == sign)

    if name in _TOKENWISE and factors[0] is x and factors[1].ndim == 2:
        weight = factors[1].T if name == "linear" else factors[1]
        bias = None
        if name == "linear":
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
        elif name == "addmm":
            bias = kwargs.get("beta", 1) * args[0]
        if bias is None or (bias.ndim < 2 and bias.numel()):  # the same for every token
            return _TokenwiseMap.apply(x, lambda t: func(*args, **kwargs), sum_of, weight, bias)
    return _Map.apply(x, lambda t: func(*args, **kwargs), sum_of)


def _is_weight(t: Tensor, x: Tensor) -> bool:
    return t is not x and t.is_floating_point()


def _part(t: Tensor, sign: int) -> Tensor:
    return t.clamp(min=0) if sign > 0 else t.clamp(max=0)


class _Map(Rule):
    tokenwise = False

    @staticmethod
    def forward(ctx, x, func, sum_of):
        result = func(x)
        ctx.save_for_backward(x, result)
        ctx.sum_of = sum_of
        return result.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx, gradient):
        x, result = kept(ctx)
        return _passed(ctx.sum_of, x, gradient * result, result), None, None


def _passed(sum_of: Callable, x: Tensor, relevance: Tensor, result: Tensor) -> Tensor:
    """R_in / x."""
    passed, missing = _passed_by(sum_of, x, relevance, 1)
    if bool((missing & (result != 0)).any()):
        others, _ = _passed_by(sum_of, x, relevance.masked_fill(~missing, 0), -1)
        passed = passed + others
    return passed


def _passed_by(sum_of: Callable, x: Tensor, relevance: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """R_in / x by the products of x and weights that are positive (``sign`` −1: negative), and where none is.

    Divided by their sums as they are, however small: with the released code's ``safe_divide`` relevance is
    lost where all products but a few tiny ones are negative.
    """
    parts = {of_x: _part(x.detach(), of_x).requires_grad_() for of_x in (1, -1)}
    with torch.enable_grad():
        products = sum_of(parts, sign)
    total = products.detach().abs()
    missing = total < _least(x)
    share = (sign * relevance / total).masked_fill(missing, 0)
    first, second = torch.autograd.grad(products, tuple(parts.values()), share)
    return (x > 0) * first + (x < 0) * second, missing


def _least(x: Tensor) -> float:
    """What is divided by less may be infinite."""
    limits = torch.finfo(x.dtype)
    return limits.tiny / limits.eps


class _TokenwiseMap(_Map):
    """The same of x W (+ bias), W (in, out), by three products instead of four.

    ``x⁺ W⁺ + x⁻ W⁻ = (x W + |x| |W|) / 2``, and x W is there.
    """

    tokenwise = True

    @staticmethod
    def forward(ctx, x, func, sum_of, weight, bias):
        ctx.weights = weight, bias
        return _Map.forward(ctx, x, func, sum_of)

    @staticmethod
    def backward(ctx, gradient):
        x, result = kept(ctx)
        shape, (weight, bias) = x.shape, ctx.weights
        reached = gradient.flatten(0, -2).any(dim=1) if gradient.ndim > 1 else None
        # Behind the last attention only the tokens that are read have any.
        few = reached is not None and 2 * int(reached.sum()) < len(reached)
        if few:
            x, result, gradient = (t.flatten(0, -2)[reached] for t in (x, result, gradient))
        passed = _by_three_products(x, result, gradient * result, weight, bias)
        if passed is None:
            passed = _passed(ctx.sum_of, x, gradient * result, result)
        if few:
            passed = passed.new_zeros(len(reached), shape[-1]).masked_scatter_(reached[:, None], passed)
        return passed.view(shape), None, None, None, None


def _by_three_products(
    x: Tensor, result: Tensor, relevance: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """R_in / x, or None where the sums would be differences of much larger numbers."""
    absolute = weight.abs()
    size = x.abs() @ absolute
    twice = result + size if bias is None else (result - bias).add_(size)
    bound = _least(x) if bias is None else _least(x) + 2 * _CANCELLED * float(bias.abs().max())
    if not bool((torch.sub(twice, size, alpha=2 * _CANCELLED) > bound).all()):
        return None
    share = relevance / twice
    sign = x.sign()  # (0 at 0)
    return (share @ weight.T).mul_(sign).add_(share @ absolute.T).mul_(sign)
