"""LeGrad: every layer is read out by the model's head."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rules import backward_rules
from clipmapper.relevance.method import explanation, from_layer
from clipmapper.relevance.methods.attention_only import on_inputs
from clipmapper.relevance.rerun import again
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import Attention, AttentionTrace


@explanation(gradient=True)
def legrad(trace: AttentionTrace, start_layer: int | Mapping[str, int] = 0) -> Relevance:
    """LeGrad (Bousselham et al. 2024, arXiv 2404.03214).

    ``s_l`` is what the model's head gives for the mean of layer l's tokens (after its MLP; padding left out);
    the relevance of token j is ``Σ_l E_h mean_i relu(∂s_l / ∂A_l[i, j])``, scaled to [0, 1] over the tokens
    of a stream. The head has its own norm and projection. As in the released code, which takes the mean also
    where the model itself reads a class token.

    Defined for the layers whose residual stream the head reads (``Again.readout``): those of CLIPmapper's
    mapper, all blocks of a single ViT. In a mapper with two flows the layer of a cross-attention adds to the
    other stream's tokens (ours; the paper has one stream). ``start_layer`` (default: all layers, as in the
    paper's formula; the released code begins in the middle): see
    :func:`~clipmapper.relevance.method.from_layer`.
    Raises ``UserError`` without a readout, or where the end of the last layer was not recorded.
    """
    running = again(trace, "legrad")
    if running.readout is None:
        raise UserError("legrad reads every layer by the model's head: set Again.readout to it")
    trace.require_no_cut()
    recorded = from_layer(running.undifferentiated(trace), start_layer)
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
        with torch.enable_grad(), backward_rules(trace.rules):
            pooled = (step.after * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)
            score = running.readout(pooled).sum()
        found = torch.autograd.grad(score, [s.mixed for s in layer], retain_graph=True)
        for sublayer, gradient in zip(layer, found, strict=True):
            sublayer = replace(sublayer, mixed_gradient=gradient, gradient_scale=None)
            evidence = sublayer.probability_gradient().clamp(min=0)
            # Rows of padding are no tokens of the layer.
            rows = (inside[:, None] / inside.sum(dim=1)[:, None, None].clamp(min=1)).to(evidence.dtype)
            column = (evidence * rows).sum(dim=2).mean(dim=1)
            source = sublayer.key_node.stream
            totals[source] = totals[source] + column if source in totals else column
        layer = []
    recorded.release_graph()
    if layer or not totals:
        raise UserError(
            f"legrad reads layers where they end, and the recorder sees no end of the last layer of stream "
            f"{read_stream!r} that the readout applies to; whole blocks have one (ViT, GPT-2), parts do not "
            "(BERT, T5)"
        )
    streams = {}
    for stream, values in totals.items():
        for part, piece in on_inputs(recorded, stream, values[:, None]).items():
            streams[part] = _scaled(piece[:, 0], recorded.padding_free(part))
    return as_relevance(trace, streams)


def _scaled(values: Tensor, valid: Tensor) -> Tensor:
    low = values.masked_fill(~valid, float("inf")).amin(dim=1, keepdim=True)
    high = values.masked_fill(~valid, float("-inf")).amax(dim=1, keepdim=True)
    flat = high <= low  # one token, or the same everywhere: 1 where there is evidence at all
    return torch.where(
        flat, (values > 0).to(values.dtype), (values - low) / (high - low).masked_fill(flat, 1)
    )
