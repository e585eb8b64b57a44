"""One line style per explanation method, the same in every figure.

Colours are from Okabe and Ito's palette and from Paul Tol's "muted" and "medium-contrast", all made for any
colour vision; dashes and markers tell apart what colour alone might not.
"""

import zlib
from dataclasses import dataclass

FOREMOST = "weighted"  # the paper's method: drawn thickest and on top


@dataclass(frozen=True)
class LineStyle:
    """Colour, dashes and marker in matplotlib's terms."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]]
    marker: str


_DASHED, _DOTTED, _MIXED = (0, (5.0, 2.0)), (0, (1.2, 1.6)), (0, (6.0, 2.0, 1.2, 2.0))

_STYLES = {
    "weighted": LineStyle("#D55E00", "-", "o"),
    "weighted_token": LineStyle("#E69F00", _DASHED, "s"),
    "weighted_half": LineStyle("#8C6D1F", _DOTTED, "D"),
    "gae": LineStyle("#0072B2", "-", "^"),
    "rollout": LineStyle("#009E73", "-", "v"),
    "attention_flow": LineStyle("#117733", _DASHED, "<"),
    "raw_attention": LineStyle("#56B4E9", _MIXED, ">"),
    "grad_cam": LineStyle("#CC79A7", "-", "P"),
    "transformer_attribution": LineStyle("#332288", _DASHED, "X"),
    "partial_lrp": LineStyle("#882255", _MIXED, "s"),
    "attn_lrp": LineStyle("#AA4499", _DASHED, "D"),
    "integrated_gradients": LineStyle("#44AA99", _MIXED, "h"),
    "occlusion": LineStyle("#000000", "-", "*"),
    "input_x_gradient": LineStyle("#999933", _DASHED, "p"),
    "random": LineStyle("#7A7A7A", _DOTTED, "x"),
}
_SPARE_COLOURS = ("#CC6677", "#6699CC", "#997700", "#994455", "#004488")
_SPARE_DASHES = (_DASHED, _MIXED, _DOTTED)
_SPARE_MARKERS = ("h", "p", "d", "<", "*")


def line_style(method: str) -> LineStyle:
    """The style of a method; a name without a fixed style gets one computed from its letters."""
    if method in _STYLES:
        return _STYLES[method]
    # Not hash(): that differs from one Python process to the next.
    number = zlib.crc32(method.encode())
    colour = _SPARE_COLOURS[number % len(_SPARE_COLOURS)]
    dashes = _SPARE_DASHES[number // 5 % len(_SPARE_DASHES)]
    return LineStyle(colour, dashes, _SPARE_MARKERS[number // 15 % len(_SPARE_MARKERS)])
