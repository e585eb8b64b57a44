"""Training captioners: batches, the loss and its metrics, self-critical training, and whole runs."""

import json
import math
import os
import random
import signal
from dataclasses import asdict, replace
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from support import training_models
from support.slow import mostly_slow
from support.training_models import same_bits
from torch.utils.data import DataLoader

import clipmapper
from clipmapper.commands.train import train
from clipmapper.data.records import Record
from clipmapper.data.tables.base import Records
from clipmapper.data.token_cache import TokenStore
from clipmapper.data.world.caption_truth import CaptionTruth
from clipmapper.data.world.captions import draw_caption
from clipmapper.data.world.data import ScenesCaptions
from clipmapper.data.world.scenes import Scene, draw_scene
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.evaluation.captions.ngram_scores import cider_d
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.evaluation.captions.scores import score_captions
from clipmapper.settings import schema as config
from clipmapper.tasks.captioning.batches import CaptionBatches, Stage, drawn_batches
from clipmapper.tasks.captioning.build import build_captioner
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.head import caption_vocabulary
from clipmapper.tasks.captioning.results import family_scores
from clipmapper.tasks.captioning.task import CaptionRun
from clipmapper.tasks.captioning.training import CaptionModule, JudgedCaption, SelfCriticalModule
from clipmapper.tasks.registry import task_of
from clipmapper.training.batches import Labelled, StepBatches
from clipmapper.training.checkpoint_data import data_for
from clipmapper.training.launching import less_noise
from clipmapper.training.processes import WHOLE
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

TINY_MODEL = {
    "mapper": "dual_flow",
    "width": 32,
    "depth": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "image_position_embedding": True,
    "tied_head": False,
    "text_embedding_only": False,
    "vocabulary": "data",
}
TINY_RUN = (
    "experiment=caption_scenes",
    "encoder.pretrained=null",
    "data.train_scenes=20",
    "data.simple_scenes=9",
    "data.validation_scenes=12",
    "data.held_out_scenes=6",
    "training.batch_size=8",
    "training.token_precision=float32",
    "training.max_steps=5",
    "training.warmup_steps=2",
    "training.logged_captions=3",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "logger=csv",
)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory) -> str:
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data() -> ScenesCaptions:
    return ScenesCaptions(
        train_scenes=12, simple_scenes=9, validation_scenes=7, held_out_scenes=4, references=5, seed=0
    )


def tiny_captioner(architecture: str, data: ScenesCaptions, **settings):
    encoder = {"architecture": architecture, "pretrained": None, "frozen": settings.pop("frozen", True)}
    torch.manual_seed(0)
    model = build_captioner(encoder, TINY_MODEL | settings, captions=data.wordings())
    training_models.spread_out(model.encoder.clip, 0)
    return model


def only_rings(number: int, caption: str) -> CaptionTruth:
    """A judge of its own kind: correct is what names a ring, complete what is long."""
    return CaptionTruth("listing" if "ring" in caption else None, (), len(caption) > 40)


def scenes_of(records: Records) -> list[Scene]:
    return [record.truth.scene for record in records]


def references_of(records: Records) -> list[list[str]]:
    return [list(captions) for captions in records.captions()]


def pixels_of(records: Records) -> np.ndarray:
    return np.stack([record.image.pixels for record in records])


# The data

NAMES = ("train", "simple", "validation", "held_out")


def test_splits_share_no_scene_and_references_are_true(data):
    keys = [scene.key for name in NAMES for scene in scenes_of(data.split(name))]
    assert len(set(keys)) == len(keys) == 12 + 9 + 7 + 4
    assert max(len(scene.objects) for scene in scenes_of(data.split("simple"))) == 2
    split = data.validation
    assert len(split) == 7
    for record in split:
        assert len(set(record.captions)) == 5
        assert all(record.truth.judge(reference).correct for reference in record.captions)
        drawn = {record.truth.draw(random.Random(seed)) for seed in range(8)}
        assert len(drawn) > 4 and all(record.truth.judge(caption).complete for caption in drawn)
    again = ScenesCaptions(12, 9, 7, 4, 5, seed=0).validation
    assert references_of(again) == references_of(split)
    assert np.array_equal(pixels_of(again), pixels_of(split))
    other = ScenesCaptions(12, 9, 7, 4, 5, seed=1).validation
    assert references_of(other) != references_of(split)


def test_every_word_of_the_world_is_in_the_wordings(architecture, data):
    tokenizer = tiny_captioner(architecture, data).encoder.tokenizer
    known = set(caption_vocabulary(tokenizer, data.wordings()))
    assert len(known) < 80
    for index in range(1500):
        for held_out in (False, True):
            scene = draw_scene(9, "unseen", index, held_out=held_out)
            caption = draw_caption(scene, random.Random(index))
            assert set(tokenizer.encode(caption)) <= known, caption


# Batches


def test_batch_of_a_step_is_always_the_same_and_captions_are_drawn_anew(architecture, data):
    model = tiny_captioner(architecture, data)
    split = CaptionBatches(model, data, "train", data.train, store=TokenStore())
    asked = []
    original = split.batch
    split.batch = lambda images, captions: (
        asked.append((list(images), list(captions))),
        original(images, captions),
    )[1]

    def draw(image, rng):
        return data.train[image].truth.draw(rng)

    batch_at = drawn_batches([Stage(split, draw)], batch_size=5, captions=2, seed=3)
    for step in (*range(24), 4):
        batch = batch_at(step)
        assert batch["image_tokens"].shape[0] == len(batch["references"]) == 5
        assert batch["text"].ids.shape[0] == 10
    assert asked[4] == asked[24]
    images = [image for of_step, _ in asked[:24] for image in of_step]
    assert [images.count(image) for image in range(12)] == [10] * 12  # 24 batches of 5 are 10 epochs
    said: dict[int, list[str]] = {}
    longest = []
    for of_step, captions in asked[:24]:
        longest.append(max(len(caption.split()) for caption in captions))
        for number, caption in enumerate(captions):
            image = of_step[number // 2]
            assert data.train[image].truth.judge(caption).complete
            said.setdefault(image, []).append(caption)
    assert np.mean([len(set(captions)) / len(captions) for captions in said.values()]) > 0.6
    assert np.mean(longest) < 0.7 * max(longest)  # captions of a length come together
    other = drawn_batches([Stage(split, draw)], batch_size=5, captions=2, seed=4)
    assert other(0)["references"] != batch_at(0)["references"]


@pytest.mark.slow
def test_stages_of_training(architecture, settings):
    """Simple scenes in the first wordings, in all, then all scenes in all; twins more often than they are."""
    config = settings(
        "data.train_scenes=80",
        "data.simple_scenes=60",
        "training.max_steps=160",
        "training.first_share=0.25",
        "training.simple_share=0.5",
        "training.twins=0.6",
        "training.wordings={listing: 0, places: 1, relations: 0, counts: 2}",
    )
    task = CaptionRun(config, ScenesCaptions(80, 60, 1, 1, 1, seed=0))
    task.prepare(Path("nowhere"))
    asked = []
    for name in ("simple", "train"):
        task.splits[name].batch = lambda images, captions, name=name: (
            asked.append((name, images, captions)) or {}
        )
    for step in range(160):
        task.batch_at(step, WHOLE)
    assert [name for name, _, _ in asked] == ["simple"] * 80 + ["train"] * 80
    twins, counted = {"simple": [], "train": []}, []
    for step, (name, images, captions) in enumerate(asked):
        records = task.splits[name].records
        assert len(captions) == 2 * len(images)
        pairs = list(zip([image for image in images for _ in range(2)], captions, strict=True))
        wordings = [records[image].truth.judge(caption).wording for image, caption in pairs]
        assert set(wordings) <= ({"places"} if step < 40 else {"places", "counts"})
        counted += [wording == "counts" for wording in wordings] * (step >= 40)
        for image in images:
            looks = [(o.size, o.colour, o.shape) for o in records[image].truth.scene.objects]
            twins[name].append(len(set(looks)) < len(looks))
    assert np.mean(counted) == pytest.approx(2 / 3, abs=0.06)
    for name, found in twins.items():
        records = task.splits[name].records
        there = np.mean([record.truth.has_twins for record in records])
        assert np.mean(found) == pytest.approx(0.6 + 0.4 * there, abs=0.08)


def test_cached_tokens_are_those_of_the_pixels(architecture, data):
    model = tiny_captioner(architecture, data)
    batches = [
        CaptionBatches(model, data, "train", data.train, store=store) for store in (TokenStore(), None)
    ]
    cached, pixels = (split.batch([3, 0], ["a ring", "two objects: two rings"]) for split in batches)
    assert set(cached) ^ set(pixels) == {"image_tokens", "images"}
    module = captions_module(model, data)
    with torch.no_grad():
        torch.testing.assert_close(
            module.image_tokens(cached), module.image_tokens(pixels), atol=2e-2, rtol=2e-3
        )
    assert cached["references"] == [list(data.train[image].captions) for image in (3, 0)]
    assert torch.equal(cached["text"].ids, model.tokenize(["a ring", "two objects: two rings"]).ids)


# Cross-entropy


def captions_module(model, data, kind=CaptionModule, steps=60, **more):
    def judge(number: int, caption: str) -> CaptionTruth:
        return data.validation[number].truth.judge(caption)

    judges = {"validation": judge, "held_out": only_rings}
    more = {"label_smoothing": 0.1} | more if kind is CaptionModule else more
    return kind(
        model=model,
        learning_rate=1e-2,
        weight_decay=0.0,
        warmup_steps=5,
        max_steps=steps,
        judges=judges,
        **more,
    )


def fit(module, batch_at, data, steps: int) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loaders = [DataLoader(StepBatches(batch_at, 0, steps), batch_size=None)]
    for name in ("validation", "held_out"):
        split = CaptionBatches(module.model, data, name, data.split(name), store=TokenStore())
        split.labelled_at_most = 3
        loaders.append(DataLoader(Labelled(split), batch_size=None))
    with less_noise():
        trainer.fit(module, loaders[0], loaders[1:])
    return trainer


@pytest.fixture(scope="module")
def fitted(architecture, data):
    """A captioner that was trained on six captions until it knew them, with its module and trainer."""
    model = tiny_captioner(architecture, data)
    train_split = CaptionBatches(model, data, "train", data.train, store=TokenStore())
    captions = [record.captions[0] for record in data.train[:6]]
    module = captions_module(model, data)
    trainer = fit(module, lambda step, share: train_split.batch(range(6), captions), data, 60)
    return module, trainer, train_split, captions


def test_captioner_learns_a_few_captions_by_heart(fitted):
    module, _, split, captions = fitted
    with torch.no_grad():
        text = module.model.tokenize(captions)
        tokens = split.image_tokens[:6].float()
        assert float(module.loss(tokens, text, 0.0)) < 0.5
        known = module.model.head.known
        assert float(module.loss(tokens, text, 0.0)) < float(module.loss(tokens, text, 0.1)) < math.log(known)


def test_training_loss_has_label_smoothing_over_the_known_tokens(fitted):
    module, _, split, captions = fitted
    batch = split.batch(range(6), captions)
    with torch.no_grad():
        module.log = lambda *args, **kwargs: None
        loss = module.training_step(batch, 0)
        del module.log
        text = batch["text"]
        words = module.model.text_tokens(text.ids, text.valid)
        logits = module.model.caption_logits(batch["image_tokens"], words, text.valid)
        known = module.model.head.tokens
        total, count = 0.0, 0
        for row in range(6):
            for place in range(1, int(text.valid[row].sum())):
                log_p = logits[row, place - 1, known].double().log_softmax(0)
                own = log_p[known.tolist().index(int(text.ids[row, place]))]
                total -= 0.9 * float(own) + 0.1 * float(log_p.mean())
                count += 1
        assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_validation_metrics_are_those_of_the_greedy_captions(fitted, data):
    module, trainer, _, _ = fitted
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("validation", "held_out"):
        split = data.split(name)
        batches = CaptionBatches(module.model, data, name, split, store=TokenStore())
        tokens = batches.image_tokens.float()
        longest = Decoding("greedy", max_length=module.model.encoder.context_length - 1)
        written = [texts[0] for texts in write_captions(module.model, tokens, longest).texts]
        assert [one.caption for one in module.written[name]] == written
        assert [one.image for one in module.written[name]] == list(range(len(split)))
        truths = [module.judges[name](number, caption) for number, caption in enumerate(written)]
        assert [one.truth for one in module.written[name]] == truths
        scores = score_captions(written, references_of(split)).corpus
        for score in ("cider", "bleu_4", "rouge_l"):
            assert logged[f"{name}/{score}"] == pytest.approx(scores[score], rel=1e-5)
        assert logged[f"{name}/correct"] == pytest.approx(np.mean([t.correct for t in truths]))
        assert logged[f"{name}/complete"] == pytest.approx(np.mean([t.complete for t in truths]))
    text = module.model.tokenize([record.captions[0] for record in data.split("held_out")])
    with torch.no_grad():
        over_all_words = float(module.loss(batches.image_tokens.float(), text, 0.0))
    assert logged["held_out/loss"] == pytest.approx(over_all_words, rel=1e-4)  # batches of 3 and 1 images


# Self-critical sequence training


@pytest.fixture
def critical(fitted, data):
    """On a captioner that writes something like captions: others have no reward worth comparing."""
    return captions_module(
        fitted[0].model, data, SelfCriticalModule, references=references_of(data.train), captions=3, seed=7
    )


def test_reward_is_cider_with_the_frequencies_of_the_training_captions(critical, data):
    references = references_of(data.train)
    texts = [(reference[0], reference[3], "a cross") for reference in references]
    rewards = critical.rewards(texts, references)
    tokenised = [[ptb_tokenise(caption) for caption in of_image] for of_image in references]
    for column in range(3):
        expected = cider_d([ptb_tokenise(of_image[column]) for of_image in texts], tokenised)
        np.testing.assert_allclose(rewards[:, column].numpy(), expected, rtol=1e-5)
    assert (rewards[:, 0] > rewards[:, 2]).all()


def test_log_probability_of_a_caption_is_the_sum_over_its_words(critical, data):
    model = critical.model.eval()
    images = torch.randn(2, 10, model.encoder.image_width, generator=torch.Generator().manual_seed(0))
    text = model.tokenize(["a red ring", "two objects: a cross and a ring"])
    with torch.no_grad():
        found = critical.log_probability(images, text)
        words = model.text_tokens(text.ids, text.valid)
        logits = model.caption_logits(images, words, text.valid).double()
        for row in range(2):
            length = int(text.valid[row].sum())
            own = [logits[row, t - 1].log_softmax(0)[text.ids[row, t]] for t in range(1, length)]
            assert float(found[row]) == pytest.approx(float(sum(own)), rel=1e-5)


def test_loss_is_the_reward_over_the_greedy_one_times_log_probability(critical, data):
    """Rennie et al. 2017, equation 9, with the mean of the drawn captions."""
    split = CaptionBatches(critical.model, data, "train", data.train, store=TokenStore())
    batch = split.batch([0, 5], [data.train[image].captions[0] for image in (0, 5)])
    logged = {}
    critical.log_dict = lambda values, **_: logged.update(values)
    loss = critical.training_step(batch, 0)
    seed = int(np.random.SeedSequence((7, 0)).generate_state(1)[0])
    longest = critical.model.longest
    drawing = Decoding("nucleus", captions=3, max_length=longest, top_p=1.0, seed=seed)
    drawn = write_captions(critical.model, batch["image_tokens"], drawing)
    greedy = write_captions(critical.model, batch["image_tokens"], Decoding("greedy", max_length=longest))
    total = 0.0
    for image, references in enumerate(batch["references"]):
        (baseline,) = critical.rewards([greedy.texts[image]], [references])[0]
        for k in range(3):
            (reward,) = critical.rewards([[drawn.texts[image][k]]], [references])[0]
            row = slice(3 * image + k, 3 * image + k + 1)
            log_p = critical.log_probability(batch["image_tokens"][image][None], drawn.tokens[row])
            total -= float((reward - baseline) * log_p[0].detach()) / 6
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    assert float(logged["train/reward"]) == pytest.approx(
        float(critical.rewards(drawn.texts, batch["references"]).mean())
    )
    loss.backward()
    assert critical.model.head.layer.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_reward_rises(architecture, data):
    """From a captioner that knows the words but not yet which fit: what is drawn scores better and better."""
    model = tiny_captioner(architecture, data)
    split = CaptionBatches(model, data, "train", data.train, store=TokenStore())
    captions = [record.captions[0] for record in data.train[:6]]
    numbers = range(len(captions))
    fit(captions_module(model, data, steps=25), lambda step, share: split.batch(numbers, captions), data, 25)
    module = captions_module(
        model, data, SelfCriticalModule, steps=30, references=references_of(data.train), captions=8, seed=0
    )
    # At 5e-3 the words drift away from what is rewarded, or not, by the machine's rounding.
    module.learning_rate = 2e-3
    rewards = []
    original = module.log_dict

    def noting(values, **more):
        rewards.append(float(values["train/reward"]))
        original(values, **more)

    module.log_dict = noting
    fit(module, lambda step, share: split.batch(numbers, captions), data, 30)
    assert len(rewards) == 30
    assert np.mean(rewards[-10:]) > 1.1 * np.mean(rewards[:10]) > 0


# Whole runs


@pytest.fixture(scope="module")
def settings(architecture, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")

    def with_overrides(*overrides: str) -> config.TrainConfig:
        where = (f"encoder.architecture={architecture}", f"output={output}")
        return training_models.train_settings(*TINY_RUN, *where, *overrides)

    return with_overrides


@pytest.fixture(scope="module")
def finished(settings) -> Path:
    return train(settings("name=whole"))


def results_of(folder: Path) -> dict:
    return json.loads((folder / RESULTS).read_text())


def test_families_are_scored_as_data_sets_of_their_own():
    told = ["a red ring", "a blue disc", "two red discs", "a ring left of a disc", "nothing", "a blue ring"]
    records = [
        Record(n, Path(f"{n}.png"), str(n), family=["in", "out"][n % 2], captions=(text, f"{text} or so"))
        for n, text in enumerate(told)
    ]
    said = [told[n] if n % 2 else "a red disc" for n in range(6)]
    written = [JudgedCaption(n, text, None) for n, text in enumerate(said)]
    found = family_scores(written, records)
    assert list(found) == ["in", "out"] and found["in"]["captions"] == found["out"]["captions"] == 3
    for family, mine in (("in", [0, 2, 4]), ("out", [1, 3, 5])):
        wanted = score_captions([said[n] for n in mine], [records[n].captions for n in mine]).corpus
        for score in ("cider", "bleu_4", "rouge_l"):
            assert found[family][score] == pytest.approx(wanted[score])
    assert found["out"]["cider"] > 2 * found["in"]["cider"] > 0
    assert family_scores(written[::2], records) == {}  # one family: the whole says it


def test_results_say_what_the_captions_are_worth(finished, capsys):
    results = results_of(finished)
    assert results["name"] == "whole" and results["settings"]["training"]["objective"] == "cross_entropy"
    assert set(results["captions"]) == {"validation", "held_out"}
    for split, images in (("validation", 12), ("held_out", 6)):
        row = results["captions"][split]
        assert row["greedy"]["captions"] == images and 0 <= row["greedy"]["correct"] <= 1
        assert all(math.isfinite(row[name]) for name in ("loss", "cider", "bleu_4", "rouge_l"))
        assert sum(w["captions"] for w in row["greedy"]["wordings"].values()) == images
    assert results["captions"]["validation"]["drawn"]["captions"] == 12
    assert len(results["samples"]) == 3
    for sample in results["samples"]:
        assert set(sample) == {"image", "caption", "reference", "correct", "complete", "wrong"}
        assert sample["correct"] == (sample["wrong"] == "")
    for path in results["files"].values():
        assert Path(path).exists()


def test_checkpoint_of_a_run_writes_the_captions_of_its_results(finished):
    model = clipmapper.load(finished / CHECKPOINT)
    split = data_for(task_of(model), model, None, "last.ckpt").validation
    longest = Decoding("greedy", max_length=model.encoder.context_length - 1)
    for sample in results_of(finished)["samples"]:
        assert model.caption(split[sample["image"]].image.pixels, longest) == sample["caption"]
        assert sample["reference"] == split[sample["image"]].captions[0]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", mostly_slow(["gpt2_prefix", "gpt2_cross"], ["gpt2_cross"]))
def test_a_run_with_gpt2(settings, decoder):
    """Trained, judged and saved by the same command; the file alone writes the captions of the results."""
    sizes = ("model.gpt2.width=16", "model.gpt2.heads=2", "model.gpt2.layers=1", "training.max_steps=2")
    chosen = ("experiment=caption_scenes_gpt2", f"model.decoder={decoder}", f"name={decoder}")
    folder = train(settings(*chosen, *sizes))
    model = clipmapper.load(folder / CHECKPOINT)
    assert model.decoder.cross == (decoder == "gpt2_cross")
    records = data_for(task_of(model), model, None, "last.ckpt").validation
    for row in results_of(folder)["samples"]:
        how = Decoding("greedy", max_length=model.longest)
        assert model.caption(records[row["image"]].image.pixels, how) == row["caption"]


def test_interrupted_and_resumed_is_as_if_never_interrupted(settings, finished, monkeypatch):
    stopped = settings("name=stopped")
    original = CaptionModule.training_step
    with monkeypatch.context() as patched:

        def training_step(module, batch, index):
            if module.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return original(module, batch, index)

        patched.setattr(CaptionModule, "training_step", training_step)
        with pytest.raises(RunInterrupted, match="after step 3"):
            train(stopped)
    again = train(replace(stopped, resume=True))
    weights = [
        torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"] for folder in (again, finished)
    ]
    assert same_bits(*weights)
    assert results_of(again)["captions"] == results_of(finished)["captions"]
    assert len(list(again.parent.iterdir())) == 1


def test_frozen_encoder_is_not_trained_and_the_mapper_is(settings, finished):
    trained = torch.load(finished / CHECKPOINT, weights_only=True)["state_dict"]
    lightning.seed_everything(0, verbose=False)
    given = settings()
    data = ScenesCaptions(1, 1, 1, 1, 1, 0)
    fresh = build_captioner(asdict(given.encoder), asdict(given.model), captions=data.wordings()).state_dict()
    changed = {name: not torch.equal(value, trained[f"model.{name}"]) for name, value in fresh.items()}
    assert not any(changed[name] for name in changed if name.startswith("encoder."))
    assert changed["mapper.project_text.weight"] and changed["head.layer.weight"]


def test_second_phase_goes_on_from_a_checkpoint(settings, finished):
    checkpoint = f"training.checkpoint={finished / CHECKPOINT}"
    second = ("training.objective=scst", checkpoint, "training.learning_rate=1e-4", "training.max_steps=2")
    folder = train(settings("name=second", *second))
    results = results_of(folder)
    assert results["settings"]["training"]["objective"] == "scst"
    before, after = (
        torch.load(run / CHECKPOINT, weights_only=True)["state_dict"] for run in (finished, folder)
    )
    difference = (before["model.head.layer.weight"] - after["model.head.layer.weight"]).abs().max()
    assert 0 < difference < 1e-3
    assert (
        clipmapper.load(folder / CHECKPOINT).head.known == clipmapper.load(finished / CHECKPOINT).head.known
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("model.depth=2",), "model.depth=2: the captioner of training.checkpoint=.* has 1"),
        (("model.mapper=single_flow",), "model.mapper=single_flow: the captioner of .* has dual_flow"),
        (("encoder.architecture=ViT-B-32",), "encoder.architecture=ViT-B-32: the captioner of .* has "),
        (("training.checkpoint=gone.ckpt",), "checkpoint=gone.ckpt: no such file"),
    ],
)
def test_second_phase_of_another_captioner(settings, finished, change, says):
    checkpoint = f"training.checkpoint={finished / CHECKPOINT}"
    with pytest.raises(UserError, match=says):
        train(settings("name=wrong", "training.objective=scst", checkpoint, *change))


def test_second_phase_of_a_model_for_questions(settings, architecture, tmp_path):
    model = training_models.tiny_model(architecture)
    path = tmp_path / "questions.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "clipmapper": model.description}, path)
    with pytest.raises(UserError, match="a model for the task vqa, not a captioner"):
        train(settings("name=wrong", "training.objective=scst", f"training.checkpoint={path}"))


def test_encoder_that_is_not_frozen_learns(settings, finished):
    folder = train(
        settings("name=tuned", "encoder.frozen=false", "model.mapper=single_flow", "training.max_steps=2")
    )
    tuned, before = (torch.load(f / CHECKPOINT, weights_only=True)["state_dict"] for f in (folder, finished))
    for name in ("visual.conv1.weight", "token_embedding.weight"):
        key = f"model.encoder.clip.{name}"
        assert not torch.equal(tuned[key], before[key])


@pytest.mark.parametrize("experiment", ["caption_coco_b32"])
def test_experiment_on_coco_says_what_is_missing(experiment, tmp_path):
    given = training_models.train_settings(f"experiment={experiment}", "trainer=cpu", f"output={tmp_path}")
    with pytest.raises(UserError, match=r"captions_train2014\.json: no such file; COCO's captions"):
        train(given)
    assert list(tmp_path.iterdir()) == []  # nothing was begun
