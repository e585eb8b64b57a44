"""Methods that sum gradient × token over the layers: FullGrad+, AttCAT, XGrad-CAM, value × gradient.

They read the tokens before every attention sub-layer, or its values, and their gradients, in whatever streams
these are; the numbers of a stream that was made of others go to the input tokens at its places.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.method import Needs, Relevance, as_relevance, explanation, from_layer, with_sign
from clipmapper.relevance.methods.attention_only import on_inputs
from clipmapper.relevance.propagation import mean_attention, rows_times, signed_attention
from clipmapper.relevance.rerun import with_rules
from clipmapper.relevance.trace import Attention, AttentionTrace, exact


@explanation(layers=True)
def full_grad(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """FullGrad+ without its bias terms: ``Σ_l x_l ⊙ ∂y/∂x_l``, summed over channels.

    x_l are the tokens before attention sub-layer l. FullGrad (Srinivas & Fleuret 2019, arXiv 1905.00780) is
    the first of these terms, of the input, plus bias × gradient of every bias in the network; FullGrad+ of
    LibraGrad (Mehri et al., CVPR 2025, arXiv 2411.16760, §2.1) takes the input of every layer, plus the
    biases. Where this differs, and why:

    - The bias terms are left out: a trace holds tokens and their gradients, not those at biases. LibraGrad's
      ablation (its table 5) measures what they do to its deletion test: 71.7 with them, 71.5 without. So the
      relevance does not sum to y, and that of the input alone is ``input_x_gradient``.
    - Signed numbers are summed, as in LibraGrad. Srinivas & Fleuret take the absolute value of every term and
      stretch it to [0, 1] before they sum.
    - A layer is an attention sub-layer: a block of self- and cross-attention counts twice.

    ``sign``: "positive" evidence, "negative" (as positive numbers), or "both", which is LibraGrad's.
    ``start_layer``: see :func:`~clipmapper.relevance.method.from_layer`. Defined for every trace in which
    each input stream has a sub-layer of its own (learned queries that pool, which are no input, pass on to
    what they read). Needs ``trace.backward(y)``. Raises ``UserError`` for a stream that is only read.
    """
    trace.require_no_cut()
    found = ((step.query_node.stream, _product(step)) for step in _states(trace))
    return with_sign(_summed(trace, found, "full_grad"), sign)


@explanation(layers=True)
def att_cat(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """AttCAT (Qiang et al., NeurIPS 2022): ``Σ_l E_h(α_l) · Σ_c h_l ⊙ ∂y/∂h_l``.

    α_l is the attention that a token receives in sub-layer l, the mean over the queries, and h_l the token
    as it is read there: in self-attention, before the sub-layer. So the authors' released code has it.
    LibraGrad's (arXiv 2411.16760) multiplies α_l with the tokens *behind* layer l, and leaves out the last
    layer, behind which only the read token has a gradient.

    Cross-attention, which the paper does not have, counts in the same way for the tokens that it reads, where
    their gradient in the state that is read was recorded: two streams that read each other (CLIPmapper,
    LXMERT), but not an encoder's last state that is handed over (T5, BLIP), whose tokens count in the
    encoder's own layers. Queries that do not reach y (the words behind the predicted one, padding) are no
    part of the mean, so the relevance of a word is that of the text up to it; in the paper's encoders all
    queries reach it (the released code has padding in the mean).

    ``sign``: "positive" evidence, "negative" (as positive numbers), or "both", which is the paper's.
    ``start_layer`` and models as for :func:`full_grad`. Needs ``trace.backward(y)``. Raises ``UserError`` for
    a stream that no attention reads in a state whose gradient was recorded.
    """
    trace.require_no_cut()
    states = {step.query_node: step for step in _states(trace)}

    def received() -> Iterator[tuple[str, Float[Tensor, "batch _tokens"]]]:
        for step in trace.attention:
            state = states.get(step.key_node)
            if state is None:
                continue
            rows = _reaches(trace, step).to(trace.dtype)
            rows = rows / rows.sum(dim=1, keepdim=True).clamp(min=1)
            attention, _ = rows_times(mean_attention, step, rows[:, None], normalise=False)
            yield step.key_node.stream, attention[:, 0] * _product(state)

    return with_sign(_summed(trace, received(), "att_cat"), sign)


@explanation(layers=True)
def x_grad_cam(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """XGrad-CAM (Fu et al., BMVC 2020, arXiv 2008.02312) on the tokens, in LibraGrad's form XGradCAM+.

    ``Σ_l Σ_c w_lc x_lc`` with ``w_lc = Σ_i |x_lic| ∂y/∂x_lic / Σ_i |x_lic|``: x_l are the tokens i before
    attention sub-layer l, and a channel weighs the same for all tokens of a sub-layer. Where LibraGrad (arXiv
    2411.16760, and its code) differs from Fu et al., this follows it:

    - ``|x|`` in both sums of the weight, where Fu et al. have x. Their x come out of a ReLU; a channel of
      tokens has both signs, and its sum may be next to 0.
    - The sum over layers; Fu et al. take the last one (``start_layer=-1``).
    - No ReLU of the map: ``sign="both"``. With "positive", the default, the sum over layers is cut off at 0.

    Different from both: where ``Σ_i |x_lic|`` is 0 the weight is 0 (there a small number is added to it), and
    a token that does not reach y (padding, the words behind the predicted one) is left out of the sums and
    has relevance 0, as it would if it weren't there. In a joined stream a channel weighs the same for the
    tokens of all its parts. ``sign``, ``start_layer`` and models as for :func:`full_grad`. Needs
    ``trace.backward(y)``. Raises ``UserError`` for a stream that is only read.
    """
    trace.require_no_cut()

    def maps() -> Iterator[tuple[str, Float[Tensor, "batch _tokens"]]]:
        for step in _states(trace):
            tokens, gradient = _with_gradient(step)
            tokens = tokens * _reaches(trace, step)[..., None]
            size = tokens.abs()
            total = size.sum(dim=1)
            weight = (size * gradient).sum(dim=1) / total.masked_fill(total == 0, 1.0)
            yield step.query_node.stream, (tokens @ weight[..., None])[..., 0]

    return with_sign(_summed(trace, maps(), "x_grad_cam"), sign)


def _by_rules(rules: str, name: str) -> Callable[..., Relevance]:
    def method(trace: AttentionTrace, sign: str = "positive", start_layer: object = 0) -> Relevance:
        trace = from_layer(with_rules(trace, rules, name), start_layer)

        def read() -> Iterator[tuple[str, Float[Tensor, "batch _tokens"]]]:
            for step in trace.attention:
                every = torch.ones(step.query.shape[0], 1, step.query.shape[2], device=trace.device)
                mean, _ = rows_times(signed_attention, step, every.to(trace.dtype), normalise=False)
                yield step.key_node.stream, step.query.shape[1] * mean[:, 0]

        return with_sign(_summed(trace, read(), name, _UNREAD, through_pools=False), sign)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = _VALUE_GRADIENT.format(gradient=_GRADIENTS_OF[rules])
    return explanation(needs=Needs(rules=rules))(method)


_VALUE_GRADIENT = """Value × gradient by {gradient}: ``R_j = Σ_l Σ_h ⟨(Aᵀ ∂y/∂o)_j, v_j⟩``.

    v_j is what a head reads of token j, o = A v what it makes of all; the sum is over all heads of all
    attention sub-layers l that read the token's stream. That is the sum of the columns of A ⊙ ∂y/∂A: by how
    much y falls, to first order, when no query reads the token any more while attention stays what it is.
    No formula of a paper: of those near it, input × gradient takes the token where it comes in, AttCAT
    (:func:`att_cat`) multiplies gradient × token by the attention that it receives, and so counts what the
    residual connection carries once a layer, which is left out here.

    A query that does not reach y has no gradient, so neither words behind the predicted one nor padding
    count. A stream that is only read (an encoder's last state) counts where it is read; one that was made of
    others gives to the input tokens at its places. Learned queries that pool are no input, and what they made
    is none: that it is read stands in the gradient where they read. ``sign``: "positive" evidence, "negative"
    (as positive numbers), or "both". ``start_layer``: see :func:`~clipmapper.relevance.method.from_layer`.
    Defined where the gradient is, for every trace. Attention is rebuilt in blocks: memory grows with the
    number of tokens, not with its square. Raises ``UserError`` for an input stream that no attention reads.
    """
_GRADIENTS_OF = {
    "plain": "the plain gradient",
    "libra": "LibraGrad's gradient",
    "attn_lrp": "AttnLRP's rules (arXiv 2402.05602)",
}
_UNREAD = "is read by no attention sub-layer"

value_gradient = _by_rules("attn_lrp", "value_gradient")
value_gradient_libra = _by_rules("libra", "value_gradient_libra")
value_gradient_plain = _by_rules("plain", "value_gradient_plain")


def _states(trace: AttentionTrace) -> Iterator[Attention]:
    """The sub-layers whose query stream has tokens before them (not those that pool by learned queries)."""
    return (step for step in trace.attention if not step.pools)


def _with_gradient(step: Attention) -> tuple[Tensor, Tensor]:
    """(x, ∂y/∂x), each [batch, tokens, width], of the tokens before a sub-layer."""
    gradient, _ = step.gradients()
    return exact(step.before.detach()), exact(gradient)


def _product(step: Attention) -> Float[Tensor, "batch tokens"]:
    """Gradient × token, summed over channels."""
    tokens, gradient = _with_gradient(step)
    return torch.linalg.vecdot(tokens, gradient)


def _reaches(trace: AttentionTrace, step: Attention) -> Bool[Tensor, "batch queries"]:
    """True at the query tokens that y depends on, as they are before the sub-layer (those that pool: behind).

    Exactly: what a mask forbids has a gradient of 0, not a small one.
    """
    before, added = step.gradients()
    reached = ((added if step.pools else before) != 0).any(dim=-1)
    return reached & trace.padding_free(step.query_node.stream)


_ONLY_READ = (
    "is only read, by cross-attention, or only reads; the gradient at its tokens, in a state in which they "
    "are read, is not recorded"
)


def _summed(
    trace: AttentionTrace,
    found: Iterable[tuple[str, Float[Tensor, "batch _tokens"]]],
    method: str,
    why: str = _ONLY_READ,
    through_pools: bool = True,
) -> Relevance:
    """Sums over sub-layers, by the input tokens at whose places the tokens are.

    Raises ``UserError`` that names an input stream for which nothing was found, and says why.
    """
    by_stream: dict[str, Tensor] = {}
    for stream, values in found:
        by_stream[stream] = by_stream[stream] + values if stream in by_stream else values
    totals: dict[str, Tensor] = {}
    for stream, values in by_stream.items():
        for source, part in on_inputs(trace, stream, values[:, None], through_pools=through_pools).items():
            totals[source] = totals[source] + part[:, 0] if source in totals else part[:, 0]
    pooling = {step.query_node.stream for step in trace.attention if step.pools}
    for stream in trace.inputs:
        if stream not in totals and stream not in pooling:
            raise UserError(f"{method}: stream {stream!r} {why}")
    return as_relevance(trace, totals)
