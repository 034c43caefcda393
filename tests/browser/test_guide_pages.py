"""The guides of this checkout as pages in a real browser: what a reader sees and can reach."""

import pytest
from conftest import ROOT, assert_fit

from persona_steer.reports.guides import build_guides


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    return build_guides(ROOT / "docs", tmp_path_factory.mktemp("guides"))


def open_page(page, path, anchor=""):
    page.context.set_offline(True)
    page.goto(path.as_uri() + anchor)


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "light"), (390, "dark")])
def test_axe_finds_nothing_serious_and_nothing_runs_off_the_screen(page, guides, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for path in guides:
        open_page(page, path)
        assert_fit(page, path.name)
    assert page.complaints == [] and all(r.startswith(("file:", "data:")) for r in page.requests)


def test_on_a_phone_the_navigation_opens_and_leads_on(page, guides):
    page.set_viewport_size({"width": 390, "height": 900})
    open_page(page, guides[0])
    link = page.get_by_role("navigation", name="Guides").get_by_role("link").last
    assert not link.is_visible()
    page.locator("summary", has_text="Guides").press("Enter")
    link.click()
    page.wait_for_url(guides[-1].as_uri())
    page.get_by_role("link", name="Previous").click()
    page.wait_for_url(guides[-2].as_uri())


def test_on_a_wide_screen_the_navigation_stands_beside_the_text(page, guides):
    page.set_viewport_size({"width": 1280, "height": 900})
    open_page(page, guides[0])
    navigation = page.get_by_role("navigation", name="Guides")
    assert navigation.get_by_role("link").count() == len(guides)
    assert all(link.is_visible() for link in navigation.get_by_role("link").all())
    assert not page.locator("summary", has_text="Guides").is_visible()
    box, text = navigation.bounding_box(), page.locator("main h1").bounding_box()
    assert box["x"] + box["width"] <= text["x"] and text["width"] < 700


def test_an_anchor_and_the_skip_link_lead_to_their_place(page, guides):
    long = next(p for p in guides if 'class="contents"' in p.read_text(encoding="utf-8"))
    open_page(page, long)
    link = page.locator("nav.contents a").last
    link.click()
    heading = page.locator(f'[id="{link.get_attribute("href")[1:]}"]')
    assert heading.is_visible() and 0 <= heading.bounding_box()["y"] < 1100
    page.keyboard.press("Control+Home")
    page.locator("a.skip").press("Enter")
    assert page.evaluate("location.hash") == "#page.content"


def test_on_paper_there_is_the_text_alone(page, guides):
    open_page(page, guides[0])
    page.emulate_media(media="print")
    assert not page.locator("body > header").is_visible() and not page.locator(".turn").is_visible()
    assert page.locator("h1").is_visible()
