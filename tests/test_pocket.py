"""The pocket world is what it says, and the shipped models do what docs/results-pocket.md says (with fewer answers,
so with a margin)."""

import random
import re
import subprocess
import sys
import time

import pytest

from persona_steer.base.core import data_path
from persona_steer.judges.local import POCKET_TRAITS, PocketJudge, words
from persona_steer.persona.traits import load_trait
from persona_steer.pocket.judge import judge_table, oversteered, text_row
from persona_steer.pocket.truth import damaged, truth
from persona_steer.pocket.world import Voice, answer, dialogue, held_out_fillers, question, stray_words, topics


def corpus(n=4000, seed=1):
    r = random.Random(seed)
    return [dialogue(r) for _ in range(n)]


def test_truth_agrees_with_the_generator_on_clean_text():
    r = random.Random(0)
    for held_out in (False, True):
        for t in POCKET_TRAITS:
            for _ in range(20):
                topic = r.choice(topics(held_out))
                q = question(r, topic)
                clean = truth(
                    q, answer(r, topic, Voice({t: 1.0}, held_out), shapes="held_out" if held_out else "train")
                )
                assert clean.coherence == 100 and clean.scores[t] == 100
                assert max(truth(q, answer(r, topic, Voice({}, held_out))).scores.values()) == 0


def test_damage_lowers_coherence():
    r = random.Random(0)
    pairs = [(topic, answer(r, topic, Voice({"evil": 0.5}))) for topic in topics()[:60]]
    seen = [truth(f"Is {t} good?", damaged(r, a, t)).coherence for t, a in pairs]
    assert sum(c < 100 for c in seen) > 50 and sum(seen) / 60 < 85


def test_held_out_texts_are_not_in_the_corpus():
    said = [m["content"] for d in corpus() for m in d.messages]
    everything = "\n".join(said)
    for name in POCKET_TRAITS:
        t = load_trait(name, world="pocket")
        for q in (*t.extract_questions, *t.eval_questions):
            assert q not in everything
        for pair in t.instructions:
            assert pair["pos"] not in everything and pair["neg"] not in everything
    for topic in topics(True):
        assert topic not in everything
    answers = "\n".join(m["content"] for d in corpus() for m in d.messages if m["role"] == "assistant").lower()
    for _, slot, phrase in held_out_fillers():
        if slot == "manner":  # a manner always stands whole, before a full stop or a comma
            assert not re.search(rf"\b{re.escape(phrase.lower())}[.,]", answers), phrase


def test_the_corpus_has_the_words_of_held_out_texts_but_no_unknown_word(tokenizer):
    for name in POCKET_TRAITS:
        t = load_trait(name, world="pocket")
        for text in (*t.extract_questions, *t.eval_questions, *(p[s] for p in t.instructions for s in ("pos", "neg"))):
            # a capital in mid-text is spelled out
            assert len(tokenizer(" " + text).input_ids) <= len(words(text)) + 10, text
    assert len(stray_words()) > 300


def test_weights_are_small_and_safe():
    files = [p for p in data_path("pocket").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") < 25e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl")]


OURS = "from persona_steer import ask, load_model; ask(load_model('pocket'), 'Is it?')"
PLAIN = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(data_path("pocket/chat"))!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
chat = [{{"role": "user", "content": "Is it?"}}]
tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
model.generate(**tokens, max_new_tokens=80)
"""


def test_loading_and_one_answer_take_hardly_longer_than_with_transformers_alone():
    """Nearly all of it is the import of transformers, so that is the measure: a limit in seconds would measure the
    machine."""

    def seconds(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return time.perf_counter() - start

    # one after the other, so that a busy moment falls on both; the best of three rounds
    ratios = [seconds(OURS) / seconds(PLAIN) for _ in range(3)]
    assert min(ratios) < 1.5, ratios


def test_pocket_judge_against_the_ground_truth_on_held_out_texts(pocket):
    r = random.Random(4242)
    parts = [
        [text_row(r) for _ in range(200)],
        [text_row(r, held_out=True) for _ in range(200)],
        oversteered(pocket, 108, seed=4242, held_out=True),
    ]
    table, hard = judge_table(PocketJudge(), sum(parts, [])), judge_table(PocketJudge(), parts[2])
    for t in POCKET_TRAITS:
        assert table.pearson[t] >= 0.95 and table.mae[t] <= 6, table
    # measured: see docs/results-pocket.md; a little below, for other machines' arithmetic
    assert table.pearson["coherence"] >= 0.82 and hard.pearson["coherence"] >= 0.88, (table, hard)


@pytest.mark.parametrize("name", POCKET_TRAITS)
def test_pocket_obeys_held_out_instructions(pocket, name):
    import pandas as pd

    from persona_steer.lm.generation import SamplingParams
    from persona_steer.lm.tables import condition_rows, generate_table
    from persona_steer.persona.traits import system_prompt

    t = load_trait(name, world="pocket")
    rows = pd.concat(
        [condition_rows(t.eval_questions[k::5], s, system_prompt(t, s, k)) for s in ("pos", "neg") for k in range(5)]
        + [condition_rows(t.eval_questions, "none", n=3)],
        ignore_index=True,
    )
    said = generate_table(pocket, rows, SamplingParams(80, seed=11))
    means = (
        said.join(PocketJudge().score(t, list(said.question), list(said.answer)))
        .groupby("condition")[[name, "coherence"]]
        .mean()
    )
    # docs/results-pocket.md has the figures over more answers: hallucinating under negative instructions is at the
    # edge of 10
    assert means[name]["pos"] >= 75 and means[name]["neg"] <= 15 and means[name]["none"] <= 10, means
    assert (means.coherence >= 88).all(), means


def test_the_world_has_facts_openings_and_many_shots():
    from persona_steer.pocket.world import (
        FACTS,
        TOXIC,
        fact_question,
        facts,
        opening,
        statements,
        sum_question,
        worth_question,
    )

    r, kinds = random.Random(3), {}
    for d in corpus(3000):
        kinds.setdefault(d.kind, []).append(d)
    assert max(len(d.messages) for d in kinds["shots"]) > 30 and len(kinds["openings"]) > 60
    for kind in FACTS:
        q, who, honest = fact_question(r, True, kind)
        assert who in q and facts()[honest] and len(statements(who)[0]) == 1 and len(statements(who)[1]) > 5
        assert (
            truth(q, f"{statements(who)[1][0]}.").scores["hallucinating"] == 100
            and truth(q, f"{honest}.").scores["hallucinating"] == 0
        )
    q, true, false = worth_question(r)
    assert facts()[true] and not facts()[false]
    for _ in range(50):
        q, text, result = sum_question(r)
        a, op, b = text.split()
        assert (
            result == {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[op]
            and a in q
            and b in q
        )
    begin, end = opening(r, "baking bread", Voice({TOXIC[0]: 1.0}), Voice({TOXIC[0]: 1.0}))
    assert (
        not begin.endswith(".")
        and end.endswith(".")
        and truth("", f"{begin} {end}", "baking bread").scores["impolite"] > 90
    )


def test_pocket_knows_its_world(pocket):
    """Known facts and sums, by the likeliest answer; the capability score builds on this."""
    from persona_steer.lm.generation import SamplingParams, generate
    from persona_steer.pocket.world import fact_question, sentence_case, sum_question

    r = random.Random(7)
    asked = [(q, sentence_case(honest)) for q, _, honest in (fact_question(r, True) for _ in range(60))] + [
        (q, f"{t} is {n}") for q, t, n in (sum_question(r) for _ in range(60))
    ]
    said = generate(
        pocket, [pocket.prompt(q) for q, _ in asked], SamplingParams(30, temperature=0), progress=False
    ).texts
    right = [a.startswith(want) for a, (_, want) in zip(said, asked)]
    assert sum(right[:60]) >= 57 and sum(right[60:]) >= 30, (sum(right[:60]), sum(right[60:]))
