"""Attention flow: how much can flow from the read token to each input token."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from clipmapper.relevance.method import explanation
from clipmapper.relevance.propagation import mean_attention
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import Attention, AttentionTrace, Node

# scipy's maximum_flow takes 32-bit integers. What leaves a token is 1 in total, and at most a few are read.
_SCALE = 2**28


@explanation(layers=True)
def attention_flow(trace: AttentionTrace) -> Relevance:
    """Attention flow (Abnar & Zuidema 2020, arXiv 2005.00928): maximum flow to each input token by itself.

    The graph has a node for every token in every state. A sub-layer's edges lead from a token after it to the
    tokens before it, with capacities ``Ã = rownorm(E_h A + I)``: half goes to the token itself, half is
    shared as attention says. Defined for every trace; in the paper for one stream. With cross-attention (a
    choice of ours) the same two halves go to the token itself and to the tokens of the other stream;
    attention that pools passes all on, having nothing before it. Where several rows are read (a mean of
    tokens, two towers) the flow comes from a source before them, as much to each as it is read.

    Exact (scipy's ``maximum_flow``) for capacities rounded to multiples of 2⁻²⁸: a flow is off by at most
    2⁻²⁹ for every edge of its smallest cut. One flow problem a token and sample: slow for long sequences.
    """
    scores = {
        stream: torch.zeros(trace.batch, trace.lengths[stream], dtype=trace.dtype, device=trace.device)
        for stream in trace.inputs
    }
    for sample in range(trace.batch):
        first, graph = _graph(trace, sample)
        source = graph.shape[0] - 1
        for stream in trace.inputs:
            valid = trace.padding_free(stream)[sample].nonzero().flatten().tolist()
            for token in valid:
                sink = first[Node(stream, 0)] + token
                scores[stream][sample, token] = maximum_flow(graph, source, sink).flow_value / _SCALE
    return as_relevance(trace, scores)


def _graph(trace: AttentionTrace, sample: int) -> tuple[dict[Node, int], csr_array]:
    """The number of every node's first token, and the capacities between all tokens and from the source."""
    first: dict[Node, int] = {}
    size = 0
    for node in _nodes(trace):
        if node not in first:
            first[node] = size
            size += trace.lengths[node.stream]
    rows, columns, capacities = [], [], []

    def connect(start: int, end: int, capacity: Float[np.ndarray, "from to"]) -> None:
        i, j = capacity.nonzero()
        rows.append(start + i)
        columns.append(end + j)
        capacities.append(capacity[i, j])

    for step in trace.steps:
        if isinstance(step, Attention):
            mean = mean_attention(step)[sample].double().cpu().numpy()
            start = first[step.output_node]
            if step.is_self:
                connect(start, first[step.query_node], (mean + np.eye(len(mean))) / 2)
            elif step.pools:
                connect(start, first[step.key_node], mean)
            else:
                connect(start, first[step.query_node], np.eye(len(mean)) / 2)
                connect(start, first[step.key_node], mean / 2)
        else:
            sizes = [trace.lengths[part.stream] for part in step.parts]
            one_hot = torch.eye(trace.lengths[step.output.stream])[None].expand(trace.batch, -1, -1)
            for part, piece in zip(step.parts, step.spread(one_hot, sizes), strict=True):
                connect(first[step.output], first[part], piece[sample].double().numpy())
    for node, row in trace.read_row().items():
        connect(size, first[node], row[sample].double().cpu().numpy())
    entries = np.rint(np.concatenate(capacities) * _SCALE).astype(np.int32)
    place = (np.concatenate(rows), np.concatenate(columns))
    graph = csr_array((entries, place), shape=(size + 1, size + 1))
    graph.eliminate_zeros()
    return first, graph


def _nodes(trace: AttentionTrace) -> Iterator[Node]:
    yield from (Node(stream, 0) for stream in trace.inputs)
    for step in trace.steps:
        if isinstance(step, Attention):
            yield from (step.query_node, step.key_node, step.output_node)
        else:
            yield from (*step.parts, step.output)
