"""What the tokens of an encoder depend on, as plain values: the encoder's part of a token cache's key."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor

from clipmapper.models.encoder import ClipEncoder

# Raise it whenever the towers (image_towers.py, text_tower.py) or the images that they are given
# (clipmapper/data/images.py) come to give other tokens for the same weights and data.
TOKENS_VERSION = 1


def image_identity(encoder: ClipEncoder) -> dict:
    """Architecture, weights (by their content, wherever they came from) and preprocessing of the images."""
    visual = encoder.clip.visual
    size = visual.image_size
    return {
        **_common(encoder),
        "weights": weights_digest(visual.state_dict()),
        "preprocessing": {
            **visual.preprocess_cfg,
            "image_size": list(size) if isinstance(size, tuple) else [size, size],
            "image_mean": list(visual.image_mean),
            "image_std": list(visual.image_std),
        },
    }


def text_identity(encoder: ClipEncoder) -> dict:
    """Architecture and weights. The tokenizer's part is in the ids that it gives."""
    state = {k: v for k, v in encoder.clip.state_dict().items() if not k.startswith("visual.")}
    return {**_common(encoder), "weights": weights_digest(state), "context_length": encoder.context_length}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _common(encoder: ClipEncoder) -> dict:
    return {
        "tokens_version": TOKENS_VERSION,
        "open_clip": version("open_clip_torch"),
        "architecture": encoder.config,
    }
