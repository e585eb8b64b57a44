"""Functions of one number: an activation is a number times its gate, and the gate counts as a constant.

That is LibraGrad's rule for gated activations (arXiv 2411.16760, §3), and the identity rule of LRP for
functions of one variable (Achtibat et al. 2024, arXiv 2402.05602, §3.3): x · ∂x = f(x) · ∂f. It is the same
for any function f, by the gate f(x) / x.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clipmapper.relevance.backward.rule import Rule, kept, variables


def quick_gelu_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * x)


def new_gelu_gate(x: Tensor) -> Tensor:
    """Return the gate of GELU's approximation by tanh (GPT-2)."""
    return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_gate(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 2**-0.5))


def _silu_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


_GELU_GATES = {"none": gelu_gate, "tanh": new_gelu_gate}

# Operators of torch that are functions of one number, whatever else (slopes, bounds) they are told.
ELEMENTWISE = {
    "abs", "absolute", "acos", "acosh", "asin", "asinh", "atan", "atanh", "arccos", "arccosh", "arcsin",
    "arcsinh", "arctan", "arctanh", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "cosh", "elu",
    "erf", "erfc", "exp", "exp2", "expm1", "fix", "frac", "gelu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "log", "log10", "log1p", "log2", "log_sigmoid", "logit", "mish", "pow",
    "float_power", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "sin", "sinc", "sinh",
    "softplus", "softshrink", "special_erf", "special_erfc", "special_expit", "special_exp2",
    "special_expm1", "special_log1p", "special_sinc", "sqrt", "square", "tan", "tanh", "threshold",
}  # fmt: skip


def elementwise(func: Callable, *args, gate: Callable | None = None, **kwargs) -> Tensor:
    """``func`` of one tensor, the gradient at which is its own times f(x) / x, or times its ``gate``."""
    kwargs.pop("inplace", None)
    name = getattr(func, "__name__", "")
    (x,) = variables(args, kwargs)
    if gate is None and x is args[0]:
        gate = _silu_gate if name == "silu" else None
        if name == "gelu":
            gate = _GELU_GATES[kwargs.get("approximate", "none")]
    if gate is not None:
        return Gated.apply(x, lambda t: func(t, *args[1:], **kwargs), gate)
    return named(_OwnGate.apply(x, of_one_tensor(func, x, args, kwargs)), name, x, args)


def named(result: Tensor, name: str, x: Tensor, args: Sequence) -> Tensor:
    """The result, whose node in the graph says which operator of x it stands for: where x is not the first of
    its arguments, as in the power of a number, it is an exponential."""
    if result.grad_fn is not None:
        result.grad_fn.operator = name if args and x is args[0] else "exp"
    return result


def of_one_tensor(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> Callable[[Tensor], Tensor]:
    """The operator with its other arguments, as a function of x alone."""

    def of_one(t: Tensor) -> Tensor:
        return func(*(t if a is x else a for a in args), **{k: t if v is x else v for k, v in kwargs.items()})

    return of_one


class Gated(Rule):
    of_one_number = True

    @staticmethod
    def forward(ctx, x, func, gate):
        ctx.save_for_backward(x)
        ctx.gate = gate
        return func(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = kept(ctx)
        return gradient * ctx.gate(x), None, None


class _OwnGate(Rule):
    """With the gate f(x) / x. At 0 it is the limit where f(0) is 0; otherwise a number of 0 has no relevance
    that its gradient could say, and the gate is 0."""

    of_one_number = True

    @staticmethod
    def forward(ctx, x, func):
        result = func(x)
        ctx.save_for_backward(x, result)
        ctx.func = func
        return result

    @staticmethod
    def backward(ctx, gradient):
        x, result = kept(ctx)
        zero = x == 0
        gate = result / x.masked_fill(zero, 1.0)
        if bool(zero.any()):
            near = torch.finfo(x.dtype).eps ** 0.5
            limit = ctx.func(torch.full_like(x, near)) / near
            gate = torch.where(zero, torch.where(result == 0, limit, torch.zeros_like(limit)), gate)
        return gradient * gate, None


def divides(name: str, args: Sequence, kwargs: Mapping) -> bool:
    """Whether an operator is 1 / x or 1 / √x, or a power like them."""
    if name not in ("pow", "float_power"):
        return name in ("reciprocal", "rsqrt")
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, int | float) and exponent < 0


def constant(func: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    """1 / x and 1 / √x: by what something is divided (the size of a vector) counts as a constant."""
    return func(x.detach(), *args, **kwargs)
