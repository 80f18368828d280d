"""Claims of inspect_rules.py: where each limit lies, in which pixels, which pixels belong together, that bad
input is one sentence and costs nothing else, and what the command writes."""
import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inspect_rules as ir

PILL, ABC = ir.LABELS["pill"], ("background", "a", "b")
DOCS = Path(ir.__file__).parent / "docs"


def draw(classes, areas, size):
    """Index mask of size (H, W) with areas[name] pixels of each class, laid out one after the other."""
    mask, start = np.zeros(size, np.uint8), 0
    for name, area in areas.items():
        mask.ravel()[start:start + area] = classes.index(name)
        start += area
    return mask


def bar(height, width, value=1):
    mask = np.zeros((12, 12), np.uint8)
    mask[1:1 + height, 1:1 + width] = value
    return mask


THREE = bar(1, 2) | bar(2, 2)[::-1] | bar(3, 3)[:, ::-1]          # components of 2, 9 and 4 px


def save(path, mask, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    (image.convert(mode) if mode else image).save(path)
    return path


def write_json(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def main(*arguments):
    try:
        return ir.main(list(map(str, arguments)))
    except SystemExit as stop:      # argparse: bad flags
        return stop.code


@pytest.fixture
def judge_by(tmp_path):
    """judge(mask) by a standard of JSON rules, on class a unless they name others, through load_standard."""
    def make(*rules, **change):
        rules = [{"classes": ["a"]} | rule for rule in rules]
        data = {"object": "test", "native_size": "mask", "rules": rules} | change
        standard = ir.load_standard(write_json(tmp_path / "test.json", data), ABC)
        return lambda mask, **more: ir.judge(np.asarray(mask, np.uint8), standard, ABC, **more)
    return make


# --- limits and areas ---

@pytest.mark.parametrize("zoom", [0.5, 1, 2])       # mask of half, native, double size
@pytest.mark.parametrize("name", ir.STANDARDS)
def test_every_rule_accepts_below_its_limit_and_rejects_from_it_on_summing_its_classes(name, zoom):
    classes, scale = ir.LABELS[name], 1 / zoom**2
    standard = ir.load_standard(name, classes)
    size = tuple(int(n * zoom) for n in standard.native_size)
    for r in standard.rules:
        at = math.ceil(r.limit / scale)             # in mask pixels: the first number that meets the limit
        for number in {max(at - 1, 0), at, at + 1}:
            areas = {c: number // len(r.classes) for c in r.classes}
            areas[r.classes[0]] += number % len(r.classes)
            findings = ir.judge(draw(classes, areas, size), standard, classes, "picture")
            expected, area = "reject" if number >= max(at, 1) else "accept", number * scale
            row = ("picture", "+".join(r.classes), area, r.limit, expected, r.name, "area_px", "image", area,
                   r.limit - area)
            assert ir.verdict(findings) == expected
            assert [f.row()[:10] for f in findings] == ([row] if number else [])


def test_a_class_that_no_rule_names_is_decided_by_unnamed(judge_by):
    for change, expected in ({}, "reject"), ({"unnamed": "accept"}, "accept"):
        (finding,) = judge_by({"max_area_px": 9}, **change)(bar(1, 2, 2))
        assert (finding.class_name, finding.limit, finding.verdict) == ("b", None, expected)
        assert "no rule names this class" in finding.rule
    judge = judge_by({"max_area_px": 3}, unnamed="error")
    assert judge(bar(1, 1))[0].verdict == "accept"
    with pytest.raises(ValueError, match="photo 7: class 'b' is in the mask, but no rule"):
        judge(bar(1, 1, 2), image="photo 7")


def test_native_pixels_are_those_of_the_standard_or_of_the_photo_or_of_the_mask(judge_by):
    (finding,) = ir.judge(draw(PILL, {"contamination": 10}, (400, 200)), ir.load_standard("pill"), PILL)
    assert (finding.area_px, finding.scale) == (80, 8)
    judge = judge_by({"max_area_px": 100}, {"max_length_px": 100})
    assert [(f.value, f.scale) for f in judge(bar(3, 4))] == [(12, 1), (5, 1)]
    area, length = judge(bar(3, 4), native_size=(24, 36))           # [height, width]
    assert (area.value, area.box, area.scale) == (72, (2, 3, 8, 15), 6) and length.value == math.hypot(6, 12)


# --- components ---

def flood(mask):
    """The components of a bool mask as sets of (row, column), in reading order: nothing of the product."""
    left, components = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        group = front = {min(left)}
        while front:
            left -= front
            front = {(y + dy, x + dx) for y, x in front for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            group = group | front
        components.append(group)
    return components


def hard_masks():
    """Bool masks of many shapes and densities, and what troubles labelling: spirals, combs, rings."""
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 24, 2)) < p for p in (0.05, 0.3, 0.5, 0.8, 1) for _ in range(20)]
    y, x = np.indices((21, 21))
    rings = np.minimum(np.minimum(y, x), 20 - np.maximum(y, x)) % 2 == 0
    spiral, k = rings.copy(), np.arange(0, 8, 2)                    # each ring is cut, and joined to the next
    spiral[k + 1, k], spiral[k + 2, k + 1] = False, True
    masks += [rings, spiral, ~spiral, (x % 2 == 0) | (y == 20), (y % 2 == 0) | (x == 0), (x + y) % 2 == 0,
              (x % 4 == 0) | ((y == 20) & (x % 8 > 3)), y == x, y == 20 - x]
    return [mask for mask in masks if mask.any()]


@pytest.mark.parametrize("height, width", [("1", "1"), ("1/2", "5"), ("2/3", "5/7")])
def test_components_equal_a_flood_fill_and_their_lengths_the_largest_distance_of_corners(height, width):
    pixel = Fraction(height), Fraction(width)
    for mask in hard_masks():
        components, groups = ir.find_components(ir.find_runs(mask)), flood(mask)
        assert [{(row, x) for row, start, stop in runs.T.tolist() for x in range(start, stop)}
                for runs in components] == groups
        for runs, group in zip(components, groups):
            corners = sorted({(y + a, x + b) for y, x in group for a in (0, 1) for b in (0, 1)})
            points = np.array(corners) * [float(pixel[0]), float(pixel[1])]
            brute = np.sqrt(((points[:, None] - points) ** 2).sum(-1)).max()
            assert math.isclose(ir.length_px([runs], pixel), brute, rel_tol=1e-12)


def test_touching_classes_of_one_rule_are_one_component_and_those_of_two_are_not(judge_by):
    for classes, number in (["a", "b"], 1), (["a"], 2), (["b"], 2):
        finding = judge_by({"classes": classes, "max_count": 9})([[1, 2, 1, 0, 2], [0, 0, 0, 1, 0]])[0]
        assert (finding.class_name, finding.value) == ("+".join(classes), number)


# --- rules on components ---

@pytest.mark.parametrize("limit, below, at, above, value", [
    ({"max_area_px": 6}, bar(1, 5), bar(2, 3), bar(1, 7), 6),
    ({"max_area_px": 6, "per": "component"}, bar(1, 5), bar(2, 3), bar(1, 7), 6),
    ({"max_area_mm2": 1.5, "per": "component"}, bar(1, 5), bar(2, 3), bar(1, 7), 6),
    ({"max_count": 2}, bar(9, 9), bar(1, 1) | bar(1, 1)[::-1], THREE, 2),
    ({"max_length_px": 5}, bar(3, 3), bar(3, 4), bar(4, 4), 5),
    ({"max_length_mm": 2.5}, bar(3, 3), bar(3, 4), bar(4, 4), 5)])
def test_each_kind_of_limit_rejects_from_the_limit_on(judge_by, limit, below, at, above, value):
    judge = judge_by(limit, px_per_mm=2)
    for mask, decision in (below, "accept"), (at, "reject"), (above, "reject"):
        (finding,) = judge(mask)
        assert finding.verdict == decision and finding.limit == value
        assert finding.margin == pytest.approx(value - finding.value)
        assert (finding.margin <= 0) == (decision == "reject")
    zero = judge_by({key: 0 if key.startswith("max") else per for key, per in limit.items()}, px_per_mm=2)
    assert judge(at)[0].value == value and zero(bar(1, 1))[0].verdict == "reject"
    assert zero(np.zeros((12, 12))) == judge(np.zeros((12, 12))) == []


def test_a_limit_in_mm_that_is_met_exactly_rejects(judge_by):
    for px_per_mm in (0.1, 1.6, 10, 12.5, 33.33):
        for area in range(1, 145, 3):
            limit = Fraction(area) / Fraction(str(px_per_mm)) ** 2
            if Fraction(str(float(limit))) == limit:                # it can be written as a decimal
                judge = judge_by({"max_area_mm2": float(limit)}, px_per_mm=px_per_mm)
                assert [f.verdict for f in judge(draw(ABC, {"a": area}, (12, 12)))] == ["reject"]
    (finding,) = judge_by({"max_area_mm2": 0.07}, px_per_mm=10)(bar(1, 7))
    assert 0.07 * 10**2 > 7 and finding.verdict == "reject" and "(0.07 mm2 = 7 px)" in str(finding)


def test_a_limit_that_is_met_exactly_in_a_resized_mask_rejects(judge_by):
    judge = judge_by({"max_area_px": 12}, {"max_length_px": 5})
    for zoom in range(1, 30):                                       # 3 x 4 native pixels
        assert [(f.value, f.verdict) for f in judge(np.ones((3 * zoom, 4 * zoom)), native_size=(3, 4))] == [
            (12, "reject"), (5, "reject")]
    mask = np.pad(np.ones((5, 12)), ((0, 21), (0, 14)))     # 13 pixels of 480 / 26 px: in floats below
    (finding,) = judge_by({"max_length_mm": 24}, px_per_mm=10)(mask, native_size=(480, 480))     # 240
    assert (finding.value, finding.limit, finding.verdict) == (240, 240, "reject")


@pytest.mark.parametrize("per, limit, areas, box", [
    ("image", 15, [15], (1, 1, 11, 11)), ("image", 16, [15], (1, 1, 11, 11)),
    ("component", 0, [2, 9, 4], (1, 1, 2, 3)), ("component", 4, [9, 4], (1, 8, 4, 11)),
    ("component", 10, [9], (1, 8, 4, 11))])
def test_findings_are_of_the_image_or_of_each_rejected_component_or_else_of_the_largest(
        judge_by, per, limit, areas, box):
    findings = judge_by({"max_area_px": limit, "per": per})(THREE)
    assert [f.area_px for f in findings] == areas and findings[0].box == box
    expected = "accept" if areas[0] < limit else "reject"
    assert {f.verdict for f in findings} == {ir.verdict(findings)} == {expected}


@pytest.mark.parametrize("least, number, area", [(0, 3, 15), (2, 3, 15), (2.5, 2, 13), (5, 1, 9), (10, 0, 0)])
def test_components_below_the_minimum_are_noise_and_counted_as_such(judge_by, least, number, area):
    for limit, value in ({"max_count": 3}, number), ({"max_area_px": 15}, area):
        (finding,) = judge_by(limit | {"min_component_px": least})(THREE)
        assert (finding.value, finding.area_px, finding.noise) == (value, area, 3 - number)
        assert (finding.verdict == "reject") == (number == 3) and bool(finding.box) == (number > 0)
        assert ("smaller left out" in str(finding)) == (number < 3)
    (finding,) = judge_by({"max_length_px": 0, "min_component_px": 10})(THREE)
    assert (finding.verdict, finding.value, len(finding.row())) == ("accept", 0, len(ir.COLUMNS))


def test_a_measure_is_added_in_three_lines(judge_by, monkeypatch):
    def height_px(components, pixel):
        return max((len(np.unique(row)) for row, start, stop in components), default=0) * float(pixel[0])
    monkeypatch.setitem(ir.MEASURES, "height_px", height_px)
    for per, limit, decision in ("component", 3, "accept"), ("image", 2, "reject"):
        (finding,) = judge_by({"max_height_px": limit, "per": per})(bar(2, 7))
        assert (finding.measure, finding.value, finding.verdict) == ("height_px", 2, decision)


def test_findings_are_the_same_when_a_mask_is_enlarged_by_a_whole_factor(judge_by):
    rules = [{"max_area_px": 3}, {"classes": ["a", "b"], "max_area_px": 3, "per": "component"},
             {"max_count": 9, "min_component_px": 2}, {"classes": ["b"], "max_length_px": 4}]
    judge, rng = judge_by(*rules, native_size=[11, 14]), np.random.default_rng(0)
    for factor in (2, 4, 8) * 5:
        mask = rng.choice(3, (11, 14), p=(0.7, 0.15, 0.15))
        for block in (factor, factor), (1, factor), (factor, 1):
            assert [replace(f, scale=1.0) for f in judge(np.kron(mask, np.ones(block, int)))] == judge(mask)


def test_the_example_standards_are_valid(tmp_path):
    tile = ("background", "blowhole", "break", "crack", "fray", "uneven")
    standard = ir.load_standard(DOCS / "magnetic_tile.json", tile)
    assert standard.native_size is None and {c for r in standard.rules for c in r.classes} == set(tile[1:])
    text = (DOCS / "rules.md").read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    standard = ir.load_standard(write_json(tmp_path / "s.json", text))
    assert {r.measure for r in standard.rules} == set(ir.MEASURES) and standard.px_per_mm
    assert all(ir.load_standard(name, ir.LABELS[name]).object == name for name in ir.STANDARDS)


# --- recall, false positive rate, interval ---

def test_recall_fpr_equals_a_plain_count():
    for seed in range(30):
        truths, said = np.random.default_rng(seed).choice(["accept", "reject"], (2, seed % 7)).tolist()
        both = list(zip(truths, said))
        tp, fn = both.count(("reject", "reject")), both.count(("reject", "accept"))
        fp, tn = both.count(("accept", "reject")), both.count(("accept", "accept"))
        rates = {"recall": tp / (tp + fn) if tp + fn else None, "fpr": fp / (fp + tn) if fp + tn else None}
        assert ir.recall_fpr(truths, said) == rates | {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    with pytest.raises(ValueError, match="shorter"):
        ir.recall_fpr(["accept"], [])


# Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
@pytest.mark.parametrize("hits, trials, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                                     (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_interval_is_the_published_one(hits, trials, low, high):
    assert [round(end, 4) for end in ir.wilson_interval(hits, trials)] == [low, high]
    assert ir.wilson_interval(0, 0) is None


# --- bad standards, class tables and masks ---

def standard_json(**change):
    rules = [{"classes": ["crack"], "max_area_px": 0}]
    return {"object": "pill", "native_size": [8, 8], "rules": rules} | change


def rule(**change):
    return standard_json(rules=[{"classes": ["crack"]} | change])


BAD_STANDARDS = [
    ("cannot be read as JSON", "{"), ("expected a JSON object", [1]), ("'object' is missing", {}),
    ("'rules' is missing", {"object": "pill", "native_size": [8, 8]}),
    ("unknown key 'size'; known are object, native_size, rules, unnamed", standard_json(size=1)),
    ("object must be a text", standard_json(object=" ")),
    ('unnamed must be "reject"', standard_json(unnamed="maybe")),
    *[(r"native_size must be \[height, width\]", standard_json(native_size=v))
      for v in ([8], [8, 0], [8, 8.0], [8, True], 8)],
    *[("px_per_mm must be a number > 0", standard_json(px_per_mm=v)) for v in (0, float("nan"), "1", None)],
    *[("rules must be a list of rules", standard_json(rules=v)) for v in ([], {})],
    (r"rules\[0\]: expected a JSON object", standard_json(rules=["crack"])),
    (r"rules\[0\]: the key 'classes' is missing", standard_json(rules=[{"max_area_px": 0}])),
    (r"rules\[0\]: give one of max_area_px, .*not none", rule()),
    (r"rules\[0\]: give one of .*not max_area_px and max_count", rule(max_area_px=1, max_count=3)),
    (r"rules\[0\]: unknown key 'max_area'; known are classes, max_area_px, .*name", rule(max_area=3)),
    *[("max_area_px must be a number >= 0", rule(max_area_px=v))
      for v in (-1, "3", float("nan"), float("inf"), 10**400, True, None)],
    *[("min_component_px must be a number", rule(max_count=1, min_component_px=v)) for v in (-1, "1")],
    ("max_count must be a whole number", rule(max_count=1.5)),
    ("max_area_mm2 needs px_per_mm", rule(max_area_mm2=3)),
    ('per must be "image" or', rule(max_area_px=1, per="pixel")),
    ("per must be 'image' for max_count", rule(max_count=1, per="component")),
    ("per must be 'component' for max_length_px", rule(max_length_px=1, per="image")),
    *[("classes must be a list", rule(max_count=1, classes=v)) for v in ("crack", [1], [], ["background"])],
    ("name must be a text, not 3", rule(max_count=1, name=3)),
    (r"\['crak'\]; the class table has background, color", rule(max_count=1, classes=["crak"])),
    ("limit the area_px of 'crack' per image 2 times", rule(max_area_px=1, classes=["crack", "crack"])),
    ("limit the area_px of 'crack' per image 2 times", standard_json(px_per_mm=1, rules=[
        {"classes": ["crack"], "max_area_px": 9}, {"classes": ["color", "crack"], "max_area_mm2": 3}])),
]


@pytest.mark.parametrize("message, data", BAD_STANDARDS)
def test_a_bad_standard_is_one_sentence_naming_the_key_and_writes_nothing(tmp_path, capsys, message, data):
    path = write_json(tmp_path / "bad.json", data)
    masks = save(tmp_path / "masks/a.png", np.zeros((8, 8), np.uint8)).parent
    assert main("--standard", path, "--masks", masks, "--csv", tmp_path / "c", "--json", tmp_path / "j") == 2
    assert re.fullmatch(f"error: .*bad.json.*{message}.*\n", capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "masks"]


@pytest.mark.parametrize("table", [
    "[", "[]", "{}", '["crack"]', "3", '{"0": "crack"}', '{"0": "background", "2": "crack"}',
    '{"0": "background", "1": "background"}', '{"0": "background", "1": 3}', '{"0": "background", "1": ""}'])
def test_a_bad_class_table_is_one_sentence_naming_the_file(tmp_path, table):
    with pytest.raises(ValueError, match="classes.json: "):
        ir.read_classes(write_json(tmp_path / "classes.json", table))


def test_judge_refuses_a_class_table_of_another_object():
    with pytest.raises(ValueError, match="'pill': rules name .*'crack'"):
        ir.judge(np.zeros((8, 8), int), ir.load_standard("pill"), ABC)


@pytest.mark.parametrize("mask, message", [
    (np.zeros((2, 2, 3), int), r"\(2, 2, 3\)"), (np.zeros((0, 2), int), "empty"), (np.zeros((2, 2)), "float"),
    (np.zeros((2, 2), bool), "bool"), (np.full((2, 2), 7), "0 to 6"), (np.full((2, 2), -1), "-1")])
def test_judge_refuses_a_mask_that_is_not_an_index_mask(mask, message):
    with pytest.raises(ValueError, match=f"picture: .*{message}"):
        ir.judge(mask, ir.load_standard("pill"), PILL, "picture")


def test_masks_of_all_kinds_are_read_as_raw_indices(tmp_path):
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = Image.fromarray(mask)
    palette.putpalette([255, 0, 0, 0, 0, 255] * 3)
    palette.save(tmp_path / "palette.png")
    deep = save(tmp_path / "deep.png", mask.astype(np.uint16))
    for path in save(tmp_path / "grey.bmp", mask), deep, tmp_path / "palette.png":
        np.testing.assert_array_equal(ir.read_mask(path, PILL), mask)
    equal = save(tmp_path / "equal.png", np.stack([mask] * 3, 2))
    np.testing.assert_array_equal(ir.read_mask(equal, PILL), mask)
    both = save(tmp_path / "both.png", np.array([[0, 255]], np.uint8))
    assert ir.read_mask(both, ["x"] * 256).tolist() == [[0, 255]]       # 255 is an index of that table


def test_bad_masks_are_named_with_their_reason_and_cost_no_other(tmp_path, capsys):
    folder, grey = tmp_path / "masks", np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)
    good = save(folder / "good.png", draw(PILL, {"color": 1}, (800, 800)))
    wide = "mask is [32, 64], native_size [800, 800] [height, width], of another shape"
    hue = np.stack([grey, grey * 0, grey], 2)
    bad = {"colour": (hue, None, "is RGB"), "equal": (grey * 255, "RGB", "binary 0/255"),
           "alpha": (grey * 255, "LA", "is LA"),
           "bit": (grey * 255, "1", "binary 0/255"), "binary": (grey * 255, None, "binary 0/255"),
           "deep": (grey * np.uint16(65535), None, "binary 0/255"), "wide": (grey[:32], None, wide),
           "above": (grey * 9, None, "0 to 9, but the class table has 0 to 6"),
           "cut": (grey, None, "cannot be read"), "text": (grey, None, "cannot be read")}
    for name, (mask, mode, message) in bad.items():
        save(folder / f"{name}.png", mask, mode)
    (folder / "cut.png").write_bytes(good.read_bytes()[:80])
    (folder / "text.png").write_text("not an image")
    out = tmp_path / "out.csv", tmp_path / "out.json"
    assert main("--standard", "pill", "--masks", folder, "--csv", out[0], "--json", out[1]) == 2
    assert [row["image"] for row in csv.DictReader(out[0].open())] == ["good"]
    result = json.loads(out[1].read_text())
    assert result["verdicts"] == {"good": "accept"} and set(result["errors"]) == set(bad)
    for name, (mask, mode, message) in bad.items():
        assert message in result["errors"][name] and name in result["errors"][name]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 7 and said[2].startswith("error: 4 files, binary, bit, deep and 1 more; of")


@pytest.mark.parametrize("shape, plain, squashed", [
    ((480, 320), 0, 0), ((49, 32), 0, 0), ((1, 1), 0, 0), ((64, 64), 2, 0), ((480, 100), 2, 0),
    ((320, 480), 2, 2), ((32, 48), 2, 2)])                          # the last two lie on their side
def test_shapes_other_than_native_are_refused_unless_squashed(tmp_path, capsys, shape, plain, squashed):
    save(tmp_path / "m/a.png", np.zeros(shape, np.uint8))
    standard = write_json(tmp_path / "s.json", standard_json(native_size=[480, 320]))
    assert main("--standard", standard, "--masks", tmp_path / "m") == plain
    assert main("--standard", standard, "--masks", tmp_path / "m", "--squashed") == squashed
    err = capsys.readouterr().err
    assert ("swapped?" in err) == (squashed == 2) and ("[480, 320] [height, width]" in err) == (plain == 2)


def test_ignored_pixels_are_never_a_defect():
    mask = draw(PILL, {"contamination": 3999}, (800, 800))
    mask[400:] = ir.IGNORE
    (finding,) = ir.judge(mask, ir.load_standard("pill"), PILL)
    assert (finding.area_px, finding.verdict) == (3999, "accept")


# --- the command ---

def data_set(folder, masks, classes=PILL):
    """A data set in the project's layout, with images and colour masks that the command must leave alone."""
    for name, mask in masks.items():
        kind, stem = name.split("/")
        save(folder / "mask" / kind / f"{stem}_mask.png", mask)
        save(folder / "image" / kind / f"{stem}.png", np.full((128, 128), 77, np.uint8), "RGB")
        save(folder / "rgb_mask" / kind / f"{stem}_rgb_mask.png", mask, "RGB")
    (folder / "mask/.hidden.png").touch()
    write_json(folder / "classes.json", {str(i): c for i, c in enumerate(classes)})
    return folder


def test_csv_json_and_print_hold_every_image(tmp_path, capsys):
    data = data_set(tmp_path / "pill", {
        "good/0": draw(PILL, {}, (800, 800)), "color/0": draw(PILL, {"color": 299}, (800, 800)),
        "crack/0": draw(PILL, {"crack": 2, "contamination": 10}, (400, 400))})
    out = tmp_path / "new/findings.csv", tmp_path / "findings.json"
    out[1].write_text("old")
    assert main("--standard", "pill", "--masks", data, "--csv", out[0], "--json", out[1]) == 1
    rows = list(csv.reader(out[0].open(newline="")))
    assert rows[0] == list(ir.COLUMNS) and [row[:5] for row in rows[1:]] == [
        ["mask/color/0_mask", "color", "299.0", "300", "accept"],
        ["mask/crack/0_mask", "crack", "8.0", "0", "reject"],
        ["mask/crack/0_mask", "contamination", "40.0", "4000", "accept"],
        ["mask/good/0_mask", "(no defect)", "0.0", "", "accept"]]
    result = json.loads(out[1].read_text())
    assert list(result["verdicts"].values()) == ["accept", "reject", "accept"]
    row = ["crack", 8, 0, "reject", "no cracks", "area_px", "image", 8, -8, 0, 0, 2, 4, 0, 4]
    assert result["findings"][1] == dict(zip(ir.COLUMNS, ["mask/crack/0_mask", *row]))
    assert result["standard"] == ir.STANDARDS["pill"] and tuple(result["classes"]) == PILL
    printed = capsys.readouterr().out
    assert "2 accepted, 1 rejected, 0 not judged" in printed
    assert "mask/crack/0_mask: reject\n    reject: crack, area_px 8, limit 0: no cracks\n" in printed
    assert not list(tmp_path.rglob("*.tmp"))


def test_masks_are_read_from_all_formats_in_mask_folders_and_margins_are_round(tmp_path, capsys):
    mask = draw(ABC, {"a": 1}, (20, 20))
    save(tmp_path / "mask/0.png", mask)
    Image.fromarray(mask).convert("RGB").save(tmp_path / "mask/1.webp", lossless=True)
    write_json(tmp_path / "classes.json", {str(i): name for i, name in enumerate(ABC)})
    standard = standard_json(native_size="mask", rules=[{"classes": ["a"], "max_area_px": 0.7}])
    flags = "--standard", write_json(tmp_path / "s.json", standard), "--masks", tmp_path
    assert main(*flags, "--csv", tmp_path / "f.csv") == 1 and "2 rejected" in capsys.readouterr().out
    assert (tmp_path / "f.csv").read_text().count(",-0.3,") == 2


def test_data_of_every_layout_are_judged_as_datasets_reads_them(tmp_path, capsys):
    for n, area in ((0, 39), (1, 41)):                          # MVTec AD, as bmp of three channels
        white = 255 * draw(ABC, {"a": area}, (20, 20))
        save(tmp_path / f"bolt/test/dent/{n}.png", np.full((20, 20), 9, np.uint8))
        save(tmp_path / f"bolt/ground_truth/dent/{n}_mask.bmp", white, "RGB")
    standard = standard_json(native_size=[20, 20], rules=[{"classes": ["dent"], "max_area_px": 40}])
    flags = "--standard", write_json(tmp_path / "s.json", standard), "--data", tmp_path
    assert main(*flags, "--overlay", tmp_path / "over") == 2 and "is inside" in capsys.readouterr().err
    assert main(*flags[:-1], tmp_path / "bolt", "--overlay", tmp_path / "over") == 1
    assert "dent/0: accept\n    accept: dent, area_px 39" in (out := capsys.readouterr().out)
    assert "dent/1: reject" in out
    verdict = np.array(Image.open(tmp_path / "over/dent/1_verdict.png"))
    assert (verdict == 9).all(-1).mean() > 0.5                                      # drawn on the photo


def test_the_class_table_is_given_else_near_the_masks_else_built_in_else_asked_for(tmp_path, capsys):
    data = data_set(tmp_path / "any", {"good/0": np.array([[0, 1]], np.uint8)}, ("background", "dust"))
    standard = write_json(tmp_path / "s.json", {"object": "bolt", "native_size": [1, 2],
                                                "rules": [{"classes": ["dust"], "max_area_px": 2}]})
    for below in "", "mask", "mask/good", "..":
        assert main("--standard", standard, "--masks", data / below) == 0
    assert capsys.readouterr().out.count(f"class table: {data / 'classes.json'}") == 4
    data_set(tmp_path / "other", {"good/0": np.zeros((2, 2), np.uint8)})
    assert main("--standard", standard, "--masks", tmp_path) == 2
    assert "holds 2 classes.json" in capsys.readouterr().err
    (data / "classes.json").rename(tmp_path / "table.json")
    assert main("--standard", standard, "--masks", data) == 2
    assert "'bolt'; give --classes FILE" in capsys.readouterr().err
    assert main("--standard", standard, "--masks", data, "--classes", tmp_path / "table.json") == 0
    assert main("--standard", "pill", "--masks", data, "--squashed") == 1       # half a pill in "color"
    assert "built-in labels of pill" in capsys.readouterr().out


def test_without_flags_it_shows_the_standards_to_copy_and_an_example(capsys):
    assert ir.main([]) == 0
    *shown, example = capsys.readouterr().out.split("\n\n")[:4]
    assert list(map(json.loads, shown)) == list(ir.STANDARDS.values()) and "made_up: reject" in example


@pytest.mark.parametrize("flags, message", [
    ("--standard pill", "go together"), ("--masks .", "go together"), ("--standrad pill", "--standrad"),
    ("--standard pil --masks masks", "'pil': built in are pill, wood, zipper"),
    ("--standard pill --masks none", "no masks"), ("--standard pill --masks twins", "differ only in"),
    ("--standard pill --masks masks --classes no.json", "no.json"),
    ("--standard pill --masks masks --csv masks/a.png/c", "a.png"),
    ("--standard pill --masks masks --data masks", "go together"),
    ("--standard pill --masks masks --overlay masks/over", "is inside .*masks")])
def test_bad_flags_and_paths_are_one_sentence_and_exit_with_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in "masks/a.png", "twins/a.png", "twins/a.bmp":
        save(Path(name), np.zeros((2, 2), np.uint8))
    assert main(*flags.split()) == 2
    assert re.search(f"error: .*{message}.*\n$", capsys.readouterr().err)


def test_run_as_a_script_it_sets_the_exit_status_without_a_traceback(tmp_path):
    save(tmp_path / "a.png", draw(PILL, {"crack": 1}, (8, 8)))
    for standard, status in ("pill", 1), ("none", 2):
        command = [sys.executable, ir.__file__, "--standard", standard, "--masks", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr


# --- pictures ---

def test_overlays_show_the_photo_with_the_defect_outlined_and_its_reason(tmp_path):
    mask = draw(PILL, {}, (64, 64))
    mask[30:40, 20:30], mask[50, 50] = PILL.index("crack"), PILL.index("color")
    data = data_set(tmp_path / "pill", {"crack/0": mask, "good/0": draw(PILL, {}, (64, 64))})
    assert main("--standard", "pill", "--masks", data, "--overlay", tmp_path / "new/over") == 1
    (path,) = (p for p in (tmp_path / "new/over").rglob("*") if p.is_file())
    assert path.relative_to(tmp_path / "new/over").as_posix() == "mask/crack/0_mask_verdict.png"
    picture = np.array(Image.open(path))
    assert picture.shape[1] >= 512 and picture[520:].any()          # 128 px times 4, and text below
    assert (picture[4 + 31 * 8:4 + 39 * 8, 4 + 21 * 8:4 + 29 * 8] == 77).all()      # the defect stays visible
    for decision, top, left, bottom, right in ("reject", 30, 20, 40, 30), ("accept", 50, 50, 51, 51):
        y, x = np.nonzero((picture[:520] == ir.COLOURS[decision]).all(-1))
        assert (y.min(), x.min()) == (4 + top * 8 - 2, 4 + left * 8 - 2)
        assert (y.max(), x.max()) == (4 + bottom * 8 + 1, 4 + right * 8 + 1)


def test_an_overlay_without_a_readable_photo_shows_the_mask(tmp_path, judge_by):
    path = save(tmp_path / "mask/x/1_mask.png", bar(3, 3))
    assert ir.find_photo(path) is None
    save(tmp_path / "image/x/1.png", bar(1, 1)).write_bytes(b"no picture")
    assert ir.find_photo(path) is None
    picture = np.array(ir.draw_overlay(bar(3, 3), judge_by({"max_area_px": 10})(bar(3, 3))))
    green, red = ((picture == ir.COLOURS[decision]).all(-1).any() for decision in ("accept", "reject"))
    assert green and not red


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (64, 64), (3, 1024)])
def test_a_picture_can_be_drawn_of_any_shape_and_any_number_of_findings(judge_by, shape):
    mask = np.zeros(shape, np.uint8)
    mask[::2, ::2] = 1
    long_name = {"name": "x" * 300, "max_area_px": 0, "per": "component"}
    for least in 0, 2:                                              # 2: nothing but noise
        picture = ir.draw_overlay(mask, judge_by(long_name | {"min_component_px": least})(mask))
        assert picture.width >= 480 and picture.height < 4 * max(512, *shape)
