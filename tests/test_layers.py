"""The packages are layers: each module imports from its own package and from those below it, and no modules import each
other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "persona_steer"
# From the bottom up; packages of one line do not know each other. "" holds the experiments: the chapters in nbs/
# itself.
LAYERS = [
    ("base",),
    ("serving",),
    ("lm", "reports"),
    ("persona",),
    ("judges", "jobs"),
    ("training",),
    ("",),
    ("paper",),
    ("app",),
    ("bench", "pocket"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules(root: Path) -> list:
    return [p for p in sorted(root.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


def name_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports(path: Path, root: Path, known: set) -> set:
    """Modules of the package that a module imports, those inside functions too; as names below the package."""
    inside = path.relative_to(root).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("persona_steer.") for a in node.names if a.name.startswith("persona_steer.")}
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            above = inside[: len(inside) - node.level + 1]
            base = ".".join([*above, *filter(None, [module])])
        elif module == "persona_steer" or module.startswith("persona_steer."):
            base = module.removeprefix("persona_steer").removeprefix(".")
        else:
            continue
        for a in node.names:  # a name in a module, or a module in a package
            within = f"{base}.{a.name}".removeprefix(".")
            found.add(within if within in known else base)
    whole = found & {package(m) for m in known}  # packages that are imported themselves
    return found & known | {f"{name}.__init__" for name in whole if name}


def package(module: str) -> str:
    return module.rpartition(".")[0]


def import_graph(root: Path) -> dict:
    """Module -> what it imports."""
    known = {name_of(p, root) for p in modules(root)}
    return {name_of(p, root): imports(p, root, known) for p in modules(root)}


def wrong_imports(root: Path) -> list:
    out = []
    for me, others in import_graph(root).items():
        for other in others:
            mine, theirs = package(me), package(other)
            if mine != theirs and RANK[theirs] >= RANK[mine]:
                out.append(f"{me} imports {other}")
    return out


def test_every_package_has_its_place():
    assert {package(name_of(p, PACKAGE)) for p in modules(PACKAGE)} == set(RANK)


def test_imports_run_downwards_only():
    assert wrong_imports(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle():
    list(TopologicalSorter(import_graph(PACKAGE)).static_order())


@pytest.mark.parametrize(
    "line",
    [
        "from ..extraction import extract",
        "from ..app import live_generation",
        "from ..app import anything",
        "from persona_steer.judges.judging import Judge",
        "def f():\n    from ..persona.traits import Trait",
    ],
)
def test_a_wrong_import_is_found(tmp_path, line):
    copy = tmp_path / "persona_steer"
    for p in modules(PACKAGE):
        target = copy / p.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(p.read_text(encoding="utf-8"), encoding="utf-8")
    assert wrong_imports(copy) == []
    models = copy / "lm" / "models.py"
    models.write_text(models.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    assert len(wrong_imports(copy)) == 1 and wrong_imports(copy)[0].startswith("lm.models imports")


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
