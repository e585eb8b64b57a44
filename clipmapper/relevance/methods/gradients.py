"""Methods that look at the gradient of one sub-layer, or of the input tokens."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.method import explanation
from clipmapper.relevance.methods.attention_only import last_attention
from clipmapper.relevance.propagation import part_of
from clipmapper.relevance.rerun import with_rules
from clipmapper.relevance.result import Relevance, as_relevance, with_sign
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node, exact_step


@explanation(gradient=True)
def grad_cam(trace: AttentionTrace) -> Relevance:
    """Grad-CAM (Selvaraju et al. 2017) on attention, as Chefer et al. 2021 use it as a baseline.

    ``relu(E_h[(mean_ij ∇A) · A])`` of the last sub-layer in which the read token reads each modality, on
    the read row. The mean leaves padding out: a sample's map does not depend on what it is batched with.
    Needs ``trace.backward(y)``.
    """

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        rows = trace.padding_free(step.query_node.stream)[samples, None, :, None]
        columns = trace.padding_free(step.key_node.stream)[samples, None, None, :]
        inside = (rows & columns).to(trace.dtype)
        step = part_of(step, samples, slice(None))
        weight = (step.probability_gradient() * inside).sum(dim=(2, 3), keepdim=True)
        weight = weight / inside.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        return (weight * step.probabilities()).mean(dim=1).clamp(min=0)[:, queries]

    return last_attention(trace, matrix)


@explanation(gradient=True)
def grad_eclip(trace: AttentionTrace) -> Relevance:
    """Grad-ECLIP (Zhao et al. 2024, ICML) of the last sub-layer in which the read token reads each modality.

    ``relu(Σ_d (∂y/∂o_read)_d v_{i,d} λ_i)``, o and v all heads side by side, ``λ_i`` the cosine of the read
    token's query and key i, scaled to [0, 1] over the keys. Differences from the released code: λ is scaled
    over all keys that may be read, there without the image's class token; and q, k are compared as they are,
    where a later version of the code sends them through the output projection first. Where all cosines are
    equal λ is 1. Made for CLIP; defined for every trace. Needs ``trace.backward(y)``.
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


@explanation()
def attn_lrp(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """AttnLRP (Achtibat et al. 2024, arXiv 2402.05602): gradient × input under its backward rules.

    See :func:`clipmapper.relevance.backward.rules.backward_rules`. ε is 0, so a bias takes its part of the
    relevance. Defined for models of linear layers, norms, GELU, SiLU or ReLU, products, and attention by
    ``scaled_dot_product_attention``; what else a model computes is differentiated plainly.
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
