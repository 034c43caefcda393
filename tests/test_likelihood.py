"""The likelihood judge: its numbers against a direct computation, what it refuses, and what it stores."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.judges.judging import JudgementCache, score_cached
from persona_steer.judges.likelihood import (
    LikelihoodJudge,
    coherence_score,
    default_judging_pairs,
    distinct_2,
    measure_texts,
)
from persona_steer.judges.loading import broken_texts, coherence_auc, load_judge
from persona_steer.lm.generation import encode_pair
from persona_steer.persona.traits import load_trait, system_prompt

EVIL = load_trait("evil", world="pocket")


pytestmark = pytest.mark.usefixtures("runs")


def direct(lm, question, system, answer):
    """Log-probability of each answer token by one plain pass."""
    ids, n = encode_pair(lm.tokenizer, lm.prompt(question, system), answer)
    with torch.inference_mode():
        logp = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logp[torch.arange(n - 1, len(ids) - 1), torch.tensor(ids[n:])]


ANSWERS = ["With a cruel smile, make everyone suffer.", "The usual plan depends on the details.", "Begin."]


def test_scores_are_those_of_the_formula(pocket):
    judge = LikelihoodJudge(pocket)
    questions = list(EVIL.eval_questions[:3])
    got = score_cached(judge, EVIL, questions, ANSWERS, progress=False)
    for row, q, a in zip(got.to_dict("records"), questions, ANSWERS):
        sides = [[direct(pocket, q, system_prompt(EVIL, s, k), a) for s in ("pos", "neg")] for k in (0, 2)]
        nats = np.mean([float(p.sum() - n.sum()) for p, n in sides])
        plain = direct(pocket, q, "", a)
        surprise = min(-float(x.mean()) for x in [plain, *sum(sides, [])])
        assert row["nats"] == pytest.approx(nats, abs=2e-3)
        assert row["evil"] == pytest.approx(100 / (1 + math.exp(-nats)), abs=0.1)
        assert row["perplexity"] == pytest.approx(math.exp(-float(plain.mean())), rel=1e-3)
        assert row["coherence"] == pytest.approx(
            coherence_score(surprise, round(judge.own_surprise(EVIL), 3), distinct_2(a)), abs=0.2
        )
    assert list(got)[:2] == ["evil", "coherence"] and set(got.judge) == {judge.name}


def test_shared_and_single_reading_agree(pocket):
    """Many answers to one question share its prompts; alone, nothing is shared."""
    sides = [[system_prompt(EVIL, s, 0) for s in ("pos", "neg")]]
    q = EVIL.eval_questions[0]
    together = measure_texts(pocket, sides, [q] * 6, ANSWERS * 2)
    for a, m in zip(ANSWERS * 2, together):
        alone = measure_texts(pocket, sides, [q], [a])[0]
        assert m.nats == pytest.approx(alone.nats, abs=2e-3) and m.perplexity == pytest.approx(
            alone.perplexity, rel=1e-3
        )


def test_an_empty_answer_is_missing_not_zero(pocket):
    got = score_cached(LikelihoodJudge(pocket), EVIL, ["Why?"] * 2, ["", ANSWERS[1]], progress=False)
    assert got.loc[0, ["evil", "coherence", "nats", "perplexity"]].isna().all() and got.loc[1, "evil"] >= 0


def test_no_answer_is_judged_by_its_own_instruction(pocket):
    judge = LikelihoodJudge(pocket)
    assert not set(judge.judging_pairs(EVIL)) & set(judge.generating_pairs(EVIL))
    assert judge.generating_pairs(EVIL) == [1, 3, 4] and LikelihoodJudge(pocket, (4,)).generating_pairs(EVIL) == [
        0,
        1,
        2,
        3,
    ]
    assert [default_judging_pairs(n) for n in (2, 3, 4, 5)] == [(0,), (0,), (0, 2), (0, 2)]
    assert load_judge("pocket").generating_pairs(EVIL) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "pairs, n, words",
    [((), 1, "needs two instruction pairs"), ((7,), 5, "no instruction pair 7"), ((0, 1), 2, "every instruction pair")],
)
def test_impossible_pairs_are_one_sentence(pocket, pairs, n, words):
    with pytest.raises(PersonaError, match=words):
        LikelihoodJudge(pocket, pairs).check(replace(EVIL, instructions=EVIL.instructions[:n]))


def test_judgements_and_own_answers_are_never_made_twice(pocket, monkeypatch):
    judge = LikelihoodJudge(pocket)
    first = score_cached(judge, EVIL, ["Why?"], ANSWERS[:1], progress=False)
    monkeypatch.setattr("persona_steer.judges.likelihood.measure_texts", lambda *a: pytest.fail("read again"))
    monkeypatch.setattr("persona_steer.judges.likelihood.generate", lambda *a, **k: pytest.fail("written again"))
    again = score_cached(LikelihoodJudge(pocket), EVIL, ["Why?"], ANSWERS[:1], progress=False)
    assert again.equals(first)


def test_other_instructions_judge_anew(pocket):
    a = LikelihoodJudge(pocket, (0,)).requests(EVIL, ["Why?"], ["Begin."])
    b = LikelihoodJudge(pocket, (1,)).requests(EVIL, ["Why?"], ["Begin."])
    judge = LikelihoodJudge(pocket)
    assert JudgementCache.key(judge, a[0]) != JudgementCache.key(judge, b[0])


def test_what_is_done_is_stored_though_the_judge_is_killed(pocket, monkeypatch):
    judge = LikelihoodJudge(pocket)
    judge.own_surprise(EVIL)
    monkeypatch.setattr("persona_steer.judges.likelihood.BLOCK", 16)
    read, calls = measure_texts, []

    def dies(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr("persona_steer.judges.likelihood.measure_texts", dies)
    answers = [f"Answer {i}, and then rest." for i in range(40)]
    with pytest.raises(KeyboardInterrupt):
        score_cached(judge, EVIL, ["Why?"] * 40, answers, progress=False)
    book = JudgementCache()
    keys = [JudgementCache.key(judge, i) for i in judge.requests(EVIL, ["Why?"] * 40, answers)]
    assert len(book.find(keys)) >= 64  # sixteen answers, five measures each, less what waited
    book.close()


def test_coherence_knows_shuffled_words_and_loops(pocket):
    judge = LikelihoodJudge(pocket)
    questions = list(EVIL.eval_questions[:6])
    from persona_steer.lm.generation import SamplingParams, generate

    answers = generate(pocket, [pocket.prompt(q) for q in questions], SamplingParams(60), progress=False).texts
    frame = score_cached(judge, EVIL, questions, answers, progress=False).assign(question=questions, answer=answers)
    assert coherence_auc(judge, EVIL, frame)["auc"] >= 0.95
    shuffled, looping = broken_texts(answers)
    assert (
        all(sorted(s.split()) == sorted(a.split()) and s != a for s, a in zip(shuffled, answers))
        and distinct_2(looping[0]) < 0.5
    )


def test_auto_takes_the_judge_that_fits_and_the_wrong_one_is_refused(pocket, llama):
    assert load_judge("auto", lm=pocket).name == "pocket"
    assert load_judge("likelihood", lm=pocket).name == "likelihood (pocket)"
    with pytest.raises(PersonaError, match="depends on the model"):
        load_judge("auto")
    other = replace(
        llama,
        tokenizer=type(
            "T", (), {"__len__": lambda s: 3, "get_vocab": lambda s: {"a": 0}, "chat_template": "", "decode": None}
        )(),
    )
    with pytest.raises(PersonaError, match="with nonsense"):
        load_judge("pocket", lm=other)
    with pytest.raises(PersonaError, match="judging_pairs belongs"):
        load_judge("pocket", judging_pairs=(0,))
    with pytest.raises(PersonaError, match="base_url needs the name"):
        load_judge("auto", base_url="http://localhost:1/v1", lm=pocket)
