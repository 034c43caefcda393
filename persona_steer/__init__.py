"""Persona vectors: extract, steer, evaluate and monitor character traits of language models."""
__version__ = "0.1.0"

import importlib
import os
import sys

if sys.platform == "darwin":  # read when torch is imported: what an Apple GPU cannot do is done on the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

# The public names and where they live. They are imported when first used, so that `import persona_steer` is quick.
_WHERE = {
    "load_model": "lm.models", "load_trait": "persona.traits", "list_traits": "persona.traits", "load_judge": "judges.loading",
    "SamplingParams": "lm.generation", "generate": "lm.generation", "ask": "lm.generation",
    "project": "projection", "finetune": "finetuning", "screen": "screening",
    "extract": "extraction", "steer": "lm.activations", "evaluate": "evaluation",
    "PersonaVectors": "persona.vectors", "save_vectors": "persona.vectors", "load_vectors": "persona.vectors", "PersonaError": "base.core",
    "push_vectors": "persona.hub", "pull_vectors": "persona.hub",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'persona_steer' has no attribute '{name}'")
    return getattr(importlib.import_module(f"persona_steer.{_WHERE[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
