"""A small captioner with CLIP's own tokenizer, and images and captions for it."""

from collections.abc import Sequence

import numpy as np
import torch

from clipmapper.data.world.data import ScenesCaptions
from clipmapper.data.world.scenes import draw_scene
from clipmapper.tasks.captioning.build import build_captioner
from clipmapper.tasks.captioning.model import Captioner
from support import training_models

SETTINGS = {
    "mapper": "dual_flow",
    "width": 16,
    "depth": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "image_position_embedding": True,
    "tied_head": False,
    "text_embedding_only": False,
    "vocabulary": "tokenizer",
}


def captioner(
    architecture: str, *, seed: int = 0, said: Sequence[str] | None = None, **settings
) -> Captioner:
    """On :func:`training_models.tiny_clip`, in float64, every weight random."""
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    torch.manual_seed(seed)
    model = build_captioner(encoder, SETTINGS | settings, captions=said)
    training_models.spread_out(model.encoder.clip, seed)
    training_models.spread_out(model.head, seed + 1)
    return model.double().eval()


def scenes(count: int) -> ScenesCaptions:
    """Data whose only split, "validation", has so many scenes with three captions each."""
    data = ScenesCaptions(0, 0, count, 0, references=3, seed=0)
    drawn = [draw_scene(0, "caption tests", index) for index in range(count)]
    data.splits = {"validation": data.records("validation", drawn)}
    return data


def picture() -> np.ndarray:
    """The image of a scene."""
    return scenes(1).validation[0].image.pixels
