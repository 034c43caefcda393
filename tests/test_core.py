"""Importing, errors, atomic files, sampling."""

import os
import subprocess
import sys

import pytest
import torch

from persona_steer.base.cache import Cache
from persona_steer.base.core import PersonaError, atomic_path, project_root, provenance, save_json
from persona_steer.lm.generation import SamplingParams, generate, length_batches, sample_token, uniforms


def test_import_is_quick_and_needs_no_torch_key_or_network():
    code = (
        "import sys, time; t = time.perf_counter(); import persona_steer; d = time.perf_counter() - t; "
        "assert not {'torch', 'transformers', 'openai', 'pandas'} & set(sys.modules); print(d)"
    )
    env = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5


def test_public_names_are_there():
    import persona_steer

    assert 8 <= len(persona_steer.__all__) <= 20
    for name in persona_steer.__all__:
        assert getattr(persona_steer, name).__doc__
    with pytest.raises(AttributeError):
        persona_steer.nothing


def test_atomic_writes_leave_the_old_file_or_the_new_one(tmp_path):
    p = save_json(tmp_path / "a" / "x.json", {"a": 1})
    with pytest.raises(ZeroDivisionError):
        with atomic_path(p) as tmp:
            tmp.write_text("half")
            1 / 0
    assert p.read_text() == '{\n  "a": 1\n}\n' and [x.name for x in p.parent.iterdir()] == ["x.json"]


def test_what_was_made_from_other_inputs_is_not_taken(tmp_path):
    one, two = (Cache.of_parts(tmp_path, "a", key) for key in ("1", "2"))
    assert one.folder != two.folder == Cache.of_parts(tmp_path, "a", "2").folder
    Cache(tmp_path, "1").save("r.json", {"x": 1})
    assert Cache(tmp_path, "1").load("r.json")["x"] == 1 and Cache(tmp_path, "2").load("r.json") == {}
    again = Cache(tmp_path, "1", overwrite=True)
    assert again.load("r.json") == {} and Cache(tmp_path, "1").load("r.json")
    again.save("r.json", {"x": 2})
    assert again.load("r.json")["x"] == 2


def test_provenance_holds_no_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    p = provenance(seed=1)
    assert p["seed"] == 1 and "torch" in p["versions"] and "very-secret" not in str(p)


def test_batches_cover_every_row_within_the_budget():
    lengths = [5, 200, 3, 90, 90, 1]
    batches = length_batches(lengths, 10, 300)
    assert sorted(sum(batches, [])) == list(range(6))
    assert all(len(b) == 1 or len(b) * (max(lengths[i] for i in b) + 10) <= 300 for b in batches)


def test_sampling_follows_the_distribution_and_top_p():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    u = uniforms([7], 20000)[0]
    drawn = sample_token(p.log().repeat(20000, 1), u).bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, p, atol=0.012, rtol=0)
    assert sample_token(p.log().repeat(500, 1), u[:500], top_p=0.8).unique().tolist() == [0, 1]
    assert sample_token(p.log()[None], u[:1], temperature=0).tolist() == [0]


def test_each_answer_has_its_own_seed_whatever_its_batch(llama):
    prompts = [llama.prompt(f"Is it {i}?") for i in range(5)]
    a = generate(llama, prompts, SamplingParams(8))
    b = generate(llama, prompts[::-1], SamplingParams(8), seeds=[4, 3, 2, 1, 0])
    assert a.texts == b.texts[::-1] and len(set(a.texts)) > 1
    assert generate(llama, prompts, SamplingParams(8, seed=1)).texts != a.texts
    assert max(a.tokens) <= 8


def test_nothing_to_generate_is_said(llama):
    with pytest.raises(PersonaError, match="empty"):
        generate(llama, [])


def test_nothing_unsafe_in_the_library():
    import inspect
    import re
    from pathlib import Path

    from persona_steer.base import core
    from persona_steer.lm import models

    source = "\n".join(p.read_text(encoding="utf-8") for p in Path(core.__file__).parent.glob("*.py"))
    assert not re.search(r"(?<![\w.])(eval|exec)\(|weights_only=False|pickle\.|shell=True", source)
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", source))
    assert inspect.signature(models.load_model).parameters["trust_remote_code"].default is False


def test_a_misspelt_parameter_is_refused(tmp_path):
    """papermill itself only warns, and runs the default."""
    import nbformat
    import papermill
    from nbformat.v4 import new_code_cell, new_notebook

    parameters = new_code_cell('trait: str = "evil"\nmodel: str = "pocket"', metadata={"tags": ["parameters"]})
    start = new_code_cell("from persona_steer.base.core import check_parameters\ncheck_parameters()\nprint(trait)")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[parameters, start], metadata=kernel), tmp_path / "a.ipynb")

    def run(**given):
        papermill.execute_notebook(
            tmp_path / "a.ipynb", tmp_path / "out.ipynb", given, kernel_name="python3", progress_bar=False
        )

    run()
    run(trait="humorous", model="smollm2")
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'trayt': did you mean 'trait'"):
        run(trayt="humorous")


def test_every_job_checks_its_parameters():
    import json

    jobs = 0
    for path in (project_root() / "nbs").rglob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        for before, after in zip(cells, cells[1:]):
            if "parameters" in before["metadata"].get("tags", []):
                jobs += 1
                assert "\ncheck_parameters()" in "".join(after["source"]), path.name
    assert jobs > 15


def test_parameters_about_the_judge_are_the_same_in_all_jobs():
    import json

    found = {}
    for path in sorted((project_root() / "nbs").glob("0*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                lines = "".join(cell["source"]).split("\n")
                names = ("judge_model", "base_url", "judge_scale", "max_calls", "judging_pairs")
                found[path.stem] = [line for line in lines if line.split(":")[0] in names]
    with_judge = {name: lines for name, lines in found.items() if lines}
    assert len(with_judge) >= 10 and len(set(map(tuple, with_judge.values()))) == 1
    assert all(len(lines) == 5 for lines in with_judge.values())
