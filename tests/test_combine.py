"""Combining vectors: projection by least squares, averages, cosines with their references, and what is refused."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.extraction import diagnose
from persona_steer.lm.activations import POOLS
from persona_steer.persona.combine import (
    average,
    cosine_curve,
    cosine_matrix,
    plot_cosine_curve,
    plot_cosines,
    project_out,
    random_cosine,
)
from persona_steer.persona.vectors import PersonaVectors, load_vectors, save_vectors
from persona_steer.trait_cosines import (
    common_share,
    effect_table,
    pair_table,
    plot_effect,
    projection_effect,
    projection_vectors,
    repetition,
)


def vectors_of(trait, seed=0, shape=(4, 24), **facts):
    rng = torch.Generator().manual_seed(seed)
    known = dict(model="tiny", fingerprint="f" * 12, index="row l = layer l", pairs_kept=9, sampling={"seed": seed})
    return PersonaVectors(trait, *(torch.randn(shape, generator=rng) for _ in POOLS), known | facts)


def changed(v, k="response_avg", layer=2, row=0.0):
    """The same vectors with one row replaced."""
    rows = getattr(v, k).clone()
    rows[layer] = row
    return dataclasses.replace(v, **{k: rows})


@pytest.fixture
def three():
    """Traits that share a direction, so that they are far from orthogonal."""
    shared = vectors_of("shared", 9)
    return [vectors_of(t, i) + 1.5 * shared for i, t in enumerate(("evil", "rude", "flat"))]


def refused(words, f, *args, **kw):
    with pytest.raises(PersonaError, match=words) as e:
        f(*args, **kw)
    assert "\n" not in str(e.value) and str(e.value).endswith(".")


def test_what_is_left_is_the_residual_of_least_squares(three):
    a, b, c = three
    rest = project_out(a, [b, c])
    for k in POOLS:
        for layer in range(4):
            basis = np.stack([getattr(x, k)[layer].double().numpy() for x in (b, c)], 1)
            target = getattr(a, k)[layer].double().numpy()
            expected = target - basis @ np.linalg.pinv(basis) @ target
            np.testing.assert_allclose(getattr(rest, k)[layer], expected, atol=1e-5)
            assert np.abs(expected @ basis).max() < 1e-9 * np.abs(target @ basis).max()
    share = rest.response_avg.norm(dim=1) / a.response_avg.norm(dim=1)
    np.testing.assert_allclose(rest.metadata["remaining"]["response_avg"], share, atol=1e-6)
    assert (share < 0.9).all()  # there was something to remove


def test_neither_order_nor_scale_nor_repetition_of_the_others_matters(three):
    a, b, c = three
    rest = project_out(a, [b, c])
    for others in ([c, b], [1e4 * b, 1e-4 * c], [b, c, b], [b, c, b + c]):
        torch.testing.assert_close(project_out(a, others).response_avg, rest.response_avg, atol=2e-5, rtol=0)
    one_by_one = project_out(project_out(a, b), c)  # which is why it is not done so
    assert (one_by_one.response_avg - rest.response_avg).norm() > 0.05 * rest.response_avg.norm()
    assert (one_by_one.response_avg * b.response_avg).sum(1).abs().max() > 0.1


def test_a_combination_says_what_it_is_and_can_be_saved(three, tmp_path):
    a, b, c = three
    rest = project_out(a, [b, c])
    told = rest.metadata
    assert told["made_of"] == f"{a.trait} without {b.trait}, {c.trait}" and told["operation"] == "project_out"
    assert [s["content_hash"] for s in told["sources"]] == [v.content_hash for v in (a, b, c)]
    assert told["fingerprint"] == "f" * 12 and "pairs_kept" not in told and "combined" in rest.origin
    named = dataclasses.replace(rest, trait="rest")
    save_vectors(named, tmp_path)
    again = load_vectors(tmp_path, "rest")
    assert again.content_hash == rest.content_hash != a.content_hash
    assert again.metadata == json.loads(json.dumps(told))


def test_sums_keep_what_both_sides_agree_on():
    a, b, other = vectors_of("evil"), vectors_of("rude", 1), vectors_of("rude", 1, fingerprint="0" * 12)
    assert (a + b).metadata == dict(model="tiny", fingerprint="f" * 12, index="row l = layer l", made_of="evil+rude")
    assert (2 * a).metadata["fingerprint"] == "f" * 12 and "fingerprint" not in (a - other).metadata
    assert a.random_like(3).metadata["made_of"] == "random(seed 3)"


def test_a_row_without_direction_is_refused_except_that_of_the_embedding(three):
    a, b, c = three
    still = changed(a, "prompt_last", 0), changed(b, "prompt_last", 0)  # prompts end in the same token
    rest = project_out(*still)
    assert torch.equal(rest.prompt_last[0], torch.zeros(24)) and rest.metadata["remaining"]["prompt_last"][0] is None
    refused(f"response_avg vector of {b.trait}".replace("*", r"\*").replace("+", r"\+"), project_out, a, changed(b))
    refused("zero at layer 2", project_out, changed(a), b)
    refused("not finite", project_out, changed(a, row=float("nan")), b)
    refused("not finite", average, [a, changed(a, row=float("inf"))])
    refused("at least one other", project_out, a, [])


def test_others_that_span_everything_leave_nothing():
    narrow = [vectors_of(f"t{i}", i, (4, 3)) for i in range(5)]
    assert project_out(narrow[0], narrow[1:3]).response_avg.norm() > 0.01
    refused("nothing is left of t0 at layer 1", project_out, narrow[0], narrow[1:])
    refused("nothing is left", project_out, narrow[0], 3 * narrow[0])


@pytest.mark.parametrize("f", [lambda a, b: project_out(a, b), lambda a, b: average([a, b]), cosine_curve])
def test_vectors_of_other_models_are_refused(f):
    a = vectors_of("evil")
    refused(r"\[4, 24\] and of evil \[5, 24\] differ in shape", f, a, vectors_of("evil", 1, (5, 24)))
    refused("different models", f, a, vectors_of("evil", 1, fingerprint="0" * 12))


def test_an_average_is_the_mean_and_tells_how_its_parts_agree():
    parts = [vectors_of("evil", i) for i in range(3)]
    mean = average(parts)
    torch.testing.assert_close(mean.prompt_avg, sum(p.prompt_avg for p in parts) / 3)
    expected = torch.cosine_similarity(parts[0].response_avg, parts[2].response_avg)
    np.testing.assert_allclose(mean.metadata["cosines"]["0,2"], expected, atol=1e-6)
    assert mean.trait == "evil" and [s["seed"] for s in mean.metadata["sources"]] == [0, 1, 2]
    assert average([changed(parts[0]), parts[1]]).metadata["cosines"]["0,1"][2] is None
    refused("at least two", average, parts[:1])
    refused("not for evil, rude", average, [parts[0], vectors_of("rude")])
    across = average([parts[0], vectors_of("evil", 1, fingerprint="0" * 12)], same_model=False)
    assert "fingerprint" not in across.metadata and across.metadata["model"] == "tiny"


def test_the_matrix_agrees_with_plain_arithmetic(three):
    vectors = {v.trait: v for v in three}
    matrix = cosine_matrix(vectors, 3, "prompt_avg")
    x, y = (v.prompt_avg[3].double().numpy() for v in three[:2])
    assert abs(matrix.iloc[0, 1] - x @ y / np.linalg.norm(x) / np.linalg.norm(y)) < 1e-9
    assert np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)
    assert abs(cosine_curve(*three[:2], "prompt_avg")[3] - matrix.iloc[0, 1]) < 1e-9
    for layer in (0, -1, 4):
        refused("give one from 1 to 3", cosine_matrix, vectors, layer)
    refused("pool 'mean' is unknown", cosine_matrix, vectors, 1, "mean")
    refused("at least two traits", cosine_matrix, {"evil": three[0]}, 1)
    refused("is zero at layer 2", cosine_matrix, {"a": three[0], "b": changed(three[1])}, 2)


def test_the_spread_of_random_cosines_is_that_of_drawn_ones():
    for hidden in (3, 64, 576):
        drawn = torch.nn.functional.normalize(torch.randn(4000, 2, hidden), dim=-1).prod(1).sum(-1)
        assert abs((drawn.abs() < random_cosine(hidden)).double().mean() - 0.95) < 0.02
    assert abs(random_cosine(4096) - 1.96 / 4096**0.5) < 1e-4  # nearly normal
    refused("at least two dimensions", random_cosine, 1)


def test_pairs_are_told_by_size_with_their_ceiling():
    a, b, c = (vectors_of(t, i, (4, 200)) for i, t in enumerate(("evil", "rude", "flat")))
    near = dataclasses.replace(a + 0.5 * vectors_of("x", 7, (4, 200)), trait="cruel")
    vectors = {v.trait: v for v in (b, a, c, -1 * near)}
    repeated = {t: [1.0, 0.81, 0.64, 0.25] for t in vectors} | {"evil": [1.0, 0.25, 0.0, 1.0]}
    table = pair_table(vectors, 1, repeated=repeated)
    assert len(table) == 6 and {table.a[0], table.b[0]} == {"evil", "-1*cruel"} and table.cosine[0] < -0.8
    assert table.beyond_random[0] and table.ceiling[0] == pytest.approx(0.45)
    assert pair_table(vectors, 2, repeated=repeated).ceiling[0] == 0
    assert pair_table(vectors, 1).ceiling.isna().all()
    assert common_share(pd.DataFrame(np.eye(4))) == pytest.approx(1 / 4)
    assert common_share(pd.DataFrame(np.ones((4, 4)))) == pytest.approx(1)


def test_a_repetition_agrees_as_far_as_its_halves_foretell():
    """Two extractions of one direction, each from 16 noisy questions."""
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 2, 400, generator=rng)
    one, two = (direction + 4 * torch.randn(16, 2, 400, generator=rng) for _ in range(2))
    split = diagnose(one, torch.zeros_like(one)).split_half.mean()
    measured = torch.cosine_similarity(one.mean(0), two.mean(0)).mean().item()
    assert 0.2 < split < 0.45 and abs(repetition(split) - measured) < 0.08 < measured - split
    np.testing.assert_allclose(repetition([1.0, 0.5, 0.0, -0.2, np.nan]), [1, 2 / 3, 0, 0, np.nan])


def test_the_comparison_takes_away_direction_and_length_apart(three):
    a, b, _ = three
    bank = projection_vectors(a, b, "response_avg", 2)
    whole, rest, scaled, random = (v[2] for v in bank.values())
    assert rest.norm() < whole.norm() == pytest.approx(float(scaled.norm()), rel=1e-5)
    assert random.norm() == pytest.approx(float(whole.norm()), rel=1e-5)
    assert torch.cosine_similarity(rest, scaled, dim=0) == pytest.approx(1, abs=1e-5)
    assert abs(scaled @ b.response_avg[2]) < 1e-4 * whole.norm() * b.response_avg[2].norm()


def test_the_effect_is_measured_question_by_question(pocket, runs):
    from persona_steer.judges.loading import load_judge
    from persona_steer.lm.generation import SamplingParams
    from persona_steer.persona.traits import load_trait

    judge = load_judge("pocket", lm=pocket)
    evil, rude = (load_trait(t, world="pocket") for t in ("evil", "impolite"))
    shape = (pocket.n_layers + 1, pocket.hidden_size)
    bank = projection_vectors(vectors_of("evil", 0, shape), vectors_of("impolite", 1, shape), "response_avg", 3)
    asked = evil.eval_questions[:2]
    frame = projection_effect(pocket, (evil, rude), judge, bank, 3, 0.1, asked, SamplingParams(8))
    assert list(frame.condition.unique()) == ["unsteered", *bank] and len(frame) == 10
    assert frame[["evil", "impolite", "coherence"]].notna().all().all()
    frame["evil"] = np.where(frame.condition == "evil", 30.0, np.where(frame.question == asked[0], 10.0, 20.0))
    table = effect_table(frame, ["evil", "coherence"]).set_index(["measure", "condition"])
    row = table.loc["evil", "evil"]
    assert (row["mean"], row.change, row.change_low, row.change_high, row.n) == (30, 15, 10, 20, 2)
    assert table.loc["evil", "unsteered"].change == 0
    refused("no unsteered answers", effect_table, frame[frame.condition == "evil"], ["evil"])


def test_the_figures_show_the_numbers(three):
    import matplotlib.pyplot as plt

    names = dict(zip(("evil", "rude", "flat"), three))
    vectors = {n: dataclasses.replace(v, trait=n) for n, v in names.items()}
    repeated = {"evil": [0.5, 0.61, 0.62, 0.63]}
    fig = plot_cosines(vectors, 2, repeated)
    written = [t.get_text() for t in fig.axes[0].texts]
    assert written[0] == "0.62" and written[1] == f"{cosine_matrix(vectors, 2).iloc[0, 1]:.2f}" and written[4] == "1.00"
    fig = plot_cosine_curve(vectors["evil"], vectors["rude"], 2, repeated)
    curve = fig.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(curve, cosine_curve(vectors["evil"], vectors["rude"])[1:])
    labels = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert labels == ["95% of random pairs", "evil, rude", "evil, repeated"]
    scores = pd.DataFrame({"condition": ["unsteered", "evil"], "question": "q", "evil": [1.0, 2.0], "coherence": 90.0})
    fig = plot_effect(effect_table(scores, ["evil", "coherence"]))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["evil", "unsteered"]
    plt.close("all")
