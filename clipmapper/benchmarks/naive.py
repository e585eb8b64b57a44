"""Relevance as released implementations compute it, to measure against: here it is the cost that matters.

Attention is written out, so that every layer's N × N probabilities are in the graph; a backward from y runs
for each gradient that a layer needs; relevance is accumulated in full matrices over all streams' tokens. The
result is that of :func:`clipmapper.relevance.methods.gae` and :func:`clipmapper.relevance.methods.weighted`
(a test compares them). Sub-layers and streams are those that the recorder finds, which costs next to nothing.

One thing is cheaper here than in the released programs: the recorder lets parameters take no gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node


@contextmanager
def attention_written_out() -> Iterator[list[Tensor]]:
    """Within, ``scaled_dot_product_attention`` is matrix products; the probabilities of each call are listed.

    To be entered before the recorder, which remembers whatever function it finds.
    """
    probabilities: list[Tensor] = []

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
        probabilities.append(scores.softmax(dim=-1))
        return probabilities[-1] @ value

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend
    try:
        yield probabilities
    finally:
        F.scaled_dot_product_attention = original


def probability_bytes(trace: AttentionTrace) -> int:
    """The least that these take: every layer's probabilities in the graph, and the scores of one."""
    sizes = [
        step.query[..., 0].numel() * step.key.shape[2] * step.query.element_size() for step in trace.attention
    ]
    return sum(sizes) + max(sizes)


def one_backward_per_layer(
    trace: AttentionTrace, probabilities: list[Tensor], y: Tensor, reads: list[tuple[Node, Tensor]]
) -> dict[str, Tensor]:
    """``gae`` as Chefer et al. 2021 released it: ``autograd.grad(y, A)`` layer by layer."""
    own: dict[str, Tensor] = _columns(trace)

    def update(step: Attention, A: Tensor, state: Mapping[Node, Tensor]) -> Tensor:
        positive = (_gradient(y, A) * A).clamp(min=0).mean(dim=1).detach()
        relevance, other = state[step.query_node], state[step.key_node]
        updated = relevance + positive @ other
        if not step.is_self:
            s, q = own[step.query_node.stream], own[step.key_node.stream]
            between = _normalised(relevance[..., s]).transpose(1, 2) @ positive @ _normalised(other[..., q])
            updated[..., q] = relevance[..., q] + between
        return updated

    return _accumulated(trace, probabilities, update, reads, own)


def three_gradients_per_layer(
    trace: AttentionTrace, probabilities: list[Tensor], y: Tensor, reads: list[tuple[Node, Tensor]]
) -> dict[str, Tensor]:
    """``weighted`` as WRA released it: three ``autograd.grad`` a layer, at A, before and after it."""

    def update(step: Attention, A: Tensor, state: Mapping[Node, Tensor]) -> Tensor:
        positive = (_gradient(y, A) * A).clamp(min=0).mean(dim=1).detach()
        _, at_before, at_added = step.edges
        valid = trace.padding_free(step.query_node.stream)[..., None]
        before = (at_before.turned(_gradient(y, at_before.edge, like=step.before)) * step.before).detach()
        added = (at_added.turned(_gradient(y, at_added.edge, like=step.added)) * step.added).detach()
        before, added = ((t.clamp(min=0) * valid).sum(dim=(1, 2)) for t in (before, added))
        nothing = before + added <= 0
        alpha = torch.where(nothing, 1.0, before / (before + added).masked_fill(nothing, 1.0))[:, None, None]
        sums = positive.sum(dim=-1, keepdim=True)
        relevance, other = state[step.query_node], state[step.key_node]
        moved = torch.where(sums > 0, (positive / sums.masked_fill(sums <= 0, 1.0)) @ other, relevance)
        return alpha * relevance + (1 - alpha) * moved

    return _accumulated(trace, probabilities, update, reads, _columns(trace))


def _gradient(y: Tensor, at, like: Tensor | None = None) -> Tensor:
    (found,) = torch.autograd.grad(y.sum(), at, retain_graph=True, allow_unused=True)
    return torch.zeros_like(at if like is None else like) if found is None else found


def _accumulated(
    trace: AttentionTrace,
    probabilities: list[Tensor],
    update: Callable[[Attention, Tensor, Mapping[Node, Tensor]], Tensor],
    reads: list[tuple[Node, Tensor]],
    own: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The read rows of the matrices of all input tokens, over which ``update`` goes step by step."""
    width = sum(trace.lengths[stream] for stream in trace.inputs)
    everything = torch.eye(width, dtype=trace.dtype, device=trace.device)
    columns = _columns(trace)
    state = {
        Node(stream, 0): everything[columns[stream]].expand(trace.batch, -1, -1) for stream in trace.inputs
    }
    matrices = iter(probabilities)
    for step in trace.steps:
        if isinstance(step, Join):
            state[step.output] = step.gather([state[part] for part in step.parts])
            own[step.output.stream] = step.gather([own[part.stream][None] for part in step.parts])[0]
        else:
            state[step.output_node] = update(step, next(matrices), state)
    rows = torch.arange(trace.batch, device=trace.device)
    total = sum(state[node][rows, position] for node, position in reads)
    return {s: total[:, columns[s]] * trace.padding_free(s) for s in trace.inputs}


def _columns(trace: AttentionTrace) -> dict[str, Tensor]:
    ends = torch.tensor([trace.lengths[stream] for stream in trace.inputs]).cumsum(0).tolist()
    return {s: torch.arange(end - trace.lengths[s], end) for s, end in zip(trace.inputs, ends, strict=True)}


def _normalised(relevance: Tensor) -> Tensor:
    identity = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    sums = (relevance - identity).sum(dim=-1, keepdim=True)
    return (relevance - identity) / sums.masked_fill(sums == 0, 1.0) + identity
