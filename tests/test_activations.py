"""The exact semantics of pooling and steering; each pitfall of published code has a test here."""

import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.lm.activations import ActivationPooler, hidden, steer
from persona_steer.lm.generation import SamplingParams, collect_activations, encode_pair, generate

QUESTIONS = [
    "How should I start baking bread?",
    "Is it?",
    "My friend is bad at losing a game. What should I say to my friend about it?",
]


def batch_of(lm, texts, side="left"):
    ids = [lm.tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    return lm.tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side=side)


def hooks_of(lm):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()]


@torch.no_grad()
def states(lm, **batch):
    return lm.model(**batch, output_hidden_states=True).hidden_states


def test_added_vector_changes_its_layer_by_exactly_c_v_and_nothing_below(family):
    ids = torch.randint(3, 2000, (2, 7))
    v, before = torch.randn(32), states(family, input_ids=ids)
    for layer in (1, 2):  # hidden_states of the last layer are taken after the final norm
        with steer(family, v, layer, 2.5, positions="all"):
            after = states(family, input_ids=ids)
        assert all(torch.equal(a, b) for a, b in zip(before[:layer], after[:layer]))
        torch.testing.assert_close(
            after[layer] - before[layer], (2.5 * v).expand_as(after[layer]), rtol=1e-3, atol=1e-3
        )


def test_last_layer_is_steered_before_the_final_norm(llama):
    seen = []
    ids, v = torch.randint(3, 2000, (1, 5)), torch.randn(32)
    with steer(llama, v, 3, 1.0, positions="all"):
        handle = llama.model.model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        states(llama, input_ids=ids)
    states(llama, input_ids=ids)
    handle.remove()
    torch.testing.assert_close(seen[0] - seen[1], v.expand(1, 5, 32), rtol=1e-4, atol=1e-4)


def test_pooling_equals_a_plain_loop_over_hidden_states(family):
    prompts = [family.prompt(q) for q in QUESTIONS]
    answers = ["First, plan baking bread.", "No", "The process takes some time. Keep short notes."]
    pooled = collect_activations(family, prompts, answers)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        ids, n = encode_pair(family.tokenizer, p, a)
        hs = torch.stack(states(family, input_ids=torch.tensor([ids])))[:3, 0]  # rows 0 to L-1: the last is normed
        plain = {"prompt_avg": hs[:, :n].mean(1), "response_avg": hs[:, n:].mean(1), "prompt_last": hs[:, n - 1]}
        for k, want in plain.items():
            assert torch.cosine_similarity(pooled[k][i, :3], want, dim=-1).min() > 0.9999, (family.name, k)
            torch.testing.assert_close(pooled[k][i, :3], want, rtol=1e-3, atol=1e-3)


def test_pooling_while_generating_equals_reading(family):
    # a random model writes byte salad; the ids are therefore read as they were sampled, not as text
    prompts = [family.prompt(q) for q in QUESTIONS]
    s, seeds = SamplingParams(12, seed=3), [1, 2, 3]
    ids = {}
    with torch.no_grad():
        from persona_steer.lm import generation as g

        original = g.text_of
        try:
            g.text_of = lambda tokenizer, row: str(ids.setdefault(len(ids), row))
            said = g._generate_batch(
                family, [family.tokenizer(p, add_special_tokens=False).input_ids for p in prompts], seeds, s, None, True
            )
        finally:
            g.text_of = original
    for i, p in enumerate(prompts):
        head = family.tokenizer(p, add_special_tokens=False).input_ids
        with torch.no_grad(), ActivationPooler(family, len(head)) as pool:
            family.model(input_ids=torch.tensor([head + ids[i]]))
        for k, want in pool.result().items():
            assert torch.cosine_similarity(said.activations[k][i], want[0], dim=-1).min() > 0.9999, (family.name, k, i)


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_same_text_with_and_without_cache_and_for_a_one_token_prompt(llama, positions):
    v = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 2
    for text in ("How", QUESTIONS[0]):
        ids = llama.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = {}
        for cache in (True, False):
            with steer(llama, v, 2, 3.0, positions):
                out[cache] = llama.model.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=cache).tolist()
        plain = llama.model.generate(**ids, max_new_tokens=8, do_sample=False).tolist()
        assert out[True] == out[False] != plain


def test_positions_are_the_tokens_they_say(llama):
    ids, v = torch.randint(3, 2000, (1, 8)), torch.randn(32)
    before = states(llama, input_ids=ids)[1]
    touched = {}
    for positions in ("response", "prompt", "all"):
        s = steer(llama, v, 1, 1.0, positions)
        s.start = 5  # tokens 0-4 are the prompt
        with s:
            touched[positions] = (
                (states(llama, input_ids=ids)[1] - before)[0].abs().sum(-1).gt(1e-6).nonzero().flatten().tolist()
            )
    assert touched == {"response": [4, 5, 6, 7], "prompt": [0, 1, 2, 3, 4], "all": list(range(8))}


def test_left_padding_is_never_steered_and_a_batch_gives_what_singles_give(family):
    prompts, v = [family.prompt(q) for q in QUESTIONS], torch.randn(32, generator=torch.Generator().manual_seed(1))
    c = torch.tensor([0.0, 1.0, -2.0])
    s = SamplingParams(10)
    together = generate(family, prompts, s, steer(family, v, 2, c, "all")).texts
    alone = [
        generate(family, [p], s, steer(family, v, 2, c[i].item(), "all"), seeds=[i]).texts[0]
        for i, p in enumerate(prompts)
    ]
    assert together == alone
    batch = batch_of(family, prompts)
    seen = []
    with steer(family, v, 2, 1.0, "all"):
        handle = family.blocks[1].register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        states(family, **batch)
        handle.remove()
    handle = family.blocks[1].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    states(family, **batch)
    handle.remove()
    moved = (seen[0] - seen[1]).abs().sum(-1) > 1e-6
    assert torch.equal(moved, batch["attention_mask"].bool())


def test_coefficient_zero_is_the_unsteered_model_and_rows_keep_their_own_coefficient(llama):
    prompts, v = [llama.prompt(QUESTIONS[0])] * 3, torch.randn(32) * 4
    plain = generate(llama, prompts, SamplingParams(12), seeds=[1, 1, 1]).texts
    mixed = generate(
        llama, prompts, SamplingParams(12), steer(llama, v, 2, torch.tensor([0.0, 2.0, 0.0])), seeds=[1, 1, 1]
    ).texts
    assert mixed[0] == plain[0] == mixed[2] and mixed[1] != plain[1]


def test_model_is_as_before_after_the_context_and_after_errors(llama, monkeypatch):
    before, weights = hooks_of(llama), {k: p.clone() for k, p in llama.model.state_dict().items()}
    with pytest.raises(KeyError):
        with steer(llama, torch.randn(32), [1, 2, 3], 1.0), ActivationPooler(llama):
            raise KeyError
    assert hooks_of(llama) == before

    def fail(*a, **k):
        raise RuntimeError("no hook for you")

    monkeypatch.setattr(llama.blocks[2], "register_forward_hook", fail)
    for context in (steer(llama, torch.randn(32), [1, 3], 1.0), ActivationPooler(llama)):
        with pytest.raises(RuntimeError):
            context.__enter__()
        assert hooks_of(llama) == before
    assert all(torch.equal(p, weights[k]) for k, p in llama.model.state_dict().items())


def test_a_block_that_never_runs_is_an_error(llama):
    import copy

    llama.blocks = copy.deepcopy(llama.blocks)  # not the ones that the model calls
    with pytest.raises(PersonaError, match="never ran"):
        with steer(llama, torch.randn(32), 2, 1.0):
            states(llama, input_ids=torch.randint(3, 99, (1, 4)))
    assert hooks_of(llama)  # and closed properly
    with steer(llama, torch.randn(32), 2, 1.0):
        pass  # nothing ran, so nothing was missed


def gradients(lm, checkpointing, steering):
    lm.model.zero_grad()
    lm.model.train()
    if checkpointing:
        lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(10, 18)[None]
    with steering:
        lm.model(input_ids=ids, labels=ids).loss.backward()
    lm.model.gradient_checkpointing_disable()
    lm.model.eval()
    return [p.grad.clone() for p in lm.model.parameters() if p.grad is not None]


def test_gradient_checkpointing_gives_the_same_gradient(llama):
    v = torch.randn(32)

    def s(c=3.0):
        return steer(llama, v, 2, c, "all")

    plain, checkpointed, none = (
        gradients(llama, False, s()),
        gradients(llama, True, s()),
        gradients(llama, False, s(0.0)),
    )
    for a, b in zip(plain, checkpointed):
        torch.testing.assert_close(a, b)
    assert any(not torch.allclose(a, b) for a, b in zip(plain, none))


def test_low_precision_models_are_steered_in_their_dtype_and_pooled_in_float32(llama):
    llama.model.to(torch.bfloat16)
    ids, v = torch.randint(3, 2000, (2, 40)), torch.randn(32)
    with torch.no_grad(), steer(llama, v, 2, 1.0, "all"), ActivationPooler(llama, 20) as pool:
        hs = llama.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert hs[2].dtype == torch.bfloat16
    r = pool.result()["response_avg"]
    assert r.dtype == torch.float32
    torch.testing.assert_close(r[:, 2], hs[2][:, 20:].float().mean(1), rtol=1e-5, atol=1e-5)


def test_ablation_removes_the_component_and_only_that(llama):
    ids, v = torch.randint(3, 2000, (2, 6)), torch.randn(32)
    before = states(llama, input_ids=ids)[2]
    with steer(llama, v, 2, torch.tensor([1.0, 0.0]), "all", mode="ablate"):
        after = states(llama, input_ids=ids)[2]
    u = v / v.norm()
    assert (after[0] @ u).abs().max() < 1e-4 and torch.equal(after[1], before[1])
    torch.testing.assert_close(after[0], before[0] - (before[0] @ u)[:, None] * u, rtol=1e-4, atol=1e-4)


def test_many_vectors_at_many_layers_add_up_and_contexts_nest(llama):
    ids = torch.randint(3, 2000, (1, 6))
    a, b = torch.randn(32), torch.randn(32)
    with steer(llama, [a, b], [1, 2], [2.0, -1.0], "all"):
        together = states(llama, input_ids=ids)[2]
    with steer(llama, a, 1, 2.0, "all"), steer(llama, b, 2, -1.0, "all"):
        nested = states(llama, input_ids=ids)[2]
    with steer(llama, [a, b], 1, [1.0, 1.0], "all"):
        two = states(llama, input_ids=ids)[1]
    torch.testing.assert_close(together, nested)
    torch.testing.assert_close(two, states(llama, input_ids=ids)[1] + a + b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(layers=0), "layers 1 to 3"),
        (dict(layers=-1), "layers 1 to 3"),
        (dict(layers=4), "layers 1 to 3"),
        (dict(vectors=torch.randn(64)), "width 64"),
        (dict(vectors=torch.randn(9, 32)), "9 rows"),
        (dict(positions="answer"), "positions"),
        (dict(mode="multiply"), "mode"),
        (dict(vectors=torch.full((32,), float("nan"))), "NaN"),
        (dict(layers=[1, 2], coefficients=[1, 2, 3]), "do not fit"),
    ],
)
def test_bad_steering_is_refused_in_one_sentence(llama, bad, words):
    with pytest.raises(PersonaError, match=words) as e:
        steer(llama, **dict(dict(vectors=torch.randn(32), layers=1), **bad))
    assert "\n" not in str(e.value)


def test_a_wrong_number_of_coefficients_is_an_error_not_a_broadcast(llama):
    with pytest.raises(PersonaError, match="2 coefficients"):
        with steer(llama, torch.randn(32), 1, torch.tensor([1.0, 2.0])):
            states(llama, input_ids=torch.randint(3, 99, (3, 4)))


def test_block_outputs_are_not_edited_in_place(llama):
    seen = []
    original = llama.blocks[1].forward

    def spy(*a, **k):
        out = original(*a, **k)
        seen.append((out, out.detach().clone()))
        return out

    llama.blocks[1].forward = spy
    ids = torch.arange(10, 16)[None]
    with steer(llama, torch.randn(32), 2, 5.0, "all"):
        llama.model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(seen[0][0], seen[0][1])


def test_blocks_that_return_a_tuple_are_steered_in_its_first_element(llama):
    class Block(torch.nn.Module):
        def forward(self, h):
            return h, "cache"

    block, s = Block(), steer(llama, torch.ones(32), 1, 2.0, "all")
    with s:
        tracker = s._open[-1][1]
        tracker._before(llama.base_model, (torch.ones(1, 4, dtype=torch.long),), {})
        hook = s._hook(1, s.terms, tracker, s._open[-1][2])
        h, rest = hook(block, (), block(torch.zeros(1, 4, 32)))
        tracker.calls = 0
    assert rest == "cache" and torch.equal(h, torch.full((1, 4, 32), 2.0))


def test_another_mode_is_a_function_and_a_line(llama, monkeypatch):
    """`steer` finds modes by name in MODES; an unknown one is an error that names them all."""
    from persona_steer.lm import activations

    def halve(h, terms, where):
        return torch.where(where.to(h.device), h / 2, h)

    monkeypatch.setitem(activations.MODES, "halve", halve)
    ids = llama.tokenizer("Why?", return_tensors="pt").input_ids
    seen = {}
    block = llama.blocks[1]
    with torch.inference_mode():
        hook = block.register_forward_hook(lambda m, a, out: seen.setdefault("plain", hidden(out).clone()))
        llama.model(ids)
        hook.remove()
        with steer(llama, torch.ones(llama.hidden_size), 2, 1.0, "all", "halve"):
            hook = block.register_forward_hook(lambda m, a, out: seen.setdefault("halved", hidden(out).clone()))
            llama.model(ids)
            hook.remove()
    torch.testing.assert_close(seen["halved"], seen["plain"] / 2)
    with pytest.raises(PersonaError, match=" or ".join(map(repr, activations.MODES))):
        steer(llama, torch.ones(llama.hidden_size), 2, mode="double")


def test_a_mode_that_needs_a_direction_refuses_a_zero_vector(llama):
    zero = torch.zeros(llama.hidden_size)
    steer(llama, zero, 1)
    with pytest.raises(PersonaError, match="no direction, which mode 'ablate' needs"):
        steer(llama, zero, 1, mode="ablate")
    with pytest.raises(PersonaError, match="coefficients at layer 1 hold NaN"):
        steer(llama, zero + 1, 1, float("nan"))
    with pytest.raises(PersonaError, match="'high' is no number"):
        steer(llama, zero + 1, 1, "high")
    assert len(repr(steer(llama, zero + 1, 1))) < 5000  # without the model


def test_steering_of_other_rows_is_refused(llama):
    from persona_steer.lm.generation import generate

    steering = steer(llama, torch.ones(llama.hidden_size), 1, torch.ones(6))
    for n in (3, 7):
        with pytest.raises(PersonaError, match=f"6 coefficients.*{n} rows"):
            generate(llama, [llama.prompt(f"Why {i}?") for i in range(n)], steering=steering, progress=False)
