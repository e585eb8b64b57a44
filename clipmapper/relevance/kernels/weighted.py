"""Apply ``weighted`` to a row at one sub-layer on an NVIDIA GPU, in four launches (Triton).

A row of N numbers is no work for a GPU, but each of the two dozen operations on it is a launch, and models of
an everyday size wait for launches. Importance is summed in one, α and what moves are made in another; with
the two of :mod:`clipmapper.relevance.kernels.row` these are all. The reference is
:mod:`clipmapper.relevance.methods.weighted`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from clipmapper.relevance.kernels.row import RowSums, dense, row_sums, row_times
from clipmapper.relevance.trace import Attention

_TOKENS, _CHANNELS = 8, 256  # of a tile in which importance is summed
_ROW = 256  # numbers of a row at a time


@torch.no_grad()
def weighted_row(
    step: Attention,
    row: Float[Tensor, "batch 1 queries"],
    valid: Bool[Tensor, "batch queries"] | None,
    *,
    by_token: bool,
) -> tuple[Float[Tensor, "batch 1 queries"], Float[Tensor, "batch 1 keys"]]:
    """The row at the query tokens and at the key tokens, from the row behind the sub-layer.

    ``valid``: False at padding (None: there is none). ``by_token``: a pair of weights for each token. Defined
    where :func:`clipmapper.relevance.propagation.kernels_for` says so.
    """
    sums = row_sums(step, row)
    moving, staying = mixed_row(importance(step, valid), sums, row, by_token=by_token)
    return staying, row_times(step, moving, sums)


def importance(
    step: Attention, valid: Bool[Tensor, "batch queries"] | None
) -> Float[Tensor, "2 batch queries"]:
    """relu(∇x ⊙ x) and relu(∇a ⊙ a), mean over channels; 0 at padding."""
    tensors = [dense(t) for t in (step.before, step.before_gradient, step.added, step.added_gradient)]
    batch, queries, width = step.before.shape
    out = torch.empty(2, batch, queries, device=step.before.device)
    strides = [stride for t in tensors for stride in t.stride()[:2]]
    with torch.cuda.device_of(out):
        _importance[(triton.cdiv(queries, _TOKENS), batch)](
            *tensors, out if valid is None else valid.contiguous(), out[0], out[1], queries, width, *strides,
            PADDED=valid is not None, TOKENS=_TOKENS, CHANNELS=_CHANNELS,
        )  # fmt: skip
    return out


def mixed_row(
    importances: Float[Tensor, "2 batch queries"],
    sums: RowSums,
    row: Float[Tensor, "batch 1 queries"],
    *,
    by_token: bool,
) -> tuple[Float[Tensor, "batch 1 queries"], Float[Tensor, "batch 1 queries"]]:
    """Split the row into what goes on to the keys, divided by the sums of Ā's rows, and what stays."""
    batch, heads, queries = sums.positive.shape
    out = torch.empty(2, *row.shape, device=row.device)
    with torch.cuda.device_of(row):
        _mix[(batch,)](
            importances[0], importances[1], sums.positive, row.contiguous(), out[0], out[1], heads, queries,
            BY_TOKEN=by_token, ROW=_ROW,
        )  # fmt: skip
    return out[0], out[1]


@triton.jit
@no_type_check  # what checks annotations (jaxtyping, in the tests) has to leave the source alone
def _importance(
    x, x_gradient, a, a_gradient, valid, before, added, queries, width,
    x0, x1, gx0, gx1, a0, a1, ga0, ga1,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < queries
    of_x, of_a = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    for at in range(0, width, CHANNELS):
        channels = at + tl.arange(0, CHANNELS)
        here = inside[:, None] & (channels[None, :] < width)
        value = tl.load(x + sample * x0 + tokens[:, None] * x1 + channels[None, :], mask=here, other=0.0)
        slope = tl.load(
            x_gradient + sample * gx0 + tokens[:, None] * gx1 + channels[None, :], mask=here, other=0.0
        )
        of_x += tl.sum(tl.maximum(value.to(tl.float32) * slope.to(tl.float32), 0.0), axis=1)
        value = tl.load(a + sample * a0 + tokens[:, None] * a1 + channels[None, :], mask=here, other=0.0)
        slope = tl.load(
            a_gradient + sample * ga0 + tokens[:, None] * ga1 + channels[None, :], mask=here, other=0.0
        )
        of_a += tl.sum(tl.maximum(value.to(tl.float32) * slope.to(tl.float32), 0.0), axis=1)
    place = sample * queries + tokens
    if PADDED:
        kept = tl.load(valid + place, mask=inside, other=0) != 0
        of_x, of_a = tl.where(kept, of_x, 0.0), tl.where(kept, of_a, 0.0)
    tl.store(before + place, of_x / width, mask=inside)
    tl.store(added + place, of_a / width, mask=inside)


@triton.jit
@no_type_check  # what checks annotations (jaxtyping, in the tests) has to leave the source alone
def _mix(
    before, added, positive, row, moving, staying, heads, queries,
    BY_TOKEN: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    all_before, all_added = tl.zeros([ROW], tl.float32), tl.zeros([ROW], tl.float32)
    if not BY_TOKEN:
        for at in range(0, queries, ROW):
            tokens = at + tl.arange(0, ROW)
            place, inside = sample * queries + tokens, tokens < queries
            all_before += tl.load(before + place, mask=inside, other=0.0)
            all_added += tl.load(added + place, mask=inside, other=0.0)
    of_sample = tl.sum(all_before, axis=0)
    total_of_sample = of_sample + tl.sum(all_added, axis=0)
    for at in range(0, queries, ROW):
        tokens = at + tl.arange(0, ROW)
        place, inside = sample * queries + tokens, tokens < queries
        if BY_TOKEN:
            share = tl.load(before + place, mask=inside, other=0.0)
            total = share + tl.load(added + place, mask=inside, other=0.0)
        else:
            share = tl.zeros([ROW], tl.float32) + of_sample
            total = tl.zeros([ROW], tl.float32) + total_of_sample
        # A sub-layer that does not reach y moves no relevance.
        alpha = tl.where(total > 0, share / tl.where(total > 0, total, 1.0), 1.0)
        sums = tl.zeros([ROW], tl.float32)
        for head in range(heads):
            sums += tl.load(positive + (sample * heads + head) * queries + tokens, mask=inside, other=0.0)
        sums = sums / heads
        numbers = tl.load(row + place, mask=inside, other=0.0)
        moves = (1 - alpha) * numbers
        # A row of Ā whose sum is 0 has nothing to pass on.
        tl.store(moving + place, tl.where(sums > 0, moves / tl.where(sums > 0, sums, 1.0), 0.0), mask=inside)
        tl.store(staying + place, alpha * numbers + tl.where(sums > 0, 0.0, moves), mask=inside)
