"""Methods that look at the gradient of one sub-layer, of every layer by itself, or of the input tokens."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rules import backward_rules
from clipmapper.relevance.method import Needs, Relevance, as_relevance, explanation, from_layer, with_sign
from clipmapper.relevance.methods.attention_only import last_attention, on_inputs
from clipmapper.relevance.propagation import part_of
from clipmapper.relevance.rerun import again, input_tokens, with_rules
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node, exact_step


@explanation(gradient=True)
def grad_cam(trace: AttentionTrace, rows: str = "all") -> Relevance:
    """Grad-CAM (Selvaraju et al. 2017) on attention, as Chefer et al. 2021 use it as a baseline.

    ``relu(E_h[(mean_ij ∇A) · A])`` of the last sub-layer in which the read token reads each modality, on
    the read row. The mean leaves padding out: a sample's map does not depend on what it is batched with.

    Its authors' code has it in two forms. ``rows``: "all", the mean is over all rows and columns (the
    baseline on LXMERT, arXiv 2103.15679); "read", over the read row, without the column in which the read
    token reads itself (on ViT, arXiv 2012.09838: the class token's row over the patches). Where several rows
    are read, they count as they are read.
    Needs ``trace.backward(y)``. Raises ``UserError`` for another ``rows``.
    """
    if rows not in ("all", "read"):
        raise UserError(f"rows={rows!r}: must be one of all, read")
    read = {node.stream: row for node, row in trace.read_row().items()}

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        valid = trace.padding_free(step.query_node.stream)[samples, None, :, None]
        columns = trace.padding_free(step.key_node.stream)[samples, None, None, :]
        inside = (valid & columns).to(trace.dtype)
        if rows == "read":
            inside = inside * read[step.query_node.stream][samples, :, :, None]
            if step.is_self:
                inside = inside * (1 - torch.eye(inside.shape[-1], dtype=inside.dtype, device=inside.device))
        step = part_of(step, samples, slice(None))
        weight = (step.probability_gradient() * inside).sum(dim=(2, 3), keepdim=True)
        count = inside.sum(dim=(2, 3), keepdim=True)
        weight = weight / count.masked_fill(count <= 0, 1)
        return (weight * step.probabilities()).mean(dim=1).clamp(min=0)[:, queries]

    return last_attention(trace, matrix)


@explanation(gradient=True)
def grad_eclip(trace: AttentionTrace) -> Relevance:
    """Grad-ECLIP (Zhao et al. 2024, ICML) of the last sub-layer in which the read token reads each modality.

    ``relu(Σ_d (∂y/∂o_read)_d v_{i,d} λ_i)``, o and v all heads side by side, ``λ_i`` the cosine of the read
    token's query and key i, scaled to [0, 1] over the keys. Differences from the released code: λ is scaled
    over all keys that may be read, there without the image's class token; and q, k are compared as they are,
    where a later version of the code sends them through the output projection first; and the model keeps its
    heads and one layer counts, where the code runs the last layer with a single head and sums 8 layers for
    text. Where all cosines are equal λ is 1. Made for CLIP; defined for every trace.
    Needs ``trace.backward(y)``.
    """

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        step = part_of(step, samples, slice(None))
        query, key = (t.detach().transpose(1, 2).flatten(2) for t in (step.query, step.key))
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(1, 2)
        allowed = step.allowed()
        allowed = (allowed if allowed.ndim == 2 else allowed[:, 0]).expand(cosine.shape)
        low = cosine.masked_fill(~allowed, float("inf")).amin(dim=-1, keepdim=True)
        high = cosine.masked_fill(~allowed, float("-inf")).amax(dim=-1, keepdim=True)
        same = high <= low
        scaled = ((cosine - low) / (high - low).masked_fill(same, 1.0)).masked_fill(same, 1.0)
        evidence = step.probability_gradient().sum(dim=1)  # Σ over heads and channels of ∂o · v
        return (scaled * allowed * evidence).clamp(min=0)[:, queries]

    return last_attention(trace, matrix)


@explanation()
def input_x_gradient(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """Gradient × input on the tokens that enter the first sub-layers, summed over channels.

    The tokens are those after position embeddings. ``sign``: "positive" evidence, "negative" (as positive
    numbers), or "both", which sum up to the first-order change of y. Equal to captum's ``InputXGradient`` on
    these tokens (a test compares them). Defined for every trace in which each input stream has a sub-layer of
    its own (learned queries that pool, which are no input, get 0). Needs ``trace.backward(y)``.
    """
    trace.require_no_cut()
    found: dict[str, Tensor] = {}
    pooling = {step.query_node.stream for step in trace.attention if step.pools}
    for step in trace.attention:
        node = step.query_node
        if node.version == 0 and not step.pools:
            step = exact_step(step)
            gradient, _ = step.gradients()
            product = (gradient * step.before.detach()).sum(dim=-1)
            for stream, values in _entered(trace, node, product).items():
                found.setdefault(stream, values)
    for stream in trace.inputs:
        if stream not in found and stream not in pooling:
            raise UserError(
                f"input × gradient: stream {stream!r} is only read, by cross-attention; the gradient at its "
                "tokens is not recorded"
            )
    return with_sign(as_relevance(trace, found), sign)


@explanation(needs=Needs(rules="attn_lrp"))
def attn_lrp(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """AttnLRP (Achtibat et al. 2024, arXiv 2402.05602): gradient × input under its backward rules.

    See :func:`clipmapper.relevance.backward.rules.backward_rules`. ε is 0, so a bias takes its part of the
    relevance. Raises ``UserError`` where relevance arrives at an operator that has no rule, which it names.
    """
    return input_x_gradient(with_rules(trace, "attn_lrp", "attn_lrp"), sign=sign)


def _entered(trace: AttentionTrace, node: Node, values: Tensor) -> dict[str, Tensor]:
    """Values of a node's tokens, for those of them that are inputs there."""
    if node.stream in trace.inputs:
        return {node.stream: values}
    join = next((s for s in trace.steps if isinstance(s, Join) and s.output == node), None)
    if join is None:
        return {}
    pieces = join.spread(values[:, None], [trace.lengths[part.stream] for part in join.parts])
    return {p.stream: v[:, 0] for p, v in zip(join.parts, pieces, strict=True) if p.version == 0}


@explanation(gradient=True, needs=Needs(backward=False))
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
    Each ``s_l`` is differentiated from the end of layer l back to its A alone, in the trace's own graph where
    that is kept; otherwise the forward is recorded once more.
    Raises ``UserError`` without a readout, or where the end of the last layer was not recorded.
    """
    running = again(trace, "legrad")
    if running.readout is None:
        raise UserError("legrad reads every layer by the model's head: set Again.readout to it")
    trace.require_no_cut()
    has_graph = all(step.mixed.requires_grad and step.edges for step in trace.attention)
    recorded = from_layer(trace if has_graph else running.undifferentiated(trace), start_layer)
    streams_changed = {step.query_node.stream for step in trace.attention}
    read_stream = streams_changed.pop() if len(streams_changed) == 1 else trace.reads[0][0].stream
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
    if not has_graph:
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


_VARIANTS = 64  # on a GPU at most so many in one forward, or one of each sample
_GRAPH = 4  # so many times what is recorded a graph keeps at most (a ViT's block 10 widths a token, and 6)


def _points_at_once(trace: AttentionTrace) -> int:
    """How many points of the line, of all samples together, are differentiated at once.

    One of each sample: then memory is that of one gradient. A GPU, which such small batches leave idle, takes
    more of them as long as half of its free memory holds their graphs.
    """
    if trace.device.type != "cuda":
        return trace.batch
    recorded = [t for s in trace.attention for t in (s.query, s.key, s.value, s.mixed, s.before, s.before)]
    bytes_each = _GRAPH * sum(t.numel() * t.element_size() for t in recorded) / trace.batch
    fitting = int(torch.cuda.mem_get_info(trace.device)[0] / 2 / bytes_each)
    return max(trace.batch, min(_VARIANTS, fitting))


def _variants_at_once(trace: AttentionTrace) -> int:
    """How many variants of each sample run in one forward without a graph.

    One a sub-layer: such a forward holds what a sub-layer computes, a graph what all of them do.
    """
    many = len(trace.attention) * trace.batch
    return max(1, (many if trace.device.type != "cuda" else max(many, _VARIANTS)) // trace.batch)


@explanation()
def integrated_gradients(trace: AttentionTrace, steps: int = 50, sign: str = "positive") -> Relevance:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from captum, summed over channels.

    The line runs from tokens of 0 (captum's default) to those that enter the first sub-layers, position
    embeddings included. ``sign`` as in :func:`~clipmapper.relevance.methods.gradients.input_x_gradient`;
    "both" sums up to the change of y along the line. What is part of the model (learned queries, a class
    token that the mapper adds) stays as it is. Defined for every trace with ``trace.again``. Raises
    ``UserError`` where captum is not installed.
    """
    attribution, tokens, options = _captum(trace, "IntegratedGradients", "integrated_gradients")
    at_once = _points_at_once(trace)
    found = attribution.attribute(
        tuple(tokens.values()), n_steps=steps, internal_batch_size=at_once, **options
    )
    return _relevance(trace, tokens, found, lambda values: values.sum(dim=-1), sign)


@explanation()
def occlusion(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """Occlusion (Zeiler & Fergus 2014) from captum: by how much y falls when one token is set to 0.

    Tokens, ``sign`` and requirements as in :func:`integrated_gradients`. (Removing a token from the sequence
    is another question; that is what the perturbation test asks.)
    """
    attribution, tokens, options = _captum(trace, "Occlusion", "occlusion")
    windows = tuple((1, values.shape[-1]) for values in tokens.values())
    at_once = _variants_at_once(trace)
    with trace.device:  # captum (0.9) makes some of its masks on the default device
        found = attribution.attribute(
            tuple(tokens.values()), windows, perturbations_per_eval=at_once, **options
        )
    # Every channel of a token holds what the whole token changes.
    return _relevance(trace, tokens, found, lambda values: values[..., 0], sign)


def _captum(trace: AttentionTrace, kind: str, method: str):
    """The captum object, its inputs, and what it is to hand on to the forward."""
    running = again(trace, method)
    if kind == "IntegratedGradients":
        trace.require_no_cut()
    try:
        from captum import attr
    except ImportError as missing:
        raise UserError(f"{method} needs captum: pip install 'clipmapper[captum]'") from missing
    tokens, usual = input_tokens(trace, method), torch.get_default_device()

    def forward(*arguments: Tensor) -> Tensor:
        *values, rows = arguments
        with usual:  # the model's own default, whatever is set for captum
            return running.score(trace, rows, dict(zip(tokens, values, strict=True)))

    rows = torch.arange(trace.batch, device=trace.device)
    return getattr(attr, kind)(forward), tokens, {"additional_forward_args": (rows,)}


def _relevance(
    trace: AttentionTrace,
    tokens: Iterable[str],
    found: tuple[Tensor, ...],
    per_token: Callable[[Tensor], Tensor],
    sign: str,
) -> Relevance:
    # captum's occlusion gives float32, whatever it is given.
    values = (per_token(v.detach()).to(trace.dtype) for v in found)
    streams = dict(zip(tokens, values, strict=True))
    return with_sign(as_relevance(trace, streams), sign)
