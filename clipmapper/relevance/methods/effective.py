"""Effective and efficient attention: the part of an attention matrix that has an effect.

Two attention rows ``A_i`` and ``u`` with ``u V = A_i V`` give the same sub-layer output. With more keys than
the width D of a head there are many such rows; each function here picks one. Where the values of the keys
that a row may read are linearly independent (in general: not more keys than D), ``A_i`` is the only one, and
both functions return A itself.

Rows keep to the keys that their mask lets them read. Whether the output projection is counted in (``V W_O``
for ``V``) makes no difference as long as a head's part of it has full rank D, as trained projections do; it
is left out here. Both are defined for every sub-layer of every trace.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import nnls
from torch import Tensor

from clipmapper.relevance.method import Relevance, explanation
from clipmapper.relevance.methods.attention_only import raw_attention, rollout
from clipmapper.relevance.methods.solved_rows import SolvedRows
from clipmapper.relevance.methods.weighted import weighted
from clipmapper.relevance.trace import Attention, AttentionTrace, Join

# How much more the conditions of a row with negative entries count than its norm, until it is polished.
_WEIGHT = 1e5
_RESIDUAL = 1e-9
SOLVED = SolvedRows()

Matrix = Float[Tensor, "batch heads queries keys"]


@explanation()
def effective_attention(trace: AttentionTrace) -> Relevance:
    """:func:`raw_attention` on effective attention; entries below 0 count as 0."""
    return _positive(raw_attention(with_attention(trace, effective_matrix)))


@explanation(layers=True)
def effective_rollout(trace: AttentionTrace) -> Relevance:
    """:func:`rollout` on effective attention.

    Rollout needs distributions and rows of A_eff are none: the mean over heads is cut off at 0 and each row
    divided by its sum (a choice of ours; the papers do not roll A_eff out).
    """

    def matrix(step: Attention) -> Matrix:
        mean = effective_matrix(step).mean(dim=1, keepdim=True).clamp(min=0)
        total = mean.sum(dim=-1, keepdim=True)
        return (mean / total.masked_fill(total <= 0, 1.0)).expand(-1, step.query.shape[1], -1, -1)

    return rollout(with_attention(trace, matrix))


@explanation(gradient=True, layers=True)
def effective_weighted(trace: AttentionTrace) -> Relevance:
    """:func:`weighted` with effective attention in place of A. Needs ``trace.backward(y)``."""
    return weighted(with_attention(trace, effective_matrix))


@explanation()
def efficient_attention(trace: AttentionTrace) -> Relevance:
    """:func:`raw_attention` on efficient attention."""
    return raw_attention(with_attention(trace, efficient_matrix))


@explanation(layers=True)
def efficient_rollout(trace: AttentionTrace) -> Relevance:
    """:func:`rollout` on efficient attention."""
    return rollout(with_attention(trace, efficient_matrix))


@explanation(gradient=True, layers=True)
def efficient_weighted(trace: AttentionTrace) -> Relevance:
    """:func:`weighted` with efficient attention in place of A. Needs ``trace.backward(y)``."""
    return weighted(with_attention(trace, efficient_matrix))


def with_attention(trace: AttentionTrace, matrix: Callable[[Attention], Matrix]) -> AttentionTrace:
    """A trace in which ``matrix(step)`` stands in for the attention probabilities of every sub-layer."""
    steps = [s if isinstance(s, Join) else replace(s, replaced=matrix(s)) for s in trace.steps]
    return replace(trace, steps=steps)


def effective_matrix(step: Attention) -> Matrix:
    """``A_eff = A − A N Nᵀ``, N an orthonormal basis of the left null space of V, per head.

    Brunner et al. 2020 (arXiv 1908.04211), Sun & Marasović 2021. Rows may have negative entries and need not
    sum to 1. Under a mask, N is that of the values which the row may read (the papers have no mask).
    """
    return _per_head(step, _projected, ones=False)


def efficient_matrix(step: Attention) -> Matrix:
    """The row-stochastic representative: ``argmin ‖u‖²`` with ``u V = A_i V``, ``u · 1 = 1``, ``u ≥ 0``.

    A probability distribution that has the same effect as ``A_i``, after Naim & Asher 2024 (arXiv
    2410.18541), who ask for one; *this construction is ours*. Without ``u ≥ 0`` it is the projection on the
    column space of ``[V, 1]``; rows where that has negative entries are solved as a quadratic programme, by
    Lawson and Hanson's active-set method (scipy's ``nnls``) and, on the keys that it leaves positive, in
    closed form. A_i itself satisfies the conditions, so there is always a solution, and it is unique. (A row
    for which it cannot be found to 1e-9, next to one-hot, keeps A_i, which is as good as the only one there.)
    """
    return _per_head(step, _distributions, ones=True)


def _per_head(step: Attention, solve: Callable[[Tensor, Tensor, Tensor], Tensor], ones: bool) -> Matrix:
    """``solve(rows [n, M], values [M, D], allowed [n, M])`` for the rows of each head, in float64."""
    probabilities = step.probabilities()
    A, value = probabilities.double(), step.value.detach().double()
    if ones:
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    allowed = step.allowed().expand(A.shape)
    result = A.clone()
    for sample in range(A.shape[0]):
        for head in range(A.shape[1]):
            result[sample, head] = SOLVED(solve, A[sample, head], value[sample, head], allowed[sample, head])
    return result.to(probabilities.dtype)


def _basis(value: Float[Tensor, "keys channels"], may: Bool[Tensor, "queries keys"]) -> Tensor:
    """Orthonormal basis of the column space of the values that may be read, padded with columns of 0.

    [keys, rank] where all queries read the same keys, otherwise [queries, keys, rank].
    """
    readable = may[0][:, None] * value if bool((may == may[0]).all()) else may[:, :, None] * value
    left, singular, _ = torch.linalg.svd(readable, full_matrices=False)
    size = max(readable.shape[-2:]) * torch.finfo(readable.dtype).eps
    return left * (singular > size * singular.amax(dim=-1, keepdim=True))[..., None, :]


def _coordinates(rows: Tensor, basis: Tensor) -> Float[Tensor, "queries rank"]:
    return rows @ basis if basis.ndim == 2 else (rows[:, None] @ basis)[:, 0]


def _combine(coordinates: Tensor, basis: Tensor) -> Float[Tensor, "queries keys"]:
    return coordinates @ basis.mT if basis.ndim == 2 else (coordinates[:, None] @ basis.mT)[:, 0]


def _projected(rows: Tensor, value: Tensor, may: Tensor) -> Float[Tensor, "queries keys"]:
    basis = _basis(value, may)
    return _combine(_coordinates(rows, basis), basis) * may


def _distributions(rows: Tensor, value: Tensor, may: Tensor) -> Float[Tensor, "queries keys"]:
    basis = _basis(value, may)
    target = _coordinates(rows, basis)
    result = _combine(target, basis)
    for i in (result < 0).any(dim=-1).nonzero().flatten().tolist():
        W = (basis if basis.ndim == 2 else basis[i]).cpu().numpy()
        found = _least_norm(target[i].cpu().numpy(), W)
        result[i] = rows[i] if found is None else torch.from_numpy(found).to(result)
    return result * may


def _least_norm(
    target: Float[np.ndarray, "rank"], W: Float[np.ndarray, "keys rank"]
) -> Float[np.ndarray, "keys"] | None:
    """The shortest ``u ≥ 0`` with ``Wᵀ u = target``; None where it is not found."""
    conditions = np.concatenate([_WEIGHT * W.T, np.eye(len(W))])
    wanted = np.concatenate([_WEIGHT * target, np.zeros(len(W))])
    try:
        rough, _ = nnls(conditions, wanted)
    except RuntimeError:  # too many iterations
        return None
    positive = rough > 0
    polished = np.zeros_like(rough)
    polished[positive] = np.linalg.lstsq(W[positive].T, target, rcond=None)[0]
    for u in (polished, rough):
        if u.min() >= 0 and np.abs(W.T @ u - target).max() <= _RESIDUAL:
            return u
    return None


def _positive(relevance: Relevance) -> Relevance:
    return replace(relevance, streams={s: values.clamp(min=0) for s, values in relevance.streams.items()})
