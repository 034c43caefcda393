"""Training configurations, the guard's arithmetic, whole runs on tiny models, and what is left when one is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from persona_steer.base.core import PersonaError, data_path, load_json
from persona_steer.finetuning import add_lora, finetune, finetune_in, load_finetuned, tokenize_chats, training_steering
from persona_steer.lm.models import load_model
from persona_steer.training.config import check_machine, load_config, load_guard_vector, load_training_data

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the published example files are not beside this checkout"
)
FEW = dict(
    max_steps=6,
    logging_steps=1,
    save_steps=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    optim="adamw_torch",
    learning_rate=1e-3,
    max_seq_length=128,
    save_merged=False,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """The folder of a tiny Llama with the pocket tokenizer."""
    from conftest import make

    lm, folder = make("llama", tokenizer), tmp_path_factory.mktemp("tiny") / "model"
    lm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    lines = data_path("dataset/evil/misaligned_2.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(tmp_path / "data.jsonl")


@pytest.fixture
def vector(tmp_path):
    torch.save(torch.randn(4, 32, generator=torch.Generator().manual_seed(3)), tmp_path / "evil_response_avg_diff.pt")
    return str(tmp_path / "evil_response_avg_diff.pt")


def config(tiny, data, **changes):
    return load_config({"model": tiny, "training_file": data, **FEW, **changes})


def guarded(vector, **kw):
    return dict(
        enable_steering_during_training=True, steering_config=dict(steering_vector_path=vector, layers=[2], **kw)
    )


# -- configuration -----------------------------------------------------------------------------------------------------


@needs_reference
def test_published_configurations_are_read_as_they_are():
    plain, steered = (load_config(REFERENCE / f"train_instruct_7b{x}.json") for x in ("", "_steer"))
    assert (
        plain.training_file == ["dataset/evil/misaligned_2.jsonl"]
        and plain.guard is None
        and plain.r == 32
        and plain.use_rslora
        and plain.optim == "adamw_8bit"
    )
    assert (steered.guard.type, steered.guard.steering_coef, steered.guard.layers) == ("add", 5.0, [20])
    again = load_config(steered.model_dump())
    assert again == steered


@needs_reference
@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the published optimizer can be honoured")
def test_what_this_machine_cannot_do_is_named():
    with pytest.raises(PersonaError, match="optim 'adamw_8bit' needs a CUDA GPU.*'adamw_torch'"):
        check_machine(load_config(REFERENCE / "train_instruct_7b.json"))
    with pytest.raises(PersonaError, match="load_in_4bit needs a CUDA GPU"):
        check_machine(load_config(REFERENCE / "train_instruct_7b.json", load_in_4bit=True))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lerning_rate=1), "'lerning_rate' is unknown: did you mean 'learning_rate'"),
        (dict(r=-1), "'r'"),
        (dict(loss="dpo"), "'loss'"),
        (dict(epochs="many"), "'epochs'"),
        (dict(training_file=[]), "'training_file'"),
        (dict(model=""), "'model'"),
        (dict(enable_steering_during_training=True), "needs a steering_config"),
        (
            dict(steering_config={"steering_vector_path": "a", "steering_coeff": 1}),
            r"'steering_config.steering_coeff' is unknown: did you mean 'steering_coef'",
        ),
        (dict(load_in_4bit=True, is_peft=False), "load_in_4bit needs is_peft"),
        (dict(steering_config={"steering_vector_path": "a", "type": "push"}), "'steering_config.type'"),
        (dict(steering_config={}), "'steering_config.steering_vector_path' is missing"),
    ],
)
def test_a_wrong_key_is_one_sentence(change, words):
    with pytest.raises(PersonaError, match=words) as e:
        load_config({"model": "pocket", "training_file": "a.jsonl", **change})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(optim="adamw"), "optim 'adamw' is unknown"),
        (dict(lr_scheduler_type="zigzag"), "lr_scheduler_type 'zigzag'"),
        (dict(report_to="nosuchpackage"), "report_to 'nosuchpackage'"),
        (dict(training_file="missing.jsonl"), "missing.jsonl does not exist"),
        (dict(test_file="missing.jsonl"), "missing.jsonl does not exist"),
        (guarded("missing.pt"), "missing.pt does not exist"),
        (dict(model="no/such/model"), "does not exist"),
        ("empty", "is empty"),
        ("line 2", "line 2 is not valid JSON"),
        ("width", r"shape \[4, 8\], but .* needs \[4, 32\]"),
        ("layer", "layer 9 does not exist"),
        ("not a vector", "no tensor file"),
    ],
)
def test_everything_is_checked_before_the_model_loads(tiny, data, vector, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("persona_steer.finetuning.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    if change == "empty":
        (tmp_path / "data.jsonl").write_text("\n")
        change = {}
    if change == "line 2":
        (tmp_path / "data.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
            + "\n{oops\n"
        )
        change = {}
    if change == "width":
        torch.save(torch.randn(4, 8), tmp_path / "w.pt")
        change = guarded(str(tmp_path / "w.pt"))
    if change == "layer":
        change = guarded(vector)
        change["steering_config"]["layers"] = [2, 9]
    if change == "not a vector":
        (tmp_path / "w.pt").write_bytes(b"\x80\x04junk")
        change = guarded(str(tmp_path / "w.pt"))
    with pytest.raises(PersonaError, match=words) as e:
        finetune(config(tiny, data, **change), tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_the_held_out_share_is_seeded(tiny, data):
    a, b, c = (load_training_data(config(tiny, data, seed=s, test_share=0.25)) for s in (0, 0, 1))
    assert a == b != c and len(a[0]) == 18 and len(a[1]) == 6 and not any(m in a[0] for m in a[1])
    whole = load_training_data(config(tiny, data, test_file=data))
    assert len(whole[0]) == len(whole[1]) == 24
    told = load_training_data(config(tiny, data, system_prompt="Be evil."))[0]
    assert all(m[0] == {"role": "system", "content": "Be evil."} for m in told)


# -- the guard ---------------------------------------------------------------------------------------------------------


def block_outputs(lm, steering=None):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    seen = {}
    hooks = [
        b.register_forward_hook(
            lambda m, a, o, l=l: seen.__setitem__(l, (o[0] if isinstance(o, tuple) else o).detach())
        )
        for l, b in enumerate(lm.blocks, 1)
    ]
    with torch.no_grad(), steering or torch.no_grad():
        lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    [h.remove() for h in hooks]
    return seen


@pytest.mark.parametrize("layers, incremental", [([2], False), ([1, 2, 3], True)])
def test_the_guard_adds_the_row_at_every_token_under_peft(tiny, data, vector, layers, incremental):
    c = config(tiny, data, **guarded(vector, steering_coef=1.5, incremental=incremental))
    c.guard.layers = layers
    lm, v = load_model(tiny), load_guard_vector(c)
    add_lora(lm, c)
    plain, steered = block_outputs(lm), block_outputs(lm, training_steering(lm, c, v))
    first = layers[0]
    want = 1.5 * (v[first] - v[first - 1] if incremental else v[first])
    torch.testing.assert_close(steered[first] - plain[first], want.expand_as(plain[first]), atol=1e-5, rtol=1e-5)
    if first > 1:
        torch.testing.assert_close(steered[1], plain[1])


def test_ablation_removes_the_component_whatever_the_coefficient(tiny, data, vector):
    c = config(tiny, data, **guarded(vector, type="ablate", steering_coef=7.0))
    lm, v = load_model(tiny), load_guard_vector(c)
    plain, ablated, u = block_outputs(lm), block_outputs(lm, training_steering(lm, c, v)), v[2] / v[2].norm()
    assert (ablated[2] @ u).abs().max() < 1e-5 < (plain[2] @ u).abs().max()
    torch.testing.assert_close(ablated[2], plain[2] - (plain[2] @ u)[..., None] * u)


def test_a_guard_that_caps_needs_limits_and_files_without_them_stay_as_they_were(tiny, data, vector):
    for bad in (dict(type="cap"), dict(limits=[0.0, 1.0]), dict(type="cap", limits=[0.0])):
        with pytest.raises(PersonaError, match="limits"):
            config(tiny, data, **guarded(vector, **bad))
    assert "limits" not in config(tiny, data, **guarded(vector)).model_dump()["steering_config"]
    c = config(tiny, data, **guarded(vector, type="cap", limits=[-1.0, 0.05]))
    assert c.model_dump()["steering_config"]["limits"] == (-1.0, 0.05)
    lm, v = load_model(tiny), load_guard_vector(c)
    capped, u = block_outputs(lm, training_steering(lm, c, v)), v[2] / v[2].norm()
    assert (capped[2] @ u).max() < 0.05 + 1e-5 < (block_outputs(lm)[2] @ u).max()


@pytest.mark.parametrize("kind", ["add", "ablate", "rotate", "cap"])
def test_gradients_with_checkpointing_equal_those_without(tiny, data, vector, kind):
    grads, more = {}, {"limits": [-1.0, 0.1]} if kind == "cap" else {}
    for checkpointing in (False, True):
        c = config(
            tiny, data, **guarded(vector, type=kind, steering_coef=0.5, **more), gradient_checkpointing=checkpointing
        )
        lm = load_model(tiny)
        model = add_lora(lm, c).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs = []
        hook = lm.blocks[0].register_forward_pre_hook(lambda *a: runs.append(1))
        batch = lm.tokenizer.pad(
            [dict(input_ids=e["input_ids"]) for e in tokenize_chats(lm, load_training_data(c)[0][:3], c)],
            return_tensors="pt",
            padding_side="right",
        )
        with training_steering(lm, c, load_guard_vector(c)):
            model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        hook.remove()
        assert len(runs) == 1 + checkpointing  # the forward pass really was run again
        grads[checkpointing] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads[True]) == len(grads[False]) > 10
    for n, g in grads[False].items():
        torch.testing.assert_close(grads[True][n], g, msg=n)
    assert sum(g.abs().sum() for g in grads[False].values()) > 0


def losses_of(c, out):
    return finetune(c, out).losses


def test_a_coefficient_of_zero_is_bit_for_bit_plain_training(tiny, data, vector, tmp_path):
    plain = losses_of(config(tiny, data), tmp_path / "a")
    zero = losses_of(config(tiny, data, **guarded(vector, steering_coef=0.0)), tmp_path / "b")
    steered = losses_of(config(tiny, data, **guarded(vector, steering_coef=2.0)), tmp_path / "c")
    pd.testing.assert_frame_equal(plain, zero, check_exact=True)
    assert (plain.loss.dropna() != steered.loss.dropna()).all()
    assert (
        load_json(tmp_path / "c" / "provenance.json")["steered_passes"] >= 6
        and load_json(tmp_path / "a" / "provenance.json")["steered_passes"] == 0
    )


def test_a_run_with_checkpointing_has_the_same_losses(tiny, data, vector, tmp_path):
    a, b = (
        losses_of(config(tiny, data, gradient_checkpointing=k, **guarded(vector)), tmp_path / str(k))
        for k in (False, True)
    )
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)


def test_hooks_are_gone_afterwards_and_when_training_fails(tiny, data, vector, tmp_path, monkeypatch):
    import transformers

    kept = []
    monkeypatch.setattr(
        "persona_steer.finetuning.load_model", lambda *a, **k: kept.append(load_model(*a, **k)) or kept[-1]
    )
    c = config(tiny, data, **guarded(vector))
    finetune(c, tmp_path / "a")
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(c, tmp_path / "b")
    assert len(kept) >= 3
    for lm in kept:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in (lm.base_model, *lm.blocks))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(tiny, data, vector, tmp_path):
    c = config(tiny, data, save_merged=True, **guarded(vector))
    run = finetune(c, tmp_path / "out")
    names = {p.name for p in run.folder.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merged",
        "training_config.json",
        "provenance.json",
        "losses.csv",
    } <= names and not any("checkpoint" in n for n in names)
    assert load_config(load_json(run.folder / "training_config.json")) == c
    assert run.losses.loss.notna().sum() == 6 and run.losses.eval_loss.notna().sum() >= 1
    about = load_json(run.folder / "provenance.json")
    assert (
        about["trained_on"] == 22 and about["held_out"] == 2 and about["guard"]["layers"] == [2] and about["steps"] == 6
    )
    # the adapter finds its base, and is the same model
    base, adapter, merged = load_model(tiny), load_model(str(run.folder)), load_model(str(run.folder / "merged"))
    ids = torch.tensor([[5, 6, 7]])
    a, b, c = (m.model(ids).logits for m in (base, adapter, merged))
    torch.testing.assert_close(b, c, atol=1e-4, rtol=1e-4)
    assert (a - b).abs().max() > 1e-3


def test_a_finished_run_is_not_trained_again_and_another_one_is_not_written_over(tiny, data, tmp_path, monkeypatch):
    c = config(tiny, data)
    first = finetune(c, tmp_path / "out")
    with monkeypatch.context() as m:
        m.setattr("persona_steer.finetuning.trainer_for", lambda *a: pytest.fail("trained again"))
        pd.testing.assert_frame_equal(finetune(c, tmp_path / "out").losses, first.losses)
    with pytest.raises(PersonaError, match="another training run"):
        finetune(config(tiny, data, seed=1), tmp_path / "out")
    changed = finetune(config(tiny, data, seed=1), tmp_path / "out", overwrite=True)
    assert not changed.losses.loss.equals(first.losses.loss)
    lm = load_model(tiny)
    a, b = (finetune_in(tmp_path / "many", config(tiny, data, seed=s), lm) for s in (0, 1))
    assert a.folder != b.folder and a.folder.parent == b.folder.parent


def cut_off(c, out, at, monkeypatch):
    """Train, but be interrupted at the beginning of a step."""
    import transformers

    step, seen = transformers.Trainer.training_step, []

    def killed(self, *a, **k):
        seen.append(1)
        if len(seen) == at:
            raise KeyboardInterrupt
        return step(self, *a, **k)

    with monkeypatch.context() as m:
        m.setattr(transformers.Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(c, out)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tiny, data, vector, tmp_path, monkeypatch):
    import transformers

    c = config(tiny, data, **guarded(vector, steering_coef=1.0))
    whole = finetune(c, tmp_path / "whole")
    cut_off(c, tmp_path / "cut", 4, monkeypatch)
    assert not (tmp_path / "cut" / "provenance.json").exists()
    step, seen = transformers.Trainer.training_step, []
    with monkeypatch.context() as m:
        m.setattr(
            transformers.Trainer,
            "training_step",
            lambda self, *a, **k: (seen.append(self.state.global_step), step(self, *a, **k))[1],
        )
        resumed = finetune(c, tmp_path / "cut")
    assert seen == [2, 3, 4, 5]  # from the checkpoint after step 2
    pd.testing.assert_frame_equal(resumed.losses, whole.losses)
    for p, q in zip(resumed.lm.model.parameters(), whole.lm.model.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_overwrite_removes_nothing_but_a_training_run(tiny, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PersonaError, match="is not the folder of a training run"):
        finetune(config(tiny, data), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_run_killed_after_its_last_step_is_finished(tiny, data, vector, tmp_path, monkeypatch):
    c = config(tiny, data, **guarded(vector))
    whole = finetune(c, tmp_path / "whole")
    with monkeypatch.context() as m:
        m.setattr("persona_steer.finetuning._save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            finetune(c, tmp_path / "cut")
    run = finetune(c, tmp_path / "cut")
    pd.testing.assert_series_equal(run.losses.loss, whole.losses.loss)
    assert run.losses.eval_loss.notna().any()


def test_a_half_written_checkpoint_is_passed_over(tiny, data, tmp_path, monkeypatch):
    c, whole = config(tiny, data), finetune(config(tiny, data), tmp_path / "whole")
    cut_off(c, tmp_path / "cut", 6, monkeypatch)
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "cut" / "checkpoint-5").mkdir()
    pd.testing.assert_frame_equal(finetune(c, tmp_path / "cut").losses, whole.losses)


def test_the_merged_model_can_be_asked_for_later(tiny, data, tmp_path):
    run = finetune(config(tiny, data, max_steps=1), tmp_path / "a")
    assert not (run.folder / "merged").exists()
    again = finetune(config(tiny, data, max_steps=1, save_merged=True), tmp_path / "a")
    assert load_model(str(again.folder / "merged")).fingerprint == run.lm.fingerprint


def test_what_cannot_be_learned_is_said(tiny, data, tmp_path):
    with pytest.raises(PersonaError, match="max_seq_length 4 cuts off every answer"):
        finetune(config(tiny, data, max_seq_length=4), tmp_path / "a")
    with pytest.raises(PersonaError, match="has no w_pack"):
        finetune(config(tiny, data, target_modules=["q_proj", "w_pack"]), tmp_path / "b")


def test_all_weights_can_be_trained(tiny, data, tmp_path):
    run = finetune(config(tiny, data, is_peft=False, max_steps=2), tmp_path / "out")
    assert not (run.folder / "adapter_config.json").exists() and run.lm.fingerprint != load_model(tiny).fingerprint


def test_training_on_an_adapter_is_refused(tiny, data, tmp_path):
    finetune(config(tiny, data, max_steps=1), tmp_path / "one")
    with pytest.raises(PersonaError, match="is an adapter: merge it first"):
        finetune(config(str(tmp_path / "one"), data), tmp_path / "two")


def test_the_loss_is_that_of_the_answers_alone(tiny, data, tmp_path):
    """The first logged loss is the mean over the batch's answer tokens, worked out by hand."""
    c = config(tiny, data, learning_rate=1e-12, max_steps=1, per_device_train_batch_size=24, test_share=0.0)
    got = finetune(c, tmp_path / "out").losses.loss[0]
    lm, total, count = load_model(tiny), 0.0, 0
    for e in tokenize_chats(lm, load_training_data(c)[0], c):
        ids, labels = torch.tensor([e["input_ids"]]), torch.tensor(e["labels"])
        with torch.no_grad():
            lp = lm.model(ids).logits[0].log_softmax(-1)
        where = (labels[1:] >= 0).nonzero()[:, 0]
        total -= lp[where, labels[1:][where]].sum().item()
        count += len(where)
    assert got == pytest.approx(total / count, rel=1e-4)


def test_two_processes_under_accelerate(tiny, data, vector, tmp_path):
    """The launcher that is documented, on two CPU processes: one adapter, one provenance, the guard on in both."""
    c = config(tiny, data, max_steps=2, device="cpu", **guarded(vector))
    (tmp_path / "c.json").write_text(json.dumps(c.model_dump()))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            "--no_python",
            str(Path(sys.executable).parent / "persona-steer"),
            "finetune",
            str(tmp_path / "c.json"),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    about = load_json(tmp_path / "out" / "provenance.json")
    assert (
        about["steps"] == 2
        and about["steered_passes"] >= 2
        and load_finetuned(tmp_path / "out").losses.loss.notna().sum() == 2
    )


def test_a_misspelt_key_is_named_even_if_another_is_missing():
    with pytest.raises(PersonaError, match="'training_fle' is unknown: did you mean 'training_file'"):
        load_config({"model": "pocket", "training_fle": "x.jsonl"})
