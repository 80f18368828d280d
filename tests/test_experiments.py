"""The simulated line counts as one does by hand; speed compares networks that compute the same."""
import itertools
import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch

import evaluate
import sample
from datasets import open_dataset, write_classes, write_json, write_pair
from experiments import line, speed
from inspect_rules import Rule, Standard
from unet import LARGE, SMALL, UNet

CLASSES = "background", "crack", "dirt"
STANDARD = Standard("s", "bolt", (8, 8), None, "reject",
                    (Rule("no crack", ("crack",), 0), Rule("dirt below 4 px", ("dirt",), 4)))


# --- line ---

def test_at_even_odds_masks_are_those_of_argmax_and_higher_odds_take_pixels_away():
    logits = 4 * torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    logits[0, :, 0] = 1.0                                           # a tie, which argmax gives to background
    logits[1, 0, 0], logits[1, 1:, 0] = 0.0, 1e-6                   # and the closest of defects
    found = line.odds(logits)
    assert torch.equal(line.masks_at(*found), logits.argmax(1).byte())
    areas = [(line.masks_at(*found, level) > 0).sum().item() for level in line.LEVELS]
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[-1]


@pytest.mark.parametrize("areas", [(0, 3, 8, 8), (5, 5, 7, 20)])
@pytest.mark.parametrize("truths", [*itertools.product(("accept", "reject"), repeat=4)])
def test_no_other_limit_separates_better_and_of_equals_it_is_the_smallest(areas, truths):
    def youden(limit):
        hits = {"reject": [0], "accept": [0]}
        for area, truth in zip(areas, truths):
            hits[truth].append(area > 0 and area >= limit)
        recall, alarms = (Fraction(sum(h), max(1, len(h) - 1)) for h in hits.values())
        return recall - alarms
    best = max(map(youden, range(22)))
    assert line.best_limit(areas, truths) == min(t for t in (0, *areas, max(areas) + 1) if youden(t) == best)


@pytest.fixture
def bolts(tmp_path):
    """Good; 3 px of dirt, benign; 4 px of it where halving loses them; a crack of 1 px where it does not."""
    places = [(0, []), (2, [(1, 1), (3, 3), (5, 5)]), (2, [(0, 0), (0, 2), (2, 4), (6, 6)]), (1, [(5, 5)])]
    for kind, (value, pixels) in zip("abcd", places):
        mask = np.zeros((8, 8), np.uint8)
        mask[tuple(np.array(pixels, int).reshape(-1, 2).T)] = value
        write_pair(tmp_path, "000", np.full((3, 8, 8), 90, np.uint8), mask, kind)
    write_classes(tmp_path, CLASSES)
    return line.Product("bolt", open_dataset(tmp_path), STANDARD, [(4, 4), (16, 16)])


def test_the_truth_what_resolution_costs_and_verdicts_are_as_counted_by_hand(bolts):
    assert bolts.verdicts == ["accept", "accept", "reject", "reject"]
    # halved, nearest pixels are those of odd places: each stands for four, the others are lost
    assert line.resolution_table([bolts])["rows"] == [["bolt", "4x4", 4, 1, 1], ["bolt", "16x16", 4, 0, 0]]
    masks = torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, 0, 0], masks[3, 0, 0] = 2, 1                           # one pixel of 4x4 counts four
    findings = bolts.judge(masks, STANDARD, CLASSES)
    assert bolts.compare(findings) == ["false_alarm", "accepted", "miss", "rejected"]
    assert [line.broken(each) for each in findings] == [["dirt below 4 px"], [], [], ["no crack"]]


def test_rows_pool_counts_and_average_products(bolts):
    other = line.Product("nut", bolts.dataset, STANDARD)
    for way in line.WAYS:
        for product, seed, tp, fn in ((bolts, 0, 1, 2), (bolts, 1, 3, 0), (other, 0, 1, 0), (other, 1, 1, 0)):
            product.records.append(dict(way=way, seed=seed, level=0, tp=tp, fn=fn, fp=0, tn=2))
    rows = {row[0]: row[2:] for row in line.verdict_table([bolts, other])["rows"]}
    assert rows["bolt"][0] == "66.7 ± 47.1" and rows["bolt"][4:] == [4, 2, 0, 4]
    assert rows["bolt"][1] == evaluate.interval(4, 6, seeds=2)      # of three images, two are found
    assert rows["all products, pooled"][0] == "75.0 ± 35.4"         # 2 of 4 and 4 of 4
    assert rows["mean of products"][0] == "83.3 ± 23.6"             # (1/3 + 1) / 2 and 1


def test_the_line_runs_from_a_run_to_tables_and_pictures(data, trained, tmp_path, capsys, monkeypatch):
    run, out, standard = tmp_path / "bolt", tmp_path / "line", tmp_path / "standard.json"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("samples"))
    sample.draw_pairs(sample.parse_args(["--run", str(run), "--count", "4", "--num-steps", "2"]))
    rules = [{"classes": ["crack"], "max_area_px": 0}]
    write_json(standard, {"object": "bolt", "native_size": [24, 32], "rules": rules})
    flags = ["--standard", str(standard), "--out", str(out), "--quick"]
    line.line(*line.parse_args(["--run", str(run), *flags]))
    records = json.loads((out / "quick/line.json").read_text())["records"]["bolt"]
    assert [record["way"] for record in records if record["level"] == 0] == list(line.WAYS)
    assert {sum(record[key] for key in line.COUNTS) for record in records} == {8}
    pictures = [path.stem.split("_")[-1] for path in (out / "quick/verdicts").iterdir()]
    assert 0 < pictures.count("exact") == pictures.count("predicted")
    first = (out / "quick/line.json").read_bytes()
    monkeypatch.setattr(evaluate.Run, "network", None)              # what is judged is not trained again
    line.line(*line.parse_args(["--run", str(run), *flags]))
    assert (out / "quick/line.json").read_bytes() == first
    capsys.readouterr()
    line.line(*line.parse_args(["--data", str(data), *flags]))
    assert "Exact masks resized (nearest) and judged\n  product  size" in capsys.readouterr().out


# --- speed ---

@pytest.mark.parametrize("network", [dict(LARGE, channels=16), dict(SMALL, channels=16)])
def test_the_released_reference_computes_the_same_and_keeps_its_own_weights(network):
    torch.manual_seed(0)
    ours, x = UNet(5, **network), torch.randn(2, 5, 32, 32)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))     # the last layers begin at 0
    theirs, t = speed.released(ours), torch.tensor([3, 800])
    torch.testing.assert_close(theirs(x, t), ours(x, t), rtol=1e-4, atol=1e-4)
    before = next(theirs.parameters()).clone()
    speed.our_step(ours, x, bf16=False)()
    assert torch.equal(before, next(theirs.parameters()))
    speed.released_step(theirs, x)()
    assert not torch.equal(before, next(theirs.parameters()))


def test_a_part_is_written_beside_the_others(trained, tmp_path):
    path = tmp_path / "quick/speed.json"
    write_json(path, {"sampling": {"machine": "another"}})
    speed.speed(speed.parse_args(["--part", "size", "--run", str(trained), "--quick", "--device", "cpu",
                                  "--out", str(tmp_path)]))
    written = json.loads(path.read_text())
    assert written["sampling"] == {"machine": "another"}
    assert [row[0] for row in written["size"]["rows"]] == ["16x16", "32x32"]
