"""Photographs of one's own, manifests about them, and training on these."""

import json

import numpy as np
from PIL import Image

from clipmapper.commands.train import train
from support import training_models

SETTINGS = (
    "encoder.pretrained=null", "training.batch_size=8", "training.max_steps=2", "training.warmup_steps=1",
    "trainer.val_check_interval=2",  # once: tests of several are those of the best one
    "callbacks.samples=3", "callbacks.pictures=1", "callbacks.methods=[weighted,random]", "logger=csv",
)  # fmt: skip


def photograph(corner: tuple[int, int, int], size=(64, 40)) -> Image.Image:
    """Grey, with a coloured quarter at the upper left."""
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = corner
    return Image.fromarray(pixels)


def photographs_in(folder):
    """Photographs of different shapes, one stored on its side, and manifests about them."""
    questions, captions = [], []
    for n in range(8):
        colour, name = ((255, 0, 0), "red") if n % 2 else ((0, 0, 255), "blue")
        exif = Image.Exif()
        picture = photograph(colour, (64, 40 + 8 * n))
        if n == 3:
            picture, exif[0x112] = picture.rotate(90, expand=True), 6
        picture.save(folder / f"{n}.jpg", exif=exif)
        split = "train" if n < 4 else "validation" if n < 7 else "test"
        asked = {"id": 10 + n, "image": f"{n}.jpg", "question": "what colour is it?", "split": split}
        asked["family"] = "../what/colour"  # any text
        questions.append(asked | ({} if n == 7 else {"answers": [name] * 6 + ["purple"] * 4}))
        told = [f"a {name} corner", f"something {name}"]
        captions.append({"id": n, "image": f"{n}.jpg", "captions": told, "split": split})
    for name, rows in (("questions", questions), ("captions", captions)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(place, *settings: str):
    architecture = training_models.tiny_clip(place)  # with room for few patches
    given = SETTINGS if "callbacks=none" not in settings else [s for s in SETTINGS if "callbacks." not in s]
    common = (f"encoder.architecture={architecture}", f"output={place / 'outputs'}")
    return train(training_models.train_settings(*given, *settings, *common))
