"""The loss at every learning rate that was tried, and the one that was chosen."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from clipmapper.visual.layout import FAINT, FONT, INK, axes_at, house_style, new_figure, write

_LEFT, _ABOVE, _WIDTH, _HEIGHT = 0.75, 0.5, 4.2, 2.6
_BELOW, _RIGHT = 0.6, 0.3


@house_style()
def plot_learning_rates(rates: Sequence[float], losses: Sequence[float], chosen: float | None) -> Figure:
    """``losses``: smoothed, one a step, while the rate rose. ``chosen``: None where none was."""
    figure = new_figure(_LEFT + _WIDTH + _RIGHT, _ABOVE + _HEIGHT + _BELOW)
    write(figure, _LEFT, _ABOVE - 0.24, "The loss while the learning rate rises", 9.5, weight="bold")
    said = "no rate was chosen" if chosen is None else f"it falls fastest at {chosen:.2g}, which is taken"
    write(figure, _LEFT, _ABOVE - 0.08, said, 7.5, colour=FAINT)
    axes = axes_at(figure, _LEFT, _ABOVE, _WIDTH, _HEIGHT)
    axes.plot(rates, losses, color=INK, linewidth=1.3)
    if chosen is not None:
        axes.axvline(chosen, color="#b3261e", linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=8.5, fontfamily=FONT, color=INK)
    axes.set_ylabel("loss, smoothed", fontsize=8.5, fontfamily=FONT, color=INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, labelfontfamily=FONT, color="#808080", labelcolor=INK)
    return figure
