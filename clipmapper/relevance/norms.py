"""Methods that measure by norms of vectors what attention moves: ALTI, TokenTM, Beyond Intuition."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.again import again
from clipmapper.relevance.attention_only import last_attention
from clipmapper.relevance.propagation import mean_attention, propagate
from clipmapper.relevance.result import Relevance, as_relevance
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node

_BLOCK = 16  # query rows whose contributions, keys × width each, are held at a time
_INTEGRATION_STEPS = 20  # of the paper


def alti(trace: AttentionTrace) -> Relevance:
    """ALTI (Ferrando et al. 2022, arXiv 2203.04212), rolled out.

    With ``T_i(x_j) = Σ_h A_ij^h v_j^h W_O^h`` (and x_i with j = i) and ``y_i = x_i + a_i``, the contribution
    of j to i is ``max(0, ‖y_i‖₁ − ‖y_i − T_i(x_j)‖₁)``, rows divided by their sums. Taken on the residual
    stream, as suits pre-LayerNorm models; the paper's models normalise after the addition, and it takes that
    LayerNorm (linearised) into T. Cross-attention: the token's own residual is one more contributor (ALTI+,
    Ferrando et al. 2022, arXiv 2205.11631). A row without positive contributions keeps its relevance.
    Defined where the recorder knows the output projection. No gradient is needed.
    """

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        weight = _output_weight(step, "alti")
        moved = step.value.detach() @ weight  # [batch, heads, keys, width]
        A, x = step.probabilities(), step.before.detach()
        y = x + step.added.detach()
        own, to_keys = torch.zeros_like(row), row.new_zeros(*row.shape[:2], step.key.shape[2])
        for start in range(0, y.shape[1], _BLOCK):
            i = torch.arange(start, min(start + _BLOCK, y.shape[1]), device=y.device)
            contribution = torch.einsum("bhij,bhjc->bijc", A[:, :, i], moved)
            if step.is_self:
                contribution[:, torch.arange(len(i)), i] += x[:, i]
                stays = row.new_zeros(len(y), len(i))
            else:
                stays = (y[:, i].abs().sum(-1) - step.added.detach()[:, i].abs().sum(-1)).clamp(min=0)
            whole = y[:, i].abs().sum(-1)
            share = (whole[..., None] - (y[:, i, None] - contribution).abs().sum(-1)).clamp(min=0)
            total = share.sum(-1) + stays
            nothing = total <= 0
            part = row[:, :, i] * (~nothing / total.masked_fill(nothing, 1.0))[:, None]
            own[:, :, i] += part * stays[:, None] + row[:, :, i] * nothing[:, None]
            to_keys += part @ share
        return own, to_keys

    rows = propagate(trace, trace.read_row(), rule)
    return as_relevance(trace, {stream: row[:, 0] for stream, row in rows.items()})


def token_tm(trace: AttentionTrace) -> Relevance:
    """TokenTM (Wu et al., CVPR 2024, arXiv 2403.14552).

    ``C_0 = diag ‖e_i‖``; then per attention sub-layer ``C ← (I + (A W) ⊙ E_h relu(∇A)) C`` and per MLP
    ``C ← (I + W) C``, with ``W_i = ‖ẽ_i‖ / ‖e_i‖ · softmax_i(cos(e_i, ẽ_i))``: e the tokens on the residual
    stream, ẽ what the sub-layer makes of each by itself (``v_i W_O`` all heads together; the MLP's output).
    A is the mean over heads. The softmax leaves out padding. Cross-attention, which the paper does not have,
    follows the same rule with the keys' tokens. The MLPs of a model's last block only scale the result.
    Defined where the recorder knows the output projection and the MLPs. Needs ``trace.backward(y)``.
    """

    def rule(step: Attention, row: Float[Tensor, "batch rows queries"]):
        if step.after is not None:
            e = (step.before + step.added).detach()
            row = row * (1 + _transformed(trace, step.query_node, e, step.after.detach() - e))[:, None]
        values = torch.einsum("bhjd,hdc->bjc", step.value.detach(), _output_weight(step, "token_tm"))
        weight = _transformed(trace, step.key_node, _tokens(trace, step.key_node, "token_tm"), values)
        moves = step.probabilities().mean(dim=1) * step.probability_gradient().clamp(min=0).mean(dim=1)
        return row, (row @ moves) * weight[:, None]

    rows = propagate(trace, trace.read_row(), rule)
    lengths = {s: _tokens(trace, Node(s, 0), "token_tm").norm(dim=-1) for s in rows}
    return as_relevance(trace, {stream: row[:, 0] * lengths[stream] for stream, row in rows.items()})


def _transformed(
    trace: AttentionTrace, node: Node, e: Float[Tensor, "b n c"], new: Float[Tensor, "b n c"]
) -> Float[Tensor, "b n"]:
    """‖ẽ‖ / ‖e‖ · softmax over tokens of cos(e, ẽ); 0 at padding."""
    valid = trace.padding_free(node.stream)
    cosine = torch.nn.functional.cosine_similarity(e, new, dim=-1)
    share = cosine.masked_fill(~valid, float("-inf")).softmax(dim=-1)
    length = e.norm(dim=-1)
    return share * new.norm(dim=-1) / length.masked_fill(length == 0, 1.0)


def beyond_intuition(trace: AttentionTrace) -> Relevance:
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
        length = _tokens(trace, step.key_node, "beyond_intuition").norm(dim=-1)
        ratio = moved / length.masked_fill(length == 0, 1.0)
        mean = step.probabilities().mean(dim=1)
        return row, (row @ mean) * ratio[:, None]

    reasoned = propagate(trace, trace.read_row(), rule)
    last: list[int] = []
    numbered = {id(step): i for i, step in enumerate(trace.attention)}

    def noting(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        last.append(numbered[id(step)])
        return mean_attention(step, samples, queries)

    last_attention(trace, noting)
    gradients = dict.fromkeys(last, 0.0)
    for k in range(_INTEGRATION_STEPS):
        scaled = running.scaled(trace, k / (_INTEGRATION_STEPS - 1)).attention
        for i in gradients:
            gradients[i] = gradients[i] + scaled[i].probability_gradient() / _INTEGRATION_STEPS

    def matrix(step: Attention, samples: slice, queries: slice) -> Float[Tensor, "samples queries keys"]:
        return gradients[numbered[id(step)]][samples, :, queries].clamp(min=0).mean(dim=1)

    weights = last_attention(trace, matrix).streams
    return as_relevance(trace, {s: row[:, 0] * weights[s] for s, row in reasoned.items()})


def _output_weight(step: Attention, method: str) -> Float[Tensor, "heads channels width"]:
    if step.output_weight is None:
        raise UserError(
            f"{method} needs the output projection of {step.name}, which the recorder does not know; add its "
            "kind of module to clipmapper.relevance.projections.PROJECTION"
        )
    return step.output_weight


def _tokens(trace: AttentionTrace, node: Node, method: str) -> Float[Tensor, "batch tokens width"]:
    """The tokens of a node on the residual stream."""
    for step in trace.attention:
        if step.query_node == node:
            return step.before.detach()
    for join in (s for s in trace.steps if isinstance(s, Join)):
        if node in join.parts:
            begin = sum(trace.lengths[p.stream] for p in join.parts[: join.parts.index(node)])
            whole = _tokens(trace, join.output, method)
            return whole[:, begin : begin + trace.lengths[node.stream]]
    raise UserError(f"{method}: the tokens of stream {node.stream!r} were not recorded in the state read")
