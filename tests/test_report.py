"""An executed notebook to a page."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import html5lib
import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import persona_steer
from persona_steer.base.core import PersonaError
from persona_steer.reports.notebook import parameters, redact, span, state
from persona_steer.reports.report import export_page, lossless_webp

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
KEY = "sk-proj-AAAAbbbb11112222"


def shows(*outputs, source="show()", **metadata):
    return new_code_cell(source, outputs=list(outputs), execution_count=1, metadata=metadata)


def html(text):
    return new_output("display_data", {"text/html": text, "text/plain": "plain"})


def png():
    return new_output("display_data", {"image/png": PNG, "text/plain": "<Figure size 1x1>"})


def chapter(*cells, **papermill):
    head = [
        new_markdown_cell("# A `title` & more\n> One line.\n\nFirst words."),
        new_code_cell(
            "trait: str = 'evil'  # which trait\nn = 20  # how many\nlayers = list(range(3))",
            metadata={"tags": ["parameters"]},
        ),
        new_code_cell("# Parameters\nn = 5\nextra = 'x'\n", metadata={"tags": ["injected-parameters"]}),
    ]
    return new_notebook(cells=[*head, *cells], metadata={"papermill": papermill} if papermill else {})


@pytest.fixture
def page(tmp_path):
    def build(*cells, **papermill):
        nbformat.write(chapter(*cells, **papermill), tmp_path / "c.ipynb")
        text = export_page(tmp_path / "c.ipynb", tmp_path / "c.html").read_text(encoding="utf-8")
        html5lib.HTMLParser(strict=True).parse(text)  # raises at the first error in the markup
        return BeautifulSoup(text, "html.parser")

    return build


def test_a_password_in_an_address_is_blotted_out():
    assert (
        redact("http://me:hunter2@localhost:8000/v1") == "http://[redacted]@localhost:8000/v1"
        and redact("http://localhost:8000/v1?a=b@c") == "http://localhost:8000/v1?a=b@c"
    )


def test_structure(page):
    s = page(new_markdown_cell("## One\ntext\n## Two\n### Empty\n## Three\ntext\n## Four\ntext\n## Four\ntext"))
    assert (
        s.html["lang"] == "en"
        and s.title.text == "A title & more" == s.h1.text
        and len(s("h1")) == len(s("main")) == len(s("footer")) == 1
    )
    assert (
        s.select_one(".lede").text.strip() == "One line."
        and s.select_one("a.skip")["href"] == "#content"
        and s.main["id"] == "content"
    )
    assert [h.text for h in s(["h2", "h3"])] == [
        "One",
        "Three",
        "Four",
        "Four",
        "Method",
        "Parameters",
    ]  # headings without contents are gone
    links = [a["href"][1:] for a in s.select("nav.contents a")]
    assert len(set(links)) == 6 and all(s.find(id=i) for i in links)
    assert "prefers-color-scheme:dark" in s.style.text and "@media print" in s.style.text


def test_parameters_are_one_table(page):
    s = page()
    rows = {tr.th.text: [td.get_text(" ", strip=True) for td in tr("td")] for tr in s.select(".parameters tbody tr")}
    assert rows == {
        "trait": ["evil", "which trait"],
        "n": ["5 set for this run", "how many"],
        "layers": ["list(range(3))", ""],
        "extra": ["x set for this run", ""],
    }
    assert len(s.select(".parameters")) == 1 and "# Parameters" not in s.text


def test_parameters_that_do_not_parse_stay_code():
    nb = new_notebook(cells=[new_code_cell("n = = 2", metadata={"tags": ["parameters"]})])
    assert parameters(nb) == []


def test_implementation_and_checks_go(page):
    s = page(
        new_code_cell("#| export\ndef hidden_a(): ..."),
        new_code_cell("#| slow\n# | exporti\nhidden_b = 1"),
        new_code_cell("#|hide\nhidden_c"),
        new_code_cell("assert hidden_d"),
        new_code_cell("test_eq(hidden_e, 1)"),
        new_code_cell("with expect_error(): hidden_f"),
        new_code_cell("import hidden_g\nfrom hidden_h import x"),
        shows(html("<p>hidden_i</p>"), remove="", tags=["remove_cell"]),
        shows(html("<p>seen_a</p>"), source="hidden_j()", tags=["remove_input"]),
        new_code_cell("#| eval: false\nseen_b()"),
        new_code_cell("\n".join(f"seen_{i} = {i}" for i in range(20))),
    )
    assert (
        "hidden_" not in s.text
        and "seen_a" in s.text
        and "seen_b" in s.text
        and "#|" not in s.text
        and "seen_19" in s.details.text
    )


def test_progress_widgets_and_litter_go(page):
    widget = new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar_a"}
    )
    s = page(
        shows(
            new_output("stream", name="stderr", text="bar_b 10%|#  | 1/10"),
            widget,
            new_output(
                "stream",
                name="stdout",
                text="step 1\rstep 2\nkept \x1b[31mred\x1b[0m <b>\n 50%|#####     | 5/10 [bar_c]\n",
            ),
            new_output("execute_result", {"text/plain": "[<matplotlib.lines.Line2D at 0x7f>]"}),
            new_output("display_data", {"application/javascript": "bar_d", "text/plain": "after"}),
        )
    )
    assert [p.text.strip() for p in s.select("pre.text")] == ["step 2\nkept red <b>", "after"] and "bar_" not in s.text


def test_figure_caption_and_alt(page):
    s = page(
        shows(png()),
        new_markdown_cell("**Figure 1.** It *rises*.\n\nProse goes on."),
        new_markdown_cell("Before the second."),
        shows(png(), png(), new_output("display_data", {"text/markdown": "**Figure 2.** Two at once."})),
        new_markdown_cell("What leads to it."),
        shows(png()),
        shows(png(), alt="given"),
    )
    alts = [i["alt"] for i in s("img")]
    assert alts == [
        "Figure 1. It rises.",
        "Figure 2. Two at once. (1 of 2)",
        "Figure 2. Two at once. (2 of 2)",
        "What leads to it.",
        "given",
    ]
    assert [c.text.strip() for c in s("figcaption")] == [
        "Figure 1. It rises.",
        "Figure 2. Two at once.",
    ] and "Prose goes on." in s.text
    assert all(i["src"].startswith("data:image/png;base64,") for i in s("img"))


def test_nothing_is_fetched_and_nothing_runs(page, tmp_path):
    (tmp_path / "near.png").write_bytes(b"\x89PNG")
    s = page(
        shows(
            html(
                '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" '
                'href="https://x.example/f.css"><style>@import "https://x.example/a.css";'
                ' p{background:url(https://x.example/b.png)}</style><img '
                'src="https://x.example/c.png" onerror="alert(1)" alt="far"><iframe '
                'src="https://x.example"></iframe>'
                '<p style="background:url(//x.example/d.png)">kept</p><a '
                'href="javascript:alert(1)">x</a><meta http-equiv="refresh" content="0"><video '
                'src="/v.mp4"></video>'
            )
        ),
        shows(html("<div></div><script>draw()</script>")),
        new_markdown_cell(
            "![near](near.png) ![far](http://x.example/e.png) [web](https://ok.example) [next](03_x.ipynb)"
        ),
    )
    assert not s(["script", "link", "iframe"]) and len(s("meta")) == 4
    assert all(
        t[a].startswith(("data:image/", "#"))
        for t in s(True)
        if t.name != "a"
        for a in ("src", "href", "srcset")
        if t.has_attr(a)
    )
    assert {a["href"] for a in s.main("a")} == {"https://ok.example"} and not any(
        k.startswith("on") for t in s(True) for k in t.attrs
    )
    assert (
        len(s("img")) == 1
        and "picture not in this page: far" in s.text
        and "interactive output" in s.text
        and "kept" in s.text
    )
    assert "x.example" not in str(s) and "default-src 'none'" in str(s.head)


def test_tables_scroll_and_numbers_align(page):
    s = page(
        shows(
            html(
                '<table border="1" class="dataframe"><thead><tr style="text-align: '
                'right;"><th></th><th>n</th><th>text</th></tr></thead>'
                "<tbody><tr><th>0</th><td>-1.5</td><td>a</td></tr><tr><th>1</th><td>NaN</td><td>2</td></tr></tbody></table>"
            )
        ),
        shows(html('<p style="background-color: yellow">x</p>')),
    )
    box = s.select_one(".output:not(:has(.parameters)) .scroll")
    assert box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] and not box.table.has_attr("border")
    assert [c.text for c in box.select(".num")] == ["n", "-1.5", "NaN"] and box.select_one("tbody th")["scope"] == "row"
    assert len(s.select(".light")) == 1


def test_secrets_are_blotted_out(page, tmp_path):
    (tmp_path / "provenance.json").write_text(
        json.dumps(
            {
                "model": "m",
                "judge": "j",
                "api_key": "short",
                "environ": {"HOME": "/h"},
                "versions": {"torch": "2.13"},
                "note": KEY,
            }
        )
    )
    s = page(
        shows(new_output("stream", name="stdout", text=f"{KEY}\nOPENAI_API_KEY=abcdef123456"), source=f"key = '{KEY}'"),
        shows(new_output("error", ename="E", evalue=f"\\n{KEY}", traceback=["a", f"\x1b[31m{KEY}\x1b[0m"])),
        new_markdown_cell("hf_abcDEFghi0123456789"),
        environment_variables={"HOME": "/h"},
    )
    assert not re.search(r"sk-proj|hf_abc|abcdef123456|/h\b|short", str(s))
    assert [[t.text for t in r(["th", "td"])] for r in s.footer("tr")] == [
        ["model", "m"],
        ["judge", "j"],
        ["api_key", "[redacted]"],
        ["versions.torch", "2.13"],
        ["note", "[redacted]"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens=128",
        "task-oriented-20250101-something",
        "pad_token = '<|im_end|>'",
        "risk-adjusted-value-0123456789",
        "sk-learn",
    ],
)
def test_ordinary_text_is_kept(text):
    assert redact(text) == text


def test_error_is_shown_where_its_cell_is_hidden(page):
    s = page(
        new_markdown_cell(
            '<span>An Exception was encountered at In [3]</span>', metadata={"tags": ["papermill-error-cell-tag"]}
        ),
        shows(
            new_output("error", ename="ValueError", evalue="layer <9> is missing", traceback=["one", "two"]),
            source="#| export\nhidden()",
        ),
        new_markdown_cell("**Figure 1.** Never made."),
        exception=True,
    )
    box = s.find(id="error")
    assert (
        "ValueError" in box.text
        and "layer <9> is missing" in box.text
        and "two" in box.details.text
        and not s("figcaption")
    )
    assert (
        s.select_one(".badge").text == "failed"
        and s.find("a", href="#error")
        and "hidden()" not in s.text
        and "An Exception" not in s.text
    )


def test_states():
    ran, raised = shows(html("x")), new_output("error", ename="E", evalue="", traceback=[])
    assert (
        state(chapter(ran)) == "done"
        and state(chapter(new_code_cell("1"))) == "unexecuted"
        and state(chapter(shows(raised))) == "failed"
    )
    assert (
        state(chapter(shows(raised, tags=["raises-exception"]))) == "done"
        and state(chapter(exception=True)) == "failed"
    )
    assert state(chapter(ran, start_time="2026-01-01T00:00:00", end_time=None)) == "unfinished"


def test_bad_input(tmp_path):
    with pytest.raises(PersonaError, match="does not exist"):
        export_page(tmp_path / "none.ipynb", tmp_path / "x.html")
    (tmp_path / "bad.ipynb").write_text("{}")
    with pytest.raises(PersonaError, match="bad.ipynb"):
        export_page(tmp_path / "bad.ipynb", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_texts_side_by_side_scroll(page):
    table = (
        '<table class="texts"><thead><tr><th scope="col">question</th><th '
        'scope="col">base</th></tr></thead><tbody><tr><th scope="row">Why?</th><td>Background: a '
        'color.<br>So.</td></tr></tbody></table>'
    )
    s = page(shows(html(table)))
    assert (
        s.select_one(".scroll > table.texts")
        and s.select_one(".texts tbody th")["scope"] == "row"
        and not s.select(".light")
    )
    rule = re.search(r"\.texts :is\(th, td\) {([^}]*)}", s.style.text)[1]
    assert "min-width:14rem" in rule and "vertical-align:top" in rule


def test_times():
    assert [span(s) for s in (None, 0.42, 42, 59.7, 192, 7500)] == [
        "",
        "0.42 s",
        "42 s",
        "1 min 00 s",
        "3 min 12 s",
        "2 h 05 min",
    ]


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_of_the_pages_is_valid():
    script = Path(persona_steer.__file__).parent / "reports" / "templates" / "page.js"
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_result_comes_first_and_examples_of_the_method_are_left_out(tmp_path):
    """One sentence, the experiment, the method in prose, the parameters folded."""
    cells = [
        new_code_cell("#| default_exp evaluation"),
        new_markdown_cell("# Evaluate\n> In short.\n\n**Question.** How strong?"),
        new_markdown_cell("## The formula\nA mean of differences."),
        shows(new_output("stream", name="stdout", text="toy 123"), source="toy()"),
        new_markdown_cell("**Figure 1.** A toy."),
        new_markdown_cell("## The experiment"),
        new_code_cell('trait: str = "evil"  # which trait', metadata={"tags": ["parameters"]}),
        new_markdown_cell("### The sweep"),
        shows(png(), source="plot()"),
        new_markdown_cell("**Figure 2.** The sweep."),
        shows(
            new_output("display_data", {"text/markdown": "**The score changes by +72 [65, 78].**", "text/plain": ""}),
            tags=["headline"],
        ),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "c.ipynb")
    text = export_page(tmp_path / "c.ipynb", tmp_path / "c.html").read_text(encoding="utf-8")
    html5lib.HTMLParser(strict=True).parse(text)
    s = BeautifulSoup(text, "html.parser")
    main = s.main.get_text(" ")
    assert s.h1.text == "Evaluate"
    order = ["In short", "+72 [65, 78]", "The sweep", "Figure 2", "Method", "How strong?", "The formula", "which trait"]
    places = [main.index(words) for words in order]
    assert places == sorted(places) and "toy 123" not in main and "A toy" not in main and "The experiment" not in main
    assert "open" not in s.select_one("details:has(.parameters)").attrs
    failed = shows(new_output("error", ename="ValueError", evalue="no toy", traceback=["no toy"]), source="toy()")
    nbformat.write(new_notebook(cells=[*cells[:3], failed, *cells[5:7]]), tmp_path / "f.ipynb")
    assert "no toy" in export_page(tmp_path / "f.ipynb", tmp_path / "f.html").read_text(encoding="utf-8")


def test_no_path_of_this_machine_is_published(page, tmp_path):
    (tmp_path / "provenance.json").write_text(json.dumps({"files": [str(tmp_path / "data" / "mine.jsonl")]}))
    text = str(page(shows(new_output("stream", name="stdout", text=f"wrote {tmp_path}/runs/evil/x.csv"))))
    assert str(tmp_path) not in text and ".../evil/x.csv" in text and ".../data/mine.jsonl" in text
    assert "https://arxiv.org/abs/2507.21509" in str(
        page(new_markdown_cell("[paper](https://arxiv.org/abs/2507.21509)"))
    )


def as_png(image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def drawn_figure() -> bytes:
    """What matplotlib draws for a chapter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    figure.subplots().plot([1, 3, 2], label="evil")
    out = io.BytesIO()
    figure.savefig(out)
    return out.getvalue()


def test_compressed_figures_are_smaller_and_have_the_same_pixels(tmp_path):
    png = drawn_figure()
    figure = new_output("display_data", {"image/png": base64.b64encode(png).decode()})
    nbformat.write(chapter(new_markdown_cell("## A figure"), shows(figure)), tmp_path / "c.ipynb")
    sizes, sources = [], []
    for compress in (False, True):
        text = export_page(tmp_path / "c.ipynb", tmp_path / "c.html", compress=compress).read_text(encoding="utf-8")
        sizes.append(len(text))
        sources.append(BeautifulSoup(text, "html.parser").img["src"])
    assert sources[0].startswith("data:image/png;") and sources[1].startswith("data:image/webp;")
    assert sizes[0] - sizes[1] > 0.5 * len(sources[0])
    before, after = (Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources)
    assert before.size == after.size and before.convert("RGBA").tobytes() == after.convert("RGBA").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_png_keeps_its_pixels(mode):
    noise = Image.effect_noise((40, 30), 60)
    image = Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise.rotate(270)]).convert(mode)
    after = Image.open(io.BytesIO(lossless_webp(as_png(image))))
    assert after.format == "WEBP" and after.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_a_picture_that_webp_cannot_hold_stays_as_it_is():
    deep, wide = Image.new("I;16", (3, 3)), Image.new("L", (16384, 1))
    for picture in (as_png(deep), as_png(wide), b"no picture", drawn_figure()[:90]):
        assert lossless_webp(picture) == picture
