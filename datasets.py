"""Folders of defect photos with pixel masks -> (image, mask, classes); the drawn data; the audit; writing a data set.

    image   uint8 (C, H, W), C = 1 when every file is grey, else 3
    mask    int64 (H, W), the value is a class index and 0 is background; classes[0] == "background"
    kind    the folder an image came from ("crack", "combined", "good"). It is metadata: a "combined" image holds several
            classes, so the classes of an image are read from its mask, never from its folder.

Understood: Defect Spectrum (image/<kind>, mask/<kind>/<stem>_mask.png), MVTec AD (test/<kind>, ground_truth/<kind>), and
drawn:pill | drawn:zipper | drawn:wood, which needs no files.

    python datasets.py                              audit of the drawn pill, and a contact sheet
    python datasets.py --data FOLDER --sheet sheet.png
"""
import argparse
import json
import os
import re
import sys
import zlib
from collections import Counter, namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import inspect_rules
from inspect_rules import read_classes, read_json

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
NO_DEFECT = {"good", "ok"}          # kinds that come without a mask file: all background
FEW_SHOT = 5                        # images per kind for training where a data set has no split of its own (the authors' rule)
PALETTE = np.array([(0, 0, 0), (230, 25, 75), (60, 180, 75), (67, 99, 216), (255, 225, 25), (245, 130, 49), (145, 30, 180),
                    (66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212), (0, 128, 128)], np.uint8)

# label: None when the mask file holds class indices; else the class that a binary mask file (>= 128) stands for
Sample = namedtuple("Sample", "name image mask kind label caption", defaults=(None, ""))


# --- reading files ---

def natural(text):
    """Sort key that counts: 2 before 10, '472' before '1836'."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", str(text)) if part]


def _open(path):
    """A loaded PIL image, turned upright by its EXIF tag. Raises ValueError naming the file."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except Exception as error:      # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ... by format
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from None


def read_image(path, channels=3):
    """Read any image file as uint8 (channels, H, W); 16-bit is scaled by 65535, alpha is dropped, palettes are looked up."""
    picture = _open(path)
    if picture.mode.startswith("I") or picture.mode == "F":                     # 16-bit grey in Pillow's modes
        wide = np.asarray(picture, np.float64)
        picture = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")       # through RGBA: a palette with transparency warns otherwise
    array = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


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
        return ((np.array(picture) >= (1 if picture.mode == "1" else 128)) * label).astype(np.uint8)
    mask = inspect_rules.read_mask(path, classes)
    if mask.max(initial=0) >= len(classes) or mask.min(initial=0) < 0:
        raise ValueError(f"{path}: mask has the values {np.unique(mask)[:12].tolist()} but the class list has 0..{len(classes) - 1} "
                         f"({', '.join(classes)}); add the missing classes to classes.json or correct the mask")
    return mask.astype(np.uint8)


def _images_in(folder):
    """Image files directly in a folder, {stem: path}, in natural order; dot files and other suffixes are skipped."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return {p.stem: p for p in sorted(files, key=lambda p: natural(p.name))}


def _folders_in(folder):
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: natural(p.name))


# --- data sets ---

class DefectDataset:
    """Images with index masks. dataset[i] -> (image uint8 (C, H, W), mask int64 (H, W)), resized to `size` where one is given.

    Attributes: name, classes (tuple, [0] = "background"), samples (list of Sample), channels (1 or 3), size ((H, W) or None).
    """

    def __init__(self, name, classes, samples, size=None):
        self.name, self.classes, self.samples, self.size = name, tuple(classes), list(samples), size
        self.channels = 1 if all(_is_grey(s.image) for s in self.samples) else 3

    def __len__(self):
        return len(self.samples)

    def native_size(self, i):
        """(H, W) of image i on disk, upright."""
        try:
            with Image.open(self.samples[i].image) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5
                return picture.size if turned else picture.size[::-1]
        except Exception as error:
            raise ValueError(f"{self.samples[i].image}: cannot be read as an image ({error})") from None

    def read(self, i, size=None):
        """Image uint8 (C, H, W) and mask uint8 (H, W) at `size` (native when None): images are averaged, masks nearest."""
        sample = self.samples[i]
        image = read_image(sample.image, self.channels)
        mask = np.zeros(image.shape[1:], np.uint8) if sample.mask is None else \
            read_mask(sample.mask, self.classes, sample.label)
        if mask.shape != image.shape[1:]:
            raise ValueError(f"{sample.image} is {image.shape[1]}x{image.shape[2]} but its mask {sample.mask} is "
                             f"{mask.shape[0]}x{mask.shape[1]}; they must have the same size")
        if size is not None and tuple(size) != mask.shape:
            image = np.stack([np.array(Image.fromarray(c).resize(size[::-1], Image.BILINEAR)) for c in image])
            mask = np.array(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))
        return torch.from_numpy(image), torch.from_numpy(mask)

    def __getitem__(self, i):
        image, mask = self.read(i, self.size)
        return image, mask.long()

    def subset(self, indices):
        """The same data set with some of its samples."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, samples=[self.samples[i] for i in indices])
        return part

    def tensors(self):
        """All of it, decoded once: images uint8 (N, C, H, W), masks uint8 (N, H, W). Every bad file is named in one error."""
        if self.size is None:
            raise ValueError("tensors() needs open_dataset(..., size=(H, W)): images of different sizes do not stack")
        pairs, errors = [], []
        for i in range(len(self)):
            try:
                pairs.append(self.read(i, self.size))
            except ValueError as error:
                errors.append(str(error))
        if errors:
            more = f"\n  and {len(errors) - 8} more" if len(errors) > 8 else ""
            raise ValueError("\n  ".join([f"{len(errors)} of {len(self)} samples of {self.name} cannot be used:", *errors[:8]]) + more)
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def _is_grey(path):
    """Whether a file is grey by its header. A file that cannot be opened does not decide; it is reported when it is read."""
    try:
        with Image.open(path) as picture:
            return picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16")
    except Exception:
        return True


class DrawnDataset(DefectDataset):
    """The drawn products (section 'the drawn data'), made on request at any size: 20 images of each kind."""

    def __init__(self, product, size=None, annotation="spectrum"):
        kinds = DRAWN[product].kinds
        self.product, self.annotation = product, annotation
        self.name, self.size, self.channels = f"drawn:{product}", size, 3
        self.classes = DRAWN[product].classes if annotation == "spectrum" else ("background", "defect")
        self.samples = [Sample(f"{kind}/{n:03d}", None, None, kind, n * len(kinds) + k)     # label: the index to draw
                        for k, kind in enumerate(kinds) for n in range(20)]

    def native_size(self, i):
        return DRAWN[self.product].native

    def read(self, i, size=None):
        image, spectrum, original, _, _ = draw(self.product, 0, self.samples[i].label, size)
        mask = spectrum if self.annotation == "spectrum" else original
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


def open_dataset(spec, size=None, split=None, object=None, annotation="spectrum"):
    """Open a data set by one word or one path.

    Args:
        spec:   a folder in one of the layouts above, or "drawn:pill" | "drawn:zipper" | "drawn:wood".
        size:   (H, W) that images and masks are resized to, or None for each image's own size.
        split:  a list of split.json, or "train" | "test" where there is none: the first 5 images of each kind, and the rest.
                None: everything.
        object: the sub-folder to open when `spec` holds one folder per object.
        annotation: drawn data only: "spectrum" (exact, per class) or "original" (one coarse binary mask per image).
    Raises: FileNotFoundError, ValueError: a sentence that names the folder and what it should hold.
    """
    spec = str(spec)
    if spec.startswith("drawn:"):
        product = spec.split(":", 1)[1]
        if product not in DRAWN:
            raise ValueError(f"unknown drawn object '{product}'; there are {', '.join('drawn:' + p for p in DRAWN)}")
        dataset, splits = DrawnDataset(product, size, annotation), {}
    else:
        root = Path(spec) / (object or "")
        if not root.is_dir():
            there = [p.name for p in _folders_in(root.parent)] if root.parent.is_dir() else []
            raise FileNotFoundError(f"--data {root}: no such folder; " + (f"{root.parent} holds {listed(there)}" if there else
                                    "give a folder or one of " + ", ".join("drawn:" + p for p in DRAWN)))
        classes, samples = _read_layout(root)
        dataset = DefectDataset(root.resolve().name, classes, samples, size)
        splits = read_json(root / "split.json") if (root / "split.json").exists() else {}
    return dataset if split is None else dataset.subset(_split_indices(dataset, splits, split))


def _read_layout(root):
    if (root / "image").is_dir():
        return _defect_spectrum(root)
    if (root / "test").is_dir() and (root / "ground_truth").is_dir():
        return _mvtec(root)
    raise ValueError(f"--data {root}: no known layout. Expected image/<kind>/ with mask/<kind>/<stem>_mask.png (Defect Spectrum) or "
                     f"test/<kind>/ with ground_truth/<kind>/ (MVTec AD), found {listed(p.name for p in root.iterdir())}")


def _pair(image_root, mask_root, label=lambda kind: None):
    """Samples of image_root/<kind>/<stem>.* with mask_root/<kind>/<stem>_mask.* or <stem>.*: paired by stem, never by position."""
    samples, without_mask, without_image = [], [], []
    kinds = {p.name for root in (image_root, mask_root) if root.is_dir() for p in _folders_in(root)}
    for kind in sorted(kinds, key=natural):
        images = _images_in(image_root / kind) if (image_root / kind).is_dir() else {}
        masks = _images_in(mask_root / kind) if (mask_root / kind).is_dir() else {}
        for stem, path in images.items():
            mask = masks.pop(stem + "_mask", None) or masks.pop(stem, None)
            if mask is None and kind not in NO_DEFECT:
                without_mask.append(f"{kind}/{path.name}")
            samples.append(Sample(f"{kind}/{stem}", path, mask, kind, label(kind)))
        without_image += [f"{kind}/{path.name}" for path in masks.values()]
    if without_mask or without_image:
        raise ValueError(f"{image_root.parent}: images without a mask ({len(without_mask)}): {listed(without_mask)}; masks without an "
                         f"image ({len(without_image)}): {listed(without_image)}. The mask of {image_root.name}/<kind>/<stem>.png is {mask_root.name}/<kind>/<stem>_mask.png; "
                           "only images in a folder named good need none")
    if not samples:
        raise ValueError(f"{image_root}: no images in its sub-folders; expected {image_root.name}/<kind>/<stem>.png")
    return samples


def _defect_spectrum(root):
    """image/<kind>/<stem>.png, mask/<kind>/<stem>_mask.png with class indices, optional classes.json {index: name}."""
    samples = _pair(root / "image", root / "mask")
    if (root / "classes.json").exists():
        return read_classes(root / "classes.json"), samples
    top = max((int(np.array(_open(s.mask)).max()) for s in samples if s.mask), default=0)
    if top > 64:
        raise ValueError(f"{root}: there is no classes.json and a mask holds the value {top}. Index masks hold 0..K; is it a 0/255 "
                         f"or a colour mask? See README, 'Your own data'")
    return ["background"] + [f"class_{i}" for i in range(1, top + 1)], samples


def _mvtec(root):
    """test/<kind>/<stem>.png, ground_truth/<kind>/<stem>_mask.png with 0/255: the class is the kind."""
    kinds = [p.name for p in _folders_in(root / "test") if p.name not in NO_DEFECT]
    return ["background"] + kinds, _pair(root / "test", root / "ground_truth", lambda kind: kinds.index(kind) + 1 if kind in kinds else None)


def few_shot_split(dataset, n=FEW_SHOT):
    """(train, rest): indices of the first n images of each kind in natural order, and of all others (issue 7 of the released code)."""
    seen, train, rest = Counter(), [], []
    for i, sample in enumerate(dataset.samples):
        (train if seen[sample.kind] < n else rest).append(i)
        seen[sample.kind] += 1
    return train, rest


def _split_indices(dataset, splits, split):
    if not splits:
        splits = dict(zip(("train", "test"), ([dataset.samples[i].name for i in part] for part in few_shot_split(dataset))))
    if split not in splits:
        raise ValueError(f"{dataset.name} has no split '{split}'; there are {', '.join(splits)}")
    position = {s.name: i for i, s in enumerate(dataset.samples)}
    missing = [name for name in splits[split] if name not in position]
    if missing:
        raise ValueError(f"split.json, '{split}': no such images in {dataset.name} ({len(missing)}): {listed(missing)}")
    if not splits[split]:
        raise ValueError(f"the split '{split}' of {dataset.name} is empty")
    return [position[name] for name in splits[split]]


def listed(names, most=8):
    """'a, b, c and 5 more', 'none' for nothing."""
    names = [str(n) for n in names]
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


# --- writing ---

def write_atomically(path, write):
    """write(temporary path), then rename: a reader sees the whole file or none, and a full disk keeps the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


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

def colorize(mask):
    """Mask (H, W) -> uint8 (3, H, W), one colour per class, black background."""
    return PALETTE[np.asarray(mask) % len(PALETTE)].transpose(2, 0, 1)


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
        pen.rectangle((x, y, x + 14, y + 14), tuple(PALETTE[i % len(PALETTE)].tolist()))
        pen.text((x + 18, y - 1), name, "black", font)
        x += 30 + int(font.getlength(name))
    return canvas


# --- the drawn data ---

class Drawn(NamedTuple):
    """One drawn product: native (H, W) in px, classes in index order, its name in captions, and where defects may lie."""
    native: tuple
    classes: tuple
    noun: str
    room: tuple                       # px: the defects' centres fill x = +-room[0] +-room[1], y = +-room[2]; room[3] = 1: an ellipse

    @property
    def kinds(self):
        return self.classes[1:] + ("combined", "good")


class Look(NamedTuple):
    """How one defect class is drawn, wherever it falls on the product."""
    size: tuple         # px: (shortest, longest, half width) of a line; (least, middle, most) total area of blobs, half < middle
    angle: tuple                      # middle and spread of a line's direction, rad from the x axis
    opacity: float
    relief: float                     # px that it stands out of the surface
    variants: tuple                   # of (words, shape, RGB in [0, 1])


DRAWN = {
    "pill": Drawn((800, 800), ("background", "color", "contamination", "crack", "faulty_imprint", "scratch"),
                  "white oval pill", (0, 310, 215, 1)),
    "zipper": Drawn((1024, 1024), ("background", "broken_teeth", "fabric_border", "fabric_interior", "split_teeth",
                                   "squeezed_teeth"), "dark grey zipper", (212, 85, 450, 0)),
    "wood": Drawn((1024, 1024), ("background", "color", "crack", "scratch", "hole", "liquid"),
                  "brown wooden board", (0, 470, 470, 0)),
}
LOOKS = {                             # the middle of an area range is the limit in the paper's standards, but for the hole
    ("pill", "color"): Look((75, 300, 4000), (0, 0), 0.85, 0, (
        ("red color stain", "blob", (0.75, 0.1, 0.1)), ("yellow color stain", "blob", (0.85, 0.6, 0.05)),
        ("orange color stain", "blob", (0.85, 0.35, 0.05)))),
    ("pill", "contamination"): Look((1000, 4000, 20000), (0, 1.6), 0.92, 6, (
        ("black speck of contamination", "blob", (0.1, 0.1, 0.1)), ("brown speck of contamination", "blob", (0.3, 0.19, 0.1)),
        ("green speck of contamination", "blob", (0.2, 0.3, 0.17)), ("dark fibre of contamination", "fibre", (0.12, 0.16, 0.3)))),
    ("pill", "crack"): Look((220, 380, 11), (0, 1.6), 1, -14, (("dark crack", "crack", (0.13, 0.11, 0.1)),)),
    ("pill", "scratch"): Look((180, 340, 8.5), (0, 1.6), 0.9, -12, (("scratch", "scratch", (0.58, 0.55, 0.51)),)),
    ("zipper", "fabric_interior"): Look((1200, 4800, 24000), (1.57, 0.3), 0.9, -4, (
        ("hole in the fabric interior", "blob", (0.66, 0.67, 0.68)), ("stain on the fabric interior", "blob", (0.5, 0.37, 0.24)),
        ("pulled thread in the fabric interior", "fibre", (0.55, 0.55, 0.6)))),
    ("wood", "color"): Look((62, 250, 4000), (0, 0), 0.95, 3, (
        ("red spot of color", "blob", (0.75, 0.1, 0.1)), ("blue spot of color", "blob", (0.15, 0.25, 0.7)),
        ("white spot of color", "blob", (0.95, 0.95, 0.93)), ("green spot of color", "blob", (0.1, 0.5, 0.3)))),
    ("wood", "crack"): Look((320, 620, 16), (1.57, 0.1), 1, -14, (
        ("dark crack along the grain", "crack", (0.07, 0.045, 0.03)),)),
    ("wood", "scratch"): Look((280, 520, 10), (0, 1.1), 0.85, -10, (("light scratch", "scratch", (0.95, 0.85, 0.7)),)),
    ("wood", "hole"): Look((4000, 7000, 12000), (0, 0), 0.85, -40, (("round hole", "pit", (0.14, 0.09, 0.06)),)),
    ("wood", "liquid"): Look((250, 1000, 16000), (0, 0), 0.62, 0, (("liquid stain", "blob", (0.2, 0.1, 0.05)),)),
}


class Region(NamedTuple):
    """A shape: the window (row slice, column slice) that holds it, its depth there, points (N, 2) around it, its area."""
    window: tuple
    depth: np.ndarray
    outline: np.ndarray
    area_px: float


class Picture:
    """A picture being drawn: albedo (H, W, 3) in [0, 1], height (H, W) in px, mask (H, W), and the defects so far."""

    def __init__(self, rng, native, shape, tilt, shift):
        """Place the product, turned by up to `tilt` rad and moved by up to `shift` px."""
        self.native, self.shape, self.step = native, shape, [n / s for n, s in zip(native, shape)]
        angle, self.offset = rng.uniform(-tilt, tilt), rng.uniform(-shift, shift, 2).tolist()
        self.cos, self.sin = float(np.cos(angle)), float(np.sin(angle))
        v, u = ((np.arange(n, dtype=np.float32) + 0.5) * s - 0.5 * size - o
                for n, s, size, o in zip(shape, self.step, native, self.offset))
        self.x, self.y = self.cos * u + self.sin * v[:, None], self.cos * v[:, None] - self.sin * u     # (H, W) each
        self.albedo, self.height = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
        self.inside = np.full(shape, 1e3, np.float32)                          # depth of the part that can have defects
        self.mask, self.defects = np.zeros(shape, np.uint8), []

    def window(self, x, y, reach):
        """Slices of the rows and columns within `reach` px of (x, y)."""
        turned = self.cos * y + self.sin * x, self.cos * x - self.sin * y
        middle = [p + o + n / 2 for p, o, n in zip(turned, self.offset, self.native)]
        return tuple(slice(max(0, int((m - reach) / s) - 1), max(1, int((m + reach) / s) + 2))
                     for m, s in zip(middle, self.step))

    def noise(self, rng, rows, columns, octaves=2):
        """Value noise (H, W), mean 0, std about 0.6: random grids, enlarged. A grid is the same at every picture size."""
        grids = [rng.standard_normal((rows << o, columns << o)).astype(np.float32) * 0.7 ** o for o in range(octaves)]
        return sum(np.asarray(Image.fromarray(g).resize(self.shape[::-1], Image.Resampling.BICUBIC)) for g in grids)

    def lines(self, polylines):
        """Region of strokes, each polyline (N, 3) of x, y, half width."""
        outline = np.concatenate([line[:, :2] + line[:, 2:] * side for line in polylines
                                  for side in ((1, 0), (-1, 0), (0, 1), (0, -1))])
        low, high = outline.min(0), outline.max(0)
        window, area_px = self.window(*(low + high) / 2, np.hypot(*(high - low)) / 2), 0
        x, y, depth = self.x[window], self.y[window], np.full(self.x[window].shape, -1e3, np.float32)
        for line in (p.tolist() for p in polylines):
            for (ax, ay, a), (bx, by, b) in zip(line, line[1:]):
                dx, dy = bx - ax, by - ay
                t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
                np.maximum(depth, a + (b - a) * t - np.hypot(x - ax - t * dx, y - ay - t * dy), out=depth)
                area_px += np.hypot(dx, dy) * (a + b)
        return Region(window, np.minimum(depth, self.inside[window]), outline, area_px)

    def blob(self, rng, x, y, area_px, rough):
        """Region with a wavy outline r(angle) whose mean square is that of a circle: its area is exactly area_px."""
        k = np.arange(2, 9)
        wave, phase = rough * rng.uniform(0.3, 1, 7) / k ** 0.6, rng.uniform(0, 2 * np.pi, 7)
        radius, slim = (area_px / np.pi / (1 + (wave ** 2).sum() / 2)) ** 0.5, rng.uniform(0.85, 1.25)

        def edge(angle):
            return float(radius) * (1 + sum(w * np.cos(n * angle + p) for n, w, p in np.c_[k, wave, phase].tolist()))
        turn = np.linspace(0, 2 * np.pi, 24)
        outline = edge(turn)[:, None] * np.stack([np.cos(turn) / slim, np.sin(turn) * slim], 1) + (x, y)
        window = self.window(x, y, 2 * radius)
        dx, dy = (self.x[window] - x) * slim, (self.y[window] - y) / slim
        depth = edge(np.arctan2(dy, dx)) - np.hypot(dx, dy)
        return Region(window, np.minimum(depth, self.inside[window]), outline, area_px)

    def paint(self, region, colour, opacity=1.0, relief=0.0, slope=8.0):
        """Blend a colour into a region and raise it by `relief` px (sink it if < 0) over the first `slope` px."""
        alpha = opacity * np.clip(region.depth / max(self.step) + 0.5, 0, 1)                   # share of each pixel covered
        self.albedo[region.window] += alpha[..., None] * (np.float32(colour) - self.albedo[region.window])
        self.height[region.window] += relief * np.clip(region.depth / slope, 0, 1)

    def mark(self, region, index, words):
        """Give a region its class and remember it for the caption."""
        self.mask[region.window][region.depth > 0] = index
        self.defects.append((region, words))

    def develop(self, rng, k):
        """Light the scene, average k x k samples to a pixel, add the sensor's noise. Returns (H / k, W / k, 3) uint8."""
        toward, slant, warmth = rng.uniform(-2.4, -0.8), rng.uniform(0, 0.3), rng.uniform(-0.05, 0.05)
        lx, ly = 0.6 * float(np.cos(toward)), 0.6 * float(np.sin(toward))                      # the lamp is above the picture
        gy, gx = np.gradient(self.height, *self.step)
        light = 0.2 + np.clip((0.8 - gx * lx - gy * ly) / np.sqrt(1 + gx * gx + gy * gy), 0, None)
        light *= 1 + slant * (self.x * lx + self.y * ly) / max(self.native)
        image = self.albedo * light[..., None] * (rng.uniform(0.88, 1.08) * np.float32([1 + warmth, 1, 1 - warmth]))
        image = image.reshape(self.shape[0] // k, k, self.shape[1] // k, k, 3).mean((1, 3)) if k > 1 else image
        image += rng.standard_normal(image.shape, dtype=np.float32) * 0.008
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)

    def original(self):
        """(H, W) 0/1: the annotation of older data sets, a coarse 12-sided outline 10 px around the largest defect only."""
        coarse = np.zeros(self.shape, np.uint8)
        if self.defects:
            outline = max((region for region, _ in self.defects), key=lambda region: region.area_px).outline
            middle = outline.mean(0)
            window = self.window(*middle, np.hypot(*(outline - middle).T).max() + 30)
            sides = [(float(np.cos(a)), float(np.sin(a))) for a in np.arange(12) * np.pi / 6]
            coarse[window] = np.all([self.x[window] * c + self.y[window] * s < float((outline @ (c, s)).max()) + 10
                                     for c, s in sides], 0)
        return coarse

    def caption(self, noun):
        """One sentence: the product, then each defect with its rough size and place. Names the class of each."""
        said = []
        for region, words in self.defects:
            x, y = region.outline.mean(0) / self.native[0]
            place = [low if p < 0 else high for p, low, high in ((y, "upper", "lower"), (x, "left", "right")) if abs(p) > 0.08]
            share = region.area_px / (self.native[0] * self.native[1])
            size = "tiny" if share < 0.0008 else "small" if share < 0.004 else "medium-sized" if share < 0.015 else "large"
            where = f"in the {' '.join(place)}{' half' if len(place) == 1 else ''}" if place else "near the centre"
            said.append(f"a {size} {words} {where}")
        said[:-1] = [", ".join(said[:-1])] if said[1:] else []
        return f"A {noun} with {' and '.join(said)}." if said else f"A flawless {noun}."


def drawn_kind(name, index):
    """The kind (folder) of picture `index`: the kinds take turns."""
    return DRAWN[name].kinds[index % len(DRAWN[name].kinds)]


def draw(name, seed, index, size=None):
    """Draw picture `index` of a product; a pure function of its arguments.

    Args:
        name: "pill" | "zipper" | "wood".   seed: of the data set, >= 0.   index: >= 0; it decides the kind (drawn_kind).
        size: (H, W) in px, None = native. Not square = squashed, as a photo is when resized.
    Returns: image (H, W, 3) uint8, mask (H, W) uint8 class index, original (H, W) uint8 0/1, kind, caption.
    """
    if name not in DRAWN:
        raise ValueError(f"there is no drawn product {name!r}; choose from {', '.join(DRAWN)}")
    product, kind, rng = DRAWN[name], drawn_kind(name, index), np.random.default_rng([zlib.crc32(name.encode()), seed, index])
    todo = [] if kind == "good" else [kind]
    if kind == "combined":
        todo = rng.permutation(product.classes[1:])[:rng.integers(2, 4)].tolist()
    h, w = size or product.native
    k = 3 if max(h, w) <= 160 else 1                           # odd: the middle one of k x k samples is the pixel's centre
    setup, tilt, shift = {"pill": (_pill, 0.15, 20), "zipper": (_zipper, 0.04, 20), "wood": (_wood, 0.03, 60)}[name]
    picture = Picture(rng, product.native, (h * k, w * k), tilt, shift)
    setup(rng, picture, {c: product.classes.index(c) for c in todo})
    for c in todo:
        if (name, c) in LOOKS:
            _defect(rng, picture, product.room, LOOKS[name, c], product.classes.index(c))
    middle = np.s_[k // 2::k, k // 2::k]
    return (picture.develop(rng, k), picture.mask[middle].copy(), picture.original()[middle].copy(), kind,
            picture.caption(product.noun))


def _defect(rng, picture, room, look, index):
    """Draw one class of defect on a product: one line, or one to three blobs or fibres."""
    low, middle, high = look.size
    words, shape, colour = look.variants[rng.integers(len(look.variants))]
    sizes = [rng.uniform(low, middle)]                                         # the length of a line, or the areas of blobs
    if shape in ("blob", "fibre", "pit"):
        total = np.exp(rng.uniform(*np.log((low, 0.97 * middle) if rng.random() < 0.5 else (1.03 * middle, high))))
        sizes = (total * rng.dirichlet(np.full(1 if shape == "pit" else rng.integers(1, 4), 4.0))).tolist()
    for size in sizes:
        length = {"blob": 1.4, "pit": 1.2, "fibre": 4.5}[shape] * size ** 0.5 if shape not in ("crack", "scratch") else size
        p = rng.uniform(-1, 1, (12, 2))                                        # of 12 places the one farthest from the rest
        p = p * np.sqrt(1 - room[3] * p[:, ::-1] ** 2 / 2) * np.maximum(np.subtract(room[1:3], 0.5 * length), 10)
        p[:, 0] += rng.choice([-1, 1], 12) * room[0]
        others = [region.outline.mean(0) for region, _ in picture.defects] or [p[0]]
        far = np.hypot(*(p[:, None] - others).T).min(0)
        x, y = p[far.argmax() if picture.defects else 0].tolist()
        angle = look.angle[0] + rng.uniform(-1, 1) * look.angle[1]
        if shape == "crack":
            trunk = _walk(rng, x, y, length, angle, 0.35, high)
            twigs = [_walk(rng, 0, 0, 0.3 * length, angle + turn * rng.uniform(0.4, 0.8), 0.3, 0.6 * high, 4) for turn in (-1, 1)]
            lines = [trunk] + [t + (trunk[i] - t[0]) * (1, 1, 0) for t, i in zip(twigs, rng.integers(2, 7, 2))]
        elif shape == "scratch":
            across = (-np.sin(angle), np.cos(angle), 0)
            lines = [_walk(rng, x, y, length * rng.uniform(0.6, 1), angle, 0.07, high) + np.multiply(across, 30 * i)
                     for i in range(rng.integers(1, 4))]
        else:
            lines = [_walk(rng, x, y, length, angle, 0.5, size / length / 1.5, 12)]
        region = (picture.lines(lines) if shape in ("crack", "scratch", "fibre") else
                  picture.blob(rng, x, y, size, 0.06 if shape == "pit" else 0.4))
        picture.paint(region, colour, look.opacity, look.relief, 40 if shape == "pit" else 8)
        picture.mark(region, index, words)


def _walk(rng, x, y, length, angle, wiggle, half, n=9):
    """A wandering line of n points centred on (x, y), widest in the middle: (n, 3) of x, y, half width in px."""
    turn = angle + wiggle * rng.standard_normal(n - 1)
    p = np.cumsum(np.r_[[(0, 0)], np.stack([np.cos(turn), np.sin(turn)], 1) * length / (n - 1)], 0)
    return np.c_[p - p.mean(0) + (x, y), half * (0.4 + 0.6 * np.sin(np.linspace(0.15, 3, n))) * rng.uniform(0.7, 1.2, n)]


def _pill(rng, picture, todo):
    """A white oval tablet with the letters FF pressed into it, on a dark table; draws the faulty imprint."""
    far = ((np.abs(picture.x) / 320) ** 2.4 + (np.abs(picture.y) / 225) ** 2.4) ** (1 / 2.4)             # 1 = the rim
    shadow = np.clip(1.6 - np.hypot((picture.x - 25) / 320, (picture.y - 40) / 225), 0, 0.6)
    table = (1 + 0.12 * picture.noise(rng, 40, 40)) * (1 - 1.4 * shadow)
    picture.albedo[:] = np.float32([0.17, 0.18, 0.21]) * table[..., None]
    speckle = np.clip(picture.noise(rng, 110, 110, 1) - 2.1, 0, 1)[..., None] * np.float32([0.04, 0.3, 0.32])       # reddish
    body = Region(np.s_[:, :], (1 - far) * 225, None, 0)
    picture.paint(body, np.float32([0.83, 0.81, 0.76]) * (1 + 0.02 * picture.noise(rng, 90, 90))[..., None] - speckle)
    picture.height += 105 * np.sqrt(np.clip(1 - far ** 4, 0, 1))
    picture.inside = body.depth - 6                                                           # no defect hangs over the rim
    bars = [np.float64([(x, y, 14), (x + dx, y + dy, 14)]) for x in (-105, 30)
            for y, dx, dy in ((-75, 0, 150), (-75, 80, 0), (0, 60, 0))]
    fault = rng.permutation(["missing", "doubled"])[0] if "faulty_imprint" in todo else None
    letter, lost = 3 * int(rng.integers(2)) + np.arange(3), rng.permutation(3)[:rng.integers(1, 4)]
    hit = letter[lost] if fault == "missing" else letter
    ink = dict(colour=(0.6, 0.58, 0.55), opacity=0.8, relief=-9, slope=10)
    picture.paint(picture.lines([b for i, b in enumerate(bars) if fault != "missing" or i not in hit]), **ink)
    if fault:
        shift = (*rng.choice([-1, 1], 2) * rng.uniform(24, 40, 2), 0) if fault == "doubled" else 0
        wrong = picture.lines([bars[i] + shift for i in hit])
        if fault == "doubled":
            picture.paint(wrong, **ink)
        picture.mark(wrong, todo["faulty_imprint"], {"missing": "gap in a", "doubled": "doubled letter of a"}[fault] + " faulty imprint")


def _wood(rng, picture, todo):
    """Three boards side by side, grain upright, now and then a knot (which is no defect)."""
    x = picture.x
    seams = (np.sort(rng.uniform(-60, 60, 2)) + (-190, 190)).tolist()
    board = (x > seams[0]).astype(np.int8) + (x > seams[1])
    tone, start = (rng.uniform(*ends, 3).astype(np.float32)[board] for ends in ((-0.12, 0.12), (0, 3000)))
    ring, knot = x + 80 * picture.noise(rng, 2, 4) + start, 0                                  # a ring's place across the board
    for _ in range(rng.integers(0, 3)):
        kx, ky, radius = *rng.uniform(-430, 430, 2).tolist(), rng.uniform(60, 95)
        far = np.hypot(x - kx, (picture.y - ky) / 1.5)
        near = np.exp(-(far / radius) ** 2)
        ring += near * (1.2 * far - x + kx)                                                    # the rings close around a knot
        knot = np.maximum(knot, np.clip(1.9 * near - 0.8, 0, 0.6))
    profile, fibre = rng.uniform(0, 1, 257), picture.noise(rng, 10, 260)
    grain = np.interp(ring % 5120, np.arange(257) * 20, profile).astype(np.float32)
    dark = np.clip(0.15 + 0.5 * grain + 0.1 * fibre + tone + 0.15 * picture.noise(rng, 3, 8), 0, 1) + knot
    picture.albedo[:] = np.float32([0.74, 0.54, 0.35]) - dark[..., None] * np.float32([0.33, 0.29, 0.22])
    picture.height += 0.7 * fibre
    for seam in seams:
        picture.paint(Region(np.s_[:, :], 4 - np.abs(x - seam), None, 0), (0.1, 0.07, 0.05), 0.75)


def _zipper(rng, picture, todo):
    """Two dark woven tapes on a light table, joined by upright rows of metal teeth; draws the defects of teeth and border."""
    def corners(x, y, half_x, half_y):
        return np.float64([(x + i * half_x, y + j * half_y) for i in (-1, 1) for j in (-1, 1)])
    pitch, border, root, tip = 80, 310, 92, -26                    # px: from tooth to tooth; from the middle line to the ends
    slots = (rng.permutation([-290, 0, 290]) + rng.uniform(-30, 30, 3)).tolist()               # each teeth defect has its section
    reach = (rng.uniform(110, 150, 3) * (1.5, 1, 1)).tolist()                                  # half its length
    gape, cut = rng.uniform(55, 85) * ("split_teeth" in todo), rng.uniform(50, 92)
    first, count = round(slots[2] / pitch) - 1, int(rng.integers(2, 5))
    phase, bent_side, broken_side = rng.uniform(0, pitch), *rng.choice([-1, 1], 2).tolist()
    x, y, whole = picture.x, picture.y, np.s_[:, :]
    apart = gape * np.clip(1 - ((y - slots[0]) / reach[0]) ** 2, 0, 1) ** 1.5                  # px that each row has moved out
    table = np.float32([0.66, 0.67, 0.68]) * (1 + 0.03 * picture.noise(rng, 30, 30))[..., None]
    picture.albedo[:] = table
    rib = 0.12 * np.cos(x * (2 * np.pi / 43)) + 0.3 * np.clip(1 - np.abs(np.abs(x) - 125) / 12, 0, 1)
    weave = np.sin(x * 0.45) * np.sin(y * 0.45) * min(0.2, 0.6 / max(picture.step))            # too fine for a small picture
    cloth = np.float32([0.23, 0.235, 0.26]) * (1 + rib + weave + 0.1 * picture.noise(rng, 60, 60))[..., None]
    for side in (-1, 1):
        tape = np.minimum(side * x - apart - 4, border - side * x)
        picture.albedo *= 1 - 0.35 * np.clip(1 + tape / 25, 0, 1)[..., None]                   # its shadow on the table
        picture.paint(Region(whole, tape, None, 0), cloth, relief=6)
    if "fabric_border" in todo:
        side, place, knots = int(rng.choice([-1, 1])), rng.uniform(-380, 380), np.r_[0, rng.uniform(0.5, 1, 7), 0]
        area_px = 4800 * np.exp(rng.uniform(*np.log((0.25, 0.97) if rng.random() < 0.5 else (1.03, 5))))
        length = (area_px * rng.uniform(2, 3.5)) ** 0.5
        depth = knots * area_px / (knots.sum() * length / 8)                                   # trapezoids of area_px in all
        notch = np.interp(y, place + np.linspace(-0.5, 0.5, 9) * length, depth).astype(np.float32)
        inward = border - side * x
        outline = corners(side * (border - depth.max() / 2), place, depth.max() / 2, length / 2)
        torn = Region(whole, np.minimum(inward, notch - inward), outline, area_px)
        strand = rng.uniform(-0.3, 1, 256).astype(np.float32)[(y // 11).astype(np.int16)] * notch
        picture.paint(torn, 0.85 * table)
        picture.paint(torn._replace(depth=np.minimum(torn.depth, np.minimum(2.2 - np.abs(y % 11 - 5.5),
                                    strand - notch + inward))), (0.3, 0.3, 0.33))                # loose threads
        picture.mark(torn, todo["fabric_border"], "tear in the fabric border")
    band = np.s_[:], picture.window(0, 0, 230)[1]                                              # the columns that hold teeth
    x, y, apart = x[band], y[band], apart[band]
    along = np.clip((y - slots[1]) / reach[1], -1, 1)
    bent = (1 - along ** 2) * ("squeezed_teeth" in todo)
    shade = rng.uniform(0.8, 1.1, (3, 64)).astype(np.float32)
    for side in (-1, 1):
        bend = bent * (side == bent_side)
        out = side * x - apart + 14 * bend                                                     # px outward from this row's line
        number = (y - phase) / pitch + 0.5 * (side > 0)
        number += bend * (0.28 * reach[1] / pitch * np.sin(np.pi * along) + 0.004 * out)       # pushed together, then aslant
        which = np.floor(number + 0.5).astype(np.int8)
        tooth = 16 + 4 * np.clip((12 - out) / 14, 0, 1) - np.abs(number - which) * pitch        # thicker at the tip
        tooth = np.minimum(tooth, np.minimum(out - tip, root - out))
        if "broken_teeth" in todo and side == broken_side:
            gone = (which >= first) & (which < first + count) & (out < cut)
            middle = (first + (count - 1) / 2 - 0.5 * (side > 0)) * pitch + phase
            outline = corners(side * (cut + tip) / 2, middle, (cut - tip) / 2, (count - 1) * pitch / 2 + 20)
            missing = Region(band, np.where(gone, tooth + 4, -1e3), outline, count * 36 * (cut - tip))
            picture.mark(missing, todo["broken_teeth"], "stretch of broken teeth")
            tooth = np.where(gone, -1e3, tooth)
        metal = np.float32([0.68, 0.68, 0.66]) * shade[side, which][..., None]
        picture.paint(Region(band, tooth, None, 0), metal, relief=14, slope=10)
    if "split_teeth" in todo:
        split = Region(band, np.where(apart > 8, apart + root + 4 - np.abs(x), -1e3),
                       corners(0, slots[0], gape + root + 4, 0.85 * reach[0]), 3 * (gape + root) * reach[0])
        picture.mark(split, todo["split_teeth"], "stretch of split teeth")
    if "squeezed_teeth" in todo:
        depth = np.minimum(root + 8 - np.abs(x), 0.85 * reach[1] - np.abs(y - slots[1]))
        squeezed = Region(band, depth, corners(0, slots[1], root + 8, 0.85 * reach[1]), 340 * reach[1])
        picture.mark(squeezed, todo["squeezed_teeth"], "stretch of squeezed teeth")
    picture.inside = np.minimum(border - 6 - np.abs(picture.x), np.abs(picture.x) - root - 8)     # the fabric's interior


# --- what every command shares ---

def pick_device(name=None):
    """The named device, else the accelerator if there is one, else the CPU. Raises ValueError for one that is not there."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def has_bf16(device):
    """Whether bfloat16 pays on this device: CUDA from compute capability 8, CPUs with AVX-512 instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def add_data_flags(parser, split):
    """The flags that say which images, the same in every command."""
    parser.add_argument("--data", default="drawn:pill", help="a folder, or drawn:pill | drawn:zipper | drawn:wood (default: %(default)s)")
    parser.add_argument("--object", help="the object to open when --data holds one folder per object")
    parser.add_argument("--split", default=split, help="which images: a list of split.json, or train | test (default: %(default)s)")


def run_main(main):
    """Run a command's main(); bad input ends it with one sentence on stderr and status 2 instead of a traceback."""
    try:
        status = main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


# --- python datasets.py: the audit ---

def audit(dataset):
    """What a data set holds, as plain values: images per kind, sizes, pixels and images per class, images with several defect types,
    unreadable samples. A broken file is a row of the audit, not its end. Counted at native size."""
    report = {"name": dataset.name, "images": len(dataset), "channels": dataset.channels, "kinds": Counter(s.kind for s in dataset.samples),
              "sizes": Counter(), "classes": {c: {"pixels": 0, "images": 0} for c in dataset.classes}, "several_types": 0, "problems": []}
    for i, sample in enumerate(dataset.samples):
        try:
            mask = dataset.read(i)[1]
        except ValueError as error:
            report["problems"].append(str(error))
            continue
        count = torch.bincount(mask.flatten(), minlength=len(dataset.classes)).tolist()
        report["sizes"]["{}x{}".format(*mask.shape)] += 1
        for name, pixels in zip(dataset.classes, count):
            report["classes"][name]["pixels"] += pixels
            report["classes"][name]["images"] += pixels > 0
        report["several_types"] += sum(pixels > 0 for pixels in count[1:]) > 1
    return report


def print_audit(report):
    print(f"{report['name']}: {report['images']} images, {'grey' if report['channels'] == 1 else 'RGB'}, "
          f"{report['several_types']} with several defect types")
    print("  images per kind:  " + ", ".join(f"{kind} {n}" for kind, n in report["kinds"].items()))
    print("  sizes:            " + listed(f"{size} ({n})" for size, n in report["sizes"].most_common()))
    total = sum(c["pixels"] for c in report["classes"].values()) or 1
    print(f"  {'class':<24}{'pixels':>14}{'share':>10}{'images':>8}")
    for i, (name, c) in enumerate(report["classes"].items()):
        print(f"  {i:>2} {name:<21}{c['pixels']:>14}{100 * c['pixels'] / total:>9.3f}%{c['images']:>8}")
    for problem in report["problems"]:
        print(f"  problem: {problem}")


def main():
    parser = argparse.ArgumentParser(description="Audit a data set: what it holds, what is wrong with it, and a contact sheet.")
    add_data_flags(parser, split=None)
    parser.add_argument("--annotation", default="spectrum", choices=["spectrum", "original"],
                        help="drawn data: exact classes, or one coarse binary mask as older data sets give (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the audit as JSON")
    parser.add_argument("--sheet", metavar="FILE", default="sheet.png", help="the contact sheet to write (default: %(default)s)")
    args = parser.parse_args()
    dataset = open_dataset(args.data, split=args.split, object=args.object, annotation=args.annotation)
    report = audit(dataset)
    print_audit(report)
    if args.json:
        write_json(args.json, report)
    rows = []
    for kind in report["kinds"]:
        tiles = []
        for i in [i for i, s in enumerate(dataset.samples) if s.kind == kind][:4]:
            try:
                image, mask = dataset.read(i, (160, 160))
                tiles += [image, overlay(image, mask)]
            except ValueError:
                continue                            # it is in the list of problems
        if tiles:
            rows.append((kind, tiles))
    if rows:
        write_image(args.sheet, sheet(rows, classes=dataset.classes, tile=160))
        print(f"contact sheet: {args.sheet}")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    run_main(main)
