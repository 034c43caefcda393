"""An exported control vector in the real llama.cpp does what `steer` does here: llama.cpp's own loader reads the file,
its C interface applies it, and the change of the logits is compared, layer by layer.

The package xllamacpp holds llama.cpp as one shared library, which ctypes calls. Its parameter structures are passed on
as they are returned, so that their fields, which change from version to version, need not be known here."""

import ctypes
import importlib.util
import os
import platform
import sys

import numpy as np
import pytest
import torch

from persona_steer.base.core import PersonaError
from persona_steer.lm.activations import POOLS, steer
from persona_steer.lm.gguf_files import SMOLLM2, packaged_file
from persona_steer.lm.models import load_model
from persona_steer.persona.exchange import write_gguf
from persona_steer.persona.peer_objects import repeng_package
from persona_steer.persona.transfer import export_vectors
from persona_steer.persona.vectors import PersonaVectors, save_vectors

if not os.environ.get("CI"):  # in CI nothing of this may be missing
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    if packaged_file(SMOLLM2) is None:
        pytest.skip("the package with SmolLM2 is not installed", allow_module_level=True)

TEXT = "The capital of France is a large city, and"
POINTER, I32 = ctypes.c_void_p, ctypes.c_int32


class Opaque(ctypes.Structure):
    """A structure that is only passed on; larger than any of llama.cpp's."""

    _fields_ = [("bytes", ctypes.c_char * 1024)]


INTERFACE = {  # function of llama.h -> result, arguments
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [POINTER, POINTER]),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, Opaque]),
    "llama_init_from_model": (POINTER, [POINTER, Opaque]),
    "llama_set_n_threads": (None, [POINTER, I32, I32]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, ctypes.c_bool]),
    "llama_batch_get_one": (Opaque, [POINTER, I32]),
    "llama_decode": (I32, [POINTER, Opaque]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, I32]),
    "llama_set_adapter_cvec": (I32, [POINTER, POINTER, ctypes.c_size_t, I32, I32, I32]),
    "llama_free": (None, [POINTER]),
    "llama_model_free": (None, [POINTER]),
}
LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)
QUIET = LOGGER(lambda *args: None)


def library() -> ctypes.CDLL:
    import xllamacpp.xllamacpp as binary

    lib = ctypes.CDLL(binary.__file__)
    for name, (result, arguments) in INTERFACE.items():
        f = getattr(lib, name)
        f.restype, f.argtypes = result, arguments
    lib.llama_log_set(ctypes.cast(QUIET, POINTER), None)
    lib.llama_backend_init()
    return lib


class LoadInfo(
    ctypes.Structure
):  # common_control_vector_load_info; a string of this ABI is a pointer to its characters
    _fields_ = [("strength", ctypes.c_float), ("file", ctypes.c_char_p)]


class Vector(ctypes.Structure):  # std::vector
    _fields_ = [("begin", POINTER), ("end", POINTER), ("capacity", POINTER)]


class ControlVectorData(ctypes.Structure):  # common_control_vector_data
    _fields_ = [("n_embd", ctypes.c_int), ("data", Vector)]


LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


def load_as_llama_cpp(lib: ctypes.CDLL, path, strength: float = 1.0) -> np.ndarray | None:  # [names from 1, hidden]
    """What `--control-vector-scaled FILE:STRENGTH` reads, by llama.cpp's own function; None: it refuses the file."""
    load = lib[LOADER]
    load.restype, load.argtypes = None, [POINTER, POINTER]
    info, out = LoadInfo(strength, str(path).encode()), ControlVectorData()
    at = ctypes.addressof(info)
    files = Vector(at, at + ctypes.sizeof(info), at + ctypes.sizeof(info))
    load(ctypes.byref(out), ctypes.byref(files))
    if out.n_embd == -1:
        return None
    data = ctypes.string_at(out.data.begin, out.data.end - out.data.begin)
    return np.frombuffer(data, np.float32).reshape(-1, out.n_embd)


def read_by_names(path) -> np.ndarray:  # [names from 1, hidden]
    """The same from the rule alone: `direction.N` is row N - 1 of the buffer."""
    from gguf import GGUFReader

    found = {int(t.name.split(".")[1]): np.array(t.data) for t in GGUFReader(path).tensors}
    out = np.zeros((max(found), len(next(iter(found.values())))), np.float32)
    for n, row in found.items():
        out[n - 1] = row
    return out


class LlamaCpp:
    """A model in llama.cpp, on one thread."""

    def __init__(self, lib: ctypes.CDLL, path):
        self.lib = lib
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {path}"
        self.context = lib.llama_init_from_model(self.model, lib.llama_context_default_params())
        lib.llama_set_n_threads(self.context, 1, 1)

    def logits(self, ids: list[int], size: int) -> np.ndarray:
        """The logits after the last token."""
        tokens = (I32 * len(ids))(*ids)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_get_one(ctypes.cast(tokens, POINTER), len(ids))
        assert self.lib.llama_decode(self.context, batch) == 0
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (size,)).copy()

    def control(self, buffer: np.ndarray | None, first: int = 1, last: int = 30):
        """Apply a buffer from name 1 on to some of the names, both included; None: nothing is steered."""
        if buffer is None:
            done = self.lib.llama_set_adapter_cvec(self.context, None, 0, 0, first, last)
        else:
            data, width = np.ascontiguousarray(buffer), buffer.shape[1]
            done = self.lib.llama_set_adapter_cvec(self.context, data.ctypes.data, data.size, width, first, last)
        assert done == 0

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def float_gguf(path):
    """SmolLM2 as float32, its weights rounded to bfloat16 as in the model folder that this project converts."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader, writer = GGUFReader(packaged_file(SMOLLM2)), GGUFWriter(str(path), "llama")
    for name, f in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inside = f.types[-1] if f.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, f.contents(), f.types[0], inside)
    for t in reader.tensors:
        plain = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32))
        writer.add_tensor(t.name, plain.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def lib():
    return library()


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llama(lib, tmp_path_factory):
    path = float_gguf(tmp_path_factory.mktemp("llama") / "smollm2-f32.gguf")
    model = LlamaCpp(lib, path)
    yield model
    model.close()
    path.unlink()


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    """A vector of 10% of the residual stream's size at each layer, and the file for llama.cpp."""
    folder = tmp_path_factory.mktemp("vectors")
    with torch.no_grad():
        states = smollm2.model(**smollm2.tokenizer(TEXT, return_tensors="pt"), output_hidden_states=True).hidden_states
    v = torch.randn(31, 576, generator=torch.Generator().manual_seed(0))
    size = torch.stack([h[0, -1].norm() for h in states[:-1]] + [states[-2][0, -1].norm()])
    v = 0.1 * v / v.norm(dim=1, keepdim=True) * size[:, None]
    about = {"model": "smollm2", "fingerprint": smollm2.fingerprint}
    save_vectors(PersonaVectors("evil", **{k: v for k in POOLS}, metadata=about), folder)
    export_vectors(folder, folder / "evil.gguf")
    return v, folder / "evil.gguf"


@pytest.fixture(scope="module")
def ways(llama, smollm2):
    """Two functions: the change of the logits in llama.cpp under a buffer, and here under a vector at a layer."""
    ids = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids

    def here() -> np.ndarray:
        with torch.no_grad():
            return smollm2.model(ids).logits[0, -1].numpy()

    plain = {"there": llama.logits(ids[0].tolist(), len(here())), "here": here()}

    def there_moved(buffer, first=1, last=30):
        llama.control(buffer, first, last)
        try:
            return llama.logits(ids[0].tolist(), len(plain["here"])) - plain["there"]
        finally:
            llama.control(None)

    def here_moved(vector, layer, coefficient=1.0):
        with steer(smollm2, vector, layer, coefficient, positions="all"):
            return here() - plain["here"]

    return there_moved, here_moved, plain


def test_the_plain_model_is_the_same_in_llama_cpp(ways):
    *_, plain = ways
    assert cosine(plain["there"], plain["here"]) > 0.9999
    assert np.abs(plain["there"] - plain["here"]).max() < 0.05 * plain["here"].std()


@pytest.mark.parametrize("layer", [2, 3, 15, 29, 30])
def test_a_direction_moves_the_logits_as_steer_does_at_its_layer_and_at_no_other(ways, exported, layer):
    there_moved, here_moved, _ = ways
    v, path = exported
    n = layer - 1  # direction.N, restricted as --control-vector-layer-range N N does
    moved, want = there_moved(read_by_names(path), n, n), here_moved(v, layer)
    same, ratio = cosine(moved, want), np.linalg.norm(moved) / np.linalg.norm(want)
    off = [cosine(moved, here_moved(v[layer], l)) for l in (layer - 1, layer + 1) if l <= 30]  # the vector, elsewhere
    off += [cosine(moved, here_moved(v, l)) for l in (layer - 1, layer + 1) if l <= 30]  # the file, read a row off
    print(f"\nlayer {layer}: cosine {same:.5f}, length {ratio:.4f}; a layer off: {[round(c, 3) for c in off]}")
    assert same > 0.999 and ratio == pytest.approx(1, rel=0.02)
    assert max(off) < 0.96


def test_a_whole_file_adds_every_layer_at_once(ways, exported):
    there_moved, here_moved, _ = ways
    v, path = exported
    moved, layers = there_moved(0.3 * read_by_names(path)), list(range(2, 31))
    want = here_moved([v] * len(layers), layers, 0.3)
    assert cosine(moved, want) > 0.99
    assert cosine(moved, here_moved(v, 15, 0.3)) < 0.9


KNOWN = (sys.platform, platform.machine()) == ("linux", "x86_64")
own_loader = pytest.mark.skipif(not KNOWN, reason="how C++ passes structures is known for x86-64 Linux alone")


@own_loader
def test_llama_cpp_reads_the_file_as_the_rule_says(lib, exported, tmp_path):
    v, path = exported
    assert np.array_equal(load_as_llama_cpp(lib, path), read_by_names(path))
    assert np.array_equal(load_as_llama_cpp(lib, path), v[2:].numpy())
    assert np.array_equal(load_as_llama_cpp(lib, path, 1.5), 1.5 * v[2:].numpy())
    write_gguf(tmp_path / "one.gguf", v, "llama", [15], 0.5)
    one = load_as_llama_cpp(lib, tmp_path / "one.gguf")
    assert one.shape == (14, 576) and not one[:13].any() and np.array_equal(one[13], 0.5 * v[15].numpy())


@own_loader
def test_llama_cpp_refuses_a_direction_0_which_is_why_layer_1_is_refused_here(lib, exported, tmp_path):
    v, _ = exported
    assert importlib.util.find_spec("repeng") or not os.environ.get("CI")
    if importlib.util.find_spec("repeng") is None:
        pytest.skip("repeng is not installed")
    rows = {i: v[i + 1].numpy() for i in (0, 14)}
    repeng_package().ControlVector("llama", rows).export_gguf(tmp_path / "zero.gguf")
    assert load_as_llama_cpp(lib, tmp_path / "zero.gguf") is None
    with pytest.raises(PersonaError, match="layer 1 has no name"):
        write_gguf(tmp_path / "one.gguf", v, "llama", [1, 15])


def test_the_name_0_has_no_effect_in_llama_cpp(ways, exported):
    there_moved, *_ = ways
    _, path = exported
    assert not there_moved(read_by_names(path), 0, 0).any()
