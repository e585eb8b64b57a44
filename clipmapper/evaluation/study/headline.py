"""Which of all quantities a study ranks methods by."""

from clipmapper.evaluation.explanation_scores.values import NEITHER, Quantity

# A model's certainty of what it says; what else is perturbed (accuracy, BLEU) is in the file of values.
_CERTAINTIES = ("probability", "log_probability", "word_probability")
_WITHOUT_RANK = "sanity"  # of which a low value is wanted, but the lowest is no better than a low one


def is_ranked(quantity: Quantity) -> bool:
    """Whether methods are ranked by this quantity, named ``<score>/<quantity>``.

    Of curves the gap between both directions; of the oracle's shares those over both; of localisation mass
    and rank accuracy.
    """
    score, _, name = quantity.name.partition("/")
    parts = name.split("/")
    if quantity.better == NEITHER or score == _WITHOUT_RANK:
        return False
    if score == "removal" or score.startswith("replace_"):
        return "gap" in parts and parts[-1] in _CERTAINTIES
    if score == "oracle":
        return parts[-1] == "share" and not {"positive", "negative"} & set(parts)
    if score == "localisation":
        return parts[-1] in ("mass", "rank")
    return name == score if score in ("f_syn", "adcc") else True


def is_claimed(quantity: Quantity) -> bool:
    """Whether the paper's claim is looked at by this quantity: areas, where tokens are removed, of each
    modality and direction."""
    score, _, name = quantity.name.partition("/")
    parts = name.split("/")
    directed = bool({"positive", "negative"} & set(parts))
    return score == "removal" and directed and parts[-1] in ("accuracy", *_CERTAINTIES)
