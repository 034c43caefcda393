"""Vectors on the hub: a push and a pull over a real socket, the card as it arrives, one sentence for each failure."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, Repo, hub_serving

from persona_steer.base.core import PersonaError, save_json
from persona_steer.lm.activations import POOLS
from persona_steer.persona.hub import files_to_push, pull_vectors, push_vectors, repository_files
from persona_steer.persona.model_card import model_card, public
from persona_steer.persona.vectors import PersonaVectors, load_vectors, save_vectors

KEY = "sk-0123456789abcdefghij"
FACTS = dict(
    model="pocket",
    hook_site="output of the block",
    pairs_made=100,
    pairs_kept=93,
    judge="a judge on http://10.1.2.3:8000/v1",
    threshold=50,
    min_coherence=50,
    sampling={"temperature": 1.0, "seed": 7},
    csv=["/home/ada/secret project/pos.csv"],
    engine="node7.cluster.local:8000/v1",
    api_key=KEY,
    platform="Linux-ada",
    versions={"torch": "2.13.0"},
    time="2026-11-01T00:00:00+00:00",
)


def vectors_of(trait, seed=0, shape=(7, 192), fingerprint="f" * 12, **facts):
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randn(shape, generator=rng) for _ in POOLS]
    return PersonaVectors(trait, *rows, FACTS | dict(trait=trait, fingerprint=fingerprint) | facts)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in POOLS)


COLUMNS = [f"{m}{k}" for m in ("trait", "coherence") for k in ("", "_low", "_high", "_n")]
REPORT = f"""condition,layer,coefficient,{",".join(COLUMNS)}
unsteered,3,0.0,6.4,0.1,16.5,20,96.6,94.0,98.8,20
steered,3,1.25,88.8,78.3,96.8,20,95.5,93.5,97.2,20
steered,3,3.0,11.1,1.0,2.0,20,33.3,3.0,4.0,20
"""


@pytest.fixture
def run(tmp_path):
    """A model's folder below runs/: evil with results of chapters 02 and 04, humorous without."""
    root = tmp_path / "runs" / "pocket"
    evil = vectors_of("evil")
    save_vectors(evil, root / "evil" / "02_extract")
    save_vectors(vectors_of("humorous", 1), root / "humorous" / "02_extract")
    save_json(root / "evil/02_extract/summary.json", {"AUC of the judge": [0.987, 0.961, 0.999]})
    choice = dict(layer=3, coefficient=1.25, content_hash=evil.content_hash, pool="response_avg")
    save_json(root / "evil/04_evaluate/choice.json", choice)
    (root / "evil/04_evaluate/report_summary.csv").write_text(REPORT)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client takes for its own, with an empty cache; large files go over HTTP."""
    from huggingface_hub import constants

    with hub_serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def refused(words, f, *args, **kw):
    """One sentence with these words, without the token, raised as a `PersonaError`."""
    with pytest.raises(PersonaError, match=words) as e:
        f(*args, **kw)
    text = str(e.value)
    assert "\n" not in text and TOKEN not in text and text.endswith((".", ")")) and len(text) < 240
    return text


def test_vectors_come_back_equal_to_the_bit_in_one_commit(hub, run, tmp_path):
    address = push_vectors(run, "ada/vectors", license="mit")
    commits = hub.repos["ada/vectors"].branches["main"]
    assert len(commits) == 2 and address.startswith(f"{hub.url}/ada/vectors/commit/")
    expected = {"README.md", ".gitattributes", *repository_files("evil"), *repository_files("humorous")}
    assert set(commits[-1]) == expected
    folder = pull_vectors("ada/vectors")
    for trait in ("evil", "humorous"):
        assert same(load_vectors(folder, trait), load_vectors(run / trait / "02_extract", trait))
    # a copy, and one trait alone into another cache: the other's files are not fetched
    out = pull_vectors("ada/vectors", out=tmp_path / "mine")
    assert same(load_vectors(out, "evil"), load_vectors(folder, "evil")) and not (out / "README.md").exists()
    hub.requests.clear()
    pull_vectors("ada/vectors", ["evil"], cache_dir=tmp_path / "other")
    assert hub.fetched() == set(repository_files("evil"))


def test_the_card_says_what_the_files_of_the_run_say(hub, run):
    push_vectors(run, "ada/vectors", license="mit", base_model="org/model")
    card = hub.repos["ada/vectors"].branches["main"][-1]["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "org/model" and head["library_name"] == "persona_steer" and head["license"] == "mit"
    for told in ("93 / 100", "0.987 [0.961, 0.999]", "88.8 [78.3, 96.8] (n=20)", "seed 7", "torch 2.13.0", "7 x 192"):
        assert told in card, told
    assert "11.1" not in card  # another coefficient than the chosen one
    assert load_vectors(pull_vectors("ada/vectors"), "evil").metadata["measured"]["extraction"]
    # figures of other vectors are not told
    choice = run / "evil/04_evaluate/choice.json"
    save_json(choice, json.loads(choice.read_text()) | {"content_hash": "of another"})
    assert "88.8" not in files_to_push(run, "ada/vectors")["README.md"].decode()


def test_nothing_of_this_machine_is_sent(hub, run):
    push_vectors(run, "ada/vectors")
    sent = b"\n".join([*hub.received, *hub.large.values(), *hub.repos["ada/vectors"].branches["main"][-1].values()])
    for private in ("/home/ada", "secret project", "10.1.2.3", "node7", KEY, "Linux-ada", str(run), TOKEN):
        assert private.encode() not in sent, private
    assert b'"pos.csv"' in sent and b"a judge on a server" in sent
    assert public(["data/x.csv", "../up/model", "and/or", "~/m/x"]) == ["x.csv", "model", "and/or", "x"]


def test_the_example_of_the_card_runs(hub, run, pocket, capsys):
    save_vectors(vectors_of("evil", fingerprint=pocket.fingerprint), run / "evil/02_extract", overwrite=True)
    push_vectors(run, "ada/vectors")
    card = hub.repos["ada/vectors"].branches["main"][-1]["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    names = {}
    exec(code, names)
    assert same(names["vectors"], load_vectors(run / "evil/02_extract", "evil"))
    assert "layers=3, coefficients=1.25" in code and "evil in ada/vectors was made" not in capsys.readouterr().out
    other = vectors_of("evil", shape=(5, 192))
    save_vectors(other, run / "evil/02_extract", overwrite=True)
    push_vectors(run, "ada/small", ["evil"])
    refused(r"\[5, 192\], but pocket needs \[7, 192\]", pull_vectors, "ada/small", lm=pocket)
    pull_vectors("ada/vectors", ["humorous"], lm=pocket)
    assert "humorous in ada/vectors was made on other weights" in capsys.readouterr().out


def test_a_trait_that_is_added_leaves_the_others(hub, run):
    push_vectors(run, "ada/vectors", ["evil"])
    stored = len(hub.large)
    push_vectors(run, "ada/vectors", ["humorous"])
    files = hub.repos["ada/vectors"].branches["main"][-1]
    card = files["README.md"].decode()
    assert "| evil | mean difference | 93 / 100" in card and "| humorous | mean difference | 93 / 100" in card
    assert "88.8 [78.3, 96.8]" in card and set(repository_files("evil")) < set(files) and len(hub.large) == stored + 3
    push_vectors(run, "ada/vectors")  # nothing is new
    assert len(hub.repos["ada/vectors"].branches["main"]) == 3 or hub.repos["ada/vectors"].branches["main"][-1] == files


def test_two_pushes_at_once_do_not_undo_each_other(hub, run):
    push_vectors(run, "ada/vectors", ["evil"])
    commits = hub.repos["ada/vectors"].branches["main"]
    hub.meanwhile = lambda: commits.append(commits[-1] | {"notes.txt": b"by somebody else"})
    refused("has changed meanwhile: push again", push_vectors, run, "ada/vectors", ["humorous"])
    assert "humorous_vectors.json" not in commits[-1]


def test_records_that_others_put_there_do_not_stop_a_push(hub, run):
    raw = (run / "evil/02_extract/evil_vectors.json").read_bytes()
    hub.repos["ada/vectors"] = Repo()
    commits = hub.repos["ada/vectors"].branches["main"]
    commits.append(commits[-1] | {"evil_vectors.json": raw, "rude_vectors.json": b"{}"})
    push_vectors(run, "ada/vectors", ["humorous"])
    card = commits[-1]["README.md"].decode()
    assert "| evil | mean difference | 93 / 100" in card and "| rude | made elsewhere, not recorded" in card
    commits.append(commits[-1] | {"rude_vectors.json": b"[1]"})
    refused("rude_vectors.json in ada/vectors is no record", push_vectors, run, "ada/vectors", ["humorous"])


def test_revisions_and_private_repositories(hub, run, monkeypatch, tmp_path):
    push_vectors(run, "ada/vectors", ["evil"], private=True)
    push_vectors(run, "ada/vectors", ["humorous"], revision="wip")
    assert hub.repos["ada/vectors"].private
    assert not (pull_vectors("ada/vectors") / "humorous_vectors.json").exists()
    assert (pull_vectors("ada/vectors", revision="wip") / "humorous_vectors.json").exists()
    refused("no revision 'nope'", pull_vectors, "ada/vectors", revision="nope")
    hub.repos["ada/open"] = Repo()
    refused("ada/open exists already and is public", push_vectors, run, "ada/open", private=True)
    assert len(hub.repos["ada/open"].branches["main"]) == 1
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no repository ada/vectors, or it is private", pull_vectors, "ada/vectors", cache_dir=tmp_path)


def test_what_others_made_is_not_replaced(hub, run, tmp_path):
    push_vectors(run, "ada/vectors", ["evil"])
    save_vectors(vectors_of("evil", 5, fingerprint="0" * 12), tmp_path / "new")
    refused("holds vectors of evil of another model", push_vectors, tmp_path / "new", "ada/vectors")
    hub.repos["ada/other"] = Repo()
    hub.repos["ada/other"].branches["main"].append({"README.md": b"# My model"})
    refused("README of other origin", push_vectors, run, "ada/other")
    assert hub.repos["ada/other"].files("main")["README.md"] == b"# My model"
    push_vectors(run, "ada/other", overwrite=True)
    # nor are vectors on this machine
    save_vectors(vectors_of("evil", 9), tmp_path / "here")
    refused("holds other vectors of evil", pull_vectors, "ada/vectors", out=tmp_path / "here")
    assert same(load_vectors(tmp_path / "here", "evil"), vectors_of("evil", 9))


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmful",)


def test_files_that_are_not_what_they_say_are_refused(hub, run, tmp_path):
    push_vectors(run, "ada/vectors", ["evil"])
    files = hub.repos["ada/vectors"].branches["main"][-1]
    good = dict(files)
    torch.save(torch.ones(7, 192), tmp_path / "x.pt")
    for name, content, words in (
        ("evil_prompt_avg_diff.pt", (tmp_path / "x.pt").read_bytes(), "differ from their record"),
        ("evil_prompt_last_diff.pt", b"not a tensor", "no tensor file that can be loaded safely"),
    ):
        hub.repos["ada/vectors"].branches["main"].append(good | {name: content})
        refused(words, pull_vectors, "ada/vectors", cache_dir=tmp_path / words[:6])
    torch.save(Harmful(), tmp_path / "x.pt")
    harm = {"evil_response_avg_diff.pt": (tmp_path / "x.pt").read_bytes()}
    hub.repos["ada/vectors"].branches["main"].append(good | harm)
    refused("loaded safely", pull_vectors, "ada/vectors", cache_dir=tmp_path / "harm")
    assert not Path("harmful").exists()
    save_vectors(vectors_of("flat") * float("nan"), tmp_path / "nan")
    refused("not finite", push_vectors, tmp_path / "nan", "ada/nan")


def test_without_a_network_the_cache_serves(hub, run, monkeypatch, tmp_path):
    from huggingface_hub import constants

    push_vectors(run, "ada/vectors", ["evil"])
    folder = pull_vectors("ada/vectors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_vectors("ada/vectors") == folder and pull_vectors("ada/vectors", ["evil"]) == folder
    refused("HF_HUB_OFFLINE is set", pull_vectors, "ada/unknown")
    refused("HF_HUB_OFFLINE is set", push_vectors, run, "ada/vectors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nowhere = "http://127.0.0.1:9"
    assert pull_vectors("ada/vectors", endpoint=nowhere) == folder
    refused("hub cannot be reached for ada/unknown", pull_vectors, "ada/unknown", endpoint=nowhere)
    refused("hub cannot be reached for ada/vectors", push_vectors, run, "ada/vectors", endpoint=nowhere)


@pytest.mark.parametrize(
    "where, status, words",
    [
        ("/api/repos/create", 401, "refuses the token"),
        ("/api/repos/create", 500, r"has a problem \(status 500\)"),
        ("/commit/", 403, "may not do this in ada/vectors"),
        ("/commit/", 412, "has changed meanwhile: push again"),
        ("/commit/", 500, r"has a problem \(status 500\)"),
        ("/large/", 403, "may not do this in ada/vectors"),
    ],
)
def test_a_push_that_fails_says_why_in_one_sentence(hub, run, where, status, words):
    hub.faults[where] = status
    refused(words, push_vectors, run, "ada/vectors")
    assert not any("README.md" in c for r in hub.repos.values() for c in r.branches["main"])


def test_a_storage_that_does_not_answer_is_told(hub, run, monkeypatch):
    """Large files go through hf_xet where it is installed; this hub has no such storage."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    refused("storage cannot be reached for ada/vectors.*HF_HUB_DISABLE_XET=1", push_vectors, run, "ada/vectors")
    assert "evil_vectors.json" not in hub.repos["ada/vectors"].files("main")


def test_a_pull_that_fails_says_why_in_one_sentence(hub, run, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
    for status, words in ((401, "refuses the token"), (500, "status 500"), (429, "asks to wait")):
        hub.faults["/api/models/"] = status
        refused(words, pull_vectors, "ada/vectors")
    hub.faults.clear()
    refused("there is no repository ada/unknown", pull_vectors, "ada/unknown")
    hub.repos["ada/empty"] = Repo()
    refused("holds no vectors", pull_vectors, "ada/empty")
    push_vectors(run, "ada/vectors", ["evil"])
    refused("no vectors of rude; it has evil", pull_vectors, "ada/vectors", ["rude"])
    hub.faults["/resolve/"] = 500
    refused("status 500", pull_vectors, "ada/vectors")
    for name in ("vectors", "a/b/c", "ada/", "/tmp", "ada/vec tors"):
        refused("name is user/name", pull_vectors, name)


def test_a_push_is_refused_before_anything_is_sent(hub, run, tmp_path, monkeypatch):
    refused("no vectors in", push_vectors, tmp_path, "ada/vectors")
    refused("is no folder", push_vectors, tmp_path / "nowhere", "ada/vectors")
    refused("no vectors of rude; it has evil, humorous", push_vectors, run, "ada/vectors", ["rude"])
    monkeypatch.delenv("HF_TOKEN")
    refused("log in with 'hf auth login', or set HF_TOKEN", push_vectors, run, "ada/vectors")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused("refuses the card", push_vectors, run, "ada/vectors", license="my licence")


def test_vectors_that_were_made_elsewhere_have_a_card(tmp_path):
    save_vectors(vectors_of("evil"), tmp_path)
    (tmp_path / "evil_vectors.json").unlink()
    card = files_to_push(tmp_path, "ada/vectors")["README.md"].decode()
    assert "made elsewhere, not recorded" in card and "What was measured" not in card and "base_model" not in card
    refused("at least one trait", model_card, {}, "ada/vectors")
    deep = {"evil": dict(model="smollm2", shape=[31, 576])}
    told = model_card(deep, "ada/vectors")
    assert "layers=20, coefficients=1.5" in told and "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in told


def command(capsys, monkeypatch, *args):
    """What a command prints, and its exit status or the sentence that it ends with."""
    from persona_steer.app.cli import main

    monkeypatch.setattr(sys, "argv", ["persona-steer", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    return told.out, end.value.code


def test_the_commands(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    out, code = command(capsys, monkeypatch, "push", run, "ada/vectors", "--dry-run", "--license", "mit")
    assert code == 0 and hub.requests == [] and "bytes  evil_response_avg_diff.pt" in out and "93 / 100" in out
    _, code = command(capsys, monkeypatch, "push", run, "ada/vectors")
    assert "log in with" in code and "\n" not in code
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out, code = command(capsys, monkeypatch, "push", run, "ada/vectors", "--trait", "evil", "--private")
    assert code == 0 and out.startswith(f"{hub.url}/ada/vectors/commit/") and hub.repos["ada/vectors"].private
    out, code = command(capsys, monkeypatch, "pull", "ada/vectors", tmp_path / "out")
    assert code == 0 and "vectors of evil" in out
    assert same(load_vectors(tmp_path / "out", "evil"), load_vectors(run / "evil/02_extract", "evil"))


def test_a_process_of_its_own_takes_the_hub_from_its_environment(run, tmp_path):
    """With a wrong token: one line, without a traceback, and the token is not in it."""
    with hub_serving() as server:
        env = dict(
            HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path), HF_TOKEN="hf_WrongToken0123456789"
        )
        program = [sys.executable, "-c", "from persona_steer.app.cli import main; main()"]
        r = subprocess.run(
            [*program, "push", str(run), "ada/vectors"], capture_output=True, text=True, env=os.environ | env
        )
    assert r.returncode == 1 and "refuses the token" in r.stderr and r.stderr.count("\n") == 1, r.stderr
    assert "hf_Wrong" not in r.stdout + r.stderr and server.repos == {}
