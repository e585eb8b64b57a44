"""Naive relevance of any model, for comparison with the generic recorder.

Written per model by hand: which sub-layers there are, in which order, who reads whom, and from which modules
their x and a come. Attention probabilities come from the model's own eager attention (or, where it returns
none, from a slow ``scaled_dot_product_attention``), their gradients from autograd. One sample at a time.
"""

import math
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import naive_relevance


@dataclass
class Spec:
    """A sub-layer: ``queries`` and ``keys`` are names of streams; ``state``: how many sub-layers had been
    run when the keys were in the state in which they are read (None: all before this one)."""

    queries: str
    keys: str
    x: str | None  # module whose first argument x is (None: pooling, nothing before it)
    a: str  # module whose output a is
    state: int | None = None


@dataclass
class Sublayer(naive_relevance.Sublayer):
    pools: bool = False
    norm: nn.Module | None = None  # LayerNorm behind the addition
    given: Tensor | None = None  # [M, C] the keys' tokens as the sub-layer gets them, where they are no x


@dataclass
class Run:
    sublayers: list
    size: int
    read: int
    logits: Tensor


def selfs(stream: str, layers: str, count: int, x: str, a: str) -> list[Spec]:
    """A stack of self-attention; x and a relative to a layer."""
    join = lambda base, path: f"{base}.{path}" if path else base  # noqa: E731
    return [Spec(stream, stream, join(f"{layers}.{n}", x), join(f"{layers}.{n}", a)) for n in range(count)]


@contextmanager
def watched(model: nn.Module, specs: list[Spec]):
    """Lists of the x and the a that passed, per module."""
    seen_x, seen_a, handles = defaultdict(list), defaultdict(list), []

    def note_x(path):
        def hook(module, args, kwargs):
            seen_x[path].append(args[0] if args else kwargs["hidden_states"])

        return hook

    def note_a(path):
        return lambda module, args, output: seen_a[path].append(
            output[0] if isinstance(output, tuple) else output
        )

    for path in {spec.x for spec in specs if spec.x is not None}:
        handles.append(model.get_submodule(path).register_forward_pre_hook(note_x(path), with_kwargs=True))
    for path in {spec.a for spec in specs}:
        handles.append(model.get_submodule(path).register_forward_hook(note_a(path)))
    try:
        yield seen_x, seen_a
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def slow_attention(rules="plain"):
    """``scaled_dot_product_attention`` by its definition; the list holds its probabilities.

    ``rules``: "libra" makes them constants, "attn_lrp" halves what meets in a product, by detaching.
    """
    original, seen = F.scaled_dot_product_attention, []

    def half(t):
        return (t + t.detach()) / 2 if rules == "attn_lrp" else t

    def leaf(probabilities):
        return probabilities.detach().requires_grad_() if rules == "libra" else probabilities

    def slow(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = half(query) @ half(key).transpose(-2, -1) * factor
        if is_causal:
            later = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(later, float("-inf"))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:
                scores = scores + attn_mask
        probabilities = leaf(scores.softmax(-1))
        seen.append(probabilities)
        return half(probabilities) @ half(value)

    softmax = F.softmax

    def step_by_step(scores, *args, **kwargs):
        """Replaces the softmax of models that compute attention step by step; some would do it in float32."""
        kwargs.pop("dtype", None)
        seen.append(leaf(softmax(scores, *args, **kwargs)))
        return seen[-1]

    matmul = torch.matmul
    F.scaled_dot_product_attention, F.softmax = slow, step_by_step
    if rules == "attn_lrp":
        torch.matmul = lambda a, b: matmul(half(a), half(b))
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention, F.softmax, torch.matmul = original, softmax, matmul


def run(model, specs, places, reads, forward, tokens_first=False, rules="plain") -> list[Run]:
    """``forward()`` gives y (a scalar) and the probabilities in order of the specs, or None.

    ``places``: the numbers of a stream's tokens; ``reads``: the tokens whose rows are read.
    """
    with torch.enable_grad(), watched(model, specs) as (xs, attended), slow_attention(rules) as slow:
        y, probabilities = forward()
        probabilities = slow if probabilities is None else probabilities
        assert len(probabilities) == len(specs), (len(probabilities), len(specs))
        used_x, used_a = defaultdict(int), defaultdict(int)
        kept, wanted = [], []
        for spec, A in zip(specs, probabilities, strict=True):
            a = attended[spec.a][used_a[spec.a]]
            used_a[spec.a] += 1
            x = None
            if spec.x is not None:
                x = xs[spec.x][used_x[spec.x]]
                used_x[spec.x] += 1
            kept.append((x, a, A))
            wanted += [t for t in (x, a, A) if t is not None]
        found = torch.autograd.grad(y, wanted, allow_unused=True)
        gradients = {
            id(t): torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)
        }

    def one(t):
        if t is None:
            return None
        return (t[:, 0] if tokens_first and t.ndim == 3 else t[0]).detach()

    sublayers = []
    for number, (spec, (x, a, A)) in enumerate(zip(specs, kept, strict=True)):
        zero = torch.zeros_like(one(a))
        sublayers.append(
            Sublayer(
                pools=spec.x is None,
                queries=places[spec.queries],
                keys=places[spec.keys],
                keys_state=number if spec.state is None else spec.state,
                x=zero if x is None else one(x),
                a=one(a),
                A=one(A),
                dx=zero if x is None else one(gradients[id(x)]),
                da=one(gradients[id(a)]),
                dA=one(gradients[id(A)]),
            )
        )
    size = 1 + max(max(p) for p in places.values())
    return [Run(sublayers, size, read, y.detach()) for read in reads]


def rollout(run: Run) -> Tensor:
    """As in ``naive_relevance``, with sub-layers of the read token's stream behind its last crossing."""
    eye = torch.eye(run.size, dtype=run.logits.dtype)
    states, crossing = [eye], None
    after = eye  # what the read stream does behind the crossing
    for number, s in enumerate(run.sublayers):
        new = states[-1].clone()
        if not s.cross:
            mixing = s.A.mean(0) + torch.eye(len(s.queries), dtype=new.dtype)
            mixing = mixing / mixing.sum(-1, keepdim=True)
            new[s.queries] = mixing @ states[-1][s.queries]
            if run.read in s.queries:
                after = after.clone()
                after[s.queries] = mixing @ after[s.queries]
        elif s.pools:
            new[s.queries] = states[-1][s.queries] + s.A.mean(0) @ states[s.keys_state][s.keys]
        elif run.read in s.queries:
            crossing, after = number, eye
        states.append(new)
    result = states[-1][run.read].clone()
    if crossing is not None:
        s = run.sublayers[crossing]
        result += after[run.read][s.queries] @ s.A.mean(0) @ states[s.keys_state][s.keys]
    return result


def gae(run: Run) -> Tensor:
    """As in ``naive_relevance``; what the keys owe to third streams comes along in the same way."""

    def N(block):
        rest = block - torch.eye(len(block), dtype=block.dtype)
        sums = rest.sum(-1, keepdim=True)
        return torch.where(sums != 0, rest / sums, rest) + torch.eye(len(block), dtype=block.dtype)

    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        R, read, A = states[-1], states[s.keys_state], naive_relevance.positive(s)
        new = R.clone()
        if s.cross:
            across = N(R[s.queries][:, s.queries]).T @ A @ N(read[s.keys][:, s.keys])
            for column in range(run.size):
                if column in s.keys:
                    new[s.queries, column] = R[s.queries, column] + across[:, s.keys.index(column)]
                else:
                    new[s.queries, column] = R[s.queries, column] + A @ read[s.keys, column]
        else:
            new[s.queries] = R[s.queries] + A @ R[s.queries]
        states.append(new)
    return states[-1][run.read]


METHODS = {"weighted": naive_relevance.weighted, "gae": gae, "rollout": rollout}


def relevance(runs: list[Run], name: str) -> Tensor:
    """All tokens' relevance, the rows that are read added up."""
    return sum(METHODS[name](run) for run in runs)


def number(**lengths: int) -> dict[str, list[int]]:
    """Streams' tokens numbered through."""
    places, start = {}, 0
    for stream, length in lengths.items():
        places[stream] = list(range(start, start + length))
        start += length
    return places
