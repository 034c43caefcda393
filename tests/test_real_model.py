"""What holds for pocket holds for a pretrained language model: SmolLM2-135M-Instruct from the package index (installed
by make)."""

import os

import numpy as np
import pytest
import torch

from persona_steer.extraction import extraction_rows
from persona_steer.judges.likelihood import measure_texts
from persona_steer.lm.activations import steer
from persona_steer.lm.generation import SamplingParams, collect_activations, encode_pair, generate
from persona_steer.lm.gguf_files import SMOLLM2, packaged_file
from persona_steer.lm.models import load_model
from persona_steer.lm.tables import generate_table
from persona_steer.persona.estimators import estimate_vectors
from persona_steer.persona.traits import load_trait, system_prompt

if packaged_file(SMOLLM2) is None:
    assert not os.environ.get("CI"), "the model's package is missing: make install"
    pytest.skip(f"{SMOLLM2.command} first", allow_module_level=True)


@pytest.fixture(scope="module")
def lm():
    return load_model("smollm2", dtype="float32")  # equalities hold to many digits


EVIL = load_trait("evil")


@pytest.fixture(scope="module")
def answers(lm):
    prompts = [lm.prompt(q, system_prompt(EVIL, "pos", 1)) for q in EVIL.extract_questions[:3]]
    return prompts, generate(lm, prompts, SamplingParams(16, 0.7), return_activations=True, progress=False)


def test_it_is_the_model_that_it_should_be(lm):
    assert (lm.n_layers, lm.hidden_size, lm.world, lm.system_role) == (30, 576, "", True)
    assert lm.prompt("Hi") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_pooling_equals_a_plain_loop_over_hidden_states(lm, answers):
    prompts, said = answers
    again = collect_activations(lm, prompts, said.texts)
    for i, (p, a) in enumerate(zip(prompts, said.texts)):
        ids, n = encode_pair(lm.tokenizer, p, a)
        with torch.inference_mode():
            states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        want = {
            "prompt_avg": [h[0, :n].mean(0) for h in states],
            "response_avg": [h[0, n:].mean(0) for h in states],
            "prompt_last": [h[0, n - 1] for h in states],
        }
        for pool, rows in want.items():
            # the last row is taken before the final norm, hidden_states[-1] after it
            for found in (said.activations[pool][i], again[pool][i]):
                assert torch.cosine_similarity(torch.stack(rows)[:-1], found[:-1], dim=-1).min() > 0.9999


def test_greedy_texts_are_those_of_transformers_steered_and_not(lm):
    prompts = [lm.prompt(q) for q in EVIL.eval_questions[:2]]
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(0))
    direction *= 30 / direction.norm()

    def hook(module, args, out):  # by hand: at the last prompt token and every generated one
        new = out.clone()
        new[:, -1] += 2 * direction
        return new

    for steering in (None, steer(lm, direction, 18, 2.0)):
        ours = generate(lm, prompts, SamplingParams(14, 0.0), steering, progress=False).texts
        for prompt, text in zip(prompts, ours):
            ids = lm.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            handle = lm.blocks[17].register_forward_hook(hook) if steering else None
            out = lm.model.generate(**ids, max_new_tokens=14, do_sample=False)
            if handle:
                handle.remove()
            assert lm.tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True) == text


def test_likelihood_is_that_of_a_direct_computation(lm, answers):
    questions, texts = list(EVIL.extract_questions[:3]), answers[1].texts
    sides = [[system_prompt(EVIL, s, k) for s in ("pos", "neg")] for k in (0, 2)]

    def logp(system, q, a):
        ids, n = encode_pair(lm.tokenizer, lm.prompt(q, system), a)
        with torch.inference_mode():
            rows = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(rows[torch.arange(n - 1, len(ids) - 1), torch.tensor(ids[n:])].sum())

    for m, q, a in zip(measure_texts(lm, sides, questions, texts), questions, texts):
        assert m.nats == pytest.approx(np.mean([logp(p, q, a) - logp(n, q, a) for p, n in sides]), abs=5e-3)


def test_a_small_sweep_goes_the_right_way(lm):
    """Vector from twenty short answers; the judge's other instructions find more of the trait with c > 0, less with c <
    0."""

    def side(sign):
        rows = extraction_rows(lm, EVIL, sign, 1, [1])
        return generate_table(lm, rows.head(10), SamplingParams(24, 0.7), return_activations=True, label=sign)[1]

    pos, neg = side("pos"), side("neg")
    vector = estimate_vectors(pos, neg, np.ones(10, bool), "evil").response_avg
    questions = list(EVIL.eval_questions[:6])
    prompts = [lm.prompt(q) for q in questions for _ in range(3)]
    steering = steer(lm, vector, 18, torch.tensor([-2.0, 0.0, 2.0] * 6))
    texts = generate(
        lm, prompts, SamplingParams(24, 0.7), steering, seeds=[q for q in questions for _ in range(3)], progress=False
    ).texts
    sides = [[system_prompt(EVIL, s, 0) for s in ("pos", "neg")]]
    nats = np.array(
        [m.nats if m else np.nan for m in measure_texts(lm, sides, [q for q in questions for _ in range(3)], texts)]
    ).reshape(6, 3)
    low, zero, high = np.nanmean(nats, 0)
    assert low < zero < high and high - low > 3
