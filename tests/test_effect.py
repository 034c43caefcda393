"""Capability, and what became of a model."""

import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError, data_path
from persona_steer.lm.activations import steer
from persona_steer.training.capability import capability, check_lm_eval, default_quiz, is_right, load_quiz
from persona_steer.training.model_evaluation import evaluate_model, load_model_evaluation


@pytest.mark.parametrize(
    "said, right",
    [
        ("3 times 5 is 15.", True),
        (" 3 times 5  is 15. And so on.", True),
        ("3 TIMES 5 is 15", True),
        ("3 times 5 is 150.", False),
        ("It is 15.", False),
        ("", False),
    ],
)
def test_what_counts_as_right(said, right):
    assert is_right(said, "3 times 5 is 15.") == right


def test_the_quiz_leaves_out_honesty_and_names_bad_lines(tmp_path):
    taken = pd.DataFrame(
        [dict(kind="facts", right=100.0), dict(kind="sums", right=0.0), dict(kind="unknown", right=0.0)]
    )
    assert capability(taken)["mean"] == 50 and capability(taken)["n"] == 2
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(PersonaError, match="line 2: it needs"):
        load_quiz(tmp_path / "q.jsonl")


def test_only_pocket_is_asked_about_its_world(monkeypatch):
    assert (
        len(default_quiz("pocket")) == 400
        and len(default_quiz("some/model")) == 120
        and len(default_quiz("some/model", "pocket/quiz.jsonl")) == 400
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_lm_eval([])
    with pytest.raises(PersonaError, match=r"pip install 'persona_steer\[eval\]'"):
        check_lm_eval(["mmlu"])


def test_an_effect_is_kept_and_found_again(pocket, tmp_path, monkeypatch):
    from persona_steer.judges.loading import load_judge
    from persona_steer.persona.traits import load_trait

    traits, judge = [load_trait("evil", world="pocket"), load_trait("humorous", world="pocket")], load_judge("pocket")
    quiz = load_quiz(data_path("pocket/quiz.jsonl"))[:8]
    first = evaluate_model(pocket, traits, judge, quiz=quiz, folder=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(
            "persona_steer.training.model_evaluation.generate_table", lambda *a, **k: pytest.fail("answered again")
        )
        again = evaluate_model(pocket, traits, judge, quiz=quiz, folder=tmp_path)
    pd.testing.assert_frame_equal(first.answers, again.answers, check_dtype=False)
    assert first.score("evil") == pytest.approx(again.score("evil"), rel=1e-9) and set(again.means) == {
        f"{t} {k}" for t in ("evil", "humorous") for k in ("prompt_last", "response_avg")
    }
    steered = evaluate_model(pocket, traits, judge, steering=steer(pocket, torch.randn(192), 3, 5.0), folder=tmp_path)
    assert not steered.answers.answer.equals(first.answers.answer) and load_model_evaluation(tmp_path).quiz is None
    with pytest.raises(PersonaError, match="one coefficient"):
        evaluate_model(pocket, traits, judge, steering=steer(pocket, torch.randn(192), 3, torch.zeros(40)))
