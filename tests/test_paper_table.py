"""Claims about experiments/paper_table.py: the pools, what is paired with what, what is kept."""
import json
import math
import shutil

import pytest
import torch

import sample
from datasets import open_dataset
from defect_gen import DefectGen
from diffusion import rng
from experiments import paper_table


def test_gains_are_paired_by_seed_and_blocks_are_averaged_first():
    base = {(0, seed): {"any": value} for seed, value in enumerate((10, 20, 30))}
    found = {(block, seed): {"any": base[0, seed]["any"] + gain + 2 * block}
             for seed, gain in enumerate((1, 2, 3)) for block in (0, 1)}
    mean, half = paper_table.difference(found, base, "any")
    assert mean == pytest.approx(3) and half == pytest.approx(4.30 * 1 / math.sqrt(3))
    assert math.isnan(paper_table.difference({(0, 0): {"any": 5}}, base, "any")[1])


def test_blots_cover_two_to_fifteen_percent_and_foreign_changes_nothing_beside_them():
    photo, room = torch.full((3, 64, 64), 90, dtype=torch.uint8), torch.ones(64, 64, dtype=torch.bool)
    for seed in range(5):
        image, mask = paper_table.foreign(photo, photo // 2, room, rng(seed))
        assert 0.015 < mask.float().mean() < 0.16
        assert (image[:, ~mask] == 90).all() and (image[:, mask] < 90).all()


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_pasted_pairs_take_the_classes_in_turn_and_leave_the_photo_as_it_is_beside_them(run, data):
    args = sample.parse_args(["--run", str(run), "--photos", str(data)])
    painter = sample.Painter(args, DefectGen.load(run))
    for name in ("pasted", "pasted where"):
        found = set()
        for seed in range(12):
            pair = paper_table.pasted_pair(painter, name, seed)
            if pair:
                found |= set(pair[1].unique().tolist()) - {0}
        assert found == set(painter.wishes.donors)


def test_the_table_keeps_finished_cells_of_the_same_pixels(run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "NUM_STEPS", 2)
    flags = ["paper_table", "--run", str(run), "--photos", str(data), "--arch", "segformer", "--seeds", "2",
             "--steps", "1", "--blocks", "1", "--pools", "real", "two-stage", "foreign", "relabelled",
             "--out", str(tmp_path / "t.json")]
    monkeypatch.setattr("sys.argv", flags)
    paper_table.main()
    first, cells = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())["cells"]
    assert len(cells) == 2 * 4 and first.count("±") == 13          # foreign has no mIoU of classes
    pairs = open_dataset(run / "pools" / "two-stage_0")
    assert len(pairs) == len(open_dataset(str(data), split="train"))
    monkeypatch.setattr(paper_table.Bench, "score", None)           # nothing is computed again
    paper_table.main()
    assert first[first.index("IoU in"):] in capsys.readouterr().out
    shutil.copy(pairs.samples[0].image, pairs.samples[1].image)
    with pytest.raises(TypeError):                                  # other pairs: other cells
        paper_table.main()


def test_more_photos_than_those_trained_on_are_asked_for(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["paper_table", "--run", str(run), "--pools", "more real", "--quick"])
    with pytest.raises(ValueError, match="--more train: .* no photo there but those trained on"):
        paper_table.main()


def test_more_real_photos_of_a_drawn_product_are_in_no_split():
    bench = paper_table.Bench.__new__(paper_table.Bench)
    bench.train, bench.size = open_dataset("drawn:wood", split="train"), (16, 16)
    other = bench.others()
    assert not {s.name for s in other.samples} & {s.name for s in open_dataset("drawn:wood").samples}
    assert other.size == (16, 16) and other.classes == bench.train.classes


def test_judged_pairs_are_asked_for_with_a_judge_and_a_least_fit(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["paper_table", "--run", str(run), "--pools", "judged"])
    with pytest.raises(ValueError, match="--pools judged takes a segmenter to judge by"):
        paper_table.main()
    asked = []
    monkeypatch.setattr(sample, "paint_pairs", asked.append)
    monkeypatch.setattr("sys.argv", ["paper_table", "--photos", str(data), "--judge", "judge.pt"])
    args = paper_table.parse_args()
    assert "judged" in args.pools
    for name in ("painted", "judged"):
        paper_table.make_pool(args, str(run), name, 2, 0)
    assert [(a.judge, a.min_fit) for a in asked] == [(None, 0), ("judge.pt", 0.2)]
