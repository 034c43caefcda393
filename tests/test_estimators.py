"""Estimators of a direction against repeng and scikit-learn; sign, scale, refusals; extraction; comparison."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer import estimator_comparison as comparison
from persona_steer import extraction
from persona_steer.base.core import PersonaError, digest, project_root
from persona_steer.extraction import extract, extract_from_scores, load_extraction, load_or_extract
from persona_steer.judges.loading import load_judge
from persona_steer.lm import generation
from persona_steer.lm.activations import POOLS
from persona_steer.lm.divergence import reference_texts
from persona_steer.lm.generation import SamplingParams
from persona_steer.persona.estimators import (
    ESTIMATORS,
    estimate_layers,
    estimate_vectors,
    find_estimator,
    linear_discriminant,
    logistic_probe,
    match_gap,
    mean_difference,
    pca_centered,
    pca_pairs,
)
from persona_steer.persona.traits import load_trait, system_prompt
from persona_steer.persona.vectors import load_vectors

OTHERS = [name for name in ESTIMATORS if name != "mean_difference"]


def made_up(pairs=40, layers=3, hidden=24, seed=0):
    """Two sides [pairs, layers, hidden] that differ by a shift of random strength, in noise that is not round."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=rng) / hidden**0.5
    pos, neg = (torch.randn(pairs, layers, hidden, generator=rng) @ mixing for _ in range(2))
    strength = 1 + 0.5 * torch.rand(pairs, 1, 1, generator=rng)
    return pos + strength * torch.randn(1, layers, hidden, generator=rng), neg


def cosine(a, b) -> float:
    a, b = (torch.as_tensor(np.asarray(x)).double() for x in (a, b))
    return float(abs(a @ b) / (a.norm() * b.norm()))


# -- references -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repeng():
    """The library itself; it must be there in CI."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # repeng 0.4 names a type that numpy 2 no longer has
    if not os.environ.get("CI"):
        pytest.importorskip("repeng.extract")
    return importlib.import_module("repeng.extract")


@pytest.mark.parametrize("method, ours", [("pca_diff", pca_pairs), ("pca_center", pca_centered)])
def test_principal_components_are_those_of_repeng(repeng, pocket, method, ours):
    """repeng reads the hidden states of the last tokens itself; ours gets the states that it read."""
    evil = load_trait("evil", world="pocket")
    texts = [
        [pocket.prompt(q, system_prompt(evil, sign, k)) for q in evil.extract_questions[:8] for k in range(3)]
        for sign in ("pos", "neg")
    ]
    entries = [repeng.DatasetEntry(positive=p, negative=n) for p, n in zip(*texts)]
    layers = list(range(1, pocket.n_layers - 1))  # in its count; its last layer is read behind the final norm
    theirs = repeng.read_representations(pocket.model, pocket.tokenizer, entries, layers, method=method)
    strings = [s for e in entries for s in (e.positive, e.negative)]
    states = repeng.batched_get_hiddens(pocket.model, pocket.tokenizer, strings, layers, 32)
    for layer in layers:
        h = torch.as_tensor(states[layer])
        assert cosine(ours(h[::2], h[1::2]), theirs[layer]) > 0.999
    if method == "pca_diff":  # the two methods are not the same
        assert min(cosine(mean_difference(h[::2], h[1::2]), theirs[layer]) for layer in layers) < 0.999


def test_the_probe_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    for pos, neg in zip(*(side.unbind(1) for side in made_up())):
        x, y = np.concatenate([pos.numpy(), neg.numpy()]).astype(float), np.repeat([1, 0], len(pos))
        x = x - x.mean(axis=0)
        reference = LogisticRegression(tol=1e-8, max_iter=10000).fit(x / np.sqrt(np.mean(x**2)), y)
        assert cosine(logistic_probe(pos, neg), reference.coef_[0]) > 0.999
        # neither shift nor unit of the activations matters
        assert cosine(logistic_probe(pos, neg), logistic_probe(100 * pos + 7, 100 * neg + 7)) > 0.999


def test_the_discriminant_is_scikit_learns():
    from sklearn.covariance import ledoit_wolf
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    for pos, neg in zip(*(side.unbind(1) for side in made_up())):
        x, y = np.concatenate([pos.numpy(), neg.numpy()]).astype(float), np.repeat([1, 0], len(pos))
        reference = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(x, y)
        assert cosine(linear_discriminant(pos, neg), reference.coef_[0]) > 0.999
        # as the docstring says it: the mean of two covariances, shrunk in units of the coordinates' spread
        sigma = 0
        for side in (pos, neg):
            side = side.double().numpy()
            d = side.std(axis=0)
            sigma = sigma + d[:, None] * ledoit_wolf((side - side.mean(axis=0)) / d)[0] * d / 2
        formula = np.linalg.solve(sigma, (pos.double().mean(0) - neg.double().mean(0)).numpy())
        assert cosine(linear_discriminant(pos, neg), formula) > 0.999


def test_the_mean_difference_is_what_it_was_to_the_bit():
    pos, neg = made_up(pairs=37)
    assert torch.equal(estimate_layers(pos, neg), pos.mean(0) - neg.mean(0))
    assert torch.equal(mean_difference(pos[:, 1], neg[:, 1]), pos[:, 1].mean(0) - neg[:, 1].mean(0))


# -- sign, scale, refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sign_and_scale(name):
    pos, neg = made_up()
    vectors, difference = estimate_layers(pos, neg, name), pos.mean(0) - neg.mean(0)
    assert vectors.dtype == torch.float32 and vectors.shape == (3, 24)
    gap = ((pos * vectors).sum(-1) - (neg * vectors).sum(-1)).mean(0)
    torch.testing.assert_close(gap, difference.square().sum(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(estimate_layers(neg, pos, name), -vectors, rtol=1e-3, atol=1e-3)


def test_the_sign_of_what_an_estimator_finds_does_not_matter(monkeypatch):
    pos, neg = made_up()
    before = estimate_layers(pos, neg, "pca_pairs")
    monkeypatch.setitem(ESTIMATORS, "pca_pairs", lambda p, n: -5 * pca_pairs(p, n))
    torch.testing.assert_close(estimate_layers(pos, neg, "pca_pairs"), before)


def test_an_orthogonal_direction_has_no_sign():
    d, u = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(match_gap(-3 * d, 2 * d), 2 * d)
    with pytest.raises(PersonaError, match="orthogonal to the mean difference"):
        match_gap(u, d)


def bad_sides():
    pos, neg = (side[:, 0] for side in made_up())
    holes = pos.clone()
    holes[[3, 5], 2] = torch.nan
    return {
        "NaN": (holes, neg, "2 of 40 pairs hold NaN"),
        "equal": (pos, pos.clone(), "the two sides are equal"),
        "none": (pos[:0], neg[:0], "there are 0"),
        "shapes": (pos, neg[:5], r"\[40, 24\] and \[5, 24\]"),
    }


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("case", bad_sides())
def test_what_gives_no_direction_is_refused_in_one_sentence(name, case):
    pos, neg, words = bad_sides()[case]
    with pytest.raises(PersonaError, match=words) as e:
        ESTIMATORS[name](pos, neg)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", OTHERS)
def test_one_pair_is_enough_for_the_mean_difference_only(name):
    pos, neg = (side[:1] for side in made_up())
    assert torch.equal(estimate_layers(pos, neg), (pos - neg)[0])
    with pytest.raises(PersonaError, match="needs at least 2 pairs of answers and there is 1"):
        estimate_layers(pos, neg, name)
    with pytest.raises(PersonaError, match="needs at least 2 pairs"):
        ESTIMATORS[name](pos[:, 0], neg[:, 0])


def test_pairs_that_all_differ_by_the_same_have_no_component():
    pos, _ = (side[:, 0] for side in made_up())
    with pytest.raises(PersonaError, match="differences of all pairs are the same"):
        pca_pairs(pos, pos - torch.arange(24.0))
    assert cosine(pca_centered(pos, pos - torch.arange(24.0)), torch.arange(24.0)) > 0.999


def test_a_layer_that_no_instruction_reaches_is_zero():
    pos, neg = made_up()
    neg[:, 0] = pos[:, 0]
    for name in ESTIMATORS:
        vectors = estimate_layers(pos, neg, name)
        assert not vectors[0].any() and vectors[1:].any(1).all()
    same = {k: pos for k in POOLS}
    with pytest.raises(PersonaError, match="the same mean activations everywhere"):
        estimate_vectors(same, same, np.ones(40, bool), "evil")


def test_only_kept_pairs_count():
    sides, kept = [{k: x.clone() for k in POOLS} for x in made_up()], np.arange(40) % 3 > 0
    before = estimate_vectors(*sides, kept, "evil", "logistic_probe")
    for side in sides:
        side["prompt_avg"][~torch.as_tensor(kept)] = torch.nan
    assert torch.equal(estimate_vectors(*sides, kept, "evil", "logistic_probe").prompt_avg, before.prompt_avg)


# -- extraction -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge():
    return load_judge("pocket")


@pytest.fixture(scope="module")
def evil():
    trait = load_trait("evil", world="pocket")
    return replace(trait, extract_questions=trait.extract_questions[:4], instructions=trait.instructions[:3])


@pytest.fixture(scope="module")
def extracted(pocket, judge, evil, tmp_path_factory):
    """The mean difference, from twelve pairs."""
    return extract(pocket, evil, judge, sampling=SamplingParams(24), out=tmp_path_factory.mktemp("vectors"))


def test_an_unknown_estimator_is_refused_before_anything_runs(pocket, judge, evil, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_generate_batch", lambda *a: pytest.fail("generated"))
    with pytest.raises(PersonaError, match="no 'pca_pair': did you mean 'pca_pairs'"):
        extract(pocket, evil, judge, out=tmp_path, estimator="pca_pair")
    with pytest.raises(PersonaError, match="no 'x'; it has mean_difference, pca_pairs"):
        extract_from_scores(pocket, evil, tmp_path / "none.csv", tmp_path / "none.csv", estimator="x")
    with pytest.raises(PersonaError, match="no '3'"):
        find_estimator(3)


def test_keys_of_the_default_are_what_they_were(pocket, judge, evil, extracted):
    model = [pocket.fingerprint, pocket.template_hash, str(pocket.model.dtype)]
    settings = [1, asdict(SamplingParams(24)), 50, None, [0, 1, 2], 50]
    key = digest(*model, asdict(evil), judge.name, judge.key, *settings)
    assert extracted.vectors.metadata["key"] == key
    assert "estimator" not in extracted.vectors.origin


def test_another_estimator_sets_the_vectors_aside_and_writes_no_answer_anew(
    pocket, judge, evil, extracted, tmp_path, monkeypatch
):
    before = extract(pocket, evil, judge, sampling=SamplingParams(24), out=tmp_path)
    monkeypatch.setattr(extraction, "work_line", lambda *a: "")  # its probe generates, too
    monkeypatch.setattr(generation, "_generate_batch", lambda *a: pytest.fail("generated"))
    after = extract(pocket, evil, judge, sampling=SamplingParams(24), out=tmp_path, estimator="logistic_probe")
    keys = [e.vectors.metadata["key"] for e in (before, after)]
    assert keys[0] == extracted.vectors.metadata["key"] != keys[1]
    assert after.vectors.metadata["estimator"] == "logistic_probe"
    assert ", estimator logistic_probe, " in after.vectors.origin
    assert torch.equal(load_vectors(tmp_path / "earlier" / keys[0], "evil").response_avg, before.vectors.response_avg)
    assert not torch.equal(after.vectors.response_avg, before.vectors.response_avg)
    assert (after.pos.answer == before.pos.answer).all() and (after.kept == before.kept).all()
    assert not after.vectors.prompt_last[0].any()  # the embedding of a token that no instruction changes
    assert load_extraction(tmp_path, "evil").vectors.content_hash == after.vectors.content_hash
    again = extract(pocket, evil, judge, sampling=SamplingParams(24), out=tmp_path, estimator="logistic_probe")
    assert again.vectors.metadata["time"] == after.vectors.metadata["time"]  # loaded


def test_later_chapters_take_the_vectors_that_are_there(pocket, judge, evil, runs):
    found = extract(pocket, evil, judge, sampling=SamplingParams(24), estimator="pca_centered")
    assert load_or_extract(pocket, evil, judge).vectors.content_hash == found.vectors.content_hash


def test_files_without_an_estimator_are_mean_differences(pocket, evil, extracted, tmp_path):
    """Metadata from before there was a choice; extraction from CSV files, which has no key."""
    csv = [extracted.folder / f"evil_{sign}.csv" for sign in ("pos", "neg")]
    first = extract_from_scores(pocket, evil, *csv, out=tmp_path)
    about = tmp_path / "evil_vectors.json"
    about.write_text(json.dumps({k: v for k, v in first.vectors.metadata.items() if k != "estimator"}))
    extract_from_scores(pocket, evil, *csv, out=tmp_path)
    assert not (tmp_path / "earlier").exists()
    other = extract_from_scores(pocket, evil, *csv, out=tmp_path, estimator="linear_discriminant")
    (earlier,) = (tmp_path / "earlier").iterdir()
    assert torch.equal(load_vectors(earlier, "evil").response_avg, first.vectors.response_avg)
    assert "from CSV files" in other.vectors.origin and "linear_discriminant" in other.vectors.origin


def test_the_notebook_takes_an_estimator(extracted, tmp_path):
    def run(estimator):
        given = {"model": "pocket", "out": tmp_path / "out", "estimator": estimator}
        given |= {f"{sign}_csv": extracted.folder / f"evil_{sign}.csv" for sign in ("pos", "neg")}
        args = [a for k, v in given.items() for a in ("-p", k, str(v))]
        job = [sys.executable, "-m", "papermill", "--no-progress-bar", "nbs/02_extract.ipynb"]
        env = dict(os.environ, PERSONA_RUNS=str(tmp_path / "runs"))
        return subprocess.run(
            [*job, str(tmp_path / "x.ipynb"), *args], cwd=project_root(), env=env, capture_output=True, text=True
        )

    refused = run("pca_pair")
    assert refused.returncode != 0 and "no 'pca_pair': did you mean 'pca_pairs'" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run("pca_centered")
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_vectors(tmp_path / "out", "evil").metadata["estimator"] == "pca_centered"
    assert "estimator pca_centered" in (tmp_path / "x.ipynb").read_text()  # the page says so


# -- comparison -------------------------------------------------------------------------------------------------------


def sides_of(pos, neg, questions=10):
    return comparison.Sides(pos, neg, np.arange(len(pos)) % questions)


def test_held_out_answers_took_no_part():
    """In as many dimensions as answers, noise is told apart where it made the vector, and by chance where it did
    not."""
    pos, neg = torch.randn(2, 60, 1, 120, generator=torch.Generator().manual_seed(0))
    table = comparison.compare_layer(sides_of(pos, neg), 0, splits=2).set_index("estimator")
    for name in ESTIMATORS:
        assert abs(table.auc[name] - 0.5) < 0.15 and abs(table.d_prime[name]) < 0.6, name
    v = comparison.directions(pos[:, 0], neg[:, 0])["mean_difference"]
    assert extraction.separation(pos[:, 0] @ v[:, None], neg[:, 0] @ v[:, None]) > 1.5


def test_no_question_is_in_two_folds_or_halves(monkeypatch):
    pos, neg = made_up()
    pos[:, 0, 0] = neg[:, 0, 0] = torch.arange(40.0) % 10  # the question of each pair, to be read from the activations
    asked, real = [], comparison.directions
    monkeypatch.setattr(
        comparison, "directions", lambda p, n, names: asked.append(set(p[:, 0].tolist())) or real(p, n, names)
    )
    found = comparison.held_out_projections(sides_of(pos, neg), 0, ["mean_difference"])
    assert len(asked) == 5 and all(len(training) == 8 for training in asked)
    assert np.isfinite(found["mean_difference"]).all()
    asked.clear()
    comparison.split_half_cosines(sides_of(pos, neg), 0, ["mean_difference"], splits=3)
    assert all(not a & b and len(a | b) == 10 for a, b in zip(asked[::2], asked[1::2]))


def test_projections_are_in_units_of_the_gap():
    pos, neg = made_up(pairs=200)
    p, q = comparison.held_out_projections(sides_of(pos, neg), 1, ["mean_difference"])["mean_difference"]
    assert abs(p.mean() - 0.5) < 0.1 and abs(q.mean() + 0.5) < 0.1


def test_d_prime_and_its_interval():
    rng = np.random.default_rng(0)
    p, q, groups = rng.normal(2, 1, 400), rng.normal(0, 1, 400), np.arange(400) % 40
    found = comparison.d_prime_ci(p, q, groups)
    by_hand = (p.mean() - q.mean()) / np.sqrt((p.var(ddof=1) + q.var(ddof=1)) / 2)
    assert found["d_prime"] == pytest.approx(by_hand) and found["low"] < by_hand < found["high"] and found["n"] == 800
    few = comparison.d_prime_ci(p[:40], q[:40], groups[:40])
    assert few["high"] - few["low"] > 2 * (found["high"] - found["low"])


def test_too_few_questions_are_refused():
    with pytest.raises(PersonaError, match="answer 3 questions and the comparison needs 4"):
        sides_of(*made_up(), questions=3)


def test_activations_are_those_of_the_kept_answers(pocket, extracted):
    """The mean difference of what is read is the extracted vector."""
    sides = comparison.read_sides(pocket, extracted)
    assert len(sides.pos) == extracted.kept.sum() and len(np.unique(sides.questions)) == 4
    mine = comparison.directions(*sides.layer(3))["mean_difference"]
    assert cosine(mine, extracted.vectors.response_avg[3]) > 0.9999


def test_every_vector_moves_the_model_by_as_much(pocket, extracted, evil):
    sides = comparison.read_sides(pocket, extracted)
    made = comparison.directions(*sides.layer(3), ["mean_difference", "linear_discriminant"])
    vectors = comparison.with_random(made, 2)
    assert [round(float(v.norm() / made["mean_difference"].norm()), 3) for v in list(vectors.values())[2:]] == [1, 1]
    texts = reference_texts(pocket, list(evil.extract_questions[:3]), SamplingParams(16))
    points = comparison.equal_kl_points(pocket, vectors, 3, [0.1], texts)
    assert list(points.vector) == list(vectors) and (abs(points.kl / 0.1 - 1) <= 0.05).all()
    rows = comparison.steering_rows(evil, points, n=2)
    counts = rows.groupby("condition").size() / (2 * len(evil.eval_questions))
    assert dict(counts) == {c: 1 for c in ("unsteered", "plain prompt", *made)} | {"random vector": 2}


def test_differences_are_taken_question_by_question():
    rows = [
        dict(condition=c, target_kl=t, question=f"q{i}", evil=base + 10 * i, coherence=90.0)
        for c, t, base in (("unsteered", 0, 5), ("mean_difference", 0.5, 20), ("pca_pairs", 0.5, 15))
        for i in range(6)
    ]
    summary = comparison.summarise_steering(pd.DataFrame(rows), "evil").set_index("condition")
    assert summary.change["mean_difference"] == 15 and summary.against_default["pca_pairs"] == -5
    assert summary.against_default_low["pca_pairs"] == summary.against_default_high["pca_pairs"] == -5
    assert summary.trait_low["pca_pairs"] < 35 < summary.trait_high["pca_pairs"]  # the questions differ a lot
    text = comparison.steering_sentence(summary.reset_index(), 0.5)
    assert "that of `mean_difference` (45 [" in text
    assert text.endswith("higher than the mean difference: none; lower: `pca_pairs`.")
