"""Methods on the relevance that LRP gives to attention matrices (Chefer, Gur, Wolf, CVPR 2021)."""

from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.again import with_rules
from clipmapper.relevance.attention_only import last_attention
from clipmapper.relevance.propagation import part_of, propagate
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import Attention, AttentionTrace


def attention_relevance(step: Attention) -> Float[Tensor, "batch heads queries keys"]:
    """R^A of a sub-layer recorded with ``rules="lrp"``: half of ``A ⊙ ∂A``, the other half is v's."""
    return step.probabilities() * step.probability_gradient() / 2


def transformer_attribution(trace: AttentionTrace) -> Relevance:
    """``C ← C + Ā C`` with ``Ā = E_h relu(∇A ⊙ R^A)`` (Chefer, Gur, Wolf, CVPR 2021, arXiv 2012.09838).

    R^A is the LRP relevance of A when 1 is propagated from y, by the rules of
    :mod:`clipmapper.relevance.lrp_rules`; ∇A is the plain gradient. The paper's models have one stream; with
    cross-attention the keys' C takes the place of C on the right (ours). Defined where ``attn_lrp`` is, and
    each head has its own keys. Needs ``trace.backward(y)`` and ``trace.again``.
    """
    relevance = with_rules(trace, "lrp", "transformer_attribution").attention
    trace = with_rules(trace, "plain", "transformer_attribution")
    numbered = {id(step): i for i, step in enumerate(trace.attention)}

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        part = attention_relevance(relevance[numbered[id(step)]])
        positive = (step.probability_gradient() * part).clamp(min=0).mean(dim=1)
        return row, row @ positive

    rows = propagate(trace, trace.read_row(), rule)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


def partial_lrp(trace: AttentionTrace) -> Relevance:
    """LRP relevance of the last sub-layer's attention (Voita et al. 2019, arXiv 1905.09418), on the read row.

    As the baseline in Chefer, Gur, Wolf 2021: positive relevance, mean over heads, of the last sub-layer in
    which the read token reads each modality. Defined where :func:`transformer_attribution` is.
    """

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        return attention_relevance(part_of(step, samples, queries)).clamp(min=0).mean(dim=1)

    return last_attention(with_rules(trace, "lrp", "partial_lrp"), matrix)
