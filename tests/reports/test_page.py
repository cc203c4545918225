"""The page stands alone, shows what it is given and nothing else, and its figures follow its colours."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from bdpo.reports.page import (
    BLUE,
    INK,
    Page,
    PageSection,
    PageTable,
    Picture,
    write_page,
)


def drawing():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [1, 0], c=BLUE, label="<b>")
    axes.axhline(0.5, c=INK)
    axes.legend()
    return figure


@pytest.fixture
def written(tmp_path):
    parts = [
        PageSection(
            "One <i>",
            ["a & b"],
            [PageTable(("", "n"), [("rows", "1,000")], "of all")],
            [Picture("p1", drawing())],
        ),
        PageSection("Two", pictures=[Picture("p2", drawing(), "again")], folded=True),
    ]
    write_page(Page("Title", ["lead"], parts), tmp_path / "page.html")
    return tmp_path


class Reader(HTMLParser):
    """Text, ids, and whatever a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.text, self.ids, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [attrs[name] for name in ("src", "srcset") if name in attrs]

    def handle_data(self, data):
        self.text.append(data)


def read(folder):
    reader = Reader()
    reader.feed((folder / "page.html").read_text())
    return reader


def test_it_needs_no_other_file_and_no_network(written):
    assert read(written).fetched == []
    assert not re.search(r"@import|url\((?!#)", (written / "page.html").read_text())


def test_what_it_is_given_is_there_as_text(written):
    text = " ".join(read(written).text)
    for shown in ("Title", "lead", "One <i>", "a & b", "1,000", "of all", "again", "<b>"):
        assert shown in text


def test_two_figures_share_no_id(written):
    ids = read(written).ids
    assert len(ids) > 4
    assert len(ids) == len(set(ids))


def test_figures_take_the_colours_of_the_page(written):
    html = (written / "page.html").read_text()
    svg = html[html.index("<svg") :]
    assert "var(--blue)" in svg
    assert "currentColor" in svg
    assert BLUE not in svg
    assert "#000000" not in svg


def test_each_figure_is_a_png_beside_it(written):
    for name in ("p1", "p2"):
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'href="{name}.png"' in (written / "page.html").read_text()


def test_a_table_with_headings_is_a_csv_beside_it(tmp_path):
    parts = [
        PageSection(
            "What it was: 1",
            tables=[PageTable(("a, b", "n"), [("x", "1,000")]), PageTable(("", ""), [("k", "v")])],
        )
    ]
    write_page(Page("Title", [], parts), tmp_path / "page.html")
    assert (tmp_path / "what-it-was-1.csv").read_text() == '"a, b",n\nx,"1,000"\n'
    assert len(list(tmp_path.glob("*.csv"))) == 1


def test_the_same_page_twice_is_the_same_file(tmp_path):
    for name in ("first", "second"):
        page = Page("Title", ["lead"], [PageSection("One", pictures=[Picture("p", drawing())])])
        write_page(page, tmp_path / name / "page.html")
    assert (tmp_path / "first/page.html").read_bytes() == (tmp_path / "second/page.html").read_bytes()


def test_files_that_stay_the_same_are_not_written_again(tmp_path):
    def write(cell):
        table = PageTable(("", "n"), [("rows", cell)])
        parts = [PageSection("One", tables=[table]), PageSection("Two", pictures=[Picture("p", drawing())])]
        write_page(Page("Title", [], parts), tmp_path / "page.html")
        return {file.name: file.stat().st_ino for file in tmp_path.iterdir()}

    first = write("1")
    assert first.keys() == {"page.html", "one.csv", "p.png"}
    assert write("1") == first
    assert {name for name, inode in write("2").items() if inode != first[name]} == {"page.html", "one.csv"}


INK_OF = "getComputedStyle(document.querySelector('{}')).color"


def contrast(tab, selector, background):
    """Of the text of an element, after WCAG 2.2: 1 is none, 4.5 is what text requires."""

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = [int(number) for number in re.findall(r"\d+", tab.value(INK_OF.format(selector)))]
    low, high = sorted((luminance(ink), luminance(background)))
    return (high + 0.05) / (low + 0.05)


def test_it_fits_a_phone(written, tab):
    tab.assert_fits_a_phone(written / "page.html")


@pytest.mark.parametrize(
    ("scheme", "media", "dark"),
    [
        ("light", "screen", False),
        ("dark", "screen", True),
        ("dark", "print", False),
        ("light", "print", False),
    ],
)
def test_it_is_dark_where_that_is_wanted_and_never_on_paper(written, tab, scheme, media, dark):
    tab.show(written / "page.html", 900, scheme, media)
    paper = tab.pixels()[-1, -1]
    assert (paper < 64).all() if dark else (paper > 250).all()
    for selector in ("h1", "p", ".lead", "td", "figcaption", "svg text"):
        assert contrast(tab, selector, paper) > 4.5
    line = tab.value("getComputedStyle(document.querySelector('svg path[style*=\"--blue\"]')).stroke")
    assert line == {True: "rgb(86, 180, 233)", False: "rgb(0, 114, 178)"}[dark]


def test_paper_shows_what_the_screen_folds(written, tab):
    visible = "[...document.querySelectorAll('details svg, summary')].map(x => x.checkVisibility())"
    for media, shown in (("screen", [True, False]), ("print", [False, True])):  # the button, the figure
        tab.show(written / "page.html", 900, media=media)
        assert tab.value(visible) == shown


def test_paper_shows_the_whole_of_a_wide_table(tmp_path, tab):
    headings = [f"a rather long heading {i}" for i in range(12)]
    wide = PageTable(headings, [["12.3 (11.2 to 13.4)"] * 12])
    write_page(Page("Title", [], [PageSection("Wide", tables=[wide])]), tmp_path / "page.html")
    edge = "document.querySelector('td:last-child').getBoundingClientRect().right"
    tab.show(tmp_path / "page.html", 700)
    assert tab.value(edge) > 700
    tab.show(tmp_path / "page.html", 700, media="print")
    assert tab.value(edge) <= 700
