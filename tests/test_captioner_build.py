"""Captioners from settings, their checkpoints, and heads that know only some of the tokens."""

import math
from pathlib import Path

import pytest
import torch
from support import training_models
from support.slow import mostly_slow
from support.training_models import same_bits

import clipmapper
from clipmapper.errors import UserError
from clipmapper.models.exported import DESCRIPTION
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.build import build_captioner
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.head import CaptionHead, TiedCaptionHead, caption_vocabulary
from clipmapper.tasks.captioning.model import caption_loss

CAPTIONS = ("a red ring left of a blue square", "two objects: a small cross, a green triangle and a ring")
SETTINGS = {
    "mapper": "dual_flow",
    "width": 16,
    "depth": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "image_position_embedding": True,
    "tied_head": False,
    "text_embedding_only": False,
    "vocabulary": "data",
}
VARIANTS = {
    "plain": {},
    "single flow, tied": {"mapper": "single_flow", "tied_head": True},
    "tied, same width": {"width": 12, "tied_head": True},
    "every token": {"vocabulary": "tokenizer"},
    "no text tower": {"text_embedding_only": True},
}


def tiny_captioner(architecture: str, **settings):
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    torch.manual_seed(0)
    model = build_captioner(encoder, SETTINGS | settings, captions=CAPTIONS)
    training_models.spread_out(model.encoder.clip, 0)
    return model.eval()


@pytest.fixture
def architecture(tmp_path) -> str:
    return training_models.tiny_clip(tmp_path)


def test_vocabulary_is_what_captions_are_written_with(architecture):
    model = tiny_captioner(architecture)
    tokenizer, end = model.encoder.tokenizer, model.ends.end
    tokens = caption_vocabulary(tokenizer, CAPTIONS)
    words = sorted(set(" ".join(CAPTIONS).replace(":", " :").replace(",", " ,").split(" ")))
    assert tokens == sorted({end, *(tokenizer.encode(word)[0] for word in words)})
    assert model.head.known == len(tokens) == len(words) + 1
    assert model.head.tokens.tolist() == tokens


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ["single flow, tied"]))
def test_checkpoint_rebuilds_the_captioner(architecture, tmp_path, variant):
    """Nothing but the file is needed: the configuration of CLIP that was given as a file is gone."""
    model = tiny_captioner(architecture, **VARIANTS[variant])
    path = tmp_path / "captioner.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, DESCRIPTION: model.description}, path)
    _ = model.encoder.tokenizer  # read by the file as well
    Path(architecture).unlink()
    loaded = clipmapper.load(path)
    assert type(loaded) is type(model) and not loaded.training
    assert same_bits(dict(model.state_dict()), dict(loaded.state_dict()))
    assert type(loaded.head) is type(model.head) and loaded.head.known == model.head.known
    assert loaded.text_embedding_only == model.text_embedding_only
    assert loaded.description == model.description
    described = loaded.description
    assert (described["task"], described["tokenizer"]) == ("captioning", "tiny-scenes-clip-for-tests")
    text = model.tokenize(CAPTIONS)
    images = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(images, text), loaded(images, text))
    picture = training_models.small_scenes().validation[0].image.pixels
    decodings = (None, Decoding("greedy"), Decoding("beam", beams=3), Decoding("nucleus", seed=3))
    said = [loaded.caption(picture, decoding) for decoding in decodings]
    assert said == [model.caption(picture, decoding) for decoding in decodings]
    assert all(said) and len(set(said)) > 1


@pytest.mark.parametrize("tied", [False, True])
def test_head_of_some_tokens_is_the_whole_head_without_the_others(tied):
    torch.manual_seed(0)
    tokens, width = [2, 5, 6, 11], 8
    embedding = torch.nn.Embedding(12, 6)

    def head(known):
        return TiedCaptionHead(width, embedding, known) if tied else CaptionHead(width, 12, known)

    every, some = head(None), head(tokens)
    if tied:
        some.project.load_state_dict(every.project.state_dict())
        torch.nn.init.normal_(every.bias)
        some.bias.data.copy_(every.bias[tokens])
    else:
        some.layer.load_state_dict({k: v[tokens] for k, v in every.layer.state_dict().items()})
    text = torch.randn(3, 4, width)
    whole, part = every(text), some(text)
    torch.testing.assert_close(part[..., tokens], whole[..., tokens])
    torch.testing.assert_close(some.known_scores(text), whole[..., tokens])
    others = [i for i in range(12) if i not in tokens]
    assert part.shape == (3, 4, 12) and (part[..., others] == -math.inf).all()
    assert some.places(torch.tensor([[11, 2], [6, 5]])).tolist() == [[3, 0], [2, 1]]
    padded = some.places(torch.tensor([5, 0]), wanted=torch.tensor([True, False]))
    assert padded[0] == 1 and padded[1] in range(4)
    for unknown in (0, 3, 12):
        with pytest.raises(UserError, match=f"token {unknown}, which this model cannot say"):
            some.places(torch.tensor([2, unknown]))


def test_loss_over_the_known_tokens_is_the_loss_over_all(architecture):
    """Tokens of probability 0 change no sum: only label smoothing has to know that they are not meant."""
    model = tiny_captioner(architecture)
    text = model.tokenize(CAPTIONS)
    images = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image_tokens = model.encoder.image_tokens(images)
        words = model.text_tokens(text.ids, text.valid)
        known = model.caption_logits(image_tokens, words, text.valid, known_only=True)
        whole = model.caption_logits(image_tokens, words, text.valid)
    assert known.shape[-1] == model.head.known and whole.shape[-1] == 49408
    wanted = text.valid.clone()
    wanted[:, 0] = False  # the start token is never said
    placed = TokenizedText(model.head.places(text.ids, wanted), text.valid, text.removable)
    torch.testing.assert_close(caption_loss(known, placed), caption_loss(whole, text))


def test_captions_are_written_in_the_known_tokens_alone(architecture):
    """As if the head knew all of them and had never meant another one."""
    model = tiny_captioner(architecture)
    images = model.encoder.image_tokens(torch.randn(3, 3, 72, 72, generator=torch.Generator().manual_seed(1)))
    known = set(model.head.tokens.tolist())

    some = model.head

    class Whole(CaptionHead):
        def known_scores(self, text):
            return some(text)

    for decoding in (
        Decoding("greedy"),
        Decoding("beam", captions=3, repetition_penalty=1.3, no_repeat_ngram=2),
        Decoding("nucleus", captions=4, seed=1),
    ):
        for use_cache in (True, False):
            written = write_captions(model, images, decoding, use_cache=use_cache)
            assert set(written.tokens.ids[written.tokens.removable].tolist()) <= known - {model.ends.end}
            if decoding.method != "nucleus":  # which draws other words when there are more to draw from
                model.head = Whole(16, 49408)
                whole = write_captions(model, images, decoding, use_cache=use_cache)
                model.head = some
                assert whole.texts == written.texts


def test_a_clip_that_reads_ahead_needs_the_option(tmp_path):
    from support import tiny_models

    architecture = tiny_models.clip_config(tmp_path, "unmasked")
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    settings = SETTINGS | {"vocabulary": "tokenizer", "image_position_embedding": False}
    with pytest.raises(UserError, match="text_embedding_only=true"):
        build_captioner(encoder, settings)
    assert build_captioner(encoder, settings | {"text_embedding_only": True}).text_embedding_only
