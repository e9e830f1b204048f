"""The look of all pictures: colours, styles of boxes, figures, titles, PNG files.

One visual language, so that a reader learns it once: the table STYLES. Colours are Okabe and Ito's,
extended to any number of classes; orange and red stay reserved for errors, and no meaning hangs on
colour alone. Figures are at most 9 inches wide; an inch is 100 CSS pixels, so that the widest fill
the column of a notebook. Notebooks keep them as PNG files of twice that resolution. Pyplot does not
know the figures: nothing needs to be closed.
"""

import base64
import io
import re
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

RED, ORANGE, BLUE, GREY, INK = "#E3001B", "#E69F00", "#56B4E9", "#C8C8C8", "#222222"
# Okabe and Ito's, without the black, the orange and the red; then five more
CLASS_COLORS = (
    *("#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2"),
    *("#999933", "#7B5FC7", "#7FE0C8", "#8B5A2B", "#C9B8FF"),
)
METHOD_COLORS = {
    "control": "#8C6D1F",  # before the method it is a control for
    "same-time": "#8C6D1F",  # "supervised, same time": the same
    "supervised": "#5A5A5A",
    "mean-teacher": "#0072B2",
    "semi-detr": "#D55E00",
    "soft-teacher": "#009E73",
    "dense-teacher": "#CC79A7",
    "+shm+cqc": "#7B5FC7",
    "+shm": "#56B4E9",
}
BURN_IN_COLOR = "#A6A6A6"
OTHER_COLORS = ("#56B4E9", "#7B5FC7", "#000000")
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#56B4E9", "#5A5A5A")
# style: (colour, None for the colour of the class; line width in points; line style; hatch)
STYLES = {
    "truth": ("#FFFFFF", 1.2, "-", None),  # with a black outline
    "prediction": (None, 1.6, "-", None),  # labelled with class name and score, as all below
    "pseudo": (None, 1.6, "--", None),
    "hit": (BLUE, 1.6, "-", None),
    "false_alarm": (ORANGE, 1.6, "-", "//"),
    "missed": (RED, 2.2, "-", None),
    "kept": (BLUE, 2.4, "-", None),  # of the teacher's boxes, as are the next four
    "kept_wrong": (ORANGE, 2.4, "-", "//"),  # where the truth is known
    "mined": (BLUE, 1.6, "--", None),
    "mined_wrong": (ORANGE, 1.6, "--", None),
    "dropped": (GREY, 0.9, ":", None),
}
STYLE_NAMES = {  # in a legend, where they differ from the keys
    "false_alarm": "false alarm",
    "kept_wrong": "kept, wrong",
    "mined": "mined only",
    "mined_wrong": "mined only, wrong",
}
MAX_LABELS = 12  # labels in one image
WIDTH, DPI = 9.0, 100  # inches, CSS pixels per inch
SHARPNESS = 2  # pixels of a saved picture per CSS pixel
LEGEND_OUTSIDE: dict[str, Any] = {  # arguments of a legend to the right of a plot
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1.02),
    "fontsize": 9,
    "frameon": False,
}


class Picture(Figure):
    """A Matplotlib figure that a notebook shows when it is the last line of a cell.

    `alt` describes it to those who do not see it; without one the words in the figure do.
    """

    alt = ""

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        return png_bundle([self])

    def __repr__(self) -> str:
        """The same on every machine: tests of notebooks compare it."""
        return "<Picture>"

    __str__ = __repr__


def png_bundle(figures: Sequence[Figure]) -> tuple[dict, dict]:
    """Figures, one below the other, as a notebook keeps them: data and metadata by type.

    A PNG file with alt text, which GitHub, nbviewer and nbconvert show at its size in CSS pixels.
    """
    images = [_render(figure, SHARPNESS * figure.dpi) for figure in figures]
    width = max(image.width for image in images)
    together = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        together.paste(image, (0, top))
        top += image.height
    code = base64.b64encode(_pack(together)).decode("ascii")
    alt = "; ".join(map(describe, figures))
    metadata = {"alt": alt, "width": width // SHARPNESS}
    return {"image/png": code, "text/plain": "<Picture>"}, {"image/png": metadata}


def new_plot(
    width: float, height: float, columns: int = 1, height_ratios: tuple | list = (1,)
) -> tuple[Picture, Any]:
    """A figure of `width` x `height` inches with plots in the common style.

    Returns the figure and its axes: one, or an array of `columns` side by side, or of one below the
    other for each of `height_ratios`.
    """
    figure = Picture(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(len(height_ratios), columns, height_ratios=height_ratios)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#888888")
        ax.grid(color="#E8E8E8", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9, colors="#555555", length=2)
        for axis in (ax.xaxis, ax.yaxis):
            axis.label.set(fontsize=9, color="#555555")
    return figure, axes


def set_title(
    figure: Picture, title: str | None, finding: str = "", x: float = 0.01, y: float | None = None
) -> Picture:
    """Write `title` over a figure, or `finding` where the title is None. Returns the figure."""
    text = wrap(finding if title is None else title, figure.get_figwidth(), 11)
    if text:
        figure.suptitle(
            text,
            x=x,
            y=y,
            ha="left",
            va="top",
            fontsize=11,
            weight="bold",
            color=INK,
            parse_math=False,
        )
    return figure


def wrap(text: str, inches: float, points: int) -> str:
    """A text with line breaks that fits a width, never broken after a number.

    A letter is taken to be about 0.6 times as wide as its size in `points`.
    """
    together = re.sub(r"(?<=\d) ", "\u00a0", text)
    letters = max(12, int(inches / (0.0082 * points)))
    return textwrap.fill(together, letters).replace("\u00a0", " ")


def count_of(count: int, word: str, plural: str = "") -> str:
    """A number with what it counts: "1 box", "2 boxes"."""
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def image_tag(figure: Figure, text: str = "", dpi: int | None = None) -> str:
    """A figure as an HTML image tag, described by `text`, else by the words in the figure."""
    code = base64.b64encode(png(figure, dpi)).decode("ascii")
    return f'<img src="data:image/png;base64,{code}" alt="{escape(text or describe(figure))}">'


def describe(figure: Figure) -> str:
    """Its alt text; without one its title, then title, axes and labels of each plot or image."""
    alt = getattr(figure, "alt", "")
    if alt:
        return alt
    words = [text.get_text() for text in figure.texts]
    for ax in figure.axes:
        words.append(ax.get_title(loc="left"))
        words.append(" over ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel()))))
        words.append(", ".join(text.get_text() for text in ax.texts))
    return re.sub(r"\s+", " ", "; ".join(filter(None, words)))


def png(figure: Figure, dpi: int | None = None) -> bytes:
    """A figure as the bytes of a PNG file, at its own resolution unless `dpi` is given.

    The file has 40 colours, chosen so that the rare ones (of boxes) stay true. This makes it a
    quarter of the size.
    """
    return _pack(_render(figure, dpi or figure.dpi))


def _render(figure: Figure, dpi: float) -> Image.Image:
    """A figure as an image of three channels."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return Image.open(file).convert("RGB")


def _pack(image: Image.Image) -> bytes:
    """An image as a PNG file of 40 colours."""
    file = io.BytesIO()
    palette = image.quantize(40, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    palette.save(file, "PNG", optimize=True)
    return file.getvalue()


def class_color(label: int) -> str | tuple[float, float, float]:
    """The colour of a class: ten distinct ones, then the same ten lighter, then darker."""
    color = CLASS_COLORS[label % len(CLASS_COLORS)]
    shade = label // len(CLASS_COLORS) % 3
    if shade == 0:
        return color
    red, green, blue = (0.55 * part + (0.45 if shade == 1 else 0) for part in to_rgb(color))
    return red, green, blue


def method_color(name: str, position: int = 0) -> str:
    """The fixed colour of the method that `name` mentions, else a colour by `position`."""
    plain = name.lower().replace("_", "-").replace(" ", "-")
    colors = [color for method, color in METHOD_COLORS.items() if method in plain]
    return colors[0] if colors else OTHER_COLORS[position % len(OTHER_COLORS)]


def hide_frame(ax: Axes) -> None:
    """Take the ticks and the frame away from an image."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
