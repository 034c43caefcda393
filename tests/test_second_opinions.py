"""Second opinions: what the scorers say, which trait has one, the added column, agreement with the judge."""

import importlib.util
import math

import numpy as np
import pandas as pd
import pytest

from persona_steer.base.core import PersonaError
from persona_steer.judges import second_opinions as so
from persona_steer.persona.traits import load_trait

HERE = all(importlib.util.find_spec(p) for p in ("profanity_check", "vaderSentiment"))
needs_packages = pytest.mark.skipif(not HERE, reason="the extra 'opinions' is not installed")


@pytest.fixture
def no_packages(monkeypatch):
    """As if neither package were installed."""
    so._profanity_model.cache_clear()
    so._vader.cache_clear()
    real = importlib.util.find_spec
    hidden = ("profanity_check", "vaderSentiment")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else real(name, *a))
    yield
    so._profanity_model.cache_clear()
    so._vader.cache_clear()


@needs_packages
def test_rude_texts_score_high_and_empty_ones_are_missing():
    rude, kind, empty, blank = so.profanity_probability(
        ["Shut up, you damn idiot.", "The bread is on the table.", "", " \n"]
    )
    assert 0 <= kind < 0.2 and 0.8 < rude <= 1 and math.isnan(empty) and math.isnan(blank)
    assert so.profanity_probability([]) == []


@needs_packages
def test_sentiment_has_a_sign_and_empty_texts_are_missing():
    good, bad, empty = so.vader_compound(["Tomorrow will be wonderful.", "This is a hopeless disaster.", ""])
    assert -1 <= bad < -0.3 and 0.3 < good <= 1 and math.isnan(empty)


@needs_packages
def test_a_missing_text_between_others_does_not_shift_the_scores():
    texts = ["You idiot.", None, "Good morning.", float("nan"), "You idiot."]
    scores = so.profanity_probability(texts)
    assert scores[0] == scores[4] > 0.5 > scores[2] and math.isnan(scores[1]) and math.isnan(scores[3])


def test_the_traits_with_a_second_opinion():
    assert {t: so.second_opinion(t).name for t in so.SECOND_OPINIONS} == {
        "evil": "profanity",
        "impolite": "profanity",
        "optimistic": "vader_compound",
    }
    assert so.second_opinion("humorous") is None and so.second_opinion("") is None
    for trait, (name, sign) in so.SECOND_OPINIONS.items():
        assert load_trait(trait).name == trait and name in so.SCORERS and sign in (1, -1)
    for name, opinion in so.SCORERS.items():
        assert opinion.name == name and opinion.limits[0] < opinion.limits[1] and opinion.about.endswith(".")


@needs_packages
@pytest.mark.parametrize(
    "trait, column", [("evil", "profanity"), ("impolite", "profanity"), ("optimistic", "vader_compound")]
)
def test_the_column_is_added_and_nothing_else_changes(trait, column):
    frame = pd.DataFrame(
        dict(question=["a", "b", "c"], answer=["You stupid idiot.", "All will be great.", ""]), index=[5, 3, 9]
    )
    before = frame.copy()
    scored = so.add_second_opinion(frame, trait)
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(scored[["question", "answer"]], before)
    assert list(scored) == ["question", "answer", column] and scored[column].isna().tolist() == [False, False, True]
    assert scored[column].tolist()[:2] == so.second_opinion(trait).score(list(frame.answer)[:2])


def test_a_trait_without_one_leaves_the_table_alone_and_a_table_needs_answers():
    frame = pd.DataFrame(dict(answer=["x"]))
    assert list(so.add_second_opinion(frame, "apathetic")) == ["answer"]
    with pytest.raises(PersonaError, match="needs the column 'answer' .the table has question."):
        so.add_second_opinion(pd.DataFrame(dict(question=["x"])), "evil")


@pytest.mark.parametrize("trait, package", [("evil", "alt-profanity-check"), ("optimistic", "vaderSentiment")])
def test_a_missing_package_leaves_the_column_out_and_says_so_once(no_packages, capsys, trait, package):
    frame = pd.DataFrame(dict(answer=["You idiot."]))
    assert list(so.add_second_opinion(frame, trait)) == ["answer"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and package in said and "pip install 'persona_steer[opinions]'" in said
    with pytest.raises(PersonaError, match=r"pip install 'persona_steer\[opinions\]'"):
        so.second_opinion(trait).score(["x"])


def test_a_scorer_without_its_package_is_one_sentence(no_packages):
    with pytest.raises(PersonaError, match="'profanity' needs the package alt-profanity-check") as e:
        so.ProfanityScorer()
    assert "\n" not in str(e.value)


@needs_packages
def test_the_profanity_scorer_has_what_the_toxicity_experiment_needs():
    scorer = so.ProfanityScorer()
    assert scorer.name == "profanity" and any(c.isdigit() for c in scorer.key)
    scores = scorer.scores(["Shut up, you damn idiot.", "The bread is on the table.", ""])
    assert scores[0] > 80 and scores[1] < 20 and math.isnan(scores[2])
    assert scores[:2] == [
        100 * p for p in so.profanity_probability(["Shut up, you damn idiot.", "The bread is on the table."])
    ]


# -- agreement --------------------------------------------------------------------------------------------------------


def table(n=40, seed=0):
    """Scores that a second opinion follows with some noise; a row without a score and one without an opinion."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0, 100, n)
    opinion = np.exp(score / 20) + rng.normal(0, 20, n)  # far from linear
    frame = pd.DataFrame(dict(question=[f"q{i // 2}" for i in range(n)], evil=score, profanity=opinion))
    return pd.concat([frame, pd.DataFrame(dict(question=["x", "y"], evil=[np.nan, 90.0], profanity=[0.5, np.nan]))])


def test_agreement_is_spearman_and_auc_over_the_rows_that_have_both():
    from scipy.stats import mannwhitneyu, spearmanr

    frame = table()
    both = frame.dropna()
    found = so.opinion_agreement(frame, "evil")
    high = both.evil >= 50
    assert found.spearman["n"] == found.auc["n"] == 40 and found.n_high == int(high.sum())
    assert found.spearman["r"] == pytest.approx(spearmanr(both.evil, both.profanity).statistic)
    area = mannwhitneyu(both.profanity[high], both.profanity[~high]).statistic / (high.sum() * (~high).sum())
    assert found.auc["auc"] == pytest.approx(area) and found.auc["auc"] > 0.7
    for m, k in ((found.spearman, "r"), (found.auc, "auc")):
        assert m["low"] <= m[k] <= m["high"] and m["low"] < m["high"]
    other = so.opinion_agreement(frame, "evil", threshold=80)
    assert other.n_high == int((both.evil >= 80).sum()) < found.n_high


def test_questions_are_resampled_not_answers():
    frame = table()
    alone = so.opinion_agreement(frame.drop(columns="question"), "evil").spearman
    grouped = so.opinion_agreement(frame, "evil").spearman
    assert grouped["r"] == alone["r"] and (grouped["low"], grouped["high"]) != (alone["low"], alone["high"])


def test_a_falling_scorer_agrees_when_it_falls(monkeypatch):
    frame = table()
    rising = so.opinion_agreement(frame, "evil")
    monkeypatch.setitem(so.SECOND_OPINIONS, "evil", ("profanity", -1))
    falling = so.opinion_agreement(frame.assign(profanity=-frame.profanity), "evil")
    assert falling.spearman["r"] == pytest.approx(rising.spearman["r"])
    assert falling.auc["auc"] == pytest.approx(rising.auc["auc"])


def test_agreement_without_what_it_needs():
    frame = table()
    assert so.opinion_agreement(frame, "humorous") is None
    assert so.opinion_agreement(frame.drop(columns="profanity"), "evil") is None
    with pytest.raises(PersonaError, match="no scores for 'evil'"):
        so.opinion_agreement(frame.drop(columns="evil"), "evil")
    one_sided = so.opinion_agreement(frame.assign(evil=frame.evil / 10), "evil")
    assert math.isnan(one_sided.auc["auc"]) and "(0 answers) against the others missing." in str(one_sided)
    assert "Spearman 0." in str(one_sided) and "AUC for scores of at least 50" in str(
        so.opinion_agreement(frame, "evil")
    )
