"""The map of a caption from the maps of its words."""

import numpy as np
from jaxtyping import Float

from clipmapper.errors import UserError
from clipmapper.settings.keys import WORD_MAPS


def check_word_maps(word_maps: str) -> None:
    """Raises ``UserError`` for another word."""
    if word_maps not in WORD_MAPS:
        raise UserError(f"word_maps={word_maps!r}: must be one of {', '.join(WORD_MAPS)}")


def caption_map(
    maps: Float[np.ndarray, "words rows columns"], weights: Float[np.ndarray, "words"], word_maps: str
) -> Float[np.ndarray, "rows columns"]:
    """The map of a caption, by one of these ways:

    - "scaled" (the code of WRA): the weighted mean of the maps, each of which is first divided by its sum, so
      that a word counts for its weight and not for the size of its map. Where a map has negative entries too
      (evidence for and against), by the sum of their sizes: the sum itself may be 0. A map of zeros stays
      one; the word then adds nothing.
    - "raw": the weighted mean of the maps as they are.
    - "root": the weighted mean of the roots of the scaled maps' entries, with their signs: a patch that a
      little of every word needs comes before one that a single word needs much.
    - "largest": of each patch the largest weighted entry of the scaled maps.
    - "coverage" (ours): by how much each patch adds to Σ_t w_t √(Σ_{j ∈ S} R_tj), R the positive parts of the
      scaled maps, when the patch that adds most is put into S first, then the next: patches that serve words
      which those before them don't. What is added never grows on the way, so that the map has this order.
    """
    if word_maps == "raw":
        return np.tensordot(weights, maps, axes=1)
    scaled = scaled_maps(maps)
    if word_maps == "root":
        return np.tensordot(weights, np.sign(scaled) * np.sqrt(np.abs(scaled)), axes=1)
    if word_maps == "largest":
        return (weights[:, None, None] * scaled).max(axis=0)
    if word_maps == "coverage":
        return _coverage(scaled, weights)
    return np.tensordot(weights, scaled, axes=1)


def scaled_maps(maps: Float[np.ndarray, "words rows columns"]) -> Float[np.ndarray, "words rows columns"]:
    """Each map divided by the sum of the sizes of its entries; a map of zeros as it is."""
    largest = np.abs(maps).max(axis=(1, 2), keepdims=True)
    # By the largest first: of very small numbers the sum could not be divided by.
    maps = np.divide(maps, largest, out=np.zeros_like(maps), where=largest > 0)
    total = np.abs(maps).sum(axis=(1, 2), keepdims=True)
    return np.divide(maps, total, out=maps, where=total > 0)


def _coverage(
    scaled: Float[np.ndarray, "words rows columns"], weights: Float[np.ndarray, "words"]
) -> Float[np.ndarray, "rows columns"]:
    words = np.maximum(scaled, 0).reshape(len(scaled), -1)
    covered, gains = np.zeros((len(words), 1), words.dtype), np.full(words.shape[1], np.nan, words.dtype)
    for _ in range(words.shape[1]):
        adds = weights @ (np.sqrt(covered + words) - np.sqrt(covered))
        adds[~np.isnan(gains)] = -1  # those that are in S
        first = int(adds.argmax())
        gains[first] = adds[first]
        covered += words[:, [first]]
    return gains.reshape(scaled.shape[1:])
