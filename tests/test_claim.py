"""The claim's experiment runs and goes on where it stopped."""
import json

import pytest
import torch

from datasets import open_dataset
from experiments import claim


@pytest.mark.slow
def test_a_run_through_measures_every_switch_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claim", "--quick", "--out", str(tmp_path)])
    claim.main()
    results = json.loads((tmp_path / "quick/claim.json").read_text())
    assert list(results["pill25"]) == ["4", "2"] and len(results["pill25"]["4"]) == 1 + len(claim.SWITCHES)
    first = capsys.readouterr().out
    monkeypatch.setattr(claim, "compare", None)                 # nothing is measured again
    claim.main()
    assert json.loads((tmp_path / "quick/claim.json").read_text()) == results and "25 pills" in first
    path = max((tmp_path / "quick/pill25/small").glob("*.pt"))
    torch.save(torch.load(path, weights_only=True) | {"seed": 1}, path)
    with pytest.raises(TypeError):                              # but with other weights it is
        claim.main()


def test_25_pills_are_25_that_train(tmp_path):
    claim.write_pills(tmp_path, count=30)
    for n in (5, 25):
        assert len(open_dataset(tmp_path, (32, 32), f"train{n}").defective()) == n
