"""What is computed between operators that the rules saw: by torch.jit, torch.vmap, before the block."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipmapper.relevance.backward.rule import kind_of, tensors
from clipmapper.relevance.backward.unknown import has_rule
from clipmapper.relevance.backward.weights import note_of_weights, of_weights

_MARK = "clipmapper: of weights"  # in a node's metadata: False of an activation
_MANY = 1000
# (Nodes are Any here: to Python, those of torch.jit are no torch.autograd.graph.Node.)
# What of weights and of something that does not vary makes an activation: that may be tokens, or name them.
_READS_DATA = {"Mm", "Bmm", "Mv", "Addmm", "Addmv", "Addbmm", "Baddbmm", "Linear", "Convolution", "Index"}


class Seen:
    """Marks the results of operators in the graph, so that what lies between them is noticed."""

    def __init__(self) -> None:
        # Nodes are numbered in their order; what was made before the block is as the caller wanted it.
        self._start = torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()

    def note(self, result: object) -> None:
        for value in tensors((result,)):
            if value.grad_fn is not None:
                value.grad_fn.metadata[_MARK] = of_weights(value)

    def look_at(self, x: Tensor, rules: str) -> str | None:
        """Note whether x, which an operator is given, is of weights, if nobody has seen it being made.

        Return the name of what it was made by inside the block where that has no rule.
        """
        made = x.grad_fn
        if made is None or _MARK in made.metadata:
            return None
        if _is_of_weights(made):
            note_of_weights(x)
            made.metadata[_MARK] = True
            return None
        for node in _unseen(made):
            if kind_of(node) == "AccumulateGrad" or node._sequence_nr() < self._start:
                continue
            if getattr(node, "_forward_cls", None) is None and not has_rule(node, rules):
                return kind_of(node)
        made.metadata[_MARK] = False
        return None


def _unseen(made: Any) -> Iterator[Any]:
    """A node, and those behind it as far as nobody has seen them."""
    waiting, met = [made], set()
    while waiting and len(met) < _MANY:
        node = waiting.pop()
        if node in met or _MARK in node.metadata:
            continue
        met.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions if following is not None]


def _is_of_weights(made: Any) -> bool:
    """Whether a node's only ends are parameters, and what was seen to be of weights."""
    for node in _unseen(made):
        kind = kind_of(node)
        if kind == "AccumulateGrad":
            if not isinstance(node.variable, nn.Parameter):
                return False
            continue
        given = [following for following, _ in node.next_functions]
        if kind.startswith("Embedding") or (kind in _READS_DATA and None in given[-3:]):
            return False
        if any(following is not None and following.metadata.get(_MARK) is False for following in given):
            return False
        if not any(following is not None for following in given):
            return False
    return True
