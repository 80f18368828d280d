"""The simulated line: verdicts, limits, floors and blame on cases small enough to count by hand."""
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

import segment
import simulation
from datasets import open_dataset, write_classes, write_pair
from inspect_rules import Rule, Standard, load_standard
from simulation import Line

CLASSES = "background", "crack", "dirt"
STANDARD = Standard("s", "bolt", (8, 8), None, "reject", (Rule("no crack", ("crack",), 0), Rule("dirt below 4 px", ("dirt",), 4)))


def data_of(folder, *masks):
    """A data set of grey pictures with these masks, kinds 'a', 'b', ..."""
    for kind, mask in zip("abcdefgh", masks):
        write_pair(folder, "000", np.full((3, *mask.shape), 90, np.uint8), mask, kind)
    write_classes(folder, CLASSES)
    return open_dataset(folder)


def points(*places, value=2, size=(8, 8)):
    mask = np.zeros(size, np.uint8)
    for place in places:
        mask[place] = value
    return mask


def seen(*masks):
    """Predictions that say these masks with the highest odds, as segment.odds writes them."""
    masks = torch.from_numpy(np.stack(masks))
    return torch.stack([masks.clamp(min=1), (masks > 0).to(torch.uint8) * 255], 1)


# --- confidence ---

def test_at_even_odds_the_masks_are_those_of_argmax_and_higher_odds_take_pixels_away():
    logits = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, :, 0] = 1.0                                           # a tie, which argmax gives to the background
    logits[1, 0, 0], logits[1, 1:, 0] = 0.0, 1e-6                   # and the closest of defects
    found = segment.odds(logits).to(torch.uint8)
    assert torch.equal(segment.masks_at(found), logits.argmax(1).to(torch.uint8))
    areas = [(segment.masks_at(found, level) > 0).sum().item() for level in simulation.LEVELS]
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[-1]


@pytest.mark.parametrize("log_odds, there", [(-3, True), (1.4, True), (1.6, False)])
def test_odds_are_those_of_the_likeliest_defect_against_the_background(log_odds, there):
    logits = torch.tensor([0.5, -9.0, 2.0]).view(1, 3, 1, 1)        # dirt against background: e ** 1.5
    assert segment.masks_at(segment.odds(logits), log_odds).item() == 2 * there
    assert simulation.confidence(1.5) == pytest.approx(100 * math.exp(2.0) / (math.exp(2.0) + math.exp(0.5)))


# --- the area limit ---

@pytest.mark.parametrize("areas, truths, limit", [
    ([0, 10, 50, 60], "aarr", 50), ([10, 50, 60], "rar", 60), ([10, 50, 60], "rra", 0), ([0, 5], "ar", 0), ([10, 20], "aa", 21), ([10, 20], "rr", 0), ([0, 0], "ar", 0),
    ([5, 5, 9], "arr", 9), ([1, 2, 3, 4], "arar", 2)])
def test_the_limit_has_the_largest_difference_and_is_the_smallest_of_equals(areas, truths, limit):
    assert simulation.best_limit(areas, [{"a": "accept", "r": "reject"}[t] for t in truths]) == limit


def test_no_other_limit_is_better():
    rng = random.Random(0)
    for _ in range(100):
        areas = [float(rng.choice((0, 0, 3, 7, 8, 20, 50))) for _ in range(9)]
        truths = [rng.choice(("accept", "reject")) for _ in areas]

        def youden(limit):
            hits = {word: [area >= limit and area > 0 for area, t in zip(areas, truths) if t == word] for word in ("reject", "accept")}
            recall, fpr = (Fraction(sum(h), len(h) or 1) for h in hits.values())
            return recall - fpr
        best = simulation.best_limit(areas, truths)
        assert youden(best) == max(youden(limit) for limit in range(53))
        assert all(youden(limit) < youden(best) for limit in {0.0, *areas} if limit < best)


# --- lines ---

@pytest.fixture
def line(tmp_path):
    """Good; 3 px of dirt, benign; 4 px of dirt; a crack; a crack with 3 px of dirt."""
    dirt = [(1, 1), (1, 2), (3, 3)]
    masks = [points(), points(*dirt), points(*dirt, (6, 6)), points((5, 5), value=1), points((5, 5), value=1) + points(*dirt)]
    line = Line("bolt", data_of(tmp_path, *masks), STANDARD, CLASSES)
    # predicted: a crack; too much dirt; nothing; the crack; dirt instead
    said = [points((0, 0), value=1), points(*dirt, (0, 0)), points(), points((5, 5), value=1), points((5, 5))]
    for seed in range(2):
        line.add("way", seed, seen(*(said if seed == 0 else masks)), STANDARD, CLASSES)
    return line


def test_verdicts_counts_and_blame_of_a_known_line(line):
    assert line.truth == ["accept", "accept", "reject", "reject", "reject"]
    assert [[rates[key] for key in simulation.COUNTS] for rates in line.per_seed("way")] == [[1, 2, 2, 0], [3, 0, 0, 2]]
    misses, alarms = line.blame("way")
    assert misses == {"dirt below 4 px": 1, "no crack": 1} and alarms == {"no crack": 1, "dirt below 4 px": 1}
    rows = {row[1]: row[2:] for row in simulation.rule_table([line])["rows"]}
    assert rows == {"dirt below 4 px": [1, "1 / 1"], "no crack": [2, "1 / 1"]}


def test_a_class_that_no_rule_names_is_blamed_by_its_own_name(line):
    standard = Standard("s", "bolt", (8, 8), None, "reject", (STANDARD.rules[0],))
    other = Line("bolt", line.dataset, standard, CLASSES)
    other.add("way", 0, seen(*(points() for _ in range(5))), standard, CLASSES)
    assert other.blame("way")[0] == {"dirt: no rule names this class (unnamed: reject)": 3, "no crack": 2}


def exact_tail(p, n, k):
    """P(k or more of n), by whole binomial coefficients."""
    return sum(math.comb(n, i) * p ** i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_rates_and_intervals_are_those_of_the_pooled_counts(line):
    result = simulation.pooled(line.per_seed("way"))
    pairs = [(truth, "reject" if any(f.verdict == "reject" for f in found) else "accept")
             for findings in line.findings.values() for truth, found in zip(line.truth, findings)]
    for rate, of in (("recall", "reject"), ("fpr", "accept")):
        said = [verdict == "reject" for truth, verdict in pairs if truth == of]
        hits, n = sum(said), len(said)
        assert result[rate] == hits / n and (hits, n) == {"recall": (4, 6), "fpr": (2, 4)}[rate]
        low, high = (Fraction(x) for x in result["intervals"][rate])
        assert float(exact_tail(low, n, hits)) == pytest.approx(0.025) and float(1 - exact_tail(high, n, hits + 1)) == pytest.approx(0.025)


def test_several_products_are_pooled_and_averaged(line, tmp_path):
    other = Line("nut", data_of(tmp_path / "nut", points(), points((5, 5), value=1)), STANDARD, CLASSES)
    for seed in range(2):
        other.add("way", seed, seen(points(), points((5, 5), value=1)), STANDARD, CLASSES)
    rows = {row[0]: row[2:] for row in simulation.verdict_table([line, other])["rows"]}
    assert rows["bolt"][4:] == [4, 2, 2, 2] and rows["nut"][4:] == [2, 0, 0, 2]
    assert rows["all products, pooled"][4:] == [6, 2, 2, 4]
    assert rows["all products, pooled"][0] == "75.0 ± 35.4"                     # per seed 2 of 4, 4 of 4
    assert rows["mean of products"][0] == "83.3 ± 23.6"                         # bolt 1/3 and 1, nut 1 and 1
    assert len(simulation.seed_table([line, other])["rows"]) == 4


def test_a_product_without_one_kind_of_truth_has_no_such_rate(tmp_path):
    line = Line("bolt", data_of(tmp_path, points((5, 5), value=1)), STANDARD, CLASSES)
    line.add("way", 0, seen(points()), STANDARD, CLASSES)
    assert simulation.verdict_table([line])["rows"] == [["bolt", "way", "0.0", "0.0 to 97.5", "–", "–", 0, 1, 0, 0]]


def test_resolution_costs_what_nearest_pixels_lose(tmp_path):
    """Halved, nearest pixels are those of odd places: each stands for four, those of even places are lost."""
    alone, lost = points((1, 1)), points((0, 0), (0, 2), (2, 4), (6, 6))
    line = Line("bolt", data_of(tmp_path, alone, lost, points(), np.full((8, 8), 2, np.uint8)), STANDARD, CLASSES, sizes=[(4, 4), (8, 8), (16, 16)])
    assert line.truth == ["accept", "reject", "accept", "reject"]
    counts = {size: [rates[key] for key in simulation.COUNTS] for size, rates in line.floors.items()}
    assert counts == {(4, 4): [1, 1, 1, 1], (8, 8): [2, 0, 0, 2], (16, 16): [2, 0, 0, 2]}
    rows = simulation.floor_table([line], {"bolt": (4, 4)})["rows"]
    assert [row[1:6] for row in rows] == [["4x4 (the run's)", 4, 2, 1, 1], ["8x8", 4, 0, 0, 0], ["16x16", 4, 0, 0, 0], ["native, 8x8", 4, 0, 0, 0]]


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_the_floor_of_a_size_is_fitted_as_the_run_fits(tmp_path, fit):
    """A crack at the left edge of a wide photo: only a crop does not see it."""
    line = Line("bolt", data_of(tmp_path, points(np.s_[:, :2], value=1, size=(8, 16))), Standard("s", "bolt", None, None, "reject", STANDARD.rules),
                CLASSES, fit, sizes=[(8, 8)])
    assert line.floors[8, 8]["recall"] == (0 if fit == "crop" else 1)


def test_photos_that_differ_in_size_are_judged_in_their_own_pixels(tmp_path):
    standard = Standard("s", "bolt", None, None, "reject", (Rule("dirt below 40 px", ("dirt",), 40),))
    line = Line("bolt", data_of(tmp_path, points(np.s_[:2, :2], size=(8, 8)), points(np.s_[:8, :8], size=(16, 32))), standard, CLASSES)
    assert line.truth == ["accept", "reject"] and line.natives == [(8, 8), (16, 32)]
    line.add("way", 0, seen(points(np.s_[:2, :2]), points(np.s_[:2, :5])), standard, CLASSES)
    assert [found[0].area_px for found in line.findings["way", 0]] == [4, 10 * 8]              # 64 mask pixels for 512 native ones


def test_the_gallery_shows_each_kind_of_verdict_with_its_reasons(line):
    said = [points((0, 0), value=1), points(*[(1, 1), (1, 2), (3, 3)]), points(), points((5, 5), value=1), points((5, 5))]
    line.add("spectrum: standard", 0, seen(*said), STANDARD, CLASSES)
    pictures = simulation.gallery(line, "spectrum: standard", 0, seen(*said))
    files, shown, captions = zip(*pictures)
    assert set(f.rsplit("_", 2)[0] for f in files) == {"accepted", "rejected", "false_alarm", "miss"} and len(files) == 2 * 5
    assert captions[files.index("false_alarm_1_exact.png")] == "False alarm: bolt a/000, exact mask. accept: no defect"
    assert captions[files.index("miss_1_exact.png")].endswith("reject: dirt below 4 px (dirt, area 4 px, limit 4)")
    assert captions[files.index("miss_1_predicted.png")].endswith("accept: no defect")
    assert all(np.asarray(picture).std() > 0 for picture in shown)


def test_reasons_are_cut_after_four(tmp_path):
    standard = Standard("s", "bolt", (8, 8), None, "reject", (Rule("spot", ("dirt",), 1, per="component", connectivity=4),))
    line = Line("bolt", data_of(tmp_path, points(*itertools.product((0, 2, 4), (0, 2)))), standard, CLASSES)
    assert simulation.reason_text(line.truths[0]).endswith("limit 1) and 2 more")


def test_the_command_prints_the_floors(tmp_path, capsys):
    simulation.main(simulation.parse_args(["--count", "3", "--sizes", "8,16"]))
    out = capsys.readouterr().out
    assert "8x8" in out and "native, 800x800" in out
    with pytest.raises(ValueError, match="--sizes 8,x: expected sides"):
        simulation.main(simulation.parse_args(["--count", "3", "--sizes", "8,x"]))
    assert load_standard("pill")
