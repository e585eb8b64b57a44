"""``clipmapper.explain`` of a captioner: every word of a caption, from one forward of the image."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import caption_models, training_models
from support.compared_methods import METHODS
from support.slow import mostly_slow

import clipmapper
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.ngram_scores import CiderD, DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.models.tokens import word_positions
from clipmapper.relevance import record
from clipmapper.relevance.explained_scalar import EXPLAINED
from clipmapper.relevance.many_scalars import each_scalar
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.explain import CaptionExplanation, explain_captions
from clipmapper.tasks.captioning.trace import trace_caption

CAPTION = "a chartreuse ring, left of a small cross"
WORDS = ("a", "chartreuse", "ring", ",", "left", "of", "a", "small", "cross")


MAPPERS = ["dual_flow", "single_flow"]
QUICK = [("dual_flow", "probability"), ("single_flow", "logit")]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=MAPPERS)
def model(request, architecture):
    return caption_models.captioner(architecture, mapper=request.param)


@pytest.fixture(scope="module")
def plain(architecture):
    return caption_models.captioner(architecture)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return caption_models.picture()


def pixels_of(model, picture):
    return model.load_image(picture).double()


def separately(model, pixels, method, explained):
    """A forward and a backward for every token, by the recorder alone."""
    text = model.tokenize(CAPTION)
    words = word_positions(model.encoder.tokenizer, text.ids[0], text.removable[0])
    maps, matrix = [], []
    for _, positions in words:
        image, earlier = [], []
        for position in positions:
            with record(model, [position]) as trace:
                scores = model(pixels, text, only_text=False)[0, position - 1]
                scores = {
                    "logit": scores,
                    "probability": scores.softmax(0),
                    "log_probability": scores.log_softmax(0),
                }
                y = scores[explained][text.ids[0, position]]
            trace.read_token("text", torch.tensor([position - 1]))
            trace.backward(y[None])
            found = METHODS[method](trace)
            image.append(found.image[0])
            earlier.append([sum(float(found.text[0, p]) for p in tokens) for _, tokens in words])
        maps.append(torch.stack(image).mean(dim=0).numpy())
        matrix.append(np.mean(earlier, axis=0))
    return np.stack(maps), np.stack(matrix)


@pytest.mark.parametrize(
    ("model", "explained"), mostly_slow(product(MAPPERS, EXPLAINED), QUICK), indirect=["model"]
)
def test_all_words_at_once_are_each_on_its_own(model, picture, explained):
    pixels = pixels_of(model, picture)
    together = explain_captions(model, pixels, methods=list(METHODS), caption=CAPTION, explained=explained)
    for explanation, method in zip(together, METHODS, strict=True):
        maps, matrix = separately(model, pixels, method, explained)
        assert (explanation.method, explanation.words, explanation.caption) == (method, WORDS, CAPTION)
        np.testing.assert_allclose(explanation.maps, maps, rtol=1e-9, atol=1e-12, err_msg=method)
        np.testing.assert_allclose(explanation.word_matrix, matrix, rtol=1e-9, atol=1e-12, err_msg=method)


def test_nothing_comes_from_later_words_and_what_there_is_sums_to_one(plain, picture):
    pixels = pixels_of(plain, picture)
    traced = trace_caption(plain, pixels, CAPTION)
    explanation = clipmapper.explain(plain, pixels, caption=CAPTION)
    assert not np.triu(explanation.word_matrix, 1).any()
    several_tokens = [len(positions) > 1 for _, positions in traced.words]
    assert several_tokens.count(True) >= 1
    assert ((np.diag(explanation.word_matrix) > 0) == several_tokens).all()
    # The rest is on the class token and the start token.
    total = explanation.maps.sum(axis=(1, 2)) + explanation.word_matrix.sum(axis=1)
    assert (total < 1).all() and (total > 0).all()


def test_the_image_passes_its_tower_once(plain, picture, monkeypatch):
    calls = []
    tower, original = plain.encoder.image_tower, plain.encoder.image_tower.forward

    def counted(images, *args, **kwargs):
        calls.append(len(images))
        return original(images, *args, **kwargs)

    monkeypatch.setattr(tower, "forward", counted)
    pixels = pixels_of(plain, picture)
    # Read again for its CLIPScore, what an untrained model writes at full length is too long.
    scored = {"word_weights": "clip", "decoding": Decoding(max_length=20)}
    for options in ({}, {"caption": CAPTION}, scored, {"caption": CAPTION, "word": "ring"}):
        calls.clear()
        explanation = clipmapper.explain(plain, pixels, **options)
        assert calls == [1], options
        assert len(explanation.words) > 3


@pytest.mark.parametrize(
    ("model", "decoding"),
    mostly_slow(product(MAPPERS, [None, Decoding("greedy", max_length=6), Decoding("nucleus", seed=3)]), 6),
    indirect=["model"],
)
@pytest.mark.slow
def test_the_model_s_own_caption(model, picture, decoding):
    pixels = pixels_of(model, picture)
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    explanation = clipmapper.explain(model, pixels, decoding=decoding)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    assert explanation.caption == model.caption(pixels, decoding)
    assert "".join(explanation.words) == explanation.caption.replace(" ", "")
    assert explanation.maps.shape == (len(explanation.words), *training_models.GRID)
    with torch.no_grad():
        text = trace_caption(model, pixels, decoding=decoding).text
        told = model(pixels, text)[0].log_softmax(-1)
    first = next(iter(word_positions(model.encoder.tokenizer, text.ids[0], text.removable[0])))[1]
    expected = np.exp(sum(float(told[p - 1, text.ids[0, p]]) for p in first))
    assert explanation.probabilities[0] == pytest.approx(expected)


def test_one_word(plain, picture):
    pixels = pixels_of(plain, picture)
    whole = clipmapper.explain(plain, pixels, caption=CAPTION, method="gae")
    for word, place in (("chartreuse", 1), ("Small", 7), (6, 6), (-1, 8)):
        one = clipmapper.explain(plain, pixels, caption=CAPTION, method="gae", word=word)
        assert (one.words, one.explained) == (WORDS, (place,))
        np.testing.assert_allclose(one.maps[0], whole.maps[place], rtol=1e-9)
        np.testing.assert_allclose(one.word_matrix[0], whole.word_matrix[place], rtol=1e-9)
        np.testing.assert_allclose(one.patches, one.maps[0] / one.maps[0].sum())
        assert [word for word, _ in one.earlier_words(0)] == list(WORDS[:place])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_improbable_words_in_half_precision(architecture, picture, dtype):
    """Of 49408 words each is so improbable that float16 could not hold a gradient of its probability."""
    half = caption_models.captioner(architecture).to(dtype)
    exact = caption_models.captioner(architecture).to(dtype).float()
    asked = {"methods": ["weighted", "input_x_gradient", "gae_libra"], "explained": "probability"}
    found, expected = (
        explain_captions(model, model.load_image(picture).to(kind), caption=CAPTION, **asked)
        for model, kind in ((half, dtype), (exact, torch.float32))
    )
    for ours, its in zip(found, expected, strict=True):
        assert its.probabilities.max() < 1e-3
        largest = its.maps.max(axis=(1, 2), keepdims=True)
        some = largest[:, 0, 0] > 0  # a word may owe the patches nothing
        assert some.sum() >= 3
        off = np.abs(ours.maps - its.maps)[some] / largest[some]
        assert off.max() < (0.1 if dtype == torch.float16 else 0.6), ours.method


def test_many_tokens_in_several_parts(plain, picture):
    """More tokens than are taken at once."""
    traced = [trace_caption(plain, pixels_of(plain, picture), CAPTION) for _ in range(2)]
    tokens = torch.arange(1, 9)
    maps = []
    for part, at_once in zip(traced, (16, 3), strict=True):
        y = part.scores[tokens - 1, part.text.ids[0, tokens]]
        rows = each_scalar(part.trace, y, tokens - 1, list(range(8)), at_once=at_once)
        maps.append(torch.cat([METHODS["weighted"](trace).image for trace in rows]))
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-10, atol=1e-12)


def test_several_scalars_need_one_sample_and_a_graph(plain, picture):
    pixels = pixels_of(plain, picture).expand(2, -1, -1, -1)
    text = plain.tokenize([CAPTION, CAPTION])
    with record(plain) as trace:
        scores = plain(pixels, text, only_text=False)
    with pytest.raises(ValueError, match="not of 2"):
        next(each_scalar(trace, scores[:, 0, 0], torch.tensor([0, 0]), [0, 1]))
    traced = trace_caption(plain, pixels[:1], CAPTION)
    with pytest.raises(ValueError, match="does not depend"):
        next(each_scalar(traced.trace, torch.ones(1), torch.tensor([0]), [0]))


# The caption's map


def test_mean_leaves_stop_words_out(plain, picture):
    counting = np.array([word in ("chartreuse", "ring", "left", "small", "cross") for word in WORDS])
    pixels = pixels_of(plain, picture)
    for options in ({}, {"word_maps": "scaled"}, {"word_maps": "raw"}):
        explanation = clipmapper.explain(plain, pixels, caption=CAPTION, **options)
        assert explanation.weights.tolist() == [0.2 * count for count in counting]
        maps = explanation.maps[counting]
        if options != {"word_maps": "raw"}:
            maps = np.stack([one / one.sum() for one in maps])
        np.testing.assert_allclose(explanation.patches, maps.mean(axis=0))


def caption_of_maps(maps, word_maps):
    """An explanation with these maps of its words, which count alike."""
    count = len(maps)
    words = tuple(f"word{number}" for number in range(count))
    return CaptionExplanation(
        caption=" ".join(words),
        words=words,
        explained=tuple(range(count)),
        maps=np.array(maps, dtype=np.float64),
        word_matrix=np.zeros((count, count)),
        probabilities=np.ones(count),
        weights=np.full(count, 1 / count),
        word_weights="mean",
        image=np.zeros((4, 4, 3), np.uint8),
        method="by hand",
        word_maps=word_maps,
    )


def test_words_count_for_their_weight_and_not_for_the_size_of_their_map():
    maps = [[[1, 3]], [[30, 10]]]
    assert caption_of_maps(maps, "raw").patches.tolist() == [[15.5, 6.5]]
    np.testing.assert_allclose(caption_of_maps(maps, "scaled").patches, [[1 / 2, 1 / 2]])


def test_other_ways_to_put_maps_together():
    """Scaled: .64 .36 0 and 0 .01 .99 of two words, which count half."""
    maps = [[[64, 36, 0]], [[0, 1, 99]]]
    root = [[0.8 / 2, (0.6 + 0.1) / 2, 0.99**0.5 / 2]]
    np.testing.assert_allclose(caption_of_maps(maps, "root").patches, root)
    np.testing.assert_allclose(caption_of_maps(maps, "largest").patches, [[0.32, 0.18, 0.495]])
    # The third patch first, then the first; what is left of both words for the second is little.
    left = (1 - 0.8) / 2 + (1 - 0.99**0.5) / 2
    np.testing.assert_allclose(caption_of_maps(maps, "coverage").patches, [[0.4, left, 0.99**0.5 / 2]])
    against = [[[-4, 12]], [[8, -8]]]
    np.testing.assert_allclose(
        caption_of_maps(against, "root").patches, [[(0.5**0.5 - 0.5) / 2, (0.75**0.5 - 0.5**0.5) / 2]]
    )
    assert caption_of_maps(against, "coverage").patches.min() >= 0


@given(st.integers(0, 10**6))
def test_coverage_takes_the_patch_that_adds_most(seed):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(3, 2, 3)) * rng.integers(0, 2, (3, 2, 3))
    found = caption_of_maps(maps, "coverage").patches.ravel()
    shares = [
        [max(x, 0.0) / (np.abs(one).sum() or 1.0) for x in one.ravel()] for one in maps
    ]  # by word, by patch
    taken: list[int] = []

    def worth(patches):
        return sum(sum(word[j] for j in patches) ** 0.5 for word in shares) / 3

    for patch in sorted(range(6), key=lambda j: (-found[j], j)):
        gains = {j: worth([*taken, j]) - worth(taken) for j in range(6) if j not in taken}
        assert found[patch] == pytest.approx(max(gains.values()), abs=1e-12)
        assert gains[patch] == pytest.approx(max(gains.values()), abs=1e-12)
        taken.append(patch)


def test_maps_without_a_sum():
    """Zeros add nothing; evidence for and against is scaled by the sum of its sizes; nothing is too small."""
    np.testing.assert_allclose(caption_of_maps([[[0, 0]], [[1, 3]]], "scaled").patches, [[1 / 8, 3 / 8]])
    assert not caption_of_maps([[[0, 0]]], "scaled").patches.any()
    np.testing.assert_allclose(caption_of_maps([[[2, -2]], [[1, 3]]], "scaled").patches, [[3 / 8, 1 / 8]])
    np.testing.assert_allclose(
        caption_of_maps([[[1e-320, 3e-320]]], "scaled").patches, [[1 / 4, 3 / 4]], rtol=1e-3
    )


def test_cider_weighs_words_by_what_is_lost_without_them(plain, picture):
    references = ["a small cross", "a ring left of a small cross"]
    documents = [
        [ptb_tokenise(r) for r in references],
        [["a", "blue", "square"]],
        [["two", "of", "a", "kind"]],
    ]
    frequencies = DocumentFrequencies.of(documents)
    options = {"caption": CAPTION, "references": references, "frequencies": frequencies}
    explanation = clipmapper.explain(plain, pixels_of(plain, picture), word_weights="cider", **options)
    cider = CiderD(frequencies)

    def score(words):
        return float(cider([ptb_tokenise(" ".join(words))], [documents[0]])[0])

    lost = [max(0, score(WORDS) - score(WORDS[:i] + WORDS[i + 1 :])) for i in range(len(WORDS))]
    np.testing.assert_allclose(explanation.weights, np.array(lost) / sum(lost), atol=1e-6)
    assert explanation.weights.argmax() in (7, 8)
    assert explanation.weights[1] == 0  # the caption is better without it


def test_clip_weighs_words_by_what_is_lost_without_them(plain, picture):
    pixels = pixels_of(plain, picture)
    explanation = clipmapper.explain(plain, pixels, caption=CAPTION, word_weights="clip")
    encoder = plain.encoder

    def score(words):
        ids = encoder.tokenizer([" ".join(words)])
        image, text = encoder.embeddings(pixels, ids)
        return 2.5 * max(0.0, float((image * text).sum()))

    lost = np.array([max(0, score(WORDS) - score(WORDS[:i] + WORDS[i + 1 :])) for i in range(len(WORDS))])
    expected = (
        lost / lost.sum()
        if lost.any()
        else 0.2 * np.isin(WORDS, ["chartreuse", "ring", "left", "small", "cross"])
    )
    np.testing.assert_allclose(explanation.weights, expected, atol=1e-5)
    assert explanation.weights.sum() == pytest.approx(1)


# Pictures and mistakes


@pytest.mark.slow
def test_plot_writes_a_picture(plain, picture, tmp_path):
    long = " and ".join([CAPTION] * 3)
    sizes = []
    for name, options in (("one", {"word": 2}), ("short", {}), ("long", {"caption": long})):
        explanation = clipmapper.explain(plain, pixels_of(plain, picture), **{"caption": CAPTION, **options})
        path = explanation.plot(tmp_path / "new folder" / f"{name}.png")
        with Image.open(path) as image:
            image.load()
            sizes.append(image.size)
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert sizes[0][1] < sizes[2][1] and sizes[1][1] < sizes[2][1]  # the strip wraps into more rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": " "}, "the caption is empty"),
        ({"caption": CAPTION, "word": "blue"}, "word='blue' is not in the caption"),
        ({"caption": CAPTION, "word": "a"}, "2 times; give word=0, word=6"),
        ({"caption": CAPTION, "word": 9}, "word=9: the caption .* has words 0 to 8"),
        ({"caption": CAPTION, "method": "magic"}, "unknown method 'magic'"),
        (
            {"caption": CAPTION, "word_weights": "best"},
            "word_weights='best': must be one of mean, cider, clip",
        ),
        ({"caption": CAPTION, "word_weights": "cider"}, "needs references"),
        (
            {"caption": CAPTION, "word_maps": "thin"},
            "word_maps='thin': must be one of scaled, raw, root, largest, coverage",
        ),
        (
            {"caption": CAPTION, "explained": "odds"},
            "explained='odds': must be one of logit, probability, log_probability",
        ),
        ({"caption": CAPTION, "decoding": Decoding("greedy")}, "leave one out"),
        ({"question": "what is this?"}, "this model writes captions"),
        ({"answer": "red"}, "this model writes captions"),
    ],
)
def test_mistakes_are_one_line(architecture, picture, options, message):
    model = caption_models.captioner(architecture).float()
    with pytest.raises(UserError, match=message) as error:
        clipmapper.explain(model, picture, **options)
    assert "\n" not in str(error.value)


def test_words_that_the_head_cannot_say(architecture, picture):
    model = caption_models.captioner(architecture, said=["a red ring"], vocabulary="data").float()
    with pytest.raises(UserError, match="cannot say"):
        clipmapper.explain(model, picture, caption="a green ring")
    assert clipmapper.explain(model, picture, caption="a red ring").words == ("a", "red", "ring")


def test_an_answering_model_takes_no_caption(architecture, picture):
    model = training_models.tiny_model(architecture).eval()
    with pytest.raises(UserError, match="answers questions"):
        clipmapper.explain(model, picture, "is it red?", caption=CAPTION)
    with pytest.raises(UserError, match="give question="):
        clipmapper.explain(model, picture)
