"""The way in which all explanation methods are called, and the relevance that every one of them returns."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.trace import Attention, AttentionTrace, Join


@dataclass(frozen=True)
class Needs:
    """What a method asks of the recording that it is given, to be served by it alone.

    Attributes
    ----------
    rules : of the backward pass (:mod:`clipmapper.relevance.backward.rules`). A trace of other rules serves
        as well where ``trace.again`` is set: what is missing is recorded again.
    backward : whether gradients of y are needed. Without, the method makes those that it needs from the
        graph, which is to be kept.
    """

    rules: str = "plain"
    backward: bool = True

    def differentiate(self, trace: AttentionTrace, y: Tensor, times: Tensor | None = None) -> None:
        """Make the backward of y, unless it is of no use to the method. ``times``: of
        :meth:`AttentionTrace.backward`.

        (Where there are several streams and nobody has said which is read, the backward finds it.)
        """
        several = len({step.query_node.stream for step in trace.attention}) > 1
        if self.backward or (several and trace.read is None):
            trace.backward(y, keep_graph=not self.backward, times=times)


def needs_of(methods: Iterable[Callable[..., "Relevance"]]) -> Needs:
    """The recording that serves all these methods: by their rules where those agree, otherwise plain."""
    needs = [getattr(method, "needs", Needs()) for method in methods]
    rules = {need.rules for need in needs}
    return Needs(rules.pop() if len(rules) == 1 else "plain", any(need.backward for need in needs))


@dataclass(frozen=True)
class Relevance:
    """Relevance of every input token for the explained scalar, per input stream: Float[batch, tokens].

    ``grid`` is (rows, columns) of the image patches; tokens before them (class token) are prefix tokens.
    """

    streams: Mapping[str, Float[Tensor, "batch _tokens"]]
    image_stream: str | None = None
    text_stream: str | None = None
    grid: tuple[int, int] | None = None

    @property
    def image(self) -> Float[Tensor, "batch rows columns"]:
        """Relevance of the image patches, as a grid."""
        if self.image_stream is None or self.grid is None:
            raise ValueError("this trace has no image stream with a grid of patches")
        self._check_alone(self.image_stream)
        rows, columns = self.grid
        tokens = self.streams[self.image_stream].shape[1]
        if tokens < rows * columns:
            raise ValueError(f"patches were removed: {tokens} tokens are left of a {rows} × {columns} grid")
        return self.streams[self.image_stream][:, -rows * columns :].unflatten(1, (rows, columns))

    @property
    def text(self) -> Float[Tensor, "batch tokens"]:
        """Relevance of the text tokens, 0 at padding."""
        if self.text_stream is None:
            raise ValueError("this trace has no text stream")
        self._check_alone(self.text_stream)
        return self.streams[self.text_stream]

    def _check_alone(self, stream: str) -> None:
        """Raises ``ValueError`` where it can't be known which of several streams is meant."""
        several = [name for name in self.streams if name == stream or name.startswith(f"{stream} ")]
        if len(several) > 1:
            raise ValueError(
                f"{len(several)} {stream} streams were recorded, as of several forwards: choose one of them, "
                f"as streams[{several[-1]!r}], or make one forward inside the recorder"
            )


def as_relevance(trace: AttentionTrace, streams: Mapping[str, Tensor]) -> Relevance:
    """Relevance with every input stream of the trace: what nothing was found for is 0, and so is padding."""
    complete = {}
    for stream in trace.inputs:
        if stream in streams:
            valid = trace.padding_free(stream)
            complete[stream] = streams[stream] * valid
        else:
            shape = (trace.batch, trace.lengths[stream])
            complete[stream] = torch.zeros(shape, dtype=trace.dtype, device=trace.device)
    return Relevance(complete, trace.image_stream, trace.text_stream, trace.grid)


def with_sign(relevance: Relevance, sign: str) -> Relevance:
    """Signed relevance as it is ("both"), or the evidence for ("positive") or against y ("negative") alone.

    Evidence against y is given as positive numbers. Raises ``UserError`` for another word.
    """
    check_sign(sign)
    change = {
        "both": lambda v: v,
        "positive": lambda v: v.clamp(min=0),
        "negative": lambda v: (-v).clamp(min=0),
    }
    return replace(relevance, streams={s: change[sign](v) for s, v in relevance.streams.items()})


def check_sign(sign: str) -> None:
    """Raises ``UserError`` for a word that is no sign."""
    if sign not in ("positive", "negative", "both"):
        raise UserError(f"sign={sign!r}: must be one of positive, negative, both")


_WHY_NOT = {
    "sign": "it uses no gradient, so nothing in it speaks against y",
    "start_layer": "it does not accumulate over layers",
}


def explanation(*, gradient: bool = False, layers: bool = False, needs: Needs | None = None) -> Callable:
    """Makes a function of a trace a method: ``method(trace, y=None, **options) -> Relevance``.

    ``y``: Float[batch], the explained scalar; the backward is made here unless it has been made of this very
    tensor. (The graph is kept for another y; ``trace.backward(y)`` beforehand lets go of it.)

    With ``gradient`` there is an option ``sign``: "positive" is the method itself, what speaks for y;
    "negative" is the method for −y, what speaks against it, as positive numbers; "both" is their difference.
    With ``layers`` there is ``start_layer``, see :func:`clipmapper.relevance.method.from_layer`. ``needs``
    become an attribute of the method. A function
    may have options of these names itself. An option that a method does not have raises ``UserError``, and so
    does a map that is not finite.
    """

    def decorate(function: Callable[..., Relevance]) -> Callable[..., Relevance]:
        own = inspect.signature(function).parameters
        offered = {"sign": gradient, "start_layer": layers}

        @functools.wraps(function)
        def method(trace: AttentionTrace, y: object = None, **options) -> Relevance:
            for name in options:
                if name not in own and not offered.get(name, False):
                    why = _WHY_NOT.get(name, f"its options are {', '.join(_options(signature)) or 'none'}")
                    raise UserError(f"{function.__name__} has no option {name}: {why}")
            check_sign(options.get("sign", "positive"))
            if gradient:
                trace.require_no_cut()  # before it asks for a backward that can't be made
            trace = differentiated(trace, y, "sign" in own or gradient)
            if "start_layer" not in own:
                trace = from_layer(trace, options.pop("start_layer", 0))
            sign = "positive" if "sign" in own else options.pop("sign", "positive")
            # Relevance is not computed by autocast's rules (``trace.again`` is).
            with torch.autocast(trace.device.type, enabled=False):
                return finite(trace, _signed(function, trace, sign, options), function.__name__)

        parameters = list(own.values())
        parameters.insert(1, inspect.Parameter("y", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
        for name, default in (("sign", "positive"), ("start_layer", 0)):
            if offered[name] and name not in own:
                parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
        signature = inspect.Signature(parameters, return_annotation=Relevance)
        method.__signature__ = signature
        method.needs = Needs() if needs is None else needs
        return method

    return decorate


def _signed(function: Callable[..., Relevance], trace: AttentionTrace, sign: str, options: dict) -> Relevance:
    if sign == "positive":
        return function(trace, **options)
    against = function(opposite(trace), **options)
    if sign == "negative":
        return against
    streams = function(trace, **options).streams
    return replace(against, streams={s: v - against.streams[s] for s, v in streams.items()})


def _options(signature: inspect.Signature) -> list[str]:
    return [name for name in signature.parameters if name not in ("trace", "y")]


def differentiated(trace: AttentionTrace, y: object, gradient: bool) -> AttentionTrace:
    """The trace after its backward of ``y``; as it is for None, or where y is not needed.

    Raises ``UserError`` for a y that is no tensor (an option by position, say).
    """
    if y is not None and not isinstance(y, Tensor):
        raise UserError(f"y={y!r}: the explained scalar must be a tensor [batch]; options are given by name")
    if y is None or trace.explained is y or not (gradient or trace.reads_what_y_reads):
        return trace
    trace.backward(y, keep_graph=True)
    # The forward that can be made again may explain another scalar.
    return replace(trace, again=None)


def opposite(trace: AttentionTrace) -> AttentionTrace:
    """The trace of −y."""

    def turned(step):
        if not isinstance(step, Attention):
            return step
        names = ("mixed_gradient", "before_gradient", "added_gradient")
        gradients = {name: getattr(step, name) for name in names}
        return replace(step, **{name: None if g is None else -g for name, g in gradients.items()})

    again = None if trace.again is None else trace.again.opposite()
    return replace(trace, steps=[turned(step) for step in trace.steps], again=again)


_NUMBERS = ("before", "query", "key", "value", "mixed", "added")
_GRADIENTS = ("added_gradient", "mixed_gradient", "before_gradient")


def finite(trace: AttentionTrace, relevance: Relevance, method: str) -> Relevance:
    """The relevance itself. Raises ``UserError`` that names the sub-layer where it is not finite."""
    if all(bool(values.isfinite().all()) for values in relevance.streams.values()):
        return relevance
    bad = {
        int(sample)
        for values in relevance.streams.values()
        for sample in (~values.isfinite().all(dim=1)).nonzero()
    }
    which = "sample " + ", ".join(map(str, sorted(bad)[:5])) + (" and more" if len(bad) > 5 else "")
    raise UserError(f"{method}: the map of {which} is not finite: {_cause(trace)}")


def _cause(trace: AttentionTrace) -> str:
    """The first place of the forward, or else of the backward, at which a number is not finite."""
    for step in trace.attention:
        if bad := _first(step, _NUMBERS):
            return f"so are the tokens of {step.name} ({bad}); is the input finite, or the precision too low?"
    for step in reversed(trace.attention):
        if bad := _first(step, _GRADIENTS):
            return f"so is the gradient at {step.name} ({bad})"
    last = trace.attention[-1].name
    return f"all numbers recorded are finite, up to {last}, and overflow when they are put together"


def _first(step: Attention, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = getattr(step, name)
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            return name.replace("_", " ")
    return None


def from_layer(trace: AttentionTrace, start_layer: int | Mapping[str, int] = 0) -> AttentionTrace:
    """The trace with every input stream entering at its attention sub-layer ``start_layer`` (from 0).

    Relevance then is that of the tokens in that state, each counted as the input token at its place (C = I
    there). Chefer et al.'s notebooks do so for CLIP, whose maps over all layers look noisy: −1 keeps the
    last sub-layer alone. A number holds for every input stream that has sub-layers of its own, a mapping for
    the streams that it names (a stream made of others as well).

    Raises ``UserError`` for a stream that is not there or has no such sub-layer.
    """
    if start_layer == 0:
        return trace
    counts = Counter(step.query_node.stream for step in trace.attention)
    for step in trace.attention:
        if step.pools:  # one sub-layer by itself, with learned queries
            del counts[step.query_node.stream]
    if isinstance(start_layer, Mapping):
        wanted = dict(start_layer)
    else:
        wanted = {stream: start_layer for stream in trace.inputs if stream in counts}
        if not wanted:
            raise UserError(f"start_layer={start_layer}: name a stream, one of {', '.join(counts)}")
    first = {}
    for stream, number in wanted.items():
        if stream not in counts:
            raise UserError(f"start_layer: no stream {stream!r} with sub-layers; one of {', '.join(counts)}")
        count = counts[stream]
        if not -count <= number < count:
            raise UserError(
                f"start_layer={number}: stream {stream!r} has {count} attention sub-layers, so it must be "
                f"{-count} to {count - 1}; a mapping gives each stream its own: {{{stream!r}: {count - 1}}}"
            )
        first[stream] = number % count

    def kept(step: Attention | Join) -> Attention | Join:
        if isinstance(step, Join) or step.query_node.version >= first.get(step.query_node.stream, 0):
            return step
        return Join(step.output_node, (step.query_node,))  # every token stays what it is

    return replace(trace, steps=[kept(step) for step in trace.steps])
