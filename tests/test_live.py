"""Answers as they are written: alignment, stopping, one batch; a session; vectors that several jobs need at once."""

import threading
import time

import pytest
import torch

from persona_steer import extraction
from persona_steer.app.live_generation import LatestRequestWorker, LiveRequest, answer_live
from persona_steer.base.core import PersonaError, save_json, settings
from persona_steer.lm.generation import SamplingParams, encode_pair, generate
from persona_steer.lm.models import load_model
from persona_steer.persona.traits import load_trait
from persona_steer.projection import Trace


@pytest.fixture(scope="module")
def lm():
    return load_model("pocket", "cpu", "float32")


@pytest.fixture(scope="module")
def vectors(lm):
    return {
        t: torch.randn(lm.n_layers + 1, lm.hidden_size, generator=torch.Generator().manual_seed(i))
        for i, t in enumerate(("evil", "mild"))
    }


def test_values_are_the_projections_of_the_tokens_they_stand_at(lm, vectors):
    """Against one pass over the whole text; the unsteered answer is the one that `generate` gives without steering."""
    request = LiveRequest(
        "How do I plan a garden?",
        terms=(("evil", 3, 0.2), ("mild", 2, 0.1)),
        watched=("evil", 4),
        sampling=SamplingParams(30),
    )
    plain, steered = answer_live(lm, request, vectors)
    prompt = lm.prompt(request.question)
    assert (
        plain.text == generate(lm, [prompt], request.sampling, seeds=["live"], progress=False).texts[0] != steered.text
    )
    ids, n = encode_pair(lm.tokenizer, prompt, plain.text)
    with Trace(lm, 4, vectors["evil"][4]) as whole, torch.inference_mode():
        lm.model(torch.tensor([ids]))
    assert len(plain.values) == len(plain.pieces) == len(ids) - n and torch.allclose(
        torch.tensor(plain.values), whole.values()[0, n:], atol=1e-4
    )


def test_both_answers_are_one_batch_whatever_the_budget(lm, vectors, monkeypatch):
    request = LiveRequest(
        "How do I plan a garden?", terms=(("evil", 3, 0.2),), watched=("evil", 3), sampling=SamplingParams(20)
    )
    whole = answer_live(lm, request, vectors)
    monkeypatch.setattr(settings(), "batch_tokens", 8)
    assert [a.text for a in answer_live(lm, request, vectors)] == [a.text for a in whole] and all(
        a.pieces for a in whole
    )


def test_a_question_that_is_none_and_vectors_that_do_not_fit(lm):
    with pytest.raises(PersonaError, match="no question"):
        answer_live(lm, LiveRequest(" "), {})
    with pytest.raises(PersonaError, match="another model"):
        answer_live(lm, LiveRequest("Why?", terms=(("evil", 3, 1.0),)), {"evil": torch.ones(3, 5)})


def test_stopping_is_prompt_and_the_last_wish_wins(lm, vectors):
    log, errors = [], []

    def answer(request, stop):
        log.append(
            (
                request.question,
                len(answer_live(lm, request, vectors, lambda answers: time.sleep(0.02) or stop())[0].pieces),
                stop(),
            )
        )

    worker = LatestRequestWorker(answer, errors.append)
    for q in ("Why one?", "Why two?", "Why three?"):
        worker.ask(LiveRequest(q, sampling=SamplingParams(60)))
        time.sleep(0.15)
    worker.ask(LiveRequest("", sampling=SamplingParams(60)))  # an error goes to its handler, and the session lives on
    assert worker.wait() and all(stopped for _, _, stopped in log) and len(errors) == 1
    worker.ask(LiveRequest("Why five?", sampling=SamplingParams(5)))
    assert worker.wait() and log[-1][0] == "Why five?" and log[-1][1] == 5 and not log[-1][2]
    worker.stop()
    worker.close()
    assert not worker.thread.is_alive()


def test_of_several_jobs_that_need_the_same_vectors_one_makes_them(lm, tmp_path, monkeypatch):
    trait, made = load_trait("evil", world="pocket"), []
    monkeypatch.setattr(settings(), "runs", tmp_path)

    def make(lm, trait, judge, sampling):
        made.append(sampling.seed)
        time.sleep(0.5)
        save_json(
            extraction.extraction_folder(lm, trait.name) / "evil_vectors.json",
            {
                "fingerprint": lm.fingerprint,
                "template": lm.template_hash,
                "definition": extraction.digest(extraction.asdict(trait)),
            },
        )
        return "made"

    monkeypatch.setattr(extraction, "extract", make)
    monkeypatch.setattr(extraction, "load_extraction", lambda *a: "loaded")
    got = []
    threads = [
        threading.Thread(
            target=lambda k=k: got.append(extraction.load_or_extract(lm, trait, None, SamplingParams(seed=k)))
        )
        for k in (3, 4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(got) == ["loaded", "made"] and made == [0]  # and whoever comes first, they are the same
