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
    "dagm2007": (["defect"], {"train": ["good/0576", "defect/0577"], "test": ["good/0002"]}, [
        ("defect/0577", "Train/0577.PNG", "Train/Label/0577_label.PNG", 1, 255),
        ("good/0576", "Train/0576.PNG"), ("good/0002", "Test/0002.PNG")]),
    "kolektor2": (["defect"], {"train": ["10000"], "test": ["20000"]}, [
        ("10000", "train/10000.png", "train/10000_GT.png", 1, 255),
        ("20000", "test/20000.png", "test/20000_GT.png", 0, 0)]),
    "mmsegmentation": (["class_1", "class_2"], {"train": ["0"], "val": ["1"], "test": ["1"]}, [
        ("0", "img_dir/train/0.jpg", "ann_dir/train/0.png", 1, 1),
        ("1", "img_dir/val/1.jpg", "ann_dir/val/1.png", 2, 2)]),
    "deepcrack": (["defect"], {"train": ["0"], "test": ["1"]}, [
        ("0", "train_img/0.jpg", "train_lab/0.png", 1, 255),
        ("1", "test_img/1.jpg", "test_lab/1.png", 1, 255)]),
    "roboflow": (["crack", "dirt"], {"train": ["0.rf.a"], "val": ["1.rf.b"], "test": ["1.rf.b"]}, [
        ("0.rf.a", "train/0.rf.a.jpg", "train/0.rf.a_mask.png", 1, 1),
        ("1.rf.b", "valid/1.rf.b.jpg", "valid/1.rf.b_mask.png", 2, 2)]),
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


def load(path):
    return json.loads(path.read_text("utf-8"))


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
    if layout == "roboflow":
        (root / "train/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, crack\n2, dirt\n")
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
    written = {file.stem: load(file) for file in out.glob("*.json")}
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
    flags = {"layout": "binary", "classes": "one"} if layout == "binary" else {}
    convert.convert(tmp_path / "in/wood", tmp_path / "out/wood", **flags)
    check(tmp_path / "out/wood", pairs, classes, split, {"hole/002": "A <b>. B."} if "ds" in layout else {})


@pytest.mark.parametrize("first_id, parts, above", [
    (0, ("train", "val"), None), (1, ("train", "val"), None), (1, ("train", "valid", "test"), "parts")])
def test_coco_ids_from_0_and_from_1_give_the_same_classes(first_id, parts, above, tmp_path):
    pairs = make_coco(tmp_path / "in", first_id, parts, above)
    convert.convert(tmp_path / "in", tmp_path / "out")
    pairs = {name.replace("valid_", "val_"): pair for name, pair in pairs.items()}
    train, val, test = ([f"{part}_{n}" for n in range(3)] for part in ("train", "val", parts[-1]))
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
    with pytest.raises(ValueError, match="a.png: the photo is .*, its mask 9x9; if .*resize"):
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
    assert np.flatnonzero(convert.fill_segmentation((4, 4), runs).T).tolist() == [5, 6]


@pytest.fixture
def wrong(tmp_path):
    def convert_and_match(sentence, folder="in", layout=None, **flags):
        with pytest.raises(ValueError, match=sentence):
            convert.convert(tmp_path / folder, tmp_path / "out", layout, **flags)
        assert not list(tmp_path.glob("*out*"))
    return convert_and_match


def test_a_wrong_coco_table_is_one_sentence_and_leaves_nothing(tmp_path, wrong):
    make_coco(tmp_path / "in")
    path = tmp_path / "in/val/_annotations.coco.json"
    text = path.read_text()
    for segmentation, sentence in (([], "a box alone"), ({"counts": "Q1k2"}, "do not fit 16x16"),
                                   ([[1, 2, 3]], "reshape"), ([[1, 2, 3, 4]], "less than 3 points"),
                                   ([[float("nan")] * 6], "no number"),
                                   ({"counts": [7]}, "lengths over 7 pixels do not fit")):
        table = json.loads(text)
        table["annotations"][0]["segmentation"] = segmentation
        path.write_text(json.dumps(table))
        wrong(f"val/0.jpg: .*{sentence}")
    path.write_text(text.replace('"category_id": 0', '"category_id": 7'))
    wrong("_annotations.coco.json: .*an annotation has category_id 7, which the table does not explain")
    path.write_text(text.replace('"image_id": 9', '"image_id": 99'))
    wrong("_annotations.coco.json: .*an annotation has image_id 99, which the table does not explain")
    path.write_text(text)
    (tmp_path / "in/train/1.jpg").rename(tmp_path / "in/train/5.jpg")
    wrong("1 labels without one photo of their name: train/_annotations.coco.json: x/1.jpg")


def test_wrong_files_are_one_sentence_and_leave_nothing(tmp_path, wrong):
    make("dagm2007", tmp_path / "in")
    (tmp_path / "in/Train/Label/0577_label.PNG").write_bytes(b"no picture")
    wrong("0577_label.PNG: cannot be read .*; replace it")
    save(tmp_path / "in/Train/Label/0577_label.PNG", blot(1, 3))
    wrong("2 values in masks, class indices: 0, 3; leave --layout binary away")
    (tmp_path / "empty").mkdir()
    wrong("has no labels in a layout that is read", "empty")


def test_several_objects_and_the_command(tmp_path):
    for name in ("Ring", "Screw"):
        make_coco(tmp_path / "VISION" / name)
    command = [sys.executable, convert.__file__, tmp_path / "VISION", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"next: python datasets.py --data {tmp_path / 'out'}" in done.stdout
    assert done.stdout.count("6 photos of dirt, tear") == 2
    assert sorted(p.name for p in tmp_path.glob("out/*")) == ["Ring", "Screw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("/out: is not empty; name a new folder\n")


# --- what labelling tools write, and folders as people have them ---

def tree(root, pictures):
    """Write arrays as pictures and strings as text: {"images/a.png": array}."""
    for name, content in pictures.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content) if isinstance(content, str) else save(path, content)


def masks_of(root, out, **flags):
    """Convert, then what datasets.py reads: {name: mask}, and the classes."""
    convert.convert(root, out, **flags)
    data = open_dataset(out)
    return {s.name: data.read_mask(i) for i, s in enumerate(data.samples)}, list(data.classes[1:])


def same(found, expected):
    assert set(found) == set(expected)
    for name, mask in expected.items():
        assert np.array_equal(found[name], mask), name


GREY, A, B = blot(0, 90), blot(1), blot(4, 2)


def test_compressed_run_lengths_equal_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 0.98, 1) * 8:
        layer = rng.random((37, 23)) < share
        layer[5:30, 3:20] ^= rng.random() < 0.5                 # long runs: numbers of several characters
        rle = coco.encode(np.asfortranarray(layer.astype(np.uint8)))
        text = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        assert np.array_equal(convert.fill_segmentation((37, 23), text), layer)
        plain = coco.frPyObjects(convert.run_lengths(layer), 37, 23)
        assert np.array_equal(coco.decode(plain), layer)


def test_polygons_equal_scikit_image():
    draw = pytest.importorskip("skimage.draw")
    for corners in (3, 5, 9) * 10:
        points = np.random.default_rng(corners).uniform(-3, 40, (corners, 2))
        mask = np.zeros((37, 33), np.uint8)
        convert.fill_polygon(mask, points.ravel(), 1)
        assert np.array_equal(mask, draw.polygon2mask(mask.shape, points[:, ::-1] - 0.5))


def test_coco_in_annotations_reads_all_parts_and_run_lengths(tmp_path):
    tree(tmp_path / "in", {"images/train/0.png": GREY, "images/val/0.png": GREY,
                           "annotations/captions_val.json": "{}"})
    for part, mask in (("train", A), ("val", blot(2))):
        runs = convert.run_lengths(mask > 0)
        table = {"categories": [{"id": 9, "name": "tear"}, {"id": 4, "name": "dirt"}],
                 "images": [{"id": 1, "file_name": "0.png", "height": SIDE, "width": SIDE}],
                 "annotations": [{"image_id": 1, "category_id": 9, "segmentation": runs, "iscrowd": 1}]}
        tree(tmp_path / "in", {f"annotations/instances_{part}2017.json": json.dumps(table)})
        tree(tmp_path / "parts", {f"{part}/images/0.png": GREY, f"{part}/any.json": json.dumps(table)})
    same(masks_of(tmp_path / "parts", tmp_path / "out2")[0], {"train_0": 2 * A, "val_0": 2 * blot(2)})
    found, classes = masks_of(tmp_path / "in", tmp_path / "out")
    same(found, {"train_0": 2 * A, "val_0": 2 * blot(2)})
    assert classes == ["dirt", "tear"] and load(tmp_path / "out/split.json")["val"] == ["val_0"]


def test_labelme_shapes(tmp_path):
    shapes = [{"label": "tear", "points": [[1, 2], [9, 2], [9, 6], [1, 6]]},
              {"label": "dirt", "points": [[14, 15], [10, 12]], "shape_type": "rectangle"}]
    table = {"imagePath": "..\\a.png", "imageHeight": SIDE, "imageWidth": SIDE, "shapes": shapes}
    tree(tmp_path / "in", {"train/a.png": GREY, "train/a.json": json.dumps(table), "good/b.png": GREY})
    mask = blot(0, 0)
    mask[2:6, 1:9], mask[12:15, 10:14] = 2, 1
    found, classes = masks_of(tmp_path / "in", tmp_path / "out")
    assert classes == ["dirt", "tear"]
    same(found, {"defect/a": mask, "good/b": blot(0, 0)})
    shapes[0]["shape_type"] = "linestrip"
    tree(tmp_path / "in", {"train/a.json": json.dumps(table)})
    with pytest.raises(ValueError, match="a.json: .*a shape of the type 'linestrip' is not read"):
        convert.convert(tmp_path / "in", tmp_path / "new")


@pytest.mark.parametrize("names", [
    "names: [dirt, 'tear, long']  # two", "names:\n- dirt\n- \"tear, long\"\nnc: 2",
    "names:\n  0: dirt\n  1: 'tear, long'\ntrain: x", "nc: 2\nnames: {0: dirt, 1: 'tear, long'}\n",
    "names: [\n  'dirt',\n  'tear, long'\n]\nval: [a, b]", "names:\n  - dirt # one\n  - tear, long\n",
    "names:\n  1: tear, long\n  0: 'dirt'\n"])
def test_yolo_polygons_and_names_in_each_form(names, tmp_path):
    line = "1 0.125 0.25 0.625 0.25 0.625 0.5 0.125 0.5\n"
    tree(tmp_path / "in", {"data.yaml": names, "train/images/a.png": GREY, "train/labels/a.txt": line,
                             "valid/images/b.png": GREY, "valid/labels/b.txt": ""})
    mask = blot(0, 0)
    mask[4:8, 2:10] = 2
    found, classes = masks_of(tmp_path / "in", tmp_path / "out")
    assert classes == ["dirt", "tear, long"]
    same(found, {"a": mask, "b": blot(0, 0)})
    tree(tmp_path / "in", {"train/labels/a.txt": "0 0.5 0.5 0.1 0.1"})
    with pytest.raises(ValueError, match="a.txt: .* a box alone"):
        convert.convert(tmp_path / "in", tmp_path / "new")


@pytest.mark.parametrize("text, names", [
    ("names:\n- crack (deep)\n- oil [b]\n- dent {c}", ["crack (deep)", "oil [b]", "dent {c}"]),
    ("names:\n  0: 'oil #2'  # c\n  1: \"a: 'b'\"\n", ["oil #2", "a: 'b'"]),
    ("names: ['it''s one', b]", ["it's one", "b"]),
    ("names:\n - it's one # don't\n - b\n", ["it's one", "b"]),
    ("names:\n  '1': b\n  '0': a\n", ["a", "b"])])
def test_names_with_signs_of_yaml_in_them(text, names, tmp_path):
    tree(tmp_path, {"data.yaml": text})
    assert convert.read_names(tmp_path) == dict(enumerate(names))


@pytest.mark.parametrize("opacity", [90, 255])
def test_masks_whose_shape_is_their_opacity(opacity, tmp_path, wrong):
    white, black = np.full((SIDE, SIDE, 3), 255), np.zeros((SIDE, SIDE, 3), int)
    tree(tmp_path / "in", {"images/a.png": GREY, "masks/a.png": np.dstack([white, opacity * A])})
    same(masks_of(tmp_path / "in", tmp_path / "1")[0], {"a": A})
    for image in np.dstack([black, opacity * A]), np.dstack([white * A[..., None], 0 * A]):
        tree(tmp_path / "in", {"masks/a.png": image})
        wrong("masks/a.png: what shows the defects, its colours or its transparency. Save it without")


def test_colour_masks_by_labelmap_or_file(tmp_path):
    colours = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)])
    names = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ntear:128,0,0::\ndirt:0,128,0::\n"
    both = np.maximum(A, B)
    tree(tmp_path / "in", {"JPEGImages/a.png": GREY, "SegmentationClass/a.png": colours[both],
                             "labelmap.txt": names, "SegmentationObject/a.png": GREY,
                             "ImageSets/Segmentation/val.txt": "a\n"})
    found, classes = masks_of(tmp_path / "in", tmp_path / "out")
    assert classes == ["tear", "dirt"] and load(tmp_path / "out/split.json")["val"] == ["a"]
    same(found, {"a": both})
    (tmp_path / "in/labelmap.txt").rename(tmp_path / "colours.txt")
    with pytest.raises(ValueError, match=r"neither class indices .*\(128, 0, 0\); pass --colours"):
        convert.convert(tmp_path / "in", tmp_path / "new")
    same(masks_of(tmp_path / "in", tmp_path / "new", colours=tmp_path / "colours.txt")[0], {"a": both})


def test_equal_channels_suffixes_splits_and_other_formats(tmp_path, capsys):
    tree(tmp_path / "in", {"images/train/a.ppm": np.dstack([GREY] * 3), "images/validation/a.png": GREY,
                             "masks/train/a_seg_mask.tif": np.dstack([A] * 3),
                             "masks/validation/a_seg_mask.gif": B})
    found, classes = masks_of(tmp_path / "in", tmp_path / "out")
    same(found, {"train_a": A, "val_a": B})
    assert classes == ["class_1", "class_2"]
    assert load(tmp_path / "out/split.json") == {"train": ["train_a"], "val": ["val_a"], "test": ["val_a"]}
    tree(tmp_path / "own", {"images/a_1.png": GREY, "images/a_2.png": GREY, "masks/a_1_defect.png": A,
                            "masks/a_2_defect.png": B})
    same(masks_of(tmp_path / "own", tmp_path / "out2")[0], {"a_1": A, "a_2": B})
    assert "labels are named <photo>_defect: 2" in capsys.readouterr().out
    tree(tmp_path / "lost", {"images/a.png": GREY, "masks/a_1_mask.png": A})    # the photo a_1 is missing
    with pytest.raises(ValueError, match="1 labels without one photo of their name: masks/a_1_mask.png"):
        convert.convert(tmp_path / "lost", tmp_path / "new")


def test_black_and_white_masks_by_folder(tmp_path, capsys):
    tree(tmp_path / "anomalib", {"good/a.png": GREY, "crack/a.png": GREY, "dirt/b.png": GREY,
                                   "mask/crack/a.png": 255 * A, "mask/dirt/b.png": 127 * B + (B > 0)})
    found, classes = masks_of(tmp_path / "anomalib", tmp_path / "out1")
    same(found, {"good/a": blot(0, 0), "crack/a": A, "dirt/b": B})
    tree(tmp_path / "anomalib", {"classes.json": '["background", "dirt", "crack"]'})
    same(masks_of(tmp_path / "anomalib", tmp_path / "out2")[0], {
        "good/a": blot(0, 0), "crack/a": 2 * A, "dirt/b": B // 2})
    tree(tmp_path / "by_class", {"images/a.png": GREY, "masks/crack/a.png": 255 * A,
                                   "masks/dirt/a.png": 255 * (blot(2))})
    same(masks_of(tmp_path / "by_class", tmp_path / "out3")[0], {"a": np.where(blot(2), 2, A)})
    assert "classes overlap, the later one counts: 1" in capsys.readouterr().out
    tree(tmp_path / "beside", {"k1/a.png": GREY, "k1/a_label.bmp": 255 * A,
                                 "k2/a.png": GREY, "k2/a_label.bmp": 255 * A})
    tree(tmp_path / "normal", {"normal/a.png": GREY, "abnormal/a.png": GREY, "mask/a.png": 255 * A})
    same(masks_of(tmp_path / "normal", tmp_path / "out5")[0], {"good/a": blot(0, 0), "abnormal/a": A})
    with pytest.raises(ValueError, match="2 folders .*: k1, k2; pass --classes folder .* --classes one"):
        convert.convert(tmp_path / "beside", tmp_path / "new")
    same(masks_of(tmp_path / "beside", tmp_path / "out4", classes="one")[0], {"k1/a": A, "k2/a": A})


@pytest.mark.parametrize("files, classes", [
    (["images/0.jpg", "masks/0_crack.png", "masks/0_dirt.png"], ["crack", "dirt"]),
    (["test/logical/0.png", "ground_truth/logical/0/000.png", "ground_truth/logical/0/001.png"], ["logical"]),
])
def test_several_masks_of_a_photo_by_the_ends_of_their_names_or_in_a_folder(files, classes, tmp_path):
    for n, file in enumerate(files):
        save(tmp_path / "in" / file, blot(n, 255))
    convert.convert(tmp_path / "in", tmp_path / "out", classes="folder")
    data = open_dataset(tmp_path / "out")
    expected = np.maximum(blot(1), blot(2, len(classes)))
    assert data.classes[1:] == tuple(classes) and np.array_equal(data.read_mask(0), expected)


def test_what_cannot_be_known_is_asked_for(tmp_path, wrong):
    tree(tmp_path / "in", {"images/a.png": GREY, "masks/a.png": 255 * (1 - A)})
    wrong("9.% of the masks is white; pass --inverted .* --no-inverted")
    same(masks_of(tmp_path / "in", tmp_path / "1", inverted=True)[0], {"a": A})
    same(masks_of(tmp_path / "in", tmp_path / "2", inverted=False)[0], {"a": 1 - A})
    void = np.where(B, 255, A)
    tree(tmp_path / "in", {"masks/a.png": void})                # 255 beside an index is not scored
    convert.convert(tmp_path / "in", tmp_path / "3")
    assert np.array_equal(np.array(Image.open(tmp_path / "3/mask/a_mask.png")), void)
    assert load(tmp_path / "3/classes.json") == {"0": "background", "1": "class_1"}
    tree(tmp_path / "in", {"masks/a.png": 85 * np.maximum(A, B)})
    wrong(r"neither class indices nor 0 and 255: \(85, 85, 85\), .*--colours FILE .*--layout binary")
    (tmp_path / "in/masks/a.png").unlink()
    tree(tmp_path / "in", {"masks/a.jpg": 3 * A})
    wrong("1 masks of small numbers in JPEG, which changes them: masks/a.jpg; export them anew as PNG")
    (tmp_path / "in/masks/a.jpg").unlink()
    tree(tmp_path / "in", {"masks/a.png": A, "images/b.png": GREY})
    wrong("1 photos without a label: images/b.png; .*--unlabelled good .*--unlabelled skip")
    same(masks_of(tmp_path / "in", tmp_path / "4", unlabelled="good")[0], {"defect/a": A, "good/b": 0 * A})
    same(masks_of(tmp_path / "in", tmp_path / "5", unlabelled="skip")[0], {"a": A})
    (tmp_path / "in/masks/a.png").rename(tmp_path / "in/masks/b.png")
    tree(tmp_path / "in", {"images/a.json": '{"shapes": [], "imageHeight": 16, "imageWidth": 16}'})
    wrong("1 mask pictures beside files of shapes: masks/b.png; move away")


def test_a_palette_whose_number_0_is_no_black_is_of_colours(tmp_path, wrong):
    picture = Image.fromarray(np.where(A, 2, 1).astype(np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 0, 0, 0, 255, 0])
    tree(tmp_path / "in", {"images/a.png": GREY, "masks/a.png": A})
    picture.putpixel((15, 15), 0)
    picture.save(tmp_path / "in/masks/a.png")
    wrong(r"neither class indices nor 0 and 255: \(0, 255, 0\), \(255, 0, 0\); pass --colours")


def test_photos_of_two_splits_and_an_out_inside_are_refused_and_links_followed(tmp_path, wrong):
    make_coco(tmp_path / "in")
    table = (tmp_path / "in/val/_annotations.coco.json").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(tmp_path / "in/val")
    (tmp_path / "data/annotations").mkdir()
    for split in "train", "test":
        (tmp_path / f"data/annotations/{split}.json").write_text(table)
    wrong("splits of the photo images/.*: test, train; leave it in one", "data")
    wrong("lies in the folder that is read; name one beside it", ".")
    (tmp_path / "data/annotations/test.json").unlink()
    (tmp_path / "data/again").symlink_to(".")                                               # in circles
    assert len(masks_of(tmp_path / "data", tmp_path / "1", unlabelled="skip")[0]) == 3


def test_lists_of_voc_are_splits_and_trainval_gives_way_to_train(tmp_path):
    tree(tmp_path / "in", {f"JPEGImages/{name}.png": GREY for name in "123"})
    tree(tmp_path / "in", {f"SegmentationClass/{name}.png": A for name in "123"})
    tree(tmp_path / "in", {f"ImageSets/Segmentation/{split}.txt": "\n".join(names) + "\n"
                           for split, names in {"train": "12", "trainval": "123", "val": "3"}.items()})
    convert.convert(tmp_path / "in", tmp_path / "1")
    assert load(tmp_path / "1/split.json") == {"val": ["3"], "train": ["1", "2"], "test": ["3"]}


def test_umlauts_of_macos_are_those_of_others(tmp_path):
    one, two = "Pr\u00fcf", "Pru\u0308f"                            # one sign, and two
    tree(tmp_path / "in", {f"images/{two}.png": GREY, f"masks/{one}.png": A,
                           "split.json": json.dumps({"train": [two]})})
    same(masks_of(tmp_path / "in", tmp_path / "1")[0], {one: A})
    assert len(open_dataset(tmp_path / "1", split="train")) == 1


def test_masks_of_another_size(tmp_path, wrong, capsys):
    tree(tmp_path / "in", {"images/a.png": np.kron(GREY, np.ones((3, 3))), "masks/a.png": A})
    same(masks_of(tmp_path / "in", tmp_path / "1")[0], {"a": np.kron(A, np.ones((3, 3), np.uint8))})
    assert "enlarged by nearest: 1" in capsys.readouterr().out
    tree(tmp_path / "in", {"images/a.png": np.zeros((20, 30))})
    wrong(r"a.png: the photo is 20x30, its mask 16x16; .*resize\(\(30, 20\), Image.NEAREST\)")


def test_to_coco_and_back(tmp_path):
    tree(tmp_path / "in", {
        "image/crack/0.png": GREY, "image/crack/1.png": GREY, "image/good/0.png": GREY,
        "mask/crack/0_mask.png": np.maximum(A, B), "mask/crack/1_mask.png": np.where(blot(4), 255, 3 * A),
        "split.json": '{"few": ["crack/0"], "train": ["crack/0"], "test": ["crack/1", "good/0"]}',
        "classes.json": '{"0": "background", "1": "crack", "2": "dirt", "3": "tear"}'})
    convert.convert(tmp_path / "in", tmp_path / "same")
    assert load(tmp_path / "same/split.json") == load(tmp_path / "in/split.json")
    convert.convert(tmp_path / "in", tmp_path / "coco", to="coco")          # which has no place for "few"
    convert.convert(tmp_path / "coco", tmp_path / "out")
    masks = [{path.name: np.array(Image.open(path)) for path in (tmp_path / folder).glob("mask/*/*.png")}
             for folder in ("in", "out")]
    same(*masks)                                                            # also 255, which is not scored
    tables = [load(path) for path in sorted((tmp_path / "coco").glob("annotations/*.json"))]
    assert [len(t["annotations"]) for t in tables] == [2, 2]            # test, train
    assert [a["area"] for a in tables[1]["annotations"]] == [(np.maximum(A, B) == k).sum() for k in (1, 2)]
    assert load(tmp_path / "out/split.json") == {"train": ["crack/0"], "test": ["crack/1", "good/0"]}
    assert (tmp_path / "out/classes.json").read_text() == (tmp_path / "same/classes.json").read_text()


def test_palettes_void_and_a_photo_on_its_side(tmp_path):
    """VOC's palette masks: the numbers count; 255 is void. YOLO's points are those of the upright photo."""
    tree(tmp_path / "voc", {"JPEGImages/a.jpg": GREY})
    (tmp_path / "voc/SegmentationClass").mkdir()
    raw = Image.fromarray(np.where(blot(3), 2, A).astype(np.uint8), "P")
    raw.putpalette([0, 0, 0, 128, 0, 0, 224, 224, 192])
    raw.save(tmp_path / "voc/SegmentationClass/a.png")
    same(masks_of(tmp_path / "voc", tmp_path / "out1")[0], {"a": np.where(blot(3), 2, A)})
    tree(tmp_path / "voc", {"labelmap.txt": "background:0,0,0::\nplane:128,0,0::\n"})
    convert.convert(tmp_path / "voc", tmp_path / "out2")
    assert np.array_equal(np.array(Image.open(tmp_path / "out2/mask/a_mask.png")), np.where(blot(3), 255, A))
    exif = Image.Exif()
    exif[convert.ORIENTATION] = 6
    tree(tmp_path / "yolo", {"data.yaml": "names: [a]", "labels/a.txt": "0 0 0 1 0 1 .5 0 .5\n"})
    save(tmp_path / "yolo/images/a.jpg", np.zeros((10, 20)), exif=exif)
    half = np.repeat([[1], [0]], 10, 0) * np.ones((1, 10))
    same(masks_of(tmp_path / "yolo", tmp_path / "out3")[0], {"a": half})


def test_kinds_of_the_same_names_as_classes_are_asked_about(tmp_path, wrong):
    for kind, mask in (("crack", A), ("dirt", 1 * (B > 0))):
        tree(tmp_path / "in", {f"images/{kind}/{kind}.png": GREY, f"masks/{kind}/{kind}.png": mask})
    tree(tmp_path / "in", {"classes.json": '["background", "crack", "dirt"]'})
    # masks of 0 and 1: of which class is a 1?
    wrong("2 folders or endings of black and white masks: crack, dirt; pass --classes folder")
    same(masks_of(tmp_path / "in", tmp_path / "1", classes="folder")[0],
         {"crack/crack": A, "dirt/dirt": 2 * (B > 0)})
    tree(tmp_path / "in", {"classes.json": '["crack", "dirt"]'})
    wrong("classes.json: its first name is crack; add background, the value 0")


def test_what_is_left_out_or_changed_is_said(tmp_path, capsys):
    void = np.where(blot(3), 255, 0)
    tree(tmp_path / "in", {"images/a.png": GREY, "images/b.png": GREY, "masks/a.png": A, "masks/b.png": void})
    with pytest.raises(ValueError, match="1 masks of 0 and 255 alone among .*: masks/b.png; make"):
        convert.convert(tmp_path / "in", tmp_path / "1")
    (tmp_path / "lines").write_text("crack:1,1,1\nignore:255,255,255\n")               # colours say so
    pairs = masks_of(tmp_path / "in", tmp_path / "1", colours=tmp_path / "lines")[0]
    same(pairs, {"a": A, "b": 0 * A})
    assert "masks of nothing but 255, which become background: 1" in capsys.readouterr().out
    tree(tmp_path / "grey", {"images/a.png": GREY, "masks/a.png": np.where(blot(3), 20, 255 * A)})
    same(masks_of(tmp_path / "grey", tmp_path / "2", layout="binary")[0], {"a": np.where(blot(3), 0, A)})
    assert "values of masks beside 0 and 255, cut at 128: 20: 1" in capsys.readouterr().out
    tree(tmp_path / "pgm", {"masks/a.png": A})
    (tmp_path / "pgm/images").mkdir()
    deep = (200 * np.arange(256)).astype(">u2").reshape(16, 16)
    (tmp_path / "pgm/images/a.pgm").write_bytes(b"P5\n16 16\n65535\n" + deep.tobytes())
    convert.convert(tmp_path / "pgm", tmp_path / "3")
    assert np.array_equal(np.array(Image.open(tmp_path / "3/image/a.png")), deep)


def test_tables_of_windows_are_cleaned_and_json_without_photos_is_named(tmp_path, capsys):
    tree(tmp_path / "in", {"images/crack/a.png": GREY, "masks/crack/a.png": A, "masks/about.json": "{}",
                           "split.json": '\ufeff{"test": ["crack\\\\a.PNG"]}',
                           "classes.json": '\ufeff["background", "dirt"]'})
    assert masks_of(tmp_path / "in", tmp_path / "out")[1] == ["dirt"]
    assert load(tmp_path / "out/split.json") == {"test": ["crack/a"]}
    assert "masks/about.json: neither photos nor shapes, passed over" in capsys.readouterr().out
