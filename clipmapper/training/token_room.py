"""The room and the time that a token cache will take, checked and said before anything is computed."""

import time
from collections.abc import Callable, Mapping

import torch

from clipmapper.data.token_cache import TokenStore, size_of
from clipmapper.host.progress import span
from clipmapper.models.encoder import ClipEncoder
from clipmapper.training.asked_texts import AskedTexts
from clipmapper.training.encoder_tokens import ImageSource, image_key, image_shape, text_key
from clipmapper.training.tables import console

_TRIED = 64  # images or texts by which the time is measured ...
_TIMES = 3  # ... so often; the fastest counts, for a machine that is busy for a moment is no measure


def check_tokens(
    encoder: ClipEncoder, store: TokenStore, splits: Mapping[str, tuple[ImageSource, AskedTexts | None]]
) -> None:
    """Raise ``UserError`` where the tokens of all splits together have no room; otherwise say their size, and
    how long it will take to compute those that are not there, measured by encoding a few.

    ``splits``: name → the images, and the texts of the questions about them (None: none are kept).
    """
    encoder.eval()
    images = image_shape(encoder)
    asked = [texts for _, texts in splits.values() if texts is not None]
    shapes = {"images": (sum(len(source) for source, _ in splits.values()), *images)}
    if asked:
        # Each split has rows as long as its longest text; the longest of all is a little more.
        longest = max(texts.longest for texts in asked)
        shapes["texts"] = (sum(map(len, asked)), longest, encoder.text_width)
    left, files = {kind: shape[0] for kind, shape in shapes.items()}, []
    if store.folder is not None:
        of_images = [
            store.file("images", image_key(encoder, store, source), len(source), images)
            for source, _ in splits.values()
        ]
        of_texts = [
            store.file(
                "texts", text_key(encoder, store, texts), len(texts), (texts.longest, encoder.text_width)
            )
            for texts in asked
        ]
        files = [*of_images, *of_texts]
        left = {"images": sum(file.missing_rows() for file in of_images)}
        left["texts"] = sum(file.missing_rows() for file in of_texts)
    store.check_room(shapes, files)

    counts = " and ".join(f"{shape[0]:,} {kind}" for kind, shape in shapes.items())
    where = "in memory" if store.folder is None else f"in {store.folder}"
    line = f"token cache: {counts}, {size_of(store.bytes_of(shapes))} {where} ({store.precision})"
    if not any(left.values()):
        line += "; all there"
    else:
        source = max((source for source, _ in splits.values()), key=len)
        seconds = left["images"] * _image_seconds(encoder, store, source) if left["images"] else 0.0
        if left.get("texts"):
            seconds += left["texts"] * _text_seconds(encoder, max(asked, key=len))
        some = "" if left == {kind: shape[0] for kind, shape in shapes.items()} else "the rest "
        line += f"; {some}takes about {span(seconds)}"
    console().print(line, markup=False, soft_wrap=True, highlight=False)


@torch.no_grad()
def _image_seconds(encoder: ClipEncoder, store: TokenStore, source: ImageSource) -> float:
    """Measure the time of one image. Workers prepare images while others are encoded."""
    device = next(encoder.parameters()).device
    rows = range(min(_TRIED, len(source)))
    loading, loaded = _timed(lambda: source.load(rows))
    encoding, _ = _timed(lambda: encoder.image_tokens(source.pixels(loaded.to(device))).cpu())
    both = max(loading / store.workers, encoding) if store.workers else loading + encoding
    return both / len(rows)


@torch.no_grad()
def _text_seconds(encoder: ClipEncoder, texts: AskedTexts) -> float:
    device = next(encoder.parameters()).device
    some = texts.padded(range(0, len(texts), max(1, len(texts) // _TRIED))[:_TRIED])
    ids, valid = (of_some.to(device) for of_some in some)
    return _timed(lambda: encoder.text_tokens(ids, valid).cpu())[0] / len(ids)


def _timed(work: Callable):
    """The seconds of the fastest of some calls, and what the last gives: the first warms up."""
    found = work()
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - began)
    return min(seconds), found
