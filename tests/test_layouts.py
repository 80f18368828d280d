"""Every layout is read as it is downloaded, pixel for pixel, faults and all; a damaged file is reported and the rest is read."""
import json
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from conftest import ROOT, run_audit as go
from datasets import (CLASS_TABLES, NO_DEFECT, audit, fill_polygon, find_dataset, find_objects, open_dataset,
                      read_captions)
from inspect_rules import LABELS
from layouts import MVTEC, blots, mvtec, save, touch, write_all, write_xlsx

TILE = ROOT.parent / "shared" / "data" / "magnetic_tile"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("layouts"))


NAMES = ["bottle", "capsule", "metal_nut", "pill", "wood", "Capacitor", "Screw", "Wood", "DS-Cotton-Fabric", "DS-DAGM", "synthetic_MVTec/pill",
         "synthetic_VISION/Capacitor", "synthetic_Cotton_Fabric", "mvtec", "btad", "vision", "dagm2007", "kolektor2", "visa", "magnetic_tile",
         "aitex", "plain"]
every_layout = pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)


def stored(path):
    """An image file as (C, H, W)."""
    array = np.array(Image.open(path))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


@every_layout
def test_each_layout_is_read_pixel_for_pixel(written, index):
    built = written[index]
    data = open_dataset(built.path, object=built.object)
    assert (data.layout, data.classes) == (built.layout, built.classes)
    assert {s.name for s in data.samples} == set(built.pairs) and len(data) == len(built.pairs) and not data.problems
    for i, s in enumerate(data.samples):
        image, mask = data[i]
        path, expected = built.pairs[s.name]
        assert np.array_equal(image, stored(path)) and np.array_equal(mask, expected), s.name
        assert data.caption(i) == built.captions.get(s.name, "")
    assert data.defective() == [i for i, s in enumerate(data.samples) if built.pairs[s.name][1].any()]


@every_layout
@pytest.mark.parametrize("what", ["image", "mask"])
def test_a_damaged_file_is_reported_and_the_rest_is_read(written, index, what, tmp_path):
    built = written[index]
    copy = shutil.copytree(built.path, tmp_path / built.path.name)
    files = [built.pairs[name][0] for name in built.pairs] if what == "image" else list(built.mask_files.values())
    if not files:
        return                                                      # polygons: the table is one file, tested below
    victim = copy / files[4].relative_to(built.path)
    victim.write_bytes(victim.read_bytes()[:-40])
    with pytest.raises(ValueError, match="1 of .* cannot be used") as error:
        open_dataset(copy, (32, 32), object=built.object).tensors()
    assert victim.name in str(error.value)
    rest = open_dataset(copy, (32, 32), object=built.object, skip_bad=True)
    assert len(rest) == len(built.pairs) - 1 == len(rest.tensors()[0]) and victim.name in "".join(rest.notes)
    report = audit(find_dataset(copy, built.object))
    assert len(report["problems"]) == 1 and victim.name in report["problems"][0] and sum(report["sizes"].values()) == len(built.pairs) - 1


@every_layout
def test_training_and_scoring_share_no_image_and_the_rule_is_named(written, index):
    built = written[index]
    parts = [open_dataset(built.path, split=split, object=built.object) for split in ("train", "test")]
    names = [{s.name for s in part.samples} for part in parts]
    assert names[0] | names[1] == set(built.pairs) and not names[0] & names[1]
    rule = parts[0].split_rule
    if built.layout in ("vision", "dagm2007", "kolektor2"):
        assert rule == "split train: official, by the folders on disk"
        assert all(name.lower().startswith("train/") for name in names[0])
    elif built.layout in ("flat", "synthetic", "plain", "visa"):
        assert rule == "split train: the first 5 images of each mask class train"
        for value in range(1, len(built.classes)):                  # order: natural, as few_shot_split has it
            holding = [s.name for s in find_dataset(built.path, built.object).samples if (built.pairs[s.name][1] == value).any()]
            assert set(holding[:5]) <= names[0]
    else:
        assert rule == "split train: the first 5 images of each kind train"
        kinds = {name.rsplit("/", 1)[0].split("/")[0] for name in names[0]}
        assert all(sum(n.startswith(kind + "/") for n in names[0]) <= 5 for kind in kinds)


COMMANDS = ["pill", "Capacitor", "DS-Cotton-Fabric", "synthetic_MVTec/pill", *NAMES[13:]]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_four_commands_run_on_each_layout(written, name, tmp_path, capsys):
    built, out = written[NAMES.index(name)], tmp_path / "run"
    where = ["--data", str(built.path)] + (["--object", built.object] if built.object else [])
    for stage in ("large", "small"):
        train.train(train.parse_args(["--stage", stage, *where, "--out", str(out), "--size", "16", "16", "--steps", "2", "--batch-size", "2",
                                      "--device", "cpu"]))
    sample.draw_pairs(sample.parse_args(["--run", str(out), "--count", "3", "--num-steps", "2", "--device", "cpu"]))
    evaluate.evaluate(evaluate.parse_args(["generation", "segmentation", "--run", str(out), "--quick", "--device", "cpu"]))
    shown = capsys.readouterr().out
    assert f"layout {built.layout}" in shown and "split test: " in shown
    text = json.loads((out / "quick/metrics.json").read_text())["generation"]["text"][-1]
    assert "split train: " in text and "split test: " in text and text.split("(")[1].split(")")[0] in (out / "quick/report.html").read_text()


# --- the root folder and the audit ---

def test_the_audit_of_the_whole_download_counts_what_was_written(written, tmp_path):
    trees = [b for b in written if b.path == written[0].path]
    shown = go("--data", trees[0].path, "--json", tmp_path / "audit.json", "--sheet", tmp_path / "sheet.png")
    reports = json.loads((tmp_path / "audit.json").read_text())
    assert len(reports) == len(trees) == 13
    for built in trees:
        report = reports.get(built.object) or next(r for name, r in reports.items() if name.endswith(f"/{built.object}") and "synthetic" not in name)
        masks = [mask for _, mask in built.pairs.values()]
        assert report["images"] == len(masks) and report["annotated"] == sum(m.any() for m in masks) and not report["problems"]
        assert report["several_types"] == sum(len(np.unique(m)) > 2 for m in masks) and len(report["captions"]) == len(built.captions)
        for k, name in enumerate(built.classes):
            areas = [int((m == k).sum()) for m in masks if (m == k).any()]
            expected = [min(areas), float(np.median(areas)), max(areas)] if areas else None
            assert report["classes"][name]["pixels"] == sum(areas) and report["classes"][name]["area"] == expected
        assert report["types"] == len({v for m in masks for v in np.unique(m)} - {0}) and report["pixel_wise"]
    assert "good/007 and 14 more" in reports["DS-MVTec/pill"]["left_out"][0] and "good/000" in reports["DS-MVTec/pill"]["left_out"][0]
    assert sum(len(b.captions) for b in trees) == sum(len(r["captions"]) for r in reports.values()) == 84
    total = shown.splitlines()[-1].split()
    assert total[:3] == ["total", str(sum(len(b.pairs) for b in trees)), str(sum(m.any() for b in trees for _, m in b.pairs.values()))]
    assert len(list(tmp_path.glob("sheet_*.png"))) == 13


def test_the_audit_names_what_is_wrong_and_goes_on(tmp_path):
    for name in ("a", "b"):
        for n in range(12):
            mask = blots(n % 7, 1)
            save(tmp_path / f"{name}/image/crack/{n}.png", np.random.default_rng(n).integers(0, 256, (32, 32, 3)))
            save(tmp_path / f"{name}/mask/crack/{n}_mask.png", mask * (n != 3))
        touch(tmp_path / f"{name}/classes.json", '{"0": "background", "1": "crack"}')
    save(tmp_path / "a/mask/crack/4_mask.png", blots(4, 7))                                         # above the table
    shutil.copy(tmp_path / "a/image/crack/0.png", tmp_path / "a/image/crack/11.png")                # in training and in scoring
    save(tmp_path / "a/image/crack/12.png", np.zeros((60, 32, 3)))
    save(tmp_path / "a/mask/crack/12_mask.png", np.ones((60, 32)))
    save(tmp_path / "a/mask/crack/99_mask.png", np.ones((32, 32)))                                  # no such image
    touch(tmp_path / "b/classes.json", "{")
    shown = go("--data", tmp_path, "--json", tmp_path / "audit.json", "--sheet", tmp_path / "s.png", code=1)
    report, broken = json.loads((tmp_path / "audit.json").read_text()).values()
    assert report["empty_masks"] == ["crack/3"] and report["size_outliers"] == ["crack/12"]
    assert report["near_duplicates"] == [["crack/0", "crack/11", 0]]
    assert [("values [0, 7]" in p, "mask/crack/99_mask.png" in p) for p in report["problems"]] == [(False, True), (True, False)]
    assert "classes.json" in broken["problems"][0] and "problem" in shown


def test_a_root_lists_its_objects(written):
    root = written[0].path
    assert len(find_objects(root)) == 13 and open_dataset(root, object="DS-MVTec/pill").name == "pill"
    with pytest.raises(ValueError, match="holds 13 data sets; choose one with --object: DS-Cotton-Fabric, DS-DAGM, DS-MVTec/bottle"):
        open_dataset(root)
    with pytest.raises(FileNotFoundError, match="--object tablet: not in .*DS-MVTec/pill"):
        open_dataset(root, object="tablet")
    assert open_dataset(root, object="Capacitor").layout == "flat"                                  # not the synthetic one
    assert open_dataset(root / "DS-MVTec", object="wood").classes != open_dataset(root / "DS-VISION", object="Wood").classes
    nested = next(b for b in written if b.layout == "dagm2007").path
    assert open_dataset(nested).name == "Class1"                                                    # only one there: no need to say


def test_layout_overrides_what_the_folder_looks_like(written, tmp_path):
    root = next(b for b in written if b.layout == "synthetic").path / "synthetic_Cotton_Fabric"
    with pytest.raises(ValueError, match="samples_image_000000_0_1"):
        open_dataset(root, layout="plain")
    for n in range(7):
        save(tmp_path / f"images/{n}.png", np.zeros((32, 32, 3)))
        save(tmp_path / f"masks/{n}.png", blots(n, 255))
    with pytest.raises(ValueError, match="value 255.*--layout binary"):
        open_dataset(tmp_path)
    data = open_dataset(tmp_path, layout="binary")
    assert data.classes == ("background", "defect") and np.array_equal(data[3][1], blots(3, 1))
    assert train.parse_args(["--stage", "small", "--layout", "binary"]).layout == "binary"


def test_the_shipped_tables_agree_with_the_standards():
    assert len(MVTEC) == 5 and all(CLASS_TABLES[name] == ("background", *text.split()) for name, (text, _, _) in MVTEC.items())
    assert all(CLASS_TABLES[name] == table for name, table in LABELS.items()) and len(CLASS_TABLES) == 15 + 6 + 3
    assert [len(CLASS_TABLES[name]) - 1 for name in ("cable", "toothbrush", "hazelnut", "DS-DAGM")] == [8, 3, 4, 5]


def test_classes_json_overrides_the_shipped_table(written, tmp_path):
    root = shutil.copytree(written[0].path / "DS-MVTec" / "pill", tmp_path / "pill")
    assert open_dataset(root).classes[1] == "color" and not open_dataset(root).samples[0].caption
    touch(root / "classes.json", json.dumps({str(i): n for i, n in enumerate(["background", "a", "b", "c"])}))
    data = open_dataset(root)
    assert data.classes == ("background", "a", "b", "c") and len(data) == 21 + 26               # own data: nothing is foreign


# --- single readers ---

def test_captions_that_cannot_be_trusted_are_refused(tmp_path):
    path = tmp_path / "captions.xlsx"
    rows = [("Path", "object description", "defect description"), ("pill/crack/000.png", "A pill.", "A crack.")]
    write_xlsx(path, rows)
    assert read_captions(path) == {("pill", "crack", 0): "A pill. A crack."}
    for name, text in (("xl/sharedStrings.xml", '<!DOCTYPE x [<!ENTITY a "b">]><sst/>'), ("xl/sharedStrings.xml", "<sst>" + " " * (17 << 20)),
                       ("xl/worksheets/sheet1.xml", "<worksheet"), ("other.xml", "")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
            book.writestr(name, text)
        with pytest.raises(ValueError, match="captions.xlsx"):
            read_captions(path)
    path.write_bytes(b"no zip")
    for n in range(2):
        save(tmp_path / f"pill/image/crack/00{n}.png", np.zeros((32, 32)))
        save(tmp_path / f"pill/mask/crack/00{n}_mask.png", blots(n, 1))
    data = open_dataset(tmp_path / "pill")
    assert len(data) == 2 and "captions" in data.notes[0]                                           # no reason to stop


@pytest.mark.parametrize("segmentation", [{"counts": [1, 2], "size": [32, 32]}, [[1, 2, 3]], [["a", 1, 2, 3]], [[float("nan")] * 6]])
def test_annotations_that_are_no_polygons_cost_one_image(tmp_path, segmentation):
    table = {"images": [{"id": i, "file_name": f"../{i}.jpg"} for i in range(3)], "categories": [{"id": 0, "name": "0"}],
             "annotations": [{"image_id": 1, "category_id": 0, "segmentation": segmentation},
                             {"image_id": 2, "category_id": 0, "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}]}
    for i in range(3):
        save(tmp_path / f"train/{i}.jpg", np.zeros((32, 32, 3)))
    touch(tmp_path / "train/_annotations.coco.json", json.dumps(table))
    assert len(open_dataset(tmp_path, skip_bad=True)) == 2 and "train/1.jpg" in audit(find_dataset(tmp_path))["problems"][0]
    touch(tmp_path / "train/_annotations.coco.json", json.dumps({**table, "images": [{}]}))
    with pytest.raises(ValueError, match="not a COCO table"):
        open_dataset(tmp_path)


def test_polygons_cover_the_pixels_whose_centres_they_hold():
    mask = np.zeros((12, 12), np.uint8)
    fill_polygon(mask, [2, 3, 7, 3, 7, 5, 2, 5], 1)
    assert mask.sum() == 5 * 2 and mask[3:5, 2:7].all()
    mask[:] = 0
    fill_polygon(mask, [-3, -3, 20.2, -3, -3, 20.2], 2)
    y, x = np.mgrid[:12, :12] + 0.5
    assert np.array_equal(mask > 0, x + y < 17.2)
    ring = np.zeros((12, 12), np.uint8)
    fill_polygon(ring, [0, 0, 12, 0, 12, 12, 0, 12, 0, 0, 4, 4, 4, 8, 8, 8, 8, 4, 4, 4], 1)             # cut to a hole and back
    assert ring.sum() == 144 - 16


def test_random_trees_pair_by_stem(tmp_path):
    """40 random folders: what is read is what has a partner, and what has none is named."""
    for trial in range(40):
        random.seed(trial)
        root, there = tmp_path / str(trial), {}
        for kind in random.sample(["crack", "good", "ok", "a b", "10", "2"], 3):
            for stem in random.sample(["0", "000", "1_mask", "x.y", "Z", "007"], 4):
                image, mask = random.random() < 0.8, random.random() < 0.7
                there[kind, stem] = image, mask
                if image:
                    save(root / f"image/{kind}/{stem}.{random.choice(['png', 'JPG', 'bmp'])}", np.zeros((8, 8, 3)))
                if mask:
                    save(root / f"mask/{kind}/{stem}_mask.png", np.ones((8, 8)))
        touch(root / "classes.json", '{"0": "background", "1": "x"}')
        if not (root / "image").is_dir():
            continue
        data = find_dataset(root)
        expected = {f"{k}/{s}": m for (k, s), (i, m) in there.items() if i and (m or k in NO_DEFECT)}
        assert {s.name: s.mask is not None for s in data.samples} == expected
        assert len(data.problems) == sum((i and not m and k not in NO_DEFECT) or (m and not i) for (k, s), (i, m) in there.items())
        assert all(s.mask is None or s.mask.stem == f"{s.image.stem}_mask" for s in data.samples)


def test_original_masks_are_paired_by_object_kind_and_stem(written, tmp_path):
    spectrum = next(b for b in written if b.object == "metal_nut")
    old = mvtec(tmp_path / "MVTec")
    data = open_dataset(spectrum.path, object="metal_nut")
    with pytest.raises(ValueError, match="--original"):
        open_dataset(spectrum.path, object="metal_nut", annotation="original")
    for kind in ("scratch", "bent"):
        for n in range(7):
            save(tmp_path / f"MVTec/metal_nut/ground_truth/{kind}/{n:03d}_mask.png", blots(n, 255, 255))
    for place in (old.path, old.path / "metal_nut"):
        coarse = open_dataset(spectrum.path, object="metal_nut", annotation="original", original=place)
        assert coarse.classes == ("background", "defect") and [s.name for s in coarse.samples] == [s.name for s in data.samples]
        for i, s in enumerate(coarse.samples):
            expected = blots(0) if s.kind == "good" else blots(int(s.image.stem), 1, 1)
            assert np.array_equal(coarse[i][1], expected) and torch.equal(coarse[i][0], data[i][0])
    (tmp_path / "MVTec/metal_nut/ground_truth/bent/003_mask.png").unlink()
    with pytest.raises(ValueError, match=r"without an original mask \(1\): bent/003"):
        open_dataset(spectrum.path, object="metal_nut", annotation="original", original=old.path)


# --- real photos ---

@pytest.mark.skipif(not TILE.is_dir(), reason="no magnetic_tile beside the repository")
def test_magnetic_tile():
    data = find_dataset(TILE)
    assert len(data) == 779 and len(data.classes) == 6 and not data.problems
    series = {name: entry["series"] for name, entry in json.loads((TILE / "meta.json").read_text()).items()}
    parts = {split: {series[s.name] for s in data.part(split).samples} for split in ("train", "val", "test", "few_shot")}
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["val"] and not parts["val"] & parts["test"]
    assert parts["few_shot"] <= parts["train"] and sum(len(data.part(s)) for s in ("train", "val", "test")) == 779
    assert len(data.defective()) == 388
