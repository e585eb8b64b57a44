"""How much each word of a caption counts."""

import numpy as np
import pytest

from clipmapper.evaluation.captions.scores import is_stop_word, loss_weights, mean_weights


def test_stop_words():
    for word in ("a", "The", "of", "there", ",", ":", "is"):
        assert is_stop_word(word), word
    for word in ("red", "ring", "left", "above", "next", "two", "small"):
        assert not is_stop_word(word), word


def test_mean():
    assert mean_weights(["a", "red", "ring"]).tolist() == [0, 0.5, 0.5]
    assert mean_weights(["a", "the"]).tolist() == [0.5, 0.5]


def test_what_is_lost():
    worth = {"red": 3.0, "ring": 1.0, "not": -2.0}

    def score(captions):
        return np.array([sum(worth.get(word, 0) for word in caption.split()) for caption in captions])

    assert loss_weights(["a", "red", "ring", "not"], score).tolist() == pytest.approx([0, 0.75, 0.25, 0])
    assert loss_weights(["a", "big", "one"], score).tolist() == pytest.approx(
        [0, 0.5, 0.5]
    )  # nothing is lost
    # Equal words: each is missed as long as the score counts it
    assert loss_weights(["red", "red"], score).tolist() == pytest.approx([0.5, 0.5])
