"""A manifest's column ``mask``: which pixels decide, of one's own images."""

import json

import numpy as np
import pytest
from PIL import Image
from support.photographs import run
from support.slow import mostly_slow
from torch import nn

from clipmapper.commands.compose import train_settings
from clipmapper.commands.train import train
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.record import MaskFile, Record
from clipmapper.errors import UserError
from clipmapper.evaluation.localisation import image_localisation
from clipmapper.training.explained import mask_of
from clipmapper.training.run_folder import RESULTS

SIDE = 64
SMALL = ("model.width=16", "model.depth=1", "callbacks=relevance", "data.workers=0")


def left_half() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    return mask


def rows_in(folder, masks: list, captions: bool = False):
    """A manifest of a row for each mask: an image (of each two rows one is for training), the mask's path."""
    rows = []
    for number, mask in enumerate(masks):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        said = {"captions": ["a red ring", "one ring"]} if captions else {
            "question": "what colour is it?", "answers": [("red", "blue")[number // 2 % 2]]
        }  # fmt: skip
        split = ("train", "validation")[number % 2]
        rows.append({"image": f"{number}.png", "split": split, "mask": mask, **said})
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(folder, name: str, mask: np.ndarray | Image.Image) -> str:
    (folder / "masks").mkdir(exist_ok=True)
    (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(folder / "masks" / name)
    return f"masks/{name}"


@pytest.mark.parametrize("captions", mostly_slow([False, True], [False]), ids=["questions", "captions"])
@pytest.mark.slow
def test_a_run_says_how_well_maps_find_the_mask(tmp_path, captions):
    """Half of the image decides; of the rows of validation one has no mask."""
    name = saved(tmp_path, "left.png", left_half())
    path = rows_in(tmp_path, [None, name, None, name, None, None], captions)
    chosen = ("experiment=caption_manifest",) if captions else ("data=manifest", "training.blind_steps=2")
    folder = run(tmp_path, *chosen, f"data.path={path}", *SMALL)
    found = json.loads((folder / RESULTS).read_text())["explanations"]["localisation"]
    (where,) = found  # the words that decide are nobody's to say
    assert where == ("caption" if captions else "image")
    assert found[where]["area_baseline"] == pytest.approx(0.5)
    for method, scores in found[where]["methods"].items():
        assert set(scores) == {"mass", "rank", "pointing"}, method
        assert all(0 <= score["low"] <= score["mean"] <= score["high"] <= 1 for score in scores.values())
    assert list((folder / "pictures").glob("explanation_*.png"))


def test_scores_by_hand(tmp_path):
    """Of 2 x 2 patches the left two are in the mask."""
    mask = MaskFile(tmp_path / saved(tmp_path, "left.png", left_half())).mask()[None]
    inside, outside, even = (
        image_localisation(np.array([grid]), mask)
        for grid in ([[1.0, 0.0], [3.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    )
    assert inside.mass == inside.rank == inside.pointing == 1 and inside.area == 0.5
    assert outside.mass == outside.rank == outside.pointing == 0
    assert even.mass == even.rank == even.pointing == even.area == 0.5


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((96, 96), (96, 96)), ((30, 60), (64, 64)), ((96, 200), (96, 96)), ((900, 900), (640, 640))],
)
def test_pixels_of_a_mask_are_those_of_its_image(tmp_path, shape, expected):
    """A tower of 64 x 64 pixels: none is lost (scores by area would change), what it does not see is cut."""
    visual = nn.Module()
    visual.image_size, visual.preprocess_cfg = 64, {"resize_mode": "shortest", "fill_color": 0}
    whole = np.zeros(shape, np.uint8)
    whole[:, shape[1] // 2 :] = 255
    name = saved(tmp_path, "half.png", whole)
    record = Record(0, tmp_path / name, "0", truth=MaskFile(tmp_path / name))
    found = mask_of(record, visual)
    assert found.shape == expected
    np.testing.assert_array_equal(found, np.indices(expected)[1] >= expected[1] // 2)


def test_masks_of_different_sizes_are_scored_as_one_by_one():
    generator = np.random.default_rng(0)
    maps, masks = (
        generator.random((3, 2, 3)),
        [generator.random(size) > 0.4 for size in ((6, 6), (9, 5), (2, 3))],
    )
    together = image_localisation(maps, masks)
    for row, mask in enumerate(masks):
        alone = image_localisation(maps[row : row + 1], [mask])
        for score in ("mass", "rank", "pointing", "area"):
            assert getattr(together, score)[row] == getattr(alone, score)[0]


@pytest.mark.parametrize(
    "mask",
    [
        left_half(),
        left_half() // 255,  # the number of an instance
        (left_half() // 255).astype(np.uint16),
        left_half().astype(np.uint16) * 257,
        left_half() > 0,
        np.stack([left_half(), 0 * left_half(), 0 * left_half()], axis=2),
        np.stack([left_half()] * 3 + [0 * left_half()], axis=2),  # transparency says nothing
    ],
    ids=["grey", "number", "number in 16 bits", "16 bits", "1 bit", "colour", "transparent"],
)
def test_black_is_what_does_not_decide(tmp_path, mask):
    path = tmp_path / saved(tmp_path, "mask.png", mask)
    np.testing.assert_array_equal(MaskFile(path).mask(), left_half() > 0)


def test_paths_are_relative_to_the_manifest_or_whole(tmp_path):
    """Also out of its folder, as those of images are."""
    inner = tmp_path / "inner"
    inner.mkdir()
    name = saved(tmp_path, "left.png", left_half())
    path = rows_in(inner, [f"../{name}", str(tmp_path / name), None])
    records = [record for split in manifest_data(str(path)).splits.values() for record in split]
    masks = sorted(str(record.truth and record.truth.path) for record in records)
    assert masks == sorted([str(tmp_path / name)] * 2 + ["None"])


def bad(folder, kind: str) -> str:
    (folder / "masks").mkdir()
    if kind == "text":
        (folder / "masks" / "m.png").write_text("no picture")
    elif kind == "folder":
        (folder / "masks" / "m.png").mkdir()
    elif kind == "size":
        saved(folder, "m.png", left_half()[:, :40])
    elif kind == "jpeg":
        Image.fromarray(left_half()).convert("L").save(folder / "masks" / "m.png", "JPEG")
    elif kind == "empty":
        saved(folder, "m.png", 0 * left_half())
    return "masks/m.png"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "my.jsonl:2: no such mask: "),
        ("folder", "my.jsonl:2: no such mask: "),
        ("text", "m.png: not a readable mask"),
        ("jpeg", "m.png: a mask has to be a PNG, not JPEG"),
        ("size", "my.jsonl:2: its mask has 40 x 64 pixels, its image 64 x 64; a mask is as large as"),
        ("empty", "the deciding pixels of none of its questions can be seen"),
    ],
)
def test_bad_masks_end_a_run_before_it_trains(tmp_path, monkeypatch, kind, says):
    path = rows_in(tmp_path, [None, bad(tmp_path, kind), None])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as mistake:
        train(train_settings("data=manifest", f"data.path={path}", "data.least_answers=1", *SMALL))
    assert says in str(mistake.value)
    assert not list(tmp_path.glob("outputs/**/last.ckpt"))
