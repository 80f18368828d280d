"""Written rules for benign products: index mask -> findings -> "accept" or "reject", as in Defect Spectrum (arXiv 2310.17316).

    python inspect_rules.py                                                    # the built-in standards, and an example
    python inspect_rules.py --standard pill --masks DIR --csv findings.csv     # a built-in standard
    python inspect_rules.py --standard my_rules.json --masks DIR --overlay OUT  # your own: copy what the first command prints
    python inspect_rules.py --bench                                            # how fast components are found here

A rule names classes, whose pixels count together, and one limit:

    max_area_px, max_area_mm2     their area; "per": "image" (all of it, the default) or "component" (each connected piece)
    max_count                     the number of their components in the image
    max_length_px, max_length_mm  of each component: the largest distance between two corners of its pixels, so a bar of
                                  3 x 4 pixels is 5 long, and a pixel stays as long when it is drawn as 2 x 2 finer ones

Pixels touch at sides and corners ("connectivity": 8, the default) or at sides only (4). A component with fewer than
"min_component_px" is noise: no measure sees it, and the finding says how many there were. Conventions that bite:
1. Reaching a limit rejects: a rule rejects when value > 0 and value >= limit. The paper calls "< 4800 px" benign, so with
   max_area_px = 4800 an area of 4799 is accepted and 4800 is rejected; max_count = 3 allows two; 0 means not allowed at all.
2. Areas and lengths are in NATIVE pixels: in an H x W mask a pixel is native_height / H high and native_width / W wide. That is
   right for resized and squashed images, wrong for crops, so the command refuses masks of another shape unless told --squashed.
   "native_size": "mask" means that every mask already has its photo's size, for photos that differ in size.
3. A defect that no rule names is decided by the standard's "unnamed": "reject" (the default), "accept", or "error".

Needs numpy and pillow only, so that it can be read, and trusted, alone. An auditor reads as far as verdict(): nothing below it decides.
"""

import argparse
import csv
import importlib
import json
import math
import os
import platform
import sys
import tempfile
import textwrap
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

# Class tables of the published Defect Spectrum masks: a pixel's value is an index into its object's tuple.
LABELS = {
    "pill": ("background", "color", "contamination", "crack", "faulty_imprint", "scratch", "pill_type"),
    "wood": ("background", "color", "crack", "scratch", "hole", "liquid"),
    "zipper": ("background", "broken_teeth", "fabric_border", "fabric_interior", "split_teeth", "squeezed_teeth"),
}

# The paper's three standards, in the JSON shape that users write; native_size is [height, width] of the MVTec AD photos.
# Limits are the paper's. Ours, because the paper does not say:
# - which labels its words mean. zipper: "teeth" = broken_teeth + split_teeth + squeezed_teeth, "fabric" = fabric_border +
#   fabric_interior, each summed; pill: "colour stain" = color; wood: "dent" = hole, "stain" = liquid, "impurity" = color.
# - that an area is that of all defects of the kind in the image together, not of each.
# - "unnamed": "reject". The standards list what is benign, so a defect not declared benign (pill: faulty_imprint, scratch,
#   pill_type; wood: crack) is rejected.
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
        {"name": "no defect on teeth", "classes": ["broken_teeth", "split_teeth", "squeezed_teeth"], "max_area_px": 0},
        {"name": "fabric defect below 4800 px", "classes": ["fabric_border", "fabric_interior"], "max_area_px": 4800}]},
}

# measure -> what it can be measured per, the default first; the JSON key is "max_" + measure
MEASURES = {"area_px": ("image", "component"), "area_mm2": ("image", "component"), "count": ("image",),
            "length_px": ("component",), "length_mm": ("component",)}
LIMITS = tuple("max_" + measure for measure in MEASURES)


@dataclass(frozen=True)
class Rule:
    name: str
    classes: tuple                # together
    limit: float | None           # the smallest value that is rejected; 0 = not allowed; None = no rule names the class
    measure: str = "area_px"
    per: str = "image"
    connectivity: int = 8
    min_component_px: float = 0   # native pixels


@dataclass(frozen=True)
class Standard:
    name: str                     # the file's, where it names none
    object: str
    native_size: tuple | None     # (height, width) of the photos that the limits were written for; None = each mask's own
    px_per_mm: float | None
    unnamed: str                  # verdict on a class that no rule names, or "error"
    rules: tuple

    def as_json(self) -> dict:
        """What load_standard reads, with every default written out."""
        rules = [{"name": r.name, "classes": list(r.classes), "max_" + r.measure: r.limit, "per": r.per,
                  "connectivity": r.connectivity, "min_component_px": r.min_component_px} for r in self.rules]
        scale = {"px_per_mm": self.px_per_mm} if self.px_per_mm else {}
        return {"name": self.name, "object": self.object, "native_size": list(self.native_size or ()) or "mask", **scale,
                "unnamed": self.unnamed, "rules": rules}


@dataclass(frozen=True)
class Finding:
    image: str
    class_name: str               # the rule's classes joined with "+"
    area_px: float                # native pixels of what was measured: the component, or all components of the image
    limit: float | None           # None where no rule names the class
    verdict: str                  # "accept" | "reject"
    rule: str                     # its name, or why there is none
    measure: str                  # "area_px", "area_mm2", "count", "length_px" or "length_mm": the unit of value, limit and margin
    per: str                      # "image" | "component"
    value: float
    margin: float | None          # limit - value: 0 and below rejects
    box: tuple                    # (top, left, bottom, right) edges in native pixels; empty where only noise was found
    noise: int                    # components of this image that the rule left out as smaller than min_component_px
    scale: float                  # native pixels per mask pixel; 1.0 = the mask had native size

    def row(self) -> tuple:
        """Its cells below COLUMNS."""
        return (self.image, self.class_name, self.area_px, self.limit, self.verdict, self.rule, self.measure, self.per, self.value,
                self.margin, *(self.box or (None,) * 4), self.noise, self.scale)


COLUMNS = ("image", "class", "area_px", "limit", "verdict", "rule", "measure", "per", "value", "margin",
           "top", "left", "bottom", "right", "noise", "scale")
NO_DEFECT = "(no defect)"         # class of the row that an image without findings gets, so that every image has one


# --- standards and class tables ---

def load_standard(name_or_path, classes=None) -> Standard:
    """The built-in standard of that name, else the JSON file at that path; checked against the class table if that is given.

    A class may have several rules if they measure different things (area per image, area per component, count, length); two limits
    on the same thing are refused, as one of them would never decide.
    Raises: ValueError, one sentence that names the file and the key.
    """
    name = str(name_or_path)
    if name in STANDARDS:
        data = STANDARDS[name]
    elif Path(name).is_file():
        data = read_json(name)
    else:
        raise ValueError(f"no standard {name!r}: built in are {', '.join(STANDARDS)}, and there is no file of that name")

    _check_keys(data, name, ("object", "native_size", "rules"), ("unnamed", "name", "px_per_mm"))
    size, unnamed, px_per_mm = data["native_size"], data.get("unnamed", "reject"), data.get("px_per_mm")
    for key in ("object", "name"):
        _need(_is_text(data.get(key, "-")), name, key, "a string and not empty", data.get(key))
    _need(size == "mask" or isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 10**6 for n in size),
          name, "native_size", 'two positive integers [height, width], or "mask"', size)
    _need(unnamed in ("accept", "reject", "error"), name, "unnamed", '"reject", "accept" or "error"', unnamed)
    _need("px_per_mm" not in data or _is_number(px_per_mm) and px_per_mm > 0, name, "px_per_mm", "a finite number > 0", px_per_mm)
    _need(isinstance(data["rules"], list) and data["rules"], name, "rules", "a list of at least one rule", data["rules"])

    rules, owner = [], {}
    for i, entry in enumerate(data["rules"]):
        where = f"{name}: rules[{i}]"
        rule = _read_rule(entry, where)
        if rule.measure.endswith(("mm", "mm2")) and not px_per_mm:
            raise ValueError(f"{where}: max_{rule.measure} needs the standard's px_per_mm, which is missing")
        if rule.name in owner:
            raise ValueError(f"{where}: name {rule.name!r} is that of rules[{owner[rule.name]}] too; give each rule its own")
        owner[rule.name] = i
        for c in rule.classes:
            measured = (c, rule.measure.split("_")[0], rule.per)
            if measured in owner:
                raise ValueError(f"{where}: classes names {c!r}, which rules[{owner[measured]}] already names "
                                 f"for the {measured[1]} per {rule.per}")
            owner[measured] = i
        rules.append(rule)
    standard = Standard(data.get("name", name), data["object"], None if size == "mask" else tuple(size), px_per_mm, unnamed,
                        tuple(rules))
    if classes is not None:
        _check_classes(standard, classes, name)
    return standard


def _read_rule(rule, where) -> Rule:
    _check_keys(rule, where, ("classes",), (*LIMITS, "per", "connectivity", "min_component_px", "name"))
    names, limits = rule["classes"], [key for key in LIMITS if key in rule]
    _need(isinstance(names, list) and names and all(map(_is_text, names)), where, "classes", "a list of at least one class name", names)
    if "background" in names:
        raise ValueError(f"{where}: classes names background, which is no defect")
    if len(limits) != 1:
        raise ValueError(f"{where}: exactly one limit is needed, of {', '.join(LIMITS)}, not {' and '.join(limits) or 'none'}")
    measure, limit, least = limits[0].removeprefix("max_"), rule[limits[0]], rule.get("min_component_px", 0)
    for key, value in ((limits[0], limit), ("min_component_px", least)):
        _need(_is_number(value), where, key, "a finite number >= 0", value)
    _need(measure != "count" or limit == int(limit), where, "max_count", "a whole number", limit)
    per, connectivity = rule.get("per", MEASURES[measure][0]), rule.get("connectivity", 8)
    _need(per in MEASURES[measure], where, "per", f"{' or '.join(MEASURES[measure])} for {limits[0]}", per)
    _need(type(connectivity) is int and connectivity in (4, 8), where, "connectivity", "8 or 4", connectivity)
    joined, (kind, _, unit) = ("each " if per == "component" else "") + "+".join(names), measure.partition("_")
    words = f"{joined} {'shorter than' if kind == 'length' else 'below'} {limit} {unit or 'pieces'}" if limit else f"no {'+'.join(names)}"
    name = rule.get("name", words)
    _need(_is_text(name), where, "name", "a string and not empty", name)
    return Rule(name, tuple(names), limit, measure, per, connectivity, least)


def _need(holds, where, key, wanted, value):
    if not holds:
        raise ValueError(f"{where}: {key} must be {wanted}, not {value!r}")


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15        # type(): to isinstance, true is an integer; NaN compares false


def read_classes(path) -> tuple:
    """classes.json, {"0": "background", "1": "crack", ...} -> ("background", "crack", ...)."""
    table = read_json(path)
    names = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else []
    if not all(isinstance(c, str) and c for c in names) or len(set(names)) < len(names) or names[:1] != ["background"]:
        raise ValueError(f'{path}: expected a class table {{"0": "background", "1": "crack", ...}} with keys 0 to K-1 and names '
                         f"all different, not {str(table)[:200]}")
    return tuple(names)


def read_json(path):
    """The JSON file's value. A key that is there twice is refused: Python would silently take the second."""
    def unique(pairs):
        for key, n in Counter(key for key, _ in pairs).items():
            if n > 1:
                raise ValueError(f"the key {key!r} is there {n} times")
        return dict(pairs)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None


def _check_keys(data, where, required, optional):
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a JSON object with the keys {', '.join(required)}, not {data!r}")
    for key in required:
        if key not in data:
            raise ValueError(f"{where}: the key {key!r} is missing")
    for key in data:
        if key not in required + optional:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(required + optional)}")


def _check_classes(standard, classes, where):
    # A misspelt class would have area 0 in every mask, and its rule would never reject anything.
    for i, rule in enumerate(standard.rules):
        for c in rule.classes:
            if c not in classes:
                raise ValueError(f"{where}: rules[{i}]: classes names {c!r}, which is not in the class table ({', '.join(classes)})")


# --- components ---

def find_runs(mask) -> np.ndarray:
    """(4, n): row, start, stop and class of every stretch of one class within a row, background left out, in reading order."""
    change = np.ones(mask.shape, bool)
    np.not_equal(mask[:, 1:], mask[:, :-1], out=change[:, 1:])
    first = np.flatnonzero(change)
    value, length = mask.ravel()[first].astype(np.int64), np.diff(first, append=mask.size)
    row, start = np.divmod(first, mask.shape[1])
    return np.stack([row, start, start + length, value])[:, value > 0]


def label_runs(runs, connectivity) -> np.ndarray:
    """(n,) component number of each run, 0, 1, ... in reading order of the components' first pixels.

    runs: (3, n) row, start, stop in reading order, with a gap between any two of a row.
    """
    row, start, stop = runs
    reach = int(connectivity == 8)                                 # a run touches one that begins at its stop, a row below
    stride = stop.max(initial=0) + 2                               # row * stride + column: one sorted axis for all rows, no overlap
    below = (row + 1) * stride
    first = np.searchsorted(row * stride + stop, below + start - reach, "right")        # runs first..last-1 touch this one from below
    last = np.searchsorted(row * stride + start, below + stop + reach, "left")
    count = last - first
    upper = np.repeat(np.arange(len(row)), count)
    lower = np.arange(len(upper)) + np.repeat(first - np.cumsum(count) + count, count)

    # Union-find on all pairs at once: every run points to its root; the higher root of a pair is hung below the lower one, and
    # pointers are followed to the end. Which of several lower roots it gets does not matter: pairs still apart go round again.
    root = np.arange(len(row))
    while len(upper):
        a, b = root[upper], root[lower]
        root[np.maximum(a, b)] = np.minimum(a, b)
        while not np.array_equal(root, end := root[root]):
            root = end
        apart = root[upper] != root[lower]
        upper, lower = upper[apart], lower[apart]
    return (np.cumsum(root == np.arange(len(row))) - 1)[root]


def find_components(runs, connectivity=8):
    """Runs of the classes of one rule -> their components, in reading order.

    Returns: runs (3, n) row, start, stop; component i is runs[:, bounds[i]:bounds[i + 1]]; its area (m,) and its box (m, 4) as
    top, left, bottom, right, in mask pixels.
    """
    row, start, stop = runs[:3]
    fresh = np.flatnonzero((np.diff(row, prepend=-1) != 0) | (start != np.append(-1, stop)[:-1]))   # classes side by side: one run
    runs = np.stack([row[fresh], start[fresh], stop[np.append(fresh[1:], len(row)) - 1]])
    label = label_runs(runs, connectivity)
    order = np.argsort(label, kind="stable")
    row, start, stop = runs = runs[:, order]
    first = np.flatnonzero(np.diff(label[order], prepend=-1))
    box = [row[first], np.minimum.reduceat(start, first), np.maximum.reduceat(row, first) + 1, np.maximum.reduceat(stop, first)]
    return runs, np.append(first, len(row)), np.add.reduceat(stop - start, first), np.stack(box, axis=1)


def longest_extent(runs, zoom) -> float:
    """The largest distance between two pixel corners of one component, in native pixels.

    zoom: ((native height, mask height), (native width, mask width)); whole numbers, so that whole lengths come out exact.
    Of two rows, the farthest corners are the left end of one and the right end of the other: all pairs of rows are tried.
    """
    row, start, stop = runs
    begin = np.flatnonzero(np.diff(row, prepend=-1))
    row, left, right = row[begin], start[begin], stop[np.append(begin[1:], len(row)) - 1]
    blocks = (slice(i, i + 256) for i in range(0, len(row), 256))  # memory must not grow with the square of the rows
    return max(float(_length(abs(row - row[b, None]) + 1, right - left[b, None], zoom).max()) for b in blocks)


def _length(high, wide, zoom):
    (native_h, h), (native_w, w) = zoom
    return np.sqrt((high * native_h / h) ** 2 + (wide * native_w / w) ** 2)


def component_lengths(runs, bounds, box, zoom, scale, limit, real) -> np.ndarray:
    """(m,) longest_extent / scale of the components `real` (indices); 0 for one that is neither the longest nor reaches the limit.

    No component is longer than the diagonal of its box: from the largest diagonal on down, most need no closer look.
    """
    diagonal, length, best = _length(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1], zoom) / scale, np.zeros(len(box)), 0.0
    for i in real[np.argsort(-diagonal[real], kind="stable")]:
        if diagonal[i] < min(limit, best):
            break
        length[i] = longest_extent(runs[:, bounds[i]:bounds[i + 1]], zoom) / scale
        best = max(best, length[i])
    return length


# --- judging ---

def read_mask(path, classes=()) -> np.ndarray:
    """(H, W) class indices of a single-channel PNG: 8- or 16-bit grey, or palette (the raw indices, not the colours).

    Raises: ValueError naming the file: not an image, several channels, or a binary 0/255 mask (unless the table reaches 255).
    """
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except Exception as error:                # pillow raises many types for a damaged file; to the user they are one fact
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"{path}: is {mode}, but a mask is a single-channel PNG whose pixel value is the class index; "
                         "a colour mask is for the eye only")
    top = int(mask.max())
    if mode == "1" or (top in (255, 65535) and top >= len(classes) and np.isin(mask, (0, top)).all()):
        raise ValueError(f"{path}: looks like a binary 0/255 mask, which cannot tell one class from another; "
                         "pixel values must be class indices")
    return mask


def judge(mask, standard, classes, image="mask", native_size=None) -> list[Finding]:
    """The findings of one mask: rules in the standard's order, then the present classes that no rule names.

    A rule per image gives one finding if its classes are there; a rule per component gives one for each component that is rejected,
    or one for its largest component if none is. verdict(findings) is the decision.

    Args:
        mask:        (H, W) integers, index into classes; 0 = background. Any size and shape, see the module's second convention.
        classes:     tuple of names, index -> name.
        image:       name that the findings carry.
        native_size: (height, width) of the photo where the standard's is "mask" and this mask was resized; default: the mask's own.
    Raises: ValueError naming the image: not an index mask of this class table, or a class that no rule names where that is an error.
    """
    return [finding for finding, _ in examine(mask, standard, classes, image, native_size)]


def examine(mask, standard, classes, image="mask", native_size=None) -> list:
    """What judge does, as pairs (finding, (3, n) runs of the pixels it is about)."""
    _check_classes(standard, classes, f"standard {standard.name!r}")
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"{image}: a mask is (H, W) integers and not empty, but this one is {mask.shape} of {mask.dtype}")
    if mask.min() < 0 or mask.max() >= len(classes):
        raise ValueError(f"{image}: mask has values {mask.min()} to {mask.max()}, but the class table has "
                         f"0 to {len(classes) - 1} ({', '.join(classes)})")
    native_h, native_w = standard.native_size or native_size or mask.shape
    zoom = (native_h, mask.shape[0]), (native_w, mask.shape[1])
    # whole numbers until the one division: an area that is a whole number comes out exact, and meets its limit exactly
    in_px = lambda pixels: pixels * float(native_h * native_w) / mask.size
    named = {c for rule in standard.rules for c in rule.classes}
    unnamed = tuple(Rule(f"no rule names this class (unnamed: {standard.unnamed})", (c,), None) for c in classes[1:] if c not in named)

    found, all_runs = [], find_runs(mask)
    for rule in standard.rules + unnamed:
        runs = all_runs[:3, np.array([c in rule.classes for c in classes])[all_runs[3]]]
        if runs.size == 0:
            continue
        if rule.limit is None and standard.unnamed == "error":
            raise ValueError(f"{image}: class {rule.classes[0]!r} is in the mask, but no rule of standard {standard.name!r} names it "
                             '(its unnamed is "error")')
        runs, bounds, area, box = find_components(runs, rule.connectivity)
        kept = in_px(area) >= rule.min_component_px
        real, kind = np.flatnonzero(kept), rule.measure.split("_")[0]
        scale = standard.px_per_mm if rule.measure.endswith(("mm", "mm2")) else 1
        if rule.per == "image" or not len(real):
            value = len(real) if kind == "count" else in_px(area[real].sum()) / scale**2
            groups = [(real, value, runs[:, np.repeat(kept, np.diff(bounds))])]
        else:
            values = in_px(area) / scale**2 if kind == "area" else component_lengths(runs, bounds, box, zoom, scale, rule.limit, real)
            shown = real[values[real] >= rule.limit]
            if not len(shown):
                shown = real[[values[real].argmax()]]
            groups = [([i], values[i], runs[:, bounds[i]:bounds[i + 1]]) for i in shown]

        for members, value, pixels in groups:                      # component numbers, what they measure together, their runs
            value, margin, decision, edges = float(value), None, standard.unnamed, ()
            if rule.limit is not None:
                margin, decision = rule.limit - value, "reject" if value > 0 and value >= rule.limit else "accept"
            if len(members):
                edges = (*box[members, :2].min(axis=0), *box[members, 2:].max(axis=0))
                edges = tuple(float(edge * native / size) for edge, (native, size) in zip(edges, zoom * 2))
            found.append((Finding(image, "+".join(rule.classes), float(in_px(area[members].sum())), rule.limit, decision, rule.name,
                                  rule.measure, rule.per, value, margin, edges, int((~kept).sum()), in_px(1)), pixels))
    return found


def verdict(findings) -> str:
    """ "reject" if any finding rejects, else "accept"; no findings, no defect: "accept"."""
    return "reject" if any(f.verdict == "reject" for f in findings) else "accept"


# --- how good verdicts are ---

def recall_fpr(truths, verdicts) -> dict:
    """Image-level recall = tp / (tp + fn) and false positive rate = fp / (fp + tn); positive = the truth says "reject".

    A rate without a denominator (no positives, no negatives) is None.
    """
    truths, verdicts = list(truths), list(verdicts)
    if len(truths) != len(verdicts) or not {"accept", "reject"}.issuperset(truths + verdicts):
        raise ValueError(f'truths ({len(truths)}) and verdicts ({len(verdicts)}) must be equally many, each "accept" or "reject"')
    pairs = Counter(zip(truths, verdicts))
    tp, fn = pairs["reject", "reject"], pairs["reject", "accept"]
    fp, tn = pairs["accept", "reject"], pairs["accept", "accept"]
    return {"recall": tp / (tp + fn) if tp + fn else None, "fpr": fp / (fp + tn) if fp + tn else None,
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def binomial_interval(hits, trials, confidence=0.95):
    """Exact (Clopper-Pearson) interval (low, high) of a rate of which `hits` of `trials` were seen: of recall, (tp, tp + fn).

    low is the rate at which as many hits or more have probability (1 - confidence) / 2; high, as many or fewer. No trials: None.
    """
    if not (0 <= hits <= trials and 0 < confidence < 1):
        raise ValueError(f"expected 0 <= hits <= trials and 0 < confidence < 1, not {hits}, {trials} and {confidence}")
    if trials == 0:
        return None
    return _lower_limit(hits, trials, (1 - confidence) / 2), 1 - _lower_limit(trials - hits, trials, (1 - confidence) / 2)


def _lower_limit(hits, trials, tail) -> float:
    if hits == 0:
        return 0.0
    k = np.arange(hits, trials + 1)
    ways = np.array([math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in k.tolist()])
    low, high = 0.0, 1.0
    for _ in range(60):                                            # the tail grows with the rate: halve the range to the last digit
        rate = (low + high) / 2
        below = rate < 1 and np.exp(ways + k * math.log(rate) + (trials - k) * math.log1p(-rate)).sum() < tail
        low, high = (rate, high) if below else (low, rate)
    return high


# --- the command ---

def find_masks(folder) -> dict:
    """{name: path} of all PNGs below folder, but hidden files and what a data set keeps in image/ and rgb_mask/ folders or beside mask/
    (sheet.png). The name is the path below folder without its suffix, with slashes."""
    if not Path(folder).is_dir():
        raise ValueError(f"--masks {folder} is not a folder")
    skipped, masks = {"image", "images", "rgb_mask", "rbg_mask"}, {}         # "rbg": so spelt in half of the published data
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() == ".png" and not (p.parent / "mask").is_dir()):
        inner = path.relative_to(folder)
        name = inner.as_posix()[:-4]
        if any(part.startswith(".") or part in skipped for part in inner.parts):
            continue
        if name in masks:
            raise ValueError(f"--masks {folder} holds {path.name} and {masks[name].name}, which share one name; rename one")
        masks[name] = path
    if not masks:
        raise ValueError(f"--masks {folder} holds no PNG masks")
    return masks


def find_classes(masks, standard, classes_file=None):
    """(class table, where it is from): the given file, else classes.json beside or above the masks, else the built-in labels."""
    if classes_file:
        return read_classes(classes_file), classes_file
    tables = {next((str(up / "classes.json") for up in (folder, *folder.parents) if (up / "classes.json").is_file()), None)
              for folder in {mask.parent.resolve() for mask in masks}}
    if len(tables) > 1:
        raise ValueError(f"--masks holds data sets with different class tables ({', '.join(sorted(map(str, tables)))}); pass --classes FILE")
    path = tables.pop()
    if path:
        return read_classes(path), path
    if standard.object in LABELS:
        return LABELS[standard.object], f"the built-in labels of {standard.object}, as no classes.json was found"
    raise ValueError(f"no classes.json beside or above the masks and no built-in labels for {standard.object!r}; pass --classes FILE")


def check_shape(shape, native_size, path):
    """Refuse a mask that is no resized photo of native size, give or take a pixel of rounding: it was squashed or cropped."""
    (h, w), (native_h, native_w) = shape, native_size
    if (h - 1) / native_h >= (w + 1) / native_w or (w - 1) / native_w >= (h + 1) / native_h:
        raise ValueError(f"{path}: is {h}x{w}, another shape than the standard's native_size {native_h}x{native_w}: its areas would be "
                         "wrong if it was cropped; pass --squashed if it is the whole photo")


@contextmanager
def replacing(path, mode="w", **how):
    """A file under a temporary name that becomes `path` when the block ends well and is removed when it does not; path None: no file."""
    if path is None:
        with open(os.devnull, mode, **how) as file:
            yield file
        return
    temporary = Path(path).with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, mode, **how) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def printable(text) -> str:
    """Text in which nothing moves the cursor: line breaks, escapes and undecodable bytes of file names are written as \\n, \\x1b, ..."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def csv_cells(finding) -> list:
    """Its row; text that a spreadsheet would run as a formula gets a leading quote."""
    formula = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")          # the last four: the full-width forms
    return ["'" + cell if isinstance(cell, str) and cell.startswith(formula) else cell for cell in finding.row()]


HEAD = ("image", "class", "measured", "limit", "margin", "verdict", "rule")


def cells(f) -> tuple:
    """A finding's cells below HEAD: lengths to two decimals, the CSV has them all."""
    kind, _, unit = f.measure.partition("_")
    number = lambda value: "-" if value is None else f"{value:.10g}" if value == int(value) else f"{value:.2f}"
    return (printable(f.image), printable(f.class_name), f"{kind} {number(f.value)} {unit}".rstrip(), number(f.limit), number(f.margin),
            f.verdict, printable(f.rule) + (f" ({f.noise} smaller left out)" if f.noise else ""))


def line(texts, image_width, class_width) -> str:
    widths = (image_width, class_width, 16, 8, 9, 7, 0)
    return "  ".join(t.rjust(w) if i in (2, 3, 4) else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths))).rstrip()


def show_standards() -> int:
    """Print the built-in standards in words and as JSON to copy, and judge a made-up mask."""
    for name in STANDARDS:
        standard = load_standard(name, LABELS[name])
        print(f"{name}, areas in pixels of a {standard.native_size[0]}x{standard.native_size[1]} photo")
        for rule in standard.rules:
            print(f"  {rule.name} ({' + '.join(rule.classes)})")
        print(f"  any other defect: {standard.unnamed}")
        print(json.dumps(STANDARDS[name]).replace(' {"name"', '\n  {"name"') + "\n")
    mask = np.zeros((400, 400), np.uint8)                         # half the native size: each pixel counts 4
    mask[100:130, 100:130] = LABELS["pill"].index("contamination")
    mask[200:203, 50:350] = LABELS["pill"].index("crack")
    findings = judge(mask, load_standard("pill"), LABELS["pill"], "made_up")
    print("A made-up 400x400 mask, judged by the pill standard:")
    print("\n".join(line(texts, 7, 13) for texts in (HEAD, *map(cells, findings))))
    print(f"verdict: {verdict(findings)}\n\nNext: python inspect_rules.py --standard pill --masks DIR --csv findings.csv")
    return 0


def inspect_folder(args) -> int:
    """Judge every mask of --masks, one in memory at a time; print and write the findings as they come. Returns the exit status."""
    for flag, path in (("--csv", args.csv), ("--json", args.json)):
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ValueError(f"{flag} {path}: is a folder, or lies in one that does not exist")
    if args.overlay and Path(args.overlay).resolve().is_relative_to(Path(args.masks).resolve()):
        raise ValueError(f"--overlay {args.overlay} lies below --masks, where its pictures would be read as masks; choose another folder")
    standard, masks = load_standard(args.standard), find_masks(args.masks)
    classes, source = find_classes(masks.values(), standard, args.classes)
    _check_classes(standard, classes, args.standard)
    if args.overlay:
        Path(args.overlay).mkdir(parents=True, exist_ok=True)
    print(f"class table: {printable(str(source))}")
    named = ["+".join(rule.classes) for rule in standard.rules]
    widths = [max(len(printable(name)) for name in names) for names in (masks, (*classes, *named, NO_DEFECT))]
    print(line(HEAD, *widths))

    verdicts, errors, sizes, separator = {}, {}, Counter(), "\n"
    with (replacing(args.csv, newline="", encoding="utf-8", errors="backslashreplace") as csv_file,
          replacing(args.json, encoding="utf-8") as json_file):
        table = csv.writer(csv_file)
        table.writerow(COLUMNS)
        json_file.write(json.dumps({"standard": standard.as_json(), "classes": classes})[:-1] + ', "findings": [')
        for image, path in masks.items():
            try:
                mask = read_mask(path, classes)
                if standard.native_size and not args.squashed:
                    check_shape(mask.shape, standard.native_size, path)
                examined = examine(mask, standard, classes, image)
            except ValueError as error:                           # a bad mask does not cost the others
                errors[image] = str(error)
                continue
            findings = [finding for finding, _ in examined]
            verdicts[image] = verdict(findings)
            sizes[mask.shape] += 1
            scale = math.prod(standard.native_size or mask.shape) / mask.size
            for f in findings or [Finding(image, NO_DEFECT, 0.0, None, "accept", "", "area_px", "image", 0.0, None, (), 0, scale)]:
                print(line(cells(f), *widths))
                table.writerow(csv_cells(f))
                json_file.write(separator + json.dumps(dict(zip(COLUMNS, f.row()))))
                separator = ",\n"
            if args.overlay and findings:
                picture = draw_overlay(mask, examined, find_photo(path))
                target = Path(args.overlay) / f"{image}_verdict.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target, "wb") as file:
                    picture.save(file, "PNG")
        json_file.write("],\n" + json.dumps({"verdicts": verdicts, "errors": errors}, indent=1)[1:] + "\n")

    native = standard.native_size
    for (h, w), n in sorted(sizes.items()):
        if native and (h, w) != native:
            print(f"{n} of {len(verdicts)} masks: {h}x{w}, areas times {math.prod(native) / (h * w):.6g} to native {native[0]}x{native[1]}")
    tally = Counter(verdicts.values())
    print(f"{printable(standard.name)} standard, {len(verdicts)} images judged: {tally['accept']} accepted, {tally['reject']} rejected"
          f"{f', and {len(errors)} that could not be judged' if errors else ''}.")
    for error in errors.values():
        print(f"error: {printable(error)}", file=sys.stderr)
    return 2 if errors else 1 if tally["reject"] else 0


# --- pictures: no verdict depends on what follows ---

COLOURS = np.array([(48, 48, 48), (240, 228, 66), (86, 130, 233), (204, 121, 220), (120, 220, 232), (250, 250, 250), (170, 120, 70)], np.uint8)
RED, GREEN = (255, 40, 40), (40, 220, 80)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def find_photo(path):
    """image/<kind>/<stem>.* of mask/<kind>/<stem>_mask.png as an RGB picture; None where there is none that can be read."""
    parts = Path(path).absolute().parts
    if "mask" not in parts[:-1]:
        return None
    at = len(parts) - 1 - parts[::-1].index("mask", 1)
    folder, stem = Path(*parts[:at], "image", *parts[at + 1:-1]), Path(path).stem.removesuffix("_mask")
    for photo in (folder / (stem + suffix) for suffix in SUFFIXES):
        try:
            with Image.open(photo) as image:
                if image.mode.startswith(("I", "F")):             # 16 bits and more: to the range of 8
                    image = Image.fromarray((np.asarray(image, float) * (255 / max(1, np.max(image)))).clip(0, 255).astype(np.uint8))
                return image.convert("RGB")
        except Exception:                                         # missing or damaged: the coloured mask will do
            continue
    return None


def draw_overlay(mask, examined, photo=None) -> Image.Image:
    """The photo, or else the coloured mask, with the pixels of every finding outlined (red: rejected, green: accepted) and numbered,
    and its reason below. Small pictures are enlarged by whole factors.

    mask: (H, W) indices; examined: what examine() returned; photo: RGB, any size.
    """
    if photo is None:
        photo = Image.fromarray(COLOURS[np.where(mask > 0, (mask - 1) % (len(COLOURS) - 1) + 1, 0)])
    factor = -(-512 // max(photo.size))
    size = photo.width * max(1, factor), photo.height * max(1, factor)
    thick = max(2, max(size) // 340)
    frame = 2 * thick                                             # an outline lies outside: room for that of what touches the border
    enlarged = lambda picture: ImageOps.expand(picture.resize(size, Image.Resampling.NEAREST), frame, 0)
    canvas = enlarged(photo)
    for decision, colour in ("accept", GREEN), ("reject", RED):
        inside = np.zeros(mask.shape, np.uint8)
        for finding, runs in examined:
            if finding.verdict == decision:
                for row, start, stop in runs.T.tolist():
                    inside[row, start:stop] = 255
        area = enlarged(Image.fromarray(inside))
        canvas.paste(colour, mask=ImageChops.subtract(area.filter(ImageFilter.MaxFilter(2 * thick + 1)), area))

    font, pen = ImageFont.load_default(max(15, max(size) // 52)), ImageDraw.Draw(canvas)
    width, lines, tags = max(canvas.width, 480), [], {}
    shown = sorted(examined, key=lambda pair: pair[0].verdict == "accept")          # rejected first
    for number, (f, runs) in enumerate(shown[:12], 1):
        _, name, measured, limit, _, decision, rule = cells(f)
        text = f"{number} {decision}: {name}, {measured}{'' if f.limit is None else ', limit ' + limit}: {rule}"
        lines += [(piece, decision) for piece in textwrap.wrap(text, int((width - 16) / font.getlength("n")), subsequent_indent="   ")]
        if runs.size:
            tags.setdefault((int(runs[1, 0]), int(runs[0, 0])), []).append(str(number))
    for (x, y), numbers in tags.items():                          # at the first pixel, above it where there is room
        x, y = frame + x * size[0] / mask.shape[1], frame + y * size[1] / mask.shape[0] - thick
        y = y - font.size * 1.2 if y > font.size * 1.3 else y + font.size * 0.3
        text = ",".join(numbers)
        pen.text((min(x, canvas.width - thick - font.getlength(text)), y), text, "white", font, stroke_width=thick, stroke_fill="black")
    if len(shown) > 12:
        lines.append((f"and {len(shown) - 12} more", shown[12][0].verdict))
    step = int(font.size * 1.35)
    picture = ImageOps.expand(canvas, (0, 0, width - canvas.width, step * len(lines) + step // 2), "black")
    pen = ImageDraw.Draw(picture)
    for i, (piece, decision) in enumerate(lines):
        pen.text((8, canvas.height + step * i), piece, (255, 130, 130) if decision == "reject" else (150, 240, 170), font)
    return picture


# --- speed ---

def flood_fill(mask, connectivity):
    """Areas of a bool mask's components in reading order, as plain Python finds them: to compare with."""
    (h, w), todo, areas = mask.shape, mask.tolist(), []
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y or x) and (connectivity == 8 or not (y and x))]
    for y in range(h):
        for x in range(w):
            if todo[y][x]:
                todo[y][x], stack, area = False, [(y, x)], 0
                while stack:
                    a, b = stack.pop()
                    area += 1
                    for dy, dx in steps:
                        if 0 <= a + dy < h and 0 <= b + dx < w and todo[a + dy][b + dx]:
                            todo[a + dy][b + dx] = False
                            stack.append((a + dy, b + dx))
                areas.append(area)
    return areas


def bench_masks(side):
    """{what it shows: bool (side, side)}: a few defects as photos have them, and three that are hard to label."""
    rng, (y, x) = np.random.default_rng(0), np.ogrid[:side, :side]
    spots = np.zeros((side, side), bool)
    for cy, cx, ry, rx, turn in rng.random((8, 5)) * (side, side, side / 12, side / 12, 6) + (0, 0, 3, 3, 0):
        angle = np.arctan2(y - cy, x - cx)
        spots |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 + 0.3 * np.sin(5 * angle + turn)
    spiral = np.minimum(np.minimum(y, x), np.minimum(side - 1 - y, side - 1 - x)) % 2 == 0      # rings, each then cut and joined to the next
    k = np.arange(0, side // 2 - 2, 2)
    spiral[k + 1, k], spiral[k + 2, k + 1] = False, True
    return {"8 defects": spots, "noise, 10 %": rng.random((side, side)) < 0.1, "noise, 50 %": rng.random((side, side)) < 0.5, "spiral": spiral}


def timed(work, times=3):
    """(milliseconds of the fastest of several, result)"""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        spent.append(1e3 * (time.perf_counter() - start))
    return min(spent), result


def bench(side=1024, count=1000) -> int:
    """Print what components cost here, beside a flood fill and, where it is installed, scipy.ndimage; and `count` masks judged."""
    try:
        ndimage = importlib.import_module("scipy.ndimage")
    except ImportError:
        ndimage = None

    def theirs():
        labels, n = ndimage.label(mask, np.ones((3, 3)))
        return np.bincount(labels.ravel(), minlength=n + 1)[1:].tolist(), ndimage.find_objects(labels)

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"
          f"{'' if ndimage else '; scipy is not installed'}\n"
          f"areas and boxes of the 8-connected components of a {side}x{side} mask, milliseconds (times ours)")
    print(f"{'mask':12}  components    ours   plain flood fill   scipy.ndimage")
    for name, mask in bench_masks(side).items():
        ours, (_, _, area, _) = timed(lambda: find_components(find_runs(mask)))
        others = [timed(lambda: (flood_fill(mask, 8), None), 1)] + ([timed(theirs)] if ndimage else [])
        assert all(sorted(area) == sorted(areas) for _, (areas, _) in others)
        print(f"{name:12}  {len(area):10}  {ours:6.1f}" + "".join(f"{f'{spent:.1f} ({spent / ours:.2f}x)':>19}" for spent, _ in others))

    rules = (Rule("each below 900 px", ("a",), 900, "area_px", "component", 8, 10), Rule("fewer than 3", ("a",), 3, "count"),
             Rule("each shorter than 40 px", ("b",), 40, "length_px", "component", 8, 10), Rule("no c", ("c",), 0))
    standard, spots, spent = Standard("bench", "bench", None, None, "reject", rules), bench_masks(side)["8 defects"], Counter()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(20):
            turned = np.roll(spots, (37 * i, 101 * i), (0, 1))
            Image.fromarray((turned * (1 + np.arange(side) * 3 // side)).astype(np.uint8)).save(f"{folder}/{i}.png")
        for i in range(count):
            reading, mask = timed(lambda: read_mask(f"{folder}/{i % 20}.png"), 1)
            spent.update(reading=reading, judging=timed(lambda: judge(mask, standard, ("background", "a", "b", "c")), 1)[0])
    print(f"{count:,} masks of {side}x{side} with 8 defects, 4 rules on area, count and length of components: "
          f"{spent['judging'] / 1e3:.1f} s to judge and {spent['reading'] / 1e3:.1f} s to read the PNGs")
    return 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Judge a folder of index masks by written rules. Without flags: the built-in standards and an example.",
        epilog="Exit status: 0 all accepted, 1 something rejected, 2 bad input (what could be judged is still written).")
    parser.add_argument("--standard", metavar="NAME|FILE", help=f"built-in standard ({', '.join(STANDARDS)}) or a JSON file")
    parser.add_argument("--masks", metavar="DIR", help="folder searched for PNG masks, at any depth; image/ and rgb_mask/ are left out")
    parser.add_argument("--classes", metavar="FILE", help="class table (default: classes.json beside or above the masks, "
                                                          "else the object's built-in labels)")
    parser.add_argument("--squashed", action="store_true", help="masks of another shape than native show the whole photo, squashed")
    parser.add_argument("--csv", metavar="FILE", help="write the findings as CSV, at least one row per image")
    parser.add_argument("--json", metavar="FILE", help="write standard, classes, findings, verdicts and errors as JSON")
    parser.add_argument("--overlay", metavar="DIR", help="write a picture of every image with a finding: outlined, with the reason")
    parser.add_argument("--bench", action="store_true", help="measure how fast masks are judged on this machine, and stop")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):                       # a name that the terminal cannot show is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    alone = not any(vars(args).values())
    if args.bench:
        return bench()
    if not alone and not (args.standard and args.masks):
        parser.error("--standard and --masks go together")
    try:
        return show_standards() if alone else inspect_folder(args)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
