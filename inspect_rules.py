"""Written rules for benign products: index mask -> findings -> "accept" or "reject", as in Defect Spectrum (arXiv 2310.17316).

    python inspect_rules.py                                                    # the built-in standards, and an example
    python inspect_rules.py --standard pill --masks DIR --csv findings.csv     # a built-in standard
    python inspect_rules.py --standard my_rules.json --masks DIR               # your own: copy what the first command prints

Three conventions that bite:
1. A rule rejects when area > 0 and area >= max_area_px. The paper calls "< 4800 px" benign, so with max_area_px = 4800 an
   area of 4799 is accepted and 4800 is rejected; max_area_px = 0 means not allowed at all.
2. Areas are counted in NATIVE pixels: in an H x W mask each pixel counts native_height * native_width / (H * W). This is right
   for a resized or squashed image, whatever its shape, and wrong for a crop; the command says which masks were scaled.
3. A defect that no rule names is decided by the standard's "unnamed": "reject" (the default) or "accept".

Needs numpy and pillow only, so that it can be read, and trusted, alone.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

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


@dataclass(frozen=True)
class Rule:
    name: str
    classes: tuple                # summed
    max_area_px: float            # the smallest area that is rejected; 0 = not allowed


@dataclass(frozen=True)
class Standard:
    object: str
    native_size: tuple            # (height, width) of the photos that the limits were written for
    unnamed: str                  # verdict on a class that no rule names
    rules: tuple


@dataclass(frozen=True)
class Finding:
    image: str
    class_name: str               # the rule's classes joined with "+"
    area_px: float                # native pixels
    limit: float | None           # the rule's max_area_px; None where no rule names the class
    verdict: str                  # "accept" | "reject"
    rule: str                     # its name, or why there is none
    scale: float                  # native pixels per mask pixel; 1.0 = the mask had native size


COLUMNS = ("image", "class", "area_px", "limit", "verdict", "rule", "scale")         # a Finding, field by field
NO_DEFECT = "(no defect)"         # class of the row that an image without findings gets, so that every image has one


# --- standards and class tables ---

def load_standard(name_or_path, classes=None) -> Standard:
    """The built-in standard of that name, else the JSON file at that path; checked against the class table if that is given.

    Raises: ValueError, one sentence that names the file and the key.
    """
    name = str(name_or_path)
    if name in STANDARDS:
        data = STANDARDS[name]
    elif Path(name).is_file():
        data = read_json(name)
    else:
        raise ValueError(f"no standard {name!r}: built in are {', '.join(STANDARDS)}, and there is no file of that name")

    _check_keys(data, name, ("object", "native_size", "rules"), ("unnamed",))
    size, unnamed, owner = data["native_size"], data.get("unnamed", "reject"), {}
    if not isinstance(data["object"], str):
        raise ValueError(f"{name}: object must be a string, not {data['object']!r}")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 10**6 for n in size)):
        raise ValueError(f"{name}: native_size must be two positive integers [height, width], not {size!r}")
    if unnamed not in ("accept", "reject"):
        raise ValueError(f'{name}: unnamed must be "accept" or "reject", not {unnamed!r}')
    if not (isinstance(data["rules"], list) and data["rules"]):
        raise ValueError(f"{name}: rules must be a list of at least one rule, not {data['rules']!r}")

    rules = []
    for i, rule in enumerate(data["rules"]):
        where = f"{name}: rules[{i}]"
        _check_keys(rule, where, ("classes", "max_area_px"), ("name",))
        names, limit = rule["classes"], rule["max_area_px"]
        if not (isinstance(names, list) and names and all(isinstance(c, str) and c for c in names)):
            raise ValueError(f"{where}: classes must be a list of at least one class name, not {names!r}")
        if type(limit) not in (int, float) or not 0 <= limit < 1e15:       # type(): to isinstance, true is an integer
            raise ValueError(f"{where}: max_area_px must be a finite number >= 0, not {limit!r}")
        for c in names:
            if c == "background":
                raise ValueError(f"{where}: classes names background, which is no defect")
            if c in owner:
                raise ValueError(f"{where}: classes names {c!r}, which rules[{owner[c]}] already names")
            owner[c] = i
        joined = "+".join(names)
        text = rule.get("name", f"{joined} below {limit} px" if limit else f"no {joined}")
        if not isinstance(text, str):
            raise ValueError(f"{where}: name must be a string, not {text!r}")
        rules.append(Rule(text, tuple(names), limit))
    standard = Standard(data["object"], tuple(size), unnamed, tuple(rules))
    if classes is not None:
        _check_classes(standard, classes, name)
    return standard


def read_classes(path) -> tuple:
    """classes.json, {"0": "background", "1": "crack", ...} -> ("background", "crack", ...)."""
    table = read_json(path)
    names = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else []
    if not all(isinstance(c, str) and c for c in names) or len(set(names)) < len(names) or names[:1] != ["background"]:
        raise ValueError(f'{path}: expected a class table {{"0": "background", "1": "crack", ...}} with keys 0 to K-1 and names '
                         f"all different, not {str(table)[:200]}")
    return tuple(names)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
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
                raise ValueError(f"{where}: rules[{i}]: classes names {c!r}, "
                                 f"which is not in the class table ({', '.join(classes)})")


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


def judge(mask, standard, classes, image="mask") -> list[Finding]:
    """One finding per rule whose area is > 0, in the standard's order, then one per present class that no rule names.

    Args:
        mask:    (H, W) integers, index into classes; 0 = background. Any size, see the module's second convention.
        classes: tuple of names, index -> name.
        image:   name that the findings carry.
    """
    _check_classes(standard, classes, f"standard {standard.object!r}")
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"{image}: a mask is (H, W) integers and not empty, but this one is {mask.shape} of {mask.dtype}")
    if mask.min() < 0 or mask.max() >= len(classes):
        raise ValueError(f"{image}: mask has values {mask.min()} to {mask.max()}, but the class table has "
                         f"0 to {len(classes) - 1} ({', '.join(classes)})")
    count = dict(zip(classes, np.bincount(mask.ravel().astype(np.int64), minlength=len(classes)).tolist()))
    native_px = standard.native_size[0] * standard.native_size[1]
    named = {c for rule in standard.rules for c in rule.classes}
    unnamed = tuple(Rule("no rule names this class", (c,), None) for c in classes[1:] if c not in named)

    findings = []
    for rule in standard.rules + unnamed:
        # whole numbers until the one division: an area that is a whole number comes out exact, and meets its limit exactly
        area_px = sum(count[c] for c in rule.classes) * native_px / mask.size
        if area_px > 0:
            limit = rule.max_area_px
            decision = standard.unnamed if limit is None else "reject" if area_px >= limit else "accept"
            findings.append(Finding(image, "+".join(rule.classes), area_px, limit, decision, rule.name,
                                    native_px / mask.size))
    return findings


def verdict(findings) -> str:
    """ "reject" if any finding rejects, else "accept"; no findings, no defect: "accept"."""
    return "reject" if any(f.verdict == "reject" for f in findings) else "accept"


def recall_fpr(truths, verdicts) -> dict:
    """Image-level recall = tp / (tp + fn) and false positive rate = fp / (fp + tn); positive = the truth says "reject".

    A rate without a denominator (no positives, no negatives) is None.
    """
    truths, verdicts = list(truths), list(verdicts)
    if len(truths) != len(verdicts) or not {"accept", "reject"}.issuperset(truths + verdicts):
        raise ValueError(f"truths ({len(truths)}) and verdicts ({len(verdicts)}) must be equally many, "
                         'each "accept" or "reject"')
    pairs = Counter(zip(truths, verdicts))
    tp, fn = pairs["reject", "reject"], pairs["reject", "accept"]
    fp, tn = pairs["accept", "reject"], pairs["accept", "accept"]
    return {"recall": tp / (tp + fn) if tp + fn else None, "fpr": fp / (fp + tn) if fp + tn else None,
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


# --- the command ---

def find_masks(folder) -> list[Path]:
    """All PNGs below folder, but hidden files and what a data set keeps in image/ and rgb_mask/ folders or beside mask/ (sheet.png)."""
    if not Path(folder).is_dir():
        raise ValueError(f"--masks {folder} is not a folder")
    skipped = {"image", "images", "rgb_mask", "rbg_mask"}         # "rbg": so spelt in half of the published data
    masks = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() == ".png" and not (p.parent / "mask").is_dir() and not any(
        part.startswith(".") or part in skipped for part in p.relative_to(folder).parts))
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
        raise ValueError(f"--masks holds data sets with different class tables ({', '.join(sorted(map(str, tables)))}); "
                         "inspect one at a time, or pass --classes FILE")
    path = tables.pop()
    if path:
        return read_classes(path), path
    if standard.object in LABELS:
        return LABELS[standard.object], f"the built-in labels of {standard.object}, as no classes.json was found"
    raise ValueError(f"no classes.json beside or above the masks and no built-in labels for {standard.object!r}; "
                     "pass --classes FILE")


def print_table(findings):
    """Print the findings in aligned columns."""
    rows = [COLUMNS[:-1]] + [(f.image, f.class_name, f"{f.area_px:.10g}", "-" if f.limit is None else f"{f.limit:.10g}",
                              f.verdict, f.rule) for f in findings]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def write_csv(path, findings):
    """COLUMNS, one row per finding. Text that a spreadsheet would run as a formula gets a leading quote."""
    def cell(value):
        return "'" + value if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS] + [[cell(value) for value in astuple(f)] for f in findings])


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
    print_table(findings)
    print(f"verdict: {verdict(findings)}\n\nNext: python inspect_rules.py --standard pill --masks DIR --csv findings.csv")
    return 0


def inspect_folder(args) -> int:
    """Judge every mask of --masks, print and write the findings; returns the exit status."""
    masks, standard = find_masks(args.masks), load_standard(args.standard)
    classes, source = find_classes(masks, standard, args.classes)
    _check_classes(standard, classes, args.standard)
    print(f"class table: {source}")

    rows, verdicts, errors, sizes = [], {}, {}, Counter()
    native_h, native_w = standard.native_size
    for path in masks:
        image = path.relative_to(args.masks).with_suffix("").as_posix()
        try:
            mask = read_mask(path, classes)
            findings = judge(mask, standard, classes, image)
        except ValueError as error:                               # a bad mask does not cost the others
            errors[image] = str(error)
            continue
        verdicts[image] = verdict(findings)
        rows += findings or [Finding(image, NO_DEFECT, 0.0, None, "accept", "", native_h * native_w / mask.size)]
        sizes[mask.shape] += 1

    print_table(rows)
    for (h, w), n in sorted(sizes.items()):
        if (h, w) != (native_h, native_w):
            print(f"{n} of {len(verdicts)} masks: {h}x{w}, areas times {native_h * native_w / (h * w):.6g} "
                  f"to native {native_h}x{native_w}")
            if abs(h * native_w / (w * native_h) - 1) > 0.02:
                print("    (another shape than native: right if the images were squashed, wrong if they were cropped)")
    tally = Counter(verdicts.values())
    print(f"{standard.object} standard, {len(verdicts)} images judged: {tally['accept']} accepted, {tally['reject']} rejected"
          f"{f', and {len(errors)} that could not be judged' if errors else ''}.")
    for error in errors.values():
        print(f"error: {error}", file=sys.stderr)
    if args.csv:
        write_csv(args.csv, rows)
    if args.json:
        result = {"standard": asdict(standard), "classes": classes, "verdicts": verdicts, "errors": errors,
                  "findings": [dict(zip(COLUMNS, astuple(f))) for f in rows]}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 2 if errors else 1 if tally["reject"] else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Judge a folder of index masks by written rules. Without flags: the built-in standards and an example.",
        epilog="Exit status: 0 all accepted, 1 something rejected, 2 bad input (what could be judged is still written).")
    parser.add_argument("--standard", metavar="NAME|FILE", help=f"built-in standard ({', '.join(STANDARDS)}) or a JSON file")
    parser.add_argument("--masks", metavar="DIR",
                        help="folder searched for PNG masks, at any depth; image/ and rgb_mask/ are left out")
    parser.add_argument("--classes", metavar="FILE", help="class table (default: classes.json beside or above the masks, "
                                                          "else the object's built-in labels)")
    parser.add_argument("--csv", metavar="FILE", help="write the findings as CSV, at least one row per image")
    parser.add_argument("--json", metavar="FILE", help="write standard, classes, findings, verdicts and errors as JSON")
    args = parser.parse_args(argv)
    alone = not any(vars(args).values())
    if not alone and not (args.standard and args.masks):
        parser.error("--standard and --masks go together")
    try:
        return show_standards() if alone else inspect_folder(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
