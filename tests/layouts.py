"""Writes every layout that datasets.py reads, as it is downloaded and with its faults, at 32 px; and what must be read back."""
import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

SIDE = 32
MVTEC = {"bottle": ("broken_large broken_small contamination", "rbg_mask", "_rbg_mask"),
         "capsule": ("crack poke faulty_imprint scratch squeeze", "rgb_mask", "_rgb_mask"),
         "metal_nut": ("scratch bent color", "rgb_mask", "_rgb_mask"),
         "pill": ("color contamination crack faulty_imprint scratch pill_type", "rgb_mask", "_rgb_mask"),
         "wood": ("color crack scratch hole liquid", "rbg_mask", "_rgb_mask")}


@dataclass
class Built:
    """One data set on disk: where, how it is read, and for each sample (image file, mask array or None)."""
    path: Path
    layout: str
    classes: tuple
    object: str | None = None
    pairs: dict = field(default_factory=dict)
    mask_files: dict = field(default_factory=dict)
    captions: dict = field(default_factory=dict)

    def add(self, name, image, mask, mask_path=None, mask_array=None, seed=0):
        """Write a photo, and its mask if it has a path; `mask` is what is to be read, `mask_array` what the file holds."""
        random = np.random.default_rng([seed, len(self.pairs)])
        save(image, random.integers(0, 256, (SIDE, SIDE, 3)))
        if mask_path is not None:
            save(mask_path, mask if mask_array is None else mask_array)
            self.mask_files[name] = mask_path
        self.pairs[name] = (image, np.zeros((SIDE, SIDE), np.uint8) if mask is None else mask)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def touch(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def blots(n, *values):
    """A mask with a rectangle of its own size and place for each value."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for k, value in enumerate(values):
        mask[2 + n:6 + 2 * n, 3 + 9 * k:9 + 9 * k] = value
    return mask


def colour(mask):
    return np.stack([mask * 40, mask * 20, mask], -1)


# --- Defect Spectrum ---

def ds_mvtec(root, name, count=7):
    classes, folder, suffix = MVTEC[name]
    classes = ("background", *classes.split())
    built, base = Built(root, "defect-spectrum", classes, name), root / "DS-MVTec" / name
    kinds = {kind: (k,) for k, kind in enumerate(classes) if k in (1, 2)}
    if name in ("pill", "wood"):
        kinds["combined"] = (3, 1)                                              # no class of that name: two classes
    for kind, values in kinds.items():
        for n in range(count):
            mask = blots(n, *values)
            built.add(f"{kind}/{n:03d}", base / f"image/{kind}/{n:03d}.png", mask, base / f"mask/{kind}/{n:03d}_mask.png")
            save(base / f"{folder}/{kind}/{n:03d}{suffix}.png", colour(mask))
            built.captions[f"{kind}/{n:03d}"] = f"A {name} & its box. It has <{kind}> number {n}."
    for n in {"capsule": (7, 9, 10, 11), "pill": range(26)}.get(name, range(3)):
        built.add(f"good/{n:03d}", base / f"image/good/{n:03d}.png", None)
        if name == "pill" and n < 22:
            del built.pairs[f"good/{n:03d}"]                                    # on disk, but photos of metal_nut
    touch(base / "image/.DS_Store")
    touch(base / f"image/{next(iter(kinds))}/.DS_Store")
    touch(base / "mask/notes.md")
    return built


def write_xlsx(path, rows):
    """A workbook as in the download: shared strings, styled empty cells behind them; the strings are not in the order of the cells."""
    strings = sorted({text for row in rows for text in row})
    cell = lambda r, c, text: f'<c r="{"ABC"[c]}{r}" s="1" t="s"><v>{strings.index(text)}</v></c>'
    body = "".join(f'<row r="{r}">{"".join(cell(r, c, t) for c, t in enumerate(row))}<c r="D{r}" s="2"/></row>' for r, row in enumerate(rows, 1))
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    halves = lambda text: f"<r><t>{escape(text[:3])}</t></r><r><t xml:space=\"preserve\">{escape(text[3:])}</t></r>"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{''.join(f'<si>{halves(t)}</si>' for t in strings)}</sst>")
        book.writestr("xl/worksheets/sheet1.xml", f'<worksheet {space}><dimension ref="A1:L99"/><sheetData>{body}</sheetData></worksheet>')


def write_captions(path, builts):
    rows = [("Path", "object description", "defect description")]
    for built in builts:
        for n, (name, caption) in enumerate(built.captions.items()):
            kind, stem = name.split("/")
            stem = f"03643_{n:05d}_{stem}" if built.object in ("capsule", "metal_nut", "wood") else stem
            first, second = re.fullmatch(r"(.*?\.) (.*)", caption).groups()
            rows.append((f"{built.object}/{kind}/{stem}.png", first, second))
    write_xlsx(path, rows)


def ds_flat(root, name, object, classes, stems, suffix=".jpg"):
    built, base = Built(root, "flat", ("background", *classes.split()), object), root / name
    for n, stem in enumerate(stems):
        mask = blots(n % 8, *((1, 2) if n == 0 else (1 + n % 2,)))
        built.add(stem, base / f"image/{stem}{suffix}", mask, base / f"mask/{stem}_mask.png")
        save(base / f"rbg_mask/{stem}_rgb_mask.png", colour(mask))
    touch(base / "image/.DS_Store")
    return built


def synthetic(root, name, object, classes, prefixes=("",)):
    built, base = Built(root, "synthetic", ("background", *classes.split()), object), root / name
    for prefix in prefixes:
        for n in range(16):
            key, mask = f"{n:06d}_{n % 2}_1", blots(n % 8, 1 + n % 2)
            built.add(prefix + key, base / f"images/{prefix}samples_image_{key}.png", mask,
                      base / f"masks_converted_dir/{prefix}samples_converted_mask_{key}.png")
            save(base / f"masks/{prefix}samples_mask_{key}.png", colour(mask)[..., ::-1])
    touch(base / ".DS_Store")
    return built


def defect_spectrum(root):
    """The tree of the whole download, faults included: a list of its data sets."""
    mvtec = [ds_mvtec(root, name) for name in MVTEC]
    write_captions(root / "DS-MVTec" / "captions.xlsx", mvtec)
    touch(root / "DS-MVTec" / "DS-MVTec.md")
    touch(root / "README.md")
    return mvtec + [
        ds_flat(root, "DS-VISION/Capacitor", "Capacitor", "scratch crush crack", [str(n) for n in range(472, 488)]),
        ds_flat(root, "DS-VISION/Screw", "Screw", "bump crush fiber", [str(n) for n in (472, *range(1825, 1840))]),
        ds_flat(root, "DS-VISION/Wood", "Wood", "point friction scratch dirty", [f"{n:06d}" for n in range(48, 64)]),
        ds_flat(root, "DS-Cotton-Fabric", "DS-Cotton-Fabric", "texture bubble",
                [f"{960 + n:05d}_{n:04d}{'F' * (n == 3)}_Thick-Place" for n in range(16)]),
        ds_flat(root, "DS-DAGM", "DS-DAGM", "scratch texture crush color dirty", [str(n) for n in range(104, 120)], ".png"),
        synthetic(root, "synthetic_MVTec/pill", "synthetic_MVTec/pill", "color contamination crack faulty_imprint scratch pill_type"),
        synthetic(root, "synthetic_VISION/Capacitor", "synthetic_VISION/Capacitor", "scratch crush crack", ("", "2_", "3_")),
        synthetic(root, "synthetic_Cotton_Fabric", "synthetic_Cotton_Fabric", "texture bubble")]


# --- other data sets ---

def mvtec(root, object="metal_nut"):
    built = Built(root, "mvtec", ("background", "bent", "flip"), object)
    for k, kind in enumerate(("bent", "flip"), 1):
        for n in range(7):
            built.add(f"{kind}/{n:03d}", root / f"{object}/test/{kind}/{n:03d}.png", blots(n, k),
                      root / f"{object}/ground_truth/{kind}/{n:03d}_mask.png", blots(n, 255))
    for n in range(3):
        built.add(f"good/{n:03d}", root / f"{object}/test/good/{n:03d}.png", None)
        save(root / f"{object}/train/good/{n:03d}.png", np.zeros((SIDE, SIDE, 3)))
    touch(root / object / "license.txt")
    return built


def btad(root):
    built, base = Built(root / "BTech_Dataset_transformed", "mvtec", ("background", "ko"), "03"), root / "BTech_Dataset_transformed/03"
    for n in range(8):
        built.add(f"ko/{n:04d}", base / f"test/ko/{n:04d}.{'bmp' if n % 2 else 'png'}", blots(n, 1),
                  base / f"ground_truth/ko/{n:04d}.{'png' if n % 3 else 'bmp'}", blots(n, 255))
        built.add(f"ok/{n:04d}", base / f"test/ok/{n:04d}.bmp", None)
    save(base / "train/ok/0000.bmp", np.zeros((SIDE, SIDE, 3)))
    return built


def vision(root):
    """COCO boxes as polygons; ids in another order than the files; two annotations on one image; one image without."""
    built = Built(root, "vision", ("background", "t_contamination", "t_scratch"), "Ring")
    for part, numbers in (("train", range(6)), ("val", range(6, 10))):
        table = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in ((1, "t_scratch"), (0, "t_contamination"))]}
        for n in numbers:
            mask = blots(n, *((1, 2) if n % 2 == 0 else (2,)) if n != 5 else ())
            built.add(f"{part}/{n:06d}", root / f"Ring/{part}/{n:06d}.jpg", mask)
            table["images"].insert(0, {"id": 100 - n, "file_name": f"{n:06d}.jpg", "width": SIDE, "height": SIDE})
            for value in sorted(set(mask.flatten()) - {0}, reverse=True):
                y, x = np.nonzero(mask == value)
                top, left, bottom, right = (int(v) for v in (y.min(), x.min(), y.max() + 1, x.max() + 1))
                table["annotations"].append({"image_id": 100 - n, "category_id": int(value) - 1,
                                             "segmentation": [[left, top, right, top, right, bottom, left, bottom]]})
        touch(root / f"Ring/{part}/_annotations.coco.json", json.dumps(table))
    save(root / "Ring/inference/000000.jpg", np.zeros((SIDE, SIDE, 3)))
    return built


def dagm2007(root):
    built, base = Built(root, "dagm2007", ("background", "defect"), "Class1"), root / "Class1/Class1"
    for part, numbers in (("Train", range(575, 581)), ("Test", range(1, 7))):
        for n in numbers:
            mask = blots(n % 7, 1) if n % 2 else None
            label = base / f"{part}/Label/{n:04d}_label.PNG" if n % 2 else None
            built.add(f"{part}/{n:04d}", base / f"{part}/{n:04d}.PNG", mask, label, None if mask is None else mask * 255)
        touch(base / f"{part}/Label/Labels.txt")
    return built


def kolektor2(root):
    built = Built(root, "kolektor2", ("background", "defect"))
    for part, start in (("train", 10000), ("test", 20000)):
        for n in range(6):
            mask = blots(n, 1) * (n % 2)
            built.add(f"{part}/{start + n}", root / f"{part}/{start + n}.png", mask, root / f"{part}/{start + n}_GT.png", mask * 255)
    return built


def visa(root):
    built, base = Built(root, "visa", ("background", "class_1", "class_2"), "capsules"), root / "capsules/Data"
    for n in range(14):
        built.add(f"Anomaly/{n:03d}", base / f"Images/Anomaly/{n:03d}.JPG", blots(n % 7, 1 + n % 2), base / f"Masks/Anomaly/{n:03d}.png")
    for n in range(3):
        built.add(f"Normal/{n:04d}", base / f"Images/Normal/{n:04d}.JPG", None)
    touch(root / "capsules/image_anno.csv")
    touch(root / "split_csv/1cls.csv")
    return built


def magnetic_tile(root):
    built = Built(root, "magnetic-tile", ("background", "blowhole", "break"))
    for k, kind in enumerate(("Blowhole", "Break", "Free"), 1):
        for n in range(7):
            name, mask = f"exp{n}_num_{100 + n}", blots(n, k) * (kind != "Free")
            grey = np.where(mask > 0, 128 + 10 * n, 127 - n)                    # anti-aliased edges: never quite 0 or 255
            built.add(f"MT_{kind}/{name}", root / f"MT_{kind}/Imgs/{name}.jpg", mask, root / f"MT_{kind}/Imgs/{name}.png", grey)
    return built


def aitex(root):
    built = Built(root, "aitex", ("background", "broken_end", "fuzzyball"))
    for k, code in enumerate(("002", "019"), 1):
        for n in range(8):
            stem = f"{n:04d}_{code}_00"
            kind, mask = built.classes[k], blots(n, k, k) if n == 3 else blots(n, k)
            path = root / f"Mask_images/{stem}_mask{'1' if n == 3 else ''}.png"
            built.add(f"{kind}/{stem}", root / f"Defect_images/{stem}.png", mask, path, (blots(n, 1) if n == 3 else mask > 0) * 255)
            if n == 3:
                save(path.with_name(f"{stem}_mask2.png"), blots(n, 0, 255))
    save(root / "Defect_images/0100_025_08.png", np.zeros((SIDE, SIDE, 3)))     # has no mask
    built.add("good/2306881-210020u/0001_000_00", root / "NODefect_images/2306881-210020u/0001_000_00.png", None)
    return built


def plain(root):
    built = Built(root, "plain", ("background", "class_1", "class_2"))
    for n in range(14):
        built.add(f"photo {n}", root / f"images/photo {n}.jpg", blots(n % 7, 1 + n % 2), root / f"masks/photo {n}.png")
    built.add("photo 14", root / "images/photo 14.jpg", blots(0) * 0, root / "masks/photo 14.png")
    return built


OTHERS = (mvtec, btad, vision, dagm2007, kolektor2, visa, magnetic_tile, aitex, plain)


def write_all(root):
    """Every data set below one folder, one sub-folder per download."""
    return defect_spectrum(root / "Defect_Spectrum") + [build(root / build.__name__) for build in OTHERS]
