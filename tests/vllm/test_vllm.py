"""The real vLLM: as the server behind a remote judge, as an engine behind an address, and in this process. Run by `make
test-vllm`."""

import math
import sys

import pytest
import torch

pytest.importorskip("vllm")

from servers import start_vllm

from persona_steer.base.core import PersonaError, data_path
from persona_steer.judges.loading import load_judge
from persona_steer.lm.generation import SamplingParams, generate
from persona_steer.lm.models import load_model
from persona_steer.lm.vllm_engine import VLLMEngine, load_engine
from persona_steer.persona.traits import load_trait, system_prompt

EVIL = load_trait("evil", world="pocket")


OPTIONS = "--dtype float32 --max-model-len 1024 --enforce-eager --max-logprobs 20 --no-enable-chunked-prefill"


def serve(model, name, log, *more):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, *OPTIONS.split(), "--max-num-batched-tokens", "8192", *more]
    process, url = start_vllm(command, log)
    return process, f"{url}/v1"


@pytest.fixture(scope="module")
def chat_url(adapter, tmp_path_factory):
    process, url = serve(
        data_path("pocket/chat"),
        "chat",
        tmp_path_factory.mktemp("log") / "chat.log",
        "--enable-lora",
        "--lora-modules",
        f"tuned={adapter}",
        "--max-lora-rank",
        "8",
    )
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def judge_url(tmp_path_factory):
    process, url = serve(data_path("pocket/judge_causal"), "judge", tmp_path_factory.mktemp("log") / "judge.log")
    yield url
    process.terminate()
    process.wait(30)


def prompts_of(lm, n=8):
    return [lm.prompt(q, system_prompt(EVIL, s, 0)) for q in EVIL.eval_questions[:n] for s in ("pos", "neg")]


def test_the_served_judge_says_what_the_judge_in_this_process_says(judge_url, lm):
    questions = list(EVIL.eval_questions[:12])
    prompts = [lm.prompt(q, system_prompt(EVIL, s, 1)) for q in questions for s in ("pos", "neg")]
    answers, questions = (
        generate(lm, prompts, SamplingParams(60, seed=3), progress=False).texts,
        [q for q in questions for _ in "ab"],
    )
    answers[0], answers[5] = "cruel cruel the the", "First, First plan bread the"  # not all perfect
    remote, local = load_judge("judge", base_url=judge_url), load_judge("pocket-causal")
    remote.check(EVIL, len(answers))
    a, b = remote.score(EVIL, questions, answers), local.score(EVIL, questions, answers)
    difference = (a - b).abs()
    print(
        f"largest difference, {difference.size} judgements: {difference.max().max():.3f}; scores from "
        f"{b.min().min():.0f} to {b.max().max():.0f}"
    )
    assert difference.max().max() <= 0.5 and a.notna().all().all() and b.evil.max() - b.evil.min() > 50


def test_the_engine_behind_an_address_answers_greedily_as_hugging_face_does(chat_url, lm):
    engine, prompts = load_engine(chat_url + "#chat", lm), prompts_of(lm)
    greedy = SamplingParams(40, temperature=0)
    want, got = generate(lm, prompts, greedy, progress=False), engine.generate(prompts, greedy)
    same = sum(a == b for a, b in zip(want.texts, got.texts))
    assert same >= len(prompts) - 1 and [t for t, a, b in zip(got.tokens, want.texts, got.texts) if a == b] == [
        t for t, a, b in zip(want.tokens, want.texts, got.texts) if a == b
    ]


def test_sampling_settings_mean_the_same(chat_url, lm):
    """First tokens of many samples follow the probabilities that the settings stand for, and nothing outside the
    nucleus is drawn."""
    engine, prompt = VLLMEngine(lm, chat_url, "chat"), prompts_of(lm)[1]
    s, n = SamplingParams(1, temperature=0.7, top_p=0.9, seed=5), 600
    with torch.no_grad():
        p = (
            lm.model(**lm.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
            / s.temperature
        ).softmax(-1)
    sorted_p, order = p.sort(descending=True)
    keep = (sorted_p.cumsum(0) - sorted_p) < s.top_p
    nucleus = {lm.tokenizer.decode([i]): q.item() for i, q in zip(order[keep], sorted_p[keep] / sorted_p[keep].sum())}
    got = engine.generate([prompt] * n, s).texts
    assert set(got) <= set(nucleus)
    for token, q in nucleus.items():
        assert abs(got.count(token) / n - q) < 4.5 * math.sqrt(q * (1 - q) / n) + 1 / n, (
            token,
            got.count(token) / n,
            q,
        )
    assert (
        engine.generate([prompt] * 5, SamplingParams(20, seed=5)).texts
        == engine.generate([prompt] * 5, SamplingParams(20, seed=5)).texts
    )
    assert len(set(engine.generate([prompt] * 5, SamplingParams(20, seed=5)).texts)) > 1


def test_lora_adapters_in_both_engines(chat_url, adapter, lm):
    tuned = load_model(str(adapter), "cpu", "float32")
    prompts, greedy = prompts_of(lm), SamplingParams(30, temperature=0)
    want, plain = (
        generate(tuned, prompts, greedy, progress=False).texts,
        generate(lm, prompts, greedy, progress=False).texts,
    )
    got = VLLMEngine(tuned, chat_url, "tuned").generate(prompts, greedy).texts
    assert sum(a == b for a, b in zip(want, got)) >= len(prompts) - 2 and want != plain


def test_an_extraction_written_by_vllm(chat_url, lm, tmp_path, monkeypatch):
    from dataclasses import replace

    from persona_steer.extraction import extract
    from persona_steer.judges import judging

    monkeypatch.setattr(judging, "run_path", lambda name: tmp_path / name)
    trait = replace(EVIL, extract_questions=EVIL.extract_questions[:4])
    found = extract(
        lm,
        trait,
        load_judge("pocket"),
        sampling=SamplingParams(40, seed=1),
        out=tmp_path / "x",
        engine=load_engine(chat_url + "#chat", lm),
    )
    assert found.vectors.metadata["engine"] == "vllm" and found.kept.mean() > 0.7
    own = extract(lm, trait, load_judge("pocket"), sampling=SamplingParams(40, seed=1), out=tmp_path / "y")
    # other draws, same directions
    assert torch.cosine_similarity(found.vectors.response_avg[1:], own.vectors.response_avg[1:]).min() > 0.7
    n = len(list((tmp_path / "x" / ".parts").rglob("*.json")))
    # nothing is left to do
    extract(
        lm,
        trait,
        load_judge("pocket"),
        sampling=SamplingParams(40, seed=1),
        out=tmp_path / "x",
        engine=VLLMEngine(lm, "http://127.0.0.1:9/v1"),
    )
    assert n and n == len(list((tmp_path / "x" / ".parts").rglob("*.json")))


def test_a_server_that_is_down_or_does_not_know_the_model_is_one_sentence(chat_url, lm):
    for engine, words in (
        (VLLMEngine(lm, "http://127.0.0.1:9/v1", "chat"), "cannot be reached"),
        (VLLMEngine(lm, chat_url, "nobody"), "does not know the model 'nobody'"),
    ):
        with pytest.raises(PersonaError, match=words) as e:
            engine.generate([lm.prompt("q")])
        assert "\n" not in str(e.value)


def test_vllm_in_this_process_with_and_without_an_adapter(adapter, lm):
    tuned = load_model(str(adapter), "cpu", "float32")
    engine = VLLMEngine(tuned, max_model_len=512, enforce_eager=True)
    prompts, greedy = prompts_of(lm, 4), SamplingParams(30, temperature=0)
    got, want = engine.generate(prompts, greedy), generate(tuned, prompts, greedy, progress=False)
    assert sum(a == b for a, b in zip(want.texts, got.texts)) >= len(prompts) - 1
