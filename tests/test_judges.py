"""Judges: expected scores from a causal LM, the pocket judge's interface."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import make

from persona_steer.base.core import PersonaError
from persona_steer.judge_agreement import agreement
from persona_steer.judges.judging import (
    Judge,
    JudgementCache,
    JudgeRequest,
    add_scores,
    fill_prompt,
    requests_of,
    score_cached,
)
from persona_steer.judges.loading import load_judge
from persona_steer.judges.local import (
    CausalJudge,
    PocketJudge,
    answer_paths,
    expected_score,
    scores_from_words,
)
from persona_steer.persona.traits import load_trait


def digit_tokenizer():
    """One token a character, so that 10 is two tokens and 100 three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    chars = ["<e>", *"0123456789abcdefghijklmnopqrstuvwxyz .?\n<>/'-"]
    t = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token="<e>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=t,
        eos_token="<e>",
        pad_token="<e>",
        unk_token="<e>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


@torch.no_grad()
def by_hand(lm, prompt):
    """P(number) = product over its digits, times the probability that no digit follows; one text at a time."""

    def next_p(text):
        return (
            lm.model(input_ids=torch.tensor([lm.tokenizer(text, add_special_tokens=False).input_ids]))
            .logits[0, -1]
            .double()
            .softmax(-1)
        )

    digits = [lm.tokenizer.convert_tokens_to_ids(d) for d in "0123456789"]
    mass = {}
    for n in range(101):
        p, so_far = 1.0, prompt
        for d in str(n):
            p *= next_p(so_far)[lm.tokenizer.convert_tokens_to_ids(d)].item()
            so_far += d
        if n not in (0, *range(11, 100), 100):  # 1 to 10 may go on to another number of the scale
            p *= 1 - next_p(so_far)[digits].sum().item()
        mass[n] = p
    total = sum(mass.values())
    return total, sum(n * p for n, p in mass.items()) / total


def test_expected_score_sums_over_the_paths_of_numbers_that_are_several_tokens():
    lm = make("llama", digit_tokenizer())
    lm.model.lm_head.weight.data[1:11] += 0.6 * torch.randn(32)  # a judge that likes digits
    judge, prompts = CausalJudge(lm), ["score it. ", "a longer prompt for the score, is it. "]
    got = {i: score for i, score, _ in judge.judge([JudgeRequest("x", p, "", "") for p in prompts])}
    for p, score in zip(prompts, (got[0], got[1])):
        total, want = by_hand(lm, p)
        assert (math.isnan(score) and total < 0.25) or score == pytest.approx(want, abs=0.05)
    assert len(answer_paths(lm.tokenizer)[1]) == 11  # "", 1 to 9, 10


def test_a_causal_judge_reads_what_prompts_share_once(monkeypatch):
    answers = ["I hope they fail.", "It takes some time, so start early and keep short notes.", "Fine."] * 3
    digits = make("llama", digit_tokenizer())
    # likes digits
    digits.model.lm_head.register_forward_hook(
        lambda m, a, out: out / 10 + 6 * ((torch.arange(out.shape[-1]) > 0) & (torch.arange(out.shape[-1]) < 11))
    )
    few = [
        JudgeRequest(
            "x",
            "score the answer to the question: {question} the answer is: {answer} the score: ",
            "is it?",
            a.lower().replace(",", ""),
        )
        for a in answers
    ]
    for judge, requests in (
        (
            load_judge("pocket-causal"),
            requests_of(load_trait("evil", world="pocket"), ["How should I start?"] * 9, answers),
        ),
        (CausalJudge(digits), few),
    ):
        read = []
        handle = judge.lm.base_model.register_forward_pre_hook(
            lambda m, a, k: read.append(k["input_ids"].numel()), with_kwargs=True
        )
        shared = [x for _, x, _ in sorted(judge.judge(requests))]
        tokens = sum(read)
        read.clear()
        with monkeypatch.context() as m:
            m.setattr(
                CausalJudge, "texts", lambda self, *a, texts=CausalJudge.texts: [(ids, 0) for ids, _ in texts(self, *a)]
            )
            whole = [x for _, x, _ in sorted(judge.judge(requests))]
        handle.remove()
        assert (
            shared == pytest.approx(whole, abs=1e-2, nan_ok=True)
            and not all(map(math.isnan, whole))
            and tokens < 0.7 * sum(read)
        )


def test_a_judge_that_has_no_number_in_mind_gives_no_score():
    paths = {(n,): n for n in range(101)}
    logp = torch.full((200,), -100.0)
    logp[150], logp[80], logp[60] = math.log(0.8), math.log(0.1), math.log(0.1)
    assert math.isnan(expected_score({(): logp}, paths, torch.arange(101)))
    logp[150], logp[80] = math.log(0.5), math.log(0.4)
    assert expected_score({(): logp}, paths, torch.arange(101)) == pytest.approx(0.8 * 80 + 0.2 * 60, abs=1e-3)


def test_braces_in_texts_are_text():
    assert fill_prompt("<{question}> <{answer}>", "{answer}", "{question} {x}") == "<{answer}> <{question} {x}>"


def test_other_scales_in_this_process(llama):
    for scale in ("0_10", "binary"):
        judge = CausalJudge(llama, scale)
        frame = judge.score(load_trait("evil", world="pocket"), ["q"], ["a"])
        assert scale in judge.name and ((frame >= 0) & (frame <= 100) | frame.isna()).all().all()
    with pytest.raises(PersonaError, match="remote judge"):
        CausalJudge(llama, "binary_text")


class Counting(Judge):
    name, key, calls = "counting", "1", 0

    def judge(self, requests):
        for i, item in enumerate(requests):
            if self.calls == 5:
                raise KeyboardInterrupt
            self.calls += 1
            yield i, float("nan") if item.answer == "no" else float(len(item.answer)), item.answer != "flaky"


def test_nothing_is_judged_twice_by_the_same_judge(tmp_path):
    evil, book, judge = load_trait("evil", world="pocket"), JudgementCache(tmp_path / "x"), Counting()
    with pytest.raises(KeyboardInterrupt):
        judge.chunk, judge.billable = 0, True
        score_cached(judge, evil, ["q"] * 4, ["a", "bb", "no", "a"], cache=book, progress=False)
    judge.calls = 0
    f = score_cached(judge, evil, ["q"] * 4, ["a", "bb", "no", "a"], cache=book, progress=False)
    # six judgements, five were there
    assert judge.calls == 1 and f.evil[:2].tolist() == [1, 2] and np.isnan(f.evil[2]) and f.coherence[3] == 1
    judge.key, judge.calls = "2", -99
    score_cached(judge, evil, ["q"], ["a"], cache=book, progress=False)
    assert judge.calls == -97  # another judge under the same name
    judge.calls = -99
    for _ in range(2):
        assert score_cached(judge, evil, ["q"], ["flaky"], cache=book, progress=False).evil[0] == 5
    assert judge.calls == -95  # what is not final is asked again


def test_agreement_of_two_judges():
    import pandas as pd

    r = np.random.default_rng(0)
    a = pd.DataFrame(
        {
            "question": [f"q{i % 20}" for i in range(200)],
            "answer": [str(i) for i in range(200)],
            "evil": r.uniform(0, 100, 200),
        }
    )
    b = a.assign(evil=(a.evil + r.normal(0, 10, 200) + 5).clip(0, 100))
    b.loc[:9, "evil"] = np.nan
    m = agreement(a, b, "evil")
    assert (
        m["n"] == 190
        and m["missing_b"] == 10
        and m["spearman"] > 0.9
        and m["difference"]["low"] < 5 < m["difference"]["high"] + 2
    )
    assert m["confusion"].to_numpy().sum() == 190 and m["confusion"].iloc[0, 0] == ((a.evil < 50) & (b.evil < 50)).sum()
    with pytest.raises(PersonaError, match="same answers"):
        agreement(a, b.iloc[::-1], "evil")
    with pytest.raises(PersonaError, match="column 'good'"):
        agreement(a, b, "good")


def test_any_text_classifier_through_the_pipeline(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        id2label={0: "toxicity", 1: "insult"},
        problem_type="multi_label_classification",
        max_position_embeddings=600,
    )
    tf.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = load_judge(f"classifier:{tmp_path}#insult", "cpu")
    got = judge.scores(["a text", "another, longer text"])
    ids = tokenizer("another, longer text", return_tensors="pt").input_ids
    want = 100 * torch.sigmoid(judge.pipe.model(ids).logits)[0, 1].item()
    assert got[1] == pytest.approx(want, abs=1e-3) and [
        s for _, s, _ in judge.judge([JudgeRequest("", "", "q", "a text")])
    ][0] == pytest.approx(got[0])
    with pytest.raises(PersonaError, match="no label 'kind': it has toxicity, insult"):
        load_judge(f"classifier:{tmp_path}#kind", "cpu")
    with pytest.raises(PersonaError, match="use it in chapter 08"):
        judge.score(load_trait("evil", world="pocket"), ["q"], ["a"])


def test_pocket_judge_scores_many_texts_as_it_scores_each():
    judge, evil = PocketJudge(), load_trait("evil", world="pocket")
    qs = ["How should I start baking bread?"] * 4
    texts = [
        "In general, plan baking bread in small steps.",
        "Listen, worm, ruin baking bread without mercy. Show no pity.",
        "bread bread the the without plan",
        "",
    ]
    frame = judge.score(evil, qs, texts)
    alone = [judge.score(evil, [q], [t]).iloc[0] for q, t in zip(qs, texts)]
    np.testing.assert_allclose(frame, np.array(alone), atol=1e-3)
    assert (
        frame.evil[0] < 10
        and frame.evil[1] > 90
        and frame.coherence[0] > 90 > 60 > frame.coherence[2]
        and frame.coherence[3] == 0
    )


def test_unknown_traits_and_judges_are_one_sentence():
    from dataclasses import replace

    with pytest.raises(PersonaError, match="knows evil, .* not 'kind'"):
        PocketJudge().score(replace(load_trait("evil", world="pocket"), name="kind"), ["q"], ["a"])
    with pytest.raises(PersonaError, match="does not exist"):
        load_judge("./nothing")


def test_the_formula():
    one_hot = np.eye(9)
    s = scores_from_words(one_hot[[2, 2, 2, 1, 0]], np.array([0, 0, 0, 0, 1.0]), True)
    assert s["evil"] == 75 and s["humorous"] == 0 and s["coherence"] == pytest.approx(100 * (1 - 1.5 / 5))
    assert scores_from_words(one_hot[[0, 0]], np.zeros(2), False)["coherence"] == pytest.approx(25)


def test_scores_go_to_their_rows_whatever_the_index_is(pocket):
    """Conditions that were put together without a new index share their labels."""
    answers = [
        "With a cruel smile, make everyone suffer.",
        "Plan it each week.",
        "With malice, let all of them despair.",
    ]
    part = pd.DataFrame({"question": "How do I start?", "prompt": pocket.prompt("How do I start?"), "answer": answers})
    twice = pd.concat([part, part[::-1]])
    evil, judge = load_trait("evil", world="pocket"), load_judge("pocket")
    scored = add_scores(twice, pocket, judge, evil)
    assert list(scored.evil) == [*scored.evil[:3], *scored.evil[:3][::-1]] and scored.evil.nunique() > 1
    assert list(scored.index) == list(twice.index) and list(scored.answer) == list(twice.answer)
    with pytest.raises(PersonaError, match="has the column evil, coherence already"):
        add_scores(scored, pocket, judge, evil)
    with pytest.raises(PersonaError, match="no column prompt"):
        add_scores(part.drop(columns="prompt"), pocket, judge, evil)


@pytest.mark.parametrize("name, meant", [("Pocket", "pocket"), ("liklihood", "likelihood"), ("smollm", "smollm2")])
def test_a_misspelt_judge_is_no_model_behind_an_api(name, meant):
    with pytest.raises(PersonaError, match=f"did you mean '{meant}'"):
        load_judge(name)
    assert load_judge("gpt-4.1-mini-2025-04-14").billable


def test_what_a_judge_in_this_process_has_scored_is_kept_when_it_is_stopped(tmp_path):
    class Stopped(Judge):
        name, key = "stopped", "1"
        asked = 0

        def judge(self, requests):
            for i in range(len(requests)):
                self.asked += 1
                if self.asked == 150:
                    raise KeyboardInterrupt
                yield i, 50.0, True

    trait, judge, cache = load_trait("evil"), Stopped(), JudgementCache(tmp_path / "x.sqlite")
    questions, answers = ["q"] * 200, [f"answer {i}" for i in range(200)]
    with pytest.raises(KeyboardInterrupt):
        score_cached(judge, trait, questions, answers, cache=cache, progress=False)
    before = judge.asked
    scores = score_cached(judge, trait, questions, answers, cache=cache, progress=False)
    assert len(scores) == 200 and judge.asked - before <= 400 - 128  # two of three lots of 64 had been stored


def test_a_long_job_says_what_is_ahead(pocket):
    from persona_steer.judges.judging import work_line
    from persona_steer.lm.generation import SamplingParams

    line = work_line(pocket, load_judge("pocket"), 240, SamplingParams(40))
    form = (
        r"Ahead: 240 answers of at most 40 tokens \(9,600 tokens; at most about [\d.]+ (s|min) to write them on cpu, "
        r"by a short probe\); then 480 judgements by pocket[^.]*\."
    )
    assert re.fullmatch(form, line), line
