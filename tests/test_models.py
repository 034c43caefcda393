"""Block lookup, chat templates, loading by name."""
import pytest
import torch
import transformers as tf

from conftest import CONFIGS
from persona_steer.core import PersonaError, data_path, pick_dtype
from persona_steer.generation import encode_pair
from persona_steer.models import find_blocks, fold_system, has_system_role, load_model, locate


def test_blocks_are_found_in_every_family(family):
    assert len(family.blocks) == 3 and family.n_layers == 3 and family.hidden_size == 32
    assert family.model.get_submodule(next(n for n, m in family.model.named_modules() if m is family.trunk)) is family.trunk


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


GEMMA = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}")
DROPS = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"


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
    t.train_from_iterator(["a\n\nb\n\n"] * 50, trainers.BpeTrainer(special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=300))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return tf.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="<s>", chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}")


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
    with pytest.raises(PersonaError, match="dtype"):
        pick_dtype(torch.device("cpu"), "float7")


@pytest.mark.parametrize("name", ["./nothing/here", "/no/such/model", "no_such_model", "a/b/c"])
def test_a_path_that_does_not_exist_is_one_sentence(name):
    with pytest.raises(PersonaError, match="does not exist") as e:
        load_model(name)
    assert "\n" not in str(e.value)


def test_names(tmp_path):
    assert locate("pocket") == str(data_path("pocket/chat")) and locate("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(PersonaError, match="no config.json"):
        locate(str(tmp_path))


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
    from persona_steer.models import fingerprint
    assert fingerprint(again.model) != llama.fingerprint
