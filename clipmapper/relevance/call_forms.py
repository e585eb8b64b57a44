"""The methods in the call forms of captum (``Attribution.attribute``) and Quantus (``explain_func``)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.relevance.method import Relevance, needs_of
from clipmapper.relevance.recording.record import record
from clipmapper.relevance.rerun import Again
from clipmapper.relevance.trace import AttentionTrace

# As in captum: the class for every sample, one for all, a place in an output of more axes; or any function
# of the output that gives one scalar a sample (a regression target, one answer rather than another).
Target = int | tuple | list | Tensor | Callable[[Tensor], Tensor] | None


class Attribution:
    """One method in the habits of captum.

    Parameters
    ----------
    model : what is recorded; see :func:`clipmapper.relevance.record`.
    method : a function of a trace, such as those in ``METHODS``.
    forward : called as ``forward(*inputs, *additional_forward_args)``, gives the model's output (default: the
        model). It must compute every token, as a recording needs.
    streams : the input stream that each of the inputs becomes (default: images [batch, 3, height, width] the
        image's, whole numbers the text's, and others those that are left, in order).
    """

    def __init__(
        self,
        model: nn.Module,
        method: Callable[..., Relevance],
        forward: Callable[..., Tensor] | None = None,
        streams: Sequence[str] | None = None,
    ) -> None:
        self.model, self.method = model, method
        self.forward = model if forward is None else forward
        self.streams = streams

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | tuple = None,
        internal_batch_size: int | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, ...]:
        """Relevance [batch, tokens] of each input; a tuple if a tuple was given.

        Tensors among ``additional_forward_args`` whose first axis is the batch are divided with it.
        ``options`` go to the method. Raises ``UserError`` where ``target`` does not fit the output, where
        there are fewer streams than inputs, and for a batch, or parts of it, of no samples.
        """
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        extra = additional_forward_args
        extra = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
        batch = given[0].shape[0]
        size = batch if internal_batch_size is None else internal_batch_size
        if batch < 1 or size < 1:
            raise UserError(
                f"{batch} samples, internal_batch_size={internal_batch_size}: at least 1 is needed"
            )
        parts = []
        for start in range(0, batch, size):
            rows = torch.arange(start, min(start + size, batch))
            trace = self.trace(given, target, extra, rows)
            relevance = self.method(trace, **options)
            names = _streams_of(given, trace) if self.streams is None else self.streams
            parts.append([relevance.streams[name] for name in names])
        joined = tuple(torch.cat(values) for values in zip(*parts, strict=True))
        return joined if isinstance(inputs, tuple) else joined[0]

    def trace(self, inputs: tuple[Tensor, ...], target: Target, extra: tuple, rows: Tensor) -> AttentionTrace:
        """The trace of some samples, after its backward."""
        batch = inputs[0].shape[0]

        def of_batch(value: object, rows: Tensor) -> object:
            whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
            return value[rows.to(value.device)] if whole else value

        def scalars(chosen: Tensor) -> Tensor:
            at = rows.to(chosen.device)[chosen]
            out = self.forward(*(of_batch(v, at) for v in (*inputs, *extra)))
            return select(out, target, at, batch)

        needs = needs_of([self.method])
        with record(self.model, samples=rows.tolist(), rules=needs.rules) as trace:
            y = scalars(torch.arange(len(rows), device=inputs[0].device))
        needs.differentiate(trace, y)
        trace.again = Again(self.model, scalars)
        return trace


def _streams_of(inputs: tuple[Tensor, ...], trace: AttentionTrace) -> list[str]:
    """The stream of each input; learned queries and a class token of the model's are none."""
    pooling = {step.query_node.stream for step in trace.attention if step.pools}
    left = [s for s in trace.inputs if s not in pooling and s != "class_token"]
    if len(left) < len(inputs):
        raise UserError(f"{len(inputs)} inputs, but the model's input streams are {', '.join(left)}")
    found: list[str | None] = []
    for value in inputs:
        whole = not (value.is_floating_point() or value.is_complex())
        stream = trace.image_stream if value.ndim == 4 else trace.text_stream if whole else None
        found.append(stream if stream in left else None)
        if stream in left:
            left.remove(stream)
    return [left.pop(0) if stream is None else stream for stream in found]


def select(out: object, target: Target, rows: Tensor, batch: int) -> Tensor:
    """One scalar a sample of an output [len(rows), ...], ``target`` as captum reads it."""
    if callable(target):
        y = target(out)
    elif not isinstance(out, Tensor):
        raise UserError(
            f"the forward gives {type(out).__name__}, no tensor: give forward=lambda *inputs: "
            "model(...).logits, or as target a function of what it gives"
        )
    elif target is None:
        y = out[:, 0] if out.ndim == 2 and out.shape[1] == 1 else out
    else:
        if isinstance(target, Tensor):
            target = target.tolist()  # a number where it has no axis
        if not isinstance(target, int | tuple | list):
            raise UserError(f"target={target!r}: must be a class, classes, or a function of the output")
        places = [target] * batch if isinstance(target, int | tuple) else target
        if len(places) != batch:
            raise UserError(f"target has {len(places)} entries for {batch} samples")
        chosen = [places[i] for i in rows.tolist()]
        chosen = [tuple(place) if isinstance(place, list) else place for place in chosen]
        try:
            y = torch.stack([row[place] for row, place in zip(out, chosen, strict=True)])
        except IndexError as error:
            raise UserError(f"target {chosen}: the output is {tuple(out.shape)}") from error
    if y.ndim != 1:
        raise UserError(f"target leaves {tuple(y.shape)} of the output, not one scalar a sample")
    return y


def quantus_explainer(
    method: Callable[..., Relevance], forward: Callable[..., Tensor] | None = None, stream: str | None = None
) -> Callable[..., np.ndarray]:
    """A function as Quantus' ``explain_func``: ``explain(model, inputs, targets, **kwargs)`` → array.

    For images [batch, channels, height, width] the result is [batch, 1, height, width], every pixel with
    the relevance of its patch; otherwise [batch, tokens]. ``forward(model, inputs)`` gives the output
    (default: ``model(inputs)``). What Quantus hands over beside model, inputs and targets is not used.
    """

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **kwargs) -> np.ndarray:
        first = next(model.parameters())
        pixels = torch.as_tensor(inputs).to(first.device, first.dtype)

        def run(values: Tensor) -> Tensor:
            return model(values) if forward is None else forward(model, values)

        attribution = Attribution(model, method, run)
        target = torch.as_tensor(np.asarray(targets)).long()
        trace = attribution.trace((pixels,), target, (), torch.arange(len(pixels)))
        relevance = method(trace)
        if stream is None and pixels.ndim == 4:
            maps = relevance.image[:, None]
            return nn.functional.interpolate(maps, pixels.shape[-2:], mode="nearest").cpu().numpy()
        name = stream if stream is not None else next(iter(relevance.streams))
        return relevance.streams[name].cpu().numpy()

    return explain
