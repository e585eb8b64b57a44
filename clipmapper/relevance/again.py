"""The explained forward, to be made again: for methods that one recording cannot serve.

``trace.again`` holds it where the caller gave one (:func:`clipmapper.explaining.trace_answers` does). Methods
that only need other backward rules work without it on a trace that was recorded with them:
``with record(model, rules="libra") as trace: ...``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.relevance.recorders import record
from clipmapper.relevance.trace import Attention, AttentionTrace

Forward = Callable[[Int[Tensor, "variants"]], Float[Tensor, "variants"]]


@runtime_checkable
class Readout(Protocol):
    """The model's head on one vector a sample, for methods that read out early layers (LeGrad).

    ``applies`` says at which sub-layers the residual stream is the one that the head was made for.
    """

    def applies(self, step: Attention) -> bool: ...

    def __call__(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]: ...


class Again:
    """A model and a forward of it: ``forward(rows)`` gives y for these samples of the traced batch.

    The model is in evaluation mode meanwhile and afterwards what it was.
    """

    def __init__(self, model: nn.Module, forward: Forward, readout: Readout | None = None) -> None:
        self.model, self.forward, self.readout = model, forward, readout
        self._recorded: dict[str, AttentionTrace] = {}

    def recorded(self, trace: AttentionTrace, rules: str) -> AttentionTrace:
        """The same forward and backward under other backward rules (made once for each)."""
        if rules not in self._recorded:
            with self._evaluating(), record(self.model, trace.samples, rules) as again:
                y = self.forward(self._all(trace))
            again.backward(y)
            self._recorded[rules] = again
        return self._recorded[rules]

    def scaled(self, trace: AttentionTrace, factor: float) -> AttentionTrace:
        """Recorded with the input tokens (:func:`input_tokens`) multiplied by ``factor``."""
        tokens = {stream: factor * values for stream, values in input_tokens(trace).items()}
        recording = record(self.model, trace.samples)
        # Substituted inside, so that those hooks run before the recorder's, which is to see the new tokens.
        with self._evaluating(), recording as again, _substituted(trace, tokens):
            y = self.forward(self._all(trace))
        again.backward(y)
        return again

    def undifferentiated(self, trace: AttentionTrace) -> AttentionTrace:
        """Recorded, without the backward: its tensors still hold the graph."""
        with self._evaluating(), record(self.model, trace.samples) as again:
            self.forward(self._all(trace))
        return again

    def score(
        self, trace: AttentionTrace, rows: Int[Tensor, "variants"], tokens: Mapping[str, Tensor]
    ) -> Float[Tensor, "variants"]:
        """y of variants of the samples ``rows`` with these input tokens; differentiable in the tokens."""
        with self._evaluating(), _substituted(trace, tokens):
            return self.forward(rows)

    def _all(self, trace: AttentionTrace) -> Tensor:
        return torch.arange(trace.batch, device=trace.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


def again(trace: AttentionTrace, method: str) -> Again:
    """``trace.again``; ``UserError`` where a method needs it and it is not there."""
    if trace.again is None:
        raise UserError(
            f"{method} runs the model more than once: set trace.again (clipmapper.relevance.Again), as "
            "clipmapper.explain does"
        )
    return trace.again


def with_rules(trace: AttentionTrace, rules: str, method: str) -> AttentionTrace:
    """The trace itself when it was recorded by these backward rules, else the same recorded again."""
    return trace if trace.rules == rules else again(trace, method).recorded(trace, rules)


def input_tokens(trace: AttentionTrace) -> dict[str, Tensor]:
    """The tokens [batch, tokens, width] of every input stream as they entered its first sub-layer.

    That is after position embeddings (and CLIP's first LayerNorm). A stream that has no sub-layer of its own
    before it is joined with others (a class token that the mapper adds) is left out.
    """
    found = {}
    for step in trace.attention:
        node = step.query_node
        if node.version == 0 and node.stream in trace.inputs:
            found.setdefault(node.stream, step.before.detach())
    return found


@contextmanager
def _substituted(trace: AttentionTrace, tokens: Mapping[str, Tensor]) -> Iterator[None]:
    """The modules of each stream's first sub-layer are given these tokens in place of their own."""

    def hook(values: Tensor):
        return lambda module, args: (values, *args[1:])

    with ExitStack() as stack:
        for stream, values in tokens.items():
            handle = trace.entries[stream].register_forward_pre_hook(hook(values), prepend=True)
            stack.callback(handle.remove)
        yield
