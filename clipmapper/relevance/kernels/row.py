"""Multiply a row by Ā on an NVIDIA GPU, in tiles that never leave the chip (Triton).

``row @ Ā`` with ``Ā = E_h relu(∇A ⊙ A)`` is what ``weighted`` and ``gae`` need of a sub-layer. The reference,
:func:`clipmapper.relevance.propagation.rows_times`, writes A, ∇A and their product to memory and reads them
again; here a tile of each is made from queries, keys, values and the gradient of o, as in FlashAttention
(Dao et al. 2022, arXiv 2205.14135), used, and forgotten. Two passes: Σ_j of every row of A and of Ā, then the
product. Heads are summed last and in order, so the same input gives the same bits.

Only for what was recorded in half precision: tensor cores multiply such numbers exactly and add in float32.
Products of float32 would have to be made without those, which on an H100 took six times as long as the
reference (ViT-B/16, 32 images).
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


def row_sums(step: Attention, row: Float[Tensor, "batch 1 queries"]) -> RowSums:
    """Sums of the rows that ``row`` asks for; of tiles of rows of which it asks nothing, 0."""
    batch, heads, queries, _ = step.query.shape
    sums = RowSums(*torch.zeros(2, batch, heads, queries, device=row.device))
    _launch(_sums_of_rows, queries, step, row, sums.logarithms, sums.positive)
    return sums


def row_times(
    step: Attention, row: Float[Tensor, "batch 1 queries"], sums: RowSums
) -> Float[Tensor, "batch 1 keys"]:
    """``row @ Ā``."""
    batch, heads, keys, _ = step.key.shape
    of_keys = torch.empty(batch, heads, keys, device=row.device)
    _launch(_row_times, keys, step, row, sums.logarithms, of_keys)
    return of_keys.mean(dim=1, keepdim=True)


def dense(tensor: Tensor) -> Tensor:
    """Make the last axis dense, as the kernels take it; they are given the strides of the others."""
    return tensor.detach() if tensor.stride(-1) == 1 else tensor.detach().contiguous()


def _launch(kernel, tokens: int, step: Attention, row: Tensor, *results: Tensor) -> None:
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
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr
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
            evidence = tl.maximum(probability * tl.dot(g, tl.trans(v)), 0.0)
            product += tl.sum(weight[:, None] * evidence, axis=0)
    tokens = first + tl.arange(0, TILE)
    tl.store(out + (sample * heads + head) * keys + tokens, product, mask=tokens < keys)
