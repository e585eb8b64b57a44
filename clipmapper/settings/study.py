# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The settings of ``clipmapper study``."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from clipmapper.host.outputs import file_name_problem
from clipmapper.settings.commands import device_problems
from clipmapper.settings.data import DataConfig
from clipmapper.settings.keys import (
    EXPLANATION_SCORES,
    SEED_LIMIT,
    WORD_MAPS,
    Section,
    explanation_methods,
    list_problems,
    setting,
)


@dataclass
class StudyConfig(Section):
    """``clipmapper study``: models × seeds × methods × scores.

    ``models``: name → a checkpoint, an exported folder or a shipped model; or a list, what ``clipmapper
    train`` is given to train one (with each of ``seeds``, and with ``training`` where the list does not say
    otherwise); or null, which takes a model of the study's file out. ``data``: as of
    :class:`~clipmapper.settings.commands.PerturbConfig`, of all models; null: what each was trained on.
    ``fewer``: score → of how many of the ``samples`` it is. ``of_model``:
    model → other numbers of ``samples``, and of scores. ``judged``:
    whether planted maps and the truth judge the scores. ``only_model``, ``only_seed``: the part of the
    study that this call is to work off. ``threads``: of each of the ``jobs``; null: the cores shared out.
    """

    models: dict[str, Any] = setting()
    training: list[str] = setting()
    seeds: list[int] = setting(minimum=0, maximum=SEED_LIMIT)
    data: DataConfig | None = setting()
    split: str = setting(choices=("validation", "held_out", "train", "test"))
    methods: list[str] = setting(choices=explanation_methods)
    scores: list[str] = setting(choices=EXPLANATION_SCORES)
    caption_scores: list[str] | None = setting()
    word_maps: str | None = setting(choices=WORD_MAPS)
    samples: int = setting(minimum=1)
    fewer: dict[str, int] = setting()
    of_model: dict[str, dict[str, int]] = setting()
    judged: bool = setting()
    only_model: str | None = setting()
    only_seed: int | None = setting(minimum=0, maximum=SEED_LIMIT)
    output: str = setting()
    resume: bool = setting()
    jobs: int = setting(minimum=1)
    threads: int | None = setting(minimum=1)
    batch_size: int = setting(minimum=1)
    chunk: int = setting(minimum=1)
    pictures: int = setting(minimum=0)
    confidence: float = setting(above=0, below=1)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
    device: str = setting()

    def for_model(self, model: str) -> "StudyConfig":
        """The settings with this model's numbers of samples."""
        counts = dict(self.of_model.get(model, {}))
        samples = counts.pop("samples", self.samples)
        fewer = {score: min(count, samples) for score, count in {**self.fewer, **counts}.items()}
        return replace(self, samples=samples, fewer=fewer)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from list_problems("methods", self.methods)
        yield from list_problems("scores", self.scores)
        yield from list_problems("seeds", self.seeds)
        if self.caption_scores is not None:
            yield from list_problems("caption_scores", self.caption_scores)
        yield from device_problems(self.device)
        yield from _counts_problems("fewer", self.fewer, self.samples)
        chosen = {name: given for name, given in self.models.items() if given is not None}
        for name, counts in self.of_model.items():
            if name not in self.models:
                yield f"of_model.{name}", f"no model of this study; there are {', '.join(chosen)}"
            of_scores = {score: count for score, count in counts.items() if score != "samples"}
            samples = counts.get("samples", self.samples)
            if samples < 1:
                yield f"of_model.{name}.samples", f"{samples} is less than 1"
            yield from _counts_problems(f"of_model.{name}", of_scores, samples)
        if not chosen:
            yield "models", "there are none; give one as +models.NAME=CHECKPOINT"
        for name, given in chosen.items():
            if problem := file_name_problem(name):
                yield "models", f"{name!r}: {problem}"
            elif not given or not (isinstance(given, str) or _is_texts(given)):
                yield (
                    f"models.{name}",
                    f"{given!r} is neither a checkpoint nor a list of settings for clipmapper train",
                )
        if self.only_model is not None and self.only_model not in chosen:
            yield "only_model", f"{self.only_model!r} is not one of {', '.join(chosen)}"
        if self.only_seed is not None and self.only_seed not in self.seeds:
            yield "only_seed", f"{self.only_seed} is not one of seeds={self.seeds}"


def _counts_problems(key: str, counts: dict[str, int], samples: int) -> Iterator[tuple[str, str]]:
    for score, count in counts.items():
        if score not in EXPLANATION_SCORES:
            yield f"{key}.{score}", f"no score; there are {', '.join(EXPLANATION_SCORES)}"
        elif not 1 <= count <= samples:
            yield f"{key}.{score}", f"{count} is not between 1 and samples={samples}"


def _is_texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(one, str) for one in given)
