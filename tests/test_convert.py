"""Each layout comes out pixel for pixel; what is wrong with it is one sentence and leaves nothing behind."""
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import convert
from datasets import open_dataset

SIDE = 16
# layout: (classes, None: datasets.py knows them by the folder's name; split;
#          photos: (name that comes out, file), and where it has a mask: file, class, value in the file)
MADE = {
    "dagm2007": (["defect"], {"train": ["defect/0577", "good/0576"], "test": ["good/0002"]}, [
        ("defect/0577", "Train/0577.PNG", "Train/Label/0577_label.PNG", 1, 255),
        ("good/0576", "Train/0576.PNG"), ("good/0002", "Test/0002.PNG")]),
    "kolektor2": (["defect"], {"train": ["10000"], "test": ["20000"]}, [
        ("10000", "train/10000.png", "train/10000_GT.png", 1, 255),
        ("20000", "test/20000.png", "test/20000_GT.png", 0, 0)]),
    "visa": (["class_1", "class_2"], {}, [
        ("anomaly/000", "Data/Images/Anomaly/000.JPG", "Data/Masks/Anomaly/000.png", 1, 1),
        ("anomaly/001", "Data/Images/Anomaly/001.JPG", "Data/Masks/Anomaly/001.png", 2, 2),
        ("good/000", "Data/Images/Normal/000.JPG")]),
    "magnetic-tile": (["blowhole", "uneven"], {}, [
        ("blowhole/exp1_0", "MT_Blowhole/Imgs/exp1_0.jpg", "MT_Blowhole/Imgs/exp1_0.png", 1, 140),
        ("uneven/exp1_1", "MT_Uneven/Imgs/exp1_1.jpg", "MT_Uneven/Imgs/exp1_1.png", 2, 128),
        ("uneven/exp1_2", "MT_Uneven/Imgs/exp1_2.jpg", "MT_Uneven/Imgs/exp1_2.png", 0, 127),
        ("good/exp1_3", "MT_Free/Imgs/exp1_3.jpg")]),
    "aitex": (["broken_end", "fuzzyball"], {}, [
        ("broken_end/1111_002_00", "Defect_images/1111_002_00.png",
         "Mask_images/1111_002_00_mask.png", 1, 255),
        ("fuzzyball/0044_019_04", "Defect_images/0044_019_04.png",
         "Mask_images/0044_019_04_mask1.png", 2, 255),
        ("good/0000_000_05", "NODefect_images/2306881-210020u/0000_000_05.png")]),
    "synthetic": (None, {}, [
        ("2_000002_1_1", "images/2_samples_image_000002_1_1.png",
         "masks_converted_dir/2_samples_converted_mask_000002_1_1.png", 5, 5)]),
    "ds-mvtec": (None, {}, [
        ("hole/002", "image/hole/002.png", "mask/hole/002_mask.png", 4, 4),
        ("good/000", "image/good/000.png")]),
    "binary": (["defect"], {}, [
        ("defect/a", "images/a.jpg", "masks/a.png", 1, 255), ("good/a", "images/ok/a.jpg"),
        ("crack/a", "images/crack/a.jpg", "masks/crack/a_mask.png", 1, 255)]),
}


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def blot(n, value=1):
    """A mask (SIDE, SIDE) with a rectangle of its own size and place for each n."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[1 + n:3 + 2 * n, 2:7 + n] = value
    return mask


def make(layout, root):
    """Write a fake download: {name that comes out: (photo, mask or None)}."""
    pairs = {}
    for n, (name, photo, *mask) in enumerate(MADE[layout][2]):
        save(root / photo, np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3)))
        pairs[name] = root / photo, blot(n, mask[1]) if mask else None
        if mask:
            save(root / mask[0], blot(n, mask[2]))
    if layout == "aitex":                           # a defect with two masks; one that is published without
        save(root / "Mask_images/0044_019_04_mask2.png", blot(5, 255))
        pairs["fuzzyball/0044_019_04"][1][blot(5) > 0] = 2
        save(root / "Defect_images/0100_025_08.png", blot(0))
    if layout == "ds-mvtec":
        texts = ["Path", "object description", "defect description",
                 "wood/hole/03643_00111_002.png", "A &lt;b&gt;.", "B."]
        space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
        cells = [f'<c t="s"><v>{i}</v></c>' for i in range(6)]
        rows = [f'<row>{"".join(cells[i:i + 3])}<c s="2"/></row>' for i in (0, 3)]
        strings = [f"<si><r><t>{t[:1]}</t></r><r><t>{t[1:]}</t></r></si>" for t in texts]
        with zipfile.ZipFile(root.parent / "captions.xlsx", "w") as book:
            book.writestr("xl/sharedStrings.xml", f"<sst {space}>{''.join(strings)}</sst>")
            book.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}>{''.join(rows)}</worksheet>")
    return pairs


def make_coco(root, first_id=0, parts=("train", "val"), above=None):
    """In each part photo 0 has dirt and a tear, photo 1 a tear, photo 2 nothing. Ids are not in order."""
    classes = [{"id": first_id + 1, "name": "tear"}, {"id": first_id, "name": "dirt"}]
    if above:                                       # Roboflow: the project, above its classes
        classes = [{**c, "supercategory": above} for c in classes] + [{"id": 0, "name": above}]
    pairs = {}
    for part in parts:
        images = [{"id": 9 - n, "file_name": f"x/{n}.jpg", "height": SIDE, "width": SIDE} for n in range(3)]
        table = {"categories": classes, "annotations": [], "images": images}
        for n, values in enumerate(((1, 2), (2,), ())):
            mask = blot(0, 0)
            for k in values:
                mask[k:k + 3, 2 * n:9] = k
                box = [[2 * n, k, 9, k, 9, k + 3, 2 * n, k + 3]]
                shape = {"image_id": 9 - n, "category_id": first_id + k - 1, "segmentation": box}
                table["annotations"].append(shape)
            save(root / part / f"{n}.jpg", blot(n, 200))
            pairs[f"{part}_{n}"] = root / part / f"{n}.jpg", mask
        (root / part / "_annotations.coco.json").write_text(json.dumps(table))
    return pairs


def check(out, pairs, classes, split, captions={}):
    """The files of a converted data set, and what datasets.py reads from it."""
    images = {p.relative_to(out / "image").with_suffix("").as_posix(): p for p in out.glob("image/**/*.*")}
    assert {name: path.read_bytes() for name, path in images.items()} == {
        name: photo.read_bytes() for name, (photo, _) in pairs.items()}
    masks = {p.relative_to(out / "mask").as_posix().removesuffix("_mask.png"): np.array(Image.open(p))
             for p in out.glob("mask/**/*.*")}
    assert set(masks) == {name for name, (_, mask) in pairs.items() if mask is not None}
    assert all(np.array_equal(mask, pairs[name][1]) for name, mask in masks.items())
    written = {file.stem: json.loads(file.read_text("utf-8")) for file in out.glob("*.json")}
    numbered = classes and {str(i): name for i, name in enumerate(["background", *classes])}
    expected = {"classes": numbered, "split": split, "captions": captions}
    assert written == {name: content for name, content in expected.items() if content}
    data = open_dataset(out)
    assert data.classes[1:] == tuple(classes or ("color", "crack", "scratch", "hole", "liquid"))
    assert {s.name for s in data.samples} == set(pairs)
    for i, sample in enumerate(data.samples):
        assert np.array_equal(data.read(i)[1], masks.get(sample.name, blot(0, 0)))


@pytest.mark.parametrize("layout", MADE)
def test_each_layout_comes_out_pixel_for_pixel(layout, tmp_path):
    classes, split, _ = MADE[layout]
    pairs = make(layout, tmp_path / "in/wood")
    convert.convert(tmp_path / "in/wood", tmp_path / "out/wood", layout if layout == "binary" else None)
    captions = {"hole/002": "A <b>. B."} if layout == "ds-mvtec" else {}
    check(tmp_path / "out/wood", pairs, classes, split, captions)


@pytest.mark.parametrize("first_id, parts, above", [
    (0, ("train", "val"), None), (1, ("train", "val"), None), (1, ("train", "valid", "test"), "parts")])
def test_coco_ids_from_0_and_from_1_give_the_same_classes(first_id, parts, above, tmp_path):
    pairs = make_coco(tmp_path / "in", first_id, parts, above)
    convert.convert(tmp_path / "in", tmp_path / "out")
    train, val, test = ([f"{part}_{n}" for n in range(3)] for part in (*parts[:2], parts[-1]))
    check(tmp_path / "out", pairs, ["dirt", "tear"], {"train": train, "val": val, "test": test})


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_that_lies_on_its_side_gets_an_upright_mask(turn, tmp_path):
    path, stored, exif = tmp_path / "a.png", np.tril(np.ones((10, 14), np.uint8)), Image.Exif()
    exif[convert.ORIENTATION] = turn
    save(path, stored, exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(convert.upright(upright, path), upright)
    if turn >= 5:                                   # only then the shape tells that the mask lies, too
        assert np.array_equal(convert.upright(stored, path), upright)
    with pytest.raises(ValueError, match="a.png: the photo is 10x14, its mask 9x9"):
        convert.upright(np.zeros((9, 9), np.uint8), path)


def test_polygons_cover_the_pixels_whose_centres_they_hold():
    rng, (row, column) = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE][..., None] + 0.5
    for corners in (3, 4, 7, 12) * 10:
        x, y = points = rng.uniform(-4, 20, (2, corners))
        mask = blot(0, 0)
        convert.fill_polygon(mask, points.T.ravel().tolist(), 3)
        x_next, y_next = np.roll(x, -1), np.roll(y, -1)         # edges that a ray to the right crosses
        crosses = ((y <= row) != (y_next <= row)) & (x + (row - y) / (y_next - y) * (x_next - x) > column)
        assert np.array_equal(mask, 3 * (crosses.sum(-1) % 2))
    runs = {"counts": [5, 2, 9], "size": [4, 4]}    # COCO's run lengths go down the columns
    assert np.flatnonzero(convert.fill_annotations("a", (4, 4), [(1, runs)]).T).tolist() == [5, 6]


@pytest.fixture
def wrong(tmp_path):
    def convert_and_match(sentence, folder="in", layout=None):
        with pytest.raises(ValueError, match=sentence):
            convert.convert(tmp_path / folder, tmp_path / "out", layout)
        assert not list(tmp_path.glob("*out*"))
    return convert_and_match


def test_a_wrong_coco_table_is_one_sentence_and_leaves_nothing(tmp_path, wrong):
    make_coco(tmp_path / "in")
    path = tmp_path / "in/val/_annotations.coco.json"
    text = path.read_text()
    for segmentation, sentence in (([], "a box alone"), ({"counts": "Q1k2"}, "compressed"),
                                   ([[1, 2, 3]], "not a polygon"), ([[float("nan")] * 6], "not a polygon"),
                                   ({"counts": [7]}, "cannot reshape")):
        table = json.loads(text)
        table["annotations"][0]["segmentation"] = segmentation
        path.write_text(json.dumps(table))
        wrong(f"val/0.jpg: .*{sentence}")
    path.write_text(text.replace('"category_id": 0', '"category_id": 7'))
    wrong("_annotations.coco.json: is no COCO table .KeyError.7")
    path.write_text(text)
    (tmp_path / "in/train/1.jpg").rename(tmp_path / "in/train/5.jpg")
    wrong("1 images without a mask: train/5.jpg; add or remove files")
    (tmp_path / "in/train/5.jpg").unlink()
    wrong("1 masks without an image: train/1.jpg; add or remove files")


def test_wrong_files_are_one_sentence_and_leave_nothing(tmp_path, wrong):
    make("dagm2007", tmp_path / "in")
    (tmp_path / "in/Train/Label/0577_label.PNG").write_bytes(b"no picture")
    wrong("0577_label.PNG: cannot be read as an image")
    save(tmp_path / "in/Train/Label/0577_label.PNG", blot(1, 3))
    wrong("0577_label.PNG: has the values 0 to 3, not 0 and 255")
    photo = make("synthetic", tmp_path / "drawn")["2_000002_1_1"][0]
    save(tmp_path / "drawn" / MADE["synthetic"][2][0][2], blot(1, 255))
    wrong("2_samples_converted_mask_000002_1_1.png: is no mask of class indices", "drawn")
    photo.with_suffix(".jpg").write_bytes(photo.read_bytes())
    wrong("2_samples_image_000002_1_1.png: has the stem of 2_samples_image_000002_1_1.jpg", "drawn")
    wrong("no images in the layout binary", "in", "binary")
    wrong("has none of these layouts", "drawn/images")
    wrong("nowhere: no such folder", "nowhere")


def test_several_objects_and_the_command(tmp_path):
    for name in ("Ring", "Screw"):
        make_coco(tmp_path / "VISION" / name)
    (tmp_path / ".out.part/rest").mkdir(parents=True)           # of a conversion that was killed
    command = [sys.executable, convert.__file__, tmp_path / "VISION", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"next: python datasets.py --data {tmp_path / 'out'}" in done.stdout
    for line in ("6 images, 2 of them without", f"1 dirt{18:>32} px in 2 images", "split test: 3 images"):
        assert done.stdout.count(line) == 2
    assert sorted(p.name for p in tmp_path.glob("out/*")) == ["Ring", "Screw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: --out {tmp_path / 'out'}: is not empty; name a new folder\n"
