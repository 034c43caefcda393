"""Results of different models, seeds and names never replace one another, and no name leads out of its folder."""

from dataclasses import replace

import pytest
import torch

from persona_steer.base.cache import own_results
from persona_steer.base.core import PersonaError, check_name, digest, load_json, project_root, save_json
from persona_steer.evaluation import sweep_rows
from persona_steer.extraction import extract, extraction_folder
from persona_steer.jobs.batch import batch_folder, has_its_results, jobs_of
from persona_steer.judges.loading import load_judge
from persona_steer.lm.activations import steer
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


CLAIM = "from persona_steer.base.cache import own_results\nfrom persona_steer.base.core import save_json\n"


def test_a_chapter_that_runs_again_with_other_parameters_keeps_its_earlier_results(tmp_path):
    import nbformat
    import papermill
    from nbformat.v4 import new_code_cell, new_notebook

    first = new_code_cell(
        f'trait: str = "evil"\nn: int = 1\nout: str = "{tmp_path}"', metadata={"tags": ["parameters"]}
    )
    job = new_code_cell(CLAIM + 'save_json(own_results(out, "model") / "summary.json", {"n": n})')
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[first, job], metadata=kernel), tmp_path / "a.ipynb")
    (tmp_path / "notes.txt").write_text("the user's own")

    def run(**given):
        papermill.execute_notebook(
            tmp_path / "a.ipynb", tmp_path / "out.ipynb", given, kernel_name="python3", progress_bar=False
        )
        return sorted(load_json(p)["n"] for p in tmp_path.glob("earlier/*/summary.json"))

    assert run(n=1) == [] and run(n=1) == []
    assert load_json(tmp_path / "settings.json")["parameters"] == {"trait": "evil", "n": 1}
    assert run(n=2) == [1] and load_json(tmp_path / "summary.json")["n"] == 2
    assert run(n=1) == [1, 2] and load_json(tmp_path / "summary.json")["n"] == 1
    assert {p.name for p in tmp_path.iterdir()} >= {"notes.txt", "a.ipynb", "out.ipynb"}


def test_folders_and_records_of_a_batch_stay_where_they_are(tmp_path):
    own_results(tmp_path, 1)
    for name in ("filtered", "training-1", ".parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text("{}")
    for name in ("job.json", "families.csv"):
        (tmp_path / name).write_text("{}")
    own_results(tmp_path, 2)
    moved = {str(p.relative_to(tmp_path).relative_to(f"earlier/{p.parts[len(tmp_path.parts) + 1]}"))
             for p in tmp_path.glob("earlier/*/*")}  # fmt: skip
    assert moved == {"families.csv", "settings.json"}
    kept = {"earlier", "job.json", "settings.json", "filtered", "training-1", ".parts"}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_every_chapter_with_results_sets_earlier_ones_aside():
    """02 and 06 do so in the library or refuse; 11 writes nothing; 12 measures anew."""
    for path in sorted((project_root() / "nbs").glob("0*.ipynb")):
        source = path.read_text(encoding="utf-8")
        if path.stem not in ("02_extract", "06_finetune"):
            assert "= own_results(" in source, path.name


def test_vectors_have_a_key_of_their_values():
    one = PersonaVectors("evil", *torch.randn(3, 5, 8))
    assert one.content_hash == PersonaVectors("other", one.prompt_avg, one.response_avg, one.prompt_last).content_hash
    assert one.content_hash != (2.0 * one).content_hash


def test_vectors_of_different_models_are_not_added():
    one, other = (PersonaVectors("evil", *torch.randn(3, 5, width)) for width in (8, 16))
    for add in (lambda: one + other, lambda: one - other):
        with pytest.raises(PersonaError, match=r"\[5, 8\].*\[5, 16\].*cannot be added"):
            add()


def test_steering_takes_a_tensor_and_says_so(pocket):
    with pytest.raises(PersonaError, match=r"not PersonaVectors; take one of its three, such as \.response_avg"):
        steer(pocket, PersonaVectors("evil", *torch.randn(3, 5, 8)), 1)
    with pytest.raises(PersonaError, match="not str"):
        steer(pocket, "evil", 1)


def test_one_layer_is_a_list_of_one():
    assert sweep_rows(["a?"], 3, 2.0).equals(sweep_rows(["a?"], [3], [2.0]))


def test_a_folder_named_like_a_built_in_model_is_not_that_model(tmp_path, monkeypatch):
    """Such as nbs/pocket, seen from nbs/."""
    from persona_steer.base.core import BUILT_IN, model_source
    from persona_steer.lm.gguf_files import PACKAGED

    assert set(BUILT_IN) == {"pocket", *PACKAGED}
    monkeypatch.chdir(tmp_path)
    for name in (*BUILT_IN, "mine"):
        (tmp_path / name).mkdir()
    assert [model_source(name) for name in (*BUILT_IN, "mine")] == [*BUILT_IN, str((tmp_path / "mine").resolve())]
