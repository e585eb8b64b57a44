"""The perturbation (deletion) test: remove tokens in the order of an explanation, watch the scores.

Protocol of WRA (arXiv 2308.10240) and of Chefer, Gur & Wolf (ICCV 2021, arXiv 2103.15679). *Positive* removes
the most relevant tokens first: a faithful explanation makes the score fall at once, a low area is good.
*Negative* removes the least relevant first: a high area is good. *Insertion* is not computed apart: keeping
the most relevant share f is removing the least relevant 1 − f, so the insertion curve is the negative curve
read from right to left, and its area is the same.

The model is known only by a :class:`VariantScorer`, where a variant is one sample with some tokens removed.
All methods, directions and fractions of a chunk of samples become one list of variants: equal ones are scored
once, and those that keep equally many tokens share a forward.

A large set is gone through in chunks, so that an interrupted run goes on where it stopped.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipmapper.errors import visible
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES, PerturbationScores
from clipmapper.host.outputs import whole_file

FRACTIONS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.50, 0.75, 1.0)


@runtime_checkable
class VariantScorer(Protocol):
    """Scores the samples of one chunk with some of their tokens removed: all that is known of the model."""

    names: tuple[str, ...]

    def unperturbed(self, batch_size: int) -> Float[np.ndarray, "samples scores"]:
        """Scores of the untouched samples. Called once, before :meth:`score`."""

    def score(
        self,
        sample: Int[np.ndarray, "variants"],
        image_keep: Int[Tensor, "variants kept_patches"] | None,
        text_keep: Int[Tensor, "variants kept_tokens"] | None,
    ) -> Float[np.ndarray, "variants scores"]:
        """`sample` are positions in the chunk.

        `image_keep` holds the patches kept (0 … P−1, ascending; the class token is always kept and not
        listed), `text_keep` the text tokens kept *including* start and end tokens, ascending, filled up with
        −1 at the end. None means that nothing of that modality is removed. The indices are on the CPU.
        """


@dataclass(frozen=True)
class ModalityRelevance:
    """One method's relevance of every image patch and of every text token (padded as the text is)."""

    image: Float[Tensor, "samples patches"]
    text: Float[Tensor, "samples tokens"]


def number_removed(fraction: float, removable: Int[np.ndarray, "samples"]) -> Int[np.ndarray, "samples"]:
    """fraction · removable, halves rounded up: 0 removes nothing, 1 everything."""
    # The small addend: 0.29 · 50 is 14.5 on paper, and a last bit less in binary.
    return np.floor(fraction * removable + 0.5 + 1e-9).astype(np.int64)


def removal_order(
    relevance: Float[np.ndarray, "*methods samples tokens"],
    *,
    seed: int,
    positive: bool,
    removable: Bool[np.ndarray, "samples tokens"] | None = None,
    sample_ids: Int[np.ndarray, "samples"] | None = None,
) -> Int[np.ndarray, "*methods samples tokens"]:
    """Token indices in the order of their removal: most relevant first if `positive`, else least first.

    Ties are broken by a random permutation of the sample's removable tokens, drawn from (seed, sample id) and
    nothing else: not by index (which would favour the image's top rows), and not by what shares the chunk.
    All methods get the same permutation, so that their difference is not in the luck of the draw, and the
    negative order is the positive one reversed. Tokens that may not be removed come last, in no given order.
    """
    if not np.isfinite(relevance).all():
        raise ValueError("relevance must be finite")
    samples, tokens = relevance.shape[-2:]
    if removable is None:
        removable = np.ones((samples, tokens), dtype=bool)
    if sample_ids is None:
        sample_ids = np.arange(samples)
    tie = np.zeros((samples, tokens))
    for i, sample_id in enumerate(sample_ids):
        generator = np.random.default_rng([seed, int(sample_id)])
        tie[i, removable[i]] = generator.permutation(int(removable[i].sum()))
    sign = -1.0 if positive else 1.0
    keys = (sign * tie, sign * relevance, ~removable)  # the last key decides first
    return np.lexsort(np.stack([np.broadcast_to(key, relevance.shape) for key in keys]), axis=-1)


def _kept_sets(
    relevance: Float[np.ndarray, "methods samples tokens"],
    removable: Bool[np.ndarray, "samples tokens"],
    valid: Bool[np.ndarray, "samples tokens"],
    fractions: Sequence[float],
    seed: int,
    sample_ids: Int[np.ndarray, "samples"],
) -> Bool[np.ndarray, "directions methods samples fractions tokens"]:
    removed = np.stack([number_removed(f, removable.sum(axis=1)) for f in fractions], axis=1)
    kept = []
    for direction in DIRECTIONS:
        order = removal_order(
            relevance,
            seed=seed,
            positive=direction == "positive",
            removable=removable,
            sample_ids=sample_ids,
        )
        rank = np.argsort(order, axis=-1)  # the place of each token in the order
        kept.append(valid[:, None] & (rank[:, :, None] >= removed[:, :, None]))
    return np.stack(kept)


def unique_variants(
    sample: Int[np.ndarray, "variants"], kept: Bool[np.ndarray, "variants tokens"]
) -> tuple[Int[np.ndarray, "unique"], Int[np.ndarray, "variants"]]:
    """Positions of one variant of each kind, and the kind of every variant.

    Kinds are sorted by the number of tokens kept, most first (so that a forward too large for the memory
    fails at once), then by sample.
    """
    gone = kept.shape[1] - kept.sum(axis=1)
    # Equal bytes = equal variant; big-endian numbers, so that bytes sort as the numbers do.
    fields = [x.astype(">u4").view(np.uint8).reshape(-1, 4) for x in (gone, sample)]
    rows = np.ascontiguousarray(np.concatenate([*fields, np.packbits(kept, axis=1)], axis=1))
    _, first, kind = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return first, kind


def _batches(count: Int[np.ndarray, "variants"], batch_size: int, *, equal_counts: bool) -> Iterator[slice]:
    """Consecutive batches of variants sorted by count; with `equal_counts` no batch mixes two counts."""
    ends = np.flatnonzero(np.diff(count)) + 1 if equal_counts else np.array([], dtype=np.int64)
    for start, stop in zip([0, *ends], [*ends, len(count)], strict=True):
        for begin in range(int(start), int(stop), batch_size):
            yield slice(begin, min(begin + batch_size, int(stop)))


def kept_indices(kept: Bool[np.ndarray, "variants tokens"]) -> Int[Tensor, "variants kept_tokens"]:
    """The positions kept, ascending; rows that keep fewer are filled up with −1."""
    count = kept.sum(axis=1)
    width = int(count.max())
    index = np.argsort(~kept, axis=1, kind="stable")[:, :width]
    return torch.from_numpy(np.where(np.arange(width) < count[:, None], index, -1))


@torch.no_grad()
def perturb(
    scorer: VariantScorer,
    relevance: Mapping[str, ModalityRelevance],
    removable_text: Bool[Tensor, "samples tokens"],
    text_valid: Bool[Tensor, "samples tokens"],
    *,
    sample_ids: Int[np.ndarray, "samples"],
    fractions: Sequence[float] = FRACTIONS,
    modalities: Sequence[str] = MODALITIES,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PerturbationScores:
    """Curves of every method on one chunk of samples, each modality perturbed while the other stays whole.

    `relevance` maps method names to relevance. `removable_text` is false at start, end and padding tokens,
    `text_valid` at padding; every image patch is removable. `sample_ids` (not negative) and `seed` fix how
    ties are broken: a sample's curves do not depend on the chunk or the batch it is in. Fraction 0 is the
    unperturbed model itself. A text without removable tokens gets a flat curve.

    `batch_size` limits the variants of one forward. `progress` is told how many points of curves each forward
    settled; in all samples × methods × modalities × 2 × fractions.
    """
    at = np.array(fractions, dtype=np.float64)
    if not relevance:
        raise ValueError("no method to score")
    if not modalities or not set(modalities) <= set(MODALITIES):
        raise ValueError(f"modalities must be among {', '.join(MODALITIES)}, not {tuple(modalities)}")
    if len(at) < 2 or at[0] != 0 or at[-1] > 1 or (np.diff(at) <= 0).any():
        raise ValueError(f"fractions must start at 0 and rise to at most 1, not {tuple(fractions)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if (removable_text & ~text_valid).any():
        raise ValueError("padding cannot be removable")
    count = len(sample_ids)
    if count == 0 or len(text_valid) != count:
        raise ValueError("sample_ids and text masks must belong to the same samples, at least one")

    whole = scorer.unperturbed(batch_size)
    if len(whole) != count:
        raise ValueError(f"the scorer has {len(whole)} samples, but {count} sample_ids are given")
    results = []
    for modality in modalities:
        values = np.stack([getattr(its, modality).double().cpu().numpy() for its in relevance.values()])
        if modality == "text":
            removable, valid = removable_text.cpu().numpy(), text_valid.cpu().numpy()
        else:
            removable = valid = np.ones(values.shape[1:], dtype=bool)
        if values.shape[1:] != (count, valid.shape[1]):
            raise ValueError(f"relevance of the {modality} has shape {values.shape[1:]}, not {valid.shape}")
        kept = _kept_sets(values, removable, valid, fractions, seed, sample_ids)
        curve_shape = kept.shape[:-1]
        sample = np.broadcast_to(np.arange(count)[:, None], curve_shape).ravel()
        kept = kept.reshape(len(sample), -1)

        scores = whole[sample]
        changed = np.flatnonzero((kept != valid[sample]).any(axis=1))
        if progress is not None:
            progress(len(sample) - len(changed))
        first, kind = unique_variants(sample[changed], kept[changed])
        unique, points = changed[first], np.bincount(kind, minlength=len(first))
        unique_scores = np.empty((len(unique), len(scorer.names)))
        for batch in _batches(kept[unique].sum(axis=1), batch_size, equal_counts=modality == "image"):
            keep = kept_indices(kept[unique[batch]])
            keeps = (keep, None) if modality == "image" else (None, keep)
            unique_scores[batch] = scorer.score(sample[unique[batch]], *keeps)
            if progress is not None:
                progress(int(points[batch].sum()))
        scores[changed] = unique_scores[kind]
        results.append(scores.reshape(*curve_shape, -1))
    found = np.moveaxis(np.stack(results), -1, 0)
    return PerturbationScores(tuple(relevance), tuple(modalities), scorer.names, at, sample_ids, found)


_log = logging.getLogger(__name__)


@runtime_checkable
class Kept(Protocol):
    """What is known of some samples: kept in a file, and put together from that of parts of them."""

    @classmethod
    def concatenate(cls, parts: Sequence[Any]) -> Any: ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Any: ...

    def to_arrays(self) -> dict[str, np.ndarray]: ...


_Found = TypeVar("_Found", bound=Kept)


def run_in_chunks(
    n_samples: int,
    chunk_size: int,
    compute: Callable[[range], _Found],
    *,
    folder: Path | None,
    key: str,
    kind: type[_Found] = PerturbationScores,
) -> _Found:
    """Scores of samples 0 … n_samples − 1, `chunk_size` at a time; `compute` gets the positions of one chunk
    and gives a ``kind``.

    With a `folder`, each finished chunk is kept as `chunk_00000.npz` and so on, together with `key`: a string
    that names everything the numbers depend on (checkpoint, data, methods, seed, fractions …). A later run
    takes a chunk with the same key and the same positions from its file; any other file is replaced, a
    damaged one with a warning in the log.
    """
    if n_samples < 1 or chunk_size < 1:
        raise ValueError(f"needs at least one sample and a chunk of at least one: {n_samples}, {chunk_size}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for index, start in enumerate(range(0, n_samples, chunk_size)):
        positions = range(start, min(start + chunk_size, n_samples))
        path = None if folder is None else folder / f"chunk_{index:05d}.npz"
        # The positions belong to the key: another chunk size cuts the same samples differently.
        chunk_key = f"{key} [{positions.start}:{positions.stop}]"
        scores = None if path is None else _load_chunk(path, chunk_key, kind)
        if scores is None:
            scores = compute(positions)
            if path is not None:
                with whole_file(path, durable=False) as file:
                    np.savez(file, **scores.to_arrays(), key=np.array(chunk_key))
        chunks.append(scores)
    return kind.concatenate(chunks)


def finished_chunks(folder: Path, key: str) -> int:
    """How many chunks, in ``folder`` and those in it, a run with this ``key`` need not compute again."""
    return sum(_key_of(path).startswith(f"{key} [") for path in folder.rglob("chunk_*.npz"))


def _key_of(path: Path) -> str:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return str(stored["key"])
    except Exception:  # as in _load_chunk
        return ""


def _load_chunk(path: Path, chunk_key: str, kind: type[_Found]) -> _Found | None:
    if not path.exists():
        return None
    try:
        # Opened here, because numpy leaves a damaged file open that it was given by name.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != chunk_key:
                return None
            return kind.from_arrays(stored)
    # What numpy raises for an empty, a foreign, an incomplete and a cut file, and one with pickled objects.
    except Exception as error:
        _log.warning("%s is damaged and is computed again (%s)", path, visible(str(error)))
        return None
