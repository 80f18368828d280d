"""Written rules for benign products: index mask -> findings -> "accept" or "reject" (arXiv 2310.17316).

    python inspect_rules.py                                                 the standards, an example
    python inspect_rules.py --standard pill --masks DIR --csv findings.csv  judge a folder: docs/rules.md

A rule names classes, whose pixels count together, and one limit: "max_" + a measure, of all that is in the
image or of each component. Pixels that touch at a side or a corner are one component. Conventions that bite:

1. Reaching a limit rejects: value > 0 and value >= limit. The paper calls "< 4800 px" benign, so with
   max_area_px = 4800 an area of 4799 is accepted and 4800 rejected; max_count = 3 allows two; 0 allows none.
2. Pixels are NATIVE pixels, those of the photo that the limits are for; native_size is [height, width]. Masks
   may be resized photos but no crops: other shapes are refused unless told --squashed. "native_size": "mask"
   is for photos that differ in size: each mask has that of its photo.
3. A defect that no rule names is decided by "unnamed": "reject" (the default), "accept" or "error".

Needs numpy and pillow only, so that it can be read, and trusted, alone: verdicts are made by the parts
"measures", "judging" and "components"; what follows reads, refuses, writes and draws.
"""
import argparse
import csv
import json
import math
import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

# Class tables of the published Defect Spectrum masks: a pixel's value is an index into its object's tuple.
LABELS = {
    "pill": ("background", "color", "contamination", "crack", "faulty_imprint", "scratch", "pill_type"),
    "wood": ("background", "color", "crack", "scratch", "hole", "liquid"),
    "zipper": ("background", "broken_teeth", "fabric_border", "fabric_interior", "split_teeth",
               "squeezed_teeth"),
}

# The paper's three standards, in the JSON that users write; sizes are those of MVTec AD. The limits are the
# paper's. Ours, because the paper does not say:
# - which labels its words mean. zipper: "teeth" and "fabric" are the labels below; pill: "colour stain" is
#   color; wood: "dent" is hole, "stain" is liquid, "impurity" is color.
# - that an area is that of all defects of the kind in the image together, not of each.
# - "unnamed": "reject". The standards list what is benign, so a defect not declared benign (pill:
#   faulty_imprint, scratch, pill_type; wood: crack) is rejected.
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
    runs: np.ndarray | None = field(default=None, repr=False, compare=False)    # its pixels: see find_runs

    def row(self) -> tuple:
        """Its values in the order of COLUMNS."""
        box = self.box or (None, None, None, None)
        return (self.image, self.class_name, self.area_px, self.limit, self.verdict, self.rule, self.measure,
                self.per, self.value, self.margin, *box, self.noise, self.scale)

    def sentence(self) -> str:
        """ "reject: crack, area_px 300, limit 0: no cracks" """
        value = f"{self.value:.10g}" if self.value == int(self.value) else f"{self.value:.2f}"
        limit = "" if self.limit is None else f", limit {self.limit:.10g}"
        noise = f" ({self.noise} smaller left out)" if self.noise else ""
        return f"{self.verdict}: {self.class_name}, {self.measure} {value}{limit}: {self.rule}{noise}"


COLUMNS = ("image", "class", "area_px", "limit", "verdict", "rule", "measure", "per", "value", "margin",
           "top", "left", "bottom", "right", "noise", "scale")
NO_DEFECT = "(no defect)"         # class of the row that an image without findings gets


# --- measures ---
# A measure gets the components that a limit is about (those of the image, or one of them; none if all are
# noise) and the (height, width) of a mask pixel in native pixels, as fractions. It returns one number >= 0.
# A component is a (3, n) array of runs in mask pixels: row, start, stop.
# To add a measure, write it here and name it in MEASURES: a rule may then say "max_" + its name.

def area_px(components, pixel) -> float:
    """Native pixels of all components together; exact, so that no area is rounded past its limit."""
    pixels = sum(int((stop - start).sum()) for row, start, stop in components)
    return float(pixels * pixel[0] * pixel[1])


def count(components, pixel) -> float:
    """How many components there are."""
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

    Args:
        mask:        (H, W) integers, index into classes; 0 = background. Of any size: see convention 2.
        classes:     tuple of names, index -> name.
        image:       name that the findings carry.
        native_size: (height, width) of the photo where the standard's is "mask" and this mask was resized.
    Raises: ValueError naming the image: not an index mask of this class table, or a class that no rule names
        where the standard's unnamed is "error".
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"{image}: a mask is (H, W) integers, not empty, not {mask.shape} of {mask.dtype}")
    if mask.min() < 0 or mask.max() >= len(classes):
        raise ValueError(f"{image}: mask has values {mask.min()} to {mask.max()}, but the class table has "
                         f"0 to {len(classes) - 1} ({', '.join(classes)})")
    check_classes(standard, classes, f"standard {standard.name!r}")
    height, width = standard.native_size or native_size or mask.shape
    pixel = Fraction(int(height), mask.shape[0]), Fraction(int(width), mask.shape[1])
    present = {classes[i] for i in np.unique(mask)}
    named = {c for rule in standard.rules for c in rule.classes}
    unnamed = [c for c in classes[1:] if c in present - named]
    if unnamed and standard.unnamed == "error":
        raise ValueError(f"{image}: class {unnamed[0]!r} is in the mask, but no rule of standard "
                         f'{standard.name!r} names it; add one, or change "unnamed"')
    why = f"no rule names this class (unnamed: {standard.unnamed})"
    findings = []
    for rule in standard.rules + tuple(Rule(why, (c,), None) for c in unnamed):
        if not present.isdisjoint(rule.classes):
            inside = np.isin(mask, [i for i, c in enumerate(classes) if c in rule.classes])
            findings += _apply(rule, find_components(find_runs(inside)), pixel, image, standard.unnamed)
    return findings


def _apply(rule, components, pixel, image, unnamed) -> list[Finding]:
    """The findings of one rule; components: all of its classes."""
    kept = [c for c in components if area_px([c], pixel) >= rule.min_component_px]
    noise = len(components) - len(kept)
    if rule.per == "image" or not kept:
        return [_finding(rule, kept, pixel, image, unnamed, noise)]
    each = [_finding(rule, [c], pixel, image, unnamed, noise) for c in kept]
    return [f for f in each if f.verdict == "reject"] or [max(each, key=attrgetter("value"))]


def _finding(rule, components, pixel, image, unnamed, noise) -> Finding:
    (high, wide), box = pixel, ()
    runs = np.concatenate([np.zeros((3, 0), int), *components], axis=1)
    row, start, stop = runs
    if components:
        box = (float(int(row.min()) * high), float(int(start.min()) * wide),
               float(int(row.max() + 1) * high), float(int(stop.max()) * wide))
    value, margin, decision = MEASURES[rule.measure](components, pixel), None, unnamed
    if rule.limit is not None:
        margin = rule.limit - value
        decision = "reject" if value > 0 and value >= rule.limit else "accept"
    return Finding(image, "+".join(rule.classes), area_px(components, pixel), rule.limit, decision, rule.name,
                   rule.measure, rule.per, value, margin, box, noise, float(high * wide), runs)


def verdict(findings) -> str:
    """ "reject" if any finding rejects, else "accept"; no findings, no defect: "accept"."""
    return "reject" if any(f.verdict == "reject" for f in findings) else "accept"


# --- components ---

def find_runs(inside) -> np.ndarray:
    """(H, W) bool -> (3, n): row, start and stop of every stretch of True within a row, in reading order."""
    padded = np.pad(inside, ((0, 0), (1, 1)))                     # False at both ends: what starts also stops
    row, column = np.nonzero(padded[:, 1:] != padded[:, :-1])     # start, stop, start, stop, ...
    return np.stack([row[::2], column[::2], column[1::2]])


def touching_pairs(runs) -> list:
    """[(upper, lower), ...]: the runs of neighbouring rows that touch at a side or a corner.

        row 0   A A . . . B B      A touches C at a side. B and C touch at a corner:
        row 1   . C C C C . .      B starts in the column where C stops.
        row 2   . . . . . . .      D touches nothing: above it lies an empty row,
        row 3   D D . E . . .      and between D and E a gap.            Pairs: (A, C), (B, C)

    runs: (3, n) as find_runs gives them. Two touch if each starts no later than the other stops.
    """
    row, start, stop = runs.tolist()
    pairs, first = [], 0            # runs before `first` lie too high or too far left for all that follow
    for lower in range(len(row)):
        above = row[lower] - 1
        while row[first] < above or (row[first] == above and stop[first] < start[lower]):
            first += 1
        upper = first
        while row[upper] == above and start[upper] <= stop[lower]:
            pairs.append((upper, lower))
            upper += 1
    return pairs


def join(pairs, n) -> list:
    """The group of each of n things, a pair being in one group: 0, 1, ... in order of their first members."""
    parent = list(range(n))         # union-find: parents lead to the one member that stands for the group

    def find(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]       # shortens the way for those who come after
            i = parent[i]
        return i

    for a, b in pairs:
        parent[find(b)] = find(a)
    numbers = {}
    return [numbers.setdefault(find(i), len(numbers)) for i in range(n)]


def find_components(runs) -> list:
    """(3, n) runs -> [(3, k) runs of each component, ...], all in reading order."""
    number = np.array(join(touching_pairs(runs), runs.shape[1]))
    order = np.argsort(number, kind="stable")                     # stable: keeps the order within a component
    return np.split(runs[:, order], np.cumsum(np.bincount(number))[:-1], axis=1)


# --- what is read: standards, class tables, masks ---

LIMITS_MM = {"max_area_mm2": ("area_px", 2), "max_length_mm": ("length_px", 1)}   # power of px_per_mm


def load_standard(name_or_path, classes=None) -> Standard:
    """The built-in standard of that name, else the JSON file there; checked against the class table if given.

    Raises: ValueError, one sentence that names the file and the key.
    """
    name = str(name_or_path)
    if name not in STANDARDS and not Path(name).is_file():
        raise ValueError(f"no standard {name!r}: built in are {', '.join(STANDARDS)}; there is no such file")
    data = STANDARDS.get(name) or read_json(name)
    _check(data, name, ("object", "native_size", "rules"), ("unnamed", "name", "px_per_mm"))
    scale, unnamed = data.get("px_per_mm"), data.get("unnamed", "reject")
    rules = tuple(_read_rule(rule, f"{name}: rules[{i}]", scale) for i, rule in enumerate(data["rules"]))
    limited = Counter((c, rule.measure, rule.per) for rule in rules for c in rule.classes)
    (c, measure, per), n = limited.most_common(1)[0]
    if n > 1:                       # one of them would never decide
        raise ValueError(f"{name}: rules limit the {measure} of {c!r} per {per} {n} times; keep one")
    size = None if data["native_size"] == "mask" else tuple(data["native_size"])
    standard = Standard(data.get("name", name), data["object"], size, scale, unnamed, rules)
    if classes is not None:
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
    for key in required:
        if key not in data:
            raise ValueError(f"{where}: the key {key!r} is missing")
    for key, value in data.items():
        if key == "connectivity":
            raise ValueError(f"{where}: unknown key {key!r}: pixels touch at sides and corners; remove it")
        if key not in required + optional:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(required + optional)}")
        fits, wanted = _expected(key, value)
        if not fits:
            raise ValueError(f"{where}: {key} must be {wanted}, not {repr(value)[:60]}")


def _expected(key, value):
    """(whether the key may have the value, what it may have)"""
    text = isinstance(value, str) and value.strip()
    some = isinstance(value, list) and len(value) > 0
    number = type(value) in (int, float) and 0 <= value < 1e15    # no isinstance: JSON's true is none
    size = some and len(value) == 2 and all(type(n) is int and 0 < n < 10**6 for n in value)
    names = some and all(isinstance(c, str) and c.strip() and c != "background" for c in value)
    return {"object": (text, "a text"),
            "name": (text, "a text"),
            "native_size": (size or value == "mask", '[height, width] in whole pixels, or "mask"'),
            "unnamed": (value in ("reject", "accept", "error"), '"reject", "accept" or "error"'),
            "px_per_mm": (number and value > 0, "a number > 0"),
            "rules": (some, "a list of rules"),
            "classes": (names, "a list of names of defects"),
            "per": (value in ("image", "component"), '"image" or "component"'),
            "max_count": (number and value == int(value), "a whole number >= 0"),
            }.get(key, (number, "a number >= 0"))


def check_classes(standard, classes, where):
    """Refuse a misspelt class: it would have area 0 in every mask, and its rule would never reject."""
    unknown = {c for rule in standard.rules for c in rule.classes} - set(classes)
    if unknown:
        raise ValueError(f"{where}: rules name {sorted(unknown)}; the class table has {', '.join(classes)}")


def check_shape(shape, native_size, where, squashed=False):
    """Refuse a mask whose (height, width) cannot be native_size resized.

    squashed: it is the whole photo, in another shape; what lies on its side is still refused.
    """
    (h, w), (height, width) = shape, native_size
    if abs(h * width - w * height) < height + width:              # give or take a pixel of rounding
        return
    fact = f"{where}: mask is {list(shape)}, native_size {list(native_size)} [height, width]"
    if abs(h * height - w * width) < height + width:
        raise ValueError(f"{fact}: swapped? correct native_size, or turn the mask")
    if not squashed:
        raise ValueError(f"{fact}, of another shape; pass --squashed if it is the whole photo")


def read_json(path):
    """The JSON file's value. Raises: ValueError naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))     # -sig: some editors add a mark
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None


def read_classes(path) -> tuple:
    """classes.json, {"0": "background", "1": "crack", ...} -> ("background", "crack", ...)."""
    table = read_json(path)
    names = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else []
    texts = all(isinstance(c, str) and c for c in names)
    if not texts or names[:1] != ["background"] or len(set(names)) < len(names):
        raise ValueError(f'{path}: expected {{"0": "background", "1": "crack", ...}}, no gaps, no repeats, '
                         f"not {repr(table)[:60]}")
    return tuple(names)


def read_mask(path, classes=()) -> np.ndarray:
    """(H, W) class indices of a picture of one channel: 8- or 16-bit grey, or palette (indices, not colours).

    Raises: ValueError naming the file: no image, several channels, only 0 and 255 (unless classes reach 255).
    """
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except Exception as error:      # pillow raises many types for a damaged file; to the user they are one
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"{path}: is {mode}, but a mask has one channel, whose values are class indices")
    top = int(mask.max())
    if mode == "1" or (top in (255, 65535) and top >= len(classes) and np.isin(mask, (0, top)).all()):
        raise ValueError(f"{path}: is a binary 0/255 mask; values must be class indices 0, 1, 2, ...")
    return mask


# --- how good verdicts are ---

def recall_fpr(truths, verdicts) -> dict:
    """Image-level recall = tp / (tp + fn) and false positive rate = fp / (fp + tn); positive: truly "reject".

    A rate without a denominator (no positives, no negatives) is None.
    """
    truths, verdicts = list(truths), list(verdicts)
    if len(truths) != len(verdicts) or not {"accept", "reject"}.issuperset(truths + verdicts):
        raise ValueError(f"{len(truths)} truths, {len(verdicts)} verdicts: must be as many, accept or reject")
    pairs = Counter(zip(truths, verdicts))
    tp, fn = pairs["reject", "reject"], pairs["reject", "accept"]
    fp, tn = pairs["accept", "reject"], pairs["accept", "accept"]
    return {"recall": tp / (tp + fn) if tp + fn else None, "fpr": fp / (fp + tn) if fp + tn else None,
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def wilson_interval(hits, trials):
    """95 % score interval (low, high) of a rate of which `hits` of `trials` were seen; None without trials.

    Its ends are the rates p with |hits / trials - p| = z * sqrt(p (1 - p) / trials): Wilson, JASA 22 (1927).
    """
    if trials == 0:
        return None
    z = 1.959963984540054           # 2.5 % of the normal distribution lie above it
    middle, reach = hits + z * z / 2, z * math.sqrt(hits * (trials - hits) / trials + z * z / 4)
    return max(0.0, (middle - reach) / (trials + z * z)), min(1.0, (middle + reach) / (trials + z * z))


# --- the command ---

def find_masks(folder) -> dict:
    """{name: path} of the masks below folder: what lies in mask/ or masks/, or all pictures if nothing does.

    A name is the path below folder, with slashes and without suffix.
    """
    paths = [path for path in sorted(Path(folder).rglob("*"))
             if path.suffix.lower() in (".png", ".bmp", ".tif", ".tiff") and path.name[0] != "."]
    in_mask = [path for path in paths if {"mask", "masks"} & {*path.relative_to(folder).parts[:-1]}]
    paths = in_mask or paths
    masks = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    if not masks:
        raise ValueError(f"--masks {folder}: no masks (.png, .bmp, .tif) below this folder")
    if len(masks) < len(paths):
        raise ValueError(f"--masks {folder}: two masks differ only in their suffix; rename one")
    return masks


def find_classes(folder, standard, classes_file=None):
    """(class table, its source): that file, else the classes.json in, above or below folder, else LABELS."""
    folder = Path(folder).resolve()
    above = [up / "classes.json" for up in (folder, *folder.parents) if (up / "classes.json").is_file()]
    found = [classes_file] if classes_file else above[:1] or sorted(folder.rglob("classes.json"))
    if len(found) > 1:
        raise ValueError(f"--masks holds {len(found)} classes.json; give a folder with one, or --classes")
    if found:
        return read_classes(found[0]), found[0]
    if standard.object in LABELS:
        return LABELS[standard.object], f"built-in labels of {standard.object}; no classes.json was found"
    raise ValueError(f"no classes.json, and no built-in labels of {standard.object!r}; give --classes FILE")


def print_findings(image, findings):
    print(f"{image}: {verdict(findings)}")
    for finding in findings:
        print(f"    {finding.sentence()}")


def show_standards() -> int:
    """Print the built-in standards as JSON to copy, and judge a made-up mask."""
    for name in STANDARDS:
        print(json.dumps(STANDARDS[name]).replace(' {"name"', '\n  {"name"') + "\n")
    mask = np.zeros((400, 400), np.uint8)                         # half the native size: each pixel counts 4
    mask[100:130, 100:130] = LABELS["pill"].index("contamination")
    mask[200:203, 50:350] = LABELS["pill"].index("crack")
    print("A made-up mask of 400 x 400 pixels, judged by the pill standard:")
    print_findings("made_up", judge(mask, load_standard("pill"), LABELS["pill"], "made_up"))
    print("\nNext: python inspect_rules.py --standard pill --masks DIR --csv findings.csv")
    return 0


def inspect_folder(args) -> int:
    """Judge every mask of --masks; print, draw and write the findings. Returns the exit status."""
    for path in (args.csv, args.json):
        if path and not Path(path).absolute().parent.is_dir():    # found out now, not after the work
            raise ValueError(f"{path}: its folder does not exist")
    if args.overlay and Path(args.overlay).resolve().is_relative_to(Path(args.masks).resolve()):
        raise ValueError(f"--overlay {args.overlay} is inside --masks; its pictures would be read as masks")
    standard, masks = load_standard(args.standard), find_masks(args.masks)
    classes, source = find_classes(args.masks, standard, args.classes)
    check_classes(standard, classes, args.standard)
    print(f"class table: {source}")
    rows, verdicts, errors = [], {}, {}
    for image, path in masks.items():
        try:
            mask = read_mask(path, classes)
            if standard.native_size:
                check_shape(mask.shape, standard.native_size, path, args.squashed)
            findings = judge(mask, standard, classes, image)
        except ValueError as error:                               # a bad mask does not cost the others
            errors[image] = str(error)
            continue
        verdicts[image] = verdict(findings)
        print_findings(image, findings)
        if args.overlay and findings:
            target = Path(args.overlay) / f"{image}_verdict.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            draw_overlay(mask, findings, find_photo(path)).save(target)
        scale = math.prod(standard.native_size or mask.shape) / mask.size
        none = Finding(image, NO_DEFECT, 0.0, None, "accept", "", "area_px", "image", 0.0, None, (), 0, scale)
        rows += [finding.row() for finding in findings or [none]]
    write_results(args, rows, {"standard": STANDARDS.get(args.standard) or read_json(args.standard),
                               "classes": classes, "verdicts": verdicts, "errors": errors})
    counts = Counter(verdicts.values())
    print(f"{standard.name} standard: {counts['accept']} accepted, {counts['reject']} rejected, "
          f"{len(errors)} not judged")
    for error in errors.values():
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else int(counts["reject"] > 0)


def write_results(args, rows, summary):
    """--csv and --json, each under another name first: a file holds all of it, or what it held before."""
    if args.csv:
        with open(f"{args.csv}.tmp", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        os.replace(f"{args.csv}.tmp", args.csv)
    if args.json:
        summary["findings"] = [dict(zip(COLUMNS, row)) for row in rows]
        Path(f"{args.json}.tmp").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        os.replace(f"{args.json}.tmp", args.json)


# --- pictures ---

RED, GREEN = (255, 40, 40), (40, 220, 80)
PALE = {"reject": (255, 130, 130), "accept": (150, 240, 170)}     # for text on black
SHOWN = 12                          # findings that are numbered and explained


def find_photo(path):
    """image/<kind>/<stem>.* of mask/<kind>/<stem>_mask.png, as RGB; None where none can be read."""
    for folder in path.parents:
        if folder.name in ("mask", "masks"):
            photos = folder.with_name(folder.name.replace("mask", "image")) / path.parent.relative_to(folder)
            for suffix in (".png", ".jpg", ".jpeg", ".bmp", ".tif"):
                try:
                    with Image.open(photos / (path.stem.removesuffix("_mask") + suffix)) as photo:
                        return ImageOps.exif_transpose(photo).convert("RGB")
                except Exception:   # missing or damaged: the mask will do
                    continue
    return None


def draw_overlay(mask, findings, photo=None) -> Image.Image:
    """The photo, or else the mask in grey, with every finding outlined (red: rejected, green: accepted) and
    numbered, and its sentence below. Small pictures are enlarged by whole factors.

    mask: (H, W) indices; findings: what judge() returned for it; photo: RGB of any size.
    """
    if photo is None:
        photo = Image.fromarray(np.where(mask > 0, 130, 50).astype(np.uint8)).convert("RGB")
    photo = ImageOps.scale(photo, max(1, math.ceil(512 / max(photo.size))), Image.Resampling.NEAREST)
    border = 2 * max(2, max(photo.size) // 340)         # outlines lie outside of pixels: room at the edges
    canvas = ImageOps.expand(photo, border)
    for decision, colour in (("accept", GREEN), ("reject", RED)):
        inside = np.zeros(mask.shape, np.uint8)
        for finding in findings:
            if finding.verdict == decision:
                for row, start, stop in finding.runs.T:
                    inside[row, start:stop] = 255
        area = ImageOps.expand(Image.fromarray(inside).resize(photo.size, Image.Resampling.NEAREST), border)
        canvas.paste(colour, mask=ImageChops.subtract(area.filter(ImageFilter.MaxFilter(border + 1)), area))

    font = ImageFont.load_default(max(15, max(photo.size) // 52))
    width, step = max(canvas.width, 480), int(1.35 * font.size)
    letters = int((width - 16) / font.getlength("n"))
    numbers, lines = {}, []
    for number, finding in enumerate(sorted(findings, key=attrgetter("verdict"), reverse=True), 1):
        if number > SHOWN:
            lines.append((f"and {len(findings) - SHOWN} more", "white"))
            break
        if finding.runs.size:       # at its first pixel; several in one text, or they would hide each other
            numbers.setdefault(tuple(finding.runs[:2, 0]), []).append(str(number))
        for line in textwrap.wrap(f"{number} {finding.sentence()}", letters, subsequent_indent="   "):
            lines.append((line, PALE[finding.verdict]))
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
    add("--classes", metavar="FILE", help="class table (default: classes.json near the masks, else built in)")
    add("--squashed", action="store_true", help="take masks of other proportions: each shows the whole photo")
    add("--csv", metavar="FILE", help="write the findings, at least one row per image")
    add("--json", metavar="FILE", help="write standard, classes, verdicts, errors and findings")
    add("--overlay", metavar="DIR", help="draw every image with a finding: outlined, with the reasons")
    args = parser.parse_args(argv)
    if not any(vars(args).values()):
        return show_standards()
    if not (args.standard and args.masks):
        parser.error("--standard and --masks go together")
    try:
        return inspect_folder(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")             # names that the terminal cannot show
    sys.exit(main())
