"""Accumulated relevance, one row at a time, from the read token back to the inputs.

Only one row of the relevance matrix ``C`` is read. Where a sub-layer's rule is ``C_s ← P C_s + Q C_r``, the
row ``r C_s`` after it is ``(r P) C_s + (r Q) C_r`` before it: rows run backwards through the trace at the
price of a vector–matrix product a sub-layer, and the result is identical to that of full matrices.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node

# Given a sub-layer and rows at its output, the rows at its query tokens and at its key tokens.
Rule = Callable[
    [Attention, Float[Tensor, "batch rows queries"]],
    tuple[Float[Tensor, "batch rows queries"], Float[Tensor, "batch rows keys"] | None],
]

# Query rows whose attention is rebuilt at a time, so that memory grows with N and not with N².
_QUERY_BLOCK = 1024


def propagate(
    trace: AttentionTrace, rows: Mapping[Node, Float[Tensor, "batch rows _tokens"]], rule: Rule
) -> dict[str, Float[Tensor, "batch rows _tokens"]]:
    """Take rows (one-hot at the tokens to be read) back to the inputs; returns them per input stream."""
    at: dict[Node, Tensor] = dict(rows)
    for step in reversed(trace.steps):
        if isinstance(step, Join):
            row = at.pop(step.output, None)
            if row is not None:
                sizes = [trace.lengths[part.stream] for part in step.parts]
                for part, piece in zip(step.parts, step.spread(row, sizes), strict=True):
                    _add(at, part, piece)
            continue
        row = at.pop(step.output_node, None)
        if row is not None:
            own, to_keys = rule(step, row)
            _add(at, step.query_node, own)
            if to_keys is not None:
                _add(at, step.key_node, to_keys)
    return {node.stream: row for node, row in at.items() if node.version == 0 and node.stream in trace.inputs}


def _add(at: dict[Node, Tensor], node: Node, row: Tensor) -> None:
    at[node] = at[node] + row if node in at else row


def positive_attention(step: Attention, queries: slice = slice(None)) -> Float[Tensor, "batch queries keys"]:
    """Ā = mean over heads of relu(∇A ⊙ A) (Chefer et al. 2021, eq. 5), for some of the query rows."""
    part = _rows(step, queries)
    return (part.probability_gradient() * part.probabilities()).clamp(min=0).mean(dim=1)


def mean_attention(step: Attention, queries: slice = slice(None)) -> Float[Tensor, "batch queries keys"]:
    """Mean over heads of A."""
    return _rows(step, queries).probabilities().mean(dim=1)


def rows_times(
    matrix: Callable[[Attention, slice], Tensor],
    step: Attention,
    row: Float[Tensor, "batch rows queries"],
    normalise: bool,
) -> tuple[Float[Tensor, "batch rows keys"], Float[Tensor, "batch rows queries"]]:
    """``row @ M`` for a matrix that is rebuilt in blocks of query rows, and what of ``row`` met an empty row.

    With ``normalise`` every row of M is divided by its sum; a row whose sum is 0 has nothing to pass on,
    and the second value holds that part of ``row``.
    """
    total = torch.zeros(*row.shape[:2], step.key.shape[2], dtype=row.dtype, device=row.device)
    stuck = torch.zeros_like(row)
    for start in range(0, row.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        part = matrix(step, block).to(row.dtype)
        weight = row[:, :, block]
        if normalise:
            sums = part.sum(dim=-1)
            empty = sums <= 0
            stuck[:, :, block] = weight * empty[:, None]
            weight = weight * (~empty / sums.masked_fill(empty, 1.0))[:, None]
        total += weight @ part
    return total, stuck


def _rows(step: Attention, queries: slice) -> Attention:
    """The sub-layer restricted to some query rows (a view: nothing is copied)."""
    count = step.query.shape[2]
    if range(count)[queries] == range(count):
        return step
    mask, causal = step.mask, step.causal
    if causal:
        positions = torch.arange(count, device=step.query.device)
        mask = positions[queries, None] >= torch.arange(step.key.shape[2], device=step.query.device)
        causal = False
    elif mask is not None and mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    gradient = None if step.mixed_gradient is None else step.mixed_gradient[:, :, queries]
    return replace(
        step,
        query=step.query[:, :, queries],
        mixed=step.mixed[:, :, queries],
        before=step.before[:, queries],
        added=step.added[:, queries],
        mask=mask,
        causal=causal,
        mixed_gradient=gradient,
        replaced=None if step.replaced is None else step.replaced[:, :, queries],
        before_gradient=None,
        added_gradient=None,
        after=None,
    )
