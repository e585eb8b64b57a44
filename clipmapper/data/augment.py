"""Images of training batches, altered by torchvision: drawn by seed, step and sample, and never mirrored."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Num, UInt8
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import InterpolationMode

from clipmapper.data.images import levels

# Questions ask where things are and how many there are, so whole objects should stay: a crop keeps seven
# tenths of the image at least, which cuts a fifth of a side off at most. Its sides differ by a tenth at most,
# for a square is to stay one.
_AREA, _RATIO = (0.7, 1.0), (0.9, 1 / 0.9)
# Colours are asked for too: they become paler, brighter or darker by a fifth at most, and their hue stays.
_COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
# The numbers of its paper for ImageNet (Cubuk et al. 2020, §4.3), which torchvision's own are too.
_OPERATIONS, _MAGNITUDE = 2, 9


class Augmentation:
    """Alters images of training as an image tower reads them.

    Parameters
    ----------
    kind : "crop", a part of the image, brought to its size by the tower's interpolation; "colour", its
        brightness, contrast and saturation; "randaugment", what torchvision's ``RandAugment`` holds.
    visual : the image tower (``open_clip``).
    seed : of the run.

    What is drawn depends on the seed, the step and a name alone (the id of the record, or that of an image
    which several records of a batch share): a step has the same images in whatever process, worker or part of
    a batch they are made, and after a resumption.
    """

    def __init__(self, kind: str, visual: nn.Module, seed: int) -> None:
        self.visual, self.seed = visual, seed
        self.transform = _TRANSFORMS[kind](visual)

    def __call__(
        self, images: Num[Tensor, "n 3 height width"], step: int, names: Sequence[int | str]
    ) -> UInt8[Tensor, "n 3 height width"]:
        """``images``: uint8, or normalised already."""
        found = []
        # torchvision draws from the generator of the process, which draws for others as well.
        with torch.random.fork_rng(devices=[]):
            for image, name in zip(levels(images, self.visual), names, strict=True):
                drawn = random.Random(f"augment/{self.seed}/{step}/{name}").getrandbits(32)
                # (torch.manual_seed would seed the accelerators too.)
                torch.default_generator.manual_seed(drawn)
                found.append(self.transform(image))
        return torch.stack(found)


def _crop(visual: nn.Module) -> nn.Module:
    size, interpolation = visual.image_size, InterpolationMode(visual.preprocess_cfg["interpolation"])
    return v2.RandomResizedCrop(size, scale=_AREA, ratio=_RATIO, interpolation=interpolation, antialias=True)


def _colour(visual: nn.Module) -> nn.Module:
    return v2.ColorJitter(**_COLOUR)


def _randaugment(visual: nn.Module) -> nn.Module:
    # What is turned or moved into the picture has the mean colour, which is nothing to the tower.
    fill = [255 * mean for mean in visual.image_mean]
    return v2.RandAugment(_OPERATIONS, _MAGNITUDE, interpolation=InterpolationMode.BILINEAR, fill=fill)


_TRANSFORMS = {"crop": _crop, "colour": _colour, "randaugment": _randaugment}
AUGMENT = ("none", *_TRANSFORMS)
