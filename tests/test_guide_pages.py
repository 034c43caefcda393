"""Guides as pages, and the check of a site's links."""

import base64
import io
import re
from pathlib import Path

import html5lib
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from persona_steer.base.core import PersonaError
from persona_steer.reports.guides import (
    GROUPS,
    anchor_of,
    build_guides,
    find_guides,
    guide_page,
    highlight_code,
    repository_address,
)
from persona_steer.reports.links import check_links, site_size

ROOT = Path(__file__).resolve().parents[1]
GUIDE = """# Ways to `steer`: all of them

A *mode* says what a vector does & where.

<!-- test: network -->
```sh
cd vectors && persona-steer push folder user/name  # a comment
```

## Content

See [judges](judges.md), [what they cost](judges.md#what-it-costs), [the paper](https://example.org/paper),
[above](#content), [a report](runs--report.html#x), [contributing](../CONTRIBUTING.md#style), [`LICENSE`](../LICENSE),
[the data](../data/), [the data's table](../data/a%20b.csv).

![Two points](../nbs/images/points.png) ![A badge](https://example.org/badge.svg)

## What's new? 1 & 2

| mode | score | formula |
|---|---:|---|
| `add` | 79 | h + c v, a cell with more than forty characters in it |
| `a\\|b` | 6 | ~~no~~ [73, 85] |

```nonsense
<b>x</b>
```

## What's new? 1 & 2

    <script>code()</script>

<div onclick="run()" style="background:url(https://example.org/x.png)">raw <b>HTML</b></div>
<script>run()</script><img src="x" onerror="run()" alt="none"><a href="javascript:run()">run</a>
<a name="named">no link</a> <a href="http://[x">broken</a>

## ½ n_layers²
1. one

   ```python
   x = 1
   ```
"""


@pytest.fixture
def docs(tmp_path):
    """A repository with two guides."""
    docs = tmp_path / "repository" / "docs"
    for folder in ("docs", "data", "nbs/images"):
        (tmp_path / "repository" / folder).mkdir(parents=True)
    (docs / "steering.md").write_text(GUIDE.replace('<img src="x"', '<img src="../LICENSE"'), encoding="utf-8")
    (docs / "judges.md").write_text("# Judges\n\n## What it costs\nNothing.\n", encoding="utf-8")
    for name in ("CONTRIBUTING.md", "LICENSE", "data/a b.csv"):
        (docs.parent / name).write_text("text")
    points = Image.new("RGBA", (300, 200), (255, 255, 255, 255))
    points.putpixel((3, 3), (200, 10, 10, 255))
    points.save(docs.parent / "nbs/images/points.png")
    return docs


def page_of(docs, repository="") -> BeautifulSoup:
    path = guide_page(docs / "steering.md", docs.parent.parent / "steering.html", find_guides(docs), repository)
    text = path.read_text(encoding="utf-8")
    html5lib.HTMLParser(strict=True).parse(text)  # raises at the first error in the markup
    return BeautifulSoup(text, "html.parser")


def test_the_frame_of_a_page(docs):
    s = page_of(docs)
    assert s.html["lang"] == "en" and s.title.text == s.h1.text == "Ways to steer: all of them"
    assert s.select_one('meta[name="description"]')["content"] == "A mode says what a vector does & where."
    assert s.select_one('meta[http-equiv="Content-Security-Policy"]')["content"].startswith("default-src 'none'")
    assert len(s("h1")) == len(s("main")) == 1 and not s("script") and "test: network" not in str(s)
    assert s.main["id"] == s.select_one("a.skip")["href"][1:] and len(s(id=s.main["id"])) == 1
    guides = s.select_one('nav[aria-label="Guides"]')
    assert [(a.text, a["href"]) for a in guides("a")] == [("Judges", "judges.html"), ("Ways to steer", "steering.html")]
    assert guides.select_one("[aria-current=page]").text == "Ways to steer"
    assert s.header.a["href"] == "index.html" and s.select_one("[rel=prev]")["href"] == "judges.html"
    assert not s.select("[rel=next]")
    assert [t.name for t in s.main(recursive=False)][:3] == ["h1", "p", "nav"]


def test_headings_have_the_anchors_of_the_code_host(docs):
    s = page_of(docs)
    ids = ["content", "whats-new-1--2", "whats-new-1--2-1", "-n_layers"]
    assert [h["id"] for h in s("h2")] == ids and s.h1["id"] == "ways-to-steer-all-of-them"
    assert [a["href"][1:] for a in s.select("nav.contents a")] == ids
    assert anchor_of(" Two  spaces, ÄÖ: É_é-x! ") == "two--spaces-äö-é_é-x"


def test_links_lead_to_pages_and_to_the_repository(docs):
    links = [a["href"] for a in page_of(docs, "https://example.org/r").main("a", href=True)]
    blob = "https://example.org/r/blob/HEAD"
    expected = [f"{blob}/CONTRIBUTING.md#style", f"{blob}/LICENSE", "https://example.org/r/tree/HEAD/data"]
    expected.append(f"{blob}/data/a%20b.csv")
    for link in ["judges.html", "judges.html#what-it-costs", "#content", "runs--report.html#x", *expected]:
        assert link in links


def test_without_an_address_of_the_repository_paths_are_shown_as_code(docs):
    s = page_of(docs)
    assert not [a for a in s("a", href=True) if ".." in a["href"] or "blob" in a["href"]]
    text = " ".join(s.main.get_text().split())
    assert "contributing (CONTRIBUTING.md), LICENSE, the data (data), the data's table (data/a b.csv)." in text
    assert s.main.find("code", string="LICENSE")["class"] == ["short"]
    assert {"CONTRIBUTING.md", "LICENSE", "data/a b.csv"} <= {c.text for c in s.main("code")}


def test_pictures_are_inside_and_have_the_same_pixels(docs):
    s = page_of(docs)
    first = s.main.img
    assert first["alt"] == "Two points" and first["src"].startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(first["src"].partition(",")[2]))) as image:
        assert image.size == (300, 200) and image.convert("RGB").getpixel((3, 3)) == (200, 10, 10)
    assert "[picture not in this page: A badge]" in s.main.text


def test_raw_html_is_safe_and_code_is_only_text(docs):
    s = page_of(docs)
    assert "<b>x</b>" in s.main.text and "<script>code()</script>" in s.main.text and s.main.b.text == "HTML"
    assert "example.org/x.png" not in str(s) and "run()" not in str(s)
    assert s.main.select_one(".highlight .c1").text == "# a comment"
    assert s.main.select_one("li .highlight .mi").text == "1"
    assert "<span" not in highlight_code("x = 1", "no-such-language").replace("<span></span>", "")


def test_tables_scroll_and_numbers_align(docs):
    table = page_of(docs).main.table
    assert table.parent["class"] == ["scroll"] and table.parent["tabindex"] == "0"
    assert [t.text for t in table("tr")[2]("td")] == ["a|b", "6", "no [73,\u00a085]"]
    assert table("td")[1]["class"] == ["num"] and table("td")[2]["class"] == ["long"] and table.s.text == "no"


@pytest.mark.parametrize("link", ["judge.md", "../LICENCE", "../../outside.md", "![x](../no.png)"])
def test_a_file_that_does_not_exist_is_an_error(docs, link):
    (docs.parent.parent / "outside.md").write_text("x")
    (docs / "steering.md").write_text(f"# Title\n\n{link if link.startswith('!') else f'[x]({link})'}\n")
    with pytest.raises(PersonaError, match="steering.md names .*, which"):
        build_guides(docs, docs)
    assert not list(docs.glob("*.html"))


def test_guides_that_cannot_be_pages(docs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PersonaError, match="no guide in"):
        build_guides(tmp_path / "empty", tmp_path)
    (docs / "hub.md").write_text("No title.\n")
    with pytest.raises(PersonaError, match=r"hub\.md has no title"):
        build_guides(docs, docs)
    (docs / "hub.md").rename(docs / "index.md")
    with pytest.raises(PersonaError, match="front page"):
        build_guides(docs, docs)


def test_the_order_of_the_navigation(tmp_path):
    titles = {
        "zebra": "Zebra",
        "code-layout": "Code",
        "results-pocket": "Results: pocket",
        "results": "Results: all",
        "speed": "Speed: how fast",
        "apple": "Apple",
        "getting-started": "Begin",
    }
    for name, title in titles.items():
        (tmp_path / f"{name}.md").write_text(f"# {title}\n")
    guides = find_guides(tmp_path)
    stems = ["getting-started", "results", "results-pocket", "speed", "code-layout", "apple", "zebra"]
    assert [g.file.stem for g in guides] == stems
    assert [g.group for g in guides] == ["Start", *["Results"] * 3, *["More"] * 3]
    # the title up to a colon names a guide, unless another has the same
    assert [g.label for g in guides][1:4] == ["Results: all", "Results: pocket", "Speed"]
    assert len({stem for stems in GROUPS.values() for stem in stems}) == sum(map(len, GROUPS.values()))


@pytest.mark.parametrize(
    "address, expected",
    [
        ("https://example.invalid/x", ""),
        ("https://github.com/me/persona_steer/", "https://github.com/me/persona_steer"),
        ("", ""),
    ],
)
def test_the_address_of_the_repository(tmp_path, address, expected):
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\nx = 100%\ngit_url = {address}\n")
    assert repository_address(tmp_path / "settings.ini") == expected


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The guides of this checkout as pages."""
    out = tmp_path_factory.mktemp("site")
    pages = build_guides(ROOT / "docs", out)
    (out / "index.html").write_text("<title>The front page</title>")
    return pages


def test_the_guides_of_this_checkout(real):
    assert {p.stem for p in real} == {p.stem for p in (ROOT / "docs").glob("*.md")}
    for page in real:
        html5lib.HTMLParser(strict=True).parse(page.read_text(encoding="utf-8"))
    assert check_links(real[0].parent) == []
    assert site_size(real[0].parent) < 2e6


def test_no_cell_of_a_table_is_lost(real):
    """A bar in code ends a cell, too, unless it is written as \\|; what is beyond the head's cells is not shown."""
    for guide in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"(?ms)^ *```.*?^ *```", "", guide.read_text(encoding="utf-8"))
        for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
            cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
            assert len(set(cells)) == 1, (guide.name, table.splitlines()[cells.index(max(cells))])


SITE = {
    "index.html": '<h1 id="top-of-all">x</h1><a href="a/page.html#here">1</a><a href="a/">2</a><a href="#">3</a>'
    '<a href="https://example.org/">4</a><a href="mailto:me@example.org">5</a><img src="data:image/gif;base64,R0lG">'
    '<link rel="canonical" href="https://example.org/"><a href="a/na%20me.txt">6</a>'
    '<svg><use href="#top-of-all"/></svg>',
    "a/page.html": '<a name="here">x</a><a href="../index.html#top-of-all">1</a><img src="p.png" srcset="p.png 2x">',
    "a/index.html": '<style>p { background:url("p.png"); } q { background:url(data:image/gif;base64,R0lG); }</style>',
}


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site" / "a").mkdir(parents=True)
    for name, text in SITE.items():
        (tmp_path / "site" / name).write_text(text, encoding="utf-8")
    for name in ("site/a/na me.txt", "site/a/p.png", "outside.html"):
        (tmp_path / name).write_text("x")
    return tmp_path / "site"


def test_a_site_without_problems(site):
    assert check_links(site) == []
    assert site_size(site) == sum(len(text) for text in SITE.values()) + 2


@pytest.mark.parametrize(
    "planted, problem",
    [
        ('<a href="gone.html">x</a>', "links to gone.html, which is not there."),
        ('<a href="#gone">x</a>', "links to #gone, which has no place gone in index.html."),
        ('<a href="a/page.html#gone">x</a>', "links to a/page.html#gone, which has no place gone in page.html."),
        ('<a href="../outside.html">x</a>', "links to ../outside.html, which is outside the folder."),
        ('<a href="/a/page.html">x</a>', "links to /a/page.html, which is outside the folder."),
        ('<a href="javascript:x">x</a>', "links to javascript:x, which is outside the folder."),
        ('<a href="http://[x">x</a>', "links to http://[x, which is no address."),
        ('<img src="https://example.org/x.png">', "loads https://example.org/x.png, which is outside the folder."),
        ('<img src="//example.org/x.png">', "loads //example.org/x.png, which is outside the folder."),
        ('<img src="gone.png">', "loads gone.png, which is not there."),
        ('<img srcset="a/p.png 1x, https://e.org/x 2x">', "loads https://e.org/x, which is outside the folder."),
        ('<img srcset="a/p.png 1x,https://e.org/x 2x">', "loads https://e.org/x, which is outside the folder."),
        ('<link rel="preload" href="https://e.org/f">', "loads https://e.org/f, which is outside the folder."),
        ('<link rel="alternate stylesheet" href="//e.org/c">', "loads //e.org/c, which is outside the folder."),
        ('<script src="https://e.org/s.js"></script>', "loads https://e.org/s.js, which is outside the folder."),
        ('<iframe src="https://e.org/"></iframe>', "loads https://e.org/, which is outside the folder."),
        ('<style>@import "https://e.org/c.css";</style>', "loads https://e.org/c.css, which is outside the folder."),
        ("<p style=\"background:url('https://e.org/x')\">", "loads https://e.org/x, which is outside the folder."),
        ('<meta http-equiv="Refresh" content="0; url=https://e.org/">', "loads https://e.org/, which is outside the"),
    ],
)
def test_a_planted_problem_is_found(site, planted, problem):
    index = site / "index.html"
    index.write_text(index.read_text() + planted)
    found = check_links(site)
    assert len(found) == 1 and found[0].startswith(f"index.html {problem}")


def test_a_folder_without_pages(tmp_path):
    with pytest.raises(PersonaError, match="no page in"):
        check_links(tmp_path)
