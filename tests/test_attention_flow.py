"""Attention flow against networkx and against flows worked by hand."""

import numpy as np
import pytest
import torch
from support.made_traces import RandomRun, sublayer
from support.naive_flow import by_networkx

from clipmapper.relevance import AttentionTrace, Join, Node
from clipmapper.relevance.methods.attention_only import attention_flow


@pytest.mark.parametrize("seed", range(12))
def test_any_graph_of_two_streams_equals_networkx(seed):
    run = RandomRun(seed)
    expected = by_networkx(run, run.trace)
    relevance = attention_flow(run.trace)
    for stream, places in (("image", run.image), ("text", run.text)):
        np.testing.assert_allclose(relevance.streams[stream][0].numpy(), expected[places], rtol=0, atol=1e-7)


def step(stream, version, rows):
    zero = [[0.0]] * len(rows)
    node = Node(stream, version)
    return sublayer(node, node, [rows], [rows], before=zero, added=zero)


def test_two_sublayers_by_hand():
    """From token 0: half stays, half goes to token 1; both can pass half on to either input token."""
    rows = [[0.0001, 0.9999], [0.9999, 0.0001]]
    trace = AttentionTrace(
        [step("t", 0, rows), step("t", 1, rows)], {"t": 2}, {}, ("t",), (Node("t", 2), torch.tensor([0]))
    )
    stay, cross = 0.50005, 0.49995
    # To input 0: min over the two middle tokens of what reaches it and what it passes on.
    expected = [min(stay, stay) + min(cross, cross), min(stay, cross) + min(cross, stay)]
    found = attention_flow(trace).streams["t"][0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_narrow_place_limits_the_flow():
    """Not a product as rollout is: 1/4 at most comes through the second sub-layer."""
    first = [[0.5, 0.5], [0.0001, 0.9999]]
    second = [[0.5, 0.5], [0.5, 0.5]]
    trace = AttentionTrace(
        [step("t", 0, first), step("t", 1, second)], {"t": 2}, {}, ("t",), (Node("t", 2), torch.tensor([0]))
    )
    # From token 0: 3/4 stays, 1/4 to token 1. Token 0 passes 3/4 and 1/4 on; token 1 passes 0.00005, 0.99995.
    expected = torch.tensor([0.75 + 0.00005, 0.25 + 0.25], dtype=torch.float64)
    found = attention_flow(trace).streams["t"][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_joined_streams_and_padding():
    third = [[1 / 3] * 3] * 3
    join = Join(Node("joint", 0), (Node("a", 0), Node("b", 0)))
    trace = AttentionTrace(
        [join, step("joint", 0, third)], {"a": 1, "b": 2, "joint": 3},
        {"b": torch.tensor([[True, False]])}, ("a", "b"), (Node("joint", 1), torch.tensor([0])),
    )  # fmt: skip
    found = attention_flow(trace).streams
    torch.testing.assert_close(found["a"], torch.tensor([[2 / 3]], dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(found["b"], torch.tensor([[1 / 6, 0]], dtype=torch.float64), rtol=0, atol=1e-8)


# The three sub-layers of the graph below, first to last, and others in the place of the last two.
FIRST = [[0.7, 0.1, 0.2], [0.6, 0.2, 0.2], [0.8, 0.1, 0.1]]
LATER = [[[0.2, 0.4, 0.4], [0.4, 0.2, 0.4], [0.4, 0.4, 0.2]]] * 2
OTHERS = [
    [[0.1, 0.45, 0.45], [0.4, 0.2, 0.4], [0.4, 0.5, 0.1]],
    [[0.1, 0.4, 0.5], [0.5, 0.2, 0.3], [0.3, 0.6, 0.1]],
]
NARROW = [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]]


def flows(*layers, read=0):
    steps = [step("t", version, rows) for version, rows in enumerate(layers)]
    places = (Node("t", len(layers)), torch.tensor([read]))
    return attention_flow(AttentionTrace(steps, {"t": 3}, {}, ("t",), places)).streams["t"][0].numpy()


def test_the_smallest_cut_lies_at_the_input():
    """A token gets min(1, column sum of the first Ã), whatever later layers say and whoever reads."""
    # The first Ã is [[.85, .05, .1], [.3, .6, .1], [.4, .05, .55]]: its columns sum to 1.55, .7 and .75.
    # Later ones have .6 on the diagonal and .2 elsewhere. From token 0 to token 1: .6, .2 and .2 come to the
    # tokens below; each sends .2 on to token 1, which passes .6 to the input, and token 0 still has .05 for
    # itself and .05 for token 2, as much as these pass on.
    expected = [1, 0.7, 0.75]
    for read in range(3):
        np.testing.assert_allclose(flows(FIRST, *LATER, read=read), expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(flows(FIRST, *OTHERS), expected, rtol=0, atol=1e-8)
    turned = [row[::-1] for row in FIRST[::-1]]
    np.testing.assert_allclose(flows(turned, *LATER), [0.75, 0.7, 1], rtol=0, atol=1e-8)


def test_a_later_layer_counts_where_less_comes_through_it():
    """Two layers in which token 0 looks at little but itself: the smallest cut is no longer at the input."""
    # Later Ã have .99 on the diagonal and .005 elsewhere. Tokens 1 and 2 of the state behind the first layer
    # get .02 in all, and pass on what they get; token 0 gets more than it can pass on, .85, .05 and .1.
    found = flows(FIRST, *[NARROW] * 2)
    np.testing.assert_allclose(found, [0.87, 0.07, 0.12], rtol=0, atol=1e-8)
