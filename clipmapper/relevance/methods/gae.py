"""Generic attention explainability (Chefer, Gur, Wolf, ICCV 2021), the full bi-modal rule."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.method import Relevance, as_relevance, explanation
from clipmapper.relevance.propagation import positive_attention, propagate, rows_times
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node


@explanation(gradient=True, layers=True)
def gae(trace: AttentionTrace) -> Relevance:
    """Relevance by Chefer et al. 2021, with ``Ā = E_h relu(∇A ⊙ A)`` (eq. 5).

    Self-attention of stream s (eqs. 6, 7): ``R_ss ← R_ss + Ā R_ss`` and ``R_sq ← R_sq + Ā R_sq``.
    Cross-attention, queries s and keys q (eqs. 8 to 11): ``R_sq ← R_sq + N(R_ss)ᵀ Ā N(R_qq)`` and
    ``R_ss ← R_ss + Ā R_qs``, from the values before either, ``N(R) = rownorm(R − I) + I``.

    Every stream is updated (WRA's released code never runs the text side's cross-attention of the dual-flow
    mapper, which makes its baseline too weak). The keys' relevance is that of the state in which they were
    read, so the order of the two directions of a block does not matter. A row of ``R − I`` that is 0 stays
    0 in N (the released LXMERT code divides 0 by 0 there). The read token's own entry is kept (that code sets
    it to 0 for display). All layers count; the released CLIP notebook's default is ``start_layer=-1``. The
    result depends on the scale of y.
    Needs ``trace.backward(y)``.
    """
    if all(step.is_self for step in trace.attention):
        return _self_alone(trace)
    streams, rows = trace.inputs, trace.read_row()
    columns = _columns(trace)
    width = sum(trace.lengths[stream] for stream in streams)
    # R of every node: how much each of its tokens (rows) owes to each input token (columns, all streams).
    state: dict[Node, Tensor] = {}
    # The columns that a stream's tokens themselves began as, token by token: in one row for all samples,
    # or in a row for each.
    own: dict[str, Tensor] = {}
    for stream in streams:
        own[stream] = columns[stream].to(trace.device)[None]
        start = torch.zeros(trace.batch, trace.lengths[stream], width, dtype=trace.dtype, device=trace.device)
        start[:, torch.arange(trace.lengths[stream]), columns[stream]] = 1
        state[Node(stream, 0)] = start
    for step in trace.steps:
        if isinstance(step, Join):
            state[step.output] = step.gather([state[part] for part in step.parts])
            own[step.output.stream] = step.gather([own[part.stream] for part in step.parts])
        elif step.query_node.stream == step.key_node.stream:
            relevance = state[step.query_node]
            state[step.output_node] = relevance + positive_attention(step) @ relevance
        else:
            state[step.output_node] = _cross(step, state, own)
    total = sum(row @ state[node] for node, row in rows.items())
    return as_relevance(trace, {stream: total[:, 0, columns[stream]] for stream in streams})


def _self_alone(trace: AttentionTrace) -> Relevance:
    """The same where no stream reads another one: then a row of R suffices, and memory grows with N."""

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        return row, rows_times(positive_attention, step, row, normalise=False)[0]

    rows = propagate(trace, trace.read_row(), rule, as_recorded=True)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


def _cross(
    step: Attention, state: dict[Node, Tensor], own: dict[str, Tensor]
) -> Float[Tensor, "batch queries inputs"]:
    """Eqs. 8 to 11 for one cross-attention.

    What the keys owe to any third stream (an image that was pooled into them) comes along as in eq. 11.
    """
    relevance, other = state[step.query_node], state[step.key_node]
    s, q = own[step.query_node.stream][:, None], own[step.key_node.stream][:, None]
    attention = positive_attention(step)
    updated = relevance + attention @ other
    of_s, of_q = relevance.take_along_dim(s, dim=2), other.take_along_dim(q, dim=2)
    to_other = _normalised(of_s).transpose(1, 2) @ attention @ _normalised(of_q)
    known = relevance.take_along_dim(q, dim=2) + to_other
    return updated.scatter(2, q.expand(known.shape), known)


def _normalised(relevance: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch n n"]:
    """N(R) = rownorm(R − I) + I, with rows of R − I that are 0 left at 0."""
    identity = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    gathered = relevance - identity
    sums = gathered.sum(dim=-1, keepdim=True)
    return gathered / sums.masked_fill(sums == 0, 1.0) + identity


def _columns(trace: AttentionTrace) -> dict[str, Tensor]:
    """Which columns of R belong to each input stream."""
    columns, start = {}, 0
    for stream in trace.inputs:
        columns[stream] = torch.arange(start, start + trace.lengths[stream])
        start += trace.lengths[stream]
    return columns
