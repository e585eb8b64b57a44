"""Infidelity and sensitivity by captum, against what is written down here, on the same random numbers."""

import sys

import numpy as np
import pytest
import torch
from support.made_subjects import MadeSubject, any_certainty

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores import captum_scores
from clipmapper.evaluation.explanation_scores.captum_scores import infidelity, require_captum, sensitivity
from clipmapper.evaluation.explanation_scores.chosen import check_scores
from clipmapper.evaluation.explanation_scores.values import LOW
from clipmapper.evaluation.perturbation import ModalityRelevance

RUN = {"batch_size": 7, "seed": 3}


def test_infidelity_by_hand(monkeypatch):
    """0.2 and 0.4 a patch; removed are {0}, {1}, both and none. Twice that is as good; 1, 0 is best scaled by
    (0.2 + 0.6) / 2 = 0.4 and misses by −0.2, 0.4, 0.2, 0; nothing by all."""
    gone = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    monkeypatch.setattr(captum_scores, "_SUBSETS", 4)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: 1.0 - gone.double())
    worth = np.array([0.2, 0.4])
    subject = MadeSubject(
        lambda sample, patches, words: worth[list(patches)].sum(), grid=(1, 2), modalities=("image",)
    )
    maps = {"right": [worth], "twice": [2 * worth], "first": [[1.0, 0.0]], "none": [[0.0, 0.0]]}
    found = infidelity(subject, {name: subject.relevance(its) for name, its in maps.items()}, **RUN)
    expected = [0, 0, (0.04 + 0.16 + 0.04) / 4, (0.04 + 0.16 + 0.36) / 4]
    assert found.of("image")[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
    assert [(one.name, one.better) for one in found.quantities] == [("image", LOW)]


def test_infidelity_against_naive_code():
    """Both modalities, texts of several lengths; the sets are the same for all methods."""
    words = (3, 2, 0)
    subject = MadeSubject(any_certainty(0, 3, 6, 3), words=words, grid=(2, 3))
    maps = {"a": subject.drawn(0, like=5), "b": subject.drawn(1, like=7)}
    found = infidelity(subject, maps, **RUN)
    forwards = subject.scorers[0].forwards
    assert sum(forwards) <= 3 + 2 * 3 * 51 and max(forwards) <= RUN["batch_size"]  # once, not once a method
    every = frozenset(range(6))
    for i, (modality, width) in enumerate((("image", 6), ("text", 5))):
        generator = torch.Generator().manual_seed(RUN["seed"])
        gone = (torch.rand(3 * 50, width, generator=generator, dtype=torch.float64) < 0.5).view(3, 50, width)
        for k, relevance in enumerate(maps.values()):
            for row, many in enumerate(words):
                all_words = frozenset(range(many))
                its = getattr(relevance, modality)[row].numpy()
                told, lost = [], []
                for one in gone[row].numpy():
                    if modality == "text":
                        one = one & subject.removable_text[row].numpy()
                        left = every, all_words - {int(place) - 1 for place in np.flatnonzero(one)}
                    else:
                        left = every - set(np.flatnonzero(one).tolist()), all_words
                    told.append(its[one].sum())
                    lost.append(subject._certainty(row, every, all_words) - subject._certainty(row, *left))
                told, lost = np.array(told), np.array(lost)
                factor = (told @ lost) / (told @ told) if told.any() else 0
                expected = ((factor * told - lost) ** 2).mean()
                assert found.values[i, k, row] == pytest.approx(expected, abs=1e-12)
    again, other = infidelity(subject, maps, **RUN), infidelity(subject, maps, batch_size=50, seed=4)
    assert (again.values == found.values).all() and not np.allclose(other.values[0], found.values[0])


def explaining(subject):
    """One map is linear in the pixels, one does not see them; each needs a gradient, which captum forbids."""

    def maps(images):
        assert torch.is_grad_enabled() and images.shape == subject.images.shape
        pixels = images.clone().requires_grad_()
        square = (pixels.double() ** 2).sum() / 2
        (gradient,) = torch.autograd.grad(square, pixels)
        seen = gradient.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(1, 4, 5)).flatten(1).double()
        text = torch.zeros(subject.text_valid.shape)
        still = torch.ones_like(seen)
        found.append(seen)
        return {
            name: ModalityRelevance(its, text)
            for name, its in (("seen", seen), ("still", still), ("nothing", 0 * seen))
        }

    found: list[torch.Tensor] = []
    return maps, found


def test_sensitivity_against_naive_code():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=generator)
    subject = MadeSubject(words=(2, 1), images=images)
    subject._explained, known = explaining(subject)
    before = torch.get_rng_state()
    found = sensitivity(subject, subject.maps(), **RUN)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(known) == 1 + 11  # for the maps, and for all methods together: untouched, and ten times noisy
    with torch.random.fork_rng():
        torch.manual_seed(RUN["seed"])
        noise = [torch.FloatTensor(2, 3, 4, 4).uniform_(-0.02, 0.02) for _ in range(10)]
    assert max(float(one.abs().max()) for one in noise) <= 0.02

    def of(pixels):
        return np.array(
            [
                [[float(one[:, y : y + 2, x : x + 2].mean()) for x in (0, 2)] for y in (0, 2)]
                for one in pixels.double()
            ]
        ).reshape(2, 4)

    whole = of(images)
    far = [np.linalg.norm(of(images + one) - whole, axis=1) / np.linalg.norm(whole, axis=1) for one in noise]
    assert found.of("max")[0].tolist() == pytest.approx(np.max(far, axis=0), rel=1e-4)
    assert found.of("max")[1:].tolist() == [[0, 0], [0, 0]]
    assert (np.max(far, axis=0) > np.mean(far, axis=0) + 1e-6).all()
    again = sensitivity(subject, subject.maps(), **RUN)
    other = sensitivity(subject, subject.maps(), batch_size=7, seed=4)
    assert (again.values == found.values).all() and (other.of("max")[0] != found.of("max")[0]).all()
    assert [(one.name, one.better) for one in found.quantities] == [("max", LOW)]


def test_a_map_that_comes_out_of_nothing():
    """The norm of a map of zeros counts as 1."""
    subject = MadeSubject()
    text = torch.zeros(1, 4)
    calls = []

    def maps(images):
        calls.append(1)
        return {"a": ModalityRelevance(torch.full((1, 4), 0.5 * (len(calls) == 4)), text)}

    subject._explained = maps
    found = sensitivity(subject, {"a": ModalityRelevance(torch.zeros(1, 4), text)}, **RUN)
    assert found.of("max").item() == 1  # four times ½


def test_without_captum_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    for asks in (require_captum, lambda: check_scores(["removal", "sensitivity"], ("image",))):
        with pytest.raises(UserError, match=r"^scores: .*pip install 'clipmapper\[captum\]'$") as error:
            asks()
        assert "\n" not in str(error.value)
    check_scores(["removal", "adcc"], ("image",))
