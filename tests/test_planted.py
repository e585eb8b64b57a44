"""Planted maps, and reports that have them scored beside the methods."""

import numpy as np
import pytest
import torch
from support import caption_models, training_models

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.planted import (
    PLANTED,
    PLANTED_NAMES,
    Deciding,
    blurred,
    centre,
    edges,
    patch_shares,
    planted_maps,
    shifted,
)
from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.with_planted import WithPlanted
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.planted import spoken_of
from clipmapper.tasks.captioning.report import CaptionReport, caption_report
from clipmapper.tasks.captioning.samples import caption_samples
from clipmapper.tasks.vqa.report import AnswerReport, answer_report
from clipmapper.tasks.vqa.samples import question_samples
from clipmapper.tasks.vqa.subject import AnswerSubject
from clipmapper.training.processes import Share

METHODS = ("gae", "random")
SCORES = ("removal", "adcc", "sanity")
TRUTH = np.array([[0, 0, 0.5], [0, 1, 0], [0, 0, 0]])

# Maps by hand


def test_shares_of_patches():
    mask = np.zeros((6, 6), dtype=bool)
    mask[2:4, 2:4] = mask[0, 4:6] = True
    np.testing.assert_array_equal(patch_shares([mask], (3, 3)), TRUTH[None])


def test_shifted_to_the_right_and_round():
    np.testing.assert_array_equal(shifted(TRUTH), [[0.5, 0, 0], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(shifted(np.array([1.0, 0, 0, 1])), [1, 1, 0, 0])


def test_blurred_by_one_patch():
    """Weights exp(−d²/2), over both axes, mirrored at the border: d = −4 … 4 fold back onto three places."""
    weight = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    weight /= weight.sum()
    fold = [2, 1, 0]  # of the places behind the end: 3 is 2 again, 4 is 1, 5 is 0 (mirrored between patches)
    one = np.zeros((3, 3))  # to, from
    for to in range(3):
        for away, its in zip(range(-4, 5), weight, strict=True):
            place = (to + away) % 6
            one[to, place if place < 3 else fold[place - 3]] += its
    np.testing.assert_allclose(blurred(TRUTH), one @ TRUTH @ one.T, atol=1e-12)
    assert blurred(TRUTH).sum() == pytest.approx(1.5)
    np.testing.assert_allclose(blurred(TRUTH[1]), one @ TRUTH[1], atol=1e-12)


def test_centre_is_a_gaussian_of_a_quarter_of_each_side():
    side = np.exp(-((4 / 3) ** 2) / 2)
    np.testing.assert_allclose(centre((3,)), [side, 1, side])
    np.testing.assert_allclose(centre((3, 3)), np.outer([side, 1, side], [side, 1, side]))
    np.testing.assert_allclose(centre((1, 4))[0], np.exp(-(np.array([-1.5, -0.5, 0.5, 1.5]) ** 2) / 2))


def test_edges_are_where_the_luminance_changes():
    images = torch.zeros(2, 3, 7, 6)  # the last row of pixels belongs to no patch
    images[0, :, :, 2:] = 1.0  # columns 1 and 2 have central differences of ½
    images[1, 1, 6:] = 1.0  # green: 0.587 · ½ at rows 5 (and 1 at 6, at the border, which no patch reads)
    found = edges(images, (3, 3))
    np.testing.assert_allclose(found[0], [[0.25, 0.25, 0]] * 3, atol=1e-7)
    np.testing.assert_allclose(found[1], [[0] * 3, [0] * 3, [0.587 / 4] * 3], atol=1e-7)


def planted(sample_ids=(7,), seed=0, words=((False, (1,)), (True, (2, 3)), (False, (4,)))):
    count = len(sample_ids)
    deciding = Deciding(np.repeat(TRUTH[None], count, axis=0), [words] * count)
    return planted_maps(
        deciding, torch.rand(count, 3, 6, 6), tokens=6, sample_ids=np.array(sample_ids), seed=seed
    )


def test_all_tokens_of_a_word_have_its_value_and_others_none():
    found = {name: its.text[0].tolist() for name, its in planted().items()}
    assert found["planted/truth"] == [0, 0, 1, 1, 0, 0]
    assert found["planted/truth_inverted"] == [0, 1, 0, 0, 1, 0]
    assert found["planted/truth_shifted"] == [0, 0, 0, 0, 1, 0]
    assert found["planted/edges"] == [0, 1, 1, 1, 1, 0]
    side = pytest.approx(np.exp(-((4 / 3) ** 2) / 2))
    assert found["planted/centre"] == [0, side, 1, 1, side, 0]
    blur = found["planted/truth_blurred"]
    assert blur[2] == blur[3] > blur[1] > 0 and blur[1] == pytest.approx(blur[4])


def test_maps_of_patches():
    found = planted()
    assert tuple(found) == PLANTED_NAMES and len(PLANTED) == 7
    np.testing.assert_array_equal(found["planted/truth"].image[0], TRUTH.ravel())
    np.testing.assert_array_equal(found["planted/truth_inverted"].image[0], 1 - TRUTH.ravel())
    assert not any(its.text.any() for its in planted(words=()).values())


def test_noise_is_of_the_seed_and_the_sample_alone():
    one, both, other = planted((7,)), planted((3, 7)), planted((7,), seed=1)
    for name in ("image", "text"):
        noise = [getattr(its["planted/noise"], name) for its in (one, both, other)]
        assert torch.equal(noise[0][0], noise[1][1]) and not torch.equal(noise[1][0], noise[1][1])
        assert not torch.equal(noise[0], noise[2])


# Reports


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(architecture):
    return training_models.tiny_model(architecture).eval()


@pytest.fixture(scope="module")
def samples(model):
    return question_samples(model, training_models.small_scenes(), "validation", 5, seed=0)


OPTIONS = {"chunk": 3, "batch_size": 512, "seed": 0, "scores": SCORES}


@pytest.fixture(scope="module")
def report(model, samples):
    return answer_report(model, samples, METHODS, planted=True, **OPTIONS)


def test_they_are_in_the_values_behind_the_methods_and_nowhere_else(report, model, samples):
    plain = answer_report(model, samples, METHODS, **OPTIONS)
    for score, found in report.scored.items():
        assert found.values.methods == METHODS + PLANTED_NAMES
        assert found.values.values.shape[2] == 5 and np.isfinite(found.values.values).all()
        for own, its in zip(plain.scored[score].values.values, found.of_methods.values, strict=True):
            np.testing.assert_allclose(own, its, atol=1e-6)
    assert tuple(report.relevance) == tuple(report.localisation) == METHODS
    assert report.perturbation.methods == METHODS
    told = [report.numbers(0.95, 0), report.scalars(), report.perturbation_numbers(0.95, 0)]
    assert "planted" not in str(told)


def test_parts_are_put_together(report, model, samples):
    parts = [
        answer_report(model, samples.part(Share(k, 2)), METHODS, planted=True, **OPTIONS) for k in (0, 1)
    ]
    joined = AnswerReport.together(samples, parts)
    assert joined.scored["removal"].values.methods == METHODS + PLANTED_NAMES
    np.testing.assert_allclose(
        joined.scored["removal"].values.values, report.scored["removal"].values.values, atol=1e-6
    )


def test_only_edges_change_with_the_image_and_none_with_the_weights(report, model, samples):
    sanity = report.scored["sanity"].values
    stays = sanity.part(PLANTED_NAMES).of("image/all")
    np.testing.assert_allclose(stays, 1)
    coherency = dict(zip(METHODS + PLANTED_NAMES, report.scored["adcc"].values.of("coherency"), strict=True))
    for name in PLANTED_NAMES:
        assert name == "planted/edges" or coherency[name] == pytest.approx(1)
    assert (coherency["planted/edges"] < 1 - 1e-6).any()


def test_it_is_a_subject(model, samples):
    inner = AnswerSubject(
        model, samples, range(1, 4), METHODS, answers=torch.zeros(3, dtype=torch.int64), seed=0
    )
    deciding = Deciding(patch_shares(samples.masks, (3, 3)), [((True, (1,)),)] * 5)
    subject = WithPlanted(inner, deciding.part(range(1, 4)), 0)
    assert isinstance(subject, Subject)
    assert tuple(subject.maps()) == METHODS + PLANTED_NAMES
    every = subject.maps()
    for some in (["gae"], ["planted/edges"], ["planted/noise", "random"]):
        alone = subject.maps(None, some)
        assert set(alone) == set(some)
        assert all(torch.equal(its.image, every[method].image) for method, its in alone.items())
    np.testing.assert_array_equal(
        subject.planted()["planted/truth"].image, patch_shares(samples.masks[1:4], (3, 3)).reshape(3, -1)
    )


def test_judged_questions(report):
    found = report.judged(0.9, 0)["answer"]
    assert found["samples"] == 5 and tuple(found["scores"]) == SCORES
    its = found["scores"]["removal"]["gap/probability"]
    assert set(its["methods"]) == set(its["samples"]) == {"mass", "rank"}
    assert len(its["planted"]) == 12


@pytest.mark.parametrize("field", ["masks", "deciding"])
def test_questions_whose_truth_is_not_known_are_refused(model, samples, field):
    part = samples.part(Share(0, 1))
    object.__setattr__(part, field, [None, *getattr(part, field)[1:]])
    with pytest.raises(UserError, match=r"^planted: of 1 of 5 questions it is not known") as error:
        answer_report(model, part, METHODS, planted=True, **OPTIONS)
    assert "\n" not in str(error.value)


# Captions


@pytest.fixture(scope="module")
def captioner(architecture):
    data = caption_models.scenes(4)
    said = [caption for captions in data.validation.captions() for caption in captions]
    model = caption_models.captioner(architecture, said=said, vocabulary="data").float()
    return model, caption_samples(model, data, "validation", 4, seed=1)


def test_captions_speak_of_what_they_name(captioner):
    model, samples = captioner
    aligned = [truth.aligned(1)[0] for truth in samples.known]
    captions = [caption.text for caption in aligned[:3]] + ["is a of"]
    words = [[word.text for word in caption.words] for caption in aligned[:3]] + [["is", "a", "of"]]
    chosen = [next(k for k, w in enumerate(one.words) if w.kind == "shape") for one in aligned[:2]] + [0, 1]
    words[2][0] = captions[2].split()[0]
    found = spoken_of(model, samples, captions, words, chosen)
    for row, instances in enumerate(truth.instances for truth in samples.known):
        assert found.masks["caption"][row].sum() == (instances > 0).sum()
    for row in (0, 1):
        own = np.isin(samples.known[row].instances, [k + 1 for k in aligned[row].words[chosen[row]].objects])
        if not samples.known[row].has_twins:
            np.testing.assert_array_equal(found.masks["word"][row], own)
    assert found.aligned["caption"].tolist() == [True, True, True, False]
    assert found.aligned["word"][[0, 1, 3]].tolist() == [True, True, False]
    assert found.judged("caption").all() and not found.judged("word")[3]


def test_reports_on_captions(captioner):
    model, samples = captioner
    options = {
        "chunk": 2, "batch_size": 50, "seed": 2, "scores": ("removal",), "planted": True,
        "decoding": Decoding("greedy", max_length=6),
    }  # fmt: skip
    report = caption_report(model, samples, METHODS, **options)
    for test in ("caption", "word"):
        assert report.tested["removal"][test].values.methods == METHODS + PLANTED_NAMES
        assert report.tested["removal"][test].curves.methods == METHODS
    assert tuple(report.explanations) == tuple(report.localisation) == METHODS
    assert "planted" not in str([report.numbers(0.95, 0), report.scalars()])
    parts = [caption_report(model, samples.part(Share(k, 2)), METHODS, **options) for k in (0, 1)]
    joined = CaptionReport.together(samples, parts)
    judged, again = (one.judged(0.9, 0) for one in (report, joined))
    assert judged["caption"]["samples"] == 4 and judged == again
    plain = caption_report(model, samples, METHODS, **options | {"planted": False})
    with pytest.raises(UserError, match="planted: the report was made without"):
        plain.judged(0.9, 0)
    object.__setattr__(samples, "known", [None, *samples.known[1:]])
    with pytest.raises(UserError, match="planted: of 1 of 4 images it is not known"):
        caption_report(model, samples, METHODS, **options)
