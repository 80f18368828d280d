"""The paper's simulated production line: what are labels worth when products are judged by what is seen?

    python -m experiments.line --run runs/pill --run runs/zipper --run runs/wood --seeds 3 --steps 200
    python -m experiments.line --data drawn:wood        exact masks, resized and judged; needs no run

Each scoring image of a run is a product, and the standard's verdict on its exact mask at native size is the
truth. In the line stands the segmenter of evaluate.py's inspection; its masks are judged in one of four WAYS:

    original: any defect            labels of one class: whatever is predicted rejects
    original: best area             the same masks: an area of a limit or more, chosen on the training images
                                    with the verdicts of their exact masks, which a factory without exact
                                    labels has not: it is the best that such labels could do
    spectrum: standard              a class for each pixel: the written standard decides
    spectrum + generated: standard  the same, trained on generated pairs too

Everything is judged in native pixels, whatever size a mask has. Writes OUT/line.json, OUT/verdicts/*.png and
OUT/cells/*.json, one for each run and seed: an interrupted command is run again and goes on.
"""
import argparse
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import evaluate
from datasets import fingerprint, has_bf16, open_dataset, run_main, write_image, write_json
from inspect_rules import Rule, draw_overlay, judge, load_standard, read_json, recall_fpr, verdict
from segment import to_input

ANY_DEFECT, BEST_AREA, STANDARD, GENERATED = WAYS = (
    "original: any defect", "original: best area", "spectrum: standard", "spectrum + generated: standard")
BINARY = "background", "defect"         # classes of the original labels
LEVELS = range(-7, 8)                   # log-odds that a pixel needs to be a defect; at 0 masks are argmax's
SIZES = (64, 64), (128, 128), (256, 256)
COUNTS = "tp", "fn", "fp", "tn"         # positive: to be rejected
KINDS = {("accept", "accept"): "accepted", ("reject", "reject"): "rejected",        # (truth, said)
         ("reject", "accept"): "miss", ("accept", "reject"): "false_alarm"}


# --- masks at a confidence ---

def odds(logits):
    """(B, K, H, W) -> uint8 (B, H, W), the likeliest defect class, and its log-odds against background."""
    best, kind = logits[:, 1:].float().max(1)
    return (kind + 1).to(torch.uint8), best - logits[:, 0].float()


def masks_at(kinds, log_odds, level=0):
    """Masks uint8 (N, H, W): a defect needs p_class / p_background > e ** level. 0: the masks of argmax."""
    return kinds * (log_odds > level)


@torch.inference_mode()
def predict_odds(net, images, batch_size=16):
    """Images uint8 (N, C, H, W) -> the two of `odds`, each (N, H, W), on the CPU."""
    net.eval()
    device, batches = next(net.parameters()).device, []
    for batch in images.split(batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            batches.append([part.cpu() for part in odds(net(to_input(batch.to(device))))])
    return tuple(map(torch.cat, zip(*batches)))


# --- judging ---

def area_standard(standard, limit):
    """The one rule that binary labels allow: `limit` native px or more reject; 0: any defect does."""
    rule = Rule("area limit" if limit else "any defect", ("defect",), limit)
    return replace(standard, rules=(rule,), unnamed="reject")


def best_limit(areas, truths):
    """The limit t of "t px or more reject" with the most recall - false alarms (Youden), of equals the least.

    areas: native px of all that is predicted, per image; truths: "accept" | "reject". Tried are 0, which is
    any defect, the areas themselves, and one that rejects nothing. A rate of no images counts as 0.
    """
    def youden(limit):
        n = recall_fpr(truths, ["reject" if area > 0 and area >= limit else "accept" for area in areas])
        bad, good = max(1, n["tp"] + n["fn"]), max(1, n["fp"] + n["tn"])
        return n["tp"] * good - n["fp"] * bad           # times both: whole numbers, which have equals
    return max(sorted({0.0, *areas, max(areas) + 1}), key=youden)


class Product:
    """A data set's images with the standard's findings on their exact masks, which are the truth.

    resized: {"HxW": recall_fpr of the exact masks resized (nearest) and judged}. simulate() adds
    records: [{"way", "seed", "limit", "level", and recall_fpr's}], and
    errors:  a Counter of (rule, way, kind). A miss counts for each rule that the exact mask breaks, a false
             alarm for each that the predicted mask breaks.
    """

    def __init__(self, name, dataset, standard, sizes=()):
        self.name, self.dataset, self.native_sizes, self.truths = name, dataset, [], []
        self.records, self.errors, resized = [], Counter(), {size: [] for size in sizes}
        for i, sample in enumerate(dataset.samples):            # one native mask in memory at a time
            mask = dataset.read_mask(i)
            self.native_sizes.append(mask.shape)
            self.truths.append(judge(mask, standard, dataset.classes, sample.name))
            for size, verdicts in resized.items():
                small = np.array(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))
                verdicts.append(verdict(judge(small, standard, dataset.classes, sample.name, mask.shape)))
        self.verdicts = [verdict(findings) for findings in self.truths]
        self.resized = {f"{h}x{w}": recall_fpr(self.verdicts, said) for (h, w), said in resized.items()}

    def judge(self, masks, standard, classes):
        """The findings of a predicted mask for each image: uint8 (N, h, w), of any one size."""
        return [judge(mask, standard, classes, sample.name, size)
                for mask, sample, size in zip(masks.numpy(), self.dataset.samples, self.native_sizes)]

    def compare(self, findings):
        """What each image's findings come to beside the truth: a word of KINDS."""
        return [KINDS[truth, verdict(said)] for truth, said in zip(self.verdicts, findings)]


def broken(findings):
    """The rules that reject, each once; a class that no rule names goes by its own name."""
    names = [f.rule if f.limit is not None else f"{f.class_name}: {f.rule}"
             for f in findings if f.verdict == "reject"]
    return list(dict.fromkeys(names))


def write_verdicts(folder, product, masks, findings, most=2):
    """Pictures of at most two verdicts of each kind, on the exact mask and on the predicted one."""
    written = Counter()
    for i, kind in enumerate(product.compare(findings)):
        truth, said, native = product.truths[i], findings[i], product.native_sizes[i]
        if written[kind] == most or not truth + said:           # nothing to see on a good product
            continue
        written[kind] += 1
        size = tuple(max(1, 512 * side // max(native)) for side in native)
        photo = product.dataset.read(i, size)[0].expand(3, *size).permute(1, 2, 0)
        photo = Image.fromarray(photo.contiguous().numpy())
        name = f"{product.name}_{kind}_{written[kind]}"
        exact, predicted = product.dataset.read_mask(i), masks[i].numpy()
        write_image(folder / f"{name}_exact.png", draw_overlay(exact, truth, photo))
        write_image(folder / f"{name}_predicted.png", draw_overlay(predicted, said, photo))


def simulate(run, standard, out):
    """One run's Product, judged in all ways with every seed; what is in `out` is not done again."""
    product = Product(run.folder.name, run.test, standard, sorted({*SIZES, run.size}))
    training = Product(product.name, run.train, standard)
    print(f"{product.name}: {product.verdicts.count('reject')} of {len(run.test)} scoring and "
          f"{training.verdicts.count('reject')} of {len(run.train)} training images are to be rejected; "
          f"original labels: {run.original[1]}")
    pixels = *run.real, *run.scored, *run.generated, *run.original[0]
    made_from = fingerprint(*pixels, standard, run.args.steps, run.args.backbone_weights)
    for seed in range(run.args.seeds):
        cell = out / "cells" / f"{product.name}_{seed}_{made_from}.json"
        if not cell.exists():
            write_json(cell, judge_seed(run, seed, product, training, standard, out / "verdicts"))
        found = read_json(cell)
        product.records += found["records"]
        product.errors.update({tuple(key): count for *key, count in found["errors"]})
    return product


def judge_seed(run, seed, product, training, standard, pictures):
    """{"records", "errors"}, as a Product has them, of one seed. pictures: the folder of write_verdicts."""
    any_defect, records, errors = area_standard(standard, 0), [], Counter()
    nets = {pool: run.network(evaluate.INSPECTOR, *run.pool(pool), seed, run.args.steps)
            for pool in ("original", "real", "real + generated")}
    seen = training.judge(masks_at(*predict_odds(nets["original"], run.real[0])), any_defect, BINARY)
    best = best_limit([sum(f.area_px for f in findings) for findings in seen], training.verdicts)
    for way, pool, rules, classes, limit in (
            (ANY_DEFECT, "original", any_defect, BINARY, 0),
            (BEST_AREA, "original", area_standard(standard, best), BINARY, best),
            (STANDARD, "real", standard, run.classes, None),
            (GENERATED, "real + generated", standard, run.classes, None)):
        found = predict_odds(nets[pool], run.scored[0])
        findings = {level: product.judge(masks_at(*found, level), rules, classes) for level in LEVELS}
        for level, said in findings.items():
            records.append({"way": way, "seed": seed, "limit": limit, "level": level,
                            **recall_fpr(product.verdicts, map(verdict, said))})
        for truth, said, kind in zip(product.truths, findings[0], product.compare(findings[0])):
            if kind in ("miss", "false_alarm"):
                errors.update((rule, way, kind) for rule in broken(truth + said))
        if way == STANDARD and seed == 0:
            write_verdicts(pictures, product, masks_at(*found), findings[0])
    print(f"{product.name}: seed {seed} is judged; best area {best:.0f} px", flush=True)
    return {"records": records, "errors": [[*key, count] for key, count in errors.items()]}


# --- rates ---

def select(records, **wanted):
    return [record for record in records if all(record[key] == value for key, value in wanted.items())]


def together(records):
    """recall_fpr of the verdicts of several records; a rate of no images is nan."""
    n = {key: sum(record[key] for record in records) for key in COUNTS}
    bad, good = n["tp"] + n["fn"], n["fp"] + n["tn"]
    return {**n, "recall": n["tp"] / bad if bad else math.nan, "fpr": n["fp"] / good if good else math.nan}


def by_seed(records):
    """`together` of the records of each seed."""
    return [together(select(records, seed=seed)) for seed in sorted({record["seed"] for record in records})]


def percent(rates, name):
    """Mean and deviation of a rate over several, as the cell of a table."""
    return evaluate.spread([100 * each[name] for each in rates], 1)


# --- tables: {"caption", "head", "rows"} ---

def verdict_table(products):
    groups = {product.name: product.records for product in products}
    groups["all products, pooled"] = [record for product in products for record in product.records]
    rows = []
    for name, records in groups.items():
        for way in WAYS:
            seeds = by_seed(select(records, way=way, level=0))
            n = together(seeds)
            recall = evaluate.interval(n["tp"], n["tp"] + n["fn"], len(seeds))
            alarms = evaluate.interval(n["fp"], n["fp"] + n["tn"], len(seeds))
            counts = [n[key] for key in COUNTS]
            rows.append([name, way, percent(seeds, "recall"), recall, percent(seeds, "fpr"), alarms, *counts])
    for way in WAYS:
        by_product = [by_seed(select(product.records, way=way, level=0)) for product in products]
        means = [{rate: sum(n[rate] for n in of_seed) / len(products) for rate in ("recall", "fpr")}
                 for of_seed in zip(*by_product)]
        rows.append(["mean of products", way, percent(means, "recall"), "", percent(means, "fpr"), *[""] * 5])
    return {"caption": "Verdicts; counts are those of all seeds, 95 % intervals for new images", "rows": rows,
            "head": ["product", "labels: rule", "recall %", "", "false alarms %", "", *COUNTS]}


def resolution_table(products):
    rows = [[product.name, size, len(product.truths), n["fn"], n["fp"]]
            for product in products for size, n in product.resized.items()]
    return {"caption": "Exact masks resized (nearest) and judged", "rows": rows,
            "head": ["product", "size", "images", "misses", "false alarms"]}


def rule_table(products):
    rows = []
    for product in products:
        exact = Counter(rule for findings in product.truths for rule in broken(findings))
        for rule in dict.fromkeys([*exact, *(rule for rule, _, _ in product.errors)]):
            cells = [f"{product.errors[rule, way, 'miss']} / {product.errors[rule, way, 'false_alarm']}"
                     for way in WAYS]
            rows.append([product.name, rule, exact[rule], *cells])
    return {"caption": "Rules behind the errors of all seeds: misses / false alarms", "rows": rows,
            "head": ["product", "rule", "images that break it", *WAYS]}


def working_point_table(products):
    rows = []
    records = [record for product in products for record in product.records]
    for level in LEVELS:
        points = [together(select(records, way=way, level=level)) for way in WAYS]
        cells = [f"{100 * n['recall']:.1f} / {100 * n['fpr']:.1f}" for n in points]
        rows.append([f"{100 / (1 + math.exp(-level)):.1f}", *cells])
    return {"caption": "Recall / false alarms in %, all products and seeds: a pixel is a defect from this "
                       "confidence on, p / (p + background)", "head": ["confidence %", *WAYS], "rows": rows}


# --- command ---

def parse_args(argv=None):
    """Our flags, and those of evaluate.py, with which it opens each run."""
    parser = argparse.ArgumentParser(
        description="The simulated line; without --run: the exact masks of --data resized and judged.",
        epilog="Takes --data --split --original --seeds --steps --backbone-weights --device --quick as well: "
               "see python evaluate.py --help.", allow_abbrev=False)
    parser.add_argument("--run", action="append", default=[], help="with pairs in RUN/samples; repeatable")
    parser.add_argument("--standard", action="append", default=[], help="name or JSON file of the standard, "
                        "once for all or once for each --run (default: that of the object)")
    parser.add_argument("--out", default="runs/line", help="where results go (default: %(default)s)")
    args, others = parser.parse_known_args(argv)
    if len(args.standard) not in (0, 1, len(args.run)):
        raise ValueError("--standard: give it once, or once for each --run")
    if len({Path(run).name for run in args.run}) < len(args.run):
        raise ValueError("--run: two folders have one name, which the tables would mix up; rename one")
    return args, evaluate.parse_args(others)


def line(args, others):
    """Judge the products of all runs; print the tables, write them and the pictures."""
    if not args.run:
        dataset = open_dataset(others.data or "drawn:pill", split=others.split)
        name = dataset.name.split(":")[-1]
        standard = load_standard((*args.standard, name)[0], dataset.classes)
        evaluate.print_table(resolution_table([Product(name, dataset, standard, SIZES)]))
        return
    runs = [evaluate.Run(argparse.Namespace(**{**vars(others), "run": folder})) for folder in args.run]
    names = args.standard or [run.test.name.split(":")[-1] for run in runs]
    names = names * (len(runs) if len(names) == 1 else 1)
    standards = [load_standard(name, run.classes) for name, run in zip(names, runs)]    # before training

    out = Path(args.out) / ("quick" if others.quick else "")
    products = [simulate(run, standard, out) for run, standard in zip(runs, standards)]
    tables = [verdict_table(products), resolution_table(products), rule_table(products),
              working_point_table(products)]
    settings = {**vars(others), **vars(args), "torch": torch.__version__, "device": str(runs[0].device)}
    records = {product.name: product.records for product in products}
    write_json(out / "line.json", {"settings": settings, "tables": tables, "records": records})
    for table in tables:
        evaluate.print_table(table)
    print(f"numbers: {out / 'line.json'}, pictures: {out / 'verdicts'}")


if __name__ == "__main__":
    run_main(lambda: line(*parse_args()))
