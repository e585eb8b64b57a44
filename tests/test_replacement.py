"""What stands in the place of patches and words that are replaced, to the pixel and to the token."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from support import tiny_models, training_models

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.replacement import (
    REPLACEMENTS,
    blurred,
    mean_patches,
    other_words,
    patches_replaced,
)
from clipmapper.tasks.replaced import Replacing, replacing
from clipmapper.tasks.vqa.samples import question_samples
from clipmapper.tasks.vqa.subject import AnswerSubject
from clipmapper.training.explained import others_of
from clipmapper.training.processes import Share


def random_images(count, height, width, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed)).double()


# Pixels


def test_pixels_of_kept_patches_stay_to_the_bit():
    """2 × 2 patches of 2 × 3 pixels; what is left over at the far edges goes with the last ones."""
    images, filler = random_images(2, 5, 7), random_images(2, 5, 7, seed=1)
    found = patches_replaced(images, filler, torch.tensor([[1, 2], [0, 3]]), (2, 2))
    for row, kept in enumerate(({1, 2}, {0, 3})):
        for y in range(5):
            for x in range(7):
                patch = 2 * (y >= 2) + (x >= 3)
                source = images if patch in kept else filler
                assert torch.equal(found[row, :, y, x], source[row, :, y, x])
    assert torch.equal(patches_replaced(images, filler, torch.zeros(2, 0, dtype=torch.long), (2, 2)), filler)
    assert torch.equal(patches_replaced(images, filler, torch.arange(4).expand(2, 4), (2, 2)), images)


def test_patches_are_numbered_row_by_row():
    """(Two rows of three: their numbers and their transposed ones differ.)"""
    images, filler = torch.zeros(2, 3, 4, 6), torch.ones(2, 3, 4, 6)
    found = patches_replaced(images, filler, torch.tensor([[1], [3]]), (2, 3))
    assert (found[0] == 0).nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert (found[1] == 0).nonzero()[:, 1:].unique(dim=0).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


def test_the_mean_patch_by_hand():
    images = random_images(2, 5, 6)
    found = mean_patches(images, (2, 3))  # patches of 2 × 2
    for y in range(2):
        for x in range(2):
            pixel = images[:, :, [y, y + 2]][..., [x, x + 2, x + 4]].mean(dim=(2, 3))
            for row in (0, 2):
                for column in (0, 2, 4):
                    torch.testing.assert_close(found[:, :, row + y, column + x], pixel)
    assert torch.equal(found[:, :, 4], images[:, :, 4])  # no patch reads it


def test_the_token_of_the_mean_patch_is_the_mean_token():
    tower = torch.nn.Conv2d(3, 5, 4, stride=4).double()
    images = random_images(2, 12, 12)
    tokens, of_mean = tower(images).flatten(2), tower(mean_patches(images, (3, 3))).flatten(2)
    torch.testing.assert_close(of_mean, tokens.mean(dim=2, keepdim=True).expand_as(tokens))


@pytest.mark.parametrize(("grid", "sigma", "reach"), [((3, 3), 4, 8), ((2, 4), 6, 11)])
def test_the_blur_is_a_gaussian_as_wide_as_a_patch(grid, sigma, reach):
    """Two standard deviations of it, or as far as an image of 12 pixels can be mirrored."""
    images = random_images(2, 12, 12)
    expected = images.numpy()
    for axis in (2, 3):
        expected = gaussian_filter1d(expected, sigma, axis=axis, mode="mirror", radius=reach)
    np.testing.assert_allclose(blurred(images, grid).numpy(), expected, rtol=1e-6, atol=1e-6)


# Words


def test_words_of_another_text_by_hand():
    """Start 1, end 2, padding 0; five places for three words, two for three, three for none."""
    ids = torch.tensor([[1, 11, 12, 13, 14, 15, 2], [1, 21, 22, 2, 0, 0, 0], [1, 31, 32, 33, 2, 0, 0]])
    removable = ids > 2
    other = torch.tensor([[1, 7, 8, 9, 2, 0], [1, 7, 8, 9, 2, 0], [1, 2, 0, 0, 0, 0]])
    assert other_words(ids, removable, other, other > 2).tolist() == [
        [1, 7, 8, 9, 7, 8, 2],
        [1, 7, 8, 2, 0, 0, 0],
        [1, 31, 32, 33, 2, 0, 0],
    ]


@pytest.mark.parametrize("tower", tiny_models.TEXT_TOWERS)
@torch.no_grad()
def test_words_are_the_mean_of_all(tmp_path, tower):
    """As by a tower whose vocabulary has a word that is the mean of all."""
    encoder = tiny_models.clipmapper(tmp_path, text_tower=tower).encoder
    text = tiny_models.texts((7, 4, 9))
    text = replace(text, ids=text.ids.clamp(max=37))
    images = tiny_models.images(3)
    others = Replacing(encoder, images, images, text)
    sample = torch.tensor([2, 0, 2, 1])
    keep = torch.tensor([[0, 2, 5, 8], [0, 1, 6, -1], [0, 8, -1, -1], [0, 1, 2, 3]])
    found = others.text_tokens(sample, keep)
    with_word = copy.deepcopy(encoder)
    embedding = with_word.text_tower.owner.token_embedding.weight
    embedding[38] = encoder.text_tower.owner.token_embedding.weight.mean(dim=0)
    ids = text.ids[sample].clone()
    for row, kept in enumerate(keep.tolist()):
        for place in range(ids.shape[1]):
            if text.valid[sample[row], place] and place not in kept:
                ids[row, place] = 38
    assert (ids == 38).sum() == 5 + 4 + 7 + 0
    torch.testing.assert_close(found, with_word.text_tokens(ids, text.valid[sample]))
    # Nothing is left behind, whatever happens.
    whole = encoder.text_tokens(text.ids, text.valid)
    torch.testing.assert_close(whole[1], found[3])
    with pytest.raises(IndexError):
        Replacing(encoder, images, images, replace(text, ids=text.ids + 100)).text_tokens(sample, keep)
    assert torch.equal(encoder.text_tokens(text.ids, text.valid), whole)


@torch.no_grad()
def test_words_are_another_text_s(tmp_path):
    encoder, text = tiny_models.clipmapper(tmp_path).encoder, tiny_models.texts((7, 4, 9))
    words, images = tiny_models.texts((9, 9, 9), seed=1).ids, tiny_models.images(3)
    others = Replacing(encoder, images, images, text, words)
    found = others.text_tokens(torch.tensor([0]), torch.tensor([[0, 2, 3, 6]]))
    ids = text.ids[:1].clone()
    ids[0, [1, 4, 5]] = words[0, [1, 4, 5]]
    torch.testing.assert_close(found, encoder.text_tokens(ids, text.valid[:1]))


# Of samples


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = training_models.tiny_model(training_models.tiny_clip(tmp_path_factory.mktemp("clip")))
    return model.double().eval()


@pytest.fixture(scope="module")
def samples(model):
    found = question_samples(model, training_models.small_scenes(), "validation", 6, seed=0)
    return replace(found, images=found.images.double(), all_images=found.all_images.double())


def test_others_are_of_another_image():
    assert others_of(["a", "a", "b", "a", "c"]) == [2, 2, 3, 4, 0]
    assert others_of(["a", "a"]) == [-1, -1] and others_of(["a"]) == [-1] and others_of([]) == []


def test_what_is_taken_is_of_the_samples(model, samples):
    encoder, rows = model.encoder, torch.tensor([4, 1])
    mean, std = encoder.clip.visual.image_mean, encoder.clip.visual.image_std
    found = {
        kind: replacing(kind, encoder, samples, rows, samples.text[rows], samples.text)
        for kind in REPLACEMENTS
    }
    images = samples.images[rows]
    assert all(torch.equal(its.images, images) for its in found.values())
    assert [kind for kind, its in found.items() if its.words is not None] == ["other"]
    torch.testing.assert_close(found["mean"].patches, mean_patches(images, encoder.grid))
    torch.testing.assert_close(found["blur"].patches, blurred(images, encoder.grid))
    for channel in range(3):
        grey = (128 / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(
            found["grey"].patches[:, channel].double(), torch.full((2, 72, 72), grey).double()
        )
    for row, sample in enumerate((4, 1)):
        other = samples.others[sample]
        assert samples.known[other].scene is not samples.known[sample].scene
        assert torch.equal(found["other"].patches[row], samples.images[other])
        words = samples.text.ids[other][samples.text.removable[other]].tolist()
        own = samples.text.removable[sample]
        taken = found["other"].words[row][own].tolist()
        assert taken == (words * len(taken))[: len(taken)]
        assert torch.equal(found["other"].words[row][~own], samples.text.ids[sample][~own])
        # The background is the picture to the bit where no object is near, and differs where one is.
        truth, there = samples.known[sample], found["background"].patches[row].double()
        differs = (there != images[row]).any(dim=0).numpy()
        assert differs[truth.instances > 0].mean() > 0.9 and 0 < differs.mean() < 0.8
        # An edge is soft: half of a pixel is not yet an object's, but is painted.
        near = np.zeros_like(differs)
        for y, x in np.argwhere(truth.instances > 0):
            near[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = True
        assert not differs[~near].any()


def test_a_part_of_the_samples_takes_from_all(model, samples):
    """A process has the second half, and patches and words that are in the first."""
    part = samples.part(Share(1, 2))
    assert len(part) == 3 and torch.equal(part.all_images, samples.images)
    rows = torch.tensor([0, 2])
    found = replacing("other", model.encoder, part, rows, part.text[rows], part.all_text)
    whole = replacing("other", model.encoder, samples, rows + 3, samples.text[rows + 3], samples.text)
    assert torch.equal(found.patches, whole.patches) and torch.equal(found.words, whole.words)
    assert min(samples.others[3:]) < 3


def test_what_there_is_not_is_one_line(model, samples):
    rows = torch.arange(2)
    elsewhere = replace(samples, known=[None] * 6)
    alone = replace(samples, others=[-1] * 6)
    for kind, its, said in (
        (
            "background",
            elsewhere,
            r"^scores: replace_background needs .* only the built-in world has; others",
        ),
        ("other", alone, r"^scores: replace_other takes patches of another image, .* of the same one$"),
    ):
        with pytest.raises(UserError, match=said) as error:
            replacing(kind, model.encoder, its, rows, its.text[rows], its.text)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", REPLACEMENTS)
@torch.no_grad()
def test_answers_are_those_to_the_pictures_and_questions_put_together(model, samples, kind):
    answers = model(samples.images, samples.text).argmax(dim=1)
    rows = range(2, 5)
    subject = AnswerSubject(model, samples, rows, ("gae",), answers=answers[2:5], seed=0)
    scorer = subject.scorer(kind)
    whole = scorer.unperturbed(2)
    logits = model(samples.images[2:5], samples.text[2:5])
    np.testing.assert_allclose(whole[:, 1], logits.softmax(1).max(dim=1).values, rtol=1e-6)
    others = replacing(kind, model.encoder, samples, torch.tensor(rows), samples.text[2:5], samples.text)
    keep, sample = torch.tensor([[0, 4, 8], [1, 2, 3], [5, 6, 7]]), np.array([2, 0, 2])
    pictures = patches_replaced(others.images[sample], others.patches[sample], keep, model.encoder.grid)
    logits = model(pictures, samples.text[2:5][torch.from_numpy(sample)])
    expected = logits.softmax(1).gather(1, answers[2:5][sample][:, None])[:, 0]
    np.testing.assert_allclose(scorer.score(sample, keep, None)[:, 1], expected, rtol=1e-6)
    truth = samples.targets[2:5][sample].gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    assert scorer.score(sample, keep, None)[:, 0].tolist() == truth.tolist()
    if others.words is not None:
        ends = [int(its.sum()) - 1 for its in samples.text.valid[2:5]]
        kept = torch.tensor([[0, 1, ends[1]]])
        ids = others.words[1:2].clone()
        ids[0, 1] = samples.text.ids[3, 1]
        logits = model(samples.images[3:4], replace(samples.text[3:4], ids=ids))
        found = scorer.score(np.array([1]), None, kept)[0, 1]
        assert found == pytest.approx(float(logits.softmax(1)[0, answers[3]]), rel=1e-6)
