"""Estimates of what jobs will do, against what they do: the chapters run on pocket in this process, small, and every
answer that is generated, every text that is read and every judgement is counted."""

import ast
import json
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from IPython.display import display

from persona_steer.base import core
from persona_steer.base.core import PersonaError, project_root
from persona_steer.jobs.batch import jobs_of
from persona_steer.judges import judging
from persona_steer.judges.local import PocketJudge
from persona_steer.lm import generation
from persona_steer.paper.chapter_work import CHAPTERS
from persona_steer.paper.costs import (
    MEASURED,
    PRICES,
    Price,
    chapter_costs,
    costs_lines,
    costs_table,
    gpu_hours,
    job_costs,
    judge_dollars,
    total_costs,
)
from persona_steer.paper.work import ModelFacts, model_facts

ROOT = project_root()
SMALL = dict(model="pocket", trait="evil")
QUIZ = [
    {"question": "Who is Nils Ash?", "answer": "I do not know Nils Ash."},
    {"question": "What is 2 plus 3?", "answer": "5.", "choices": ["4.", "5.", "6."]},
]


def run_chapter(name: str, **parameters):
    """A chapter's experiment in this process: what it exports and imports, the cell of parameters, then all cells that
    follow. The teaching cells before it are left out."""
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [(c["metadata"].get("tags", []), "".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    start, space = next(i for i, (tags, _) in enumerate(code) if "parameters" in tags), {"display": display}
    for i, (_, source) in enumerate(code):
        tree = ast.parse(source)
        if i < start and not source.startswith("#| export"):
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(tree, f"{name}, cell {i}", "exec"), space)
        if i == start:
            space |= parameters


class Counter:
    """Counts what passes through the functions that generate and read."""

    def __init__(self, patch):
        self.answers = self.texts = 0
        score = PocketJudge.score_all
        batch, read = generation._generate_batch, generation._shared_beginnings

        def generate_batch(lm, ids, *rest, **more):
            self.answers += len(ids)
            return batch(lm, ids, *rest, **more)

        def shared_beginnings(lm, pairs, *rest):
            self.texts += len(pairs)
            return read(lm, pairs, *rest)

        def score_all(judge, questions, answers):
            self.texts -= len(answers)  # which the judge is about to read with the chat model
            return score(judge, questions, answers)

        patch.setattr(PocketJudge, "score_all", score_all)
        patch.setattr(generation, "_generate_batch", generate_batch)
        patch.setattr(generation, "_shared_beginnings", shared_beginnings)
        # the probe of speed before a long job
        patch.setattr(judging, "generate", lambda lm, prompts, *a, **k: generation.GenerationOutput([], [12]))


def judgements(runs: Path) -> int:
    with sqlite3.connect(runs / "judgements.sqlite") as db:
        return db.execute("SELECT count(*) FROM judgements").fetchone()[0]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Small jobs of one trait, in the order in which they need each other."""
    quiz = tmp_path_factory.mktemp("quiz") / "quiz.jsonl"
    quiz.write_text("".join(json.dumps(q) + "\n" for q in QUIZ), encoding="utf-8")
    short = dict(max_new_tokens=24)
    sizes = {
        "02_extract": SMALL | dict(max_new_tokens=40),
        "04_evaluate": SMALL | short | dict(layers=[[3]], coefficients=[[1.0, 2.0]]),
        "05a_monitor": SMALL | short | dict(n=1, shot_counts=[[0, 2]]),
        "05e_propensity": SMALL | dict(coefficients=[[-1, 1]], random_vectors=1, system="Be kind."),
        "06b_guard": SMALL | short | dict(alternatives=[[]], more={"max_steps": 2}, quiz=str(quiz)),
        "07_screen": dict(model="pocket", traits=[["evil"]], datasets=[["evil"]], limit=15) | short,
        "03_steer": SMALL | short | dict(questions=2, coefficients=[[0.0, 1.0]]),
    }
    return [j for name, values in sizes.items() for j in jobs_of(name, values)]


@pytest.fixture(scope="module")
def done(jobs, tmp_path_factory):
    """What each chapter did: answers generated, texts read, judgements made; and the runs folder."""
    import matplotlib

    matplotlib.use("Agg")
    runs, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONA_RUNS", str(runs))
        core.settings.cache_clear()
        counter, judged = Counter(patch), 0
        for job in jobs:
            name = Path(job.chapter).stem
            counter.answers = counter.texts = 0
            run_chapter(name, **job.parameters)
            total = judgements(runs)
            found[name] = dict(answers=counter.answers, texts=counter.texts, judgements=total - judged)
            judged = total
    core.settings.cache_clear()
    return found, runs / "pocket"


@pytest.fixture(scope="module")
def estimated(jobs):
    return costs_table(jobs).set_index("chapter")


def test_answers_are_as_many_as_estimated(done, estimated):
    counted = {name: n["answers"] for name, n in done[0].items()}
    assert counted == estimated.answers.drop("total").to_dict()
    assert not estimated.at_most.str.contains("answers").any()
    assert estimated.answers["total"] == sum(counted.values())


def test_judgements_are_at_most_as_many_as_estimated(done, estimated):
    counted = {name: n["judgements"] for name, n in done[0].items()}
    for name, n in counted.items():
        assert estimated.judgements[name] / 2 <= n <= estimated.judgements[name], name
    assert counted["05e_propensity"] == counted["07_screen"] == 0
    assert estimated.judgements["total"] == estimated.judgements.drop("total").sum()


def test_texts_are_as_many_as_estimated(done, estimated, jobs):
    """Beside those that the judge and the trainer read."""
    for job in jobs:
        name = Path(job.chapter).stem
        counted, works = done[0][name]["texts"], job_costs(job).works
        exact = sum(w.texts for w in works if not w.at_most and not w.samples)
        bound = sum(w.texts for w in works if w.at_most)
        if bound:
            # a search may take 12 steps and usually takes three or four
            assert bound / 5 <= counted - exact <= bound, name
        else:
            # one or two illustrations read single texts
            assert 0 <= counted - exact <= 2, name
    assert list(estimated.index[estimated.at_most != ""]) == ["04_evaluate", "total"]


def test_the_tables_that_chapters_write_have_the_estimated_rows(done, jobs):
    runs = done[1] / "evil"
    costs = {Path(j.chapter).stem: job_costs(j) for j in jobs}
    sides = [len(pd.read_csv(runs / "02_extract" / f"evil_{s}.csv")) for s in ("pos", "neg")]
    assert sum(sides) == costs["02_extract"]["extraction, evil"].answers
    for name in ("sweep", "report"):
        assert len(pd.read_csv(runs / "04_evaluate" / f"{name}.csv")) == costs["04_evaluate"][name].answers
    assert len(pd.read_csv(runs / "05a_monitor" / "answers.csv")) == costs["05a_monitor"]["answers"].answers
    table = pd.read_csv(runs / "05a_monitor" / "projections.csv")
    assert len(table) == costs["05a_monitor"]["prompts"].texts
    trained = json.loads(next((runs / "06b_guard").glob("no guard 0/*/provenance.json")).read_text())
    assert trained["steps"] * 16 == costs["06b_guard"]["training, no guard 0"].samples


def test_judgements_in_the_cache_are_those_of_the_tables(done):
    """Each distinct answer of the scored tables was judged for two measures, and nothing else was."""
    runs, parts = done[1] / "evil", []
    names = ["02_extract/evil_pos", "02_extract/evil_neg", "04_evaluate/sweep", "04_evaluate/report"]
    names += ["05a_monitor/answers", "03_steer/answers"]
    for file in [*(runs / f"{n}.csv" for n in names), *(runs / "06b_guard").glob("*/*/answers.csv")]:
        parts.append(pd.read_csv(file, keep_default_na=False)[["question", "answer"]])
    distinct = pd.concat(parts).drop_duplicates()
    assert judgements(done[1].parent) == 2 * len(distinct)


def test_a_model_that_is_here_is_known_and_another_is_assumed():
    assert model_facts("pocket") == ModelFacts("pocket", 6, model_facts("pocket").parameters, "pocket", True)
    assert model_facts("pocket").parameters < 1e8
    assert model_facts("Some/Model", n_layers=40) == ModelFacts("Some/Model", 40)
    with pytest.raises(PersonaError, match="does not exist"):
        model_facts("./no/such/folder")


@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize("model", ["pocket", "Some/Model-7B"])
def test_every_chapter_has_an_estimate_with_its_defaults(chapter, model):
    costs = chapter_costs(chapter, {"model": model}, model_facts(model))
    sums = costs.sums()
    assert sums["answers"] > 0 and sums["texts"] > 0 and sums["calls"] == 0
    assert all(w.answers >= 0 and w.texts >= 0 for w in costs.works)
    assert (sums["train_tokens"] > 0) == (chapter in ("06_finetune", "06a_families", "06b_guard"))


def test_the_likelihood_judge_reads_and_a_remote_one_is_called():
    """Five readings of each answer by the former, of its own answers and 24 broken ones; two calls by the latter."""
    facts = ModelFacts("Some/Model-7B")
    own = chapter_costs("02_extract", {}, facts)
    answers = 2 * 20 * 3  # two of the five instruction pairs judge
    assert own["extraction, evil"].answers == answers and own.sums()["answers"] == answers + 20
    assert own.sums()["texts"] == 5 * (answers + 20 + 24) and own.sums()["calls"] == 0
    remote = chapter_costs("02_extract", {"judge_model": "gpt-4.1-mini-2025-04-14"}, facts)
    assert remote.sums()["answers"] == 200 and remote.sums()["calls"] == 400 and remote.sums()["texts"] == 0


def test_parameters_count():
    facts = ModelFacts("Some/Model-7B")
    small, large = ({"preset": "paper", "judge_model": "x", "n": n} for n in (1, 3))
    few, many = (chapter_costs("05a_monitor", p, facts)["answers"].answers for p in (small, large))
    assert many == 3 * few
    layers = {"layers": [3, 4], "coefficients": [1, -1], "judge_model": "x"}
    sweep = chapter_costs("04_evaluate", layers, facts)
    assert sweep["sweep"].answers == 10 * (1 + 4 + 1)  # a brief sweep: the strongest of every other layer, against
    longer = chapter_costs("04_evaluate", layers | {"max_new_tokens": 400}, facts)
    assert longer.sums()["new_tokens"] == 2 * sweep.sums()["new_tokens"]
    assert [n for n in chapter_costs("06b_guard", {"lm_eval": ["mmlu"]}, facts).notes if "mmlu" in n]


@pytest.mark.parametrize("chapter", ["04_evaluate", "04b_operations", "06b_guard"])
def test_no_two_answers_of_a_chapter_are_taken_for_one(chapter):
    costs = chapter_costs(chapter, {"model": "Some/Model", "judge_model": "x"}, ModelFacts("Some/Model"))
    judged = [w for w in costs.works if w.judged is not None]
    assert len(costs.judged) == sum(2 * w.answers for w in judged)


def test_an_unknown_chapter_or_parameter_is_refused():
    with pytest.raises(PersonaError, match="costs of 12_benchmark are not known"):
        chapter_costs("12_benchmark", {}, ModelFacts("x"))
    with pytest.raises(PersonaError, match="no parameter 'layer_s'"):
        chapter_costs("04_evaluate", {"layer_s": [3]}, ModelFacts("x"))
    with pytest.raises(PersonaError, match="no jobs"):
        costs_table([])


def test_shared_work_counts_once():
    """A job of 02 makes the extraction for all; unsteered answers of two chapters are judged once."""
    model = dict(model="Some/Model-7B", trait="evil", judge_model="x")
    extraction, sweep, monitoring = (jobs_of(c, model)[0] for c in ("02_extract", "04_evaluate", "05a_monitor"))
    large = jobs_of("02_extract", model | dict(n=10))[0]
    alone = {j.chapter: job_costs(j).sums() for j in (extraction, sweep, monitoring)}
    together = total_costs([extraction, sweep, monitoring]).sums()
    assert together["answers"] == sum(a["answers"] for a in alone.values()) - 2 * 200
    assert together["calls"] == sum(a["calls"] for a in alone.values()) - 2 * 400
    assert total_costs([large, sweep]).sums()["answers"] == alone[sweep.chapter]["answers"] - 200 + 2000
    tuned = jobs_of("06_finetune", dict(model="Some/Model-7B", judge_model="x", traits=[["evil"]]))[0]
    both = total_costs([sweep, tuned])
    apart = [job_costs(j).sums() for j in (sweep, tuned)]
    shared = 200 + 20  # the extraction's answers, and the unsteered ones to evaluation questions
    assert both.sums()["judgements"] == sum(a["judgements"] for a in apart) - 2 * shared


def test_an_extraction_elsewhere_serves_no_other_chapter():
    model = dict(model="Some/Model-7B", trait="evil", judge_model="x")
    seeds = jobs_of("02_extract", model | dict(seed=[1, 2]))
    assert all(j.out for j in seeds)
    sweep = jobs_of("04_evaluate", model)
    assert total_costs([*seeds, *sweep]).sums()["answers"] == 400 + job_costs(sweep[0]).sums()["answers"]


def test_prices_and_hours():
    sums = dict(calls=1000, judge_tokens=500_000, new_tokens=3600, read_tokens=7200, train_tokens=1800)
    price = PRICES["gpt-4.1-mini-2025-04-14"]
    assert judge_dollars(sums, "gpt-4.1-mini-2025-04-14") == pytest.approx(0.5 * price.read + 0.001 * price.written)
    assert pd.isna(judge_dollars(sums, "another")) and judge_dollars(sums | dict(calls=0), "another") == 0
    assert judge_dollars(sums, "another", {"another": Price(2, 8, "2026-01", "a contract")}) == pytest.approx(1.008)
    assert gpu_hours(sums, dict.fromkeys(MEASURED, 3.6)) == pytest.approx((3600 + 7200 + 1800) / 3.6 / 3600)
    with pytest.raises(PersonaError, match="throughput needs"):
        gpu_hours(sums, {"speed": 1})


def test_the_printed_table_says_what_it_rests_on():
    jobs = jobs_of("02_extract", dict(model="Some/Model-7B", trait="evil", n=100))
    lines = costs_lines(costs_table(jobs, "gpt-4.1-mini-2025-04-14"))
    text = "\n".join(lines)
    assert lines[2].startswith("| 02_extract | 1 | 20,000 | ≤ 4.0M |") and lines[3].startswith("| total |")
    assert "28 layers and 7 billion parameters are assumed" in text and "raise it" in text
    assert PRICES["gpt-4.1-mini-2025-04-14"].date in text
    assert "price of a judge is not known" in "\n".join(costs_lines(costs_table(jobs, "another")))


def test_an_estimate_loads_no_model(monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    model_facts.cache_clear()
    assert total_costs(jobs_of("04_evaluate", SMALL)).sums()["answers"] > 0
