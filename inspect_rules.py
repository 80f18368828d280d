"""Written rules for benign products: index mask -> findings -> "accept" or "reject" (arXiv 2310.17316).

    python inspect_rules.py                                                 the standards, an example
    python inspect_rules.py --standard pill --masks DIR --csv findings.csv  judge a folder: docs/rules.md
    python inspect_rules.py --standard FILE --data FOLDER                   the masks that datasets.py reads

A rule names classes, whose pixels count together, and one limit: "max_" + a measure, of all that is in the
image or of each component: pixels that touch at a side or a corner. Conventions that bite:

1. Reaching a limit rejects: value > 0 and value >= limit. The paper calls "< 4800 px" benign, so with
   max_area_px = 4800 an area of 4799 is accepted and 4800 rejected; max_count = 3 allows two; 0 allows none.
2. Pixels are native: those of the photo that the limits are for, whatever size the mask has.
3. A defect that no rule names is decided by "unnamed": "reject" (the default), "accept" or "error".

Needs numpy and pillow only. "measures", "judging" and "components" below make the verdicts.
"""
import argparse
import csv
import itertools
import json
import math
import re
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
IGNORE = 255        # a mask's value beside class indices: not to be scored, never a defect

# Class tables of the published Defect Spectrum masks: a pixel's value is an index into its object's tuple.
LABELS = {
    "pill": ("background", "color", "contamination", "crack", "faulty_imprint", "scratch", "pill_type"),
    "wood": ("background", "color", "crack", "scratch", "hole", "liquid"),
    "zipper": ("background", "broken_teeth", "fabric_border", "fabric_interior", "split_teeth",
               "squeezed_teeth"),
}

# The paper's three standards, in the JSON that users write; sizes are those of MVTec AD. The limits are the
# paper's. Ours, because the paper does not say: which labels its words mean (pill: "colour stain" is color;
# wood: "dent" is hole, "stain" liquid, "impurity" color; zipper: "teeth" and "fabric" are the labels below),
# that an area is that of all defects of the kind in the image together, and that a defect which is not
# declared benign (pill: faulty_imprint, scratch, pill_type; wood: crack) is rejected.
STANDARDS = {
    "pill": {"object": "pill", "native_size": [800, 800], "unnamed": "reject", "rules": [
        {"name": "no cracks", "classes": ["crack"], "max_area_px": 0},
        {"name": "contamination below 4000 px", "classes": ["contamination"], "max_area_px": 4000},
        {"name": "colour stains below 300 px", "classes": ["color"], "max_area_px": 300}]},
    "wood": {"object": "wood", "native_size": [1024, 1024], "unnamed": "reject", "rules": [
        {"name": "no scratch", "classes": ["scratch"], "max_area_px": 0},
        {"name": "no dent", "classes": ["hole"], "max_area_px": 0},
        {"name": "impurities below 250 px", "classes": ["color"], "max_area_px": 250},
        {"name": "stain below 1000 px", "classes": ["liquid"], "max_area_px": 1000}]},
    "zipper": {"object": "zipper", "native_size": [1024, 1024], "unnamed": "reject", "rules": [
        {"name": "no defect on teeth", "classes": ["broken_teeth", "split_teeth", "squeezed_teeth"],
         "max_area_px": 0},
        {"name": "fabric defect below 4800 px", "classes": ["fabric_border", "fabric_interior"],
         "max_area_px": 4800}]},
}


@dataclass(frozen=True)
class Rule:
    name: str
    classes: tuple                # their pixels count together
    limit: float | None           # the smallest value that is rejected; 0: none allowed; None: no rule
    measure: str = "area_px"      # a key of MEASURES
    per: str = "image"            # "image": all of its components together | "component": each
    min_component_px: float = 0   # native px; a smaller component is noise, which no measure sees


@dataclass(frozen=True)
class Standard:
    name: str                     # the file's, where it gives none
    object: str
    native_size: tuple | None     # (height, width) of the photos the limits are for; None: each mask's own
    px_per_mm: float | None       # what limits in mm were read with
    unnamed: str                  # "accept" | "reject" | "error"
    rules: tuple


@dataclass(frozen=True)
class Finding:
    image: str
    class_name: str               # the rule's classes joined with "+"
    area_px: float                # native px of what was measured: one component, or all of the image
    limit: float | None           # None where no rule names the class
    verdict: str                  # "accept" | "reject"
    rule: str                     # its name, or why there is none
    measure: str                  # a key of MEASURES: what value, limit and margin are
    per: str                      # "image" | "component"
    value: float
    margin: float | None          # limit - value: 0 and below rejects
    box: tuple                    # (top, left, bottom, right) edges, native px; empty if all was noise
    noise: int                    # components of this image that the rule left out as noise
    scale: float                  # native area of one mask pixel, px; 1.0: the mask has native size
    runs: np.ndarray = field(repr=False, compare=False)     # its pixels: see find_runs

    def row(self) -> tuple:
        """Its values in the order of COLUMNS."""
        *values, box, noise, scale, runs = vars(self).values()
        return (*values, *(box or [None] * 4), noise, scale)

    def __str__(self) -> str:
        """ "reject: crack, area_px 300, limit 0: no cracks" """
        value = f"{self.value:.10g}" if self.value == int(self.value) else f"{self.value:.2f}"
        limit = "" if self.limit is None else f", limit {self.limit:.10g}"
        noise = f" ({self.noise} smaller left out)" if self.noise else ""
        return f"{self.verdict}: {self.class_name}, {self.measure} {value}{limit}: {self.rule}{noise}"


COLUMNS = ("image", "class", "area_px", "limit", "verdict", "rule", "measure", "per", "value", "margin",
           "top", "left", "bottom", "right", "noise", "scale")


# --- measures ---
# A measure gets components, each a (3, n) array of runs in mask pixels (row, start, stop), and the (height,
# width) of a mask pixel in native pixels, as fractions. It returns one number >= 0, 0 for no components.
# To add a measure, write it here and name it in MEASURES: a rule may then say "max_" + its name.

def area_px(components, pixel) -> float:
    """Native pixels of all components together; exact, so that no area is rounded past its limit."""
    pixels = sum(int((stop - start).sum()) for row, start, stop in components)
    return float(pixels * pixel[0] * pixel[1])


def count(components, pixel) -> float:
    return float(len(components))


def length_px(components, pixel) -> float:
    """The largest distance between two corners of pixels of one component: 3 x 4 native pixels are 5 long."""
    unit = math.lcm(pixel[0].denominator, pixel[1].denominator)   # sides are whole numbers of 1 / unit px:
    high, wide = float(pixel[0] * unit), float(pixel[1] * unit)   # 5 px is never rounded to less than 5
    longest = 0.0
    for row, start, stop in components:
        rows, first = np.unique(row, return_index=True)
        left, right = start[first], np.maximum.reduceat(stop, first)
        for y, x in zip(rows, left):            # farthest are one row's left end and another's right end
            squares = ((abs(rows - y) + 1) * high) ** 2 + ((right - x) * wide) ** 2
            longest = max(longest, float(squares.max()))
    return math.sqrt(longest) / unit


MEASURES = {"area_px": area_px, "count": count, "length_px": length_px}
PER = {"count": "image", "length_px": "component"}                # others: image (default) or component


# --- judging ---

def judge(mask, standard, classes, image="mask", native_size=None) -> list[Finding]:
    """The findings of one mask: rules in the standard's order, then the present classes that no rule names.

    A rule per image gives one finding if its classes are there; a rule per component gives one for each
    component that is rejected, or one for its largest if none is. verdict(findings) is the decision.

    mask: (H, W) integers of any size, index into classes (tuple of names); 0 = background, 255 = IGNORE.
    native_size: (height, width) of the photo where the standard's is "mask" and this mask was resized.
    Raises ValueError naming the image: not an index mask of these classes, or an unnamed class is an error.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"{image}: a mask is (H, W) integers, not empty, not {mask.shape} of {mask.dtype}")
    unknown = mask[(mask < 0) | (mask >= len(classes)) & (mask != IGNORE)]
    if unknown.size:
        raise ValueError(f"{image}: mask has values {mask.min()} to {unknown.max()}, but the class table has "
                         f"0 to {len(classes) - 1} ({', '.join(classes)})")
    check_classes(standard, classes, f"standard {standard.name!r}")
    height, width = standard.native_size or native_size or mask.shape
    pixel = high, wide = Fraction(int(height), mask.shape[0]), Fraction(int(width), mask.shape[1])
    present = {classes[i] for i in np.unique(mask) if i < len(classes)}             # IGNORE is none
    named = {c for rule in standard.rules for c in rule.classes}
    unnamed = [c for c in classes[1:] if c in present - named]
    if unnamed and standard.unnamed == "error":
        raise ValueError(f"{image}: class {unnamed[0]!r} is in the mask, but no rule of standard "
                         f'{standard.name!r} names it; add one, or change "unnamed"')
    findings, why = [], f"no rule names this class (unnamed: {standard.unnamed})"
    for rule in standard.rules + tuple(Rule(why, (c,), None) for c in unnamed):     # these without a limit
        if present.isdisjoint(rule.classes):
            continue
        inside = np.isin(mask, [classes.index(c) for c in rule.classes])
        components = find_components(find_runs(inside))
        kept = [c for c in components if area_px([c], pixel) >= rule.min_component_px]
        found = []
        for measured in [[c] for c in kept] if rule.per == "component" and kept else [kept]:
            value = MEASURES[rule.measure](measured, pixel)
            decision, margin, box = standard.unnamed, None, ()
            if rule.limit is not None:
                margin = float(f"{rule.limit - value:.12g}")     # 0.7 - 1 is -0.3
                decision = "reject" if value > 0 and value >= rule.limit else "accept"
            runs = np.concatenate([np.zeros((3, 0), int), *measured], axis=1)
            if measured:
                row, start, stop = runs.tolist()
                box = (float(min(row) * high), float(min(start) * wide),
                       float((max(row) + 1) * high), float(max(stop) * wide))
            found.append(Finding(image, "+".join(rule.classes), area_px(measured, pixel), rule.limit,
                                 decision, rule.name, rule.measure, rule.per, value, margin, box,
                                 len(components) - len(kept), float(high * wide), runs))
        findings += [f for f in found if f.verdict == "reject"] or [max(found, key=attrgetter("value"))]
    return findings


def verdict(findings) -> str:
    """ "reject" if any finding rejects, else "accept"; no findings, no defect: "accept"."""
    return "reject" if any(f.verdict == "reject" for f in findings) else "accept"


# --- components ---

def find_runs(inside) -> np.ndarray:
    """(H, W) bool -> (3, n): row, start and stop of every stretch of True within a row, in reading order."""
    padded = np.pad(inside, ((0, 0), (1, 1)))                     # False at both ends: what starts also stops
    row, column = np.nonzero(padded[:, 1:] != padded[:, :-1])     # start, stop, start, stop, ...
    return np.stack([row[::2], column[::2], column[1::2]])


def find_components(runs) -> list:
    """(3, n) runs -> [(3, k) runs of each component, ...], all in reading order."""
    row, start, stop = runs
    # Runs of neighbouring rows touch, at a side or a corner, if each starts no later than the other stops.
    # Numbered row after row, starts and stops ascend: those above that touch run i are first[i]:last[i].
    width = stop.max(initial=0) + 1
    first = np.searchsorted(row * width + stop, (row - 1) * width + start)
    last = np.searchsorted(row * width + start, (row - 1) * width + stop, side="right")
    group = [[i] for i in range(len(row))]      # of each run; runs of one component share one list
    for lower in range(len(row)):
        for upper in range(first[lower], last[lower]):
            few, many = sorted((group[lower], group[upper]), key=len)
            if few is not many:
                many.extend(few)
                for i in few:                   # moving the few moves no run more than log2(n) times
                    group[i] = many
    distinct = {id(members): members for members in group}
    return [runs[:, sorted(members)] for members in distinct.values()]


# --- what is read: standards, class tables, masks; what is wrong is a ValueError that names the file ---

LIMITS_MM = {"max_area_mm2": ("area_px", 2), "max_length_mm": ("length_px", 1)}   # power of px_per_mm


def load_standard(name_or_path, classes=None) -> Standard:
    """The built-in standard of that name, else of that JSON file; checked against the classes if given."""
    name = str(name_or_path)
    if name not in STANDARDS and not Path(name).is_file():
        raise ValueError(f"no standard {name!r}: built in are {', '.join(STANDARDS)}; there is no such file")
    data = STANDARDS.get(name) or read_json(name)
    _check(data, name, ("object", "native_size", "rules"), ("unnamed", "name", "px_per_mm"))
    scale = data.get("px_per_mm")
    rules = tuple(_read_rule(rule, f"{name}: rules[{i}]", scale) for i, rule in enumerate(data["rules"]))
    limited = Counter((c, rule.measure, rule.per) for rule in rules for c in rule.classes)
    (c, measure, per), n = limited.most_common(1)[0]
    if n > 1:                       # one of them would never decide
        raise ValueError(f"{name}: rules limit the {measure} of {c!r} per {per} {n} times; keep one")
    size = None if data["native_size"] == "mask" else tuple(data["native_size"])
    unnamed = data.get("unnamed", "reject")
    standard = Standard(data.get("name", name), data["object"], size, scale, unnamed, rules)
    if classes:
        check_classes(standard, classes, name)
    return standard


def _read_rule(data, where, px_per_mm) -> Rule:
    limits = {"max_" + measure: (measure, 0) for measure in MEASURES} | LIMITS_MM
    _check(data, where, ("classes",), (*limits, "per", "min_component_px", "name"))
    keys = [key for key in limits if key in data]
    if len(keys) != 1:
        raise ValueError(f"{where}: give one of {', '.join(limits)}, not {' and '.join(keys) or 'none'}")
    key, limit, (measure, power) = keys[0], data[keys[0]], limits[keys[0]]
    per = data.get("per", PER.get(measure, "image"))
    if per != PER.get(measure, per):
        raise ValueError(f"{where}: per must be {PER[measure]!r} for {key}")
    name = data.get("name", f"{'+'.join(data['classes'])}: {key} {limit} per {per}")
    if power:
        if px_per_mm is None:
            raise ValueError(f"{where}: {key} needs px_per_mm, which the standard does not give")
        # In exact fractions of the decimals as written, rounded once. In floating point 0.07 mm2 at 10 px per
        # mm are 0.07 * 10**2 = 7.000000000000001 px, which an area of 7 px would not reach.
        pixels = float(Fraction(str(limit)) * Fraction(str(px_per_mm)) ** power)
        name, limit = f"{name} ({limit} {key.split('_')[-1]} = {pixels:.10g} px)", pixels
    return Rule(name, tuple(data["classes"]), limit, measure, per, data.get("min_component_px", 0))


def _check(data, where, required, optional):
    """Refuse a JSON object that lacks a key, has an unknown one, or a value that the key cannot have."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a JSON object, not {repr(data)[:60]}")
    for key in (*required, *data):
        if key not in data:
            raise ValueError(f"{where}: the key {key!r} is missing")
        if key not in required + optional:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(required + optional)}")
        value = data[key]
        number = type(value) in (int, float) and 0 <= value < 1e15    # no isinstance: JSON's true is none
        items = value if isinstance(value, list) else []
        names = all(isinstance(c, str) and c.strip() and c != "background" for c in items)
        size = [type(n) for n in items] == [int, int] and 0 < min(items) <= max(items) < 10**6
        text = isinstance(value, str) and value.strip(), "a text"
        fits, wanted = {
            "object": text, "name": text,
            "native_size": (size or value == "mask", '[height, width] in whole pixels, or "mask"'),
            "unnamed": (value in ("reject", "accept", "error"), '"reject", "accept" or "error"'),
            "px_per_mm": (number and value > 0, "a number > 0"),
            "rules": (items, "a list of rules"),
            "classes": (items and names, "a list of names of defects"),
            "per": (value in ("image", "component"), '"image" or "component"'),
            "max_count": (number and value == int(value), "a whole number >= 0"),
        }.get(key, (number, "a number >= 0"))
        if not fits:
            raise ValueError(f"{where}: {key} must be {wanted}, not {repr(value)[:60]}")


def check_classes(standard, classes, where):
    """Refuse a misspelt class: it would have area 0 in every mask, and its rule would never reject."""
    unknown = {c for rule in standard.rules for c in rule.classes} - set(classes)
    if unknown:
        raise ValueError(f"{where}: rules name {sorted(unknown)}; the class table has {', '.join(classes)}; "
                         "correct one of the two")


def check_shape(shape, native_size, where, squashed=False):
    """Refuse a mask whose (height, width) is not native_size resized; if squashed, only one on its side."""
    (h, w), (height, width) = shape, native_size
    turned = abs(h * height - w * width) < height + width         # give or take a pixel of rounding
    if abs(h * width - w * height) >= height + width and (turned or not squashed):
        remedy = (": swapped? correct native_size, or turn the mask" if turned else
                  ", of another shape; inspect_rules.py --squashed takes it as the whole photo")
        raise ValueError(f"{where}: mask is {list(shape)}, native_size {list(native_size)} [height, width]"
                         f"{remedy}")


def read_json(path):
    """The JSON file's value."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))     # -sig: some editors add a mark
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON in UTF-8: {error}") from None


def read_classes(path) -> tuple:
    """classes.json, {"0": "background", "1": "crack", ...} or the names in a list -> a tuple of names."""
    table = read_json(path)
    names = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else table
    texts = isinstance(names, list) and all(isinstance(c, str) and c for c in names)
    if not texts or names[:1] != ["background"] or len(set(names)) < len(names):
        raise ValueError(f'{path}: expected {{"0": "background", "1": "crack", ...}}, no gaps, no repeats, '
                         f"not {repr(table)[:60]}")
    return tuple(names)


def open_picture(path) -> Image.Image:
    """A loaded picture, turned upright by its EXIF tag; of several frames the first."""
    try:
        with Image.open(path) as picture:
            deep = re.search("RGBA?;16", str(getattr(picture, "tile", "")))
            picture = ImageOps.exif_transpose(picture)
    except Exception as error:      # Pillow raises OSError, SyntaxError, struct.error, ... by format
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    if deep:                        # Pillow reads the upper 8 bits: photos of 12 bits would be nearly black
        raise ValueError(f"{path}: is colour of 16 bits, of which only 8 can be read; save it with 8 bits")
    return picture


def read_mask(path, classes, label=None) -> np.ndarray:
    """(H, W) class indices of a picture of one channel, or of equal ones: grey, 16 bits, palette (indices).

    label: the class of the pixels from 128 on, or of 0/1 masks from 1, in black and white; else refused.
    """
    picture = open_picture(path)
    if label is not None and picture.mode in ("1", "P"):
        picture = picture.convert("L")                            # what its palette shows
    mode, mask = picture.mode, np.array(picture)
    if mode == "RGBA" and mask[..., 3].min() == 255:
        mode, mask = "RGB", mask[..., :3]
    if mode == "RGB" and (mask == mask[..., :1]).all():
        mode, mask = "L", mask[..., 0]
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"{path}: is {mode}, but a mask has one channel, whose values are class indices; "
                         "data/convert.py reads masks in colours")
    top = int(mask.max())
    if label is not None:
        return (mask >= (1 if top == 1 else 128)) * label
    if top and Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path}: JPEG changes class indices; export masks anew as PNG (data/convert.py "
                         "reads JPEG in black and white)")
    if mode == "1" or (top in (255, 65535) and top >= len(classes) and np.isin(mask, (0, top)).all()):
        raise ValueError(f"{path}: is a binary 0/255 mask; values must be class indices 0, 1, 2, ... "
                         "data/convert.py makes them")
    return mask


def listed(names, most=8):
    """'a, b, c and 5 more', 'none' for nothing."""
    names = [str(name) for name in names] or ["none"]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def grouped(named):
    """The sentences of [(name, sentence), ...]; those that differ in paths and numbers alone are one:

    "3 files, a, b, c; of the first: in/a.png is 24x32 but ..."
    """
    groups = {}
    for name, sentence in named:
        groups.setdefault(re.sub(r"\S*[/\\]\S*|[\d, ]+", "", sentence), {})[name] = sentence
    many = "{} files, {}; of the first: ".format
    return [(many(len(group), listed(group, 3)) if len(group) > 1 else "") + next(iter(group.values()))
            for group in groups.values()]


# --- how good verdicts are ---

def recall_fpr(truths, verdicts) -> dict:
    """Recall = tp / (tp + fn) and false positive rate = fp / (fp + tn) of verdicts on images.

    Positive: truly "reject". A rate without a denominator is None. Raises ValueError for other words.
    """
    pairs = Counter(zip(truths, verdicts, strict=True))
    if unknown := {*itertools.chain(*pairs)} - {"accept", "reject"}:
        raise ValueError(f"a verdict is accept or reject, not {unknown}")
    tp, fn = pairs["reject", "reject"], pairs["reject", "accept"]
    fp, tn = pairs["accept", "reject"], pairs["accept", "accept"]
    return {"recall": tp / (tp + fn) if tp + fn else None, "fpr": fp / (fp + tn) if fp + tn else None,
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def wilson_interval(hits, trials):
    """95 % score interval (low, high) of a rate seen `hits` times in `trials`; None without trials.

    Its ends p solve |hits / trials - p| = z * sqrt(p (1 - p) / trials): Wilson, JASA 22 (1927).
    """
    if trials == 0:
        return None
    z = 1.959963984540054           # 2.5 % of the normal distribution lie above it
    middle, reach = hits + z * z / 2, z * math.sqrt(hits * (trials - hits) / trials + z * z / 4)
    return max(0.0, (middle - reach) / (trials + z * z)), min(1.0, (middle + reach) / (trials + z * z))


# --- the command ---

def find_masks(folder) -> dict:
    """{path below folder without suffix: path} of all pictures, or of those in mask/ or masks/ if any are."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*"))
             if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    paths = [path for path in paths if {"mask", "masks"} & {*path.parts[:-1]}] or [
        path for path in paths if path.suffix.lower() not in (".jpg", ".jpeg")]         # those are photos
    masks = {path.with_suffix("").as_posix(): folder / path for path in paths}
    if not masks:
        raise ValueError(f"--masks {folder}: no masks (.png, .bmp, .tif, .webp) below this folder")
    if len(masks) < len(paths):
        raise ValueError(f"--masks {folder}: two masks differ only in their suffix; rename one")
    return masks


def find_classes(folder, standard, classes_file):
    """(class table, its source): that file, else the classes.json in, above or below folder, else LABELS."""
    above = [up / "classes.json" for up in (folder, *folder.parents) if (up / "classes.json").is_file()]
    found = [classes_file] if classes_file else above[:1] or sorted(folder.rglob("classes.json"))
    if len(found) > 1:
        raise ValueError(f"--masks holds {len(found)} classes.json; give a folder with one, or --classes")
    if found:
        return read_classes(found[0]), found[0]
    if standard.object in LABELS:
        return LABELS[standard.object], f"built-in labels of {standard.object}; no classes.json was found"
    raise ValueError(f"no classes.json, and no built-in labels of {standard.object!r}; give --classes FILE")


def show_standards():
    """Print the built-in standards as JSON to copy, and judge a made-up mask."""
    for data in STANDARDS.values():
        print(json.dumps(data).replace(' {"name"', '\n  {"name"') + "\n")
    mask = np.zeros((400, 400), np.uint8)                         # half the native size: each pixel counts 4
    mask[100:130, 100:130] = LABELS["pill"].index("contamination")
    mask[200:203, 50:350] = LABELS["pill"].index("crack")
    findings = judge(mask, load_standard("pill"), LABELS["pill"])
    print("A made-up mask of 400 x 400 pixels, judged by the pill standard:")
    print(f"made_up: {verdict(findings)}", *findings, sep="\n    ")
    print("\nNext: python inspect_rules.py --standard pill --masks DIR --csv findings.csv")


def open_masks(args, standard):
    """(class table, its source, {image: (file, reader of its mask, of its photo)}) of --masks or --data."""
    if args.masks:
        masks = find_masks(Path(args.masks))
        classes, source = find_classes(Path(args.masks).resolve(), standard, args.classes)
        return classes, source, {image: (path, partial(read_mask, path, classes), partial(find_photo, path))
                                 for image, path in masks.items()}
    import datasets                 # not above: it imports this module, and torch, which --masks is without
    data = datasets.open_dataset(args.data, object=args.object)

    def photo_of(i):
        with suppress(ValueError):                                # verdicts need the mask alone
            image = data.read(i)[0]
            return Image.fromarray(image.expand(3, *image.shape[1:]).permute(1, 2, 0).numpy())
        return read_photo(data.samples[i].image)
    return data.classes, args.data, {
        sample.name: (sample.mask or sample.name, partial(data.read_mask, i), partial(photo_of, i))
        for i, sample in enumerate(data.samples)}


def inspect_folder(args) -> int:
    """Judge every mask of --masks or --data; print, draw and write the findings. Returns the exit status."""
    folder = Path(args.masks or args.data).resolve()
    if args.overlay and Path(args.overlay).resolve().is_relative_to(folder):
        raise ValueError(f"--overlay {args.overlay} is inside {folder}; its pictures would be read as masks")
    standard = load_standard(args.standard)
    classes, source, masks = open_masks(args, standard)
    check_classes(standard, classes, args.standard)
    print(f"class table: {source}")
    for path in filter(None, (args.csv, args.json)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows, verdicts, errors = [], {}, {}
    for image, (path, read, photo) in masks.items():
        try:
            mask = read()
            if standard.native_size:
                check_shape(mask.shape, standard.native_size, path, args.squashed)
            findings = judge(mask, standard, classes, image)
            if args.overlay and findings:
                target = Path(args.overlay) / f"{image}_verdict.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                draw_overlay(mask, findings, photo()).save(target)
        except ValueError as error:                               # a bad mask does not cost the others
            errors[image] = str(error)
            continue
        verdicts[image] = verdict(findings)
        print(f"{image}: {verdicts[image]}", *findings, sep="\n    ")
        scale = math.prod(standard.native_size or mask.shape) / mask.size
        none = Finding(image, "(no defect)", 0.0, None, "accept", "", "area_px", "image", 0.0, None, (), 0,
                       scale, None)
        rows += [finding.row() for finding in findings or [none]]
    if args.csv:
        with open(f"{args.csv}.tmp", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        Path(f"{args.csv}.tmp").replace(args.csv)                 # whole, or what was there before
    if args.json:
        result = {"standard": STANDARDS.get(args.standard) or read_json(args.standard), "classes": classes,
                  "verdicts": verdicts, "errors": errors,
                  "findings": [dict(zip(COLUMNS, row)) for row in rows]}
        Path(f"{args.json}.tmp").write_text(json.dumps(result, indent=1), encoding="utf-8")
        Path(f"{args.json}.tmp").replace(args.json)
    counts = Counter(verdicts.values())
    print(f"{standard.name} standard: {counts['accept']} accepted, {counts['reject']} rejected, "
          f"{len(errors)} not judged")
    for error in grouped(errors.items()):
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else int(counts["reject"] > 0)


# --- pictures ---

COLOURS = {"accept": (40, 220, 80), "reject": (255, 60, 60)}
SHOWN = 12                          # findings that are numbered and explained


def read_photo(path):
    """A photo as RGB; None where it is missing or damaged."""
    with suppress(ValueError):
        return open_picture(path).convert("RGB")


def find_photo(path):
    """image/<kind>/<stem>.* of mask/<kind>/<stem>_mask.png, as RGB; None where none can be read."""
    for folder in path.parents:
        if folder.name in ("mask", "masks"):
            photos = folder.with_name(folder.name.replace("mask", "image")) / path.parent.relative_to(folder)
            for suffix in sorted(IMAGE_SUFFIXES):
                if photo := read_photo(photos / (path.stem.removesuffix("_mask") + suffix)):
                    return photo


def draw_overlay(mask, findings, photo=None) -> Image.Image:
    """The photo, or else the mask in grey, with every finding outlined (red: rejected, green: accepted) and
    numbered, and its sentence below; enlarged by a whole factor if small.

    mask: (H, W) indices; findings: what judge() returned for it; photo: RGB of any size.
    """
    if photo is None:
        photo = Image.fromarray(np.where(mask > 0, 130, 50).astype(np.uint8)).convert("RGB")
    photo = ImageOps.scale(photo, max(1, math.ceil(512 / max(photo.size))), Image.Resampling.NEAREST)
    border = 2 * max(2, max(photo.size) // 340)         # outlines lie outside of pixels: room at the edges
    canvas = ImageOps.expand(photo, border)
    for decision, colour in COLOURS.items():
        inside = np.zeros(mask.shape, np.uint8)
        runs = [finding.runs for finding in findings if finding.verdict == decision]
        for row, start, stop in np.concatenate([np.zeros((3, 0), int), *runs], axis=1).T:
            inside[row, start:stop] = 255
        area = ImageOps.expand(Image.fromarray(inside).resize(photo.size, Image.Resampling.NEAREST), border)
        canvas.paste(colour, mask=ImageChops.subtract(area.filter(ImageFilter.MaxFilter(border + 1)), area))

    font = ImageFont.load_default(max(15, max(photo.size) // 52))
    width, step = max(canvas.width, 480), int(1.35 * font.size)
    letters = int((width - 16) / font.getlength("n"))
    numbers, lines = {}, []
    for number, finding in enumerate(sorted(findings, key=attrgetter("verdict"), reverse=True)[:SHOWN], 1):
        if finding.runs.size:       # at its first pixel; several in one text, or they would hide each other
            numbers.setdefault(tuple(finding.runs[:2, 0]), []).append(str(number))
        text = textwrap.wrap(f"{number} {finding}", letters, subsequent_indent="   ")
        lines += [(line, COLOURS[finding.verdict]) for line in text]
    if len(findings) > SHOWN:
        lines.append((f"and {len(findings) - SHOWN} more", "white"))
    canvas = ImageOps.expand(canvas, (0, 0, width - canvas.width, step * len(lines) + step // 2))
    pen = ImageDraw.Draw(canvas)
    for (row, column), texts in numbers.items():
        text = ",".join(texts)
        x = min(border + column * photo.width / mask.shape[1], border + photo.width - font.getlength(text))
        y = max(border + row * photo.height / mask.shape[0], font.size)
        pen.text((x, y), text, "white", font, "ls", stroke_width=border // 2, stroke_fill="black")
    for i, (line, colour) in enumerate(lines):
        pen.text((8, 2 * border + photo.height + step * i), line, colour, font)
    return canvas


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Judge a folder of index masks by written rules. Without flags: the standards.",
        epilog="Exit status: 0 all accepted, 1 something rejected, 2 bad input (the rest is still judged).")
    add = parser.add_argument
    add("--standard", metavar="NAME|FILE", help=f"built-in standard ({', '.join(STANDARDS)}) or a JSON file")
    add("--masks", metavar="DIR", help="masks at any depth; those in mask/ folders if there are any")
    add("--data", metavar="FOLDER", help="instead of --masks: a data set, whatever datasets.py reads")
    add("--object", help="the object to judge when --data holds one folder per object")
    add("--classes", metavar="FILE", help="class table of --masks (default: classes.json near, or built in)")
    add("--squashed", action="store_true", help="take masks of other proportions: each shows the whole photo")
    add("--csv", metavar="FILE", help="write the findings, at least one row per image")
    add("--json", metavar="FILE", help="write standard, classes, verdicts, errors and findings")
    add("--overlay", metavar="DIR", help="draw every image with a finding: outlined, with the reasons")
    args = parser.parse_args(argv)
    if not any(vars(args).values()):
        show_standards()
        return 0
    if not args.standard or bool(args.masks) == bool(args.data):
        parser.error("--standard and --masks, or --standard and --data, go together")
    try:
        return inspect_folder(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")             # names that the terminal cannot show
    sys.exit(main())
