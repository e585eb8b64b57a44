"""``data.augment``: images of training are altered, the same wherever a step is made; no others are."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import training_models
from support.slow import mostly_slow
from support.training_models import ROOT
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from clipmapper.commands.make_shards import main as make_shards
from clipmapper.commands.train import train
from clipmapper.data.augment import AUGMENT, Augmentation
from clipmapper.data.images import clip_input, levels
from clipmapper.data.pixels import normalised
from clipmapper.errors import UserError
from clipmapper.settings.checks import built
from clipmapper.settings.data import DataConfig
from clipmapper.settings.keys import implementations
from clipmapper.tasks.registry import task_named
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.batches import Labelled, StepBatches
from clipmapper.training.checkpoint_data import data_description
from clipmapper.training.interruption import RunInterrupted
from clipmapper.training.processes import Share
from clipmapper.training.run_folder import CHECKPOINT, CONFIG, folder_to_resume, new_run_folder

KINDS = [kind for kind in AUGMENT if kind != "none"]
SIDE = 48
EXCLUDE = (
    "data.augment={} and training.token_cache=true exclude each other, for every step has other images: the "
    "token cache was switched off"
)


class Visual(nn.Module):
    """What is asked of an image tower."""

    image_size = (SIDE, SIDE)
    image_mean, image_std = (0.5, 0.45, 0.4), (0.3, 0.25, 0.28)
    preprocess_cfg = {"interpolation": "bicubic", "size": image_size}  # noqa: RUF012


def altered(kind: str, image, count: int, *, seed: int = 0, step: int = 0):
    """``count`` samples of one image."""
    images = image.expand(count, *image.shape)
    return Augmentation(kind, Visual(), seed)(images, step, range(count))


def uniform(colour):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE).contiguous()


def marked():
    """Grey as nothing is to the tower, and dark a little right of the upper left corner."""
    image = uniform([round(255 * mean) for mean in Visual.image_mean])
    image[:, 8:18, 12:20] = 10
    return image


# What is drawn


def test_the_choices_are_the_same_in_every_place():
    found = [kind.__dataclass_fields__["augment"].metadata["choices"] for kind in implementations(DataConfig)]
    assert len(found) > 8 and set(found) == {AUGMENT}
    assert training_models.train_settings().data.augment == "none"
    for choice in ("scenes", "scenes_captions", "manifest", "shards", "vqa_v2", "flickr8k", "huggingface"):
        task = "experiment=caption_scenes" if choice == "scenes_captions" else f"data={choice}"
        task = "experiment=caption_manifest" if choice == "flickr8k" else task
        given = [task, f"data={choice}", "data.augment=crop"]
        given += ["data.path=x"] * (choice in ("manifest", "shards", "huggingface"))
        assert training_models.train_settings(*given).data.augment == "crop"
    with pytest.raises(UserError, match=r"data\.augment: 'mirror' is not one of none, crop, colour, randaug"):
        training_models.train_settings("data.augment=mirror")


@pytest.mark.parametrize("kind", KINDS)
def test_uint8_in_and_out_and_many_draws(kind):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8))
    found = altered(kind, image, 30)
    assert found.dtype == torch.uint8 and found.shape == (30, 3, SIDE, SIDE)
    assert len({one.numpy().tobytes() for one in found}) >= 25  # (randaugment may change nothing)
    # Every one of them is of its sample, step and seed alone.
    assert altered(kind, image, 7).equal(found[:7])
    assert not altered(kind, image, 30, step=1).equal(found)
    assert not altered(kind, image, 30, seed=1).equal(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_of_the_process_is_as_it_was(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = altered(kind, marked(), 4)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(6)
    assert altered(kind, marked(), 4).equal(first)


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_images_are_altered_as_uint8(kind):
    pixels = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    fed = clip_input(pixels, Visual())
    as_uint8 = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert levels(fed, Visual()).equal(as_uint8) and normalised(as_uint8, Visual()).equal(fed)
    alter = Augmentation(kind, Visual(), 0)
    assert alter(fed, 0, "abcd").equal(alter(as_uint8, 0, "abcd"))


def lies_as_before(image, before) -> bool:
    """Whether the picture fits itself better as it is than mirrored or upside down."""
    one, other = ((of.float() - of.float().mean((1, 2), keepdim=True)).abs().sum(0) for of in (image, before))
    fits = [float((one * turned).sum()) for turned in (other, *(other.flip(axis) for axis in (0, 1)))]
    return fits[0] >= max(fits[1:])  # (RandAugment may leave one colour)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_ever_mirrored(kind, monkeypatch):
    image, plain = marked(), Augmentation.__init__
    assert all(lies_as_before(one, image) for one in altered(kind, image, 300))

    def mirroring(self, *arguments):
        plain(self, *arguments)
        self.transform = nn.Sequential(self.transform, v2.RandomHorizontalFlip())

    monkeypatch.setattr(Augmentation, "__init__", mirroring)  # what the check is for, it finds
    found = [lies_as_before(one, image) for one in altered(kind, image, 300)]
    assert 0.3 < np.mean(found) < 0.7


def test_what_randaugment_holds():
    """A release of torchvision that adds to it is not taken as it is: docs/data.md names what there is."""
    names = (
        "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness Posterize"
    )
    assert set(v2.RandAugment._AUGMENTATION_SPACE) == {*names.split(), "Solarize", "AutoContrast", "Equalize"}


def test_a_crop_has_the_colours_of_the_image_and_most_of_it():
    for colour in ([255, 0, 0], [3, 200, 77], [128, 128, 128]):
        assert (altered("crop", uniform(colour), 20) == uniform(colour)).all()
    ramp = torch.arange(SIDE, dtype=torch.uint8).mul(5).expand(3, SIDE, SIDE).contiguous()
    kept = [float(one[0].max()) - float(one[0].min()) for one in altered("crop", ramp, 200)]
    # A side loses 21 % at most: √(0.7 · 0.9) of it is left; pixels at the edge mix with their neighbours.
    assert min(kept) > 5 * (SIDE * (0.7 * 0.9) ** 0.5 - 3)
    assert np.std(kept) > 5


def test_other_colours_keep_their_hue():
    found = altered("colour", uniform([220, 120, 30]), 50).float()
    assert (found == found[:, :, :1, :1]).all()
    red, green, blue = found[:, :, 0, 0].unbind(1)
    hue = (green - blue) / (red - blue)
    assert (red > green).all() and (green > blue).all() and (hue - 90 / 190).abs().max() < 0.12
    assert red.std() > 5


DIGEST = """
import hashlib
import torch
from torch import nn
from clipmapper.data.augment import AUGMENT, Augmentation

visual = nn.Module()
visual.image_size, visual.image_mean, visual.image_std = (40, 40), (0.5,) * 3, (0.5,) * 3
visual.preprocess_cfg = {"interpolation": "bicubic"}
images = (torch.arange(3 * 40 * 40) * 37 % 251).byte().reshape(1, 3, 40, 40).expand(8, 3, 40, 40)
drawn = [Augmentation(kind, visual, 3)(images, 11, "abcdefgh") for kind in AUGMENT[1:]]
digest = hashlib.sha256(torch.cat(drawn).numpy()).hexdigest()
"""


@pytest.mark.slow
def test_another_process_draws_the_same():
    here: dict = {}
    exec(DIGEST, here)
    command = [sys.executable, "-c", f"{DIGEST}print(digest)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here["digest"]


# In training

SMALL = (
    "encoder.pretrained=null", "training.batch_size=4", "training.max_steps=5", "training.warmup_steps=1",
    "model.depth=1", "logger=csv", "callbacks=none",
)  # fmt: skip
SCENES = (
    "data.train_scenes=6", "data.simple_scenes=6", "data.validation_scenes=24", "data.held_out_scenes=24",
)  # fmt: skip
ANSWERING = ("model.width=16", "model.head_width=16", "training.blind_steps=2")
CAPTIONING = ("experiment=caption_manifest", "model.width=32", "training.captions=2")
DATA = {
    "questions": ("data=manifest", *ANSWERING),
    "captions": (*CAPTIONING, "data=manifest"),
    "shards of questions": ("data=shards", *ANSWERING),
    "shards of captions": (*CAPTIONING, "data=shards"),
    "scenes": ("experiment=vqa_scenes", *ANSWERING, *SCENES),
    "scenes with captions": ("experiment=caption_scenes", "model.width=32", *SCENES),
}
TRAINED_ON = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Manifests of questions and of captions, and shards of them."""
    folder = tmp_path_factory.mktemp("mine")
    rows: dict[str, list] = {"questions": [], "captions": []}
    for n in range(TRAINED_ON + 3):
        name = "red" if n % 2 else "blue"
        pixels = np.random.default_rng(n).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((100, 80 + n), Image.Resampling.BICUBIC)
        picture.save(folder / f"{n}.jpg")
        common = {"id": n, "image": f"{n}.jpg", "split": "train" if n < TRAINED_ON else "validation"}
        rows["questions"].append(common | {"question": f"what colour, {n}?", "answers": [name] * 10})
        rows["captions"].append(common | {"captions": [f"a {name} picture", f"something {name}"]})
    for name, told in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, told)))
        path = f"data.path={folder / name}.jsonl"
        make_shards([str(folder / name), "data=manifest", path, "data.workers=0", "--images-per-shard=2"])
    return folder


def config_of(place, name: str, *more: str):
    where = [f"encoder.architecture={training_models.tiny_clip(place)}", f"output={place / 'outputs'}"]
    if "scenes" not in name:
        path = place / name.split()[-1]
        where.append(f"data.path={path if 'shards' in name else path.with_suffix('.jsonl')}")
    return training_models.train_settings(*DATA[name], *SMALL, *where, *more)


def prepared(place, name: str, augment: str, *more: str):
    """A run of the task behind everything that comes before its first step."""
    config = config_of(place, name, f"data.augment={augment}", "training.token_cache=false", *more)
    torch.manual_seed(0)
    run = task_named(config.training.task).run(config, built(asdict(config.data)))
    run.prepare(place)
    run.augment()
    return run


def loaded(run, workers: int, first: int = 0, last: int = 5) -> list[dict]:
    steps = StepBatches(run.batch_at, first, last)
    forked = {"multiprocessing_context": "fork"} if workers else {}
    return list(DataLoader(steps, batch_size=None, num_workers=workers, **forked))


def same_but_for_images(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for key in found.keys() - {"images"}:
        one, other = found[key], wanted[key]
        if key == "text":
            assert one.ids.equal(other.ids) and one.valid.equal(other.valid)
        else:
            assert one.equal(other) if isinstance(one, torch.Tensor) else one == other, key


@pytest.mark.parametrize("name", mostly_slow(DATA, ["questions", "shards of captions"]))
def test_batches_are_those_of_before_with_other_images(place, name):
    plain, run = prepared(place, name, "none"), prepared(place, name, "crop")
    visual = run.model.encoder.clip.visual
    for step in range(4):  # more than an epoch of photographs
        found, wanted = run.batch_at(step, Share()), plain.batch_at(step, Share())
        same_but_for_images(found, wanted)
        unaltered = levels(wanted["images"], visual)
        assert found["images"].dtype == torch.uint8 and found["images"].shape == unaltered.shape
        assert all(not one.equal(other) for one, other in zip(found["images"], unaltered, strict=True))
        assert run.batch_at(step, Share())["images"].equal(found["images"])
    module = run.module()
    module.log = module.log_dict = lambda *_, **__: None
    assert torch.isfinite(module.training_step(loaded(run, 0, 0, 1)[0], 0))


@pytest.mark.parametrize("name", mostly_slow(DATA, ["captions", "scenes with captions"]))
def test_workers_and_resumptions_have_the_same_images(place, name):
    runs = [prepared(place, name, "crop") for _ in range(2)]
    whole = loaded(runs[0], 2)
    assert len(whole) == 5 and len({tuple(batch["ids"]) for batch in whole}) > 1
    others = [(loaded(runs[1], 2, first=2), whole[2:])]
    if "shards" not in name:  # where each worker reads shards of its own
        others += [(loaded(runs[1], 0), whole), (loaded(runs[1], 0, first=3), whole[3:])]
    for found, wanted in others:
        for one, other in zip(found, wanted, strict=True):
            same_but_for_images(one, other)
            assert one["images"].equal(other["images"])


@pytest.mark.parametrize("name", ["questions", "scenes with captions"])
def test_shares_of_a_step_have_the_images_of_the_whole(place, name):
    run = prepared(place, name, "crop")
    whole = run.batch_at(2, Share())
    for share in (Share(0, 2), Share(1, 2), Share(3, 4)):
        part = run.batch_at(2, share)
        assert part["ids"] == list(share.rows(whole["ids"]))
        assert part["images"].equal(whole["images"][share.index :: share.of])


def test_other_epochs_have_other_images(place):
    run = prepared(place, "questions", "crop", "training.batch_size=8")
    epochs = [dict(zip(batch["ids"], batch["images"], strict=True)) for batch in loaded(run, 0, last=3)]
    assert [sorted(one) for one in epochs] == [list(range(TRAINED_ON))] * 3
    for sample in range(TRAINED_ON):
        assert len({one[sample].numpy().tobytes() for one in epochs}) == 3


@pytest.mark.parametrize("name", mostly_slow(DATA, ["questions", "scenes with captions"]))
def test_what_is_validated_and_explained_is_not_altered(place, name):
    """Applied to these, it fails here: the images must be those of a run without it, to the last bit."""
    found = []
    for augment in ("none", "randaugment"):
        run = prepared(place, name, augment)
        validated = [batch for split in run.validation_splits for batch in Labelled(run.splits[split])]
        samples = task_named(run.config.training.task).samples(run.model, run.data, "validation", 2, 0)
        found.append((validated, samples.images))
        if "captions" not in name:
            assert "images" not in run._train.questions_only(torch.arange(2))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        same_but_for_images(one, other)
        assert one["images"].dtype == other["images"].dtype and one["images"].equal(other["images"])
    assert found[0][1].equal(found[1][1])


@pytest.mark.slow
def test_a_run_says_that_the_token_cache_is_off_and_validates_the_images_themselves(
    place, capsys, monkeypatch
):
    seen: dict[str, list] = {"training_step": [], "validation_step": []}
    for name, batches in seen.items():
        step = getattr(VQAModule, name)

        def watched(self, batch, *rest, step=step, batches=batches):
            batches.append(batch)
            return step(self, batch, *rest)

        monkeypatch.setattr(VQAModule, name, watched)
    config = config_of(place, "questions", "data.augment=colour", "data.workers=2", "training.max_steps=2")
    assert config.training.token_cache  # by default, or because the user says so: the line is the same
    train(config)
    printed = capsys.readouterr()
    assert " ".join(printed.out.split()).count(EXCLUDE.format("colour")) == 1
    run = prepared(place, "questions", "none")
    read = run.data.reader(run.model.encoder)
    records = {record.id: record for split in run.data.splits.values() for record in split}
    for name, batches in seen.items():
        assert batches and not any("image_tokens" in batch for batch in batches)
        for batch in batches:
            unaltered = read.many([records[sample] for sample in batch["ids"]])
            assert batch["images"].dtype == torch.uint8
            assert batch["images"].equal(unaltered) == (name == "validation_step")


@pytest.mark.parametrize("more", [("training.token_cache=false",), ("encoder.frozen=false",)])
def test_the_line_is_said_where_the_two_meet(place, capsys, more):
    config = config_of(place, "captions", "data.augment=crop", "training.max_steps=1", *more)
    run = task_named(config.training.task).run(config, built(asdict(config.data)))
    run.prepare(place)
    printed = " ".join(capsys.readouterr().out.split())
    assert (EXCLUDE.format("crop") in printed) == config.training.token_cache


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_the_images_that_it_would_have_seen(place, monkeypatch):
    seen, stop_in = [], None
    original = VQAModule.training_step

    def training_step(module, batch, index):
        seen.append(batch["images"])
        if module.global_step == stop_in:
            os.kill(os.getpid(), 15)
        return original(module, batch, index)

    monkeypatch.setattr(VQAModule, "training_step", training_step)
    more = ("data.augment=randaugment", "data.workers=2", "name=augmented", "training.blind_steps=0")
    config = config_of(place, "questions", *more)

    def weights(folder):
        return torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]

    whole = weights(train(config))
    wanted, stop_in = seen[:], 1
    seen.clear()
    with pytest.raises(RunInterrupted, match="after step 2"):
        train(config)
    stop_in = None
    resumed = weights(train(replace(config, resume=True)))
    assert len(wanted) == 5 and all(map(torch.equal, seen, wanted)) and len(seen) == 5
    assert training_models.same_bits(resumed, whole)


@pytest.mark.slow
def test_a_run_of_before_the_setting_goes_on_without_it(place, tmp_path):
    settings = asdict(config_of(place, "questions", f"output={tmp_path}", "name=old"))
    folder = new_run_folder(str(tmp_path), "old", settings)
    text = (folder / CONFIG).read_text()
    assert "  augment: none\n" in text
    (folder / CONFIG).write_text(text.replace("  augment: none\n", ""))
    (folder / CHECKPOINT).write_bytes(b"")
    assert folder_to_resume(str(tmp_path), "old", settings) == folder
    settings["data"]["augment"] = "crop"
    with pytest.raises(UserError, match=r"data\.augment is not what .*none"):
        folder_to_resume(str(tmp_path), "old", settings)


def test_a_checkpoint_says_which_data_and_not_how_they_were_altered(place):
    described = [
        data_description(config_of(place, "scenes", f"data.augment={kind}").data) for kind in ("none", "crop")
    ]
    assert described[0] == described[1] and "augment" not in described[0]["settings"]
