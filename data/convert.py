"""A downloaded data set -> a folder that datasets.py reads. Imports nothing of ours.

    python data/convert.py VISION/Ring --out ring
    python data/convert.py photos --out tiles --layout binary

    image/<kind>/<stem>.<ext>     the photo, byte for byte: a hard link where possible, else a copy
    mask/<kind>/<stem>_mask.png   8-bit, the value is the class, 0 the background; "good" has no masks
    classes.json                  {"0": "background", "1": "scratch", ...}
    split.json                    {"train": ["<kind>/<stem>", ...], "test": [...]} where there is a given one
    captions.json                 {"<kind>/<stem>": "A pill. A crack."} where there are captions

A kind is a folder whose name decides nothing; a download without kinds becomes a flat folder of <stem>.<ext>.
Where train/ and test/ share a stem, stems begin with the folder: train_0001.
A new format is one function of about ten lines, which returns class names and Items, and an entry in LAYOUTS.
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
import xml.etree.ElementTree as ET
import zipfile
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
GOOD = {"good", "ok", "Normal", "MT_Free"}      # folders of photos without a defect
ORIENTATION = 0x0112                            # the EXIF tag: 1 = upright, 5 to 8 = lying on a side
PUBLISHED = ()                                  # class names: datasets.py knows them by the folder's name
AITEX = {"002": "broken_end", "006": "broken_yarn", "010": "broken_pick", "016": "weft_curling",
         "019": "fuzzyball", "022": "cut_selvage", "023": "crease", "025": "warp_ball", "027": "knots",
         "029": "contamination", "030": "nep", "036": "weft_crack"}

# One photo. read(mask) gives uint8 (H, W) of class indices; it is None for a good photo, which has no mask.
# image or mask is None where the download lacks that partner, which stops the conversion.
Item = namedtuple("Item", "kind stem image mask read split caption", defaults=("", ""))


# --- reading files ---

@contextlib.contextmanager
def opened(path):
    """A PIL image. Raises ValueError naming the file, also for what goes wrong while pixels are read."""
    try:
        with Image.open(path) as picture:
            yield picture
    except Exception as error:      # Pillow raises OSError, SyntaxError and more, by the format
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace it") from None


def read_indices(path):
    """A mask file that holds class indices: uint8 (H, W)."""
    with opened(path) as picture:
        mask = np.array(picture)
    if mask.ndim != 2 or mask.max() > 64:
        raise ValueError(f"{path}: is no mask of class indices but a picture in colour or of 0 and 255")
    return mask.astype(np.uint8)


def read_binary(path, value=1):
    """A black and white mask as uint8 (H, W) of 0 and `value`; grey edges are cut at 128."""
    with opened(path) as picture:
        grey = np.asarray(picture.convert("RGB")).max(-1)
    if 0 < grey.max() < 16:         # grey edges alone are brighter than that
        raise ValueError(f"{path}: has the values 0 to {grey.max()}, not 0 and 255; are they class indices?")
    return np.where(grey >= 128, value, 0).astype(np.uint8)


def fill_polygon(mask, points, value):
    """Set the pixels of mask (H, W) whose centres lie inside the polygon [x, y, x, y, ...], even-odd rule.

    PIL's polygon also sets every pixel that the outline touches: areas become 5 % too large.
    """
    try:
        x, y = np.asarray(points, np.float64).reshape(-1, 2).T
        assert len(x) and np.isfinite(x).all() and np.isfinite(y).all()
    except (ValueError, TypeError, OverflowError, AssertionError):      # from JSON: anything
        raise ValueError(f"{str(points)[:60]} is not a polygon [x, y, x, y, ...]") from None
    x_next, y_next = np.roll(x, -1), np.roll(y, -1)
    for row in range(max(0, math.floor(y.min())), min(len(mask), math.ceil(y.max()))):
        cut = (y <= row + 0.5) != (y_next <= row + 0.5)
        at = np.sort(x[cut] + (row + 0.5 - y[cut]) * (x_next - x)[cut] / (y_next - y)[cut])
        for left, right in np.ceil(at - 0.5).clip(0).astype(int).reshape(-1, 2):
            mask[row, left:right] = value


def fill_annotations(image, shape, annotations):
    """COCO's [(class, segmentation), ...] of an image as uint8 (H, W); the later one lies on top."""
    mask = np.zeros(shape, np.uint8)
    try:
        for value, segmentation in annotations:
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
                counts = segmentation["counts"]     # lengths of runs of 0, 1, 0, ... down the columns
                mask[np.repeat(np.arange(len(counts)) % 2, counts).reshape(shape[::-1]).T > 0] = value
            elif isinstance(segmentation, list) and segmentation:
                for points in segmentation:
                    fill_polygon(mask, points, value)
            else:
                raise ValueError("an annotation is a box alone, or compressed run lengths")
    except ValueError as error:
        raise ValueError(f"{image}: {error}; export polygons from the labelling tool") from None
    return mask


def upright(mask, image):
    """The mask (H, W) for the photo as datasets.py shows it, turned upright by its EXIF tag.

    A mask that has the shape of the stored pixels is turned with them, one that fits the upright photo stays.
    If both shapes are the same it stays, for labelling tools show photos upright. COCO polygons are drawn at
    the width and height that their table gives, so the same rule holds for them.
    """
    with opened(image) as picture:
        turn, stored = picture.getexif().get(ORIENTATION, 1), picture.size[::-1]
    if mask.shape == (stored[::-1] if turn >= 5 else stored):
        return mask
    if mask.shape != stored:
        sizes = "{}x{}, its mask {}x{}".format(*stored, *mask.shape)
        raise ValueError(f"{image}: the photo is {sizes}; bring them to one size")
    lying = Image.fromarray(mask)
    lying.getexif()[ORIENTATION] = turn
    return np.array(ImageOps.exif_transpose(lying))


def read_captions(path):
    """captions.xlsx of DS-MVTec -> {"pill/crack/000": text}.

    Its paths say pill/crack/000.png, or wood/hole/03643_00111_022.png for wood/hole/022.
    """
    space, captions = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}", {}
    try:
        with zipfile.ZipFile(path) as book:
            strings = ET.fromstring(book.read("xl/sharedStrings.xml")).iter(space + "si")
            rows = ET.fromstring(book.read("xl/worksheets/sheet1.xml")).iter(space + "row")
        strings = ["".join(part.text or "" for part in string.iter(space + "t")) for string in strings]
        for row in rows:
            name, *texts = [strings[int(v.text)] for v in row.iter(space + "v")]
            name = re.sub(r"/([^/]*_)?(\d+)\.png$", r"/\2", name)
            captions[name] = " ".join(text.strip() for text in texts)
    except Exception as error:      # zipfile and the parser raise many types for a damaged file
        raise ValueError(f"{path}: cannot be read as a table of captions ({error!r}); replace it") from None
    return captions


# --- listing folders ---

def files(folder, suffixes=IMAGE_SUFFIXES):
    """{stem: path} of the images directly in a folder, sorted; none for a missing folder."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and path.name[0] != ".":
            if path.stem in found:
                raise ValueError(f"{path}: has the stem of {found[path.stem].name}; rename one of them")
            found[path.stem] = path
    return found


def folders(folder):
    """The folders in a folder, sorted; none for a missing folder."""
    return sorted(p for p in folder.glob("*") if p.is_dir() and p.name[0] != ".")


def pair(images, masks, read, kind="", split=""):
    """Items of images and masks {stem: path} that have the same stem. read: path of a mask -> array."""
    return [Item(kind, stem, images.get(stem), masks.get(stem), read, split) for stem in {**images, **masks}]


def good(images, split=""):
    """Items of photos {stem: path} without a defect."""
    return pair(images, {}, None, "good", split)


def pair_kinds(images, masks, read):
    """pair() for two folders and their sub-folders, the kinds; masks are <stem>.png or <stem>_mask.png."""
    items = []
    for kind in ["", *sorted({folder.name for folder in folders(images) + folders(masks)})]:
        if kind in GOOD:
            items += good(files(images / kind))
        else:
            found = {stem.removesuffix("_mask"): path for stem, path in files(masks / kind).items()}
            items += pair(files(images / kind), found, read, kind)
    return items


# --- layouts: folder -> class names from value 1 on (None: the masks hold indices without names), Items ---

def read_coco(path):
    """A COCO table -> {class: id}, {classes above others}, [(file name, (H, W), [(class, segmentation)])]."""
    try:
        table, shapes = json.loads(path.read_text("utf-8")), {}
        names = {c["id"]: str(c["name"]) for c in table["categories"]}
        above = {c.get("supercategory") for c in table["categories"] if c.get("supercategory") != c["name"]}
        for a in table["annotations"]:
            shapes.setdefault(a["image_id"], []).append((names[a["category_id"]], a["segmentation"]))
        images = [(Path(i["file_name"]).name, (i["height"], i["width"]), shapes.get(i["id"], []))
                  for i in table["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no COCO table ({error!r}); export it again") from None
    return {name: number for number, name in names.items()}, above, images


def coco(root):
    """Classes are numbered 1..K in the order of their ids, wherever these begin.

    Roboflow lists the project as a class above the others, which no annotation has: that one is left out.
    """
    ids, above, tables, items = {}, set(), {}, []
    for path in sorted(root.glob("*/_annotations.coco.json")):
        more_ids, more_above, tables[path.parent] = read_coco(path)
        ids, above = {**ids, **more_ids}, above | more_above
    used = {name for images in tables.values() for *_, shapes in images for name, _ in shapes}
    names = sorted(used | (set(ids) - above), key=ids.get)
    for folder, images in tables.items():
        there = {path.name: path for path in files(folder).values()}
        split = {"valid": "val"}.get(folder.name, folder.name)
        for name, shape, shapes in images:
            path = there.pop(name, None)
            mask = [(names.index(c) + 1, points) for c, points in shapes] if path else folder / name
            items.append(Item("", Path(name).stem, path, mask, partial(fill_annotations, path, shape), split))
        items += pair({path.stem: path for path in there.values()}, {}, fill_annotations)
    return names, items


def dagm2007(root):
    """Train/, Test/: a photo with a label has a defect, the others are good."""
    items = []
    for part in ("Train", "Test"):
        images, labels = files(root / part), files(root / part / "Label")
        masks = {stem.removesuffix("_label"): path for stem, path in labels.items()}
        marked = {stem: images.pop(stem) for stem in masks if stem in images}
        items += pair(marked, masks, read_binary, "defect", part.lower()) + good(images, part.lower())
    return ["defect"], items


def kolektor2(root):
    """train/, test/: every photo has a mask beside it, a black one when it is good."""
    items = []
    for part in ("train", "test"):
        images = files(root / part)
        masks = {stem.removesuffix("_GT"): images.pop(stem) for stem in [*images] if stem.endswith("_GT")}
        items += pair(images, masks, read_binary, split=part)
    return ["defect"], items


def visa(root):
    """Masks hold class indices, whose names are not in the download."""
    images, masks = root / "Data" / "Images", root / "Data" / "Masks"
    items = pair(files(images / "Anomaly"), files(masks / "Anomaly"), read_indices, "anomaly")
    return None, items + good(files(images / "Normal"))


def magnetic_tile(root):
    """The folder is the class; photos are .jpg, their masks .png beside them. Some of MT_Uneven are empty."""
    kinds, items = sorted(path.parent for path in root.glob("MT_*/Imgs") if path.parent.name != "MT_Free"), []
    for value, kind in enumerate(kinds, 1):
        images, masks = files(kind / "Imgs", {".jpg"}), files(kind / "Imgs", {".png"})
        items += pair(images, masks, partial(read_binary, value=value), kind.name[3:].lower())
    items += good(files(root / "MT_Free" / "Imgs", {".jpg"}))
    return [kind.name[3:].lower() for kind in kinds], items


def read_aitex(path, value):
    """Two defects have two masks, _mask1 and _mask2."""
    second = path.with_name(path.name.replace("_mask1", "_mask2"))
    return np.maximum(read_binary(path, value), read_binary(second, value))


def aitex(root):
    """<number>_<code>_<fabric>.png: the code is the class. 0100_025_08 is published without a mask."""
    images, masks, items = files(root / "Defect_images"), files(root / "Mask_images"), []
    images.pop("0100_025_08", None)
    masks = {re.sub("_mask1?$", "", stem): masks[stem] for stem in masks if not stem.endswith("_mask2")}
    codes = sorted({stem[5:8] for stem in [*images, *masks]})
    for value, code in enumerate(codes, 1):
        mine = [{stem: paths[stem] for stem in paths if stem[5:8] == code} for paths in (images, masks)]
        items += pair(*mine, partial(read_aitex, value=value), AITEX.get(code, code))
    for roll in folders(root / "NODefect_images"):
        items += good(files(roll))
    return [AITEX.get(code, code) for code in codes], items


def synthetic(root):
    """The generated part of Defect Spectrum; its other folder, masks/, is in unreliable colours."""
    images, masks = files(root / "images"), files(root / "masks_converted_dir")
    images = {stem.replace("samples_image_", ""): path for stem, path in images.items()}
    masks = {stem.replace("samples_converted_mask_", ""): path for stem, path in masks.items()}
    return PUBLISHED, pair(images, masks, read_indices)


def ds_mvtec(root):
    """An object of Defect Spectrum, which datasets.py reads as it is; here it gets its captions."""
    captions = read_captions(root.parent / "captions.xlsx")
    items = pair_kinds(root / "image", root / "mask", read_indices)
    return PUBLISHED, [item._replace(caption=captions.get(f"{root.name}/{item.kind}/{item.stem}", ""))
                       for item in items]


def binary(root):
    """image(s)/ and mask(s)/ with black and white masks of one class."""
    images = root / ("image" if (root / "image").is_dir() else "images")
    masks = root / ("mask" if (root / "mask").is_dir() else "masks")
    return ["defect"], pair_kinds(images, masks, read_binary)


# look: the layout in words; marks: patterns that all match in such a folder (none: only by --layout).
Layout = namedtuple("Layout", "look marks read")
LAYOUTS = {
    "coco": Layout("train/, val/ with _annotations.coco.json (VISION)", ["*/_annotations.coco.json"], coco),
    "dagm2007": Layout("Train/, Test/ with Label/<stem>_label.PNG", ["Train/Label"], dagm2007),
    "kolektor2": Layout("train/, test/ with <stem>_GT.png", ["train/*_GT.png", "test/*_GT.png"], kolektor2),
    "visa": Layout("Data/Images with Data/Masks/Anomaly", ["Data/Images", "Data/Masks"], visa),
    "magnetic-tile": Layout("MT_<kind>/Imgs/<stem>.jpg with <stem>.png", ["MT_*/Imgs"], magnetic_tile),
    "aitex": Layout("Defect_images/ with Mask_images/", ["Defect_images", "Mask_images"], aitex),
    "synthetic": Layout("images/ with masks_converted_dir/", ["images", "masks_converted_dir"], synthetic),
    "ds-mvtec": Layout("image/, mask/ beside ../captions.xlsx", ["image", "../captions.xlsx"], ds_mvtec),
    "binary": Layout("image/ and mask/ with 0/255 masks (only by --layout)", [], binary),
}


def find(folder, depth=3):
    """[(folder, key of LAYOUTS)] of the data sets at or below a folder."""
    for name, layout in LAYOUTS.items():
        if layout.marks and all(any(folder.glob(mark)) for mark in layout.marks):
            return [(folder, name)]
    return [found for below in folders(folder) if depth for found in find(below, depth - 1)]


# --- writing ---

def read_layout(root, layout):
    """(class names, Items with unique names). Raises ValueError naming the files without a partner."""
    names, items = LAYOUTS[layout].read(root)
    lonely = {"images without a mask": [item.image for item in items if item.mask is None and item.read],
              "masks without an image": [item.mask for item in items if item.image is None]}
    for what, paths in lonely.items():
        if paths:
            shown = ", ".join(str(path.relative_to(root)) for path in paths[:8])
            raise ValueError(f"{root}: {len(paths)} {what}: {shown}; add or remove files")
    if not items:
        raise ValueError(f"{root}: no images in the layout {layout}: {LAYOUTS[layout].look}")
    if any(item.kind for item in items):            # datasets.py reads a flat folder or kinds, not both
        items = [item._replace(kind=item.kind or "defect") for item in items]
    if len({(item.kind, item.stem) for item in items}) < len(items):
        items = [item._replace(stem=f"{item.image.parent.name}_{item.stem}") for item in items]
    return names, items


def place(item, name, folder):
    """Put the photo of an Item into a data set, and its mask: returns the mask, None for a good photo."""
    image = folder / "image" / f"{name}{item.image.suffix.lower()}"
    image.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(item.image.resolve(), image)
    except OSError:                                 # another disk, or one without hard links
        shutil.copyfile(item.image, image)
    if item.read is None:
        return None
    mask = upright(item.read(item.mask), item.image)
    path = folder / "mask" / f"{name}_mask.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return mask


def write(folder, names, items):
    """Write a data set and print what it holds."""
    pixels, holding, sound = np.zeros(256, int), np.zeros(256, int), 0
    splits, captions = {}, {}
    for item in items:
        name = f"{item.kind}/{item.stem}".lstrip("/")
        mask = place(item, name, folder)
        if mask is not None:
            count = np.bincount(mask.ravel(), minlength=256)
            pixels, holding = pixels + count, holding + (count > 0)
        sound += mask is None or not mask.any()
        if item.split:
            splits.setdefault(item.split, []).append(name)
        if item.caption:
            captions[name] = item.caption
    if "val" in splits:                             # VISION has no test: val is what is scored
        splits.setdefault("test", splits["val"])
    numbered = [f"class_{value}" for value in range(1, np.flatnonzero(pixels).max(initial=0) + 1)]
    classes = dict(enumerate(["background", *(numbered if names is None else names)]))
    contents = {"classes": classes if names != PUBLISHED else {}, "split": splits, "captions": captions}
    for file, content in contents.items():
        if content:
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (folder / f"{file}.json").write_text(text, "utf-8")
    print(f"  {len(items)} images, {sound} of them without a defect, {len(captions)} captions")
    for value, name in enumerate(names or numbered, 1):
        print(f"  {value:>2} {name:<24}{pixels[value]:>12} px in {holding[value]} images")
    for split, members in splits.items():
        print(f"  split {split}: {len(members)} images")


def convert(source, out, layout=None):
    """Convert the data set at a folder, or each of those below it, into the new folder `out`.

    Raises: ValueError, OSError: a sentence that names the file. Then nothing is left behind.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty; name a new folder")
    found = [(source, layout)] if layout else find(source)
    if not found:
        looks = "".join(f"\n  {name}: {layout.look}" for name, layout in LAYOUTS.items())
        raise ValueError(f"{source}: has none of these layouts; docs/data.md names more:{looks}")
    plans = [(root, layout, *read_layout(root, layout)) for root, layout in found]
    part = out.with_name(f".{out.name}.part")       # renamed at the end: a killed conversion is never `out`
    shutil.rmtree(part, ignore_errors=True)
    try:
        for root, layout, names, items in plans:
            print(f"{root.name}: layout {layout}")
            write(part / root.relative_to(source) if len(plans) > 1 else part, names, items)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="Convert a downloaded data set for datasets.py.")
    parser.add_argument("source", type=Path, help="the unpacked folder: one object, or several below it")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--layout", choices=LAYOUTS, help="of SOURCE (default: found by looking)")
    args = parser.parse_args()
    try:
        convert(args.source.resolve(), args.out.resolve(), args.layout)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"next: python datasets.py --data {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    main()
