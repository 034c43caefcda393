"""Steering in an engine for many requests, without the engine: the notation, the tables, the book of requests, the
server's middleware. `tests/vllm/test_serving.py` has the real vLLM."""

import asyncio
import json
import random

import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.lm.activations import steer
from persona_steer.lm.gates import Gate
from persona_steer.lm.operations import SteeringTerm, ablate, add, cap
from persona_steer.lm.vllm_engine import steering_texts
from persona_steer.serving.plugin import Served, block_key, check_request
from persona_steer.serving.server import SteeringMiddleware, load_presets, server_command
from persona_steer.serving.specification import Limits, SteeringSpec, Term, parse_monitoring, parse_steering
from persona_steer.serving.steps import StepBook
from persona_steer.serving.tables import SteeringTables
from persona_steer.serving.vectors import vector_files
from persona_steer.serving.worker import check_steered_step, find_served_blocks, hook_blocks

LIMITS = Limits(("evil", "humorous"), 4, 5.0, monitors=1)


@pytest.mark.parametrize(
    "text, words",
    [
        ("evil", "write name:coefficient@layer"),
        ("evil:2", "write name:coefficient@layer"),
        ("evil:x@2", "'x' is no number"),
        ("evil:nan@2", "must be finite"),
        ("evil:inf@2", "must be finite"),
        ("evil:1e308@2,evil:1e308@2", "at most 1e\\+06"),
        ("evil:1e300@2", "at most 1e\\+06"),
        (f"evil:1@{'9' * 5000}", "cannot be read"),
        ("../evil:1@2", "cannot be read"),
        ("evil:1@2;position=all", "did you mean 'positions'"),
        ("evil:1@2;positions=last", "'last' is unknown"),
        ("evil:1@2;mode=rotate", "'rotate' is unknown"),
        ("evil:1@2;mode=cap", "limits=LOW,HIGH belong together"),
        ("evil:1@2;limits=0,1", "limits=LOW,HIGH belong together"),
        ("evil:1@2;mode=cap;limits=1", "write limits=LOW,HIGH"),
        ("evil:1@2;mode=cap;limits=2,1", "must not be above"),
        ("evil:1@2;mode=cap;limits=nan,1", "must not be above"),
        ("evil:1@2;positions=response[3:3]", "positions 'response\\[3:3\\]' is unknown"),
        ("evul:1@2", "did you mean 'evil'"),
        ("evil:1@5", "layers 1 to 4"),
        ("evil:1@0", "layers 1 to 4"),
        ("evil:3@2,humorous:-3@2", "coefficient of 6: this server allows 5"),
        (7, "is a text"),
    ],
)
def test_a_specification_that_cannot_be_applied_is_refused_in_a_sentence(text, words):
    with pytest.raises(PersonaError, match=words):
        LIMITS.check_steering(parse_steering(text))


def test_what_the_worker_could_not_fill_is_refused_before():
    """Else the engine would end there, with all its requests."""
    limits = Limits(("evil", "humorous", "kind"), 4, zeros=(("kind", 2),))
    limits.check_steering(parse_steering("evil:1@2,humorous:1@2,kind:1@2"))
    limits.check_steering(parse_steering("evil:1@2,humorous:1@2,evil:1@3;mode=ablate"))
    for text, words in (
        ("evil:1@2,humorous:1@2,evil:0.5@2;mode=ablate", r"ablate 2 directions at a layer, not 3 \(layer 2\)"),
        ("kind:1@2;mode=ablate", "'kind' is 0 at layer 2"),
    ):
        with pytest.raises(PersonaError, match=words):
            limits.check_steering(parse_steering(text))


def test_specifications_that_do_the_same_have_one_text():
    same = ["evil:2@3,humorous:1@2", "humorous:1.0@2, evil:1@3 , evil:1@3;mode=add", "humorous:1@2,evil:2@3,evil:0@1;"]
    assert len({str(parse_steering(t)) for t in same}) == 1
    assert str(parse_steering(str(parse_steering(same[0])))) == str(parse_steering(same[0]))
    one_after_the_other = [
        str(parse_steering(f"{t};mode=ablate")) for t in ("evil:1@2,humorous:1@2", "humorous:1@2,evil:1@2")
    ]
    assert len(set(one_after_the_other)) == 2


def test_monitoring_is_checked():
    LIMITS.check_monitoring(parse_monitoring("evil@1, evil@4"))
    for text, words in (
        ("humorous@1", "cannot be monitored"),
        ("evil@9", "layers 1 to 4"),
        ("evil", "write name@layer"),
    ):
        with pytest.raises(PersonaError, match=words):
            LIMITS.check_monitoring(parse_monitoring(text))


def tables_of(dtype=torch.float32, **more):
    torch.manual_seed(0)
    tables = SteeringTables(4, 8, dtype, "cpu", max_tokens=64, **more)
    for name in ("evil", "humorous"):
        tables.add_vector(name, torch.randn(5, 8))
    return tables


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize(
    "mode, operate, limits",
    [("add", add, None), ("ablate", ablate, None), ("cap", cap, (-0.4, 0.3)), ("cap", cap, (-torch.inf, -0.2))],
)
@pytest.mark.parametrize("residual", [True, False])
def test_a_step_does_to_each_token_what_hugging_face_does(dtype, close, mode, operate, limits, residual):
    tables = tables_of(dtype)
    option = f"mode={mode}" + (";limits={},{}".format(*limits) if limits else "")
    specs = [parse_steering(f"evil:1.5@2,humorous:-0.7@2;{option}"), parse_steering(f"evil:-1@2;{option}")]
    for spec in specs:
        tables.fill(tables.slots.take(spec)[0], spec)
    tables.use(specs)
    tables.slot[:6] = torch.tensor([0, 1, 2, 1, 0, 2])
    h, rest = torch.randn(6, 8).to(dtype), torch.randn(6, 8).to(dtype) if residual else None
    stream = h if rest is None else h + rest
    got = tables.step(h, rest, 2)
    got = (got if rest is None else got + rest).float()
    for i, slot in enumerate([0, 1, 2, 1, 0, 2]):
        terms = [
            SteeringTerm(2, tables.vectors[t.name][2], torch.tensor(t.coefficient), limits)
            for t in specs[slot - 1].terms
        ]
        want = operate(stream[None, i : i + 1].float(), terms, torch.tensor([[[slot > 0]]]))[0, 0]
        assert torch.allclose(got[i], want, atol=close, rtol=close), (i, slot)
    assert tables.step(h, rest, 3) is h  # no other layer


def test_a_slice_steers_the_tokens_that_hugging_face_steers(llama):
    """Generated token k comes out of the position before it, whatever the chunks that a prompt is read in."""
    from test_operations import touched

    for positions in ("response", "response[:1]", "response[2:]", "response[1:3]"):
        tables = tables_of()
        book = StepBook(tables)
        book.enter("r", {"steer": f"evil:1@2;positions={positions}"}, 5)
        seen = []
        for first, n in ((0, 3), (3, 2), (5, 1), (6, 1), (7, 1), (8, 1)):
            book.begin([("r", first, n)])
            seen += [first + i for i in range(n) if tables.slot[i]]
        assert [seen] == touched(llama, torch.randint(3, 2000, (1, 9)), 5, positions), positions


def test_steering_goes_to_vllm_whole_or_is_refused(llama):
    v = torch.randn(32)
    texts, _ = steering_texts(steer(llama, v, 2, torch.tensor([1.0, 0.0]), mode="cap", limits=(-torch.inf, 1.5)), 2)
    assert texts[0].endswith("mode=cap;limits=-inf,1.5") and texts[1] == ""
    assert steering_texts(steer(llama, v, 2, 1.0, "response[:8]"), 1)[0][0].endswith("positions=response[:8];mode=add")
    for bad, words in (
        (dict(keep_norm=True), "keep_norm"),
        (dict(when=Gate(v, 1, 0.0)), "no gates"),
        (dict(outside="json"), "outside"),
        (dict(positions=torch.ones(1, 9, dtype=torch.bool)), "not as a mask"),
        (dict(mode="rotate"), "'rotate' is unknown"),
    ):
        with pytest.raises(PersonaError, match=words):
            steering_texts(steer(llama, v, 2, 1.0, **bad), 1)


def test_ten_thousand_specifications_one_after_the_other_leave_no_growth():
    tables = tables_of(slots=4)
    book = StepBook(tables)
    for k in range(10_000):
        book.enter(f"r{k}", {"steer": f"evil:{k + 1}@{k % 4 + 1}"}, 3)
        book.begin([(f"r{k}", 0, 3)])
        book.leave(f"r{k}")
    assert len(tables.slots.of) == len(tables.slots.users) == 4 and len(tables.filled) == 4 and not book.requests
    used = sum(bool(t[1:].any(1).sum()) for t in tables.table)
    assert used <= 4
    for layer, table in enumerate(tables.table, 1):
        for spec, slot in tables.slots.of.items():
            want = sum(
                (t.coefficient * tables.vectors["evil"][layer] for t in spec.terms if t.layer == layer), torch.zeros(8)
            )
            assert torch.allclose(table[slot], want)


def test_all_slots_in_use_is_an_error_and_no_wrong_steering():
    tables = tables_of(slots=1)
    book = StepBook(tables)
    book.enter("a", {"steer": "evil:1@1"}, 3)
    with pytest.raises(PersonaError, match="slots are in use"):
        book.enter("b", {"steer": "evil:2@1"}, 3)


def steps_of(length: int, prompt: int, r: random.Random, restarts: bool):
    """A request's tokens as an engine may pass them: the prompt in chunks, then one by one, now and then from the start
    again."""
    at = 0
    while at < length:
        n = r.randint(1, prompt - at) if at < prompt else 1
        yield at, n
        at += n
        if restarts and at > prompt and r.random() < 0.2:
            yield 0, at  # preempted, and all of it read again
    return


@pytest.mark.parametrize("seed", range(20))
def test_what_is_done_to_a_token_does_not_depend_on_the_chunks(seed):
    """Steered positions, projections and pooled activations of requests side by side equal those of whole texts."""
    r = random.Random(seed)
    tables = tables_of(capture=3)
    book = StepBook(tables)
    positions = r.choice(["response", "prompt", "all"])
    asked = [
        {"steer": f"evil:2@1;positions={positions}", "monitor": "evil@1", "pool": dict(pool="k", pool_tokens=4)},
        {},
        {},
    ]
    asked[2] = {"monitor": "humorous@2", "pool": dict(pool="m", pool_tokens=9)}
    prompts, lengths = [r.randint(2, 7) for _ in asked], []
    texts = [torch.randn(p + 6, 8) for p in prompts]
    for k, (extra, p) in enumerate(zip(asked, prompts)):
        book.enter(f"r{k}", extra, p)
        lengths.append(p + 6)
    plans = [list(steps_of(n, p, r, k != 1)) for k, (n, p) in enumerate(zip(lengths, prompts))]
    found, where = {}, {}
    while any(plans):
        now = [(k, *plans[k].pop(0)) for k in r.sample(range(3), r.randint(1, 3)) if plans[k]]
        if not now:
            continue
        book.begin([(f"r{k}", at, n) for k, at, n in now])
        h = torch.cat([texts[k][at : at + n] for k, at, n in now])
        tables.step(h, None, 0)
        for layer in range(1, 5):
            h = tables.step(h, None, layer)
        places = [(k, p) for k, at, n in now for p in range(at, at + n)]
        for (k, p), slot in zip(places, tables.slot.tolist()):
            where.setdefault((k, p), set()).add(bool(slot))
        for name, values in book.end().items():
            for v, numbers in values.items():
                found.setdefault((name, v), []).extend(numbers)
    first, end = {"response": (prompts[0] - 1, 99), "prompt": (0, prompts[0]), "all": (0, 99)}[positions]
    assert all(s == {k == 0 and first <= p < end} for (k, p), s in where.items())
    whole = [t.clone() for t in texts]
    whole[0][first:end] += 2 * tables.vectors["evil"][1]
    for k, v, layer in ((0, "evil", 1), (2, "humorous", 2)):
        unit = tables.vectors[v][layer] / tables.vectors[v][layer].norm()
        want = whole[k][prompts[k] - 1 :] @ unit
        assert torch.allclose(torch.tensor(found[f"r{k}", f"{v}@{layer}"]), want, atol=1e-4)
    pools = book.take_pools(["k", "m", "unknown"])
    assert pools["unknown"] is None and not book.pools
    for k, key, n in ((0, "k", 4), (2, "m", 6)):
        p = prompts[k]
        for layer, text in ((0, texts[k]), (4, whole[k])):
            want = torch.stack([text[:p].mean(0), text[p : p + n].mean(0), text[p - 1]])
            assert torch.allclose(pools[key][:, layer], want, atol=1e-4)


def test_a_request_that_was_given_up_leaves_its_slot_and_takes_one_again():
    tables = tables_of(slots=1)
    book = StepBook(tables)
    book.enter("a", {"steer": "evil:1@1"}, 2)
    book.begin([("a", 0, 2)])
    book.pause("a")
    book.enter("b", {"steer": "evil:2@1"}, 2)  # in the same slot
    book.begin([("b", 0, 2)])
    book.leave("b")
    book.begin([("a", 0, 3)])
    want = torch.stack([torch.zeros(8), *[tables.vectors["evil"][1]] * 2])
    assert torch.allclose(tables.step(torch.zeros(3, 8), None, 1), want)
    book.leave("a")
    assert not any(tables.slots.users.values())


def test_activations_that_are_incomplete_are_not_handed_out():
    book = StepBook(tables_of(capture=1))
    book.enter("cached", {"pool": dict(pool="k", pool_tokens=4)}, 8)
    book.begin([("cached", 4, 4)])  # the first tokens came from a cache
    book.enter("no row left", {"pool": dict(pool="l", pool_tokens=4)}, 2)
    book.begin([("no row left", 0, 2)])
    assert book.take_pools(["k", "l"]) == {"k": None, "l": None}


def test_blocks_of_the_cache_are_kept_apart_where_they_hold_steered_tokens():
    served = Served(
        dict(digests={"evil": "abc", "humorous": "def"}, max_coefficient=0, monitors=8, slots=4, capture=0), 4
    )

    def keys(text, prompt=40):
        params = type("P", (), {"extra_args": {"steer": text}})()
        check_request(served, params, prompt)
        return [block_key(params.extra_args, end) for end in range(16, 80, 16)]

    plain, response = keys(""), keys("evil:1@2")
    assert plain == [""] * 4 and response[:2] == ["", ""] and all(response[2:])
    assert all(keys("evil:1@2;positions=all")) and all(keys("evil:1@2;positions=prompt"))
    different = ["evil:1@2", "evil:2@2", "evil:1@3", "humorous:1@2", "evil:1@2;positions=all", "evil:1@2;mode=ablate"]
    assert len({keys(t)[2] for t in different}) == len(different)
    other = Served(dict(served.config, digests={"evil": "xyz"}), 4)
    assert other.key(parse_steering("evil:1@2")) != served.key(parse_steering("evil:1@2"))


def test_what_a_client_writes_into_the_inner_arguments_is_not_believed():
    served = Served(dict(digests={"evil": "abc"}, max_coefficient=0, monitors=8, slots=4, capture=0), 4)
    params = type("P", (), {"extra_args": {"steer": "evil:1@2", "steer_key": "mine", "steer_slots": 0, "mine": 3}})()
    check_request(served, params, 5)
    assert params.extra_args["steer_key"] == served.key(parse_steering("evil:1@2")) and params.extra_args["mine"] == 3
    for extra in ({"steer_key": "x"}, {"steer_key": "x", "steer": ""}, {"steer_slots": 3}):
        params = type("P", (), {"extra_args": extra})()
        check_request(served, params, 5)
        assert not params.extra_args["steer_key"] and block_key(params.extra_args, 16) == ""
    for pool in ("x", {"pool": "x", "pool_tokens": 3}):
        with pytest.raises(PersonaError, match="does not pool"):
            check_request(served, type("P", (), {"extra_args": {"pool": pool}})(), 5)


class Block(torch.nn.Module):
    def forward(self, h, residual):
        stream = h if residual is None else h + residual
        return torch.tanh(stream), stream


class Served4(torch.nn.Module):
    """Four blocks as vLLM's; `wrong` scales what a block returns, as an architecture of another kind might."""

    def __init__(self, wrong=False):
        super().__init__()
        self.layers, self.norm, self.wrong = torch.nn.ModuleList(Block() for _ in range(4)), torch.nn.Identity(), wrong

    def forward(self, x):
        h, residual = x, None
        for block in self.layers:
            h, residual = block(h, residual)
            h = 0.5 * h if self.wrong else h
        return self.norm(h + residual)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_the_test_at_start_finds_a_hidden_state_that_does_not_move_by_the_vector(layer):
    from persona_steer.serving.tables import register_tables

    for wrong in (False, True):
        tables, model = tables_of(), Served4(wrong)
        inner, blocks = find_served_blocks(model, 4)
        hook_blocks(blocks, register_tables(tables), read_input=False)
        x = torch.randn(5, 8)
        if not wrong:
            check_steered_step(inner, blocks, tables, lambda: model(x), [layer])
            assert not tables.slot.any() and not any(t.any() for t in tables.table) and not tables.added
            continue
        with pytest.raises(PersonaError, match="does not move its hidden state by the vector"):
            check_steered_step(inner, blocks, tables, lambda: model(x), [layer])


def test_blocks_that_are_not_clear_are_refused():
    with pytest.raises(PersonaError, match="could not be told apart"):
        find_served_blocks(torch.nn.Sequential(Served4(), Served4()), 4)


def test_a_vector_of_another_model_is_refused_before_the_engine_starts(tmp_path):
    torch.save(torch.randn(3, 8), tmp_path / "evil_response_avg_diff.pt")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "hidden_size": 8}))
    with pytest.raises(PersonaError, match=r"'evil' is \[3, 8\] but m needs \[5, 8\]"):
        server_command(str(model), "m", [str(tmp_path)])
    torch.save(torch.randn(5, 8), tmp_path / "evil_response_avg_diff.pt")
    command = server_command(str(model), "m", [f"wicked={tmp_path}"], more=("--port", "1"))
    config = json.loads(command[command.index("--additional-config") + 1])["persona_steer"]
    assert list(config["vectors"]) == ["wicked"] and command[-2:] == ["--port", "1"]


def test_vector_files_have_one_name_each(tmp_path):
    for folder in ("a", "b", "a/earlier/x"):
        (tmp_path / folder).mkdir(parents=True)
        torch.save(torch.randn(3, 4), tmp_path / folder / "evil_response_avg_diff.pt")
    assert list(vector_files([str(tmp_path / "a")])) == ["evil"]  # not what was set aside
    with pytest.raises(PersonaError, match="two vectors are called 'evil'"):
        vector_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert list(vector_files([str(tmp_path / "a"), f"other={tmp_path / 'b'}"])) == ["evil", "other"]
    for given, words in (("nowhere", "does not exist"), (f"a/b={tmp_path / 'a'}", "cannot be a vector's name")):
        with pytest.raises(PersonaError, match=words):
            vector_files([given])


@pytest.mark.parametrize(
    "text, words",
    [
        ("kind: {steer: 'evul:1@2'}", "preset 'kind': there is no vector 'evul'"),
        ("kind: {stear: 'evil:1@2'}", "did you mean 'steer'"),
        ("kind: 3", "needs 'steer' or 'monitor'"),
        ("- a", "presets are names"),
        ("a: [", "not valid YAML"),
    ],
)
def test_presets_are_checked_before_the_engine_starts(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(PersonaError, match=words):
        load_presets(str(tmp_path / "p.yaml"), LIMITS)


def answer_of(
    body, reply: list[bytes], kind=b"application/json", path="/v1/chat/completions", method="POST", status=200
):
    """What a client gets through the middleware from a server that answers with these parts; what that server got."""
    served = Served(dict(digests={"evil": "abc"}, max_coefficient=5, monitors=8, slots=4, vectors={},
                         presets={"kind": {"steer": "evil:-1@2"}}), 4)  # fmt: skip
    seen, sent = {}, []

    async def app(scope, receive, send):
        seen["path"], seen["body"] = scope["path"], (await receive()).get("body")
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        for i, part in enumerate(reply):
            await send({"type": "http.response.body", "body": part, "more_body": i < len(reply) - 1})

    engine = type("E", (), {"input_processor": type("P", (), {"persona_steer": served})()})()
    state = type("S", (), {"engine_client": engine, "args": type("A", (), {"served_model_name": ["m"]})()})()
    scope = dict(
        type="http",
        method=method,
        path=path,
        headers=[(b"content-type", b"application/json")],
        app=type("F", (), {"state": state})(),
    )
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]

    async def receive():
        return (
            {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            if parts
            else {"type": "http.disconnect"}
        )

    async def send(message):
        sent.append(message)

    asyncio.run(SteeringMiddleware(app)(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), seen


def test_the_middleware_writes_presets_out_and_names_them_in_the_answer():
    status, text, seen = answer_of({"model": "kind", "prompt": "x"}, [b'{"model": "m", ', b'"choices": []}'])
    assert status == 200 and json.loads(text)["model"] == "kind"
    got = json.loads(seen["body"])
    assert got["model"] == "m" and got["vllm_xargs"] == {"steer": "evil:-1@2"}
    _, text, _ = answer_of({"model": "kind"}, [b'data: {"mod', b'el": "m"}\n\ndata: [DONE]\n\n'], b"text/event-stream")
    assert text == b'data: {"model": "kind"}\n\ndata: [DONE]\n\n'


def test_the_middleware_lets_everything_else_through_untouched():
    raw = b'{"a": 1}'
    for body in (b"not json", b"[1]", b'{"model": "m", "prompt": "x"}'):
        status, text, seen = answer_of(body, [raw])
        assert (status, text) == (200, raw)
        assert seen["body"] == body or json.loads(seen["body"]) == json.loads(body)


@pytest.mark.parametrize(
    "extra", [{"steer": "evil:1@9"}, {"steer": "evil:6@2"}, {"monitor": "x@1"}, {"pool": "k"}, "text"]
)
def test_the_middleware_refuses_what_cannot_be_applied(extra):
    status, text, seen = answer_of({"model": "m", "vllm_xargs": extra}, [b"{}"])
    assert status == 400 and json.loads(text)["error"]["message"].endswith(".")
    assert seen["path"] == "/v1/models"  # which asks for the API key


def test_who_may_not_use_the_server_learns_nothing_of_its_vectors():
    status, text, _ = answer_of({"vllm_xargs": {"steer": "x:1@1"}}, [b'{"error": "Unauthorized"}'], status=401)
    assert status == 401 and b"evil" not in text


@pytest.mark.parametrize(
    "path, more, words",
    [
        ("/invocations", {}, "/invocations cannot be steered"),
        ("/v1/embeddings", {}, "cannot be steered"),
        ("/v1/responses", {"vllm_xargs": {"monitor": "evil@2"}}, "cannot give projections"),
        ("/v1/completions", {"use_beam_search": True}, "beam search"),
        ("/v1/completions", {"use_beam_search": True, "model": "kind", "vllm_xargs": {}}, "beam search"),
    ],
)
def test_what_vllm_would_leave_out_in_silence_is_refused(path, more, words):
    body = {"model": "m", "vllm_xargs": {"steer": "evil:1@2"}} | more
    status, text, _ = answer_of(body, [b"{}"], path=path)
    assert status == 400 and words in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("body", [b'{"model": []}', b'{"model": {}}', b"[" * 100_000, b'{"a": "\xff"}'])
def test_malformed_bodies_are_left_to_the_server(body):
    assert answer_of(body, [b"{}"])[0] == 200


def test_presets_are_listed_as_models_and_vectors_described():
    listed = b'{"data": [{"id": "m"}]}'
    _, text, _ = answer_of(b"", [listed], path="/v1/models", method="GET")
    assert [m["id"] for m in json.loads(text)["data"]] == ["m", "kind"]
    _, text, seen = answer_of(b"", [listed], path="/v1/steering", method="GET")
    assert json.loads(text)["layers"] == 4 and seen["path"] == "/v1/models"  # which asks for the API key


def test_specs_are_frozen_and_hashable():
    assert {SteeringSpec((Term(1, "a", 1.0),)): 1}[parse_steering("a:1@1")] == 1


class StreamingServer:
    """Says what a steered server says: three tokens, whose projections grow with the coefficient, one event late."""

    def __init__(self):
        import threading
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, kind: str, body: bytes):
                self.send_response(200)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                vectors = {"evil": {"digest": "abc", "rows": [], "norms": [2.0] * 7}}
                about = {"vectors": vectors, "layers": 6}
                listed = {"object": "list", "data": [{"id": "pocket", "object": "model"}]}
                self.reply("application/json", json.dumps(about if "steering" in self.path else listed).encode())

            def do_POST(self):
                ask = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked.append(ask)
                c = 3.0 if ask["vllm_xargs"]["steer"] else 0.0
                events = [({"role": "assistant", "content": ""}, [], [9.0])]
                events += [({"content": text}, [k], [k + c]) for k, text in enumerate(("One", " <b>", " three"))]
                lines = []
                for delta, ids, values in events:
                    choice = {"index": 0, "delta": delta, "token_ids": ids, "projections": {"evil@4": values}}
                    lines.append(
                        f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'choices': [choice]})}"
                    )
                self.reply("text/event-stream", "\n\n".join([*lines, "data: [DONE]", ""]).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"


def test_the_dashboard_steers_a_served_model(runs):
    from persona_steer.app.dashboard import Dashboard

    served = StreamingServer()
    panel = Dashboard(models=(served.url,), chosen=("evil",), max_new_tokens=20)
    try:
        assert panel.worker.wait() and not panel.error.value
        coefficient, layer = panel.rows["evil"]
        assert (layer.max, layer.value) == (6, 4)  # two thirds of the depth that the server named
        assert {a["vllm_xargs"]["steer"] for a in served.asked} == {"", "evil:1.5@4;positions=response"}
        assert {a["vllm_xargs"]["monitor"] for a in served.asked} == {"evil@4"}
        assert "&lt;b&gt;" in panel.left.value and "steered: evil x 1.5 at layer 4" in panel.right.value
        assert 'title="+1.50"' in panel.right.value and 'title="+0.00"' in panel.left.value  # 3 in lengths of 2
        coefficient.value = -2.0
        assert panel.worker.wait() and served.asked[-1]["vllm_xargs"]["steer"] in ("", "evil:-2.0@4;positions=response")
        panel.traits.value = ("evil", "humorous")
        assert panel.worker.wait() and "has no vector &#x27;humorous&#x27;" in panel.error.value
    finally:
        panel.close()
        served.server.shutdown()


def test_an_address_where_nothing_answers_is_told(runs):
    from persona_steer.app.live_generation import connect

    with pytest.raises(PersonaError, match="127.0.0.1:9"):
        connect("http://127.0.0.1:9/v1")
