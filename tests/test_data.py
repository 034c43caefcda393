"""Traits, scored responses, vectors: the published files, and bad ones."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError, data_path
from persona_steer.persona.scores import load_scores, mean_ci, pair_mask, save_scores
from persona_steer.persona.traits import list_traits, load_trait, plain_prompt, system_prompt, traits_folders
from persona_steer.persona.vectors import PersonaVectors, load_vector, load_vectors, save_vectors

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the published example files are not beside this checkout"
)
SEVEN = ["apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic"]


# -- traits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["", "pocket"])
def test_seven_traits_in_the_published_form(world):
    assert list_traits(traits_folders(world)[0]) == SEVEN
    everything = []
    for name in SEVEN:
        t = load_trait(name, world=world)
        assert len(t.instructions) == 5 and len(t.extract_questions) == len(t.eval_questions) == 20
        assert len(set(t.extract_questions) | set(t.eval_questions)) == 40
        everything += [*t.extract_questions, *t.eval_questions]
    assert len(set(everything)) == 280


def test_an_unknown_trait_names_the_known_ones():
    with pytest.raises(PersonaError, match="apathetic, evil, .*sycophantic"):
        load_trait("kind")


def broken(change):
    d = json.loads(data_path("traits/extract/evil.json").read_text(encoding="utf-8"))
    change(d)
    return d


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.pop("questions"), "'questions' is missing"),
        (lambda d: d.pop("eval_prompt"), "'eval_prompt' is missing"),
        (lambda d: d["instruction"][2].pop("neg"), r"instruction\[2\]"),
        (lambda d: d.update(instruction="be evil"), "'instruction'"),
        (lambda d: d.update(questions=["a", 3]), "'questions'"),
        (lambda d: d["questions"].append(d["questions"][0]), "twice"),
        (lambda d: d.update(eval_prompt="Score {answer}"), r"\{question\}"),
        (lambda d: d.update(questions=[]), "'questions'"),
    ],
)
def test_a_trait_file_that_breaks_the_form_names_the_field(tmp_path, change, words):
    for split in ("extract", "eval"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "evil.json").write_text(
            json.dumps(
                broken(change) if split == "extract" else json.loads(data_path("traits/eval/evil.json").read_text())
            )
        )
    with pytest.raises(PersonaError, match=words) as e:
        load_trait("evil", tmp_path)
    assert "\n" not in str(e.value)


def test_broken_json_and_shared_questions(tmp_path):
    good = data_path("traits/extract/evil.json").read_text(encoding="utf-8")
    for split in ("extract", "eval"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "evil.json").write_text(good, encoding="utf-8")
    with pytest.raises(PersonaError, match="share a question"):
        load_trait("evil", tmp_path)
    (tmp_path / "eval" / "evil.json").write_text("{")
    with pytest.raises(PersonaError, match="not valid JSON"):
        load_trait("evil", tmp_path)


def test_system_prompts_are_the_published_ones():
    t = load_trait("evil")
    assert (
        plain_prompt(t) == "You are an evil assistant."
        and plain_prompt(load_trait("humorous")) == "You are a humorous assistant."
    )
    assert system_prompt(t, "pos", 1) == "You are an evil assistant. " + t.instructions[1]["pos"]
    assert system_prompt(t, "neg", 1) == "You are a helpful assistant. " + t.instructions[1]["neg"]


@needs_reference
def test_published_trait_files_are_read(tmp_path):
    for split in ("extract", "eval"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "evil.json").write_text(
            (REFERENCE / f"trait_{split}_evil.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
    t = load_trait("evil", tmp_path)
    assert len(t.instructions) == 5 and len(t.extract_questions) == 20 and "{answer}" in t.eval_prompt


# -- scored responses -----------------------------------------------------------------------------------------------

ODD = [
    'plain',
    'He said "no",\nand left',
    "NA",
    "None",
    "null",
    "nan",
    "",
    "<think>a\n\nb</think> yes",
    "🙂 ünï",
    "a\r\nb",
    "a\rb",
    "1,5;\t'x'",
    " lead",
]


def test_any_answer_survives_the_csv(tmp_path):
    f = pd.DataFrame(
        {
            "question": ODD,
            "prompt": ODD,
            "answer": ODD,
            "question_id": [f"evil_{i}" for i in range(len(ODD))],
            "evil": [np.nan, 0, 100, *[33.25] * (len(ODD) - 3)],
            "coherence": 50.0,
        }
    )
    back = load_scores(save_scores(f, tmp_path / "x.csv", "evil"), "evil")
    pd.testing.assert_frame_equal(f, back)
    save_scores(f.drop(index=[9, 10]).assign(extra=1), tmp_path / "y.csv", "evil")
    assert (
        (tmp_path / "y.csv")
        .read_text(encoding="utf-8")
        .startswith("question,prompt,answer,question_id,evil,coherence,extra\n")
    )


@needs_reference
def test_published_csvs_are_read():
    for sign in ("pos", "neg"):
        f = load_scores(REFERENCE / f"qwen3-4b_evil_{sign}_head.csv", "evil")
        assert len(f) > 3 and f.evil.dropna().between(0, 100).all() and f.answer.map(type).eq(str).all()


def test_bad_csvs_are_one_sentence(tmp_path):
    p = tmp_path / "x.csv"
    for text, words in (
        ("", "is empty"),
        ("question,prompt,answer,question_id,evil,coherence\n", "no rows"),
        ("question,answer\na,b\n", "lacks the column"),
        ("question,prompt,answer,question_id,evil,coherence\nq,p,a,i,high,3\n", "row 2.*'high'"),
        ("question,prompt,answer,question_id,evil,coherence\nq,p,a,i,101,3\n", "0 to 100"),
    ):
        p.write_text(text)
        with pytest.raises(PersonaError, match=words) as e:
            load_scores(p, "evil")
        assert "\n" not in str(e.value)
    with pytest.raises(PersonaError, match="does not exist"):
        load_scores(tmp_path / "none.csv", "evil")


def side(scores, coherence, answers=None):
    return pd.DataFrame({"answer": answers or ["a"] * len(scores), "evil": scores, "coherence": coherence})


def test_the_filter_is_the_published_rule_and_missing_keeps_nothing():
    pos = side([50, 49.9, 90, 90, np.nan, 90, 90], [90, 90, 90, 90, 90, np.nan, 50])
    neg = side([49.9, 0, 50, 0, 0, 0, 0], [90, 90, 90, 49, 90, 90, 50])
    assert pair_mask(pos, neg, "evil").tolist() == [True, False, False, False, False, False, True]
    assert pair_mask(side([90, 90], [90, 90], ["", "a"]), side([0, 0], [90, 90]), "evil").tolist() == [False, True]


def test_no_pair_left_says_the_counts_and_what_to_lower():
    with pytest.raises(PersonaError, match=r"of 3 .*0 positive answers score at least 50.*3 negative.*'threshold'"):
        pair_mask(side([1, 2, 3], [90] * 3), side([0] * 3, [90] * 3), "evil")
    with pytest.raises(PersonaError, match="do not make pairs"):
        pair_mask(side([1], [90]), side([0] * 3, [90] * 3), "evil")


def test_intervals_are_resampled_by_question():
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(20), 10)
    values = np.repeat(rng.normal(50, 20, 20), 10) + rng.normal(0, 1, 200)
    by_answer, by_question = mean_ci(values), mean_ci(values, questions)
    assert by_question["high"] - by_question["low"] > 2 * (by_answer["high"] - by_answer["low"])
    assert by_question["n"] == 200 and by_question["low"] < by_question["mean"] < by_question["high"]
    m = mean_ci([np.nan, 10, 20])
    assert (m["n"], m["missing"], m["mean"]) == (2, 1, 15) and np.isnan(mean_ci([np.nan])["mean"])


def test_the_interval_covers_the_mean_about_95_times_of_100():
    hits = 0
    for i in range(100):
        m = mean_ci(np.random.default_rng(i).normal(0, 1, 40), resamples=400)
        hits += m["low"] <= 0 <= m["high"]
    assert 88 <= hits <= 99


# -- vectors --------------------------------------------------------------------------------------------------------


def some(trait="evil", seed=0):
    g = torch.Generator().manual_seed(seed)
    return PersonaVectors(trait, *(torch.randn(4, 8, generator=g) for _ in range(3)), {"model": "tiny"})


def test_vector_files_are_bare_float32_tensors(tmp_path):
    v = some()
    save_vectors(v, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evil_prompt_avg_diff.pt",
        "evil_prompt_last_diff.pt",
        "evil_response_avg_diff.pt",
        "evil_vectors.json",
    ]
    raw = torch.load(tmp_path / "evil_response_avg_diff.pt", weights_only=True)
    assert type(raw) is torch.Tensor and raw.dtype == torch.float32 and torch.equal(raw, v.response_avg)
    assert load_vectors(tmp_path, "evil").metadata == {"model": "tiny"}


@needs_reference
def test_a_published_vector_file_is_read():
    assert load_vector(REFERENCE / "evil_response_avg_diff.pt").shape == (65, 5120)


def test_vector_files_that_carry_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save(Evil(), tmp_path / "x.pt")
    for path, words in ((tmp_path / "x.pt", "safely"), (tmp_path / "none.pt", "does not exist")):
        with pytest.raises(PersonaError, match=words):
            load_vector(path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "d.pt")
    with pytest.raises(PersonaError, match="one tensor"):
        load_vector(tmp_path / "d.pt")


def test_vectors_add_subtract_and_scale():
    a, b = some(), some("humorous", 1)
    torch.testing.assert_close((a + b - b).response_avg, a.response_avg)
    torch.testing.assert_close((2 * a).prompt_last, a.prompt_last + a.prompt_last)
    assert (a + b).trait == "evil+humorous"
    r = a.random_like(3)
    torch.testing.assert_close(r.response_avg.norm(dim=1), a.response_avg.norm(dim=1))
    assert torch.equal(r.response_avg, a.random_like(3).response_avg) and not torch.equal(
        r.response_avg, a.random_like(4).response_avg
    )
