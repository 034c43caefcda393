"""Pages opened from disk, the network off: the slider, the sortable index, links, and what axe-core finds."""

import json
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from persona_steer.reports.site import build_site
from persona_steer.steering import sweep_view


def executed(trait, model, *outputs, fails=False):
    out = [new_output("display_data", o) for o in outputs] + (
        [new_output("error", ename="ValueError", evalue="no <model>", traceback=["..."])] if fails else []
    )
    return new_notebook(
        cells=[
            new_markdown_cell("# Evaluate\n> One line.\n\nA word."),
            new_code_cell(
                f"trait: str = '{trait}'  # which\nmodel: str = '{model}'  # on what", metadata={"tags": ["parameters"]}
            ),
            new_markdown_cell("## Found"),
            new_code_cell("show()", execution_count=1, outputs=out),
            new_markdown_cell("## More\ntext\n## And more\ntext"),
        ]
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Three runs, one failed: texts of a sweep, a figure, a table."""
    runs = tmp_path_factory.mktemp("runs")
    frame = pd.DataFrame(
        [
            dict(question=q, coefficient=float(c), answer=f"{q} answered at {c}")
            for q in ("Why?", "How <b>?")
            for c in range(-1, 4)
        ]
    )
    scores = {
        n: {
            float(c): dict(mean=50.0 + 10 * c, low=40.0 + 10 * c, high=55.0 + 10 * c, n=20, missing=0)
            for c in range(-1, 4)
        }
        for n in ("evil score", "coherence")
    }
    means = pd.DataFrame(
        [
            dict(
                condition="steered" if c else "unsteered",
                coefficient=c,
                trait=20.0 * c,
                trait_low=18.0 * c,
                trait_high=22.0 * c,
                coherence=95.0,
                coherence_low=90.0,
                coherence_high=99.0,
            )
            for c in range(4)
        ]
    )
    for model, score in (("small", 81.5), ("large", 9.25)):
        at = runs / model / "evil" / "04_evaluate"
        at.mkdir(parents=True)
        write(
            executed("evil", model, {"text/html": sweep_view(frame, scores)}, {"text/html": means.to_html()}),
            at / "04_evaluate.ipynb",
        )
        (at / "summary.json").write_text(
            json.dumps(
                {
                    "layer": 4,
                    "coefficient": 1.5,
                    "evil, steered": [score, score - 5, score + 5],
                    "coherence, steered": [90.0, 85.0, 95.0],
                    "evil, unsteered": [1.0, 0.0, 2.0],
                }
            )
        )
        (at / "provenance.json").write_text('{"git": "abc"}')
        means.to_csv(at / "report_summary.csv", index=False)
    (runs / "small/mild/02_extract").mkdir(parents=True)
    write(executed("mild", "small", fails=True), runs / "small/mild/02_extract/02_extract.ipynb")
    return build_site(runs, tmp_path_factory.mktemp("site")).parent


def open_page(page, path):
    page.context.set_offline(True)
    page.goto(path.as_uri())


def test_the_slider_works_from_disk_with_the_network_off(page, site):
    open_page(page, site / "small--evil--04_evaluate--04_evaluate.html")
    slider, shown = (
        page.get_by_role("slider", name="Coefficient"),
        lambda: [t for t in page.locator(".sweep td:visible").all_inner_texts()],
    )
    assert (
        shown()[2:] == ["Why? answered at 0", "How <b>? answered at 0"]
        and slider.get_attribute("aria-valuetext") == "c = 0: evil score 50, coherence 50"
    )
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert (
        shown() == ["60.0 [50.0, 65.0] (n=20)"] * 2 + ["Why? answered at 1", "How <b>? answered at 1"]
        and page.locator(".slider output").inner_text() == "c = 1: evil score 60, coherence 60"
    )
    page.keyboard.press("End")
    assert shown()[2] == "Why? answered at 3"
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 6, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    assert shown()[2] == "Why? answered at -1"
    page.get_by_role("button", name="All steps").click()
    assert len(shown()) == 4 * 5
    page.get_by_role("button", name="All steps").click()
    page.emulate_media(media="print")
    assert len(shown()) == 4 * 5 and not page.locator(".slider").is_visible()  # on paper all of it stands
    assert page.complaints == [] and all(r.startswith(("file:", "data:")) for r in page.requests)


def test_without_scripts_everything_can_be_read(browser, site):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / "small--evil--04_evaluate--04_evaluate.html").as_uri())
    assert page.locator(".sweep td:visible").count() == 4 * 5 and page.locator(".slider").count() == 0
    page.goto((site / "index.html").as_uri())
    assert page.locator("tbody tr:visible").count() == 6 and "9.25 [4.25, 14.2]" in page.locator("table").inner_text()
    context.close()


def test_the_index_sorts_by_keyboard_and_by_mouse_and_goes_back(page, site):
    open_page(page, site / "index.html")

    def models():
        return [t for t in page.locator("tbody tr:not(.job) td[data-label=Model]").all_inner_texts()]

    assert models() == ["large", "small", "small"] and page.locator("tr.job:visible").count() == 3
    score = page.get_by_role("columnheader", name="Score")
    score.get_by_role("button").click()
    # who has no score comes last
    assert (
        models() == ["small", "large", "small"]
        and score.get_attribute("aria-sort") == "descending"
        and page.locator("tr.job:visible").count() == 0
    )
    score.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert models() == ["large", "small", "small"] and score.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert score.get_attribute("aria-sort") is None and page.locator("tr.job:visible").count() == 3
    page.get_by_role("columnheader", name="Trait").get_by_role("button").click()
    assert (
        page.locator("tbody td[data-label=Trait]").all_inner_texts() == ["evil", "evil", "mild"]
        and page.complaints == []
    )


def test_every_link_leads_somewhere(site):
    pages = {p.name: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in site.glob("*.html")}
    links = [(n, a["href"]) for n, s in pages.items() for a in s("a", href=True)]
    assert (
        len(pages) == 5
        and ("index.html", "compare--evil.html") in links
        and ("compare--evil.html", "large--evil--04_evaluate--04_evaluate.html") in links
    )
    for name, href in links:
        file, _, anchor = href.partition("#")
        assert (site / (file or name)).is_file() and (not anchor or pages[file or name].find(id=anchor)), (name, href)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 1000, 390])
def test_axe_finds_nothing_serious_and_nothing_runs_off_the_screen(page, site, scheme, width):
    import axe_playwright_python

    axe = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for path in sorted(site.glob("*.html")):
        open_page(page, path)
        page.evaluate(axe)  # into the page, past its security policy
        found = page.evaluate("axe.run()")
        bad = [
            (v["id"], v["nodes"][0]["html"][:150])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert len(found["passes"]) > 10 and bad == [], (path.name, bad)
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, (
            path.name
        )
