"""Methods on attention alone, and ``random``, their control: none of them needs a gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.method import explanation
from clipmapper.relevance.propagation import Matrix, mean_attention, propagate, rows_times
from clipmapper.relevance.result import Relevance, as_relevance
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
    seen: set[str] = set()
    for step in reversed(trace.attention):
        source = step.key_node.stream
        if step.query_node.stream in rows and source not in seen:
            seen.add(source)
            to_keys, _ = rows_times(matrix, exact_step(step), rows[step.query_node.stream], normalise=False)
            for stream, part in on_inputs(trace, source, to_keys).items():
                found.setdefault(stream, part[:, 0])
    return as_relevance(trace, found)


def on_inputs(
    trace: AttentionTrace,
    stream: str,
    row: Float[Tensor, "batch 1 tokens"],
    held: Float[Tensor, "batch 1 tokens"] | None = None,
) -> dict[str, Float[Tensor, "batch 1 _part"]]:
    """A row over a stream's tokens, given to the input streams that the stream was joined or pooled from.

    ``held``: 1 for the tokens of ``stream`` that the row is about; all of them, unless told otherwise. An
    input stream none of whose tokens the row is about is left out.
    """
    pool = next((s for s in trace.attention if s.pools and s.query_node.stream == stream), None)
    if pool is not None:  # learned queries have nothing of their own
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
            inputs.update(on_inputs(trace, part.stream, piece, holds))
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
