"""What is computed between operators that the rules saw: by torch.jit, torch.vmap, before the block."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipmapper.relevance.backward.rule import MATRIX_PRODUCTS, behind, kind_of, tensors, walk
from clipmapper.relevance.backward.unknown import has_rule
from clipmapper.relevance.backward.weights import note_of_weights, of_weights

_MARK = "clipmapper: of weights"  # in a node's metadata: False of an activation
# What of weights and of something that does not vary makes an activation: that may be tokens, or name them.
_READS_DATA = (MATRIX_PRODUCTS - {"Dot"}) | {"Convolution", "Index"}


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
    return walk(made, lambda node: _MARK in node.metadata)


def _is_of_weights(made: Any) -> bool:
    """Whether a node's only ends are parameters, and what was seen to be of weights."""
    for node in _unseen(made):
        kind = kind_of(node)
        if kind == "AccumulateGrad":
            if not isinstance(node.variable, nn.Parameter):
                return False
            continue
        given = behind(node)
        factors = [following for following, _ in node.next_functions[-3:]]
        if kind.startswith("Embedding") or (kind in _READS_DATA and None in factors):
            return False
        if not given or any(following.metadata.get(_MARK) is False for following in given):
            return False
    return True
