"""Scores of explanations on subjects whose certainty is written down: by hand, and against naive code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_subjects import MadeSubject, any_certainty
from torch import nn

from clipmapper.evaluation.explanation_scores.adcc import adcc, harmonic, min_max
from clipmapper.evaluation.explanation_scores.chosen import as_scored, points, score_samples
from clipmapper.evaluation.explanation_scores.curves import area_values, curves
from clipmapper.evaluation.explanation_scores.oracle import oracle_share
from clipmapper.evaluation.explanation_scores.sanity import restored, sanity, shuffle, unchanged
from clipmapper.evaluation.explanation_scores.synergy import synergy
from clipmapper.evaluation.explanation_scores.values import HIGH, LOW, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import FRACTIONS, ModalityRelevance, perturb
from clipmapper.evaluation.perturbation_scores import PerturbationScores

RUN = {"batch_size": 7, "seed": 3}
TENTHS = [k / 10 for k in range(11)]


def removed_of(fraction: float, many: int) -> int:
    """Halves rounded up."""
    return math.floor(fraction * many + 0.5 + 1e-9)


def area(curve, at) -> float:
    return sum(
        (b - a) * (y + z) / 2 for a, b, y, z in zip(at[:-1], at[1:], curve[:-1], curve[1:], strict=True)
    )


def best_first(relevance, removable=None):
    """The numbers of the tokens that can be removed, the most relevant first."""
    kept = relevance if removable is None else relevance[removable]
    return np.argsort(-kept.numpy(), kind="stable").tolist()


def naive_curve(value, tokens, order):
    """value(what is left) along the fractions of a perturbation test."""
    return [value(frozenset(tokens) - set(order[: removed_of(f, len(order))])) for f in FRACTIONS]


# Areas, and the gap


def scored(values, *, methods=("weighted",), modalities=("image",), scores=("probability",)):
    at = np.array([0.0, 0.5, 1.0])
    shape = len(scores), len(modalities), 2, len(methods), -1, 3
    values = np.array(values, float).reshape(shape)
    return PerturbationScores(methods, modalities, scores, at, np.arange(values.shape[4]), values)


def test_areas_and_gap_by_hand():
    """Positive 1, 0, 0: ¼. Negative 1, 1, 0: ¾. The gap is ½; that of the text −¼."""
    found = area_values(
        scored([[[1, 0, 0], [1, 1, 0]], [[1, 1, 0], [1, 0.5, 0]]], modalities=("image", "text"))
    )
    assert {one.name: found.of(one.name).item() for one in found.quantities} == {
        "image/positive/probability": 0.25,
        "image/negative/probability": 0.75,
        "image/gap/probability": 0.5,
        "image/reversed/probability": 0.0,
        "text/positive/probability": 0.75,
        "text/negative/probability": 0.5,
        "text/gap/probability": -0.25,
        "text/reversed/probability": 1.0,
        "gap/probability": 0.125,
    }
    better = {one.name: one.better for one in found.quantities}
    assert better["image/positive/probability"] == LOW
    assert [name for name, one in better.items() if one == LOW] == [
        "image/positive/probability", "image/reversed/probability",
        "text/positive/probability", "text/reversed/probability",
    ]  # fmt: skip
    assert {one.factor for one in found.quantities} == {100}
    of_caption = area_values(scored([[-1, -2, -3], [-1, -1, -3]], scores=("log_probability",)))
    assert [one.name for one in of_caption.quantities] == [
        "image/positive/log_probability", "image/positive/log_probability/above_end",
        "image/negative/log_probability", "image/negative/log_probability/above_end",
        "image/gap/log_probability", "image/reversed/log_probability",
    ]  # fmt: skip
    assert [one.factor for one in of_caption.quantities] == [1, 1, 1, 1, 1, 100]
    assert of_caption.values[:, 0, 0].tolist() == [-2, 1, -1.5, 1.5, 0.5, 0]
    # An order that is wrong at one of two inner fractions, where a tie is not wrong; below its own end.
    at = np.array([0.0, 0.25, 0.5, 1.0])
    values = np.array([[0, -1, -9, -4], [0, -3, -9, -4]], float).reshape(1, 1, 2, 1, 1, 4)
    found = area_values(
        PerturbationScores(("a",), ("image",), ("log_probability",), at, np.array([0]), values)
    )
    assert found.of("image/reversed/log_probability").item() == 0.5
    assert found.of("image/positive/log_probability/above_end").item() == pytest.approx(-0.625)


def test_curves_against_naive_code():
    subject = MadeSubject(any_certainty(0, 2, 6, 3), words=(3, 2), grid=(2, 3))
    maps = {"a": subject.drawn(0), "b": subject.drawn(1)}
    found = curves(subject, maps, subject.modalities, replacement=None, **RUN)
    for k, relevance in enumerate(maps.values()):
        for row, many in enumerate((3, 2)):
            patches, words = frozenset(range(6)), frozenset(range(many))
            tested = (
                (patches, best_first(relevance.image[row]), lambda left, r=row, w=words: (r, left, w)),
                (
                    words,
                    best_first(relevance.text[row], subject.removable_text[row]),
                    lambda left, r=row, p=patches: (r, p, left),
                ),
            )
            for i, (tokens, order, at) in enumerate(tested):
                for j, its in enumerate((order, order[::-1])):
                    expected = naive_curve(lambda left, at=at: subject._certainty(*at(left)), tokens, its)
                    assert found.score("probability")[i, j, k, row].tolist() == expected


@pytest.mark.parametrize(
    ("score", "replacement", "modalities"),
    [
        ("removal", None, ("image", "text")),
        ("replace_mean", "mean", ("image", "text")),
        ("replace_other", "other", ("image", "text")),
        ("replace_blur", "blur", ("image",)),
        ("replace_grey", "grey", ("image",)),
        ("replace_background", "background", ("image",)),
    ],
)
def test_what_is_replaced_by_what(score, replacement, modalities):
    subject, told = MadeSubject(), []
    found = score_samples(score, subject, {"a": subject.drawn(0)}, progress=told.append, **RUN)
    assert subject.replaced == [replacement] and found.modalities == modalities
    assert sum(told) == points(score, 1, 1, subject.modalities) == found.values[0].size
    kept = as_scored(found).curves
    assert kept.methods == ("a",) and np.array_equal(kept.values, found.values, equal_nan=True)


@settings(max_examples=8)
@given(st.integers(0, 10**6))
def test_the_gap_of_a_map_turned_round_has_the_other_sign(seed):
    subject = MadeSubject(any_certainty(seed, 1, 4, 2))
    its = subject.drawn(seed)
    turned = ModalityRelevance(-its.image, -its.text)
    found = area_values(curves(subject, {"a": its, "b": turned}, subject.modalities, replacement=None, **RUN))
    for name in ("image/gap/probability", "text/gap/probability", "gap/probability"):
        assert found.of(name)[0] == pytest.approx(-found.of(name)[1])


def test_insertion_is_the_negative_curve_from_right_to_left():
    subject = MadeSubject(any_certainty(5, 1, 4, 2))
    its, at = subject.drawn(2), (0.0, 0.25, 0.5, 0.75, 1.0)
    found = perturb(
        subject.scorer(), {"a": its}, subject.removable_text, subject.text_valid,
        sample_ids=subject.sample_ids, modalities=("image",), fractions=at,
    )  # fmt: skip
    order, both = best_first(its.image[0]), frozenset((0, 1))
    inserted = [subject._certainty(0, frozenset(order[:many]), both) for many in range(5)]
    assert found.score("probability")[0, 1, 0, 0, ::-1].tolist() == inserted
    assert found.areas("probability")[0, 1, 0, 0] == pytest.approx(area(inserted, at))


# F_syn


def by_share(function):
    """The certainty as a function of the shares of ten patches and of ten words that are left."""
    return lambda sample, patches, words: function(len(patches) / 10, len(words) / 10)


@pytest.mark.parametrize(
    ("certainty", "deletion", "insertion"),
    [
        # (1 − k)² − 2 (1 − k) + 1 = k², and k² − 0 − 0 + 0.
        (lambda image, text: image * text, 0.335, 0.335),
        # One is enough: (1 − k) − 1 − 1 + 1 = −k, and k − k − k + 0.
        (max, -0.5, -0.5),
        # All have to be there: 0 − 0 − 0 + 1 from the first tenth on, and 0 up to the last.
        (lambda image, text: float(image == text == 1), 0.95, 0.05),
        # Some is enough: 1 − 1 − 1 + 1 until all are gone, then 0 − 0 − 0 + 1; and 1 − 0 − 0 + 0.
        (lambda image, text: float(image > 0 and text > 0), 0.05, 0.95),
        (lambda image, text: (3 * image + text) / 4, 0, 0),
    ],
    ids=["product", "either", "all", "some", "sum"],
)
def test_f_syn_by_hand(certainty, deletion, insertion):
    subject = MadeSubject(by_share(certainty), words=(10,), grid=(2, 5))
    found = synergy(subject, {"a": subject.drawn(0)}, **RUN)
    assert found.of("deletion").item() == pytest.approx(deletion, abs=1e-12)
    assert found.of("insertion").item() == pytest.approx(insertion, abs=1e-12)
    assert found.of("f_syn").item() == pytest.approx((deletion + insertion) / 2, abs=1e-12)
    assert {one.better for one in found.quantities} == {HIGH}


def test_f_syn_is_of_the_most_relevant():
    """One patch and one word are needed together: found first, 1 from the first tenth on."""
    subject = MadeSubject(
        lambda sample, patches, words: float(7 in patches and 4 in words), words=(10,), grid=(2, 5)
    )
    right = np.eye(10)[[7]] + np.arange(10) / 100, np.eye(10)[[4]] + np.arange(10) / 100
    maps = {"right": subject.relevance(*right), "wrong": subject.relevance(*(-one for one in right))}
    maps["right patch alone"] = subject.relevance(right[0], -right[1])
    found = synergy(subject, maps, **RUN)
    assert found.of("f_syn")[:, 0].tolist() == pytest.approx([0.95, 0.05, 0.05])


def test_f_syn_against_naive_code():
    words = (3, 2, 0)
    subject = MadeSubject(any_certainty(4, 3, 6, 3), words=words, grid=(2, 3))
    maps = {"a": subject.drawn(5), "b": subject.drawn(6)}
    found = synergy(subject, maps, **RUN)
    for k, relevance in enumerate(maps.values()):
        for row, many in enumerate(words):
            image = best_first(relevance.image[row])
            text = best_first(relevance.text[row], subject.removable_text[row])
            every, all_words, none = frozenset(image), frozenset(range(many)), frozenset()
            deleted, inserted = [], []
            for tenth in TENTHS:
                top, said = (frozenset(its[: removed_of(tenth, len(its))]) for its in (image, text))

                def p(patches, kept, row=row):
                    return subject._certainty(row, patches, kept)

                deleted.append(
                    p(every - top, all_words - said)
                    - p(every - top, all_words)
                    - p(every, all_words - said)
                    + p(every, all_words)
                )
                inserted.append(p(top, said) - p(top, none) - p(none, said) + p(none, none))
            expected = area(deleted, TENTHS), area(inserted, TENTHS)
            assert sum(subject.scorers[0].forwards) <= 3 + 2 * 3 * 58  # equal variants once
            assert found.of("deletion")[k, row] == pytest.approx(expected[0], abs=1e-12)
            assert found.of("insertion")[k, row] == pytest.approx(expected[1], abs=1e-12)
            assert found.of("f_syn")[k, row] == pytest.approx(sum(expected) / 2, abs=1e-12)


@settings(max_examples=8)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(0, 100))
def test_f_syn_of_what_adds_up_is_nothing(worth, seed):
    subject = MadeSubject(
        lambda sample, patches, words: sum(worth[k] for k in patches) + sum(worth[4 + k] for k in words)
    )
    found = synergy(subject, {"a": subject.drawn(seed)}, **RUN)
    np.testing.assert_allclose(found.values, 0, atol=1e-12)


# The oracle


def greedy(value, tokens, sign):
    """The order in which each token is the one without which there is the least (sign 1) or most (−1)."""
    left, order = frozenset(tokens), []
    while left:
        order.append(min(sorted(left), key=lambda token: sign * value(left - {token})))
        left -= {order[-1]}
    return order


def test_oracle_by_hand():
    """0.4, 0.3, 0.2 and 0.1 a patch: what is left without 0, 1 (at 15 to 25 %), 2, 3 and 4 of them is
    1, 0.6, 0.3, 0.1 and 0 for the greedy oracle, and for the map that is its order."""
    worth = np.array([0.2, 0.4, 0.1, 0.3])
    subject = MadeSubject(lambda sample, patches, words: worth[list(patches)].sum(), modalities=("image",))
    maps = {"right": subject.relevance(worth[None]), "wrong": subject.relevance(-worth[None])}
    found = oracle_share(subject, maps, **RUN)
    best = area([1, 1, 1, 0.6, 0.6, 0.6, 0.3, 0.1, 0], FRACTIONS)
    most = area([1, 1, 1, 0.9, 0.9, 0.9, 0.7, 0.4, 0], FRACTIONS)
    rng = [np.random.default_rng((RUN["seed"], number, 40)).random(4) for number in range(5)]
    random = {
        sign: np.mean(
            [
                area(naive_curve(lambda left: worth[list(left)].sum(), range(4), order[::sign]), FRACTIONS)
                for order in (np.argsort(-one).tolist() for one in rng)
            ]
        )
        for sign in (1, -1)
    }
    assert found.of("image/positive/possible")[0, 0] == pytest.approx(random[1] - best)
    assert found.of("image/negative/possible")[0, 0] == pytest.approx(most - random[-1])
    means = {one.name: found.mean(one) for one in found.quantities}
    for name in ("image/positive/share", "image/negative/share", "share"):
        assert means[name][0] == pytest.approx(1)
    assert means["image/positive/share"][1] == pytest.approx((random[1] - most) / (random[1] - best))
    assert means["image/negative/share"][1] == pytest.approx((best - random[-1]) / (most - random[-1]))
    assert {one.name: (one.better, one.factor) for one in found.quantities} == {
        f"{where}{what}": how
        for where in ("image/positive/", "image/negative/", "")
        for what, how in (("share", (HIGH, 100)), ("possible", (NEITHER, 1)))
    }


def test_oracle_against_brute_force():
    """Of samples with as many words and with fewer; with fewer the curve goes on as it ended."""
    words = (3, 2, 0)
    subject = MadeSubject(any_certainty(9, 3, 6, 3), words=words, grid=(2, 3))
    its = subject.drawn(7)
    found = oracle_share(subject, {"a": its}, **RUN)
    gains = {}
    for row, many in enumerate(words):
        every, all_words = frozenset(range(6)), frozenset(range(many))
        parts = {
            "image": (lambda left, r=row, w=all_words: subject._certainty(r, left, w), every, its.image[row]),
            "text": (
                lambda left, r=row, p=every: subject._certainty(r, p, left),
                all_words,
                its.text[row][subject.removable_text[row]],
            ),
        }
        removable = {"image": torch.ones(6, dtype=torch.bool), "text": subject.removable_text[row]}
        for modality, (value, tokens, relevance) in parts.items():

            def area_of(order, value=value, tokens=tokens):
                return area(naive_curve(value, tokens, order), FRACTIONS)

            for direction, sign in (("positive", 1), ("negative", -1)):
                seeds = [(RUN["seed"], number, 40 + row) for number in range(5)]
                at = removable[modality].numpy()
                drawn = [np.random.default_rng(seed).random(len(at))[at] for seed in seeds]
                random = np.mean([area_of(np.argsort(-one)[::sign].tolist()) for one in drawn])
                own = area_of(best_first(relevance)[::sign])
                best = area_of(greedy(value, tokens, sign))
                gains[modality, direction, row] = sign * (random - own), sign * (random - best)
                name = f"{modality}/{direction}"
                assert (found.of(f"{name}/share")[0, row], found.of(f"{name}/possible")[0, row]) == (
                    pytest.approx(gains[modality, direction, row], abs=1e-12)
                )
    for row in range(3):
        for modality in ("image", "text"):
            both = np.mean([gains[modality, d, row] for d in ("positive", "negative")], axis=0)
            share, possible = (found.of(f"{modality}/{what}")[0, row] for what in ("share", "possible"))
            assert (share, possible) == pytest.approx(tuple(both), abs=1e-12)
        every = np.mean([gain for (_, _, k), gain in gains.items() if k == row], axis=0)
        assert (found.of("share")[0, row], found.of("possible")[0, row]) == pytest.approx(tuple(every))


def test_a_random_map_has_no_share():
    rng = np.random.default_rng(0)
    worth = rng.random((150, 4)) / 4
    subject = MadeSubject(
        lambda sample, patches, words: worth[sample, list(patches)].sum(),
        words=(1,) * 150,
        modalities=("image",),
    )
    maps = {"random": subject.drawn(1), "right": subject.relevance(worth)}
    found = oracle_share(subject, maps, batch_size=1000, seed=0)
    share = found.mean(next(one for one in found.quantities if one.name == "share"))
    assert abs(share[0]) < 0.1 and share[1] == pytest.approx(1)


# ADCC


def painted(values):
    """An image of 4 × 4 pixels of four patches."""
    patches = torch.tensor(values, dtype=torch.float64).view(2, 2)
    return patches.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(1, 3, 4, 4).clone()


def adcc_of(own, again, whole, there, image=(1.0, 1.0, 1.0, 1.0)):
    """Of a sample whose certainty is ``whole``, and ``there`` where the map lies over the image."""
    seen = []

    def explained(images):
        seen.append(images)
        return {"a": subject.relevance([again])}

    subject = MadeSubject(
        lambda sample, patches, words: whole,
        images=painted(image),
        seen=lambda sample, pixels: seen.append(pixels) or there,
        explained=explained,
    )
    found = adcc(subject, {"a": subject.relevance([own])}, **RUN)
    return {one.name: found.of(one.name).item() for one in found.quantities}, seen


def test_adcc_explains_each_masked_image_by_its_method_alone(monkeypatch):
    """(By all of them, forty methods would cost forty times as much.)"""
    subject, asked = MadeSubject(seen=lambda sample, image: 0.5), []

    def maps(images=None, methods=None):
        asked.append(methods)
        return {method: subject.drawn(3) for method in methods}

    monkeypatch.setattr(subject, "maps", maps)
    adcc(subject, {"a": subject.drawn(1), "b": subject.drawn(2)}, **RUN)
    assert asked == [["a"], ["b"]]


def test_adcc_by_hand():
    """The map 1, 2, 3, 2 becomes 0, ½, 1, ½: complexity ½, drop ¼; coherency 1; 3 / (1 + 2 + 4/3)."""
    found, (pixels, images) = adcc_of([1, 2, 3, 2], [10, 20, 30, 20], 0.8, 0.6, (4.0, 2.0, -1.0, 8.0))
    expected = {"adcc": 9 / 13, "average_drop": 0.25, "coherency": 1, "complexity": 0.5}
    assert found == pytest.approx(expected)
    for shown in (pixels, images[0]):
        torch.testing.assert_close(shown, painted((0.0, 1.0, -1.0, 4.0))[0])
    # 1, 2, 3, 2 against 2, 1, 2, 3: deviations −1, 0, 1, 0 and 0, −1, 0, 1.
    found, _ = adcc_of([1, 2, 3, 2], [2, 1, 2, 3], 0.8, 0.9)
    assert found == pytest.approx({"adcc": 3 / 5, "average_drop": 0, "coherency": 0.5, "complexity": 0.5})


@pytest.mark.parametrize(
    ("own", "again", "whole", "there", "expected"),
    [
        ([5, 5, 5, 5], [1, 2, 3, 4], 0.8, 0.8, {"complexity": 1, "coherency": 0.5, "average_drop": 0}),
        ([1, 2, 3, 4], [5, 5, 5, 5], 0.8, 0.8, {"coherency": 0.5, "adcc": 3 / 5}),
        ([0, 0, 0, 0], [7, 7, 7, 7], 0.8, 0.8, {"complexity": 1, "coherency": 1}),
        ([1, 2, 3, 4], [-1, -2, -3, -4], 0.8, 0.8, {"coherency": 0, "complexity": 0.5}),
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.8, 0.0, {"average_drop": 1, "coherency": 1}),
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0, 0.3, {"average_drop": 0, "adcc": 3 / 4}),
    ],
    ids=["constant", "constant again", "both", "turned round", "all lost", "never sure"],
)
def test_adcc_where_a_denominator_is_nothing(own, again, whole, there, expected):
    found, _ = adcc_of(own, again, whole, there)
    assert found == pytest.approx({"adcc": 0} | found | expected)
    if "adcc" not in expected:
        assert found["adcc"] == 0


def test_adcc_against_naive_code():
    """Of images that the patches do not fill, in batches: 5 × 7 pixels, patches of 2 × 3."""
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.normal(size=(4, 3, 5, 7)))
    own, mixing = rng.random((2, 4, 4)), rng.normal(size=(105, 4))

    def explained(pixels):
        found = (pixels.flatten(1).numpy() @ mixing, pixels.flatten(1).numpy() ** 2 @ mixing)
        return {name: subject.relevance(its) for name, its in zip("ab", found, strict=True)}

    def seen(sample, pixels):
        return float(pixels[sample % 3].mean().sigmoid())

    whole = [0.4, 0.6, 0.5, 0.01]
    subject = MadeSubject(
        lambda sample, patches, words: whole[sample],
        words=(2, 1, 3, 2), images=images, seen=seen, explained=explained,
    )  # fmt: skip
    maps = {name: subject.relevance(its) for name, its in zip("ab", own, strict=True)}
    found = adcc(subject, maps, batch_size=3, seed=0)
    for k in range(2):
        for row in range(4):
            scaled = own[k, row] - own[k, row].min()
            scaled = scaled / scaled.max()
            laid = images[row].clone()
            for y in range(5):
                for x in range(7):
                    laid[:, y, x] *= scaled[2 * min(y // 2, 1) + min(x // 3, 1)]
            numbers = laid.flatten().numpy()
            again = (numbers, numbers**2)[k] @ mixing
            drop = max(0.0, whole[row] - seen(row, laid)) / whole[row]
            coherency = (np.corrcoef(scaled, again)[0, 1] + 1) / 2
            terms = coherency, 1 - scaled.sum() / 4, 1 - drop
            expected = [3 / sum(1 / term for term in terms), drop, coherency, scaled.sum() / 4]
            assert found.values[:, k, row].tolist() == pytest.approx(expected)
    better = {one.name: one.better for one in found.quantities}
    assert better == {"adcc": HIGH, "average_drop": LOW, "coherency": HIGH, "complexity": LOW}


def test_parts_of_adcc():
    assert min_max(torch.tensor([[2.0, 4.0, 3.0], [1.0, 1.0, 1.0]])).tolist() == [[0, 1, 0.5], [1, 1, 1]]
    assert harmonic(np.array([1.0, 0.5]), np.array([0.5, 0.0])).tolist() == pytest.approx([2 / 3, 0])


# Sanity


class Learnt:
    """A model of three parameters; each map is a product of some of them and the sample's image."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.head, self.block, self.embedding = (
            nn.Parameter(torch.randn(9, generator=generator)) for _ in range(3)
        )
        self.calls = 0
        self.subject = MadeSubject(
            grid=(3, 3),
            words=(8, 6, 1),
            explained=self.maps,
            layers=(("head", [self.head]), ("block", [self.block]), ("embeddings", [self.embedding])),
        )

    def maps(self, images):
        self.calls += 1
        rows = len(self.subject.sample_ids)
        of_model, of_last = (self.head * self.block * self.embedding).detach(), self.embedding.detach()
        still = torch.arange(9.0)
        text = torch.zeros(self.subject.text_valid.shape)
        found = {}
        for name, its in (("right", of_model), ("first", of_last), ("random", still)):
            words = text.clone()
            words[:, 1:-1] = its[: text.shape[1] - 2]
            found[name] = ModalityRelevance(its.expand(rows, 9).clone(), words)
        return found


def test_sanity_destroys_one_layer_after_the_other():
    model = Learnt()
    before = [p.detach().clone() for p in (model.head, model.block, model.embedding)]
    maps = model.maps(None)
    found = sanity(model.subject, maps, **RUN)
    assert model.calls == 4
    depths = ("1 head", "2 block", "3 embeddings", "all")
    assert [one.name for one in found.quantities] == [
        f"{modality}/{depth}"
        for pair in (depths[:1], depths[1:2], depths[2:])
        for modality in ("image", "text")
        for depth in pair
    ]
    assert {one.better for one in found.quantities} == {LOW}
    # "first" sees the last layer alone: the same until that is destroyed.
    for modality in ("image", "text"):
        for depth in depths[:2]:
            assert found.of(f"{modality}/{depth}")[1].tolist() == pytest.approx([1, 1, 1])
        assert (found.of(f"{modality}/all") == found.of(f"{modality}/3 embeddings")).all()
    assert (np.abs(found.of("image/all")[:2]) < 0.9).all()
    assert (found.of("image/1 head")[0] < 0.9).all()
    assert unchanged(found) == ["random"]
    # Exactly as before, and what was there in between is what the generator says.
    for parameter, values in zip((model.head, model.block, model.embedding), before, strict=True):
        assert torch.equal(parameter, values)
    generator = torch.Generator().manual_seed(RUN["seed"])
    head = before[0][torch.randperm(9, generator=generator)]
    ranks = [np.argsort(np.argsort((its * before[1] * before[2]).numpy())) for its in (before[0], head)]
    assert found.of("image/1 head")[0, 0] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_sanity_counts_words_alone():
    """Start, end and padding, which have no relevance, would make maps look alike."""
    model = Learnt()
    found = sanity(model.subject, model.maps(None), **RUN)
    assert found.of("text/all").shape == (3, 3)
    # A single word ranks nothing: constant before and behind.
    assert found.of("text/all")[:, 2].tolist() == [1, 1, 1]
    generator = torch.Generator().manual_seed(RUN["seed"])
    drawn = [torch.randperm(9, generator=generator) for _ in range(3)]
    values = model.embedding.detach()
    ranks = [np.argsort(np.argsort(its[:6].numpy())) for its in (values, values[drawn[2]])]
    assert found.of("text/all")[1, 1] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_unchanged_is_by_the_worst_modality():
    quantities = (Quantity("image/1 head", LOW), Quantity("image/all", LOW), Quantity("text/all", LOW))
    values = np.array([[[1.0, 1.0]] * 4, [[0.1, 0.3], [0.95, 0.9], [0.9, 0.9], [0.5, 1]], [[0.2, 0.2]] * 4])
    values[2, 3] = 0.93
    found = ScoreValues(quantities, ("a", "b", "c", "d"), np.arange(2), values)
    assert unchanged(found) == ["b", "d"]  # not "c", which has 0.9 and no more


def test_parameters_come_back_whatever_happens():
    model = Learnt()
    before = model.head.detach().clone()

    def fails(images):
        raise RuntimeError("in between")

    maps = model.maps(None)
    model.subject._explained = fails
    with pytest.raises(RuntimeError, match="in between"):
        sanity(model.subject, maps, **RUN)
    assert torch.equal(model.head, before) and model.head.requires_grad
    with pytest.raises(KeyboardInterrupt), restored([model.head]):
        shuffle(model.head, torch.Generator().manual_seed(0))
        assert not torch.equal(model.head, before)
        raise KeyboardInterrupt
    assert torch.equal(model.head, before)


def test_shuffled_numbers_are_the_same_in_another_order():
    values = torch.arange(24.0).view(2, 3, 4)
    drawn = [values.clone() for _ in range(3)]
    for its, seed in zip(drawn, (0, 0, 1), strict=True):
        shuffle(its, torch.Generator().manual_seed(seed))
        assert not torch.equal(its, values) and torch.equal(its.flatten().sort().values, values.flatten())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# Values, and their intervals


def made_values(samples=12, seed=0):
    rng = np.random.default_rng(seed)
    quantities = (
        Quantity("share", HIGH, 100, over="possible"),
        Quantity("possible", NEITHER),
        Quantity("error", LOW),
    )
    values = rng.random((3, 2, samples))
    return ScoreValues(quantities, ("weighted", "gae"), np.arange(samples) + 7, values)


def test_a_share_is_a_quotient_of_means():
    """1 of 2 and 3 of 2: 4 of 4, and not the mean of ½ and 3/2; with 1 of 4 and 3 of 0 as well."""
    quantities = Quantity("share", HIGH, 100, over="possible"), Quantity("possible", NEITHER)
    values = np.array([[[1.0, 3.0], [1.0, 3.0]], [[2.0, 2.0], [4.0, 0.0]]])
    found = ScoreValues(quantities, ("a", "b"), np.arange(2), values)
    assert found.mean(quantities[0]).tolist() == [1, 1] and found.mean(quantities[1]).tolist() == [2, 2]
    assert found.intervals(confidence=0.9, seed=0)[0, :, 0].tolist() == [1, 1]


def test_a_share_of_nothing_is_nothing():
    """No question has words that can be removed: nothing to be gained, by no method, in no resample."""
    quantities = Quantity("share", HIGH, 100, over="possible"), Quantity("possible", NEITHER)
    found = ScoreValues(quantities, ("weighted", "b"), np.arange(3), np.zeros((2, 2, 3)))
    assert found.mean(quantities[0]).tolist() == [0, 0]
    assert not found.intervals("weighted", confidence=0.9, seed=0).any()


def test_intervals_against_naive_resampling():
    found, seed, sets = made_values(), 4, 300
    own = found.intervals(confidence=0.8, seed=seed, resamples=sets)
    paired = found.intervals("weighted", confidence=0.8, seed=seed, resamples=sets)
    drawn = np.random.default_rng(seed).integers(0, 12, (sets, 12))

    def value(quantity, method, rows):
        mean = found.values[quantity, method][rows].mean()
        return mean / found.values[1, method][rows].mean() if quantity == 0 else mean

    for i in range(3):
        for k in range(2):
            every = [value(i, k, rows) for rows in drawn]
            whole = value(i, k, slice(None))
            assert own[i, k].tolist() == pytest.approx([whole, *np.quantile(every, [0.1, 0.9])])
            less = [value(i, k, rows) - value(i, 0, rows) for rows in drawn]
            expected = [whole - value(i, 0, slice(None)), *np.quantile(less, [0.1, 0.9])]
            assert paired[i, k].tolist() == pytest.approx(expected)
    broken = ScoreValues(found.quantities, found.methods, found.sample_ids, found.values * np.inf)
    with pytest.raises(ValueError, match="finite"):
        broken.intervals(confidence=0.9, seed=0)


def test_numbers_of_values():
    found = made_values()
    numbers = found.numbers(confidence=0.9, seed=1)
    assert list(numbers) == ["share", "possible", "error"]
    assert {name: (its["better"], its["factor"]) for name, its in numbers.items()} == {
        "share": (HIGH, 100), "possible": (NEITHER, 1), "error": (LOW, 1),
    }  # fmt: skip
    own, paired = found.intervals(confidence=0.9, seed=1), found.intervals("weighted", confidence=0.9, seed=1)
    methods = numbers["share"]["methods"]
    assert methods["weighted"] == {"value": dict(zip(("mean", "low", "high"), own[0, 0], strict=True))}
    assert methods["gae"] == {
        "value": dict(zip(("mean", "low", "high"), own[0, 1], strict=True)),
        "difference_to_weighted": dict(zip(("mean", "low", "high"), paired[0, 1], strict=True)),
    }
    alone = ScoreValues(found.quantities, ("gae", "random"), found.sample_ids, found.values)
    assert set(alone.numbers(confidence=0.9, seed=1)["error"]["methods"]["random"]) == {"value"}


def test_values_are_stored_and_put_together(tmp_path):
    found = made_values()
    np.savez(tmp_path / "values.npz", **found.to_arrays())
    with np.load(tmp_path / "values.npz", allow_pickle=False) as stored:
        again = ScoreValues.from_arrays(stored)
    assert (again.quantities, again.methods) == (found.quantities, found.methods)
    assert (again.values == found.values).all() and (again.sample_ids == found.sample_ids).all()
    parts = [
        ScoreValues(found.quantities, found.methods, found.sample_ids[rows], found.values[..., rows])
        for rows in (slice(0, 5), slice(5, 12))
    ]
    whole = ScoreValues.concatenate(parts)
    assert (whole.values == found.values).all() and (whole.sample_ids == found.sample_ids).all()
    with pytest.raises(ValueError, match="nothing"):
        ScoreValues.concatenate([])
    other = ScoreValues(found.quantities, ("weighted", "random"), found.sample_ids, found.values)
    with pytest.raises(ValueError, match="differ"):
        ScoreValues.concatenate([found, other])
    with pytest.raises(ValueError, match=r"no quantity 'beauty': one of share, possible, error"):
        found.of("beauty")


def test_values_of_two_tests_beside_each_other():
    first, second = made_values(seed=0), made_values(seed=1)
    both = ScoreValues.beside({"caption": first, "word": second})
    assert [one.name for one in both.quantities] == [
        f"{test}/{name}" for test in ("caption", "word") for name in ("share", "possible", "error")
    ]
    assert both.quantities[3] == Quantity("word/share", HIGH, 100, over="word/possible")
    assert (both.values == np.concatenate([first.values, second.values])).all()
    for test, its in (("caption", first), ("word", second)):
        share = next(one for one in both.quantities if one.name == f"{test}/share")
        assert (both.mean(share) == its.mean(its.quantities[0])).all()
    later = ScoreValues(second.quantities, second.methods, second.sample_ids + 1, second.values)
    with pytest.raises(ValueError, match="differ"):
        ScoreValues.beside({"caption": first, "word": later})
