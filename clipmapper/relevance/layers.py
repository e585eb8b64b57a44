"""Leaving out a model's first attention sub-layers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from clipmapper.errors import UserError
from clipmapper.relevance.trace import Attention, AttentionTrace, Join


def from_layer(trace: AttentionTrace, start_layer: int | Mapping[str, int] = 0) -> AttentionTrace:
    """The trace with every input stream entering at its attention sub-layer ``start_layer`` (from 0).

    Relevance then is that of the tokens in that state, each counted as the input token at its place (C = I
    there). Chefer et al.'s notebooks do so for CLIP, whose maps over all layers look noisy: −1 keeps the
    last sub-layer alone. A number holds for every input stream that has sub-layers of its own, a mapping for
    the streams that it names (a stream made of others as well).

    Raises ``UserError`` for a stream that is not there or has no such sub-layer.
    """
    if start_layer == 0:
        return trace
    counts = Counter(step.query_node.stream for step in trace.attention)
    for step in trace.attention:
        if step.pools:  # one sub-layer by itself, with learned queries
            del counts[step.query_node.stream]
    if isinstance(start_layer, Mapping):
        wanted = dict(start_layer)
    else:
        wanted = {stream: start_layer for stream in trace.inputs if stream in counts}
        if not wanted:
            raise UserError(f"start_layer={start_layer}: name a stream, one of {', '.join(counts)}")
    first = {}
    for stream, number in wanted.items():
        if stream not in counts:
            raise UserError(f"start_layer: no stream {stream!r} with sub-layers; one of {', '.join(counts)}")
        count = counts[stream]
        if not -count <= number < count:
            raise UserError(
                f"start_layer={number}: stream {stream!r} has {count} attention sub-layers, so it must be "
                f"{-count} to {count - 1}; a mapping gives each stream its own: {{{stream!r}: {count - 1}}}"
            )
        first[stream] = number % count

    def kept(step: Attention | Join) -> Attention | Join:
        if isinstance(step, Join) or step.query_node.version >= first.get(step.query_node.stream, 0):
            return step
        return Join(step.output_node, (step.query_node,))  # every token stays what it is

    return replace(trace, steps=[kept(step) for step in trace.steps])
