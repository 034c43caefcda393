"""A headless Chromium, and servers for it: JupyterLab, notebook 7 and Voila on copies of the notebooks. Without
Chromium the tests are skipped, in CI they fail."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items):
    if CHROMIUM or os.environ.get("CI"):
        return
    for item in items:
        item.add_marker(
            pytest.mark.skip(reason="there is no Chromium: install Debian's chromium, or name one in CHROMIUM")
        )


def on_pocket(notebook: str) -> str:
    """A notebook whose default model is pocket, which answers in a second."""
    return notebook.replace('model: str = \\"smollm2\\"', 'model: str = \\"pocket\\"')


SERIOUS = ("serious", "critical")  # what axe calls a fault that must not be there


def assert_fit(page, name: str):
    """The page that is open has no serious fault by axe, and nothing runs off the screen."""
    import axe_playwright_python

    axe = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
    page.evaluate(axe)  # into the page, past its security policy
    found = page.evaluate("axe.run()")
    bad = [(v["id"], v["nodes"][0]["html"][:150]) for v in found["violations"] if v["impact"] in SERIOUS]
    assert len(found["passes"]) > 10 and bad == [], (name, bad)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, name


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def page(browser):
    """A page that remembers what the console said and what was asked of the network."""
    context = browser.new_context(viewport={"width": 1400, "height": 1100})
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on(
        "console", lambda m: m.type == "error" and page.complaints.append(f"{m.text} ({m.location.get('url', '')})")
    )
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on("request", lambda r: page.requests.append(r.url))
    yield page
    context.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Copies of the notebooks, which tests may run and save."""
    target = tmp_path_factory.mktemp("lab")
    for name in ("11_dashboard", "index"):
        text = (ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")
        (target / f"{name}.ipynb").write_text(on_pocket(text), encoding="utf-8")
    return target


@pytest.fixture
def dashboard(folder, request):
    """The name of a copy of the dashboard that only this test opens: JupyterLab saves what it shows every two minutes,
    and a saved copy opens with widgets whose kernel is gone."""
    name = f"{request.node.name}.ipynb"
    shutil.copy(folder / "11_dashboard.ipynb", folder / name)
    return name


HELD = """import time
from pathlib import Path

from persona_steer.app import dashboard, live_generation


def answer_held(lm, request, vectors, show):
    def held(answers):
        while Path("hold").exists() and not show(answers):
            time.sleep(0.05)
        return show(answers)

    return live_generation.answer_live(lm, request, vectors, held)


dashboard.answer_live = answer_held

"""


@pytest.fixture
def held_dashboard(folder, dashboard):
    """The same, and the file that is returned: while it exists, an answer waits at its first token until it is stopped.
    Pocket's answers would be over before a click arrives."""
    notebook = json.loads((folder / dashboard).read_text(encoding="utf-8"))
    mark = "from persona_steer.app.dashboard import Dashboard"
    cell = next(c for c in notebook["cells"] if mark in "".join(c["source"]))
    cell["source"] = [HELD + "".join(cell["source"])]
    (folder / dashboard).write_text(json.dumps(notebook), encoding="utf-8")
    hold = folder / "hold"
    yield dashboard, hold
    hold.unlink(missing_ok=True)


def serve(folder, *command):
    """Start a server that takes `--port`, wait till it answers, and yield its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(folder / f"{command[0]}.log", "wb") as log:
        server = subprocess.Popen(
            [
                str(Path(sys.executable).parent / ("voila" if command[0] == "voila" else f"jupyter-{command[0]}")),
                *command[1:],
                f"--port={port}",
            ],
            cwd=folder,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "JUPYTER_CONFIG_DIR": str(folder / ".config"),
                "JUPYTER_DATA_DIR": str(folder / ".data"),
            },
        )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                time.sleep(0.2)
            assert server.poll() is None, (folder / f"{command[0]}.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


OPEN = (
    "--no-browser",
    "--allow-root",
    "--IdentityProvider.token=",
    "--ServerApp.disable_check_xsrf=True",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.news_url=None",
)


@pytest.fixture(scope="session")
def lab(folder):
    yield from serve(folder, "lab", *OPEN)


@pytest.fixture(scope="session")
def notebook(folder):
    yield from serve(folder, "notebook", *OPEN)
