"""Tell LRP's rule for residual connections on which axis the samples are."""

from collections.abc import Iterable

from torch.autograd.graph import Node as GraphNode

from clipmapper.relevance.recording.tokenwise import leaves_tokens
from clipmapper.relevance.trace import Edge


def note_sample_axis(additions: Iterable[GraphNode], known: Iterable[tuple[Edge, bool]]) -> None:
    """``additions``: nodes of :class:`clipmapper.relevance.backward.lrp.Add`, in the order of the forward.

    ``known``: places of the graph, and whether the tensors there have their tokens on the first axis and so
    their samples on the second. What is added has them where the next such place on the way back has them;
    where there is none, on the first axis.
    """
    axes = {(e.edge.node, e.edge.output_nr): int(first) for e, first in known if e.edge is not None}
    if not any(axes.values()):
        return
    for node in additions:
        node.sample_axis = _axis(node, axes)
        axes[node, 0] = node.sample_axis


def _axis(node: GraphNode, axes: dict[tuple[GraphNode, int], int]) -> int:
    waiting, seen = list(node.next_functions), set()
    while waiting:
        place = waiting.pop(0)
        if place in axes:
            return axes[place]
        if place[0] is not None and place not in seen and leaves_tokens(place[0]):
            seen.add(place)
            waiting += place[0].next_functions
    return 0
