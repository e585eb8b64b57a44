"""The methods against a naive second implementation on whole models, and what must hold of them."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive_relevance, tiny_models
from support.compared_methods import METHODS
from support.explained_models import MODELS, Case, assert_same, expected_streams
from support.made_traces import MASKS, RandomRun, attention
from support.slow import once_each

from clipmapper.relevance import propagation as propagation_module
from clipmapper.relevance import record
from clipmapper.relevance.methods.attention_only import random
from clipmapper.relevance.methods.weighted import (
    weighted,
    weighted_half_rule,
    weighted_rule,
    weighted_token_rule,
)
from clipmapper.relevance.propagation import mean_attention, positive_attention, propagate, rows_times

RULES = {
    "weighted": weighted_rule,
    "weighted_token": weighted_token_rule,
    "weighted_half": weighted_half_rule,
}
GRADIENT_FREE = ("weighted_half", "rollout", "raw_attention", "random")


def name_of(model: tuple | str) -> str:
    return (
        model
        if isinstance(model, str)
        else f"{model[0]}{'-class_token' if model[1] else ''}-{model[2]}-blocks"
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(model):
        if model not in made:
            made[model] = Case(tmp_path_factory.mktemp("clip"), *model)
        return made[model]

    return case


@pytest.fixture(params=MODELS, ids=name_of)
def case(request, cases):
    return cases(request.param)


def test_every_method_equals_the_naive_implementation(case):
    relevances = {name: METHODS[name](case.trace) for name in naive_relevance.METHODS}
    spread = dict.fromkeys(relevances, 0)
    for row in range(len(case.lengths)):
        run = case.naive(row)
        torch.testing.assert_close(case.logits[row], run.logits.detach(), rtol=0, atol=1e-10)
        for name, method in naive_relevance.METHODS.items():
            values = method(run)
            spread[name] = max(spread[name], int((values > 0.01 * values.max()).sum()))
            expected = expected_streams(run, values, case.trace.lengths)
            assert_same(relevances[name], expected, row, f"{name}, sample {row}")
    assert min(spread.values()) >= 5, "an example in which next to nothing is relevant proves nothing"


@pytest.mark.parametrize("model", [MODELS[0], MODELS[4]], ids=["dual_flow", "single_flow"])
def test_ignored_tokens_are_as_if_they_had_never_been_there(cases, model):
    """Patches and words masked out of every attention; the naive run has them removed."""
    case = cases(model)
    generator = torch.Generator().manual_seed(5)
    image_ignore = torch.rand(len(case.lengths), tiny_models.PATCHES, generator=generator) < 0.4
    text_ignore = (torch.rand(case.text.ids.shape, generator=generator) < 0.4) & case.text.removable
    assert image_ignore.any() and text_ignore.any()
    _, trace = case.traced(image_ignore=image_ignore, text_ignore=text_ignore)
    relevances = {name: METHODS[name](trace) for name in naive_relevance.METHODS}
    for row, length in enumerate(case.lengths):
        patches = (~image_ignore[row]).nonzero().flatten().tolist()
        words = (~text_ignore[row, :length]).nonzero().flatten().tolist()
        run = case.naive(row, patches=patches, words=words)
        at = {"class_token": [0], "image": [0, *(1 + p for p in patches)], "text": words}
        for name, method in naive_relevance.METHODS.items():
            expected = {}
            unpadded = {"image": len(run.image), "text": len(run.text)}
            for stream, values in expected_streams(run, method(run), unpadded).items():
                whole = torch.zeros(trace.lengths[stream], dtype=values.dtype)
                whole[at[stream]] = values
                expected[stream] = whole
            assert_same(relevances[name], expected, row, f"{name}, sample {row}")


def last_node(trace, stream):
    nodes = [step.output_node for step in trace.attention if step.output_node.stream == stream]
    return max(nodes, key=lambda node: node.version)


@pytest.mark.parametrize("name", RULES)
def test_every_row_of_the_relevance_matrix_sums_to_one(case, name):
    """Rows of all final tokens (padding as well), not of the read one alone: C is row-stochastic."""
    trace = case.trace
    streams = {step.output_node.stream for step in trace.attention if "mapper" in step.name}
    for stream in streams:
        length = trace.lengths[stream]
        rows = torch.eye(length, dtype=trace.dtype).expand(trace.batch, -1, -1)
        with_nothing_lost = propagate(trace, {last_node(trace, stream): rows}, RULES[name](trace))
        total = sum(part.sum(-1) for part in with_nothing_lost.values())
        torch.testing.assert_close(total, torch.ones(trace.batch, length, dtype=trace.dtype))
        assert all((part >= 0).all() for part in with_nothing_lost.values())


@pytest.mark.parametrize("name", RULES)
def test_relevance_of_a_sample_sums_to_one_and_none_is_on_padding(case, name):
    relevance = METHODS[name](case.trace)
    total = sum(part.sum(-1) for part in relevance.streams.values())
    torch.testing.assert_close(total, torch.ones_like(total))


def test_padding_has_no_relevance_in_any_method(case):
    padding = ~case.text.valid
    assert padding.any()
    for name, method in METHODS.items():
        assert (method(case.trace).text[padding] == 0).all(), name
        assert method(case.trace).text.shape == case.text.ids.shape
        assert method(case.trace).image.shape == (len(case.lengths), *tiny_models.GRID)


def test_weighted_does_not_depend_on_the_scale_of_y(case):
    _, scaled = case.traced(factor=7.0)
    for name in ("weighted", "weighted_token"):
        once, again = METHODS[name](case.trace), METHODS[name](scaled)
        for stream, values in once.streams.items():
            torch.testing.assert_close(again.streams[stream], values, rtol=0, atol=1e-12)
    difference = METHODS["gae"](scaled).image - METHODS["gae"](case.trace).image
    assert difference.abs().max() > 1e-3, "gae does depend on the scale; is y scaled at all?"


@pytest.mark.parametrize(
    ("case", "name"), once_each(product(MODELS, METHODS)), indirect=["case"], ids=name_of
)
def test_a_batch_gives_what_its_samples_give_alone(case, name):
    samples = [31, 7, 64]
    _, trace = case.traced(samples=samples)
    together = METHODS[name](trace)
    for row, length in enumerate(case.lengths):
        _, alone = case.traced(rows=slice(row, row + 1), samples=samples[row : row + 1])
        for stream, values in METHODS[name](alone).streams.items():
            whole = together.streams[stream][row]
            cut = whole[: length if stream == "text" else None]
            torch.testing.assert_close(
                cut, values[0], rtol=0, atol=1e-10, msg=lambda m, s=stream, r=row: f"sample {r}, {s}: {m}"
            )


def test_methods_differ_from_one_another(case):
    """All but rollout and weighted_half of one stream, which are the same by definition."""
    maps = {
        name: torch.cat([*method(case.trace).streams.values()], dim=1) for name, method in METHODS.items()
    }
    same = {
        (a, b)
        for a in maps
        for b in maps
        if a < b and torch.allclose(F.normalize(maps[a], dim=1), F.normalize(maps[b], dim=1), atol=1e-4)
    }
    single = not any(s.query_node.stream != s.key_node.stream for s in case.trace.attention)
    assert same == ({("rollout", "weighted_half")} if single else set())


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(GRADIENT_FREE)))
def test_a_gradient_method_before_the_backward_says_so(cases, name):
    case = cases(MODELS[0])
    with record(case.model) as trace:
        case.model(case.images, case.text, only_class_token=False)
    with pytest.raises(ValueError, match=r"call trace\.backward\(y\)"):
        METHODS[name](trace)


@pytest.mark.parametrize("name", GRADIENT_FREE)
def test_other_methods_need_no_backward(cases, name):
    case = cases(MODELS[0])
    with record(case.model) as trace:
        case.model(case.images, case.text, only_class_token=False)
    assert not METHODS[name](trace).image.requires_grad
    torch.testing.assert_close(METHODS[name](trace).image, METHODS[name](case.trace).image)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(GRADIENT_FREE)))
def test_a_scalar_that_attention_does_not_change_leaves_no_nan(cases, name):
    """y = 0 · logit: every gradient is 0, no row has positive evidence, α = 1 everywhere."""
    _, trace = cases(MODELS[0]).traced(factor=0.0)
    relevance = METHODS[name](trace)
    read = {"weighted": 1.0, "weighted_token": 1.0, "gae": 1.0, "grad_cam": 0.0}[name]
    for stream, values in relevance.streams.items():
        expected = torch.zeros_like(values)
        expected[:, 0] = read if stream == "image" else 0
        torch.testing.assert_close(values, expected, rtol=0, atol=0)


def test_the_last_text_side_does_not_reach_the_answer(cases):
    """The last block's text sub-layers: ∇a = 0, so α = 1, and the text's rows pass them unchanged.

    (What enters the block is read by the image's cross-attention, so ∇x of the first is not 0.)
    """
    trace = cases(MODELS[0]).trace
    text_side = [s for s in trace.attention if s.name.startswith("mapper, block 1, text")]
    assert len(text_side) == 2
    for step in text_side:
        assert not step.added_gradient.any()
        assert step.before_gradient.any() == step.is_self
        row = torch.rand(trace.batch, 2, trace.lengths["text"], dtype=trace.dtype)
        for rule in (weighted_rule(trace), weighted_token_rule(trace)):
            own, to_keys = rule(step, row)
            assert torch.equal(own, row) and not to_keys.any()


@pytest.mark.parametrize("name", RULES)
def test_rows_without_positive_evidence_keep_their_relevance(cases, name):
    """∇o made to point away from every value in half of the query rows of every sub-layer."""
    _, trace = cases(MODELS[0]).traced()
    for step in trace.attention:
        # Values all positive and ∇o negative: ∇A = ∇o · vᵀ < 0 in these rows, for every key and head.
        step.value = step.value.abs() + 0.1
        step.mixed_gradient[:, :, ::2] = -step.mixed_gradient[:, :, ::2].abs() - 0.1
        assert (positive_attention(step)[:, ::2] == 0).all()
    rows = torch.eye(trace.lengths["image"], dtype=trace.dtype).expand(trace.batch, -1, -1)
    parts = propagate(trace, {last_node(trace, "image"): rows}, RULES[name](trace))
    total = sum(part.sum(-1) for part in parts.values())
    torch.testing.assert_close(total, torch.ones_like(total))
    if name != "weighted_half":
        # Rows of even tokens meet nothing positive anywhere: they stay where they are.
        torch.testing.assert_close(parts["image"][:, ::2], rows[:, ::2])
        assert not torch.allclose(parts["image"][:, 1::2], rows[:, 1::2], atol=1e-2)


# ---------------------------------------------------------------------------------------------------------
def test_random_is_a_function_of_the_seed_and_the_sample(cases):
    case = cases(MODELS[2])
    trace = replace(case.trace, samples=[11, 12, 13])
    one = random(trace, seed=3)
    assert all(torch.equal(one.streams[s], random(trace, seed=3).streams[s]) for s in one.streams)
    for other in (random(trace, seed=4), random(replace(trace, samples=[14, 15, 16]), seed=3)):
        assert not any(torch.allclose(one.streams[s], other.streams[s]) for s in one.streams)
    permuted = random(replace(trace, samples=[13, 11, 12]), seed=3)
    assert torch.equal(permuted.image, one.image[[2, 0, 1]])
    for values in one.streams.values():
        assert ((values >= 0) & (values < 1)).all()
    assert not torch.allclose(one.image[0], one.image[1])


def test_random_does_not_depend_on_how_far_the_batch_is_padded(cases):
    """Text comes last, longer than a vector register or not."""
    trace = replace(cases(MODELS[0]).trace, samples=[1, 2, 3], valid={})
    scores = {n: random(replace(trace, lengths={**trace.lengths, "text": n})) for n in (5, 16, 77)}
    for n in (5, 16):
        assert torch.equal(scores[n].text, scores[77].text[:, :n])
        assert torch.equal(scores[n].image, scores[77].image)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_its_gradient_are_rebuilt_exactly(mask):
    step, A, gradient = attention(mask)
    torch.testing.assert_close(step.probabilities(), A)
    torch.testing.assert_close(step.probability_gradient(), gradient)
    torch.testing.assert_close(positive_attention(step), (A * gradient).clamp(min=0).mean(1))
    torch.testing.assert_close(mean_attention(step), A.mean(1))


@pytest.mark.parametrize("block", [1, 21 * 3, 21 * 7, 21 * 14])  # a row, 3 of 7, a sample, both samples
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_of_attention_change_nothing(monkeypatch, mask, block):
    step, A, _ = attention(mask)
    step.mixed_gradient[0, :, 2] = 0  # one row of one sample without evidence
    positive = (A * (step.mixed_gradient @ step.value.transpose(2, 3))).clamp(min=0).mean(1)
    row = torch.rand(2, 3, 7, dtype=torch.float64)
    sums = positive.sum(-1, keepdim=True)
    monkeypatch.setattr(propagation_module, "_BLOCK", block)
    moved, stuck = rows_times(positive_attention, step, row, normalise=True)
    torch.testing.assert_close(moved, row @ (positive / sums.where(sums > 0, 1.0)))
    torch.testing.assert_close(stuck, row * (sums == 0)[..., 0][:, None])
    assert stuck.count_nonzero() >= 3
    moved, stuck = rows_times(mean_attention, step, row, normalise=False)
    torch.testing.assert_close(moved, row @ A.mean(1))
    assert not stuck.any()


def test_blocks_of_attention_change_no_method(cases, monkeypatch):
    for model in (MODELS[0], MODELS[3]):
        case = cases(model)
        monkeypatch.setattr(propagation_module, "_BLOCK", 2**20)
        whole = {name: METHODS[name](case.trace) for name in METHODS}
        monkeypatch.setattr(propagation_module, "_BLOCK", 600)
        for name, relevance in whole.items():
            for stream, values in METHODS[name](case.trace).streams.items():
                torch.testing.assert_close(values, relevance.streams[stream], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_any_graph_of_two_streams_equals_the_naive_implementation(seed):
    run = RandomRun(seed)
    for name in ("weighted", "weighted_token", "weighted_half", "gae", "raw_attention", "grad_cam"):
        values, relevance = naive_relevance.METHODS[name](run), METHODS[name](run.trace)
        for stream, places in (("image", run.image), ("text", run.text)):
            torch.testing.assert_close(
                relevance.streams[stream][0], values[places], rtol=1e-9, atol=1e-9,
                msg=lambda m, n=name, s=stream: f"{n}, {s}: {m}",
            )  # fmt: skip
    rows = torch.eye(len(run.image), dtype=torch.float64)[None]
    for rule in RULES.values():
        parts = propagate(run.trace, {run.trace.read[0]: rows}, rule(run.trace))
        total = sum(part.sum(-1) for part in parts.values())
        torch.testing.assert_close(total, torch.ones_like(total))


def test_relevance_says_what_a_trace_does_not_have():
    run = RandomRun(1)
    relevance = weighted(run.trace)
    with pytest.raises(ValueError, match="no image stream"):
        _ = relevance.image
    with pytest.raises(ValueError, match="no text stream"):
        _ = relevance.text
    with pytest.raises(ValueError, match=r"trace\.read_token"):
        weighted(replace(run.trace, read=None))
