"""Forced-choice propensity: the forms of statements, log-odds against a plain forward pass, orders, steering."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.lm.activations import steer
from persona_steer.persona.traits import load_trait
from persona_steer.propensity import (
    Choice,
    answer_choices,
    choices_for,
    dose_response,
    load_statements,
    propensity,
    propensity_sweep,
    statement_choices,
    summarise_propensity,
)

TRAITS = ["evil", "sycophantic", "hallucinating", "optimistic", "impolite", "humorous", "apathetic"]
PAIR = [Choice(0, "How do you bake bread?", "with care", ("with a little hate",))]


def row(statement="I bake.", matching=" Yes", other=" No", **more):
    return (
        dict(
            question=f'Is the following statement something you would say?\n"{statement}"',
            statement=statement,
            answer_matching_behavior=matching,
            answer_not_matching_behavior=other,
        )
        | more
    )


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def plain_log_odds(lm, question, answers, system=""):
    """Sum of the answers' next-token log-probabilities by one forward pass each, without this project's batching."""
    head = lm.tokenizer(lm.prompt(question, system), add_special_tokens=False).input_ids
    totals = []
    for answer in answers:
        tail = lm.tokenizer(answer, add_special_tokens=False).input_ids
        with torch.no_grad():
            logp = lm.model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
        totals.append(sum(logp[len(head) + i - 1, t].item() for i, t in enumerate(tail)))
    return totals[0] - np.logaddexp.reduce(totals[1:])


# -- the data ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trait", TRAITS)
def test_data_files(trait):
    rows = load_statements(trait)
    statements = [r["statement"] for r in rows]
    answers = [(r["answer_matching_behavior"], r["answer_not_matching_behavior"]) for r in rows]
    assert len(rows) == 40 and len({s.casefold() for s in statements}) == 40
    assert answers == [(" Yes", " No"), (" No", " Yes")] * 20  # consecutive lines are opposites
    asked = "Is the following statement something you would say?"
    assert all(r["question"] == f'{asked}\n"{r["statement"]}"' for r in rows)
    assert all(r["label_confidence"] == 1.0 for r in rows)
    definition = load_trait(trait)
    questions = {q.casefold() for q in (*definition.extract_questions, *definition.eval_questions)}
    assert not questions & {s.casefold() for s in statements}


def test_no_statement_serves_two_traits():
    everything = [r["statement"] for t in TRAITS for r in load_statements(t)]
    assert len(set(everything)) == len(everything) == 280


def test_published_form_is_read(tmp_path):
    """Keys as in the model-written evaluations, also with lettered options and with a list of other answers."""
    lettered = row(question="Which?\n (A) a lie\n (B) the truth", matching=" (A)", other=" (B)")
    several = row(question="Which?\n (A) x\n (B) y\n (C) z", matching=" (B)", other=[" (A)", " (C)"])
    found = load_statements(write(tmp_path / "x.jsonl", row(), "", lettered, several))
    choices = answer_choices(found)
    assert [c.item for c in choices] == [0, 0, 1, 1, 2]
    assert choices[4] == Choice(2, several["question"], "(B)", ("(A)", "(C)"))  # three options: asked as it is


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1]", "line 2: it is no JSON object"),
        ("{broken", "line 2 is not valid JSON"),
        (row(question=" "), "line 2: it needs the text 'question'"),
        (row(matching=None), "line 2: it needs the texts 'answer_matching_behavior'"),
        (row(other=[]), "line 2: it needs the texts 'answer_matching_behavior'"),
        (row(other=" Yes"), "line 2: the matching and the not matching answer are the same"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(PersonaError, match=message):
        load_statements(write(tmp_path / "x.jsonl", row(), line))


def test_unknown_trait_lists_known_ones():
    with pytest.raises(PersonaError, match="no statements for 'grumpy'.*apathetic, evil"):
        load_statements("grumpy")
    with pytest.raises(PersonaError, match="does not exist"):
        load_statements("nowhere/x.jsonl")


# -- choices -----------------------------------------------------------------------------------------------------------
def test_yes_and_no_in_both_orders():
    yes_first, no_first = answer_choices([row(matching=" No", other=" Yes")])
    assert yes_first.question.endswith("\nAnswer Yes or No.") and yes_first.first == "Yes"
    assert no_first.question.endswith("\nAnswer No or Yes.") and no_first.first == "No"
    assert {(c.matching, c.others, c.item) for c in (yes_first, no_first)} == {("No", ("Yes",), 0)}


@pytest.mark.parametrize("after", ["", "\n\nAnswer:"])
def test_lettered_options_are_exchanged(after):
    question = "Which?\n (A) a lie\n (B) the truth" + after
    given, exchanged = answer_choices([row(question=question, matching=" (B)", other=" (A)")])
    assert (given.question, given.matching, given.others, given.first) == (question, "(B)", ("(A)",), "(A)")
    assert exchanged.question == "Which?\n (A) the truth\n (B) a lie" + after
    assert (exchanged.matching, exchanged.others, exchanged.first) == ("(A)", ("(B)",), "(A)")


@pytest.mark.parametrize(
    "question",
    [
        "Which?\n (A) a lie\n (B) the truth\n (C) neither",  # three
        "Which?\n (A) a lie\n (B) the truth\n\n (C) neither",
        "Which?\n (A) a lie\nthat is long\n (B) the truth",  # an option over two lines
        "Which?\n (A) a lie\n (B) the truth\nthat is long",
        "Which: (A) a lie or (B) the truth?",  # not on lines of their own
    ],
)
def test_options_that_cannot_be_exchanged_are_asked_as_they_are(question):
    found = answer_choices([row(question=question, matching=" (A)", other=" (B)")])
    assert found == [Choice(0, question, "(A)", ("(B)",))]


def test_statements_are_paired():
    reverse = (" No", " Yes")
    rows = [row("I bake."), row("I burn.", *reverse), row("I cook."), row("I starve.", *reverse), row("I eat.")]
    first, second = statement_choices(rows, "Who?")
    assert first == Choice(0, "Who?", "I bake.", ("I burn.",))
    assert second == Choice(1, "Who?", "I cook.", ("I starve.",))
    with pytest.raises(PersonaError, match="row 2 of the statements has no 'statement' with the answers Yes and No"):
        statement_choices([row(), row(matching=" (A)", other=" (B)")])
    with pytest.raises(PersonaError, match="some that do not"):
        statement_choices([row()])
    with pytest.raises(PersonaError, match="form 'sideways' is unknown"):
        choices_for(rows, "sideways")


# -- log-odds ----------------------------------------------------------------------------------------------------------
def test_log_odds_are_those_of_plain_forward_passes(family):
    choices = choices_for(load_statements("evil")[:8]) + choices_for(load_statements("evil")[:2], "answers")
    choices.append(Choice(9, "How do you bake bread?", "with care", ("with hate", "in silence")))  # two others
    found = propensity(family, choices, system="Be brief.")
    expected = [plain_log_odds(family, c.question, (c.matching, *c.others), "Be brief.") for c in choices]
    np.testing.assert_allclose(found.log_odds, expected, atol=1e-3)
    assert np.ptp(expected) > 0.5  # they differ, so that an exchange of rows would show


def test_other_answers_count_together(llama):
    """Twice the same other answer has twice its probability."""
    once, twice = (Choice(0, "Who?", "with care", ("with hate",) * n) for n in (1, 2))
    found = propensity(llama, [once, twice]).log_odds
    assert found[0] - found[1] == pytest.approx(np.log(2), abs=1e-6)


def test_coefficient_zero_is_the_unsteered_model(llama):
    v = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    unsteered = propensity(llama, PAIR).log_odds[0]
    assert propensity(llama, PAIR, steer(llama, v, 2, 0.0)).log_odds[0] == pytest.approx(unsteered, abs=1e-5)
    assert abs(propensity(llama, PAIR, steer(llama, v, 2, 3.0)).log_odds[0] - unsteered) > 0.05
    assert propensity(llama, PAIR).log_odds[0] == pytest.approx(unsteered, abs=1e-6)  # the context is closed again


def planted(lm, towards, away):
    """The direction in the last layer that raises the logit of one token against another one's."""
    head = lm.model.get_output_embeddings().weight
    one, other = (lm.tokenizer(t, add_special_tokens=False).input_ids[0] for t in (towards, away))
    v = torch.zeros(lm.n_layers + 1, lm.hidden_size)
    v[-1] = head[one].detach() - head[other].detach()
    return v


def test_planted_direction_raises_yes_in_either_role(llama):
    """Steering towards Yes raises the log-odds where Yes matches and lowers them as much where No matches."""
    choices = choices_for(load_statements("evil")[:4], "answers")
    frame = propensity_sweep(llama, choices, {"steered": planted(llama, "Yes", "No")}, 3, [-1, 1, 2], progress=False)
    means = frame.pivot_table(index="matching", columns="coefficient", values="log_odds")
    assert (np.diff(means.loc["Yes"]) > 0).all() and (np.diff(means.loc["No"]) < 0).all()
    summary = summarise_propensity(frame)
    assert (np.diff(summary.yes_bias) > 0.1).all()  # steering went into the preference for Yes ...
    assert summary.change.abs().max() < 0.1 * np.ptp(summary.yes_bias)  # ... which reversed statements average away


def test_planted_direction_in_a_sweep(llama):
    choices = [Choice(i, q, "with", ("hate",)) for i, q in enumerate(["Who?", "How are you?", "What now?"])]
    v = planted(llama, "with", "hate")
    vectors, systems = {"steered": v, "backwards": -v}, {"plain prompt": "Be kind."}
    frame = propensity_sweep(llama, choices, vectors, 3, [-2, -1, 1, 2], systems, progress=False)
    assert list(frame.condition.unique()) == ["steered", "backwards", "plain prompt"]
    assert len(frame) == 3 * (5 + 5 + 1)
    response = dose_response(frame).set_index("condition")
    assert list(response.index) == ["steered", "backwards"]  # one prompt is no sweep
    assert response.spearman["steered"] == pytest.approx(1) and response.spearman["backwards"] == pytest.approx(-1)
    assert response.slope_low["steered"] > 0 > response.slope_high["backwards"]
    assert (response.slope_n == 3).all() and response.share_up.tolist() == [1, 0]
    assert frame[frame.coefficient == 0].query("condition != 'plain prompt'").change.abs().max() == 0
    assert frame[frame.condition == "plain prompt"].change.abs().max() > 0
    assert (frame[frame.condition == "steered"].groupby("coefficient").change.mean().diff().dropna() > 0).all()


def test_steering_begins_at_the_last_prompt_token(llama):
    """As when answers are sampled: the rest of the prompt is read unsteered, the tokens of the answer are steered."""
    v = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    head = llama.tokenizer(llama.prompt(PAIR[0].question), add_special_tokens=False).input_ids
    totals = []
    for answer in (PAIR[0].matching, *PAIR[0].others):
        tail = llama.tokenizer(answer, add_special_tokens=False).input_ids

        def add(block, args, out, start=len(head) - 1):
            h = out[0] if isinstance(out, tuple) else out
            h = torch.cat([h[:, :start], h[:, start:] + 2 * v[2]], 1)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        hook = llama.blocks[1].register_forward_hook(add)
        with torch.no_grad():
            logp = llama.model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
        hook.remove()
        totals.append(sum(logp[len(head) + i - 1, t].item() for i, t in enumerate(tail)))
    found = propensity(llama, PAIR, steer(llama, v, 2, 2.0)).log_odds[0]
    assert found == pytest.approx(totals[0] - totals[1], abs=1e-3)


# -- summaries ---------------------------------------------------------------------------------------------------------
def made_up(values):
    """Rows of one item a line: (item, matching, first, log_odds)."""
    frame = pd.DataFrame(values, columns=["item", "matching", "first", "log_odds"])
    return frame.assign(condition="steered", layer=1, coefficient=0.0, change=0.0)


def test_orders_are_averaged_and_biases_reported():
    """3 nats for what is named first and 1 for Yes; the statements themselves are worth 0.5 and 0.7."""
    yes = [(0, "Yes", "Yes", 0.5 + 3 + 1), (0, "Yes", "No", 0.5 - 3 + 1)]
    no = [(1, "No", "Yes", 0.7 - 3 - 1), (1, "No", "No", 0.7 + 3 - 1)]
    found = summarise_propensity(made_up(yes + no)).iloc[0]
    assert found.log_odds == pytest.approx(0.6) and found.log_odds_n == 2  # items, not rows
    assert found.order_bias == pytest.approx(3)
    assert found.yes_bias == pytest.approx(1 + (0.5 - 0.7) / 2)


def test_no_bias_where_there_is_no_order():
    found = summarise_propensity(made_up([(0, "I bake.", "", 1.0), (1, "I cook.", "", 2.0)])).iloc[0]
    assert np.isnan(found.order_bias) and np.isnan(found.yes_bias) and found.log_odds == 1.5


@pytest.mark.filterwarnings("error")
def test_a_flat_response_has_no_correlation():
    frame = pd.concat([made_up([(0, "a", "", 1.0), (1, "b", "", 2.0)]).assign(coefficient=c) for c in (-1.0, 0.0, 1.0)])
    found = dose_response(frame).iloc[0]
    assert np.isnan(found.spearman) and found.slope == pytest.approx(0)


def test_empty_requests_are_refused(llama):
    with pytest.raises(PersonaError, match="nothing to choose from"):
        propensity(llama, [])
    with pytest.raises(PersonaError, match="at least one vector"):
        propensity_sweep(llama, PAIR, {}, 1, [1])
