"""Calls of a model that are changed for the while of a recorded forward; no number of the model changes.

Attention that a model computes step by step is sent through the fused function: no N × N matrix is kept for
the backward, and a recorder sees queries, keys and values. Modules that are given tokens with a gradient and
give back tokens without one are found.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

_NOT_ASKED = "attention weights can't be asked for while recording; output_attentions=False"


@contextmanager
def fused_attention(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the modules of a model use ``scaled_dot_product_attention`` where they have the choice.

    And the classes of ``STEP_BY_STEP``, which have none, are run by the function given there.
    """
    with ExitStack() as stack:
        # (By their __dict__: asking modules for what they don't have takes them long.)
        for config in {id(c): c for c in (vars(m).get("config") for m in modules)}.values():
            chosen = getattr(config, "_attn_implementation", None)
            if chosen not in (None, "sdpa"):
                config._attn_implementation_internal = "sdpa"
                stack.callback(setattr, config, "_attn_implementation_internal", chosen)
        for module in modules:
            if vars(module).get("fused_attn") is False:
                module.fused_attn = True
                stack.callback(setattr, module, "fused_attn", False)
            kind = type(module)
            run = STEP_BY_STEP.get(f"{kind.__module__}.{kind.__qualname__}")
            if run is not None:
                had = vars(module).get("forward")
                module.forward = _bound(run, module)
                if had is None:
                    stack.callback(vars(module).pop, "forward")
                else:
                    stack.callback(setattr, module, "forward", had)
        yield


def _bound(run: Callable, module: nn.Module) -> Callable:
    return lambda *args, **kwargs: run(module, *args, **kwargs)


def _lxmert(module, hidden_states, context, attention_mask=None, output_attentions=False):
    if output_attentions:
        raise ValueError(_NOT_ASKED)
    return (_attend(module, hidden_states, context, attention_mask),)


def _self(module, hidden_states, attention_mask=None, output_attentions=False):
    return _lxmert(module, hidden_states, hidden_states, attention_mask, output_attentions)


def _blip_text(
    module,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    cache=None,
    past_key_values=None,  # its name before transformers 5.24
    **others,
):
    cache = past_key_values if cache is None else cache
    if cache is not None and cache.get_seq_length():
        raise ValueError("a forward behind remembered words can't be recorded; use_cache=False")
    if encoder_hidden_states is None:
        return _attend(module, hidden_states, hidden_states, attention_mask), None
    return _attend(module, hidden_states, encoder_hidden_states, encoder_attention_mask), None


def _git(module, hidden_states, attention_mask=None, cache=None, **others):
    return _blip_text(module, hidden_states, attention_mask, cache=cache)


def _mpnet(module, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **others):
    if output_attentions:
        raise ValueError(_NOT_ASKED)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.where(attention_mask, 0.0, float("-inf"))
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else attention_mask + position_bias
    query, key, value = (layer(hidden_states) for layer in (module.q, module.k, module.v))
    return (module.o(_mixed(module, query, key, value, attention_mask)),)


def _blip(module, hidden_states, **others):
    fused = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*fused, scale=module.scale, dropout_p=_dropout(module))
    return module.projection(mixed.transpose(1, 2).flatten(2)), None


def _attend(module: nn.Module, tokens: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """With modules ``query``, ``key`` and ``value``, as in BERT."""
    return _mixed(module, module.query(tokens), module.key(context), module.value(context), mask)


def _mixed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Mix values [batch, tokens, width] of all heads by fused attention; the mask is added to the scores."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    query, key, value = heads(query), heads(key), heads(value)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=_dropout(module))
    return mixed.transpose(1, 2).flatten(2)


def _dropout(module: nn.Module) -> float:
    return module.dropout.p if module.training else 0.0


_HF = "transformers.models."
STEP_BY_STEP: dict[str, Callable[..., tuple[Tensor, ...] | Tensor]] = {
    f"{_HF}lxmert.modeling_lxmert.LxmertAttention": _lxmert,
    f"{_HF}visual_bert.modeling_visual_bert.VisualBertSelfAttention": _self,
    f"{_HF}vilt.modeling_vilt.ViltSelfAttention": _self,
    f"{_HF}blip.modeling_blip.BlipAttention": _blip,
    f"{_HF}blip.modeling_blip_text.BlipTextSelfAttention": _blip_text,
    f"{_HF}flava.modeling_flava.FlavaSelfAttention": _self,
    f"{_HF}git.modeling_git.GitSelfAttention": _git,
    f"{_HF}mpnet.modeling_mpnet.MPNetSelfAttention": _mpnet,
}


@contextmanager
def softmax_noticed(notice: Callable[[], None]) -> Iterator[None]:
    """Within, ``notice`` is called after every softmax whose result looks like attention probabilities.

    That is [..., heads, queries, keys] or [batch, tokens, tokens]. Probabilities of classes are not; nor is
    attention whose author has written out the softmax.
    """

    def noticing(original: Callable) -> Callable:
        def softmax(*args, **kwargs):
            result = original(*args, **kwargs)
            if _is_attention(result):
                notice()
            return result

        return softmax

    with ExitStack() as stack:
        for owner in (torch, F, torch.Tensor):
            if "softmax" in vars(owner):
                stack.callback(setattr, owner, "softmax", owner.softmax)
            else:
                stack.callback(delattr, owner, "softmax")  # a tensor inherits it
            owner.softmax = noticing(owner.softmax)
        yield


def _is_attention(result: Tensor) -> bool:
    return result.ndim > 3 or (result.ndim == 3 and result.shape[1] == result.shape[2] > 1)


# Positions of arguments of nn.MultiheadAttention.forward(query, key, value, ...).
_NEED_WEIGHTS = 4


@contextmanager
def without_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules compute no attention weights (then they would not use fused attention).

    Callers that asked for weights are given None. The fast path for inference, which is no attention that
    could be differentiated, is off.
    """
    with ExitStack() as stack:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for module in modules:
            if isinstance(module, nn.MultiheadAttention):
                hook = module.register_forward_pre_hook(_need_no_weights, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _need_no_weights(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if len(args) > _NEED_WEIGHTS:
        return (*args[:_NEED_WEIGHTS], False, *args[_NEED_WEIGHTS + 1 :]), kwargs
    return args, {**kwargs, "need_weights": False}


class GradientCuts:
    """Notices where a forward leaves the autograd graph, while it runs.

    A quantised layer, a ``detach()``, a block under ``no_grad`` or a way through NumPy computes the same
    numbers, and what is before it gets no gradient: maps would be zeros, or those of a part of the model,
    without a word. ``first`` is the line for the first such module, None where there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.first: str | None = None
        self._names = {module: name for name, module in model.named_modules()}

    def watch(self, stack: ExitStack, modules: Iterable[nn.Module]) -> None:
        """Until ``stack`` is left."""
        for module in modules:
            if _has_weights(module):
                stack.callback(module.register_forward_hook(self._ended, with_kwargs=True).remove)

    def note(self, name: str, kind: str) -> None:
        """This one passes no gradient."""
        if self.first is None:
            off = "" if torch.is_grad_enabled() else " (gradients are switched off in it, as by no_grad)"
            self.first = f"{name}: {kind} passes no gradient{off}"

    def _ended(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if self.first is not None or type(output) is not Tensor or _passes(output):
            return
        # As many tokens as it was given: what a module only reads off a tensor's shape (position embeddings)
        # is no token of it.
        for given in (*args, *kwargs.values()):
            if type(given) is Tensor and given.requires_grad and given.ndim > 1:
                if output.is_floating_point() and output.shape[:-1] == given.shape[:-1]:
                    self.note(self._names.get(module) or "the model", type(module).__name__)
                return


def _passes(output: Tensor) -> bool:
    """Operators without a derivative (quantised ones) have a node in the graph that passes nothing."""
    return output.requires_grad and not (
        output.grad_fn is not None and output.grad_fn.name().endswith("NotImplemented")
    )


def _has_weights(module: nn.Module) -> bool:
    """Parameters, or the packed ones of a quantised layer, which are none to torch."""
    if next(module.parameters(), None) is not None or isinstance(module, torch.jit.ScriptModule):
        return True
    return any("quantized" in type(part).__module__ for part in module.modules())


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Within, ``torch.utils.checkpoint`` runs what it is given like any other part of the model.

    It would run the forward a second time in the backward, behind the back of the hooks and patches that are
    in place while a forward is recorded. What is replaced is what torch's own function calls (of either
    kind), because modules hold that function itself (timm and open_clip import it by name).
    """
    # (The first has another name from release to release.)
    kind = "_checkpoint_without_reentrant_generator"
    generators = [name for name in vars(checkpoint) if name.startswith(kind)]
    replaced = dict.fromkeys(generators, _nothing_around) | {"CheckpointFunction": _Plain}
    before = {name: getattr(checkpoint, name) for name in replaced}
    vars(checkpoint).update(replaced)
    try:
        yield
    finally:
        vars(checkpoint).update(before)


def _nothing_around(*args, **kwargs) -> Iterator[None]:
    yield


class _Plain:
    @staticmethod
    def apply(function: Callable, preserve: bool, *args):
        return function(*args)
