"""Removing patches by what explanations of captions say, and words held against what they speak of."""

import json

import numpy as np
import pytest
import torch
from support import caption_models, training_models

from clipmapper.errors import UserError
from clipmapper.evaluation.captions.ngram_scores import DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.evaluation.captions.scores import SCORES, score_captions
from clipmapper.evaluation.localisation import image_localisation
from clipmapper.evaluation.perturbation import FRACTIONS, ModalityRelevance, perturb
from clipmapper.evaluation.perturbation_scores import LOG_PROBABILITY
from clipmapper.evaluation.perturbation_scores import SCORES as SCORE_NAMES
from clipmapper.models.tokens import word_positions
from clipmapper.tasks.captioning import perturbation as caption_variants
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.explain import explain_captions
from clipmapper.tasks.captioning.perturbation import CaptionScorer, WordScorer, images_removed, kept_captions
from clipmapper.tasks.captioning.pictures import caption_perturbation_tables, word_localisation_table
from clipmapper.tasks.captioning.report import caption_report
from clipmapper.tasks.captioning.samples import caption_samples, token_word_places
from clipmapper.training.processes import Share
from clipmapper.training.shown import console

METHODS = ("weighted", "gae", "random")
GREEDY = Decoding("greedy", max_length=8)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data():
    return caption_models.scenes(5)


@pytest.fixture(scope="module")
def model(architecture, data):
    said = [caption for captions in data.validation.captions() for caption in captions]
    return caption_models.captioner(architecture, said=said, vocabulary="data").float()


@pytest.fixture(scope="module")
def samples(model, data):
    return caption_samples(model, data, "validation", 4, seed=1)


@pytest.fixture(scope="module")
def report(model, samples):
    return caption_report(model, samples, METHODS, chunk=3, batch_size=50, seed=2, decoding=GREEDY)


# What is scored


def fake(sample, image_keep, write):
    """Four patches; each that is left adds to the first token's log-probability, patch 0 names the word."""
    left = [list(range(4))] * len(sample) if image_keep is None else image_keep.tolist()
    told = torch.tensor([[-1.0 - (4 - len(keep)), -0.5 * (0 not in keep) - 0.1, 0.0] for keep in left])
    texts = ["a red ring" if 0 in keep else "a blue ring" for keep in left] if write else None
    return told, texts


def curves(scorer, best_first=True):
    worth = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    return perturb(
        scorer,
        {"weighted": ModalityRelevance(worth if best_first else -worth, torch.zeros(1, 3))},
        torch.zeros(1, 3, dtype=torch.bool),
        torch.ones(1, 3, dtype=torch.bool),
        sample_ids=np.array([0]),
        fractions=(0.0, 0.25, 0.5, 0.75, 1.0),
        modalities=("image",),
    )


def test_caption_curves_by_hand():
    references = [["a red ring", "the red ring"]]
    frequencies = DocumentFrequencies.of([[ptb_tokenise(r) for r in references[0]], [["two", "squares"]]])
    scores = ("log_probability", "mean_probability", "bleu_1", "cider")
    found = curves(CaptionScorer(fake, references, frequencies, np.array([2]), scores))
    assert found.scores == scores
    positive, negative = found.score("log_probability")[0, :, 0, 0]
    assert positive.tolist() == pytest.approx([-1.1, -2.6, -3.6, -4.6, -5.6])
    assert negative.tolist() == pytest.approx([-1.1, -2.1, -3.1, -4.1, -5.6])
    # Of two tokens: the root of their product.
    positive, negative = found.score("mean_probability")[0, :, 0, 0]
    assert positive.tolist() == pytest.approx(
        [
            np.sqrt(np.exp(-1.0 - a) * np.exp(-0.1 - b))
            for a, b in ((0, 0), (1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5))
        ]
    )
    assert negative[3] == pytest.approx(np.sqrt(np.exp(-4.0) * np.exp(-0.1)))
    good, bad = (
        score_captions([text], references, ("bleu_1", "cider"), frequencies).samples
        for text in ("a red ring", "a blue ring")
    )
    for score in ("bleu_1", "cider"):
        positive, negative = found.score(score)[0, :, 0, 0]
        assert positive.tolist() == pytest.approx([good[score][0]] + [bad[score][0]] * 4)
        assert negative.tolist() == pytest.approx([good[score][0]] * 4 + [bad[score][0]])
        assert good[score][0] > bad[score][0]


def test_word_curves_by_hand():
    found = curves(WordScorer(fake, [[1, 2]]))
    assert found.scores == ("word_probability",)
    positive, negative = found.score("word_probability")[0, :, 0, 0]
    with_patch, without = np.exp(-0.1), np.exp(-0.6)
    assert positive.tolist() == pytest.approx([with_patch] + [without] * 4)
    assert negative.tolist() == pytest.approx([with_patch] * 4 + [without])


def test_scores_that_there_are():
    assert {*SCORES, LOG_PROBABILITY} <= set(SCORE_NAMES)
    frequencies = DocumentFrequencies.of([[["a"]]])
    with pytest.raises(UserError, match="unknown caption scores"):
        CaptionScorer(fake, [["a"]], frequencies, np.array([2]), ("beauty",))
    broken = WordScorer(lambda *args: (torch.full((1, 3), torch.nan), None), [[0]])
    with pytest.raises(ValueError, match="finite"):
        broken.unperturbed(1)


# What the model says of an image without some of its patches


@pytest.mark.parametrize("most", [2**26, 1])
@torch.no_grad()
def test_kept_captions_are_the_model_s(model, data, monkeypatch, most):
    monkeypatch.setattr(caption_variants, "_MOST_SCORES", most)
    images = torch.cat([model.load_image(record.image.pixels) for record in data.validation[:2]])
    text = model.tokenize([data.validation[0].captions[0], data.validation[1].captions[1]])
    kept = kept_captions(model, images_removed(model, images), text, GREEDY)
    sample = torch.tensor([1, 0, 1])
    for keep in (None, torch.tensor([[0, 4, 8], [1, 2, 3], [0, 1, 2]]), torch.zeros(3, 0, dtype=torch.long)):
        told, texts = kept(sample, keep, True)
        assert told.shape == (3, text.ids.shape[1] - 1)
        for row, number in enumerate(sample.tolist()):
            one = {} if keep is None else {"image_keep": keep[row : row + 1]}
            scores = model(images[number : number + 1], text[number : number + 1], **one)[0].log_softmax(-1)
            length = int(text.valid[number].sum())
            expected = [float(scores[p - 1, text.ids[number, p]]) for p in range(1, length)]
            assert told[row, : length - 1].tolist() == pytest.approx(expected, abs=1e-4)
            assert not told[row, length - 1 :].any()
            if keep is None:
                assert texts[row] == model.caption(images[number], GREEDY)
        assert kept(sample, keep, False)[1] is None


# The report


def test_samples(model, data, samples):
    assert len(set(samples.ids)) == 4 and samples.images.shape[0] == 4
    for row, number in enumerate(samples.ids):
        assert (samples.pictures[row] == data.validation[number].image.pixels).all()
        known, scene = samples.spoken[row], data.validation[number].truth.scene
        assert known.text in samples.references[row] == list(data.validation[number].captions)
        text = model.tokenize(known.text)
        words = [w for w, _ in word_positions(model.encoder.tokenizer, text.ids[0], text.removable[0])]
        for place, (kind, mask) in known.words.items():
            if kind in ("colour", "shape", "size"):
                alike = [
                    k
                    for k, o in enumerate(scene.objects)
                    if getattr(o, kind) in (words[place], words[place][:-1])
                ]
                seen = np.isin(data.validation[number].truth.instances, [k + 1 for k in alike])
                assert mask.any() and not (mask & ~seen).any()
    again = caption_samples(model, data, "validation", 4, seed=1)
    assert again.ids == samples.ids and [k.text for k in again.spoken] == [k.text for k in samples.spoken]


def test_words_are_found_in_any_tokenizer_s_words():
    assert token_word_places(["a", "red", ",", "ring"], ["a", "red", ",", "ring"]) == [0, 1, 2, 3]
    assert token_word_places(["a", "red", ",", "ring"], ["A", "red,", "ring"]) == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="not the same text"):
        token_word_places(["a", "ring"], ["a", "cross"])


def test_report_explains_the_model_s_captions(model, samples, report):
    for row, number in enumerate(samples.ids):
        pixels = samples.images[row : row + 1]
        for name in ("weighted", "gae"):
            explanation = report.explanations[name][row]
            (expected,) = explain_captions(model, pixels, methods=[name], decoding=GREEDY)
            assert explanation.caption == expected.caption == model.caption(pixels, GREEDY)
            np.testing.assert_allclose(explanation.maps, expected.maps, rtol=1e-4, atol=1e-7)
            chosen = report.chosen[row]
            # Fraction 0 is the untouched model.
            start = report.word_scores.score("word_probability")[0, :, :, row, 0]
            np.testing.assert_allclose(start, explanation.probabilities[chosen], rtol=1e-4)
        assert report.caption_scores.sample_ids[row] == report.word_scores.sample_ids[row] == number
    own = [explanation.caption for explanation in report.explanations["gae"]]
    found = score_captions(own, samples.references, ("bleu_4", "cider"), samples.frequencies).samples
    for score in ("bleu_4", "cider"):
        values = report.caption_scores.score(score)
        assert values.shape == (1, 2, len(METHODS), 4, len(FRACTIONS))
        np.testing.assert_allclose(values[0, 0, 0, :, 0], found[score])


def test_localisation_of_words(model, samples, report):
    """Recomputed from explanations of the known captions, one by one."""
    expected: dict[str, list[float]] = {}
    for row, known in enumerate(samples.spoken):
        explanation = explain_captions(model, samples.images[row], methods=["gae"], caption=known.text)[0]
        by_kind: dict[str, list[float]] = {}
        for place, (kind, mask) in known.words.items():
            scores = image_localisation(explanation.maps[place][None], mask[None])
            by_kind.setdefault(kind, []).append(float(scores.mass[0]))
        for kind, values in by_kind.items():
            expected.setdefault(kind, []).append(float(np.mean(values)))
    assert {"colour", "shape"} <= set(expected) == set(report.localisation["gae"])
    for kind, values in expected.items():
        np.testing.assert_allclose(report.localisation["gae"][kind].mass, values, rtol=1e-4)


def test_numbers_tables_and_scalars(report):
    numbers = report.numbers(0.95, seed=0)
    assert json.loads(json.dumps(numbers)) == numbers
    area = numbers["perturbation"]["caption"]["positive"]["log_probability"]["gae"]
    assert area["area"]["mean"] == pytest.approx(
        report.caption_scores.areas("log_probability")[0, 0, 1].mean()
    )
    assert "difference_to_weighted" in area
    assert set(numbers["perturbation"]["word"]["negative"]["word_probability"]) == set(METHODS)
    assert {"mass", "rank", "pointing"} == set(numbers["localisation"]["colour"]["methods"]["weighted"])
    out = console()
    with out.capture() as printed:
        for table in (*caption_perturbation_tables(numbers), word_localisation_table(numbers)):
            out.print(table)
    for expected in ("log-probability", "CIDEr-D", "BLEU-4", "uniform map", "weighted", "caption positive ↓"):
        assert expected in printed.get()
    assert "…" not in printed.get()
    scalars = report.scalars()
    assert scalars["perturbation/caption/positive/gae/log_probability"] == area["area"]["mean"]
    assert "localisation/colour/mass/weighted" in scalars


def test_report_explains_what_is_asked_for(model, samples):
    few = samples.part(Share(0, 4))
    options = {"explained": "probability", "word_maps": "raw"}
    report = caption_report(
        model,
        few,
        ("gae",),
        chunk=3,
        batch_size=50,
        seed=2,
        decoding=GREEDY,
        caption_scores=[LOG_PROBABILITY],
        **options,
    )
    (found,) = report.explanations["gae"]
    (expected,) = explain_captions(model, few.images, methods=["gae"], decoding=GREEDY, **options)
    np.testing.assert_allclose(found.maps, expected.maps)
    np.testing.assert_allclose(found.patches, np.tensordot(found.weights, found.maps, axes=1))
    (logit,) = explain_captions(model, few.images, methods=["gae"], decoding=GREEDY)
    assert not np.allclose(found.maps, logit.maps, rtol=1e-2) and logit.word_maps == "scaled"


@pytest.mark.slow
def test_report_goes_on_where_it_stopped(model, samples, report, tmp_path):
    points = []

    def run(key):
        points.clear()
        options = {"decoding": GREEDY, "folder": tmp_path, "key": key, "progress": points.append}
        return caption_report(model, samples, METHODS, chunk=3, batch_size=50, seed=2, **options)

    first = run("a")
    assert sum(points) == samples.points(len(METHODS), ["removal"])
    assert np.array_equal(first.caption_scores.values, report.caption_scores.values)
    again = run("a")
    assert not any(points) and np.array_equal(again.word_scores.values, report.word_scores.values)
    run("b")
    assert points
