"""The perturbation test on a toy model whose logits are sums over the tokens kept."""

import itertools
import logging

import numpy as np
import pytest
import torch

from clipmapper.evaluation.perturbation import (
    FRACTIONS,
    ModalityRelevance,
    number_removed,
    perturb,
    removal_order,
    run_in_chunks,
)
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, PerturbationScores
from clipmapper.tasks.vqa.perturbation import AnswerScorer


class BagOfTokens:
    """logits = bias + Σ kept patches + Σ kept words. Integer weights, so sums are exact in any order."""

    def __init__(self, samples, patches=12, tokens=9, answers=4, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def integers(*shape):
            return torch.randint(-3, 4, shape, generator=generator).double()

        self.image, self.text = integers(samples, patches, answers), integers(samples, tokens, answers)
        self.bias = integers(samples, answers)
        words = torch.randint(1, tokens - 1, (samples,), generator=generator)  # without start and end
        at = torch.arange(tokens)
        self.valid = at < words[:, None] + 2
        self.removable = (at >= 1) & (at <= words[:, None])
        self.targets = torch.rand(samples, answers, generator=generator, dtype=torch.float64)
        self.forwards = []

    def __call__(self, sample, image_keep, text_keep):
        self.forwards.append((sample.clone(), image_keep, text_keep))
        assert image_keep is None or text_keep is None
        logits = self.bias[sample].clone()
        for weights, keep, whole in (
            (self.image, image_keep, torch.ones(self.image.shape[:2], dtype=torch.bool)),
            (self.text, text_keep, self.valid),
        ):
            for row, i in enumerate(sample.tolist()):
                kept = whole[i].nonzero()[:, 0] if keep is None else keep[row]
                kept = kept[kept >= 0]
                logits[row] += weights[i, kept].sum(dim=0)
        return logits

    def perturb(self, relevance, positions=None, **options):
        at = torch.arange(len(self.targets)) if positions is None else torch.tensor(list(positions))
        longest = int(self.valid[at].sum(dim=1).max())  # a chunk is padded to its own longest text
        part = {
            name: ModalityRelevance(its.image[at], its.text[at, :longest]) for name, its in relevance.items()
        }
        return perturb(
            AnswerScorer(
                lambda sample, image_keep, text_keep: self(at[sample], image_keep, text_keep),
                self.targets[at],
            ),
            part,
            self.removable[at, :longest],
            self.valid[at, :longest],
            **{"sample_ids": at.numpy() + 100, **options},
        )

    def relevances(self, seed=1):
        """A method without ties, one full of ties, one constant, and their like."""
        generator = torch.Generator().manual_seed(seed)
        image, text = self.image.shape[:2], self.text.shape[:2]

        def rand(shape):
            return torch.rand(shape, generator=generator)

        return {
            "smooth": ModalityRelevance(rand(image), rand(text)),
            "ties": ModalityRelevance((rand(image) * 3).floor(), (rand(text) * 2).floor()),
            "constant": ModalityRelevance(torch.ones(image), torch.ones(text)),
        }


def test_number_removed_rounds_halves_up():
    n = np.array([0, 1, 5, 10, 49])
    assert number_removed(0.0, n).tolist() == [0] * 5
    assert number_removed(1.0, n).tolist() == n.tolist()
    assert number_removed(0.05, n).tolist() == [0, 0, 0, 1, 2]
    assert number_removed(0.15, n).tolist() == [0, 0, 1, 2, 7]
    assert number_removed(0.5, n).tolist() == [0, 1, 3, 5, 25]
    for percent, count in itertools.product(range(101), range(60)):  # halves of every size, in integers
        assert number_removed(percent / 100, np.array([count]))[0] == (2 * percent * count + 100) // 200


def test_order_follows_relevance_and_negative_is_its_reverse():
    relevance = np.array([[0.1, 0.5, -0.2, 0.3]])
    assert removal_order(relevance, seed=0, positive=True).tolist() == [[1, 3, 0, 2]]
    assert removal_order(relevance, seed=0, positive=False).tolist() == [[2, 0, 3, 1]]
    removable = np.array([[False, True, True, True]])
    order = removal_order(relevance, seed=0, positive=True, removable=removable)
    assert order.tolist() == [[1, 3, 2, 0]]
    with pytest.raises(ValueError, match="finite"):
        removal_order(np.array([[np.nan, 1.0]]), seed=0, positive=True)


def test_ties_are_broken_at_random_and_reproducibly():
    relevance = np.ones((300, 8))
    relevance[:, 3] = 2.0
    order = removal_order(relevance, seed=5, positive=True)
    assert (order[:, 0] == 3).all()
    second = np.bincount(order[:, 1], minlength=8)
    assert second[3] == 0 and (np.delete(second, 3) > 20).all()  # 43 each expected
    assert (order == removal_order(relevance, seed=5, positive=True)).all()
    assert (order != removal_order(relevance, seed=6, positive=True)).any()
    assert (order[:, ::-1] == removal_order(relevance, seed=5, positive=False)).all()
    # the sample's id decides, not its place in the batch
    swapped = removal_order(relevance[:2], seed=5, positive=True, sample_ids=np.array([1, 0]))
    assert (swapped == order[[1, 0]]).all()
    # nor the padding that the batch adds
    removable = np.arange(12) < 8
    padded = np.concatenate([relevance, np.full((300, 4), 9.0)], axis=1)
    in_padded = removal_order(padded, seed=5, positive=True, removable=np.tile(removable, (300, 1)))
    assert (in_padded[:, :8] == order).all()


def test_curves_by_hand():
    """Four patches worth 3, 2, 1, −1 to answer 0; answer 1 has the constant logit 2.5."""
    worth = torch.tensor([3.0, 2.0, 1.0, -1.0], dtype=torch.float64)

    def model(sample, image_keep, text_keep):
        assert text_keep is None
        kept = torch.arange(4).expand(len(sample), 4) if image_keep is None else image_keep
        first = worth[kept].sum(dim=1)
        return torch.stack([first, torch.full_like(first, 2.5)], dim=1)

    scores = perturb(
        AnswerScorer(model, torch.tensor([[0.9, 0.3]])),
        {"weighted": ModalityRelevance(worth[None] + 1, torch.zeros(1, 3))},
        torch.tensor([[False, True, False]]),
        torch.ones(1, 3, dtype=torch.bool),
        sample_ids=np.array([0]),
        fractions=(0.0, 0.25, 0.5, 0.75, 1.0),
        modalities=("image",),
    )
    positive, negative = scores.score("accuracy")[0, :, 0, 0]
    assert positive.tolist() == pytest.approx([0.9, 0.3, 0.3, 0.3, 0.3])  # sums 5, 2, 0, −1, 0
    assert negative.tolist() == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.3])  # sums 5, 6, 5, 3, 0

    def probability(sums):
        return [np.exp(s) / (np.exp(s) + np.exp(2.5)) for s in sums]

    assert scores.score("probability")[0, 0, 0, 0].tolist() == pytest.approx(probability([5, 2, 0, -1, 0]))
    assert scores.score("probability")[0, 1, 0, 0].tolist() == pytest.approx(probability([5, 6, 5, 3, 0]))
    assert scores.areas("accuracy")[0, :, 0, 0] == pytest.approx([0.375, 0.825])
    p = probability([5, 6, 5, 3, 0])
    assert scores.areas("probability")[0, 1, 0, 0] == pytest.approx(
        (p[0] / 2 + p[1] + p[2] + p[3] + p[4] / 2) / 4
    )


def naive(model, relevance, fractions, modalities, seed):
    """One variant at a time, nothing shared: masks by hand from `removal_order` of the single sample."""
    shape = (len(modalities), 2, len(relevance), len(model.targets), len(fractions))
    accuracy, probability = np.empty(shape), np.empty(shape)
    for m, d, k, i, f in itertools.product(*map(range, shape)):
        its = getattr(list(relevance.values())[k], modalities[m])[i].double().numpy()
        text = modalities[m] == "text"
        removable = model.removable[i].nonzero()[:, 0].numpy() if text else np.arange(len(its))
        valid = model.valid[i].nonzero()[:, 0].numpy() if text else removable
        order = removal_order(
            its[removable][None],
            seed=seed,
            positive=DIRECTIONS[d] == "positive",
            sample_ids=np.array([i + 100]),
        )[0]
        gone = removable[order[: int(fractions[f] * len(removable) + 0.5 + 1e-9)]]
        keep = torch.tensor([[t for t in valid if t not in gone]], dtype=torch.int64)
        sample = torch.tensor([i])
        whole = model(sample, None, None)[0]
        logits = model(sample, None, keep)[0] if text else model(sample, keep, None)[0]
        accuracy[m, d, k, i, f] = model.targets[i, logits.argmax()]
        probability[m, d, k, i, f] = logits.softmax(dim=0)[whole.argmax()]
    return accuracy, probability


def test_equals_the_naive_loop_exactly():
    model = BagOfTokens(samples=5)
    relevance = model.relevances()
    scores = model.perturb(relevance, batch_size=5, seed=3)
    accuracy, probability = naive(model, relevance, FRACTIONS, ("image", "text"), seed=3)
    assert scores.methods == ("smooth", "ties", "constant")
    assert (scores.score("accuracy") == accuracy).all()
    assert (scores.score("probability") == probability).all()


def test_zero_removed_is_the_unperturbed_model():
    model = BagOfTokens(samples=6)
    scores = model.perturb(model.relevances())
    whole = [model(torch.tensor([i]), None, None)[0] for i in range(6)]
    for i, logits in enumerate(whole):
        assert (scores.score("accuracy")[:, :, :, i, 0] == float(model.targets[i, logits.argmax()])).all()
        assert (scores.score("probability")[:, :, :, i, 0] == float(logits.softmax(0).max())).all()


def test_what_the_model_is_given():
    model = BagOfTokens(samples=9)
    progress = []
    scores = model.perturb(model.relevances(), batch_size=6, progress=progress.append)
    seen = set()
    kept_patches = []
    for sample, image_keep, text_keep in model.forwards:
        assert len(sample) <= 6
        if image_keep is not None:
            kept_patches.append(image_keep.shape[1])
            assert (image_keep >= 0).all() and (image_keep.diff(dim=1) > 0).all()
        if text_keep is not None:
            assert (text_keep.amax(dim=0) >= 0).all()  # no column of nothing but filling
        for row, i in enumerate(sample.tolist()):
            variant = [i, None, None]
            if image_keep is not None:
                variant[1] = tuple(image_keep[row].tolist())
            if text_keep is not None:
                kept = text_keep[row][text_keep[row] >= 0]
                assert (text_keep[row][len(kept) :] == -1).all() and (kept.diff() > 0).all()
                bounds = model.valid[i] & ~model.removable[i]
                assert set(bounds.nonzero()[:, 0].tolist()) <= set(kept.tolist())  # start and end stay
                assert model.valid[i, kept].all()
                variant[2] = tuple(kept.tolist())
            assert tuple(variant) not in seen, "the same variant was scored twice"
            seen.add(tuple(variant))
    assert {v[0] for v in seen if v[1:] == (None, None)} == set(range(9))
    assert {v[0] for v in seen if v[1] == ()} == set(range(9))  # all patches gone: once a sample
    # 12 patches: removing 5 … 75 % keeps 11, 11, 10, 10, 9, 6, 3 and each count is a group of its own
    assert sorted(set(kept_patches)) == [0, 3, 6, 9, 10, 11]
    assert sum(progress) == scores.values.size // 2


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_batch_size_changes_nothing(batch_size):
    model = BagOfTokens(samples=8)
    relevance = model.relevances()
    expected, scores = (model.perturb(relevance, batch_size=b) for b in (17, batch_size))
    assert (scores.score("accuracy") == expected.score("accuracy")).all() and (
        scores.score("probability") == expected.score("probability")
    ).all()


def test_chunk_composition_changes_nothing():
    model = BagOfTokens(samples=10)
    relevance = model.relevances()
    whole = model.perturb(relevance)
    parts = [model.perturb(relevance, positions=p) for p in ([7, 2, 5], [0], [9, 8, 1, 3, 4, 6])]
    joined = PerturbationScores.concatenate(parts)
    back = np.argsort(joined.sample_ids)
    assert (joined.sample_ids[back] == whole.sample_ids).all()
    assert (joined.score("accuracy")[:, :, :, back] == whole.score("accuracy")).all()
    assert (joined.score("probability")[:, :, :, back] == whole.score("probability")).all()
    assert (
        model.perturb(relevance, seed=1).score("probability") != whole.score("probability")
    ).any()  # ties depend on the seed


def planted(samples=60):
    """A model that decides by 2 of 12 patches and 1 word, and maps that know them."""
    model = BagOfTokens(samples)
    generator = torch.Generator().manual_seed(5)
    model.image.zero_(), model.text.zero_(), model.bias.zero_()
    answer = torch.randint(0, 4, (samples,), generator=generator)
    model.targets = torch.nn.functional.one_hot(answer, 4).double()
    model.bias[torch.arange(samples), (answer + 1) % 4] = (
        3.0  # wrong without the two patches, right without the word
    )
    oracle = ModalityRelevance(torch.zeros(samples, 12), torch.zeros(samples, 9))
    for i in range(samples):
        patches = torch.randperm(12, generator=generator)[:2]
        word = 1 + int(torch.randint(int(model.removable[i].sum()), (1,), generator=generator))
        model.image[i, patches, answer[i]] = 1.0
        model.text[i, word, answer[i]] = 2.0
        oracle.image[i, patches] = 1.0
        oracle.text[i, word] = 1.0
    model.image *= 2  # 4 from the patches, 2 from the word

    def random(seed):
        draw = torch.Generator().manual_seed(seed)
        return ModalityRelevance(
            torch.rand(samples, 12, generator=draw), torch.rand(samples, 9, generator=draw)
        )

    return model, {"weighted": oracle, "random": random(1), "again": random(2)}


def test_oracle_beats_random_and_random_is_level_with_itself():
    model, relevance = planted()
    scores = model.perturb(relevance)
    rows = {(r.modality, r.direction, r.score, r.method): r for r in scores.summary()}
    for modality in ("image", "text"):
        # random − oracle: the oracle's positive area is lower, its negative area higher
        assert rows[modality, "positive", "probability", "random"].difference.low > 0
        assert rows[modality, "negative", "probability", "random"].difference.high < 0
    # One of 12 patches goes at 5 and 10 %, two at 15 %: right (area 0.1), then a slope, then wrong.
    assert rows["image", "positive", "accuracy", "weighted"].area.mean == pytest.approx(0.125)
    assert rows["text", "positive", "accuracy", "weighted"].area.mean == pytest.approx(1.0)
    for row in scores.summary(reference="random"):
        if row.method == "again":
            assert row.reference == "random"
            assert row.difference.low <= 0 <= row.difference.high
    # the two modalities are measured apart: the patches weigh more than the word
    gap = [rows[m, "positive", "probability", "random"].difference.mean for m in ("image", "text")]
    assert gap[0] > gap[1]


def test_summary_and_curves():
    model, relevance = planted(samples=20)
    scores = model.perturb(relevance)
    rows = scores.summary(seed=4)
    assert len(rows) == 2 * 2 * 2 * 3
    areas = scores.areas("accuracy")
    for row in rows:
        if (row.score, row.modality, row.direction) == ("accuracy", "text", "negative"):
            at = scores.methods.index(row.method)
            assert row.area.mean == pytest.approx(areas[1, 1, at].mean())
            if row.method == "weighted":
                assert row.difference is None and row.reference is None
            else:
                assert row.difference.mean == pytest.approx((areas[1, 1, at] - areas[1, 1, 0]).mean())
    curves = scores.curves("probability")
    assert set(curves) == {"image/positive", "image/negative", "text/positive", "text/negative"}
    mean, low, high = curves["image/negative"]["again"]
    assert mean == pytest.approx(scores.score("probability")[0, 1, 2].mean(axis=0))
    assert (low <= mean).all() and (mean <= high).all() and mean.shape == (len(FRACTIONS),)
    with pytest.raises(ValueError, match="'gae' was not run"):
        scores.summary(reference="gae")
    with pytest.raises(ValueError, match="no score 'loss'"):
        scores.areas("loss")
    without = model.perturb({"random": relevance["random"]}, modalities=("text",))
    assert all(row.difference is None for row in without.summary())
    assert set(without.curves("accuracy")) == {"text/positive", "text/negative"}
    with pytest.raises(ValueError, match="differ"):
        PerturbationScores.concatenate([scores, without])


def test_text_without_removable_words_is_flat():
    model = BagOfTokens(samples=3)
    model.removable[:] = False
    scores = model.perturb(model.relevances(), modalities=("text",))
    assert (scores.score("probability") == scores.score("probability")[..., :1]).all()


def test_refuses_what_does_not_fit():
    model = BagOfTokens(samples=3)
    relevance = model.relevances()
    for options, message in (
        ({"fractions": (0.1, 1.0)}, "start at 0"),
        ({"fractions": (0.0, 0.5, 0.5)}, "rise"),
        ({"modalities": ("audio",)}, "modalities"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            model.perturb(relevance, **options)
    with pytest.raises(ValueError, match="no method"):
        model.perturb({})
    model.bias[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite logits"):
        model.perturb(relevance)
    model.removable[:] = True
    with pytest.raises(ValueError, match="padding"):
        model.perturb(relevance)


def equal(a, b):
    return a.methods == b.methods and all(
        np.array_equal(x, y) for x, y in zip(a.to_arrays().values(), b.to_arrays().values(), strict=True)
    )


def test_interrupted_run_goes_on(tmp_path, caplog):
    model = BagOfTokens(samples=10)
    relevance = model.relevances()
    computed = []

    def compute(positions, fail_at=None):
        if positions.start == fail_at:
            raise KeyboardInterrupt
        computed.append(positions)
        return model.perturb(relevance, positions=positions)

    def run(key="a", chunk_size=4, folder=tmp_path, **options):
        computed.clear()
        return run_in_chunks(10, chunk_size, lambda p: compute(p, **options), folder=folder, key=key)

    expected = run(folder=None)
    assert computed == [range(0, 4), range(4, 8), range(8, 10)] and not list(tmp_path.iterdir())
    assert equal(expected, model.perturb(relevance))
    with pytest.raises(KeyboardInterrupt):
        run(fail_at=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chunk_00000.npz"]
    assert equal(run(), expected)
    assert computed == [range(4, 8), range(8, 10)]
    assert equal(run(), expected) and computed == []
    assert equal(run(key="b"), expected) and len(computed) == 3  # other settings: nothing is reused
    assert equal(run(key="b", chunk_size=5), expected) and len(computed) == 2  # nor chunks cut otherwise

    run()
    assert not caplog.records
    whole = (tmp_path / "chunk_00001.npz").read_bytes()
    middle = len(whole) // 2
    one_bit = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (whole[:middle], b"", b"not an archive", whole[:-200] + bytes(200), one_bit):
        (tmp_path / "chunk_00001.npz").write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert equal(run(), expected)
        assert computed == [range(4, 8)]
        assert len(caplog.records) == 1 and "chunk_00001.npz is damaged" in caplog.text
        caplog.clear()
    np.savez(tmp_path / "chunk_00002.npz", key=np.array("a [8:10]"))  # the key alone
    with caplog.at_level(logging.WARNING):
        assert equal(run(), expected) and computed == [range(8, 10)]
    with pytest.raises(ValueError, match="at least one sample"):
        run_in_chunks(0, 4, compute, folder=None, key="a")
