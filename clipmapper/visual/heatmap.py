"""Relevance of image patches as a heat map over the image, and of words as coloured grounds.

The image below the heat map is dimmed and partly greyed, and the opacity of the colour grows with relevance:
what does not matter stays visible but recedes, what matters lights up. The colours are a section of
matplotlib's perceptually uniform `inferno`, whose lightness rises steadily, so that the map also reads in
grey print and with any colour vision.
"""

import html
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from clipmapper.visual.layout import (
    CAPTION_SIZE,
    FAINT,
    FONT,
    INK,
    POINTS_PER_INCH,
    axes_at,
    break_word,
    flow,
    text_width,
    write,
)

# inferno's dark third would only blacken the picture, its last hundredths would bleach it.
_COLOURS = colormaps["inferno"](np.linspace(0.38, 0.97, 256))[:, :3]
_GREYED = 0.65
_DIMMED = 0.75
_OPACITY_POWER = 0.8  # below 1, so that weak relevance is still seen as colour
_SMALL, _LARGE = 512, 1024
DEFAULT_ALPHA = 0.75
HEAT_LABEL = "relevance ÷ maximum"


def upscaled(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "tall wide 3"]:
    """Enlarge a small image by the least whole factor that brings its longer side to 512 pixels or more.

    Whole factors and nearest neighbours keep every pixel a sharp square: nothing is drawn that the model did
    not see.
    """
    factor = math.ceil(_SMALL / max(image.shape[:2]))
    return image if factor == 1 else np.ascontiguousarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def for_display(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "tall wide 3"]:
    """The image at a size fit for a figure panel: small ones enlarged, ones above 1024 pixels reduced."""
    height, width = image.shape[:2]
    scale = _LARGE / max(height, width)
    if scale >= 1:
        return upscaled(image)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def relevance_at_pixels(
    relevance: Float[np.ndarray, "rows columns"], height: int, width: int
) -> Float[np.ndarray, "{height} {width}"]:
    """Relevance divided by its maximum, interpolated (bicubic) from patch centres to pixels; in [0, 1].

    Negative relevance counts as 0. The outer edges of the grid are the outer edges of the image. A map
    without positive relevance gives zeros. Raises ValueError where relevance is not finite.
    """
    if not np.isfinite(relevance).all():
        raise ValueError("relevance has entries that are not finite")
    positive = np.maximum(relevance, 0).astype(np.float64)
    peak = positive.max()
    if peak == 0:
        return np.zeros((height, width), dtype=np.float32)
    grid = Image.fromarray((positive / peak).astype(np.float32))
    # Bicubic curves overshoot beside a sharp peak: outside [0, 1] there is nothing to show.
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def _blend(
    base: Float[np.ndarray, "*pixels 3"], strength: Float[np.ndarray, "*pixels"], alpha: float
) -> Float[np.ndarray, "*pixels 3"]:
    """Colour of the given strength in [0, 1] over a base picture in [0, 1]."""
    grey = base @ np.array([0.299, 0.587, 0.114], dtype=base.dtype)
    dimmed = _DIMMED * (base + _GREYED * (grey[..., None] - base))
    colour = _COLOURS.astype(base.dtype)[np.rint(strength * 255).astype(np.intp)]
    opacity = (alpha * strength**_OPACITY_POWER)[..., None].astype(base.dtype)
    return dimmed + opacity * (colour - dimmed)


def heatmap_overlay(
    image: UInt8[np.ndarray, "height width 3"],
    relevance: Float[np.ndarray, "rows columns"],
    alpha: float = DEFAULT_ALPHA,
) -> UInt8[np.ndarray, "tall wide 3"]:
    """The patch grid as smooth colours over the image; the grid covers the entire image.

    `image` is the picture as the model saw it (after cropping). Row 0 of the grid is its upper edge. `alpha`
    in [0, 1] is the opacity of the most relevant patch. A small image comes back enlarged (see `upscaled`).
    A map without positive relevance gives the dimmed image and no heat colours.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    canvas = upscaled(image)
    strength = relevance_at_pixels(relevance, canvas.shape[0], canvas.shape[1])
    blended = _blend(canvas.astype(np.float32) / 255, strength, alpha)
    return np.rint(255 * blended).astype(np.uint8)


def heat_scale(alpha: float = DEFAULT_ALPHA) -> ScalarMappable:
    """The colours of the overlay as they look over mid grey, for a colour bar from 0 to 1."""
    strength = np.linspace(0, 1, 256, dtype=np.float32)
    over_grey = _blend(np.full((256, 3), 0.6, dtype=np.float32), strength, alpha)
    return ScalarMappable(cmap=ListedColormap(over_grey))


_EDGE = "#404040"


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


def region_key(figure: Figure, right: float, baseline: float) -> None:
    """The legend of `outline_region`, ending at a place in inches."""
    write(figure, right, baseline, "□ decides the answer", CAPTION_SIZE, colour=FAINT, align="right")


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


WORD_LABEL = "relevance ÷ maximum"
# On white paper more relevance is a deeper colour; the hues are those of the heat map's hot half.
_GROUNDS = LinearSegmentedColormap.from_list("words", ["#f6f3ee", "#fddc9a", "#fba246", "#e2542f", "#a81d3c"])
_VALUE_SIZE = 0.58  # size of the value below a word, as a share of the word's


def word_scale() -> ScalarMappable:
    """The colours of the words, for a colour bar from 0 to 1."""
    return ScalarMappable(cmap=_GROUNDS)


def share_of_maximum(words: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Scores divided by the greatest; negative scores count as 0, and all are 0 where none is positive."""
    peak = max((score for _, score in words), default=0.0)
    if not np.isfinite([score for _, score in words]).all():
        raise ValueError("word scores must be finite")
    return [(word, max(0.0, score) / peak if peak > 0 else 0.0) for word, score in words]


def word_colours(share: float) -> tuple[str, str]:
    """(ground, ink) as hex colours for a share of the maximum; the ink is the better readable of two."""
    ground = _GROUNDS(share)
    luminance = _luminance(to_hex(ground))
    dark, light = _luminance(INK), 1.0
    contrast_dark = (luminance + 0.05) / (dark + 0.05)
    contrast_light = (light + 0.05) / (luminance + 0.05)
    return to_hex(ground), INK if contrast_dark >= contrast_light else "#ffffff"


def _luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.1 (linear light, weights of the sRGB primaries)."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def words_html(words: Sequence[tuple[str, float]]) -> str:
    """The words as HTML spans coloured by score over the greatest score; the score shows on hovering."""
    spans = []
    for (word, score), (_, share) in zip(words, share_of_maximum(words), strict=True):
        ground, ink = word_colours(share)
        spans.append(
            f'<span title="{score:.4g}" style="background-color:{ground};color:{ink};border-radius:4px;'
            f'padding:1px 4px;white-space:pre-wrap">{html.escape(word)}</span>'
        )
    return f'<div style="font-family:sans-serif;line-height:1.9">{" ".join(spans)}</div>'


def _boxes(
    words: Sequence[tuple[str, float]], width: float, size: float
) -> list[tuple[str, float, int, float, float]]:
    """(text, share, line, left edge, width) of every word's box, in inches."""
    padding = _padding(size)
    pieces = [
        (piece, share)
        for word, share in share_of_maximum(words)
        for piece in break_word(" ".join(word.split()), width - 2 * padding, size)
    ]
    widths = [text_width(piece, size) + 2 * padding for piece, _ in pieces]
    places = flow(widths, width, gap=0.22 * size / POINTS_PER_INCH)
    return [
        (piece, share, line, left, box)
        for (piece, share), (line, left), box in zip(pieces, places, widths, strict=True)
    ]


def _padding(size: float) -> float:
    return 0.32 * size / POINTS_PER_INCH


def _row_height(size: float, values: bool) -> float:
    return ((2.55 if values else 1.72) * size) / POINTS_PER_INCH


def words_height(
    words: Sequence[tuple[str, float]], width: float, size: float, values: bool = False
) -> float:
    """Height in inches that `draw_words` needs in axes of the given width in inches."""
    rows = max((line for _, _, line, _, _ in _boxes(words, width, size)), default=-1) + 1
    return rows * _row_height(size, values)


def draw_words(axes: Axes, words: Sequence[tuple[str, float]], size: float, values: bool = False) -> None:
    """Fill the axes with the words, wrapped, on grounds coloured by score over the greatest score.

    `size` is in points; with `values` the share of the greatest score stands below each word. Axes of the
    height that `words_height` tells hold all rows.
    """
    box = axes.get_position()
    page_width, page_height = axes.figure.get_size_inches()
    width, height = box.width * page_width, box.height * page_height
    axes.set(xlim=(0, width), ylim=(height, 0))  # data units are inches, counted downwards
    axes.set_axis_off()
    unit = size / POINTS_PER_INCH
    for text, share, line, left, box_width in _boxes(words, width, size):
        ground, ink = word_colours(share)
        top = line * _row_height(size, values)
        axes.add_patch(
            FancyBboxPatch(
                (left, top + 0.06 * unit), box_width, 1.46 * unit, mutation_aspect=1, facecolor=ground,
                edgecolor="none", boxstyle=f"round,pad=0,rounding_size={0.28 * unit}",
            )
        )  # fmt: skip
        centre = left + box_width / 2
        style = {"ha": "center", "va": "baseline", "fontfamily": FONT, "parse_math": False}
        axes.text(centre, top + 1.13 * unit, text, fontsize=size, color=ink, **style)
        if values:
            axes.text(
                centre, top + 2.15 * unit, f"{share:.2f}", fontsize=_VALUE_SIZE * size, color=FAINT, **style
            )
