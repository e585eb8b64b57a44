"""What stands in the place of patches and words that are not removed but replaced.

Removal takes a model out of what it was trained on, and may punish the truth (a captioner without background
counts one object several times): replacing patches by something plausible is the other half of the test.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

REPLACEMENTS = {
    # (CLIP's tokenizers have no mask token.)
    "mean": "the image's mean patch; the mean of all word embeddings",
    "other": "another sample's patches at the same places, and words",
    "blur": "the same image blurred by a Gaussian as wide as a patch",
    "grey": "mid-grey",
    "background": "the same picture without its objects (of the built-in world alone)",
}
"""What patches and words are replaced by; words only by the first two."""

WORDS_REPLACED = ("mean", "other")


def patch_side(images: Float[Tensor, "samples 3 height width"], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a patch in pixels. What the grid leaves over at the far edges no patch reads."""
    return images.shape[2] // grid[0], images.shape[3] // grid[1]


def mean_patches(
    images: Float[Tensor, "samples 3 height width"], grid: tuple[int, int]
) -> Float[Tensor, "samples 3 height width"]:
    """Each image tiled with the mean of its patches.

    A patch's embedding is linear in its pixels, so that its token is the mean token of the image's, before
    positions are added.
    """
    rows, columns = grid
    high, wide = patch_side(images, grid)
    patches = images[..., : rows * high, : columns * wide].unflatten(-1, (columns, wide))
    patches = patches.unflatten(2, (rows, high))  # [samples, 3, rows, high, columns, wide]
    filled = images.clone()
    filled[..., : rows * high, : columns * wide] = patches.mean(dim=(2, 4)).tile(1, 1, rows, columns)
    return filled


def blurred(
    images: Float[Tensor, "samples 3 height width"], grid: tuple[int, int]
) -> Float[Tensor, "samples 3 height width"]:
    """Each image under a Gaussian whose standard deviation is a patch's side."""
    sigma = float(max(patch_side(images, grid)))
    # As far as two standard deviations, and no farther than an image can be mirrored at its edge.
    reach = min(int(2 * sigma), images.shape[2] - 1, images.shape[3] - 1)
    # One axis after the other: the same, and torchvision would take a square of weights at every pixel.
    for kernel in ([2 * reach + 1, 1], [1, 2 * reach + 1]):
        images = gaussian_blur(images, kernel, [sigma, sigma])
    return images


def patches_replaced(
    images: Float[Tensor, "variants 3 height width"],
    filler: Float[Tensor, "variants 3 height width"],
    keep: Int[Tensor, "variants kept"],
    grid: tuple[int, int],
) -> Float[Tensor, "variants 3 height width"]:
    """The images with the pixels of ``filler`` at every patch but those of ``keep``."""
    rows, columns = grid
    kept = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
    kept.scatter_(1, keep, True)
    high, wide = patch_side(images, grid)
    down = (torch.arange(images.shape[2], device=images.device) // high).clamp(max=rows - 1)
    across = (torch.arange(images.shape[3], device=images.device) // wide).clamp(max=columns - 1)
    stays = kept.unflatten(1, grid)[:, down][:, :, across]
    return torch.where(stays[:, None], images, filler)


def other_words(
    ids: Int[Tensor, "samples tokens"],
    removable: Bool[Tensor, "samples tokens"],
    other_ids: Int[Tensor, "samples other_tokens"],
    other_removable: Bool[Tensor, "samples other_tokens"],
) -> Int[Tensor, "samples tokens"]:
    """The words of another text in the places of a text's own.

    From its first one on, and again from there where it is shorter; other tokens (start, end, padding) stay.
    A text without words changes nothing.
    """
    filled = ids.clone()
    for row in range(len(ids)):
        words = other_ids[row][other_removable[row]]
        places = removable[row].nonzero()[:, 0]
        if len(words):
            filled[row, places] = words[torch.arange(len(places), device=ids.device) % len(words)]
    return filled
