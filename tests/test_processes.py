"""Two processes on the CPU (gloo) give what one gives: weights, metrics, explanations."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import training_models
from support.slow import mostly_slow

from clipmapper.commands.make_shards import main as make_shards
from clipmapper.commands.train import train
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.records import Record
from clipmapper.errors import UserError
from clipmapper.tasks.captioning.batches import CaptionBatches, Stage, drawn_batches
from clipmapper.tasks.vqa.batches import QuestionBatches, question_batches
from clipmapper.tasks.vqa.model import build_clipmapper
from clipmapper.training.processes import Share, batches_of
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

COMMON = (
    "encoder.pretrained=null",
    "training.max_steps=3",
    "training.batch_size=12",
    "training.warmup_steps=1",
    "trainer.checkpoint_interval=2",
    "logger=csv",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
)
EXPLAINED = ("callbacks.samples=5", "callbacks.pictures=0", "callbacks.methods=[weighted,random]")
QUESTIONS = (
    *COMMON,
    *EXPLAINED,
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "data.validation_scenes=15",
    "data.held_out_scenes=7",
    "training.blind_steps=1",
    "training.token_cache=false",
)
COMPILED = (*QUESTIONS, "name=compiled", "callbacks.pictures=1", "trainer.compile=true")
CAPTIONS = (
    *COMMON,
    *EXPLAINED,
    "experiment=caption_scenes",
    "callbacks=relevance",
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "data.validation_scenes=15",
    "data.held_out_scenes=7",
    "trainer.accumulate_grad_batches=3",
)
SHARDED = (
    *COMMON,
    "name=sharded",
    "data=manifest",  # whose images two further processes decode
    "training.blind_steps=0",
    "callbacks=none",
    "encoder.frozen=false",
    "trainer.strategy=fsdp2",
)
PLAIN = (*COMMON, "data=manifest", "data.workers=0", "training.blind_steps=0", "callbacks=none")
STREAMED = (*PLAIN, "data=shards")
# A run, and the same stopped behind a step and resumed.
RESUMED = (
    (*PLAIN, "name=whole"),
    (*PLAIN, "name=stopped", "stop_after=2"),
    (*PLAIN, "name=stopped", "resume=true"),
    SHARDED,
    (*SHARDED, "name=sharded_stopped", "stop_after=2"),
    (*SHARDED, "name=sharded_stopped", "resume=true"),
    (*STREAMED, "name=streamed"),
    (*STREAMED, "name=streamed_stopped", "stop_after=2"),
    (*STREAMED, "name=streamed_stopped", "resume=true"),
)
# How a run is made and not what comes of it: the run by one process is without.
BY_THE_WAY = ("trainer.accumulate", "trainer.strategy", "trainer.compile")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Questions about two images: 13 to train on, 5 of validation, 3 of a test; and a shard of each image."""
    folder = tmp_path_factory.mktemp("mine")
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 48), colour).save(folder / f"{colour}.png")
    splits = ["train"] * 13 + ["validation"] * 5 + ["test"] * 3
    rows = []
    for number, split in enumerate(splits):
        colour = "red" if number % 3 else "blue"
        row = {"id": 100 - number, "image": f"{colour}.png", "question": f"what colour is {number}?"}
        rows.append(row | {"split": split} | ({} if split == "test" else {"answers": [colour] * 10}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = ["data=manifest", f"data.path={path}", "data.workers=0", "--images-per-shard=1"]
    make_shards([str(folder / "shards"), *settings])
    return path


def weights(folder: Path) -> dict:
    """Without the biases of keys: softmax does not see them, so that what Adam makes of their gradient is
    made of rounding errors."""
    state = torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]
    return {name: w for name, w in state.items() if not name.endswith(("key_value.bias", "in_proj_bias"))}


def close(a: object, b: object) -> None:
    """The same numbers to float32's rounding, and everything else the same."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            close(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-4)
    else:
        assert a == b


def placed(run: tuple[str, ...], architecture: str, manifest: Path, output: Path) -> tuple[str, ...]:
    path = manifest.with_name("shards") if "data=shards" in run else manifest
    data = (f"data.path={path}",) if {"data=manifest", "data=shards"} & {*run} else ()
    return (*run, *data, f"encoder.architecture={architecture}", f"output={output}")


def run_by_two(runs, architecture: str, manifest: Path, folder: Path) -> training_models.Finished:
    """All runs by the same two processes, which the first command starts."""
    placed_runs = [placed(run, architecture, manifest, folder) for run in runs]
    command = [sys.executable, str(Path(__file__).parent / "support" / "two_processes.py")]
    finished = training_models._process([*command, json.dumps(placed_runs)], folder)
    assert finished.status == 0, finished.errors
    return finished


@pytest.fixture(scope="module")
def by_two(architecture, manifest, tmp_path_factory):
    return run_by_two((QUESTIONS,), architecture, manifest, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def slowly_by_two(architecture, manifest, tmp_path_factory):
    return run_by_two(
        (CAPTIONS, SHARDED, COMPILED), architecture, manifest, tmp_path_factory.mktemp("slowly")
    )


@pytest.fixture(scope="module")
def resumed(architecture, manifest, tmp_path_factory):
    return run_by_two(RESUMED, architecture, manifest, tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize(
    ("ran", "name", "run"),
    mostly_slow(
        [
            ("by_two", "vqa_scenes", QUESTIONS),
            ("slowly_by_two", "caption_scenes", CAPTIONS),
            ("slowly_by_two", "sharded", SHARDED),
            ("slowly_by_two", "compiled", COMPILED),
        ],
        [],
    ),
)
def test_two_processes_equal_one(request, architecture, manifest, tmp_path, ran, name, run):
    """With splits that two do not divide evenly; of captions, gradients are accumulated as well: they have
    unequally many words, so that the mean of the parts' means would not be the mean."""
    (two,) = (request.getfixturevalue(ran).folder / name).iterdir()
    alone = tuple(setting for setting in run if not setting.startswith(BY_THE_WAY))
    alone += ("data.workers=0",) if run == SHARDED else ()
    one = train(training_models.train_settings(*placed(alone, architecture, manifest, tmp_path)))
    torch.testing.assert_close(weights(two), weights(one), atol=1e-5, rtol=1e-4)
    results = [json.loads((folder / RESULTS).read_text()) for folder in (two, one)]
    parts = {"accuracy", "captions", "samples", "explanations"} & results[0].keys()
    assert len(parts) >= (1 if run == SHARDED else 2)
    for part in parts:
        close(results[0][part], results[1][part])
    logged = [next(folder.rglob("metrics.csv")).read_text().splitlines() for folder in (two, one)]
    assert logged[0][0] == logged[1][0] and ("/positive/weighted" in logged[0][0]) == (run != SHARDED)
    if run == SHARDED:
        for split, ids in (("validation", range(87, 82, -1)), ("test", range(82, 79, -1))):
            answers = [json.loads((folder / f"answers_{split}.json").read_text()) for folder in (two, one)]
            assert answers[0] == answers[1]
            assert [answer["question_id"] for answer in answers[0]] == list(ids)


@pytest.mark.slow
def test_compiled_blocks_train_as_they_are_written(slowly_by_two):
    """That the weights are the same, the test above says of the run with ``trainer.compile``."""
    (graphs,) = re.findall(r"(\d+) graphs compiled", slowly_by_two.printed)
    assert int(graphs) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [("whole", "stopped"), ("sharded", "sharded_stopped"), ("streamed", "streamed_stopped")],
    ids=["plain", "fsdp2", "shards"],
)
def test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not_been(resumed, names):
    """One of them is told to stop, between two steps; both do."""
    (whole,), (stopped,) = ([*(resumed.folder / name).iterdir()] for name in names)
    assert resumed.errors.count("stopped after step 2") == 3
    ends = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (whole, stopped)]
    assert ends[0]["global_step"] == 3
    for part in ("state_dict", "optimizer_states"):
        assert training_models.same_bits(ends[0][part], ends[1][part]), part
    results = [json.loads((folder / RESULTS).read_text()) for folder in (whole, stopped)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    written = [json.loads((folder / "answers_validation.json").read_text()) for folder in (whole, stopped)]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("commands", "runs", "gone_on"),
    mostly_slow([("by_two", 1, 0), ("slowly_by_two", 3, 0), ("resumed", 6, 3)], []),
)
def test_one_process_speaks_and_writes(request, commands, runs, gone_on):
    """One that is stopped writes nothing and says so."""
    ran = request.getfixturevalue(commands)
    assert ran.printed.count("\nRun ") + ran.printed.startswith("Run ") == runs
    assert ran.printed.count("Resuming ") == gone_on
    assert "distributed" not in ran.printed + ran.errors
    assert ran.printed.count("Written") == runs


@pytest.mark.parametrize(("count", "batch_size", "of"), [(31, 500, 2), (3, 1, 2), (5, 2, 3), (7, 3, 1)])
def test_every_sample_is_in_one_share(count, batch_size, of):
    shares = [list(batches_of(count, batch_size, Share(index, of))) for index in range(of)]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1  # processes wait for each other in every batch
    assert all(batch for share in shares for batch in share)


def test_shares_of_shares_are_the_same_rows():
    rows = list(range(24))
    parts = [Share(index, 2).part(part, 3).rows(rows) for index in range(2) for part in range(3)]
    assert sorted(row for part in parts for row in part) == rows and {len(part) for part in parts} == {4}
    # By hand: process 1 of 2 has the odd rows, and its parts share these out in turn.
    assert [Share(1, 2).part(part, 3).rows(rows[:12]) for part in range(3)] == [[1, 7], [3, 9], [5, 11]]


def test_shares_of_questions_are_the_step_and_the_split(architecture, manifest):
    data = manifest_data(str(manifest))
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    model = build_clipmapper(encoder, training_models.TINY_MAPPER, data.answers)
    split = QuestionBatches(model, data, "train", data.train, None)
    batch_at = question_batches(split, batch_size=6, seed=3)
    for step in (0, 1, 2):  # the last goes over the end of an epoch
        whole = batch_at(step)
        parts = [batch_at(step, Share(index, 3)) for index in range(3)]
        for index, part in enumerate(parts):
            assert part["ids"] == whole["ids"][index::3] and len(part["ids"]) == 2
            assert torch.equal(part["images"], whole["images"][index::3])
            assert torch.equal(part["targets"], whole["targets"][index::3])
    shares = [list(split.labelled(4, Share(index, 2))) for index in range(2)]
    assert len(shares[0]) == len(shares[1]) == 2
    found = [[one for batch in share for one in batch["ids"]] for share in shares]
    ids = [record.id for record in data.train]
    assert found == [ids[0::2], ids[1::2]]


def test_shares_of_captions_are_the_step():
    class Drawn(CaptionBatches):
        def __init__(self) -> None:
            told = [tuple(f"caption {n} of {image}" for n in range(9)) for image in range(7)]
            self.records = [Record(image, b"", str(image), captions=some) for image, some in enumerate(told)]

        def draw(self, image, rng):
            return rng.choice(self.records[image].captions)

        def batch(self, images, captions):
            return {"ids": images, "captions": captions}

    split = Drawn()
    batch_at = drawn_batches([Stage(split, split.draw)], batch_size=4, captions=2, seed=0)
    whole, parts = batch_at(5), [batch_at(5, Share(index, 2)) for index in range(2)]
    pairs = list(zip(whole["captions"][::2], whole["captions"][1::2], strict=True))
    for index, part in enumerate(parts):
        assert part["ids"] == whole["ids"][index::2]
        assert list(zip(part["captions"][::2], part["captions"][1::2], strict=True)) == pairs[index::2]


def test_fewer_samples_than_processes():
    with pytest.raises(UserError, match="a split of 1 samples cannot be shared among 2 processes"):
        list(batches_of(1, 500, Share(0, 2)))


def test_batch_that_cannot_be_shared_is_one_line(architecture, tmp_path):
    settings = (*QUESTIONS, f"encoder.architecture={architecture}", f"output={tmp_path}")
    with pytest.raises(UserError, match=r"training\.batch_size: 12 .* 1 processes × 5"):
        train(training_models.train_settings(*settings, "trainer.accumulate_grad_batches=5"))
