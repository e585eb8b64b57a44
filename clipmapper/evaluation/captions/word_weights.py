"""How much each word of a caption counts when the maps of its words are averaged into one map."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

WORD_WEIGHTS = ("mean", "cider", "clip")

# English words that say nothing of what is to be seen. Words of place ("left", "above", "next") are not among
# them, as they are in the usual lists made for retrieval: a caption can be wrong in them.
STOP_WORDS = frozenset(
    (
        "a", "an", "the", "and", "or", "but", "nor", "so", "of", "to", "in", "on", "at", "by", "for",
        "from", "with", "without", "into", "onto", "as", "than", "then", "that", "this", "these", "those",
        "it", "its", "he", "she", "they", "him", "her", "their", "we", "our", "you", "your", "i", "my",
        "me", "who", "whom", "which", "whose", "what", "where", "when", "is", "are", "was", "were", "be",
        "been", "being", "am", "do", "does", "did", "has", "have", "had", "having", "will", "would",
        "can", "could", "may", "might", "must", "shall", "should", "there", "here", "not", "no", "only",
        "just", "nothing", "some", "any", "each", "both", "all", "very", "too", "also", "see", "image",
        "picture", "photo", "near", "s", "t",
    )
)  # fmt: skip


def is_stop_word(word: str) -> bool:
    """Whether a word counts for nothing: a function word or a punctuation mark."""
    return word.lower() in STOP_WORDS or not any(letter.isalnum() for letter in word)


def mean_weights(words: Sequence[str]) -> Float[np.ndarray, "words"]:
    """Equal for all words but stop-words, which have 0; they sum to 1. Only stop-words: equal for all."""
    counting = np.array([not is_stop_word(word) for word in words], dtype=np.float64)
    if not counting.any():
        counting[:] = 1
    return counting / counting.sum()


def loss_weights(
    words: Sequence[str], score: Callable[[list[str]], Float[np.ndarray, "captions"]]
) -> Float[np.ndarray, "words"]:
    """Weigh words in proportion to what a caption's score loses without them; they sum to 1.

    ``score`` gives the scores of several captions of the same image: CIDEr against its references ("cider"),
    or CLIPScore ("clip"). A word without which the score is no lower has 0; where that is so of all words,
    :func:`mean_weights`.
    """
    shorter = [" ".join([*words[:i], *words[i + 1 :]]) for i in range(len(words))]
    scores = np.asarray(score([" ".join(words), *shorter]), dtype=np.float64)
    lost = np.maximum(scores[0] - scores[1:], 0)
    # Rounding of a score is no loss.
    lost[lost <= 1e-6 * abs(scores[0])] = 0
    return lost / lost.sum() if lost.any() else mean_weights(words)
