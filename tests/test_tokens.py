"""Token ids, padding and words of texts, with CLIP's tokenizer and with tokenizers of other kinds."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clipmapper.models.tokens import merge_words, padding_id, tokenize, word_positions


@pytest.fixture(scope="module")
def clip_bpe() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=16)


@pytest.fixture(scope="module")
def wide_bpe() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=400)


def words_of(tokenizer, text: str) -> list[tuple[str, list[int]]]:
    tokens = tokenize(tokenizer, [text])
    return word_positions(tokenizer, tokens.ids[0], tokens.removable[0])


def test_ids_are_those_of_open_clip_cut_to_the_longest_text(clip_bpe):
    texts = ["a red circle", "what is left of the small blue square?"]
    tokens = tokenize(clip_bpe, texts)
    theirs = clip_bpe(texts)
    length = tokens.ids.shape[1]
    assert length == 10 + 1
    assert torch.equal(tokens.ids, theirs[:, :length]) and not theirs[:, length:].any()
    assert tokens.valid.sum(1).tolist() == [5, 11]
    assert tokens.removable[0].tolist() == [False, True, True, True] + [False] * 7
    assert tokens.removable[1].tolist() == [False] + [True] * 9 + [False]
    assert torch.equal(tokenize(clip_bpe, texts, whole_context=True).ids, theirs)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
@settings(max_examples=60)
@given(text=st.text("aeirstAIW 0127,.:?'&!", max_size=30))
def test_plain_text_has_the_ids_of_open_clip(clean, text):
    tokenizer = _tokenizer(clean)
    ids = tokenize(tokenizer, [text], whole_context=True).ids
    assert torch.equal(ids, tokenizer([text]))


@functools.cache
def _tokenizer(clean: str) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=40, clean=clean)


def test_batches_can_be_indexed_and_moved(clip_bpe):
    tokens = tokenize(clip_bpe, ["a", "a red circle", "square"])
    some = tokens[torch.tensor([2, 0])].to("cpu")
    assert torch.equal(some.ids, tokens.ids[[2, 0]]) and torch.equal(some.valid, tokens.valid[[2, 0]])
    assert torch.equal(some.removable, tokens.removable[[2, 0]])


def test_exclamation_mark_is_no_padding_although_its_id_is_that_of_padding(clip_bpe):
    text = "stop!€ now"
    tokens = tokenize(clip_bpe, [text, "a red circle and a blue square"])
    assert padding_id(clip_bpe) == 0
    assert (tokens.ids[0] == 0).nonzero().flatten().tolist() == [2, 6, 7, 8]
    assert tokens.valid[0].tolist() == [True] * 6 + [False] * 3
    assert tokens.removable[0].tolist() == [False] + [True] * 4 + [False] * 4
    assert words_of(clip_bpe, text) == [("stop", [1]), ("!€", [2, 3]), ("now", [4])]
    assert [word for word, _ in words_of(clip_bpe, "stop!")] == ["stop", "!"]


def test_pieces_of_a_word_are_merged(clip_bpe):
    text = "Photosynthesis of a plant"
    words = words_of(clip_bpe, text)
    assert [word for word, _ in words] == ["photosynthesis", "of", "a", "plant"]
    assert len(words[0][1]) > 1
    tokens = tokenize(clip_bpe, [text])
    scores = torch.arange(tokens.ids.shape[1], dtype=torch.float)
    merged = merge_words(clip_bpe, tokens.ids[0], tokens.removable[0], scores)
    pieces = len(words[0][1])
    assert merged[0] == ("photosynthesis", float(sum(range(1, pieces + 1))))
    assert merged[1:] == [("of", pieces + 1.0), ("a", pieces + 2.0), ("plant", pieces + 3.0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ein Äpfel-Café", ["ein", "äpfel", "-", "café"]),
        ("猫 と 犬", ["猫", "と", "犬"]),
        ("🦜 and 🙂🙃", ["🦜", "and", "🙂🙃"]),
        ("it's 42", ["it", "'s", "4", "2"]),
        ("", []),
    ],
)
def test_words_of_any_script_are_whole(clip_bpe, text, words):
    assert [word for word, _ in words_of(clip_bpe, text)] == words


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_every_piece_of_a_text_is_in_exactly_one_word(wide_bpe, text):
    tokenizer = wide_bpe
    tokens = tokenize(tokenizer, [text, "a longer text than many others"])
    words = word_positions(tokenizer, tokens.ids[0], tokens.removable[0])
    positions = [position for _, where in words for position in where]
    assert positions == tokens.removable[0].nonzero().flatten().tolist()
    assert torch.equal(tokens.ids[0], tokenizer([text])[0, : tokens.ids.shape[1]])
    assert "".join(word for word, _ in words) == "".join(tokenizer.clean_fn(text).split())


def test_long_text_is_cut_with_one_line_of_warning(clip_bpe):
    text = "red\n" + "blue " * 20
    with pytest.warns(UserWarning) as caught:
        tokens = tokenize(clip_bpe, [text, "short"])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "21 tokens" in message and "cut to the 14" in message and "\n" not in message
    assert tokens.ids.shape == (2, 16) and tokens.valid[0].all()
    assert tokens.ids[0, -1] == clip_bpe.eot_token_id and not tokens.removable[0, -1]
    assert torch.equal(tokens.ids[:1], clip_bpe([text]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(clip_bpe, ["blue " * 14]).valid.all()


@pytest.fixture(scope="module")
def like_siglip(tmp_path_factory) -> HFTokenizer:
    """As SigLIP's: pieces mark the space before a word, an end token but no start token, padded with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.decoders import Metaspace
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "</s>", "▁photo", "synth", "esis", "▁of", "▁a", "▁plant", "▁", "s"]
    scores = [(piece, -float(i)) for i, piece in enumerate(vocabulary)]
    inner = Tokenizer(models.Unigram(scores, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("siglip")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=8, clean="canonicalize")


@pytest.fixture(scope="module")
def like_clipa(tmp_path_factory) -> HFTokenizer:
    """As CLIPA's: BERT's word pieces, of whose special tokens the end token is stripped."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.decoders import WordPiece
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "photo", "##synth", "##esis", "of", "a", "plant", "?"]
    inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = WordPiece()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    folder = tmp_path_factory.mktemp("clipa")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=8, strip_sep_token=True)


def test_tokenizer_without_a_start_token(like_siglip):
    texts = ["Photosynthesis of plants!", "a"]
    tokens = tokenize(like_siglip, texts, whole_context=True)
    assert torch.equal(tokens.ids, like_siglip(texts))
    assert padding_id(like_siglip) == 1
    assert tokens.ids[0].tolist() == [2, 3, 4, 5, 7, 9, 1, 1]
    assert tokens.valid.sum(1).tolist() == [7, 2]
    assert tokens.removable.sum(1).tolist() == [6, 1] and tokens.removable[0, 0]
    words = word_positions(like_siglip, tokens.ids[0], tokens.removable[0])
    assert words == [("photosynthesis", [0, 1, 2]), ("of", [3]), ("plants", [4, 5])]
    assert tokenize(like_siglip, texts).ids.shape == (2, 7)


def test_long_text_of_a_tokenizer_without_a_start_token(like_siglip):
    text = "a plant of a plant of a plant"
    with pytest.warns(UserWarning, match="8 tokens is cut to the 7") as caught:
        tokens = tokenize(like_siglip, [text])
    assert len(caught) == 1
    assert torch.equal(tokens.ids, like_siglip([text]))
    assert tokens.valid.all() and tokens.removable[0].tolist() == [True] * 7 + [False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(like_siglip, ["a plant of a plant of a"]).removable.sum() == 7


def test_tokenizer_whose_end_token_is_stripped(like_clipa):
    texts = ["photosynthesis of a plant?", "a plant"]
    with pytest.warns(UserWarning, match="7 tokens is cut to the 6"):
        tokens = tokenize(like_clipa, texts, whole_context=True)
    assert torch.equal(tokens.ids, like_clipa(texts))
    assert tokens.valid.sum(1).tolist() == [7, 3]
    assert tokens.removable.sum(1).tolist() == [6, 2]
    words = word_positions(like_clipa, tokens.ids[0], tokens.removable[0])
    assert words == [("photosynthesis", [1, 2, 3]), ("of", [4]), ("a", [5]), ("plant", [6])]
    short = tokenize(like_clipa, ["a plant?"])
    words = word_positions(like_clipa, short.ids[0], short.removable[0])
    assert [word for word, _ in words] == ["a", "plant", "?"]
