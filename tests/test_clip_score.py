"""CLIPScore and RefCLIPScore: by hand, and with the embeddings of a CLIP."""

import math

import pytest
import torch
from support.tiny_models import CONTEXT_LENGTH, VOCABULARY, clip_config, images

from clipmapper.evaluation.captions.clip_score import ClipScore, clip_score, ref_clip_score
from clipmapper.models.encoder import ClipEncoder

IMAGES = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
# Cosines with the images 0.6, -1 and 1.
CAPTIONS = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 0.5]])
# Best cosines with the captions 0.96 (of 0.8 and 0.96), 1, and -1.
REFERENCES = [
    torch.tensor([[0.0, 2.0], [0.8, 0.6]]),
    torch.tensor([[-3.0, 0.0]]),
    torch.tensor([[0.0, -1.0]]),
]


def test_by_hand():
    torch.testing.assert_close(clip_score(IMAGES, CAPTIONS), torch.tensor([1.5, 0.0, 2.5]))
    expected = torch.tensor([2 * 1.5 * 0.96 / (1.5 + 0.96), 0.0, 0.0])
    torch.testing.assert_close(ref_clip_score(IMAGES, CAPTIONS, REFERENCES), expected)


def test_lengths_of_embeddings_do_not_matter_and_half_precision_is_not_added_up_in():
    scaled = clip_score(IMAGES * 7, CAPTIONS * 0.1)
    torch.testing.assert_close(scaled, clip_score(IMAGES, CAPTIONS))
    assert clip_score(IMAGES.half(), CAPTIONS.half()).dtype == torch.float32


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match="references for 2 samples"):
        ref_clip_score(IMAGES, CAPTIONS, REFERENCES[:2])
    with pytest.raises(ValueError, match="at least one reference"):
        ref_clip_score(IMAGES, CAPTIONS, [*REFERENCES[:2], torch.zeros(0, 2)])
    with pytest.raises(ValueError, match="references=True"):
        ClipScore(references=True).update(IMAGES, CAPTIONS)
    with pytest.raises(ValueError, match="references=True"):
        ClipScore().update(IMAGES, CAPTIONS, REFERENCES)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_is_the_mean():
    metric = ClipScore(references=True)
    assert all(math.isnan(score) for score in metric.compute().values())
    metric.update(IMAGES[:1], CAPTIONS[:1], REFERENCES[:1])
    metric.update(IMAGES[1:], CAPTIONS[1:], REFERENCES[1:])
    assert metric.compute()["clip_score"].item() == pytest.approx(4 / 3)
    assert metric.compute()["ref_clip_score"].item() == pytest.approx(1.170732 / 3, abs=1e-6)
    assert set(ClipScore().compute()) == {"clip_score"}


def test_with_the_embeddings_of_an_encoder(tmp_path):
    """`ClipEncoder.embeddings` gives what the scores take; an image compared with itself gives 2.5."""
    torch.manual_seed(0)
    encoder = ClipEncoder(clip_config(tmp_path)).double().eval()
    ids = torch.randint(1, VOCABULARY, (3, CONTEXT_LENGTH))
    image, text = encoder.embeddings(images(3), ids)
    expected = 2.5 * (image * text).sum(dim=-1).clamp(min=0)
    torch.testing.assert_close(clip_score(image, text), expected)
    torch.testing.assert_close(clip_score(image, image), torch.full_like(expected, 2.5))
