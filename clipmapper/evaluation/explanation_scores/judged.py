"""Scores of explanations, judged where the truth is known: do they prefer what points at what decides?

Two questions about every quantity of a score. Does it rank methods, and the maps of a single sample, as the
truth does (relevance mass and rank accuracy of Arras et al. 2022, arXiv 2003.07258, by Kendall's τ-b)? And
does it put the planted maps (:mod:`~clipmapper.evaluation.explanation_scores.planted`) in their right order?

A model may look at something else than what decides. Then a score that is right about the model is wrong
here: what is judged is the score and the model together, and a model that answers well is to be taken.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clipmapper.evaluation.explanation_scores.planted import PREFIX, is_planted
from clipmapper.evaluation.explanation_scores.values import HIGH, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.perturbation_scores import MODALITIES
from clipmapper.evaluation.statistics import Interval, bootstrap_interval, kendall_tau, resampled_means

Truth = Mapping[str, Mapping[str, Float[np.ndarray, "methods samples"]]]
"""Modality → "mass" | "rank" → how much of each method's map of each sample is where it should be."""

RIGHT, LEVEL, WRONG = "right", "level", "wrong"
_OF_IMAGES = ("adcc", "sensitivity")  # whose quantities do not name the one modality that they are of
_RESAMPLES = 2000
_ROUNDING = 1e-12  # sums of the same numbers in another order


class Pair(NamedTuple):
    """Two planted maps, one of which is better, and why."""

    better: str
    worse: str
    why: str

    def __str__(self) -> str:
        return f"{self.better} > {self.worse}"


_LAST = "upside down every deciding patch comes behind all that decide nothing: no map is worse"
PAIRS = (
    Pair("truth", "truth_blurred", "a blur ranks patches beside a thing before those that hold a bit of it"),
    Pair("truth", "truth_shifted", "the same values, some of them where nothing decides"),
    Pair("truth", "centre", "what decides may be anywhere"),
    Pair("truth", "edges", "edges are also where nothing decides, and not inside what does"),
    Pair("truth", "noise", "noise says nothing"),
    Pair("truth", "truth_inverted", _LAST),
    Pair("truth_blurred", "noise", "it is highest in and around what decides"),
    Pair("truth_blurred", "truth_inverted", _LAST),
    Pair("truth_shifted", "truth_inverted", _LAST),
    Pair("centre", "truth_inverted", _LAST),
    Pair("edges", "truth_inverted", _LAST),
    Pair("noise", "truth_inverted", _LAST),
)
"""A partial order. What is not here may be either way round: whether a blur or a shift does more harm depends
on how large things are, and whether a blob in the middle or edges say more than noise on the pictures."""


def judge(scored: Mapping[str, ScoreValues], truth: Truth, *, confidence: float, seed: int) -> dict:
    """What each quantity of each score is worth, for ``results.json``.

    ``scored``: of the methods in the order of ``truth``, behind them the planted maps where there are some;
    all of the same samples. A quantity of both modalities is held against the mean of their truths. All is
    oriented so that more is better, and quantities of which that cannot be said are left out.

    score → quantity → "methods" | "samples" → "mass" | "rank" → τ with its interval: between the mean values
    of the methods and their mean truth; and the mean of that within each sample. "planted" → pair → the mean
    paired difference, which should be above 0, and its "verdict": "right" or "wrong" where the interval is
    clear of 0, else "level". "maps" → planted map → its mean. Intervals are percentile bootstrap intervals
    over samples, a pair's alone: of many pairs that are truly level some will not be called so.

    Raises ValueError where scores and truth are of other methods or samples.
    """
    found: dict = {}
    for score, values in scored.items():
        methods = [method for method in values.methods if not is_planted(method)]
        real = values.part(methods)
        drawn = real.resampled(seed=seed, resamples=_RESAMPLES)
        planted = _planted(values, confidence, seed)
        its = found[score] = {}
        for place, quantity in enumerate(values.quantities):
            if quantity.better == NEITHER:
                continue
            sign = _sign(quantity)
            entry = its[quantity.name] = {"methods": {}, "samples": {}}
            for name, true in _truth_of(score, quantity, truth).items():
                if true.shape != real.values.shape[1:]:
                    raise ValueError(
                        f"{score}: {real.values.shape[1:]} methods and samples, not {true.shape}"
                    )
                ranks = sign * drawn[:, place], resampled_means(true.T, _RESAMPLES, seed)
                tau = kendall_tau(sign * real.mean(quantity), true.mean(axis=1))
                low, high = _ends(kendall_tau(*ranks), confidence)
                entry["methods"][name] = Interval(float(tau), low, high).as_dict()
                # A share's divisor is the same for all methods: within a sample it orders nothing.
                within = kendall_tau(sign * real.values[place].T, true.T)
                interval = bootstrap_interval(within, confidence=confidence, seed=seed)
                entry["samples"][name] = interval.as_dict()
            if planted:
                entry["planted"] = {pair: by_place[place] for pair, by_place in planted.items()}
                entry["maps"] = {
                    method.removeprefix(PREFIX): mean
                    for method, mean in zip(values.methods, values.mean(quantity).tolist(), strict=True)
                    if is_planted(method)
                }
    return found


def _planted(values: ScoreValues, confidence: float, seed: int) -> dict[str, list[dict]]:
    """Pair → of every quantity, the paired difference and what it says; empty without planted maps."""
    if not any(map(is_planted, values.methods)):
        return {}
    places = {method: place for place, method in enumerate(values.methods)}
    over = {
        worse: values.intervals(PREFIX + worse, confidence=confidence, seed=seed, resamples=_RESAMPLES)
        for worse in {pair.worse for pair in PAIRS}
    }
    found = {}
    for pair in PAIRS:
        differences = over[pair.worse][:, places[PREFIX + pair.better]]
        found[str(pair)] = []
        for quantity, (mean, *ends) in zip(values.quantities, differences.tolist(), strict=True):
            sign = _sign(quantity)
            low, high = sorted(sign * end for end in ends)
            verdict = RIGHT if low > _ROUNDING else WRONG if high < -_ROUNDING else LEVEL
            found[str(pair)].append(Interval(sign * mean, low, high).as_dict() | {"verdict": verdict})
    return found


def _truth_of(
    score: str, quantity: Quantity, truth: Truth
) -> dict[str, Float[np.ndarray, "methods samples"]]:
    """That of the modalities that the quantity is of."""
    named = [part for part in quantity.name.split("/") if part in MODALITIES]
    of = named or (["image"] if score in _OF_IMAGES else list(truth))
    names = next(iter(truth.values()))
    return {name: np.mean([truth[modality][name] for modality in of], axis=0) for name in names}


def _sign(quantity: Quantity) -> float:
    return 1.0 if quantity.better == HIGH else -1.0


def _ends(drawn: Float[np.ndarray, "resamples"], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def judged_table(found: Mapping, truth: str = "rank") -> str:
    """:func:`judge`'s findings as a table in Markdown, a row a quantity. ``truth``: "mass" or "rank"."""
    head = ("score", "quantity", "τ over methods", "τ within samples", "pairs right", "level", "wrong")
    rows = [head, ("---",) * 2 + ("---:",) * 3 + ("---",) * 2]
    for score, by_quantity in found.items():
        for quantity, its in by_quantity.items():
            verdicts = {pair: difference["verdict"] for pair, difference in its.get("planted", {}).items()}
            right = sum(verdict == RIGHT for verdict in verdicts.values())
            others = [
                ", ".join(pair for pair, verdict in verdicts.items() if verdict == wanted)
                for wanted in (LEVEL, WRONG)
            ]
            taus = [_shown(its[over][truth]) for over in ("methods", "samples")]
            rows.append((score, quantity, *taus, f"{right} of {len(verdicts)}", *others))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(interval: Mapping[str, float]) -> str:
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**interval)
