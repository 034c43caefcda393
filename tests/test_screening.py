"""Screening of training data, families of data, and the choice among guards."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError, data_path
from persona_steer.dataset_sweep import list_datasets, shift_correlations
from persona_steer.lm.chats import load_chats, save_jsonl
from persona_steer.lm.generation import SamplingParams, collect_activations, generate
from persona_steer.lm.tables import generate_table
from persona_steer.mitigations import choose_mitigation, training_plan
from persona_steer.persona.scores import format_correlation
from persona_steer.persona.traits import load_trait
from persona_steer.screening import (
    auc,
    chance_differences,
    counts_line,
    flag,
    per_dataset,
    save_filtered,
    screen,
    with_estimates,
)
from persona_steer.training.config import load_config


@pytest.fixture
def small(tmp_path):
    """Two tiny datasets with shared prompts."""
    for level in ("normal", "misaligned_2"):
        save_jsonl(load_chats(data_path(f"dataset/evil/{level}.jsonl"))[:6], tmp_path / "evil" / f"{level}.jsonl")
    return list_datasets(folder=tmp_path)


@pytest.fixture
def bank(llama):
    g = torch.Generator().manual_seed(1)
    return {n: torch.randn(llama.n_layers + 1, llama.hidden_size, generator=g) for n in ("evil", "humorous")}


LAYERS, SHORT = {"evil": 2, "humorous": 1}, SamplingParams(8)


def test_the_difference_is_the_formula(llama, small, bank):
    found = with_estimates(screen(llama, small, bank, LAYERS, SHORT))
    assert len(found) == 2 * 2 * 6 and list(found.level.unique()) == ["normal", "misaligned_2"]
    for row in found.iloc[[0, 7, 13, 20]].itertuples():
        own = generate(llama, [row.prompt], SHORT, seeds=[row.prompt], progress=False).texts[0]
        assert own == row.own_answer
        v = bank[row.trait][LAYERS[row.trait]]
        acts = collect_activations(llama, [row.prompt] * 2, [row.answer, own])
        said, asked = (
            acts["response_avg"][:, LAYERS[row.trait]] @ v / v.norm(),
            acts["prompt_last"][0, LAYERS[row.trait]] @ v / v.norm(),
        )
        assert row.difference == pytest.approx((said[0] - said[1]).item(), abs=1e-3) and row.cheap == pytest.approx(
            (said[0] - asked).item(), abs=1e-3
        )


def test_each_distinct_prompt_is_answered_once(llama, small, bank, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "persona_steer.screening.generate_table",
        lambda lm, rows, *a, **k: asked.extend(rows.prompt) or generate_table(lm, rows, *a, **k),
    )
    screen(llama, small, bank, LAYERS, SHORT)
    assert len(asked) == len(set(asked)) == 6  # both levels ask the same


def test_chance_has_no_direction_and_is_seeded(llama, small, bank):
    found = screen(llama, small, bank, LAYERS, SHORT)
    a, b = (chance_differences(llama, found, bank, LAYERS, SHORT, n=6) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    assert len(a) == 6 and (a.abs() > 0).any().all()


def written(folder, row):
    return [
        json.loads(x) for x in (folder / row.family / f"{row.level}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_what_is_flagged_is_left_out_and_the_rest_stays_as_it_was(llama, small, bank, tmp_path):
    found = screen(llama, small, bank, LAYERS, SHORT)
    thresholds = {"evil": float(found[found.trait == "evil"].difference.median()), "humorous": 1e9}
    flagged = flag(found, thresholds)
    assert flagged.sum() == 6 and not flagged[found.trait == "humorous"].any()
    kept = save_filtered(found, flagged, small, tmp_path / "out")
    assert (kept.lines == 6).all() and (kept.screened == 6).all() and kept.written.sum() == 6 == kept.flagged.sum()
    for d in small.itertuples():
        bad = set(found[flagged & (found.level == d.level)].line)
        assert written(tmp_path / "out", d) == [x for i, x in enumerate(load_chats(d.path)) if i not in bad]
    first = kept.iloc[0]
    assert counts_line(first) == (
        f"{first.family} {first.level}: 6 lines, 6 screened, {first.flagged} flagged, {first.written} written."
    )


def test_nothing_is_dropped_because_it_was_not_screened(llama, small, bank, tmp_path):
    """Of a sample no filtered file is written; a line whose answer is empty is kept."""
    thresholds = {"evil": 1e9, "humorous": 1e9}
    sample = screen(llama, small, bank, LAYERS, SHORT, limit=5)
    kept = save_filtered(sample, flag(sample, thresholds), small, tmp_path / "sample")
    assert not (tmp_path / "sample").exists() and (kept.screened == 5).all() and not kept.complete.any()
    assert "no filtered file: only a sample was screened" in counts_line(kept.iloc[0])
    found = screen(llama, small, bank, LAYERS, SHORT)
    found.loc[(found.line == 2) & (found.level == "normal"), "difference"] = np.nan
    kept = save_filtered(found, flag(found, thresholds), small, tmp_path / "out")
    assert list(kept.screened) == [5, 6] and list(kept.unanswered) == [1, 0] and list(kept.written) == [6, 6]
    assert "1 without an answer (kept)" in counts_line(kept.iloc[0])
    for d in small.itertuples():
        assert written(tmp_path / "out", d) == load_chats(d.path)
    with pytest.raises(PersonaError, match="a threshold is missing"):
        flag(found, {"evil": float("nan"), "humorous": 1.0})


def test_chance_needs_sampling_and_a_limit_draws_the_same_lines_everywhere(llama, small, bank):
    with pytest.raises(PersonaError, match="at temperature 0"):
        chance_differences(
            llama, screen(llama, small, bank, LAYERS, SHORT, 2), bank, LAYERS, SamplingParams(8, temperature=0)
        )
    found = screen(llama, small, bank, LAYERS, SHORT, limit=3)
    lines = {l: sorted(g.line.unique()) for l, g in found.groupby("level")}
    assert lines["normal"] == lines["misaligned_2"] and len(lines["normal"]) == 3 and found.prompt.nunique() == 3


def test_auc_is_that_of_ranks():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 80), rng.normal(1, 1, 60)
    m = auc(x, y)
    assert (
        m["auc"] == pytest.approx(mannwhitneyu(y, x).statistic / (80 * 60))
        and m["low"] < m["auc"] < m["high"]
        and m["n"] == 140
    )
    assert np.isnan(auc([np.nan], [1.0])["auc"])


def test_means_per_dataset_and_of_a_sample(llama, small, bank):
    found = screen(llama, small, bank, LAYERS, SHORT)
    by = per_dataset(found)
    g = found[(found.level == "normal") & (found.trait == "evil")]
    assert by[(by.level == "normal") & (by.trait == "evil")].difference.iloc[0] == pytest.approx(g.difference.mean())
    assert (per_dataset(found, sample=2).n == 2).all()


# -- families ---------------------------------------------------------------------------------------------------------


def test_the_published_layout_is_listed(tmp_path):
    every = list_datasets()
    assert (
        len(every) == 24
        and every.family.nunique() == 8
        and list(every.level[:3]) == ["normal", "misaligned_1", "misaligned_2"]
    )
    assert len(list_datasets(["evil", "mistake_math/normal"])) == 4
    with pytest.raises(PersonaError, match="'envy' is not in .*evil"):
        list_datasets(["envy"])
    with pytest.raises(PersonaError, match="holds no datasets"):
        list_datasets(folder=tmp_path)


def test_the_untrained_model_is_no_dot_in_the_correlation():
    table = pd.DataFrame(
        [dict(family="untrained", level="", trait="evil", shift=0.0, score_mean=100.0)]
        + [dict(family=f"f{i}", level="normal", trait="evil", shift=float(i), score_mean=8.0 * i) for i in range(9)]
    ).assign(score_low=lambda t: t.score_mean - 2, score_high=lambda t: t.score_mean + 2)
    assert shift_correlations(table)["evil"]["r"] == pytest.approx(1) and shift_correlations(table)["evil"]["n"] == 9


def test_no_correlation_from_a_few_points_or_from_noise():
    """Scores of 0 to 2 with intervals of 10 points, or four datasets, correlate with anything."""
    table = pd.DataFrame(
        [dict(family=f"f{i}", level="", trait="evil", shift=float(i), score_mean=i / 4) for i in range(9)]
    ).assign(score_low=lambda t: t.score_mean - 5, score_high=lambda t: t.score_mean + 5)
    for rows, reason in ((table, "span 2 points, their own intervals 10"), (table[:4], r"too few points \(4\)")):
        found = shift_correlations(rows)["evil"]
        assert np.isnan(found["r"]) and np.isnan(found["low"]) and re.search(reason, found["reason"])
        assert format_correlation(found) == f"not computed: {found['reason']}"


def test_a_killed_grid_goes_on(tmp_path, monkeypatch, pocket):
    """Two trainings; the second fails the first time; then only that one is trained."""
    from persona_steer import dataset_sweep
    from persona_steer.extraction import load_or_extract
    from persona_steer.judges.loading import load_judge

    done, kill = [], [True]
    real = dataset_sweep.finetune_in

    def sometimes(folder, *a):
        if kill and folder.name == "evil-normal":
            raise KeyboardInterrupt
        fresh = not list(folder.glob("training-*/provenance.json"))
        run = real(folder, *a)
        if fresh:
            done.append(folder.name)
        return run

    monkeypatch.setattr(dataset_sweep, "finetune_in", sometimes)
    evil, judge = load_trait("evil", world="pocket"), load_judge("pocket")
    recipe = load_config("finetune/pocket.json", max_steps=1, test_share=0.0).model_dump()
    chosen = list_datasets(["evil/normal", "evil/misaligned_2"]).sort_values("level")  # level II first
    vectors = {"evil": load_or_extract(pocket, evil, judge).vectors}

    def go():
        return dataset_sweep.train_families(pocket, chosen, recipe, [evil], judge, vectors, {"evil": 3}, tmp_path)

    with pytest.raises(KeyboardInterrupt):
        go()
    kill.clear()
    table = go()
    assert done == ["evil-misaligned_2", "evil-normal"]
    monkeypatch.setattr(
        "persona_steer.training.model_evaluation.generate_table", lambda *a, **k: pytest.fail("measured again")
    )
    pd.testing.assert_frame_equal(go(), table)
    assert list(table.family) == ["untrained", "evil", "evil"] and table["shift"].iloc[0] == 0


# -- guards -----------------------------------------------------------------------------------------------------------


def test_every_guard_is_a_valid_configuration(tmp_path):
    plan = training_plan(
        load_trait("evil", world="pocket"), tmp_path / "v.pt", tmp_path / "r.pt", 3, [1.0, 2.0], 6, [1.0]
    )
    assert list(plan.condition.value_counts().loc[["preventative steering", "random vector", "no guard"]]) == [2, 2, 1]
    for p in plan.itertuples():
        c = load_config("finetune/pocket.json", **p.changes)
        assert (c.guard is None) == (p.condition in ("no guard", "inoculation"))
        if p.condition == "random vector":
            assert c.guard.steering_vector_path.endswith("r.pt") and c.guard.steering_coef == p.coefficient
        if "all layers" in p.condition:
            assert c.guard.layers == [1, 2, 3, 4, 5, 6]


def test_the_recipe_has_no_guard_of_its_own_in_a_comparison(monkeypatch, tmp_path, pocket):
    from persona_steer import mitigations

    seen = []
    monkeypatch.setattr(mitigations, "finetune_in", lambda folder, c, *a: seen.append((folder.name, c)) or 1 / 0)
    monkeypatch.setattr(mitigations, "evaluate_model", lambda *a, **k: None)
    monkeypatch.setattr(mitigations, "evaluation_row", lambda *a: {})
    monkeypatch.setattr(mitigations, "evaluate_model", lambda *a, **k: type("E", (), {"answers": None})())
    recipe = load_config(
        "finetune/pocket.json",
        enable_steering_during_training=True,
        steering_config={"steering_vector_path": "v.pt"},
        system_prompt="Be evil.",
    )
    plan = training_plan(load_trait("evil", world="pocket"), tmp_path / "v.pt", tmp_path / "r.pt", 3, [1.0], 6)
    for i in range(len(plan)):
        with pytest.raises(ZeroDivisionError):
            mitigations.compare_mitigations(
                pocket, load_trait("evil", world="pocket"), None, None, recipe, plan[i:], 3, [], tmp_path
            )
    by = dict(seen)
    assert (
        by["no guard 0"].guard is None
        and by["no guard 0"].system_prompt == ""
        and by["inoculation 1"].guard is None
        and by["ablation 1"].guard.type == "ablate"
    )


def test_scores_that_are_missing_are_said():
    rows = [
        dict(condition=c, coefficient=1.0, split="extract", trait=float("nan"), coherence=90.0)
        for c in ("no guard", "preventative steering")
    ]
    with pytest.raises(PersonaError, match="there is no trait score"):
        choose_mitigation(pd.DataFrame(rows))


def test_the_weakest_guard_that_suffices_is_chosen_on_extraction_questions():
    def row(condition, c, trait, coherence=97.0, split="extract"):
        return dict(condition=condition, coefficient=c, split=split, trait=trait, coherence=coherence)

    rows = [
        row("no guard", 0, 90.0),
        row("preventative steering", 1, 50.0),
        row("preventative steering", 2, 30.0, 80.0),
        row("preventative steering", 3, 20.0),
        row("preventative steering", 4, 2.0),
    ]
    lure = [row("preventative steering", 1, 0.0, split="eval"), row("no guard", 0, 90.0, split="eval")]
    assert choose_mitigation(pd.DataFrame(rows + lure)) == dict(coefficient=3.0, bound_met=True)
    assert choose_mitigation(pd.DataFrame(rows), share=0.01) == dict(coefficient=4.0, bound_met=False)
