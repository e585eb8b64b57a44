"""Methods that take tokens out of the model's input and look at what becomes of y."""

import torch
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.method import Needs, Relevance, as_relevance, explanation, with_sign
from clipmapper.relevance.rerun import Removal, again
from clipmapper.relevance.trace import AttentionTrace


@explanation(needs=Needs(backward=False))
def leave_one_out(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """Leave-one-out (Robnik-Šikonja & Kononenko 2008; erasure of Li et al. 2016, arXiv 1612.08220): by how
    much y falls when one token is taken out of the sequence.

    Exact: for each token a forward without it, in batches, and what a token's removal leaves as it is (the
    other modality's tower) is computed once. It is the first step of the perturbation test, for every token
    by itself; :func:`~clipmapper.relevance.methods.gradients.occlusion` sets a token to 0 instead and leaves
    it in its place. Tokens that are always there (class token, start and end of a text) have relevance 0.
    ``sign``: "positive" (y falls), "negative" (y rises, as positive numbers) or "both". Defined for the
    models whose ``trace.again`` can remove tokens (:class:`~clipmapper.relevance.rerun.Removal`): those of
    CLIPmapper's tasks. Raises ``UserError`` for others.
    """
    running = again(trace, "leave_one_out")
    if running.removal is None:
        raise UserError(
            "leave_one_out removes tokens from the sequence, and nobody said how from this model's: set "
            "Again.removal, as clipmapper.explain does"
        )
    whole = running.value(trace)
    streams = {
        stream: _falls(trace, running.removal, stream, removable.to(trace.device), whole)
        for stream, removable in running.removal.removable.items()
    }
    return with_sign(as_relevance(trace, streams), sign)


def _falls(trace: AttentionTrace, removal: Removal, stream: str, removable: Tensor, whole: Tensor) -> Tensor:
    found = torch.zeros(removable.shape, dtype=trace.dtype, device=trace.device)
    samples, tokens = removable.nonzero(as_tuple=True)
    at_once = max(1, len(trace.attention)) * trace.batch  # as `occlusion`: what a graph's memory would hold
    for part in torch.arange(len(samples), device=samples.device).split(at_once):
        rows, left_out = samples[part], tokens[part]
        without = trace.again.removed(rows, stream, left_out)
        found[rows, left_out] = (whole[rows] - without).to(trace.dtype)
    return found
