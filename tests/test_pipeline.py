"""Extraction, evaluation, resuming, the notebooks as jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer import extraction
from persona_steer.base.core import PersonaError, project_root, settings
from persona_steer.evaluation import choose, generate_and_score, report_rows, summarise, sweep_rows
from persona_steer.extraction import diagnose, extract, extract_from_scores, extraction_rows
from persona_steer.judges.judging import Judge
from persona_steer.judges.loading import load_judge
from persona_steer.lm import generation
from persona_steer.lm.activations import POOLS
from persona_steer.lm.generation import SamplingParams
from persona_steer.lm.tables import condition_rows, generate_table, table_steering
from persona_steer.persona.scores import auc
from persona_steer.persona.traits import load_trait

ROOT = project_root()


@pytest.fixture(scope="session")
def judge():
    return load_judge("pocket")


@pytest.fixture(scope="session")
def evil():
    return load_trait("evil", world="pocket")


@pytest.fixture(scope="session")
def small(evil):
    """Evil with few questions, so that a test is quick."""
    from dataclasses import replace

    return replace(evil, extract_questions=evil.extract_questions[:4], eval_questions=evil.eval_questions[:4])


def test_rows_of_both_signs_are_pairs_in_the_published_order(pocket, evil):
    pos, neg = extraction_rows(pocket, evil, "pos", 2), extraction_rows(pocket, evil, "neg", 2)
    assert len(pos) == len(neg) == 200 and (pos.question == neg.question).all()
    assert (
        pos.question_id[0] == "evil_0_pos_0"
        and pos.question_id[2] == "evil_0_pos_1"
        and neg.question_id[199] == "evil_19_neg_4"
    )
    assert not set(pos.seed) & set(neg.seed) and pos.seed.nunique() == 200


def test_extraction_while_generating_equals_extraction_from_its_csv(pocket, judge, small, tmp_path):
    a = extract(pocket, small, judge, sampling=SamplingParams(60), out=tmp_path / "a")
    b = extract_from_scores(pocket, small, tmp_path / "a/evil_pos.csv", tmp_path / "a/evil_neg.csv", out=tmp_path / "b")
    assert (a.kept == b.kept).all() and a.kept.sum() >= 10
    for k in POOLS:
        torch.testing.assert_close(getattr(a.vectors, k), getattr(b.vectors, k), rtol=1e-3, atol=1e-3)
        # the last prompt token is the same on both sides: row 0 is zero
        rows = slice(1, None) if k == "prompt_last" else slice(None)
        assert torch.cosine_similarity(getattr(a.vectors, k)[rows], getattr(b.vectors, k)[rows], dim=-1).min() > 0.9999
    m = json.loads((tmp_path / "a/evil_vectors.json").read_text())
    assert (
        m["pairs_made"] == 20
        and m["pairs_kept"] == a.kept.sum()
        and m["fingerprint"] == pocket.fingerprint
        and m["sampling"]["seed"] == 0
    )
    assert list(pd.read_csv(tmp_path / "a/evil_pos.csv"))[:6] == [
        "question",
        "prompt",
        "answer",
        "question_id",
        "evil",
        "coherence",
    ]


def test_what_is_done_is_not_done_again_unless_inputs_change(pocket, judge, small, tmp_path, monkeypatch):
    first = extract(pocket, small, judge, sampling=SamplingParams(40), out=tmp_path)
    calls = []
    real = generation._generate_batch
    monkeypatch.setattr(generation, "_generate_batch", lambda *a: calls.append(1) or real(*a))
    again = extract(pocket, small, judge, sampling=SamplingParams(40), out=tmp_path)
    assert (
        not calls
        and torch.equal(first.vectors.response_avg, again.vectors.response_avg)
        and (first.kept == again.kept).all()
    )
    other = extract(pocket, small, judge, sampling=SamplingParams(40, seed=1), out=tmp_path)
    assert calls and not torch.equal(first.vectors.response_avg, other.vectors.response_avg)


def test_a_judge_elsewhere_works_while_the_next_answers_are_written(pocket, small, runs, tmp_path, monkeypatch):
    negative, seen, real = threading.Event(), [], extraction.generate_table

    class Sides(Judge):
        """High for whatever it is asked first."""

        def __init__(self, name, billable):
            self.name, self.billable, self.calls = name, billable, 0

        def judge(self, requests):
            self.calls += 1
            seen.append((self.name, negative.wait(60), threading.current_thread() is threading.main_thread()))
            for i, item in enumerate(requests):
                yield i, 90.0 if item.measure == "coherence" or self.calls == 1 else 10.0, True

    def generate_table(*a):
        if a[-1].endswith("neg"):
            negative.set()
        return real(*a)

    monkeypatch.setattr(extraction, "generate_table", generate_table)
    beside = extract(pocket, small, Sides("elsewhere", True), sampling=SamplingParams(20), out=tmp_path / "a")
    assert seen == [("elsewhere", True, False)] * 2  # the first side in a thread of its own, after the second had begun
    alone = extract(pocket, small, Sides("here", False), sampling=SamplingParams(20), out=tmp_path / "b")
    assert seen[2:] == [("here", True, True)] * 2
    assert torch.equal(beside.vectors.response_avg, alone.vectors.response_avg) and list(
        beside.neg[small.name]
    ) == list(alone.neg[small.name])


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(pocket, judge, small, tmp_path, monkeypatch):
    monkeypatch.setattr(settings(), "batch_tokens", 700)  # several batches
    monkeypatch.setattr(extraction, "work_line", lambda *a: "")  # its probe generates, too
    whole = extract(pocket, small, judge, sampling=SamplingParams(40), out=tmp_path / "whole")
    real, calls = generation._generate_batch, []

    def stop_after(n):
        def batch(*a):
            calls.append(1)
            if len(calls) > n:
                raise KeyboardInterrupt
            return real(*a)

        return batch

    for n in (2, 3):
        calls.clear()
        monkeypatch.setattr(generation, "_generate_batch", stop_after(n))
        with pytest.raises(KeyboardInterrupt):
            extract(pocket, small, judge, sampling=SamplingParams(40), out=tmp_path / "cut")
        assert not list((tmp_path / "cut").glob("*.pt"))  # nothing half-written
    calls.clear()
    monkeypatch.setattr(generation, "_generate_batch", lambda *a: calls.append(1) or real(*a))
    resumed = extract(pocket, small, judge, sampling=SamplingParams(40), out=tmp_path / "cut")
    parts = sum("judge" not in p.parent.name for p in (tmp_path / "whole/.parts").rglob("*.json"))
    assert len(calls) == parts - 5  # five batches were there already
    assert (resumed.pos.answer == whole.pos.answer).all() and torch.equal(
        resumed.vectors.response_avg, whole.vectors.response_avg
    )


KILLED = """
import sys
from persona_steer.base.core import settings
from persona_steer.extraction import extract
from persona_steer.lm.generation import SamplingParams
from persona_steer.judges.loading import load_judge
from persona_steer.lm.models import load_model
from persona_steer.persona.traits import load_trait
settings().batch_tokens = 1500
lm, judge = load_model("pocket"), load_judge("pocket")
e = extract(lm, load_trait("evil", world="pocket"), judge, sampling=SamplingParams(40), out=sys.argv[1])
"""


def test_a_run_that_is_killed_goes_on(tmp_path):
    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / out)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PERSONA_RUNS": str(tmp_path / out / "runs")},
        )

    run = start("cut")
    deadline = time.time() + 120
    while len(list((tmp_path / "cut").rglob("*.json"))) < 2 and time.time() < deadline and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not list((tmp_path / "cut").glob("*.pt"))
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*.json")}
    assert start("cut").wait() == 0 and start("whole").wait() == 0
    assert all(p.stat().st_mtime_ns == t for p, t in there.items())
    for name in ("evil_pos.csv", "evil_neg.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    a, b = (torch.load(tmp_path / x / "evil_response_avg_diff.pt", weights_only=True) for x in ("cut", "whole"))
    assert torch.equal(a, b)


def test_no_pair_left_leaves_no_vectors(pocket, judge, small, tmp_path):
    with pytest.raises(PersonaError, match="no pair is left.*threshold"):
        extract(pocket, small, judge, sampling=SamplingParams(2, temperature=0), threshold=100, out=tmp_path)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*_vectors.json"))


def test_an_empty_csv_is_refused_before_the_model_runs(pocket, evil, tmp_path):
    for s in ("pos", "neg"):
        (tmp_path / f"{s}.csv").write_text("question,prompt,answer,question_id,evil,coherence\n")
    with pytest.raises(PersonaError, match="no rows"):
        extract_from_scores(pocket, evil, tmp_path / "pos.csv", tmp_path / "neg.csv", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_diagnostics_tell_signal_from_noise():
    torch.manual_seed(0)
    noise, shift = torch.randn(60, 3, 32), torch.zeros(3, 32)
    shift[1, 0], shift[2, 0] = 1.0, 6.0
    d = diagnose(noise + shift, torch.randn(60, 3, 32))
    assert d.split_half[2] > 0.95 > d.split_half[0] and abs(d.split_half[0]) < 0.3
    assert d.d_prime[2] > 4 > 2 > max(d.d_prime[0], d.d_prime[1]) and abs(d.d_prime[0]) < 0.6
    assert diagnose(noise[:3], noise[:3]).d_prime.isna().all()


def test_a_sweep_in_one_batch_equals_one_run_per_point(pocket, small):
    v = torch.randn(pocket.n_layers + 1, pocket.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = sweep_rows(small.eval_questions, [2, 4], [1.0, 2.0])
    together = generate_table(pocket, rows, SamplingParams(20), table_steering(pocket, rows, {"trait": v}))
    assert len(rows) == 4 * (1 + 4)
    for (layer, c), g in together.groupby(["layer", "coefficient"]):
        point = condition_rows(small.eval_questions, vector="trait", layer=int(layer), coefficient=c)
        alone = generate_table(pocket, point, SamplingParams(20), table_steering(pocket, point, {"trait": v}))
        assert alone.answer.tolist() == g.answer.tolist()
    unsteered = generate_table(pocket, condition_rows(small.eval_questions), SamplingParams(20))
    assert unsteered.answer.tolist() == together[together.coefficient == 0].answer.tolist()


def test_layer_is_chosen_on_extraction_and_reported_on_evaluation_questions(evil):
    chosen_on, reported_on = (
        set(sweep_rows(evil.extract_questions, [1], [1.0]).question),
        set(report_rows(evil, 1, [1.0]).question),
    )
    assert not chosen_on & reported_on and reported_on == set(evil.eval_questions)
    conditions = set(report_rows(evil, 1, [1.0]).condition)
    assert {
        "unsteered",
        "steered",
        "random vector",
        "plain prompt",
        "positive instructions",
        "negative instructions",
    } == conditions


def test_missing_judgements_stay_missing(pocket, small):
    class Shy(Judge):
        name = "shy"

        def judge(self, requests):
            for i, item in enumerate(requests):
                yield (
                    i,
                    90.0
                    if item.measure == "coherence"
                    else np.nan
                    if small.eval_questions.index(item.question) % 2
                    else 80.0,
                    True,
                )

    f = generate_and_score(
        pocket, small, Shy(), condition_rows(small.eval_questions, "unsteered"), {}, SamplingParams(4)
    )
    s = summarise(f, "evil").iloc[0]
    assert s.trait == 80 and s.trait_n == 2 and s.trait_missing == 2


def test_a_trait_that_the_judge_does_not_know_ends_before_generation(pocket, judge, small, tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(generation, "_generate_batch", lambda *a: pytest.fail("generated"))
    for run in (
        lambda t: extract(pocket, t, judge, out=tmp_path),
        lambda t: generate_and_score(pocket, t, judge, condition_rows(["q"]), {}, folder=tmp_path),
    ):
        with pytest.raises(PersonaError, match="not 'kind'"):
            run(replace(small, name="kind"))


def test_choice_respects_the_bound():
    s = pd.DataFrame(
        dict(
            condition="steered",
            layer=[1, 2, 3],
            coefficient=[1.0, 2.0, -1.0],
            trait=[20.0, 90.0, 99.0],
            coherence=[95.0, 85.0, 99.0],
            coherence_low=[93.0, 70.0, 98.0],
        )
    )
    back = pd.DataFrame(
        dict(
            condition="against instructions",
            layer=[3, 4, 5],
            coefficient=-2.0,
            trait=[60.0, 35.0, 1.0],
            coherence=[95.0, 90.0, 50.0],
            coherence_low=80.0,
        )
    )
    assert (
        choose(back, against=True)["layer"] == 4
        and choose(back.assign(trait=[60.0, 55.0, 70.0]), against=True)["layer"] == 4
    )
    assert choose(s)["layer"] == 1 and choose(s, 60)["layer"] == 2 and not choose(s, 99)["bound_met"]


# -- notebooks as jobs ------------------------------------------------------------------------------------------------


def papermill(cwd, notebook, out, runs, *parameters):
    args = [a for k, v in {"model": "pocket", **dict(parameters)}.items() for a in ("-p", k, str(v))]
    env = dict(os.environ, PERSONA_RUNS=str(runs))
    return subprocess.run(
        [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, str(out), *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


def test_chapters_run_from_the_root_and_from_nbs(tmp_path):
    for cwd, name in (
        (ROOT, "nbs/02_extract.ipynb"),
        (ROOT / "nbs", "03_steer.ipynb"),
        (ROOT, "nbs/04_evaluate.ipynb"),
    ):
        quick = {"04": [("layers", "[3, 4]"), ("coefficients", "[1.0, 2.0]")]}.get(Path(name).name[:2], [])
        done = papermill(cwd, name, tmp_path / Path(name).name, tmp_path / "runs", ("trait", "optimistic"), *quick)
        assert done.returncode == 0, done.stderr[-3000:]
    made = {
        p.relative_to(tmp_path / "runs").as_posix()
        for p in (tmp_path / "runs").rglob("*")
        if p.is_file() and ".parts" not in p.parts
    }
    assert {
        "pocket/optimistic/02_extract/optimistic_response_avg_diff.pt",
        "pocket/optimistic/02_extract/provenance.json",
        "pocket/optimistic/03_steer/answers.csv",
        "pocket/optimistic/04_evaluate/choice.json",
        "pocket/optimistic/04_evaluate/report.csv",
    } <= made
    choice = json.loads((tmp_path / "runs/pocket/optimistic/04_evaluate/choice.json").read_text())
    assert choice["layer"] in (3, 4)


@pytest.mark.parametrize(
    "parameters, words",
    [
        ([("trait", "kindly")], "trait 'kindly' is unknown"),
        ([("model", "./nowhere")], "model './nowhere' does not exist"),
        ([("preset", "large")], "preset 'large'"),
        ([("pos_csv", "x.csv")], "pos_csv and neg_csv"),
    ],
)
def test_bad_parameters_are_one_sentence_without_a_wall(tmp_path, parameters, words):
    done = papermill(ROOT, "nbs/02_extract.ipynb", tmp_path / "x.ipynb", tmp_path / "runs", *parameters)
    assert done.returncode != 0
    cells = json.loads((tmp_path / "x.ipynb").read_text())["cells"]
    error = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert len(error) == 1 and words in error[0]["evalue"] and len(error[0]["traceback"]) == 1
    assert not (tmp_path / "runs").exists()


def test_a_layer_out_of_range_ends_before_any_work(tmp_path):
    done = papermill(ROOT, "nbs/03_steer.ipynb", tmp_path / "x.ipynb", tmp_path / "runs", ("layer", 99))
    assert (
        done.returncode != 0
        and "layer 99 does not exist: pocket has layers 1 to 6" in done.stderr
        and not (tmp_path / "runs").exists()
    )


def test_help_reads_like_documentation():
    for name in ("02_extract", "03_steer", "04_evaluate"):
        text = subprocess.run(
            [sys.executable, "-m", "papermill", "--help-notebook", f"nbs/{name}.ipynb"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        lines = [l for l in text.splitlines() if re.match(r"\s+\w+: ", l)]
        assert len(lines) >= 10 and "trait: str (default \"evil\")" in text
        cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
        source = "".join(next(c for c in cells if "parameters" in c["metadata"].get("tags", []))["source"])
        for line in source.splitlines():
            name_, comment = line.split(":")[0], line.split("  # ")[1]
            assert comment.split(";")[0][:30] in text, f"{name_} is not explained"


def test_notebooks_hold_no_outputs():
    for p in (ROOT / "nbs").rglob("*.ipynb"):
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            assert not c.get("outputs") and not c.get("execution_count"), p.name


REFERENCE = ROOT.parent / "shared" / "reference"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published example files are not beside this checkout")
def test_vectors_from_published_scored_responses(pocket, tmp_path):
    from persona_steer.extraction import extract_from_scores
    from persona_steer.persona.scores import load_scores, save_scores

    trait = load_trait("evil", world="pocket")
    sides = {s: load_scores(REFERENCE / f"qwen3-4b_evil_{s}_head.csv", "evil") for s in ("pos", "neg")}
    n = min(map(len, sides.values()))
    for s, f in sides.items():
        # pocket reads 1,024 tokens
        short = f.head(n).assign(answer=f.answer.str.slice(0, 600), prompt=f.prompt.str.slice(-300))
        save_scores(short, tmp_path / f"{s}.csv", "evil")
    found = extract_from_scores(
        pocket, trait, tmp_path / "pos.csv", tmp_path / "neg.csv", threshold=1, out=tmp_path / "out"
    )
    v = torch.load(tmp_path / "out" / "evil_response_avg_diff.pt", weights_only=True)
    assert (
        v.dtype == torch.float32
        and v.shape == (pocket.n_layers + 1, pocket.hidden_size)
        and torch.isfinite(v).all()
        and found.kept.any()
    )


def test_a_table_that_does_not_fit_is_one_sentence(pocket):
    rows = condition_rows(["Why?"], vector="v", layer=2, coefficient=1)
    with pytest.raises(PersonaError, match="made of the same rows"):
        generate_table(pocket, rows, SamplingParams(4))
    with pytest.raises(PersonaError, match="no column 'seed'"):
        generate_table(pocket, rows.drop(columns="seed"), SamplingParams(4))
    with pytest.raises(PersonaError, match="one text"):
        condition_rows("Why?")
    with pytest.raises(PersonaError, match="asks for the vector 'v' but there are only w"):
        table_steering(pocket, rows, {"w": torch.zeros(1)})


def test_halves_are_split_by_question():
    """What a question's answers share must not pass for signal: the same question stands in one half only."""
    torch.manual_seed(0)
    questions = np.repeat(np.arange(12), 10)
    shared = 3 * torch.randn(12, 2, 32)[questions]  # differs by question, and points nowhere
    pos, neg = shared + torch.randn(120, 2, 32), torch.randn(120, 2, 32)
    by_pair, by_question = diagnose(pos, neg), diagnose(pos, neg, questions)
    assert (by_pair.split_half > 0.6).all() and (by_question.split_half.abs() < 0.35).all()
    assert (by_question.d_prime < by_pair.d_prime).all()
    assert diagnose(pos[:30], neg[:30], questions[:30]).split_half.isna().all()  # three questions


def test_an_auc_over_few_questions_is_less_certain():
    rng = np.random.default_rng(0)
    q = np.repeat(np.arange(6), 30)
    level = rng.normal(size=6)[q]
    good, bad = level + 0.2 * rng.normal(size=180), 0.3 + level + 0.2 * rng.normal(size=180)
    alone, grouped = auc(good, bad), auc(good, bad, good_groups=q, bad_groups=q)
    assert alone["auc"] == grouped["auc"] and grouped["low"] <= grouped["auc"] <= grouped["high"]
    unpaired = auc(good, bad + 3 * rng.normal(size=6)[q], good_groups=q, bad_groups=q)
    assert unpaired["high"] - unpaired["low"] > 2 * (alone["high"] - alone["low"])


def test_an_empty_filter_names_the_judge_each_count_and_the_parameters():
    from persona_steer.persona.scores import pair_mask

    rows = {"answer": ["a", "b"], "coherence": [10.0, 90.0], "judge": "likelihood (x)"}
    pos, neg = pd.DataFrame(rows | {"evil": [90.0, 10.0]}), pd.DataFrame(rows | {"evil": [5.0, 5.0]})
    with pytest.raises(PersonaError) as e:
        pair_mask(pos, neg, "evil")
    for words in (
        "judge: likelihood (x)",
        "1 positive answers score at least 50",
        "2 negative ones below 50",
        "parameter 'threshold'",
        "1 pairs have a coherence of at least 50",
        "parameter 'min_coherence'",
    ):
        assert words in str(e.value), words


def test_a_choice_that_met_no_bound_is_not_handed_on_in_silence(pocket, monkeypatch, tmp_path, capsys):
    from persona_steer.base.core import save_json
    from persona_steer.steering import default_coefficient, default_layer

    monkeypatch.setattr(settings(), "runs", tmp_path)
    choice = dict(layer=3, coefficient=2.0, bound_met=False, fingerprint=pocket.fingerprint)
    save_json(pocket.run_path("evil/04_evaluate/choice.json"), choice)
    assert "no point met the bound" in default_layer(pocket, "evil")[1]
    assert default_coefficient(pocket, "evil") == 2.0 and "no point of chapter 04 met" in capsys.readouterr().out


def test_what_an_example_shows_is_computed():
    from persona_steer.steering import change_line, scores_line

    few = pd.DataFrame({"condition": ["c = 0", "c = 0", "c = 2", "c = 2"], "evil": [0.0, 10.0, 80.0, 90.0]})
    assert scores_line(few, "evil") == "Mean evil score of 2 answers each: c = 0: 5, c = 2: 85."
    assert change_line(5, 85, "It") == "It rises from 5 to 85." and change_line(85, 5, "It") == "It falls from 85 to 5."
    assert change_line(50, 55, "It") == "It hardly changes: 50, then 55."
    assert "cannot be compared" in change_line(float("nan"), 5, "It")
