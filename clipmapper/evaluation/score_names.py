"""The scores that perturbation tests give, by the names that results, tables and figures have for them."""

from typing import NamedTuple


class ScoreName(NamedTuple):
    """``title``: in tables. ``axis``: of a curve. ``factor``: 100 for a share, which tables show in per
    cent."""

    title: str
    axis: str
    factor: int


LOG_PROBABILITY, WORD_PROBABILITY = "log_probability", "word_probability"
SCORES = {
    "accuracy": ScoreName("soft accuracy (%)", "soft accuracy", 100),
    "probability": ScoreName(
        "probability of the predicted answer (%)", "probability of the predicted answer", 100
    ),
    LOG_PROBABILITY: ScoreName("log-probability (nats)", "log-probability of the caption (nats)", 1),
    WORD_PROBABILITY: ScoreName("probability (%)", "probability of the word", 100),
    **{f"bleu_{n}": ScoreName(f"BLEU-{n} (%)", f"BLEU-{n} of single captions", 100) for n in range(1, 5)},
    "rouge_l": ScoreName("ROUGE-L (%)", "ROUGE-L", 100),
    "cider": ScoreName("CIDEr-D", "CIDEr-D", 1),
    "meteor": ScoreName("METEOR (%)", "METEOR", 100),
    "spice": ScoreName("SPICE (%)", "SPICE", 100),
}
