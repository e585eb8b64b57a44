"""Weighted evidence: worked by hand, on many families by both rules, in blocks; what it keeps."""

import pytest
import torch
from support import families
from support.made_traces import sublayer, tensor
from support.more_families import CASES as MORE
from support.naive_methods import weighted_evidence
from support.signed_maps import check, image_and_text, rebuilds_attention_in_blocks, traced
from support.slow import mostly_slow

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Node, method_named
from clipmapper.relevance.method import Needs
from clipmapper.relevance.methods.evidence import weighted_evidence_plain

CASES = {**families.CASES, **MORE}
RULES = {"attn_lrp": "weighted_evidence", "libra": "weighted_evidence_libra"}


def made(nodes, evidence, own):
    """A sub-layer with this A ⊙ ∂y/∂A, whatever A is, and this x ⊙ ∂y/∂x of two channels."""
    query, key = nodes
    A = torch.full_like(tensor(evidence), 1 / len(evidence[0][0])).tolist()
    return sublayer(query, key, A, evidence, before=own, added=[[9.0, 9]] * len(own))


def two_streams(times=1.0):
    """The image by itself (two heads), then by the text."""
    i0, i1, t0 = Node("image", 0), Node("image", 1), Node("text", 0)
    evidence = [[[1.0, 1], [2, 0]], [[-1, 0], [2, -3]]], [[[1.0, 2, 1], [0, 0, 0]]]
    own = [[1.0, 1], [0, 0]], [[3.0, -2], [5, 5]]
    scaled = [(times * tensor(e)).tolist() for e in evidence], [(times * tensor(o)).tolist() for o in own]
    pairs = (i0, i0), (i1, t0)
    return image_and_text([made(p, e, o) for p, e, o in zip(pairs, *scaled, strict=True)])


def test_by_hand():
    # By the text: p = 3 − 2, s = 4, the only evidence of its sub-layer: β = 4/5.
    # By itself: p = 2, s = 1 + 1, and its neighbour has twice as much: β = 1/2 · 1/2. So .2 splits in two.
    check(weighted_evidence_plain(two_streams()).streams, image=[0.175, 0.025], text=[0.2, 0.4, 0.2])


def test_nothing_changes_when_y_is_multiplied():
    found = [weighted_evidence_plain(two_streams(times)).streams for times in (1.0, 7.0)]
    for stream, values in found[0].items():
        torch.testing.assert_close(values, found[1][stream])


def test_a_sub_layer_without_evidence_moves_nothing():
    trace = two_streams()
    trace.steps[0] = made((Node("image", 0), Node("image", 0)), [[[-1.0, 0], [0, 0]]], [[1.0, 1], [0, 0]])
    check(weighted_evidence_plain(trace).streams, image=[0.2, 0], text=[0.2, 0.4, 0.2])


def test_channels_that_cancel_out_are_no_evidence_of_the_token():
    """The whole relevance is spent where the token itself says nothing."""
    trace = two_streams()
    trace.steps[1] = made(
        (Node("image", 1), Node("text", 0)), [[[1.0, 2, 1], [0, 0, 0]]], [[3.0, -3], [5, 5]]
    )
    check(weighted_evidence_plain(trace).streams, image=[0, 0], text=[0.25, 0.5, 0.25])


def test_a_token_without_a_gradient_has_no_evidence():
    """Such as padding: the other one has the most then."""
    trace = two_streams()
    trace.steps[0].mixed_gradient[:, :, 1] = 0
    check(weighted_evidence_plain(trace).streams, image=[0.15, 0.05], text=[0.2, 0.4, 0.2])


FAMILIES = [
    "hf_bert", "hf_vilt", "hf_siglip", "open_clip_coca", "hf_clip", "hf_dinov2", "hf_qwen3", "hf_gptj",
    "hf_visual_bert", "shared_block", "hf_bart", "hf_albert",
]  # fmt: skip
QUICK = ("hf_bert", "hf_qwen3")


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, QUICK))
def test_every_row_sums_to_1(family):
    """All of the relevance is at the input tokens, and none is negative. (y reads a row of each tower.)"""
    for rules, name in RULES.items():
        trace, _ = traced(CASES[family](), rules)
        found = METHODS[name](trace).streams.values()
        assert all((values >= 0).all() for values in found)
        torch.testing.assert_close(
            sum(values.sum(dim=1) for values in found),
            torch.full((2,), float(len(trace.reads)), dtype=torch.float64),
        )


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, QUICK))
def test_equals_the_naive_implementation(family):
    case = CASES[family]()
    trace, _ = traced(case)
    names = case.streams or {stream: stream for stream in case.places}
    found = weighted_evidence_plain(trace).streams
    for row in range(2):
        runs, places = families.naive_runs(case, row)
        wanted = sum(map(weighted_evidence, runs))
        for stream, source in names.items():
            expected = wanted[places[source]]
            torch.testing.assert_close(found[stream][row][: len(expected)], expected, rtol=1e-8, atol=1e-11)


def test_each_form_is_recorded_by_its_rules():
    for rules, name in RULES.items():
        assert METHODS[name].needs == Needs(rules=rules)
    assert method_named("weighted_evidence_attn_lrp") is METHODS["weighted_evidence"]
    with pytest.raises(UserError, match="weighted_evidence_libra runs the model more than once"):
        METHODS["weighted_evidence_libra"](traced(families.hf_bert())[0])


def test_attention_is_rebuilt_in_blocks(monkeypatch):
    monkeypatch.setitem(METHODS, "weighted_evidence_plain", weighted_evidence_plain)
    rebuilds_attention_in_blocks("weighted_evidence_plain", monkeypatch)
