"""Writing captions: with and without cache, against exhaustive search, one by one, and its controls."""

import math
from itertools import product

import pytest
import torch
from support import tiny_models
from support.slow import once_each

from clipmapper.errors import UserError
from clipmapper.models.mapper import MAPPERS
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.decoding import Decoding, WrittenCaptions, write_captions
from clipmapper.tasks.captioning.model import Captioner

DECODINGS = {
    "greedy": Decoding("greedy", max_length=9),
    "beam": Decoding("beam", max_length=9, beams=4, captions=3),
    "nucleus": Decoding("nucleus", max_length=9, captions=3, top_p=0.95, seed=5),
    "controlled": Decoding("beam", max_length=9, min_length=4, no_repeat_ngram=2, repetition_penalty=1.3),
}
VARIANTS = {
    "plain": {},
    "like CoCa": {"text_tower": "class_token", "tied": True},
    "like SigLIP, no tower": {
        "text_tower": "unmasked", "text_embedding_only": True, "class_token": True,
    },
}  # fmt: skip
START, END = tiny_models.VOCABULARY - 2, tiny_models.VOCABULARY - 1


@torch.no_grad()
def varied(model: Captioner) -> Captioner:
    """The model with a head whose choice depends on what was said, and which ends captions here and there."""
    vocabulary, end = model.ends.end + 1, model.ends.end
    text = tiny_models.texts([6] * 32)
    logits = model(tiny_models.images(32), with_ids(text, text.ids % vocabulary))
    scale = 1.3 / (logits - logits.mean(dim=(0, 1))).std()
    linear = model.head.layer if hasattr(model.head, "layer") else model.head.project
    bias = model.head.layer.bias if hasattr(model.head, "layer") else model.head.bias
    bias.sub_(logits.mean(dim=(0, 1))).mul_(scale)
    linear.weight.mul_(scale)
    bias[end] += 1.0
    return model


def with_ids(text: TokenizedText, ids: torch.Tensor) -> TokenizedText:
    return TokenizedText(ids, text.valid, text.removable)


@pytest.fixture(scope="module", params=once_each(product(MAPPERS, VARIANTS), as_one=True), ids=str)
def model(request, tmp_path_factory) -> Captioner:
    kind, variant = request.param
    return varied(tiny_models.captioner(tmp_path_factory.mktemp("clip"), kind, **VARIANTS[variant]))


@pytest.fixture(scope="module", params=MAPPERS)
def plain(request, tmp_path_factory) -> Captioner:
    return varied(tiny_models.captioner(tmp_path_factory.mktemp("clip"), request.param))


def image_tokens(model: Captioner, count: int = 4, seed: int = 0) -> torch.Tensor:
    return model.encoder.image_tokens(tiny_models.images(count, seed))


def rows(written: WrittenCaptions) -> list[list[int]]:
    """Ids of every caption behind the start token, without padding."""
    text = written.tokens
    assert (text.ids[:, 0] == START).all()
    return [ids[valid].tolist()[1:] for ids, valid in zip(text.ids, text.valid, strict=True)]


@pytest.mark.parametrize("name", DECODINGS)
@torch.no_grad()
def test_cached_and_uncached_decoding_give_identical_tokens(model, name):
    tokens = image_tokens(model)
    cached = write_captions(model, tokens, DECODINGS[name])
    uncached = write_captions(model, tokens, DECODINGS[name], use_cache=False)
    assert rows(cached) == rows(uncached) and cached.texts == uncached.texts
    assert len(set(cached.texts)) == len(tokens)


@pytest.mark.parametrize("name", ["greedy", "beam", "controlled"])
@torch.no_grad()
def test_batched_equals_one_by_one(model, name):
    tokens = image_tokens(model)
    together = write_captions(model, tokens, DECODINGS[name])
    alone = [write_captions(model, tokens[i : i + 1], DECODINGS[name]) for i in range(len(tokens))]
    assert rows(together) == [row for written in alone for row in rows(written)]
    assert together.texts == tuple(written.texts[0] for written in alone)


def next_log_probabilities(model: Captioner, image: torch.Tensor, words: tuple[int, ...]) -> torch.Tensor:
    """Return the log-probabilities of one image's next token, by a whole forward of the model."""
    ids = torch.tensor([[model.ends.start, *words]])
    valid = torch.ones_like(ids, dtype=torch.bool)
    logits = model.caption_logits(image[None], model.text_tokens(ids, valid), valid)[0, -1]
    return logits.log_softmax(0)


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_each_time(plain):
    tokens = image_tokens(plain, 8)
    expected = []
    for image in tokens:
        words = ()
        while len(words) < 9 and END not in words:
            scores = next_log_probabilities(plain, image, words)
            scores[START] = -math.inf
            if not words:
                scores[END] = -math.inf  # min_length is 1
            words += (int(scores.argmax()),)
        expected.append(list(words))
    assert rows(write_captions(plain, tokens, DECODINGS["greedy"])) == expected


def all_captions(model: Captioner, image: torch.Tensor, longest: int, shortest: int):
    """Every caption that may be written, with its log-probability. Those of ``longest`` need no end."""
    start, end = model.ends.start, model.ends.end
    words = [i for i in range(end + 1) if i not in (start, end)]

    def continued(done: tuple[int, ...], log_p: float):
        step = next_log_probabilities(model, image, done)
        if len(done) >= shortest:
            yield (*done, end), log_p + float(step[end])
        for word in words:
            if len(done) + 1 == longest:
                yield (*done, word), log_p + float(step[word])
            else:
                yield from continued((*done, word), log_p + float(step[word]))

    return list(continued((), 0.0))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("kind", MAPPERS)
@torch.no_grad()
def test_a_beam_of_all_captions_is_exhaustive_search(tmp_path, kind, length_penalty):
    vocabulary, longest, shortest, best = 6, 3, 1, 12
    model = varied(tiny_models.captioner(tmp_path, kind, vocabulary=vocabulary, seed=3))
    tokens = image_tokens(model, 2)
    decoding = Decoding(
        "beam",
        beams=vocabulary**longest,
        captions=best,
        min_length=shortest,
        max_length=longest,
        length_penalty=length_penalty,
    )
    written = write_captions(model, tokens, decoding).tokens
    found = [ids[valid].tolist()[1:] for ids, valid in zip(written.ids, written.valid, strict=True)]
    for i, image in enumerate(tokens):
        every = all_captions(model, image, longest, shortest)
        assert len(every) == 4 + 4 * 4 + 4 * 4 * 4  # ended after one or two words, or three words
        every.sort(key=lambda caption: -caption[1] / len(caption[0]) ** length_penalty)
        assert found[i * best : (i + 1) * best] == [list(ids) for ids, _ in every[:best]]


@torch.no_grad()
def test_the_towers_and_the_image_are_run_once_and_every_word_once(plain, monkeypatch):
    seen = []

    def watch(owner, name: str) -> None:
        original = getattr(owner, name)

        def watched(tokens, *rest, **more):
            seen.append((name, len(tokens), tokens.shape[1]))
            return original(tokens, *rest, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(plain, "step_logits")
    watch(plain.mapper, "image_memory")
    watch(plain.encoder.text_tower, "step")
    monkeypatch.setattr(plain.mapper, "forward", None)
    monkeypatch.setattr(plain.encoder.image_tower, "forward", None)
    tokens = torch.randn(2, 10, 16).double()
    write_captions(plain, tokens, Decoding("beam", beams=3, min_length=4, max_length=5))
    assert seen == [("image_memory", 2, 10), *[("step_logits", 6, 1), ("step", 6, 1)] * 5]


@torch.no_grad()
def test_the_same_seed_draws_the_same_and_leaves_the_generator_alone(plain):
    tokens = image_tokens(plain)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, again, other = (
        rows(write_captions(plain, tokens, Decoding("nucleus", captions=5, max_length=6, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_draws_come_from_the_nucleus_in_its_proportions(plain):
    image, draws, top_p = image_tokens(plain, 1), 4000, 0.8
    p = next_log_probabilities(plain, image[0], ()).exp()
    p[[START, END]] = 0
    p = p / p.sum()
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros_like(p)
    expected[order[:size]] = p[order[:size]] / p[order[:size]].sum()
    assert 3 <= size < 30
    decoding = Decoding("nucleus", captions=draws, min_length=1, max_length=2, top_p=top_p)
    drawn = torch.tensor([row[0] for row in rows(write_captions(plain, image, decoding))])
    share = torch.bincount(drawn, minlength=len(p)) / draws
    assert ((share > 0) <= (expected > 0)).all()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()
    cold = Decoding("nucleus", temperature=1e-4, max_length=9)
    greedy = write_captions(plain, image, DECODINGS["greedy"])
    assert rows(write_captions(plain, image, cold)) == rows(greedy)
    narrow = Decoding("nucleus", top_p=1e-6, max_length=9)
    assert rows(write_captions(plain, image, narrow)) == rows(greedy)


def repeated(row: list[int], size: int) -> bool:
    grams = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
    return len(set(grams)) < len(grams)


@torch.no_grad()
def test_draws_are_of_all_words_and_not_of_the_likeliest_fifty(tmp_path):
    """Each of 198 words is a little likelier than the one before; ``transformers`` draws of 50 by itself."""
    model = tiny_models.captioner(tmp_path, vocabulary=200)
    model.head.layer.weight.zero_()
    model.head.layer.bias.copy_(torch.linspace(0, 0.01, 200))
    decoding = Decoding("nucleus", captions=500, min_length=0, max_length=1, top_p=1.0)
    drawn = write_captions(model, image_tokens(model, 1), decoding).tokens.ids[:, 1]
    # The less likely half of the words gets about half of the draws: 250 with a deviation of 11.
    assert len(drawn) == 500 and 200 < int((drawn < 100).sum()) < 300


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
@torch.no_grad()
def test_no_sequence_of_tokens_comes_twice(plain, method):
    tokens = image_tokens(plain, 32)
    for size in (1, 2):
        free = rows(write_captions(plain, tokens, Decoding(method, max_length=11)))
        held = rows(write_captions(plain, tokens, Decoding(method, max_length=11, no_repeat_ngram=size)))
        assert any(repeated(row, size) for row in free)
        assert not any(repeated(row, size) for row in held)


@torch.no_grad()
def test_repetition_penalty_makes_repetition_rarer(plain):
    tokens = image_tokens(plain, 8)

    def repetitions(penalty: float) -> int:
        decoding = Decoding("greedy", max_length=11, repetition_penalty=penalty)
        return sum(len(row) - len(set(row)) for row in rows(write_captions(plain, tokens, decoding)))

    assert repetitions(1.0) > repetitions(1.5) > 0
    assert repetitions(50.0) == 0


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
@torch.no_grad()
def test_shortest_and_longest_length(plain, method):
    tokens = image_tokens(plain, 16)
    short = rows(write_captions(plain, tokens, Decoding(method, max_length=4)))
    assert max(map(len, short)) == 4
    lengths = []
    for shortest in (0, 5):
        found = rows(write_captions(plain, tokens, Decoding(method, min_length=shortest, max_length=8)))
        assert all(START not in row and END not in row[:-1] for row in found)
        assert all(row[-1] == END or len(row) == 8 for row in found)
        lengths.append(min(len(row) - (row[-1] == END) for row in found))
    assert lengths[0] < 5 <= lengths[1]


@torch.no_grad()
def test_length_penalty_favours_longer_captions(plain):
    tokens = image_tokens(plain, 16)
    total = [
        sum(map(len, rows(write_captions(plain, tokens, Decoding(max_length=8, beams=6, length_penalty=p)))))
        for p in (-2.0, 0.0, 2.0)
    ]
    assert total[0] <= total[1] <= total[2] and total[0] < total[2]


@torch.no_grad()
def test_what_is_written_can_be_read_by_the_model(plain):
    images = tiny_models.images(3)
    written = write_captions(plain, plain.encoder.image_tokens(images), Decoding("greedy", max_length=6))
    logits = plain(images, written.tokens)
    logits[:, :, START] = logits[:, 0, END] = -math.inf
    for row in range(3):
        length = int(written.tokens.valid[row].sum())
        assert torch.equal(logits[row, : length - 1].argmax(1), written.tokens.ids[row, 1:length])
    words = [plain.encoder.tokenizer.decode(row.tolist()) for row in written.tokens.ids]
    spelled = [
        plain.encoder.tokenizer.decode(ids[of_text].tolist())
        for ids, of_text in zip(written.tokens.ids, written.tokens.removable, strict=True)
    ]
    assert [texts[0] for texts in written.texts] == [" ".join(text.split()) for text in spelled] != words


@torch.no_grad()
def test_captions_of_what_is_left_of_an_image(plain):
    images, keep = tiny_models.images(3), torch.tensor([[0, 4, 7], [1, 2, 3], [5, 6, 8]])
    tokens = plain.encoder.image_tokens(images, keep=keep)
    for name in ("greedy", "beam"):
        part = rows(write_captions(plain, tokens, DECODINGS[name], keep=keep))
        assert part == rows(write_captions(plain, tokens, DECODINGS[name], keep=keep, use_cache=False))
    whole = rows(write_captions(plain, plain.encoder.image_tokens(images), DECODINGS["greedy"]))
    assert rows(write_captions(plain, tokens, DECODINGS["greedy"], keep=keep)) != whole


def test_training_mode_comes_back(plain):
    plain.train()
    write_captions(plain, image_tokens(plain, 1), Decoding("greedy", max_length=3))
    assert plain.training
    plain.eval()


@pytest.mark.parametrize(
    "wrong, line",
    [
        ({"method": "best"}, "decoding.method=best: must be one of greedy, beam, nucleus"),
        ({"method": "greedy", "captions": 2}, "gives at most 1"),
        ({"method": "beam", "beams": 3, "captions": 4}, "gives at most 3"),
        ({"method": "greedy", "beams": 3}, "only decoding.method=beam has it, not greedy"),
        ({"method": "beam", "top_p": 0.5}, "only decoding.method=nucleus has it, not beam"),
        ({"method": "beam", "beams": 1}, "at least 2"),
        ({"method": "nucleus", "top_p": 1.5}, "over 0, at most 1"),
        ({"method": "nucleus", "temperature": 0.0}, "over 0"),
        ({"min_length": 30}, "from 0 to less than max_length"),
        ({"captions": 0}, "at least 1"),
        ({"repetition_penalty": 0.0}, "over 0"),
        ({"no_repeat_ngram": -1}, "or more"),
    ],
)
def test_what_is_not_allowed_is_said(wrong, line):
    with pytest.raises(UserError, match=line):
        Decoding(**wrong)


def test_a_caption_must_fit_into_the_text_tower(plain):
    tokens = image_tokens(plain, 1)
    with pytest.raises(UserError, match="has room for 11 tokens"):
        write_captions(plain, tokens, Decoding("greedy", max_length=12))
    longest = Decoding("greedy", min_length=10, max_length=11)
    assert len(rows(write_captions(plain, tokens, longest))[0]) == 11
