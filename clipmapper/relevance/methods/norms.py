"""Methods that measure by norms of vectors what attention moves: ALTI, TokenTM, Beyond Intuition."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.method import Relevance, as_relevance, explanation, from_layer
from clipmapper.relevance.methods.attention_only import last_attention, last_reading
from clipmapper.relevance.propagation import propagate
from clipmapper.relevance.rerun import again
from clipmapper.relevance.sublayer import Projection, is_linear
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node, exact_step

_BLOCK = 16  # query rows whose contributions, keys × width each, are held at a time
_INTEGRATION_STEPS = 20  # of the paper


@explanation(layers=True)
def alti(trace: AttentionTrace) -> Relevance:
    """ALTI (Ferrando et al. 2022, arXiv 2203.04212), rolled out.

    With ``T_i(x_j) = Σ_h A_ij^h v_j^h W_O^h`` (and x_i with j = i) and ``y_i = x_i + a_i``, the contribution
    of j to i is ``max(0, ‖y_i‖₁ − ‖y_i − T_i(x_j)‖₁)``, rows divided by their sums. In post-LayerNorm models
    (the paper's) y_i and T_i go through the LayerNorm behind the addition, linearised as in the paper: its
    mean is linear, its σ a constant. In pre-LayerNorm models they are taken on the residual stream. Biases
    are left out of T_i, as in the paper. Cross-attention: the token's own residual is one more contributor
    (ALTI+, Ferrando et al. 2022, arXiv 2205.11631); attention that pools has none. A row without positive
    contributions keeps its relevance.
    Defined where the recorder knows the output projection. No gradient is needed.
    """

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        projection, weight = _projection(step, "alti"), _output_weight(step, "alti")
        moved = step.value.detach() @ weight  # [batch, heads, keys, width]
        A, x = step.probabilities(), step.before.detach()
        stream = x + step.added.detach()
        norm = projection.norm
        y = stream if norm is None else projection.normed(stream)
        residual = projection.normalised(stream, x)
        own, to_keys = torch.zeros_like(row), row.new_zeros(*row.shape[:2], step.key.shape[2])
        for start in range(0, y.shape[1], _BLOCK):
            i = torch.arange(start, min(start + _BLOCK, y.shape[1]), device=y.device)
            contribution = torch.einsum("bhij,bhjc->bijc", A[:, :, i], moved)
            contribution = projection.normalised(stream[:, i, None], contribution)
            whole = y[:, i].abs().sum(-1)
            if step.is_self:
                contribution[:, torch.arange(len(i)), i] += residual[:, i]
                stays = row.new_zeros(len(y), len(i))
            else:
                stays = (whole - (y - residual)[:, i].abs().sum(-1)).clamp(min=0)
            share = (whole[..., None] - (y[:, i, None] - contribution).abs().sum(-1)).clamp(min=0)
            total = share.sum(-1) + stays
            nothing = total <= 0
            part = row[:, :, i] * (~nothing / total.masked_fill(nothing, 1.0))[:, None]
            own[:, :, i] += part * stays[:, None] + row[:, :, i] * nothing[:, None]
            to_keys += part @ share
        return own, to_keys

    rows = propagate(trace, trace.read_row(), rule)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


@explanation(gradient=True, layers=True)
def token_tm(trace: AttentionTrace) -> Relevance:
    """TokenTM (Wu et al., CVPR 2024, arXiv 2403.14552).

    ``C_0 = diag ‖e_i‖``; then per attention sub-layer ``C ← (I + (A W) ⊙ E_h relu(∇A)) C`` and per MLP
    ``C ← (I + W) C``, with ``W_i = ‖ẽ_i‖ / ‖e_i‖ · softmax_i(cos(e_i, ẽ_i))``: e the tokens on the residual
    stream, ẽ what the sub-layer makes of each by itself (``v_i W_O`` all heads together; the MLP's output).
    (One of the authors' rewrites of models takes the stream behind the sub-layer for ẽ, which holds e too.)
    A is the mean over heads. The softmax leaves out padding. Cross-attention, which the paper does not have,
    follows the same rule with the keys' tokens, and attention that pools has no I. An MLP behind the last
    sub-layer only scales the read row; where the recorder does not see its end it is left out.
    Defined where the recorder knows the output projection, for pre-LayerNorm models: with a LayerNorm behind
    the addition (BERT) it is not said what e and ẽ are. Needs ``trace.backward(y)``.
    """

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        if _projection(step, "token_tm").norm is not None:
            raise UserError(
                f"token_tm is defined for pre-LayerNorm models: {step.name} has its LayerNorm behind the "
                "addition"
            )
        if step.after is not None:
            e = (step.before + step.added).detach()
            row = row * (1 + _transformed(trace, step.query_node, e, step.after.detach() - e))[:, None]
        values = torch.einsum("bhjd,hdc->bjc", step.value.detach(), _output_weight(step, "token_tm"))
        weight = _transformed(trace, step.key_node, _read_tokens(step), values)
        moves = step.probabilities().mean(dim=1) * step.probability_gradient().clamp(min=0).mean(dim=1)
        stays = torch.zeros_like(row) if step.pools else row
        return stays, (row @ moves) * weight[:, None]

    rows = propagate(trace, trace.read_row(), rule)
    pooling = {step.query_node.stream for step in trace.attention if step.pools}
    found = {}
    for stream in rows.keys() - pooling:
        length = _tokens(trace, Node(stream, 0), "token_tm").norm(dim=-1)
        found[stream] = rows[stream][:, 0] * length
    return as_relevance(trace, found)


def _transformed(
    trace: AttentionTrace, node: Node, e: Float[Tensor, "b n c"], new: Float[Tensor, "b n c"]
) -> Float[Tensor, "b n"]:
    """‖ẽ‖ / ‖e‖ · softmax over tokens of cos(e, ẽ); 0 at padding."""
    valid = trace.padding_free(node.stream)
    cosine = torch.nn.functional.cosine_similarity(e, new, dim=-1)
    share = cosine.masked_fill(~valid, float("-inf")).softmax(dim=-1).masked_fill(~valid, 0)
    length = e.norm(dim=-1)
    return share * new.norm(dim=-1) / length.masked_fill(length == 0, 1.0)


@explanation(gradient=True)
def beyond_intuition(trace: AttentionTrace, start_layer: int | Mapping[str, int] = 0) -> Relevance:
    """Beyond Intuition (Chen et al., TMLR 2023), token-wise.

    ``R ← R + E_h A diag(‖v_j W_O‖ / ‖z_j‖) R`` over the sub-layers, then ⊙ ``E_h relu(mean_k ∇A_L)`` over
    the 20 points k of the straight line from 0 to the input, A_L the attention of the last sub-layer in which
    the read token reads each modality. Here the line runs through the *tokens* that enter the first
    sub-layers, in the released code through the image's pixels (words have none); there the first 5 blocks of
    12 are left out by default, here none. Cross-attention, which the paper does not have, follows the same
    rule with the keys' tokens. relu comes after the mean, as in the code.
    Defined where the recorder knows the output projection and ``trace.again`` is there.
    """
    running = again(trace, "beyond_intuition")

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        weight = _output_weight(step, "beyond_intuition")
        moved = torch.einsum("bhjd,hdc->bjc", step.value.detach(), weight).norm(dim=-1)
        length = _read_tokens(step).norm(dim=-1)
        ratio = moved / length.masked_fill(length == 0, 1.0)
        mean = step.probabilities().mean(dim=1)
        return torch.zeros_like(row) if step.pools else row, (row @ mean) * ratio[:, None]

    reasoned = propagate(from_layer(trace, start_layer), trace.read_row(), rule)
    gradients = dict.fromkeys(last_reading(trace), 0.0)
    for k in range(_INTEGRATION_STEPS):
        scaled = running.scaled(trace, gradients, k / (_INTEGRATION_STEPS - 1), "beyond_intuition")
        for node in gradients:
            gradients[node] = gradients[node] + scaled[node].probability_gradient() / _INTEGRATION_STEPS

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        return gradients[step.output_node][samples, :, queries].clamp(min=0).mean(dim=1)

    weights = last_attention(trace, matrix).streams
    return as_relevance(trace, {s: row[:, 0] * weights[s] for s, row in reasoned.items()})


def _projection(step: Attention, method: str) -> Projection:
    if step.projection is None or not is_linear(step.projection, step.mixed, step.added, step.rounded):
        raise UserError(
            f"{method} needs the output projection of {step.name}, which the recorder does not know: its "
            "line in clipmapper/relevance/recording/families.py names none, its weights can't be read "
            "(quantised), or something else is done to its result"
        )
    return step.projection


def _output_weight(step: Attention, method: str) -> Float[Tensor, "heads channels width"]:
    return _projection(step, method).weight(step.mixed.shape[1]).to(step.mixed.dtype)


def _read_tokens(step: Attention) -> Float[Tensor, "batch keys width"]:
    """The tokens that are read: on their residual stream, or as another part of the model hands them over."""
    return (step.before if step.context is None else step.context).detach()


def _tokens(trace: AttentionTrace, node: Node, method: str) -> Float[Tensor, "batch tokens width"]:
    """The tokens of a node on the residual stream."""
    for step in trace.attention:
        if step.query_node == node:
            return exact_step(step).before.detach()
    for join in (s for s in trace.steps if isinstance(s, Join)):
        if node in join.parts:
            sizes = [trace.lengths[part.stream] for part in join.parts]
            # As rows, one a channel; what the join leaves behind is 0.
            rows = join.spread(_tokens(trace, join.output, method).transpose(1, 2), sizes)
            return rows[join.parts.index(node)].transpose(1, 2)
    raise UserError(f"{method}: the tokens of stream {node.stream!r} were not recorded in the state read")
