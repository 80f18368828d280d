"""Folders of defect photos with pixel masks -> (image, mask, classes); splits, the audit, writing a data set.

    image   uint8 (C, H, W), C = 1 when every file is grey, else 3
    mask    uint8 (H, W), the value is a class index and 0 is background; classes[0] == "background"
    kind    the folder an image came from ("crack", "combined", "good"). Classes are read from the mask, not
            from it: a "combined" image holds several. It decides two things: the first images of each kind
            train where there is no split.json, and those of GOOD_KINDS need no mask, having no defect.

A folder is read in the layouts that LAYOUTS lists; data/convert.py brings all others into the first of them.
drawn:pill, drawn:zipper and drawn:wood need no files; drawn:pill:original has one coarse class instead.

    python datasets.py                                          audit of the drawn pill, and a contact sheet
    python datasets.py --data Defect_Spectrum                   every object below that folder, one row each
    python datasets.py --data Defect_Spectrum --object pill
"""
import argparse
import json
import math
import os
import re
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import inspect_rules
from data.drawn import DRAWN, draw
from inspect_rules import LABELS, read_classes, read_json

LAYOUTS = """  image/<kind>/<stem>.png with mask/<kind>/<stem>_mask.png, class indices (Defect Spectrum)
  images/<kind>/<stem>.png with masks/<kind>/<stem>.png or <stem>_mask.png, class indices; also without kinds
  test/<kind>/<stem>.png with ground_truth/<kind>/<stem>_mask.png, 0/255: the class is the kind (MVTec AD)"""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
GOOD_KINDS = {"good", "ok", "Normal", "MT_Free"}    # products without a defect; they may come without masks
FEW_SHOT = 5                        # images per kind that train where there is no split (the authors' rule)
AUGMENTATIONS = ("flip", "turn")
PALETTE = np.array([(0, 0, 0), (230, 25, 75), (60, 180, 75), (67, 99, 216), (255, 225, 25), (245, 130, 49),
                    (145, 30, 180), (66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212),
                    (0, 128, 128)], np.uint8)

# Defect Spectrum ships these in its .md files, by object folder: value 1, 2, ... of a mask, in their order.
CLASS_TABLES = {**LABELS, **{name: ("background", *names.split()) for name, names in {
    "bottle": "broken_large broken_small contamination",
    "cable": "bent_wire cable_swap combined cut_inner_insulation cut_outer_insulation missing_cable "
             "missing_wire poke_insulation",
    "capsule": "crack poke faulty_imprint scratch squeeze",
    "carpet": "color cut hole metal_contamination thread",
    "grid": "bent broken glue metal_contamination thread",
    "hazelnut": "cut crack hole print",
    "leather": "color cut fold glue poke",
    "metal_nut": "scratch bent color",
    "screw": "manipulated_front scratch_head scratch_neck thread_side thread_top",
    "tile": "crack glue_strip gray_stroke oil rough",
    "toothbrush": "contamination missing messy",
    "transistor": "bent_lead cut_lead damaged_case misplaced",
    "Capacitor": "scratch crush crack",
    "Console": "scratch bump dirty gap",
    "Groove": "scratch abrasion",
    "Ring": "friction scratch texture color",
    "Screw": "bump crush fiber",
    "Wood": "point friction scratch dirty",
    "DS-Cotton-Fabric": "texture bubble",
    "synthetic_Cotton_Fabric": "texture bubble",
    "DS-DAGM": "scratch texture crush color dirty"}.items()}}
FOREIGN = {"pill": [f"good/{n:03d}" for n in range(22)]}    # DS-MVTec: metal nuts, uploaded there by mistake

# image: a path, or the number of a drawn picture. mask: a path, or None (all background).
# label: None when the mask file holds class indices; else the class that its pixels >= 128 stand for.
Sample = namedtuple("Sample", "name image mask kind label", defaults=(None, "", None))


# --- reading files: what is wrong is a ValueError that names the file and the reason ---

def open_picture(path):
    """A loaded PIL image, turned upright by its EXIF tag; of several frames the first."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except Exception as error:      # Pillow raises OSError, SyntaxError, struct.error, ... by format
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def to_mode(picture, channels):
    """A PIL image in mode L or RGB: 16-bit grey is scaled by 65535, alpha dropped, palettes looked up."""
    if picture.mode.startswith("I") or picture.mode == "F":         # 16-bit grey in Pillow's modes
        wide = np.nan_to_num(np.asarray(picture, np.float64))
        narrow = wide / (257 if wide.max() > 255 else 1)
        picture = Image.fromarray(narrow.clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")       # through RGBA: a palette with transparency warns otherwise
    return picture.convert("L" if channels == 1 else "RGB")


def to_array(picture):
    """A PIL image in mode L or RGB as uint8 (C, H, W)."""
    array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def is_grey(path):
    """Whether a picture is grey, also in equal channels. A broken one is reported when it is read."""
    try:
        with Image.open(path) as picture:
            if picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16"):
                return True
            red, green, blue = picture.convert("RGB").split()
            return red.tobytes() == green.tobytes() == blue.tobytes()
    except Exception:               # as in open_picture
        return True


def read_mask(path, classes, label=None):
    """Read a mask file as uint8 (H, W) of class indices below len(classes).

    label: None for an index mask; a class index for a 0/255 mask, whose pixels >= 128 become that class.
    """
    if label is not None:
        picture = open_picture(path)
        if len(picture.getbands()) != 1:
            raise ValueError(f"{path}: a 0/255 mask has one channel, this one is {picture.mode}")
        return ((np.array(picture.convert("L")) >= 128) * label).astype(np.uint8)
    mask = inspect_rules.read_mask(path, classes)
    if mask.max(initial=0) >= len(classes):
        raise ValueError(f"{path}: mask has the values {np.unique(mask)[:12].tolist()} but the classes are "
                         f"0..{len(classes) - 1} ({', '.join(classes)}); add what is missing to classes.json")
    return mask.astype(np.uint8)


# --- data sets ---

class DefectDataset:
    """Images with index masks. dataset[i] -> (image uint8 (C, H, W), mask uint8 (H, W)), at `size` if any.

    Attributes: name, classes (tuple, [0] = "background"), samples (list of Sample), channels (1 or 3),
    size ((H, W) or None), splits ({name: sample names} of split.json), split_rule (what decided which images
    are here), notes (sentences on files left out), problems (list of (what, file): files without a partner).
    """

    def __init__(self, name, classes, samples, channels, splits=(), notes=(), problems=()):
        self.name, self.classes, self.samples, self.channels = name, tuple(classes), list(samples), channels
        self.splits, self.notes, self.problems = dict(splits), list(notes), list(problems)
        self.size, self.split_rule = None, "all images"
        self._classes_in = {}                                       # shared by all subsets

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.read(i, self.size)

    def read(self, i, size=None):
        """Image uint8 (C, H, W) and mask uint8 (H, W) at `size` or native; photos bilinear, masks nearest."""
        path, mask = self.samples[i].image, self.read_mask(i)
        picture = to_mode(open_picture(path), self.channels)
        if picture.size != mask.shape[::-1]:
            raise ValueError(f"{path} is {picture.height}x{picture.width} but its mask is "
                             f"{mask.shape[0]}x{mask.shape[1]}; they must have the same size")
        if size is not None and tuple(size) != mask.shape:
            picture = picture.resize(size[::-1], Image.BILINEAR)
            mask = np.array(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))
        return torch.from_numpy(to_array(picture)), torch.from_numpy(mask)

    def read_mask(self, i):
        """Mask i at native size: uint8 array (H, W). The photo is not decoded."""
        sample = self.samples[i]
        if sample.mask is None:
            return np.zeros(open_picture(sample.image).size[::-1], np.uint8)
        return read_mask(sample.mask, self.classes, sample.label)

    def classes_in(self, i):
        """Class indices in mask i but the background; None if it cannot be read, which tensors() reports."""
        name = self.samples[i].name
        if name not in self._classes_in:
            try:
                self._classes_in[name] = tuple(k for k in np.unique(self.read_mask(i)).tolist() if k)
            except ValueError:
                self._classes_in[name] = None
        return self._classes_in[name]

    def defective(self):
        """Indices of the images with a defect, by their masks or, of drawn ones, by their kinds."""
        return [i for i, s in enumerate(self.samples)
                if s.kind not in GOOD_KINDS and (s.mask is None or self.classes_in(i) != ())]

    def subset(self, indices):
        """The same data set with some of its samples."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, samples=[self.samples[i] for i in indices])
        return part

    def tensors(self):
        """All of it, decoded by threads: images uint8 (N, C, H, W), masks uint8 (N, H, W). Needs a size.

        Raises ValueError that names every file that cannot be used.
        """
        def attempt(i):
            try:
                return self[i], None
            except ValueError as error:
                return None, str(error)
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
            pairs, errors = zip(*pool.map(attempt, range(len(self))))
        if errors := [error for error in errors if error]:
            raise ValueError(f"{len(errors)} of {len(self)} samples of {self.name} cannot be used:\n  "
                             + "\n  ".join(errors))
        images, masks = zip(*pairs)
        return torch.stack(images), torch.stack(masks)

    def part(self, split):
        """The samples of one list of the split; see open_dataset."""
        position = {s.name: i for i, s in enumerate(self.samples)}
        splits, rule = self.splits, "split.json"
        if not splits:
            parts = zip(("train", "test"), few_shot_split(self))
            splits = {name: [self.samples[i].name for i in indices] for name, indices in parts}
            rule = f"the first {FEW_SHOT} images of each {'kind' if self.samples[0].kind else 'class'} train"
        if split not in splits:
            raise ValueError(f"{self.name} has no split '{split}'; there are {', '.join(splits)}")
        missing = [name for name in splits[split] if name not in position]
        if missing and not self.problems:
            raise ValueError(f"split.json, '{split}': {len(missing)} images are not there: {listed(missing)}")
        if not splits[split]:
            raise ValueError(f"the split '{split}' of {self.name} is empty ({rule})")
        part = self.subset([position[name] for name in splits[split] if name in position])
        part.split_rule = f"split {split}: {rule}"
        return part


class DrawnDataset(DefectDataset):
    """The embedded drawn products, made on request at any size: 20 images of each kind."""

    def __init__(self, product, annotation):
        kinds, self.product, self.annotation = DRAWN[product].kinds, product, annotation
        samples = [Sample(f"{kind}/{n:03d}", n * len(kinds) + k, kind=kind)
                   for k, kind in enumerate(kinds) for n in range(20)]
        classes = DRAWN[product].classes if annotation == "spectrum" else ("background", "defect")
        super().__init__(f"drawn:{product}", classes, samples, channels=3)

    def read(self, i, size=None):
        image, spectrum, original, _, _ = draw(self.product, 0, self.samples[i].image, size)
        mask = spectrum if self.annotation == "spectrum" else original
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)

    def read_mask(self, i):
        return self.read(i)[1].numpy()


def open_dataset(spec, size=None, split=None, object=None):
    """Open a data set by one word or one path.

    Args:
        spec:   a folder in one of LAYOUTS, one that holds such folders, or drawn:pill | drawn:zipper |
                drawn:wood, with :original behind for one coarse class instead of exact ones.
        size:   (H, W) that images and masks are resized to, or None for each image's own size.
        split:  a list of split.json; where there is none "train" (the first 5 images of each kind, or of each
                class where images are not sorted into kinds) or "test" (the rest). None: everything.
        object: the folder to open when `spec` holds several: "pill", or "DS-MVTec/pill".
    Raises: FileNotFoundError, ValueError: a sentence that names the folder and what it should hold.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width must be at least 1")
    dataset = find_dataset(spec, object)
    if dataset.problems:
        raise ValueError(f"{spec}: {len(dataset.problems)} files find no partner of their name: "
                         + listed(f"{file} ({what})" for what, file in dataset.problems))
    dataset = dataset if split is None else dataset.part(split)
    dataset.size = None if size is None else tuple(size)
    return dataset


def find_dataset(spec, object=None):
    """All samples, with files that find no partner in .problems; see open_dataset."""
    spec = str(spec)
    if spec.startswith("drawn:"):
        _, product, *annotation = spec.split(":")
        if product not in DRAWN or annotation not in ([], ["original"]):
            raise ValueError(f"unknown drawn object '{spec}'; there are "
                             + ", ".join(f"drawn:{p}, drawn:{p}:original" for p in DRAWN))
        return DrawnDataset(product, annotation[0] if annotation else "spectrum")
    root = pick_object(spec, object)
    name, notes, (samples, problems, classes) = root.resolve().name, [], read_layout(root)
    if not samples and not problems:
        raise ValueError(f"--data {root}: no images in it; expected\n{LAYOUTS}")
    if (root / "classes.json").exists():
        classes = read_classes(root / "classes.json")
    elif name in FOREIGN:
        notes += [f"photos of another product: {listed(FOREIGN[name])}"]
        samples = [s for s in samples if s.name not in FOREIGN[name]]
    classes = classes or CLASS_TABLES.get(name) or classes_of_values(root, samples)
    channels = 1 if all(is_grey(s.image) for s in samples) else 3
    return DefectDataset(name, classes, samples, channels, read_splits(root / "split.json"), notes, problems)


def read_splits(path):
    """{name: sample names} of a split.json, {} where there is none."""
    splits = read_json(path) if path.exists() else {}
    lists = splits.values() if isinstance(splits, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError(f'{path}: expected {{"train": ["<kind>/<stem>", ...], "test": [...]}}')
    return splits


def classes_of_values(root, samples):
    """Names for index masks that come without a class table: class_1 up to the highest value."""
    top = 0
    for sample in samples:
        picture = open_picture(sample.mask) if sample.mask else None
        if picture and len(picture.getbands()) == 1:            # a colour mask is reported when it is read
            top = max(top, int(np.array(picture).max()))
    if top > 64:
        raise ValueError(f"{root}: a mask holds the value {top} without a classes.json. If it is 0/255: "
                         f"python data/convert.py {root} --out NEW --layout binary")
    return ("background", *(f"class_{i}" for i in range(1, top + 1)))


# --- layouts ---

def read_layout(root):
    """(samples, problems, classes or None) of a folder in one of LAYOUTS."""
    if (root / "image").is_dir():
        return *find_pairs(root / "image", root / "mask"), None
    if (root / "images").is_dir():
        return *find_pairs(root / "images", root / "masks"), None
    kinds = [p.name for p in folders_in(root / "test") if p.name not in GOOD_KINDS]
    return *find_pairs(root / "test", root / "ground_truth", kinds), ("background", *kinds)


def has_layout(root):
    """Whether a folder is in one of LAYOUTS."""
    both = ("images", "masks"), ("test", "ground_truth")
    return (root / "image").is_dir() or any(all((root / name).is_dir() for name in pair) for pair in both)


def find_pairs(images, masks, binary_kinds=()):
    """(samples, problems) of two folders: their own files, and those of each sub-folder, which is the kind.

    The mask of `stem` is stem_mask or stem: by name, never by position. binary_kinds: the kinds whose masks
    are 0/255, in the order of their classes.
    """
    samples, problems = [], []
    kinds = sorted({p.name for folder in (images, masks) for p in folders_in(folder)}, key=natural)
    for kind in ["", *kinds]:
        photos, unused, partner = files_in(images / kind), files_in(masks / kind), {}
        for end in ("_mask", ""):       # all of the first kind first: an image may itself be called 007_mask
            for stem in photos:
                if stem not in partner and stem + end in unused:
                    partner[stem] = unused.pop(stem + end)
        label = binary_kinds.index(kind) + 1 if kind in binary_kinds else None
        for stem, path in photos.items():
            if stem in partner or kind in GOOD_KINDS:
                name = f"{kind}/{stem}" if kind else stem
                samples.append(Sample(name, path, partner.get(stem), kind, label))
            else:
                problems.append(("no mask", str(path.relative_to(images.parent))))
        problems += [("no image", str(path.relative_to(masks.parent))) for path in unused.values()]
    return samples, problems


def natural(text):
    """Sort key that counts: 2 before 10, '472' before '1836'."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def files_in(folder):
    """Image files directly in a folder, {stem: path}, in natural order; a missing folder gives nothing.

    A second file of one stem is filed under its whole name, so that it comes out as a file without a partner.
    """
    files = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=lambda p: natural(p.name)):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            files[path.name if path.stem in files else path.stem] = path
    return files


def folders_in(folder):
    """Sub-folders in natural order; a missing folder has none."""
    below = [p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."] if folder.is_dir() else []
    return sorted(below, key=lambda p: natural(p.name))


def find_objects(root, depth=3):
    """{path below root: folder} of the data sets at or below root; "" for root itself."""
    if has_layout(root):
        return {"": root}
    found = {}
    for folder in folders_in(root) if depth else ():
        for name, path in find_objects(folder, depth - 1).items():
            found[f"{folder.name}/{name}".rstrip("/")] = path
    return found


def pick_object(spec, name):
    """The one folder that --data and --object mean."""
    root = Path(spec)
    if not root.is_dir():
        there = listed(p.name for p in folders_in(root.parent))
        raise FileNotFoundError(f"--data {root}: no such folder; {root.parent} holds {there}")
    objects = find_objects(root)
    if not objects:
        raise ValueError(f"--data {root}: no layout that is read here, there or below. Expected\n{LAYOUTS}\n"
                         f"Convert any other with: python data/convert.py {root} --out NEW")
    wanted = [n for n in objects if not name or name in (n, n.split("/")[-1])]
    if not wanted:
        raise FileNotFoundError(f"--object {name}: not in {root}; there are {listed(objects, 60)}")
    if len(wanted) > 1:
        raise ValueError(f"--data {root} holds several; choose one with --object: {listed(wanted, 60)}")
    return objects[wanted[0]]


def few_shot_split(dataset):
    """(train, rest): indices of the first FEW_SHOT images of each kind in natural order, and of all others.

    Images without a kind count for each class in their mask: one trains if it is among the first of any.
    """
    seen, train, rest = Counter(), [], []
    for i, sample in enumerate(dataset.samples):
        groups = [sample.kind] if sample.kind else dataset.classes_in(i) or [0]
        (train if any(seen[g] < FEW_SHOT for g in groups) else rest).append(i)
        seen.update(groups)
    return train, rest


def augment(image, mask, names, generator):
    """Change one pair, (C, H, W) and (H, W), at random and alike, with what `names` holds of AUGMENTATIONS.

    flip: both axes, each half of the time; turn: by quarters (halves where H != W). Right only for products
    that may lie that way: a turned zipper is no zipper.
    """
    turn, mirror, upset = torch.rand(3, generator=generator).tolist()     # whichever names are on
    if "turn" in names:
        turns = int(4 * turn) if mask.shape[0] == mask.shape[1] else 2 * int(2 * turn)
        image, mask = image.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))
    axes = [axis for axis, chance in ((-1, mirror), (-2, upset)) if "flip" in names and chance < 0.5]
    return image.flip(axes), mask.flip(axes)


# --- writing: files appear whole or not at all ---

def write_atomically(path, write):
    """write(temporary path), then rename: readers see the whole file or none, a full disk the old one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # RuntimeError: torch's word for a full disk
        raise OSError(f"{path}: cannot be written ({error}); what was there before is unchanged") from None
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


def write_json(path, value):
    """Write plain values; not-a-number becomes null, which JSON has."""
    def plain(v):
        if isinstance(v, dict):
            return {key: plain(part) for key, part in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(part) for part in v]
        return None if isinstance(v, float) and math.isnan(v) else v
    write_atomically(path, lambda p: p.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n"))


def write_image(path, image):
    """Write a uint8 (C, H, W) tensor or array, or a PIL image, as PNG."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        image = Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    write_atomically(path, lambda p: image.save(p, format="PNG"))


def pair_paths(folder, name, kind):
    """Image, mask and colour mask of one pair in the Defect Spectrum layout."""
    folder = Path(folder)
    return (folder / "image" / kind / f"{name}.png", folder / "mask" / kind / f"{name}_mask.png",
            folder / "rgb_mask" / kind / f"{name}_rgb_mask.png")


def write_pair(folder, name, image, mask, kind):
    """Write image uint8 (C, H, W) and mask (H, W), the image last: a pair whose image exists is whole."""
    image_path, mask_path, rgb_path = pair_paths(folder, name, kind)
    mask = np.asarray(mask).astype(np.uint8)
    write_image(rgb_path, colorize(mask))
    write_image(mask_path, mask[None])
    write_image(image_path, image)


def write_classes(folder, classes):
    write_json(Path(folder) / "classes.json", {str(i): name for i, name in enumerate(classes)})


# --- pictures for the eye ---

def colour_index(k):
    """Row of PALETTE of class k: 0 is black and background's alone, more classes than colours begin again."""
    return (k > 0) * (1 + (k - 1) % (len(PALETTE) - 1))


def colorize(mask):
    """Mask (H, W) -> uint8 (3, H, W), one colour per class, black background."""
    return PALETTE[colour_index(np.asarray(mask, int))].transpose(2, 0, 1)


def overlay(image, mask, strength=0.55):
    """Image uint8 (C, H, W) with the class colours laid over -> uint8 (3, H, W)."""
    image, mask = np.asarray(image), np.asarray(mask)
    image = np.broadcast_to(image, (3, *mask.shape))
    mixed = (1 - strength) * image + strength * colorize(mask)
    return np.where(mask > 0, mixed, image).astype(np.uint8)


def sheet(rows, titles=(), classes=(), tile=128):
    """A contact sheet, as a PIL image. rows: list of (caption, [uint8 (C, H, W), ...]), all of one size;
    titles: one per column; classes: a legend of colours. Small pictures are enlarged to about `tile` px.
    """
    height, width = np.asarray(rows[0][1][0]).shape[1:]
    scale, font = max(1, tile // max(height, width)), ImageFont.load_default(13)
    cell_h, cell_w = height * scale + 4, width * scale + 4
    left, top = 8 + max(int(font.getlength(caption)) for caption, _ in rows), 20 if titles else 0
    columns = max(len(pictures) for _, pictures in rows)
    legend = sum(30 + int(font.getlength(name)) for name in classes[1:])
    size = max(left + columns * cell_w, legend), top + len(rows) * cell_h + (24 if classes else 0)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        pen.text((left + c * cell_w, 2), title, "black", font)
    for r, (caption, pictures) in enumerate(rows):
        pen.text((4, top + r * cell_h + cell_h // 2 - 8), caption, "black", font)
        for c, picture in enumerate(pictures):
            array = np.broadcast_to(np.asarray(picture), (3, height, width)).transpose(1, 2, 0)
            small = Image.fromarray(np.ascontiguousarray(array))
            canvas.paste(ImageOps.scale(small, scale, Image.NEAREST), (left + c * cell_w, top + r * cell_h))
    x, y = 4, canvas.height - 20
    for i, name in enumerate(classes[1:], 1):
        pen.rectangle((x, y, x + 14, y + 14), tuple(PALETTE[colour_index(i)].tolist()))
        pen.text((x + 18, y - 1), name, "black", font)
        x += 30 + int(font.getlength(name))
    return canvas


def listed(names, most=8):
    """'a, b, c and 5 more', 'none' for nothing."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def describe(dataset):
    """What was opened and which images were taken: one line, and one for each group of files left out."""
    classes = ", ".join(dataset.classes[1:])
    line = f"{dataset.name}: {len(dataset)} images ({dataset.split_rule}), classes {classes}"
    return "\n".join([line] + [f"  left out, {note}" for note in dataset.notes])


# --- what every command shares ---

def add_data_flags(parser, split):
    """The flags that say which images, the same in every command."""
    parser.add_argument("--data", default="drawn:pill",
                        help="a folder, or drawn:pill | drawn:zipper | drawn:wood (default: %(default)s)")
    parser.add_argument("--object", help="the object to open when --data holds one folder per object")
    parser.add_argument("--split", default=split,
                        help=f"a list of split.json, or train | test (default: {split or 'all images'})")


def pick_device(name=None):
    """The named device, else the accelerator if there is one, else the CPU; one each in torchrun."""
    if name is None:
        name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if str(name) == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                               # calls that name no device mean this one
    return device


def has_bf16(device):
    """Whether bfloat16 pays: CUDA from compute capability 8, Intel CPUs with AMX, AMD ones from Zen 4."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu
    return device.type == "cpu" and (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def run_main(main):
    """Run a command's main(); bad input ends it with one sentence and status 1 instead of a traceback."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the device's memory is full; lower --batch-size or --size")
    except KeyboardInterrupt:
        sys.exit("interrupted")


# --- python datasets.py: the audit ---

def audit(dataset):
    """What a data set holds, counted at native size. A broken file is a row of the audit, not its end.

    Returns a dict: "classes" has for each class its pixels, and the area in px on each image that has it.
    """
    def measure(i):
        try:
            mask = dataset.read(i)[1]
            return tuple(mask.shape), torch.bincount(mask.flatten(), minlength=len(dataset.classes)).tolist()
        except ValueError as error:
            return str(error), None

    problems = [f"{file}: {what}" for what, file in dataset.problems]
    sizes, areas, annotated, several, empty = Counter(), {name: [] for name in dataset.classes}, 0, 0, []
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        measured = list(pool.map(measure, range(len(dataset))))
    for sample, (size, pixels) in zip(dataset.samples, measured):
        if pixels is None:
            problems.append(size)                                   # the error's sentence
            continue
        present = sum(count > 0 for count in pixels[1:])
        sizes["{}x{}".format(*size)] += 1
        annotated += present > 0
        several += present > 1
        for name, count in zip(dataset.classes, pixels):
            areas[name] += [count] if count else []
        if not present and sample.kind not in GOOD_KINDS:
            empty.append(sample.name)
    return {"name": dataset.name, "images": len(dataset), "channels": dataset.channels, "sizes": sizes,
            "kinds": Counter(s.kind or "(no kind)" for s in dataset.samples), "classes": areas,
            "annotated": annotated, "several_classes": several, "empty_masks": empty, "problems": problems}


def print_audit(report, notes=()):
    """Print one data set's audit: kinds, sizes, a row per class, and what is wrong."""
    print(f"\n{report['name']}: {report['images']} images, {'grey' if report['channels'] == 1 else 'RGB'}")
    print("  images per kind:  " + listed((f"{kind} {n}" for kind, n in report["kinds"].items()), 20))
    print("  sizes:            " + listed(f"{size} ({n})" for size, n in report["sizes"].most_common()))
    print(f"  {'class':<24}{'pixels':>14}{'share':>10}{'images':>8}   px per image: least, median, most")
    whole = sum(map(sum, report["classes"].values())) or 1
    for k, (name, areas) in enumerate(report["classes"].items()):
        row = f"  {k:>2} {name:<21}{sum(areas):>14}{sum(areas) / whole:>10.3%}{len(areas):>8}"
        print(row + (f"   {min(areas)}, {np.median(areas):.0f}, {max(areas)}" if areas and k else ""))
    if report["empty_masks"]:
        print(f"  empty masks ({len(report['empty_masks'])}): {listed(report['empty_masks'])}")
    for note in notes:
        print(f"  left out, {note}")
    for problem in report["problems"]:
        print(f"  problem: {problem}")


def contact_sheet(dataset, per_kind=4, tile=160):
    """Images, each beside itself with its mask laid over, defects first; None if nothing can be read."""
    rows, kinds = [], {s.kind: None for s in dataset.samples}
    for kind in sorted(kinds, key=lambda kind: kind in GOOD_KINDS):
        pictures = []
        for i in [i for i, s in enumerate(dataset.samples) if s.kind == kind][:per_kind]:
            try:
                image, mask = dataset.read(i, (tile, tile))
                pictures += [image, overlay(image, mask)]
            except ValueError:
                continue                            # it is in the list of problems
        rows += [(kind, pictures)] if pictures else []
    return sheet(rows, classes=dataset.classes, tile=tile) if rows else None


def main():
    parser = argparse.ArgumentParser(
        description="Audit a data set: what it holds, what is wrong with it, and a contact sheet.",
        epilog="Exit status: 0 nothing is wrong, 1 something is.")
    add_data_flags(parser, split=None)
    parser.add_argument("--sheet", metavar="FILE", type=Path, default=Path("sheet.png"),
                        help="the contact sheet; of several objects, one each (default: %(default)s)")
    args = parser.parse_args()
    objects = find_objects(Path(args.data)) if Path(args.data).is_dir() and not args.object else {}
    names, reports = list(objects) if len(objects) > 1 else [args.object], {}
    for name in names:
        dataset = find_dataset(args.data, name)
        dataset = dataset.part(args.split) if args.split else dataset
        report = reports[name or dataset.name] = audit(dataset)
        print_audit(report, dataset.notes)
        if picture := contact_sheet(dataset):
            ending = "_" + name.replace("/", "_") if len(names) > 1 else ""
            path = args.sheet.with_stem(args.sheet.stem + ending)
            write_image(path, picture)
            print(f"  contact sheet: {path}")
    width = max(map(len, reports))
    print(f"\n{'object':<{width}}  images  annotated  several classes  problems")
    for name, r in reports.items():
        counts = f"{r['images']:6}  {r['annotated']:9}  {r['several_classes']:15}  {len(r['problems']):8}"
        print(f"{name:<{width}}  {counts}")
    return 1 if any(report["problems"] for report in reports.values()) else 0


if __name__ == "__main__":
    run_main(main)
