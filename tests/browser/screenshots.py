"""Make the README's pictures anew: python tests/browser/screenshots.py [RUNS]

Needs Chromium and what `make demo` left in RUNS.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CHROMIUM, FLAGS, OPEN, ROOT, serve
from test_dashboard import run_all, take

from persona_steer.reports.site import build_site

RUNS = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs"
os.environ["PERSONA_RUNS"] = str(RUNS.resolve())
out = ROOT / "nbs" / "images"
out.mkdir(exist_ok=True)
with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
    tmp = Path(tmp)
    shutil.copy(ROOT / "nbs" / "11_dashboard.ipynb", tmp)
    browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_page(viewport={"width": 1500, "height": 1150})
    for address in serve(tmp, "lab", *OPEN):
        run_all(page, f"{address}/lab/tree/11_dashboard.ipynb")
        page.locator(".sweep table").wait_for(timeout=400_000)
        take(page, "evil")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.wait_for_timeout(30_000)
        page.evaluate("document.querySelectorAll('.Toastify').forEach(e => e.remove())")  # JupyterLab asks about news
        page.locator(".widget-html .ps-answer").first.scroll_into_view_if_needed()
        page.locator(".jp-OutputArea-output:has(.widget-html .ps-answer)").first.screenshot(path=out / "dashboard.png")
    page = browser.new_page(viewport={"width": 1180, "height": 1180})
    site = build_site(RUNS, tmp / "site").parent
    page.goto((site / "smollm2--evil--04_evaluate--04_evaluate.html").as_uri())
    page.get_by_role("heading", name="The report, on evaluation questions").evaluate("e => e.scrollIntoView()")
    page.screenshot(path=out / "report.png")
    browser.close()
