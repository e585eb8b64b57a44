"""From a manifest to shards, and runs from them."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import training_models
from support.slow import mostly_slow
from torch.utils.data import DataLoader

from clipmapper.commands.make_shards import main as make_shards
from clipmapper.commands.train import train
from clipmapper.data.records import RecordData
from clipmapper.data.shards.data import ShardData
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.settings.checks import built
from clipmapper.tasks.captioning.task import CaptionRun
from clipmapper.tasks.captioning.training import CaptionModule
from clipmapper.tasks.vqa.task import VQARun
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.batches import StepBatches
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

TRAIN, VALIDATION = 8, 3
SMALL = (
    "encoder.pretrained=null", "training.batch_size=4", "training.max_steps=3", "training.warmup_steps=1",
    "trainer.val_check_interval=3",
    "model.depth=1", "logger=csv",
)  # fmt: skip
ANSWERING = ("data=shards", "model.width=16", "model.head_width=16", "training.blind_steps=2")
CAPTIONING = ("experiment=caption_manifest", "data=shards", "model.width=32", "model.vocabulary=data")
EXPLAINED = ("callbacks.samples=2", "callbacks.pictures=1", "callbacks.methods=[random]")


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Manifests of questions and of captions, and the shards that scripts/make_shards.py makes of them."""
    folder = tmp_path_factory.mktemp("mine")
    questions, captions = [], []
    for n in range(TRAIN + VALIDATION):
        name = "red" if n % 2 else "blue"
        pixels = np.full((30 + n, 40, 3), (250, 20, 20) if n % 2 else (20, 20, 250), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        common = {"id": n, "image": f"{n}.png", "split": "train" if n < TRAIN else "validation"}
        questions.append(common | {"question": f"what colour is it, {n}?", "answers": [name] * 10})
        captions.append(common | {"captions": [f"a {name} picture", f"something {name}"]})
    for name, rows in (("questions", questions), ("captions", captions)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        path = f"data.path={folder / name}.jsonl"
        make_shards([str(folder / name), "data=manifest", path, "data.workers=0", "--images-per-shard=2"])
    return folder


def settings(place, name: str, *more: str):
    chosen = ANSWERING if name == "questions" else CAPTIONING
    common = (f"encoder.architecture={training_models.tiny_clip(place)}", f"output={place / 'outputs'}")
    return training_models.train_settings(*chosen, f"data.path={place / name}", *SMALL, *common, *more)


def test_masks_are_not_left_out_without_a_word(place, tmp_path, capsys):
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(tmp_path / "mask.png")
    rows = [json.loads(line) for line in (place / "questions.jsonl").read_text().splitlines()]
    rows = [row | {"image": str(place / row["image"])} for row in rows]
    rows[0]["mask"] = str(tmp_path / "mask.png")
    (tmp_path / "masked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_shards([str(tmp_path / "shards"), "data=manifest", f"data.path={tmp_path / 'masked.jsonl'}"])
    assert "1 records have a mask: shards hold none" in capsys.readouterr().out
    make_shards([str(tmp_path / "more"), "data=manifest", f"data.path={place / 'questions.jsonl'}"])
    assert "have a mask" not in capsys.readouterr().out


@pytest.mark.parametrize("world", ["scenes", "scenes_captions"])
def test_built_in_scenes_are_not_put_into_shards(tmp_path, capsys, world):
    with pytest.raises(SystemExit) as ended:
        make_shards([str(tmp_path / "shards"), f"data={world}"])
    assert ended.value.code == 2
    assert "data: the built-in scenes are drawn anew whenever they are needed" in capsys.readouterr().err
    assert not list((tmp_path / "shards").glob("*.tar"))


@pytest.mark.slow
def test_questions_from_manifest_to_results(place, capsys):
    folder = train(settings(place, "questions", "data.workers=2", *EXPLAINED))
    printed = capsys.readouterr().out
    assert "train: 8 images, 8 questions, in 4 shards" in printed
    assert "validation: 3 images, 3 questions" in printed
    results = json.loads((folder / RESULTS).read_text())
    row = results["accuracy"]["overall"]
    assert row["questions"] == VALIDATION and 0 <= row["validation"] <= 1 and 0 <= row["blind"] <= 1
    answers = json.loads((folder / "answers_validation.json").read_text())
    assert sorted(a["question_id"] for a in answers) == [8, 9, 10]
    assert {a["answer"] for a in answers} <= {"red", "blue"}
    assert results["explanations"]["samples"] == 2


@pytest.mark.slow
def test_captions_from_manifest_to_results(place):
    more = ("data.workers=0", "callbacks=none", "training.max_steps=2")
    folder = train(settings(place, "captions", *more))
    second = ("training.objective=scst", "training.scst_captions=2")
    again = train(settings(place, "captions", *more, *second, f"training.checkpoint={folder / CHECKPOINT}"))
    for done in (folder, again):
        written = json.loads((done / "captions_validation.json").read_text())
        assert sorted(entry["image_id"] for entry in written) == [8, 9, 10]
        results = json.loads((done / RESULTS).read_text())
        assert results["captions"]["validation"]["greedy"] == {"captions": VALIDATION}


@pytest.mark.parametrize("name", ["questions", "captions"])
def test_a_run_that_is_resumed_sees_the_batches_that_it_would_have_seen(place, name):
    config = settings(place, name, "data.workers=2", "callbacks=none", "training.max_steps=7")

    def batches(first: int) -> list[dict]:
        data = built(vars(config.data))
        task = (VQARun if name == "questions" else CaptionRun)(config, data)
        task.prepare(place)
        steps = StepBatches(task.batch_at, first, config.training.max_steps)
        return list(DataLoader(steps, batch_size=None, num_workers=2, multiprocessing_context="fork"))

    whole = batches(0)
    assert len(whole) == 7 and {id_ for batch in whole for id_ in batch["ids"]} == set(range(TRAIN))
    for resumed, wanted in zip(batches(3), whole[3:], strict=True):
        assert resumed["ids"] == wanted["ids"] and resumed["images"].equal(wanted["images"])
        assert resumed["text"].ids.equal(wanted["text"].ids)
    if name == "captions":  # newly drawn whenever an image comes again
        told = {tuple(ids.tolist()) for batch in whole for ids in batch["text"].ids}
        assert len(told) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_slow(["questions", "captions"], ["questions"]))
def test_a_run_that_is_stopped_goes_on_with_the_next_batches(place, name, monkeypatch):
    """The whole way: stopped by a signal, resumed by the run itself, to the last bit of the weights."""
    seen: list[tuple[int, ...]] = []
    module, stop_in = (VQAModule, CaptionModule)[name == "captions"], None
    original = module.training_step

    def training_step(module, batch, index):
        seen.append(tuple(batch["ids"]))
        if module.global_step == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(module, batch, index)

    monkeypatch.setattr(module, "training_step", training_step)
    config = settings(place, name, "data.workers=2", "callbacks=none", "training.max_steps=5", "name=resumed")
    whole = checkpoint(train(replace(config, name="whole")))
    wanted, stop_in = seen[:], 1
    assert len(wanted) == 5 and len(set(wanted)) > 3
    seen.clear()
    with pytest.raises(RunInterrupted, match="after step 2"):
        train(config)
    stop_in = None
    resumed = checkpoint(train(replace(config, resume=True)))
    assert seen == wanted
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert training_models.same_bits(resumed[part], whole[part]), part


def test_what_shards_hold_is_what_the_manifest_said(place):
    for name in ("questions", "captions"):
        shards = ShardData(str(place / name), buffer=4)
        config = training_models.train_settings("data=manifest", f"data.path={place / name}.jsonl")
        manifest: RecordData = built(vars(config.data))
        assert shards.answers == manifest.answers and shards.accuracy is manifest.accuracy
        words = {word for caption in manifest.wordings() for word in caption.split()}
        assert set(shards.wordings()) == words
        found = {record.id: record for record in shards.split("validation")}
        assert len(found) == len(manifest.validation)
        for wanted in manifest.validation:
            record = found[wanted.id]
            assert not isinstance(record.image, bytes)  # it stays in the shard
            assert np.array_equal(np.asarray(record.pil()), np.asarray(wanted.pil()))
            assert (record.answers, record.captions) == (wanted.answers, wanted.captions)


def test_mistakes_are_one_clear_line(place, tmp_path):
    with pytest.raises(UserError, match=r"training\.token_cache: a stream .* give false"):
        settings(place, "questions", "training.token_cache=true")
    with pytest.raises(UserError, match="4 shards cannot be shared among 5 readers"):
        train(settings(place, "questions", "data.workers=5", "callbacks=none"))
    with pytest.raises(UserError, match=r"none: no such file or folder"):
        train(settings(place, "questions", f"data.path={tmp_path}/none", "callbacks=none"))
    with pytest.raises(UserError, match="it has captions and no questions"):
        train(settings(place, "questions", f"data.path={place / 'captions'}", "callbacks=none"))
    data = ShardData(str(place / "questions"), buffer=4)
    with pytest.raises(UserError, match="split=train: the data has validation"):
        data.split("train")
    copy = shutil.copytree(place / "questions", tmp_path / "copy")
    (copy / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"1 shards are not there; the first is train-000001\.tar"):
        ShardData(str(copy), buffer=4)
    index = json.loads((copy / "shards.json").read_text())
    (copy / "shards.json").write_text(json.dumps(index | {"version": 1}))
    with pytest.raises(UserError, match="of version 1, not 2; make the shards anew"):
        ShardData(str(copy), buffer=4)


def test_a_damaged_shard_stops_the_run_with_a_line(place, tmp_path):
    copy = shutil.copytree(place / "questions", tmp_path / "copy")
    shard = copy / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    more = (f"data.path={copy}", "data.workers=2", "callbacks=none", "training.blind_steps=0")
    with pytest.raises(UserError) as told:
        train(settings(place, "questions", *more))
    assert str(told.value).startswith(f"{copy}/train-000002.tar: cut off")
    assert "\n" not in str(told.value)
