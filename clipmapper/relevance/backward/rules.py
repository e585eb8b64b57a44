"""Other rules for the backward pass, while the forward gives exactly the same values.

``with backward_rules("libra"): y = model(x)`` – the graph that is recorded inside holds the rules, so the
backward may run outside. The model is not changed: calls of torch's operators are intercepted, and the few
activations that a library writes as a product have their class's ``forward`` replaced until the block ends.

==========  ==========================  ===================  =====================  ==================
rules       attention                   norms                activations            linear layers
==========  ==========================  ===================  =====================  ==================
libra       A detached                  σ detached           gate detached          plain
attn_lrp    v ½, q and k ¼ of plain     σ detached           gate detached          plain
lrp         relevance halved at A V     relevance as it is   relevance as it is     z⁺ rule
            and again at Q Kᵀ
==========  ==========================  ===================  =====================  ==================

``plain``: the gradient, of a graph that keeps less (:mod:`clipmapper.relevance.backward.rules`).
``lrp`` and ``attn_lrp`` propagate *relevance*: a tensor's relevance is the tensor times its gradient. Both
halve where two factors meet, at products of two activations as well (gated MLPs).
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipmapper.errors import UserError
from clipmapper.relevance.backward import lrp as lrp_rules


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


RULES = ("plain", "libra", "attn_lrp", "lrp")

# Activations that are written out as x · gate(x), which no single operator shows. By name, so that no library
# is imported that the model at hand does not use.
COMPOSED: Mapping[str, Callable] = {
    "clipmapper.models.mapper_blocks.QuickGELU": quick_gelu_gate,
    "open_clip.transformer.QuickGELU": quick_gelu_gate,
    "transformers.activations.QuickGELUActivation": quick_gelu_gate,
    "transformers.activations.NewGELUActivation": new_gelu_gate,
}


def _composed_activations() -> Iterator[tuple[type[nn.Module], Callable]]:
    for name, gate in COMPOSED.items():
        module, _, kind = name.rpartition(".")
        if module in sys.modules:
            yield getattr(sys.modules[module], kind), gate


@contextmanager
def backward_rules(rules: str) -> Iterator[None]:
    """Differentiate what is computed inside by these rules (one of ``RULES``).

    ``libra``: LibraGrad (Mehri et al., CVPR 2025, arXiv 2411.16760): attention probabilities, the standard
    deviation of norms and the gate of GELU, SiLU and QuickGELU count as constants. Products of a gated MLP
    (SwiGLU) are left as they are.
    ``attn_lrp``: Achtibat et al. 2024 (arXiv 2402.05602) in the form gradient × input, where its rules for
    softmax (Taylor expansion) and linear layers (ε → 0) are those of the plain gradient.
    ``lrp``: the rules of Chefer, Gur, Wolf 2021 (arXiv 2012.09838), see ``lrp.py``.

    Everything is restored on leaving, also after an exception. Raises ``ValueError`` for an unknown name, and
    ``UserError`` for ``lrp`` under autocast: it divides by sums that half precision rounds to 0.
    """
    if rules not in RULES:
        raise ValueError(f"rules={rules!r}: must be one of {', '.join(RULES)}")
    if rules == "lrp" and any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps"))):
        raise UserError("rules='lrp' is not defined under autocast; record outside of it, in float32")
    if rules == "plain":
        with ExitStack() as stack:
            for kind, gate in _composed_activations():
                if gate is quick_gelu_gate:
                    _replace(stack, kind, "forward", lambda self, x: lean_quick_gelu(x))
            yield
        return
    table = {"libra": _LIBRA, "attn_lrp": _ATTN_LRP, "lrp": _LRP}[rules]
    activation = lrp_rules.same_relevance if rules == "lrp" else gated
    with ExitStack() as stack:
        for kind, gate in _composed_activations():
            _replace(stack, kind, "forward", _composed(activation, kind.forward, gate))
        # Functions of torch.nn.functional hand themselves to the mode whole; with this they run, and the
        # operators that they call (in multi_head_attention_forward, say) are seen one by one.
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            _replace(stack, F, name, lambda *tensors: False)
        stack.enter_context(_Mode(table))
        yield


class _Mode(TorchFunctionMode):
    def __init__(self, table: Mapping[str, Callable]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = self.table.get(getattr(func, "__name__", ""))
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))


def _replace(stack: ExitStack, owner, name: str, value) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _composed(rule: Callable, forward: Callable, gate: Callable) -> Callable:
    def replaced(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        def plain(x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

        return rule(plain, x, gate=gate)

    return replaced


def _detached_attention(func, query, key, value, *args, **kwargs):
    return func(query.detach(), key.detach(), value, *args, **kwargs)


def _halved_attention(func, query, key, value, *args, **kwargs):
    query, key = scaled_gradient(query, 0.25), scaled_gradient(key, 0.25)
    return func(query, key, scaled_gradient(value, 0.5), *args, **kwargs)


def _halved_product(func, first, second, *args, **kwargs):
    tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    if tensors and first.requires_grad and second.requires_grad:
        first, second = scaled_gradient(first, 0.5), scaled_gradient(second, 0.5)
    return func(first, second, *args, **kwargs)


def _detached(func, x, *args, **kwargs):
    return func(x.detach(), *args, **kwargs)


# By the name of the operator. rsqrt: of root-mean-square norms that a library writes out.
_GATED = {"gelu": gated, "silu": gated, "layer_norm": detached_norm, "rms_norm": detached_norm}
_LIBRA = {**_GATED, "rsqrt": _detached, "scaled_dot_product_attention": _detached_attention}
_ATTN_LRP = {
    **_GATED,
    "rsqrt": _detached,
    "scaled_dot_product_attention": _halved_attention,
    "mul": _halved_product,
}
_LRP = {
    **dict.fromkeys(("gelu", "silu", "relu", "layer_norm", "rms_norm"), lrp_rules.same_relevance),
    "rsqrt": _detached,
    "scaled_dot_product_attention": lrp_rules.attention,
    "linear": lrp_rules.linear,
    "add": lrp_rules.add,
    "mul": _halved_product,
}


_SLOPE = 1.702


class _QuickGELU(torch.autograd.Function):
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
