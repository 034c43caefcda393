"""How much steering, monitoring and pooling cost in vLLM, and how fast vLLM is beside this project's own loop and
transformers' `generate`: `make bench-vllm`. 64 answers of 60 tokens by smollm2, float32, compiled; medians of five
rounds in turns, each engine in a process of its own."""

import os
import statistics
import subprocess
import sys
import time
import uuid

import torch

TOKENS, ROWS = 60, 64
ENGINES = ("stock", "serving", "pooling", "own loop", "transformers")


def vectors(folder: str) -> dict:
    """Two random vectors as long as persona vectors are."""
    v = torch.randn(31, 576, generator=torch.Generator().manual_seed(0))
    v = 60 * v / v.norm(dim=1, keepdim=True)
    for name, values in (("one", v), ("two", -v)):
        torch.save(values, f"{folder}/{name}.pt")
    return {name: f"{folder}/{name}.pt" for name in ("one", "two")}


def measured(works: dict, rounds: int = 5) -> None:
    """Print tokens per second of each kind of work, done in turns."""
    seconds = {name: [] for name in works}
    for k in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            tokens = work()
            if k:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / tokens)
    for name, s in seconds.items():
        print(f"{name:24s} {1 / statistics.median(s):6.0f} tokens/s [{1 / max(s):.0f}, {1 / min(s):.0f}]", flush=True)


def with_vllm(engine: str, lm, prompts: list[str], folder: str) -> dict:
    """Kinds of work of one engine."""
    from vllm import LLM, SamplingParams

    from persona_steer.lm.models import resolve_model
    from persona_steer.serving.plugin import engine_options

    options = {} if engine == "stock" else engine_options(vectors(folder), capture=ROWS if engine == "pooling" else 0)
    options |= {"async_scheduling": False} if engine == "pooling" else {}
    where = resolve_model("smollm2")[0]
    llm = LLM(
        model=where, dtype="float32", max_model_len=1024, max_num_seqs=ROWS, enable_prefix_caching=False, **options
    )
    ids = [{"prompt_token_ids": lm.tokenizer(p, add_special_tokens=False).input_ids} for p in prompts]

    def run(extra):
        asks = [
            SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra(i)) for i in range(ROWS)
        ]
        llm.generate(ids, asks, use_tqdm=False)
        return TOKENS * ROWS

    mixed = [f"{name}:{c / 8}@{layer}" for name in ("one", "two") for c in range(1, 9) for layer in (15, 18, 20, 22)]
    kinds = {f"{engine}: unsteered": lambda i: None}
    if engine != "stock":
        kinds[f"{engine}: 64 ways steered"] = lambda i: {"steer": mixed[i]}
        kinds[f"{engine}: monitored"] = lambda i: {"monitor": "one@20"}
    if engine == "pooling":
        kinds["pooling: pooled"] = lambda i: {"pool": dict(pool=uuid.uuid4().hex, pool_tokens=TOKENS)}
    return {name: (lambda extra=extra: run(extra)) for name, extra in kinds.items()}


def with_hugging_face(engine: str, lm, prompts: list[str], folder: str) -> dict:
    from persona_steer.lm.activations import steer
    from persona_steer.lm.generation import SamplingParams, generate

    v = torch.load(vectors(folder)["one"], weights_only=True)

    def own():
        return sum(generate(lm, prompts, SamplingParams(TOKENS, 0), steer(lm, v, 20, 1.0), progress=False).tokens)

    def peer():
        batch = lm.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with steer(lm, v, 20, 1.0), torch.inference_mode():
            lm.model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return TOKENS * ROWS

    return {f"{engine}: steered": own if engine == "own loop" else peer}


def main(engine: str, folder: str):
    from persona_steer.lm.models import load_model
    from persona_steer.persona.traits import load_trait

    lm = load_model("smollm2", "cpu", "float32")
    questions = list(load_trait("evil").eval_questions)
    prompts = [lm.prompt(questions[i % len(questions)]) for i in range(ROWS)]
    build = with_vllm if engine in ENGINES[:3] else with_hugging_face
    measured(build(engine, lm, prompts, folder), 5 if engine in ENGINES[:3] else 2)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        import tempfile

        quiet = dict(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="2")
        with tempfile.TemporaryDirectory() as tmp:
            for name in ENGINES:
                subprocess.run([sys.executable, __file__, name, tmp], env=os.environ | quiet, check=True)
