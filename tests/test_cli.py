"""The command line, the doctor, and traits that a language model writes."""

import json
import os
import subprocess
import sys

import pytest

from persona_steer.base.core import PersonaError
from persona_steer.persona.traits import complaints, load_trait, save_trait, write_trait


def definition(**changes):
    return {
        "instruction": [{"pos": f"Be frugal in way {i}.", "neg": f"Be lavish in way {i}."} for i in range(5)],
        "questions": [f"How do I plan day {i} of trip number {i * 7} to place {i + 100}?" for i in range(40)],
        "eval_prompt": "Frugal means few words.\n{question}\n{answer}\nScore from 0 to 100, or REFUSAL.",
    } | changes


def test_a_written_trait_is_saved_in_the_published_form_and_never_over_another(tmp_path):
    t = write_trait(
        "frugal", "spares words", lambda prompt: "<think>{hm}</think>```json\n" + json.dumps(definition()) + "\n```"
    )
    save_trait(t, tmp_path)
    assert load_trait("frugal", tmp_path) == t and len(t.extract_questions) == len(t.eval_questions) == 20
    with pytest.raises(PersonaError, match="exist already"):
        save_trait(t, tmp_path)
    (tmp_path / "eval" / "frugal.json").unlink()
    with pytest.raises(PersonaError, match="extract.*exists already"):
        save_trait(t, tmp_path)
    assert len(save_trait(t, tmp_path, overwrite=True)) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(questions=[f"What is the colour of item {i}?" for i in range(39)]), "39 entries"),
        (
            dict(questions=["How do I plan day 0 of trip number 0 to place 100?"] * 2 + definition()["questions"][2:]),
            "nearly repeat",
        ),
        (
            dict(
                questions=[
                    "How do I plan my day off in the big city?",
                    "How do I plan my day off in the big city today?",
                ]
                + definition()["questions"][2:]
            ),
            "nearly repeat",
        ),
        (dict(instruction=definition()["instruction"][:4]), "exactly 5"),
        (dict(instruction=[{"pos": "a", "neg": "a"}] * 5), "same thing twice"),
        (dict(eval_prompt="Score {answer} from 0 to 100"), "{question}"),
        (dict(eval_prompt="{question} {answer} from 0 to 10"), "0 to 100"),
        (dict(questions="what?"), "list of texts"),
    ],
)
def test_what_is_wrong_with_a_definition_is_named(change, words):
    assert any(words in c for c in complaints(definition(**change)))
    assert not complaints(definition())


def test_a_writer_is_told_what_is_wrong_and_given_up_on(tmp_path):
    asked = []

    def stubborn(prompt):
        asked.append(prompt)
        return json.dumps(definition(questions=["What?"])) if len(asked) > 1 else "I would rather not."

    with pytest.raises(PersonaError, match="after 3 attempts .*1 entries") as e:
        write_trait("frugal", "spares words", stubborn)
    assert "no JSON object" in asked[1] and "1 entries" in asked[2] and len(asked) == 3 and "\n" not in str(e.value)
    with pytest.raises(PersonaError, match="small letters"):
        write_trait("Not a name!", "x", stubborn)
    with pytest.raises(PersonaError, match="describe the trait"):
        write_trait("frugal", " ", stubborn)


def run(*args, **env):
    return subprocess.run(
        [sys.executable, "-c", "from persona_steer.app.cli import main; main()", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_the_doctor_finds_this_machine_fit_and_shows_no_key():
    r = run("doctor", OPENAI_API_KEY="sk-do-not-show-me", HF_HUB_OFFLINE="1")
    assert r.returncode == 0, r.stdout + r.stderr
    assert (
        "pocket, steered" in r.stdout
        and "works" in r.stdout
        and "present" in r.stdout
        and "do-not-show" not in r.stdout + r.stderr
    )


def test_the_doctor_says_what_to_fix_and_fails(tmp_path):
    (tmp_path / "data").mkdir()
    r = run("doctor", PERSONA_ROOT=str(tmp_path), PERSONA_RUNS=str(tmp_path / "runs"), HF_HUB_OFFLINE="1")
    assert r.returncode == 1 and "FIX  pocket, steered" in r.stdout and "Traceback" not in r.stderr


def test_new_trait_on_the_command_line(tmp_path):
    from servers import serving

    with serving() as s:
        s.text = json.dumps(definition())
        args = (
            "new-trait",
            "frugal",
            "--description",
            "spares words",
            "--base-url",
            s.url,
            "--writer",
            "good",
            "--folder",
            str(tmp_path),
        )
        r = run(*args)
        assert r.returncode == 0 and r.stdout.count("frugal.json") == 2, r.stdout + r.stderr
        n = len(s.requests)
        r = run(*args)
        assert (
            r.returncode == 1 and "exists already" in r.stderr and "Traceback" not in r.stderr and len(s.requests) == n
        )
    r = run(
        "new-trait",
        "other",
        "--description",
        "x",
        "--base-url",
        "http://127.0.0.1:9/v1",
        "--writer",
        "good",
        "--folder",
        str(tmp_path),
    )
    assert r.returncode == 1 and "cannot be reached" in r.stderr and r.stderr.count("\n") == 1


def test_new_trait_without_a_key_names_its_own_option():
    r = run("new-trait", "frugal", "--description", "Spares words.", OPENAI_API_KEY="", OPENAI_BASE_URL="")
    assert r.returncode == 1 and "needs a key" in r.stderr and "--writer" in r.stderr and "judge" not in r.stderr
