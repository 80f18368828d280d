"""Claims of inspect_rules.py: where each limit lies, in which pixels, and that bad input is one sentence and costs nothing else."""

import ast
import csv
import json
import math
import os
import subprocess
import sys
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
    at = math.ceil(r.max_area_px / scale)                     # in mask pixels: the first count that meets the limit
    for count in {max(at - 1, 0), at, at + 1}:
        findings = ir.judge(draw(classes, {r.classes[0]: count}, size), standard, classes, "picture")
        expected = "reject" if count >= max(at, 1) else "accept"
        assert ir.verdict(findings) == expected
        assert findings == ([ir.Finding("picture", "+".join(r.classes), count * scale, r.max_area_px, expected, r.name, scale)]
                            if count else [])


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


# --- bad standards, class tables and masks ---

BAD_STANDARDS = {
    "bad json": ("{", "cannot be read as JSON"),
    "not an object": ([1], "expected a JSON object"),
    "no object": ({"native_size": [8, 8], "rules": []}, "'object' is missing"),
    "no native_size": ({"object": "pill", "rules": []}, "'native_size' is missing"),
    "no rules": ({"object": "pill", "native_size": [8, 8]}, "'rules' is missing"),
    "unknown key": (good_standard(nativesize=1), "'nativesize'.*known are object, native_size, rules, unnamed"),
    "object no text": (good_standard(object=3), "object must"),
    "empty rules": (good_standard(rules=[]), "rules must"),
    "rules no list": (good_standard(rules={}), "rules must"),
    "rule no object": (good_standard(rules=["crack"]), r"rules\[0\]: expected a JSON object"),
    "rule without limit": (good_standard(rules=[{"classes": ["crack"]}]), r"rules\[0\].*'max_area_px' is missing"),
    "rule without classes": (good_standard(rules=[{"max_area_px": 0}]), r"rules\[0\].*'classes' is missing"),
    "rule's unknown key": (rule(max_area=3), r"rules\[0\].*'max_area'.*known are classes, max_area_px, name"),
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
    return {"colour": "is RGB", "alpha": "is LA", "binary": "looks like a binary 0/255 mask", "all_255": "binary 0/255",
            "deep_binary": "binary 0/255", "one_bit": "binary 0/255", "truncated": "cannot be read", "empty": "cannot be read",
            "text": "cannot be read", "above": "0 to 9, but the class table has 0 to 6"}


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
    assert result["findings"][1] == dict(zip(ir.COLUMNS, ("mask/crack/000_mask", "crack", 8.0, 0, "reject", "no cracks", 4.0)))
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
    names = ["=1+1", "+a", "-a", "@a", "plain"]
    for name in names:
        save(tmp_path / f"{name}.png", np.zeros((2, 2), np.uint8))
    out = tmp_path / "out.csv"
    assert ir.main(["--standard", "pill", "--masks", str(tmp_path), "--csv", str(out)]) == 0
    assert {row["image"] for row in csv.DictReader(out.open())} == {"'" + n for n in names[:-1]} | {"plain"}


def test_without_flags_it_shows_the_standards_to_copy_and_an_example(tmp_path, capsys):
    assert ir.main([]) == 0
    printed = capsys.readouterr().out
    shown = printed[printed.index('{"object": "zipper"'):]
    assert json.loads(shown[:shown.index("\n\n")]) == ir.STANDARDS["zipper"]
    assert "verdict: reject" in printed


@pytest.mark.parametrize("argv", [["--standard", "pill"], ["--masks", "."], ["--csv", "x"], ["--standrad", "pill"]])
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
