"""The experiments on one run: are its pairs right, do they help a segmenter, do exact masks judge better?

    python evaluate.py                              all three on runs/demo
    python evaluate.py segmentation --run runs/mine --seeds 3
    python evaluate.py --quick                      a run-through in a minute; its numbers mean nothing

Segmenters train on the generator's training split, photos without defects included; scoring images (--split)
are others, which is checked. Results go to RUN/metrics.json, RUN/figures/ and RUN/report.html; experiments
that were run before stay in them.
"""
import argparse
import base64
import html
import itertools
import math
import platform
import statistics
import time
from functools import cache, cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets import (IGNORE, defects, describe, has_bf16, largest, open_dataset, overlay, pick_device,
                      run_main, sheet, write_atomically, write_image, write_json)
from defect_gen import STAGES, load_stage
from diffusion import rng
from inspect_rules import (STANDARDS, check_shape, judge, load_standard, read_json, recall_fpr, verdict,
                           wilson_interval)
from segment import build, check_arch, confusion_matrix, draw_table, fit, load_backbone, miou, mix, predict

COPY_BELOW = 0.5        # half as new as a real photo; 0 to 3 % of held-out photos of drawn:... lie below
INSPECTOR = "deeplabv3+"        # the network of the inspection, and of mask fit
INSPECTOR_NEEDS = 8             # images; of fewer it learns nothing


# --- measures ---
# images uint8 (N, C, H, W), masks uint8 (N, H, W). A number says little without that of real photos.

def laplacian_pyramid(images, levels):
    """Float images (N, C, H, W) -> detail at each scale, finest first, and the small picture that is left."""
    pyramid = []
    for _ in range(levels - 1):
        small = F.avg_pool2d(images, 2)
        coarse = F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
        pyramid.append(images - coarse)
        images = small
    return pyramid + [images]


def wasserstein(a, b, points=1024):
    """1-Wasserstein distance of samples by `points` quantiles: (..., n), (..., m) -> (...)."""
    at = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    a, b = (v.sort(-1).values[..., (at * v.shape[-1]).long()] for v in (a, b))
    return (a - b).abs().mean(-1)


def sliced_wasserstein(images, reference, levels=3, patch=7, projections=64, seed=0):
    """[distance of all patches of two sets, at each scale of a Laplacian pyramid], finest scale first.

    0: the same patches; about 1: as far as those of one picture. As in Karras et al. 2018, section 5, but
    every patch counts, so that equal sets have distance 0, and the unit is the standard deviation of the
    reference along a direction, so that scales weigh the same. Scales without a patch drop out.
    """
    levels = min(levels, 1 + int(math.log2(min(images.shape[2:]) / patch)))
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, images.shape[1], patch, patch, generator=generator)       # filters
    directions /= directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    scales = []
    for a, b in zip(*(laplacian_pyramid(part.float() / 255, levels) for part in (images, reference))):
        a, b = (F.conv2d(part, directions).transpose(0, 1).flatten(1) for part in (a, b))
        scales.append((wasserstein(a, b) / b.std(1).clamp(min=1e-6)).mean().item())
    return scales


def variants(images, masks, names):
    """Images and masks in every way that datasets.augment lays them, in blocks of N; first as they are."""
    turns, flips = [0], [()]
    if "turn" in names:
        turns = [0, 1, 2, 3] if images.shape[-2] == images.shape[-1] else [0, 2]
    if "flip" in names:
        flips = [(), (-1,), (-2,), (-2, -1)]
        turns = [turn for turn in turns if turn < 2]                # two flips are a half turn
    return tuple(torch.cat([part.rot90(turn, (-2, -1)).flip(axes) for turn in turns for axes in flips])
                 for part in (images, masks))


halved = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True)       # so that noise does not count as novelty
outlines = partial(F.adaptive_avg_pool2d, output_size=8)            # 8x8: shape and shading, no texture


def distances(images, others, low_pass):
    """Root mean square difference in grey levels of all pairs of low-passed images: (N, M) float64."""
    a, b = (low_pass(part.float()).flatten(1).double() for part in (images, others))
    square = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T      # exact: a copy is at 0
    return (square / a.shape[1]).clamp(min=0).sqrt()


def novelty(generated, training, held_out):
    """(N,): distance to the nearest training image, over the median of that for held-out real images.

    0: a copy; 1: as new as a real photo. Pass the training images with their variants: a flipped copy is one.
    """
    unit = distances(held_out, training, halved).amin(1).quantile(0.5)
    if unit == 0:
        raise ValueError("half of the held-out images are training images: hold out others")
    return distances(generated, training, halved).amin(1) / unit


def shape_distance(images, reference):
    """(N,): distance of the outlines to the nearest reference image, over its mean among these: our own."""
    among = distances(reference, reference, outlines).fill_diagonal_(math.inf)
    return distances(images, reference, outlines).amin(1) / among.amin(1).mean()


def grain(images):
    """Mean absolute difference of neighbours (across, along), in grey levels: what a blur takes away."""
    images = images.float()
    return [images.diff(dim=axis).abs().mean().item() for axis in (-1, -2)]


def mask_fit(predicted, masks):
    """(N,): IoU of any defect between mask and what a segmenter sees in the image; nan if both are empty."""
    a, b = (predicted > 0) & (masks != IGNORE), defects(masks)
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)


def defect_crops(images, masks, side):
    """Squares (K, C, side, side) around the largest defect of the images that have one; K <= N."""
    crops, size = [], masks.shape[1:]
    for image, mask in zip(images, masks):
        if defects(mask).any():
            y, x, bottom, right = largest(defects(mask).numpy())
            middle = (y + bottom) // 2, (x + right) // 2
            top, left = (min(max(0, m - side // 2), n - side) for m, n in zip(middle, size))
            crops.append(image[:, top:top + side, left:left + side])
    return torch.stack(crops) if crops else images.new_zeros(0, images.shape[1], side, side)


def measure(pairs, seen_masks, training, reference):
    """{name: number} of (images, masks), given held-out pairs (`reference`) and training pairs with variants.

    seen_masks: what a segmenter that was trained on neither sees in the images; None if there is none.
    """
    images, masks = pairs
    side = min(images.shape[2:]) // 4
    crops = [defect_crops(*part, side) for part in (pairs, training, reference)]
    new, (across, along) = novelty(images, training[0], reference[0]), grain(images)
    fit = math.nan if seen_masks is None else 100 * mask_fit(seen_masks, masks).nanmean().item()
    return {"patch distance": statistics.mean(sliced_wasserstein(images, reference[0])),
            "grain across": across, "grain along": along,
            "empty %": 100 * (1 - defects(masks).flatten(1).any(1).double().mean().item()),
            "defects %": 100 * defects(masks).double().mean().item(),
            "copies %": 100 * (new < COPY_BELOW).double().mean().item(), "novelty": new.median().item(),
            "defect novelty": novelty(*crops).median().item() if all(map(len, crops)) else math.nan,
            "shape": shape_distance(images, reference[0]).mean().item(), "mask fit %": fit}


# --- the run ---

def merged(masks):
    """All classes of defects as one; IGNORE stays."""
    return masks.clamp(max=1).where(masks != IGNORE, IGNORE)


def pick(pairs, index):
    """The images and masks at `index`: a slice or a list."""
    return tuple(part[index] for part in pairs)


def spaced(items, most):
    """At most so many of a sequence, evenly spaced."""
    return items[::max(1, len(items) // most)][:most]


class TrainedRun:
    """A trained run, its data opened and checked, at the size (H, W) of training or another."""

    def __init__(self, args, size=None):
        self.args, self.folder = args, Path(args.run)
        self.steps_trained = {}
        for stage in STAGES:
            checkpoint = load_stage(self.folder / stage, stage)
            self.steps_trained[stage], config = checkpoint["step"], checkpoint["config"]
        self.config = config                                        # of the small stage
        self.size, self.classes = tuple(size or config["size"]), tuple(config["classes"])
        self.device, self.data = pick_device(args.device), args.data or config["data"]
        self.train, self.test = self.open(config["split"]), self.open(args.split)
        if self.train.classes != self.classes:
            raise ValueError(f"{self.data} has the classes {', '.join(self.train.classes)}, "
                             f"but {self.folder} was trained with {', '.join(self.classes)}")
        if set(config["images"]) != {self.train.samples[i].name for i in self.train.defective()}:
            raise ValueError(f"{self.data}: split {config['split']} no longer names the images that "
                             f"{self.folder} was trained on; restore it, or train again")
        if not self.test.defective():
            raise ValueError(f"{self.data}: no image has a defect in --split {args.split}; choose another")
        print(describe(self.train), describe(self.test), sep="\n")
        if args.quick:
            self.test = self.test.subset(spaced(range(len(self.test)), 8))
        self.real, self.scored = self.train.tensors(), self.test.tensors()
        trained = {image.numpy().tobytes() for image in self.real[0]}       # by pixels: names may differ
        if shared := [sample.name for sample, image in zip(self.test.samples, self.scored[0])
                      if image.numpy().tobytes() in trained]:
            raise ValueError(f"--split {args.split} shares {len(shared)} images with the training split, "
                             f"{shared[0]} among them; choose another split")

    def open(self, split):
        return open_dataset(self.data, self.size, split, self.config["object"])

    def network(self, arch, images, masks, table, num_classes, seed, steps):
        """A network trained on pairs that are drawn by `table`, see segment.fit."""
        net = build(arch, num_classes, seed)
        if self.args.backbone_weights:
            load_backbone(net, self.args.backbone_weights)
        fit(net.to(self.device), images, masks, steps, seed=seed, bf16=has_bf16(self.device), table=table)
        return net


class Run(TrainedRun):
    """A trained run with its pairs in RUN/samples, and the segmenters trained on them."""

    def __init__(self, args):
        super().__init__(args)
        samples, self.wrong = self.folder / "samples", []
        if not (samples / "config.json").exists():
            raise FileNotFoundError(f"{samples}: no pairs; draw them: python sample.py --run {self.folder}")
        self.generated = open_dataset(samples, self.size).tensors()
        empty = 100 * (~defects(self.generated[1]).flatten(1).any(1)).double().mean().item()
        if empty > 50:
            self.wrong.append(f"{empty:.0f} % of the masks are empty: draw with --min-area-px 1.")
        if read_json(samples / "config.json").get("steps_trained") != self.steps_trained:
            self.wrong.append(f"The pairs in {samples} are of other checkpoints: draw them again.")

    @cached_property
    def mixed(self):
        """Real and generated pairs 1:1, near the paper's best ratio, or as many as there are: see mix."""
        return mix(self.real, self.generated, min(1, len(self.generated[0]) / len(self.real[0])))

    @cached_property
    def original(self):
        """The training images with one coarse class, as in older data sets, and where that comes from."""
        spec = self.args.original or (f"{self.data}:original" if self.data.startswith("drawn:") else None)
        if not spec:
            return (self.real[0], merged(self.real[1])), "the exact masks with all classes merged"
        older, names = open_dataset(spec, self.size), [sample.name for sample in self.train.samples]
        place = {sample.name: i for i, sample in enumerate(older.samples)}
        if missing := [name for name in names if name not in place]:
            raise ValueError(f"--original {spec}: {len(missing)} training images are missing: {missing[0]}")
        images, masks = older.subset([place[name] for name in names]).tensors()
        return (images, merged(masks)), f"those of {spec}"

    def pool(self, name):
        """Images, masks, table to draw by, number of classes. Pools differ in what they are named for alone:
        original labels come with the same photos at the same places of the same batches as exact ones.
        """
        if name == "real + generated":
            return *self.mixed, len(self.classes)
        pairs, num_classes = (self.original[0], 2) if name == "original" else (self.real, len(self.classes))
        return *pairs, draw_table(self.real[1]), num_classes

    def segmenter(self, arch, pairs, num_classes, seed, steps):
        """Train a segmenter; returns its function images -> masks."""
        net = self.network(arch, *pairs, None, num_classes, seed, steps)
        return partial(predict, net, bf16=has_bf16(self.device))

    @cache                                                          # two experiments ask
    def predict(self, arch, pool, seed):
        """What a segmenter trained on a pool predicts for the scoring images."""
        net = self.network(arch, *self.pool(pool), seed, self.args.steps)
        return predict(net, self.scored[0], bf16=has_bf16(self.device))

    def figure(self, name, picture, caption):
        """Write a picture beside the report and return the record that the report shows it by."""
        write_image(self.folder / "figures" / name, picture)
        return {"file": name, "caption": caption}


# --- the experiments: each returns {"title", "text": sentences, "tables", "figures", "numbers"} ---

def not_run(title, why):
    return {"title": title, "text": [f"Not run: {why}."], "tables": [], "figures": [], "numbers": {}}


def class_shares(masks, num_classes):
    """Cells: % of empty masks, then for each class % of pixels (% of images that have it)."""
    cells = [f"{100 * (~defects(masks)).flatten(1).all(1).double().mean():.0f}"]
    for k in range(1, num_classes):
        here = masks == k
        cells.append(f"{100 * here.double().mean():.2f} ({100 * here.flatten(1).any(1).double().mean():.0f})")
    return cells


def halves(dataset, seed):
    """Indices of two random halves of the images with a defect, each with half of each kind.

    The order of the samples does not matter.
    """
    named = sorted(dataset.defective(), key=lambda i: dataset.samples[i].name)
    shuffled = [named[i] for i in torch.randperm(len(named), generator=rng(seed)).tolist()]
    ordered = sorted(shuffled, key=lambda i: dataset.samples[i].kind or str(dataset.classes_in(i)))
    return ordered[::2], ordered[1::2]


def compare(run, training, sets, progress):
    """{set name: [what measure() says of each part]}, as many other real images first.

    training: pairs with variants. sets: {name: (images, masks)}, each of --seeds pairs at least. Each of
    --seeds parts takes other pairs of a set, and other halves of the held-out images.
    """
    steps, parts = 2 * run.args.steps, run.args.seeds
    numbers = {name: [] for name in ("other real images", *sets)}
    for part in range(parts):
        reference, others = (pick(run.scored, half) for half in halves(run.test, part))
        count = min(len(others[0]), *(len(images) // parts for images, _ in sets.values()))
        apart = [i * len(others[0]) // count for i in range(count)]         # of every kind its share
        drawn = slice(part * count, (part + 1) * count)
        here = [pick(others, apart), *(pick(pairs, drawn) for pairs in sets.values())]
        enough = len(reference[0]) >= INSPECTOR_NEEDS
        if enough:
            see = run.segmenter(INSPECTOR, reference, len(run.classes), part, steps)
        for values, pairs in zip(numbers.values(), here):
            values.append(measure(pairs, see(pairs[0]) if enough else None, training, reference))
        progress(f"part {part + 1} of {parts}, mask fit by {INSPECTOR} of {steps} steps")
    return numbers


def generation(run, progress):
    """Generated pairs beside held-out real ones: how far apart, what is copied, what the masks hold."""
    train, test = pick(run.real, run.train.defective()), pick(run.scored, run.test.defective())
    training, steps, parts = variants(*train, run.config["augment"]), 2 * run.args.steps, run.args.seeds
    count = min(len(test[0]) // 2, len(run.generated[0]) // parts)
    if len(test[0]) < 4 or not count:
        return not_run("Generation", f"{len(test[0])} held-out images have a defect and there are "
                       f"{len(run.generated[0])} pairs; needed are 4, and {parts} pairs (--seeds)")
    numbers = compare(run, training, {"generated": run.generated}, progress)
    rows = [[name, *(spread([values[name] for values in sets], 2) for sets in numbers.values())]
            for name in numbers["generated"][0]]
    shares = [[name, *class_shares(masks, len(run.classes))] for name, masks in
              (("training", train[1]), ("held out", test[1]), ("generated", run.generated[1]))]
    return {"title": "Generation", "numbers": numbers,
            "figures": generation_figures(run, train, training, test), "wrong": faults(numbers),
            "tables": [{"caption": "Pairs", "head": ["", *numbers], "rows": rows},
                       {"caption": "Masks: % of pixels (% of images that have it)", "rows": shares,
                        "head": ["set", "% empty", *run.classes[1:]]}],
            "text": [f"{count} pairs of each set at a time, empty masks included; ± is the deviation over "
                     f"{parts} parts: other generated pairs, and other random halves of the {len(test[0])} "
                     f"held-out images with a defect, as reference and as other real images. "
                     f"{len(train[0])} training images, {len(training[0])} with the variants of --augment.",
                     "Patch distance: sliced Wasserstein, 0 is best. Grain: mean difference of neighbouring "
                     "pixels in grey levels. Novelty: distance to the nearest training image; held-out "
                     f"photos have 1, a copy 0, and what is below {COPY_BELOW} counts as a copy. Defect "
                     "novelty: the same around the largest defect. Shape: distance of the outlines, real "
                     f"ones have 1. Mask fit: IoU with what {INSPECTOR} sees after {steps} steps on the "
                     f"reference (if it has {INSPECTOR_NEEDS} images); it has seen no training image."]}


def faults(numbers):
    """Sentences on what is wrong with the pairs at first sight: the report begins with them."""
    def mean(of, measure):
        return statistics.mean(part[measure] for part in numbers[of])
    copies, fit = (mean("generated", measure) for measure in ("copies %", "mask fit %"))
    real = mean("other real images", "mask fit %")
    found = {f"{copies:.0f} % of the pairs copy a training photo.": copies > 50,
             f"Masks fit their pictures to {fit:.0f} %, those of real ones to {real:.0f} %.": fit < real / 2}
    return [sentence for sentence, holds in found.items() if holds]


def generation_figures(run, train, training, test):
    """Generated pairs with the nearest training images, and real ones; each pair (images, masks)."""
    images, masks = (spaced(part, 8) for part in run.generated)
    near = pick(training, distances(images, training[0], halved).argmin(1))
    nearest = [("generated", images), ("its mask", list(map(overlay, images, masks))),
               ("nearest training", near[0]), ("its mask", list(map(overlay, *near)))]
    real = [(name, [overlay(*pair) for pair in spaced(list(zip(*pairs)), 8)])
            for name, pairs in (("training", train), ("held out", test))]
    return [run.figure("nearest.png", sheet(nearest, classes=run.classes),
                       "Generated pairs, and the training image nearest to each"),
            run.figure("real.png", sheet(real, classes=run.classes), "Real images with masks")]


def segmentation(run, progress):
    """mIoU on real images after training on real and on real + generated pairs, at equal optimiser steps."""
    args, pools = run.args, ("real", "real + generated")
    scores, shown = {}, {}
    for arch, pool, seed in itertools.product(args.arch, pools, range(args.seeds)):
        shown[arch, pool] = run.predict(arch, pool, seed)
        score = miou(confusion_matrix(shown[arch, pool], run.scored[1], len(run.classes)))
        scores.setdefault((arch, pool), []).append(score)
        progress(f"{arch}, {pool}, seed {seed}: mIoU {100 * score['miou']:.1f} %")
    means, classes = [], []
    for arch in args.arch:
        for measure_name, words in (("miou", "mIoU"), ("miou_with_background", "with background")):
            without, with_ = ([100 * score[measure_name] for score in scores[arch, pool]] for pool in pools)
            gain = [b - a for a, b in zip(without, with_)]
            means.append([arch, words, spread(without, 1), spread(with_, 1), spread(gain, 1)])
    for (arch, pool), seeds in scores.items():
        ious = zip(*(score["iou"] for score in seeds))
        classes.append([arch, pool, *(spread([100 * value for value in values], 1) for values in ious)])
    images, truth = run.scored
    rows = [(run.test.samples[i].kind,
             [images[i], *(overlay(images[i], masks[i]) for masks in (truth, *shown.values()))])
            for i in spaced(run.test.defective(), 6)]
    titles = ["image", "truth", *(arch if pool == "real" else "+ generated" for arch, pool in shown)]
    return {"title": "Segmentation", "numbers": {" | ".join(key): seeds for key, seeds in scores.items()},
            "tables": [{"caption": "mIoU over the defect classes in %; the difference is paired by seed",
                        "head": ["network", "", *pools, "difference"], "rows": means},
                       {"caption": "IoU per class in %", "head": ["network", "trained on", *run.classes],
                        "rows": classes}],
            "figures": [run.figure("segmentation.png", sheet(rows, titles, run.classes),
                                   "Predictions of the last seed, of each network and pool")],
            "text": [f"{len(run.real[0])} real images, {len(run.mixed[0]) - len(run.real[0])} generated "
                     f"pairs more, drawn in this proportion; {args.steps} optimiser steps of 8 images; "
                     f"scored on {len(run.scored[0])} real images in one confusion matrix. ± is the "
                     f"deviation over {args.seeds} seeds. A class without a pixel in the scoring images has "
                     "no IoU and does not count."]}


def inspection(run, progress):
    """Recall and false alarms: any defect that original labels find, or the standard on exact ones."""
    args, name = run.args, run.test.name.split(":")[-1]
    given = args.standard or (name if name in STANDARDS else None)
    if given is None:
        return not_run("Inspection", f"no standard for {name}; see docs/rules.md and --standard")
    standard = load_standard(given, run.classes)
    natives = [run.test.read_mask(i) for i in range(len(run.test))]
    for sample, mask in zip(run.test.samples, natives):
        if standard.native_size:
            check_shape(mask.shape, standard.native_size, f"--standard {given}, {sample.name}")
    truth = [verdict(judge(mask, standard, run.classes)) for mask in natives]
    progress(f"{truth.count('reject')} of {len(truth)} are to be rejected by their exact masks")
    ways = "original: any defect", "real: standard", "real + generated: standard"
    numbers = {way: [] for way in ways}
    for way, seed in itertools.product(ways, range(args.seeds)):
        pool, rule = way.split(": ")
        masks = run.predict(INSPECTOR, pool, seed).numpy()
        if rule == "any defect":
            said = ["reject" if mask.any() else "accept" for mask in masks]
        else:
            said = [verdict(judge(mask, standard, run.classes, native_size=native.shape))
                    for mask, native in zip(masks, natives)]
        numbers[way].append(recall_fpr(truth, said))
        progress(f"{way}, seed {seed}")
    rows = []
    for way, seeds in numbers.items():
        tp, fn, fp, tn = (sum(rates[key] for rates in seeds) for key in ("tp", "fn", "fp", "tn"))
        cells = []
        for rate, hits, trials in (("recall", tp, tp + fn), ("fpr", fp, fp + tn)):
            cells += [spread([100 * r[rate] for r in seeds], 1) if trials else "–",
                      interval(hits, trials, args.seeds)]
        rows.append([way, *cells, tp, fn, fp, tn])
    rules = "; ".join(rule.name for rule in standard.rules)
    return {"title": "Inspection", "figures": [], "numbers": numbers,
            "tables": [{"caption": "Verdicts of all seeds; positive: to be rejected", "rows": rows,
                        "head": ["labels: rule", "recall %", "95 % interval", "false alarms %",
                                 "95 % interval", "tp", "fn", "fp", "tn"]}],
            "text": [f"Standard {standard.name}: {rules}; any other defect: {standard.unnamed}. Truth: exact "
                     f"masks at native size; {truth.count('reject')} of {len(truth)} scoring images are to "
                     f"be rejected. Segmenters: {INSPECTOR}, {args.steps} steps, {args.seeds} seeds. Older "
                     f"masks: {run.original[1]}. ± is the deviation over seeds; intervals (Wilson) are for "
                     "new images: one that comes back with each seed counts once."]}


EXPERIMENTS = {"generation": generation, "segmentation": segmentation, "inspection": inspection}


# --- tables and the report ---

def spread(values, digits):
    """'0.97 ± 0.02': mean and sample standard deviation; the mean alone of one value, – for nan."""
    if any(map(math.isnan, values)):
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def interval(hits, trials, seeds):
    """'70.6 to 81.9': 95 % interval of a rate in %, for new images; hits and trials are those of all seeds.

    The seeds judge the same images, much alike: an image is one trial, and a hit by the share of its seeds.
    """
    if not trials:
        return "–"
    return "{:.1f} to {:.1f}".format(*(100 * end for end in wilson_interval(hits / seeds, trials / seeds)))


def print_table(table):
    """Print {"caption": text, "head": cells, "rows": lists of cells}, the columns aligned."""
    rows = [list(map(str, row)) for row in (table["head"], *table["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(table["caption"])
    for row in rows:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())


STYLE = """
:root { color-scheme: light dark; --line: #8886 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
.wrong { border-left: .3rem solid #d33; padding-left: .7rem; font-weight: 600 }
h2 { margin-top: 2.5rem; border-bottom: 2px solid var(--line) }
/* a shade at the right where more is hidden */
.wide { overflow-x: auto; margin: .2rem 0 1rem; background:
  linear-gradient(to left, Canvas 50%, #0000) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, #8889, #0000) 100% 0 / 1rem 100% no-repeat }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
h3 { font-size: 1rem; margin: 1.2rem 0 0 }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
img { max-width: 100%; height: auto; background: #fff }
figure { margin: 1.2rem 0 }
@media (max-width: 62rem) { img { max-width: none } }       /* a picture scrolls rather than shrinks */
"""


def html_table(table):
    """{"caption", "head", "rows"} as a table that scrolls by itself where the screen is narrow."""
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    lines = [line("th", table["head"])] + [line("td", row) for row in table["rows"]]
    return (f"<h3>{html.escape(table['caption'])}</h3>"
            f"<div class=wide tabindex=0><table>{''.join(lines)}</table></div>")


LEAD = ("One run from {images} photos, {large} steps of the large and {small} of the small stage. Generation "
        "is how its pairs look, what they copy and whether masks fit, not what longer training draws. "
        "Whether pairs help, or exact masks judge better, takes segmenters that have learned and more than "
        "one run: experiments/paper_table.py and experiments/line.py, a night.")


def write_report(folder, metrics, lead):
    """folder/report.html: tables, text, pictures and settings of every experiment, in one file."""
    title = html.escape(f"Defect-Gen: {folder}")
    parts = ["<!doctype html><html lang=en><head><meta charset=utf-8>",
             "<meta name=viewport content='width=device-width,initial-scale=1'>",
             f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"]
    wrong = [sentence for result in metrics.values() for sentence in result["wrong"]]
    parts += [f"<p class=wrong>{html.escape(sentence)}</p>" for sentence in dict.fromkeys(wrong)]
    missing = " and ".join(name for name in EXPERIMENTS if name not in metrics)
    parts.append(f"<p>{html.escape(lead + f' Not run: {missing}.' * bool(missing))}</p>")
    for result in metrics.values():
        parts.append(f"<h2>{html.escape(result['title'])}</h2>")
        parts += [html_table(table) for table in result["tables"]]
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in result["text"]]
        for figure in result["figures"]:
            data = base64.b64encode((folder / "figures" / figure["file"]).read_bytes()).decode()
            caption = html.escape(figure["caption"])
            parts.append(f'<figure><div class=wide tabindex=0><img alt="{caption}" src="data:image/png;'
                         f'base64,{data}"></div><figcaption>{caption}</figcaption></figure>')
        settings = "; ".join(f"{name}: {value}" for name, value in result["settings"].items())
        parts.append(f"<p><small>{html.escape(settings)}</small></p>")
    write_atomically(folder / "report.html", lambda p: p.write_text("\n".join(parts), encoding="utf-8"))


# --- command ---

def parse_args(argv=None):
    """The flags, checked; --arch as a list."""
    parser = argparse.ArgumentParser(description="Run the experiments of a trained run and write its report.")
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", help=f"{' | '.join(EXPERIMENTS)} (default: all)")
    add("--run", default="runs/demo", help="with pairs in RUN/samples (default: %(default)s)")
    add("--data", help="the data set (default: the one the run was trained on)")
    add("--original", metavar="DATA", help="the same images with an older annotation, as in MVTec AD "
        "(default: drawn data have one, else all classes are merged)")
    add("--split", default="test", help="images to score on (default: %(default)s)")
    add("--seeds", type=int, default=3, help="segmenters of each kind, and parts of the pairs that ± is "
        "taken over (default: %(default)s)")
    add("--steps", type=int, default=100, help="optimiser steps of a segmenter; twice that for the judge of "
        "masks (default: %(default)s)")
    add("--arch", nargs="+", default=["deeplabv3+", "segformer"], help="networks of the segmentation; "
        "deeplabv3+:resnet50 names a backbone (default: both)")
    add("--backbone-weights", metavar="FILE", help="or imagenet; see segment.py")
    add("--standard", help="JSON file or name of the standard (default: that of the object)")
    add("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add("--quick", action="store_true", help="one seed, 2 steps, 8 scoring images: shows that everything "
        "runs; the numbers mean nothing and go to RUN/quick")
    args = parser.parse_args(argv)
    args.experiments = args.experiments or list(EXPERIMENTS)
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        raise ValueError(f"unknown experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    for arch in args.arch:
        check_arch(arch)
    if args.seeds < 1 or args.steps < 1:
        raise ValueError("--seeds and --steps must be at least 1")
    if args.quick:
        args.seeds, args.steps = 1, 2
    return args


def evaluate(args):
    """Run the experiments; each is in metrics.json and report.html as soon as it is finished."""
    run = Run(args)
    if args.quick:
        run.folder = run.folder / "quick"
    path = run.folder / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    for name in args.experiments:
        start = time.perf_counter()
        print(f"--- {name}", flush=True)

        def progress(text):
            print(f"{time.perf_counter() - start:6.0f} s  {text}", flush=True)
        metrics[name] = result = EXPERIMENTS[name](run, progress)
        result["wrong"] = [*run.wrong, *result.get("wrong", ())]
        result["settings"] = {
            "data": run.data, "trained on": run.train.split_rule, "scored on": run.test.split_rule,
            "size": "x".join(map(str, run.size)), "backbone weights": args.backbone_weights or "none",
            "seconds": round(time.perf_counter() - start), "device": str(run.device),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}"}
        if args.quick:
            result["text"].insert(0, "A run-through of --quick: the numbers mean nothing.")
        write_json(path, metrics)
        write_report(run.folder, metrics, LEAD.format(**run.steps_trained, images=len(run.config["images"])))
        for table in result["tables"]:
            print_table(table)
        print(*result["text"], *result["wrong"], sep="\n")
    print(f"report: {run.folder / 'report.html'}")


if __name__ == "__main__":
    run_main(lambda: evaluate(parse_args()))
