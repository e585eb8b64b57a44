"""The last line of defence: a map that is not finite is an error, never a result."""

from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.result import Relevance
from clipmapper.relevance.trace import Attention, AttentionTrace

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
