"""Folders of defect photos with pixel masks -> (image, mask, classes); the drawn data; the audit; writing a data set.

    image   uint8 (C, H, W), C = 1 when every file is grey, else 3
    mask    int64 (H, W), the value is a class index and 0 is background; classes[0] == "background"
    kind    the folder an image came from ("crack", "combined", "good"). It is metadata: a "combined" image holds several
            classes, so the classes of an image are read from its mask, never from its folder.

Folders are read as they are downloaded: LAYOUTS lists the layouts, one small function each. drawn:pill | drawn:zipper |
drawn:wood need no files.

    python datasets.py                                          audit of the drawn pill, and a contact sheet
    python datasets.py --data Defect_Spectrum                   every object below that folder, one row each
    python datasets.py --data Defect_Spectrum --object pill --bench
"""
import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import warnings
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

import inspect_rules
from data.drawn import DRAWN, draw
from inspect_rules import LABELS, read_classes

try:
    import fcntl
except ImportError:                 # Windows: there, nothing keeps a second process out of a run folder
    fcntl = None

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
NO_DEFECT = {"good", "ok", "Normal", "MT_Free"}     # kinds that come without a mask file: all background
ALL = "all"                         # the kind of images that are not sorted into folders: only their masks tell what they show
FEW_SHOT = 5                        # images per kind for training where a data set has no split of its own (the authors' rule)
MEMORY_LIMIT = 4 << 30              # bytes; data up to this size are decoded once and kept as uint8, workers load larger ones
MAX_PIXELS = 1 << 27                # of one image or mask: 134 million, 400 MB as RGB
MAX_JSON = 256 << 20                # bytes
MAX_XML = 16 << 20                  # bytes of one unpacked part of an .xlsx (captions.xlsx has 0.4 MB)
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")     # told by their bytes, whatever the name says; Pillow's other readers stay closed
FITS = ("squash", "pad", "crop")
AUGMENTATIONS = ("flip", "turn", "crop")
PALETTE = np.array([(0, 0, 0), (230, 25, 75), (60, 180, 75), (67, 99, 216), (255, 225, 25), (245, 130, 49), (145, 30, 180),
                    (66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212), (0, 128, 128)], np.uint8)

# Defect Spectrum ships these in its .md files, by object folder: value 1, 2, ... of a mask. Neither alphabetical nor the folders' order.
CLASS_TABLES = {**LABELS, **{name: ("background", *names.split()) for name, names in {
    "bottle": "broken_large broken_small contamination",
    "cable": "bent_wire cable_swap combined cut_inner_insulation cut_outer_insulation missing_cable missing_wire poke_insulation",
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
FOREIGN = {"pill": [f"good/{n:03d}" for n in range(22)]}        # DS-MVTec: photos of metal_nut, uploaded there by mistake
AITEX = {"002": "broken_end", "006": "broken_yarn", "010": "broken_pick", "016": "weft_curling", "019": "fuzzyball", "022": "cut_selvage",
         "023": "crease", "025": "warp_ball", "027": "knots", "029": "contamination", "030": "nep", "036": "weft_crack"}

# image: a path. mask: None (all background), a path, a tuple of paths (their union), or a list of (class index, [x, y, x, y, ...]).
# label: None when a mask file holds class indices; else the class that a binary mask file (>= 128) stands for.
Sample = namedtuple("Sample", "name image mask kind label caption", defaults=(None, ""))


# --- reading files ---
#
# What is wrong with a file is a ValueError that names the file and the reason, whoever reads it; nothing is left out silently.
# Files that find no partner stop open_dataset, files that cannot be read stop tensors() and check(), which name them all at once.
# --skip-bad leaves both out and lists them in notes, and the audit shows them as problems. Nothing that a file says makes us
# read another file: names in split.json and COCO tables are looked up among the files found by listing the data folder.
# Pictures with several frames count as their first one. Sizes are limited (MAX_PIXELS, MAX_JSON, MAX_XML), pipes are not opened.

warnings.simplefilter("ignore", Image.DecompressionBombWarning)                # of Pillow, below MAX_PIXELS


def natural(text):
    """Sort key that counts: 2 before 10, '472' before '1836'; names that differ in case only have an order, too."""
    parts = [part for part in re.split(r"(\d+)", str(text)) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts], str(text)


def shown(name):
    """A name for a message: quoted and escaped where it would break the line."""
    return str(name) if str(name).isprintable() else repr(str(name))


def check_file(path, most=math.inf):
    """Raise ValueError for what is no plain file, for a pipe would be waited on for ever, and for one above `most` bytes."""
    if not os.path.isfile(path):
        raise ValueError(f"{shown(path)}: is a folder, a pipe or a link to nothing, but a file is expected; replace or remove it")
    if os.path.getsize(path) > most:
        raise ValueError(f"{shown(path)}: has {os.path.getsize(path)} bytes, but at most {most:.0f} are read; make it smaller")


def read_json(path):
    """The values of a JSON file. Raises ValueError naming the file."""
    check_file(path, MAX_JSON)
    return inspect_rules.read_json(path)


@contextlib.contextmanager
def _opened(path):
    """A PIL image whose header was read. Raises ValueError naming the file, also for what the caller finds wrong with its pixels."""
    try:
        if not os.path.isfile(path):
            raise OSError("a folder, a pipe or a link to nothing")
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.height}x{picture.width} pixels, but at most {MAX_PIXELS} in all are read")
            yield picture
    except Exception as error:      # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ... by format
        raise ValueError(f"{shown(path)}: cannot be read as an image ({error}); replace or remove the file") from None


def _open(path):
    """A loaded PIL image, turned upright by its EXIF tag. Raises ValueError naming the file."""
    with _opened(path) as picture:
        return ImageOps.exif_transpose(picture)


def _picture(path, channels):
    """A PIL image of mode L or RGB; 16-bit is scaled by 65535, alpha is dropped, palettes are looked up."""
    picture = _open(path)
    if picture.mode.startswith("I") or picture.mode == "F":                     # 16-bit grey in Pillow's modes
        wide = np.nan_to_num(np.asarray(picture, np.float64))
        picture = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")       # through RGBA: a palette with transparency warns otherwise
    return picture.convert("L" if channels == 1 else "RGB")


def _array(picture):
    """A PIL image as uint8 (C, H, W)."""
    array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def read_image(path, channels=3):
    """Read any image file as uint8 (channels, H, W)."""
    return _array(_picture(path, channels))


def read_mask(path, classes, label=None):
    """Read a mask file as uint8 (H, W) of class indices.

    Args: label: None for an index mask; a class index for a binary mask, whose pixels >= 128 become that class (grey edges
    of rescaled masks are cut there).
    Raises: ValueError for colour masks, for 0/255 masks read as index masks and for indices above the class list.
    """
    if label is not None:
        picture = _open(path)
        if picture.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{path}: a binary mask has one channel, this one is {picture.mode} (a colour picture?)")
        values = np.array(picture) * (255 if picture.mode == "1" else 1)
        if 0 < values.max(initial=0) < 16:                          # grey edges alone are brighter than that
            raise ValueError(f"{path}: a binary mask is 0 and 255, this one is 0 to {values.max()}; are its values class indices? "
                             f"Then it needs another layout, see README, 'Your own data'")
        return ((values >= 128) * label).astype(np.uint8)
    with _opened(path) as picture:
        if picture.getexif().get(0x0112, 1) != 1:                   # its image is turned upright, and the mask would lie across it
            raise ValueError("a mask with an EXIF rotation; save it upright")
    mask = inspect_rules.read_mask(path, classes)
    if mask.max(initial=0) >= len(classes) or mask.min(initial=0) < 0:
        raise ValueError(f"{path}: mask has the values {np.unique(mask)[:12].tolist()} but the class list has 0..{len(classes) - 1} "
                         f"({', '.join(classes)}); add the missing classes to classes.json or correct the mask")
    return mask.astype(np.uint8)


def fill_polygon(mask, points, value):
    """Set the pixels of mask (H, W) whose centres lie inside the polygon [x, y, x, y, ...], by the even-odd rule."""
    try:
        x, y = np.asarray(points, np.float64).reshape(-1, 2).T
        assert len(x) and np.isfinite(x).all() and np.isfinite(y).all()
    except (ValueError, TypeError, OverflowError, AssertionError):  # from JSON: anything
        raise ValueError(f"{str(points)[:60]} is not a polygon [x, y, x, y, ...] (run lengths are not read)") from None
    x_next, y_next = np.roll(x, -1), np.roll(y, -1)
    for row in range(max(0, math.floor(y.min())), min(len(mask), math.ceil(y.max()))):
        cut = (y <= row + 0.5) != (y_next <= row + 0.5)
        at = np.sort(x[cut] + (row + 0.5 - y[cut]) * (x_next - x)[cut] / (y_next - y)[cut])
        for left, right in np.ceil(at - 0.5).clip(0).astype(int).reshape(-1, 2):
            mask[row, left:right] = value


def _files(folder):
    """Image files directly in a folder, {stem: path}, in natural order; dot files, other suffixes and a missing folder give nothing.

    A second file of one stem is filed under its whole name, so that it comes out as a file without a partner.
    """
    files = {}
    names = [n for n in os.listdir(folder) if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES and n[0] != "."] if folder.is_dir() else []
    for name in sorted(names, key=natural):
        stem = os.path.splitext(name)[0]
        files[name if stem in files else stem] = folder / name
    return files


def _folders_in(folder):
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: natural(p.name))


def read_captions(path):
    """captions.xlsx of DS-MVTec -> {(object, kind, number): text}.

    Its Path column says pill/crack/000.png, or wood/hole/03643_00111_022.png: the last digits are the number of the image.
    Raises: ValueError naming the file.
    """
    def part(book, name):
        data = book.open(name).read(MAX_XML + 1)
        if len(data) > MAX_XML or b"<!DOCTYPE" in data or b"<!ENTITY" in data or b"\0" in data:         # NUL: UTF-16 would hide the words
            raise ValueError(f"{name} is above {MAX_XML >> 20} MiB, declares entities or is not UTF-8")
        return ET.fromstring(data)

    def text(node):
        return "".join(t.text or "" for t in node.iter(space + "t"))

    space, captions = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}", {}
    try:
        check_file(path)
        with zipfile.ZipFile(path) as book:
            shared = [text(node) for node in part(book, "xl/sharedStrings.xml").iter(space + "si")]
            rows = [{re.match("[A-Z]+", cell.get("r"))[0]: shared[int(cell.find(space + "v").text)]
                     for cell in row.iter(space + "c") if cell.get("t") == "s"}
                    for row in part(book, "xl/worksheets/sheet1.xml").iter(space + "row")]
        column = {title: letter for letter, title in rows[0].items()}
        for row in rows[1:]:
            match = re.fullmatch(r"([^/]+)/([^/]+)/(?:.*_)?(\d{1,9})\.\w+", row.get(column["Path"], ""))
            if match:
                words = (row.get(column[title], "").strip() for title in ("object description", "defect description"))
                captions[match[1], match[2], int(match[3])] = " ".join(filter(None, words))
    except Exception as error:      # zipfile, zlib and the parser raise many types for a damaged file; to the user they are one fact
        raise ValueError(f"{path}: cannot be read as the table of captions ({error})") from None
    return captions


# --- fitting images into a size, and random changes ---

def placed(native, size, fit):
    """(height, width, top, left) that an image of `native` size takes inside `size`: whole for pad, larger than it for crop."""
    if fit == "squash":
        return (*size, 0, 0)
    scale = (min if fit == "pad" else max)(size[0] / native[0], size[1] / native[1])
    height, width = (max(1, round(n * scale)) for n in native)
    return height, width, (size[0] - height) // 2, (size[1] - width) // 2


def fit_picture(picture, size, fit, resample, fill):
    """A PIL image resized into `size` (H, W): squashed, or with its shape kept and then padded with `fill` or cropped at the centre."""
    height, width, top, left = placed(picture.size[::-1], size, fit)
    if height * width > MAX_PIXELS:                                 # crop: the short side of a very long image is enlarged to fill `size`
        raise ValueError(f"{picture.height}x{picture.width} is too long to be cropped to {size[0]}x{size[1]}; use --fit pad or squash")
    if picture.size != (width, height):
        picture = picture.resize((width, height), resample)
    if (height, width) == tuple(size):
        return picture
    canvas = Image.new(picture.mode, tuple(size[::-1]), fill)
    canvas.paste(picture, (left, top))
    return canvas


def unfit(mask, native, fit):
    """A mask (h, w) of a fitted image as a mask of the whole native image, at the scale it has: padding is cut off, and what a
    crop did not see is background. Its pixels then count native area / its own area, as inspect_rules.py has it."""
    height, width, top, left = placed(native, mask.shape, fit)
    whole = Image.new("L", (width, height))
    whole.paste(Image.fromarray(np.asarray(mask, np.uint8)), (-left, -top))
    return np.array(whole)


def augment(images, masks, names, generator):
    """Change each pair of (B, C, H, W) and (B, H, W) at random, image and mask alike, with what `names` holds of AUGMENTATIONS.

    flip: both axes, each half of the time; turn: by quarters (halves where H != W); crop: a window of 0.7 to 1 of each side,
    resized back, masks nearest. Right only for products that may lie that way: a turned zipper is no zipper.
    """
    pairs = []
    for image, mask in zip(images, masks):
        u = torch.rand(7, generator=generator).tolist()                         # the same draws whichever names are on
        h, w = mask.shape
        if "turn" in names:
            turns = int(4 * u[0]) if h == w else 2 * int(2 * u[0])
            image, mask = image.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        if "flip" in names and u[1] < 0.5:
            pair = [v2.functional.horizontal_flip(part) for part in pair]
        if "flip" in names and u[2] < 0.5:
            pair = [v2.functional.vertical_flip(part) for part in pair]
        if "crop" in names:
            height, width = round(h * (0.7 + 0.3 * u[3])), round(w * (0.7 + 0.3 * u[4]))
            top, left = int(u[5] * (h - height + 1)), int(u[6] * (w - width + 1))
            pair = [v2.functional.resized_crop(part, top, left, height, width, [h, w]) for part in pair]
        pairs.append(pair)
    return tuple(torch.stack([part.as_subclass(torch.Tensor) for part in parts]) for parts in zip(*pairs))


def read_names(text):
    """'flip,turn' -> ['flip', 'turn'], checked: the value of --augment."""
    names = [name for name in text.split(",") if name]
    if set(names) - set(AUGMENTATIONS):
        raise argparse.ArgumentTypeError(f"{text}: there are {', '.join(AUGMENTATIONS)}, joined by commas")
    return names


# --- data sets ---

class DefectDataset:
    """Images with index masks. dataset[i] -> (image uint8 (C, H, W), mask int64 (H, W)), resized to `size` where one is given.

    Attributes: name, classes (tuple, [0] = "background"), samples (list of Sample), channels (1 or 3), size ((H, W) or None), fit,
    layout (key of LAYOUTS), split_rule (what decided which images are here), splits (the official one: {list: names}, or {}),
    notes (sentences on files left out), problems (list of (what, file): files that find no partner).
    """
    layout, splits, split_rule, notes, problems, size, fit = "drawn", {}, "all images", (), (), None, "squash"

    def __init__(self, name, classes, samples, **attributes):
        self.name, self.classes, self.samples = name, tuple(classes), list(samples)
        self.__dict__.update(attributes)
        self.channels = 1 if all(_is_grey(s.image) for s in self.samples) else 3
        self._classes_in = {}                                       # shared by all subsets

    def __len__(self):
        return len(self.samples)

    def native_size(self, i):
        """(H, W) of image i on disk, upright."""
        with _opened(self.samples[i].image) as picture:
            turned = picture.getexif().get(0x0112, 1) >= 5
            return picture.size if turned else picture.size[::-1]

    def caption(self, i):
        """One sentence on what image i shows; empty where the data set has none."""
        return self.samples[i].caption

    def classes_in(self, i):
        """Class indices in mask i at native size, without the background; None for a mask that cannot be read. Remembered."""
        sample = self.samples[i]
        if sample.name not in self._classes_in:
            try:
                found = [c for c, _ in sample.mask] if isinstance(sample.mask, list) else self.read_mask(i, (1, 1))
                self._classes_in[sample.name] = tuple(c for c in np.unique(found).tolist() if c)
            except ValueError:
                self._classes_in[sample.name] = None
        return self._classes_in[sample.name]

    def defective(self):
        """Indices of the images with a defect: their masks are not empty. Kinds tell where there are no mask files."""
        return [i for i, s in enumerate(self.samples) if s.kind not in NO_DEFECT
                and (s.mask is None and s.kind != ALL or self.classes_in(i) != ())]

    def read_mask(self, i, shape):
        """Mask i as stored, uint8 (H, W); `shape` is that of its image, for masks that no file holds."""
        sample = self.samples[i]
        if isinstance(sample.mask, (Path, tuple)):
            paths = sample.mask if isinstance(sample.mask, tuple) else [sample.mask]
            return np.maximum.reduce([read_mask(path, self.classes, sample.label) for path in paths])
        mask = np.zeros(shape, np.uint8)
        for index, points in sample.mask or ():
            if not 0 < index < len(self.classes):
                raise ValueError(f"{sample.image}: an annotation has the class {index} but the class list has 1..{len(self.classes) - 1}")
            try:
                fill_polygon(mask, points, index)
            except ValueError as error:
                raise ValueError(f"{sample.image}: {error}") from None
        return mask

    def read(self, i, size=None, fit=None):
        """Image uint8 (C, H, W) and mask uint8 (H, W) at `size` (native when None): images are averaged, masks nearest."""
        sample, fit = self.samples[i], fit or self.fit
        picture = _picture(sample.image, self.channels)
        mask = self.read_mask(i, picture.size[::-1])
        if mask.shape != picture.size[::-1]:
            raise ValueError(f"{sample.image} is {picture.height}x{picture.width} but its mask {sample.mask} is "
                             f"{mask.shape[0]}x{mask.shape[1]}; they must have the same size")
        if size is not None and tuple(size) != mask.shape:
            mean = tuple(np.array(picture.resize((1, 1), Image.BOX)).flatten().tolist()) if fit == "pad" else 0
            try:
                picture = fit_picture(picture, size, fit, Image.BILINEAR, mean)
            except ValueError as error:
                raise ValueError(f"{shown(sample.image)}: {error}") from None
            mask = np.array(fit_picture(Image.fromarray(mask), size, fit, Image.NEAREST, 0))
        return torch.from_numpy(_array(picture)), torch.from_numpy(mask)

    def __getitem__(self, i):
        image, mask = self.read(i, self.size)
        return image, mask.long()

    def subset(self, indices, **attributes):
        """The same data set with some of its samples."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, samples=[self.samples[i] for i in indices], **attributes)
        return part

    def _read_all(self, keep):
        """([pair or None for each sample], [error sentences]), decoded by threads; keep(pair) is what is kept of a pair."""
        def attempt(i):
            try:
                return keep(self.read(i, self.size)), None
            except ValueError as error:
                return None, str(error)
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
            results = list(pool.map(attempt, range(len(self))))
        return [pair for pair, _ in results], [error for _, error in results if error]

    def tensors(self):
        """All of it, decoded once: images uint8 (N, C, H, W), masks uint8 (N, H, W). Every bad file is named in one error."""
        if self.size is None:
            raise ValueError("tensors() needs open_dataset(..., size=(H, W)): images of different sizes do not stack")
        pairs, errors = self._read_all(lambda pair: pair)
        self._raise(errors)
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def check(self):
        """Decode every sample once, keep none: every bad file is named in one error."""
        self._raise(self._read_all(lambda pair: None)[1])

    def _raise(self, errors):
        if errors:
            raise ValueError(f"{len(errors)} of {len(self)} samples of {self.name} cannot be used (--skip-bad leaves them out):\n  "
                             + "\n  ".join(errors[:8]) + (f"\n  and {len(errors) - 8} more" if len(errors) > 8 else ""))

    def readable(self):
        """The samples that can be read, every file decoded once to find out; the others are in notes."""
        good, errors = self._read_all(lambda pair: True)
        notes = [f"{what}: {file}" for what, file in self.problems] + [f"unreadable: {error}" for error in errors]
        return self.subset([i for i, readable in enumerate(good) if readable], notes=[*self.notes, *notes], problems=())

    def part(self, split):
        """The samples of one list of the split; see open_dataset."""
        position = {s.name: i for i, s in enumerate(self.samples)}
        splits, rule = self.splits, self.split_rule
        if not splits:
            splits = dict(zip(("train", "test"), ([self.samples[i].name for i in part] for part in few_shot_split(self))))
            rule = f"the first {FEW_SHOT} images of each {'mask class' if any(s.kind == ALL for s in self.samples) else 'kind'} train"
        if split not in splits:
            raise ValueError(f"{self.name} has no split '{split}'; there are {', '.join(splits)}")
        missing = [name for name in splits[split] if name not in position]
        if missing and not self.problems:
            raise ValueError(f"split.json, '{split}': no such images in {self.name} ({len(missing)}): {listed(missing)}")
        if not splits[split]:
            raise ValueError(f"the split '{split}' of {self.name} is empty ({rule})")
        return self.subset([position[name] for name in splits[split] if name in position], split_rule=f"split {split}: {rule}")


def _is_grey(path):
    """Whether a file is grey by its header. A file that cannot be opened does not decide; it is reported when it is read."""
    try:
        with _opened(path) as picture:
            return picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16")
    except ValueError:
        return True


class DrawnDataset(DefectDataset):
    """The drawn products of drawn.py, made on request at any size: 20 images of each kind."""

    def __init__(self, product, annotation="spectrum"):
        kinds = DRAWN[product].kinds
        self.product, self.annotation = product, annotation
        samples = [Sample(f"{kind}/{n:03d}", None, None, kind, n * len(kinds) + k)      # label: the index to draw
                   for k, kind in enumerate(kinds) for n in range(20)]
        super().__init__(f"drawn:{product}", DRAWN[product].classes if annotation == "spectrum" else ("background", "defect"), samples)
        self.channels = 3

    def native_size(self, i):
        return DRAWN[self.product].native

    def caption(self, i):
        return draw(self.product, 0, self.samples[i].label, (8, 8))[4]

    def read(self, i, size=None, fit=None):
        """Drawn at `size`, whatever `fit` is: there is no photo whose shape it could spoil."""
        image, spectrum, original, _, _ = draw(self.product, 0, self.samples[i].label, size)
        mask = spectrum if self.annotation == "spectrum" else original
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


def open_dataset(spec, size=None, split=None, object=None, annotation="spectrum", original=None, layout=None, fit="squash", skip_bad=False):
    """Open a data set by one word or one path.

    Args:
        spec:   a folder in one of LAYOUTS, one that holds such folders, or "drawn:pill" | "drawn:zipper" | "drawn:wood".
        size:   (H, W) that images and masks are brought to, or None for each image's own size.
        split:  a list of split.json; where there is none, of the official split (VISION, DAGM2007, KolektorSDD2); else "train" |
                "test": the first 5 images of each kind, or of each mask class where images are not sorted by kind, and the rest.
                None: everything.
        object: the folder to open when `spec` holds one per object: "pill", or "DS-MVTec/pill".
        annotation: "spectrum" (one class per pixel) or "original" (one binary mask per image: MVTec AD's at `original`, the folder of
                its objects or one of them, for the images of DS-MVTec; coarse ones for drawn data).
        layout: a key of LAYOUTS, to overrule what the folder looks like.
        fit:    "squash" | "pad" | "crop", see fit_picture.
        skip_bad: leave out files without a partner and samples that cannot be read (each is decoded once to find out).
    Raises: FileNotFoundError, ValueError: a sentence that names the folder and what it should hold.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width must be at least 1")
    dataset = find_dataset(spec, object, annotation, original, layout)
    if dataset.problems and not skip_bad:
        kinds = {what: [file for w, file in dataset.problems if w == what] for what, _ in dataset.problems}
        raise ValueError(f"{spec}: files do not pair by name as layout {dataset.layout} has it ({LAYOUTS[dataset.layout].look}). "
                         + "; ".join(f"{what} ({len(files)}): {listed(files)}" for what, files in kinds.items())
                         + ". Correct them, or leave them out with --skip-bad")
    dataset = dataset if split is None else dataset.part(split)
    dataset = dataset.readable() if skip_bad else dataset
    if not len(dataset):
        raise ValueError(f"--data {spec}: no image can be used, --skip-bad left all of them out: {listed(dataset.notes, 4)}")
    return dataset.subset(range(len(dataset)), size=size, fit=fit)


def find_dataset(spec, object=None, annotation="spectrum", original=None, layout=None):
    """All samples at native size, with what is wrong by the names of the files in .problems; see open_dataset."""
    spec = str(spec)
    if spec.startswith("drawn:"):
        product = spec.split(":", 1)[1]
        if product not in DRAWN:
            raise ValueError(f"unknown drawn object '{product}'; there are {', '.join('drawn:' + p for p in DRAWN)}")
        return DrawnDataset(product, annotation)
    root = Path(spec) / object if layout and object else Path(spec) if layout else pick_object(spec, object)
    layout = layout or layout_of(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder")
    name, found = root.resolve().name, Listing(root)
    LAYOUTS[layout].read(root, found)
    if not found.samples and not found.problems:
        raise ValueError(f"--data {root}: no images where layout {layout} has them: {LAYOUTS[layout].look}")
    foreign = {s.name for s in found.samples if re.search("[\ud800-\udfff]", s.name)}        # from bytes that are no UTF-8: no report could hold them
    found.problems += [("images whose names are not valid UTF-8", name) for name in sorted(foreign)]
    found.samples = [s for s in found.samples if s.name not in foreign]
    if (root / "classes.json").exists():
        check_file(root / "classes.json", MAX_JSON)
        found.classes = read_classes(root / "classes.json")
    elif found.classes is None:
        found.classes = CLASS_TABLES.get(name) or classes_of_values(root, found.samples)
    if not all(c.isprintable() for c in found.classes):
        raise ValueError(f"{root}: class names with characters that cannot be printed: {listed(c for c in found.classes if not c.isprintable())}")
    if (root / "split.json").exists():
        splits, rule = read_json(root / "split.json"), "split.json"
        if not (isinstance(splits, dict) and splits and all(isinstance(names, list) and all(isinstance(n, str) for n in names)
                                                            for names in splits.values())):
            raise ValueError(f'{root / "split.json"}: expected {{"train": ["<kind>/<stem>", ...], "test": [...]}}')
    else:
        splits, rule = found.splits, "official, by the folders on disk" if found.splits else "all images"
    dataset = DefectDataset(name, found.classes, found.samples, layout=layout, splits=splits, split_rule=rule, notes=found.notes,
                            problems=found.problems)
    return dataset if annotation == "spectrum" else with_original_masks(dataset, original)


def classes_of_values(root, samples):
    """Names for index masks that come without a class table: class_1 up to the highest value."""
    top = 0
    for path in (s.mask for s in samples if isinstance(s.mask, Path)):
        try:
            picture = _open(path)
        except ValueError:
            continue                                                # reported when the sample is read
        if len(picture.getbands()) == 1:                            # a colour mask is reported then, too
            top = max(top, int(np.array(picture).max()))
    if top > 64:
        raise ValueError(f"{root}: there is no classes.json and a mask holds the value {top}. Index masks hold 0..K; if these are "
                         f"0/255 masks of one defect class, say --layout binary. See README, 'Your own data'")
    return ("background", *(f"class_{i}" for i in range(1, top + 1)))


def with_original_masks(dataset, original):
    """The images of DS-MVTec with the binary masks of the same images in MVTec AD, by object, kind and stem."""
    if original is None:
        raise ValueError(f"{dataset.name}: the original annotation is in MVTec AD; give its folder with --original")
    root = next((p for p in (Path(original) / dataset.name, Path(original)) if (p / "ground_truth").is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"--original {original}: neither {dataset.name}/ground_truth nor ground_truth is there")
    samples, problems = [], list(dataset.problems)
    for s in dataset.samples:
        masks = _files(root / "ground_truth" / s.kind)
        mask = next((masks[s.image.stem + end] for end in ("_mask", "") if s.image.stem + end in masks), None)
        if mask or s.kind in NO_DEFECT:
            samples.append(s._replace(mask=mask, label=1))
        else:
            problems.append(("images without an original mask", s.name))
    return DefectDataset(dataset.name, ("background", "defect"), samples, layout=dataset.layout, splits=dataset.splits,
                         split_rule=dataset.split_rule, notes=dataset.notes, problems=problems)


# --- layouts: one function each, which fills a Listing from the names of the files ---

class Listing:
    """What a layout's function finds in a folder: samples, classes (None: index masks, see find_dataset), splits, notes, problems."""

    def __init__(self, root):
        self.root, self.samples, self.classes, self.splits, self.notes, self.problems = root, [], None, {}, [], []

    def pair(self, images, masks, kind=ALL, folder="", label=None, ends=("_mask", "")):
        """Add a sample for each image. The mask of `stem` is stem + one of `ends`: by name, never by position."""
        masks = dict(masks)
        found = {}
        for end in ends:                                            # all exact partners first: an image may itself be called 007_mask
            found.update({stem: masks.pop(stem + end) for stem in images if stem not in found and stem + end in masks})
        for stem, path in images.items():
            if stem not in found and kind not in NO_DEFECT:
                self.problems.append(("images without a mask", str(path.relative_to(self.root))))
            else:
                self.samples.append(Sample(f"{folder}/{stem}" if folder else stem, path, found.get(stem), kind, label))
        self.problems += [("masks without an image", str(p.relative_to(self.root))) for p in masks.values()]

    def pair_kinds(self, images, masks, label=lambda kind: None):
        """pair() in each folder that one of the two holds; label(kind): the class of its masks where they are binary."""
        kinds = {p.name for root in (images, masks) if root.is_dir() for p in _folders_in(root)}
        for kind in sorted(kinds, key=natural):
            self.pair(_files(images / kind), _files(masks / kind), kind, kind, label(kind))


def _defect_spectrum(root, found):
    found.pair_kinds(root / "image", root / "mask")
    if root.resolve().name in FOREIGN and not (root / "classes.json").exists():
        foreign = [s for s in found.samples if s.name in FOREIGN[root.resolve().name]]
        found.samples = [s for s in found.samples if s not in foreign]
        found.notes += [f"photos of another product: {listed(s.name for s in foreign)}"] if foreign else []
    if (root.parent / "captions.xlsx").exists():
        try:
            captions = read_captions(root.parent / "captions.xlsx")
            number = lambda s: int(re.search(r"\d{0,9}$", s.image.stem)[0] or -1)
            found.samples = [s._replace(caption=captions.get((root.resolve().name, s.kind, number(s)), "")) for s in found.samples]
        except ValueError as error:
            found.notes.append(f"captions: {error}")


def _flat(root, found):
    found.pair(_files(root / "image"), _files(root / "mask"))


def _synthetic(root, found):
    """The key of a file is what stands around samples_image_ or samples_converted_mask_: 2_samples_image_000001_0_1."""
    images, masks = ({re.sub(f"samples_{word}_", "", stem): path for stem, path in _files(root / folder).items()}
                     for folder, word in (("images", "image"), ("masks_converted_dir", "converted_mask")))
    found.pair(images, masks)


def _plain(root, found):
    found.pair(_files(root / "images"), _files(root / "masks"))
    found.pair_kinds(root / "images", root / "masks")


def _binary(root, found):
    images, masks = (root / word if (root / word).is_dir() else root / f"{word}s" for word in ("image", "mask"))
    found.classes = ["background", "defect"]
    found.pair(_files(images), _files(masks), label=1)
    found.pair_kinds(images, masks, lambda kind: 1)


def _mvtec(root, found):
    kinds = [p.name for p in _folders_in(root / "test") if p.name not in NO_DEFECT]
    found.classes = ["background", *kinds]
    found.pair_kinds(root / "test", root / "ground_truth", lambda kind: kinds.index(kind) + 1 if kind in kinds else None)


def _vision(root, found):
    """COCO: all polygons of an image into one mask, category_id + 1; images[].file_name names the file, not images[].id."""
    names = {}
    for part, splits in (("train", ["train"]), ("val", ["val", "test"])):       # "test" is what the commands score on by default
        path = root / part / "_annotations.coco.json"
        if not path.exists():
            continue
        table, polygons = read_json(path), {}
        stems = {file.name: stem for stem, file in _files(root / part).items()}
        try:
            names.update((int(c["id"]), str(c["name"])) for c in table["categories"])
            for a in table["annotations"]:
                shapes = a["segmentation"] if isinstance(a["segmentation"], list) else [None]           # else: run lengths
                polygons.setdefault(a["image_id"], []).extend((int(a["category_id"]) + 1, points) for points in shapes)
            listing = [(Path(str(i["file_name"])).name, polygons.get(i["id"], [])) for i in table["images"]]
            if not all(0 <= i < 255 for i in names):
                raise ValueError(f"category ids {listed(names)}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: not a COCO table of images, annotations with polygons, and categories ({error!r})") from None
        found.problems += [("images of the table that are missing", f"{part}/{file}") for file, _ in listing if file not in stems]
        samples = [Sample(f"{part}/{stems[file]}", root / part / file, mask, ALL) for file, mask in listing if file in stems]
        found.samples += samples
        found.splits.update(dict.fromkeys(splits, [s.name for s in samples]))
    found.classes = ["background", *(names.get(i, f"class_{i + 1}") for i in range(max(names, default=-1) + 1))]


def _dagm2007(root, found):
    found.classes = ["background", "defect"]
    for part in ("Train", "Test"):
        images, masks = _files(root / part), _files(root / part / "Label")
        marked = {stem: path for stem, path in images.items() if stem + "_label" in masks}
        found.pair(marked, masks, "defect", part, 1, ("_label",))
        found.pair({stem: path for stem, path in images.items() if stem not in marked}, {}, "good", part)
        found.splits[part.lower()] = [s.name for s in found.samples if s.name.startswith(part)]


def _kolektor2(root, found):
    found.classes = ["background", "defect"]
    for part in ("train", "test"):
        files = _files(root / part)
        masks = {stem: path for stem, path in files.items() if stem.endswith("_GT")}
        found.pair({stem: path for stem, path in files.items() if stem not in masks}, masks, ALL, part, 1, ("_GT",))
        found.splits[part] = [s.name for s in found.samples if s.name.startswith(part)]


def _visa(root, found):
    images, masks = root / "Data" / "Images", root / "Data" / "Masks"
    found.pair(_files(images / "Anomaly"), _files(masks / "Anomaly"), ALL, "Anomaly")
    found.pair(_files(images / "Normal"), {}, "Normal", "Normal")


def _magnetic_tile(root, found):
    """Photos are .jpg, their masks .png of the same stem beside them."""
    kinds = [p.name for p in _folders_in(root) if p.name.startswith("MT_")]
    found.classes = ["background", *(kind[3:].lower() for kind in kinds if kind not in NO_DEFECT)]
    for kind in kinds:
        files = list(_files(root / kind / "Imgs").values())
        images, masks = ({p.stem: p for p in files if (p.suffix.lower() == ".png") == is_mask} for is_mask in (False, True))
        found.pair(images, masks, kind, kind, found.classes.index(kind[3:].lower()) if kind not in NO_DEFECT else 1)


def _aitex(root, found):
    """<number>_<defect code>_<fabric>.png. Two images have two masks, _mask1 and _mask2; one has none and is left out."""
    images, masks = _files(root / "Defect_images"), {}
    for stem, path in _files(root / "Mask_images").items():
        key = re.sub(r"_mask\d$", "_mask", stem)
        masks[key] = (*masks.get(key, ()), path)
    without = [stem for stem in images if stem + "_mask" not in masks]
    found.notes += [f"defects without a mask: {listed(without)}"] if without else []
    codes = {stem: stem.split("_")[1] if "_" in stem else stem for stem in images if stem not in without}
    names = sorted(set(codes.values()))
    found.classes = ["background", *(AITEX.get(code, code) for code in names)]
    for code in names:
        mine = [stem for stem in codes if codes[stem] == code]
        kind = AITEX.get(code, code)
        found.pair({stem: images[stem] for stem in mine}, {f"{stem}_mask": masks.pop(f"{stem}_mask") for stem in mine}, kind, kind,
                   names.index(code) + 1)
    found.problems += [("masks without an image", path.name) for paths in masks.values() for path in paths]
    for folder in _folders_in(root / "NODefect_images"):
        found.pair(_files(folder), {}, "good", f"good/{folder.name}")


def _has(folder, *patterns):
    return all(next(folder.glob(pattern), None) for pattern in patterns)


def _has_folder(folder):
    return folder.is_dir() and bool(_folders_in(folder))


# look: for the reader of a message; fits: whether a folder is one; read: fills the Listing. The first that fits is taken.
Layout = namedtuple("Layout", "look fits read")
LAYOUTS = {
    "defect-spectrum": Layout("image/<kind>/<stem>.png with mask/<kind>/<stem>_mask.png, class indices (Defect Spectrum)",
                              lambda p: _has_folder(p / "image"), _defect_spectrum),
    "flat": Layout("image/<stem>.jpg with mask/<stem>_mask.png, class indices (DS-VISION, DS-Cotton-Fabric, DS-DAGM)",
                   lambda p: bool(_files(p / "image")), _flat),
    "synthetic": Layout("images/samples_image_<key>.png with masks_converted_dir/samples_converted_mask_<key>.png (synthetic_*)",
                        lambda p: _has(p, "images", "masks_converted_dir"), _synthetic),
    "plain": Layout("images/<stem>.png with masks/<stem>.png or <stem>_mask.png, class indices; sub-folders are kinds",
                    lambda p: _has(p, "images", "masks"), _plain),
    "binary": Layout("as defect-spectrum, flat or plain, but masks are 0/255 of one class (only by --layout)", lambda p: False, _binary),
    "mvtec": Layout("test/<kind>/ with ground_truth/<kind>/<stem>_mask.png, 0/255: the class is the kind (MVTec AD, BTAD)",
                    lambda p: _has(p, "test", "ground_truth"), _mvtec),
    "vision": Layout("train/ and val/ with _annotations.coco.json (VISION)", lambda p: _has(p, "*/_annotations.coco.json"), _vision),
    "dagm2007": Layout("Train/ and Test/ with Label/<stem>_label.PNG, 0/255 (DAGM2007)",
                       lambda p: _has(p, "T[re][as]*/Label"), _dagm2007),
    "kolektor2": Layout("train/ and test/ with <stem>_GT.png beside <stem>.png, 0/255 (KolektorSDD2)",
                        lambda p: _has(p, "t[re][as]*/*_GT.png"), _kolektor2),
    "visa": Layout("Data/Images/Anomaly and Normal with Data/Masks/Anomaly, class indices (VisA)", lambda p: _has(p, "Data/Images"), _visa),
    "magnetic-tile": Layout("MT_<kind>/Imgs/<stem>.jpg with <stem>.png, grey edges (MTD)", lambda p: _has(p, "MT_*/Imgs"), _magnetic_tile),
    "aitex": Layout("Defect_images/ with Mask_images/<stem>_mask.png, 0/255 (AITEX)",
                    lambda p: _has(p, "Defect_images", "Mask_images"), _aitex),
}


def layout_of(root):
    """The key of LAYOUTS that a folder looks like, or None."""
    return next((name for name, layout in LAYOUTS.items() if root.is_dir() and layout.fits(root)), None)


def find_objects(root, depth=3, above=()):
    """{name: folder} of the data sets at or below root: the name is the path from there, "" for root itself."""
    if layout_of(root):
        return {"": root}
    above = (*above, os.path.realpath(root))
    below = [p for p in _folders_in(root) if os.path.realpath(p) not in above] if depth else []         # a link may lead back up
    return {f"{p.name}/{name}".rstrip("/"): path for p in below for name, path in find_objects(p, depth - 1, above).items()}


def pick_object(spec, name):
    """The one folder that --data and --object mean; real photos before synthetic ones of the same object."""
    root = Path(spec)
    if not root.is_dir():
        there = [p.name for p in _folders_in(root.parent)] if root.parent.is_dir() else []
        raise FileNotFoundError(f"--data {root}: no such folder; " + (f"{root.parent} holds {listed(there)}" if there else
                                "give a folder or one of " + ", ".join("drawn:" + p for p in DRAWN)))
    objects = find_objects(root)
    if not objects:
        raise ValueError(f"--data {root}: no known layout, there or below. Found {listed(p.name for p in root.iterdir())}; expected one of\n  "
                         + "\n  ".join(f"{key}: {layout.look}" for key, layout in LAYOUTS.items()))
    fits = [name] if name in objects else [n for n in objects if not name or name == n.split("/")[-1]]
    fits = [n for n in fits if name and "synthetic_" not in n] or fits
    if len(fits) == 1:
        return objects[fits[0]]
    if not fits:
        raise FileNotFoundError(f"--object {name}: " + (f"{root} is one object itself, leave --object out" if list(objects) == [""] else
                                                        f"not in {root}; there are {listed(objects, 60)}"))
    raise ValueError(f"--data {root} holds {len(fits)} data sets{' of that name' if name else ''}; choose one with --object: {listed(fits, 60)}")


def few_shot_split(dataset, n=FEW_SHOT):
    """(train, rest): indices of the first n images of each kind in natural order, and of all others (the authors' split).

    Images that are not sorted by kind count for each class in their mask: one trains if it is among the first n of any.
    """
    seen, train, rest = Counter(), [], []
    for i, sample in enumerate(dataset.samples):
        groups = [sample.kind] if sample.kind != ALL else dataset.classes_in(i) or [0]
        (train if any(seen[g] < n for g in groups) else rest).append(i)
        seen.update(groups)
    return train, rest


def listed(names, most=8):
    """'a, b, c and 5 more', 'none' for nothing."""
    names = [shown(n) for n in names]
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


# --- writing ---

def write_atomically(path, write):
    """write(temporary path), then rename: a reader sees the whole file or none, and a full disk keeps the old one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error}), what was there before is unchanged; make room, or choose "
                      f"another folder") from None
    finally:
        with contextlib.suppress(OSError):                          # the folder may not be there at all
            temporary.unlink()


def remove_leftovers(folder, older_than_s=0):
    """Remove the temporary files of writes that were killed, which no reader looks at."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):                # a write beside this one may just have ended
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def write_json(path, value):
    """Write plain values; not-a-number becomes null, which JSON has."""
    def plain(v):
        if isinstance(v, dict):
            return {key: plain(part) for key, part in v.items()}
        return [plain(part) for part in v] if isinstance(v, (list, tuple)) else None if isinstance(v, float) and math.isnan(v) else v
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
    return PALETTE[colour_index(np.asarray(mask))].transpose(2, 0, 1)


def overlay(image, mask, strength=0.55):
    """Image uint8 (C, H, W) with the class colours laid over -> uint8 (3, H, W)."""
    image, mask = np.asarray(image), np.asarray(mask)
    image = np.broadcast_to(image, (3, *mask.shape))
    mixed = (1 - strength) * image + strength * colorize(mask)
    return np.where(mask > 0, mixed, image).astype(np.uint8)


def sheet(rows, titles=(), classes=(), tile=128):
    """A contact sheet. rows: list of (caption, [uint8 (C, H, W), ...]); titles: one per column; classes: a legend of colours.

    Tiles are enlarged by whole factors to about `tile` px, without smoothing. Returns a PIL image.
    """
    rows = [(shown(caption), tiles) for caption, tiles in rows]     # a kind is the name of a folder, which may hold a line break
    height, width = np.asarray(rows[0][1][0]).shape[1:]
    scale = max(1, tile // max(height, width))
    cell_h, cell_w = height * scale + 4, width * scale + 4
    font, columns = ImageFont.load_default(13), max(len(tiles) for _, tiles in rows)
    left = 8 + max(int(font.getlength(caption)) for caption, _ in rows)
    top = 20 if titles else 0
    bottom = 24 if classes else 0
    legend = sum(30 + int(font.getlength(c)) for c in classes[1:])
    canvas = Image.new("RGB", (max(left + columns * cell_w, legend), top + len(rows) * cell_h + bottom), "white")
    pen = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        pen.text((left + c * cell_w, 2), title, "black", font)
    for r, (caption, tiles) in enumerate(rows):
        pen.text((4, top + r * cell_h + cell_h // 2 - 8), caption, "black", font)
        for c, picture in enumerate(tiles):
            array = np.broadcast_to(np.asarray(picture), (3, height, width)).transpose(1, 2, 0)
            big = Image.fromarray(np.ascontiguousarray(array)).resize((width * scale, height * scale), Image.NEAREST)
            canvas.paste(big, (left + c * cell_w, top + r * cell_h))
    x = 4
    for i, name in enumerate(classes[1:], 1):
        y = canvas.height - 20
        pen.rectangle((x, y, x + 14, y + 14), tuple(PALETTE[colour_index(i)].tolist()))
        pen.text((x + 18, y - 1), name, "black", font)
        x += 30 + int(font.getlength(name))
    return canvas


# --- what every command shares ---

def world():
    """(rank, number) of the processes that torchrun started; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name=None):
    """The named device, else the accelerator if there is one, else the CPU. Raises ValueError for one that is not there.

    Each process of torchrun has a GPU of its own; CUDA calls that name no device mean that one.
    """
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
        torch.cuda.set_device(device)
    return device


def has_bf16(device):
    """Whether bfloat16 pays on this device: CUDA from compute capability 8, CPUs with AMX.

    AVX-512's bfloat16 products alone do not settle it: where a virtual machine hides AMX they run at half the rate of fp32 ones.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def check_compiler():
    """Raise ValueError if torch.compile would find no C++ compiler."""
    wanted = shlex.split(os.environ.get("CXX", "g++"))[0]
    if not any(map(shutil.which, (wanted, "g++", "clang++", "cl"))):
        raise ValueError(f"--compile needs a C++ compiler, but neither {wanted}, clang++ nor cl is installed; install one or leave --compile out")


@contextlib.contextmanager
def claimed(folder):
    """Keep a folder for this process: a second one gets a ValueError that names the first. The system lets go when a process dies."""
    with open(Path(folder) / ".lock", "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder} is in use by {file.read() or 'another process'}; wait for it, end it, or choose another --out") from None
        except OSError as error:                                    # some network drives have no locks
            print(f"warning: {folder} cannot be locked ({error.strerror}); see to it that no other process trains there", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def interruptible():
    """Within it the first SIGINT or SIGTERM is only noted, in the list that this yields; another one stops at once.

    Not one within a second of the first: schedulers and torchrun may both pass the same signal on.
    """
    received, old = [], {}

    def restore():
        for signum, handler in old.items():
            signal.signal(signum, handler)

    def note(signum, frame):
        if not received:
            received.extend((signum, time.monotonic()))
            os.write(2, b"\nstopping as soon as what is begun is whole; once more stops at once\n")          # print is not for handlers
        elif time.monotonic() - received[1] > 1:
            restore()
            signal.raise_signal(signum)

    old.update({signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield received
    finally:
        restore()


def ignore_signals(worker):
    """For worker processes, which get the terminal's Ctrl-C too: their parent decides when they end."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def same_command(*more):
    """The command that started this process, or all those of its torchrun, with more flags where it lacks them."""
    processes = world()[1]
    launcher = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', processes)}", "--"] if processes > 1 else ["python"]
    return shlex.join([*launcher, *sys.argv, *(flag for flag in more if flag not in sys.argv)])


DATA_OPTIONS = ("object", "layout", "fit", "skip_bad")      # flags of add_data_flags that open_dataset takes under the same name


def add_data_flags(parser, split):
    """The flags that say which images, the same in every command."""
    parser.add_argument("--data", default="drawn:pill", help="a folder, or drawn:pill | drawn:zipper | drawn:wood (default: %(default)s)")
    parser.add_argument("--object", help="the object to open when --data holds one folder per object")
    parser.add_argument("--layout", choices=LAYOUTS, help="how the folder is laid out (default: found by looking at it)")
    parser.add_argument("--split", default=split, help="which images: a list of split.json, or train | test (default: %(default)s)")
    parser.add_argument("--fit", default="squash", choices=FITS, help="images of another shape than --size: squashed to it, padded with "
                        "their mean colour, or cropped to its shape at the centre (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be read, instead of stopping; names them")


def data_options(args):
    """The data flags of a command, or of a run's config.json, as arguments of open_dataset."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: values[name] for name in DATA_OPTIONS if name in values}


def describe(dataset):
    """What was opened, how it was read and which images were taken: one line, and one for each group of files left out."""
    line = f"{dataset.name}: layout {dataset.layout}, {len(dataset)} images ({dataset.split_rule}), classes {', '.join(dataset.classes[1:])}"
    return "\n".join([line] + [f"  left out, {note}" for note in dataset.notes])


def print_table(table):
    """Print {"caption": text, "head": cells, "rows": lists of cells}, the columns aligned."""
    rows = [table["head"], *table["rows"]]
    widths = [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
    print(table["caption"])
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def run_main(main):
    """Run a command's main(); bad input ends it with one sentence on stderr and status 2 instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")               # names of files may be more than the terminal can show
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: temporary files are removed on the way out
    try:
        status = main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError:
        print("error: the device's memory is full; lower --batch-size or --size", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


# --- python datasets.py: the audit ---

def fingerprint(image):
    """256 signs of a uint8 (C, H, W) image: whether each cell of a 16 x 17 grid is brighter than its left neighbour."""
    cells = Image.fromarray(np.asarray(image).mean(0).astype(np.uint8)).resize((17, 16), Image.BOX)
    cells = np.asarray(cells).astype(int)
    return np.where(cells[:, 1:] > cells[:, :-1], 1.0, -1.0).astype(np.float32).flatten()


def near_duplicates(prints, names, others, most=16):
    """[(name, other, differing signs)] of the pairs whose fingerprints differ in at most `most` of 256 signs."""
    a, b = (np.stack([prints[n] for n in part]) if part else np.zeros((0, 256), np.float32) for part in (names, others))
    pairs = []
    for start in range(0, len(a), 1024):                            # a block at a time: 1024 x N distances in memory
        differ = (256 - a[start:start + 1024] @ b.T) / 2
        pairs += [(names[start + i], others[j], int(differ[i, j])) for i, j in np.argwhere(differ <= most)]
    return pairs


def size_outliers(sizes):
    """Names whose (H, W) is not the one that nine tenths have; without such a one, those twice or half the median side."""
    if not sizes:
        return []
    usual, count = Counter(sizes.values()).most_common(1)[0]
    if count >= 0.9 * len(sizes):
        return [name for name, size in sizes.items() if size != usual]
    median = np.median(list(sizes.values()), 0)
    return [name for name, size in sizes.items() if ((size > 2 * median) | (2 * np.array(size) < median)).any()]


def audit(dataset):
    """What a data set holds, as plain values, counted at native size. A broken file is a row of the audit, not its end.

    "area" of a class is its [least, median, most] pixels per image that has it: two scratches on one photo count as one.
    """
    def measure(i):
        try:
            image, mask = dataset.read(i)
            return tuple(mask.shape), fingerprint(image), torch.bincount(mask.flatten(), minlength=len(dataset.classes)).tolist()
        except ValueError as error:
            return str(error)

    areas, sizes, prints, annotated, several, empty = {c: [] for c in dataset.classes}, {}, {}, 0, 0, []
    problems = [f"{what}: {file}" for what, file in dataset.problems]
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        measured = list(pool.map(measure, range(len(dataset))))
    for sample, found in zip(dataset.samples, measured):
        if isinstance(found, str):
            problems.append(found)
            continue
        sizes[sample.name], prints[sample.name], count = found
        for name, pixels in zip(dataset.classes, count):
            areas[name] += [pixels] if pixels else []
        annotated += any(count[1:])
        several += sum(pixels > 0 for pixels in count[1:]) > 1
        if not any(count[1:]) and sample.kind not in NO_DEFECT:
            empty.append(sample.name)
    try:
        parts = [[s.name for s in dataset.part(split).samples if s.name in prints] for split in ("train", "test")]
        duplicates = near_duplicates(prints, *parts)
    except ValueError:
        duplicates = []                                             # no such split: nothing to leak across
    whole = sum(map(sum, areas.values())) or 1
    return {
        "name": dataset.name, "layout": dataset.layout, "images": len(dataset), "channels": dataset.channels,
        "annotated": annotated, "types": sum(map(bool, areas.values())) - bool(areas["background"]), "several_types": several,
        "pixel_wise": any(s.mask for s in dataset.samples) or dataset.layout == "drawn",
        "captions": [c for c in map(dataset.caption, range(len(dataset))) if c],
        "kinds": Counter(s.kind for s in dataset.samples), "sizes": Counter("{}x{}".format(*size) for size in sizes.values()),
        "classes": {c: {"pixels": sum(a), "share": sum(a) / whole, "images": len(a),
                        "area": [min(a), float(np.median(a)), max(a)] if a else None} for c, a in areas.items()},
        "empty_masks": empty, "size_outliers": size_outliers(sizes), "near_duplicates": duplicates,
        "left_out": list(dataset.notes), "problems": problems}


def print_audit(report):
    """Print one data set's audit: kinds, sizes, a row per class, and what is wrong."""
    print(f"\n{report['name']}: layout {report['layout']}, {report['images']} images, {'grey' if report['channels'] == 1 else 'RGB'}")
    print("  images per kind:  " + listed((f"{kind} {n}" for kind, n in report["kinds"].items()), 20))
    print("  sizes:            " + listed(f"{size} ({n})" for size, n in report["sizes"].most_common()))
    if report["captions"]:
        print(f"  captions:         {len(report['captions'])}, like: {report['captions'][0]}")
    print(f"  {'class':<24}{'pixels':>14}{'share':>10}{'images':>8}   area per image in px: least, median, most")
    for i, (name, c) in enumerate(report["classes"].items()):
        area = "{}, {:.0f}, {}".format(*c["area"]) if c["area"] and i else ""
        print(f"  {i:>2} {name:<21}{c['pixels']:>14}{100 * c['share']:>9.3f}%{c['images']:>8}   {area}")
    for title in ("empty_masks", "size_outliers"):
        if report[title]:
            print(f"  {title.replace('_', ' ')} ({len(report[title])}): {listed(report[title])}")
    if report["near_duplicates"]:
        pairs = listed(f"{a} = {b}" for a, b, _ in sorted(report["near_duplicates"], key=lambda pair: pair[2]))
        print(f"  near-duplicates of training images in the split test ({len(report['near_duplicates'])}): {pairs}")
    for note in report["left_out"]:
        print(f"  left out, {note}")
    for problem in report["problems"]:
        print(f"  problem: {problem}")


def print_overview(reports):
    """The columns of the paper's table of data sets, one row per object."""
    head = ["object", "images", "annotated", "types", "pixel-wise", "several types", "captions", "problems"]
    rows = [[name, r["images"], r["annotated"], r["types"], "yes" if r["pixel_wise"] else "no", r["several_types"], len(r["captions"]),
             len(r["problems"])] for name, r in reports.items()]
    rows.append(["total"] + [sum(row[c] for row in rows) if c != 4 else "" for c in range(1, len(head))])
    widths = [max(len(str(row[c])) for row in [head, *rows]) for c in range(len(head))]
    print()
    for row in [head, *rows]:
        print("  ".join(f"{cell!s:<{width}}" if c == 0 else f"{cell!s:>{width}}" for c, (cell, width) in enumerate(zip(row, widths))))


def contact_sheet(dataset, per_kind=4, tile=160):
    """Rows of images, each beside itself with its mask laid over, defects before good ones; None if nothing can be read."""
    rows = []
    for kind in sorted({s.kind for s in dataset.samples}, key=lambda kind: (kind in NO_DEFECT, natural(kind))):
        tiles = []
        for i in [i for i, s in enumerate(dataset.samples) if s.kind == kind][:per_kind]:
            try:
                image, mask = dataset.read(i, (tile, tile), "pad")
                tiles += [image, overlay(image, mask)]
            except ValueError:
                continue                            # it is in the list of problems
        rows += [(kind, tiles)] if tiles else []
    return sheet(rows, classes=dataset.classes, tile=tile) if rows else None


def bench(dataset, sizes=(64, 256), most=64, repeats=200):
    """Print images per second: read from files, from memory, augmented, and by a plain loop of PIL and torchvision."""
    dataset = dataset.subset(range(min(most, len(dataset))))
    paths = [(s.image, s.mask if isinstance(s.mask, Path) else s.image) for s in dataset.samples]
    if not paths or None in paths[0]:
        raise ValueError("--bench measures reading files; the drawn data have none")
    for pair in paths:                                              # both ways find the files in the system's cache
        for path in pair:
            path.read_bytes()

    def rate(work, count):
        start = time.perf_counter()
        work()
        return count / (time.perf_counter() - start)

    def plain_loop():
        for image, mask in paths:
            v2.functional.pil_to_tensor(v2.functional.resize(Image.open(image).convert("RGB"), size))
            v2.functional.pil_to_tensor(v2.functional.resize(Image.open(mask), size, v2.InterpolationMode.NEAREST))

    print(f"\nimages/s of {len(dataset)} images in batches of 8; {min(8, os.cpu_count())} threads decode; up to {MEMORY_LIMIT >> 30} GiB are "
          f"kept in memory as uint8, worker processes load larger data")
    print(f"{'size':<10}{'first read':>12}{'plain loop':>12}{'from memory':>13}{'augmented':>12}   fit in memory")
    for side in sizes:
        size, kept = (side, side), []
        part = dataset.subset(range(len(dataset)), size=size)
        first, plain = rate(lambda: kept.extend(part.tensors()), len(part)), rate(plain_loop, len(part))
        images, masks = kept
        draws = [torch.randint(len(part), (8,)) for _ in range(repeats)]
        cached = rate(lambda: [(images[d], masks[d]) for d in draws], 8 * repeats)
        changed = rate(lambda: [augment(images[d], masks[d], AUGMENTATIONS, torch.Generator()) for d in draws[:20]], 160)
        fits = MEMORY_LIMIT // ((dataset.channels + 1) * side * side)
        print(f"{side}x{side:<7}{first:>12.0f}{plain:>12.0f}{cached:>13.0f}{changed:>12.0f}   {fits} images")


def main():
    parser = argparse.ArgumentParser(description="Audit a data set: what it holds, what is wrong with it, and a contact sheet.")
    add_data_flags(parser, split=None)
    parser.add_argument("--annotation", default="spectrum", choices=["spectrum", "original"], help="exact classes, or one binary mask "
                        "per image as older data sets give (drawn data, or with --original) (default: %(default)s)")
    parser.add_argument("--original", metavar="MVTEC_DIR", help="MVTec AD's folder: its masks for the images of DS-MVTec")
    parser.add_argument("--json", metavar="FILE", help="write the audit as JSON")
    parser.add_argument("--sheet", metavar="FILE", default="sheet.png", help="the contact sheet to write, numbered where --data holds "
                        "several objects (default: %(default)s)")
    parser.add_argument("--bench", action="store_true", help="measure reading instead: images/s beside a plain PIL + torchvision loop")
    args = parser.parse_args()
    several = Path(args.data).is_dir() and not (args.object or args.layout) and find_objects(Path(args.data))
    names = list(several) if several and len(several) > 1 else [args.object]
    reports, path = {}, Path(args.sheet)
    for name in names:
        try:
            dataset = find_dataset(args.data, name, args.annotation, args.original, args.layout)
            dataset = dataset.part(args.split) if args.split else dataset
        except (ValueError, OSError) as error:
            if len(names) == 1:
                raise
            dataset = DefectDataset(name, ["background"], [], layout=None, problems=[("cannot be opened", str(error))])
        if args.bench:
            bench(dataset.readable() if args.skip_bad else dataset)
            continue
        report = reports[name or dataset.name] = audit(dataset)
        print_audit(report)
        picture = contact_sheet(dataset)
        if picture:
            target = path if len(names) == 1 else path.with_name(f"{path.stem}_{name.replace('/', '_')}{path.suffix}")
            write_image(target, picture)
            print(f"  contact sheet: {target}")
    if args.bench:
        return 0
    print_overview(reports)
    if args.json:
        write_json(args.json, reports)
    return 1 if any(report["problems"] for report in reports.values()) else 0


if __name__ == "__main__":
    run_main(main)
