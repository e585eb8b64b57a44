"""The relevance that every explanation method returns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.trace import AttentionTrace


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
