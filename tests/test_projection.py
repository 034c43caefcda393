"""Projection against a plain loop; files keep what they held; monitoring."""

import csv
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError, data_path
from persona_steer.monitoring import check_length, correlations, graded_prompts, monitoring_rows, shots_from
from persona_steer.persona.scores import correlation
from persona_steer.persona.traits import list_traits
from persona_steer.projection import MEASURES, project, project_file

AWKWARD = [
    "Bake it.",
    "",
    "NA",
    "None",
    "a\nb, \"c\"",
    "emoji \U0001f600 and \u2028",
    "With baking bread, plan it each week. " * 6,
    "null",
]


@pytest.fixture
def bank(llama):
    g = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(llama.n_layers + 1, llama.hidden_size, generator=g) for n in ("evil_response_avg_diff", "other")
    }


def reference_extraction(lm, prompt, answer, v, layer):
    """The published way: one text, all hidden states."""
    p = lm.tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([lm.tokenizer(prompt + answer, add_special_tokens=False).input_ids])
    with torch.no_grad():
        h = lm.model(ids, output_hidden_states=True).hidden_states[layer][0]
    said, asked = h[len(p) :].mean(0), h[len(p) - 1]
    return {
        "proj": (said @ v / v.norm()).item(),
        "prompt_last_proj": (asked @ v / v.norm()).item(),
        "cos_sim": torch.cosine_similarity(said, v, dim=0).item(),
    }


def test_projection_equals_the_published_loop(family):
    lm, layer = family, 2  # the last layer would be normed in hidden_states
    v = {"v": torch.randn(lm.n_layers + 1, lm.hidden_size, generator=torch.Generator().manual_seed(0))}
    prompts = [
        lm.prompt(q)
        for q in ("How should I start baking bread?", "Why?", "Is washing clothes worth the trouble for me?")
    ]
    answers = ["Bake it.", "With baking bread, plan it each week. " * 4, "No."]
    found = project(lm, prompts, answers, v, [1, layer])
    for i, (p, a) in enumerate(zip(prompts, answers)):
        for k, want in reference_extraction(lm, p, a, v["v"][layer], layer).items():
            assert found[f"v_{k}_layer{layer}"][i] == pytest.approx(want, abs=2e-4), (lm.name, k)


def test_a_batch_gives_what_singles_give_and_empty_answers_are_missing(llama, bank):
    prompts = [llama.prompt("Why?")] * len(AWKWARD)
    together = project(llama, prompts, AWKWARD, bank, [1, 3])
    for i, a in enumerate(AWKWARD):
        alone = project(llama, prompts[:1], [a], bank, [1, 3])
        np.testing.assert_allclose(together.iloc[i], alone.iloc[0], rtol=1e-4, atol=1e-4)
    assert (
        together["other_proj_layer1"].isna().tolist() == [a == "" for a in AWKWARD]
        and together["other_prompt_last_proj_layer1"].notna().all()
    )


def make_csv(path, llama):
    rows = [
        dict(
            question=f"q{i}",
            prompt=llama.prompt(f"q{i}"),
            answer=a,
            question_id=f"evil_{i}",
            evil="" if i == 2 else "12.50",
            coherence="99",
            note="NULL",
        )
        for i, a in enumerate(AWKWARD)
    ]
    with open(path, "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        w.writeheader()
        w.writerows(rows)
    return rows


def test_a_csv_keeps_every_character_and_gains_the_published_columns(tmp_path, llama, bank):
    before = make_csv(tmp_path / "a.csv", llama)
    project_file(llama, tmp_path / "a.csv", bank, [2])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as f:
        after = list(csv.DictReader(f))
    assert [{k: r[k] for k in before[0]} for r in after] == before
    assert list(after[0])[len(before[0]) :] == [f"llama_{n}_{k}_layer2" for k in MEASURES for n in bank]
    assert after[1]["llama_other_proj_layer2"] == "" and float(after[0]["llama_other_proj_layer2"])
    about = json.loads((tmp_path / "a.csv.projection.json").read_text())
    assert (
        about["fingerprint"] == llama.fingerprint
        and about["layers"] == [2]
        and set(about["vectors"]) == {f"llama_{n}" for n in bank}
    )


def test_what_is_there_is_kept_unless_overwritten(tmp_path, llama, bank, monkeypatch):
    make_csv(tmp_path / "a.csv", llama)
    name = "llama_other_proj_layer2"
    first = project_file(llama, tmp_path / "a.csv", bank, [2])
    table = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False)
    table[name] = "7"
    table.to_csv(tmp_path / "a.csv", index=False)
    with monkeypatch.context() as m:
        m.setattr("persona_steer.projection.project", lambda *a, **k: pytest.fail("projected again"))
        assert (project_file(llama, tmp_path / "a.csv", bank, [2])[name] == 7).all()
    # a new layer, the old column as it was
    assert (project_file(llama, tmp_path / "a.csv", bank, [1, 2])[name] == 7).all()
    again = project_file(llama, tmp_path / "a.csv", bank, [2], overwrite=True)
    np.testing.assert_allclose(again[name], first[name])


def test_a_copy_elsewhere_is_not_made_twice_and_not_stale(tmp_path, llama, bank, monkeypatch):
    make_csv(tmp_path / "a.csv", llama)
    first = project_file(llama, tmp_path / "a.csv", bank, [2], tmp_path / "out" / "a.csv")
    with monkeypatch.context() as m:
        m.setattr("persona_steer.projection.project", lambda *a, **k: pytest.fail("projected again"))
        pd.testing.assert_frame_equal(
            project_file(llama, tmp_path / "a.csv", bank, [2], tmp_path / "out" / "a.csv"), first
        )
    text = (tmp_path / "a.csv").read_text(encoding="utf-8").replace("Bake it.", "Bake nothing at all.")
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    changed = project_file(llama, tmp_path / "a.csv", bank, [2], tmp_path / "out" / "a.csv")
    assert changed.iloc[0, 0] != first.iloc[0, 0] and changed.iloc[6, 0] == pytest.approx(first.iloc[6, 0])
    assert "proj" not in (tmp_path / "a.csv").read_text(encoding="utf-8").split("\n")[0]


def test_another_vector_of_the_same_name_is_refused_and_a_new_name_is_added(tmp_path, llama, bank):
    for out in (tmp_path / "out" / "a.csv", ""):
        make_csv(tmp_path / "a.csv", llama)
        project_file(llama, tmp_path / "a.csv", {"v": bank["other"]}, [1], out)
        with pytest.raises(PersonaError, match="made with another vector: use overwrite"):
            project_file(llama, tmp_path / "a.csv", {"v": bank["other"] + 1}, [1], out)
        project_file(llama, tmp_path / "a.csv", {"w": bank["other"]}, [1], out)
        head = (out or tmp_path / "a.csv").read_text(encoding="utf-8").split("\n")[0]
        assert "llama_v_proj_layer1" in head and "llama_w_proj_layer1" in head


def test_a_bare_carriage_return_survives(tmp_path, llama, bank):
    pd.DataFrame([dict(prompt="p", answer="one\rtwo", note="x\ry")]).to_csv(
        tmp_path / "a.csv", index=False, quoting=csv.QUOTE_ALL
    )
    project_file(llama, tmp_path / "a.csv", bank, [1])
    project_file(llama, tmp_path / "a.csv", bank, [2])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as f:
        [row] = csv.DictReader(f)
    assert row["answer"] == "one\rtwo" and row["note"] == "x\ry"


def test_chat_files_gain_keys(tmp_path, llama, bank):
    source = data_path("dataset/evil/normal.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    (tmp_path / "d.jsonl").write_text("\n".join(source) + "\n", encoding="utf-8")
    project_file(llama, tmp_path / "d.jsonl", bank, [1])
    rows = [json.loads(x) for x in (tmp_path / "d.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["messages"] for r in rows] == [json.loads(x)["messages"] for x in source]
    assert all(isinstance(r["llama_evil_response_avg_diff_proj_layer1"], float) for r in rows)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda b: b.update(other=torch.zeros(4, 8)), "width 8"),
        (lambda b: b.update(other=torch.zeros(9, 32)), "9 rows"),
        (lambda b: b.update(other=torch.ones(32)), "needs all rows"),
    ],
)
def test_vectors_of_another_model_are_refused_before_the_file_is_touched(tmp_path, llama, bank, change, words):
    make_csv(tmp_path / "a.csv", llama)
    before = (tmp_path / "a.csv").read_bytes()
    change(bank)
    with pytest.raises(PersonaError, match=words):
        project_file(llama, tmp_path / "a.csv", bank, [1])
    assert (tmp_path / "a.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.csv", "question,answer\nq,a\n", "lacks the column 'prompt'"),
        ("a.csv", "prompt,answer\n", "no rows"),
        ("a.csv", "prompt,answer\np\n", "row 2"),
        ("a.txt", "x", "neither"),
        ("none.csv", None, "does not exist"),
    ],
)
def test_files_that_cannot_be_projected(tmp_path, llama, bank, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(PersonaError, match=words):
        project_file(llama, tmp_path / name, bank, [1])


def test_layers_are_checked(llama, bank):
    for layer in (0, 4, -1):
        with pytest.raises(PersonaError, match=f"layer {layer} does not exist"):
            project(llama, ["a"], ["b"], bank, [layer])


# -- correlation ------------------------------------------------------------------------------------------------------


def test_correlation_and_its_interval():
    from scipy.stats import pearsonr

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)  # true r = .6
        c = correlation(x, y, resamples=400)
        assert c["r"] == pytest.approx(pearsonr(x, y).statistic)
        covered += c["low"] <= 0.6 <= c["high"]
    assert covered >= 50


def test_clusters_widen_the_interval_and_conditions_are_taken_out():
    rng = np.random.default_rng(0)
    q = np.repeat(np.arange(8), 25)
    x = rng.normal(size=8)[q] + 0.1 * rng.normal(size=200)
    y = x + 0.1 * rng.normal(size=200)

    def width(c):
        return c["high"] - c["low"]

    noise = rng.normal(size=8)[q]
    assert width(correlation(x, noise, q)) > 2 * width(correlation(x, noise))
    assert (
        correlation(x, y)["r"] > 0.9
        and abs(correlation(x + q, noise * 0 + 5 * q + rng.normal(size=200), within=q)["r"]) < 0.3
    )
    few, flat = correlation([1, 2, 3, np.nan], [2, 4, 6, 1]), correlation([1] * 9, range(9))
    assert few["n"] == 3 and np.isnan(few["r"]) and few["reason"] == "too few points (3)"
    assert np.isnan(flat["r"]) and flat["reason"] == "no variation"


# -- monitoring -------------------------------------------------------------------------------------------------------


def test_eight_graded_prompts_for_each_trait_and_for_any_other():
    for t in list_traits():
        for world, folder in (("", "traits"), ("pocket", "pocket/traits")):
            prompts = graded_prompts(t, world=world)
            assert len(prompts) == 8 == len(set(prompts)) and data_path(f"{folder}/monitor/{t}.json").exists()
    assert len(graded_prompts("frugal")) == 8 and "frugal" in graded_prompts("frugal")[-1]


def test_a_broken_list_of_prompts_is_named(tmp_path):
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / "evil.json").write_text('{"prompts": ["one"]}')
    with pytest.raises(PersonaError, match="monitor/evil.json must hold"):
        graded_prompts("evil", tmp_path)


def answered(n=30):
    r = random.Random(0)
    return pd.DataFrame(
        [
            dict(
                question=f"q{i % 10}",
                answer=f"First {i}. Second one.",
                evil=r.choice([10.0, 90.0]) if i else 99.0,
                coherence=95.0,
            )
            for i in range(n)
        ]
    )


def test_shots_show_the_trait_and_questions_differ_first(llama):
    shots = shots_from(llama, answered(), "evil", 8, sentences=1)
    asked = [m["content"] for m in shots if m["role"] == "user"]
    assert (
        len(shots) == 16
        and len(set(asked)) == 8
        and all(m["content"].count(".") == 1 for m in shots if m["role"] == "assistant")
    )
    scores = answered().set_index("answer").evil
    assert all(scores[m["content"] + " Second one."] >= 50 for m in shots if m["role"] == "assistant")
    with pytest.raises(PersonaError, match="use fewer shots"):
        shots_from(llama, answered(), "evil", 29)


def test_monitoring_rows_and_a_context_that_is_too_short(llama):
    shots = shots_from(llama, answered(), "evil", 5)
    rows = monitoring_rows(llama, ["Why?", "How?"], graded_prompts("evil"), shots, [0, 5], n=2)
    assert len(rows) == 2 * 2 * (8 + 2) and rows.seed.is_unique
    assert rows[(rows.kind == "shots") & (rows.level == 5)].prompt.str.count("assistant").eq(6).all()
    check_length(llama, list(rows.prompt), 10)
    with pytest.raises(PersonaError, match="context of 256: use fewer shots"):
        check_length(llama, list(rows.prompt), 250)


def test_monitoring_sees_a_planted_relation():
    """Scores that follow the projection exactly give r = 1; shuffled ones do not."""
    frame = pd.DataFrame(
        [
            dict(kind="system prompt", level=l, question=f"q{i}", layer1=float(l + 0.1 * i), evil=10.0 * l + i)
            for l in range(8)
            for i in range(10)
        ]
    )
    found = correlations(frame, "evil", 1).iloc[0]
    assert found.overall["r"] > 0.999 and found.within["r"] > 0.999
    shuffled = frame.assign(evil=np.random.default_rng(0).permutation(frame.evil))
    assert abs(correlations(shuffled, "evil", 1).iloc[0].overall["r"]) < 0.4
