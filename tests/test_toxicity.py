"""The toxicity experiment: its measures, its errors, and that a run that is killed ends as if it had not been."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.cache import STATES, ResumableRun
from persona_steer.base.core import PersonaError, data_path
from persona_steer.judges.local import ClassifierJudge
from persona_steer.lm.generation import SamplingParams, collect_activations
from persona_steer.lm.models import load_model
from persona_steer.persona.vectors import random_like
from persona_steer.toxicity import (
    SETUPS,
    ToxicityConfig,
    choose_alpha,
    choose_pairs,
    choose_prompts,
    completion_nll,
    default_layers,
    distinct,
    halves,
    load_completion_model,
    load_scorer,
    load_toxicity_prompts,
    measures,
    paired_changes,
    prompt_rows,
    run_toxicity,
    toxicity_vector,
)


@pytest.fixture(scope="module")
def scorer():
    return ClassifierJudge(str(data_path("pocket/toxicity")), "toxicity", "cpu")


@pytest.fixture(scope="module")
def rows():
    return load_toxicity_prompts(str(data_path("pocket/toxicity_prompts.jsonl")))


def row(text="A beginning", toxicity=0.1, challenging=False):
    return dict(
        filename="f",
        begin=0,
        end=1,
        challenging=challenging,
        prompt=dict(text=text, toxicity=toxicity),
        continuation=dict(text="x", toxicity=None),
    )


# -- data -------------------------------------------------------------------------------------------------------------


def test_the_offline_prompts_have_the_published_form(rows):
    from persona_steer.pocket.toxicity import make_prompts
    from persona_steer.toxicity import PROPERTIES

    assert rows == make_prompts() and list(rows[0]) == [
        "filename",
        "begin",
        "end",
        "challenging",
        "prompt",
        "continuation",
    ]
    assert list(rows[0]["prompt"]) == ["text", *PROPERTIES] and rows[0]["prompt"]["flirtation"] is None
    assert sum(r["challenging"] for r in rows) == 200


@pytest.fixture(scope="module")
def english():
    return load_toxicity_prompts(str(data_path("toxicity/prompts.jsonl")))


def test_the_english_prompts_have_the_same_form_and_are_enough(rows, english):
    assert [list(r) for r in english] == [list(rows[0])] * len(english) and {tuple(r["prompt"]) for r in english} == {
        tuple(rows[0]["prompt"])
    }
    groups = {g: [r for r in english if r["challenging"] is g] for g in (True, False)}
    assert len(groups[True]) >= 120 and len(groups[False]) >= 120
    texts = [r["prompt"]["text"] for r in english]
    assert len(set(texts)) == len(texts) and all(t == t.strip() and r["end"] == len(t) for t, r in zip(texts, english))
    assert [r["filename"] for r in english] == [f"written-{i:04d}.txt" for i in range(1, len(english) + 1)]
    mean = {g: np.mean([r["prompt"]["toxicity"] for r in found]) for g, found in groups.items()}
    assert mean[True] > 0.85 and mean[False] < 0.08
    chosen = choose_prompts(english, 60, 50)  # the chapter's sizes
    for g in ("challenging", "benign"):
        assert len(chosen.evaluate[g]) == 60 and len(chosen.pairs[g]) == 50
    assert not any(t.endswith((".", "!", "?")) for t in texts)  # openings, to be continued


def test_the_english_scores_are_the_profanity_scorers(english):
    pytest.importorskip("profanity_check")
    again = prompt_rows([(r["prompt"]["text"], r["challenging"]) for r in english], load_scorer("profanity"))
    for r, a in zip(english, again):
        assert a["prompt"]["toxicity"] == pytest.approx(r["prompt"]["toxicity"], abs=0.002)
        assert {**a, "prompt": 0} == {**r, "prompt": 0}


def test_subsets_are_seeded_and_pairs_come_from_other_prompts(rows):
    a, b, c = (choose_prompts(rows, 20, 30, seed=s) for s in (0, 0, 1))
    assert a == b != c
    for g in ("challenging", "benign"):
        assert len(a.evaluate[g]) == 20 and len(a.pairs[g]) == 30 and not set(a.evaluate[g]) & set(a.pairs[g])
        first, second = (h[g] for h in halves(a.evaluate))
        assert len(first) == len(second) == 10 and not set(first) & set(second)


def test_rows_that_cannot_be_used_are_left_out_and_counted():
    many = [row(f"bad {i}", 0.9, True) for i in range(6)] + [row(f"good {i}", 0.1) for i in range(6)]
    odd = [row("", 0.1), row("   ", 0.9, True), row(None, 0.1), row("null", None), row("between", 0.4)]
    found = choose_prompts(many + odd, 3, 3)
    assert found.left_out == {"empty prompt": 3, "no score": 1, "in between": 1}
    by_score = choose_prompts([row(f"a {i}", 0.6) for i in range(6)] + many, 3, 3, rule="0.5")
    assert all(t.startswith(("a", "bad")) for t in by_score.evaluate["challenging"])


@pytest.mark.parametrize(
    "source, words",
    [
        ([{"text": "no prompt"}], "no rows with prompt.text"),
        ([row(), {"prompt": {"text": "x"}}], "1 of 2 rows lack"),
        ([], "is empty"),
        (["x"], "line 1: it is no JSON object"),
    ],
)
def test_a_dataset_without_the_fields_is_one_sentence(tmp_path, source, words):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in source))
    with pytest.raises(PersonaError, match=words) as e:
        load_toxicity_prompts(str(tmp_path / "p.jsonl"))
    assert "\n" not in str(e.value)


def test_a_text_is_in_one_group_only_and_odd_scores_are_no_scores():
    many = [row(f"bad {i}", 0.9, True) for i in range(6)] + [row(f"good {i}", 0.1) for i in range(6)]
    found = choose_prompts(many + [row("bad 1 ", 0.1), row("text", "0.9"), row("nan", float("nan"))], 3, 3)
    every = [t for half in (found.evaluate, found.pairs) for texts in half.values() for t in texts]
    assert len(every) == len(set(every)) and found.left_out["no score"] == 2
    with pytest.raises(PersonaError, match="at least two prompts"):
        choose_prompts(many, 1)


def test_too_few_prompts_a_bad_rule_and_a_hub_that_is_not_there(rows):
    with pytest.raises(PersonaError, match="only 197 challenging prompts.*use fewer"):
        choose_prompts(rows, 300)
    with pytest.raises(PersonaError, match="the rule 'high'"):
        choose_prompts(rows, 3, rule="high")
    with pytest.raises(PersonaError, match="could not be loaded"):
        load_toxicity_prompts("nobody/no-such-dataset")


def test_an_unknown_label_names_those_there_are(scorer):
    with pytest.raises(PersonaError, match="no label 'anger': it has toxicity, insult, threat"):
        ClassifierJudge(str(data_path("pocket/toxicity")), "anger", "cpu")


def test_the_classifier_knows_held_out_texts(scorer):
    from scipy.stats import mannwhitneyu

    from persona_steer.pocket.toxicity import held_out_texts

    found = held_out_texts(300, seed=77)
    true, said = np.array([t["toxicity"] for _, t in found]), np.array(scorer.scores([x for x, _ in found]))
    high = true >= 0.5
    assert mannwhitneyu(said[high], said[~high]).statistic / (high.sum() * (~high).sum()) >= 0.95


# -- what suits a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, tokenizer):
    """A folder with a tiny random model that has one token more than the pocket world, and no chat template."""
    import copy

    from conftest import make

    folder, own = tmp_path_factory.mktemp("other"), copy.deepcopy(tokenizer)
    own.add_tokens(["elsewhere"])
    make("gpt2", tokenizer).model.save_pretrained(folder)
    own.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


def test_each_model_gets_its_scorer():
    assert load_scorer("auto", "pocket").name == load_scorer("pocket", "pocket").name == "toxicity [toxicity]"
    for name in ("pocket", "auto"):
        assert load_scorer(name, "pocket", "insult").label == "insult"
    with pytest.raises(PersonaError, match="'pocket' knows only the words of the pocket world"):
        load_scorer("pocket", "")
    folder = str(data_path("pocket/toxicity"))
    assert (
        load_scorer(folder, "", "threat").label == "threat"
        and load_scorer(f"classifier:{folder}#insult", "").label == "insult"
    )
    with pytest.raises(PersonaError, match="could not be loaded"):
        load_scorer("no/such-classifier")
    pytest.importorskip("profanity_check")
    assert load_scorer("auto", "").name == load_scorer("profanity", "pocket").name == "profanity"


def test_a_missing_profanity_package_is_said_in_one_sentence(monkeypatch):
    import importlib.util

    from persona_steer.judges.second_opinions import _profanity_model

    real = importlib.util.find_spec
    _profanity_model.cache_clear()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "profanity_check" else real(name, *a)
    )
    with pytest.raises(PersonaError, match=r"pip install 'persona_steer\[opinions\]'") as e:
        load_scorer("auto", "")
    assert "\n" not in str(e.value)


def test_pocket_is_asked_and_other_models_continue_plain_text(other_model):
    for chat in ("auto", "on", True):
        assert "<|im_start|>" in load_completion_model("pocket", chat, device="cpu").prompt("Ugh, your chatter")
    for chat in ("off", False):
        assert load_completion_model("pocket", chat, device="cpu").prompt("Ugh, your chatter") == "Ugh, your chatter"
    lm = load_completion_model(other_model, device="cpu")
    assert lm.world == "" and lm.prompt("This damn") == "This damn"
    with pytest.raises(PersonaError, match="no chat template"):
        load_completion_model(other_model, "on", device="cpu")
    with pytest.raises(PersonaError, match="'maybe'"):
        load_completion_model("pocket", "maybe")


def test_default_layers_and_settings_exist():
    assert default_layers(6) == [1, 2, 3, 4, 5, 6]
    for n in (9, 12, 30, 80):
        layers = default_layers(n)
        assert layers == sorted(set(layers)) and 0.4 * n < layers[0] < layers[-1] < 0.8 * n
    for setup in SETUPS.values():
        assert (
            0.0 in setup.alphas
            and max(setup.alphas) > 0
            and data_path(setup.prompts_file).is_file()
            and setup.max_new_tokens >= 20
        )


# -- measures ----------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_single_texts_without_steering(family):
    prompts, answers = (
        [family.prompt("Why?"), family.prompt("How should I start baking bread?"), family.prompt("Why?")],
        ["Bake it with care.", "No.", ""],
    )
    for (nll, n), p, a in zip(completion_nll(family, prompts, answers), prompts, answers):
        ids = family.tokenizer(p + a, add_special_tokens=False).input_ids
        k = len(family.tokenizer(p, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logp = family.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        want = -sum(logp[i - 1, ids[i]].item() for i in range(k, len(ids)))
        assert n == len(ids) - k and nll == pytest.approx(want, rel=1e-3, abs=1e-3), family.name


def table(**kw):
    base = dict(group="challenging", condition="steered", vector="v", layer=1, alpha=1.0, nll=10.0, tokens=5)
    return pd.DataFrame(
        [
            base | dict(prompt_text=p, answer=a, toxicity=t) | kw
            for p, a, t in [("p", "a b", 0.2), ("p", "a c", 0.8), ("q", "a b", 0.1), ("q", "d e f", 0.3)]
        ]
    )


def test_expected_maximum_probability_and_distinct():
    m = measures(table())
    assert (
        m["toxicity"]["mean"] == pytest.approx(0.35)
        and m["expected_max_toxicity"]["mean"] == pytest.approx(0.55)
        and m["toxic_probability"]["mean"] == 0.5
    )
    assert m["perplexity"] == pytest.approx(math.exp(2)) and m["dist_1"] == pytest.approx(6 / 9) and m["dist_3"] == 1.0
    # a second vector is no second chance to be toxic
    twice = measures(pd.concat([table(vector="r0"), table(vector="r1")]))
    assert (
        twice["expected_max_toxicity"]["mean"] == m["expected_max_toxicity"]["mean"] and twice["dist_1"] == m["dist_1"]
    )
    assert math.isnan(distinct([], 1)) and math.isnan(measures(table(tokens=0))["perplexity"])


def test_silence_has_no_score(pocket, scorer, tmp_path, monkeypatch):
    from persona_steer import toxicity

    rows = toxicity.completion_rows(
        {"challenging": ["With pure malice, despair", "Ugh, your chatter"], "benign": ["In practice, the work"]},
        "baseline",
        vector="",
    )
    said = iter([["", "  ", "must end in ruin."], ["", "", ""]])
    monkeypatch.setattr(
        toxicity,
        "generate_table",
        lambda lm, rows, *a, **k: rows.assign(prompt=[lm.prompt(q) for q in rows.question], answer=next(said)),
    )
    some, none = (
        toxicity.complete(pocket, rows, {}, scorer, SamplingParams(), tmp_path, "x").astype({"toxicity": float})
        for _ in range(2)
    )
    assert (
        some.toxicity.isna().tolist() == [True, True, False] and some.toxicity[2] > 0.5 and none.toxicity.isna().all()
    )
    m = measures(some)
    assert m["toxicity"]["n"] == 1 and m["toxicity"]["missing"] == 2 and m["toxic_probability"]["n"] == 1
    assert np.isnan(measures(none)["toxicity"]["mean"])


def test_changes_are_paired_by_prompt():
    rows = pd.concat([table(condition="baseline", alpha=0.0), table().assign(toxicity=lambda d: d.toxicity - 0.1)])
    m = paired_changes(rows)["steered 1"]["challenging"]
    assert (
        m["mean"] == pytest.approx(-0.1)
        and m["low"] == pytest.approx(-0.1)
        and m["high"] == pytest.approx(-0.1)
        and m["n"] == 2
    )


def test_the_last_tokens_are_those_of_the_whole_text(llama):
    prompt, answer = llama.prompt("Why?"), "With baking bread, plan it each week."
    ids = torch.tensor([llama.tokenizer(prompt + answer, add_special_tokens=False).input_ids])
    with torch.no_grad():
        h = llama.model(ids, output_hidden_states=True).hidden_states
    for last in (3, 32, 500):
        got = collect_activations(llama, [prompt, prompt], [answer, "No."], last=last)["response_avg"][0]
        for l in (0, 1, 2):
            torch.testing.assert_close(got[l], h[l][0, -last:].mean(0), atol=1e-4, rtol=1e-4)


def test_the_vector_points_from_clean_to_toxic(llama):
    pairs = pd.DataFrame([dict(toxic_prompt="Why?", toxic="Bad words.", clean_prompt="How?", clean="Good words.")])
    a, b = (
        collect_activations(llama, [llama.prompt(q)], [text], last=32)["response_avg"][0]
        for q, text in (("Why?", "Bad words."), ("How?", "Good words."))
    )
    torch.testing.assert_close(toxicity_vector(llama, pairs), a - b)
    torch.testing.assert_close(
        random_like(a - b, torch.Generator().manual_seed(0))[1:].norm(dim=1), (a - b)[1:].norm(dim=1)
    )


def test_without_a_number_of_last_tokens_the_completion_is_averaged(llama):
    """Not the first token of the text, whose activations are far larger than the others' in many models."""
    prompts, answers = (
        dict(toxic="Why?", clean="How should I start?"),
        dict(toxic="Bad words and more.", clean="Good words."),
    )
    means = {}
    for k in ("toxic", "clean"):
        prompt = llama.prompt(prompts[k])
        ids = torch.tensor([llama.tokenizer(prompt + answers[k], add_special_tokens=False).input_ids])
        start = len(llama.tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            h = llama.model(ids, output_hidden_states=True).hidden_states
        means[k] = torch.stack([x[0, start:].mean(0) for x in h])[:-1]  # transformers normalises the last one
    pairs = pd.DataFrame([{f"{k}_prompt": prompts[k] for k in prompts} | answers])
    got = toxicity_vector(llama, pairs, last=0)
    torch.testing.assert_close(got[:-1], means["toxic"] - means["clean"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, toxicity_vector(llama, pairs, last=32), atol=1e-3)


def test_pairs_need_toxic_and_clean_completions():
    made = pd.DataFrame(
        [
            dict(group=g, prompt_text=f"{g} {i}", answer=f"{i}", toxicity=t)
            for g, t in (("challenging", 0.9), ("benign", 0.1))
            for i in range(4)
        ]
    )
    assert len(choose_pairs(made, 3)) == 3
    with pytest.raises(PersonaError, match="only 0 toxic"):
        choose_pairs(made.assign(toxicity=0.1), 3)


def test_the_choice_is_bounded():
    def points(alpha, toxicity, perplexity, benign=0.01):
        return [
            dict(
                condition="steered" if alpha else "baseline",
                layer=1,
                alpha=alpha,
                group=g,
                toxicity=dict(mean=t, low=t, high=t),
                perplexity=perplexity,
            )
            for g, t in (("challenging", toxicity), ("benign", benign))
        ]

    rows = (
        points(0.0, 0.8, 2.0)
        + points(0.5, 0.6, 2.2)
        + points(1.0, 0.3, 4.0)
        + points(2.0, 0.2, 2.1, benign=0.3)
        + points(-1.0, 0.1, 2.0)
    )
    assert choose_alpha(pd.DataFrame(rows)) == dict(layer=1, alpha=0.5, bounds_met=True)
    assert choose_alpha(pd.DataFrame(points(0.0, 0.8, 2.0) + points(1.0, 0.3, 4.0)))["bounds_met"] is False


# -- how a run ends ----------------------------------------------------------------------------------------------------

SMALL = dict(
    alphas=[-1.0, 0.0, 1.5], layers=[4, 5], pairs=6, samples=2, sampling=SamplingParams(12, 0.7, 0.9), random_vectors=1
)


def small(rows):
    return choose_prompts(rows, 8, 10)


def test_a_whole_run_and_its_files(pocket, scorer, rows, tmp_path):
    r = run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path)
    final = json.loads((tmp_path / STATES["done"]).read_text())
    assert {"settings", "choice", "pairs", "sweep", "report", "changes", "completions", "vector_norms"} <= set(
        final
    ) and (tmp_path / STATES["steps"]).exists()
    assert not (tmp_path / STATES["partial"]).exists() and not (tmp_path / STATES["failed"]).exists()
    mean = {(x["condition"], x["alpha"], x["group"]): x["toxicity"]["mean"] for x in final["report"]}
    assert (
        mean["steered", 1.5, "challenging"]
        < 0.7 * mean["baseline", 0.0, "challenging"]
        < mean["steered", -1.0, "challenging"]
    )
    assert abs(mean["random vector", r.choice["alpha"], "challenging"] - mean["baseline", 0.0, "challenging"]) < 0.3


def test_an_alpha_of_zero_is_the_model_as_it_is(pocket, scorer, rows, tmp_path):
    from persona_steer.lm.generation import generate

    r = run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path)
    base = r.completions[(r.completions.condition == "baseline")].drop_duplicates("prompt_text")
    plain = generate(
        pocket,
        [pocket.prompt(p) for p in base.prompt_text],
        SMALL["sampling"],
        seeds=[f"{p}|0" for p in base.prompt_text],
        progress=False,
    ).texts
    assert list(base.answer) == plain
    before = (tmp_path / STATES["done"]).read_text()
    for change, words in (
        (dict(alphas=[1.0]), "alphas must hold 0"),
        (dict(alphas=[-1.0, 0.0]), "one positive alpha"),
        (dict(samples=0), "samples and last"),
        (dict(last=-1), "samples and last"),
        (dict(layers=[9]), "layer 9 does not exist"),
    ):
        with pytest.raises(PersonaError, match=words):
            run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**{**SMALL, **change}), tmp_path)
    assert (tmp_path / STATES["done"]).read_text() == before  # nothing was touched


def test_overwrite_does_everything_again(pocket, scorer, rows, tmp_path, monkeypatch):
    run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path)
    made = []
    import persona_steer.lm.generation as g

    real = g._generate_batch
    monkeypatch.setattr(g, "_generate_batch", lambda *a, **k: made.append(1) or real(*a, **k))
    run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path)
    assert not made
    run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path, overwrite=True)
    assert len(made) >= 5


def test_results_are_strict_json(tmp_path):
    with ResumableRun(tmp_path, {}) as s:
        s.step("x", lambda: {"a": [1.0, float("nan")], "b": float("inf")})
        s.finish({"perplexity": float("nan")})
    for name in ("steps", "done"):
        assert (
            "NaN" not in (tmp_path / STATES[name]).read_text()
            and "Infinity" not in (tmp_path / STATES[name]).read_text()
        )


def test_one_ending_at_a_time_and_nothing_hidden_is_left(tmp_path):
    (tmp_path / ".experiment_results.json.abc.json").write_text("{")
    for error, left, gone in ((ZeroDivisionError, "failed", "partial"), (KeyboardInterrupt, "partial", "failed")):
        with pytest.raises(error):
            with ResumableRun(tmp_path, {}):
                raise error
        assert (tmp_path / STATES[left]).exists() and not (tmp_path / STATES[gone]).exists()
    assert not list(tmp_path.glob(".*")) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with ResumableRun(tmp_path, {}) as s:
        s.finish({})
    assert sorted(p.name for p in tmp_path.iterdir()) == [STATES["done"]]


def test_a_failure_is_recorded_and_mended_by_a_rerun(pocket, scorer, rows, tmp_path, monkeypatch):
    calls = []
    with monkeypatch.context() as m:
        real = scorer.scores
        m.setattr(
            scorer, "scores", lambda texts, **k: (calls.append(1), 1 / 0 if len(calls) == 3 else real(texts, **k))[1]
        )
        with pytest.raises(ZeroDivisionError):
            run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path)
    record = json.loads((tmp_path / STATES["failed"]).read_text())
    assert (
        record["error"].startswith("ZeroDivisionError")
        and record["done"] == ["completions for pairs", "pairs", "vector", "baseline"]
        and not (tmp_path / STATES["done"]).exists()
    )
    run_toxicity(pocket, scorer, small(rows), ToxicityConfig(**SMALL), tmp_path)
    assert (tmp_path / STATES["done"]).exists() and not (tmp_path / STATES["failed"]).exists()


def test_other_settings_do_not_reuse_steps(tmp_path):
    with ResumableRun(tmp_path, {"a": 1}) as s:
        assert s.step("x", lambda: 1) == 1
    with ResumableRun(tmp_path, {"a": 1}) as s:
        assert s.step("x", lambda: 2) == 1
    with ResumableRun(tmp_path, {"a": 2}) as s:
        assert s.step("x", lambda: 3) == 3
    with ResumableRun(tmp_path, {"a": 2}, overwrite=True) as s:
        assert s.step("x", lambda: 4) == 4


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PersonaError, match="nothing can be written to .*choose another folder"):
        ResumableRun(tmp_path / "file" / "out", {})


SCRIPT = """
import sys
from persona_steer.base.core import data_path
from persona_steer.lm.generation import SamplingParams, collect_activations
from persona_steer.judges.local import ClassifierJudge
from persona_steer.lm.models import load_model
from persona_steer.toxicity import ToxicityConfig, choose_prompts, load_toxicity_prompts, run_toxicity
print("ready", flush=True)
prompts = choose_prompts(load_toxicity_prompts(str(data_path("pocket/toxicity_prompts.jsonl"))), 8, 10)
judge = ClassifierJudge(str(data_path("pocket/toxicity")), "toxicity", "cpu")
config = ToxicityConfig([-1., 0., 1.5], [4, 5], 6, samples=2, sampling=SamplingParams(12, .7, .9), random_vectors=1)
run_toxicity(load_model("pocket", "cpu"), judge, prompts, config, sys.argv[1])
"""


def test_killed_ten_times_the_result_is_the_same(tmp_path):
    """Signals of three kinds, most at random moments; then a run to the end, against one that was left alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    t0 = time.time()
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "whole")], check=True, env=env, capture_output=True, timeout=300
    )
    whole, r, partial = time.time() - t0, random.Random(0), 0
    for k in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "cut")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        child.stdout.readline()
        if k:
            time.sleep(r.uniform(0.02, 0.5) * whole)
        # at least one signal comes in the middle, however slow the machine
        while not k and not (tmp_path / "cut" / STATES["steps"]).exists():
            time.sleep(0.01)
        child.send_signal([signal.SIGTERM, signal.SIGINT, signal.SIGKILL][k % 3])
        child.wait(60)
        partial += (tmp_path / "cut" / STATES["partial"]).exists()
        for name in ("steps", "partial"):  # never half-written
            if (tmp_path / "cut" / STATES[name]).exists():
                json.loads((tmp_path / "cut" / STATES[name]).read_text())
    assert partial, "no signal came while the experiment ran"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "cut")], check=True, env=env, capture_output=True, timeout=300
    )
    a, b = ((tmp_path / k / STATES["done"]).read_text() for k in ("whole", "cut"))
    assert a == b and not (tmp_path / "cut" / STATES["partial"]).exists()


def test_plain_text_needs_no_chat_template(tmp_path, tokenizer):
    from conftest import make

    lm = make("gpt2", tokenizer)
    lm.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(PersonaError, match="no chat template"):
        load_model(str(tmp_path), "cpu")
    plain = load_model(str(tmp_path), "cpu", chat=False)
    assert plain.prompt("A beginning of") == "A beginning of" and plain.template_hash != lm.template_hash
