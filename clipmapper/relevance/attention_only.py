"""Methods that look at attention and at nothing else: no gradient is needed."""

from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.propagation import Matrix, mean_attention, propagate, rows_times
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node


def rollout(trace: AttentionTrace) -> Relevance:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): ``Ã = rownorm(E_h A + I)``, multiplied up.

    Across modalities the *last* cross-attention that the read stream makes is chained between the two
    streams' rollouts: read row, rollout of its own stream after that cross-attention, mean attention of
    the cross-attention, rollout of the other stream up to the state that was read. (Chefer et al.'s LXMERT
    code puts the transposed rollout of the whole own stream there, which is no path through the network.)
    """
    crossing = {node.stream for node, _ in trace.reads}

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        to_keys, _ = rows_times(mean_attention, step, row, normalise=False)
        if step.query_node.stream == step.key_node.stream:
            # rownorm(A + I) = (A + I) / 2, since every row of A sums to 1.
            return row / 2, to_keys / 2
        if step.pools:  # learned queries have no relevance to take along; whoever reads them reads the keys
            return row, to_keys
        if step.query_node.stream not in crossing:
            return row, None
        crossing.remove(step.query_node.stream)
        return row, to_keys

    rows = propagate(trace, trace.read_row(), rule)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


def raw_attention(trace: AttentionTrace) -> Relevance:
    """Mean attention of the heads in the last sub-layer in which the read token reads each modality."""
    return last_attention(trace, mean_attention)


def last_attention(trace: AttentionTrace, matrix: Matrix) -> Relevance:
    """The read row of ``matrix(step)`` for the last sub-layer that reads each input stream.

    ``matrix(step, samples, queries)`` gives Float[samples, queries, keys].
    """
    rows = {node.stream: row for node, row in trace.read_row().items()}
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    for step in reversed(trace.attention):
        source = step.key_node.stream
        if step.query_node.stream in rows and source not in seen:
            seen.add(source)
            to_keys, _ = rows_times(matrix, step, rows[step.query_node.stream], normalise=False)
            for stream, part in _split(trace, source, to_keys).items():
                # A stream that was taken out of others (the image, of one flow) may hold nothing of some.
                if bool((trace.places(stream, source) >= 0).any()):
                    found.setdefault(stream, part[:, 0])
    return as_relevance(trace, found)


def _split(
    trace: AttentionTrace, stream: str, row: Float[Tensor, "batch 1 tokens"]
) -> dict[str, Float[Tensor, "batch 1 _part"]]:
    """A row over a stream's tokens, given to the input streams that the stream was joined from."""
    join = next((s for s in trace.steps if isinstance(s, Join) and s.output == Node(stream, 0)), None)
    if join is None:
        return {stream: row}
    pieces = join.spread(row, [trace.lengths[part.stream] for part in join.parts])
    inputs = {}
    for part, piece in zip(join.parts, pieces, strict=True):
        inputs.update(_split(trace, part.stream, piece))
    return inputs
