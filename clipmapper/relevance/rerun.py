"""The explained forward, to be made again: for methods that one recording cannot serve.

``trace.again`` holds it where the caller gave one (:func:`clipmapper.explaining.trace_answers` does). Methods
that only need other backward rules work without it on a trace that was recorded with them:
``with record(model, rules="libra") as trace: ...``.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rules import backward_rules
from clipmapper.relevance.explained_scalar import Itself, Opposite, Scalar
from clipmapper.relevance.modes import evaluating, without_parameter_gradients
from clipmapper.relevance.recording.capture import argument, replaced
from clipmapper.relevance.recording.record import record
from clipmapper.relevance.recording.step_by_step import fused_attention, without_weights
from clipmapper.relevance.trace import (
    Attention,
    AttentionTrace,
    Entry,
    Node,
    factors,
    gradients_of,
    multiplied,
)

Forward = Callable[[Int[Tensor, "variants"]], Float[Tensor, "variants *rest"]]


@runtime_checkable
class Readout(Protocol):
    """The model's head on one vector a sample, for methods that read out early layers (LeGrad).

    ``applies`` says at which sub-layers the residual stream is the one that the head was made for.
    """

    def applies(self, step: Attention) -> bool: ...

    def __call__(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]: ...


@runtime_checkable
class Removal(Protocol):
    """The explained forward with tokens out of the sequence.

    ``removable``: by input stream, which of its tokens can be taken out. ``without`` gives what the forward
    gives for the samples ``rows``, each without one token of that stream.
    """

    removable: Mapping[str, Bool[Tensor, "batch _tokens"]]

    def without(
        self, rows: Int[Tensor, "variants"], stream: str, tokens: Int[Tensor, "variants"]
    ) -> Float[Tensor, "variants *rest"]: ...


@dataclass(frozen=True)
class _Opposite:
    """The head with its sign turned."""

    readout: Readout

    def applies(self, step: Attention) -> bool:
        return self.readout.applies(step)

    def __call__(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]:
        return -self.readout(pooled)


class Again:
    """A model and a forward of it: ``forward(rows)`` gives y for these samples of the traced batch, or the
    output of which ``scalar`` makes y.

    The model is in evaluation mode meanwhile and afterwards what it was. It runs under the autocast under
    which this was made. ``scalar`` is no part of the model: backward rules do not hold for it.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        readout: Readout | None = None,
        scalar: Scalar | None = None,
        removal: Removal | None = None,
    ) -> None:
        self.model, self.forward, self.readout, self.removal = model, forward, readout, removal
        self.scalar: Scalar = Itself() if scalar is None else scalar
        self._recorded: dict[str, AttentionTrace] = {}
        self._attention: dict[str, dict[Node, Attention]] = {}
        kind = next((p.device.type for p in model.parameters()), "cpu")
        self._autocast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

    def opposite(self) -> "Again":
        """The same for −y."""
        readout = None if self.readout is None else _Opposite(self.readout)
        with self._autocast:
            return Again(self.model, self.forward, readout, Opposite(self.scalar), self.removal)

    @torch.no_grad()
    def value(self, trace: AttentionTrace) -> Float[Tensor, "batch"]:
        """y itself."""
        rows = self._all(trace)
        with self._evaluating():
            return self.scalar.value(self.forward(rows), rows)

    @torch.no_grad()
    def removed(
        self, rows: Int[Tensor, "variants"], stream: str, tokens: Int[Tensor, "variants"]
    ) -> Float[Tensor, "variants"]:
        """y of these samples, each without one token of that stream. Needs ``removal``."""
        with self._evaluating():
            return self.scalar.value(self.removal.without(rows, stream, tokens), rows)

    def recorded(self, trace: AttentionTrace, rules: str) -> AttentionTrace:
        """The same forward and backward under other backward rules (made once for each)."""
        if rules not in self._recorded:
            with self._evaluating(), record(self.model, trace.samples, rules) as again:
                output = self.forward(self._all(trace))
            y, times = self._differentiated(again, output)
            again.backward(y, times=times)
            again.again = self
            self._recorded[rules] = again
        return self._recorded[rules]

    def attention(
        self, trace: AttentionTrace, nodes: Collection[Node], rules: str
    ) -> Mapping[Node, Attention]:
        """The sub-layers that give these nodes, of the same forward under other backward rules.

        Of their gradients they have that of attention alone, ``mixed_gradient``: the backward ends at the
        first of them. Those of one call are kept for the next.
        """
        if rules in self._recorded:
            return {step.output_node: step for step in self._recorded[rules].attention}
        if not set(nodes) <= self._attention.get(rules, {}).keys():
            self._attention[rules] = self._attending(trace, nodes, rules, {})
        return self._attention[rules]

    def scaled(
        self, trace: AttentionTrace, nodes: Collection[Node], factor: float, method: str
    ) -> Mapping[Node, Attention]:
        """The same by the trace's rules, with the input tokens (:func:`input_tokens`) times ``factor``."""
        tokens = {s: factor * values for s, values in input_tokens(trace, method).items()}
        return self._attending(trace, nodes, trace.rules, tokens)

    def _attending(
        self, trace: AttentionTrace, nodes: Collection[Node], rules: str, tokens: Mapping[str, Tensor]
    ) -> dict[Node, Attention]:
        recording = record(self.model, trace.samples, rules)
        # Substituted inside, so that those hooks run before the recorder's, which is to see the new tokens.
        with self._evaluating(), recording as again, _substituted(trace, tokens):
            output = self.forward(self._all(trace))
        y, times = self._differentiated(again, output)
        again.require_gradient(y)
        steps = {step.output_node: step for step in again.attention if step.output_node in nodes}
        places = [step.edges[0] for step in steps.values()]
        found, scale = gradients_of(y, [place.edge for place in places], again, keep_graph=False)
        if all(gradient is None for gradient in found):
            raise ValueError("y depends on nothing that was recorded: run the model inside the recorder")
        times, scale = factors(times, scale, again.attention)
        for step, place, gradient in zip(steps.values(), places, found, strict=True):
            step.mixed_gradient = (
                torch.zeros_like(step.mixed)
                if gradient is None
                else multiplied(place.turned(gradient), times)
            )
            step.gradient_scale = None if scale is None else scale.expand(again.batch)
        again.release_graph()
        return steps

    def _differentiated(self, trace: AttentionTrace, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scalar of a recorded forward, and what its gradients are multiplied by."""
        rows = self._all(trace)
        with torch.inference_mode(False), torch.enable_grad():
            if trace.rules == "lrp":
                return self.scalar.start(output, rows), None
            return self.scalar.differentiated(output, rows)

    def undifferentiated(self, trace: AttentionTrace) -> AttentionTrace:
        """Recorded, without the backward: its tensors still hold the graph."""
        with self._evaluating(), record(self.model, trace.samples, trace.rules) as again:
            self.forward(self._all(trace))
        return again

    def score(
        self, trace: AttentionTrace, rows: Int[Tensor, "variants"], tokens: Mapping[str, Tensor]
    ) -> Float[Tensor, "variants"]:
        """y of variants of the samples ``rows`` with these input tokens; differentiable in the tokens.

        By the trace's backward rules.
        """
        with ExitStack() as stack:
            stack.enter_context(self._evaluating())
            modules = list(self.model.modules())
            stack.enter_context(without_parameter_gradients(modules))
            if trace.rules != "plain":
                # Rules are for the fused function.
                stack.enter_context(fused_attention(modules))
                stack.enter_context(without_weights(modules))
                stack.enter_context(backward_rules(trace.rules))
            stack.enter_context(_substituted(trace, tokens, rows))
            output = self.forward(rows)
        return self.scalar.value(output, rows)

    def _all(self, trace: AttentionTrace) -> Tensor:
        return torch.arange(trace.batch, device=trace.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with evaluating(self.model), self._autocast:
            yield


def again(trace: AttentionTrace, method: str) -> Again:
    """``trace.again``; ``UserError`` where a method needs it and it is not there."""
    if trace.again is None:
        raise UserError(
            f"{method} runs the model more than once: set trace.again (clipmapper.relevance.Again), as "
            "clipmapper.explain does"
        )
    return trace.again


def with_rules(trace: AttentionTrace, rules: str, method: str) -> AttentionTrace:
    """The trace itself when it was recorded by these backward rules, else the same recorded again.

    Raises ``UserError`` where the model passes no gradient, for which the rules are.
    """
    trace.require_no_cut()
    return trace if trace.rules == rules else again(trace, method).recorded(trace, rules)


def input_tokens(trace: AttentionTrace, method: str) -> dict[str, Tensor]:
    """The tokens [batch, tokens, width] of every input stream as they come in (``trace.entries``).

    That is after position embeddings (and CLIP's first LayerNorm). Learned queries and class tokens, which
    are part of the model, are left out. Raises ``UserError`` for any other stream whose tokens can't be
    replaced.
    """
    pooling = {step.query_node.stream for step in trace.attention if step.pools}
    found = {}
    for stream in trace.inputs:
        entry = trace.entries.get(stream)
        if entry is not None:
            tokens = next(s for s in trace.attention if s.query_node == entry.node).before.detach()
            found[stream] = tokens if entry.places is None else taken(tokens, entry.places)
        elif stream not in pooling and stream != "class_token":
            raise UserError(
                f"{method}: the tokens of stream {stream!r} can't be replaced by others: no known sub-layer "
                "changes them first (they are only read, or added to outside of it)"
            )
    return found


def taken(tokens: Tensor, places: Int[Tensor, "batch _tokens"]) -> Tensor:
    """The tokens at these places; 0 for those that are at none."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[rows, places.clamp(min=0)] * (places >= 0)[..., None]


@contextmanager
def _substituted(
    trace: AttentionTrace, tokens: Mapping[str, Tensor], rows: Tensor | None = None
) -> Iterator[None]:
    """Put these tokens (of the samples ``rows``) in the place of each stream's own, where it comes in."""
    with ExitStack() as stack:
        for stream, values in tokens.items():
            entry = trace.entries[stream]
            places = entry.places if entry.places is None or rows is None else entry.places[rows]
            hook = _Substitution(entry, values, places)
            handle = entry.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


@dataclass
class _Substitution:
    """A hook on a module, for one of its calls."""

    entry: Entry
    values: Float[Tensor, "batch _tokens width"]
    places: Int[Tensor, "batch _tokens"] | None
    calls: int = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        number, self.calls = self.calls, self.calls + 1
        if number != self.entry.call:
            return None
        values = self.values
        if self.places is not None:
            given = argument(module, args, kwargs, None)
            tokens = (given.transpose(0, 1) if self.entry.transposed else given).clone()
            row, token = (self.places >= 0).nonzero(as_tuple=True)
            tokens[row, self.places[row, token]] = values[row, token]
            values = tokens
        return replaced(module, args, kwargs, values.transpose(0, 1) if self.entry.transposed else values)
