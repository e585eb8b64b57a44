"""Other rules for the backward pass, while the forward gives exactly the same values.

``with backward_rules("libra"): y = model(x)`` – the graph that is recorded inside holds the rules, so the
backward may run outside. The model is not changed: calls of torch's operators are intercepted, and the few
activations that a library writes as a product have their class's ``forward`` replaced until the block ends.

==========  =======================  ==================  ==================  ===============  ===========
rules       attention                norms, division     functions of one    products of two  linear maps
                                                         number              activations
==========  =======================  ==================  ==================  ===============  ===========
libra       A constant               σ, ‖x‖ constant     gate constant       halved           plain
attn_lrp    v ½, q and k ¼ of plain  σ, ‖x‖ constant     gate constant       halved           plain
lrp         relevance halved at A V  relevance as it     relevance as it     halved           z⁺ rule
            and again at Q Kᵀ        is; ‖x‖ constant    is
==========  =======================  ==================  ==================  ===============  ===========

``plain``: the gradient, of a graph that keeps less (:mod:`clipmapper.relevance.backward.lean_activations`).
``lrp`` and ``attn_lrp`` propagate *relevance*: a tensor's relevance is the tensor times its gradient. What is
computed with an operator that has no rule is an error where its gradient is asked for.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch._tensor
import torch.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipmapper.errors import UserError
from clipmapper.relevance.backward import in_training, lrp, norms, products
from clipmapper.relevance.backward.elementwise import (
    ELEMENTWISE,
    constant,
    divides,
    elementwise,
    gelu_gate,
    new_gelu_gate,
    quick_gelu_gate,
)
from clipmapper.relevance.backward.lean_activations import lean_quick_gelu
from clipmapper.relevance.backward.rule import (
    HALVES,
    IN_HALF_PRECISION,
    operator_name,
    tensors,
    variables,
    varies,
    with_tensors,
    works_in_place,
)
from clipmapper.relevance.backward.unknown import foreign, guarded, refused
from clipmapper.relevance.backward.unseen import Seen
from clipmapper.relevance.backward.weights import note_activation, note_weights
from clipmapper.relevance.backward.written_softmax import writes_softmax

RULES = ("plain", "libra", "attn_lrp", "lrp")

# Activations that are written out as x · gate(x), which no single operator shows: the gate, or None where it
# is f(x) / x. By name, so that no library is imported that the model at hand does not use.
COMPOSED: Mapping[str, Callable | None] = {
    "clipmapper.models.mapper_blocks.QuickGELU": quick_gelu_gate,
    "open_clip.transformer.QuickGELU": quick_gelu_gate,
    "timm.layers.activations.QuickGELU": quick_gelu_gate,
    "timm.layers.activations.Swish": None,
    "timm.layers.activations.HardMish": None,
    "timm.layers.activations.HardSwish": None,
    "timm.layers.activations.Mish": None,
    "transformers.activations.QuickGELUActivation": quick_gelu_gate,
    "transformers.activations.NewGELUActivation": new_gelu_gate,
    "transformers.activations.AccurateGELUActivation": None,
    "transformers.activations.FastGELUActivation": None,
    "transformers.activations.GELUActivation": gelu_gate,
    "transformers.activations.LaplaceActivation": None,
    "transformers.activations.MishActivation": None,
    "transformers.models.bloom.modeling_bloom.BloomGelu": None,
}


def _composed_activations() -> Iterator[tuple[type[nn.Module], Callable | None]]:
    for name, gate in COMPOSED.items():
        module, _, kind = name.rpartition(".")
        if module in sys.modules and hasattr(sys.modules[module], kind):
            yield getattr(sys.modules[module], kind), gate


@contextmanager
def backward_rules(rules: str) -> Iterator["RulesMode | None"]:
    """Differentiate what is computed inside by these rules (one of ``RULES``).

    ``libra``: LibraGrad (Mehri et al., CVPR 2025, arXiv 2411.16760): attention probabilities, the standard
    deviation of norms and the gates of activations count as constants, and products of two activations
    (SwiGLU, GeGLU) are halved.
    ``attn_lrp``: Achtibat et al. 2024 (arXiv 2402.05602) in the form gradient × input, where its rules for
    softmax (Taylor expansion) and linear layers (ε → 0) are those of the plain gradient.
    ``lrp``: the rules of Chefer, Gur, Wolf 2021 (arXiv 2012.09838), see ``lrp.py``.

    Everything is restored on leaving, also after an exception. Gives the mode in which operators are
    intercepted, None for ``plain``. Raises ``ValueError`` for an unknown name, and ``UserError`` for ``lrp``
    under autocast and in half precision: it divides by sums that are rounded to 0 there. ``UserError`` inside
    where dropout is on, and in the backward where relevance arrives at an operator without a rule, which it
    names.
    """
    if rules not in RULES:
        raise ValueError(f"rules={rules!r}: must be one of {', '.join(RULES)}")
    if rules == "lrp" and any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps"))):
        raise UserError("rules='lrp' is not defined under autocast; record outside of it, in float32")
    activation = lrp.same_relevance if rules == "lrp" else elementwise
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            # What is compiled runs as it was written: neither rules nor hooks are part of what was compiled.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if rules == "plain":
            for kind, gate in _composed_activations():
                if gate is quick_gelu_gate:
                    _replace(stack, kind, "forward", lambda self, x: lean_quick_gelu(x))
            yield None
            return
        for kind, gate in _composed_activations():
            _replace(stack, kind, "forward", _composed(activation, kind.forward, gate))
        # Functions that torch writes in Python hand themselves to the mode whole; with this they run, and the
        # operators that they call (in multi_head_attention_forward, say) are seen one by one.
        for module in (F, torch.functional, torch._tensor):
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
                if hasattr(module, name):
                    _replace(stack, module, name, lambda *tensors: False)
        mode = RulesMode(rules)
        stack.enter_context(mode)
        yield mode


class RulesMode(TorchFunctionMode):
    """Puts rules in the place of operators. ``additions``: nodes of residual connections that LRP's rule is
    in, in their order."""

    def __init__(self, rules: str) -> None:
        super().__init__()
        self.rules, self.table = rules, _TABLES[rules]
        self.additions: list[torch.autograd.graph.Node] = []
        self.seen = Seen()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _UNSEEN or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        every = list(tensors((*args, *kwargs.values())))
        given = [x for x in every if x.requires_grad]
        unseen = {id(x): self.seen.look_at(x, self.rules) for x in given}
        if not any(map(varies, given)):
            result = func(*args, **kwargs)
            if given:
                made = every[:1] if name == "__setitem__" else tensors((result,))
                note_weights(made, operator_name(func), every)
                self.seen.note(result)
            return result
        if self.rules == "lrp" and any(x.dtype in HALVES for x in given):
            raise UserError(IN_HALF_PRECISION)
        if works_in_place(func) or name == "__setitem__":
            note_activation(every[0])
        if any(foreign(x) and varies(x) for x in given) or any(unseen.values()):
            args, kwargs = self._refusing(args, kwargs, unseen)
            given = [x for x in tensors((*args, *kwargs.values())) if x.requires_grad]
        result = self._by_rule(func, args, kwargs, given)
        self.seen.note(result)
        return result

    def _by_rule(self, func: Callable, args: tuple, kwargs: Mapping, given: list[Tensor]) -> object:
        args, kwargs = _in_order(args, kwargs)
        name = operator_name(func)
        rule = self._rule(name, args, kwargs)
        if writes_softmax(name, args, kwargs):
            return refused(func(*args, **kwargs), "a softmax written out (torch.softmax has one)", self.rules)
        if rule is None:
            bases = [x._base for x in given if x._base is not None and x._base.requires_grad]
            before = [_made_by(x) for x in (*given, *bases)]  # (in place, what a view is of is changed)
            return guarded(func(*args, **kwargs), before, func, self.rules)
        if works_in_place(func) and name not in in_training.DROPOUTS:  # (in evaluation they change nothing)
            rule = functools.partial(self._in_place, rule)
        result = rule(func, *args, **kwargs)
        self._note(result)
        return result

    def _in_place(self, rule: Callable, func: Callable, x: Tensor, *others, **kwargs) -> Tensor:
        """The rule on what the tensor was, whose result takes its place."""
        kwargs.pop("inplace", None)
        old, name = x.clone(), operator_name(func)
        usual = getattr(torch, name, None) or getattr(F, name, None) or getattr(Tensor, name)
        result = rule(usual, old, *others, **kwargs)
        self._note(result)
        return x.copy_(result)

    def _note(self, result: object) -> None:
        if isinstance(getattr(result, "grad_fn", None), lrp.Add._backward_cls):
            self.additions.append(result.grad_fn)

    def _rule(self, name: str, args: tuple, kwargs: Mapping) -> Callable | None:
        if divides(name, args, kwargs):
            return constant
        rule = self.table.get(name)
        if rule is None or name not in ELEMENTWISE:
            return rule
        # Bounds and exponents that vary as well are no function of one number, nor is what makes more of it.
        varying = variables(args, kwargs)
        sizes = {x.shape for x in tensors((*args, *kwargs.values()))}
        return rule if len(varying) == 1 and torch.broadcast_shapes(*sizes) == varying[0].shape else None

    def _refusing(self, args: tuple, kwargs: Mapping, unseen: Mapping[int, str | None]) -> tuple[tuple, dict]:
        """The arguments, of which those that no rule has made are errors in the backward."""

        def changed(x: Tensor) -> Tensor:
            if foreign(x) and varies(x):
                return refused(x, x.grad_fn._forward_cls.__name__, self.rules)
            if name := unseen.get(id(x)):
                return refused(x, f"{name} of torch.jit, torch.vmap or the like", self.rules)
            return x

        return with_tensors(args, changed), {key: with_tensors(v, changed) for key, v in kwargs.items()}


def _in_order(args: tuple, kwargs: Mapping) -> tuple[tuple, dict]:
    """The same arguments, of which the first come without their names."""
    kwargs = dict(kwargs)
    for place, names in enumerate(_NAMES):
        name = next((n for n in names if isinstance(kwargs.get(n), Tensor | int | float)), None)
        if len(args) == place and name is not None:
            args = (*args, kwargs.pop(name))
    return args, kwargs


# Of the first arguments, where several operators name them otherwise: those of addmm before those of mm.
_NAMES = (
    ("input",),
    ("other", "mat1", "batch1", "tensor1", "vec1", "mat", "mat2", "vec", "vec2", "tensor", "weight"),
    ("mat2", "batch2", "tensor2", "vec", "vec2"),
)
# Attributes and questions, by far most of what the mode sees.
_UNSEEN = frozenset(
    {"__get__", "__set__", "size", "dim", "stride", "is_floating_point", "requires_grad_", "detach"}
)


def _made_by(x: Tensor) -> torch.autograd.graph.Node | None:
    return torch.autograd.graph.get_gradient_edge(x).node


def _replace(stack: ExitStack, owner, name: str, value) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _composed(rule: Callable, forward: Callable, gate: Callable | None) -> Callable:
    def replaced(self: nn.Module, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and varies(x)):
            return forward(self, x)

        def plain(x: Tensor) -> Tensor:
            return forward(self, x)

        return rule(plain, x, gate=gate)

    return replaced


# By the name of the operator.
_ALL = {
    "div": norms.divided,
    "var": norms.half_variance,
    "cosine_similarity": norms.cosine_similarity,
    "batch_norm": in_training.batch_norm,
    **dict.fromkeys(in_training.DROPOUTS, in_training.dropout),
}
_OF_GRADIENTS = {
    **_ALL,
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "rrelu": in_training.rrelu(elementwise),
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "group_norm": norms.group_norm,
    "instance_norm": norms.instance_norm,
    "glu": products.gated_linear_unit(elementwise),
}
_TABLES: Mapping[str, Mapping[str, Callable]] = {
    "libra": {
        **_OF_GRADIENTS,
        **dict.fromkeys(products.MULTIPLICATIONS, products.product_of_libra),
        "scaled_dot_product_attention": in_training.attention(products.attention_of_libra),
    },
    "attn_lrp": {
        **_OF_GRADIENTS,
        **dict.fromkeys(products.MULTIPLICATIONS, products.product),
        "scaled_dot_product_attention": in_training.attention(products.attention_of_attn_lrp),
    },
    "lrp": {
        **_ALL,
        **dict.fromkeys((*ELEMENTWISE, "softmax", "log_softmax"), lrp.same_relevance),
        "rrelu": in_training.rrelu(lrp.same_relevance),
        **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), lrp.same_relevance),
        "glu": products.gated_linear_unit(lrp.same_relevance),
        **dict.fromkeys(products.MULTIPLICATIONS, lrp.multiplied(products.product)),
        "scaled_dot_product_attention": in_training.attention(lrp.attention),
        "add": lrp.add,
        "sub": lrp.subtract,
        "rsub": lrp.reversed_subtract,
    },
}
