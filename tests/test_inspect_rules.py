"""Claims of inspect_rules.py: where each limit lies, in which pixels, which pixels belong together, and that bad input is one sentence
and costs nothing else."""

import ast
import csv
import json
import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inspect_rules as ir

RULES = [(name, i) for name, standard in ir.STANDARDS.items() for i in range(len(standard["rules"]))]
PILL = ir.LABELS["pill"]


def draw(classes, areas, size):
    """Index mask of size (H, W) with areas[name] pixels of each class, laid out one after the other."""
    mask = np.zeros(size, np.uint8)
    start = 0
    for name, area in areas.items():
        mask.ravel()[start:start + area] = classes.index(name)
        start += area
    return mask


def save(path, mask, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    (image.convert(mode) if mode else image).save(path)
    return path


def good_standard(**change):
    return {"object": "pill", "native_size": [8, 8], "rules": [{"classes": ["crack"], "max_area_px": 0}]} | change


def rule(**change):
    return good_standard(rules=[{"classes": ["crack"], "max_area_px": 3} | change])


def write_json(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


# --- limits and areas ---

@pytest.mark.parametrize("name, i", RULES)
@pytest.mark.parametrize("zoom", [0.5, 1, 2])                 # mask of half, native and double size: a pixel counts 4, 1, 1/4
def test_every_rule_accepts_below_its_limit_and_rejects_from_it_on(name, i, zoom):
    standard, classes, scale = ir.load_standard(name, ir.LABELS[name]), ir.LABELS[name], 1 / zoom**2
    size, r = tuple(int(n * zoom) for n in standard.native_size), standard.rules[i]
    at = math.ceil(r.limit / scale)                           # in mask pixels: the first count that meets the limit
    for count in {max(at - 1, 0), at, at + 1}:
        findings = ir.judge(draw(classes, {r.classes[0]: count}, size), standard, classes, "picture")
        expected = "reject" if count >= max(at, 1) else "accept"
        assert ir.verdict(findings) == expected
        assert [f.row()[:10] for f in findings] == ([("picture", "+".join(r.classes), count * scale, r.limit, expected, r.name, "area_px",
                                                      "image", count * scale, r.limit - count * scale)] if count else [])


def test_classes_of_one_rule_are_summed():
    standard, classes = ir.load_standard("zipper"), ir.LABELS["zipper"]
    halves = draw(classes, {"fabric_border": 2400, "fabric_interior": 2399}, standard.native_size)
    assert ir.verdict(ir.judge(halves, standard, classes)) == "accept"
    halves[-1, -1] = classes.index("fabric_border")
    (finding,) = ir.judge(halves, standard, classes)
    assert (finding.class_name, finding.area_px, finding.verdict) == ("fabric_border+fabric_interior", 4800, "reject")


def test_findings_come_in_the_order_of_the_rules_then_of_the_class_table():
    mask = draw(PILL, {"pill_type": 1, "scratch": 1, "color": 1, "contamination": 5000, "crack": 1}, (800, 800))
    findings = ir.judge(mask, ir.load_standard("pill"), PILL)
    assert [(f.class_name, f.verdict) for f in findings] == [("crack", "reject"), ("contamination", "reject"),
                                                             ("color", "accept"), ("scratch", "reject"), ("pill_type", "reject")]


@pytest.mark.parametrize("unnamed", ["accept", "reject", None])
def test_a_class_that_no_rule_names_is_decided_by_unnamed_and_rejected_by_default(tmp_path, unnamed):
    data = good_standard(**({"unnamed": unnamed} if unnamed else {}))
    standard = ir.load_standard(write_json(tmp_path / "s.json", data))
    (finding,) = ir.judge(draw(PILL, {"scratch": 2}, (8, 8)), standard, PILL)
    assert (finding.class_name, finding.limit, finding.verdict) == ("scratch", None, unnamed or "reject")
    assert "no rule names this class" in finding.rule


def test_a_squashed_mask_is_scaled_by_its_area():
    (finding,) = ir.judge(draw(PILL, {"contamination": 10}, (400, 200)), ir.load_standard("pill"), PILL)
    assert (finding.area_px, finding.scale) == (80, 8)


def test_built_in_standards_name_labels_of_their_object_and_state_unnamed():
    for name, data in ir.STANDARDS.items():
        assert ir.load_standard(name, ir.LABELS[name]).object == name and data["unnamed"] == "reject"


# --- components ---

def flood(mask, connectivity):
    """The components of a bool mask as sets of (row, column), in reading order: recursion spelt out, nothing of the product."""
    left, components = {tuple(p) for p in np.argwhere(mask).tolist()}, []
    for pixel in sorted(left):
        if pixel in left:
            left.remove(pixel)
            group, front = {pixel}, [pixel]
            while front:
                y, x = front.pop()
                for other in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if connectivity == 8 or abs(dy) + abs(dx) == 1):
                    if other in left:
                        left.remove(other)
                        group.add(other)
                        front.append(other)
            components.append(group)
    return components


def pixels_of(runs):
    return {(row, x) for row, start, stop in runs.T.tolist() for x in range(start, stop)}


def hard_masks():
    """Bool masks of many shapes and densities, and the shapes that trouble labelling: spirals, combs, rings, diagonals, checkerboards."""
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 24, 2)) < density for density in (0.05, 0.3, 0.5, 0.6, 0.8, 1.0) for _ in range(25)]
    y, x = np.indices((21, 21))
    rings = np.minimum(np.minimum(y, x), 20 - np.maximum(y, x)) % 2 == 0
    combs = (x % 2 == 0) | (y == 20), (x % 2 == 0) | (y == 0), (x % 4 == 0) | ((y == 0) & (x % 8 < 5)) | ((y == 20) & (x % 8 > 3))
    return masks + [rings, *combs, *(c.T for c in combs), (x + y) % 2 == 0, y == x, y == 20 - x, ir.bench_masks(33)["spiral"],
                    ~ir.bench_masks(32)["spiral"], np.ones((1, 1), bool), np.ones((1, 9), bool), np.ones((9, 1), bool)]


@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_equal_a_flood_fill(connectivity):
    for mask in hard_masks():
        if not mask.any():
            continue
        runs, bounds, area, box = ir.find_components(ir.find_runs(mask), connectivity)
        expected = flood(mask, connectivity)
        assert [pixels_of(runs[:, a:b]) for a, b in zip(bounds, bounds[1:])] == expected
        assert area.tolist() == [len(group) for group in expected] == ir.flood_fill(mask, connectivity)
        assert box.tolist() == [[min(y for y, _ in g), min(x for _, x in g), max(y for y, _ in g) + 1, max(x for _, x in g) + 1]
                                for g in expected]


def test_touching_classes_of_one_rule_are_one_component_and_those_of_two_are_not():
    mask = np.array([[1, 2, 3, 0, 2], [0, 0, 0, 1, 0]], np.uint8)
    chosen = lambda *values: ir.find_runs(mask)[:, np.isin(ir.find_runs(mask)[3], values)]
    assert ir.find_components(chosen(1, 2), 8)[2].tolist() == [2, 2] and ir.find_components(chosen(1, 2), 4)[2].tolist() == [2, 1, 1]
    assert ir.find_components(chosen(1, 2, 3), 8)[2].tolist() == [5] and ir.find_components(chosen(2), 8)[2].tolist() == [1, 1]


def test_runs_are_the_mask():
    mask = np.random.default_rng(1).integers(0, 3, (17, 23)).astype(np.uint8)
    again = np.zeros_like(mask)
    for row, start, stop, value in ir.find_runs(mask).T:
        again[row, start:stop] = value
    np.testing.assert_array_equal(again, mask)


@pytest.mark.parametrize("native", [(1, 1), (3, 2), (Fraction(1, 2), 5)], ids=str)
def test_the_longest_extent_equals_the_largest_distance_of_all_corners(native):
    for mask in hard_masks():
        h, w = mask.shape
        zoom = ((int(native[0] * h * 2), h * 2), (int(native[1] * w * 2), w * 2))
        if not mask.any():
            continue
        runs, bounds, area, box = ir.find_components(ir.find_runs(mask), 8)
        for i, group in enumerate(flood(mask, 8)):
            corners = np.array(sorted({(y + a, x + b) for y, x in group for a in (0, 1) for b in (0, 1)}), float) * [float(n) for n in native]
            brute = np.sqrt(((corners[:, None] - corners) ** 2).sum(-1)).max()
            assert math.isclose(ir.longest_extent(runs[:, bounds[i]:bounds[i + 1]], zoom), brute, rel_tol=1e-12)


def test_lengths_that_are_not_looked_at_are_neither_longest_nor_at_the_limit():
    for mask in hard_masks():
        if mask.any():
            runs, bounds, area, box = ir.find_components(ir.find_runs(mask), 8)
            all_of_them = [ir.longest_extent(runs[:, a:b], ((1, 1), (1, 1))) for a, b in zip(bounds, bounds[1:])]
            for limit in 0, 2, 3, 1000:
                found = ir.component_lengths(runs, bounds, box, ((1, 1), (1, 1)), 1, limit, np.arange(len(area)))
                assert found.max() == max(all_of_them)
                assert [v for v in found if v >= limit] == [v for v in all_of_them if v >= limit]


def test_extent_of_a_tall_component_is_found_in_blocks():
    tall = np.zeros((1000, 750), np.uint8)
    tall[np.arange(1000), np.arange(1000) * 3 // 4] = 1
    tall[0, 0] = tall[-1, -1] = 1
    runs, *_ = ir.find_components(ir.find_runs(tall), 8)
    assert ir.longest_extent(runs, ((1000, 1000), (750, 750))) == 1250


# --- rules on components ---

def standard_of(*rules, classes=("background", "a", "b"), **change):
    """judge(mask) by a standard of JSON rules that went through load_standard."""
    ir.STANDARDS["test"] = {"object": "test", "native_size": "mask", "rules": list(rules)} | change
    try:
        standard = ir.load_standard("test", classes)
    finally:
        del ir.STANDARDS["test"]
    return lambda mask, **more: ir.judge(np.array(mask, np.uint8), standard, classes, **more)


def bar(height, width, value=1, size=(12, 12)):
    mask = np.zeros(size, np.uint8)
    mask[1:1 + height, 1:1 + width] = value
    return mask


@pytest.mark.parametrize("limit, per, below, at, above, value", [
    ({"max_area_px": 6}, "image", bar(1, 5), bar(2, 3), bar(1, 7), 6),
    ({"max_area_px": 6, "per": "component"}, "component", bar(1, 5), bar(2, 3), bar(1, 7), 6),
    ({"max_area_mm2": 1.5}, "image", bar(1, 5), bar(2, 3), bar(1, 7), 1.5),
    ({"max_area_mm2": 1.5, "per": "component"}, "component", bar(1, 5), bar(2, 3), bar(1, 7), 1.5),
    ({"max_count": 2}, "image", bar(9, 9), bar(1, 1) | bar(1, 1)[::-1, ::-1], bar(1, 1) | bar(1, 1)[::-1] | bar(1, 1)[::-1, ::-1], 2),
    ({"max_length_px": 5}, "component", bar(3, 3), bar(3, 4), bar(4, 4), 5),
    ({"max_length_mm": 2.5}, "component", bar(3, 3), bar(3, 4), bar(4, 4), 2.5)])
def test_each_kind_of_limit_rejects_from_the_limit_on(limit, per, below, at, above, value):
    judge = standard_of({"classes": ["a"], **limit}, px_per_mm=2)
    for mask, decision in (below, "accept"), (at, "reject"), (above, "reject"):
        (finding, *others) = judge(mask)
        assert finding.verdict == decision and finding.per == per and "max_" + finding.measure in limit and not others
        assert finding.margin == finding.limit - finding.value and (finding.margin <= 0) == (decision == "reject")
    assert judge(at)[0].value == value and judge(at)[0].margin == 0 and judge(np.zeros((12, 12))) == []
    zero = standard_of({"classes": ["a"], **{key: 0 if key.startswith("max") else v for key, v in limit.items()}}, px_per_mm=2)
    assert zero(bar(1, 1))[0].verdict == "reject" and zero(np.zeros((12, 12))) == []


def test_parts_below_a_limit_may_together_be_above_it():
    mask = bar(2, 3) | bar(2, 3)[::-1, ::-1]
    (alone,) = standard_of({"classes": ["a"], "max_area_px": 7, "per": "component"})(mask)
    (together,) = standard_of({"classes": ["a"], "max_area_px": 7})(mask)
    assert (alone.verdict, alone.area_px, alone.box) == ("accept", 6, (1, 1, 3, 4))
    assert (together.verdict, together.area_px, together.box) == ("reject", 12, (1, 1, 11, 11))


def test_every_rejected_component_is_a_finding_and_else_the_largest():
    mask = bar(1, 2) | bar(2, 2)[::-1] | bar(3, 3)[:, ::-1]
    judge = lambda limit: standard_of({"classes": ["a"], "max_area_px": limit, "per": "component"})(mask)
    assert [f.area_px for f in judge(4)] == [9, 4] and [f.area_px for f in judge(0)] == [2, 9, 4]
    assert [(f.area_px, f.verdict) for f in judge(10)] == [(9, "accept")]


@pytest.mark.parametrize("least, count, noise", [(0, 3, 0), (1, 3, 0), (2, 3, 0), (2.5, 2, 1), (4, 2, 1), (5, 1, 2), (9, 1, 2)])
def test_components_below_the_minimum_are_noise_and_counted_as_such(least, count, noise):
    mask = bar(1, 2) | bar(2, 2)[::-1] | bar(3, 3)[:, ::-1]
    (finding,) = standard_of({"classes": ["a"], "max_count": 3, "min_component_px": least})(mask)
    assert (finding.value, finding.noise, finding.verdict) == (count, noise, "reject" if count == 3 else "accept")
    (finding,) = standard_of({"classes": ["a"], "max_area_px": 15, "min_component_px": least})(mask)
    assert finding.value == finding.area_px == {3: 15, 2: 13, 1: 9}[count] and finding.noise == noise


@pytest.mark.parametrize("limit", ["max_area_px", "max_count", "max_length_px"])
def test_nothing_but_noise_is_accepted_and_reported(limit):
    (finding,) = standard_of({"classes": ["a"], limit: 0, "min_component_px": 10})(bar(3, 3))
    assert (finding.verdict, finding.value, finding.area_px, finding.box, finding.noise) == ("accept", 0, 0, (), 1)
    assert "(1 smaller left out)" in ir.cells(finding)[-1] and len(finding.row()) == len(ir.COLUMNS)


def test_connectivity_decides_whether_a_diagonal_is_one_piece():
    count = lambda **change: standard_of({"classes": ["a"], "max_count": 99, **change})(np.eye(5))[0].value
    assert count() == count(connectivity=8) == 1 and count(connectivity=4) == 5


def test_a_class_may_have_a_rule_for_each_thing_that_is_measured():
    rules = [{"classes": ["a"], "max_area_px": 50}, {"classes": ["a", "b"], "max_area_px": 9, "per": "component"},
             {"classes": ["a"], "max_count": 3}, {"classes": ["a"], "max_length_px": 6}]
    findings = standard_of(*rules)(bar(2, 5))
    assert [(f.rule, f.verdict) for f in findings] == [("a below 50 px", "accept"), ("each a+b below 9 px", "reject"),
                                                       ("a below 3 pieces", "accept"), ("each a shorter than 6 px", "accept")]


@pytest.mark.parametrize("k", [2, 3, 7])
def test_areas_lengths_and_boxes_are_exact_when_a_mask_is_enlarged_by_a_whole_factor(k):
    rng = np.random.default_rng(k)
    rules = [{"classes": ["a"], "max_area_px": 3}, {"classes": ["a", "b"], "max_area_px": 3, "per": "component"},
             {"classes": ["a"], "max_count": 9}, {"classes": ["b"], "max_length_px": 4}, {"classes": ["b"], "max_area_mm2": 2, "min_component_px": 2}]
    for _ in range(20):
        mask = rng.choice(3, (11, 14), p=(0.7, 0.15, 0.15))
        judge = standard_of(*rules, native_size=[11, 14], px_per_mm=3)
        for enlarged in np.kron(mask, np.ones((k, k), int)), np.kron(mask, np.ones((1, k), int)), np.kron(mask, np.ones((k, 1), int)):
            connected = [replace(f, scale=1.0) for f in judge(enlarged)]
            assert connected == judge(mask)


def test_mask_as_native_size_counts_the_masks_own_pixels_unless_told_the_photos():
    judge = standard_of({"classes": ["a"], "max_area_px": 100}, {"classes": ["a"], "max_length_px": 100})
    assert [(f.value, f.scale) for f in judge(bar(3, 4))] == [(12, 1), (5, 1)]
    area, length = judge(bar(3, 4), native_size=(24, 36))
    assert (area.value, area.box, area.scale) == (72, (2, 3, 8, 15), 6) and length.value == math.hypot(6, 12)


def test_unnamed_error_names_the_image_and_the_class():
    judge = standard_of({"classes": ["a"], "max_area_px": 3}, unnamed="error")
    assert judge(bar(1, 1))[0].verdict == "accept"
    with pytest.raises(ValueError, match="photo 7: class 'b' is in the mask, but no rule"):
        judge(bar(1, 1, 2), image="photo 7")


def test_the_example_standard_of_the_magnetic_tile_fits_its_classes():
    path = Path(ir.__file__).parent / "docs/magnetic_tile.json"
    tile = ("background", "blowhole", "break", "crack", "fray", "uneven")
    standard = ir.load_standard(path, tile)
    assert standard.native_size is None and {c for r in standard.rules for c in r.classes} == set(tile[1:])
    holes = np.zeros((60, 60), np.uint8)
    holes[2:12, 2:13] = holes[40:50, 40:51] = 1
    assert ir.verdict(ir.judge(holes, standard, tile)) == "accept"
    holes[12, 2:12] = 1                                       # 110 + 10 px: the limit
    assert [f.margin for f in ir.judge(holes, standard, tile) if f.verdict == "reject"] == [0]


def test_the_example_standard_of_the_readme_is_valid(tmp_path):
    text = (Path(ir.__file__).parent / "README.md").read_text(encoding="utf-8")
    standard = ir.load_standard(write_json(tmp_path / "s.json", text.split("```json\n")[1].split("```")[0]))
    assert {"max_" + r.measure for r in standard.rules} == {"max_area_px", "max_area_mm2", "max_count", "max_length_mm"}
    assert ir.load_standard(write_json(tmp_path / "again.json", standard.as_json())) == standard


# --- recall and false positive rate ---

def test_recall_fpr_equals_a_plain_loop():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        truths, verdicts = rng.choice(["accept", "reject"], (2, 1 + seed % 7)).tolist()
        tp = fp = fn = tn = 0
        for truth, said in zip(truths, verdicts):
            if truth == "reject" and said == "reject":
                tp += 1
            elif truth == "reject":
                fn += 1
            elif said == "reject":
                fp += 1
            else:
                tn += 1
        assert ir.recall_fpr(truths, verdicts) == {"recall": tp / (tp + fn) if tp + fn else None,
                                                   "fpr": fp / (fp + tn) if fp + tn else None,
                                                   "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def test_rates_without_a_denominator_are_none():
    assert ir.recall_fpr([], []) == {"recall": None, "fpr": None, "tp": 0, "fp": 0, "fn": 0, "tn": 0}
    assert ir.recall_fpr(["accept"], ["reject"])["recall"] is None and ir.recall_fpr(["accept"], ["reject"])["fpr"] == 1
    assert ir.recall_fpr(["reject"], ["reject"])["fpr"] is None and ir.recall_fpr(["reject"], ["reject"])["recall"] == 1


@pytest.mark.parametrize("truths, verdicts", [(["accept"], []), (["accept"], ["bad"]), ([True], ["accept"])])
def test_recall_fpr_refuses_what_is_no_verdict(truths, verdicts):
    with pytest.raises(ValueError, match="accept"):
        ir.recall_fpr(truths, verdicts)


# exact 95 % intervals in %: 0 and all of 10 in closed form, 1 - 0.025^(1/10) = 30.85 %; the others are in any table of Clopper-Pearson limits
@pytest.mark.parametrize("hits, trials, low, high", [(0, 10, 0, 30.85), (10, 10, 69.15, 100), (1, 10, 0.25, 44.50), (5, 10, 18.71, 81.29),
                                                     (0, 1, 0, 97.5), (8, 20, 19.12, 63.95), (50, 100, 39.83, 60.17)])
def test_the_binomial_interval_is_that_of_the_tables(hits, trials, low, high):
    assert [round(100 * limit, 2) for limit in ir.binomial_interval(hits, trials)] == [low, high]


def test_the_binomial_interval_leaves_half_of_the_error_on_each_side():
    def tail(p, n, which):                                    # exact: binomial coefficients are whole numbers
        return float(sum(math.comb(n, k) * Fraction(p) ** k * (1 - Fraction(p)) ** (n - k) for k in which))
    for n in 1, 2, 7, 30:
        for hits in range(n + 1):
            low, high = ir.binomial_interval(hits, n, 0.9)
            assert low == 0 if hits == 0 else math.isclose(tail(low, n, range(hits, n + 1)), 0.05, rel_tol=1e-9)
            assert high == 1 if hits == n else math.isclose(tail(high, n, range(hits + 1)), 0.05, rel_tol=1e-9)


def test_the_binomial_interval_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, trials in (0, 3), (3, 3), (1, 77), (77, 105), (500, 1000), (3, 20000):
        for confidence in 0.5, 0.95, 0.999:
            expected = stats.binomtest(hits, trials).proportion_ci(confidence, "exact")
            assert np.allclose(ir.binomial_interval(hits, trials, confidence), (expected.low, expected.high), rtol=1e-8, atol=0)


def test_an_interval_without_trials_is_none_and_nonsense_is_refused():
    assert ir.binomial_interval(0, 0) is None
    for wrong in (2, 1), (-1, 3), (1, 3, 0), (1, 3, 1), (1, 3, 95), (float("nan"), 3):
        with pytest.raises(ValueError, match="hits"):
            ir.binomial_interval(*wrong)


# --- bad standards, class tables and masks ---

BAD_STANDARDS = {
    "bad json": ("{", "cannot be read as JSON"),
    "not an object": ([1], "expected a JSON object"),
    "no object": ({"native_size": [8, 8], "rules": []}, "'object' is missing"),
    "no native_size": ({"object": "pill", "rules": []}, "'native_size' is missing"),
    "no rules": ({"object": "pill", "native_size": [8, 8]}, "'rules' is missing"),
    "unknown key": (good_standard(nativesize=1), "'nativesize'.*known are object, native_size, rules, unnamed"),
    "key twice": ('{"object": "pill", "object": "pill", "native_size": [8, 8], "rules": []}', "the key 'object' is there 2 times"),
    "rule's key twice": ('{"object": "pill", "native_size": [8, 8], "rules": [{"classes": ["crack"], "max_area_px": 9, "max_area_px": 0}]}',
                         "the key 'max_area_px' is there 2 times"),
    "object empty": (good_standard(object=" "), "object must"),
    "name a number": (good_standard(name=3), "name must"),
    "mm without scale": (good_standard(rules=[{"classes": ["crack"], "max_area_mm2": 3}]), r"rules\[0\]: max_area_mm2 needs .*px_per_mm"),
    "scale zero": (good_standard(px_per_mm=0), "px_per_mm must"),
    "scale negative": (good_standard(px_per_mm=-1), "px_per_mm must"),
    "scale nan": (good_standard(px_per_mm=float("nan")), "px_per_mm must"),
    "scale text": (good_standard(px_per_mm="10"), "px_per_mm must"),
    "scale null": (good_standard(px_per_mm=None), "px_per_mm must"),
    "two limits": (rule(max_count=3), r"rules\[0\]: exactly one limit.*not max_area_px and max_count"),
    "count no whole number": (good_standard(rules=[{"classes": ["crack"], "max_count": 1.5}]), "max_count must be a whole number"),
    "length a text": (good_standard(rules=[{"classes": ["crack"], "max_length_px": "3"}]), "max_length_px must"),
    "length nan": (good_standard(rules=[{"classes": ["crack"], "max_length_px": float("nan")}]), "max_length_px must"),
    "per": (rule(per="pixel"), "per must be image or component"),
    "count per component": (good_standard(rules=[{"classes": ["crack"], "max_count": 1, "per": "component"}]), "per must be image for"),
    "length per image": (good_standard(rules=[{"classes": ["crack"], "max_length_px": 1, "per": "image"}]), "per must be component for"),
    "connectivity": (rule(connectivity=6), "connectivity must be 8 or 4"),
    "connectivity a float": (rule(connectivity=8.0), "connectivity must be 8 or 4"),
    "connectivity a text": (rule(connectivity="8"), "connectivity must be 8 or 4"),
    "noise negative": (rule(min_component_px=-1), "min_component_px must"),
    "noise a text": (rule(min_component_px="1"), "min_component_px must"),
    "name twice": (good_standard(rules=[{"name": "x", "classes": ["crack"], "max_area_px": 0}, {"name": "x", "classes": ["color"],
                                        "max_area_px": 3}]), r"rules\[1\]: name 'x' is that of rules\[0\]"),
    "class twice in a rule": (rule(classes=["crack", "crack"]), r"'crack', which rules\[0\] already names"),
    "area in px and in mm2": (good_standard(px_per_mm=1, rules=[{"classes": ["crack"], "max_area_px": 9}, {"classes": ["crack"],
                                            "max_area_mm2": 3}]), r"rules\[1\].*'crack'.*rules\[0\] already names for the area per image"),
    "object no text": (good_standard(object=3), "object must"),
    "empty rules": (good_standard(rules=[]), "rules must"),
    "rules no list": (good_standard(rules={}), "rules must"),
    "rule no object": (good_standard(rules=["crack"]), r"rules\[0\]: expected a JSON object"),
    "rule without limit": (good_standard(rules=[{"classes": ["crack"]}]), r"rules\[0\]: exactly one limit.*max_area_px.*not none"),
    "rule without classes": (good_standard(rules=[{"max_area_px": 0}]), r"rules\[0\].*'classes' is missing"),
    "rule's unknown key": (rule(max_area=3), r"rules\[0\].*'max_area'.*known are classes, max_area_px, .*name"),
    "negative": (rule(max_area_px=-1), "max_area_px must"),
    "text limit": (rule(max_area_px="3"), "max_area_px must"),
    "nan": (rule(max_area_px=float("nan")), "max_area_px must"),
    "infinite": (rule(max_area_px=float("inf")), "max_area_px must"),
    "huge": (rule(max_area_px=10**400), "max_area_px must"),
    "bool": (rule(max_area_px=True), "max_area_px must"),
    "null": (rule(max_area_px=None), "max_area_px must"),
    "classes a text": (rule(classes="crack"), "classes must"),
    "classes numbers": (rule(classes=[1]), "classes must"),
    "classes empty": (rule(classes=[]), "classes must"),
    "class twice": (good_standard(rules=[{"classes": ["crack"], "max_area_px": 0}, {"classes": ["color", "crack"],
                                         "max_area_px": 3}]), r"rules\[1\].*'crack'.*rules\[0\] already names"),
    "background": (rule(classes=["background"]), "background, which is no defect"),
    "class not in table": (rule(classes=["crak"]), r"'crak'.*class table \(background, color, .*pill_type\)"),
    "name no text": (rule(name=3), "name must"),
    "unnamed": (good_standard(unnamed="maybe"), "unnamed must"),
    "size one number": (good_standard(native_size=[8]), "native_size must"),
    "size zero": (good_standard(native_size=[8, 0]), "native_size must"),
    "size float": (good_standard(native_size=[8, 8.0]), "native_size must"),
    "size bool": (good_standard(native_size=[8, True]), "native_size must"),
    "size a number": (good_standard(native_size=8), "native_size must"),
}


@pytest.mark.parametrize("key", BAD_STANDARDS)
def test_a_bad_standard_is_one_sentence_naming_file_and_key(tmp_path, capsys, key):
    data, message = BAD_STANDARDS[key]
    path = write_json(tmp_path / "bad.json", data)
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        ir.load_standard(path, PILL)
    save(tmp_path / "masks/a_mask.png", np.zeros((8, 8), np.uint8))
    assert ir.main(["--standard", str(path), "--masks", str(tmp_path / "masks")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_unknown_standard_lists_what_exists():
    with pytest.raises(ValueError, match="'pil'.*pill, wood, zipper"):
        ir.load_standard("pil")


def test_a_misspelt_class_is_refused_by_judge_too(tmp_path):
    standard = ir.load_standard(write_json(tmp_path / "s.json", rule(classes=["crak"])))
    with pytest.raises(ValueError, match="'crak'.*class table"):
        ir.judge(np.zeros((8, 8), int), standard, PILL)


@pytest.mark.parametrize("table", ["[", "[]", "{}", '["background"]', '{"0": "crack"}', '{"0": "background", "2": "crack"}',
                                   '{"0": "background", "1": "background"}', '{"0": "background", "1": 3}',
                                   '{"0": "background", "1": ["crack"]}', '{"0": "background", "1": ""}'])
def test_a_bad_class_table_is_one_sentence_naming_the_file(tmp_path, table):
    with pytest.raises(ValueError, match="classes.json: "):
        ir.read_classes(write_json(tmp_path / "classes.json", table))


@pytest.mark.parametrize("mask, message", [
    (np.zeros((2, 2, 3), int), r"\(2, 2, 3\)"), (np.zeros((0, 2), int), "not empty"), (np.zeros((2, 2)), "float64"),
    (np.zeros((2, 2), bool), "bool"), (np.full((2, 2), 7), r"0 to 6 \(background, .*pill_type\)"), (np.full((2, 2), -1), "-1")])
def test_judge_refuses_a_mask_that_is_not_an_index_mask(mask, message):
    with pytest.raises(ValueError, match=f"picture: .*{message}"):
        ir.judge(mask, ir.load_standard("pill"), PILL, "picture")


def test_read_mask_returns_raw_indices_of_grey_palette_and_16_bit_files(tmp_path):
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = Image.new("P", (3, 2))
    palette.putdata(mask.ravel().tolist())
    palette.putpalette([255, 0, 0, 0, 0, 255] * 3)
    palette.save(tmp_path / "palette.png")
    for path in save(tmp_path / "grey.png", mask), save(tmp_path / "deep.png", mask.astype(np.uint16)), tmp_path / "palette.png":
        np.testing.assert_array_equal(ir.read_mask(path, PILL), mask)


def bad_masks(folder):
    """name -> message, one file each."""
    grey = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)
    save(folder / "colour.png", grey, "RGB")
    save(folder / "alpha.png", grey, "LA")
    save(folder / "binary.png", grey * 255)
    save(folder / "all_255.png", np.full((8, 8), 255, np.uint8))
    save(folder / "deep_binary.png", grey.astype(np.uint16) * 65535)
    save(folder / "one_bit.png", grey * 255, "1")
    save(folder / "whole.png", grey)
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    (folder / "whole.png").unlink()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    save(folder / "above.png", grey * 9)
    save(folder / "wide.png", np.zeros((32, 64), np.uint8))
    return {"colour": "is RGB", "alpha": "is LA", "binary": "looks like a binary 0/255 mask", "all_255": "binary 0/255",
            "deep_binary": "binary 0/255", "one_bit": "binary 0/255", "truncated": "cannot be read", "empty": "cannot be read",
            "text": "cannot be read", "above": "0 to 9, but the class table has 0 to 6",
            "wide": "is 32x64, another shape than the standard's native_size 800x800"}


def test_bad_masks_are_named_with_their_reason_and_cost_no_other(tmp_path, capsys):
    folder = tmp_path / "masks"
    messages = bad_masks(folder)
    save(folder / "good.png", draw(PILL, {"color": 1}, (800, 800)))
    out = tmp_path / "out.csv", tmp_path / "out.json"
    assert ir.main(["--standard", "pill", "--masks", str(folder), "--csv", str(out[0]), "--json", str(out[1])]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for name, message in messages.items():
        (line,) = [line for line in lines if f"{folder / name}.png: " in line or f"error: {name}: " in line]
        assert line.startswith("error: ") and message in line
    assert [row["image"] for row in csv.DictReader(out[0].open())] == ["good"]
    result = json.loads(out[1].read_text())
    assert result["verdicts"] == {"good": "accept"} and set(result["errors"]) == set(messages)


def test_0_and_255_are_indices_when_the_table_reaches_255(tmp_path):
    mask = np.array([[0, 255]], np.uint8)
    np.testing.assert_array_equal(ir.read_mask(save(tmp_path / "m.png", mask), ["x"] * 256), mask)


# --- the command ---

def data_set(folder, masks, classes=PILL):
    """A data set in the project's layout, with images and colour masks that the command must leave alone."""
    for name, mask in masks.items():
        kind, stem = name.split("/")
        save(folder / "mask" / kind / f"{stem}_mask.png", mask)
        save(folder / "image" / kind / f"{stem}.png", mask, "RGB")
        save(folder / "rgb_mask" / kind / f"{stem}_rgb_mask.png", mask, "RGB")
    write_json(folder / "classes.json", {str(i): c for i, c in enumerate(classes)})
    (folder / "mask" / ".DS_Store.png").write_bytes(b"x")
    return folder


def test_csv_json_and_table_hold_every_image(tmp_path, capsys):
    data = data_set(tmp_path / "pill", {"good/000": draw(PILL, {}, (800, 800)), "color/000": draw(PILL, {"color": 299}, (800, 800)),
                                        "crack/000": draw(PILL, {"crack": 2, "contamination": 10}, (400, 400))})
    out = tmp_path / "findings.csv", tmp_path / "findings.json"
    assert ir.main(["--standard", "pill", "--masks", str(data), "--csv", str(out[0]), "--json", str(out[1])]) == 1
    with out[0].open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:5] == ["image", "class", "area_px", "limit", "verdict"]
    assert [row[:5] for row in rows[1:]] == [["mask/color/000_mask", "color", "299.0", "300", "accept"],
                                             ["mask/crack/000_mask", "crack", "8.0", "0", "reject"],
                                             ["mask/crack/000_mask", "contamination", "40.0", "4000", "accept"],
                                             ["mask/good/000_mask", ir.NO_DEFECT, "0.0", "", "accept"]]
    result = json.loads(out[1].read_text())
    assert result["verdicts"] == {"mask/color/000_mask": "accept", "mask/crack/000_mask": "reject", "mask/good/000_mask": "accept"}
    assert result["findings"][1] == dict(zip(ir.COLUMNS, (
        "mask/crack/000_mask", "crack", 8.0, 0, "reject", "no cracks", "area_px", "image", 8.0, -8.0, 0.0, 0.0, 2.0, 4.0, 0, 4.0)))
    assert ir.load_standard(write_json(tmp_path / "again.json", result["standard"])) == ir.load_standard("pill")
    printed = capsys.readouterr().out
    assert "2 accepted, 1 rejected." in printed and "1 of 3 masks: 400x400, areas times 4 to native 800x800" in printed
    assert str(data / "classes.json") in printed


@pytest.mark.parametrize("below", ["", "mask", "mask/good"])
def test_the_class_table_is_found_beside_or_above_the_masks(tmp_path, capsys, below):
    data = data_set(tmp_path / "any", {"good/0": np.array([[0, 1]], np.uint8)}, ("background", "dust"))
    rules = write_json(tmp_path / "s.json", good_standard(native_size=[1, 2], rules=[{"classes": ["dust"], "max_area_px": 2}]))
    assert ir.main(["--standard", str(rules), "--masks", str(data / below)]) == 0
    assert f"class table: {data / 'classes.json'}" in capsys.readouterr().out


def test_the_class_table_is_a_given_file_else_built_in_else_asked_for(tmp_path, capsys):
    save(tmp_path / "masks/a.png", np.array([[0, 1]], np.uint8))
    masks = ["--masks", str(tmp_path / "masks")]
    assert ir.main(["--standard", "pill", *masks]) == 1             # one pixel of two is half a pill in "color"
    assert "built-in labels of pill" in capsys.readouterr().out
    other = str(write_json(tmp_path / "s.json", good_standard(object="bolt")))
    assert ir.main(["--standard", other, *masks]) == 2
    assert "'bolt'; pass --classes FILE" in capsys.readouterr().err
    table = str(write_json(tmp_path / "table.json", {"0": "background", "1": "crack"}))
    assert ir.main(["--standard", other, *masks, "--classes", table]) == 1
    assert f"class table: {table}" in capsys.readouterr().out


def test_data_sets_with_different_class_tables_are_not_mixed(tmp_path, capsys):
    for name in "pill", "wood":
        data_set(tmp_path / name, {"good/0": np.zeros((2, 2), np.uint8)}, ir.LABELS[name])
    assert ir.main(["--standard", "pill", "--masks", str(tmp_path)]) == 2
    assert "different class tables" in capsys.readouterr().err


def test_cells_are_never_formulas(tmp_path):
    names = ["=1+1", "+a", "-a", "@a", "\t=a", "\n=a", "\uff1da", "plain"]
    for name in names:
        save(tmp_path / f"{name}.png", np.zeros((2, 2), np.uint8))
    out = tmp_path / "out.csv"
    assert ir.main(["--standard", "pill", "--masks", str(tmp_path), "--csv", str(out)]) == 0
    assert {row["image"] for row in csv.DictReader(out.open(newline=""))} == {"'" + n for n in names[:-1]} | {"plain"}


def test_without_flags_it_shows_the_standards_to_copy_and_an_example(tmp_path, capsys):
    assert ir.main([]) == 0
    printed = capsys.readouterr().out
    shown = printed[printed.index('{"object": "zipper"'):]
    assert json.loads(shown[:shown.index("\n\n")]) == ir.STANDARDS["zipper"]
    assert "verdict: reject" in printed


@pytest.mark.parametrize("argv", [["--standard", "pill"], ["--overlay", "x"], ["--squashed"], ["--masks", "."], ["--csv", "x"],
                                  ["--standrad", "pill"]])
def test_wrong_flags_exit_with_2(argv):
    with pytest.raises(SystemExit) as stopped:
        ir.main(argv)
    assert stopped.value.code == 2


def test_bad_paths_are_one_sentence(tmp_path, capsys):
    save(tmp_path / "masks/a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "empty").mkdir()
    good = ["--standard", "pill", "--masks", str(tmp_path / "masks")]
    for argv, message in ((["--standard", "pill", "--masks", str(tmp_path / "none")], "not a folder"),
                          (["--standard", "pill", "--masks", str(tmp_path / "empty")], "no PNG masks"),
                          ([*good, "--classes", str(tmp_path / "none.json")], "none.json"),
                          ([*good, "--csv", str(tmp_path / "none/out.csv")], "out.csv"),
                          ([*good, "--overlay", str(tmp_path / "masks/over")], "below --masks"),
                          ([*good, "--overlay", str(tmp_path / "masks/a.png/x")], "below --masks"),
                          ([*good, "--overlay", __file__], Path(__file__).name),
                          ([*good, "--json", str(tmp_path)], str(tmp_path))):
        assert ir.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_run_as_a_script_it_sets_the_exit_status_without_a_traceback(tmp_path):
    save(tmp_path / "a.png", draw(PILL, {"crack": 1}, (8, 8)))
    for standard, status in ("pill", 1), ("wood", 1), ("none", 2):
        done = subprocess.run([sys.executable, ir.__file__, "--standard", standard, "--masks", str(tmp_path)],
                              capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        assert done.returncode == status and "Traceback" not in done.stderr


def test_it_imports_only_numpy_pillow_and_the_standard_library():
    tree = ast.parse(Path(ir.__file__).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) == {"numpy", "PIL"}


# --- shapes, hostile names, pictures, what is left on disk ---

@pytest.mark.parametrize("shape, squashed", [((800, 800), False), ((100, 100), False), ((67, 67), False), ((100, 101), False), ((1, 1), False),
                                             ((100, 103), True), ((400, 800), True), ((64, 48), True)])
def test_only_a_mask_of_the_native_shape_is_judged_unless_told_that_it_is_squashed(tmp_path, capsys, shape, squashed):
    save(tmp_path / "a.png", np.zeros(shape, np.uint8))
    command = ["--standard", "pill", "--masks", str(tmp_path)]
    assert ir.main(command) == (2 if squashed else 0)
    assert ("a.png: is " in capsys.readouterr().err) == squashed
    assert ir.main([*command, "--squashed"]) == 0


HOSTILE = ['quote"s\'', "<script>alert(1)<script>", "süß 傷 🙂", "  spaces  ", "line\nbreak", "\x1b[31mred", "%s {0}",
           "a" * 200, "-rf", "dot.png"]


def test_hostile_file_names_are_harmless(tmp_path, capsys):
    for name in HOSTILE:
        try:
            save(tmp_path / "masks" / f"{name}.png", draw(PILL, {"crack": 1}, (8, 8)))
        except OSError:                                       # this file system has no such names
            continue
    (tmp_path / "masks" / os.fsdecode(b"byte\xff.png")).write_bytes((tmp_path / "masks/dot.png.png").read_bytes())
    table, result, over = tmp_path / "out.csv", tmp_path / "out.json", tmp_path / "over"
    assert ir.main(["--standard", "pill", "--masks", str(tmp_path / "masks"), "--csv", str(table), "--json", str(result),
                    "--overlay", str(over)]) == 1
    names = sorted(p.name[:-4] for p in (tmp_path / "masks").iterdir())
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and len(printed.splitlines()) == len(names) + 4
    assert sorted(json.loads(result.read_text())["verdicts"]) == names
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + len(names) and {len(row) for row in rows} == {len(ir.COLUMNS)}
    assert sorted(p.name for p in over.iterdir()) == sorted(f"{name}_verdict.png" for name in names)


def test_two_masks_of_one_name_are_refused(tmp_path, capsys):
    for suffix in "png", "PNG":
        save(tmp_path / "m" / f"a.{suffix}", np.zeros((2, 2), np.uint8)) if suffix == "png" else (tmp_path / "m/a.PNG").write_bytes(b"x")
    if len(list((tmp_path / "m").iterdir())) == 2:            # a file system that ignores case has one
        assert ir.main(["--standard", "pill", "--masks", str(tmp_path / "m")]) == 2
        assert "share one name" in capsys.readouterr().err


def test_overlays_show_the_photo_with_the_defect_outlined_and_its_reason(tmp_path):
    mask = draw(PILL, {}, (64, 64))
    mask[30:40, 20:30], mask[50, 50] = PILL.index("crack"), PILL.index("color")
    data = data_set(tmp_path / "pill", {"crack/000": mask, "good/000": draw(PILL, {}, (64, 64))})
    Image.new("L", (128, 128), 77).save(data / "image/crack/000.png")
    assert ir.main(["--standard", "pill", "--masks", str(data), "--overlay", str(tmp_path / "new/over")]) == 1
    (path,) = (p for p in (tmp_path / "new/over").rglob("*") if p.is_file())
    assert path.relative_to(tmp_path / "new/over").as_posix() == "mask/crack/000_mask_verdict.png"
    picture = np.array(Image.open(path))
    assert picture.shape[1] >= 512 and picture.shape[0] > 512 + 20                  # 128 px times 4, and text below
    inside, red, green = picture[4 + 31 * 8:4 + 39 * 8, 4 + 21 * 8:4 + 29 * 8], (picture == ir.RED).all(-1), (picture == ir.GREEN).all(-1)
    assert (inside == 77).all()                                                     # the defect itself stays visible
    y, x = np.nonzero(red[:520])
    assert (y.min(), x.min(), y.max(), x.max()) == (4 + 30 * 8 - 2, 4 + 20 * 8 - 2, 4 + 40 * 8 + 1, 4 + 30 * 8 + 1)
    y, x = np.nonzero(green[:520])                                                  # colour stains below their limit: accepted
    assert (y.min(), x.min(), y.max(), x.max()) == (4 + 50 * 8 - 2, 4 + 50 * 8 - 2, 4 + 51 * 8 + 1, 4 + 51 * 8 + 1)
    assert not (picture[520:] == 0).all()                                           # text


def test_an_overlay_without_a_readable_photo_shows_the_coloured_mask(tmp_path):
    mask = draw(PILL, {"contamination": 9}, (32, 32))
    path = save(tmp_path / "mask/x/1_mask.png", mask)
    examined = ir.examine(mask, replace(ir.load_standard("pill"), native_size=None), PILL)
    assert ir.find_photo(path) is None
    (tmp_path / "image/x").mkdir(parents=True)
    (tmp_path / "image/x/1.png").write_bytes(b"no picture")
    assert ir.find_photo(path) is None
    picture = np.array(ir.draw_overlay(mask, examined))
    assert (picture == ir.GREEN).all(-1).any() and not (picture == ir.RED).all(-1).any() and (picture[8, 40] == ir.COLOURS[2]).all()
    deep = np.array([[0, 65535], [32768, 0]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "image/x/1.png")
    np.testing.assert_array_equal(np.array(ir.find_photo(path))[..., 0], [[0, 255], [127, 0]])


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (64, 64), (3, 1024)])
def test_a_picture_can_be_drawn_of_any_shape_and_any_number_of_findings(shape):
    judge_all = replace(ir.load_standard("pill"), native_size=None, rules=(ir.Rule("x" * 300, ("crack",), 0, "area_px", "component", 4),))
    mask = (np.indices(shape).sum(0) % 2 * 3).astype(np.uint8)
    mask[0, 0] = 3
    picture = ir.draw_overlay(mask, ir.examine(mask, judge_all, PILL))
    assert picture.width >= 480 and picture.height < 4 * max(512, *shape)


def test_a_failure_leaves_old_files_as_they_were_and_no_temporary_ones(tmp_path, monkeypatch, capsys):
    save(tmp_path / "masks/a.png", np.zeros((2, 2), np.uint8))
    before = {name: (tmp_path / name) for name in ("out.csv", "out.json")}
    for path in before.values():
        path.write_text("old")
    command = ["--standard", "pill", "--masks", str(tmp_path / "masks"), "--csv", str(before["out.csv"]), "--json", str(before["out.json"])]

    def full(*args, **kwargs):
        raise OSError("No space left on device")
    monkeypatch.setattr(ir, "examine", full)
    assert ir.main(command) == 2 and "No space left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks", "out.csv", "out.json"]
    assert {p.read_text() for p in before.values()} == {"old"}
    monkeypatch.undo()
    assert ir.main(command) == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["masks", "out.csv", "out.json"]
    assert json.loads(before["out.json"].read_text())["verdicts"] == {"a": "accept"} and before["out.csv"].read_text().startswith("image,class")


def test_a_bad_standard_writes_nothing(tmp_path):
    save(tmp_path / "masks/a.png", np.zeros((2, 2), np.uint8))
    write_json(tmp_path / "s.json", rule(max_area_px=-1))
    assert ir.main(["--standard", str(tmp_path / "s.json"), "--masks", str(tmp_path / "masks"), "--csv", str(tmp_path / "out.csv"),
                    "--json", str(tmp_path / "out.json"), "--overlay", str(tmp_path / "over")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks", "s.json"]


def test_memory_does_not_grow_with_the_number_of_masks(tmp_path, capsys):
    peaks = []
    for count in 2, 20:
        folder = tmp_path / str(count)
        for i in range(count):
            save(folder / f"{i}.png", draw(PILL, {"contamination": 500}, (400, 400)))
        tracemalloc.start()
        assert ir.main(["--standard", "pill", "--masks", str(folder), "--csv", str(folder / "out.csv"), "--json", str(folder / "out.json")]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_the_bench_prints_ratios_and_the_machine(monkeypatch, capsys):
    def missing(name):
        raise ImportError(name)
    monkeypatch.setattr(ir.importlib, "import_module", missing)
    assert ir.bench(side=24, count=3) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("numpy", "scipy is not installed", "spiral", "x)", "3 masks of 24x24"))
