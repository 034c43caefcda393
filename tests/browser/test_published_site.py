"""The published site in docs/ in a real browser: front page and runs, on a phone and a desk, light and dark."""

import pytest
from conftest import ROOT, assert_fit

DOCS = ROOT / "docs"
RUNS = ("02_extract--02_extract", "04_evaluate--04_evaluate", "06b_guard--06b_guard")
PAGES = [DOCS / "index.html", *(DOCS / f"runs/smollm2--evil--{name}.html" for name in RUNS)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_pages_are_fit(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.context.set_offline(True)
    for path in PAGES:
        page.goto(path.as_uri())
        assert_fit(page, path.name)
    assert page.complaints == [] and all(r.startswith(("file:", "data:")) for r in page.requests)


def test_a_claim_leads_to_its_numbers_and_they_to_the_run(page):
    page.goto(PAGES[0].as_uri())
    page.locator("table.overview a").first.click()
    claim = page.locator(".claim").first
    assert claim.locator("h3").bounding_box()["y"] < 200
    claim.locator("td a").first.click()
    page.wait_for_url("**/runs/*.html")
    page.get_by_role("link", name="All pages").click()
    page.get_by_role("link", name="Front page").click()
    page.wait_for_url("**/docs/index.html")
