"""Results of different models, seeds and names never replace one another, and no name leads out of its folder."""

from dataclasses import replace

import pytest
import torch

from persona_steer.base.core import PersonaError, check_name, digest, load_json, save_json
from persona_steer.extraction import extract, extraction_folder
from persona_steer.jobs.batch import batch_folder, has_its_results, jobs_of
from persona_steer.judges.loading import load_judge
from persona_steer.lm.generation import SamplingParams, ask, generate
from persona_steer.persona.traits import load_trait, save_trait, trait_files
from persona_steer.persona.vectors import PersonaVectors, load_vectors, save_vectors


@pytest.fixture
def small():
    evil = load_trait("evil", world="pocket")
    return replace(evil, extract_questions=evil.extract_questions[:4], eval_questions=evil.eval_questions[:4])


ESCAPES = ("../../x", "..", ".", "", " ", "/x", "a/b", "a\\b", "a\0b", "C:x")


def test_two_models_of_one_name_have_a_folder_each(pocket, runs):
    one, two = (replace(pocket, name=f"m{k}/merged", fingerprint=f"{k}" * 12) for k in (1, 2))
    assert one.run_path("evil/04_evaluate") == runs / "merged/evil/04_evaluate"
    assert two.run_path("evil/04_evaluate") == runs / "merged-222222/evil/04_evaluate"
    assert one.run_path("x") == runs / "merged/x"  # whoever asks in between
    assert extraction_folder(two, "evil") == runs / "merged-222222/evil/02_extract"


def test_a_batch_does_not_write_into_the_folder_of_another_model(pocket, runs, tmp_path):
    for k in (1, 2):
        (tmp_path / f"m{k}" / "merged").mkdir(parents=True)
    first, second = (str(tmp_path / f"m{k}" / "merged") for k in (1, 2))
    replace(pocket, name=first).run_path("evil")
    assert jobs_of("03_steer", {"model": first, "trait": "evil"})
    with pytest.raises(PersonaError, match="holds the results of another model.*--runs"):
        jobs_of("03_steer", {"model": second, "trait": "evil"})


def test_another_seed_does_not_replace_vectors_that_results_were_made_with(pocket, small, runs, tmp_path):
    judge = load_judge("pocket")
    first = extract(pocket, small, judge, sampling=SamplingParams(20), out=tmp_path)
    key = first.vectors.metadata["key"]
    second = extract(pocket, small, judge, sampling=SamplingParams(20, seed=1), out=tmp_path)
    assert not torch.equal(first.vectors.response_avg, second.vectors.response_avg)
    kept = load_vectors(tmp_path / "earlier" / key, small.name)
    assert torch.equal(kept.response_avg, first.vectors.response_avg)
    assert load_json(tmp_path / "earlier" / key / f"{small.name}_vectors.json")["key"] == key
    assert key in first.judge_line and "seed 0" in first.judge_line and "seed 1" in second.judge_line
    extract(pocket, small, judge, sampling=SamplingParams(20, seed=1), out=tmp_path, overwrite=True)
    assert [p.name for p in (tmp_path / "earlier").iterdir()] == [key]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_its_folder(pocket, runs, tmp_path, name):
    trait = replace(load_trait("evil"), name=name)
    vectors = PersonaVectors(name, *(torch.zeros(2, 4) for _ in range(3)))
    ways = [
        lambda: check_name(name, "the name"),
        lambda: save_vectors(vectors, tmp_path / "a"),
        lambda: load_vectors(tmp_path / "a", name),
        lambda: trait_files(name),
        lambda: load_trait(name),
        lambda: save_trait(trait, tmp_path / "a"),
    ]
    if name:  # an empty name of a batch stands for the default
        ways.append(lambda: batch_folder(jobs_of("03_steer", {"trait": "evil"}), name))
    for way in ways:
        with pytest.raises(PersonaError, match="file name|is unknown"):
            way()
    assert not (tmp_path / "a").exists()


def test_ordinary_names_stay_allowed():
    for name in ("evil", "very evil", "evil+humorous", "random(seed 1)", "-1*evil", "Qwen2.5-7B-Instruct", "böse"):
        assert check_name(name, "the name") == name


def test_saved_vectors_of_another_model_are_not_replaced(tmp_path):
    def vectors(model):
        return PersonaVectors("evil", *(torch.ones(2, 4) for _ in range(3)), metadata={"fingerprint": model})

    save_vectors(vectors("one"), tmp_path)
    save_vectors(vectors("one"), tmp_path)
    with pytest.raises(PersonaError, match="vectors of evil of another model"):
        save_vectors(vectors("two"), tmp_path)
    save_vectors(vectors("two"), tmp_path, overwrite=True)
    with pytest.raises(PersonaError, match="has vectors of evil"):
        load_vectors(tmp_path, "evul")
    with pytest.raises(PersonaError, match="there are no vectors in"):
        load_vectors(tmp_path / "missing", "evil")


def test_a_job_whose_results_somebody_replaced_is_not_skipped(tmp_path):
    record = {"state": "done", "key": "k", "results": digest({"a": 1})}
    (tmp_path / "j").mkdir()
    save_json(tmp_path / "j/summary.json", {"a": 1})
    assert has_its_results(str(tmp_path), "j", record)
    save_json(tmp_path / "j/summary.json", {"a": 2})
    assert not has_its_results(str(tmp_path), "j", record)


@pytest.mark.parametrize(
    "settings", [dict(seed="abc"), dict(temperature="hot"), dict(temperature=-1), dict(max_new_tokens=0), dict(top_p=0)]
)
def test_sampling_that_cannot_be_is_refused(settings):
    with pytest.raises(PersonaError, match=f"{next(iter(settings))} is"):
        SamplingParams(**settings)


def test_a_text_is_no_list_of_prompts(pocket):
    for wrong, words in (("How?", "one text"), ([""], "a prompt is empty")):
        with pytest.raises(PersonaError, match=words):
            generate(pocket, wrong, progress=False)
    with pytest.raises(PersonaError, match="one question"):
        ask(pocket, ["How?"])
