"""A downloaded data set -> a folder that datasets.py reads. Imports nothing of ours.

    python data/convert.py VISION/Ring --out ring
    python data/convert.py photos --out tiles --unlabelled good
    python data/convert.py pairs --to coco --out pairs_coco

    image/<kind>/<stem>.<ext>     the photo, byte for byte: a hard link where possible, else a copy
    mask/<kind>/<stem>_mask.png   8-bit, the value is the class, 0 the background, 255 is not scored
    classes.json, split.json, captions.json      as docs/data.md shows them

gather() lists the files and what their folders say. Some are Labels (masks, COCO, labelme, YOLO): pair()
joins them to photos by name, draw() makes one mask of those of a photo. What changes a verdict and cannot be
known is asked for. A data set with folders of its own is an entry in LAYOUTS.
"""
import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

KEPT = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}    # what datasets.py reads; others: PNG
IMAGE_SUFFIXES = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN}
WORDS = {word: meaning for meaning, words in {              # what folders are called, in any case
    "mask": "mask masks label labels lab gt ground_truth groundtruth annotation annotations anno ann seg "
            "segmentation segmentationclass",
    "photo": "image images img imgs photo photos jpegimages", "good": "good ok normal",
    "train": "train training trainval", "val": "val valid validation eval dev",
    "test": "test testing test_public holdout",
}.items() for word in words.split()}
SPLITS = "train", "val", "test"
PASSED_OVER = {"rgb_mask", "rbg_mask", "segmentationobject", "__macosx", "inference"}    # not labelled
MASK_END = re.compile("(?i)([ _.-]+({})[0-9]*)+$".format("|".join(w for w in WORDS if WORDS[w] == "mask")))
NOT_CLASSES = {"background": 0, "_background_": 0, "ignore": 255, "__ignore__": 255, "void": 255}
GREY = 0x010101                                             # the code of a grey pixel is its value times this
ORIENTATION = 0x0112                                        # the EXIF tag: 5 to 8 = lying on a side

Place = namedtuple("Place", "split kind role stem")         # what a path says, see locate()
Label = namedtuple("Label", "name place content")           # content: codes() of a picture, or (H, W), parts
Item = namedtuple("Item", "photo splits kind stem labels")  # a photo and the Labels that are its mask
# The flags, which main() describes; binary: masks are black and white; published: datasets.py knows classes.
Ask = namedtuple("Ask", "classes colours inverted unlabelled to binary published", defaults=[None] * 7)
SAID = Counter()                                            # what was done to how many photos


class Wrong(ValueError):
    """A sentence for the user: the file, what is wrong, what helps."""


@contextlib.contextmanager
def naming(path, advice):
    """Whatever goes wrong within becomes a Wrong about the file: Pillow alone raises a dozen types."""
    try:
        yield
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"{path}: cannot be read ({type(error).__name__}: {error}); {advice}") from None


def demand(root, lacking, what, advice):
    """Raise Wrong with the first of a list that should be empty."""
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise Wrong(f"{root}: {len(lacking)} {what}: {', '.join(map(str, lacking[:8]))}{more}; {advice}")


def read_text(path):
    if not path.is_file():
        raise Wrong(f"{path}: no such file")
    with naming(path, "save it anew as UTF-8"):
        return path.read_text("utf-8-sig")                  # with or without a byte order mark


def read_json(path):
    """What a .json holds; an empty table where there is none."""
    with naming(path, "export it again"):
        return json.loads(read_text(path)) if path.exists() else {}


def read_classes(root):
    """The names of a classes.json from value 1 on, [] where there is none."""
    table = read_json(root / "classes.json")
    for path in [] if table else sorted(root.rglob("_classes.csv"))[:1]:    # Roboflow's: value, class
        table = dict(re.findall(r"(?m)^(\d+), *(.*?)\s*$", read_text(path)))
    with naming(root / "classes.json", 'write {"0": "background", "1": "crack", ...}'):
        names = table if isinstance(table, list) else [table[str(number)] for number in range(len(table))]
        names = [unicodedata.normalize("NFC", name.strip()) for name in names]
    if names and NOT_CLASSES.get(names[0].lower()) != 0:
        raise Wrong(f"{root}/classes.json: its first name is {names[0]}; add background, the value 0")
    return names[1:]


def read_splits(root):
    """{"<kind>/<stem>": [split, ...]} of a split.json or of VOC's lists; {} where there is none."""
    splits, voc = {}, [path for path in root.glob("ImageSets/Segmentation/*.txt") if path.stem in WORDS]
    voc.sort(reverse=True)                                      # train.txt replaces what trainval.txt says
    lists = read_json(root / "split.json") or {
        WORDS[path.stem]: re.findall(r"(?m)^\s*(\S.*?)\s*$", read_text(path)) for path in voc}
    with naming(root / "split.json", 'write {"train": ["<kind>/<stem>", ...]}'):
        for split, names in lists.items():
            for name in names:
                # as Windows has it, crack\000.PNG, and macOS, which writes umlauts as two signs
                stem, end = os.path.splitext(unicodedata.normalize("NFC", name).replace("\\", "/"))
                stem += end if end.lower() not in IMAGE_SUFFIXES else ""
                splits.setdefault(stem, []).append(split)
    return splits


def read_captions(path, product):
    """captions.xlsx of DS-MVTec -> {"crack/000": text} of one product, as "pill"."""
    space, captions = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}", {}
    with naming(path, "replace it"), zipfile.ZipFile(path) as book:
        strings = ET.fromstring(book.read("xl/sharedStrings.xml")).iter(space + "si")
        strings = ["".join(part.text or "" for part in string.iter(space + "t")) for string in strings]
        for row in ET.fromstring(book.read("xl/worksheets/sheet1.xml")).iter(space + "row"):
            name, *texts = [strings[int(v.text)] for v in row.iter(space + "v")]
            name = re.sub(r"/([^/]*_)?(\d+)\.png$", r"/\2", name)      # hole/03643_00111_022.png is hole/022
            captions[name.removeprefix(f"{product}/")] = " ".join(map(str.strip, texts))
    return captions


# --- labels that are shapes: (H, W), [(class, polygons or run lengths)] of each photo ---

def read_names(root):
    """{number: class} of YOLO's data.yaml: `names:` is a list or a table in one of YAML's usual forms."""
    text = "\n".join(read_text(path) for path in sorted(root.glob("*.y*ml")))
    block = re.search(r"(?m)^names[ \t]*:(.*(?:\n(?:[ \t\-\]}#].*)?$)*)", text)
    quoted = r"""("[^"\n]*"|'(?:[^'\n]|'')*')"""
    body = re.sub(rf"(?<![^\s,\[{{]){quoted}|(?:^|\s)#.*", r"\1", block[1]) if block else ""   # no comments
    ends = r",\n\[\]{}" if body.lstrip()[:1] in ("[", "{") else r"\n"      # in a list of lines , is text
    entry = rf"""(?:["']?(\d+)["']?[ \t]*:[ \t]+|-[ \t]+)?(?:{quoted}|([^\s{ends}"'][^{ends}]*))"""
    return {int(number or at): plain.strip() or quote[1:-1].replace("''", "'")
            for at, (number, quote, plain) in enumerate(re.findall(entry, body))}


def read_parts(path, names):
    """A file of labelme, or YOLO's lines 'class x y x y ...': no (H, W), from 0 to 1 of the upright photo."""
    if path.suffix == ".txt":
        lines = [line.split() for line in read_text(path).split("\n") if line.strip()]
        if any(len(line) < 7 or len(line) % 2 == 0 or max(map(float, line[1:])) > 2 for line in lines):
            raise ValueError("a line is no polygon, 'class x y x y ...' from 0 to 1; a box alone is none")
        if unknown := {int(line[0]) for line in lines} - names.keys():
            raise ValueError(f"data.yaml has no name for the classes {sorted(unknown)}")
        return None, [(names[int(number)], [np.array(points, float)]) for number, *points in lines]
    table, parts = read_json(path), []
    for shape in table["shapes"]:
        kind, points = shape.get("shape_type") or "polygon", shape["points"]
        if kind == "rectangle" and len(points) == 2:
            (left, top), (right, bottom) = points
            points = [left, top, right, top, right, bottom, left, bottom]
        elif kind not in ("polygon", "rectangle"):
            raise ValueError(f"a shape of the type '{kind}' is not read")
        parts.append((shape["label"].strip(), [points]))
    return (table["imageHeight"], table["imageWidth"]), parts


def read_coco(table):
    """{class: id} and [(file name, ((H, W), parts))] of a COCO table."""
    names, parts = {c["id"]: str(c["name"]) for c in table["categories"]}, {}
    images = {i["id"] for i in table["images"]}
    for shape in table["annotations"]:
        for key, known in (("image_id", images), ("category_id", names)):
            if shape[key] not in known:
                raise ValueError(f"an annotation has {key} {shape[key]}, which the table does not explain")
        parts.setdefault(shape["image_id"], []).append((names[shape["category_id"]], shape["segmentation"]))
    # Roboflow lists the project as a class above the others, which no annotation has: it is left out.
    above = {c.get("supercategory") for c in table["categories"] if c.get("supercategory") != c["name"]}
    above -= {name for shapes in parts.values() for name, _ in shapes}
    return {name: number for number, name in names.items() if name not in above}, [
        (i["file_name"].replace("\\", "/"), ((i["height"], i["width"]), parts.get(i["id"], [])))
        for i in table["images"]]


def read_shapes(root, places):
    """Class names, in the order of their ids, and Labels of the files {name: Place} that hold shapes."""
    numbered, labels = read_names(root), []
    if not numbered and any(name.endswith(".txt") for name in places):
        raise Wrong(f"{root}: has no data.yaml with the names of classes; write one: names: [crack, dirt]")
    ids = {name: number for number, name in numbered.items()}
    for file, place in places.items():
        with naming(root / file, "export polygons from the labelling tool"):
            table = read_json(root / file) if file.endswith(".json") else {}
            if "categories" in table:
                more, images = read_coco(table)
                split = locate("/".join([*re.split("[^a-z]+", place.stem.lower()), ""])).split
                for name, content in images:
                    at = locate(f"{os.path.dirname(file)}/{name}")
                    labels.append(Label(f"{file}: {name}", at._replace(split=split or at.split), content))
            else:
                content = read_parts(root / file, numbered)
                labels.append(Label(file, place, content))
                more = dict.fromkeys((name for name, _ in content[1]), 0)
            ids = {**more, **ids}
    return class_names(sorted(ids, key=lambda name: (ids[name], name))), labels


def class_names(names):
    """The names that are classes, each once, in their order."""
    return [name for name in dict.fromkeys(names) if name.lower() not in NOT_CLASSES]


def value_of(name, names):
    return names.index(name) + 1 if name in names else NOT_CLASSES[name.lower()]


def fill_polygon(mask, points, value):
    """Set the pixels of mask (H, W) whose centres lie inside the polygon [x, y, x, y, ...], even-odd rule.

    PIL's polygon also sets every pixel that the outline touches: areas become 5 % too large.
    """
    x, y = np.asarray(points, float).reshape(-1, 2).T
    if len(x) < 3 or not np.isfinite([x, y]).all():
        raise ValueError("a polygon has less than 3 points, or a coordinate that is no number")
    x_next, y_next = np.roll(x, -1), np.roll(y, -1)
    for row in range(max(0, math.floor(y.min())), min(len(mask), math.ceil(y.max()))):
        cut = (y <= row + 0.5) != (y_next <= row + 0.5)
        at = np.sort(x[cut] + (row + 0.5 - y[cut]) * (x_next - x)[cut] / (y_next - y)[cut])
        for left, right in np.ceil(at - 0.5).clip(0).astype(int).reshape(-1, 2):
            mask[row, left:right] = value


def decode_counts(text):
    """COCO's compressed run lengths: 5 bits a character, low ones first, from the third on as differences."""
    counts, value, shift = [], 0, 0
    for byte in (ord(character) - 48 for character in text):
        value, shift = value | (byte & 31) << shift, shift + 5
        if not byte & 32:                           # the last character of a number; bit 16 is its sign
            value -= (byte & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def fill_segmentation(shape, segmentation, scale=1):
    """A COCO segmentation, polygons or run lengths, as bool (H, W). scale: (x, y), of the polygons."""
    layer = np.zeros(shape, bool)
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]             # lengths of runs of 0, 1, 0, ... down the columns
        counts = np.array(decode_counts(counts) if isinstance(counts, str) else counts)
        if tuple(segmentation.get("size", shape)) != shape or counts.sum() != layer.size or counts.min() < 0:
            raise ValueError(f"run lengths over {counts.sum()} pixels do not fit {shape[0]}x{shape[1]}")
        return np.repeat(np.arange(len(counts)) % 2 > 0, counts).reshape(shape[::-1]).T
    if not segmentation:
        raise ValueError("an annotation is a box alone")
    for points in segmentation:
        fill_polygon(layer, np.reshape(points, (-1, 2)) * scale, True)
    return layer


# --- labels that are pictures ---

def read_codes(path, palette=False):
    """A mask file as int (H, W), 0xRRGGBB. palette: its colours count, not its numbers."""
    with naming(path, "replace it"), Image.open(path) as picture:
        values, mode = np.array(picture, int), picture.mode
        clear = np.array(picture.getchannel("A")) == 0 if mode in ("LA", "RGBA") else np.False_
        coloured = mode == "P" and any(picture.getpalette()[:3])        # its number 0 is no black
        rgb = values if mode in ("L", "RGB") or mode[0] in "IF" else np.array(picture.convert("RGB"), int)
    if rgb.ndim == 2:
        return (rgb if (rgb % 257).any() else rgb // 257) * GREY        # 16 bit: 0 and 65535 are 0 and 255
    codes = rgb @ [0x10000, 0x100, 1]
    if clear.any():                                                     # what is seen through is background
        if codes.any() if clear.all() else not codes[~clear].any():
            raise Wrong(f"{path}: what shows the defects, its colours or its transparency? Save it without "
                        "transparency, defects white on black")
        codes = np.where(clear, 0, codes)
    numbered = mode == "P" and not (palette or coloured) and (codes % GREY).any()   # grey ones hold values
    return values * GREY if numbered else codes


def read_colours(path):
    """labelmap.txt of VOC and CVAT, 'name:r,g,b::', or lines 'name r g b' -> names, {code: value}."""
    line = re.compile(r"(?m)^[ \t]*([^#\s].*?)[\s:,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)\b")
    rows = [(name, int(r) << 16 | int(g) << 8 | int(b)) for name, r, g, b in line.findall(read_text(path))]
    names = class_names(name for name, _ in rows)
    return names, {0: 0, 0xE0E0C0: 255, **{code: value_of(name, names) for name, code in rows}}


def read_legends(root, labels, kinds, ask):
    """Class names (None: numbers) and {name of a mask: {code: value}}: what all masks hold together decides.

    kinds: {name of a mask: its folder or its photo's, which may be its class}.
    """
    codes, white, size, names, jpeg, lone = set(), 0, 0, read_classes(root), [], []
    for label in labels:
        found = label.content()
        jpeg += [label.name] * bool(found.any() and re.search(r"(?i)\.(jpe?g?|jfif)$", label.name))
        codes |= {*(own := np.unique(found).tolist())}
        lone += [label.name] * (own[-1:] == [255 * GREY] and {*own} <= {0, 255 * GREY})
        white, size = white + (found >= 128 * GREY).sum(), size + found.size
    rgb = {code: (code >> 16, code >> 8 & 255, code & 255) for code in sorted(codes)}
    if ask.colours:
        demand(root, sorted(rgb) * bool(ask.inverted), "colours in masks", "leave --inverted away")
        names, legend = read_colours(ask.colours)
        unknown = [rgb[code] for code in rgb if code not in legend]
        demand(root, unknown, "colours of masks without a name",
               f"add lines 'name:r,g,b' to {ask.colours}; JPEG blurs colours, PNG keeps them")
        return names, dict.fromkeys(kinds, legend)
    grey = {code // GREY for code in codes if code % GREY == 0}
    odd = [rgb[code] for code in rgb if code % GREY or code // GREY > 64 and code != 255 * GREY]
    folders = sorted({*kinds.values()} - {"good"})
    cut = 128 if ask.binary or 255 in grey and grey <= {0, 255} and not odd else 0
    by_folder = len(folders) > 1 and {*folders} <= {*(names or folders)}
    if grey <= {0, 1} and not odd and by_folder and not ask.published:
        cut = 1                                             # one class, or one for each folder
    if not cut:
        demand(root, sorted(grey) * bool(ask.inverted), "class indices in masks", "leave --inverted away")
        demand(root, odd, "colours of masks, neither class indices nor 0 and 255",
               "pass --colours FILE with lines 'name:r,g,b', or --layout binary to cut greys at 128")
    demand(root, jpeg if cut < 128 else [], "masks of small numbers in JPEG, which changes them",
           "export them anew as PNG; converting them keeps what was changed")
    if not cut:
        demand(root, lone, "masks of 0 and 255 alone among class indices, where 255 is not scored",
               "make all of them indices, or all black and white")
        return names or None, dict.fromkeys(kinds, {code: code // GREY for code in codes})
    if cut > 1 and not odd and grey & {*range(1, 16)}:
        demand(root, sorted(grey), "values in masks, class indices", "leave --layout binary away")
    between = sorted(grey - {0, 255}) if cut > 1 else []
    SAID[f"values of masks beside 0 and 255, cut at 128: {', '.join(map(str, between))}"] = len(between)
    if ask.inverted is None and white > size / 2:
        raise Wrong(f"{root}: {white / size:.0%} of the masks is white; pass --inverted if white is the "
                    "background, --no-inverted if it is the defect")
    sure = cut > 1 and all(label.place.role == "mask" and label.place.kind for label in labels)
    known = cut > 1 and {*folders} <= {*names}
    if len(folders) > 1 and not sure and not known and not ask.classes:
        demand(root, folders, "folders or endings of black and white masks",
               "pass --classes folder if they are the classes, --classes one if all are of one class")
    if ask.classes == "one" or len(folders) < 2 and not sure and not ask.classes:
        demand(root, names[1:], "more classes in classes.json than masks show", "name one")
        names, folders = names or ["defect"], []
    names = names or folders
    demand(root, sorted({*folders} - {*names}), "folders of masks not in classes.json", "add them")
    return names, {mask: {code: (max(rgb[code]) >= cut) != bool(ask.inverted) and (
        names.index(kind) + 1 if kind in folders else 1) for code in rgb} for mask, kind in kinds.items()}


def sizes(photo):
    """(H, W) of a photo as it is shown and as it is stored, and its EXIF orientation."""
    with naming(photo, "replace it"), Image.open(photo) as picture:
        stored, turn = picture.size[::-1], picture.getexif().get(ORIENTATION, 1)
        return stored[::-1] if turn >= 5 else stored, stored, turn


def draw(item, names, legends):
    """The Labels of a photo as uint8 (H, W); where classes overlap the later one counts, which is said."""
    mask, shown = None, sizes(item.photo)[0]
    with naming(item.photo, "export polygons, or masks of one size, for it"):
        for label in item.labels:
            if callable(label.content):
                found, at = np.unique(codes := label.content(), return_inverse=True)
                values = [legends[label.name][code] for code in found.tolist()]
                drawn = np.array(values, np.uint8)[at].reshape(codes.shape)
                layers = [(value, drawn == value) for value in {*values} - {0}]
            else:
                shape, parts = label.content
                drawn, scale = np.zeros(shape or shown, np.uint8), 1 if shape else shown[::-1]
                layers = ((value_of(name, names), fill_segmentation(drawn.shape, part, scale))
                          for name, part in parts)
            mask = np.zeros_like(drawn) if mask is None else mask
            for value, layer in layers:
                overlap = layer & (mask > 0) & (mask != value)
                SAID["classes overlap, the later one counts"] += bool(overlap.any())
                mask[layer] = value
    return upright(np.zeros(shown, np.uint8) if mask is None else mask, item.photo)


def upright(mask, photo):
    """The mask (H, W) for the photo as datasets.py shows it, which is turned upright by its EXIF tag.

    A mask that has only the shape of the stored pixels is turned with them; others stay, for labelling tools
    show photos upright. A mask that is smaller by a whole factor is enlarged by nearest.
    """
    shape, stored, turn = sizes(photo)
    factor = max(1, max(shape) // max(mask.shape))
    large = mask.repeat(factor, 0).repeat(factor, 1)
    if large.shape not in (shape, stored):
        command = f"Image.open('MASK').resize({shape[::-1]}, Image.NEAREST).save('MASK')"
        raise Wrong("{}: the photo is {}x{}, its mask {}x{}; if it shows the whole photo: python -c "
                    '"from PIL import Image; {}"'.format(photo, *shape, *mask.shape, command))
    SAID["the mask is smaller by a whole factor, enlarged by nearest"] += factor > 1
    lying = Image.fromarray(large)
    lying.getexif()[ORIENTATION] = 1 if large.shape == shape else turn
    return np.array(ImageOps.exif_transpose(lying))


# --- pairing: what the names of folders and files say ---

def words_of(folder):
    """train_img says two things, img_dir, Train Set and train_1 one; black_dirt is a name."""
    split = re.sub("(?i)[ _-]?(set|[0-9]+)$", "", folder)
    if WORDS.get(split.lower()) in SPLITS:
        return [split]
    words = re.sub("(?i)[_-]dir$", "", folder).replace("-", "_").split("_")
    return words if all(word.lower() in WORDS for word in words) else [folder]


def locate(name):
    """The Place of images/train/crack/1.png, train/images/crack/1.png, ...

    kind: the folders that have no other meaning, each after a slash; role: "photo", "mask" or "".
    """
    *folders, file = unicodedata.normalize("NFC", name).split("/")      # macOS writes umlauts as two signs
    folders = [word for folder in folders for word in words_of(folder)]
    meanings = [WORDS.get(folder.lower().rstrip("0123456789"), "") for folder in folders]   # also train2017
    split = next((word for word in reversed(meanings) if word in SPLITS), "")
    role = next((word for word in reversed(meanings) if word in ("mask", "photo")), "")
    kinds = [f"/{folder}" for folder, word in zip(folders, meanings) if folder and not word]
    return Place(split, "/good" if "good" in meanings else "".join(kinds), role, Path(file).stem)


def gather(root, paths=()):
    """{name: Place} of the photos, of the pictures called masks and of the files of shapes below a folder."""
    photos, masks, shapes = {}, {}, {}
    files = []
    for parent, folders, names in os.walk(root, followlinks=True):
        above = {path.resolve() for path in (Path(parent), *Path(parent).parents)}      # links may lead back
        folders[:] = [folder for folder in folders if Path(parent, folder).resolve() not in above]
        files += [Path(parent, name) for name in names]
    for path in sorted(files):
        name, end = path.relative_to(root).as_posix(), path.suffix.lower()
        usual = [re.sub(old, new, name) for old, new in paths if re.fullmatch(old, name)]
        passed = any(part[0] == "." or part.lower() in PASSED_OVER for part in name.split("/"))
        if passed or paths and not usual:
            continue
        place = locate(usual[0] if usual else name)
        text = read_text(path) if end == ".json" else ""
        keys = {*re.findall('"(shapes|annotations|categories)" *:', text)}
        if "shapes" in keys or len(keys) == 2:              # labelme's, COCO's
            shapes[name] = place
        elif end == ".json" and place.role == "mask":
            SAID[f"{name}: neither photos nor shapes, passed over"] = 1
        elif end == ".txt" and place.role == "mask" and re.match(r"\d+ |\s*$", read_text(path)):
            shapes[name] = place                            # YOLO's; VOC's lists begin otherwise
        elif end in IMAGE_SUFFIXES:
            is_mask = place.role == "mask" or not place.role and MASK_END.search(place.stem)
            (masks if is_mask else photos)[name] = place
    return photos, masks, shapes


def match(root, photos, labels):
    """{name of a photo: its Labels} of photos {name: Place}: by names, never by position.

    The label of 007 is 007, 007 and words for masks, 007 and the end that most labels have in common, or 007
    and one of several ends, which are classes. Of several 007 it is the one in folders of the same names.
    """
    partner, stems, lonely = {name: [] for name in photos}, {}, []
    for name, place in photos.items():
        stems.setdefault(place.stem, []).append(name)

    def end_of(stem):
        cuts = [cut for cut in range(1, len(stem)) if stem[:cut] in stems]
        return re.sub(".*[0-9].*", "", stem[max(cuts):]) if cuts else ""

    ends, kinds = Counter(end_of(label.place.stem) for label in labels), {p.kind for p in photos.values()}
    del ends[""]
    classes = [end for end in ends if not MASK_END.fullmatch(end)]
    common = max(ends, key=lambda end: (ends[end], -len(end)), default="") if len(classes) < 2 else ""
    SAID[f"labels are named <photo>{common}"] = ends[common] if common else 0
    for label in labels:
        split, kind, _, stem = place = label.place
        end = end_of(stem)
        if kind not in kinds and kind.rpartition("/")[2] in stems:
            kind, _, stem = kind.rpartition("/")            # MVTec LOCO's 007/000.png, 007/001.png
            label = label._replace(place=place._replace(kind=kind))
        elif len(classes) > 1 and not kind and end in classes:      # 007_crack.png, 007_dirt.png
            label = label._replace(place=place._replace(kind="/" + end.strip(" _.-")))
            stem = stem.removesuffix(end)
        ways = (stem, MASK_END.sub("", stem), stem.removesuffix(common))
        near = [name for name in next((stems[way] for way in ways if way in stems), [])
                if photos[name].split in ("", split) or not split
                if photos[name].kind.endswith(kind) or kind.endswith(photos[name].kind)]
        fits = ([name for name in near if photos[name].kind == kind]
                or [name for name in near if photos[name].kind != "/good"] or near)
        partner[fits[0]].append(label) if len(fits) == 1 else lonely.append(label.name)
    demand(root, lonely, "labels without one photo of their name", "add, remove or rename files")
    return partner


def pair(root, photos, labels, unlabelled):
    """Items of photos {name: Place} and Labels, with names that differ."""
    partner, splits, items = match(root, photos, labels), read_splits(root), []
    bare = [name for name in photos if not partner[name] and photos[name].kind != "/good"]
    demand(root, [] if unlabelled else bare, "photos without a label",
           "pass --unlabelled good if they have no defect, --unlabelled skip to leave them out")
    SAID[f"photos without a label, --unlabelled {unlabelled}"] = len(bare)
    kinds = any(place.kind for place in photos.values()) or unlabelled == "good" and bare
    for name, (split, kind, _, stem) in photos.items():
        kind = kind.strip("/").replace("/", "_")
        said = {split, *(label.place.split for label in partner[name])} - {""}      # by a folder, a table
        listed = f"{kind}/{stem}".strip("/")
        demand(root, sorted(said) * (len(said) > 1 and listed not in splits), f"splits of the photo {name}",
               "leave it in one, or write a split.json")
        own = splits.pop(listed, [*said])
        kind = "good" if name in bare else kind or kinds and "defect" or ""     # all have kinds, or none has
        if name not in bare or unlabelled == "good":
            items.append(Item(root / name, own, kind, stem, partner[name]))
    outside = sum(not item.splits for item in items)
    SAID["photos in no split, which neither train nor are scored"] = outside if outside < len(items) else 0
    if not items:
        raise Wrong(f"{root}: no photo has a label; --unlabelled {unlabelled} leaves none")
    demand(root, sorted(splits), "names in split.json without a photo", "write them as <kind>/<stem>")
    if len({(item.kind, item.stem) for item in items}) < len(items):
        items = [item._replace(stem="_".join([*item.splits[:1], item.stem])) for item in items]
    names = Counter(f"{item.kind}/{item.stem}".strip("/") for item in items)
    demand(root, [name for name in names if names[name] > 1], "names of several photos", "rename some")
    return items


def read(root, paths, ask):
    """Class names, Items and legends of a data set."""
    photos, masks, shapes = gather(root, paths)
    if not photos:
        raise Wrong(f"{root}: no photos in this layout; docs/data.md shows what is read")
    if shapes:
        demand(root, list(masks), "mask pictures beside files of shapes", "move away what is not to count")
        names, labels = read_shapes(root, shapes)
        return names, pair(root, photos, labels, ask.unlabelled), {}
    ask = ask._replace(colours=ask.colours or next(root.glob("labelmap.txt"), None))
    labels = [Label(name, place, partial(read_codes, root / name, bool(ask.colours)))
              for name, place in masks.items()]
    items = pair(root, photos, labels, ask.unlabelled)
    kinds = {label.name: label.place.kind.strip("/").replace("/", "_") or item.kind
             for item in items for label in item.labels}
    names, legends = read_legends(root, labels, kinds, ask)
    return () if ask.published else names, items, legends


# marks: patterns that all match in such a folder; paths: [(pattern of a file's name, what it would be called
# here)], all other files are passed over; known: flags that need not be said.
Layout = namedtuple("Layout", "marks paths known", defaults=((), (), {}))
AITEX = dict(zip("002 006 010 016 019 022 023 025 027 029 030 036".split(), (
    "broken_end broken_yarn broken_pick weft_curling fuzzyball cut_selvage crease warp_ball knots "
    "contamination nep weft_crack").split()))
FOLDERS = {"binary": True, "classes": "folder"}
LAYOUTS = {
    "dagm2007": Layout(["Train/Label"], known={"binary": True, "classes": "one", "unlabelled": "good"}),
    "visa": Layout(["Data/Images", "Data/Masks"], [
        ("Data/Images/Normal/(.*)", r"images/good/\1"),
        ("Data/(Images|Masks)/Anomaly/(.*)", r"\1/anomaly/\2")]),
    "magnetic-tile": Layout(["MT_*/Imgs"], [
        ("MT_Free/Imgs/(.*jpg)", r"images/good/\1"),
        ("MT_(?!Free)(.*)/Imgs/(.*jpg)", lambda m: f"images/{m[1].lower()}/{m[2]}"),
        ("MT_(?!Free)(.*)/Imgs/(.*png)", lambda m: f"masks/{m[1].lower()}/{m[2]}")], FOLDERS),
    "aitex": Layout(["Defect_images", "Mask_images"], [     # 0100_025_08 is published without a mask
        ("NODefect_images/.*?([^/]*)", r"images/good/\1"),
        ("Defect_images/(?!0100_025_08)([^_]*_(.*)_.*)", lambda m: f"images/{AITEX.get(m[2], m[2])}/{m[1]}"),
        ("Mask_images/([^_]*_(.*)_.*_mask.*)", lambda m: f"masks/{AITEX.get(m[2], m[2])}/{m[1]}")], FOLDERS),
    "synthetic": Layout(["images", "masks_converted_dir"], [    # masks/ is in unreliable colours
        ("images/(.*)samples_image_(.*)", r"images/\1\2"),
        ("masks_converted_dir/(.*)samples_converted_mask_(.*)", r"masks/\1\2")], {"published": True}),
    "ds-mvtec": Layout(["image", "../captions.xlsx"], known={"published": True}),
    "folders": Layout(),                                    # all others
    "binary": Layout(known={"binary": True}),               # likewise, but masks are cut at 128
}


def find(folder, depth=3):
    """[(folder, key of LAYOUTS)] of the data sets at or below a folder."""
    for name, (marks, *_) in LAYOUTS.items():
        if marks and all(any(folder.glob(mark)) for mark in marks):
            return [(folder, name)]
    _, masks, shapes = gather(folder)
    if any(words_of(name.split("/")[0])[0].lower() in WORDS or name.count("/") < 2
           for name in [*masks, *shapes]):
        return [(folder, "folders")]                        # ring/masks/1.png is a label of the folder ring
    below = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and depth)
    return [found for child in below for found in find(child, depth - 1)]


def place_photo(photo, path):
    """Put a photo into a data set as `path` with a suffix that datasets.py reads; returns its path there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if photo.suffix.lower() not in KEPT:
        with naming(photo, "replace it"), Image.open(photo) as picture:
            saved = picture if picture.mode in ("1", "L", "LA", "P", "I;16") else picture.convert("RGB")
            if picture.mode == "I":                         # 16 bits of PGM, which PNG has as I;16
                saved = Image.fromarray(np.array(picture).astype(np.uint16))
            saved.save(f"{path}.png", exif=picture.getexif())
        return Path(f"{path}.png")
    path = path.with_name(path.name + photo.suffix.lower())
    try:
        os.link(photo.resolve(), path)
    except OSError:                                         # another disk, or one without hard links
        shutil.copyfile(photo, path)
    return path


def run_lengths(layer):
    """bool (H, W) as COCO's run lengths of 0, 1, 0, ... down the columns."""
    flat = layer.T.ravel()
    counts = np.diff([0, *np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size]).tolist()
    return {"counts": [0] * int(flat[0]) + counts, "size": list(layer.shape)}


def add_to_coco(table, name, mask):
    """Add a photo and an annotation for each class of its mask to a COCO table."""
    number = len(table["images"]) + 1
    table["images"].append({"id": number, "file_name": name, "height": len(mask), "width": mask.shape[1]})
    for value in np.unique(mask[mask > 0]).tolist():
        rows, columns = np.nonzero(mask == value)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        table["annotations"].append({
            "id": len(table["annotations"]) + 1, "image_id": number, "category_id": value,
            "iscrowd": int(value == 255), "area": len(rows), "bbox": [*map(int, box)],
            "segmentation": run_lengths(mask == value)})


def write(folder, names, items, legends, captions, to):
    """Write a data set. names: None where masks hold numbers, () where datasets.py knows the classes."""
    splits, texts, tables, top = {}, {}, {}, 0              # tables: COCO's, by split
    for item in items:
        name = f"{item.kind}/{item.stem}".lstrip("/")
        photo = place_photo(item.photo, folder / ("images" if to else "image") / name)
        mask = draw(item, names, legends)
        top = max(top, int(mask[mask < 255].max(initial=0)))
        if item.kind == "good" and mask.any():
            raise Wrong(f"{item.photo}: lies among the good ones, but its mask shows a defect; move it")
        if names and top > len(names):
            raise Wrong(f"{item.photo}: its mask holds {top}; name all classes in classes.json, not {names}")
        if to:
            split = min(item.splits, key=lambda split: split not in WORDS, default="default")
            table = tables.setdefault(split, {"images": [], "annotations": []})
            add_to_coco(table, photo.relative_to(folder / "images").as_posix(), mask)
        elif item.kind != "good":
            if mask.any() and not mask[mask < 255].any():       # such a mask alone would be read as 0/255
                SAID["masks of nothing but 255, which become background"] += 1
                mask = np.zeros_like(mask)
            (folder / "mask" / item.kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "mask" / f"{name}_mask.png")
        for split in item.splits:
            splits.setdefault(split, []).append(name)
        if name in captions:
            texts[name] = captions[name]
    if "val" in splits:                                     # VISION has no test: val is what is scored
        splits.setdefault("test", splits["val"])
    classes = [f"class_{n}" for n in range(1, top + 1)] if names is None else names
    if to:
        numbered = [*enumerate(classes, 1), (255, "ignore")]            # which is read back as 255
        categories = [{"id": number, "name": name} for number, name in numbered]
        contents = {f"annotations/instances_{split}": {**table, "categories": categories}
                    for split, table in tables.items()}
        (folder / "annotations").mkdir()
    else:
        numbered = {} if names == () else dict(enumerate(["background", *classes]))
        contents = {"classes": numbered, "split": splits, "captions": texts}
    for file, content in contents.items():
        if content:
            text = json.dumps(content, indent=None if to else 1, ensure_ascii=False)
            (folder / f"{file}.json").write_text(text, "utf-8")
    print(f"  {len(items)} photos of {', '.join(classes) or 'the published classes'}")


def convert(source, out, layout=None, **flags):
    """Convert the data set at a folder, or each of those below it, into the new folder `out`.

    flags: those of Ask. Raises: ValueError, OSError: a sentence that names the file; nothing is left behind.
    """
    if not source.is_dir():
        raise Wrong(f"{source}: no such folder")
    if out.exists() and any(out.iterdir()):
        raise Wrong(f"--out {out}: is not empty; name a new folder")
    if out.is_relative_to(source):
        raise Wrong(f"--out {out}: lies in the folder that is read; name one beside it")
    found = [(source, layout)] if layout else find(source)
    if not found:
        raise Wrong(f"{source}: has no labels in a layout that is read; export masks, COCO, YOLO polygons or "
                    "labelme's files from your tool, see docs/data.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as part:
        whole = Path(part) / out.name                       # renamed at the end: half of one is never `out`
        for root, name in found:
            SAID.clear()
            print(f"{root.name}: {name}")
            ask = Ask(**{**flags, **LAYOUTS[name].known})
            names, items, legends = read(root, LAYOUTS[name].paths, ask)
            book = root.parent / "captions.xlsx"
            captions = read_captions(book, root.name) if name == "ds-mvtec" else {}
            folder = whole if len(found) == 1 else whole / root.relative_to(source)
            write(folder, names, items, legends, captions, ask.to)
            print("".join(f"  {what}: {count}\n" for what, count in SAID.items() if count), end="")
        if out.exists():
            out.rmdir()
        whole.rename(out)


def main():
    parser = argparse.ArgumentParser(description="Convert a downloaded data set for datasets.py.")
    add = parser.add_argument
    add("source", type=Path, help="the unpacked folder: one object, or several below it")
    add("--out", type=Path, required=True, help="the folder to write, new or empty")
    add("--layout", choices=LAYOUTS, help="of SOURCE (default: found by looking)")
    add("--classes", choices=["folder", "one"], help="of black and white masks: the folder, or one for all")
    add("--colours", type=Path, metavar="FILE", help="of masks: lines 'name:r,g,b' (default: labelmap.txt)")
    add("--inverted", action=argparse.BooleanOptionalAction, help="masks whose background is white")
    add("--unlabelled", choices=["good", "skip"], help="photos without a label: no defect, or left out")
    add("--to", choices=["coco"], help="write COCO's tables and run lengths instead, for other tools")
    flags = vars(parser.parse_args())
    source, out = flags.pop("source").resolve(), flags.pop("out").resolve()
    try:
        convert(source, out, **flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not flags["to"]:
        print(f"next: python datasets.py --data {shlex.quote(str(out))}")


if __name__ == "__main__":
    main()
