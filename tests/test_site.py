"""A folder of executed notebooks to pages and their index."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import html5lib
import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from persona_steer.base.core import PersonaError
from persona_steer.reports.site import build_site, heading_of, page_names


def shows(text):
    return new_code_cell("show()", outputs=[new_output("display_data", {"text/html": text})], execution_count=1)


def chapter(*cells, **papermill):
    head = [
        new_markdown_cell("# A title\n> One line."),
        new_code_cell("trait: str = 'evil'", metadata={"tags": ["parameters"]}),
    ]
    return new_notebook(cells=[*head, *cells], metadata={"papermill": papermill} if papermill else {})


def write(runs, notebooks):
    for name, nb in notebooks.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, runs / name)


def check_markup(site):
    """Raises at the first error in the markup of a page."""
    pages = list(site.glob("*.html"))
    assert len(pages) > 1
    for page in pages:
        html5lib.HTMLParser(strict=True).parse(page.read_text(encoding="utf-8"))


def test_site(tmp_path):
    runs, times = (
        tmp_path / "runs",
        dict(start_time="2026-11-02T14:00:00", end_time="2026-11-02T14:03:12", duration=192.0),
    )
    write(
        runs,
        {
            "a b/02.ipynb": chapter(shows("x"), **times),
            "a-b/02.ipynb": chapter(),
            "index.ipynb": chapter(shows("y")),
            "a b/.ipynb_checkpoints/02-checkpoint.ipynb": chapter(shows("z")),
        },
    )
    (runs / "a-b/broken.ipynb").write_text("{")
    (runs / "a b/summary.json").write_text(json.dumps({"score": [61.24, 55, 67.5], "layer": 4, "<b>": "x"}))
    index = build_site(runs, tmp_path / "site", title="A & B")
    s = BeautifulSoup(index.read_text(encoding="utf-8"), "html.parser")
    assert s.title.text == "A & B" and {t.text for t in s.select("th.job")} == {"a b", "a-b", "Other notebooks"}
    links = [a["href"] for a in s.select("td a")]
    assert (
        sorted(links)
        == sorted(p.name for p in (tmp_path / "site").iterdir() if p.name not in ("index.html", ".pages.json"))
        and len(links) == 3
    )
    row = s.select_one('a[href="a-b--02.html"]').find_parent("tr")
    assert (
        row.select_one(".results").get_text(" ", strip=True) == "score 61.2 [55, 67.5] <b> x"
        and row.select_one("[data-label=Layer]").text == "4"
        and "3 min 12 s" in row.text
        and "evil" in row.text
    )
    assert "3 notebooks" not in s.text and "4 notebooks from 3 jobs: 2 done, 1 unexecuted, 1 unreadable." in s.text
    assert (
        sorted(b.text for b in s.select(".badge")) == ["done", "done", "unexecuted", "unreadable"]
        and not s(["link", "img"])
        and len(s("script")) == 1
    )
    page = BeautifulSoup((tmp_path / "site" / links[0]).read_text(encoding="utf-8"), "html.parser")
    assert page.nav.a["href"] == "index.html"
    check_markup(tmp_path / "site")


def test_chapters_of_a_model_and_trait_stand_together(tmp_path):
    runs, names = (
        tmp_path / "runs",
        [f"pocket/{t}/{c}/{c}.ipynb" for t in ("evil", "humorous") for c in ("02_extract", "04_evaluate")],
    )
    write(
        runs,
        {
            name: chapter(shows("x"))
            for name in (*names, "pocket_checks/20d.ipynb", "pocket/evil/.parts/x/x.ipynb", ".old/a.ipynb")
        },
    )
    (runs / "pocket/evil/02_extract/summary.json").write_text('{"layer": 4}')
    (runs / "pocket/evil/02_extract/provenance.json").write_text('{"seed": 7}')
    s = BeautifulSoup(build_site(runs, tmp_path / "site").read_text(encoding="utf-8"), "html.parser")
    assert [(b.select_one("th.job").text, len(b("tr")) - 1) for b in s("tbody")] == [
        ("pocket / evil", 2),
        ("pocket / humorous", 2),
        ("pocket_checks", 1),
    ]
    assert "5 notebooks from 5 jobs: 5 done." in s.text and [
        r.text for r in s.select("[data-label=Layer]") if r.text
    ] == ["4"]
    page = BeautifulSoup(
        (tmp_path / "site/pocket--evil--02_extract--02_extract.html").read_text(encoding="utf-8"), "html.parser"
    )
    assert page.footer.table.get_text(" ", strip=True) == "seed 7"


@pytest.mark.parametrize(
    "path, name",
    [
        ("m/t/c/c.ipynb", "m / t"),
        ("old/m/t/c/c.ipynb", "m / t"),
        ("m/t/c/d.ipynb", "m/t/c"),
        ("t/c/c.ipynb", "t/c"),
        ("c/c.ipynb", "c"),
        ("c.ipynb", "Other notebooks"),
    ],
)
def test_heading(path, name):
    assert heading_of(Path(path)) == name


def test_page_names_differ():
    names = page_names(
        [
            Path(p)
            for p in ("a/b.ipynb", "A/B.ipynb", "index.ipynb", "a b/c.ipynb", "a-b/c.ipynb", "../.x.ipynb", "é.ipynb")
        ]
    )
    assert (
        len({n.lower() for n in names}) == 7
        and all(re.fullmatch(r"[\w-][\w.-]*\.html", n, re.A) for n in names)
        and "index.html" not in names
    )


def test_bad_input(tmp_path):
    nbformat.write(chapter(), tmp_path / "new.ipynb")
    with pytest.raises(PersonaError, match="persona-steer demo"):
        build_site(tmp_path, tmp_path / "site")
    assert not (tmp_path / "site/index.html").exists()


def test_imports_quickly_and_an_empty_folder_is_one_sentence(tmp_path):
    lazy = (
        "import sys, persona_steer.reports.site; print([m for m in ('nbconvert', 'nbformat', 'bs4', "
        "'jinja2', 'torch', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    (tmp_path / "runs").mkdir()
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from persona_steer.app.cli import main; main()",
            "report",
            tmp_path / "runs",
            tmp_path / "site",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "persona-steer demo" in run.stderr and "Traceback" not in run.stderr


def test_a_failed_run_brings_its_notebook_and_a_batch_its_details(tmp_path):
    fails = chapter(
        new_code_cell(
            "boom('sk-live-0123456789abcdef')",
            outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])],
            execution_count=1,
        )
    )
    write(tmp_path / "runs", {"m/evil/02/n=1/02.ipynb": fails, "m/evil/02/n=2/02.ipynb": chapter(shows("x"))})
    s = BeautifulSoup(build_site(tmp_path / "runs", tmp_path / "site").read_text(encoding="utf-8"), "html.parser")
    assert [t.text for t in s.select("th.job")] == ["m / evil"] and [t.text for t in s.select(".title small")] == [
        "n=1",
        "n=2",
    ]
    kept = s.select_one("a[download]")["href"]
    assert (
        "ValueError" in (tmp_path / "site" / kept).read_text()
        and "sk-live" not in (tmp_path / "site" / kept).read_text()
    )


def test_runs_of_one_trait_are_compared_across_models(tmp_path):
    write(tmp_path / "runs", {f"{m}/evil/04/04.ipynb": chapter(shows("x")) for m in ("small", "large")})
    for m, score in (("small", 80.0), ("large", 40.0)):
        (tmp_path / f"runs/{m}/evil/04/summary.json").write_text(
            json.dumps(
                {"layer": 4, "evil, steered": [score, score - 5, score + 5], "coherence, steered": [90.0, 85.0, 95.0]}
            )
        )
    index = BeautifulSoup(build_site(tmp_path / "runs", tmp_path / "site").read_text(encoding="utf-8"), "html.parser")
    assert index.select_one('nav a[href="compare--evil.html"]') and [
        c["data-value"] for c in index.select("[data-label=Score]")
    ] == ["40", "80"]
    page = BeautifulSoup((tmp_path / "site/compare--evil.html").read_text(encoding="utf-8"), "html.parser")
    check_markup(tmp_path / "site")
    # no curves were left, so none are drawn
    assert len(page.select("tbody tr")) == 2 and "80 [75, 85]" in page.table.text and not page("img")


def test_a_failed_run_does_not_show_an_earlier_runs_numbers_and_old_pages_go(tmp_path):
    fails = chapter(
        new_code_cell(
            "boom()", outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])], execution_count=1
        )
    )
    write(tmp_path / "runs", {"m/evil/04/04.ipynb": fails, "m/mild/04/04.ipynb": chapter(shows("x"))})
    (tmp_path / "runs/m/evil/04/summary.json").write_text(json.dumps({"layer": 4, "evil, steered": [80.0, 75.0, 85.0]}))
    index = BeautifulSoup(
        build_site(tmp_path / "runs", tmp_path / "runs/site").read_text(encoding="utf-8"), "html.parser"
    )
    assert (
        "80" not in index.table.text
        and not (tmp_path / "runs/site/compare--evil.html").exists()
        and (tmp_path / "runs/site/m--evil--04--04.ipynb").exists()
    )
    write(tmp_path / "runs", {"m/evil/04/04.ipynb": chapter(shows("x"))})
    (tmp_path / "runs/site/mine.html").write_text("mine")
    # a site inside the runs folder does not feed on itself
    index = BeautifulSoup(
        build_site(tmp_path / "runs", tmp_path / "runs/site").read_text(encoding="utf-8"), "html.parser"
    )
    assert (
        len(index.select("tbody tr:not(.job)")) == 2
        and not (tmp_path / "runs/site/m--evil--04--04.ipynb").exists()
        and (tmp_path / "runs/site/mine.html").exists()
    )


def test_a_wrong_folder_and_a_foreign_page_cost_nothing(tmp_path):
    """The pages of an earlier build stay until the new ones are there; files of others are never touched."""
    site = tmp_path / "site"
    write(tmp_path / "runs", {"m/evil/04/04.ipynb": chapter(shows("x"))})
    build_site(tmp_path / "runs", site)
    before = {p.name: p.read_text(encoding="utf-8") for p in site.iterdir()}
    (tmp_path / "empty").mkdir()
    for wrong, words in (("empty", "persona-steer demo"), ("missing", "no folder")):
        with pytest.raises(PersonaError, match=words):
            build_site(tmp_path / wrong, site)
        assert {p.name: p.read_text(encoding="utf-8") for p in site.iterdir()} == before
    (tmp_path / "web").mkdir()
    (tmp_path / "web/index.html").write_text("mine")
    with pytest.raises(PersonaError, match="index.html, which this command did not write"):
        build_site(tmp_path / "runs", tmp_path / "web")
    assert [p.name for p in (tmp_path / "web").iterdir()] == ["index.html"]
    assert (tmp_path / "web/index.html").read_text() == "mine"
    assert not list(tmp_path.glob(".site.*"))


def test_results_are_found_where_the_chapter_wrote_them(tmp_path, runs):
    """A notebook that papermill wrote elsewhere; results of another run of the chapter are not its own."""
    times = dict(start_time="2026-11-02T14:00:00", end_time="2026-11-02T14:03:12", input_path="nbs/04_evaluate.ipynb")
    write(runs, {"mine.ipynb": chapter(shows("x"), **times), "later.ipynb": chapter(shows("x"), **times)})
    results = runs / "m/evil/04_evaluate"
    results.mkdir(parents=True)
    (results / "summary.json").write_text(json.dumps({"layer": 4, "evil, steered": [80.0, 75.0, 85.0]}))
    for made, there in (("2026-11-02T14:03:11+00:00", True), ("2026-11-02T15:00:00+00:00", False)):
        (results / "provenance.json").write_text(json.dumps({"time": made}))
        index = BeautifulSoup(build_site(runs, tmp_path / "site").read_text(encoding="utf-8"), "html.parser")
        assert ("80" in index.table.text) == there


def test_a_compressed_site_is_smaller(tmp_path):
    drawing = io.BytesIO()
    Image.linear_gradient("L").convert("RGBA").save(drawing, "PNG")
    figure = new_output("display_data", {"image/png": base64.b64encode(drawing.getvalue()).decode()})
    write(tmp_path / "runs", {"a/02.ipynb": chapter(new_code_cell("plot()", outputs=[figure], execution_count=1))})
    sizes = []
    for compress, kind in ((False, "png"), (True, "webp")):
        page = build_site(tmp_path / "runs", tmp_path / kind, compress=compress).parent / "a--02.html"
        assert f"data:image/{kind};base64," in page.read_text(encoding="utf-8")
        sizes.append(page.stat().st_size)
    assert sizes[1] < sizes[0]
