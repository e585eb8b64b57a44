"""From an image and its caption to the relevance of everything that each token was written from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText, word_positions
from clipmapper.relevance import Again, Attention, AttentionTrace, method_named, record
from clipmapper.relevance.many_scalars import attention_for_several, each_scalar
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.head import UnsayableToken, spell
from clipmapper.tasks.captioning.model import Captioner

SCALARS = ("logit", "log_probability")
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
    caption: str | None = None,
    decoding: Decoding | None = None,
) -> TracedCaption:
    """Write a caption (or read the given one), and record the forward of all its words.

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
    told = spell(model.tokenizer, text.ids[0][text.removable[0]]) if caption is None else caption.strip()
    return TracedCaption(told, model, pixels, trace, text, scores, image_tokens.detach(), words)


def word_relevance(
    traced: TracedCaption,
    explained: Sequence[int],
    methods: Sequence[str],
    *,
    scalar: str = "logit",
    sample: int = 0,
    seed: int = 0,
) -> Mapping[str, WordRelevance]:
    """Relevance by every method, for the words at these places of the caption; to be called once a trace.

    The explained scalar is the logit (or log-probability) of a token at the position that predicts it. A
    word of several tokens gets the mean over its tokens; as an earlier word it has the sum over them, as in
    :func:`clipmapper.models.tokens.merge_words`. ``sample`` and ``seed`` seed what is random.
    """
    functions = {name: method_named(name) for name in methods}
    if scalar not in SCALARS:
        raise UserError(f"scalar={scalar!r}: must be one of {', '.join(SCALARS)}")
    groups = [traced.words[place][1] for place in explained]
    tokens = torch.tensor([p for group in groups for p in group], device=traced.scores.device)
    ids = traced.text.ids[0]
    with torch.enable_grad():
        scores = traced.scores if scalar == "logit" else traced.scores.log_softmax(dim=-1)
        y = scores[tokens - 1, ids[tokens]]
    identity = [sample * len(ids) + p for p in tokens.tolist()]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in methods}
    places = iter((tokens - 1).split(AT_ONCE))
    for rows in each_scalar(traced.trace, y, tokens - 1, identity, at_once=AT_ONCE):
        rows.again = _again(traced, next(places), scalar)
        for name, function in functions.items():
            relevance = function(rows, seed=seed) if name == "random" else function(rows)
            found[name].append((relevance.image, relevance.text))
    owner = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    return {
        name: _merged(traced, owner, len(groups), *(torch.cat(part) for part in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def _again(traced: TracedCaption, positions: Int[Tensor, "scalars"], scalar: str) -> Again:
    """The forward that explains the tokens behind these positions, for methods that make it more than once.

    Each token is a sample with an image of its own, whose text ends where the token is predicted: what comes
    behind it is padding, which no method takes a mean over.
    """
    model, text = traced.model, traced.text
    ids = text.ids[0, positions + 1]
    place = torch.arange(text.ids.shape[1], device=positions.device)

    def chosen(logits: Float[Tensor, "rows vocabulary"], rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
        if scalar == "log_probability":
            logits = logits.log_softmax(dim=-1)
        return logits.gather(1, ids[rows][:, None])[:, 0]

    def forward(rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
        valid = text.valid & (place <= positions[rows][:, None])
        read = TokenizedText(text.ids.expand(len(rows), -1), valid, text.removable & valid)
        logits = model(traced.pixels.expand(len(rows), -1, -1, -1), read, only_text=False)
        return chosen(logits[torch.arange(len(rows), device=rows.device), positions[rows]], rows)

    class Head:
        def applies(self, step: Attention) -> bool:
            return step.name.startswith(model.read_from)

        def __call__(self, pooled: Float[Tensor, "rows width"]) -> Float[Tensor, "rows"]:
            return chosen(model.scores(pooled), torch.arange(len(positions), device=pooled.device))

    return Again(model, forward, Head())


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
