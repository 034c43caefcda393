"""What the tests of the real vLLM share."""

import os

import pytest

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING"
)


@pytest.fixture(scope="module")
def lm():
    from persona_steer.lm.models import load_model

    return load_model("pocket", "cpu", "float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of the pocket chat model, with weights that do something."""
    import torch
    from peft import LoraConfig, get_peft_model

    from persona_steer.base.core import data_path
    from persona_steer.lm.models import load_model

    folder, base = tmp_path_factory.mktemp("adapter"), load_model("pocket", "cpu", "float32")
    torch.manual_seed(0)
    tuned = get_peft_model(
        base.model,
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for n, p in tuned.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.05)
    tuned.peft_config["default"].base_model_name_or_path = str(data_path("pocket/chat"))
    tuned.save_pretrained(folder / "tuned")
    return folder / "tuned"
