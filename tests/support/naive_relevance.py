"""Relevance written a second time, slowly, straight from the formulas, to compare the product with.

Nothing here uses the product's recorder, trace or methods. One sample at a time, without padding: the
model's forward is written out from its weights with every attention matrix in the autograd graph, and
relevance is accumulated forwards in full matrices over the input tokens of all streams jointly.

Tokens are numbered through: mapper class token (where there is one), image tokens, text tokens. ``C`` and
``R`` are kept after every sub-layer, so that keys are looked up in the state in which they were read.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Sublayer:
    """One attention sub-layer of one sample: H heads, N queries, M keys, width C."""

    queries: list[int]  # which tokens ask
    keys: list[int]  # which tokens are read ...
    keys_state: int  # ... in their state after so many sub-layers
    x: Tensor  # [N, C]
    a: Tensor  # [N, C]
    A: Tensor  # [H, N, M]
    dx: Tensor | None = None
    da: Tensor | None = None
    dA: Tensor | None = None
    q: Tensor | None = None  # [H, N, D]
    k: Tensor | None = None  # [H, M, D]
    v: Tensor | None = None  # [H, M, D]
    W: Tensor | None = None  # W_O [H, D, C]
    after: Tensor | None = None  # [N, C] after the MLP, where one follows

    @property
    def cross(self) -> bool:
        return self.queries != self.keys


class Run:
    """The forward of a CLIPmapper for one image [3, h, w] and one text [n], with everything kept."""

    def __init__(self, model, image, ids, patches=None, words=None, rules="plain", scale=1.0):
        """``patches``, ``words``: which of them exist at all (others are removed before the first block).

        ``rules``: "libra" or "attn_lrp" change the gradient by .detach() and by halves that are detached.
        ``scale`` multiplies the tokens that enter the towers.
        """
        self.rules, self.scale = rules, scale
        self.sublayers: list[Sublayer] = []
        with torch.enable_grad():
            self.logits = self._forward(model, image, ids, patches, words)

    def _forward(self, model, image, ids, patches, words):
        clip, mapper = model.encoder.clip, model.mapper
        patches = list(range(clip.visual.positional_embedding.shape[0] - 1)) if patches is None else patches
        words = list(range(len(ids))) if words is None else words
        own_class = [0] if mapper.class_token is not None else []
        self.image = [len(own_class) + i for i in range(1 + len(patches))]
        self.text = [self.image[-1] + 1 + i for i in range(len(words))]
        self.visual = own_class + self.image  # what the mapper calls its image
        self.read = 0
        self.size = len(self.visual) + len(self.text)

        image = self._image_tower(clip.visual, image, patches)
        text = self._text_tower(clip, ids, words)
        image, text = image @ mapper.project_image.weight.T, text @ mapper.project_text.weight.T
        if own_class:
            image = torch.cat([mapper.class_token[None], image])
        if mapper.positions is not None:
            image = image + mapper.positions[[0] + [1 + p for p in patches]]
        if hasattr(mapper.blocks[0], "text_self"):
            image = self._dual_flow(mapper, image, text)
        else:
            joint = torch.cat([image, text])
            everything = self.visual + self.text
            for block in mapper.blocks:
                joint = joint + self._mapper_attention(block.attention, joint, everything, joint, everything)
                joint = self._mlp(joint, block.mlp)
            image = joint
        return self._run(model.head, image[:1])[0]

    def _image_tower(self, visual, image, patches):
        embedded = F.conv2d(image[None], visual.conv1.weight, stride=visual.conv1.stride)[0].flatten(1).T
        tokens = torch.cat([visual.class_embedding[None], embedded]) + visual.positional_embedding
        tokens = visual.ln_pre(tokens)[[0] + [1 + p for p in patches]]
        tokens = self._tower(visual.transformer.resblocks, tokens, self.image, causal=False)
        return self._run(visual.ln_post, tokens)

    def _text_tower(self, clip, ids, words):
        tokens = (clip.token_embedding.weight[ids] + clip.positional_embedding[: len(ids)])[words]
        tokens = self._tower(clip.transformer.resblocks, tokens, self.text, causal=True)
        return self._run(clip.ln_final, tokens)

    def _tower(self, blocks, tokens, places, causal):
        tokens = (self.scale * tokens.detach()).requires_grad_()
        for block in blocks:
            normed = self._run(block.ln_1, tokens)
            q, k, v = (normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
            A, mixed, heads = self._attend(q, k, v, block.attn.num_heads, causal)
            a = mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
            W = block.attn.out_proj.weight.T
            if hasattr(block.ls_1, "gamma"):
                a, W = a * block.ls_1.gamma, W * block.ls_1.gamma
            sublayer = Sublayer(places, places, len(self.sublayers), tokens, a, A)
            sublayer.q, sublayer.k, sublayer.v = heads
            sublayer.W = W.unflatten(0, (block.attn.num_heads, -1))
            self.sublayers.append(sublayer)
            tokens = tokens + a
            tokens = tokens + block.ls_2(self._run(block.mlp, self._run(block.ln_2, tokens)))
            sublayer.after = tokens
        return tokens

    def _mlp(self, tokens, mlp):
        self.sublayers[-1].after = tokens + self._run(mlp.layers, self._run(mlp.norm, tokens))
        return self.sublayers[-1].after

    def _run(self, module, x):
        """A module without attention, its norms and activations by the rules of the gradient."""
        if isinstance(getattr(module, "layers", None), torch.nn.Sequential):
            module = module.layers
        if isinstance(module, torch.nn.Sequential):
            for part in module:
                x = self._run(part, x)
            return x
        if self.rules == "plain":
            return module(x)
        if isinstance(module, torch.nn.LayerNorm):
            deviation = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt().detach()
            return (x - x.mean(-1, keepdim=True)) / deviation * module.weight + module.bias
        if isinstance(module, torch.nn.GELU):
            return x * torch.distributions.Normal(0.0, 1.0).cdf(x.detach())
        if type(module).__name__ == "QuickGELU":
            return x * torch.sigmoid(1.702 * x.detach())
        assert isinstance(module, torch.nn.Linear), type(module)
        return module(x)

    def _dual_flow(self, mapper, image, text):
        for block in mapper.blocks:
            # The text first: the two directions of a block read each other as they entered it.
            entered = len(self.sublayers)
            seen = self._mapper_attention(block.text_self, text, self.text, text, self.text)
            new_text = text + seen
            seen = self._mapper_attention(block.text_cross, new_text, self.text, image, self.visual, entered)
            new_text = new_text + seen
            new_text = self._mlp(new_text, block.text_mlp)
            new_image = image + self._mapper_attention(
                block.image_self, image, self.visual, image, self.visual
            )
            new_image = new_image + self._mapper_attention(
                block.image_cross, new_image, self.visual, text, self.text, entered
            )
            image, text = self._mlp(new_image, block.image_mlp), new_text
        return image

    def _mapper_attention(self, layer, x, queries, context, keys, keys_state=None):
        norm = layer.norm if layer.context_norm is None else layer.context_norm
        q = layer.query(self._run(layer.norm, x))
        k, v = layer.key_value(self._run(norm, context)).chunk(2, dim=-1)
        A, mixed, heads = self._attend(q, k, v, layer.heads, causal=False)
        a = layer.output(mixed)
        state = len(self.sublayers) if keys_state is None else keys_state
        sublayer = Sublayer(queries, keys, state, x, a, A)
        sublayer.q, sublayer.k, sublayer.v = heads
        sublayer.W = layer.output.weight.T.unflatten(0, (layer.heads, -1))
        self.sublayers.append(sublayer)
        return a

    def _attend(self, q, k, v, heads, causal):
        """A [H, N, M], its product with v [N, C], and q, k, v by head: by the definition of attention."""
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        half = (lambda t: (t + t.detach()) / 2) if self.rules == "attn_lrp" else (lambda t: t)
        scores = half(q) @ half(k).transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(scores.shape[1:]).triu(1).bool()
            scores = scores.masked_fill(later, float("-inf"))
        A = scores.exp() / scores.exp().sum(-1, keepdim=True)
        if self.rules == "libra":
            A = A.detach().requires_grad_()
        return A, (half(A) @ half(v)).transpose(0, 1).flatten(1), (q.detach(), k.detach(), v.detach())

    def differentiate(self, answer: int) -> "Run":
        """Gradients of one logit with respect to every x, a and A, by autograd."""
        tensors = [t for s in self.sublayers for t in (s.x, s.a, s.A)]
        found = torch.autograd.grad(self.logits[answer], tensors, allow_unused=True, retain_graph=True)
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]
        for number, s in enumerate(self.sublayers):
            s.x, s.a, s.A = s.x.detach(), s.a.detach(), s.A.detach()
            s.dx, s.da, s.dA = found[3 * number : 3 * number + 3]
        return self


def positive(s: Sublayer) -> Tensor:
    """Ā = E_h relu(∇A ⊙ A)."""
    return torch.relu(s.dA * s.A).mean(0)


def rownorm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their sums, and which rows have nothing to divide."""
    sums = matrix.sum(-1)
    normed = torch.stack([row / total if total > 0 else row for row, total in zip(matrix, sums, strict=True)])
    return normed, sums <= 0


def accumulate(run: Run, alpha_of, matrix_of) -> Tensor:
    """C_s ← α C_s + β Â C_r over all tokens; returns C [size, size]."""
    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        C, read = states[-1], states[s.keys_state]
        alpha = alpha_of(s)[:, None]
        normed, empty = rownorm(matrix_of(s))
        moved = normed @ read[s.keys]
        moved[empty] = C[s.queries][empty]  # an empty row keeps its relevance where it is
        new = C.clone()
        new[s.queries] = alpha * C[s.queries] + (1 - alpha) * moved
        states.append(new)
    return states[-1]


def _share(before: Tensor, added: Tensor) -> Tensor:
    return torch.where(before + added > 0, before / (before + added), 1.0)


def weighted(run: Run) -> Tensor:
    def alpha(s):
        before, added = torch.relu(s.dx * s.x).mean(), torch.relu(s.da * s.a).mean()
        return _share(before, added).expand(len(s.queries))

    return accumulate(run, alpha, positive)[run.read]


def weighted_token(run: Run) -> Tensor:
    def alpha(s):
        return _share(torch.relu(s.dx * s.x).mean(-1), torch.relu(s.da * s.a).mean(-1))

    return accumulate(run, alpha, positive)[run.read]


def weighted_half(run: Run) -> Tensor:
    def half(s):
        return torch.full((len(s.queries),), 0.5, dtype=s.A.dtype)

    return accumulate(run, half, lambda s: s.A.mean(0))[run.read]


def gae(run: Run) -> Tensor:
    """R over all tokens, the blocks R_ss, R_sq, ... cut out of it where a rule names them."""

    def N(block):
        rest = block - torch.eye(len(block), dtype=block.dtype)
        for i in range(len(rest)):
            if rest[i].sum() != 0:
                rest[i] = rest[i] / rest[i].sum()
        return rest + torch.eye(len(block), dtype=block.dtype)

    def cut(R, rows, columns):
        return R[rows][:, columns]

    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        R, read = states[-1], states[s.keys_state]
        new = R.clone()
        if not s.cross:
            new[s.queries] = R[s.queries] + positive(s) @ R[s.queries]
        else:
            across = N(cut(R, s.queries, s.queries)).T @ positive(s) @ N(cut(read, s.keys, s.keys))
            back = positive(s) @ cut(read, s.keys, s.queries)
            for i, row in enumerate(s.queries):
                new[row, s.keys] = R[row, s.keys] + across[i]
                new[row, s.queries] = R[row, s.queries] + back[i]
        states.append(new)
    return states[-1][run.read]


def rollout(run: Run) -> Tensor:
    """Rollout of every stream by itself; the read stream's last cross-attention chains the two."""
    eye = torch.eye(run.size, dtype=run.logits.dtype)
    states, crossing = [eye], None
    for number, s in enumerate(run.sublayers):
        new = states[-1].clone()
        if not s.cross:
            mixing = s.A.mean(0) + torch.eye(len(s.queries), dtype=new.dtype)
            new[s.queries] = mixing / mixing.sum(-1, keepdim=True) @ states[-1][s.queries]
        elif run.read in s.queries:
            crossing = number
        states.append(new)
    result = states[-1][run.read].clone()
    if crossing is not None:
        s = run.sublayers[crossing]
        # The models here cross last: after it the read row is still the read token's own.
        assert all(run.read not in later.queries for later in run.sublayers[crossing + 1 :])
        result += s.A.mean(0)[s.queries.index(run.read)] @ states[s.keys_state][s.keys]
    return result


def _last_reading(run: Run, matrix_of) -> Tensor:
    """The read row of the last sub-layer in which the read token reads each token."""
    result, seen = torch.zeros(run.size, dtype=run.logits.dtype), set()
    for s in reversed(run.sublayers):
        if run.read in s.queries and s.keys[-1] not in seen:
            row = matrix_of(s)[s.queries.index(run.read)]
            for place, value in zip(s.keys, row, strict=True):
                if place not in seen:
                    result[place] = value
            seen.update(s.keys)
    return result


def raw_attention(run: Run) -> Tensor:
    return _last_reading(run, lambda s: s.A.mean(0))


def grad_cam(run: Run) -> Tensor:
    return _last_reading(run, lambda s: torch.relu((s.dA.mean(dim=(1, 2), keepdim=True) * s.A).mean(0)))


_ALL = (weighted, weighted_token, weighted_half, gae, rollout, raw_attention, grad_cam)
METHODS = {method.__name__: method for method in _ALL}
