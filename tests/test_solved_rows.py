"""What was solved before is not solved again, and nothing else is taken for it."""

import torch

from clipmapper.relevance.methods.solved_rows import SolvedRows


def test_what_is_the_same_bit_by_bit_is_solved_once():
    kept, calls = SolvedRows(), []

    def double(rows, values):
        calls.append(1)
        return 2 * rows + values

    rows, values = torch.rand(2, 3), torch.rand(2, 3)
    first = kept(double, rows, values)
    assert torch.equal(kept(double, rows.clone(), values), first) and len(calls) == 1
    kept(double, values, rows)
    kept(double, rows.double(), values)
    kept(double, rows.view(3, 2), values.view(3, 2))
    kept(double, rows.nextafter(torch.tensor(2.0)), values)
    kept(double, rows[:, [1, 0, 2]], values)
    assert len(calls) == 6

    def other(rows, values):
        return rows * 0

    assert not kept(other, rows, values).any()


def test_the_latest_are_kept():
    kept, calls = SolvedRows(limit=100), []

    def same(rows):
        calls.append(1)
        return rows.clone()

    tensors = [torch.full((10,), float(i)) for i in range(3)]  # of 40 bytes
    for one in (*tensors[:2], tensors[0], tensors[2], tensors[0]):
        kept(same, one)
    assert len(calls) == 3
    assert torch.equal(kept(same, tensors[1]), tensors[1]) and len(calls) == 4
    kept.clear()
    kept(same, tensors[1])
    assert len(calls) == 5
    large = torch.zeros(100)
    kept(same, large)
    kept(same, large)
    assert len(calls) == 7
