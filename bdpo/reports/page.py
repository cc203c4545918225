"""A page as one self-contained HTML file: text, tables and figures, for screen, phone and paper.

Figures are SVG in the colours of the page, so that they follow its light and dark variants. Text consists of
configs, names and numbers: prompts and answers never reach this module.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bdpo.storage.paths import StoragePath, update

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, BLUE, ORANGE, GREEN, PINK, GREY = "#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777"
"""Colours that colour-blind readers distinguish as well (Okabe and Ito)."""

COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)

_ON_PAGE = {
    INK: "currentColor",
    "#ffffff": "var(--paper)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PINK: "var(--pink)",
    GREY: "var(--grey)",
}

_DPI = 200


@dataclass(frozen=True)
class PageTable:
    """A table of texts: the first column is aligned left, the others (numbers) right. Facts have no headings.

    A section has at most one table with headings, whose CSV file is named after the section.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, and the name of the PNG that is written beside the page."""

    name: str
    figure: Figure
    caption: str = ""


@dataclass(frozen=True)
class PageSection:
    """A section of the page, with its contents in this order."""

    heading: str
    text: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    pictures: Sequence[Picture] = ()
    folded: bool = False  # shown on a click


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    title: str
    lead: Sequence[str]
    sections: Sequence[PageSection] = field(default_factory=list)


def plain_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches, with one pair of axes without a frame above and on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(axes: Axes) -> None:
    """Place the legend below the axes, where it hides no point."""
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def write_page(page: Page, file: StoragePath) -> None:
    """Write the page, and beside it each picture as PNG and each table with headings as CSV.

    Files whose content would stay the same are left alone.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("bdpo.reports").joinpath("page.html.jinja").read_text("utf-8"))
    pictures = {p.name: _svg(p) for section in page.sections for p in section.pictures}
    for section in page.sections:
        for picture in section.pictures:
            write_figure(picture.figure, file.parent / f"{picture.name}.png")
        for table in section.tables:
            if any(table.headings):
                name = re.sub(r"\W+", "-", section.heading.lower(), flags=re.ASCII).strip("-")
                update(file.parent / f"{name}.csv", _csv(table).encode())
    update(file, template.render(page=page, pictures=pictures).encode())


def _csv(table: PageTable) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.headings, *table.rows])
    return text.getvalue()


def write_figure(figure: Figure, file: StoragePath) -> None:
    """Write a figure in the format of the file's suffix."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI, format=file.suffix[1:])
    update(file, drawn.getvalue())


def _svg(picture: Picture) -> Any:
    """The figure as inline SVG, with ids of its own and the fonts and colours of the page."""
    import matplotlib as mpl
    from markupsafe import Markup

    svg = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name, "svg.id": picture.name}):
        picture.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # nobody refers to groups
    for colour, variable in _ON_PAGE.items():
        text = text.replace(f": {colour}", f": {variable}")
    return Markup(text)  # noqa: S704 (made by matplotlib, which escapes)
