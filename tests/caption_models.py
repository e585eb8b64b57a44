"""A small captioner with CLIP's own tokenizer, and images and captions for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import training_models

from clipmapper.data.world.captions import captions
from clipmapper.data.world.scenes import Scene, draw_scene, render
from clipmapper.tasks.captioning.build import build_captioner
from clipmapper.tasks.captioning.model import Captioner

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


@dataclass(frozen=True)
class Split:
    """What :class:`clipmapper.data.world.captioning.CaptionSplit` gives."""

    images: np.ndarray
    references: Sequence[Sequence[str]]
    scenes: Sequence[Scene]
    instances: np.ndarray


def split(count: int, seed: int = 0) -> Split:
    scenes = [draw_scene(seed, "caption tests", index) for index in range(count)]
    drawn = render(scenes)
    return Split(drawn.images, [captions(scene, 3) for scene in scenes], scenes, drawn.instances)
