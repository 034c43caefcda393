"""Vectors in the files and objects of other tools: what goes out comes back to the bit, under the number that the other
tool gives the same block; what cannot be expressed is refused in one sentence."""

import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from persona_steer.base.core import PersonaError, load_json
from persona_steer.lm.activations import POOLS, steer
from persona_steer.lm.models import load_model
from persona_steer.persona.exchange import (
    Directions,
    named_rows,
    read_gguf,
    read_safetensors,
    read_tensor,
    write_gguf,
    write_safetensors,
)
from persona_steer.persona.peer_objects import (
    from_repeng,
    from_steering_vectors,
    repeng_package,
    to_repeng,
    to_steering_vectors,
)
from persona_steer.persona.transfer import describe_import, export_vectors, import_vectors, read_vectors
from persona_steer.persona.vectors import PersonaVectors, load_vectors, save_vectors, vector_file
from persona_steer.serving.plugin import Served, engine_options
from persona_steer.serving.specification import parse_steering
from persona_steer.serving.tables import SteeringTables

gguf = pytest.importorskip("gguf")


def peer(name: str):
    """A package that CI must have, and other places may lack."""
    if importlib.util.find_spec(name) is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket")


@pytest.fixture
def made(pocket, tmp_path):
    """A folder with vectors of pocket, and the vectors."""
    rng = torch.Generator().manual_seed(0)
    shape = (pocket.n_layers + 1, pocket.hidden_size)
    about = {"model": "pocket", "fingerprint": pocket.fingerprint, "judge": "pocket", "pairs_kept": 9, "kept": [1, 2]}
    v = PersonaVectors("evil", *(torch.randn(shape, generator=rng) for _ in POOLS), about)
    save_vectors(v, tmp_path / "made")
    return tmp_path / "made", v


def control_vector(path, rows: dict, architecture="controlvector", **fields):
    """A GGUF file with these tensors."""
    w = gguf.GGUFWriter(str(path), architecture)
    for k, x in fields.items():
        w.add_string(f"controlvector.{k}", x)
    for name, row in rows.items():
        w.add_tensor(name, row)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


ONES = np.ones(192, np.float32)


def test_a_control_vector_names_each_row_by_its_block_from_0(made, tmp_path):
    folder, v = made
    said = " ".join(export_vectors(folder, tmp_path / "x.gguf", coefficient=1.5))
    assert "direction.1-5" in said and "the embedding (row 0) and layer 1" in said
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert list(found) == [f"direction.{b}" for b in range(1, 6)]
    for b in range(1, 6):
        assert np.array_equal(found[f"direction.{b}"], 1.5 * v.response_avg[b + 1].numpy())
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    about = json.loads(reader.get_field("persona_steer.metadata").contents())
    assert about["trait"] == "evil" and about["coefficient"] == 1.5 and "kept" not in about


def test_a_layer_without_a_name_is_refused_and_nothing_is_written(made, tmp_path):
    folder, v = made
    for layers, words in (
        ([1], "layer 1 has no name in a llama.cpp file: choose layers from 2 to 6"),
        ([7], "layer 7"),
    ):
        with pytest.raises(PersonaError, match=words):
            export_vectors(folder, tmp_path / "x.gguf", layers=layers)
    only = torch.full_like(v.response_avg, float("nan"))
    only[1] = v.response_avg[1]
    with pytest.raises(PersonaError, match="no layer that has a name in a llama.cpp file"):
        write_gguf(tmp_path / "x.gguf", only, "llama")
    with pytest.raises(PersonaError, match="layer 0 has no name in repeng"):
        to_repeng(v.response_avg, "llama", [0])
    assert not list(tmp_path.glob("*.gguf*"))
    assert list(named_rows(v.response_avg, [6, 2], 2)) == [2, 6]


def test_files_of_repeng_are_read_and_ours_are_read_by_repeng_to_the_bit(made, tmp_path):
    peer("repeng")
    folder, v = made
    repeng = repeng_package()
    export_vectors(folder, tmp_path / "ours.gguf")
    theirs = repeng.ControlVector.import_gguf(tmp_path / "ours.gguf")
    assert theirs.model_type == "llama" and sorted(theirs.directions) == [1, 2, 3, 4, 5]
    assert all(np.array_equal(d, v.response_avg[i + 1].numpy()) for i, d in theirs.directions.items())
    rng = np.random.default_rng(1)
    control = repeng.ControlVector("llama", {i: rng.standard_normal(192).astype(np.float32) for i in (0, 2, 5)})
    control.export_gguf(tmp_path / "theirs.gguf")
    found, about = read_gguf(tmp_path / "theirs.gguf")
    assert about == {"model_hint": "llama"} and sorted(found.rows) == [1, 3, 6]
    assert all(np.array_equal(found.rows[i + 1], d) for i, d in control.directions.items())


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_objects_of_repeng_steer_the_block_that_they_are_named_for_here(pocket, made):
    peer("repeng")
    ControlModel = repeng_package().ControlModel

    _, v = made
    control = to_repeng(v.response_avg, "llama", [2, 6], 0.5)
    assert sorted(control.directions) == [1, 5]
    back = from_repeng(control, pocket.n_layers)
    assert torch.equal(back[[2, 6]], 0.5 * v.response_avg[[2, 6]]) and back[[0, 1, 3, 4, 5]].isnan().all()
    ids = torch.arange(5, 25)[None]
    for l in (2, 6):
        with steer(pocket, v.response_avg, l, 0.5, positions="all"):
            want = logits(pocket.model, ids)
        wrapped = ControlModel(pocket.model, [l - 1])
        try:
            wrapped.set_control(control)
            assert torch.allclose(logits(wrapped, ids), want, atol=1e-5)
        finally:
            wrapped.reset()
            wrapped.unwrap()


def test_objects_of_steering_vectors_steer_the_block_that_they_are_named_for_here(pocket, made):
    peer("steering_vectors")
    _, v = made
    vector = to_steering_vectors(v.response_avg, [1, 6], 0.5)
    assert sorted(vector.layer_activations) == [0, 5]
    back = from_steering_vectors(vector, pocket.n_layers)
    assert torch.equal(back[[1, 6]], 0.5 * v.response_avg[[1, 6]]) and back[[0, 2, 3, 4, 5]].isnan().all()
    ids = torch.arange(5, 25)[None]
    for l in (1, 6):
        with steer(pocket, v.response_avg, l, 0.5, positions="all"):
            want = logits(pocket.model, ids)
        with to_steering_vectors(v.response_avg, [l], 0.5).apply(pocket.model):
            assert torch.allclose(logits(pocket.model, ids), want, atol=1e-5)
    vector.layer_type = "mlp"
    with pytest.raises(PersonaError, match="only 'decoder_block' is the residual stream"):
        from_steering_vectors(vector, pocket.n_layers)


def test_numbers_of_blocks_that_cannot_be_are_refused(pocket):
    peer("repeng")
    repeng = repeng_package()
    for directions, words in (
        ({-1: ONES}, "numbers of blocks, from 0"),
        ({6: ONES}, "direction for layer 7 but the model has 6 layers"),
        ({}, "holds no direction"),
        ({1: ONES, 2: ONES[:9]}, "different shapes"),
        ({1: ONES * np.nan}, "NaN or infinite values at layer 2"),
    ):
        with pytest.raises(PersonaError, match=words):
            from_repeng(repeng.ControlVector("llama", directions), pocket.n_layers)


def test_safetensors_hold_everything_and_say_what_it_is(made, tmp_path):
    from safetensors import safe_open

    folder, v = made
    export_vectors(folder, tmp_path / "x.safetensors")
    back = read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(getattr(back, k), getattr(v, k)) for k in POOLS)
    assert back.trait == "evil" and back.metadata == v.metadata
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        header = f.metadata()
    assert header["layer_convention"] == "row l = layer l, 1-based; row 0 = embedding"
    assert header["fingerprint"] == v.metadata["fingerprint"] and header["estimator"] == "mean_difference"


def test_an_import_is_what_every_chapter_reads(pocket, made, tmp_path):
    folder, v = made
    export_vectors(folder, tmp_path / "x.gguf")
    with pytest.raises(PersonaError, match="are of 'evil', not of 'wicked'"):
        import_vectors(tmp_path / "x.gguf", tmp_path / "a", "wicked", pocket)
    export_vectors(folder, tmp_path / "strong.gguf", coefficient=1.5)
    strong = import_vectors(tmp_path / "strong.gguf", tmp_path / "strong", "evil", pocket)
    assert "They are 1.5 times the extracted vectors" in describe_import(strong, "strong")
    own = import_vectors(folder / "evil_prompt_avg_diff.pt", tmp_path / "own", "evil", pocket)
    assert torch.equal(own.prompt_avg, v.prompt_avg) and own.response_avg.isnan().all()  # as its name says
    back = import_vectors(tmp_path / "x.gguf", tmp_path / "a", "evil", pocket)
    assert "times" not in describe_import(back, "a")
    back = load_vectors(tmp_path / "a", "evil")
    assert torch.equal(back.response_avg[2:], v.response_avg[2:]) and back.response_avg[:2].isnan().all()
    assert back.prompt_avg.isnan().all() and back.origin == "vectors of evil that were made elsewhere"
    about = back.metadata
    assert about["layers"] == {"response_avg": [2, 3, 4, 5, 6]} and about["imported_from"]["file"] == "x.gguf"
    assert about["imported_from"]["about"]["judge"] == "pocket" and about["fingerprint"] == pocket.fingerprint
    steer(pocket, back.response_avg, 2)
    with pytest.raises(PersonaError, match="NaN or infinite values at layer 1: choose another one"):
        steer(pocket, back.response_avg, 1)
    export_vectors(folder, tmp_path / "x.safetensors")
    whole = import_vectors(tmp_path / "x.safetensors", tmp_path / "b", "evil", pocket)
    assert all(torch.equal(getattr(whole, k), getattr(v, k)) for k in POOLS)


def test_a_served_vector_may_lack_layers_and_requests_for_them_are_refused(pocket, made, tmp_path):
    folder, _ = made
    export_vectors(folder, tmp_path / "x.gguf")
    import_vectors(tmp_path / "x.gguf", tmp_path / "a", "evil", pocket)
    options = engine_options({"evil": str(vector_file(tmp_path / "a", "evil", "response_avg"))})
    limits = Served(next(iter(options["additional_config"].values())), pocket.n_layers).limits
    assert limits.read({"steer": "evil:1@2", "monitor": "evil@3"})[0] == parse_steering("evil:1@2")
    for request in ({"steer": "evil:1@1"}, {"monitor": "evil@1"}):
        with pytest.raises(PersonaError, match="vector 'evil' has no values at layer 1"):
            limits.read(request)
    tables = SteeringTables(pocket.n_layers, pocket.hidden_size, torch.float32, "cpu", 8)
    matrix = load_vectors(tmp_path / "a", "evil").response_avg
    tables.add_vector("evil", matrix)
    assert bool(torch.isfinite(tables.probes).all())
    matrix[3, 0] = float("nan")
    with pytest.raises(PersonaError, match="holds NaN or infinite values"):
        tables.add_vector("evil", matrix)


def test_tensors_in_the_layout_of_assistant_axis_begin_with_block_0(pocket, made, tmp_path):
    _, v = made
    torch.save(v.response_avg[1:], tmp_path / "bare.pt")
    torch.save({"axis": v.response_avg[1:], "n_roles": 3}, tmp_path / "axis.pt")
    for name in ("bare.pt", "axis.pt"):
        back = import_vectors(tmp_path / name, tmp_path / name[:4], "evil", pocket, layout="assistant-axis")
        assert torch.equal(back.response_avg[1:], v.response_avg[1:]) and back.response_avg[0].isnan().all()
    with pytest.raises(PersonaError, match="is for 5 layers but pocket has 6"):  # nothing is guessed from the rows
        import_vectors(tmp_path / "bare.pt", tmp_path / "c", "evil", pocket)
    with pytest.raises(PersonaError, match="is for 7 layers but pocket has 6"):
        torch.save(v.response_avg, tmp_path / "published.pt")
        import_vectors(tmp_path / "published.pt", tmp_path / "c", "evil", pocket, layout="assistant-axis")
    assert read_tensor(tmp_path / "published.pt").matrix(6, 192)[0].tolist() == v.response_avg[0].tolist()


WRONG = [
    (lambda p: control_vector(p, {"direction.2": ONES}, "llama"), "architecture 'llama', not a control vector"),
    (lambda p: control_vector(p, {"direction.2": ONES[:64]}), "has width 64 but pocket has width 192"),
    (lambda p: control_vector(p, {"direction.6": ONES}), "direction for layer 7 but pocket has 6 layers"),
    (lambda p: control_vector(p, {}), "holds no direction"),
    (lambda p: control_vector(p, {"direction.2": ONES, "direction.02": ONES}), "two directions for layer 3"),
    (lambda p: control_vector(p, {"bias.2": ONES}), "the tensor 'bias.2', which is no direction"),
    (lambda p: control_vector(p, {"direction.-1": ONES}), "which is no direction"),
    (lambda p: control_vector(p, {"direction.2": ONES.astype(np.float16)}), "direction.2 is F16"),
    (lambda p: control_vector(p, {"direction.2": np.ones((2, 192), np.float32)}), "different shapes"),
    (lambda p: control_vector(p, {"direction.2": ONES}, easysteer='{"component": "attention_heads"}'), "steers 'att"),
    (lambda p: control_vector(p, {"direction.2": ONES}, easysteer="[]"), "metadata that is no JSON object"),
    (lambda p: p.write_bytes(b"not a model at all" * 9), "no complete GGUF file"),
    (lambda p: p.write_bytes(control_vector(p, {"direction.2": ONES}).read_bytes()[:-500]), "no complete GGUF file"),
    (lambda p: None, "does not exist"),
]


@pytest.mark.parametrize("make, words", WRONG)
def test_a_control_vector_that_cannot_be_used_is_one_sentence(pocket, tmp_path, make, words):
    make(tmp_path / "x.gguf")
    with pytest.raises(PersonaError, match=words) as e:
        import_vectors(tmp_path / "x.gguf", tmp_path / "a", "evil", pocket)
    assert "\n" not in str(e.value) and not (tmp_path / "a").exists()


def test_other_input_that_cannot_be_used_is_one_sentence(pocket, made, tmp_path):
    folder, v = made
    plain = tmp_path / "plain"
    plain.mkdir()
    bare = vector_file(plain, "evil", "response_avg")
    bare.write_bytes(vector_file(folder, "evil", "response_avg").read_bytes())
    save_file({"response_avg": v.response_avg}, tmp_path / "bare.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    write_safetensors(tmp_path / "far.safetensors", PersonaVectors("evil", *[v.response_avg] * 3, {"fingerprint": "0"}))
    import_vectors(tmp_path / "far.safetensors", tmp_path / "far", "evil", pocket, other_model=True)
    (tmp_path / "x.bin").write_bytes(b"x")
    for act, words in (
        (lambda: read_vectors(tmp_path / "bare.safetensors"), "no metadata that says which row is which layer"),
        (lambda: read_vectors(tmp_path / "cut.safetensors"), "no complete safetensors file"),
        (lambda: read_vectors(tmp_path / "x.bin"), "ending of x.bin stands for no format"),
        (lambda: read_vectors(tmp_path / "x.bin", format="zip"), "format 'zip' is unknown"),
        (lambda: read_vectors(tmp_path / "x.bin", "strange", format="pt"), "layout 'strange' is unknown"),
        (lambda: export_vectors(bare, tmp_path / "y.safetensors"), "nothing says which model"),
        (lambda: export_vectors(bare, tmp_path / "y.gguf"), "no metadata beside them.*--model-hint"),
        (lambda: export_vectors(folder, tmp_path / "x.bin", "pt"), "exists"),
        (lambda: export_vectors(folder, tmp_path / "y.pt", trait="kind"), "does not exist; .* has vectors of evil"),
        (lambda: export_vectors(folder, tmp_path / "z.gguf", coefficient=0), "coefficient 0 leaves no direction"),
        (lambda: export_vectors(folder, tmp_path / "z.pt", coefficient=float("nan")), "coefficient nan leaves no"),
        (lambda: export_vectors(tmp_path, tmp_path / "y.pt"), "no vector file"),
        (lambda: export_vectors(bare, tmp_path / "y.pt", pooling="prompt_avg"), "holds response_avg, not prompt_avg"),
        (lambda: export_vectors(folder, tmp_path / "y.pt", pooling="mean"), "pooling 'mean' is unknown"),
        (lambda: import_vectors(tmp_path / "far.safetensors", tmp_path / "b", "evil", pocket), "--other-model"),
        (lambda: import_vectors(tmp_path / "far.safetensors", tmp_path / "far", "evil", pocket), "already"),
        (lambda: import_vectors(tmp_path / "far.safetensors", tmp_path / "b", "a/b", pocket), "cannot be a file name"),
        (lambda: Directions({1: ONES}, "it").matrix(6, 64), "width"),
    ):
        with pytest.raises(PersonaError, match=words) as e:
            act()
        assert "\n" not in str(e.value)
    assert export_vectors(bare, tmp_path / "y.gguf", model_hint="llama", layers=[3])[0].endswith("direction.2.")
    assert not (tmp_path / "b").exists() and not (tmp_path / "y.pt").exists()


def test_export_and_import_on_the_command_line(made, tmp_path):
    from typer.testing import CliRunner

    from persona_steer.app.cli import app

    def run(*args):
        return CliRunner().invoke(app, [str(a) for a in args])

    folder, v = made
    r = run("export", folder, tmp_path / "x.gguf", "--layers", "3,4", "--coefficient", "2")
    assert r.exit_code == 0 and "layers 3-4 as direction.2-3" in r.output, r.output
    r = run("import", tmp_path / "x.gguf", tmp_path / "a", "--trait", "evil", "--model", "pocket")
    assert r.exit_code == 0 and "no values at layer 1-2, 5-6" in r.output, r.output
    assert torch.equal(load_vectors(tmp_path / "a", "evil").response_avg[3:5], 2 * v.response_avg[3:5])
    assert load_json(tmp_path / "a" / "evil_vectors.json")["model"] == "pocket"
    for args in (("export", folder, tmp_path / "x.gguf"), ("import", tmp_path / "x.gguf", tmp_path / "a")):
        more = ("--trait", "evil", "--model", "pocket") if args[0] == "import" else ()
        r = run(*args, *more)
        assert isinstance(r.exception, PersonaError) and "--overwrite" in str(r.exception)
