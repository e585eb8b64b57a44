"""Sanity: does an explanation change when what the model has learnt is destroyed? (Adebayo et al. 2018)"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.values import LOW, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import ModalityRelevance
from clipmapper.evaluation.statistics import rank_correlation

UNCHANGED = 0.9
"""A method whose maps keep, in the mean, a higher rank correlation than this with those of the trained model,
when nothing of it is left, does not depend on what it has learnt."""


def sanity(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ScoreValues:
    """Spearman's rank correlation with the map of the trained model, as its layers are randomised one after
    the other, from the output to the input ("cascading").

    A quantity per modality and depth, ``image/1 head``, and ``image/all`` and ``text/all`` behind the last.
    What is explained stays the same. Numbers of each parameter are put in a random order: they keep their
    distribution, so that activations keep their size, and what was learnt is gone. (Adebayo et al. draw new
    ones from the initialisation, which a model does not tell.)
    """
    valid = {"image": None, "text": subject.removable_text.cpu().numpy()}
    quantities, values = [], []
    groups = subject.layers
    generator = torch.Generator().manual_seed(seed)
    with restored([parameter for _, group in groups for parameter in group]):
        for depth, (name, group) in enumerate(groups, start=1):
            if progress is not None:
                progress(0)
            for parameter in group:
                shuffle(parameter, generator)
            now = subject.maps()
            names = [f"{depth} {name}"] + ["all"] * (depth == len(groups))
            for modality in subject.modalities:
                row = np.stack(
                    [
                        rank_correlation(
                            *(getattr(its, modality).double().cpu().numpy() for its in (maps[m], now[m])),
                            valid[modality],
                        )
                        for m in maps
                    ]
                )
                quantities += [Quantity(f"{modality}/{shown}", LOW) for shown in names]
                values += [row] * len(names)
    return ScoreValues(tuple(quantities), tuple(maps), subject.sample_ids, np.stack(values))


def unchanged(found: ScoreValues) -> list[str]:
    """The methods that fail, by :data:`UNCHANGED`, in any modality."""
    last = [one for one in found.quantities if one.name.endswith("/all")]
    worst = np.max([found.mean(one) for one in last], axis=0)
    return [method for method, value in zip(found.methods, worst, strict=True) if value > UNCHANGED]


@torch.no_grad()
def shuffle(parameter: Tensor, generator: torch.Generator) -> None:
    """Put the numbers of a parameter in a random order, the same on every device."""
    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
    parameter.copy_(parameter.flatten()[order].view_as(parameter))


@contextmanager
def restored(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give the parameters back the values that they have now, whatever happens to them in between."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
