"""Tiny random models of the common families, with the pocket tokenizer; a temporary runs folder."""

import atexit
import os
import shutil
import tempfile

# jobs and judgements of tests stay apart from the user's
os.environ["PERSONA_RUNS"] = tempfile.mkdtemp(prefix="persona_runs_")
atexit.register(shutil.rmtree, os.environ["PERSONA_RUNS"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf

from persona_steer.base import core
from persona_steer.base.core import data_path
from persona_steer.lm.models import wrap_model

SIZE = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=4096,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
)
GQA = dict(SIZE, intermediate_size=48, num_key_value_heads=1)
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**GQA),
    "qwen2": lambda: tf.Qwen2Config(**GQA),
    "qwen3": lambda: tf.Qwen3Config(**GQA, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**GQA),
    "gemma2": lambda: tf.Gemma2Config(**GQA, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**GQA, head_dim=16),
    "phi3": lambda: tf.Phi3Config(**GQA),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=2,
        vocab_size=4096,
        n_positions=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZE, intermediate_size=48),
    "mixtral": lambda: tf.MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2),  # as many experts as blocks
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **GQA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}


@pytest.fixture(scope="session")
def tokenizer():
    return tf.AutoTokenizer.from_pretrained(str(data_path("pocket/chat")))


def make(family, tokenizer):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family]())
    for p in model.parameters():  # spread out, so that sampled text is not all one token
        if p.dim() > 1:
            p.data.normal_(0, 0.15)
    return wrap_model(model, tokenizer, family)


@pytest.fixture(params=list(CONFIGS))
def family(request, tokenizer):
    return make(request.param, tokenizer)


@pytest.fixture
def llama(tokenizer):
    return make("llama", tokenizer)


@pytest.fixture(scope="session")
def pocket():
    from persona_steer.lm.models import load_model

    return load_model("pocket")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A `runs/` of this test's own."""
    monkeypatch.setattr(core.settings(), "runs", tmp_path / "runs")
    return tmp_path / "runs"
