"""Operations, modifiers, gates and positions, each against plain arithmetic."""

import numpy as np
import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.lm.activations import hidden, steer
from persona_steer.lm.gates import Gate
from persona_steer.lm.generation import SamplingParams, answer_logprobs, collect_activations, encode_pair, generate
from persona_steer.lm.operations import MODES, SteeringTerm, scale_back
from persona_steer.lm.positions import PositionTracker

LIMITS = (-0.3, 0.4)
STRENGTHS = {"add": 1.5, "ablate": 1.0, "cap": 1.0, "rotate": 0.4}


def reference(mode, h, v, c):
    """What a mode does to one token, in three lines."""
    u = v / v.norm()
    p = h @ u
    if mode == "add":
        return h + c * v
    if mode == "ablate":
        return h - c * p * u
    if mode == "cap":
        return h - c * (p - min(max(p, LIMITS[0]), LIMITS[1])) * u
    w = (h - p * u) / (h - p * u).norm()
    angle = min(max(torch.acos(p / h.norm()) - c, torch.tensor(0.0)), torch.tensor(torch.pi))
    return h.norm() * (torch.cos(angle) * u + torch.sin(angle) * w)


def limits_for(mode):
    return LIMITS if mode == "cap" else None


def outputs(lm, ids, layer, **how):
    """The output of a block, [rows, tokens, hidden]."""
    seen = []
    handle = lm.blocks[layer - 1].register_forward_hook(lambda m, a, out: seen.append(hidden(out).detach().clone()))
    with torch.no_grad():
        lm.model(input_ids=ids, **how)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_each_operation_is_its_formula(mode, dtype):
    torch.manual_seed(0)
    h, v = torch.randn(3, 4, 16).to(dtype), torch.randn(16)
    c = torch.tensor([STRENGTHS[mode], 0.0, -STRENGTHS[mode]])
    where = torch.ones(3, 4, 1, dtype=torch.bool)
    where[:, 0] = False
    new = MODES[mode](h, [SteeringTerm(1, v, c, limits_for(mode))], where)
    assert new.dtype == dtype and torch.equal(new[:, 0], h[:, 0]) and torch.equal(new[1], h[1])
    want = torch.stack([torch.stack([reference(mode, t.float(), v, float(k)) for t in row]) for row, k in zip(h, c)])
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=4e-2)
    torch.testing.assert_close(new[:, 1:].float(), want[:, 1:], **tolerance)
    assert not torch.equal(new[0, 1:], h[0, 1:])


def test_what_each_operation_promises():
    torch.manual_seed(1)
    h, v, everywhere = torch.randn(1, 200, 16), torch.randn(16), torch.ones(1, 200, 1, dtype=torch.bool)
    u = v / v.norm()

    def apply(mode, c, limits=None):
        return MODES[mode](h, [SteeringTerm(1, v, torch.tensor(c), limits)], everywhere)

    projections = h @ u
    inside = (projections >= LIMITS[0]) & (projections <= LIMITS[1])
    capped = apply("cap", 1.0, LIMITS)
    assert 0 < inside.sum() < 200 and torch.equal(capped[inside], h[inside])
    assert ((capped @ u) >= LIMITS[0] - 1e-5).all() and ((capped @ u) <= LIMITS[1] + 1e-5).all()
    torch.testing.assert_close(apply("cap", 1.0, (0.0, 0.0)), apply("ablate", 1.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apply("rotate", 0.7).norm(dim=-1), h.norm(dim=-1))
    torch.testing.assert_close(apply("rotate", 9.0), h.norm(dim=-1, keepdim=True) * u, rtol=1e-4, atol=1e-4)
    back = MODES["rotate"](apply("rotate", 0.1), [SteeringTerm(1, v, torch.tensor(-0.1))], everywhere)
    torch.testing.assert_close(back, h, rtol=1e-4, atol=1e-4)
    along = (2.5 * u).expand(1, 1, 16)
    turned = MODES["rotate"](along, [SteeringTerm(1, v, torch.tensor(-0.5))], everywhere[:, :1])
    assert torch.equal(turned, along)  # a token along the vector has no plane to turn in
    kept = scale_back(h, apply("add", 1.0))
    torch.testing.assert_close(kept.norm(dim=-1), h.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(kept, h + v, dim=-1), torch.ones(1, 200))


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_in_a_batch_is_the_row_alone_and_nothing_below_changes(llama, mode, keep_norm):
    ids, v = torch.randint(3, 2000, (3, 6)), torch.randn(32)
    c = torch.tensor([0.0, STRENGTHS[mode], -STRENGTHS[mode]])
    how = dict(positions="all", mode=mode, limits=limits_for(mode), keep_norm=keep_norm)
    plain = [outputs(llama, ids, layer) for layer in (1, 2)]
    with steer(llama, v, 2, c, **how):
        below, batch = outputs(llama, ids, 1), outputs(llama, ids, 2)
    assert torch.equal(below, plain[0]) and torch.equal(batch[0], plain[1][0])
    for row in (1, 2):
        with steer(llama, v, 2, float(c[row]), **how):
            alone = outputs(llama, ids[row : row + 1], 2)
        torch.testing.assert_close(alone[0], batch[row], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone[0], plain[1][row], atol=1e-3)
        if keep_norm or mode == "rotate":
            torch.testing.assert_close(alone[0].norm(dim=-1), plain[1][row].norm(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_pass_through_each_operation(mode):
    torch.manual_seed(2)
    h, v = torch.randn(2, 3, 5, dtype=torch.float32, requires_grad=True), torch.randn(5)
    term = SteeringTerm(1, v, torch.tensor(STRENGTHS[mode]), limits_for(mode))
    where = torch.ones(2, 3, 1, dtype=torch.bool)
    weights = torch.randn(2, 3, 5)
    (MODES[mode](h, [term], where) * weights).sum().backward()
    step, numeric = 1e-2, torch.zeros_like(h)
    with torch.no_grad():
        for i in range(h.numel()):
            delta = torch.zeros(h.numel())
            delta[i] = step
            up, down = (
                (MODES[mode](h + s * delta.view_as(h), [term], where) * weights).double().sum() for s in (1, -1)
            )
            numeric.view(-1)[i] = (up - down) / (2 * step)
    close = (h.grad - numeric).abs() < 0.02
    assert close.float().mean() > (0.9 if mode == "cap" else 0.999)  # a cap has a corner at each limit
    assert torch.isfinite(h.grad).all()


def test_a_table_of_rows_through_generation_equals_one_by_one(llama):
    prompts, v = [llama.prompt(q) for q in ("Why?", "How does it work?", "Is it good?")], torch.randn(32)
    for mode, c in STRENGTHS.items():
        column = torch.tensor([0.0, 4 * c, -4 * c]) if mode in ("add", "rotate") else torch.tensor([0.0, c, -c])
        how = dict(mode=mode, limits=limits_for(mode), keep_norm=True)
        s = SamplingParams(10, temperature=0)
        together = generate(llama, prompts, s, steer(llama, v, 2, column, **how), progress=False).texts
        alone = [
            generate(llama, [p], s, steer(llama, v, 2, float(k), **how), progress=False).texts[0]
            for p, k in zip(prompts, column)
        ]
        assert together == alone, mode


def touched(lm, ids, start, positions, **how):
    """Which tokens of each row a steering of layer 1 changes."""
    plain = outputs(lm, ids, 1, **how)
    s = steer(lm, torch.randn(32), 1, 1.0, positions)
    s.start = start
    with s:
        changed = (outputs(lm, ids, 1, **how) - plain).abs().sum(-1) > 1e-6
    return [row.nonzero().flatten().tolist() for row in changed]


def test_slices_of_the_response_count_generated_tokens(llama):
    ids = torch.randint(3, 2000, (1, 9))
    want = {
        "response[0:]": [4, 5, 6, 7, 8],
        "response[:1]": [4],  # the last prompt token produces generated token 0
        "response[:3]": [4, 5, 6],
        "response[2:]": [6, 7, 8],
        "response[1:3]": [5, 6],
    }
    for positions, tokens in want.items():
        assert touched(llama, ids, 5, positions) == [tokens], positions
    for bad in ("response[3:3]", "response[:-1]", "response[a:]", "answer"):
        with pytest.raises(PersonaError, match="positions"):
            steer(llama, torch.randn(32), 1, positions=bad)


def test_a_slice_is_the_same_while_generating_with_a_cache(llama):
    prompts = [llama.prompt(q) for q in ("Why?", "How does it work?")]
    s, v = SamplingParams(12, temperature=0), 4 * torch.randn(32)

    def answer(positions):
        return generate(llama, prompts, s, steer(llama, v, 2, 1.0, positions), progress=False).tokens, generate(
            llama, prompts, s, steer(llama, v, 2, 1.0, positions), progress=False
        ).texts

    plain = generate(llama, prompts, s, progress=False).texts
    assert answer("response[0:]") == answer("response") and answer("response[30:]")[1] == plain
    first = llama.tokenizer(answer("response[4:]")[1], add_special_tokens=False).input_ids
    want = llama.tokenizer(plain, add_special_tokens=False).input_ids
    for a, b in zip(first, want):
        assert a[:3] == b[:3] and a != b  # tokens before the fourth are the unsteered ones


def test_a_mask_counts_from_the_first_token_of_each_row(llama):
    ids, attention = torch.randint(3, 2000, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    assert touched(llama, ids, None, mask, attention_mask=attention) == [[2, 5], [1]]
    prompts = [llama.prompt(q) for q in ("Why?", "How does it work?")]
    everything = torch.ones(2, 200, dtype=torch.bool)
    v = torch.randn(32)
    both = [
        generate(llama, prompts, SamplingParams(8, temperature=0), steer(llama, v, 2, 3.0, p), progress=False).texts
        for p in (everything, "all")
    ]
    assert both[0] == both[1]
    with pytest.raises(PersonaError, match="mask of 2 rows"):
        generate(llama, prompts[:1], steering=steer(llama, v, 2, 3.0, everything), progress=False)
    with pytest.raises(PersonaError, match="bool"):
        steer(llama, v, 2, 3.0, everything.float())


def test_a_gate_opens_rows_by_their_last_prompt_token(llama):
    prompts = [llama.prompt(q) for q in ("Why?", "How does it work?", "My friend is bad at chess. What now?")]
    condition, v, s = torch.randn(32), 4 * torch.randn(32), SamplingParams(8, temperature=0)
    ids = [llama.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    u = condition / condition.norm()
    values = torch.stack([outputs(llama, torch.tensor([i]), 1)[0, -1] @ u for i in ids])
    middle = float(values.sort().values[:2].mean())
    plain = generate(llama, prompts, s, progress=False).texts
    steered = generate(llama, prompts, s, steer(llama, v, 2, 2.0), progress=False).texts
    assert all(a != b for a, b in zip(plain, steered))
    for above in (True, False):
        gate = Gate(condition, 1, middle, above)
        gated = generate(llama, prompts, s, steer(llama, v, 2, 2.0, when=gate), progress=False).texts
        opened = (values > middle) == above
        assert gated == [b if o else a for a, b, o in zip(plain, steered, opened)]
    # the same of one repeated prompt, and when texts are read whose prompts share their beginning
    gate = Gate(condition, 1, middle)
    twice = generate(llama, prompts[:1] * 3, s, steer(llama, v, 2, 2.0, when=gate), seeds=[1, 1, 1], progress=False)
    assert set(twice.texts) == {steered[0] if values[0] > middle else plain[0]}
    pairs = [encode_pair(llama.tokenizer, p, " Yes, it works.") for p in prompts for _ in range(2)]
    without = answer_logprobs(llama, pairs)
    with steer(llama, v, 2, 2.0):
        always = answer_logprobs(llama, pairs)
    with steer(llama, v, 2, 2.0, when=gate):
        found = answer_logprobs(llama, pairs)
    for i, (a, b, x) in enumerate(zip(without, always, found)):
        torch.testing.assert_close(x, b if values[i // 2] > middle else a, rtol=1e-3, atol=1e-3)


def test_a_gate_at_the_steered_layer_reads_it_before_it_is_steered(llama):
    ids, v = torch.randint(3, 2000, (1, 6)), torch.randn(32)
    plain = outputs(llama, ids, 2)[0]
    u = v / v.norm()
    threshold = float(plain[-1] @ u) + 0.5  # beyond it only after steering
    with steer(llama, v, 2, 5.0, when=Gate(v, 2, threshold)):
        assert torch.equal(outputs(llama, ids, 2)[0], plain)
    with steer(llama, v, 2, 5.0, when=Gate(v, 2, threshold - 1)):
        assert not torch.equal(outputs(llama, ids, 2)[0], plain)


def test_nothing_is_steered_inside_json(llama):
    prompt = llama.prompt("Why { is it?")
    ids, n = encode_pair(llama.tokenizer, prompt, 'yes {"a": {"b": 1}} no } yes')
    s = steer(llama, torch.randn(32), 1, 1.0, outside="json")
    s.start = n
    plain = outputs(llama, torch.tensor([ids]), 1)
    with s:
        changed = ((outputs(llama, torch.tensor([ids]), 1) - plain).abs().sum(-1) > 1e-6)[0].tolist()
    depth, want = 0, []
    for i, token in enumerate(ids):
        text = llama.tokenizer.decode([token])
        if i >= n:
            depth = max(0, depth + text.count("{") - text.count("}"))
        want.append(i >= n - 1 and depth == 0)
    assert changed == want and not all(want[n:]) and want[-1] and want[n]
    # the same with a cache, a token at a time
    past, seen = None, []
    with s, torch.no_grad():
        handle = llama.blocks[0].register_forward_hook(lambda m, a, out: seen.append(hidden(out).clone()))
        for chunk in (ids[:n], *([i] for i in ids[n:])):
            past = llama.model(input_ids=torch.tensor([chunk]), past_key_values=past, use_cache=True).past_key_values
        handle.remove()
    cached = (torch.cat(seen, 1) - plain).abs().sum(-1)[0] > 1e-3
    assert cached.tolist() == want


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(mode="cap"), "needs limits"),
        (dict(limits=(0.0, 1.0)), "limits are for mode 'cap'"),
        (dict(mode="cap", limits=(2.0, 1.0)), "must not be above"),
        (dict(mode="cap", limits=(torch.inf, torch.inf)), "hold no projection"),
        (dict(mode="cap", limits=(1.0,)), "not two numbers"),
        (dict(mode="cap", limits=(None, 1.0)), "not two numbers"),
        (dict(mode="rotate", vectors=torch.zeros(32)), "no direction, which mode 'rotate' needs"),
        (dict(when=Gate(torch.ones(32), 1)), "a gate needs a threshold"),
        (dict(when=Gate(torch.ones(32), 2, 0.0)), "above layer 1"),
        (dict(when=Gate(torch.zeros(32), 1, 0.0)), "no direction"),
        (dict(when=Gate(torch.ones(16), 1, 0.0)), "width 16"),
        (dict(when=Gate(torch.ones(32), 1, 0.0), positions="all"), "positions 'response'"),
        (dict(outside="xml"), "use json, think, tool_call"),
        (dict(outside="think"), "not single tokens"),
    ],
)
def test_bad_modifiers_are_refused_in_one_sentence(llama, bad, words):
    with pytest.raises(PersonaError, match=words) as e:
        steer(llama, **dict(dict(vectors=torch.ones(32), layers=1), **bad))
    assert "\n" not in str(e.value)


def test_what_is_stored_tells_modifiers_apart(llama):
    v = torch.randn(32)
    gate = Gate(v, 1, 0.5)
    variants = [
        steer(llama, v, 1),
        steer(llama, v, 1, keep_norm=True),
        steer(llama, v, 1, mode="cap", limits=(0.0, 1.0)),
        steer(llama, v, 1, mode="cap", limits=(0.0, 2.0)),
        steer(llama, v, 1, when=gate),
        steer(llama, v, 1, when=Gate(v, 1, 0.6)),
        steer(llama, v, 1, outside="json"),
        steer(llama, v, 1, positions="response[1:]"),
        steer(llama, v, 1, positions=torch.ones(1, 3, dtype=torch.bool)),
    ]
    assert len({str(s.facts()) for s in variants}) == len(variants)
    assert len(variants[0].facts()) == 3  # as before there were modifiers: results that are kept stay valid


def test_the_roles_of_tokens_are_what_happened(llama):
    from persona_steer.lm.token_roles import roles_html, token_roles

    prompt, answer = llama.prompt("Why is it so?"), "First <b>plan</b> it."
    ids, n = encode_pair(llama.tokenizer, prompt, answer)
    steering = steer(llama, torch.randn(32), 1, 1.5, "response[1:3]")
    roles = token_roles(llama, prompt, answer, steering)
    assert "".join(roles.token[n:]).strip() == answer and len(roles) == len(ids)
    assert roles.pooled.tolist() == ["prompt"] * n + ["response"] * (len(ids) - n)
    assert roles.prompt_last.to_numpy().nonzero()[0].tolist() == [n - 1]
    assert [roles.steered.to_numpy().nonzero()[0].tolist()] == touched(llama, torch.tensor([ids]), n, "response[1:3]")
    page = roles_html(roles, steering)
    assert page.count("steered") >= 3 and "<b>" not in page and "1.5 at layer 1" in page
    assert not token_roles(llama, prompt, answer).steered.any()
    with pytest.raises(PersonaError, match="one coefficient"):
        token_roles(llama, prompt, answer, steer(llama, torch.randn(32), 1, torch.ones(1)))


def test_limits_are_quantiles_over_the_tokens_of_neutral_answers(llama):
    from persona_steer.persona.calibration import projection_limits, token_projections

    v, questions = torch.randn(32), ["Why?", "How does it work?", "Is it good?"]
    prompts = [llama.prompt(q) for q in questions]
    answers = generate(llama, prompts, SamplingParams(12), seeds=questions, progress=False).texts
    values = []
    for p, a in zip(prompts, answers):
        ids, n = encode_pair(llama.tokenizer, p, a)
        values += (outputs(llama, torch.tensor([ids]), 2)[0, n:] @ (v / v.norm())).tolist()
    found = token_projections(llama, v, 2, prompts, answers)
    torch.testing.assert_close(found.sort().values, torch.tensor(values).sort().values, rtol=1e-3, atol=1e-3)
    low, high = projection_limits(llama, v, 2, questions, (0.25, 0.75), SamplingParams(12))
    want = torch.tensor(values).quantile(torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(torch.tensor([low, high]), want, rtol=1e-3, atol=1e-3)
    assert projection_limits(llama, v, 2, questions, (0, 1), SamplingParams(12)) == (-torch.inf, torch.inf)
    for bad in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(PersonaError, match="must rise"):
            projection_limits(llama, v, 2, questions, bad)


def test_a_threshold_parts_two_kinds_of_prompts(llama):
    from sklearn.metrics import roc_auc_score

    from persona_steer.persona.calibration import choose_threshold, fit_gate, roc

    values, labels = [0.1, 0.4, 0.35, 0.8, 0.9, 0.2], [0, 0, 0, 1, 1, 1]
    table = roc(values, labels)
    area = torch.trapezoid(torch.tensor(table.tpr.to_numpy()), torch.tensor(table.fpr.to_numpy()))
    assert area.item() == pytest.approx(roc_auc_score(labels, values))
    assert choose_threshold(values, labels) == pytest.approx(0.6)  # tpr 2/3, fpr 0
    with pytest.raises(PersonaError, match="prompts of both kinds"):
        choose_threshold([1.0, 2.0], [1, 1])
    wanted, others = [llama.prompt(q) for q in ("Why?", "How?")], [llama.prompt(q) for q in ("Is it?", "Was it?")]
    last = collect_activations(llama, wanted + others, [""] * 4)["prompt_last"]
    gate, _ = fit_gate(llama, last[:2].mean(0) - last[2:].mean(0), 2, wanted, others)
    assert gate.layer == 2 and gate.vector.shape == (32,) and gate.above


def test_spans_of_each_kind_are_counted_apart(llama):
    opens, closes, left, right, word = 5, 6, 7, 8, 9
    table = torch.zeros(2, 2, 4096, dtype=torch.long)
    table[0, 0, [opens, closes]] = table[1, 1, [left, right]] = torch.tensor([1, -1])

    def outside(ids):
        tracker = PositionTracker(1, spans=table)
        handle = tracker.attach(llama.base_model)
        outputs(llama, torch.tensor([ids]), 1)
        handle.remove()
        return tracker.outside[0].int().tolist()

    assert outside([word, opens, word, right, word, closes, word]) == [1, 0, 0, 0, 0, 1, 1]
    assert outside([word, left, opens, right, word, closes, word]) == [1, 0, 0, 0, 0, 1, 1]
    assert outside([word, right, left, word, right, right, word]) == [1, 1, 0, 0, 1, 1, 1]


def test_a_gate_serves_reading_and_then_training_in_one_context(llama):
    prompts, v = [llama.prompt(q) for q in ("Why?", "How does it work?")], torch.randn(32)
    ids = torch.randint(3, 2000, (2, 6))
    u = torch.randn(32)
    with steer(llama, v, 2, 5.0, when=Gate(u, 1, -1e6)):
        always = outputs(llama, ids, 2)
    with steer(llama, v, 2, 5.0, when=Gate(u, 1, -1e6)):
        answer_logprobs(llama, [encode_pair(llama.tokenizer, p, " Yes.") for p in prompts])
        assert torch.equal(outputs(llama, ids, 2), always)
        llama.model(input_ids=ids, labels=ids).loss.backward()


def test_a_model_in_bf16_is_steered_with_the_coefficient_that_was_given(llama):
    llama.model.to(torch.bfloat16)
    ids, v = torch.randint(3, 2000, (1, 6)), torch.randn(32)
    plain, everywhere = outputs(llama, ids, 2), torch.ones(1, 6, 1, dtype=torch.bool)
    for mode, c in STRENGTHS.items():
        with steer(llama, v, 2, c, "all", mode, limits=limits_for(mode)):
            steered = outputs(llama, ids, 2)
        want = MODES[mode](plain, [SteeringTerm(2, v, torch.tensor(c), limits_for(mode))], everywhere)
        assert torch.equal(steered, want), mode


def test_numbers_of_other_libraries_are_taken_as_numbers(llama):
    from persona_steer.lm.vllm_engine import steering_texts

    v = torch.ones(32)
    ours = steer(llama, v, 1, mode="cap", limits=(0.0, 1.5))
    for low, high in ((np.float64(0), np.float32(1.5)), (torch.tensor(0), torch.tensor(1.5)), [0, 1.5]):
        theirs = steer(llama, v, 1, mode="cap", limits=(low, high))
        assert str(theirs.facts()) == str(ours.facts()) and steering_texts(theirs, 1)[0] == steering_texts(ours, 1)[0]
    gates = [steer(llama, v, 1, when=Gate(v, 1, x)) for x in (0.5, np.float32(0.5), torch.tensor(0.5))]
    assert len({str(s.facts()) for s in gates}) == 1


def test_the_innermost_context_acts_first(llama):
    ids, v = torch.randint(3, 2000, (1, 6)), torch.randn(32)
    u = v / v.norm()
    with steer(llama, v, 2, 1.0, "all", "cap", limits=LIMITS), steer(llama, v, 2, 5.0, "all"):
        assert (outputs(llama, ids, 2) @ u).max() < LIMITS[1] + 1e-3
    with steer(llama, v, 2, 5.0, "all"), steer(llama, v, 2, 1.0, "all", "cap", limits=LIMITS):
        assert (outputs(llama, ids, 2) @ u).min() > 5 * v.norm() + LIMITS[0] - 1e-3


def test_slices_in_requests_that_mean_the_same_are_the_same_text():
    from persona_steer.serving.specification import parse_steering

    def read(positions):
        return str(parse_steering(f"evil:1@2;positions={positions}"))

    assert {read(p) for p in ("response[0:]", "response[:]", "response[00:]")} == {read("response")}
    assert {read(p) for p in ("response[0:8]", "response[:08]")} == {read("response[:8]")}
    assert read("response[3:]") != read("response[:3]") != read("response[3:4]")
    for bad in (f"response[:{'9' * 5000}]", "response[:0]"):
        with pytest.raises(PersonaError, match="is unknown"):
            read(bad)


def test_limits_that_hold_nothing_are_refused_and_leave_nothing_in_a_slot():
    from persona_steer.serving.specification import SteeringSpec, Term, parse_steering
    from persona_steer.serving.tables import SteeringTables

    for bad in ("inf,inf", "-inf,-inf"):
        with pytest.raises(PersonaError, match="hold no projection"):
            parse_steering(f"evil:1@2;mode=cap;limits={bad}")
    tables = SteeringTables(2, 4, torch.float32, "cpu", 4, slots=1)
    tables.add_vector("evil", torch.ones(3, 4))
    tables.fill(1, SteeringSpec((Term(2, "evil", 1.0),), mode="cap", limits=(torch.inf, torch.inf)))
    tables.fill(1, parse_steering("evil:1@1"))
    tables.always = True
    tables.slot.fill_(1)
    h = torch.randn(2, 4)
    assert torch.equal(tables.step(h, None, 2), h)


def test_calibration_refuses_what_does_not_fit_before_anything_is_written(llama, monkeypatch):
    from persona_steer.persona import calibration

    monkeypatch.setattr(calibration, "generate", lambda *a, **k: pytest.fail("answers were written"))
    for vector, layer, words in (
        (torch.ones(4, 32), 99, "layer 99"),
        (torch.ones(4, 16), 1, "width 16"),
        (torch.zeros(4, 32), 1, "is 0 at layer 1"),
    ):
        with pytest.raises(PersonaError, match=words):
            calibration.projection_limits(llama, vector, layer, ["Why?"])
        with pytest.raises(PersonaError, match=words):
            calibration.fit_gate(llama, vector, layer, ["Why?"], ["How?"])
    with pytest.raises(PersonaError, match="no threshold"):  # such a gate would never open
        calibration.choose_threshold([0.0, 1.0], [1, 0])


def test_the_best_variant_is_one_of_those_at_equal_divergence():
    from persona_steer.operation_comparison import best_line

    rows = [("unsteered", 50, False), ("subtract", 30, True), ("ablate, c = 1", 5, False), ("rotate away", 20, True)]
    table = pd.DataFrame(
        [
            dict(condition=c, kl=float("nan") if c == "unsteered" else 0.5, at_target=at)
            | dict(trait=x, trait_low=x - 2, trait_high=x + 2)
            for c, x, at in rows
        ]
    )
    assert best_line(table, "evil", False) == "'rotate away' does more than 'subtract': evil score 20 against 30."
    table.loc[3, "trait_high"] = 29
    assert "No variant does clearly more than 'subtract' (evil score 30; the first is 'rotate away' with 20)." == (
        best_line(table, "evil", False)
    )
    assert best_line(table[~table.at_target], "evil", False) == "No operation reaches this divergence."


def test_a_guard_that_rotates_needs_an_angle():
    from persona_steer.training.config import SteeringConfig

    for bad in (dict(type="rotate"), dict(type="cap", limits=[1.0, 0.0])):
        with pytest.raises(ValueError, match="at most pi|must not be above"):
            SteeringConfig(steering_vector_path="a", **bad)
    assert SteeringConfig(steering_vector_path="a", type="rotate", steering_coef=0.3).steering_coef == 0.3


def test_texts_are_not_read_under_a_steering_by_rows(llama):
    """They are read longest first, so the rows of a batch are not those of the caller."""
    pairs = [encode_pair(llama.tokenizer, llama.prompt(q), " Yes.") for q in ("Why?", "How does it work? Is it good?")]
    mask, column = torch.ones(2, 60, dtype=torch.bool), torch.tensor([3.0, 0.0])
    for by_row in (dict(coefficients=column), dict(positions=mask)):
        with steer(llama, torch.randn(32), 2, **by_row), pytest.raises(PersonaError, match="one coefficient"):
            answer_logprobs(llama, pairs)
    s = steer(llama, torch.randn(32), 2, column)
    with s.rows([1]):  # one text has no order
        torch.testing.assert_close(answer_logprobs(llama, pairs[1:])[0], answer_logprobs(llama, pairs[1:])[0])


def test_prompts_are_not_answered_under_an_open_steering_by_rows(llama):
    prompts = [llama.prompt(q) for q in ("Why?", "How does it work? Is it good?")]
    s = steer(llama, torch.randn(32), 2, torch.tensor([3.0, 0.0]))
    with s, pytest.raises(PersonaError, match="steering="):
        generate(llama, prompts, SamplingParams(3), progress=False)
    assert len(generate(llama, prompts, SamplingParams(3), s, progress=False).texts) == 2


def test_tasks_of_lm_eval_are_not_steered_behind_a_gate(llama):
    from persona_steer.training.model_evaluation import evaluate_model

    for how in (dict(when=Gate(torch.ones(32), 1, 0.0)), dict(outside="json")):
        with pytest.raises(PersonaError, match="without a gate"):
            evaluate_model(llama, [], None, steering=steer(llama, torch.ones(32), 2, **how), tasks=["mmlu"])


def test_an_angle_is_in_radians(llama):
    v = torch.randn(32)
    steer(llama, v, 1, torch.pi, mode="rotate")
    for c in (15.0, torch.tensor([0.0, -4.0])):
        with pytest.raises(PersonaError, match="at most pi"):
            steer(llama, v, 1, c, mode="rotate")
