"""From an image and its caption to the relevance of everything that each token was written from."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText, word_positions
from clipmapper.relevance import Again, Attention, AttentionTrace, method_named, record
from clipmapper.relevance.explained_scalar import ClassScalar, require_size
from clipmapper.relevance.many_scalars import attention_for_several, each_scalar
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.head import UnsayableToken, spell
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.removal import OneTokenLess

AT_ONCE = 16  # tokens whose gradients are held together


@dataclass(frozen=True)
class TracedCaption:
    """A caption, and the forward that says how probable each of its tokens is.

    ``caption``: its text. ``model``, ``pixels``: who wrote it, of what. ``scores``: logits of the token
    behind each position, with their graph. ``words``: each word of the caption with the positions of its
    tokens. ``image_tokens``: of the encoder, without graph.
    """

    caption: str
    model: Captioner
    pixels: Float[Tensor, "1 3 pixel_rows pixel_columns"]
    trace: AttentionTrace
    text: TokenizedText
    scores: Float[Tensor, "tokens vocabulary"]
    image_tokens: Float[Tensor, "1 image width"]
    words: Sequence[tuple[str, list[int]]]

    def word_probabilities(self, places: Sequence[int]) -> Float[np.ndarray, "words"]:
        """Probability of the words at these places, given the image and the words before each."""
        told = self.scores[:-1].detach().log_softmax(dim=-1).gather(1, self.text.ids[0, 1:, None])[:, 0].cpu()
        return np.array([float(told[[p - 1 for p in self.words[k][1]]].sum().exp()) for k in places])


@dataclass(frozen=True)
class WordRelevance:
    """Relevance for some words of a caption: of the patches, and of all words (0 at later ones)."""

    maps: Float[np.ndarray, "explained rows columns"]
    matrix: Float[np.ndarray, "explained words"]


def trace_caption(
    model: Captioner,
    pixels: Float[Tensor, "1 3 height width"],
    caption: str | TokenizedText | None = None,
    decoding: Decoding | None = None,
) -> TracedCaption:
    """Write a caption (or read the given one, a text or its tokens), and record the forward of all its words.

    The image passes its tower once: the caption is written from the tokens that are traced. The model is
    left as it was. Raises ``UserError`` for an empty caption and for words that the model cannot say.
    """
    with model.evaluating(), attention_for_several(), record(model) as trace:
        image_tokens = model.encoder.image_tokens(pixels)
        if caption is None:
            with _without_hooks(model):
                how = decoding or Decoding(max_length=model.longest)
                text = write_captions(model, image_tokens.detach(), how).tokens[:1]
            text = text[:, : int(text.valid.sum())]
        elif isinstance(caption, TokenizedText):
            text = caption
        else:
            text = model.tokenize(caption)
            try:
                model.head.places(text.ids, text.valid & (text.ids != model.ends.start))
            except UnsayableToken as error:
                raise UnsayableToken(error.token, spell(model.tokenizer, [error.token])) from error
        text_tokens = model.text_tokens(text.ids, text.valid)
        scores = model.caption_logits(image_tokens, text_tokens, text.valid, only_text=False)[0]
    words = word_positions(model.tokenizer, text.ids[0], text.removable[0])
    if not words:
        raise UserError("the model's caption of this image is empty: there is no word to explain")
    given = isinstance(caption, str)
    told = caption.strip() if given else spell(model.tokenizer, text.ids[0][text.removable[0]])
    return TracedCaption(told, model, pixels, trace, text, scores, image_tokens.detach(), words)


def word_relevance(
    traced: TracedCaption,
    places: Sequence[int],
    methods: Sequence[str],
    *,
    explained: str = "logit",
    sample: int = 0,
    seed: int = 0,
) -> Mapping[str, WordRelevance]:
    """Relevance by every method, for the words at these places of the caption; to be called once a trace.

    The explained scalar is the "logit", the "probability" (as in the code of WRA) or the "log_probability" of
    a token at the position that predicts it, over all tokens that the model can say. A word of several tokens
    gets the mean over its tokens; as an earlier word it has the sum over them, as in
    :func:`clipmapper.models.tokens.merge_words`. ``sample`` and ``seed`` seed what is random.

    Raises ``UserError`` for another ``explained`` and a probability that is too small to have a gradient.
    """
    functions = {name: method_named(name) for name in methods}
    groups = [traced.words[place][1] for place in places]
    tokens = torch.tensor([p for group in groups for p in group], device=traced.scores.device)
    ids = traced.text.ids[0]
    scalar = ClassScalar(ids.roll(-1), explained)  # of every position the token behind it
    with torch.enable_grad():
        y, times = scalar.differentiated(traced.scores, torch.arange(len(ids), device=ids.device))
        y, times = y[tokens - 1], None if times is None else times[tokens - 1]
    owner = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    require_size(times, [traced.words[places[number]][0] for number in owner.tolist()])
    identity = [sample * len(ids) + p for p in tokens.tolist()]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in methods}
    parts = iter((tokens - 1).split(AT_ONCE))
    for rows in each_scalar(traced.trace, y, tokens - 1, identity, at_once=AT_ONCE, times=times):
        rows.again = _again(traced, next(parts), explained)
        for name, function in functions.items():
            relevance = function(rows, seed=seed) if name == "random" else function(rows)
            found[name].append((relevance.image, relevance.text))
    return {
        name: _merged(traced, owner, len(groups), *(torch.cat(part) for part in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def _again(traced: TracedCaption, positions: Int[Tensor, "scalars"], explained: str) -> Again:
    """The forward that explains the tokens behind these positions, for methods that make it more than once.

    Each token is a sample with an image of its own, whose text ends where the token is predicted: what comes
    behind it is padding, which no method takes a mean over.
    """
    model, text = traced.model, traced.text
    scalar = ClassScalar(text.ids[0, positions + 1], explained)
    place = torch.arange(text.ids.shape[1], device=positions.device)

    def forward(rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows vocabulary"]:
        valid = text.valid & (place <= positions[rows][:, None])
        read = TokenizedText(text.ids.expand(len(rows), -1), valid, text.removable & valid)
        logits = model(traced.pixels.expand(len(rows), -1, -1, -1), read, only_text=False)
        return logits[torch.arange(len(rows), device=rows.device), positions[rows]]

    class Head:
        def applies(self, step: Attention) -> bool:
            return step.name.startswith(model.read_from)

        def __call__(self, pooled: Float[Tensor, "rows width"]) -> Float[Tensor, "rows"]:
            rows = torch.arange(len(positions), device=pooled.device)
            return scalar.value(model.scores(pooled), rows)

    return Again(model, forward, Head(), scalar, _OneTokenLess(traced, positions))


class _OneTokenLess(OneTokenLess):
    """The logits behind these positions without one patch of the image, or one word of the text up to there.

    A patch is physically removed. A word is read by nothing any more, which is the same for all words but the
    last of the text: that one's own row is what is read, and stays. What a removal leaves whole is encoded
    once.
    """

    def __init__(self, traced: TracedCaption, positions: Int[Tensor, "scalars"]) -> None:
        self.traced, self.positions = traced, positions
        place = torch.arange(traced.text.ids.shape[1], device=positions.device)
        words = traced.text.removable & (place <= positions[:, None])
        super().__init__(traced.trace, traced.model.encoder, words)

    def without_patch(
        self, rows: Int[Tensor, "variants"], keep: Int[Tensor, "variants kept"]
    ) -> Float[Tensor, "variants vocabulary"]:
        embedded, rotary = self._embedded
        tower = self.traced.model.encoder.image_tower
        image_tokens = tower.behind(embedded.expand(len(rows), -1, -1), rotary, keep=keep)
        text_tokens = self._text_tokens.expand(len(rows), -1, -1)
        return self._logits(rows, image_tokens, text_tokens, self.traced.text.valid, keep)

    def without_word(
        self, rows: Int[Tensor, "variants"], tokens: Int[Tensor, "variants"]
    ) -> Float[Tensor, "variants vocabulary"]:
        text, image_tokens = self.traced.text, self.traced.image_tokens.expand(len(rows), -1, -1)
        ids = text.ids.expand(len(rows), -1)
        ignore = torch.arange(ids.shape[1], device=rows.device) == tokens[:, None]
        text_tokens = self.traced.model.text_tokens(ids, text.valid.expand(len(rows), -1), ignore=ignore)
        return self._logits(rows, image_tokens, text_tokens, text.valid & ~ignore)

    def _logits(
        self,
        rows: Int[Tensor, "variants"],
        image_tokens: Float[Tensor, "variants image width"],
        text_tokens: Float[Tensor, "variants tokens text_width"],
        valid: Bool[Tensor, "_ tokens"],
        keep: Int[Tensor, "variants kept"] | None = None,
    ) -> Float[Tensor, "variants vocabulary"]:
        valid = valid.expand(len(rows), -1)
        logits = self.traced.model.caption_logits(image_tokens, text_tokens, valid, keep=keep)
        return logits[torch.arange(len(rows), device=rows.device), self.positions[rows]]

    @functools.cached_property
    def _embedded(self) -> tuple[Tensor, Tensor | None]:
        return self.traced.model.encoder.image_tower.embed(self.traced.pixels)

    @functools.cached_property
    def _text_tokens(self) -> Float[Tensor, "1 tokens text_width"]:
        return self.traced.model.text_tokens(self.traced.text.ids, self.traced.text.valid)


def _merged(
    traced: TracedCaption,
    owner: Tensor,
    count: int,
    image: Float[Tensor, "tokens rows columns"],
    text: Float[Tensor, "tokens positions"],
) -> WordRelevance:
    """From tokens to words. ``owner``: which of the explained words each token belongs to."""
    image, text = image.double().cpu(), text.double().cpu()
    of_words = torch.stack([text[:, positions].sum(dim=1) for _, positions in traced.words], dim=1)
    size = torch.bincount(owner, minlength=count).double()
    maps, matrix = (
        torch.zeros(count, *t.shape[1:], dtype=t.dtype).index_add(0, owner, t).numpy()
        for t in (image, of_words)
    )
    maps, matrix = maps / size.numpy()[:, None, None], matrix / size.numpy()[:, None]
    return WordRelevance(maps, matrix)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Run parts of a model that is being recorded without the recorder seeing it."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    taken = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, hooks in taken:
            setattr(module, kind, type(hooks)())
        yield
    finally:
        for module, kind, hooks in taken:
            setattr(module, kind, hooks)
