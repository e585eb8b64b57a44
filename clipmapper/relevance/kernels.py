"""Multiply a row by Ā on an NVIDIA GPU, in tiles that never leave the chip (Triton).

``row @ Ā`` with ``Ā = E_h relu(∇A ⊙ A)`` is what ``weighted`` and ``gae`` need of a sub-layer. The reference,
:func:`clipmapper.relevance.propagation.rows_times`, writes A, ∇A and their product to memory and reads them
again; here a tile of each is made from queries, keys, values and the gradient of o, as in FlashAttention
(Dao et al. 2022, arXiv 2205.14135), used, and forgotten. Two passes: Σ_j of every row of A and of Ā, then the
product. Heads are summed last and in order, so the same input gives the same bits.

Only for what was recorded in half precision: tensor cores multiply such numbers exactly and add in float32.
Products of float32 would have to be made without those, which on an H100 took six times as long as the
reference (ViT-B/16, 32 images).

:func:`weighted_row` applies ``weighted`` to a row at one sub-layer in four launches. A row of N numbers is no
work for a GPU, but each of the two dozen operations on it is a launch, and models of an everyday size wait
for launches. Importance is summed in one, α and what moves are made in another; with the two passes above
these are all. The reference is :mod:`clipmapper.relevance.methods.weighted`.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from clipmapper.relevance.trace import HALVES, Attention

_TILE = 64
_WIDEST = 128  # channels of a head: a tile of queries, keys, values and gradients has to fit on the chip


def can_multiply(step: Attention, row: Float[Tensor, "batch rows queries"]) -> bool:
    """Whether :func:`row_times_positive_attention` is made for this: one row, no mask but a causal one."""
    attending = (step.query, step.key, step.value, step.mixed_gradient)
    return (
        row.shape[1] == 1
        and row.dtype == torch.float32
        and step.mask is None
        and step.replaced is None
        and step.query.shape[-1] <= _WIDEST
        and step.query.dtype in HALVES
        and all(t is not None and t.dtype == step.query.dtype for t in attending)
    )


class RowSums(NamedTuple):
    """Two sums of every row of attention: log Σ_j exp(score), and Σ_j relu(∇A ⊙ A)."""

    logarithms: Float[Tensor, "batch heads queries"]
    positive: Float[Tensor, "batch heads queries"]


@torch.no_grad()
def row_times_positive_attention(
    step: Attention, row: Float[Tensor, "batch 1 queries"], normalise: bool
) -> tuple[Float[Tensor, "batch 1 keys"], Float[Tensor, "batch 1 queries"]]:
    """Compute ``rows_times(positive_attention, step, row, normalise)`` where :func:`can_multiply`."""
    sums = row_sums(step, row)
    moving, stuck = row, torch.zeros_like(row)
    if normalise:
        total = sums.positive.mean(dim=1)[:, None]
        empty: Bool[Tensor, "batch 1 queries"] = total <= 0
        stuck = row * empty
        moving = row * ~empty / total.masked_fill(empty, 1.0)
    return row_times(step, moving, sums), stuck


@torch.no_grad()
def row_times_signed_attention(
    step: Attention, row: Float[Tensor, "batch 1 queries"]
) -> Float[Tensor, "batch 1 keys"]:
    """Compute ``rows_times(signed_attention, step, row, False)`` where :func:`can_multiply`."""
    return row_times(step, row, row_sums(step, row), positive=False)


def row_sums(step: Attention, row: Float[Tensor, "batch 1 queries"]) -> RowSums:
    """Sums of the rows that ``row`` asks for; of tiles of rows of which it asks nothing, 0."""
    batch, heads, queries, _ = step.query.shape
    sums = RowSums(*torch.zeros(2, batch, heads, queries, device=row.device))
    _launch(_sums_of_rows, queries, step, row, sums.logarithms, sums.positive)
    return sums


def row_times(
    step: Attention, row: Float[Tensor, "batch 1 queries"], sums: RowSums, positive: bool = True
) -> Float[Tensor, "batch 1 keys"]:
    """``row @ Ā``; without ``positive``, what is against y counts as well: ``row @ E_h (∇A ⊙ A)``."""
    batch, heads, keys, _ = step.key.shape
    of_keys = torch.empty(batch, heads, keys, device=row.device)
    _launch(_row_times, keys, step, row, sums.logarithms, of_keys, POSITIVE=positive)
    return of_keys.mean(dim=1, keepdim=True)


def dense(tensor: Tensor) -> Tensor:
    """Make the last axis dense, as the kernels take it; they are given the strides of the others."""
    return tensor.detach() if tensor.stride(-1) == 1 else tensor.detach().contiguous()


def _launch(kernel, tokens: int, step: Attention, row: Tensor, *results: Tensor, **constants: bool) -> None:
    """Run a kernel on every tile of so many tokens, head and sample."""
    tensors = [dense(t) for t in (step.query, step.key, step.value, step.mixed_gradient)]
    batch, heads, queries, width = step.query.shape
    scale = width**-0.5 if step.scale is None else step.scale
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(row):
        kernel[(triton.cdiv(tokens, _TILE), heads, batch)](
            *tensors, row.contiguous(), *results, heads, queries, step.key.shape[2], scale, *strides,
            WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)), TILE=_TILE, CAUSAL=step.causal,
            **constants,
        )  # fmt: skip


@triton.jit
@no_type_check  # what checks annotations (jaxtyping, in the tests) has to leave the source alone
def _tile(base, stride, first, count, TILE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tokens ``first`` … of one head of one sample: [TILE, PADDED], 0 where there is nothing."""
    tokens, channels = first + tl.arange(0, TILE), tl.arange(0, PADDED)
    inside = (tokens[:, None] < count) & (channels[None, :] < WIDTH)
    return tl.load(base + tokens[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check  # what checks annotations (jaxtyping, in the tests) has to leave the source alone
def _scores(
    q, k, first_query, first_key, keys, scale,
    TILE: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    scores = tl.dot(q, tl.trans(k)) * scale
    key = first_key + tl.arange(0, TILE)
    allowed = key[None, :] < keys
    if CAUSAL:
        allowed = allowed & (key[None, :] <= first_query + tl.arange(0, TILE)[:, None])
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
@no_type_check  # what checks annotations (jaxtyping, in the tests) has to leave the source alone
def _sums_of_rows(
    query, key, value, gradient, row, logarithms, sums, heads, queries, keys, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    first, head = tl.program_id(0) * TILE, tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)  # times a stride: more than 2³¹ in a large batch
    tokens = first + tl.arange(0, TILE)
    asked = tl.load(row + sample * queries + tokens, mask=tokens < queries, other=0.0)
    if tl.max(tl.abs(asked), axis=0) == 0:
        return  # of all but the last sub-layer's read token nothing is asked there
    q = _tile(query + sample * q0 + head * q1, q2, first, queries, TILE, WIDTH, PADDED)
    g = _tile(gradient + sample * g0 + head * g1, g2, first, queries, TILE, WIDTH, PADDED)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    total, positive = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for at in range(0, keys, TILE):
        k = _tile(key + sample * k0 + head * k1, k2, at, keys, TILE, WIDTH, PADDED)
        v = _tile(value + sample * v0 + head * v1, v2, at, keys, TILE, WIDTH, PADDED)
        scores = _scores(q, k, first, at, keys, scale, TILE, CAUSAL)
        # The softmax is not yet divided; what was added up is brought to the new largest score.
        now = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp(largest - now)
        part = tl.exp(scores - now[:, None])
        evidence = tl.maximum(part * tl.dot(g, tl.trans(v)), 0.0)
        total = total * shrink + tl.sum(part, axis=1)
        positive = positive * shrink + tl.sum(evidence, axis=1)
        largest = now
    place = (sample * heads + head) * queries + tokens
    tl.store(logarithms + place, largest + tl.log(total), mask=tokens < queries)
    tl.store(sums + place, positive / total, mask=tokens < queries)


@triton.jit
@no_type_check  # what checks annotations (jaxtyping, in the tests) has to leave the source alone
def _row_times(
    query, key, value, gradient, row, logarithms, out, heads, queries, keys, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    POSITIVE: tl.constexpr
):  # fmt: skip
    first, head = tl.program_id(0) * TILE, tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)  # times a stride: more than 2³¹ in a large batch
    k = _tile(key + sample * k0 + head * k1, k2, first, keys, TILE, WIDTH, PADDED)
    v = _tile(value + sample * v0 + head * v1, v2, first, keys, TILE, WIDTH, PADDED)
    product = tl.zeros([TILE], tl.float32)
    for at in range(0, queries, TILE):
        tokens = at + tl.arange(0, TILE)
        weight = tl.load(row + sample * queries + tokens, mask=tokens < queries, other=0.0)
        if tl.max(tl.abs(weight), axis=0) > 0:
            q = _tile(query + sample * q0 + head * q1, q2, at, queries, TILE, WIDTH, PADDED)
            g = _tile(gradient + sample * g0 + head * g1, g2, at, queries, TILE, WIDTH, PADDED)
            place = (sample * heads + head) * queries + tokens
            logarithm = tl.load(logarithms + place, mask=tokens < queries, other=0.0)
            scores = _scores(q, k, at, first, keys, scale, TILE, CAUSAL)
            probability = tl.exp(scores - logarithm[:, None])
            evidence = probability * tl.dot(g, tl.trans(v))
            if POSITIVE:
                evidence = tl.maximum(evidence, 0.0)
            product += tl.sum(weight[:, None] * evidence, axis=0)
    tokens = first + tl.arange(0, TILE)
    tl.store(out + (sample * heads + head) * keys + tokens, product, mask=tokens < keys)


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
