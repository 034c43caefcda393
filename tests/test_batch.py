"""Batches: grids, what is skipped and what is tried again, processes that die, a Ray cluster that loses a node."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from persona_steer.base.core import PersonaError, project_root
from persona_steer.jobs import batch as b
from persona_steer.jobs.workers import fetch, filesystem, job_directory, local

PARAMETERS = '''trait: str = "evil"  # which
seconds: float = 0.0  # how long it takes
layers: list = []  # a list by itself
how: str = ""  # how it ends
out: str = ""  # where to write; default: runs/{model}/{trait}/tiny
overwrite: bool = False  # do everything again
model: str = "pocket"  # of whom'''
BODY = '''import json, os, pathlib, time
folder = pathlib.Path(out or f"{os.environ['PERSONA_RUNS']}/{model}/{trait}/tiny")
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "begun", "a") as f: f.write("x")
for _ in range(20): time.sleep(seconds / 20)
if how == "fail" and not (folder / "mended").exists(): raise ValueError("sk-live-0123456789abcdef was refused")
if how == "die" and (folder / "begun").stat().st_size == 1: os.kill(os.getpid(), 9)
if how == "greedy": hoard = bytearray(4 * 10**9)
(folder / "summary.json").write_text(json.dumps({"n": len(trait), f"{trait} score": [1.0, 0.5, 1.5]}))
with open(folder / "ended", "a") as f: f.write("x")'''


@pytest.fixture
def tiny(tmp_path):
    nb = new_notebook(
        cells=[new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(nb, tmp_path / "tiny.ipynb")
    return str(tmp_path / "tiny.ipynb")


def ran(runs, name, what="ended"):
    path = Path(runs) / name / what
    return path.stat().st_size if path.exists() else 0


def summary(folder):
    return (Path(folder) / "summary.csv").read_text(), json.loads((Path(folder) / "summary.json").read_text())


@pytest.mark.parametrize(
    "given, default, values",
    [
        ("a, b", "x", ["a", "b"]),
        ("'a, b', c", "x", ["a, b", "c"]),
        ("on,off", "", ["on", "off"]),
        ("1, 2.5", 0.0, [1.0, 2.5]),
        ("1", 3, [1]),
        ("true", False, [True]),
        ("4, 5", [], [[4, 5]]),
        (["Is it true: yes?", "on", "'tis"], [], [["Is it true: yes?", "on", "'tis"]]),
        ("[4], [5, 6]", [], [[4], [5, 6]]),
        ([[1], [2]], [], [[1], [2]]),
        ([1, 2], [], [[1, 2]]),
        (2, 1.0, [2.0]),
        (["a", "a"], "", ["a"]),
        ("", "x", None),
    ],
)
def test_values_take_the_type_of_the_default(given, default, values):
    if values is None:
        with pytest.raises(PersonaError, match="no value"):
            b.as_values(given, default, "p")
    else:
        assert b.as_values(given, default, "p") == values


@pytest.mark.parametrize(
    "values, words",
    [
        ({"trai": "a"}, "did you mean 'trait'"),
        ({"seconds": "soon"}, "seconds='soon'.*float"),
        ({"overwrite": "1"}, "bool"),
        ({"out": "x"}, "no parameter 'out'"),
        ({"model": "a/x, b/x"}, "share the folder x/evil/tiny"),
        ({"trait": "'a"}, "no list of values"),
    ],
)
def test_what_a_chapter_cannot_take_is_said_before_anything_runs(tiny, values, words):
    with pytest.raises(PersonaError, match=words):
        b.jobs_of(tiny, values)


def test_every_chapter_writes_to_a_folder_of_its_own_below_runs():
    """Also those whose model is left to a training configuration; model names that are no folder's name are refused."""
    books = project_root() / "nbs"
    chapters = [
        str(p.relative_to(books).with_suffix("")) for p in books.rglob("*.ipynb") if '"parameters"' in p.read_text()
    ]
    names = {c: b.jobs_of(c, {})[0].name for c in chapters}
    assert (
        len(names) > 15
        and names["06b_guard"] == "smollm2/evil/06b_guard"
        and names["06a_families"] == "smollm2/06a_families"
        and names["02_extract"] == "smollm2/evil/02_extract"
    )
    assert not any({"", ".", ".."} & set(n.split("/")) for n in names.values())
    with pytest.raises(PersonaError, match="no folder of its own"):
        b.jobs_of("02_extract", {"model": "."})


def test_an_unknown_chapter_or_trait_is_named_before_anything_runs():
    with pytest.raises(PersonaError, match="no chapter '02'.*02_extract"):
        b.jobs_of("02", {})
    with pytest.raises(PersonaError, match="'greedy' is unknown"):
        b.jobs_of("02_extract", {"trait": "evil, greedy"})
    with pytest.raises(PersonaError, match="takes no parameters"):
        b.jobs_of("base/00_core", {})


@pytest.mark.parametrize(
    "name, text",
    [
        ("g.yaml", "chapter: tiny\nparameters:\n  trait: [a, 'b, c']\n  how: off\n  layers: [[1], [2, 3]]\n"),
        ("g.toml", 'chapter = "tiny"\n[parameters]\ntrait = ["a", "b, c"]\nhow = "off"\nlayers = [[1], [2, 3]]\n'),
        (
            "g.json",
            '{"chapter": "tiny", "parameters": {"trait": ["a", "b, c"], "how": "off", "layers": [[1], [2, 3]]}}',
        ),
    ],
)
def test_grid_files(tiny, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    chapter, grid = b.read_grid(tmp_path / name)
    jobs = b.jobs_of(tiny, grid)
    assert chapter == "tiny" and [
        (j.parameters["trait"], j.parameters["layers"], j.parameters["how"]) for j in jobs
    ] == [("a", [1], "off"), ("a", [2, 3], "off"), ("b, c", [1], "off"), ("b, c", [2, 3], "off")]
    assert len({j.name for j in jobs}) == 4 and all(
        j.out and " " not in j.name for j in jobs if j.parameters["trait"] == "a"
    )


@pytest.mark.parametrize("text", ["chapter: [", "a: 1", "chapter: x\nparameters: [1]", "chapter: x\nmore: 1"])
def test_a_broken_grid_file_is_one_sentence(tmp_path, text):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(PersonaError, match="g.yaml"):
        b.read_grid(tmp_path / "g.yaml")


def test_a_job_depends_on_the_chapter_the_parameters_and_the_files_they_name(tiny, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_text("1")

    def key(**v):
        return b.jobs_of(tiny, {"model": str(tmp_path / "model"), **v})[0].key

    first = key()
    assert key() == first != key(how="x")
    (tmp_path / "model" / "w").write_text("22")
    assert key() != first
    assert b.jobs_of("02_extract", {"n": "1"})[0].key != b.jobs_of("02_extract", {"n": "2"})[0].key
    # the default, said or not
    assert b.jobs_of("02_extract", {"trait": "evil"})[0].key == b.jobs_of("02_extract", {})[0].key
    first = key()
    nb = nbformat.read(tiny, 4)
    nb.cells.append(new_code_cell("1 + 1"))
    nbformat.write(nb, tiny)
    assert key() != first


def test_done_is_skipped_failed_says_why_and_is_retried_alone(tiny, tmp_path):
    jobs, runs, folder = (
        b.jobs_of(tiny, {"trait": "evil, mild", "how": "'', fail"}),
        tmp_path / "runs",
        tmp_path / "batch",
    )
    names = [j.name for j in jobs]

    def states(**k):
        return [r["state"] for r in b.run_batch(jobs, local(2, memory=8), str(runs), folder, **k)]

    assert (
        states() == ["done", "failed"] * 2
        and [ran(runs, n) for n in names] == [1, 0, 1, 0]
        and names[1] == "pocket/evil/tiny/how=fail"
    )
    rows = summary(folder)[1]
    assert (
        rows[1]["error"] == "ValueError: [redacted] was refused"
        and rows[0]["n"] == 4
        and rows[2]["trait score"] == 1.0
        and rows[2]["trait score, low"] == 0.5
    )
    assert (
        "sk-live" not in (folder / "jobs.json").read_text() + (runs / names[1] / "job.json").read_text()
        and "ValueError" in (runs / jobs[1].notebook).read_text()
    )
    # nothing ran again
    assert states() == ["done", "failed"] * 2 and [ran(runs, n, "begun") for n in names] == [1, 1, 1, 1]
    for n in names:
        (runs / n / "mended").touch()
    assert (
        states(resume=True) == ["done"] * 4
        and [ran(runs, n) for n in names] == [1, 1, 1, 1]
        and [ran(runs, n, "begun") for n in names] == [1, 2, 1, 2]
    )
    assert states(overwrite=True) == ["done"] * 4 and [ran(runs, n) for n in names] == [2] * 4
    other = b.jobs_of(tiny, {"trait": "evil, mild", "how": "'', fail", "layers": "3"})  # same folders, other settings
    assert [r["state"] for r in b.run_batch(other, local(2, memory=8), str(runs), folder)] == ["done"] * 4 and ran(
        runs, names[0]
    ) == 3


def test_an_interrupted_batch_does_not_report_what_other_settings_left(tiny, tmp_path):
    b.run_batch(b.jobs_of(tiny, {}), local(1), str(tmp_path / "runs"), tmp_path / "batch")

    def cut(specs):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        b.run_batch(b.jobs_of(tiny, {"layers": "3"}), cut, str(tmp_path / "runs"), tmp_path / "batch")
    assert [(r["state"], r.get("n")) for r in summary(tmp_path / "batch")[1]] == [("new", None)]


def test_a_job_that_cannot_even_begin_does_not_end_the_others(tiny, tmp_path):
    jobs = b.jobs_of(tiny, {"trait": "a, b"})
    (tmp_path / "runs" / jobs[0].name / "log.txt").mkdir(parents=True)  # where a file should be
    assert [r["state"] for r in b.run_batch(jobs, local(2, memory=8), str(tmp_path / "runs"), tmp_path / "batch")] == [
        "failed",
        "done",
    ]


def test_keys_are_in_no_name_and_no_file(tiny, tmp_path):
    jobs = b.jobs_of(tiny, {"how": "http://me:secret1@host/v1, http://me:secret2@host/v1"})
    b.run_batch(jobs, local(2, memory=8), str(tmp_path / "runs"), tmp_path / "batch")
    assert len({j.name for j in jobs}) == 2 and not any("secret" in j.name for j in jobs)
    assert not any("secret" in p.read_text() for p in (tmp_path / "batch").glob("*.*")) and not any(
        "secret" in p.read_text() for p in (tmp_path / "runs").rglob("job.json")
    )


def test_a_kernel_that_is_killed_is_tried_again_and_given_up_in_the_end(tiny, tmp_path):
    (job,) = b.jobs_of(tiny, {"how": "die"})
    (record,) = b.run_batch([job], local(1, retries=1), str(tmp_path / "runs"), tmp_path / "batch")
    assert (
        record["state"] == "done"
        and record["attempts"] == 2
        and record["ends"] == 1 == ran(tmp_path / "runs", job.name)
    )
    (record,) = b.run_batch([job], local(1, retries=0), str(tmp_path / "other"), tmp_path / "batch")
    assert (
        record["state"] == "failed"
        and "kernel died" in record["error"]
        and "kernel died" in summary(tmp_path / "batch")[0]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the data of a process")
def test_a_greedy_job_fails_alone(tiny, tmp_path):
    jobs = b.jobs_of(tiny, {"how": "greedy, ''"})
    records = b.run_batch(jobs, local(2, memory=2), str(tmp_path / "runs"), tmp_path / "batch")
    assert [r["state"] for r in records] == ["failed", "done"] and "MemoryError" in records[0]["error"]


def test_a_killed_batch_goes_on_where_it_was_and_ends_with_the_same_summary(tiny, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"chapter: {tiny}\nparameters:\n  trait: [a, b, c, d, e]\n  seconds: 1.5\n")

    def command(runs):
        return [
            sys.executable,
            "-c",
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom "
            "persona_steer.app.cli import main; main()",
            "batch",
            str(grid),
            "--runs",
            str(tmp_path / runs),
            "--workers",
            "2",
            "--name",
            "x",
        ]

    whole = subprocess.run(command("whole"), capture_output=True, text=True)
    assert whole.returncode == 0 and "5 of 5 done" in whole.stdout, whole.stderr
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        (tmp_path / "cut/batches/x/summary.csv").unlink(missing_ok=True)

        def begun():
            return sum(ran(tmp_path / "cut", f"pocket/{t}/tiny", "begun") for t in "abcde")

        before = begun()
        with open(tmp_path / "err.txt", "w") as err:
            child = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, stderr=err)
        while begun() == before and child.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
        child.send_signal(how)
        # (Ctrl-C is ignored by what a shell starts in the background, hence the line about SIGINT in the command)
        assert child.wait(60) != 0, how
        # written however it ends, if it can be
        assert (tmp_path / "cut/batches/x/summary.csv").exists() == (how != signal.SIGKILL), how
        if how == signal.SIGINT:
            message = (tmp_path / "err.txt").read_text()
            assert re.search(r"Interrupted\. \d of 5 jobs are done.*is kept; the same command goes on", message), (
                message
            )
    again = subprocess.run(command("cut"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    once_more = subprocess.run(command("cut"), capture_output=True, text=True)
    lines = [line for line in once_more.stdout.splitlines() if line.startswith("skipped")]
    assert len(lines) == 5 and all(re.search(r"\(done in \d+ s\)$", line) for line in lines), once_more.stdout
    assert [ran(tmp_path / "cut", f"pocket/{t}/tiny") for t in "abcde"] == [1] * 5 and begun() > 5
    assert [(tmp_path / r / "batches/x/summary.csv").read_bytes() for r in ("cut", "whole")][0] == (
        tmp_path / "whole/batches/x/summary.csv"
    ).read_bytes()
    records = json.loads((tmp_path / "cut/batches/x/jobs.json").read_text())
    assert (
        all(r["ends"] == 1 for r in records)
        and max(r["attempts"] for r in records) > 1
        and (tmp_path / "cut/batches/x/report/index.html").exists()
    )


def test_a_worker_goes_when_its_starter_goes(tiny, tmp_path):
    (job,) = b.jobs_of(tiny, {"seconds": "60"})
    spec = dict(
        chapter=job.chapter,
        parameters=job.parameters,
        name=job.name,
        key=job.key,
        out=False,
        runs=str(tmp_path),
        batch="b",
        overwrite=False,
        cwd=".",
        threads=1,
    )
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, sys; from persona_steer.jobs.workers import in_a_process; "
            "in_a_process(json.loads(sys.argv[1]))",
            json.dumps(spec),
        ]
    )
    while not ran(tmp_path, job.name, "begun"):
        time.sleep(0.05)
    pid = json.loads((tmp_path / job.name / "job.json").read_text())["pid"]
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(family) > 1
    starter.kill()
    starter.wait()
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_two_batches_at_the_same_job_run_it_once(tiny, tmp_path):
    code = (
        "import sys; from persona_steer.jobs.batch import jobs_of, run_batch; from "
        "persona_steer.jobs.workers import local\n"
        "print([r['state'] for r in run_batch(jobs_of(sys.argv[1], {'seconds': '2'}), local(1), "
        "sys.argv[2], sys.argv[3])])"
    )
    two = [
        subprocess.Popen(
            [sys.executable, "-c", code, tiny, str(tmp_path / "runs"), str(tmp_path / f"batch{k}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    assert [p.communicate()[0].strip() for p in two] == ["['done']"] * 2 and ran(
        tmp_path / "runs", "pocket/evil/tiny"
    ) == 1 == ran(tmp_path / "runs", "pocket/evil/tiny", "begun")


def test_results_in_a_place_that_is_no_folder(tiny, tmp_path):
    """`file://` goes the way of `s3://`: a scratch folder, filled from there and brought back."""
    runs, jobs = f"file://{tmp_path}/far", b.jobs_of(tiny, {"trait": "a, b", "how": "'', fail"})
    records = b.run_batch(jobs, local(2), runs, tmp_path / "batch")
    assert [r["state"] for r in records] == ["done", "failed"] * 2
    near = b.run_batch(jobs, local(2), str(tmp_path / "near"), tmp_path / "batch2")
    assert summary(tmp_path / "batch") == summary(tmp_path / "batch2") and ran(
        tmp_path / "far", jobs[0].name
    ) == 1 == ran(tmp_path / "near", jobs[0].name)
    assert [r["state"] for r in b.run_batch(jobs, local(2), runs, tmp_path / "batch")] == [
        "done",
        "failed",
    ] * 2 and ran(tmp_path / "far", jobs[1].name, "begun") == 1
    (dying,) = b.jobs_of(tiny, {"how": "die"})
    (record,) = b.run_batch([dying], local(1, retries=0), runs, tmp_path / "batch3")
    # what there was came back
    assert (
        record["state"] == "failed" == b.read_record(runs, dying.name)["state"]
        and ran(tmp_path / "far", dying.name, "begun") == 1
    )
    (record,) = b.run_batch([dying], local(1, retries=0), runs, tmp_path / "batch3", resume=True)
    assert (
        record["state"] == "done"
        and ran(tmp_path / "far", dying.name) == 1
        and ran(tmp_path / "far", dying.name, "begun") == 2
    )
    (tmp_path / "far/pocket/evil/02_extract").mkdir(parents=True)
    (tmp_path / "far/pocket/evil/02_extract/v.pt").write_text("v")
    with job_directory(dict(runs=runs, name="pocket/evil/tiny/how=x")) as near:  # noqa: F811
        assert (near / "pocket/evil/02_extract/v.pt").read_text() == "v"
    assert not near.exists()
    with pytest.raises(PersonaError, match="cannot be used"):
        filesystem("nosuch://x")
    assert (
        fetch(runs, jobs[1], tmp_path / "copy") and "ValueError" in (tmp_path / "copy" / jobs[1].notebook).read_text()
    )


def test_gpus_are_dealt_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(PersonaError, match="4 GPUs but 3 are visible"):
        local(gpus=4)
    with pytest.raises(PersonaError, match="CPU jobs only"):
        local(memory=4)
    import persona_steer.jobs.workers as w

    for none in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert w.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    seen = []
    monkeypatch.setattr(
        w,
        "in_a_process",
        lambda spec, started: (
            seen.append((spec["env"]["CUDA_VISIBLE_DEVICES"], spec["memory"]))
            or time.sleep(0.2)
            or {"state": "done", "key": spec["key"]}
        ),
    )
    b.run_batch(b.jobs_of(tiny, {"trait": "a,b,c"}), local(), str(tmp_path), tmp_path / "batch")
    assert sorted(seen) == [("4", 0), ("5", 0), ("6", 0)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    # read when Ray is imported
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    c = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield c
    import ray

    ray.shutdown()
    c.shutdown()
    for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(k)


def test_seven_traits_on_two_ray_nodes_one_of_which_is_lost(cluster, tmp_path, tiny):
    """A node is taken away while the real chapter works; the summary is that of the local executor, byte for byte."""
    import threading

    from persona_steer.jobs.ray_workers import on_ray

    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    jobs = b.jobs_of(
        "02_extract",
        {
            "model": "pocket",
            "trait": "apathetic,evil,hallucinating,humorous,impolite,optimistic,sycophantic",
            "max_new_tokens": "6",
        },
    )
    done, records = [], []
    thread = threading.Thread(
        target=lambda: records.extend(
            b.run_batch(
                jobs,
                on_ray(cluster.address, retries=3),
                str(tmp_path / "far"),
                tmp_path / "batch",
                show=lambda j, r: done.append(sum(x["state"] == "done" for x in r)),
            )
        )
    )
    thread.start()

    def running():
        return [j for j in jobs if b.read_record(str(tmp_path / "far"), j.name).get("state") == "running"]

    while thread.is_alive() and not (done and done[-1] >= 2 and len(running()) == 2):
        time.sleep(0.1)
    lost = running()
    cluster.remove_node(second, allow_graceful=False)
    thread.join(400)
    assert len(lost) == 2 and [r["state"] for r in records] == ["done"] * 7
    # the lost one was begun twice, ended once
    assert sorted(r["attempts"] for r in records) == [1] * 6 + [2] and all(r["ends"] == 1 for r in records)
    b.run_batch(jobs, local(2, threads=1), str(tmp_path / "near"), tmp_path / "batch2")
    assert summary(tmp_path / "batch") == summary(tmp_path / "batch2")


def test_a_ray_worker_that_is_killed_and_jobs_that_do_not_fit(cluster, tmp_path, tiny):
    from persona_steer.jobs.ray_workers import on_ray

    jobs = b.jobs_of(tiny, {"how": "die, fail"})
    records = b.run_batch(jobs, on_ray(cluster.address, retries=1), str(tmp_path), tmp_path / "batch")
    assert [(r["state"], r["attempts"]) for r in records] == [("done", 2), ("failed", 1)] and ran(
        tmp_path, jobs[0].name
    ) == 1
    with pytest.raises(PersonaError, match="no machine of the cluster has 1 CPUs, 2 GPUs and 0 GB"):
        b.run_batch(b.jobs_of(tiny, {"trait": "x"}), on_ray(cluster.address, gpus=2), str(tmp_path), tmp_path / "batch")


def test_a_cluster_that_is_not_there_is_one_sentence(tiny, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from persona_steer.app.cli import main; main()",
            "batch",
            tiny,
            "--executor",
            "ray",
            "--address",
            "127.0.0.1:1",
            "--runs",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        said.returncode == 1
        and "cluster at 127.0.0.1:1 cannot be reached" in said.stderr
        and len(said.stderr.strip().splitlines()) == 1
    )


def test_steps(tiny, tmp_path):
    """A later step waits for the earlier ones; what failed for a trait stops that trait alone."""
    (tmp_path / "steps.yaml").write_text(
        f"""steps:
  - {{chapter: {tiny}, parameters: {{trait: [a, b], how: [fail, '']}}}}
  - - {{chapter: {tiny}, parameters: {{trait: a, seconds: [0, 0.1]}}}}
    - {{chapter: {tiny}, parameters: {{trait: c, layers: [[3], [4]]}}}}
"""
    )
    steps = b.read_steps(tmp_path / "steps.yaml")
    assert [[values.get("trait") for _, values in step] for step in steps] == [[["a", "b"]], [["a"], ["c"]]]
    jobs = b.jobs_of_steps(steps)
    assert [j.step for j in jobs] == [0] * 4 + [1] * 4
    records = b.run_batch(jobs, local(2, memory=8), str(tmp_path / "runs"), tmp_path / "batch")
    states = {
        (j.labels["trait"], str(list(j.labels.values())[-1])): r.get("state", "not run") for j, r in zip(jobs, records)
    }
    assert states == {
        ("a", "fail"): "failed",
        ("a", ""): "done",
        ("b", "fail"): "failed",
        ("b", ""): "done",
        ("a", "0.0"): "not run",
        ("a", "0.1"): "not run",
        ("c", "[3]"): "done",
        ("c", "[4]"): "done",
    }
