"""LeGrad: every layer is read out by the model's head."""

import torch
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.again import again
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node


def legrad(trace: AttentionTrace) -> Relevance:
    """LeGrad (Bousselham et al. 2024, arXiv 2404.03214).

    ``s_l`` is what the model's head gives for the mean of layer l's tokens (after its MLP; padding left out);
    the relevance of token j is ``Σ_l E_h mean_i relu(∂s_l / ∂A_l[i, j])``, scaled to [0, 1] over the tokens
    of a stream. The head has its own norm and projection. As in the released code, which takes the mean also
    where the model itself reads a class token.

    Defined for the layers whose residual stream the head reads (``Again.readout``): those of CLIPmapper's
    mapper, all blocks of a single ViT. In a mapper with two flows the layer of a cross-attention adds to the
    other stream's tokens (ours; the paper has one stream).
    """
    running = again(trace, "legrad")
    if running.readout is None:
        raise UserError("legrad reads every layer by the model's head: set Again.readout to it")
    recorded = running.undifferentiated(trace)
    read_stream = trace.reads[0][0].stream
    totals: dict[str, Tensor] = {}
    layer: list[Attention] = []
    for step in recorded.attention:
        if step.query_node.stream != read_stream or not running.readout.applies(step):
            continue
        layer.append(step)
        if step.after is None:
            continue
        inside = recorded.padding_free(read_stream)[..., None].to(step.after.dtype)
        with torch.enable_grad():
            pooled = (step.after * inside).sum(dim=1) / inside.sum(dim=1)
            score = running.readout(pooled).sum()
        found = torch.autograd.grad(score, [s.mixed for s in layer], retain_graph=True)
        for sublayer, gradient in zip(layer, found, strict=True):
            evidence = (gradient @ sublayer.value.detach().transpose(-2, -1)).clamp(min=0)
            # Rows of padding are no tokens of the layer.
            rows = inside[:, None] / inside.sum(dim=1)[:, None, None]
            column = (evidence * rows).sum(dim=2).mean(dim=1)
            source = sublayer.key_node.stream
            totals[source] = totals[source] + column if source in totals else column
        layer = []
    recorded.release_graph()
    if not totals:
        raise UserError(
            "legrad: of no layer that the head reads it is known what comes after its MLP; it is for "
            "CLIPmapper and captioners"
        )
    streams = {}
    for stream, values in totals.items():
        for part, piece in _inputs(recorded, stream, values).items():
            streams[part] = _scaled(piece, recorded.padding_free(part))
    return as_relevance(trace, streams)


def _inputs(trace: AttentionTrace, stream: str, values: Tensor) -> dict[str, Tensor]:
    join = next((s for s in trace.steps if isinstance(s, Join) and s.output == Node(stream, 0)), None)
    if join is None:
        return {stream: values}
    pieces = values.split([trace.lengths[part.stream] for part in join.parts], dim=-1)
    return {part.stream: piece for part, piece in zip(join.parts, pieces, strict=True)}


def _scaled(values: Tensor, valid: Tensor) -> Tensor:
    low = values.masked_fill(~valid, float("inf")).amin(dim=1, keepdim=True)
    high = values.masked_fill(~valid, float("-inf")).amax(dim=1, keepdim=True)
    flat = high <= low  # one token, or the same everywhere: 1 where there is evidence at all
    return torch.where(
        flat, (values > 0).to(values.dtype), (values - low) / (high - low).masked_fill(flat, 1)
    )
