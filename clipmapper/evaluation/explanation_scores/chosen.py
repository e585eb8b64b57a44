"""All scores of explanations by the names that settings have for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.adcc import adcc
from clipmapper.evaluation.explanation_scores.captum_scores import infidelity, require_captum, sensitivity
from clipmapper.evaluation.explanation_scores.curves import area_values, curves
from clipmapper.evaluation.explanation_scores.oracle import oracle_share
from clipmapper.evaluation.explanation_scores.planted import is_planted
from clipmapper.evaluation.explanation_scores.replacement import REPLACEMENTS, WORDS_REPLACED
from clipmapper.evaluation.explanation_scores.sanity import sanity
from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.synergy import synergy
from clipmapper.evaluation.explanation_scores.values import ScoreValues
from clipmapper.evaluation.perturbation import FRACTIONS, ModalityRelevance
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, PerturbationScores
from clipmapper.settings.keys import EXPLANATION_SCORES

REMOVAL = "removal"
_REPLACING = {f"replace_{kind}": kind for kind in REPLACEMENTS}
_OTHERS: dict[str, Callable[..., ScoreValues]] = {
    "oracle": oracle_share,
    "f_syn": synergy,
    "adcc": adcc,
    "infidelity": infidelity,
    "sensitivity": sensitivity,
    "sanity": sanity,
}
_OF_CAPTUM = ("infidelity", "sensitivity")


@dataclass(frozen=True)
class Scored:
    """What one score says: its values, and the curves behind them where it has some.

    Where planted maps were scored too they are behind the methods of ``values``, and nowhere else.
    """

    values: ScoreValues
    curves: PerturbationScores | None = None

    @property
    def of_methods(self) -> ScoreValues:
        """The values without those of planted maps."""
        return self.values.part(_unplanted(self.values.methods))


def check_scores(scores: Sequence[str], modalities: Sequence[str]) -> None:
    """Raise ``UserError`` where a model whose ``modalities`` are perturbed has no such score, and where what
    it needs is not installed."""
    for score in scores:
        if score not in EXPLANATION_SCORES:
            raise UserError(f"scores: there is no {score!r}; one of {', '.join(EXPLANATION_SCORES)}")
        if score == "f_syn" and len(modalities) < 2:
            raise UserError(
                "scores: f_syn removes patches and words together, and of this model only patches are "
                f"removed; others are {', '.join(name for name in EXPLANATION_SCORES if name != score)}"
            )
    if set(scores) & set(_OF_CAPTUM):
        require_captum()


def score_kind(score: str) -> type[PerturbationScores] | type[ScoreValues]:
    """What :func:`score_samples` gives for this score."""
    return PerturbationScores if score == REMOVAL or score in _REPLACING else ScoreValues


def score_samples(
    score: str,
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> PerturbationScores | ScoreValues:
    """One of :data:`~clipmapper.settings.keys.EXPLANATION_SCORES` of every method's maps of some samples.

    ``progress`` is told of as many points as :func:`points` says.
    """
    if score_kind(score) is PerturbationScores:
        return curves(
            subject,
            maps,
            _modalities(score, subject.modalities),
            replacement=_REPLACING.get(score),
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    found = _OTHERS[score](subject, maps, batch_size=batch_size, seed=seed, progress=progress)
    if progress is not None:
        progress(points(score, len(subject.sample_ids), len(maps), subject.modalities))
    return found


def _modalities(score: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """Those that the score is of."""
    words = score == REMOVAL or _REPLACING.get(score) in WORDS_REPLACED
    return tuple(name for name in modalities if name == "image" or words)


def points(score: str, samples: int, methods: int, modalities: Sequence[str]) -> int:
    """How much there is to do, in points of curves (one variant of one sample)."""
    per_method = len(_modalities(score, modalities)) * len(DIRECTIONS) * len(FRACTIONS)
    return samples * methods * per_method


def as_scored(found: PerturbationScores | ScoreValues) -> Scored:
    """The values of whatever :func:`score_samples` gave, and its curves."""
    if not isinstance(found, PerturbationScores):
        return Scored(found)
    return Scored(area_values(found), found.part(_unplanted(found.methods)))


def _unplanted(methods: Sequence[str]) -> list[str]:
    return [method for method in methods if not is_planted(method)]
