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
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import inspect_rules
from drawn import DRAWN, draw
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

    def caption(self, i):
        """One sentence on what image i shows; empty where the data set has none."""
        return self.samples[i].caption

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
    """The drawn products of drawn.py, made on request at any size: 20 images of each kind."""

    def __init__(self, product, size=None, annotation="spectrum"):
        kinds = DRAWN[product].kinds
        self.product, self.annotation = product, annotation
        self.name, self.size, self.channels = f"drawn:{product}", size, 3
        self.classes = DRAWN[product].classes if annotation == "spectrum" else ("background", "defect")
        self.samples = [Sample(f"{kind}/{n:03d}", None, None, kind, n * len(kinds) + k)     # label: the index to draw
                        for k, kind in enumerate(kinds) for n in range(20)]

    def native_size(self, i):
        return DRAWN[self.product].native

    def caption(self, i):
        return draw(self.product, 0, self.samples[i].label, (8, 8))[4]

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
    """Samples of image_root/<kind>/<stem>.* with mask_root/<kind>/<stem>_mask.* or <stem>.*: by stem, never by position."""
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
                         f"image ({len(without_image)}): {listed(without_image)}. The mask of {image_root.name}/<kind>/<stem>.png is "
                         f"{mask_root.name}/<kind>/<stem>_mask.png; only images in a folder named good need none")
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
    label = {kind: i for i, kind in enumerate(kinds, 1)}
    return ["background"] + kinds, _pair(root / "test", root / "ground_truth", label.get)


def few_shot_split(dataset, n=FEW_SHOT):
    """(train, rest): indices of the first n images of each kind in natural order, and of all others (the authors' split)."""
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
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


# --- python datasets.py: the audit ---

def audit(dataset):
    """What a data set holds, as plain values, counted at native size. A broken file is a row of the audit, not its end."""
    report = {"name": dataset.name, "images": len(dataset), "channels": dataset.channels,
              "kinds": Counter(s.kind for s in dataset.samples), "sizes": Counter(),
              "classes": {c: {"pixels": 0, "images": 0} for c in dataset.classes}, "several_types": 0,
              "captions": [c for c in map(dataset.caption, range(len(dataset))) if c], "problems": []}
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
    print(f"  captions:         {len(report['captions'])}" + (f", like: {report['captions'][0]}" if report["captions"] else ""))
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
