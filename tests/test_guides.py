"""README and guides: short, their links resolve, and their commands run.

A comment above a code block says how it is tested:

    (none)                 the block is executed as it is
    <!-- test: pocket -->  executed with pocket in place of smollm2; what follows the word is given to each chapter:
                           <!-- test: pocket -p n 1 -->
    gpu, key, network      not executed, because it needs a GPU, a key for an API, or a model or package from elsewhere
    checkout, long, other  not executed: make targets that run for long, chapters that take minutes even on pocket
                           (`make test-notebooks` runs those), and programs that are no dependency (vLLM, llama.cpp)

Of what is not executed, every chapter, parameter, command, option, make target and import is checked to exist.
"""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_layers import LAYERS

from persona_steer.base import core

ROOT = Path(__file__).resolve().parents[1]
FIRST = ROOT / "docs" / "getting-started.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"), key=lambda p: (p != FIRST, p.name))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
NOT_EXECUTED = {"gpu", "key", "network", "checkout", "long", "other"}
WITH_RESULTS = [p for p in GUIDES if p.stem.startswith("results") or p.stem == "steering-operations"]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    rule: str  # "", "pocket", or one of NOT_EXECUTED
    extra: str  # what each chapter is given besides

    @property
    def executed(self) -> bool:
        return self.language in ("sh", "python") and self.rule not in NOT_EXECUTED


def blocks(page: Path) -> list[Block]:
    lines, out, comment, start = page.read_text(encoding="utf-8").splitlines(), [], "", None
    for i, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = i
        elif start is not None and line == "```":
            rule, _, extra = comment.partition(" ")
            out.append(Block(page, start + 2, lines[start][3:], "\n".join(lines[start + 1 : i]), rule, extra))
            start, comment = None, ""
        elif start is None:
            found = re.fullmatch(r"<!-- test: (.+) -->", line)
            comment = found[1] if found else ""
    assert start is None, f"{page.name}: a code block is not closed"
    return out


def commands(code: str) -> list[str]:
    "The commands of a shell block, less comments and assignments before them; a continued line is one."
    lines = [re.split(r"(?:^|\s)#\s", line)[0].strip() for line in code.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [c for c in (re.sub(r"^([A-Z_]+=\S+ )+", "", part) for part in parts) if c]


def on_pocket(block: Block) -> str:
    "The code with pocket in place of smollm2, in chapters too."
    code = block.code.replace("smollm2", "pocket")
    if block.language == "python":
        return code
    given = f"-p model pocket {block.extra}"
    code = re.sub(r"(?m)^(papermill nbs/\S+ \S+)", rf"\1 {given}", code.replace("\\\n", " "))
    return re.sub(r"(?m)^(persona-steer batch \w+)(?!.* -p model )", rf"\1 {given}", code)


def ids(values) -> list:
    return [pytest.param(v, id=f"{v.page.stem}:{v.line}") for v in values]


ALL = [b for page in PAGES for b in blocks(page)]


# ---- form


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_is_short(page):
    text = page.read_text(encoding="utf-8")
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    long = [f"{page.name}: {len(line)} characters: {line[:60]}" for line in prose if len(line) > 150]
    if page.name == "CONTRIBUTING.md":
        return
    words = 1400 if page in WITH_RESULTS else 900
    assert len(text.split()) <= words and not long, long
    assert page.name == "README.md" or len(text.splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_one_title_and_says_what_it_is_for(page):
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    assert text.startswith("# ") and len(re.findall(r"(?m)^# ", text)) == 1
    opening = text.split("\n\n")[1]
    assert not opening.startswith(("#", "|", "<!--")) and len(opening.split()) >= 10
    assert not re.search(r"example\.invalid|/home/|/root/|/work/", text)


@pytest.mark.parametrize("block", ids(ALL))
def test_a_block_says_its_language_and_how_it_is_tested(block):
    assert block.language in ("sh", "python", "json", "yaml", "console", "text")
    assert block.rule in {"", "pocket", *NOT_EXECUTED}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_that_goes_on_with_pocket_begins_with_it(page):
    """The blocks of a page share their names: a model that one of them loads as it is would be used by the others."""
    python = [b for b in blocks(page) if b.language == "python" and b.executed]
    if any(b.rule == "pocket" for b in python):
        assert not [b.line for b in python if b.rule == "" and "smollm2" in b.code]


def slug(heading: str) -> str:
    "The anchor that GitHub gives a heading."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    out = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            out.append(f"{page.name}: {target} does not exist")
        elif anchor and anchor not in map(slug, re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))):
            out.append(f"{page.name}: {target} has no such section")
    return out


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[a](other.md) [b](#here) [c](#a-page) [d](https://arxiv.org)\n")
    assert broken_links(page) == ["page.md: other.md does not exist", "page.md: #here has no such section"]


def test_every_guide_is_linked_and_every_chapter_is_in_the_table():
    linked = {name for page in PAGES for name in re.findall(r"\]\((?:docs/)?([\w-]+)\.md", page.read_text("utf-8"))}
    assert {p.stem for p in GUIDES} <= linked
    table = [line for line in PAGES[0].read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for chapter in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        assert any(f"`{chapter.stem}`" in row for row in table), f"README's table lacks {chapter.stem}"


def test_named_pages_and_chapters_exist():
    chapters = {p.stem for p in (ROOT / "nbs").rglob("*.ipynb")}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert {Path(n).name for n in re.findall(r"`((?:\w+/)?\d\d[a-f]?_\w+)`", text)} <= chapters, page.name
        for path in re.findall(r"\b(nbs/[\w/]+\.ipynb|(?:tests|docs)/[\w-]+\.(?:py|md))\b", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
    for book in (ROOT / "nbs").rglob("*.ipynb"):
        for name in re.findall(r"\bdocs/[a-z-]+\.md", book.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{book.name}: {name}"


def test_the_page_on_the_layout_draws_every_package():
    (drawing,) = [b.code for b in blocks(ROOT / "docs" / "code-layout.md") if "bench " in b.code]
    assert {name for row in LAYERS for name in row if name} <= set(re.findall(r"(?m)(?:^ |  )([a-z]+) {2,}", drawing))


# ---- names


def problems(command: str) -> list[str]:
    "What a command names that does not exist."
    from persona_steer.jobs.batch import chapter_path

    words = shlex.split(command)
    if words[0] == "make":
        return unknown_to_make(words[1:])
    if words[0] == "papermill":
        path = ROOT / words[2 if words[1] == "--help-notebook" else 1]
        return unknown_parameters(path, words) if path.is_file() else [f"no notebook {words[1]}"]
    if words[0] != "persona-steer":
        return []
    out = unknown_options(words[1], words[2:])
    if words[1] == "batch" and not words[2].endswith(".yaml"):
        out += unknown_parameters(chapter_path(words[2]), words)
    return out


def unknown_to_make(words: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = {w: rf"(?m)^{w.split('=')[0]}\s*\??=" if "=" in w else rf"(?m)^{w}:" for w in words}
    return [f"make does not know {w}" for w, rule in rules.items() if not re.search(rule, makefile)]


def unknown_parameters(chapter: Path, words: list[str]) -> list[str]:
    from persona_steer.jobs.batch import chapter_parameters

    given = {words[i + 1] for i, w in enumerate(words) if w == "-p"}
    given |= {name for i, w in enumerate(words) if w == "-y" for name in yaml.safe_load(words[i + 1])}
    return [f"{chapter.stem} has no parameter {name}" for name in given - set(chapter_parameters(chapter))]


def cli_commands() -> dict:
    from typer.main import get_command

    from persona_steer.app.cli import app

    return get_command(app).commands


def has_command(name: str) -> bool:
    return name in cli_commands()


def unknown_options(name: str, words: list[str]) -> list[str]:
    if not has_command(name):
        return [f"there is no persona-steer {name}"]
    known = {option for p in cli_commands()[name].params for option in [*p.opts, *p.secondary_opts]}
    return [f"persona-steer {name} has no {w}" for w in words if w.startswith("--") and w not in known]


SHELL = [b for b in ALL if b.language == "sh"]


@pytest.mark.parametrize("block", ids(SHELL))
def test_commands_name_what_there_is(block):
    assert [p for command in commands(block.code) for p in problems(command)] == []


@pytest.mark.parametrize(
    "command",
    [
        "papermill nbs/02_extracts.ipynb out.ipynb",
        "papermill nbs/02_extract.ipynb out.ipynb -p traits evil",
        'papermill nbs/02_extract.ipynb out.ipynb -y "{traits: evil}"',
        "persona-steer batch 02_extract -p traits evil",
        "persona-steer extracts runs",
        "persona-steer push runs user/name --licence mit",
        "make demonstration",
        "make demo TRAITS=evil",
    ],
)
def test_a_wrong_name_is_found(command):
    assert len(problems(command)) == 1


@pytest.mark.parametrize("block", ids(b for b in ALL if b.language == "python" and not b.executed))
def test_python_that_is_not_executed_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("persona_steer"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, a.name) for a in node.names)


# ---- execution


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of what commands read, with a runs folder of its own in which pocket's vectors for evil are there already."
    from persona_steer import extract, load_judge, load_model, load_trait

    copy = tmp_path_factory.mktemp("checkout")
    for name in ("nbs", "data"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    lm = load_model("pocket")
    extract(lm, load_trait("evil", world="pocket"), load_judge("auto", lm=lm), out=copy / "runs/pocket/evil/02_extract")
    return copy


def run_shell(code: str, checkout: Path):
    env = os.environ | {
        "PERSONA_ROOT": str(checkout),
        "PERSONA_RUNS": str(checkout / "runs"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=checkout, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.executed for b in blocks(p))], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page, checkout, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(core.settings(), "root", checkout)
    monkeypatch.setattr(core.settings(), "runs", checkout / "runs")
    names = {"__name__": page.stem}  # the blocks of a page go on from one another
    for block in filter(lambda b: b.executed, blocks(page)):
        code = on_pocket(block) if block.rule == "pocket" else block.code
        if block.language == "sh":
            run_shell(code, checkout)
        else:  # in this process, where torch has been imported already
            exec(compile(code, f"{page.name}:{block.line}", "exec"), names)


def test_a_block_that_fails_is_found(checkout):
    with pytest.raises(AssertionError, match="nowhere"):
        run_shell("ls nowhere\necho done", checkout)


def test_blocks_are_read_with_their_rules(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n<!-- test: pocket -p n 1 -->\n```sh\n"
        "papermill nbs/02_extract.ipynb a.ipynb \\\n  -p trait evil  # x\n"
        "persona-steer batch 02_extract -p model smollm2\n```\n\n```python\n1 / 0\n```\n"
    )
    shell, python = blocks(page)
    assert (shell.rule, shell.extra, python.rule, python.line) == ("pocket", "-p n 1", "", 11)
    assert on_pocket(shell).splitlines() == [
        "papermill nbs/02_extract.ipynb a.ipynb -p model pocket -p n 1    -p trait evil  # x",
        "persona-steer batch 02_extract -p model pocket",
    ]
    assert commands(shell.code)[0].split() == "papermill nbs/02_extract.ipynb a.ipynb -p trait evil".split()
