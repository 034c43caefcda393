"""What a newcomer's walk through the chapters met: files that changed since, choices for other vectors, claims."""

import pandas as pd
import pytest
import torch

from persona_steer.projection import project_file


@pytest.fixture
def bank(llama):
    return {"v": torch.randn(llama.n_layers + 1, llama.hidden_size, generator=torch.Generator().manual_seed(1))}


def two_rows(lm, path, **more):
    rows = [dict(question=q, prompt=lm.prompt(q), answer="Bake it.", **more) for q in ("Why?", "How?")]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_columns_that_a_source_has_got_since_come_into_its_projected_copy(tmp_path, llama, bank, monkeypatch):
    source, target = two_rows(llama, tmp_path / "a.csv"), tmp_path / "out" / "a.csv"
    project_file(llama, source, bank, [2], target)
    old = pd.read_csv(target)
    two_rows(llama, source, evil="50")
    with monkeypatch.context() as m:
        m.setattr("persona_steer.projection.project", lambda *a, **k: pytest.fail("projected again"))
        project_file(llama, source, bank, [2], target)
    new = pd.read_csv(target)
    assert list(new.evil) == [50, 50] and old.llama_v_proj_layer2.equals(new.llama_v_proj_layer2)


def test_prompts_without_marks_of_the_chat_template_are_told(tmp_path, llama, bank, capsys):
    project_file(llama, two_rows(llama, tmp_path / "a.csv"), bank, [2])
    assert "no marks" not in capsys.readouterr().out
    pd.DataFrame([dict(prompt="Why?", answer="Bake it.")]).to_csv(tmp_path / "bare.csv", index=False)
    project_file(llama, tmp_path / "bare.csv", bank, [2])
    assert capsys.readouterr().out.count("hold no marks of llama's chat template: they are read as they are") == 1
