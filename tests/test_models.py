"""Block lookup, chat templates, loading by name."""

import pytest
import torch
import transformers as tf

from persona_steer.base.core import PersonaError, data_path, pick_dtype
from persona_steer.lm.generation import encode_pair
from persona_steer.lm.models import find_blocks, fold_system, has_system_role, load_model, resolve_model


def test_blocks_are_found_in_every_family(family):
    assert len(family.blocks) == 3 and family.n_layers == 3 and family.hidden_size == 32
    assert (
        family.model.get_submodule(next(n for n, m in family.model.named_modules() if m is family.base_model))
        is family.base_model
    )


def test_unclear_blocks_are_an_error_that_names_the_fix(llama):
    llama.model.extra = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(PersonaError, match="blocks="):
        find_blocks(llama.model)
    assert find_blocks(llama.model, "model.layers")[1] is llama.blocks
    with pytest.raises(PersonaError, match="no module"):
        find_blocks(llama.model, "model.nothing")


def test_peft_wrappers_keep_the_blocks(llama):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(llama.model, LoraConfig(target_modules=["q_proj"]))
    assert len(find_blocks(wrapped)[1]) == 3


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if "
    "add_generation_prompt %}<model>{% endif %}"
)
DROPS = (
    "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% "
    "if add_generation_prompt %}<model>{% endif %}"
)


@pytest.mark.parametrize("template", [GEMMA, DROPS])
def test_templates_without_a_system_role_get_it_in_the_first_user_turn(llama, template):
    import copy

    llama.tokenizer = copy.deepcopy(llama.tokenizer)
    llama.tokenizer.chat_template = template
    llama.system_role = has_system_role(llama.tokenizer)
    assert llama.system_role is False
    assert llama.prompt("Hello?", "Be kind.") == "<user>Be kind.\n\nHello?<model>"
    assert fold_system([{"role": "user", "content": "a"}]) == [{"role": "user", "content": "a"}]


def bpe_with_bos():
    """A byte-level BPE that merges newlines and puts a BOS before everything it is not told otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    t.train_from_iterator(
        ["a\n\nb\n\n"] * 50,
        trainers.BpeTrainer(
            special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=300
        ),
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token="<s>",
        eos_token="<s>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    )


def test_no_second_bos_and_the_boundary_is_exact():
    tok = bpe_with_bos()
    prompt = tok.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert prompt == "<s>a\n"
    for answer in ("b", "\nb"):  # "\n" + "\n" would merge across the boundary
        ids, n = encode_pair(tok, prompt, answer)
        assert ids.count(tok.bos_token_id) == 1
        assert tok.decode(ids[:n]) == prompt and tok.decode(ids[n:]) == answer


def test_dtype_rules():
    assert pick_dtype(torch.device("cpu")) == torch.float32 and pick_dtype(torch.device("mps")) == torch.float16
    assert pick_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16
    assert (
        pick_dtype(torch.device("cpu"), "", torch.float32)
        == pick_dtype(torch.device("cpu"), "", torch.float16)
        == torch.float32
    )
    with pytest.raises(PersonaError, match="dtype"):
        pick_dtype(torch.device("cpu"), "float7")


@pytest.mark.parametrize("capable", [True, False])
def test_a_cpu_uses_bfloat16_where_it_is_quick_and_the_model_was_published_in_it(monkeypatch, capable):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    want = torch.bfloat16 if capable else torch.float32
    assert pick_dtype(torch.device("cpu"), "", torch.bfloat16) == want
    assert load_model("pocket").model.dtype == torch.float32  # too small to gain from it, and its config says so


@pytest.mark.parametrize("name", ["./nothing/here", "/no/such/model", "no_such_model", "a/b/c"])
def test_a_path_that_does_not_exist_is_one_sentence(name):
    with pytest.raises(PersonaError, match="does not exist") as e:
        load_model(name)
    assert "\n" not in str(e.value)


def test_names(tmp_path):
    assert resolve_model("pocket") == (str(data_path("pocket/chat")), "") and resolve_model(
        "Qwen/Qwen2.5-7B-Instruct"
    ) == ("Qwen/Qwen2.5-7B-Instruct", "")
    with pytest.raises(PersonaError, match="no config.json.*no checkpoint"):
        resolve_model(str(tmp_path))


def test_a_base_model_without_template_is_refused(llama, tmp_path):
    import copy

    tok = copy.deepcopy(llama.tokenizer)
    tok.chat_template = None
    llama.model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    with pytest.raises(PersonaError, match="chat template"):
        load_model(str(tmp_path))


def test_a_saved_model_loads_from_its_folder_with_the_same_fingerprint(llama, tmp_path):
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype="float32")
    assert again.fingerprint == llama.fingerprint and again.n_layers == 3
    with torch.no_grad():
        next(again.model.parameters()).view(-1)[0] += 1
    from persona_steer.lm.models import fingerprint

    assert fingerprint(again.model) != llama.fingerprint


# -- adapters and checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(llama, tmp_path):
    """A base model in one folder and a LoRA adapter of it, with weights that do something, in two checkpoints."""
    from peft import LoraConfig, get_peft_model

    llama.model.save_pretrained(tmp_path / "base")
    llama.tokenizer.save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), "cpu", "float32")
    tuned = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for step in (5, 20):
        for n, p in tuned.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1 * step)
        tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return tmp_path, ids, tuned(ids).logits


@torch.no_grad()
def test_an_adapter_loads_merged_or_kept_and_the_latest_checkpoint_is_taken(adapter, capsys):
    folder, ids, want = adapter
    merged = load_model(str(folder / "out"), "cpu", "float32")
    assert "checkpoint-20, the latest of 2" in capsys.readouterr().out
    kept = load_model(str(folder / "out" / "checkpoint-20"), "cpu", "float32", merge=False)
    other = load_model(str(folder / "out" / "checkpoint-5"), "cpu", "float32")
    base = load_model(str(folder / "base"), "cpu", "float32")
    for lm in (merged, kept):
        torch.testing.assert_close(lm.model(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert lm.n_layers == 3 and lm.hidden_size == 32
    assert len({lm.fingerprint for lm in (merged, kept, other, base)}) == 4
    assert not torch.allclose(base.model(ids).logits, want, atol=1e-2)


def test_a_kept_adapter_generates_pools_and_steers_like_the_merged_one(adapter):
    from persona_steer.lm.activations import steer
    from persona_steer.lm.generation import SamplingParams, generate

    folder, *_ = adapter
    out = []
    for merge in (True, False):
        lm = load_model(str(folder / "out" / "checkpoint-20"), "cpu", "float32", merge=merge)
        r = generate(
            lm,
            [lm.prompt("how should I start?")] * 3,
            SamplingParams(12),
            steer(lm, torch.ones(32), 2, torch.tensor([0.0, 1.0, 3.0])),
            return_activations=True,
            progress=False,
        )
        out.append(r)
    assert out[0].texts == out[1].texts and len(set(out[0].texts)) == 3
    torch.testing.assert_close(
        out[0].activations["response_avg"], out[1].activations["response_avg"], atol=1e-3, rtol=1e-3
    )


def test_an_adapter_whose_base_is_absent_is_one_sentence(adapter):
    import shutil

    folder, *_ = adapter
    shutil.rmtree(folder / "base")
    with pytest.raises(PersonaError, match="was trained on '.*base', which is not there") as e:
        load_model(str(folder / "out" / "checkpoint-5"))
    assert "\n" not in str(e.value)


def test_what_this_machine_cannot_do_is_said(llama):
    if not torch.cuda.is_available():
        with pytest.raises(PersonaError, match="needs a CUDA GPU"):
            load_model("pocket", quantize="4bit")
    with pytest.raises(PersonaError, match="'8bit', '4bit'"):
        load_model("pocket", quantize="2bit")


def test_device_map_auto_places_the_model():
    lm = load_model("pocket", "auto", "float32")
    assert lm.device.type in ("cpu", "cuda", "mps") and lm.model.dtype == torch.float32


# -- thoughts --------------------------------------------------------------------------------------------------------

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' "
    "}}{% endif %}{% endif %}"
)


@pytest.fixture
def thinker(tokenizer):
    import copy

    from conftest import make

    tok = copy.deepcopy(tokenizer)
    tok.add_tokens(["<think>", "</think>"])
    tok.chat_template = THINKING
    lm = make("llama", tok)
    lm.model.resize_token_embeddings(len(tok) + 60)
    return lm


def test_the_template_is_told_to_think_or_not(thinker):
    from dataclasses import replace

    assert "</think>" not in thinker.prompt("q") and "</think>" not in replace(thinker, thinking=True).prompt("q")
    assert replace(thinker, thinking=False).prompt("q").endswith("<think>\n\n</think>\n\n")
    assert (
        len(
            {x.template_hash for x in (thinker, replace(thinker, thinking=False), replace(thinker, keep_thoughts=True))}
        )
        == 3
    )


def test_thoughts_are_kept_in_the_text_and_left_out_of_pooling_and_judging(thinker):
    from dataclasses import replace

    from persona_steer.lm.generation import SamplingParams, collect_activations, generate, text_of

    keep = replace(thinker, keep_thoughts=True)
    p, thought, said = thinker.prompt("how should I start?"), "<think>plan the work</think>", "practice each week."
    assert (
        thinker.strip_thinking(thought + said) == said
        and keep.strip_thinking(thought + said) == thought + said
        and thinker.strip_thinking("<think>plan the") == ""
    )
    a, b, c = (
        collect_activations(lm, [p], [t])["response_avg"][0]
        for lm, t in ((thinker, thought + said), (keep, thought + said), (thinker, said))
    )
    whole = thinker.model(
        **thinker.tokenizer(p + thought + said, add_special_tokens=False, return_tensors="pt"),
        output_hidden_states=True,
    ).hidden_states[1][0]
    n = len(thinker.tokenizer(said, add_special_tokens=False).input_ids)
    torch.testing.assert_close(a[1], whole[-n:].mean(0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(a[1], b[1], atol=1e-3)
    assert text_of(thinker.tokenizer, thinker.tokenizer(thought + said + "<|im_end|>").input_ids) == thought + said

    # while generating: a model that ends its thought at the third token
    end, step = thinker.think_end, thinker.model.lm_head
    count = iter(range(99))
    handle = step.register_forward_hook(
        lambda m, args, out: (
            out.index_fill(-1, torch.tensor([end]), 1e4)
            if next(count) == 2
            else out.index_fill(-1, torch.tensor([end]), -1e4)
        )
    )
    got = generate(thinker, [p], SamplingParams(10, seed=4), return_activations=True, progress=False)
    handle.remove()
    assert "</think>" in got.texts[0]
    again = collect_activations(thinker, [p], [got.texts[0]])["response_avg"][0]
    torch.testing.assert_close(got.activations["response_avg"][0], again, atol=1e-3, rtol=1e-3)


def test_a_thought_that_never_ends_is_no_answer(thinker):
    import pandas as pd

    from persona_steer.judges.judging import Judge, add_scores
    from persona_steer.persona.traits import load_trait

    class Fifty(Judge):
        name = "fifty"

        def judge(self, items):
            for i, item in enumerate(items):
                assert "<think>" not in item.answer
                yield i, 50.0, True

    f = pd.DataFrame(
        dict(question="q", prompt=thinker.prompt("q"), answer=["<think>hm", "<think>hm</think> yes", "yes"])
    )
    got = add_scores(f, thinker, Fifty(), load_trait("evil"))
    assert got.evil.isna().tolist() == [True, False, False] and got.answer[1] == "<think>hm</think> yes"


def test_a_hub_id_without_a_hub_is_one_sentence_at_once(monkeypatch):
    """The libraries would try again and again for half a minute."""
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("tried"))
    monkeypatch.setattr("persona_steer.lm.models.hub_problem", lambda: "it cannot be reached")
    with pytest.raises(PersonaError, match="'some/model' is not in the local cache.*cannot be reached.*a GGUF file"):
        load_model("some/model")


def test_the_hub_is_asked_before_it_is_called_well(monkeypatch):
    from persona_steer.app.doctor import _hub
    from persona_steer.base.http_client import hub_problem

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert hub_problem() == "it cannot be reached" == _hub().found and _hub().fix
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_problem() == "HF_HUB_OFFLINE is set"


def test_a_prompt_longer_than_the_context_is_refused(llama):
    from persona_steer.lm.generation import SamplingParams, generate

    with pytest.raises(PersonaError, match=r"\d+ tokens and its answer may have 20, but llama has a context of 256"):
        generate(llama, [llama.prompt("Why? " * 200)], SamplingParams(20), progress=False)
