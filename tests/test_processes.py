"""Two processes on the CPU (gloo) give what one gives: weights, metrics, explanations."""

import json
import sys
from pathlib import Path

import pytest
import torch
import training_models

from clipmapper.errors import UserError
from clipmapper.training.processes import Share, batches_of
from clipmapper.training.run import train
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

COMMON = (
    "encoder.pretrained=null",
    "training.max_steps=4",
    "training.batch_size=12",
    "training.warmup_steps=1",
    "trainer.checkpoint_interval=2",
    "logger=csv",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "callbacks.samples=5",
    "callbacks.pictures=1",
    "callbacks.methods=[weighted,random]",
)
QUESTIONS = (
    *COMMON,
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "data.validation_scenes=31",
    "data.held_out_scenes=7",
    "training.blind_steps=1",
    "training.token_cache=false",
)
CAPTIONS = (
    *COMMON,
    "experiment=caption_scenes",
    "callbacks=relevance",
    "data.train_scenes=24",
    "data.validation_scenes=31",
    "data.held_out_scenes=7",
    "trainer.accumulate_grad_batches=3",
)
SHARDED = (
    *(one for one in QUESTIONS if not one.startswith("callbacks.")),
    "name=sharded",
    "callbacks=none",
    "encoder.frozen=false",
    "trainer.strategy=fsdp2",
)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


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


@pytest.fixture(scope="module")
def by_two(architecture, tmp_path_factory):
    """All runs by the same two processes, which the first command starts."""
    folder = tmp_path_factory.mktemp("two")
    where = (f"encoder.architecture={architecture}", f"output={folder}")
    runs = [(*run, *where) for run in (QUESTIONS, CAPTIONS, SHARDED)]
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), json.dumps(runs)]
    finished = training_models._process(command, folder)
    assert finished.status == 0, finished.errors
    return finished


@pytest.mark.parametrize(
    ("name", "run"), [("vqa_scenes", QUESTIONS), ("caption_scenes", CAPTIONS), ("sharded", SHARDED)]
)
def test_two_processes_equal_one(by_two, architecture, tmp_path, name, run):
    """With splits that two do not divide evenly; of captions, gradients are accumulated as well: they have
    unequally many words, so that the mean of the parts' means would not be the mean."""
    (two,) = (by_two.folder / name).iterdir()
    alone = [one for one in run if "accumulate" not in one and "strategy" not in one]
    where = (f"encoder.architecture={architecture}", f"output={tmp_path}")
    one = train(training_models.train_settings(*alone, *where))
    torch.testing.assert_close(weights(two), weights(one), atol=1e-5, rtol=1e-4)
    results = [json.loads((folder / RESULTS).read_text()) for folder in (two, one)]
    parts = {"accuracy", "captions", "samples", "explanations"} & results[0].keys()
    assert len(parts) >= (1 if run == SHARDED else 2)
    for part in parts:
        close(results[0][part], results[1][part])
    logged = [next(folder.rglob("metrics.csv")).read_text().splitlines() for folder in (two, one)]
    assert logged[0][0] == logged[1][0] and ("/positive/weighted" in logged[0][0]) == (run != SHARDED)


def test_one_process_speaks_and_writes(by_two):
    assert by_two.printed.count("\nRun ") + by_two.printed.startswith("Run ") == 3
    assert "distributed" not in by_two.printed + by_two.errors
    assert by_two.printed.count("Written") == 3


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


def test_fewer_samples_than_processes():
    with pytest.raises(UserError, match="a split of 1 samples cannot be shared among 2 processes"):
        list(batches_of(1, 500, Share(0, 2)))


def test_batch_that_cannot_be_shared_is_one_line(architecture, tmp_path):
    settings = (*QUESTIONS, f"encoder.architecture={architecture}", f"output={tmp_path}")
    with pytest.raises(UserError, match=r"training\.batch_size: 12 .* 1 processes × 5"):
        train(training_models.train_settings(*settings, "trainer.accumulate_grad_batches=5"))
