"""Signed maps, by hand and against naive code: for the methods that have a sign by themselves."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import pytest
import torch

from clipmapper.relevance import METHODS, Attention, AttentionTrace, Node, propagation, record
from support import families, naive_rules
from support.made_traces import tensor


def signed(name, trace, **options):
    return METHODS[name](trace, sign="both", **options).streams


def check(found, **streams):
    for stream, expected in streams.items():
        torch.testing.assert_close(found[stream], tensor([expected]), rtol=0, atol=1e-12)


def image_and_text(steps: Sequence[Attention]) -> AttentionTrace:
    """An image of two tokens, whose first is read in the end, and a text of three."""
    lengths = {"image": 2, "text": 3}
    return AttentionTrace(
        list(steps), lengths, {}, ("image", "text"), (Node("image", 2), torch.tensor([0])), text_stream="text"
    )


def traced(case, rules="plain"):
    with record(case.model, rules=rules) as trace:
        y = case.y(case.run(case.model, case.inputs))
    trace.backward(y)
    return trace, y.detach()


def equals_naive(case, rules: str, methods: Mapping[str, Callable], nothing: Sequence[str] = ()) -> None:
    """Both samples, by each method (name → naive code) on one recording; ``nothing``: streams that get 0."""
    names = case.streams or {stream: stream for stream in case.places}
    trace, _ = traced(case, rules)
    around = nullcontext if rules == "plain" else naive_rules.detached
    for row in range(2):
        runs, places = families.naive_runs(case, row, rules, around)
        for name, naive in methods.items():
            found, wanted = signed(name, trace), naive(runs[0])
            assert set(found) == set(names)
            assert (wanted.abs() > 1e-3 * wanted.abs().max()).sum() >= 3, "an example that proves nothing"
            for stream, source in names.items():
                values, expected = found[stream][row], wanted[places[source]]
                if stream in nothing:
                    expected = torch.zeros_like(expected)
                torch.testing.assert_close(
                    values[: len(expected)], expected, rtol=1e-8, atol=1e-11,
                    msg=lambda m, n=name, s=stream, r=row: f"{n}, sample {r}, {s}: {m}",
                )  # fmt: skip
                assert not values[len(expected) :].any()


def rebuilds_attention_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = traced(families.hf_lxmert())
    whole, counts = signed(name, trace), []
    probabilities = Attention.probabilities

    def noting(step):
        counts.append(step.query.shape[0] * step.query.shape[2])
        return probabilities(step)

    monkeypatch.setattr(Attention, "probabilities", noting)
    monkeypatch.setattr(propagation, "_BLOCK", 100)
    for stream, values in signed(name, trace).items():
        torch.testing.assert_close(values, whole[stream])
    assert max(counts) <= 4 and len(counts) > 2 * len(trace.attention)
