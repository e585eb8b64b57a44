"""Queries, keys, values, output projections and norms of five models of other people, by their names.

Written by hand from the models' code, beside what the product's families say of them.
"""

from collections import defaultdict
from contextlib import contextmanager

import torch
from torch import nn

# Of the sub-layer at x: query, key, value, output projection, LayerNorm behind the addition.
SEPARATE = {
    "vit.layers": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", None),
    "text_encoder": ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"),
    "lxmert.encoder.x_layers": ("att.query", "att.key", "att.value", "output.dense", "output.LayerNorm"),
    "lxmert": ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"),
    "EncDecAttention": (
        "EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o", None
    ),
    "encoder.block": ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o", None),
    "decoder.block": ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o", None),
}  # fmt: skip
PACKED = {  # query, key and value from one layer
    "vision_model": ("self_attn.qkv", "self_attn.projection"),
    "transformer.h": ("attn.c_attn", "attn.c_proj"),
}


def _names(model, spec):
    module = model.get_submodule(spec.x)
    key = "EncDecAttention" if hasattr(module, "EncDecAttention") else spec.x
    if key.endswith("_self_att"):  # of LXMERT's cross-modality layers
        key = "lxmert"
    for table in (PACKED, SEPARATE):
        for prefix, names in table.items():
            if key.startswith(prefix):
                return names
    raise KeyError(spec.x)


@contextmanager
def parts(model, specs, heads):
    """Gives a list that holds after the forward, for each spec: q, k, v [H, N, D], W [H, D, C], norm."""
    outputs, handles, result = defaultdict(list), [], []

    def keep(path):
        return lambda module, args, output: outputs[path].append(output)

    wanted = {f"{spec.x}.{name}" for spec in specs for name in _names(model, spec)[:-1] if name}
    for path in wanted:
        handles.append(model.get_submodule(path).register_forward_hook(keep(path)))
    yield result
    for handle in handles:
        handle.remove()
    for spec in specs:
        names = _names(model, spec)
        packed = len(names) == 2
        found = [outputs[f"{spec.x}.{name}"].pop(0)[0].detach() for name in names[: 1 if packed else 3]]
        if packed:
            found = found[0].chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in found)
        projection = model.get_submodule(f"{spec.x}.{names[1 if packed else 3]}")
        weight = projection.weight.detach()
        W = (weight.T if isinstance(projection, nn.Linear) else weight).unflatten(0, (heads, -1))
        norm = None if packed or names[4] is None else model.get_submodule(f"{spec.x}.{names[4]}")
        result.append((q, k, v, W, norm))


@torch.no_grad()
def alti(run):
    """As in ``test_more_methods``, with the LayerNorm of BERT and its kind behind the addition."""
    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        C, read, new = states[-1], states[s.keys_state], states[-1].clone()
        for i, query in enumerate(s.queries):
            total = s.x[i] + s.a[i]

            def through(t, total=total, norm=s.norm):
                if norm is None:
                    return t
                sigma = (((total - total.mean()) ** 2).mean() + norm.eps).sqrt()
                return (t - t.mean()) / sigma * norm.weight

            y = total if s.norm is None else s.norm(total)
            parts = {("key", key): through(sum(s.A[h, i, j] * s.v[h, j] @ s.W[h] for h in range(len(s.A))))
                     for j, key in enumerate(s.keys)}  # fmt: skip
            own = ("own", query) if s.cross else ("key", query)
            parts[own] = parts.get(own, 0) + through(s.x[i])
            share = {c: max(0.0, float(y.abs().sum() - (y - t).abs().sum())) for c, t in parts.items()}
            total = sum(share.values())
            if total == 0:
                continue
            new[query] = sum(w / total * (read if kind == "key" else C)[place]
                             for (kind, place), w in share.items())  # fmt: skip
        states.append(new)
    return states[-1][run.read]
