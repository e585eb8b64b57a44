"""The control that every explanation must beat."""

import torch

from clipmapper.relevance.method import explanation
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import AttentionTrace


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
