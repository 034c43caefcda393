"""Remote judges over a real socket: faults, budget, cache, keys, event loops."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from servers import score_of, serving

from persona_steer.base.core import PersonaError
from persona_steer.judges.judging import SCALE_SUFFIXES, JudgementCache, requests_of, score_cached
from persona_steer.judges.loading import load_judge
from persona_steer.judges.remote import RemoteJudge
from persona_steer.persona.traits import load_trait

EVIL = load_trait("evil")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def truth_of(requests):
    """The weighted mean that the well-behaved server stands for."""
    out = []
    for i in requests:
        n = score_of(i.prompt)
        out.append((0.75 * n + 0.1 * (n - 1 if n else 1)) / 0.85)
    return np.array(out)


def texts(n):
    return [f"question {i}" for i in range(n)], [f"answer {i}" for i in range(n)]


def test_the_published_request_and_its_mean(tmp_path):
    with serving() as s:
        judge, (q, a) = RemoteJudge("good", s.url), texts(3)
        judge.check(EVIL, 3)
        f = score_cached(judge, EVIL, q, a, cache=JudgementCache(tmp_path / "x"), progress=False)
        want = truth_of(requests_of(EVIL, q, a))
        np.testing.assert_allclose(np.r_[f.evil, f.coherence], want, atol=1e-6)
        sent = s.requests[-1]
        assert {k: sent[k] for k in ("max_tokens", "temperature", "logprobs", "top_logprobs", "seed")} == dict(
            max_tokens=1, temperature=0, logprobs=True, top_logprobs=20, seed=0
        )
        assert sorted(s.prompts[1:]) == sorted(i.prompt for i in requests_of(EVIL, q, a)) and (f.judge == "good").all()


def test_refusals_are_missing_and_are_not_asked_again(tmp_path):
    with serving() as s:
        book, (q, a) = JudgementCache(tmp_path / "x"), texts(2)
        for _ in range(2):
            assert (
                score_cached(RemoteJudge("refuser", s.url), EVIL, q, a, cache=book, progress=False)[
                    ["evil", "coherence"]
                ]
                .isna()
                .all()
                .all()
            )
        assert len(s.requests) == 4


@pytest.mark.parametrize("scale", ["0_10", "binary", "binary_text", "0_100_text"])
def test_other_scales_ask_for_another_reply_and_have_another_name(tmp_path, scale):
    with serving() as s:
        judge, (q, a) = RemoteJudge("good", s.url, scale, samples=2), texts(4)
        f = score_cached(judge, EVIL, q, a, cache=JudgementCache(tmp_path / "x"), progress=False)
        assert judge.name != "good" and scale in judge.name and SCALE_SUFFIXES.get(scale, "") in s.prompts[0]
        n = [score_of(p) for p in (i.prompt + SCALE_SUFFIXES.get(scale, "") for i in requests_of(EVIL, q, a))]
        if scale == "binary_text":
            assert list(np.r_[f.evil, f.coherence]) == [100.0 * (x >= 50) for x in n]
        if scale == "0_100_text":
            assert list(np.r_[f.evil, f.coherence]) == n and len(s.requests) == 16  # two samples each
            # newer models refuse them
            assert not {"logprobs", "temperature", "max_tokens", "seed"} & set(s.requests[0])


@pytest.mark.parametrize(
    "fault", ["429", "429 with Retry-After", "500", "drop", "malformed", "empty logprobs", "no choices", "html"]
)
def test_a_fault_that_passes_costs_nothing_but_time(tmp_path, fault):
    with serving() as s:
        q, a = texts(2)
        f = score_cached(
            RemoteJudge(f"once {fault}", s.url), EVIL, q, a, cache=JudgementCache(tmp_path / "x"), progress=False
        )
        np.testing.assert_allclose(np.r_[f.evil, f.coherence], truth_of(requests_of(EVIL, q, a)), atol=1e-6)
        assert len(s.requests) == 8
        if "After" in fault:
            first, again = s.at[0], [t for t, p in zip(s.at, s.prompts) if p == s.prompts[0]][1]
            assert again - first >= 1


def test_a_fault_that_stays_is_missing_and_asked_again_next_time(tmp_path):
    with serving() as s:
        book, (q, a) = JudgementCache(tmp_path / "x"), texts(1)
        assert score_cached(RemoteJudge("empty", s.url), EVIL, q, a, cache=book, progress=False).evil.isna().all()
        assert (
            score_cached(RemoteJudge("drop", s.url, retries=1), EVIL, q, a, cache=book, progress=False)
            .evil.isna()
            .all()
        )
        n = len(s.requests)
        score_cached(RemoteJudge("empty", s.url), EVIL, q, a, cache=book, progress=False)
        assert len(s.requests) == n + 10


def test_a_slow_answer_is_missing_after_the_time_limit(tmp_path):
    with serving() as s:
        q, a = texts(1)
        start = time.monotonic()
        assert (
            score_cached(
                RemoteJudge("slow", s.url, timeout=0.3, retries=1),
                EVIL,
                q,
                a,
                cache=JudgementCache(tmp_path / "x"),
                progress=False,
            )
            .evil.isna()
            .all()
        )
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "model, words",
    [
        ("unknown", "does not know the model 'unknown'"),
        ("locked", "refuses the key"),
        ("reasoner", "400.*0_100_text"),
        ("empty", "0_100_text"),
        ("textual", "0_100_text"),
        ("html", "OpenAI-compatible"),
        ("malformed", "no judgement"),
    ],
)
def test_what_will_not_get_better_ends_the_run_before_anything_is_generated(llama, tmp_path, monkeypatch, model, words):
    from persona_steer import extraction

    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret")
    monkeypatch.setattr(
        extraction, "generate_table", lambda *a, **k: pytest.fail("generated although the judge cannot judge")
    )
    with serving() as s:
        with pytest.raises(PersonaError, match=words) as e:
            extraction.extract(llama, EVIL, RemoteJudge(model, s.url), out=tmp_path)
        assert "\n" not in str(e.value) and "secret" not in str(e.value) and len(s.requests) <= 4
        with pytest.raises(PersonaError, match=words):  # also when it happens in the middle
            if model in ("unknown", "locked"):
                score_cached(
                    RemoteJudge(model, s.url), EVIL, *texts(50), cache=JudgementCache(tmp_path / "x"), progress=False
                )
            else:
                raise e.value


def test_a_model_without_log_probabilities_is_judged_by_its_text(tmp_path):
    with serving() as s:
        judge = RemoteJudge("reasoner", s.url, "0_100_text", samples=1)
        judge.check(EVIL, 2)
        assert (
            score_cached(judge, EVIL, *texts(2), cache=JudgementCache(tmp_path / "x"), progress=False)
            .evil.notna()
            .all()
        )


def test_an_endpoint_that_is_down_and_a_missing_key_are_one_sentence(monkeypatch):
    with pytest.raises(PersonaError, match="cannot be reached"):
        RemoteJudge("good", "http://127.0.0.1:9/v1").check(EVIL, 1)
    monkeypatch.chdir("/")
    from persona_steer.base import http_client

    monkeypatch.setattr(http_client, "settings", lambda: type("S", (), {"root": Path("/nowhere")}))
    with pytest.raises(PersonaError, match="OPENAI_API_KEY"):
        load_judge("gpt-4.1-mini-2025-04-14").check(EVIL, 1)
    with pytest.raises(PersonaError, match="no address"):
        load_judge("x", base_url="localhost:8000").check(EVIL, 1)
    with pytest.raises(PersonaError, match="0_100_text"):
        load_judge("gpt-4.1-mini-2025-04-14", scale="stars")


def test_the_key_may_stand_in_dotenv_and_shows_nowhere(monkeypatch, tmp_path, capsys):
    from persona_steer.base import http_client

    (tmp_path / ".env").write_text("OPENAI_API_KEY=sk-right\n")
    monkeypatch.setattr(http_client, "settings", lambda: type("S", (), {"root": tmp_path}))
    with serving() as s:
        judge = RemoteJudge("locked", s.url)
        judge.check(EVIL, 1)
        assert "sk-right" not in repr(judge) + str(vars(judge))
    judge = RemoteJudge("good", "http://me:hunter2@127.0.0.1:9/v1")
    with pytest.raises(PersonaError) as e:
        judge.check(EVIL, 1)
    assert "hunter2" not in repr(judge) + judge.key + judge.where + str(e.value)


def test_max_calls_guards_before_generation_and_before_judging(tmp_path, capsys):
    with serving() as s:
        judge = RemoteJudge("good", s.url, max_calls=10)
        with pytest.raises(PersonaError, match="12 calls.*max_calls=10"):
            judge.check(EVIL, 6)
        assert not s.requests
        judge.check(EVIL, 4)
        assert "up to 8 calls (max_calls=10)" in capsys.readouterr().out
        s.requests.clear()
        book = JudgementCache(tmp_path / "x")
        score_cached(judge, EVIL, *texts(5), cache=book, progress=False)
        assert "10 calls" in capsys.readouterr().out
        score_cached(judge, EVIL, *texts(5), cache=book, progress=False)  # all known: no call, no complaint
        with pytest.raises(PersonaError, match="max_calls"):
            score_cached(judge, EVIL, *texts(6), cache=book, progress=False)
        assert len(s.requests) == 10


def test_concurrency_is_bounded_and_used(tmp_path):
    with serving(latency=0.1) as s:
        start = time.monotonic()
        score_cached(
            RemoteJudge("good", s.url, concurrency=20),
            EVIL,
            *texts(100),
            cache=JudgementCache(tmp_path / "x"),
            progress=False,
        )
        assert s.most_active <= 20 and time.monotonic() - start < 10  # one after the other: 20 s
        assert s.most_active > 10


def test_it_works_inside_a_running_event_loop(tmp_path):
    async def notebook():
        with serving() as s:
            return score_cached(
                RemoteJudge("good", s.url), EVIL, *texts(3), cache=JudgementCache(tmp_path / "x"), progress=False
            )

    assert asyncio.run(notebook()).evil.notna().all()


KILLED = """
import sys
from persona_steer.judges.judging import JudgementCache, score_cached
from persona_steer.judges.remote import RemoteJudge
from persona_steer.persona.traits import load_trait
q, a = [f"question {i}" for i in range(1000)], [f"answer {i}" for i in range(1000)]
judge, book = RemoteJudge("good", sys.argv[1], concurrency=50), JudgementCache(sys.argv[2])
score_cached(judge, load_trait("evil"), q, a, cache=book, progress=False)
"""


def test_two_thousand_judgements_with_faults_killed_at_half_and_resumed(tmp_path):
    q, a = texts(1000)
    with serving(share=0.3, seed=1) as s:
        child = subprocess.Popen([sys.executable, "-c", KILLED, s.url, str(tmp_path / "x")], stdout=subprocess.DEVNULL)
        book = None
        while True:
            time.sleep(0.05)
            assert child.poll() is None, "it was over before it could be killed"
            if (tmp_path / "x").exists():
                book = book or JudgementCache(tmp_path / "x")
                if book.db.execute("SELECT count(*) FROM judgements").fetchone()[0] >= 1000:
                    break
        child.send_signal(signal.SIGKILL)
        child.wait()
        time.sleep(0.5)  # requests that were under way
        done = {r[0] for r in book.db.execute("SELECT key FROM judgements")}
        requests = requests_of(EVIL, q, a)
        judge = RemoteJudge("good", s.url, concurrency=50)
        finished = {i.prompt for i in requests if JudgementCache.key(judge, i) in done}
        before = len(s.prompts)
        f = score_cached(judge, EVIL, q, a, cache=book, progress=False)
        assert 1000 <= len(finished) < 2000 and not finished & set(s.prompts[before:])
    scores = np.r_[f.evil, f.coherence]
    ok = ~np.isnan(scores)
    assert ok.mean() > 0.998  # what failed again and again is missing
    np.testing.assert_allclose(scores[ok], truth_of(requests)[ok], atol=1e-6)
