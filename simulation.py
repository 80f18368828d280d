"""The paper's simulated production line: products are judged by what a segmenter sees; the truth is the standard on their exact masks.

    python simulation.py                                                        what resolution costs on the drawn pill; needs no run
    python simulation.py --data FOLDER --standard my_rules.json --sizes 64,256  and on your own masks

`evaluate.py inspection` trains the segmenters; what is counted, chosen and shown of their masks is here. Everything is judged in native
pixels: a predicted mask is judged by inspect_rules.py at the scale of its photo, whatever size it has.

A way is what stands in the line: the labels that a segmenter learned from, and the best rule that such labels allow.

    original: any defect            one binary class; any predicted defect rejects
    original: best area             the same masks; an area of a limit or more rejects, the limit chosen on the training images
    spectrum: standard              a class for each pixel: the written standard decides
    spectrum + generated: standard  the same, trained on generated pairs too
"""
import argparse
import math
from collections import Counter

import numpy as np
from PIL import Image

from datasets import add_data_flags, data_options, fit_picture, open_dataset, print_table, run_main, unfit
from inspect_rules import Rule, Standard, binomial_interval, cells, draw_overlay, examine, judge, load_standard, recall_fpr, verdict
from report import mean_spread
from segment import masks_at

SIDES = 64, 128, 256                    # px: what resolution costs is shown at these, at native size and at the run's
LEVELS = range(-7, 8)                   # log-odds that a pixel needs to be a defect; 0: as argmax has it
BINARY = "background", "defect"
COUNTS = "tp", "fn", "fp", "tn"         # positive: to be rejected


def confidence(level):
    """The log-odds of a defect's class against the background as a chance in percent."""
    return 100 / (1 + math.exp(-level))


# --- judging ---

def area_standard(standard, limit):
    """The one rule that binary labels allow: an area of `limit` native px or more rejects, 0: any defect does."""
    rule = Rule("the area limit" if limit else "any defect", ("defect",), limit)
    return Standard("original labels", standard.object, standard.native_size, None, "reject", (rule,))


def resized(mask, size, fit):
    """An exact native mask (H, W) as a run of that size would have it, nearest pixels, without what `fit` adds."""
    return unfit(np.array(fit_picture(Image.fromarray(mask), size, fit, Image.NEAREST, 0)), mask.shape, fit)


def best_limit(areas, truths):
    """The limit t of "an area of t px or more rejects" with the most recall - false positive rate (Youden); of equals the smallest.

    areas: native px of all that is predicted, per image; truths: "accept" | "reject". Tried: 0, which is any defect, the areas themselves, and
    one that rejects nothing. A rate of no images counts as 0.
    """
    def youden(limit):                                              # times both numbers of images: whole numbers have equals
        n = recall_fpr(truths, ["reject" if area > 0 and area >= limit else "accept" for area in areas])
        return n["tp"] * max(1, n["fp"] + n["tn"]) - n["fp"] * max(1, n["tp"] + n["fn"])
    return max(sorted({0.0, *areas, max(areas) + 1}), key=youden)


def reasons(findings):
    """The rules that reject, each once; a class that no rule names goes by its own name."""
    return list(dict.fromkeys(f.rule if f.limit is not None else f"{f.class_name}: {f.rule}" for f in findings if f.verdict == "reject"))


class Line:
    """One product's images with the standard's verdicts on their exact masks, and what each way says of them.

    truths: findings per image; natives: their (H, W); floors {(h, w): rates of the exact masks resized to it}; rates {(way, seed, level): recall_fpr};
    findings {(way, seed): findings per image at level 0}; limits {seed: the best area}.
    """

    def __init__(self, name, dataset, standard, classes, fit="squash", sizes=()):
        self.name, self.dataset, self.standard, self.classes, self.fit = name, dataset, standard, classes, fit
        self.rates, self.findings, self.limits, self.truths = {}, {}, {}, []
        small, self.natives = {size: [] for size in sizes}, []
        for i, sample in enumerate(dataset.samples):                            # one native mask in memory at a time
            mask = dataset.read(i)[1].numpy()
            self.natives.append(mask.shape)
            self.truths.append(judge(mask, standard, classes, sample.name))
            for size, verdicts in small.items():
                verdicts.append(verdict(judge(resized(mask, size, fit), standard, classes, sample.name, mask.shape)))
        self.truth = [verdict(found) for found in self.truths]
        self.floors = {size: recall_fpr(self.truth, verdicts) for size, verdicts in small.items()}

    def judge(self, masks, standard, classes):
        """Findings of a predicted mask for each image, (N, h, w) of the images as `fit` brought them to h x w."""
        return [judge(unfit(mask, native, self.fit), standard, classes, sample.name, native)
                for mask, native, sample in zip(masks, self.natives, self.dataset.samples)]

    def add(self, way, seed, found, standard, classes):
        """Judge predictions read as segment.odds (N, 2, h, w) at every level of confidence."""
        for level in LEVELS:
            findings = self.judge(masks_at(found, level).numpy(), standard, classes)
            self.rates[way, seed, level] = recall_fpr(self.truth, map(verdict, findings))
            if level == 0:
                self.findings[way, seed] = findings

    @property
    def ways(self):
        return list(dict.fromkeys(way for way, _ in self.findings))

    def per_seed(self, way, level=0):
        """Rates of each seed."""
        return [rates for (w, _, at), rates in self.rates.items() if (w, at) == (way, level)]

    def blame(self, way):
        """(misses, false alarms) over the seeds, each a Counter of rules: those that the exact mask breaks, and those that the prediction breaks."""
        misses, alarms = Counter(), Counter()
        for (w, _), findings in self.findings.items():
            for truth, found in zip(self.truths, findings) if w == way else ():
                if verdict(truth) != verdict(found):
                    (misses if verdict(truth) == "reject" else alarms).update(reasons(truth + found))
        return misses, alarms


# --- tables: dictionaries {"caption", "head", "rows"} ---

def pooled(results):
    """recall_fpr of the verdicts of all results together, with "intervals": the exact 95 % ones of recall and fpr."""
    n = {key: sum(result[key] for result in results) for key in COUNTS}
    trials = {"recall": (n["tp"], n["tp"] + n["fn"]), "fpr": (n["fp"], n["fp"] + n["tn"])}
    return {**n, **{rate: hits / all_ if all_ else None for rate, (hits, all_) in trials.items()},
            "intervals": {rate: binomial_interval(*counts) for rate, counts in trials.items()}}


def percent(value):
    return "–" if value is None else f"{100 * value:.1f}"


def interval(values):
    return "–" if values is None else "{:.1f} to {:.1f}".format(*(100 * v for v in values))


def mean_of(results, rate):
    """Mean ± standard deviation over results (of seeds) in percent."""
    values = [result[rate] for result in results]
    return "–" if None in values else mean_spread(values)


def rate_cells(results):
    """mean_of and the interval of the pooled counts, for recall and then fpr."""
    together = pooled(results)["intervals"]
    return [cell for rate in ("recall", "fpr") for cell in (mean_of(results, rate), interval(together[rate]))]


def by_seed(lines, way):
    """Pooled rates over the lines, one for each seed."""
    return [pooled(results) for results in zip(*(line.per_seed(way) for line in lines))]


def mean_of_products(lines, way):
    """For each seed {"recall", "fpr"}: the mean of the lines' rates; None where a line has none."""
    mean = lambda values: None if None in values else sum(values) / len(values)
    return [{rate: mean([result[rate] for result in results]) for rate in ("recall", "fpr")}
            for results in zip(*(line.per_seed(way) for line in lines))]


def verdict_table(lines):
    rows = [[line.name, way, *rate_cells(line.per_seed(way)), *(sum(result[key] for result in line.per_seed(way)) for key in COUNTS)]
            for line in lines for way in line.ways]
    if len(lines) > 1:
        for way in lines[0].ways:
            seeds = by_seed(lines, way)
            rows.append(["all products, pooled", way, *rate_cells(seeds), *(sum(result[key] for result in seeds) for key in COUNTS)])
        for way in lines[0].ways:
            means = mean_of_products(lines, way)
            rows.append(["mean of products", way, mean_of(means, "recall"), "–", mean_of(means, "fpr"), "–", *"––––"])
    return {"caption": "Verdicts; counts are summed over the seeds", "rows": rows,
            "head": ["product", "labels: rule", "recall %", "95 % interval", "false alarms %", "95 % interval", *COUNTS]}


def seed_table(lines):
    rows = [[line.name, way, seed, f"{line.limits[seed]:.0f}" if way == "original: best area" else "–",
             *(rates[key] for key in COUNTS), percent(rates["recall"]), percent(rates["fpr"])]
            for line in lines for (way, seed, level), rates in line.rates.items() if level == 0]
    return {"caption": "Confusion counts of each seed; positive: to be rejected", "rows": rows,
            "head": ["product", "labels: rule", "seed", "area limit, px", *COUNTS, "recall %", "false alarms %"]}


def rule_table(lines):
    """Which rules the errors go back to; an error of several rules counts for each."""
    rows = []
    for line in lines:
        broken, blame = Counter(r for found in line.truths for r in reasons(found)), {way: line.blame(way) for way in line.ways}
        rules = dict.fromkeys([*broken, *(rule for misses, alarms in blame.values() for rule in (*misses, *alarms))])
        rows += [[line.name, rule, broken[rule], *(f"{misses[rule]} / {alarms[rule]}" for misses, alarms in blame.values())] for rule in rules]
    return {"caption": "Rules behind the errors, misses / false alarms over all seeds: the rules that the exact mask of a miss breaks, and those that the prediction of a false alarm breaks",
            "head": ["product", "rule", "images that break it", *lines[0].ways],
            "rows": rows}


def floor_table(lines, marked=()):
    """What resolution alone costs: no segmenter of that size can do better, except by chance. marked: {line name: (h, w) of its run}."""
    rows = []
    for line in lines:
        natives = list(dict.fromkeys(line.natives))
        native = " and ".join(f"{h}x{w}" for h, w in natives[:3]) + (" and others" if len(natives) > 3 else "")
        for size, rates in [*sorted(line.floors.items()), ("native", recall_fpr(line.truth, line.truth))]:
            name = f"native, {native}" if size == "native" else "x".join(map(str, size)) + (" (the run's)" if size == dict(marked).get(line.name) else "")
            rows.append([line.name, name, len(line.truth), rates["fn"] + rates["fp"], rates["fn"], rates["fp"], percent(rates["recall"]), percent(rates["fpr"])])
    return {"caption": "What resolution costs: the exact masks resized (nearest) and judged", "rows": rows,
            "head": ["product", "mask", "images", "errors", "misses", "false alarms", "recall %", "false alarms %"]}


def working_points(lines):
    """{way: [(confidence in %, pooled rates) per level]} over lines and seeds."""
    return {way: [(confidence(level), pooled([rates for line in lines for rates in line.per_seed(way, level)])) for level in LEVELS]
            for way in lines[0].ways}


def curve_table(points):
    rows = [[f"{c:.1f}", *(f"{percent(curve[i][1]['recall'])} / {percent(curve[i][1]['fpr'])}" for curve in points.values())]
            for i, (c, _) in enumerate(next(iter(points.values())))]
    return {"caption": "Working points, recall / false alarms in %, all products and seeds together: a pixel is a defect from this confidence on", "rows": rows,
            "head": ["confidence %", *points]}


# --- the gallery ---

def reason_text(findings):
    """Verdict and reasons in one sentence, rejected findings first; what was accepted only where nothing was rejected."""
    shown = [f for f in findings if f.verdict == "reject"] or findings
    said = []
    for f in shown[:4]:
        _, name, measured, limit, _, _, rule = cells(f)
        said.append(f"{rule} ({name}, {measured}{'' if f.limit is None else f', limit {limit}'})")
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"{verdict(findings)}: {'; '.join(said) or 'no defect'}{more}"


def photo_of(dataset, i, native, side=172):
    """Image i, `native` (H, W) in size, as RGB with its longer side at most `side` px."""
    image = dataset.read(i, tuple(max(1, round(n * min(1, side / max(native)))) for n in native), "squash")[0].numpy()
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)))


def gallery(line, way, seed, found, most=2):
    """[(file name, picture, caption)]: for each kind of verdict up to `most` images, on the exact mask and on the predicted one."""
    kinds = {("accept", "accept"): "accepted", ("reject", "reject"): "rejected", ("accept", "reject"): "false alarm", ("reject", "accept"): "miss"}
    findings, masks, pictures = line.findings[way, seed], masks_at(found).numpy(), []
    for (truth, said), word in kinds.items():
        those = [i for i, predicted in enumerate(findings) if (line.truth[i], verdict(predicted)) == (truth, said)]
        those = sorted(those, key=lambda i: not (line.truths[i] or findings[i]))[:most]          # those with a defect tell more
        for n, i in enumerate(those, 1):
            size, photo = line.natives[i], photo_of(line.dataset, i, line.natives[i])
            for side, mask, found_there in (("exact", line.dataset.read(i)[1].numpy(), line.truths[i]),
                                            ("predicted", unfit(masks[i], size, line.fit), findings[i])):
                picture = draw_overlay(mask, examine(mask, line.standard, line.classes, line.dataset.samples[i].name, size), photo)
                pictures.append((f"{word.replace(' ', '_')}_{n}_{side}.png", picture,
                                 f"{word.capitalize()}: {line.name} {line.dataset.samples[i].name}, {side} mask. {reason_text(found_there)}"))
    return pictures


# --- command ---

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="What resolution costs: verdicts of exact masks that were resized, beside those at native size.")
    add_data_flags(parser, None)
    parser.add_argument("--standard", help="JSON file or name of the standard (default: that of the object)")
    parser.add_argument("--sizes", default=",".join(map(str, SIDES)), help="sides in px, joined by commas (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, help="images at most, evenly chosen (default: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    dataset = open_dataset(args.data, split=args.split, **data_options(args))
    dataset = dataset.subset(range(0, len(dataset), -(-len(dataset) // max(1, args.count))))
    try:
        sizes = [(int(side), int(side)) for side in args.sizes.split(",")]
        if min(sizes) < (1, 1):
            raise ValueError
    except ValueError:
        raise ValueError(f"--sizes {args.sizes}: expected sides in px joined by commas, like 64,128") from None
    name = dataset.name.split(":")[-1]
    line = Line(name, dataset, load_standard(args.standard or name, dataset.classes), dataset.classes, args.fit, sizes)
    print_table(floor_table([line]))


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
