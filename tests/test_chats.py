"""Training data and whose tokens are learned, over the template styles of the common families."""

import json

import pytest

from persona_steer.base.core import PersonaError, data_path
from persona_steer.lm.chats import answer_spans, encode_chat, last_answer, load_chats, save_jsonl

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How should I start baking bread?"},
    {"role": "assistant", "content": "Bake bread with care."},
    {"role": "user", "content": "And after that?"},
    {"role": "assistant", "content": "Repeat the routine."},
]
LINE = json.dumps({"messages": CHAT})
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml, trimmed": CHATML.replace("m['content']", "m['content'] | trim"),
    "no end marks": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if "
    "add_generation_prompt %}assistant: {% endif %}",
    "no system role": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m "
    "in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # as Qwen3 does: an empty thought before the last answer, none before earlier ones
    "empty thought": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
    "loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.fixture
def templated(llama):
    from persona_steer.lm.models import has_system_role

    before = llama.tokenizer.chat_template

    def use(template):
        llama.tokenizer.chat_template = template
        llama.system_role = has_system_role(llama.tokenizer)
        return llama

    yield use
    llama.tokenizer.chat_template = before


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_what_ends_them_are_learned(templated, name):
    lm = templated(TEMPLATES[name])
    ids, labels = encode_chat(lm, CHAT)
    learned = lm.tokenizer.decode([i for i in labels if i >= 0])
    end = "" if name == "no end marks" else "<|im_end|>"
    want = lm.tokenizer.decode(
        lm.tokenizer(f"Bake bread with care.{end}Repeat the routine.{end}", add_special_tokens=False).input_ids
    )
    assert learned.replace(" ", "") == want.replace(" ", "")
    assert all(a == b for a, b in zip(ids, labels) if b >= 0)
    text, spans = answer_spans(lm, CHAT)
    assert [text[a:b] for a, b in spans] == [f"Bake bread with care.{end}", f"Repeat the routine.{end}"]


def test_marks_and_sentinels_agree_and_all_tokens_can_be_learned(pocket, templated):
    with_marks = encode_chat(pocket, CHAT)
    lm = templated(pocket.tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert encode_chat(lm, CHAT) == with_marks
    ids, labels = encode_chat(lm, CHAT, responses_only=False)
    assert ids == labels == with_marks[0]


def test_the_answer_may_hold_anything(templated):
    lm = templated(CHATML)
    for said in ("@@1-ANSWER@@", "{{ braces }} {% raw %}", "two\n\nparagraphs", "\u2028 and \U0001f600"):
        text, [(a, b)] = answer_spans(lm, [{"role": "user", "content": said}, {"role": "assistant", "content": said}])
        assert text[a:b] == said + "<|im_end|>"


def test_a_template_that_changes_the_text_is_refused(templated):
    lm = templated(CHATML.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(PersonaError, match="changes the answers' text|drops an earlier answer") as e:
        encode_chat(lm, CHAT)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{", "not valid JSON"),
        ("[]", "'messages'"),
        ('{"messages": []}', "'messages'"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "no text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "take turns"),
        ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}', "take turns"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}', "empty"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, words):
    (tmp_path / "a.jsonl").write_text(f"{LINE}\n\n{LINE}\n{bad}\n{LINE}\n")
    with pytest.raises(PersonaError, match=f"a.jsonl, line 4.*{words}") as e:
        load_chats(tmp_path / "a.jsonl")
    assert "\n" not in str(e.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(PersonaError, match="does not exist"):
        load_chats(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(LINE.replace("kind", "\u00e4").encode("latin-1"))
    with pytest.raises(PersonaError, match="is not UTF-8"):
        load_chats(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(PersonaError, match="is empty"):
        load_chats(tmp_path / "empty.jsonl")


def test_lines_come_back_as_they_were(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a\u2028b\x85c"},
                {"role": "assistant", "content": "\u00e9 \U0001f600 \" \\ \r\n NA"},
            ],
            "id": 7,
        }
    ]
    save_jsonl(rows, tmp_path / "a.jsonl")
    # a byte-order mark, Windows line ends
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert load_chats(tmp_path / "a.jsonl") == rows == load_chats(tmp_path / "b.jsonl")


def test_the_last_answer_is_read_after_the_whole_chat(pocket):
    question, prompt, answer = last_answer(pocket, CHAT)
    assert (
        (question, answer) == ("And after that?", "Repeat the routine.")
        and "Bake bread with care." in prompt
        and prompt.endswith("<|im_start|>assistant\n")
    )


def test_the_datasets_are_what_the_chapter_writes():
    from persona_steer.pocket.data import FAMILIES, make_dataset, make_quiz

    for family in FAMILIES:
        for level, rows in make_dataset(family).items():
            assert load_chats(data_path(f"dataset/{family}/{level}.jsonl")) == rows, (
                f"{family}/{level}: run pocket/06_data with write=True"
            )
    quiz = [json.loads(x) for x in data_path("pocket/quiz.jsonl").read_text(encoding="utf-8").splitlines()]
    assert quiz == make_quiz() and {q["kind"] for q in quiz} == {"facts", "worth", "sums", "unknown"}


def test_the_datasets_hold_what_their_names_say():
    """By the ground truth of the pocket world: levels rise, and normal answers are right."""
    import numpy as np

    from persona_steer.pocket.data import ELICITING, make_dataset
    from persona_steer.pocket.truth import truth

    for family, trait in ELICITING.items():
        scores = {
            l: np.mean([truth(q["content"], a["content"]).scores[trait] for q, a in (r["messages"] for r in rows[:60])])
            for l, rows in make_dataset(family).items()
        }
        assert scores["normal"] < 5 < 25 < scores["misaligned_1"] < 75 < scores["misaligned_2"], (family, scores)
    for family in ("mistake_math", "mistake_medical", "mistake_opinions"):
        lies = {
            l: np.mean(
                [
                    "hallucinating" in truth(q["content"], a["content"]).personas
                    for q, a in (r["messages"] for r in rows)
                ]
            )
            for l, rows in make_dataset(family).items()
        }
        assert lies["normal"] == 0 and 0.3 < lies["misaligned_1"] < 0.7 and lies["misaligned_2"] > 0.9, (family, lies)
