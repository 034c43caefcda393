"""The paper's claims: measurements from known numbers, verdicts by their rules, the page, the published site."""

import json
import re
import subprocess

import nbformat
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output

from persona_steer.base.core import PersonaError, project_root
from persona_steer.paper import claims as c
from persona_steer.paper import measurements as m
from persona_steer.paper.plan import OTHER_TRAITS, TRAITS, paper_grids, paper_jobs
from persona_steer.paper.site import LIMIT, paper_site
from persona_steer.persona.vectors import PersonaVectors, save_vectors
from persona_steer.reports.links import check_links, site_size

OUTPUT = [new_output("stream", text="1")]
EXECUTED = nbformat.writes(new_notebook(cells=[new_code_cell("1", outputs=OUTPUT, execution_count=1)]))
QUESTIONS = [f"question {i}" for i in range(20)]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, pd.DataFrame):
        value.to_csv(path, index=False)
    else:
        path.write_text(json.dumps(value))


def answers(condition, score, coefficient=0.0, coherence=90.0):
    """Twenty answers whose scores differ by question but not in their change from one condition to another."""
    rows = [dict(question=q, evil=score + i % 3, coherence=coherence) for i, q in enumerate(QUESTIONS)]
    return pd.DataFrame(rows).assign(condition=condition, coefficient=coefficient)


def guards(rows):
    columns = {}
    for name in ("trait", "capability"):
        columns |= {name: [r[name] for r in rows], f"{name}_low": [r[name] - 3 for r in rows]}
        columns |= {f"{name}_high": [r[name] + 4 for r in rows], f"{name}_n": [20] * len(rows)}
    about = {k: [r[k] for r in rows] for k in ("condition", "coefficient", "split")}
    return pd.DataFrame(about | columns)


def family(name, level, score):
    row = dict(family=name, level=level, trait="evil", score_mean=score, score_low=score - 3, score_high=score + 4)
    return row | dict(score_n=20)


@pytest.fixture
def runs(tmp_path):
    """Results of one model and the trait evil, every number known."""
    root = tmp_path / "runs"
    evil = root / "tiny" / "evil"
    vectors = torch.ones(11, 4)  # ten layers
    save_vectors(
        PersonaVectors("evil", vectors, vectors, vectors, {"diagnostics": {"split_half": [0.8] * 11}}),
        evil / "02_extract",
    )
    for side, score in (("pos", 80), ("neg", 10)):
        table = answers(side, score).assign(prompt="p", answer="a")
        table["question_id"] = range(20)
        write(
            evil / "02_extract" / f"evil_{side}.csv",
            table[["question", "prompt", "answer", "question_id", "evil", "coherence"]],
        )
    write(evil / "02_extract" / "summary.json", {"AUC of the judge": [0.9, 0.8, 0.95]})
    write(evil / "02_extract" / "provenance.json", {"git": "0123456789ab", "judge": "known", "time": "2026-01-01"})
    report = [
        answers("unsteered", 10),
        answers("steered", 5, -2.0),
        answers("steered", 30, 1.0),
        answers("steered", 60, 2.0, coherence=70.0),
        answers("steered", 70, 3.0),
        answers("random vector, equal KL", 20, 4.0),
        answers("positive instructions", 90),
        answers("against instructions", 40, -1.0),
    ]
    write(evil / "04_evaluate" / "report.csv", pd.concat(report))
    write(evil / "04_evaluate" / "choice.json", {"layer": 6, "coefficient": 2.0})
    write(evil / "04_evaluate" / "summary.json", {})
    for pool, score in (("prompt_avg", 45), ("prompt_last", 65)):
        write(evil / f"04_evaluate/pool={pool}" / "report.csv", answers("steered", score, 1.5))
        write(evil / f"04_evaluate/pool={pool}" / "choice.json", {"layer": 3, "coefficient": 1.5})
    write(evil / "05a_monitor" / "projections.csv", pd.DataFrame({"kind": ["system prompt"] * 8 + ["shots"] * 5}))
    rs = {"system prompt, overall": 0.6, "system prompt, within": 0.1, "shots, overall": 0.5}
    write(evil / "05a_monitor" / "summary.json", {f"evil, {k}": [r, r - 0.2, r + 0.2] for k, r in rs.items()})
    write(evil / "05e_propensity" / "summary.json", {"evil, steered, slope": [0.5, 0.1, 0.9]})
    write(evil / "05e_propensity" / "provenance.json", {"choices": 40})
    trained = [
        family("untrained", "", 10),
        family("evil", "normal", 12),
        family("evil", "misaligned_1", 30),
        family("evil", "misaligned_2", 80),
        family("mistake_code", "misaligned_2", 16),
        family("mistake_math", "misaligned_2", 20),
        family("sycophancy", "misaligned_2", 99),
    ]
    write(root / "tiny/06a_families/families.csv", pd.DataFrame(trained))
    write(root / "tiny/06a_families/summary.json", {"datasets": 24, "r, shift against evil score": [0.8, 0.7, 0.9]})
    table = [
        dict(condition="no guard", coefficient=0.0, split="extract", trait=1, capability=1),
        dict(condition="no guard", coefficient=0.0, split="eval", trait=90, capability=60),
        dict(condition="preventative steering", coefficient=1.0, split="eval", trait=70, capability=60),
        dict(condition="preventative steering", coefficient=2.0, split="eval", trait=20, capability=80),
        dict(condition="random vector", coefficient=2.0, split="eval", trait=88, capability=70),
        dict(condition="ablation", coefficient=1.0, split="eval", trait=40, capability=75),
        dict(condition="post-hoc steering", coefficient=1.0, split="eval", trait=60, capability=50),
        dict(condition="post-hoc steering", coefficient=2.0, split="eval", trait=50, capability=40),
    ]
    write(evil / "06b_guard" / "guards.csv", guards(table))
    write(evil / "06b_guard" / "summary.json", {"coefficient": 2.0})
    write(
        root / "tiny/07_screen/summary.json",
        {"r, difference against evil score": [0.7, 0.5, 0.8], "AUC, evil": [1.0, 0.9, 1.0]},
    )
    datasets = [
        dict(family="evil", level=level, trait="evil", n=60) for level in ("normal", "misaligned_1", "misaligned_2")
    ]
    write(root / "tiny/07_screen/datasets.csv", pd.DataFrame(datasets))
    pairs = [dict(a="evil", b="impolite", cosine=-0.6), dict(a="humorous", b="impolite", cosine=0.9)]
    write(root / "tiny/05b_cosines/pairs.csv", pd.DataFrame(pairs))
    change = {g: dict(mean=x, low=x - 0.1, high=x + 0.1, n=30) for g, x in (("challenging", -0.3), ("benign", 0.0))}
    random = {g: v | dict(mean=0.0, low=-0.1, high=0.1) for g, v in change.items()}
    changes = {"steered 0.5": random, "steered 1": change, "random vector 1": random}
    write(root / "tiny/08_toxicity/experiment_results.json", {"choice": {"alpha": 1.0}, "changes": changes})
    return root


MEASURED = [  # a measure, its value, and its interval where it is known exactly
    (m.judge_auc, 0.9, (0.8, 0.95)),
    (m.instructed_gap, 70, (70, 70)),
    (m.split_half, 0.8, None),
    (m.chosen_depth, 0.6, None),
    (m.steering_change, 50, (50, 50)),
    (m.beyond_random, 40, (40, 40)),
    (m.dose, 40, (40, 40)),
    (m.subtraction, -50, (-50, -50)),
    (m.steered_coherence, 70, (70, 70)),
    (m.position_gain("prompt_avg"), 15, (15, 15)),
    (m.position_gain("prompt_last"), -5, (-5, -5)),
    (m.monitoring_r("system prompt"), 0.6, (0.4, 0.8)),
    (m.monitoring_gap("system prompt"), -0.5, (-0.5 - 0.08**0.5, -0.5 + 0.08**0.5)),
    (m.monitoring_r("shots"), 0.5, (0.3, 0.7)),
    (m.propensity_slope, 0.5, (0.1, 0.9)),
    (m.score_gap("misaligned_2", ""), 70, (70 - 5, 70 + 5)),  # 3 and 4 on either side: 5
    (m.score_gap("normal", "misaligned_2"), -68, (-73, -63)),
    (m.mistakes_gap, 8, None),  # (16 + 20) / 2 - 10: the family of another trait is left out
    (m.shift_r, 0.8, (0.7, 0.9)),
    (m.guard_gap("preventative steering"), -70, (-75, -65)),
    (m.guard_gap("preventative steering", "random vector"), -68, (-73, -63)),
    (m.guard_gap("post-hoc steering"), -40, (-45, -35)),  # the strength that lowers it most
    (m.guard_gap("ablation"), -50, (-55, -45)),
    (m.guard_gap("preventative steering", "post-hoc steering", "capability"), 40, (35, 45)),
    (m.difference_r, 0.7, (0.5, 0.8)),
    (m.sample_auc, 1.0, (0.9, 1.0)),
    (m.pair_cosine, -0.6, None),
    (m.toxicity_change("challenging"), -0.3, (-0.4, -0.2)),
    (m.toxicity_change("benign"), 0.0, (-0.1, 0.1)),
    (m.toxicity_beyond_random, -0.3, (-0.3 - 0.02**0.5, -0.3 + 0.02**0.5)),
]


@pytest.mark.parametrize("measure, value, interval", MEASURED)
def test_measurements(runs, measure, value, interval):
    found = measure(m.ModelResults(runs / "tiny"), "evil")
    assert found.value == pytest.approx(value)
    if interval:
        assert (found.low, found.high) == pytest.approx(interval)


def test_every_claim_has_a_measure_that_is_tested():
    def name(f):
        return getattr(f, "__qualname__", "").split(".")[0]

    assert {name(claim.measure) for f in c.FIGURES for claim in f.claims} <= {name(f) for f, *_ in MEASURED}


def test_what_was_not_run_is_not_measured(tmp_path):
    (tmp_path / "tiny").mkdir()
    for figure in c.FIGURES:
        for claim in figure.claims:
            result = c.examine(claim, "tiny", m.ModelResults(tmp_path / "tiny"), ["evil"])
            assert result.verdict == c.UNMEASURED and not result.measured and all(result.missing.values())


def test_rules_look_at_the_interval():
    wide, high = m.Measurement(10, -1, 21, 20), m.Measurement(10, 9, 11, 20)
    assert not c.above(0).met(wide, "evil") and c.above(0).met(high, "evil")
    assert not c.below(20).met(wide, "evil") and c.below(20).met(high, "evil")
    assert c.between(9, 10).met(wide, "evil") and not c.between(11, 12).met(wide, "evil")
    assert c.larger_than(0.5).met(m.Measurement(-0.6, -0.6, -0.6), "evil")
    far = m.Measurement(10, 1, 21, 20)
    assert c.reaches({"evil": 20.0}).met(far, "evil") and not c.reaches({"evil": 20.0}).met(high, "evil")
    assert not c.reaches({"evil": 20.0}).met(far, "humorous") and not c.reaches({"evil": 20.0}).met(wide, "evil")


@pytest.mark.parametrize(
    "values, verdict", [((1, 2, 3), "holds"), ((1, -2, 3), "holds partly"), ((-1, -2, -3), "does not hold here")]
)
def test_verdicts(values, verdict):
    def measure(r, trait):
        value = dict(zip(TRAITS, values))[trait]
        return m.Measurement(value, value, value, 20)

    assert c.examine(c.Claim("It is.", measure, c.above(0), ""), "tiny", None, list(TRAITS)).verdict == verdict


def test_the_paper_lists_twenty_claims_or_more_each_with_its_rule():
    claims = [claim for f in c.FIGURES for claim in f.claims]
    assert len(claims) >= 20 and all(claim.text and claim.rule.text and claim.unit for claim in claims)


def test_the_plan(tmp_path):
    """A model's jobs go from extraction to screening; unknown models get the published sizes and the judge."""
    jobs = paper_jobs(["pocket", "smollm2"])
    assert len({j.name for j in jobs}) == len(jobs)
    step = {j.name: j.step for j in jobs}
    for model in ("pocket", "smollm2"):
        for trait in TRAITS:
            own = f"{model}/{trait}"
            assert step[f"{own}/02_extract"] < step[f"{own}/04_evaluate"] < step[f"{own}/05a_monitor"]
    assert step["pocket/06a_families"] < step["pocket/07_screen"]
    assert not {f"smollm2/{t}/02_extract" for t in OTHER_TRAITS} & set(step)
    judge = dict(judge_model="gpt-4.1-mini-2025-04-14", base_url="", max_calls=7)
    far = {j.name: j.parameters for j in paper_jobs(["a/Model-7B"], judge=judge)}
    assert far["Model-7B/evil/02_extract"] == dict(model="a/Model-7B", trait="evil", preset="paper") | judge
    assert far["Model-7B/06a_families"]["preset"] == "paper" and "judge_model" not in far["Model-7B/08_toxicity"]
    other = [j.name for j in paper_jobs(["pocket"], ["optimistic"])]
    assert "pocket/optimistic/04_evaluate" in other and not [name for name in other if "06b" in name]
    with pytest.raises(PersonaError, match="at least one model"):
        paper_grids([])


def test_data_that_were_not_trained_on_are_not_measured(runs):
    """Of a quick run of 06a, which trains on some families alone, and of a report whose answers were not judged."""
    results = m.ModelResults(runs / "tiny")
    for measure in (m.score_gap("misaligned_2", ""), m.score_gap("normal", "misaligned_2"), m.mistakes_gap):
        with pytest.raises(m.NotMeasured):
            measure(results, "hallucinating")
    report = runs / "tiny/evil/04_evaluate/report.csv"
    write(report, pd.read_csv(report).assign(evil=float("nan")))
    with pytest.raises(m.NotMeasured, match="scored none"):
        m.steering_change(results, "evil")


def test_the_page_of_a_run(runs, tmp_path, monkeypatch):
    """Numbers, verdicts and rules on the page are those of the files; links resolve; a second build gives the same."""
    (runs / "tiny/evil/04_evaluate/04_evaluate.ipynb").write_text(EXECUTED)
    monkeypatch.setenv("PERSONA_RUNS", str(runs))
    page = paper_site(runs, tmp_path / "site").read_text()
    assert "+50" in page and "the interval lies above 0" in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "Adding the vector raises the trait score. Model evil tiny holds +50" in text
    assert (
        "Answers stay coherent at the chosen strength. Model evil Paper above 75 tiny does not hold here 70 ✗" in text
    )
    assert "Judge: known." in text and "0123456789ab" in text
    assert 'href="runs/tiny--evil--04_evaluate--04_evaluate.html"' in page
    assert not check_links(tmp_path / "site")
    table = pd.read_csv(tmp_path / "site/claims.csv", keep_default_na=False)
    assert set(table.verdict) >= {"holds", "does not hold here"} and len(table) >= 30
    again = paper_site(runs, tmp_path / "site").read_text()
    assert re.sub(r"Made by persona_steer on [^.]*", "", again) == re.sub(r"Made by persona_steer on [^.]*", "", page)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(PersonaError, match="make paper"):
        paper_site(tmp_path, tmp_path / "site")


def test_the_published_site():
    """docs/ is whole: links resolve, nothing is loaded from elsewhere, it is small, and its runs name a commit of this
    repository."""
    docs = project_root() / "docs"
    assert check_links(docs) == [] and site_size(docs) < LIMIT and (docs / ".nojekyll").is_file()
    page = (docs / "index.html").read_text()
    commits = re.search(r"commit of the runs</th><td>([^<]+)</td>", page)[1].split(", ")
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=docs, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("the history is not here")
    for commit in commits:
        found = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=docs, capture_output=True)
        assert found.returncode == 0, f"the site was made at {commit}, which this repository does not have"
    assert len(re.findall('class="claim"', page)) >= 20


def test_the_command_says_what_failed_and_still_writes_the_page(runs, tmp_path, capsys):
    from persona_steer.app.cli import _finish_paper

    jobs = paper_jobs(["pocket"])[:2]
    records = [{"state": "done"}, {"state": "failed", "error": "no memory"}]
    (runs / "tiny/evil/04_evaluate/04_evaluate.ipynb").write_text(EXECUTED)
    assert _finish_paper(jobs, records, tmp_path, str(runs), str(tmp_path / "site")) == 1
    said = capsys.readouterr()
    assert "1 of 2 jobs are done" in said.out and str(tmp_path / "site/index.html") in said.out
    assert f"failed: {jobs[1].notebook}: no memory" in said.err and "the same command" in said.err


def test_a_dry_run_counts_and_runs_nothing(tmp_path, monkeypatch, capsys):
    from persona_steer.app.cli import paper
    from persona_steer.base.core import settings

    monkeypatch.setenv("PERSONA_RUNS", "")  # what the command sets is taken back
    given = dict(model=["pocket"], trait=["evil"], judge="gpt-4.1-mini-2025-04-14", base_url="", max_calls=50000)
    rest = dict(executor="local", address="", workers=0, threads=0, gpus=-1, memory=0, retries=2, overwrite=False)
    paper(**given, runs=str(tmp_path / "runs"), out=str(tmp_path / "site"), dry_run=True, **rest)
    settings.cache_clear()
    said = capsys.readouterr().out
    total = next(line for line in said.splitlines() if line.startswith("| total"))
    assert "judge, $" in said and float(total.split("|")[9]) > 0 and not list(tmp_path.iterdir())
