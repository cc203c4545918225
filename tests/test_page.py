"""The page stands alone, shows what it is given and nothing else, and its figures follow its colours."""

import os
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from bdpo.page import BLUE, INK, Grid, Page, Part, Picture, write_page

CHROMIUM = shutil.which("chromium")
MEASURE = """<script>
document.body.dataset.width = document.documentElement.scrollWidth + "/" + window.innerWidth;
</script>"""


def drawing():
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [1, 0], c=BLUE, label="<b>")
    axes.axhline(0.5, c=INK)
    axes.legend()
    return figure


@pytest.fixture
def written(tmp_path):
    parts = [
        Part(
            "One <i>", ["a & b"], [Grid(("", "n"), [("rows", "1,000")], "of all")], [Picture("p1", drawing())]
        ),
        Part("Two", pictures=[Picture("p2", drawing(), "again")], folded=True),
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
        Part("What it was: 1", grids=[Grid(("a, b", "n"), [("x", "1,000")]), Grid(("", ""), [("k", "v")])])
    ]
    write_page(Page("Title", [], parts), tmp_path / "page.html")
    assert (tmp_path / "what-it-was-1.csv").read_text() == '"a, b",n\nx,"1,000"\n'
    assert len(list(tmp_path.glob("*.csv"))) == 1


def test_the_same_page_twice_is_the_same_file(tmp_path):
    for name in ("first", "second"):
        page = Page("Title", ["lead"], [Part("One", pictures=[Picture("p", drawing())])])
        write_page(page, tmp_path / name / "page.html")
    assert (tmp_path / "first/page.html").read_bytes() == (tmp_path / "second/page.html").read_bytes()


def assert_fits_a_phone(file):
    """Headless Chromium draws it, no wider than a phone."""
    if CHROMIUM is None:
        assert "CI" not in os.environ, "the page wants a look in a browser"
        warnings.warn("NO CHROMIUM: the page was not looked at in a browser", stacklevel=2)
        pytest.skip("NO CHROMIUM: `apt-get install chromium` to have the page tested in a browser")
    # Scripts run in headless Chromium: the page says its own width, beside that of the phone.
    measured, shot = file.with_name("measured.html"), file.with_name("shot.png")
    measured.write_text(file.read_text().replace("</body>", MEASURE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,1200"]
    ask = {"check": True, "capture_output": True, "timeout": 1200}
    subprocess.run([*command, f"--screenshot={shot}", measured.as_uri()], **ask)
    assert shot.stat().st_size > 3000
    shown = subprocess.run([*command, "--dump-dom", measured.as_uri()], **ask)
    width, room = map(int, re.search(rb'data-width="(\d+)/(\d+)"', shown.stdout).groups())
    assert width <= room


def test_chromium_shows_it_without_a_horizontal_scroll(written):
    assert_fits_a_phone(written / "page.html")
