"""Folders of defect photos with pixel masks -> (image, mask, classes); splits, the audit, writing a data set.

    image   uint8 (C, H, W), C = 1 when every file is grey, else 3
    mask    uint8 (H, W), the value is a class index; 0 is background, 255 (IGNORE) is not to be scored
    kind    the folder an image came from ("crack", "combined", "good"), not its class: masks say that. The
            first images of each kind train where there is no split.json; those of GOOD_KINDS need no mask.

Folders are read in the layouts of LAYOUTS; data/convert.py brings all others into the first of them.
drawn:pill, drawn:zipper and drawn:wood need no files; drawn:pill:original has one coarse class instead.

    python datasets.py --sheet sheet.png                        audit of the drawn pill, and a contact sheet
    python datasets.py --data Defect_Spectrum                   every object below that folder, one row each
    python datasets.py --data Defect_Spectrum --object pill
"""
import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

import inspect_rules
from data.drawn import DRAWN, draw
from inspect_rules import (IGNORE, IMAGE_SUFFIXES, LABELS, find_components, find_runs, grouped, listed,
                           open_picture, read_classes, read_json)

LAYOUTS = """  image/<kind>/<stem>.png with mask/<kind>/<stem>_mask.png, class indices (Defect Spectrum)
  images/<kind>/<stem>.png with masks/<kind>/<stem>.png or <stem>_mask.png, class indices; also without kinds
  images/train/..., images/val/... with masks/train/..., masks/val/...: likewise, in splits
  test/<kind>/<stem>.png with ground_truth/<kind>/<stem>_mask.png, 0/255: the class is the kind (MVTec AD)"""
CONVERT = "Convert any other layout with: python data/convert.py {} --out NEW"
SPLITS = dict(train="train", training="train", trainval="train", val="val", valid="val", validation="val",
              eval="val", dev="val", test="test", testing="test", test_public="test", holdout="test")
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
    "capsule": "crack poke faulty_imprint scratch squeeze", "hazelnut": "cut crack hole print",
    "carpet": "color cut hole metal_contamination thread", "leather": "color cut fold glue poke",
    "grid": "bent broken glue metal_contamination thread", "metal_nut": "scratch bent color",
    "screw": "manipulated_front scratch_head scratch_neck thread_side thread_top",
    "tile": "crack glue_strip gray_stroke oil rough", "toothbrush": "contamination missing messy",
    "transistor": "bent_lead cut_lead damaged_case misplaced",
    "Capacitor": "scratch crush crack", "Console": "scratch bump dirty gap", "Groove": "scratch abrasion",
    "Ring": "friction scratch texture color", "Screw": "bump crush fiber",
    "Wood": "point friction scratch dirty", "DS-DAGM": "scratch texture crush color dirty",
    "DS-Cotton-Fabric": "texture bubble", "synthetic_Cotton_Fabric": "texture bubble"}.items()}}
FOREIGN = {"pill": [f"good/{n:03d}" for n in range(22)]}    # DS-MVTec: metal nuts, uploaded there by mistake

# image: a path, or the number of a drawn picture. mask: a path, or None (a good photo, or a drawn one).
# label: None when the mask file holds class indices; else the class that its pixels >= 128 stand for.
Sample = namedtuple("Sample", "name image mask kind label", defaults=(None, "", None))


# --- reading files: what is wrong is a ValueError that names the file and the reason ---

def to_mode(picture, channels, white=None):
    """A PIL image in mode L or RGB: 16-bit grey is scaled by `white`, alpha dropped, palettes looked up."""
    if picture.mode[0] in "IF":                                 # I, I;16, F: Pillow's modes of 16-bit grey
        narrow = np.nan_to_num(np.asarray(picture, np.float64)) * (255 / (white or 65535))
        picture = Image.fromarray(narrow.clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")       # through RGBA: a palette with transparency warns otherwise
    return picture.convert("L" if channels == 1 else "RGB")


def as_tensor(picture):
    """A PIL image in mode L or RGB, or an array (H, W, 3), as uint8 (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1).contiguous()


def is_grey(path):
    """Whether a picture is grey: by its mode, or decoded. A broken one is reported when it is read."""
    with suppress(Exception), Image.open(path) as picture:
        if picture.mode[0] not in "1LIF":                       # 1, L, LA, I, I;16, F
            red, green, blue = picture.convert("RGB").split()
            return red.tobytes() == green.tobytes() == blue.tobytes()
    return True


def channels_of(samples):
    """1 if all photos are grey, else 3."""
    pictures = [sample.image for sample in samples]             # the first alone: most sets are in colour
    grey = all(map(is_grey, pictures[:1])) and all(same for same, _ in in_threads(is_grey, pictures[1:]))
    return 1 if grey else 3


def white_of(paths):
    """What is white in 16-bit grey photos: the largest value of as few bits as hold those of all of them.

    1 where floats end at 1; None where no photo has 16 bits. One pixel in 10,000 may be hot and brighter.
    """
    def highest(path):
        with suppress(Exception), Image.open(path) as picture:      # a broken one is reported when it is read
            if picture.mode[0] in "IF":
                values = np.nan_to_num(np.asarray(picture)).ravel()
                last = -1 - len(values) // 10_000                   # so many from the brightest
                return np.partition(values, last)[last]
    tops = [top for top, _ in in_threads(highest, paths) if top is not None]
    bits = next((bits for bits in (1, 8, 10, 12, 14) if max(tops, default=0) < 2**bits), 16)
    return 2**bits - 1 if tops else None


def split_of(folder):
    """The split that a folder is called after, "train" of Train, Training Set or train_1; else None."""
    return SPLITS.get(re.sub("[ _-]?(set|images?|img|data|split|[0-9]+)$", "", folder.lower()))


def is_good(kind):
    """Whether photos of a kind, "good" or "line1/good", have no defect."""
    return kind.rpartition("/")[2] in GOOD_KINDS


def in_threads(function, items):
    """Yields (result, None) or (None, the ValueError's sentence) of each item, in order."""
    def attempt(item):
        try:
            return function(item), None
        except ValueError as error:
            return None, str(error)
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        yield from pool.map(attempt, items)


def defects(mask):
    """Where a mask, array or tensor, has a defect: neither background nor IGNORE."""
    return (mask > 0) & (mask != IGNORE)


class DefectDataset:
    """Images with index masks. dataset[i] -> (image uint8 (C, H, W), mask uint8 (H, W)), at `size` if any.

    Attributes: name, classes (tuple, [0] = "background"), samples (list of Sample), channels (1 or 3),
    size ((H, W) or None), kinds (of all images), splits ({name: sample names} of split.json or folders),
    split_rule (what decided which images are here), notes (sentences on how files are read), problems (files
    without a partner, and what they lack), white (of 16-bit grey photos, else None).
    """

    def __init__(self, name, classes, samples, channels, splits=(), notes=(), problems=()):
        self.name, self.classes, self.samples, self.channels = name, tuple(classes), list(samples), channels
        self.splits, self.notes, self.problems = dict(splits), list(notes), list(problems)
        self.size, self.split_rule, self.kinds = None, "all images", {sample.kind for sample in samples}
        self._classes_in = {}                                   # shared by all subsets
        self.white = white_of([sample.image for sample in samples]) if channels == 1 else None
        if self.white not in (None, 65535):
            self.notes.append(f"warning: white is {self.white} here, by the brightest photos")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.read(i, self.size)

    def read(self, i, size=None):
        """Image uint8 (C, H, W) and mask uint8 (H, W) at `size` or native; photos bilinear, masks nearest."""
        path, mask = self.samples[i].image, Image.fromarray(self.read_mask(i))
        picture = open_picture(path)
        if self.white is None and picture.mode[0] in "IF":
            raise ValueError(f"{path}: is 16-bit grey among photos in colour; save it with 8 bits")
        picture = to_mode(picture, self.channels, self.white)
        if picture.size != mask.size:
            raise ValueError(f"{path} is {picture.height}x{picture.width} but its mask is {mask.height}x"
                             f"{mask.width}; they must have the same size (data/convert.py enlarges masks)")
        if size is not None:
            picture = picture.resize(size[::-1], Image.BILINEAR)
            mask = mask.resize(size[::-1], Image.NEAREST)
        return as_tensor(picture), as_tensor(mask)[0]

    def read_mask(self, i):
        """Mask i at native size: uint8 array (H, W), class indices. The photo is not decoded."""
        _, photo, path, _, label = self.samples[i]
        if path is None:
            return np.zeros(open_picture(photo).size[::-1], np.uint8)
        mask, classes = inspect_rules.read_mask(path, self.classes, label), ", ".join(self.classes)
        if ((mask >= len(self.classes)) & (mask != IGNORE)).any():
            raise ValueError(f"{path}: mask has the values {np.unique(mask)[:12].tolist()} but the classes "
                             f"are 0..{len(self.classes) - 1} ({classes}); add those to classes.json")
        return mask.astype(np.uint8)

    def classes_in(self, i):
        """The defect classes in mask i; None if it cannot be read: tensors() reports that."""
        name = self.samples[i].name
        if name not in self._classes_in:
            try:
                mask = self.read_mask(i)
                self._classes_in[name] = tuple(np.unique(mask[defects(mask)]).tolist())
            except ValueError:
                self._classes_in[name] = None
        return self._classes_in[name]

    def defective(self):
        """Indices of the images with a defect, by their masks or, of drawn ones, by their kinds."""
        return [i for i, s in enumerate(self.samples)
                if not is_good(s.kind) and (s.mask is None or self.classes_in(i) != ())]

    def subset(self, indices):
        """The same data set with some of its samples."""
        part = copy(self)
        part.samples = [self.samples[i] for i in indices]
        return part

    def tensors(self):
        """Images uint8 (N, C, H, W), masks uint8 (N, H, W) at `size`. A ValueError names every bad file."""
        pairs, errors = zip(*in_threads(self.__getitem__, range(len(self))))
        if errors := [error for error in errors if error]:
            named = [(error.split(":")[0], error) for error in errors]
            raise ValueError(f"{len(errors)} of {len(self)} samples of {self.name} cannot be used:\n  "
                             + "\n  ".join(grouped(named)))
        images, masks = zip(*pairs)
        return torch.stack(images), torch.stack(masks)

    def part(self, split):
        """The samples of one list of the split; see open_dataset."""
        splits, rule = self.splits, "split.json or folders"
        if not splits:
            seen, splits = Counter(), {"train": [], "test": []}
            for i, sample in enumerate(self.samples):           # without a kind each class of the mask counts
                groups = [sample.kind] if sample.kind else self.classes_in(i) or [0]
                first = any(seen[group] < FEW_SHOT for group in groups)
                splits["train" if first else "test"].append(sample.name)
                seen.update(groups)
            group = "kind" if all(sample.kind for sample in self.samples) else "class"
            rule = f"the first {FEW_SHOT} images of each {group} train"
        if split not in splits:
            raise ValueError(f"{self.name} has no split '{split}'; there are {', '.join(splits)}; choose one "
                             f"with --split, or write a split.json")
        missing = set(splits[split]) - {sample.name for sample in self.samples}
        if missing and not self.problems:
            raise ValueError(f"split.json, '{split}': {len(missing)} images are not there: "
                             f"{listed(sorted(missing))}. A name is like {self.samples[0].name}")
        if not splits[split]:
            raise ValueError(f"the split '{split}' of {self.name} is empty ({rule}); choose another")
        wanted = set(splits[split])             # as they lie in the folder: the order of a list means nothing
        part = self.subset([i for i, sample in enumerate(self.samples) if sample.name in wanted])
        part.split_rule = f"split {split}: {rule}"
        return part


class DrawnDataset(DefectDataset):
    """The embedded drawn products, made on request at any size: 20 images of each kind, or those of other
    numbers. coarse: one class.
    """

    def __init__(self, product, coarse, numbers=range(20)):
        kinds, self.product, self.coarse = DRAWN[product].kinds, product, coarse
        samples = [Sample(f"{kind}/{n:03d}", n * len(kinds) + k, kind=kind)
                   for k, kind in enumerate(kinds) for n in numbers]
        classes = ("background", "defect") if coarse else DRAWN[product].classes
        super().__init__(f"drawn:{product}", classes, samples, channels=3)

    def read(self, i, size=None):
        image, exact, original, _, _ = draw(self.product, 0, self.samples[i].image, size)
        return as_tensor(image), torch.from_numpy(original if self.coarse else exact)

    def read_mask(self, i):
        _, exact, original, _, _ = draw(self.product, 0, self.samples[i].image, lit=False)
        return original if self.coarse else exact


def open_dataset(spec, size=None, split=None, object=None):
    """Open a data set by one word or one path.

    Args:
        spec:   a folder in one of LAYOUTS, one that holds such folders, or drawn:pill | drawn:zipper |
                drawn:wood, with :original behind for one coarse class instead of exact ones.
        size:   (H, W) that images and masks are resized to, or None for each image's own size.
        split:  a list of split.json or a folder; where there is none "train" (the first 5 images of each
                kind, or of each class where images have no kinds) or "test" (the rest). None: everything.
        object: the folder to open when `spec` holds several: "pill", or "DS-MVTec/pill".
    Raises: FileNotFoundError, ValueError: a sentence that names the folder and what it should hold.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width must be at least 1")
    dataset = find_dataset(spec, object)
    if dataset.problems:
        raise ValueError(f"{spec}: {len(dataset.problems)} files find no partner of their name: "
                         f"{listed(dataset.problems)}. data/convert.py reads more ways of naming masks")
    dataset = dataset if split is None else dataset.part(split)
    dataset.size = None if size is None else tuple(size)
    return dataset


def find_dataset(spec, object=None):
    """All samples, with files that find no partner in .problems; see open_dataset."""
    spec = str(spec)
    if spec.startswith("drawn:"):
        drawn = {f"drawn:{p}{ending}": (p, bool(ending)) for p in DRAWN for ending in ("", ":original")}
        if spec not in drawn:
            raise ValueError(f"unknown drawn object '{spec}'; there are {', '.join(drawn)}")
        return DrawnDataset(*drawn[spec])
    root = Path(spec)
    if not root.is_dir():
        there = listed(p.name for p in listing(root.parent) if p.is_dir())
        raise FileNotFoundError(f"--data {root}: no such folder; {root.parent} holds {there}")
    objects = find_objects(root)
    if not objects:
        raise ValueError(f"--data {root}: no layout that is read here, there or below. Expected\n{LAYOUTS}\n"
                         + CONVERT.format(root))
    wanted = [object] if object in objects else [
        name for name in objects if not object or name.split("/")[-1] == object]
    if not wanted:
        raise FileNotFoundError(f"--object {object}: not in {root}; there are {listed(objects, 60)}")
    if all(map(split_of, objects)):
        raise ValueError(f"--data {root} holds {', '.join(objects)}: splits of one object? "
                         + CONVERT.format(root) + f". Or name one: --data {root}/{[*objects][0]}")
    if len(wanted) > 1:
        raise ValueError(f"--data {root} holds several; choose one with --object: {listed(wanted, 60)}")
    return read_folder(*objects[wanted[0]])


def read_folder(photos, masks):
    """The data set of a folder of photos and one of masks, which find_objects finds; see find_dataset."""
    root, notes, binary_kinds, classes = photos.parent, [], [], None
    name = root.resolve().name
    if photos.name == "test":                                   # MVTec AD: its kinds are the classes
        binary_kinds = [p.name for p in listing(photos) if p.is_dir() and p.name not in GOOD_KINDS]
        classes = "background", *binary_kinds
    samples, problems = find_pairs(photos, masks, binary_kinds)
    if not samples and not problems:
        raise ValueError(f"--data {root}: no images in it; expected\n{LAYOUTS}\n{CONVERT.format(root)}")
    if (root / "classes.json").exists():
        classes = read_classes(root / "classes.json")
    elif name in FOREIGN and photos.name == "image":            # DS-MVTec, not MVTec AD itself
        notes = [f"left out, photos of another product: {listed(FOREIGN[name])}"]
        samples = [s for s in samples if s.name not in FOREIGN[name]]
    classes = classes or CLASS_TABLES.get(name) or classes_of_values(root, samples)
    splits, folders = read_splits(root / "split.json"), {}
    inner = sorted({sample.kind for sample in samples if any(map(split_of, sample.kind.split("/")[1:]))})
    if inner and not splits:
        raise ValueError(f"{photos}: folders of splits inside kinds: {listed(inner)}. {CONVERT.format(root)}")
    for sample in samples:
        folders.setdefault(split_of(sample.kind.split("/")[0]), []).append(sample.name)
    if photos.name != "test" and folders.keys() - {None} and not splits:
        if others := sorted({name.split("/")[0] for name in folders.pop(None, [])}):
            raise ValueError(f"{photos}: {listed(others)} lie beside the folder of a split ({min(folders)}); "
                             "move them into train, val or test, or list all names in a split.json")
        samples = [sample._replace(kind=sample.kind.partition("/")[2]) for sample in samples]
        splits = {**folders, "test": folders.get("test") or folders.get("val", [])}
    return DefectDataset(name, classes, samples, channels_of(samples), splits, notes, problems)


def find_objects(root, depth=3):
    """{path below root: (folder of photos, of masks)} of the data sets there; "" is root itself."""
    for photos, masks in ("image", "mask"), ("images", "masks"), ("test", "ground_truth"):
        if (root / photos).is_dir() and (photos == "image" or (root / masks).is_dir()):
            return {"": (root / photos, root / masks)}
    return {f"{folder.name}/{name}".rstrip("/"): found for folder in listing(root) if depth
            for name, found in find_objects(folder, depth - 1).items()}


def find_pairs(photos, masks, binary_kinds=()):
    """(samples, problems) of two folders. The mask of `stem` is stem_mask or stem: never paired by position.

    binary_kinds: the kinds whose masks are 0/255, in the order of their classes.
    """
    found, unused, partner, samples, problems = images_in(photos), images_in(masks), {}, [], []
    for end in ("_mask", ""):           # all of the first kind first: an image may itself be called 007_mask
        for kind, stem in found:
            if (kind, stem) not in partner and (kind, stem + end) in unused:
                partner[kind, stem] = unused.pop((kind, stem + end))
    for (kind, stem), path in found.items():
        if (kind, stem) in partner or is_good(kind):
            name, mask = f"{kind}/{stem}" if kind else stem, partner.get((kind, stem))
            label = binary_kinds.index(kind) + 1 if kind in binary_kinds else None
            samples.append(Sample(name, path, mask, kind, label))
        else:
            problems.append(f"{path.relative_to(photos.parent)} (no mask)")
    return samples, problems + [f"{path.relative_to(masks.parent)} (no image)" for path in unused.values()]


def images_in(folder):
    """{(kind, stem): path} of the images in a folder, whose kind is "", and in those below, the kinds."""
    files, parents = {}, [folder]
    for parent in parents:                                      # grows: all levels, one by one
        inside, above = listing(parent), {path.resolve() for path in (parent, *parent.parents)}     # no loops
        parents += [path for path in inside if path.is_dir() and path.resolve() not in above]
        kind = parent.relative_to(folder).as_posix().lstrip(".")
        for path in inside:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                twin = (kind, path.stem) in files               # a second file of one stem finds no partner
                files[kind, path.name if twin else path.stem] = path
    return files


def listing(folder):
    """What lies in a folder, in natural order (2 before 10), without system files; [] where there is none."""
    def natural(path):
        parts = [part for part in re.split(r"(\d+)", path.name) if part]
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], path.name
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if path.name[0] != "." and path.name != "__MACOSX"), key=natural)


def classes_of_values(root, samples):
    """Names for index masks that come without a class table: class_1 up to the highest value."""
    def highest(path):                  # 0/255 masks are accepted here, to be named below
        mask = inspect_rules.read_mask(path, range(256))
        return int(mask[defects(mask)].max(initial=0) or mask.max())
    tops = in_threads(highest, [sample.mask for sample in samples if sample.mask])
    top = max((top or 0 for top, _ in tops), default=0)         # a broken mask is named when it is read
    if top > 64:
        raise ValueError(f"{root}: a mask holds the value {top} without a classes.json. If it is 0/255: "
                         f"python data/convert.py {root} --out NEW --layout binary")
    return ("background", *(f"class_{i}" for i in range(1, top + 1)))


def read_splits(path):
    """{split: sample names} of a split.json, {} without one; with extensions and back-slashes forgiven."""
    def plain(name):
        stem, end = os.path.splitext(name.replace("\\", "/"))
        return stem if end.lower() in IMAGE_SUFFIXES else stem + end

    splits = read_json(path) if path.exists() else {}
    lists = splits.values() if isinstance(splits, dict) else [None]
    if not all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in lists):
        raise ValueError(f'{path}: expected {{"train": ["<kind>/<stem>", ...], "test": [...]}}')
    splits = {split: [*map(plain, part)] for split, part in splits.items()}
    if both := {*splits.get("train", [])} & {*splits.get("test", [])}:
        raise ValueError(f"{path}: both train and test have {listed(sorted(both))}; take them out of one")
    return splits


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
    """Write plain values; not-a-number and infinity become null, which JSON has."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def write_image(path, image):
    """Write a uint8 (C, H, W) tensor or array, or a PIL image, as PNG."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        image = Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    write_atomically(path, lambda p: image.save(p, format="PNG"))


def pair_paths(folder, name, kind):
    """Image, mask and colour mask of one pair in the Defect Spectrum layout."""
    ends = ("image", ""), ("mask", "_mask"), ("rgb_mask", "_rgb_mask")
    return tuple(Path(folder) / part / kind / f"{name}{end}.png" for part, end in ends)


def write_pair(folder, name, image, mask, kind):
    """Write image uint8 (C, H, W) and mask (H, W), the image last: a pair whose image exists is whole."""
    image_path, mask_path, rgb_path = pair_paths(folder, name, kind)
    mask = np.asarray(mask).astype(np.uint8)
    write_image(rgb_path, colorize(mask))
    write_image(mask_path, mask[None])
    write_image(image_path, image)


def write_classes(folder, classes):
    write_json(Path(folder) / "classes.json", {str(i): name for i, name in enumerate(classes)})


def fingerprint(*parts):
    """16 hex digits of tensors, files (Path) and plain values: what a result that is kept was made from."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(part.numpy().tobytes())
        else:
            digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()[:16]


def begin(folder, classes, settings):
    """Begin a data set, or go on with one that was made with the same settings: see its config.json."""
    config = Path(folder) / "config.json"
    if not config.exists() and any((Path(folder) / part).exists() for part in ("image", "mask")):
        raise ValueError(f"--out {folder}: holds a data set; name a new folder")
    if config.exists() and read_json(config) != settings:
        raise ValueError(f"{folder} holds what was made with other settings or checkpoints, see its "
                         "config.json; remove it, or choose another --out")
    write_classes(folder, classes)
    write_json(config, settings)


# --- pictures for the eye ---

def colorize(mask):
    """Mask (H, W) -> uint8 (3, H, W): black background, IGNORE grey, a colour per class (again after 11)."""
    k = np.asarray(mask, int)
    colours = PALETTE[(k > 0) * (1 + (k - 1) % (len(PALETTE) - 1))]
    colours[k == IGNORE] = 128
    return colours.transpose(2, 0, 1)


def overlay(image, mask, strength=0.55):
    """Image uint8 (C, H, W) with the class colours laid over -> uint8 (3, H, W)."""
    image, mask = np.asarray(image), np.asarray(mask)
    image = np.broadcast_to(image, (3, *mask.shape))
    mixed = (1 - strength) * image + strength * colorize(mask)
    return np.where(mask > 0, mixed, image).astype(np.uint8)


def sheet(rows, titles=(), classes=(), tile=128):
    """A contact sheet, as a PIL image. Small pictures are enlarged to about `tile` px.

    rows: list of (caption, [uint8 (C, H, W), ...]), of one size; titles: one per column; classes: a legend.
    """
    height, width = np.asarray(rows[0][1][0]).shape[1:]
    scale, font = max(1, tile // max(height, width)), ImageFont.load_default(13)
    cell_h = height * scale + 4
    cell_w = max(width * scale + 4, *(int(font.getlength(title)) + 8 for title in titles), 0)
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
            enlarged = Image.fromarray(array.repeat(scale, 0).repeat(scale, 1))
            canvas.paste(enlarged, (left + c * cell_w, top + r * cell_h))
    x, y = 4, canvas.height - 20
    for i, name in enumerate(classes[1:], 1):
        pen.rectangle((x, y, x + 14, y + 14), tuple(colorize([[i]]).ravel().tolist()))
        pen.text((x + 18, y - 1), name, "black", font)
        x += 30 + int(font.getlength(name))
    return canvas


def describe(dataset):
    """What was opened and which images were taken: one line, and one for each group of files left out."""
    classes = ", ".join(dataset.classes[1:])
    first = f"{dataset.name}: {len(dataset)} images ({dataset.split_rule}), classes {classes}"
    return "\n  ".join([first, *dataset.notes])


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
        sys.exit("error: the device's memory is full; take less at a time: --batch-size, --size")
    except KeyboardInterrupt:
        sys.exit("interrupted")


# --- python datasets.py: the audit ---

def in_between(mask):
    """Whether edges of a mask pass through the values in between, as JPEG and smooth enlarging leave them."""
    picture = Image.fromarray(np.where(defects(mask), mask, 0))
    picture = ImageOps.expand(picture.crop(picture.getbbox()), 2)       # with the background around it
    low, high = (np.array(picture.filter(kind(5))) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    return ((low < np.array(picture)) & (np.array(picture) < high)).sum() > 0.1 * (low < high).sum()


def gaps(dataset, finer=1):
    """Sentences on what is not there to learn: kinds without a photo, classes without a pixel, and defects
    that vanish at the size, each pixel of which is taken from `finer` squared.
    """
    def left(i, multiple=1):            # classes of mask i at a multiple of the size
        size = [multiple * finer * n for n in dataset.size[::-1]]
        counts = Image.fromarray(dataset.read_mask(i)).resize(size, Image.NEAREST).histogram()
        return tuple(k for k in whole[i] if counts[k])

    whole = {i: dataset.classes_in(i) for i in dataset.defective()
             if dataset.samples[i].mask and dataset.classes_in(i)}
    here, at_size = dataset.split_rule.split(":")[0], {i: left(i) for i in whole} if dataset.size else whole
    kinds = {kind for kind in dataset.kinds if not is_good(kind)} - {s.kind for s in dataset.samples}
    read = [i for i, s in enumerate(dataset.samples) if s.mask and dataset.classes_in(i) is not None]
    seen = {0}.union(*at_size.values()) if read else range(len(dataset.classes))    # drawn ones are not read
    unseen = [name for k, name in enumerate(dataset.classes) if k not in seen]
    lines = [f"no photo of the kinds {listed(sorted(kinds))} in {here}"] if kinds else []
    lines += [f"no pixel of the classes {listed(unseen)} in {here}"] if unseen else []
    if small := [dataset.samples[i].name for i in at_size if at_size[i] != whole[i]]:
        multiples = (round(2 ** (k / 2)) for k in itertools.count(2))
        enough = next(n for n in multiples if all(left(i, n) == whole[i] for i in at_size))
        lines.append("{} of {} masks lose a defect at {}x{}: {}; --size {} {} keeps all".format(
            len(small), len(at_size), *dataset.size, listed(small, 3), *(enough * n for n in dataset.size)))
    return lines


def audit(dataset):
    """What a data set holds, a dict. "classes": for each, its area in native px on each image that has it."""
    def measure(i):
        sample, drawn = dataset.samples[i], isinstance(dataset, DrawnDataset)
        mask = dataset.read_mask(i) if drawn else dataset.read(i)[1].numpy()    # bad photos are found as well
        counts = np.bincount(mask[mask != IGNORE], minlength=len(dataset.classes))
        share = counts[1:].sum() / mask.size
        good = is_good(sample.kind)
        doubts = {"the mask is empty": not share and sample.mask and not good,
                  "lies among the good ones, but its mask shows a defect": good and share,
                  "nearly all of the mask is defect; is it inverted?": share > 0.8,
                  "edges pass through the classes in between, as JPEG or smooth enlarging leaves them; save "
                  "masks as PNG, enlarge them by nearest": counts[2:].any() and in_between(mask),
                  f"{IGNORE} beside class indices is not to be scored": (mask == IGNORE).any()}
        said = [(sample.name, f"{sample.mask}: {doubt}") for doubt, holds in doubts.items() if holds]
        return "{}x{}".format(*mask.shape), counts, said

    measured = list(in_threads(measure, range(len(dataset))))
    sizes, counts, doubts = [*zip(*(result for result, _ in measured if result))] or [()] * 3
    pixels = np.array(counts).reshape(-1, len(dataset.classes))
    present = (pixels[:, 1:] > 0).sum(1)                        # how many classes, on each image
    problems = [(problem.split(" (")[0], problem) for problem in dataset.problems]
    problems += [(s.name, error) for s, (_, error) in zip(dataset.samples, measured) if error]
    return {"images": len(dataset), "kinds": Counter(s.kind or "(no kind)" for s in dataset.samples),
            "classes": {name: area[area > 0].tolist() for name, area in zip(dataset.classes, pixels.T)},
            "annotated": (present > 0).sum(), "several_classes": (present > 1).sum(), "sizes": Counter(sizes),
            "problems": problems, "warnings": gaps(dataset) + grouped(itertools.chain(*doubts))}


def print_audit(dataset, report):
    """Print one data set's audit: kinds, sizes, a row per class, and what is wrong."""
    print(f"\n{dataset.name}: {len(dataset)} images, {'grey' if dataset.channels == 1 else 'RGB'}")
    print("  images per kind:  " + listed((f"{kind} {n}" for kind, n in report["kinds"].items()), 20))
    if dataset.splits:
        print("  splits:           " + listed(f"{name} {len(part)}" for name, part in dataset.splits.items()))
    print("  height x width:   " + listed(f"{size} ({n})" for size, n in report["sizes"].most_common()))
    print(f"  {'class':<24}{'pixels':>14}{'share':>10}{'images':>8}   px per image: least, median, most")
    whole = sum(map(sum, report["classes"].values())) or 1
    for k, (name, areas) in enumerate(report["classes"].items()):
        row = f"  {k:>2} {name:<21}{sum(areas):>14}{sum(areas) / whole:>10.3%}{len(areas):>8}"
        print(row + (f"   {min(areas)}, {np.median(areas):.0f}, {max(areas)}" if areas and k else ""))
    for word, lines in ("", dataset.notes), ("warning: ", report["warnings"]), (
            "problem: ", grouped(report["problems"])):
        print(*(f"  {word}{line}\n" for line in lines), sep="", end="")
    if dataset.problems:
        print("  data/convert.py reads more ways of naming masks")


def largest(region):
    """(top, left, bottom, right) of the largest component of a region, bool (H, W)."""
    row, start, stop = max(find_components(find_runs(region)), key=lambda runs: (runs[2] - runs[1]).sum())
    return row.min(), start.min(), row.max() + 1, stop.max()


def contact_sheet(dataset, tile=200):
    """A photo of each class, whole and around its largest defect, without and with the mask; None if none."""
    rows = []
    for k, name in enumerate(dataset.classes[1:], 1):
        shown = itertools.islice((i for i in range(len(dataset)) if k in (dataset.classes_in(i) or ())), 3)
        for image, mask in [pair for pair, _ in in_threads(dataset.read, shown) if pair][:1]:
            box = np.array(largest(mask.numpy() == k)).reshape(2, 2)
            reach = max(*(box[1] - box[0]), tile // 8) // 2
            top, left, bottom, right = [*(box[0] - reach).clip(0), *(box[1] + reach)]
            pictures = np.broadcast_to(image, (3, *mask.shape)), overlay(image, mask)
            parts = [*pictures, *(picture[:, top:bottom, left:right] for picture in pictures)]
            padded = (ImageOps.pad(Image.fromarray(part.transpose(1, 2, 0)), (tile, tile)) for part in parts)
            rows.append((name, list(map(as_tensor, padded))))
    return sheet(rows, ("photo", "its mask", "defect", "its mask"), dataset.classes, tile) if rows else None


def main():
    parser = argparse.ArgumentParser(
        description="Audit a data set: what it holds and what is wrong with it.",
        epilog="Exit status: 0 nothing is wrong, 1 something is.")
    add_data_flags(parser, split=None)
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="what vanishes at this size")
    parser.add_argument("--sheet", metavar="FILE", type=Path, help="write a contact sheet: each class, the "
                        "whole photo and its defect; of several objects, one each")
    args = parser.parse_args()
    objects = {} if args.object else find_objects(Path(args.data))
    names, reports = list(objects) if len(objects) > 1 else [args.object], {}
    for name in names:
        dataset = find_dataset(args.data, name)
        dataset = dataset.part(args.split) if args.split else dataset
        dataset.size = args.size
        report = reports[name or dataset.name] = audit(dataset)
        print_audit(dataset, report)
        if args.sheet and (picture := contact_sheet(dataset)):
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
