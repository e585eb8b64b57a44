"""Attention matrices with the same effect as A."""

import itertools

import pytest
import torch
from support.made_traces import MASKS, attention

from clipmapper.relevance import Attention, AttentionTrace, Node, raw_attention, rollout, weighted
from clipmapper.relevance.methods.effective import (
    effective_attention,
    effective_matrix,
    effective_rollout,
    effective_weighted,
    efficient_attention,
    efficient_matrix,
    efficient_rollout,
    efficient_weighted,
)

LONG = {"queries": 23, "keys": 23, "channels": 4}  # sequences longer than the head width
PAIRS = [
    (effective_attention, raw_attention), (efficient_attention, raw_attention),
    (effective_rollout, rollout), (efficient_rollout, rollout),
    (effective_weighted, weighted), (efficient_weighted, weighted),
]  # fmt: skip


def long_attention(mask, seed=0, sharp=1.0):
    step, A, _ = attention(mask, seed, **LONG)
    if sharp != 1.0:
        step.query = step.query * sharp
        A = step.probabilities()
        step.mixed = A @ step.value
    return step, A


def efficient_by_trying_all_supports(A, values):
    """min ‖u‖² with uV = AV, Σu = 1, u ≥ 0, by solving for every set of keys that may be positive."""
    W = torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], dim=1)
    best = None
    for size in range(1, len(A) + 1):
        for support in itertools.combinations(range(len(A)), size):
            part = W[list(support)]
            u = torch.zeros_like(A)
            u[list(support)] = torch.linalg.pinv(part.T) @ (W.T @ A)
            feasible = (u >= -1e-13).all() and torch.allclose(u @ W, A @ W, rtol=0, atol=1e-12)
            if feasible and (best is None or u.norm() < best.norm()):
                best = u
    return best


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("matrix", [effective_matrix, efficient_matrix])
def test_the_output_of_the_sublayer_is_unchanged(mask, matrix):
    step, A = long_attention(mask)
    other = matrix(step)
    torch.testing.assert_close(other @ step.value, A @ step.value, rtol=0, atol=1e-5)
    assert (other[A == 0] == 0).all(), "a key that may not be read is not read"
    if mask not in ("causal", "additive with -inf"):
        assert (other - A).abs().max() > 1e-3, "with so many keys there are other matrices"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sharp", [1.0, 6.0, 60.0])
def test_efficient_rows_are_distributions(mask, sharp):
    step, A = long_attention(mask, sharp=sharp)
    rows = efficient_matrix(step)
    assert rows.min() >= 0
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows @ step.value, A @ step.value, rtol=0, atol=1e-5)
    assert (rows.norm(dim=-1) <= A.norm(dim=-1) + 1e-9).all()


def test_float32_keeps_to_the_same_limits():
    step, _ = long_attention("none", sharp=6.0)
    for name in ("query", "key", "value", "mixed"):
        setattr(step, name, getattr(step, name).float())
    A, rows = step.probabilities(), efficient_matrix(step)
    assert rows.dtype == torch.float32 and rows.min() >= 0
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), rtol=0, atol=1e-6)
    for other in (rows, effective_matrix(step)):
        torch.testing.assert_close(other @ step.value, A @ step.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_effective_attention_is_the_projection_off_the_null_space(mask):
    """A − A N Nᵀ row by row, N from a full SVD of the values that the row reads."""
    step, A = long_attention(mask)
    found = effective_matrix(step)
    for sample, head, query in itertools.product(range(2), range(3), (0, 3, 9, 22)):
        reads = (A[sample, head, query] > 0).nonzero().flatten()
        row, values = A[sample, head, query, reads], step.value[sample, head, reads]
        left, singular, _ = torch.linalg.svd(values, full_matrices=True)
        N = left[:, len(singular) :]
        torch.testing.assert_close(found[sample, head, query, reads], row - row @ N @ N.T)


@pytest.mark.parametrize("seed", range(4))
def test_efficient_attention_is_the_smallest_such_distribution(seed):
    step, A, _ = attention("none", seed, batch=1, heads=2, queries=6, keys=7, channels=2)
    step.query = step.query * 2  # attention on few keys: projections have negative entries
    A, found = step.probabilities(), efficient_matrix(step)
    ones = torch.ones(1, 2, 7, 1, dtype=torch.float64)
    W = torch.cat([step.value, ones], dim=-1)
    projected = A @ W @ torch.linalg.pinv(W)
    assert (projected < -1e-6).any(), "some rows need the quadratic programme"
    for head, query in itertools.product(range(2), range(6)):
        expected = efficient_by_trying_all_supports(A[0, head, query], step.value[0, head])
        torch.testing.assert_close(found[0, head, query], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("matrix", [effective_matrix, efficient_matrix])
def test_with_no_more_keys_than_the_head_is_wide_both_are_a(mask, matrix):
    step, A, _ = attention(mask, queries=7, keys=7, channels=8)
    torch.testing.assert_close(matrix(step), A, rtol=0, atol=1e-10)


def traced(step):
    step.before_gradient, step.added_gradient = (
        torch.full_like(step.before, 0.5), torch.full_like(step.before, 1.5)
    )  # fmt: skip
    step.before = step.added = torch.ones_like(step.before)
    step.query_node = step.key_node = Node("q", 0)
    return AttentionTrace(
        [step], {"q": step.query.shape[2]}, {}, ("q",), (Node("q", 1), torch.tensor([3, 5]))
    )


@pytest.mark.parametrize("method, plain", PAIRS, ids=lambda m: m.__name__)
def test_methods_are_those_on_the_other_matrix(method, plain):
    short, _, _ = attention("none", queries=7, keys=7, channels=8)
    trace = traced(short)
    torch.testing.assert_close(method(trace).streams["q"], plain(trace).streams["q"])
    step, _ = long_attention("none")
    trace = traced(step)
    values = method(trace).streams["q"]
    assert (values >= 0).all() and not torch.allclose(values, plain(trace).streams["q"], atol=1e-3)
    assert trace.attention[0].replaced is None, "the trace that was given is left alone"


def test_efficient_methods_by_hand():
    """Three keys with equal values: efficient attention is uniform, whatever A is."""
    A = torch.tensor([[0.7, 0.2, 0.1]] * 3, dtype=torch.float64)
    same = torch.full((1, 1, 3, 3), 2.0, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)[None, None]
    zero = torch.zeros(1, 3, 1, dtype=torch.float64)
    step = Attention(
        "hand", Node("q", 0), Node("q", 0), Node("q", 1), A.log()[None, None], identity, same,
        same, None, 1.0, False, zero, zero,
    )  # fmt: skip
    trace = AttentionTrace([step], {"q": 3}, {}, ("q",), (Node("q", 1), torch.tensor([0])))
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(efficient_attention(trace).streams["q"], third)
    torch.testing.assert_close(effective_attention(trace).streams["q"], third)
    row = torch.tensor([[1 / 2 + 1 / 6, 1 / 6, 1 / 6]], dtype=torch.float64)
    torch.testing.assert_close(efficient_rollout(trace).streams["q"], row)
