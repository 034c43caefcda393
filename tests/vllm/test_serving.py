"""Steering in the real vLLM: the server over a real socket, with the `openai` client; the engine in this process. Run
by `make test-vllm`."""

import asyncio
import json
import math
import random
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

pytest.importorskip("vllm")

from servers import start_vllm

from persona_steer.base.core import data_path
from persona_steer.lm.activations import POOLS, steer
from persona_steer.lm.generation import SamplingParams, generate
from persona_steer.lm.models import load_model
from persona_steer.lm.tables import condition_rows, generate_table, table_steering
from persona_steer.lm.vllm_engine import VLLMEngine
from persona_steer.persona.traits import load_trait, system_prompt
from persona_steer.serving.vectors import vector_digest

EVIL = load_trait("evil", world="pocket")
GREEDY = SamplingParams(40, temperature=0)
LAYER = 4
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def vectors(lm, tmp_path_factory):
    """Three random directions that change pocket's answers without breaking them."""
    folder, found = tmp_path_factory.mktemp("vectors"), {}
    for k, name in enumerate(NAMES):
        v = torch.randn(lm.n_layers + 1, lm.hidden_size, generator=torch.Generator().manual_seed(k))
        found[name] = 8 * v / v.norm(dim=1, keepdim=True)
        torch.save(found[name], folder / f"{name}_response_avg_diff.pt")
    return folder, found


PRESETS = {
    "kind": {"steer": f"one:-1@{LAYER}"},
    "watched": {"steer": f"two:1@{LAYER}", "monitor": f"one@{LAYER},two@2"},
}
CPU = "--dtype float32 --max-model-len 512 --no-enable-chunked-prefill --max-num-batched-tokens 4096"


def start_server(folder: Path, log: Path, *more):
    import yaml

    presets = log.with_name("presets.yaml")
    presets.write_text(yaml.safe_dump(PRESETS))
    command = [str(Path(sys.executable).with_name("persona-steer")), "serve", "pocket", "--vectors", str(folder)]
    return start_vllm([*command, "--presets", str(presets), *CPU.split(), *more], log)


@pytest.fixture(scope="module")
def server(vectors, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = start_server(vectors[0], log, "--enforce-eager", "--slots", "24", "--max-coefficient", "3")
    yield process, url
    process.terminate()
    process.wait(30)


def post(url: str, path: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"{url}/v1/{path}", json.dumps({"model": "pocket"} | body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def questions(lm, n=8):
    return [lm.prompt(q) for q in EVIL.eval_questions[:n]]


def steered(lm, prompts, vectors, coefficient=1.0, name="one", layer=LAYER, **more):
    with steer(lm, vectors[1][name], layer, coefficient, **more):
        return [t.strip() for t in generate(lm, prompts, GREEDY, progress=False).texts]


def written(value):
    return ",".join(map(repr, value)) if isinstance(value, tuple) else value


def completions(url, prompts, **extra):
    body = dict(prompt=prompts, max_tokens=40, temperature=0)
    status, reply = post(url, "completions", body | ({"vllm_xargs": extra} if extra else {}))
    assert status == 200, reply
    return reply["choices"]


def texts_of(choices):
    return [c["text"].strip() for c in choices]


CAP = {"mode": "cap", "limits": (-math.inf, -2.0)}


@pytest.mark.parametrize(
    "more",
    [{}, {"positions": "all"}, {"positions": "prompt"}, {"mode": "ablate"}, {"positions": "response[3:9]"}, CAP],
)
def test_the_server_says_what_hugging_face_says(server, lm, vectors, more):
    prompts = questions(lm)
    spec = ";".join([f"one:1@{LAYER}", *(f"{k}={written(v)}" for k, v in more.items())])
    got, want = texts_of(completions(server[1], prompts, steer=spec)), steered(lm, prompts, vectors, **more)
    plain = texts_of(completions(server[1], prompts))
    print(f"{more}: {sum(a == b for a, b in zip(got, want))} of {len(want)} texts equal")
    assert sum(a == b for a, b in zip(got, want)) >= len(want) - 1
    assert got != plain or more.get("mode") == "ablate"
    assert texts_of(completions(server[1], prompts)) == plain  # what was cached while it was steered is not read


def test_openai_client_chat_stream_and_presets(server, lm, vectors):
    import openai

    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["pocket", "kind", "watched"]
    ask = dict(messages=[{"role": "user", "content": EVIL.eval_questions[0]}], max_tokens=40, temperature=0)
    want = steered(lm, questions(lm, 1), vectors, -1.0)[0]
    by_name = client.chat.completions.create(model="kind", **ask)
    by_hand = client.chat.completions.create(
        model="pocket", extra_body={"vllm_xargs": {"steer": f"one:-1@{LAYER}"}}, **ask
    )
    assert by_name.model == "kind" and by_hand.model == "pocket"
    assert by_name.choices[0].message.content.strip() == by_hand.choices[0].message.content.strip() == want
    whole = client.chat.completions.create(model="watched", **ask).choices[0]
    text, found, tokens = "", {}, 0
    for event in client.chat.completions.create(model="watched", stream=True, **ask):
        assert event.model == "watched"
        for choice in event.choices:
            text += choice.delta.content or ""
            tokens += bool(choice.delta.content)
            for name, values in choice.projections.items():
                found.setdefault(name, []).extend(values)
    assert text == whole.message.content and set(found) == {f"one@{LAYER}", "two@2"}
    assert found == whole.projections and len(found["two@2"]) in (tokens, tokens + 1)


def test_the_panel_of_a_served_model_writes_both_answers(server, lm, vectors):
    from persona_steer.app.live_generation import LiveRequest, answer_served, connect

    model, question = connect(f"{server[1]}/v1"), EVIL.eval_questions[1]
    assert (model.name, model.n_layers) == ("pocket", lm.n_layers)
    request = LiveRequest(question, "", (("one", LAYER, 1.0),), ("one", LAYER), sampling=SamplingParams(30, 0))
    shown = []
    plain, changed = answer_served(model, request, lambda answers: shown.append(len(answers[1].pieces)))
    prompt = [lm.prompt(question)]
    short = SamplingParams(30, 0)
    with steer(lm, vectors[1]["one"], LAYER, 1.0):
        want = generate(lm, prompt, short, progress=False).texts[0]
    assert changed.text.strip() == want.strip()
    assert plain.text.strip() == generate(lm, prompt, short, progress=False).texts[0].strip()
    assert len(changed.values) in (len(changed.pieces), len(changed.pieces) - 1) and shown[-1] > 5
    assert float(model.norms("one")[LAYER]) == pytest.approx(8, rel=1e-4)


def test_projections_are_those_of_hugging_face(server, lm, vectors):
    prompts, worst, compared = questions(lm, 4), 0.0, 0
    choices = completions(server[1], prompts, steer=f"two:1@{LAYER}", monitor=f"one@{LAYER},two@2")
    for prompt, choice in zip(prompts, choices):
        ids = lm.tokenizer(prompt, add_special_tokens=False).input_ids
        whole = ids + lm.tokenizer(choice["text"], add_special_tokens=False).input_ids
        steering = steer(lm, vectors[1]["two"], LAYER, 1.0)
        steering.start = torch.tensor([len(ids)])
        with steering, torch.no_grad():
            states = lm.model(torch.tensor([whole]), output_hidden_states=True).hidden_states
        for key, values in choice["projections"].items():
            name, layer = key.split("@")
            v = vectors[1][name][int(layer)]
            want = states[int(layer)][0, len(ids) - 1 :] @ v / v.norm()
            n = min(len(values), len(want))
            worst = max(worst, float((torch.tensor(values[:n]) - want[:n]).abs().max()))
            compared += n
    print(f"largest difference of {compared} projections: {worst:.1e}")
    assert compared > 60 and worst < 1e-3


REFUSED = [
    ({"steer": "four:1@2"}, "no vector 'four'"),
    ({"steer": "one:1@7"}, "layers 1 to 6"),
    ({"steer": "one:4@2"}, "this server allows 3"),
    ({"steer": "one:1@2;mode=rotate"}, "'rotate' is unknown"),
    ({"steer": "/etc/passwd:1@2"}, "cannot be read"),
    ({"steer": ["one:1@2"]}, "is a text"),
    ({"monitor": "four@2"}, "no vector 'four'"),
    ({"steer_key": "x"}, "not a client's"),
    ({"pool": "x"}, "not a client's"),
]


def test_cached_blocks_with_steered_tokens_are_not_read_by_others(vectors, lm):
    """Blocks of 32 tokens and a long instruction, so that there is something to share."""
    llm = llm_of(vectors, block_size=32, max_model_len=512, disable_log_stats=False)
    try:
        long = lm.prompt(EVIL.eval_questions[0], " ".join(EVIL.extract_questions[:12]))
        ids = [lm.tokenizer(long, add_special_tokens=False).input_ids]
        assert len(ids[0]) > 96
        specs = ["", f"one:1@{LAYER}", f"one:1@{LAYER};positions=all", f"two:1@{LAYER};positions=all", ""]

        def hits():
            return next(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")

        def run(spec):
            before = hits()
            text = answers_of(llm, ids, 48, **({"steer": spec} if spec else {}))[0][0]
            return text, hits() - before

        first = [run(spec) for spec in specs]
        again = [run(spec) for spec in specs]
        print([int(n) for _, n in first], [int(n) for _, n in again])
        assert [text for text, _ in again] == [text for text, _ in first] and first[0][0] == first[4][0]
        assert first[1][1] > 0 and first[2][1] == first[3][1] == 0  # shared before the prompt's end; not at all
        assert all(n > 0 for _, n in again)
        assert len({text for text, _ in first}) > 2
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra, words", REFUSED)
def test_what_cannot_be_applied_is_refused(server, extra, words, stream):
    body = dict(messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=stream, vllm_xargs=extra)
    status, reply = post(server[1], "chat/completions", body)
    assert status == 400 and words in reply["error"]["message"]


def test_embeddings_and_other_routes_cannot_be_steered_silently(server):
    status, reply = post(
        server[1], "responses", dict(input="Hello", max_output_tokens=4, vllm_xargs={"steer": "four:1@2"})
    )
    assert status == 400 and "no vector 'four'" in reply["error"]["message"]


def test_several_answers_to_one_request(server, lm, vectors):
    prompts = questions(lm, 3)
    ask = dict(prompt=prompts, max_tokens=20, temperature=0.9, seed=1, n=3)
    extra = {"steer": f"one:1@{LAYER}", "monitor": f"one@{LAYER}"}
    _, first = post(server[1], "completions", ask | {"vllm_xargs": extra})
    _, again = post(server[1], "completions", ask | {"vllm_xargs": extra})
    _, plain = post(server[1], "completions", ask)
    assert texts_of(first["choices"]) == texts_of(again["choices"]) != texts_of(plain["choices"])
    for k, choice in enumerate(first["choices"]):
        assert choice["index"] == k and choice["projections"] == again["choices"][k]["projections"]
    heads = [c["projections"][f"one@{LAYER}"][0] for c in first["choices"]]
    assert len(set(heads)) == 3  # three prompts, whose last tokens are read once


async def _one(client, prompt, spec, cancel):
    extra = {"vllm_xargs": {"steer": spec}} if spec else {}
    call = client.completions.create(
        model="pocket",
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        extra_body=extra,
    )
    if not cancel:
        return (await call).choices[0].text
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.02)
    task.cancel()
    return None


def test_three_hundred_mixed_requests_say_what_each_says_alone(server, lm):
    """32 at a time, 20 specifications and unsteered ones, every tenth request given up; memory is flat."""
    import openai

    r, prompts = random.Random(0), questions(lm, 10)
    specs = [f"{r.choice(NAMES)}:{c / 4}@{r.randint(1, 6)}" for c in range(1, 11)]
    specs += [f"one:0.5@2,two:{c / 4}@{LAYER};positions=all" for c in range(1, 11)]
    asked = [(r.choice(prompts), r.choice([*specs, "", "", ""])) for _ in range(300)]
    process = psutil.Process(server[0].pid)

    def memory():
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 2**20

    async def run(asked):
        client = openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key="none")
        gate, out, sizes = asyncio.Semaphore(32), {}, {}

        async def go(i):
            async with gate:
                out[i] = await _one(client, *asked[i], cancel=i % 10 == 9)
                if i in (100, 299):
                    sizes[i] = memory()

        await asyncio.gather(*(go(i) for i in range(300)))
        alone = {key: await _one(client, *key, cancel=False) for key in sorted(set(asked))}
        return out, sizes[299] - sizes[100], alone

    # this build of vLLM grows by itself, most in the beginning: unsteered requests before tell by how much
    *_, usual, _ = asyncio.run(run([(prompt, "") for prompt, _ in asked]))
    out, growth, alone = asyncio.run(run(asked))
    wrong = [i for i in range(300) if out[i] is not None and out[i] != alone[asked[i]]]
    given_up = sum(v is None for v in out.values())
    print(f"{300 - len(wrong)} of 300 as alone, {given_up} given up; memory {growth:+.0f} MB, else {usual:+.0f} MB")
    assert not wrong and growth < usual + 20


def test_more_specifications_than_slots_are_refused_and_nothing_is_left(vectors, tmp_path):
    process, url = start_server(
        vectors[0], tmp_path / "log", "--enforce-eager", "--slots", "2", "--api-key", "sk-secret"
    )
    try:
        import openai

        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").get("/steering", cast_to=object)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-secret", max_retries=0)

        def steer_by(c):
            return {"vllm_xargs": {"steer": f"one:{c}@2"}}

        async def run():
            ask = dict(model="pocket", prompt="Hello", max_tokens=200, temperature=0, stream=False)
            calls = [
                client.completions.create(**ask, extra_body=steer_by(c) | {"ignore_eos": True}) for c in (1, 2, 3, 4)
            ]
            both = await asyncio.gather(*calls, return_exceptions=True)
            later = await client.completions.create(
                **ask | {"max_tokens": 4}, extra_body={"vllm_xargs": {"steer": "one:5@2"}}
            )
            return both, later, await client.get("/steering", cast_to=object)

        found, later, about = asyncio.run(run())
        refused = [e for e in found if isinstance(e, openai.BadRequestError)]
        assert len(refused) == 2 and "specifications are in use" in str(refused[0]) and later.choices
        assert about["vectors"]["one"]["rows"][2] == vector_digest(vectors[1]["one"][2]) and about["slots"] == 2
        assert "sk-secret" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(30)


def test_an_engine_behind_an_address_steers_with_the_vectors_of_its_server(server, lm, vectors):
    engine = VLLMEngine(lm, f"{server[1]}/v1", "pocket")
    prompts = questions(lm)
    got = engine.generate(prompts, GREEDY, steer(lm, vectors[1]["two"], LAYER, 1.0)).texts
    want = steered(lm, prompts, vectors, name="two")
    assert sum(a.strip() == b for a, b in zip(got, want)) >= len(want) - 1
    with pytest.raises(Exception, match="does not have this vector of layer 4"):
        engine.generate(prompts, GREEDY, steer(lm, torch.randn(lm.n_layers + 1, lm.hidden_size), LAYER, 1.0))


def table_of(lm, vectors, coefficients=(-1, 1)):
    """Two vectors at two layers with two coefficients, and the unsteered point, in one table."""
    asked = EVIL.eval_questions[:6]
    rows = [condition_rows(asked, "unsteered", vector="one", layer=LAYER)]
    rows += [
        condition_rows(asked, "steered", vector=name, layer=layer, coefficient=c)
        for name in ("one", "two")
        for layer in (2, LAYER)
        for c in coefficients
    ]
    rows = pd.concat(rows, ignore_index=True)
    return rows, table_steering(lm, rows, vectors[1])


@pytest.mark.parametrize("eager", [True, False])
def test_a_sweep_and_its_activations_are_those_of_hugging_face(lm, vectors, eager):
    """Chunked prefill off, as the CPU build needs it for seeds; interpreted and compiled."""
    engine = VLLMEngine(lm, max_model_len=512, enforce_eager=eager)
    try:
        rows, steering = table_of(lm, vectors)
        got, pooled = generate_table(lm, rows, GREEDY, steering, True, engine)
        want, expected = generate_table(lm, rows, GREEDY, steering, True)
        same = (got.answer == want.answer).to_numpy()
        cosines = [torch.nn.functional.cosine_similarity(pooled[k][same], expected[k][same], dim=-1) for k in POOLS]
        least = min(float(c[~c.isnan()].min()) for c in cosines)
        print(f"eager={eager}: {same.sum()} of {len(same)} texts equal, least cosine {least:.7f}")
        assert same.mean() > 0.97 and least > 0.9999
        for k in POOLS:
            assert torch.equal(pooled[k][same].isnan(), expected[k][same].isnan())
        with steer(lm, vectors[1]["one"], LAYER), pytest.raises(Exception, match="does not reach vLLM"):
            engine.generate(questions(lm, 2), GREEDY)
    finally:
        engine._llm.llm_engine.engine_core.shutdown()


def llm_of(vectors, **options):
    from vllm import LLM

    from persona_steer.serving.plugin import engine_options

    files = {n: str(vectors[0] / f"{n}_response_avg_diff.pt") for n in NAMES}
    options = dict(dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=32) | options
    return LLM(model=str(data_path("pocket/chat")), **options, **engine_options(files))


def answers_of(llm, ids, tokens, **extra):
    from vllm import SamplingParams as Params

    ask = Params(temperature=0, max_tokens=tokens, extra_args=extra or None, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": i} for i in ids], ask, use_tqdm=False)
    return [(o.outputs[0].text, getattr(o.outputs[0], "projections", {})) for o in out]


def test_chunks_and_preemption(lm, vectors):
    """Prompts in chunks, and too little memory for the cache, so that requests are given up and read again."""
    few = dict(num_gpu_blocks_override=20, block_size=32, max_num_batched_tokens=64, disable_log_stats=False)
    llm = llm_of(vectors, **few)
    try:
        prompts = [lm.prompt(q, system_prompt(EVIL, "neg", 0)) for q in EVIL.eval_questions[:12]]
        ids = [lm.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        asked = {"steer": f"one:1@{LAYER}", "monitor": f"one@{LAYER}"}
        out = answers_of(llm, ids, 80, **asked)
        preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        print(f"preemptions: {preempted}")
        assert preempted > 0
        for (text, found), [(alone, expected)] in zip(out, [answers_of(llm, [i], 80, **asked) for i in ids[:6]]):
            x, y = (torch.tensor(v[f"one@{LAYER}"]) for v in (found, expected))
            assert text == alone and len(x) == len(y) == 80 and torch.allclose(x, y, atol=1e-3)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_two_workers_steer_alike(lm, vectors, monkeypatch):
    """Tensor parallel on two cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = llm_of(vectors, tensor_parallel_size=2)
    try:
        prompts = questions(lm, 2)
        ids = [lm.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        got = [text for text, _ in answers_of(llm, ids, 12, steer=f"one:3@{LAYER}")]
        assert all(want.startswith(text.strip()) for want, text in zip(steered(lm, prompts, vectors, 3.0), got))
        assert got != [text for text, _ in answers_of(llm, ids, 12)] and all(got)
        assert len(answers_of(llm, ids, 12, monitor="two@2")[0][1]["two@2"]) == 12
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_a_lora_adapter_beside_steering(lm, vectors, adapter):
    """In two batches: the CPU build of vLLM 0.32 lets an adapter answer also for requests without one beside it."""
    from vllm import SamplingParams as Params
    from vllm.lora.request import LoRARequest

    adapted = load_model(str(adapter), "cpu", "float32")
    llm = llm_of(vectors, enable_lora=True, max_lora_rank=8)
    try:
        prompts = questions(lm, 4)
        ids = [lm.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        lora = LoRARequest("tuned", 1, str(adapter))
        ask = Params(temperature=0, max_tokens=40, extra_args={"steer": f"one:1@{LAYER}"})
        asked, got = [{"prompt_token_ids": i} for i in ids], []
        for request in (lora, None):
            out = llm.generate(asked, ask, lora_request=request, use_tqdm=False)
            got += [o.outputs[0].text.strip() for o in out]
        want = steered(adapted, prompts, vectors) + steered(lm, prompts, vectors)
        assert sum(a == b for a, b in zip(got, want)) >= 7 and got[:4] != got[4:]
    finally:
        llm.llm_engine.engine_core.shutdown()
