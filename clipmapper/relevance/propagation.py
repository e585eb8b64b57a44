"""Accumulated relevance, one row at a time, from the read token back to the inputs.

Only one row of the relevance matrix ``C`` is read. Where a sub-layer's rule is ``C_s ← P C_s + Q C_r``, the
row ``r C_s`` after it is ``(r P) C_s + (r Q) C_r`` before it: rows run backwards through the trace at the
price of a vector–matrix product a sub-layer, and the result is identical to that of full matrices.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node, by_sample, exact_step

# Given a sub-layer and rows at its output, the rows at its query tokens and at its key tokens.
Rule = Callable[
    [Attention, Float[Tensor, "batch rows queries"]],
    tuple[Float[Tensor, "batch rows queries"], Float[Tensor, "batch rows keys"] | None],
]

# How many numbers of attention (samples × heads × queries × keys) are rebuilt at a time: they stay in a
# core's cache (on a CPU, 8 images through ViT-B/16: half the time of whole layers), and memory grows with N
# and not with N². A GPU has no such cache, and each block costs it a dozen launches.
_BLOCK = 2**20
_BLOCK_ON_GPU = 2**26

# (step, which samples, which query rows) → Float[samples, queries, keys].
Matrix = Callable[[Attention, slice, slice], Tensor]

_ALL = slice(None)


def propagate(
    trace: AttentionTrace,
    rows: Mapping[Node, Float[Tensor, "batch rows _tokens"]],
    rule: Rule,
    *,
    as_recorded: bool = False,
) -> dict[str, Float[Tensor, "batch rows _tokens"]]:
    """Take rows (one-hot at the tokens to be read) back to the inputs; returns them per input stream.

    ``as_recorded``: give the rule sub-layers with numbers in half precision, which it makes exact where it
    computes with them (most rules get them as float32).
    """
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
            own, to_keys = rule(step if as_recorded else exact_step(step), row)
            _add(at, step.query_node, own)
            if to_keys is not None:
                _add(at, step.key_node, to_keys)
    return {node.stream: row for node, row in at.items() if node.version == 0 and node.stream in trace.inputs}


def _add(at: dict[Node, Tensor], node: Node, row: Tensor) -> None:
    at[node] = at[node] + row if node in at else row


def positive_attention(
    step: Attention, samples: slice = _ALL, queries: slice = _ALL
) -> Float[Tensor, "samples queries keys"]:
    """Ā = mean over heads of relu(∇A ⊙ A) (Chefer et al. 2021, eq. 5), for some samples and query rows."""
    part = part_of(step, samples, queries)
    # In place, as what is rebuilt belongs to nobody else: with one pass less over memory each.
    return part.probability_gradient().mul_(part.probabilities()).clamp_(min=0).mean(dim=1)


def signed_attention(
    step: Attention, samples: slice = _ALL, queries: slice = _ALL
) -> Float[Tensor, "samples queries keys"]:
    """Mean over heads of ∇A ⊙ A."""
    part = part_of(step, samples, queries)
    return part.probability_gradient().mul_(part.probabilities()).mean(dim=1)


def mean_attention(
    step: Attention, samples: slice = _ALL, queries: slice = _ALL
) -> Float[Tensor, "samples queries keys"]:
    """Mean over heads of A."""
    return part_of(step, samples, queries).probabilities().mean(dim=1)


def rows_times(
    matrix: Matrix,
    step: Attention,
    row: Float[Tensor, "batch rows queries"],
    normalise: bool,
) -> tuple[Float[Tensor, "batch rows keys"], Float[Tensor, "batch rows queries"]]:
    """``row @ M`` for a matrix that is rebuilt block by block, and what of ``row`` met an empty row.

    With ``normalise`` every row of M is divided by its sum; a row whose sum is 0 has nothing to pass on,
    and the second value holds that part of ``row``. Rows of M that ``row`` does not ask for (all but the
    read token's in the last sub-layer) are not rebuilt.
    """
    made_for = matrix is positive_attention or (matrix is signed_attention and not normalise)
    kernels = kernels_for(step, row) if made_for else None
    if kernels is not None:
        if matrix is signed_attention:
            total, stuck = kernels.row_times_signed_attention(step, row), torch.zeros_like(row)
        else:
            total, stuck = kernels.row_times_positive_attention(step, row, normalise)
        if step.gradient_scale is not None and not normalise:
            total = total / by_sample(step.gradient_scale, total)
        return total, stuck
    step = exact_step(step, only_attention=True)
    total = torch.zeros(*row.shape[:2], step.key.shape[2], dtype=row.dtype, device=row.device)
    stuck = torch.zeros_like(row)
    for samples, queries in blocks(step, row):
        part = matrix(step, samples, queries).to(row.dtype)
        weight = row[samples, :, queries]
        if normalise:
            sums = part.sum(dim=-1)
            empty = sums <= 0
            stuck[samples, :, queries] = weight * empty[:, None]
            weight = weight * (~empty / sums.masked_fill_(empty, 1.0))[:, None]
        total[samples] += weight @ part
    return total, stuck


def kernels_for(step: Attention, row: Float[Tensor, "batch rows queries"]) -> ModuleType | None:
    """:mod:`clipmapper.relevance.kernels` where they are made for this row of this sub-layer."""
    kernels = _kernels() if row.is_cuda else None
    return kernels if kernels is not None and kernels.can_multiply(step, row) else None


@functools.cache
def _kernels() -> ModuleType | None:
    """Import the kernels; None without Triton (Windows), or where the GPU is none of NVIDIA's or too old."""
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from clipmapper.relevance import kernels
    except ImportError:
        return None
    return kernels


def blocks(step: Attention, row: Float[Tensor, "batch rows queries"]) -> Iterator[tuple[slice, slice]]:
    """Samples and query rows that cover all of ``row`` but its zeros in front and behind."""
    asked = (row != 0).flatten(0, 1).any(dim=0).nonzero().flatten()
    if len(asked) == 0:
        return
    first, last = int(asked[0]), int(asked[-1])
    heads, keys = step.key.shape[1:3]
    one_row = heads * keys
    block = _BLOCK if row.device.type == "cpu" else _BLOCK_ON_GPU
    at_once = max(1, block // (one_row * (last + 1 - first)))
    rows = max(1, block // (one_row * min(at_once, len(row))))
    for sample in range(0, len(row), at_once):
        for start in range(first, last + 1, rows):
            yield slice(sample, sample + at_once), slice(start, min(start + rows, last + 1))


def part_of(step: Attention, samples: slice, queries: slice) -> Attention:
    """The sub-layer restricted to some samples and query rows (a view: nothing is copied).

    It has what it takes to rebuild attention and its gradient; gradients of tokens are left behind.
    """
    batch, count = step.query.shape[0], step.query.shape[2]
    if range(count)[queries] == range(count) and range(batch)[samples] == range(batch):
        return step
    mask, causal = step.mask, step.causal
    if causal:
        positions = torch.arange(count, device=step.query.device)
        mask = positions[queries, None] >= torch.arange(step.key.shape[2], device=step.query.device)
        causal = False
    elif mask is not None:
        if mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[samples]
        if mask.shape[-2] > 1:
            mask = mask[..., queries, :]

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[samples, :, queries]

    return replace(
        step,
        query=cut(step.query),
        key=step.key[samples],
        value=step.value[samples],
        mixed=cut(step.mixed),
        before=step.before[samples, queries],
        added=step.added[samples, queries],
        mask=mask,
        causal=causal,
        mixed_gradient=cut(step.mixed_gradient),
        gradient_scale=None if step.gradient_scale is None else step.gradient_scale[samples],
        replaced=cut(step.replaced),
        before_gradient=None,
        added_gradient=None,
        after=None,
    )
