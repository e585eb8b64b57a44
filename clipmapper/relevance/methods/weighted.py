"""Weighted relevance accumulation (Huang et al. 2023, arXiv 2308.10240, "WRA").

For every sub-layer, what a token was before attention is weighed against what attention added, by the
importance of token values: ``C_s ← α C_s + β Â C_r`` with ``α + β = 1``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.method import Relevance, as_relevance, explanation
from clipmapper.relevance.propagation import (
    Matrix,
    Rule,
    kernels_for,
    mean_attention,
    positive_attention,
    propagate,
    rows_times,
)
from clipmapper.relevance.trace import Attention, AttentionTrace, exact


@explanation(gradient=True, layers=True)
def weighted(trace: AttentionTrace) -> Relevance:
    """Weighted relevance, one pair of weights per sample and sub-layer (WRA).

    ``s_pre = mean relu(∇x ⊙ x)``, ``s_post = mean relu(∇a ⊙ a)`` over tokens (not padding) and channels,
    ``α = s_pre / (s_pre + s_post)``, ``β = 1 − α``; Â is ``E_h relu(∇A ⊙ A)`` with rows that sum to 1.

    Differs from the released code in one thing on purpose: a row of Ā without any positive entry keeps its
    relevance where it is, so that relevance is conserved; there it loses β of that row's mass. And keys are
    read in the state in which the sub-layer read them; there the dual-flow mapper reads a later one.
    Unchanged when y is multiplied by a positive number. Needs ``trace.backward(y)``.
    """
    return _accumulate(trace, weighted_rule(trace))


@explanation(gradient=True, layers=True)
def weighted_token(trace: AttentionTrace) -> Relevance:
    """Accumulate as :func:`weighted` with one pair of weights per token: means over channels only.

    Present, commented out, in the released code of WRA.
    """
    return _accumulate(trace, weighted_token_rule(trace))


@explanation(layers=True)
def weighted_half(trace: AttentionTrace) -> Relevance:
    """The ablation of WRA's released code: α = β = ½ and Â the mean attention of the heads, no gradient."""
    return _accumulate(trace, weighted_half_rule(trace))


@explanation(gradient=True, layers=True)
def weighted_norm(trace: AttentionTrace) -> Relevance:
    """Accumulate as :func:`weighted`, but by norms: ``s_pre = mean_i ‖x_i‖``, ``s_post = mean_i ‖a_i‖``.

    After Kobayashi et al. 2020 (arXiv 2004.10102), who weigh attention by the norms of what it moves. Ours as
    a weighting of WRA. Needs ``trace.backward(y)`` (for Â alone).
    """
    return _accumulate(trace, weighted_norm_rule(trace))


@explanation(gradient=True, layers=True)
def weighted_token_norm(trace: AttentionTrace) -> Relevance:
    """Accumulate as :func:`weighted_norm` with one pair of weights per token."""
    return _accumulate(trace, weighted_token_norm_rule(trace))


def weighted_rule(trace: AttentionTrace) -> Rule:
    """Make the rule of :func:`weighted` at one sub-layer, for
    :func:`clipmapper.relevance.propagation.propagate`."""

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        if kernels_for(step, row) is not None:
            return _by_kernels(trace, step, row, by_token=False)
        before, added = _importance(trace, step)
        alpha = _share(before.sum(dim=1), added.sum(dim=1))
        return _mix(step, row, alpha[:, None, None], positive_attention)

    return rule


def weighted_token_rule(trace: AttentionTrace) -> Rule:
    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        if kernels_for(step, row) is not None:
            return _by_kernels(trace, step, row, by_token=True)
        alpha = _share(*_importance(trace, step))
        return _mix(step, row, alpha[:, None, :], positive_attention)

    return rule


def weighted_half_rule(trace: AttentionTrace) -> Rule:
    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        half = torch.full((1, 1, 1), 0.5, dtype=row.dtype, device=row.device)
        return _mix(step, row, half, mean_attention)

    return rule


def weighted_norm_rule(trace: AttentionTrace) -> Rule:
    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        before, added = _norms(trace, step)
        alpha = _share(before.sum(dim=1), added.sum(dim=1))
        return _mix(step, row, alpha[:, None, None], positive_attention)

    return rule


def weighted_token_norm_rule(trace: AttentionTrace) -> Rule:
    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        alpha = _share(*_norms(trace, step))
        return _mix(step, row, alpha[:, None, :], positive_attention)

    return rule


def _norms(
    trace: AttentionTrace, step: Attention
) -> tuple[Float[Tensor, "batch queries"], Float[Tensor, "batch queries"]]:
    """‖x_i‖ and ‖a_i‖; 0 at padding."""
    valid = trace.padding_free(step.query_node.stream)
    before, added = (exact(tokens.detach()).norm(dim=-1) for tokens in (step.before, step.added))
    return before * valid, added * valid


def _importance(
    trace: AttentionTrace, step: Attention
) -> tuple[Float[Tensor, "batch queries"], Float[Tensor, "batch queries"]]:
    """relu(∇x ⊙ x) and relu(∇a ⊙ a), mean over channels; 0 at padding.

    Padding is left out of both means of ``weighted`` alike, so their ratio may take sums instead.
    """
    before_gradient, added_gradient = step.gradients()
    valid = trace.padding_free(step.query_node.stream)
    pairs = ((before_gradient, step.before.detach()), (added_gradient, step.added.detach()))
    before, added = ((exact(g) * exact(t)).clamp_(min=0).mean(dim=-1) for g, t in pairs)
    return before * valid, added * valid


def _by_kernels(
    trace: AttentionTrace, step: Attention, row: Tensor, *, by_token: bool
) -> tuple[Tensor, Tensor]:
    """α and the row in few launches; from numbers in half precision, as the kernels of Ā are."""
    from clipmapper.relevance.kernels import weighted_row  # which needs Triton

    return weighted_row(step, row, trace.valid.get(step.query_node.stream), by_token=by_token)


def _share(before: Tensor, added: Tensor) -> Tensor:
    """α; 1 where both are 0: a sub-layer that does not reach y moves no relevance."""
    total = before + added
    nothing = total <= 0
    return torch.where(nothing, torch.ones_like(total), before / total.masked_fill(nothing, 1.0))


def _mix(step: Attention, row: Tensor, alpha: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    moving = (1 - alpha) * row
    to_keys, stuck = rows_times(matrix, step, moving, normalise=True)
    return alpha * row + stuck, to_keys


def _accumulate(trace: AttentionTrace, rule: Rule) -> Relevance:
    rows = propagate(trace, trace.read_row(), rule, as_recorded=True)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})
