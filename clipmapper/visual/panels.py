"""Parts of a figure: a picture that fills its panel, the outline of a region, colour bars."""

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

from clipmapper.visual.layout import CAPTION_SIZE, FAINT, FONT, INK, axes_at, text_width, write

_EDGE = "#404040"
REGION_KEY = "□ decides the answer"


def check_mask(image: UInt8[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None) -> None:
    """Raise ValueError where a mask does not have the image's height and width."""
    if mask is not None and mask.shape != image.shape[:2]:
        raise ValueError(f"deciding_mask is {mask.shape}, the image is {image.shape[:2]}")


def show_image(axes: Axes, picture: UInt8[np.ndarray, "height width 3"]) -> None:
    """Fill the axes with a picture, with a hair-line frame and without ticks."""
    axes.imshow(picture, aspect="auto", interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_EDGE, linewidth=0.5)


def outline_region(
    axes: Axes, mask: Bool[np.ndarray, "height width"], picture_shape: tuple[int, int], thickness: float
) -> None:
    """Draw the border of a region over a picture of (height, width) pixels shown by `show_image`."""
    if not mask.any():
        return
    height, width = picture_shape
    fitted = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    # A margin of zeros closes the line where the region touches the edge of the picture.
    padded = np.pad(np.asarray(fitted).astype(np.float32), 1)
    lines = axes.contour(
        np.arange(-1, width + 1).clip(-0.5, width - 0.5), np.arange(-1, height + 1).clip(-0.5, height - 0.5),
        padded, levels=[0.5], colors="white", linewidths=thickness,
    )  # fmt: skip
    lines.set_path_effects([patheffects.withStroke(linewidth=thickness + 1, foreground="black")])


def colour_bar(axes: Axes, scale: ScalarMappable, label: str) -> None:
    """An upright colour bar with ticks at 0, ½ and 1 that fills the axes."""
    bar = axes.figure.colorbar(scale, cax=axes)
    bar.set_ticks([0, 0.5, 1], labels=["0", "½", "1"])
    bar.set_label(label, fontsize=CAPTION_SIZE - 1, color=FAINT, fontfamily=FONT)
    bar.outline.set(linewidth=0.5, edgecolor=_EDGE)
    axes.tick_params(
        labelsize=CAPTION_SIZE - 1, labelcolor=INK, labelfontfamily=FONT, length=2, width=0.5, pad=2
    )


def region_key(figure: Figure, right: float, baseline: float, text: str = REGION_KEY) -> None:
    """The legend of `outline_region`, ending at a place in inches."""
    write(figure, right, baseline, text, CAPTION_SIZE, colour=FAINT, align="right")


def colour_key(figure: Figure, right: float, baseline: float, scale: ScalarMappable, label: str) -> float:
    """A colour bar in a line of text, `label 0 ▬ 1`, ending at a place in inches; returns where it begins."""
    length, size = 0.9, CAPTION_SIZE
    end = right - text_width(" 1", size)
    write(figure, right, baseline, "1", size, colour=FAINT, align="right")
    bar = axes_at(figure, end - length, baseline - 0.085, length, 0.09)
    drawn = figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[])
    drawn.outline.set(linewidth=0.5, edgecolor=_EDGE)
    before = f"{label}  0"
    start = end - length - text_width(" ", size)
    write(figure, start, baseline, before, size, colour=FAINT, align="right")
    return start - text_width(before, size)
