"""Tokens of a data set's images and texts from a frozen encoder, computed once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from clipmapper.data.token_cache import TextTokens, TokenCache, TokenStore
from clipmapper.host.progress import progress
from clipmapper.models.encoder import ClipEncoder, image_identity, text_identity
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.asked_texts import AskedTexts
from clipmapper.training.processes import this_share
from clipmapper.training.tables import console


@runtime_checkable
class ImageSource(Protocol):
    """The images of a split."""

    def __len__(self) -> int: ...

    def load(self, rows: Sequence[int]) -> Tensor:
        """Read some images as :meth:`pixels` takes them; called in workers."""

    def pixels(self, loaded: Tensor) -> Tensor:
        """Turn loaded images into the encoder's input, on the device of ``loaded``."""

    def digest(self) -> str:
        """A digest of the images' content, in their order."""


def token_store(config: TrainConfig, encoder: ClipEncoder, *, texts: bool) -> TokenStore | None:
    """Where the settings want tokens kept; None where every step is to encode.

    Settings that nothing can be done with are named in a line. ``texts``: whether tokens of texts are to be
    kept as well.
    """
    training = config.training
    folder = None if training.token_cache_folder is None else Path(training.token_cache_folder)
    why = None
    if not training.token_cache:
        if folder is not None:
            why = "training.token_cache_folder is not used, for training.token_cache=false"
    elif not config.encoder.frozen:
        why = "no token cache, for the encoder is trained (encoder.frozen=false): it runs in every step"
    elif texts and encoder.text_tower.appended_class_token:
        # The class token that CoCa's text tower appends would be cut off with a cached text's padding.
        why = "no token cache, for this text tower puts a token behind each text: it runs in every step"
    if why is not None:
        console().print(why, soft_wrap=True)
    if why is not None or not training.token_cache:
        return None
    machine = max(1, this_share().of // config.trainer.num_nodes)
    return TokenStore(folder, training.token_precision, training.token_workers, processes=machine)


def image_shape(encoder: ClipEncoder) -> tuple[int, int]:
    """(tokens, width) of an image."""
    rows, columns = encoder.grid
    return encoder.prefix_tokens + rows * columns, encoder.image_width


def image_key(encoder: ClipEncoder, store: TokenStore, source: ImageSource) -> dict:
    """Everything that tokens of images depend on."""
    of_encoder = store.once("images", lambda: image_identity(encoder))
    return {"encoder": of_encoder, "images": source.digest()}


def text_key(encoder: ClipEncoder, store: TokenStore, texts: AskedTexts) -> dict:
    """Everything that tokens of texts depend on."""
    return {"encoder": store.once("texts", lambda: text_identity(encoder)), "ids": texts.digest()}


def image_tokens(
    encoder: ClipEncoder, store: TokenStore, source: ImageSource, progress: Callable[[int], None]
) -> Float[Tensor, "images tokens width"]:
    """Tokens of every image. A stored file is keyed by encoder, weights, preprocessing and images."""
    encoder.eval()
    device = next(encoder.parameters()).device
    return store.tokens(
        "images",
        lambda: image_key(encoder, store, source),
        len(source),
        image_shape(encoder),
        source.load,
        lambda loaded: encoder.image_tokens(source.pixels(loaded.to(device))),
        progress,
    )


def text_tokens(
    encoder: ClipEncoder, store: TokenStore, texts: AskedTexts, progress: Callable[[int], None]
) -> TextTokens:
    """Tokens of every different text. A stored file is keyed by encoder, weights and the texts' token ids."""
    encoder.eval()
    device, longest = next(encoder.parameters()).device, texts.longest

    def encode(part: tuple[Tensor, Tensor]) -> Tensor:
        ids, valid = (of_part.to(device) for of_part in part)
        tokens = encoder.text_tokens(ids, valid)
        return nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))

    tokens = store.tokens(
        "texts",
        lambda: text_key(encoder, store, texts),
        len(texts),
        (longest, encoder.text_width),
        texts.padded,
        encode,
        progress,
    )
    return TextTokens(tokens, texts.lengths, texts.text_of)


def question_tokens(
    encoder: ClipEncoder,
    store: TokenStore,
    source: ImageSource,
    texts: AskedTexts,
    image_of: Int[Tensor, "questions"],
    name: str,
) -> TokenCache:
    """Tokens of the images and texts of questions, with a progress bar. ``name``: of the split."""
    with progress(f"CLIP tokens, {name} split", len(source) + len(texts)) as advance:
        images = image_tokens(encoder, store, source, advance)
        asked = text_tokens(encoder, store, texts, advance)
    return TokenCache(asked.tokens, asked.lengths, asked.text_of, images, image_of)
