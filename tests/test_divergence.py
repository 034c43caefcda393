"""The divergence against a direct computation, and the search for coefficients."""

import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.lm.activations import steer
from persona_steer.lm.divergence import TOLERANCE, calibrate, coefficients_for_kl, kl_divergence, reference_texts
from persona_steer.lm.generation import SamplingParams

QUESTIONS = ["How should I start baking bread?", "Is it hard to raise goats?", "Why?"]


@pytest.fixture(scope="module")
def texts(pocket):
    return reference_texts(pocket, QUESTIONS, SamplingParams(24))


@pytest.fixture(scope="module")
def direction(pocket):
    return torch.randn(pocket.n_layers + 1, pocket.hidden_size, generator=torch.Generator().manual_seed(0))


def test_it_is_the_mean_of_sum_p_log_p_over_q(pocket, texts, direction):
    total, tokens = 0.0, 0
    for ids, n in texts.pairs:

        def predictions():
            with torch.inference_mode():
                return pocket.model(torch.tensor([ids])).logits[0, n - 1 : -1].double().log_softmax(-1)

        plain = predictions()
        block = pocket.blocks[2]  # layer 3
        add = torch.zeros(len(ids), pocket.hidden_size)
        add[n - 1 :] = 4 * direction[3]  # the last prompt token and the answer
        hook = block.register_forward_hook(
            lambda m, a, out: out + add if isinstance(out, torch.Tensor) else (out[0] + add, *out[1:])
        )
        steered = predictions()
        hook.remove()
        total += float((steered.exp() * (steered - plain)).sum())
        tokens += len(steered)
    assert kl_divergence(pocket, steer(pocket, direction, 3, 4.0), texts) == pytest.approx(total / tokens, rel=1e-3)


def test_it_is_zero_without_steering_and_grows_with_the_coefficient(pocket, texts, direction):
    found = [kl_divergence(pocket, steer(pocket, direction, 3, c), texts) for c in (0.0, 1.0, 2.0, 4.0)]
    assert found[0] < 1e-6 and found == sorted(found) and found[-1] > 10 * found[1] > 0
    assert kl_divergence(pocket, None, texts) < 1e-6


def test_coefficients_reach_their_targets(pocket, texts, direction):
    for target, (c, kl) in coefficients_for_kl(pocket, direction, 3, [0.02, 0.1], texts).items():
        assert abs(kl / target - 1) <= TOLERANCE and kl_divergence(
            pocket, steer(pocket, direction, 3, c), texts
        ) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("power, scale", [(2, 0.3), (1.2, 5.0), (3, 0.001)])
def test_the_search_is_short_for_any_growing_curve(power, scale):
    calls = []

    def curve(c):
        calls.append(c)
        return scale * c**power

    found = calibrate(curve, [0.05, 0.3, 1.0])
    assert all(abs(d / t - 1) <= TOLERANCE and curve(c) == d for t, (c, d) in found.items()) and len(calls) - 3 <= 18


def test_a_target_out_of_reach_is_one_sentence():
    with pytest.raises(PersonaError, match="moves the model by 5 nats"):
        calibrate(lambda c: min(0.5, c), [5.0])
    calls = []
    with pytest.raises(PersonaError, match="up to 64"):
        calibrate(lambda c: calls.append(c) or min(0.5, c), [5.0])
    assert len(calls) == len(set(calls)) and max(calls) == 64  # the largest coefficient is measured once
    with pytest.raises(PersonaError, match="above 0"):
        calibrate(lambda c: c, [0.0])
