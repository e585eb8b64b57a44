"""The scalar that is explained: of a class its logit, its probability or its log-probability.

The gradient of a probability is that of its logarithm times the probability itself, ``∇p = p ∇log p``. So it
is the logarithm that is differentiated, and p that gradients are multiplied by where they have come out of
the model: a probability of 1e-9 leaves no trace in float16, and its logarithm has the size of a logit.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipmapper.errors import UserError

EXPLAINED = ("logit", "probability", "log_probability")


def check_explained(explained: str) -> None:
    """Raises ``UserError`` for a word that names no scalar."""
    if explained not in EXPLAINED:
        raise UserError(f"explained={explained!r}: must be one of {', '.join(EXPLAINED)}")


@runtime_checkable
class Scalar(Protocol):
    """From what a forward gives for the samples ``rows`` to the scalar that is explained of each."""

    def value(self, output: Tensor, rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
        """The scalar."""

    def differentiated(
        self, output: Tensor, rows: Int[Tensor, "rows"]
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"] | None]:
        """What is differentiated, and by what its gradient is multiplied (None: nothing)."""

    def start(self, output: Tensor, rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
        """The scalar in which layer-wise relevance propagation starts."""


class Itself:
    """The forward gives the scalar."""

    def value(self, output: Tensor, rows: Tensor) -> Tensor:
        return output

    def differentiated(self, output: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        return output, None

    def start(self, output: Tensor, rows: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Opposite:
    """The scalar with its sign turned."""

    scalar: Scalar

    def value(self, output: Tensor, rows: Tensor) -> Tensor:
        return -self.scalar.value(output, rows)

    def differentiated(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        y, times = self.scalar.differentiated(output, rows)
        return -y, times

    def start(self, output: Tensor, rows: Tensor) -> Tensor:
        return -self.scalar.start(output, rows)


@dataclass(frozen=True)
class ClassScalar:
    """One class of each sample, of scores [rows, classes] before a softmax.

    ``classes``: which one. ``explained``: "logit" (the score itself), "probability" (the softmax over all
    classes) or "log_probability"; the softmax is computed in float32 at least.

    Layer-wise relevance propagation starts in the logit, whatever is explained: its authors' code lets a
    softmax pass relevance as it is (Chefer, Gur, Wolf 2021).
    """

    classes: Int[Tensor, "samples"]
    explained: str = "logit"

    def __post_init__(self) -> None:
        check_explained(self.explained)

    def value(
        self, output: Float[Tensor, "rows classes"], rows: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        """The scalar, to be differentiated as it is.

        Raises ``UserError`` for a probability whose gradient float16 would lose.
        """
        y, _ = self.differentiated(output, rows)
        if self.explained != "probability":
            return y
        if output.dtype == torch.float16 and y.requires_grad:
            raise UserError(
                "explained=probability: this method differentiates it many times, and its gradient gets lost "
                "in float16; run the model in float32 or bfloat16, or give explained=log_probability"
            )
        return y.exp()

    def differentiated(
        self, output: Float[Tensor, "rows classes"], rows: Int[Tensor, "rows"]
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"] | None]:
        if self.explained == "logit":
            return self.start(output, rows), None
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        y = self.start(output.log_softmax(dim=-1), rows)
        return y, y.detach().exp() if self.explained == "probability" else None

    def start(
        self, output: Float[Tensor, "rows classes"], rows: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        return output.gather(1, self.classes[rows][:, None])[:, 0]


def require_size(times: Float[Tensor, "rows"] | None, called: list[str]) -> None:
    """Raises ``UserError`` for a probability that is too small to multiply a gradient by.

    What is left of the gradient would be less exact than its numbers are, or nothing. ``times``: of
    :meth:`Scalar.differentiated`, ``called``: the classes in words.
    """
    if times is None:
        return
    kind = torch.finfo(times.dtype)
    least = kind.tiny / kind.eps
    for name, probability in zip(called, times.tolist(), strict=True):
        if probability < least:
            raise UserError(
                f"explained=probability: that of {name!r} is {probability:.0e}, too small for a gradient "
                f"(the least is {least:.0e}); explained=log_probability has the same direction"
            )
