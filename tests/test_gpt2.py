"""GPT-2 as a second decoder of captions: built, read from a folder, trained, decoded, explained, saved."""

import json

import numpy as np
import pytest
import torch
from support import caption_models, training_models
from support.slow import once_each
from support.training_models import same_bits
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import clipmapper
from clipmapper.errors import UserError
from clipmapper.models.exported import DESCRIPTION
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.explain import explain_captions
from clipmapper.tasks.captioning.model import caption_loss
from clipmapper.training.module import adamw

SIZES = {"path": None, "layers": 2, "width": 24, "heads": 3, "frozen": False}
CAPTIONS = ["a red ring left of a blue square", "two objects: a cross and a ring", "just a cross"]
CASES = [(m, d) for m in ("dual_flow", "single_flow") for d in ("gpt2_prefix", "gpt2_cross")]
IMAGES = torch.randn(3, 3, 72, 72, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory) -> str:
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local GPT-2 with its own tokenizer, as ``save_pretrained`` leaves them."""
    return local_gpt2(tmp_path_factory.mktemp("gpt2"))


def local_gpt2(folder, positions: int = 40):
    trained = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    trained.train_from_iterator(CAPTIONS * 3, vocab_size=300, min_frequency=1, special_tokens=[end])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token=end, eos_token=end, unk_token=end
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=300, n_positions=positions, n_embd=12, n_layer=2, n_head=2, attn_pdrop=0.5)
    model = GPT2LMHeadModel(config)
    training_models.spread_out(model.requires_grad_(False), 4)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def captioner(architecture, *, mapper="dual_flow", decoder="gpt2_prefix", gpt2=SIZES, **settings):
    said = CAPTIONS if settings.get("vocabulary") == "data" else None
    model = caption_models.captioner(
        architecture, said=said, mapper=mapper, decoder=decoder, gpt2=gpt2, **settings
    )
    for part in (model.decoder.read_text, model.decoder.read_image):  # the first begins at 0
        part.weight.copy_(torch.randn_like(part.weight) * part.weight.shape[1] ** -0.5)
    if gpt2["path"] is None:
        training_models.spread_out(model.decoder.language_model, 5)
    return model


def from_folder(architecture, folder, decoder, **settings):
    gpt2 = SIZES | {"path": str(folder), "frozen": settings.pop("frozen", False)}
    return captioner(architecture, decoder=decoder, gpt2=gpt2, text_embedding_only=True, **settings)


@pytest.fixture(params=once_each(CASES, as_one=True), ids=" ".join, scope="module")
def model(request, architecture):
    mapper, decoder = request.param
    return captioner(architecture, mapper=mapper, decoder=decoder, vocabulary="data")


@pytest.fixture(params=["gpt2_prefix", "gpt2_cross"], scope="module")
def own_tokens(request, architecture, folder):
    """With GPT-2's own tokenizer."""
    return from_folder(architecture, folder, request.param)


@torch.no_grad()
def check_decoding(model):
    tokens = model.encoder.image_tokens(IMAGES)
    keep = torch.tensor([[0, 2, 3, 7]]).expand(3, -1)
    kept = model.encoder.image_tokens(IMAGES, keep=keep)
    beam = Decoding("beam", beams=3, captions=2, max_length=6, no_repeat_ngram=2)
    words = set()
    for how in (
        Decoding("greedy", max_length=8, no_repeat_ngram=1),
        beam,
        Decoding("nucleus", max_length=6, seed=3),
    ):
        written = write_captions(model, tokens, how)
        assert write_captions(model, tokens, how, use_cache=False).texts == written.texts
        words.update(word for texts in written.texts for text in texts for word in text.split())
        if how.method != "nucleus":  # which draws from one generator for the whole batch
            alone = [write_captions(model, tokens[i : i + 1], how).texts[0] for i in range(3)]
            assert tuple(alone) == written.texts
        some = write_captions(model, kept, how, keep=keep)
        assert write_captions(model, kept, how, keep=keep, use_cache=False).texts == some.texts
    assert len(words) > 3


def test_decoding_identities(model):
    check_decoding(model)


def test_decoding_identities_with_its_own_tokenizer(own_tokens):
    check_decoding(own_tokens)


@torch.no_grad()
def test_logits(model):
    """No word knows of later ones, ignored patches are as removed ones, and images may be shared."""
    text = model.tokenize(CAPTIONS)
    logits = model(IMAGES, text)
    changed = text.ids.clone()
    changed[:, 4:] = model.ends.end
    cut = model(IMAGES, type(text)(changed, text.valid, text.removable))
    torch.testing.assert_close(cut[:, :4], logits[:, :4], rtol=0, atol=1e-10)
    assert not torch.allclose(cut[0, 5], logits[0, 5])
    keep = torch.tensor([[0, 2, 3, 7]]).expand(3, -1)
    ignore = torch.ones(3, 9, dtype=torch.bool).scatter(1, keep, False)
    removed = model(IMAGES, text, image_keep=keep)
    said = text.valid
    torch.testing.assert_close(removed[said], model(IMAGES, text, image_ignore=ignore)[said])
    alone = model(IMAGES[:1], model.tokenize(CAPTIONS[0]), image_keep=keep[:1])  # no padding, so no mask
    torch.testing.assert_close(alone[0], removed[0, : alone.shape[1]])
    assert (removed - logits)[said].nan_to_num().abs().max() > 0.1
    image_tokens, words = model.encoder.image_tokens(IMAGES), model.text_tokens(text.ids, text.valid)
    shared = model.caption_logits(image_tokens[:1], words, text.valid, known_only=True)
    each = model.caption_logits(image_tokens[:1].expand(3, -1, -1), words, text.valid, known_only=True)
    torch.testing.assert_close(shared[said], each[said])


def test_checkpoint_rebuilds_it(model, tmp_path):
    check_checkpoint(model, tmp_path)


def test_checkpoint_holds_the_local_tokenizer_too(architecture, tmp_path):
    gone = local_gpt2(tmp_path / "gpt2")
    model = from_folder(architecture, gone, "gpt2_cross")
    for file in gone.iterdir():
        file.unlink()
    loaded = check_checkpoint(model, tmp_path)
    assert loaded.tokenizer.tokenizer.decode(loaded.tokenize("just a cross").ids[0, 1:-1]) == "just a cross"


def check_checkpoint(model, tmp_path):
    path = tmp_path / "captioner.ckpt"
    state = {f"model.{name}": value.float() for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, DESCRIPTION: model.description}, path)
    loaded = clipmapper.load(path).double()
    assert same_bits(
        {k: v.float() for k, v in model.state_dict().items()},
        {k: v.float() for k, v in loaded.state_dict().items()},
    )
    picture = caption_models.picture()
    how = Decoding("greedy", max_length=8)
    assert loaded.float().caption(picture, how) == rounded(model).caption(picture, how)
    assert loaded.longest == model.longest
    return loaded


def rounded(model):
    """The same in float32, as a checkpoint has it; the model itself stays."""
    import copy

    return copy.deepcopy(model).float()


def steps(model, count=2):
    model.train()
    optimiser = adamw(model, 1e-2, 0.0)
    text = model.tokenize(CAPTIONS)
    for _ in range(count):
        words = model.text_tokens(text.ids, text.valid)
        loss = caption_loss(model.caption_logits(model.encoder.image_tokens(IMAGES), words, text.valid), text)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return loss.item()


@pytest.mark.parametrize("decoder", ["gpt2_prefix", "gpt2_cross"])
def test_a_frozen_gpt2_stays_as_it_was_and_its_new_cross_attention_trains(architecture, folder, decoder):
    model = from_folder(architecture, folder, decoder, frozen=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    inside = {n for n in changed if n.startswith("decoder.language_model")}
    assert all("crossattention" in n or "ln_cross_attn" in n for n in inside)
    assert bool(inside) == (decoder == "gpt2_cross")
    assert {"decoder.read_image.weight", "decoder.read_text.weight"} < changed
    assert any(n.startswith("mapper.blocks.0.text_") for n in changed)
    assert not model.train().decoder.language_model.training  # its dropout is off
    pretrained = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    own = model.decoder.language_model.state_dict()
    assert all(torch.equal(own[name].float(), value) for name, value in pretrained.items())


def test_a_gpt2_that_is_trained_changes_and_learns(architecture, folder):
    model = from_folder(architecture, folder, "gpt2_prefix")
    before = model.decoder.gpt2.h[0].attn.c_attn.weight.clone()
    first = steps(model, 1)
    assert steps(model, 8) < first - 0.5
    assert not torch.equal(model.decoder.gpt2.h[0].attn.c_attn.weight, before)


def test_a_pretrained_gpt2_begins_as_it_was(architecture, folder):
    """Through cross-attention nothing but what that adds is new: without it the words are GPT-2's own."""
    gpt2 = SIZES | {"path": str(folder)}
    model = caption_models.captioner(architecture, decoder="gpt2_cross", gpt2=gpt2, text_embedding_only=True)
    with torch.no_grad():
        for block in model.decoder.gpt2.h:
            block.crossattention.c_proj.weight.zero_()
        text = model.tokenize(CAPTIONS[0])
        own = GPT2LMHeadModel.from_pretrained(folder).double().eval()(text.ids, use_cache=False).logits
        torch.testing.assert_close(model(IMAGES[:1], text), own)


def test_every_word_is_explained(model):
    check_explanation(model, "a red ring left of a blue square")


def test_every_word_is_explained_with_its_own_tokenizer(own_tokens):
    caption = "a red ring left of a blue square"
    check_explanation(own_tokens, caption, ("weighted", "gae"))
    # GPT-2 adds its own embedding of a word to the mapper's: replacing what attention reads is not all of it.
    with pytest.raises(UserError, match="occlusion: the tokens of stream 'text' can't be replaced"):
        check_explanation(own_tokens, caption, ("occlusion",))


def check_explanation(model, caption, methods=("weighted", "gae", "occlusion")):
    picture, model = caption_models.picture(), rounded(model)
    found = explain_captions(model, picture, methods=methods, caption=caption)
    for explanation in found:
        assert explanation.words == tuple(caption.split())
        # For occlusion, and where every gradient × attention is negative, a word may owe the image nothing.
        assert np.isfinite(explanation.maps).all() and explanation.maps.any(axis=(1, 2)).mean() > 0.5
        assert not np.triu(explanation.word_matrix, 1).any()
        assert np.tril(explanation.word_matrix, -1)[1:].any()
    one = explain_captions(model, picture, methods=methods, caption=caption, word="ring")
    for explanation, alone in zip(found, one, strict=True):
        np.testing.assert_allclose(explanation.maps[2], alone.maps[0], rtol=1e-3, atol=1e-5)


def test_what_is_wrong_with_a_folder_is_said(architecture, folder, tmp_path):
    def build(path, decoder="gpt2_cross", **settings):
        gpt2 = SIZES | {"path": str(path)}
        return caption_models.captioner(
            architecture, decoder=decoder, gpt2=gpt2, **({"text_embedding_only": True} | settings)
        )

    with pytest.raises(UserError, match=r"model.gpt2.path=.*nowhere: no such folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no readable config\.json"):
        build(tmp_path)
    for file in folder.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no tokenizer files in it"):
        build(tmp_path)
    with pytest.raises(UserError, match="text_embedding_only=true"):
        build(folder, text_embedding_only=False)
    short = local_gpt2(tmp_path / "short", positions=11)
    with pytest.raises(UserError, match="11 positions have no room for 10 image tokens"):
        build(short, decoder="gpt2_prefix")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    with pytest.raises(UserError, match="of the kind 'opt'"):
        build(short)
    (short / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(UserError, match="its weights lack"):
        build(short)
    (short / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable GPT-2"):
        build(short)
    with pytest.raises(UserError, match="must be null or one of gpt2_prefix, gpt2_cross"):
        build(folder, decoder="gpt3")
