"""Many scalars of one forward: a trace in which every scalar is a sample of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clipmapper.relevance.float16_gradients import scaled_gradients
from clipmapper.relevance.trace import (
    Attention,
    AttentionTrace,
    attention_probabilities,
    factors,
    multiplied,
)

_FORWARD = ("query", "key", "value", "mixed", "before", "added")


@contextmanager
def attention_for_several() -> Iterator[None]:
    """Run a forward in this whose gradients of several scalars are wanted; to be entered before the recorder.

    The forward of attention stays fused. Its backward is matrix products, which torch computes for all
    scalars in one batch (the backward of a fused kernel it runs once a scalar), from probabilities that are
    rebuilt layer by layer: the graph holds queries, keys and values, and no tokens² numbers.
    """
    original = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if dropout_p or more or not (query.requires_grad or key.requires_grad or value.requires_grad):
            more = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, **more}
            return original(query, key, value, attn_mask=attn_mask, **more)
        return _RebuiltAttention.apply(query, key, value, attn_mask, is_causal, scale, original)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _RebuiltAttention(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, mask, causal, scale, fused):
        return fused(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, mask, ctx.causal, scale, _ = inputs
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        ctx.save_for_backward(query, key, value, mask, output)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, mask, output = ctx.saved_tensors
        A = attention_probabilities(query, key, mask, ctx.causal, ctx.scale).to(value.dtype)
        # Through the softmax: A ⊙ (∂A − Σ_j A ∂A), and that sum is o · ∂o.
        scores = A * (gradient @ value.mT - (gradient * output).sum(dim=-1, keepdim=True)) * ctx.scale
        return scores @ key, scores.mT @ query, A.mT @ gradient, None, None, None, None


def each_scalar(
    trace: AttentionTrace,
    y: Float[Tensor, "scalars"],
    position: Int[Tensor, "scalars"],
    identity: Sequence[int],
    *,
    stream: str = "text",
    at_once: int = 16,
    times: Float[Tensor, "scalars"] | None = None,
) -> Iterator[AttentionTrace]:
    """Make, of one sample's trace with its graph (no backward yet), traces with a row for each scalar.

    Row i explains ``y[i]`` and reads token ``position[i]`` of the input ``stream``; ``identity[i]`` seeds
    what is random about it. What the forward computed is shared by all rows; only gradients are a row's own.
    ``at_once`` scalars make one trace, so that memory does not grow with their number. The last one lets go
    of the graph. ``times``: as of :meth:`AttentionTrace.backward`.

    Raises ``ValueError`` for a trace of several samples, and where ``y`` does not depend on the trace;
    ``UserError`` where a part of the model passes no gradient.
    """
    if trace.batch != 1:
        raise ValueError(f"a trace of one sample is needed, not of {trace.batch}")
    trace.require_gradient(y)
    steps = trace.attention
    wanted = [edge.edge for step in steps for edge in step.edges]
    shapes = [t.shape[1:] for step in steps for t in (step.mixed, step.before, step.before)]
    half = torch.float16 in {t.dtype for step in steps for t in (step.mixed, step.before)}
    for start in range(0, len(y), at_once):
        part = slice(start, start + at_once)
        last = start + at_once >= len(y)

        def run(
            scale: Tensor | None, largest_at_first: float = 1.0, part=part, last=last
        ) -> tuple[list[Tensor | None], float]:
            ones = torch.eye(len(y[part]), dtype=y.dtype, device=y.device)
            found = torch.autograd.grad(
                y[part],
                wanted,
                ones if scale is None else ones * (scale * largest_at_first).to(y.dtype),
                is_grads_batched=True,
                allow_unused=True,
                retain_graph=scale is not None or not last,
            )
            return list(found), largest_at_first

        count, scale = len(y[part]), None
        if half:
            found, scale = scaled_gradients(run, count, y.device, lambda g: g.abs().flatten(1).amax(dim=1))
        else:
            found, _ = run(None)
        now, scale = factors(None if times is None else times[part], scale, steps)
        gradients = iter(
            y.new_zeros(1).expand(count, *shape) if g is None else multiplied(g[:, 0], now)
            for shape, g in zip(shapes, found, strict=True)
        )
        yield _rows(trace, gradients, scale, position[part], identity[part], stream)


def _rows(
    trace: AttentionTrace,
    gradients: Iterator[Tensor],
    scale: Float[Tensor, "scalars"] | None,
    position: Int[Tensor, "scalars"],
    identity: Sequence[int],
    stream: str,
) -> AttentionTrace:
    count = len(position)

    def row_each(t: Tensor) -> Tensor:
        return t.detach().expand(count, *t.shape[1:])

    steps = []
    for step in trace.steps:
        if isinstance(step, Attention):
            step = replace(
                step,
                **{name: row_each(getattr(step, name)) for name in _FORWARD},
                context=None if step.context is None else row_each(step.context),
                mixed_gradient=next(gradients),
                before_gradient=next(gradients),
                added_gradient=next(gradients),
                gradient_scale=scale,
            )
        steps.append(step)
    rows = replace(
        trace,
        steps=steps,
        valid={name: row_each(mask) for name, mask in trace.valid.items()},
        read=None if trace.read is None else (trace.read[0], position),
        samples=list(identity),
    )
    rows.read_token(stream, position)
    return rows
