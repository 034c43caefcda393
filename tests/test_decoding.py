"""The decoding loop: shared prompts, rows that are left out, and what hooks are told of both."""

import itertools
import math
import random

import pytest
import torch
import transformers as tf
from conftest import GQA

from persona_steer.base.core import PersonaError, settings
from persona_steer.lm import decoding, generation
from persona_steer.lm.activations import ActivationPooler, steer
from persona_steer.lm.generation import SamplingParams, collect_activations, generate, length_batches, reading_batches
from persona_steer.lm.models import wrap_model
from persona_steer.lm.routing import routing_of
from persona_steer.projection import Trace

# longest first: the order of a batch
QUESTIONS = [
    "My friend is bad at losing a game. What should I say to my friend about it?",
    "How should I start baking bread?",
    "Is it?",
    "Is it?",
    "Is it?",
]


def prompts_of(lm):
    return [lm.prompt(q) for q in QUESTIONS]


def passes(lm, monkeypatch):
    """(rows, columns) of each call of the model."""
    seen = []
    lm.base_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple((k["input_ids"] if "input_ids" in k else a[0]).shape)), with_kwargs=True
    )
    return seen


def stopping(lm):
    """An answer ends where the likeliest token is one of every six: at different times, and whatever the rounding."""
    end = torch.nn.functional.one_hot(torch.tensor(2), lm.model.config.vocab_size).bool()
    lm.model.get_output_embeddings().register_forward_hook(
        lambda m, a, out: torch.where(end & (out.argmax(-1, keepdim=True) % 6 == 0), 1e4, out)
    )


def test_greedy_texts_are_those_of_transformers(family):
    ids = [family.tokenizer(p, add_special_tokens=False).input_ids for p in prompts_of(family)]
    batch = generation.padded(family.tokenizer, ids, "left", family.device)
    theirs = family.model.generate(**batch, max_new_tokens=15, do_sample=False, eos_token_id=2, pad_token_id=2)[
        :, batch["input_ids"].shape[1] :
    ]
    ours = decoding.decode(
        family, batch["input_ids"], batch["attention_mask"], lambda logits, rows, t: logits.argmax(-1), 15, [2]
    )
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)


def test_a_prompt_is_read_once_and_rows_that_have_ended_do_not_pass(llama, monkeypatch):
    stopping(llama)
    seen = passes(llama, monkeypatch)
    said = generate(llama, prompts_of(llama), SamplingParams(30, 0), progress=False)
    width = max(len(llama.tokenizer(p, add_special_tokens=False).input_ids) for p in prompts_of(llama))
    assert seen[0] == (3, width - 1) and seen[1] == (5, 1)  # three different prompts, five rows
    assert len(set(said.tokens)) > 2 and max(said.tokens) < 30
    # rows that have not ended before token t
    spoken = [sum(n >= t for n in said.tokens) for t in range(max(said.tokens) + 1)]
    assert [rows for rows, _ in seen[1:]] == spoken


@pytest.mark.parametrize("positions, look", [("response", 1), ("prompt", 1), ("all", 1), ("response", 8)])
def test_each_row_keeps_its_steering_and_its_sums(family, positions, look, monkeypatch):
    """Answers and activations in a batch with shared prompts, ends and steering are those of each row alone, however
    often one looks for ends."""
    stopping(family)
    monkeypatch.setattr(decoding, "check_interval", lambda device: look)
    v, c = torch.randn(32, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0])
    together = generate(
        family,
        prompts_of(family),
        SamplingParams(20, 0),
        steer(family, v, 2, c, positions),
        return_activations=True,
        progress=False,
    )
    assert len(set(together.tokens)) > 1
    for i, p in enumerate(prompts_of(family)):
        alone = generate(
            family,
            [p],
            SamplingParams(20, 0),
            steer(family, v, 2, c[i].item(), positions),
            seeds=[i],
            return_activations=True,
            progress=False,
        )
        assert alone.texts[0] == together.texts[i]
        for k in generation.POOLS:
            torch.testing.assert_close(
                together.activations[k][i], alone.activations[k][0], rtol=1e-3, atol=1e-3, equal_nan=True
            )


def test_a_context_around_generation_is_told_too(llama):
    stopping(llama)
    v, c = torch.randn(32), torch.tensor([0.0, 2.0, -2.0, 1.0, 0.5])
    for positions in ("response", "all"):
        inside = generate(
            llama, prompts_of(llama), SamplingParams(15, 0), steer(llama, v, 2, c, positions), progress=False
        )
        with steer(llama, v, 2, c, positions):
            around = generate(llama, prompts_of(llama), SamplingParams(15, 0), progress=False)
        assert (
            inside.texts
            == around.texts
            != generate(llama, prompts_of(llama), SamplingParams(15, 0), progress=False).texts
        )
    assert routing_of(llama.base_model) is None
    with pytest.raises(PersonaError, match="2 coefficients"), steer(llama, v, 2, c[:2], "all"):
        generate(llama, prompts_of(llama), SamplingParams(4), progress=False)


def test_a_batch_within_a_batch_leaves_the_outer_one_alone(llama):
    alone, flows = generate(llama, prompts_of(llama), SamplingParams(6, 0), progress=False), []

    def callback(ids):
        before = routing_of(llama.base_model)
        generate(llama, ["Is it?"], SamplingParams(2), progress=False)
        flows.append((before, routing_of(llama.base_model)))

    assert (
        generate(llama, prompts_of(llama), SamplingParams(6, 0), progress=False, callback=callback).texts == alone.texts
    )
    assert flows and all(a is b is not None for a, b in flows)


def test_the_flow_is_forgotten_after_an_error(llama):
    llama.model.lm_head.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(llama, prompts_of(llama), SamplingParams(4, 0), progress=False)
    assert routing_of(llama.base_model) is None


def test_a_trace_has_a_row_for_every_row(llama):
    stopping(llama)
    with Trace(llama, 2, torch.ones(32)) as trace:
        said = generate(llama, prompts_of(llama), SamplingParams(12, 0), progress=False)
    values, width = (
        trace.values(),
        max(len(llama.tokenizer(p, add_special_tokens=False).input_ids) for p in prompts_of(llama)),
    )
    passed = [min(n, 11) for n in said.tokens]  # the last of twelve is not looked at again
    assert values.shape == (5, width + max(passed)) and len(set(passed)) > 1
    for row, n in zip(values, passed):
        assert torch.isfinite(row[: width + n]).all() and torch.isnan(row[width + n :]).all()
    alone, i, n = Trace(llama, 2, torch.ones(32)), passed.index(max(passed)), max(passed)
    with alone:
        generate(llama, prompts_of(llama)[i : i + 1], SamplingParams(12, 0), seeds=[i], progress=False)
    torch.testing.assert_close(values[i, width : width + n], alone.values()[0, -n:], rtol=1e-3, atol=1e-3)


def test_the_models_own_generation_settings_do_not_apply(llama):
    plain = generate(llama, prompts_of(llama), SamplingParams(15, 0), progress=False).texts
    llama.model.generation_config.repetition_penalty = 5.0
    llama.model.generation_config.top_k = 1
    assert generate(llama, prompts_of(llama), SamplingParams(15, 0), progress=False).texts == plain


def test_prompts_are_read_in_passes_of_bounded_size(llama, monkeypatch):
    whole = generate(llama, prompts_of(llama), SamplingParams(10, 0), return_activations=True, progress=False)
    monkeypatch.setattr(decoding, "CPU_TOKENS", 30)
    seen = passes(llama, monkeypatch)
    with Trace(llama, 2, torch.ones(32)) as trace:
        parts = generate(llama, prompts_of(llama), SamplingParams(10, 0), return_activations=True, progress=False)
    assert (
        torch.isfinite(trace.values()[:, : seen[0][1] + 1]).all()
        and trace.values().shape[1] == seen[0][1] + len(seen) - 3
    )
    assert seen[0][0] == 1 and seen[3] == (5, 1)
    assert parts.texts == whole.texts
    for k in generation.POOLS:
        torch.testing.assert_close(parts.activations[k], whole.activations[k], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    "config",
    [
        lambda: tf.MambaConfig(
            vocab_size=4096, hidden_size=32, num_hidden_layers=3, eos_token_id=2, pad_token_id=0, bos_token_id=None
        ),
        lambda: tf.MistralConfig(**GQA, sliding_window=8),
    ],
    ids=["recurrent", "sliding window"],
)
def test_other_caches(config, tokenizer, monkeypatch):
    """Recurrent states are neither shared nor left out; a sliding window is both."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config()).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.15)
    lm = wrap_model(model, tokenizer, "other")
    stopping(lm)
    monkeypatch.setattr(generation, "text_of", lambda tokenizer, row: row)
    together = generate(lm, prompts_of(lm), SamplingParams(20, 0), return_activations=True, progress=False)
    assert len(set(together.tokens)) > 1
    ids = [lm.tokenizer(p, add_special_tokens=False).input_ids for p in prompts_of(lm)]
    for i, p in enumerate(prompts_of(lm)):
        alone = generate(lm, [p], SamplingParams(20, 0), seeds=[i], return_activations=True, progress=False)
        if not isinstance(model, tf.MambaForCausalLM):  # left padding reaches a recurrent state
            assert alone.texts[0] == together.texts[i]
        with torch.no_grad(), ActivationPooler(lm, len(ids[i])) as plain:
            model(input_ids=torch.tensor([ids[i] + alone.texts[0]]), use_cache=False)
        for k, want in plain.result().items():
            torch.testing.assert_close(alone.activations[k], want, rtol=1e-3, atol=1e-3, equal_nan=True)
    batch = generation.padded(lm.tokenizer, ids, "left", lm.device)
    theirs = model.generate(**batch, max_new_tokens=15, do_sample=False, eos_token_id=2, pad_token_id=2)[
        :, batch["input_ids"].shape[1] :
    ]
    ours = decoding.decode(
        lm, batch["input_ids"], batch["attention_mask"], lambda logits, rows, t: logits.argmax(-1), 15, [2]
    )
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)


def test_reading_shares_prompts_and_gives_the_same(family, monkeypatch):
    prompts = prompts_of(family) * 2
    answers = [
        "First, plan baking bread.",
        "No",
        "",
        "The process takes some time. Keep short notes.",
        "Yes.",
        "It depends.",
        "So it is.",
        "",
        "Time",
        "No, it takes some time.",
    ]
    seen = passes(family, monkeypatch)
    shared = collect_activations(family, prompts, answers)
    tokens = sum(a * b for a, b in seen)
    monkeypatch.setattr(generation, "rows_are_independent", lambda cache: False)
    seen.clear()
    whole = collect_activations(family, prompts, answers)
    assert tokens < 0.8 * sum(a * b for a, b in seen)
    for k in generation.POOLS:
        torch.testing.assert_close(shared[k], whole[k], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert torch.isnan(shared["response_avg"][2]).all() and torch.isfinite(shared["response_avg"][3]).all()


BEGIN = "Keep short notes. The process takes some time. "
PROMPTS = [
    BEGIN + "First, plan baking bread.",
    BEGIN + "My friend is bad.",
    BEGIN,
    BEGIN + "My friend is bad.",
    "Is it losing?",
    BEGIN + "My friend is bad. So",
    BEGIN + "Yes",
    "No",
]
ANSWERS = [" Yes.", " No, it takes some time.", " So it is.", "", " It depends.", " Time", "", " No"]


@pytest.mark.parametrize("steered", [False, True])
def test_beginnings_of_prompts_are_shared_and_nothing_else_changes(family, steered, monkeypatch):
    """Pools and steering find the end of each prompt, whether it lies in what is shared or behind it."""
    v, seen = torch.randn(32), passes(family, monkeypatch)
    with steer(family, v, 2, 2.0 if steered else 0.0):
        shared = collect_activations(family, PROMPTS, ANSWERS)
        rows = [a for a, _ in seen]
        assert sum(rows) > len(PROMPTS), "nothing was shared"
        monkeypatch.setattr(generation, "rows_are_independent", lambda cache: False)
        whole = collect_activations(family, PROMPTS, ANSWERS)
    for k in generation.POOLS:
        torch.testing.assert_close(shared[k], whole[k], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert torch.isnan(whole["response_avg"][3]).all() and torch.isfinite(whole["prompt_avg"]).all()


@pytest.mark.parametrize(
    "config",
    [
        # states in its modules, a soft cap of its own
        lambda: tf.RecurrentGemmaConfig(**GQA, lru_width=32, logits_soft_cap=5.0, attention_window_size=32),
        # both kinds of states, a scale of its own
        lambda: tf.FalconH1Config(
            **GQA, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8
        ),
    ],
    ids=["recurrent gemma", "falcon h1"],
)
def test_states_of_other_kinds_are_not_shared_and_heads_are_the_models_own(config, tokenizer):
    torch.manual_seed(0)
    lm = wrap_model(tf.AutoModelForCausalLM.from_config(config()).eval(), tokenizer, "other")
    together = collect_activations(lm, PROMPTS, ANSWERS)
    alone = [collect_activations(lm, [p], [a]) for p, a in zip(PROMPTS, ANSWERS)]
    for k in generation.POOLS:
        torch.testing.assert_close(together[k], torch.cat([x[k] for x in alone]), rtol=1e-3, atol=1e-3, equal_nan=True)
    ids = [tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS]
    with torch.no_grad():
        want = [lm.model(input_ids=torch.tensor([x]), use_cache=False).logits[0].float() for x in ids]
    for index, logits in generation.next_logits(lm, [(x, len(x) - 1) for x in ids]):
        for i, row in zip(index, logits):
            torch.testing.assert_close(row, want[i][-1], rtol=1e-3, atol=1e-3)
    for x, w, got in zip(ids, want, generation.answer_logprobs(lm, [(x, 1) for x in ids])):
        torch.testing.assert_close(
            got, w[:-1].log_softmax(-1).gather(-1, torch.tensor(x[1:])[:, None])[:, 0], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_what_comes_next_under_steering(llama, positions):
    ids = [llama.tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS]
    with steer(llama, 3 * torch.randn(32), 2, 1.0, positions), torch.no_grad():
        want = [llama.model(input_ids=torch.tensor([x])).logits[0, -1] for x in ids]
        for index, logits in generation.next_logits(
            llama, [(x, len(x) - 1 if i % 2 else 0) for i, x in enumerate(ids)]
        ):
            for i, row in zip(index, logits):
                torch.testing.assert_close(row, want[i], rtol=1e-3, atol=1e-3)


def test_what_is_shared_saves_the_most_and_never_steers_too_early():
    def share(*prompts, more=0):
        return generation._best_groups(
            list(prompts), [len(p) + more for p in prompts], sorted(range(len(prompts)), key=prompts.__getitem__)
        )

    assert share([1, 2, 3], [1, 2, 4]) == (2, [([1, 2], [0, 1])])
    assert share([1, 2, 3], [1, 2, 3]) == (3, [([1, 2, 3], [0, 1])])  # the whole prompt of both
    assert share([1, 2, 3], [1, 2]) == (1, [([1], [1, 0])])  # not the whole prompt of one of them
    # against 3
    assert share([1, 5, 5], [1, 5, 5], [1, 6, 6], [1, 6, 6]) == (6, [([1, 5, 5], [0, 1]), ([1, 6, 6], [2, 3])])
    assert share([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]) == (6, [([1, 2, 3], [0, 1, 2])])
    assert share([1], [2]) == share([], []) == share([1, 2, 3], [1, 2, 4], more=10) == (0, [])  # not worth it
    many = [[1, 2, 9, k] for k in range(10, 40)] + [[1, 2, *range(50, 60)]] * 3
    # all share more, but too little of each
    assert share(*many, more=30) == (24, [([1, 2, *range(50, 60)], [30, 31, 32])])
    chain = [list(range(n)) for n in range(1, 1200)]
    # does not run out of stack
    assert generation._best_groups(chain, list(map(len, chain)), list(range(len(chain))))[0] > 0


def test_what_comes_next_is_the_same_with_shared_beginnings(family, monkeypatch):
    ids = [
        family.tokenizer(p + a, add_special_tokens=False).input_ids
        for p in prompts_of(family)
        for a in ("First, plan baking bread.", "No", "Yes. It takes some time.")
    ]
    begin = [len(x) - 1 if i % 5 == 0 else min(12, len(x) - 1) for i, x in enumerate(ids)]
    with torch.no_grad():
        want = [family.model(input_ids=torch.tensor([x])).logits[0, -1].float() for x in ids]
    seen, got = passes(family, monkeypatch), {}
    for index, logits in generation.next_logits(family, list(zip(ids, begin))):
        got |= dict(zip(index, logits))
    assert sorted(got) == list(range(len(ids))) and sum(a * b for a, b in seen) < sum(map(len, ids))
    for i, w in enumerate(want):
        torch.testing.assert_close(got[i], w, rtol=1e-3, atol=1e-3)


def test_reading_batches_have_the_least_padding():
    rng = random.Random(0)
    for n, budget, extra in ((1, 5, 0), (7, 60, 0), (8, 90, 3), (9, 40, 10)):
        lengths = [rng.randint(1, 30) for _ in range(n)]
        got = reading_batches(lengths, budget, extra)
        order = sorted(lengths, reverse=True)

        def cost(cuts):
            parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, n])]
            return sum(
                len(p) * (p[0] + extra) + budget / 24 if len(p) == 1 or len(p) * (p[0] + extra) <= budget else math.inf
                for p in parts
            )

        best = min(cost(cuts) for k in range(n) for cuts in itertools.combinations(range(1, n), k))
        assert sorted(sum(got, [])) == list(range(n)) and [lengths[i] for b in got for i in b] == order
        assert cost(list(itertools.accumulate(map(len, got)))[:-1]) == pytest.approx(best)
    assert reading_batches([], 10) == []


def test_equal_prompts_come_into_one_batch(monkeypatch):
    ids = [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert length_batches([2] * 4, budget=4, ties=ids) == [[0, 2], [1, 3]]
    assert length_batches([2] * 4, budget=4) == [[0, 1], [2, 3]]
    monkeypatch.setattr(settings(), "batch_tokens", 700)
    assert decoding.pass_tokens(torch.device("cpu")) == 700 and decoding.pass_tokens(torch.device("cuda")) == 700


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_reading_under_steering(family, positions, monkeypatch):
    """Which tokens are steered does not depend on which texts are read together; a prompt that is steered is not
    shared."""
    v, prompts, answers = torch.randn(32), prompts_of(family)[1:], ["First, plan.", "No", "It depends.", "Yes."]
    seen = passes(family, monkeypatch)
    with steer(family, v, 2, 2.0, positions):
        together = collect_activations(family, prompts, answers)
        calls = len(seen)
        alone = [collect_activations(family, [p], [a]) for p, a in zip(prompts, answers)]
    plain = collect_activations(family, prompts, answers)
    assert calls == (3 if positions == "response" else 1)
    for k in generation.POOLS:
        torch.testing.assert_close(together[k], torch.cat([x[k] for x in alone]), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together["prompt_last"], plain["prompt_last"], atol=0.1)


def test_a_wrapper_that_hides_ids_and_mask_from_its_trunk(llama):
    """As multimodal models do: they hand embeddings and a mask of their own kind to the text model."""
    stopping(llama)
    plain = generate(llama, prompts_of(llama), SamplingParams(10, 0), return_activations=True, progress=False)
    embed = llama.model.get_input_embeddings()

    def hide(module, args, kwargs):
        kwargs["inputs_embeds"] = embed(kwargs.pop("input_ids"))
        return args, kwargs

    llama.base_model.register_forward_pre_hook(hide, with_kwargs=True)
    hidden = generate(llama, prompts_of(llama), SamplingParams(10, 0), return_activations=True, progress=False)
    assert hidden.texts == plain.texts
    for k in generation.POOLS:
        torch.testing.assert_close(hidden.activations[k], plain.activations[k], rtol=1e-4, atol=1e-4, equal_nan=True)
