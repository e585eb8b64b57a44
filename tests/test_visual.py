"""Pictures: what is hot is drawn hot and in its place, texts stay on the page and off the pictures."""

from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from clipmapper.errors import UserError
from clipmapper.visual.curves import line_style, plot_perturbation_curves
from clipmapper.visual.explanation import plot_explanation, plot_method_comparison
from clipmapper.visual.heatmap import (
    DEFAULT_ALPHA,
    check_mask,
    heatmap_overlay,
    relevance_at_pixels,
    share_of_maximum,
    word_colours,
    words_html,
)
from clipmapper.visual.layout import Run, house_style, save_figure, text_width, wrap

WORDS = [("What", 0.1), ("colour", 0.8), ("is", 0.0), ("the", 0.05), ("circle?", 1.0)]
LONG = "Which shape is nearest to the small striped animal near the fence, if it costs $5 or $x_1$? " * 4
METHODS = [
    "weighted", "weighted_token", "weighted_half", "gae", "rollout", "raw_attention", "grad_cam",
    "transformer_attribution", "attn_lrp", "random",
]  # fmt: skip


def grey_image(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 120, dtype=np.uint8)


def pixels(figure: Figure) -> np.ndarray:
    with TemporaryDirectory() as folder, Image.open(save_figure(figure, Path(folder) / "it.png")) as picture:
        return np.asarray(picture.convert("RGB"))


def explanation(**changes) -> Figure:
    height, width = changes.pop("shape", (72, 72))
    given_arguments = {
        "image": np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8),
        "relevance": np.random.default_rng(1).random((6, 6)),
        "words": WORDS,
        "question": "What colour is the circle?",
        "answer": "green",
        "score": 0.97,
        "method": "weighted",
    } | changes
    return plot_explanation(
        given_arguments.pop("image"), given_arguments.pop("relevance"), given_arguments.pop("words"),
        **given_arguments,
    )  # fmt: skip


def comparison(methods: list[str], shape: tuple[int, int], question: str, mask: np.ndarray | None) -> Figure:
    rng = np.random.default_rng(3)
    return plot_method_comparison(
        grey_image(*shape), {name: rng.random((4, 6)) for name in methods},
        {name: [(word, float(rng.random())) for word in question.split()] for name in methods},
        question=question, answer="green", truth="blue", deciding_mask=mask,
    )  # fmt: skip


def curve_data(methods: list[str], points: int = 5) -> dict[str, dict[str, tuple]]:
    mean = np.linspace(0.9, 0.3, points)
    return {
        panel: {
            method: (mean - 0.01 * i, mean - 0.01 * i - 0.02, mean - 0.01 * i + 0.02)
            for i, method in enumerate(methods)
        }
        for panel in ("text/negative", "image/positive", "image/negative", "text/positive")
    }


def assert_tidy(figure: Figure) -> None:
    """Texts lie on the page, off the axes and off each other; axes with their labels lie on the page."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page, renderer = figure.bbox, canvas.get_renderer()
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    for number, (content, box) in enumerate(texts):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, content
        for other, other_box in texts[:number]:
            assert not overlap(box, other_box), (content, other)
        for axes in figure.axes:
            assert not overlap(box, axes.get_window_extent(renderer)), content
    for number, axes in enumerate(figure.axes):
        box = axes.get_tightbbox(renderer)
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert all(not overlap(box, other.get_tightbbox(renderer)) for other in figure.axes[:number])


def overlap(one, other) -> bool:
    """Whether two boxes share more than the pixel by which neighbouring glyph boxes may touch."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    upright = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across > 1 and upright > 1


# --- heat map


@pytest.mark.parametrize("image_shape", [(72, 72), (427, 640), (600, 200)])
@pytest.mark.parametrize("grid_shape", [(6, 6), (3, 8), (9, 2)])
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_hot_corner_brightens_the_same_corner(image_shape, grid_shape, corner):
    relevance = np.zeros(grid_shape)
    relevance[corner] = 3.0
    image = grey_image(*image_shape)
    cold = heatmap_overlay(image, np.zeros(grid_shape)).astype(int).sum(axis=2)
    gain = heatmap_overlay(image, relevance).astype(int).sum(axis=2) - cold
    height, width = gain.shape
    rows = np.array_split(np.arange(height), grid_shape[0])[corner[0]]
    columns = np.array_split(np.arange(width), grid_shape[1])[corner[1]]
    assert gain[np.ix_(rows, columns)].mean() > 60
    assert gain[corner] == pytest.approx(gain.max(), abs=3)  # the grid reaches the very corner of the image
    away = np.ones_like(gain, dtype=bool)
    away[np.ix_(near(rows, height, grid_shape[0]), near(columns, width, grid_shape[1]))] = False
    assert np.abs(gain[away]).max(initial=0) <= 20


def near(cell: np.ndarray, extent: int, cells: int) -> np.ndarray:
    """The cell and its neighbours, which smoothing may colour."""
    size = int(np.ceil(extent / cells)) + 1
    return np.arange(max(0, cell[0] - size), min(extent, cell[-1] + size + 1))


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_maximum_is_drawn_inside_its_patch(rows, columns, data):
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    relevance = np.random.default_rng(rows * 10 + columns).random((rows, columns)) * 0.5
    relevance[row, column] = 1.0
    height, width = 40 * rows, 24 * columns
    strength = relevance_at_pixels(relevance, height, width)
    y, x = np.unravel_index(strength.argmax(), strength.shape)
    assert (y // 40, x // 24) == (row, column)
    assert strength.min() >= 0 and strength.max() <= 1
    centres = strength[20::40, 12::24]
    assert np.allclose(centres, relevance / relevance.max(), atol=0.06)


def test_map_without_relevance_is_the_dimmed_image_without_warning():
    image = np.random.default_rng(0).integers(0, 256, (512, 600, 3), dtype=np.uint8)
    shown = heatmap_overlay(image, np.zeros((7, 7)))
    assert shown.shape == image.shape
    assert shown.mean() < 0.8 * image.mean()
    assert np.corrcoef(shown.sum(axis=2).ravel(), image.sum(axis=2).ravel())[0, 1] > 0.9
    assert np.array_equal(shown, heatmap_overlay(image, np.full((7, 7), -1.0)))


def test_image_stays_recognisable_where_it_is_hottest():
    image = grey_image(512, 512)
    image[::2] = 20

    def contrast(alpha: float) -> float:
        shown = heatmap_overlay(image, np.ones((4, 4)), alpha=alpha).astype(int)
        return float((shown[1::2] - shown[::2]).mean())

    assert contrast(DEFAULT_ALPHA) > 0.5 * (1 - DEFAULT_ALPHA) * 100
    assert contrast(1.0) == 0 < contrast(DEFAULT_ALPHA) < contrast(0.2)


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_kept():
    image = np.random.default_rng(0).integers(0, 256, (36, 72, 3), dtype=np.uint8)
    shown = heatmap_overlay(image, np.zeros((3, 3)))
    assert shown.shape == (288, 576, 3)
    assert np.array_equal(shown, shown[::8, ::8].repeat(8, axis=0).repeat(8, axis=1))
    assert heatmap_overlay(grey_image(427, 640), np.ones((7, 7))).shape == (427, 640, 3)


def test_scale_of_relevance_does_not_matter():
    image, relevance = grey_image(64, 64), np.random.default_rng(0).random((6, 6))
    reference = heatmap_overlay(image, relevance)
    for factor in (1e-300, 1e-6, 8.0, 1e300):
        assert np.abs(heatmap_overlay(image, factor * relevance).astype(int) - reference).max() <= 1


def test_heatmap_refuses_bad_arguments():
    with pytest.raises(ValueError, match="not finite"):
        heatmap_overlay(grey_image(8, 8), np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="alpha"):
        heatmap_overlay(grey_image(8, 8), np.ones((2, 2)), alpha=1.5)


# --- words


class _Spans(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.texts, self.styles = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.styles.append(dict(attributes).get("style", ""))

    def handle_data(self, data):
        self.texts.append(data)


def test_words_html_escapes_and_colours():
    parser = _Spans()
    page = words_html([("<script>", 1.0), ('a"b&c', 0.5), ("the", 0.0)])
    parser.feed(page)
    assert parser.tags == ["div", "span", "span", "span"]
    assert [text for text in parser.texts if text.strip()] == ["<script>", 'a"b&c', "the"]
    assert "<script>" not in page and "&lt;script&gt;" in page
    hot, cold = word_colours(1.0)[0], word_colours(0.0)[0]
    assert hot in parser.styles[1] and cold in parser.styles[3]


def test_words_without_relevance_and_without_words():
    assert share_of_maximum([("a", 0.0), ("b", -2.0)]) == [("a", 0.0), ("b", 0.0)]
    assert share_of_maximum([("a", 4.0), ("b", 1.0), ("c", -3.0)]) == [("a", 1.0), ("b", 0.25), ("c", 0.0)]
    assert words_html([]).count("span") == 0
    with pytest.raises(ValueError, match="finite"):
        words_html([("a", float("nan"))])


def test_ink_is_readable_on_every_ground():
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lightness = []
    for share in np.linspace(0, 1, 101):
        ground, ink = word_colours(float(share))
        high, low = sorted([luminance(ground), luminance(ink)], reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4
        lightness.append(luminance(ground))
    assert np.all(np.diff(lightness) < 1e-9)  # more relevance is always darker: reads in grey print


@given(st.lists(st.text(alphabet="abW.$ü", min_size=1, max_size=40), max_size=12), st.floats(0.5, 4))
@settings(max_examples=50, deadline=None)
def test_wrapped_lines_fit_and_lose_nothing(words, width):
    lines = wrap([Run(" ".join(words), weight="bold")], width, 12.0)
    assert "".join(run.text for line in lines for _, run in line).replace(" ", "") == "".join(words)
    for line in lines:
        left, run = line[-1]
        # Widths of pieces are rounded to whole pixels each, and so do not quite add up.
        assert left + text_width(run.text, 12.0, "bold") <= width + 0.03


# --- figures


@pytest.mark.parametrize(
    ("shape", "question"),
    [
        ((72, 72), LONG),
        ((427, 640), "Is it red?"),
        ((640, 300), "W" * 300),
        ((40, 900), "Is it red?"),
        ((900, 40), LONG),
    ],
)
def test_explanation_is_tidy_at_any_size(shape, question):
    words = [(word, float(i % 5)) for i, word in enumerate(question.split())]
    mask = np.zeros(shape, dtype=bool)
    mask[:20, 5:] = True
    figure = explanation(
        shape=shape, question=question, words=words, truth="blue", deciding_mask=mask, method=METHODS[7]
    )
    assert_tidy(figure)
    (words_axes,) = [axes for axes in figure.axes if axes.texts]
    box, renderer = words_axes.get_window_extent(), figure.canvas.get_renderer()
    assert len(words_axes.texts) >= 2 * len(words)  # the word and its value
    for text in words_axes.texts:
        extent = text.get_window_extent(renderer)
        assert box.x0 - 1 <= extent.x0 and extent.x1 <= box.x1 + 1
        assert box.y0 - 1 <= extent.y0 and extent.y1 <= box.y1 + 1


def test_long_question_wraps_and_the_figure_grows():
    short, long = explanation(), explanation(question=LONG)
    assert long.get_figheight() > short.get_figheight() + 0.5
    title = " ".join(text.get_text() for text in long.texts)
    assert " ".join(LONG.split()) in title


def test_title_says_whether_the_answer_is_true():
    def texts(**changes) -> str:
        return " ".join(text.get_text() for text in explanation(**changes).texts)

    assert "✓" in texts(truth=" Green") and "✗" not in texts(truth="green")
    assert "✗" in texts(truth="blue") and "✓" not in texts(truth="blue")
    assert "✓" not in texts() and "✗" not in texts() and "truth" not in texts()
    assert "0.97" in texts() and "weighted" in texts()


def test_deciding_region_is_outlined_in_its_place():
    mask = np.zeros((60, 120), dtype=bool)
    mask[6:18, 84:108] = True
    arguments = {"image": grey_image(60, 120), "relevance": np.zeros((6, 6))}
    without, with_mask = explanation(**arguments), explanation(**arguments, deciding_mask=mask)
    plain, outlined = pixels(without).astype(int), pixels(with_mask).astype(int)
    box = with_mask.axes[0].get_window_extent()
    top, bottom = round(outlined.shape[0] - box.y1), round(outlined.shape[0] - box.y0)
    changed = np.abs(outlined - plain).sum(axis=2)[top:bottom, round(box.x0) : round(box.x1)]
    rows, columns = np.nonzero(changed)
    assert np.allclose([rows.min(), rows.max()], np.array([6, 18]) / 60 * changed.shape[0], atol=6)
    assert np.allclose([columns.min(), columns.max()], np.array([84, 108]) / 120 * changed.shape[1], atol=6)
    inside = changed[int(8 / 60 * len(changed)) : int(16 / 60 * len(changed))]
    assert (inside[:, int(88 / 120 * inside.shape[1]) : int(104 / 120 * inside.shape[1])] == 0).all()


def test_masks_at_the_edges_and_of_wrong_shape():
    for mask in (np.zeros((72, 72), dtype=bool), np.ones((72, 72), dtype=bool)):
        pixels(explanation(deciding_mask=mask))
    with pytest.raises(ValueError, match="deciding_mask"):
        check_mask(grey_image(72, 72), np.zeros((72, 71), dtype=bool))


def test_explanation_without_words():
    assert_tidy(explanation(words=[]))


@pytest.mark.parametrize(("count", "shape"), [(1, (72, 72)), (4, (900, 40)), (10, (427, 640))])
def test_comparison_is_tidy_and_shows_every_method(count, shape):
    mask = np.zeros(shape, dtype=bool)
    mask[10:30, 10:30] = True
    figure = comparison(METHODS[:count], shape, "What colour is the small circle left of the cross?", mask)
    assert_tidy(figure)
    written = [text.get_text() for text in figure.texts]
    assert [written.count(method) for method in METHODS] == [1] * count + [0] * (len(METHODS) - count)


def test_comparison_needs_words_of_every_method():
    with pytest.raises(ValueError, match="methods"):
        plot_method_comparison(
            grey_image(8, 8), {"gae": np.ones((2, 2))}, {"rollout": WORDS}, question="?", answer="yes"
        )


def test_figures_do_not_depend_on_the_users_style():
    reference = pixels(explanation())
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "axes.titlecolor": "red"}):
        assert np.array_equal(pixels(explanation()), reference)


# --- curves


def test_curves_are_tidy_with_panels_in_order_and_weighted_on_top():
    curves = curve_data(METHODS)
    areas = {panel: {method: 0.5 + 0.01 * i for i, method in enumerate(METHODS)} for panel in curves}
    figure = plot_perturbation_curves(
        curves, [0, 0.1, 0.2, 0.5, 1.0], ylabel="soft accuracy", areas=areas, title=LONG
    )
    assert_tidy(figure)
    assert len(figure.axes) == 4
    titles = [text.get_text() for text in figure.texts if "removed first" in text.get_text()]
    assert [title.split()[:2] for title in titles] == [
        ["image:", "most"], ["image:", "least"], ["text:", "most"], ["text:", "least"]
    ]  # fmt: skip
    for axes in figure.axes:
        assert np.array_equal(axes.lines[0].get_xdata(), [0, 10, 20, 50, 100])
        top = max(axes.lines, key=lambda line: line.get_zorder())
        assert top.get_color() == line_style("weighted").colour
        assert top.get_linewidth() == max(line.get_linewidth() for line in axes.lines)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert "0.590" in [text.get_text() for text in figure.texts]


def test_curves_say_what_was_done_to_the_tokens():
    figure = plot_perturbation_curves(
        curve_data(["gae"]), [0, 0.1, 0.2, 0.5, 1.0], ylabel="score", what_is_done="replaced"
    )
    assert {axes.get_xlabel() for axes in figure.axes} == {"share of tokens replaced (%)"}
    assert sum("relevant replaced first" in text.get_text() for text in figure.texts) == 4


def test_best_area_is_bold_low_for_positive_and_high_for_negative():
    curves = {panel: curve_data(["gae", "rollout"])[panel] for panel in ("image/positive", "image/negative")}
    areas = {panel: {"gae": 0.25, "rollout": 0.75} for panel in curves}
    figure = plot_perturbation_curves(curves, [0, 0.1, 0.2, 0.5, 1.0], ylabel="score", areas=areas)
    cells = [(t.get_text(), t.get_position()[0], t.get_fontweight()) for t in figure.texts]
    cells = sorted((x, text, weight) for text, x, weight in cells if text in ("0.250", "0.750"))
    assert [(text, weight) for _, text, weight in cells] == [
        ("0.250", "bold"), ("0.750", "normal"), ("0.250", "normal"), ("0.750", "bold")
    ]  # fmt: skip


def test_single_panel_and_constant_curves():
    flat = np.full(3, 0.5)
    figure = plot_perturbation_curves(
        {"image/positive": {"gae": (flat, flat, flat)}}, [0.0, 0.5, 1.0], ylabel="probability"
    )
    assert_tidy(figure)


def test_curves_of_wrong_length_are_refused():
    with pytest.raises(ValueError, match="points"):
        plot_perturbation_curves(curve_data(["gae"], points=5), [0.0, 1.0], ylabel="score")
    with pytest.raises(ValueError, match="no curves"):
        plot_perturbation_curves({}, [0.0, 1.0], ylabel="score")


def test_styles_are_stable_and_distinct():
    assert len({line_style(method) for method in METHODS}) == len(METHODS)
    assert len({line_style(method).colour for method in METHODS}) == len(METHODS)
    assert line_style("a method of mine") == line_style("a method of mine")
    assert line_style("a method of mine").colour == "#994455"  # the same in every process


# --- files


def test_saved_png_reads_back_and_is_deterministic(tmp_path):
    path = save_figure(explanation(), tmp_path / "new" / "folder" / "map.png")
    with Image.open(path) as picture:
        saved = np.asarray(picture.convert("RGB"))
    canvas = FigureCanvasAgg(explanation())
    with house_style():
        canvas.draw()
    assert np.array_equal(saved, np.array(canvas.buffer_rgba())[..., :3])
    again = save_figure(explanation(), tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["map.png"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save_figure(explanation(), tmp_path / "map.png")
    before = path.read_bytes()
    figure = explanation(answer="red")

    def fail(target, **_):
        target.write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(UserError, match="No space left"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_pdf_and_refuse_other_suffixes(tmp_path):
    assert save_figure(explanation(), tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"\.png or \.pdf"):
        save_figure(explanation(), tmp_path / "map.bmp")
