"""Weighted relevance that is spent only where there is evidence (ours, after WRA's accumulation)."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.method import Relevance, as_relevance, explanation
from clipmapper.relevance.propagation import blocks, positive_attention, propagate
from clipmapper.relevance.trace import Attention, AttentionTrace


@explanation(gradient=True, layers=True)
def weighted_evidence_plain(trace: AttentionTrace) -> Relevance:
    """``C_s ← (1 − β_i) C_s + β_i Â C_r`` with a β of each token that has the size of its evidence.

    ``β_i = s_i / (p_i + s_i) · s_i / max_k s_k`` with ``p_i = relu(Σ_c (∇x ⊙ x)_ic)``, the token's own
    evidence for y before attention, and ``s_i = Σ_h Σ_j relu(∇A ⊙ A)_hij``, the evidence that it reads; Â and
    the rest as in :func:`~clipmapper.relevance.methods.weighted.weighted` (WRA, arXiv 2308.10240). A
    sub-layer of which no token reads evidence moves no relevance. Every row still sums to 1.

    Two differences from the paper's rule, and why:

    - Â's rows are normalised, so that there a token spends all of its β even where its gradient is
      negligible, and relevance leaks to whatever it attends to. The second factor spends as much less as the
      token has less evidence than the one of the sub-layer that has most.
    - p sums over channels before negative evidence is cut off: channels that cancel out are no evidence.

    Made for the backward rules of ``weighted_evidence`` (AttnLRP's) and ``weighted_evidence_libra``, under
    which p and s are shares of the same sum; by the plain gradient, which is no method of its own, p says
    little. Unchanged when y is multiplied by a positive number. Needs ``trace.backward(y)``.
    """

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        return _spend(trace, step, row)

    rows = propagate(trace, trace.read_row(), rule)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


def _spend(
    trace: AttentionTrace, step: Attention, row: Float[Tensor, "batch rows queries"]
) -> tuple[Float[Tensor, "batch rows queries"], Float[Tensor, "batch rows keys"]]:
    """What of the rows stays with the queries, and what goes to the keys.

    Attention is rebuilt once: β is a number of the query token, but for the largest evidence of its
    sub-layer, which is a factor of all.
    """
    gradient, _ = step.gradients()
    before = torch.linalg.vecdot(gradient, step.before.detach()).clamp(min=0)
    before = (before * trace.padding_free(step.query_node.stream)).to(row.dtype)
    evidence = torch.zeros_like(before)
    to_keys = torch.zeros(*row.shape[:2], step.key.shape[2], dtype=row.dtype, device=row.device)
    # Of a token that y does not depend on there is no evidence, asked for or not.
    reaching = (step.mixed_gradient != 0).any(dim=-1).any(dim=1)[:, None].to(row.dtype)
    for samples, queries in blocks(step, reaching):
        part = positive_attention(step, samples, queries).to(row.dtype) * step.query.shape[1]
        found = part.sum(dim=-1)
        evidence[samples, queries] = found
        total = before[samples, queries] + found
        share = torch.where(found > 0, found / total.masked_fill(total <= 0, 1.0), 0.0)
        to_keys[samples] += (row[samples, :, queries] * share[:, None]) @ part
    largest = evidence.amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest <= 0, 1.0)
    total = before + evidence
    spent = evidence / total.masked_fill(total <= 0, 1.0) * (evidence / largest)
    return row * (1 - spent)[:, None], to_keys / largest[:, None]
