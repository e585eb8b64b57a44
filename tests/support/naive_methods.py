"""The methods that are not compared by default, as naive float64 code on whole runs."""

import torch
import torch.nn.functional as F

from support import naive_relevance

SIGNED = (
    "input_x_gradient", "full_grad", "att_cat", "x_grad_cam", "attn_lrp", "integrated_gradients", "occlusion",
    "leave_one_out", "value_gradient", "value_gradient_libra", "value_gradient_plain",
)  # fmt: skip


def weighted_norm(run):
    def alpha(s):
        before, added = s.x.norm(dim=1).sum(), s.a.norm(dim=1).sum()
        return (before / (before + added)).expand(len(s.queries))

    return naive_relevance.accumulate(run, alpha, naive_relevance.positive)[run.read]


def weighted_token_norm(run):
    def alpha(s):
        before, added = s.x.norm(dim=1), s.a.norm(dim=1)
        return before / (before + added)

    return naive_relevance.accumulate(run, alpha, naive_relevance.positive)[run.read]


def grad_eclip(run):
    def matrix(s):
        q, k = (F.normalize(t.transpose(0, 1).flatten(1), dim=1) for t in (s.q, s.k))
        cosine = q @ k.T
        cosine = torch.where(s.A[0] > 0, cosine, torch.nan)
        result = torch.zeros_like(cosine)
        for i, row in enumerate(cosine):
            seen = ~row.isnan()
            low, high = row[seen].min(), row[seen].max()
            weight = (row[seen] - low) / (high - low) if high > low else torch.ones(int(seen.sum()))
            result[i, seen] = weight * s.dA.sum(0)[i, seen]
        return torch.relu(result)

    return naive_relevance._last_reading(run, matrix)


def input_x_gradient(run):
    values, found = torch.zeros(run.size, dtype=run.logits.dtype), set()
    for s in run.sublayers:
        for i, place in enumerate(s.queries):
            if place not in found:
                values[place] = (s.x[i] * s.dx[i]).sum()
                found.add(place)
    return values


def states(run):
    """The sub-layers that have tokens before them."""
    return [s for s in run.sublayers if not getattr(s, "pools", False)]


def full_grad(run):
    values = torch.zeros(run.size, dtype=run.logits.dtype)
    for s in states(run):
        for i, place in enumerate(s.queries):
            values[place] += (s.x[i] * s.dx[i]).sum()
    return values


def att_cat(run):
    """Every matrix by the tokens that it reads, as they are then: as they next ask, if they ever do."""
    values = torch.zeros(run.size, dtype=run.logits.dtype)
    for s in run.sublayers:
        read = [t for t in run.sublayers[s.keys_state :] if t.queries == s.keys]
        # Queries without a gradient are none of y's; those that pool have no x.
        rows = [A.T for A, d in zip(s.A.transpose(0, 1), s.da if getattr(s, "pools", False) else s.dx,
                                    strict=True) if d.any()]  # fmt: skip
        if read and rows:
            received = torch.stack(rows).mean(dim=(0, 2))
            for j, place in enumerate(s.keys):
                values[place] += received[j] * (read[0].x[j] * read[0].dx[j]).sum()
    return values


def x_grad_cam(run):
    values = torch.zeros(run.size, dtype=run.logits.dtype)
    for s in states(run):
        inside = [i for i in range(len(s.queries)) if s.dx[i].any()]
        for channel in range(s.x.shape[1]):
            x, dx = s.x[inside, channel], s.dx[inside, channel]
            weight = sum(abs(a) * d for a, d in zip(x, dx, strict=True)) / x.abs().sum() if inside else 0
            for i, a in zip(inside, x, strict=True):
                values[s.queries[i]] += weight * a
    return values


@torch.no_grad()
def alti(run):
    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        C, read, new = states[-1], states[s.keys_state], states[-1].clone()
        for i, query in enumerate(s.queries):
            y = s.x[i] + s.a[i]
            parts = {("key", key): sum(s.A[h, i, j] * s.v[h, j] @ s.W[h] for h in range(len(s.A)))
                     for j, key in enumerate(s.keys)}  # fmt: skip
            if s.cross:
                parts["own", query] = s.x[i]
            else:
                parts["key", query] = parts["key", query] + s.x[i]
            share = {c: max(0.0, float(y.abs().sum() - (y - t).abs().sum())) for c, t in parts.items()}
            total = sum(share.values())
            new[query] = sum(w / total * (read if kind == "key" else C)[place]
                             for (kind, place), w in share.items())  # fmt: skip
        states.append(new)
    return states[-1][run.read]


def transformation(e, new):
    return new.norm(dim=1) / e.norm(dim=1) * F.cosine_similarity(e, new, dim=1).softmax(0)


def tokens_in_state(run, places, state):
    """x of the first sub-layer after ``state`` sub-layers in which these tokens ask."""
    rows = {}
    for s in run.sublayers[state:]:
        for i, place in enumerate(s.queries):
            rows.setdefault(place, s.x[i])
    return torch.stack([rows[place] for place in places])


@torch.no_grad()
def token_tm(run):
    start = {}
    for s in run.sublayers:
        for i, place in enumerate(s.queries):
            start.setdefault(place, s.x[i].norm())
    C = torch.diag(torch.stack([start[i] for i in range(run.size)]))
    states = [C]
    for s in run.sublayers:
        C, read, new = states[-1], states[s.keys_state], states[-1].clone()
        keys = tokens_in_state(run, s.keys, s.keys_state)
        values = sum(s.v[h] @ s.W[h] for h in range(len(s.v)))
        W = torch.diag(transformation(keys, values))
        rows = C[s.queries] + ((s.A.mean(0) @ W) * torch.relu(s.dA).mean(0)) @ read[s.keys]
        if s.after is not None:
            e = s.x + s.a
            rows = rows + torch.diag(transformation(e, s.after - e)) @ rows
        new[s.queries] = rows
        states.append(new)
    return states[-1][run.read]


def value_gradient_plain(run):
    """Every gradient times value that a query reads, one by one."""
    values = torch.zeros(run.size, dtype=run.logits.dtype)
    for s in run.sublayers:
        for j, place in enumerate(s.keys):
            values[place] += sum(
                s.A[h, i, j] * s.dA[h, i, j] for h in range(len(s.A)) for i in range(len(s.queries))
            )
    return values


def weighted_evidence(run, halved=False):
    """``halved``: by AttnLRP's rules A has half of what A v gets, as the naive rules have it."""

    def alpha(s):
        found = torch.relu(s.A * s.dA).sum((0, 2)) * (2 if halved else 1)
        own = torch.relu((s.x * s.dx).sum(dim=1))
        beta = torch.zeros_like(found)
        for i in range(len(found)):
            if found[i] > 0:
                beta[i] = found[i] / (own[i] + found[i]) * found[i] / found.max()
        return 1 - beta

    return naive_relevance.accumulate(run, alpha, naive_relevance.positive)[run.read]


_ALL = (
    weighted_norm, weighted_token_norm, grad_eclip, input_x_gradient, full_grad, att_cat, x_grad_cam, alti,
    token_tm, value_gradient_plain, weighted_evidence,
)  # fmt: skip
NAIVE = {method.__name__: method for method in _ALL}
