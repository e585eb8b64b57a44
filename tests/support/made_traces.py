"""Sub-layers and traces without a model: by hand, and drawn at random."""

import torch
import torch.nn.functional as F

from clipmapper.relevance import Attention, AttentionTrace, Node
from support import naive_relevance

MASKS = ["none", "causal", "full boolean", "full additive", "additive with -inf", "padding", "scale"]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def sublayer(query, key, probabilities, evidence, before, added, name="sub-layer"):
    """A recorded sub-layer of one sample with given A and ∇A ⊙ A (both [heads, queries, keys]).

    With one channel per key, key = value = identity and scale 1: the scores are the queries, log A, so that
    softmax gives A; and ∇A = ∇o · vᵀ = ∇o, which is set to evidence / A. ``before`` and ``added`` hold x ⊙ ∇x
    and a ⊙ ∇a [queries, width]; the tensors themselves are 2, so the gradients are halves of them.
    """
    A, evidence = tensor(probabilities), tensor(evidence)
    assert torch.allclose(A.sum(-1), torch.ones_like(A.sum(-1))), "rows of A must sum to 1"
    identity = torch.eye(A.shape[-1], dtype=torch.float64).expand(A.shape[0], -1, -1)[None]
    two = torch.full((1, *tensor(before).shape), 2.0, dtype=torch.float64)
    return Attention(
        name=name,
        query_node=query,
        key_node=key,
        output_node=Node(query.stream, query.version + 1),
        query=A.log()[None],
        key=identity,
        value=identity,
        mixed=A[None],
        mask=None,
        scale=1.0,
        causal=False,
        before=two,
        added=two,
        mixed_gradient=(evidence / A)[None],
        before_gradient=tensor(before)[None] / 2,
        added_gradient=tensor(added)[None] / 2,
    )


def attention(mask_kind, seed=0, batch=2, heads=3, queries=7, keys=7, channels=4):
    """A sub-layer with a mask of some kind, and A and ∇A from autograd through a plain softmax."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(batch, heads, queries, channels), normal(batch, heads, keys, channels)
    v, weight = normal(batch, heads, keys, channels), normal(batch, heads, queries, channels)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    mask, causal, scale = None, False, None
    if mask_kind == "causal":
        causal, allowed = True, allowed.tril()
    elif mask_kind == "full boolean":
        mask = normal(queries, keys) > -0.5
        mask[:, 0] = True
        allowed = mask
    elif mask_kind == "full additive":
        mask = normal(batch, heads, queries, keys)
    elif mask_kind == "additive with -inf":
        mask = torch.zeros(queries, keys, dtype=torch.float64).masked_fill(~allowed.tril(), float("-inf"))
    elif mask_kind == "padding":
        mask = (torch.arange(keys) < torch.tensor([keys, keys - 3])[:, None])[:, None, None]
        allowed = mask
    elif mask_kind == "scale":
        scale = 0.9
    scores = q @ k.transpose(2, 3) * (channels**-0.5 if scale is None else scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    scores = scores.masked_fill(~allowed, float("-inf"))
    A = scores.softmax(-1).requires_grad_()
    mixed = A @ v
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    torch.testing.assert_close(fused, mixed, msg="the test's own attention is wrong")
    gradient = torch.autograd.grad((mixed * weight).sum(), A)[0]
    width = torch.zeros(batch, queries, 1, dtype=torch.float64)
    nodes = Node("q", 0), Node("k", 0), Node("q", 1)
    step = Attention("test", *nodes, q, k, v, mixed.detach(), mask, scale, causal, width, width, weight)
    return step, A.detach(), gradient


class RandomRun:
    """A made-up run in the form of naive_relevance.Run, and the trace that says the same.

    Two streams; sub-layers in any order; keys of the other stream in any state that they have had.
    """

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def choose(n):
            return int(torch.randint(n, (1,), generator=generator))

        sizes = {"image": 1 + choose(4), "text": 1 + choose(4)}
        self.image = list(range(sizes["image"]))
        self.text = [sizes["image"] + i for i in range(sizes["text"])]
        self.size, self.read = sum(sizes.values()), choose(sizes["image"])
        places = {"image": self.image, "text": self.text}
        self.logits, self.sublayers = torch.zeros(1, dtype=torch.float64), []
        steps, versions = [], {"image": [0], "text": [0]}  # per version: the number of sub-layers before it
        for number in range(1 + choose(6)):
            stream = ("image", "text")[choose(2)]
            source = stream if choose(2) else {"image": "text", "text": "image"}[stream]
            own = len(versions[stream]) - 1
            version = own if source == stream else choose(len(versions[source]))
            n, m, heads, channels = sizes[stream], sizes[source], 2, 3
            q, k, v = normal(heads, n, channels), normal(heads, m, channels), normal(heads, m, channels)
            A, do = (q @ k.transpose(1, 2) / channels**0.5).softmax(-1), normal(heads, n, channels)
            if choose(3) == 0:
                do[:, choose(n)] = 0
            x, a, dx, da = (normal(n, 2) for _ in range(4))
            if choose(4) == 0:
                dx, da = torch.zeros_like(dx), torch.zeros_like(da)
            # The state that version had: after its sub-layer and whatever came until the next of its stream
            # nothing of it changed, so any of these counts would do.
            state = versions[source][version]
            self.sublayers.append(
                naive_relevance.Sublayer(
                    places[stream], places[source], state, x, a, A, dx, da, do @ v.transpose(1, 2)
                )
            )
            steps.append(
                Attention(
                    f"{number}", Node(stream, own), Node(source, version), Node(stream, own + 1),
                    *(t[None] for t in (q, k, v, A @ v)), None, None, False, x[None], a[None],
                    do[None], dx[None], da[None],
                )
            )  # fmt: skip
            versions[stream].append(number + 1)
        self.trace = AttentionTrace(
            steps, sizes, {}, ("image", "text"),
            (Node("image", len(versions["image"]) - 1), torch.tensor([self.read])),
        )  # fmt: skip
