"""Captioning models: causality, padding, words one at a time, and a naive implementation of the mappers."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from support import tiny_models
from support.tiny_models import VOCABULARY

from clipmapper.errors import UserError
from clipmapper.models.mapper import MAPPERS
from clipmapper.models.tokens import TokenizedText, tokenize
from clipmapper.tasks.captioning.head import (
    CaptionEnds,
    CaptionHead,
    TiedCaptionHead,
    caption_ends,
    caption_tokens,
    spell,
    with_ends,
)
from clipmapper.tasks.captioning.model import Captioner, caption_loss

KINDS = tuple(MAPPERS)
VARIANTS = {
    "plain": {},
    "tied": {"tied": True},
    "mapper's class token": {"class_token": True},
    "like CoCa": {"text_tower": "class_token"},
    "like SigLIP, no tower": {"text_tower": "unmasked", "text_embedding_only": True},
}


@pytest.fixture(scope="module", params=[(kind, variant) for kind in KINDS for variant in VARIANTS], ids=str)
def model(request, tmp_path_factory) -> Captioner:
    kind, variant = request.param
    return tiny_models.captioner(tmp_path_factory.mktemp("clip"), kind, **VARIANTS[variant])


@pytest.fixture(params=KINDS)
def plain(request, tmp_path) -> Captioner:
    return tiny_models.captioner(tmp_path, request.param)


def assert_close(ours, expected, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def changed(text: TokenizedText, position: int) -> TokenizedText:
    ids = text.ids.clone()
    ids[:, position] = (ids[:, position] + 1) % VOCABULARY
    return TokenizedText(ids, text.valid, text.removable)


@torch.no_grad()
def test_a_word_changes_no_earlier_logit_and_every_later_one(model):
    images, text = tiny_models.images(2), tiny_models.texts([7, 7])
    before = model(images, text)
    assert before.shape == (2, 7, VOCABULARY)
    for position in range(7):
        after = model(images, changed(text, position))
        assert_close(after[:, :position], before[:, :position])
        assert (after[:, position:] - before[:, position:]).abs().amax(dim=2).min() > 1e-4


@torch.no_grad()
def test_the_image_is_blind_to_the_text_and_every_word_sees_it(model):
    images, text = tiny_models.images(2), tiny_models.texts([5, 5])
    image_tokens = model.encoder.image_tokens(images)
    words, others = (model.text_tokens(t.ids, t.valid) for t in (text, tiny_models.texts([5, 5], seed=1)))
    image, _ = model.mapper(image_tokens, words)
    blind, _ = model.mapper(image_tokens, others)
    assert_close(blind, image)
    seen = model(images, text) - model(tiny_models.images(2, seed=1), text)
    assert seen.abs().amax(dim=2).min() > 1e-4


@torch.no_grad()
def test_for_answering_questions_both_streams_still_read_everything(tmp_path):
    for kind in KINDS:
        mapper = tiny_models.clipmapper(tmp_path, kind).mapper
        image, text = torch.randn(1, 10, 16).double(), torch.randn(1, 5, 12).double()
        last = text.clone()
        last[:, -1] += 1
        pairs = zip(mapper(image, text), mapper(image, last), strict=True)
        assert all((a - b).abs().amax(dim=2).min() > 1e-6 for a, b in pairs)
        with pytest.raises(ValueError, match="captioning=True"):
            mapper.image_memory(image)


@torch.no_grad()
def test_padding_never_matters(model):
    lengths = [3, 7, 5]
    images, text = tiny_models.images(3), tiny_models.texts(lengths)
    logits, loss = model(images, text), caption_loss(model(images, text), text)
    noise = torch.randint(VOCABULARY, text.ids.shape)
    other = TokenizedText(torch.where(text.valid, text.ids, noise), text.valid, text.removable)
    longer = text.padded(11, 5)
    for padded in (other, longer):
        again = model(images, padded)
        assert_close(again[:, :7][text.valid], logits[text.valid])
        assert_close(caption_loss(again, padded), loss)
    for row, length in enumerate(lengths):
        alone = model(images[row : row + 1], cut(text, row, length))
        assert_close(alone[0], logits[row, :length])


def cut(text: TokenizedText, row: int, length: int) -> TokenizedText:
    return TokenizedText(*(t[row : row + 1, :length] for t in (text.ids, text.valid, text.removable)))


def remembering():
    """A plain cache of one sub-layer: what it was given so far, in one piece."""
    seen = []

    def remember(key, value):
        seen.append((key, value))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))

    return remember


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1), (3, 1, 2), (6,)])
@torch.no_grad()
def test_words_step_by_step_as_with_teacher_forcing(model, pieces):
    images, text = tiny_models.images(2), tiny_models.texts([6] * 6)
    captions_each = 3
    logits = model(images.repeat_interleave(captions_each, 0), text)
    memory = model.mapper.image_memory(model.encoder.image_tokens(images))
    remember, past = [remembering() for _ in range(model.caches)], 0
    for new in pieces:
        step = model.step_logits(text.ids[:, past : past + new], memory, past, remember)
        past += new
        assert_close(step, logits[:, past - 1])


@torch.no_grad()
def test_leaving_out_what_no_word_reads_changes_nothing(model):
    images, text = tiny_models.images(2), tiny_models.texts([6, 4])
    assert_close(model(images, text, only_text=False)[text.valid], model(images, text)[text.valid])


@torch.no_grad()
def test_masked_patches_are_as_good_as_removed(model):
    images, text = tiny_models.images(2), tiny_models.texts([6, 4])
    keep = torch.tensor([[0, 3, 4, 8], [1, 2, 5, 6]])
    ignore = torch.ones(2, tiny_models.PATCHES, dtype=torch.bool).scatter(1, keep, False)
    removed, masked = model(images, text, image_keep=keep), model(images, text, image_ignore=ignore)
    assert_close(removed[text.valid], masked[text.valid])
    assert (removed - model(images, text))[text.valid].abs().max() > 1e-3
    tokens = model.encoder.image_tokens(images, keep=keep)
    ones = [remembering() for _ in range(model.caches)]
    step = model.step_logits(text.ids[:, :4], model.mapper.image_memory(tokens, keep), 0, ones)
    assert_close(step, removed[:, 3])


@torch.no_grad()
def test_an_ignored_word_is_read_by_no_other(model):
    images, text = tiny_models.images(2), tiny_models.texts([6, 6])
    ignore = torch.zeros(2, 6, dtype=torch.bool)
    ignore[:, 2] = True
    others = ~ignore
    before = model(images, text, text_ignore=ignore)
    after = model(images, changed(text, 2), text_ignore=ignore)
    assert_close(after[others], before[others])
    assert (before - model(images, text))[:, 3:].abs().max() > 1e-3


def naive_attention(layer, queries, keys, allowed):
    """One sub-layer for one sample, with a loop over heads and softmax written out; keys are normed here."""
    width = queries.shape[-1] // layer.heads
    asked = layer.query(layer.norm(queries))
    key, value = layer.key_value((layer.context_norm or layer.norm)(keys)).split(queries.shape[-1], dim=-1)
    out = torch.zeros_like(queries)
    for h in range(layer.heads):
        part = slice(h * width, (h + 1) * width)
        scores = (asked[:, part] @ key[:, part].T / width**0.5).exp() * allowed
        out[:, part] = scores / scores.sum(1, keepdim=True) @ value[:, part]
    return layer.output(out)


def naive_mlp(layer, tokens):
    first, _, last = layer.layers
    hidden = first(layer.norm(tokens))
    return last(hidden / (1 + (-1.702 * hidden).exp()))


@torch.no_grad()
def test_mappers_equal_a_naive_implementation(plain):
    mapper = plain.mapper
    image_tokens, text_tokens = torch.randn(10, 16).double(), torch.randn(5, 12).double()
    image = mapper.project_image(image_tokens) + mapper.positions
    text = mapper.project_text(text_tokens)
    causal = torch.tensor([[float(key <= query) for key in range(5)] for query in range(5)])
    for block in mapper.blocks:
        if type(mapper) is MAPPERS["dual_flow"]:
            entered = image
            image = image + naive_attention(block.image_self, image, image, torch.ones(10, 10))
            image = image + naive_mlp(block.image_mlp, image)
            text = text + naive_attention(block.text_self, text, text, causal)
            text = text + naive_attention(block.text_cross, text, entered, torch.ones(5, 10))
            text = text + naive_mlp(block.text_mlp, text)
        else:
            joint = torch.cat([image, text])
            allowed = torch.zeros(15, 15)
            allowed[:, :10] = 1
            allowed[10:, 10:] = causal
            joint = joint + naive_attention(block.attention, joint, joint, allowed)
            joint = joint + naive_mlp(block.mlp, joint)
            image, text = joint[:10], joint[10:]
    ours_image, ours_text = mapper(image_tokens[None], text_tokens[None])
    assert_close(ours_image[0], image)
    assert_close(ours_text[0], text)


def test_all_attention_of_the_mapper_runs_through_one_function(plain, monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    plain.mapper(torch.randn(1, 10, 16).double(), torch.randn(1, 5, 12).double())
    each = 3 if isinstance(plain.mapper, MAPPERS["dual_flow"]) else 1
    assert len(calls) == each * len(plain.mapper.blocks)


def test_captioning_has_no_cross_attention_of_the_image_and_else_the_same_weights(tmp_path):
    for kind in KINDS:
        captioning = set(tiny_models.captioner(tmp_path, kind).mapper.state_dict())
        answering = set(
            tiny_models.clipmapper(tmp_path, kind, image_position_embedding=True).mapper.state_dict()
        )
        assert captioning == {name for name in answering if "image_cross" not in name}


def test_loss_is_the_mean_over_words_and_end_with_label_smoothing(plain):
    text = with_ends([[3, 0, 0], [7], [0, 5]], plain.ends, padding=0)
    logits = plain(tiny_models.images(3), text)
    for smoothing in (0.0, 0.1):
        total, count = 0.0, 0
        for row, length in enumerate((5, 3, 4)):
            for place in range(1, length):
                log_p = logits[row, place - 1].log_softmax(0)
                own = log_p[text.ids[row, place]]
                total -= (1 - smoothing) * own + smoothing * log_p.mean()
                count += 1
        assert count == 9
        assert_close(caption_loss(logits, text, smoothing), total / count)


def test_the_id_of_padding_is_learned_where_it_is_a_word(plain):
    text = with_ends([[0], [3, 4, 5]], plain.ends, padding=0)
    logits = plain(tiny_models.images(2), text)
    logits.retain_grad()
    caption_loss(logits, text).backward()
    reached = logits.grad.abs().sum(dim=2) > 0
    assert reached.tolist() == [[True, True, False, False, False], [True, True, True, True, False]]
    assert logits.grad[0, 0, 0] < 0  # the "!" that the caption begins with becomes likelier


@pytest.mark.parametrize("width", [12, 16])
def test_tied_head_scores_by_the_encoders_own_embedding(tmp_path, width):
    for frozen in (True, False):
        model = tiny_models.captioner(tmp_path, tied=True, width=width, frozen=frozen)
        embedding = model.encoder.clip.token_embedding.weight
        hidden = torch.randn(2, 3, width).double()
        projected = hidden if width == 12 else hidden @ model.head.project.weight.T
        assert_close(model.head(hidden), projected @ embedding.T + model.head.bias)
        own = {name for name in model.state_dict() if name.startswith("head")}
        assert own == ({"head.bias"} if width == 12 else {"head.bias", "head.project.weight"})
        text = tiny_models.texts([5, 4])
        caption_loss(model(tiny_models.images(2), text), text).backward()
        assert (embedding.grad is None) == frozen
        if not frozen:  # also of tokens that no caption has: as words that were not meant
            assert embedding.grad.abs().sum(dim=1).min() > 0
    head = TiedCaptionHead(width, torch.nn.Embedding(9, width))
    assert isinstance(head.project, torch.nn.Identity)


def test_a_clip_whose_words_read_later_ones_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tiny-clip.*text_embedding_only=true"):
        tiny_models.captioner(tmp_path, text_tower="unmasked")


def test_a_mapper_for_questions_is_refused(tmp_path):
    other = tiny_models.clipmapper(tmp_path)
    with pytest.raises(ValueError, match="captioning=True"):
        Captioner(other.encoder, other.mapper, CaptionHead(16, VOCABULARY))


def test_captions_in_clips_byte_pairs():
    bpe = SimpleTokenizer(context_length=8)
    ends = caption_ends(bpe)
    assert (ends.start, ends.end) == (49406, 49407)
    captions = ["a red circle!", "square"]
    ours, theirs = caption_tokens(bpe, ends, captions), tokenize(bpe, captions)
    for name in ("ids", "valid", "removable"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert spell(bpe, ours.ids[0][ours.removable[0]]) == "a red circle!"
    with pytest.warns(UserWarning, match="is cut to the 6"):
        long = caption_tokens(bpe, ends, ["a b c d e f g h"])
    assert long.ids[0, -1] == ends.end and long.valid.all() and int(long.removable.sum()) == 6


def word_tokenizer(folder, **special) -> HFTokenizer:
    """A tokenizer of whole words, which adds no start token and, where it has one, an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<s>", "a", "red", "circle"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if "eos_token" in special:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", **special).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=5)


def test_captions_with_other_tokenizers(tmp_path):
    siglip = word_tokenizer(tmp_path / "a", eos_token="</s>")
    assert caption_ends(siglip) == CaptionEnds(1, 1)
    tokens = caption_tokens(siglip, CaptionEnds(1, 1), ["a red circle", "circle"])
    assert tokens.ids.tolist() == [[1, 3, 4, 5, 1], [1, 5, 1, 0, 0]]
    assert tokens.removable.tolist() == [[False, True, True, True, False], [False, True] + [False] * 3]
    assert tokens.valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert spell(siglip, tokens.ids[0][tokens.removable[0]]) == "a red circle"
    both = word_tokenizer(tmp_path / "b", eos_token="</s>", bos_token="<s>")
    assert caption_ends(both) == CaptionEnds(2, 1)
    with pytest.warns(UserWarning, match="caption of 4 tokens is cut to the 3"):
        cut_short = caption_tokens(both, CaptionEnds(2, 1), ["a red red circle"])
    assert cut_short.ids.tolist() == [[2, 3, 4, 4, 1]]
    with pytest.raises(UserError, match="no end token"):
        caption_ends(word_tokenizer(tmp_path / "c"))


def test_cut_captions_have_no_end_token():
    text = with_ends([[4, 5], [6]], CaptionEnds(8, 9), padding=0, ended=[False, True])
    assert text.ids.tolist() == [[8, 4, 5], [8, 6, 9]]
    assert text.valid.all() and text.removable.tolist() == [[False, True, True], [False, True, False]]


def test_an_empty_caption_is_a_users_mistake(plain):
    for empty in ("", " ", [], ["a", ""]):
        with pytest.raises(UserError, match="the caption is empty"):
            plain.tokenize(empty)
