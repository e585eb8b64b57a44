"""Methods on another backward pass: LRP's relevance of attention (Chefer, Gur, Wolf, CVPR 2021), LibraGrad.

Every method on a gradient has a twin with LibraGrad's gradient in its place. Not ``attn_lrp`` and
``partial_lrp``: they *are* rules for the backward pass. Of ``transformer_attribution`` ∇A is LibraGrad's, R^A
is LRP's as before.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.method import Relevance, as_relevance, differentiated, explanation, from_layer
from clipmapper.relevance.methods.attention_only import last_attention, last_reading
from clipmapper.relevance.methods.effective import effective_weighted, efficient_weighted
from clipmapper.relevance.methods.evidence import weighted_evidence_plain
from clipmapper.relevance.methods.gae import gae
from clipmapper.relevance.methods.gradients import (
    grad_cam,
    grad_eclip,
    input_x_gradient,
    integrated_gradients,
    legrad,
)
from clipmapper.relevance.methods.hidden_states import att_cat, full_grad, x_grad_cam
from clipmapper.relevance.methods.norms import beyond_intuition, token_tm
from clipmapper.relevance.methods.weighted import weighted, weighted_norm, weighted_token, weighted_token_norm
from clipmapper.relevance.propagation import part_of, propagate, rows_times
from clipmapper.relevance.rerun import again, with_rules
from clipmapper.relevance.trace import Attention, AttentionTrace, Node, exact_step


def attention_relevance(step: Attention) -> Float[Tensor, "batch heads queries keys"]:
    """R^A of a sub-layer recorded with ``rules="lrp"``: half of ``A ⊙ ∂A``, the other half is v's."""
    return step.probabilities() * step.probability_gradient() / 2


def _by_lrp(trace: AttentionTrace, nodes: Collection[Node], method: str) -> Mapping[Node, Attention]:
    """The sub-layers that give these nodes, with the relevance of LRP.

    ``UserError`` for a model in half precision: the rules divide by what may cancel out, and with the
    rounding of its activations what comes out is another explanation (tiny models: off by its own size)."""
    for step in trace.attention:
        if exact_step(step).rounded:
            raise UserError(
                f"{method} is not defined in half precision, nor under autocast (LRP divides by sums that "
                "cancel out): run the model in float32"
            )
    trace.require_no_cut()
    if trace.rules == "lrp":
        return {step.output_node: step for step in trace.attention}
    return again(trace, method).attention(trace, nodes, "lrp")


@explanation(gradient=True)
def transformer_attribution(trace: AttentionTrace, start_layer: int | Mapping[str, int] = 0) -> Relevance:
    """``C ← C + Ā C`` with ``Ā = E_h relu(∇A ⊙ R^A)`` (Chefer, Gur, Wolf, CVPR 2021, arXiv 2012.09838).

    R^A is the LRP relevance of A when 1 is propagated from y, by the rules of
    :mod:`clipmapper.relevance.backward.lrp`; ∇A is the plain gradient. The paper's models have one stream;
    with cross-attention the keys' C takes the place of C on the right (ours). Defined where ``attn_lrp`` is.
    Needs ``trace.backward(y)`` and ``trace.again``; not in half precision. ``start_layer`` (default: all
    layers; also an option of the released code): see :func:`~clipmapper.relevance.method.from_layer`.
    """
    nodes = {step.output_node for step in from_layer(trace, start_layer).attention}
    by_lrp = _by_lrp(trace, nodes, "transformer_attribution")
    if trace.rules == "lrp":
        trace = with_rules(trace, "plain", "transformer_attribution")
    trace = from_layer(trace, start_layer)

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        relevance = attention_relevance(part_of(by_lrp[step.output_node], samples, queries))
        gradient = part_of(step, samples, queries).probability_gradient()
        return gradient.mul_(relevance).clamp_(min=0).mean(dim=1)

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        return row, rows_times(matrix, step, row, normalise=False)[0]

    rows = propagate(trace, trace.read_row(), rule)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


@explanation()
def partial_lrp(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """LRP relevance of the last sub-layer's attention (Voita et al. 2019, arXiv 1905.09418), on the read row.

    As the baseline in Chefer, Gur, Wolf 2021: positive relevance, mean over heads, of the last sub-layer in
    which the read token reads each modality. ``sign``: "negative" relevance instead, as positive numbers, or
    "both". Defined where :func:`transformer_attribution` is.
    """
    if trace.read is None:  # no backward has found it
        trace = with_rules(trace, "lrp", "partial_lrp")
    by_lrp = _by_lrp(trace, last_reading(trace), "partial_lrp")

    def part(factor: int) -> Relevance:
        def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
            step = part_of(by_lrp[step.output_node], samples, queries)
            return (factor * attention_relevance(step)).clamp(min=0).mean(dim=1)

        return last_attention(trace, matrix)

    if sign != "both":
        return part(1 if sign == "positive" else -1)
    against = part(-1).streams
    whole = part(1)
    return replace(whole, streams={s: values - against[s] for s, values in whole.streams.items()})


GRADIENT_METHODS = (
    weighted,
    weighted_token,
    weighted_norm,
    weighted_token_norm,
    effective_weighted,
    efficient_weighted,
    gae,
    grad_cam,
    grad_eclip,
    input_x_gradient,
    full_grad,
    att_cat,
    x_grad_cam,
    token_tm,
    beyond_intuition,
    legrad,
    transformer_attribution,
    integrated_gradients,
)


def with_libra(method: Callable[..., Relevance]) -> Callable[..., Relevance]:
    """The method by the gradients of ``backward_rules("libra")`` (LibraGrad, CVPR 2025).

    Takes a trace that was recorded so, or any with ``trace.again``. Options are those of the method.
    """

    return _by_rules(method, "libra", f"{method.__name__}_libra", "LibraGrad's gradient")


def _by_rules(
    method: Callable[..., Relevance], rules: str, name: str, gradient: str
) -> Callable[..., Relevance]:
    def changed(trace: AttentionTrace, y: object = None, **options) -> Relevance:
        trace = differentiated(trace, y, gradient=True)
        return method(with_rules(trace, rules, name), **options)

    changed.__name__ = changed.__qualname__ = name
    changed.__doc__ = f"{method.__name__} with {gradient} in place of the plain one."
    changed.__signature__ = inspect.signature(method)
    changed.needs = replace(method.needs, rules=rules)
    return changed


weighted_evidence = _by_rules(
    weighted_evidence_plain, "attn_lrp", "weighted_evidence", "the gradient of AttnLRP's rules"
)
weighted_evidence_libra = _by_rules(
    weighted_evidence_plain, "libra", "weighted_evidence_libra", "LibraGrad's gradient"
)
