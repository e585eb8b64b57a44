"""Methods on attention alone, and ``random``, their control: none of them needs a gradient."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from clipmapper.relevance.method import Relevance, as_relevance, explanation
from clipmapper.relevance.propagation import Matrix, mean_attention, propagate, rows_times
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node, exact_step


@explanation(layers=True)
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


@explanation()
def raw_attention(trace: AttentionTrace) -> Relevance:
    """Mean attention of the heads in the last sub-layer in which the read token reads each modality.

    Where it reads tokens that were pooled from others by learned queries (CoCa's decoder), they pass on what
    they get as their own attention says.
    """
    return last_attention(trace, mean_attention)


def last_attention(trace: AttentionTrace, matrix: Matrix) -> Relevance:
    """The read row of ``matrix(step)`` for the last sub-layer that reads each input stream.

    ``matrix(step, samples, queries)`` gives Float[samples, queries, keys].
    """
    rows = {node.stream: row for node, row in trace.read_row().items()}
    found: dict[str, Tensor] = {}
    for step in last_reading(trace).values():
        to_keys, _ = rows_times(matrix, exact_step(step), rows[step.query_node.stream], normalise=False)
        for stream, part in on_inputs(trace, step.key_node.stream, to_keys).items():
            found.setdefault(stream, part[:, 0])
    return as_relevance(trace, found)


def last_reading(trace: AttentionTrace) -> dict[Node, Attention]:
    """The last sub-layers in which a stream that is read reads each stream, by what they give, last first."""
    read = {node.stream for node, _ in trace.reads}
    found: dict[Node, Attention] = {}
    seen: set[str] = set()
    for step in reversed(trace.attention):
        if step.query_node.stream in read and step.key_node.stream not in seen:
            seen.add(step.key_node.stream)
            found[step.output_node] = step
    return found


def on_inputs(
    trace: AttentionTrace,
    stream: str,
    row: Float[Tensor, "batch 1 tokens"],
    held: Float[Tensor, "batch 1 tokens"] | None = None,
    through_pools: bool = True,
) -> dict[str, Float[Tensor, "batch 1 _part"]]:
    """A row over a stream's tokens, given to the input streams that the stream was joined or pooled from.

    ``held``: 1 for the tokens of ``stream`` that the row is about; all of them, unless told otherwise. An
    input stream none of whose tokens the row is about is left out. ``through_pools``: learned queries that
    pool pass what they get on to what they read; otherwise it is left out (they are no input).
    """
    pool = next((s for s in trace.attention if s.pools and s.query_node.stream == stream), None)
    if pool is not None:  # learned queries have nothing of their own
        if not through_pools:
            return {}
        to_keys, _ = rows_times(mean_attention, pool, row, normalise=False)
        return on_inputs(trace, pool.key_node.stream, to_keys)
    join = next((s for s in trace.steps if isinstance(s, Join) and s.output == Node(stream, 0)), None)
    if join is None:
        return {stream: row}
    sizes = [trace.lengths[part.stream] for part in join.parts]
    holdings = join.spread(torch.ones_like(row) if held is None else held, sizes)
    inputs = {}
    for part, piece, holds in zip(join.parts, join.spread(row, sizes), holdings, strict=True):
        # A stream that was taken out of others (the image, of one flow) may hold nothing of some.
        if bool(holds.any()):
            inputs.update(on_inputs(trace, part.stream, piece, holds, through_pools))
    return inputs


@explanation()
def random(trace: AttentionTrace, seed: int = 0) -> Relevance:
    """Uniform scores in [0, 1), a function of the seed and of each sample's identity (``trace.samples``)."""
    identities = range(trace.batch) if trace.samples is None else trace.samples
    streams = {stream: [] for stream in trace.inputs}
    for identity in identities:
        generator = torch.Generator().manual_seed(hash((seed, int(identity))) & 0x7FFF_FFFF_FFFF_FFFF)
        for stream in trace.inputs:
            streams[stream].append(torch.rand(trace.lengths[stream], generator=generator))
    return as_relevance(
        trace, {s: torch.stack(rows).to(trace.device, trace.dtype) for s, rows in streams.items()}
    )


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
