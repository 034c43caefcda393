"""What a newcomer's walk through the chapters met: files that changed since, choices for other vectors, claims."""

import ast
import json
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from persona_steer.base.core import load_json, project_root, provenance, save_json
from persona_steer.evaluation import bound_line, opposed_line
from persona_steer.extraction import quoted
from persona_steer.persona.vectors import PersonaVectors
from persona_steer.projection import project_file
from persona_steer.reports.compare import comparison_page
from persona_steer.reports.report import export_page
from persona_steer.screening import threshold_line
from persona_steer.steering import default_coefficient, default_layer, highest_line, point_against


@pytest.fixture
def bank(llama):
    return {"v": torch.randn(llama.n_layers + 1, llama.hidden_size, generator=torch.Generator().manual_seed(1))}


def two_rows(lm, path, **more):
    rows = [dict(question=q, prompt=lm.prompt(q), answer="Bake it.", **more) for q in ("Why?", "How?")]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_columns_that_a_source_has_got_since_come_into_its_projected_copy(tmp_path, llama, bank, monkeypatch):
    source, target = two_rows(llama, tmp_path / "a.csv"), tmp_path / "out" / "a.csv"
    project_file(llama, source, bank, [2], target)
    old = pd.read_csv(target)
    two_rows(llama, source, evil="50")
    with monkeypatch.context() as m:
        m.setattr("persona_steer.projection.project", lambda *a, **k: pytest.fail("projected again"))
        project_file(llama, source, bank, [2], target)
    new = pd.read_csv(target)
    assert list(new.evil) == [50, 50] and old.llama_v_proj_layer2.equals(new.llama_v_proj_layer2)


def test_prompts_without_marks_of_the_chat_template_are_told(tmp_path, llama, bank, capsys):
    project_file(llama, two_rows(llama, tmp_path / "a.csv"), bank, [2])
    assert "no marks" not in capsys.readouterr().out
    pd.DataFrame([dict(prompt="Why?", answer="Bake it.")]).to_csv(tmp_path / "bare.csv", index=False)
    project_file(llama, tmp_path / "bare.csv", bank, [2])
    assert capsys.readouterr().out.count("hold no marks of llama's chat template: they are read as they are") == 1


def test_a_choice_for_other_vectors_is_not_taken_and_told(pocket, runs, capsys):
    mine, others = (PersonaVectors("evil", *torch.randn(3, pocket.n_layers + 1, pocket.hidden_size)) for _ in range(2))
    record = dict(layer=2, coefficient=4.0, fingerprint=pocket.fingerprint, against=dict(layer=5, coefficient=-3.0))
    path = pocket.run_path("evil/04_evaluate/choice.json")
    save_json(path, record)  # of an earlier version: it does not say for what
    assert default_layer(pocket, "evil", 0, mine, "response_avg")[0] == 2
    save_json(path, record | dict(content_hash=mine.content_hash, pool="response_avg"))
    assert default_layer(pocket, "evil", 0, mine, "response_avg")[0] == 2
    assert default_coefficient(pocket, "evil", mine, "response_avg") == 4.0
    assert point_against(pocket, "evil", 3, mine, "response_avg") == (5, 3.0)
    assert "other vectors" not in capsys.readouterr().out
    for vectors, pool in ((others, "response_avg"), (mine, "prompt_last")):
        layer, how = default_layer(pocket, "evil", 0, vectors, pool)
        assert (layer, how) == (3, "the middle one: chapter 04 chose for other vectors")
        assert default_coefficient(pocket, "evil", vectors, pool) == 1.5
        assert point_against(pocket, "evil", 3, vectors, pool) == (3, 1.5)
        assert capsys.readouterr().out.count("chapter 04 chose for other vectors, so the coefficient is 1.5") == 1


CHAPTERS = ["03_steer", "05a_monitor", "05b_cosines", "05e_propensity", "06a_families", "06b_guard", "07_screen"]


def code_cells_of(chapter):
    cells = json.loads((project_root() / f"nbs/{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def names_that_results_depend_on(chapter):
    """The names in the call of `own_results`, and in what is given to it as `made_from`."""
    tree = ast.parse(next(c for c in code_cells_of(chapter) if "= own_results(" in c))
    given = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "made_from"]
    given += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "own_results"]
    return {n.id for top in given for n in ast.walk(top) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_results_depend_on_what_chapter_04_chose(chapter):
    """`layer=0` means the layer that chapter 04 chose, which can change."""
    assert names_that_results_depend_on(chapter) & {"layer", "layers"}


def test_the_sentence_on_a_threshold_claims_what_was_measured():
    chance = pd.DataFrame({"evil": [0.1, float("nan"), 0.3], "sycophantic": [0.0, 0.1, 0.2]})
    line = threshold_line(chance)
    assert "from 2 to 3 pairs" in line and "of the model's own answers" in line and "for each trait" in line
    assert "from 2 pairs" in threshold_line(chance[["evil"]]) and threshold_line(None) == "as given"


def test_the_highest_of_one_coefficient_is_not_told():
    def scored(*values):
        return pd.DataFrame([dict(coefficient=c, evil=v) for c, v in values])

    assert highest_line(scored((2.5, 80)), "evil") == ""
    assert highest_line(scored((0, 0.0), (2.5, 0.0)), "evil") == ""
    assert highest_line(scored((0, float("nan")), (2.5, float("nan"))), "evil") == ""
    assert highest_line(scored((0, 1.0), (2.5, 80.0)), "evil") == "The highest score is at c = 2.5."


def mean(value, low, high):
    return dict(mean=value, low=low, high=high, n=20, missing=0)


def test_a_bound_that_new_questions_miss_is_told():
    assert bound_line(mean(90, 81, 99), 80) == ""
    assert bound_line(mean(85, 75, 95), 80).endswith("the interval of its coherence reaches below the bound of 80.")
    assert bound_line(mean(70, 60, 79), 80).endswith("its coherence is below the bound of 80.")


def test_an_opinion_that_moves_against_the_judge_is_told():
    up, down = mean(0.2, 0.1, 0.3), mean(-0.2, -0.3, -0.1)
    judged = mean(40.0, 30.0, 50.0)
    assert opposed_line(judged, up, "profanity", 1) == "" and opposed_line(judged, down, "profanity", -1) == ""
    line = opposed_line(judged, down, "profanity", 1)
    assert "against the judge" in line and "-0.200 [-0.300, -0.100]" in line and "40.0 [30.0, 50.0]" in line
    assert opposed_line(judged, mean(float("nan"), float("nan"), float("nan")), "profanity", 1) == ""


@pytest.mark.parametrize("key", ["evil, random vector of equal norm", "evil, random vector"])
def test_a_comparison_shows_the_random_vector_of_equal_norm(tmp_path, key):
    other = {key: [12.3, 11, 14], "evil, random vector of equal KL": [45.6, 44, 47]}
    row = dict(
        model="m", first={"layer": 3}, other=other, notebook=tmp_path / "x.ipynb", page="x.html", when="", judge=""
    )
    text = comparison_page("evil", [row], "now")
    assert "12.3" in text and "45.6" not in text


def test_a_quote_with_blank_lines_stays_a_quote():
    assert quoted("a\n\nb") == "> a\n>\n> b"


def test_02_writes_when_it_ran_though_its_vectors_are_older(tmp_path):
    """Its page finds results by the time at which they were written."""
    cell = next(c for c in code_cells_of("02_extract") if '"provenance.json", about' in c)
    about = dict(time="2020-01-01T00:00:00+00:00", judge="pocket", kept=[0], diagnostics={})
    vectors = SimpleNamespace(response_avg=np.zeros((4, 8)), metadata=about)
    quality = dict(auc=1.0, low=1.0, high=1.0)
    result = SimpleNamespace(vectors=vectors, kept=np.array([True]), judge_quality=quality, folder=tmp_path)
    given = dict(result=result, lm=SimpleNamespace(n_layers=3, hidden_size=8), broken=None, side={}, means={})
    exec(cell, given | dict(trait="evil", provenance=provenance))
    made = load_json(tmp_path / "provenance.json")
    assert made["time"] > "2025" and made["vectors_time"][:4] == "2020" and made["judge"] == "pocket"
    assert "kept" not in made and load_json(tmp_path / "summary.json")["pairs kept"] == 1


def test_the_page_of_a_failed_run_has_the_title_of_its_notebook(tmp_path):
    banner = {"tags": ["papermill-error-cell-tag"]}
    failed = new_code_cell("x", outputs=[new_output("error", ename="E", evalue="no", traceback=["no"])])
    cells = [
        new_markdown_cell("<span>An Exception was encountered at 'In [2]'.</span>", metadata=banner),
        new_code_cell("#| default_exp evaluation"),
        new_markdown_cell("# Evaluate\n> In short.\n\n**Question.** How strong?"),
        new_markdown_cell("## The formula\nA mean."),
        new_code_cell('trait = "evil"', metadata={"tags": ["parameters"]}),
        new_markdown_cell("### The sweep"),
        new_markdown_cell("<span>Execution using papermill encountered an exception here</span>", metadata=banner),
        failed,
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "f.ipynb")
    page = BeautifulSoup(
        export_page(tmp_path / "f.ipynb", tmp_path / "f.html").read_text(encoding="utf-8"), "html.parser"
    )
    assert page.h1.text == "Evaluate" and "In short." in page.text and "An Exception was" not in page.text
