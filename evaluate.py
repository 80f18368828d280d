"""The experiments: are the generated pairs right, do they help a segmenter, and do better masks give better verdicts?

    python evaluate.py                              generation, segmentation and inspection on runs/demo
    python evaluate.py segmentation --run runs/mine --seeds 3 --arch all
    python evaluate.py speed                        what the networks cost on this machine; needs no run
    python evaluate.py --quick                      a run-through in a minute; its numbers mean nothing

Training images are those the generator saw (the run's split); scoring images (--split) are others, which is checked.
Results go to RUN/metrics.json, RUN/figures/ and RUN/report.html; experiments that were run before stay in the report, and trained
segmenters' predictions stay in RUN/cells, so that an interrupted table goes on where it stopped.
"""
import argparse
import base64
import hashlib
import html
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import benchmark
from benchmark import machine
from datasets import (PALETTE, data_options, describe, has_bf16, open_dataset, overlay, pick_device, print_table, read_json, run_main, sheet, unfit,
                      write_atomically, write_image, write_json)
from defect_gen import STAGES, DefectGen, load_stage, open_training, steps_of, strip
from inspect_rules import STANDARDS, judge, load_standard, recall_fpr, verdict
from metrics import (COPY_BELOW, Features, copy_share, coverage_density, defect_crops, distances, intra_cluster_diversity, kid, light, mask_fit,
                     mask_statistics, novelty, shape_distance, sliced_wasserstein, variants)
from segment import ARCHS, build, check_arch, confusion_matrix, fit, load_backbone, miou, mix, predict


class Setting:
    """One run: its training images, the scoring images and the generated pairs."""

    def __init__(self, args, run, data, out):
        self.args, self.run, self.out = args, Path(run), out
        if not (self.run / "large" / "config.json").exists():
            raise FileNotFoundError(f"--run {run}: no trained run there; train first: python train.py --stage large --out {run}")
        self.config = read_json(self.run / "large" / "config.json")
        self.size, self.classes = tuple(self.config["size"]), tuple(self.config["classes"])
        self.device = pick_device(args.device)
        self.bf16 = has_bf16(self.device)
        self.data, self.fit = data or self.config["data"], self.config.get("fit", "squash")
        skip = {"skip_bad": True} if args.skip_bad else {}
        self.train = open_training(run, self.config, self.size, self.data, **skip)
        self.test = self.open(args.split)
        if not self.test.defective():
            raise ValueError(f"{self.data}: no image with a defect in --split {args.split}; nothing to score on. Keep some of the images out of "
                             f"training with a split.json (README, 'Your own data')")
        files = [{s.name if s.image is None else os.path.realpath(s.image) for s in part.samples} for part in (self.train, self.test)]
        shared = {str(file) for file in files[0] & files[1]}
        if shared:
            raise ValueError(f"--split {args.split} shares {len(shared)} images with the training split {self.config['split']} "
                             f"({sorted(shared)[0]}, ...); scores on training images prove nothing, choose another split")
        self.splits = (f"{self.train.name}: trained on {len(self.train)} images ({self.train.split_rule}), scored on others, "
                       f"{len(self.test)} of {self.test.split_rule}.")
        print(describe(self.train), describe(self.test), sep="\n")
        if args.quick:
            self.test = self.test.subset(range(0, len(self.test), max(1, len(self.test) // 8)))
        samples = self.run / "samples"
        if not (samples / "classes.json").exists():
            raise FileNotFoundError(f"{samples}: no generated pairs; draw them first: python sample.py --run {self.run}")
        self.generated = open_dataset(samples, self.size)
        if self.generated.classes != self.classes:
            raise ValueError(f"{samples} has other classes than {run}: it was drawn by another run; remove it and run sample.py again")

    @cached_property
    def real(self):
        """Training images and masks, in memory."""
        return self.train.tensors()

    @cached_property
    def drawn(self):
        """Generated images and masks, in memory."""
        return self.generated.tensors()

    @cached_property
    def scored(self):
        """Scoring images and masks, in memory."""
        return self.test.tensors()

    def open(self, split, annotation="spectrum"):
        """The part of the data that a split names, read as the run read it."""
        original = self.args.original if annotation == "original" else None
        options = data_options(self.config)
        options["skip_bad"] = options["skip_bad"] or self.args.skip_bad
        return open_dataset(self.data, self.size, split, annotation=annotation, original=original, **options)

    def figure(self, name, picture, caption):
        """Write a picture beside the report and return the record that the report shows it by."""
        write_image(self.out / "figures" / name, picture)
        return {"file": name, "caption": caption}

    def pictures(self, predictions, indices):
        """Rows of a sheet: image, truth and each prediction for some of the scoring images."""
        images, target = self.scored
        return [(self.test.samples[i].kind, [images[i]] + [overlay(images[i], masks[i]) for masks in (target, *predictions)]) for i in indices]


def spread(values, digits):
    """'0.97 ± 0.02': mean and sample standard deviation, the mean alone of a single value."""
    return " ± ".join(f"{f(values):.{digits}f}" for f in (statistics.mean, statistics.stdev)[:len(values)])


# --- generation ---

SWITCHES = 0, 100, 200, 400, 600, 800, 1000     # 0: the large network alone, 1000: the small one alone
MEASURES = ["patch distance", "1000 KID", "coverage %", "density", "diversity", "novelty", "copies %", "defect novelty", "shape", "mask fit %"]


def class_table(classes, named_masks):
    """Rows of each class in each named set of masks, and the same as numbers; see mask_statistics."""
    rows, numbers = [], {}
    for title, masks in named_masks.items():
        numbers[title] = mask_statistics(masks, len(classes))
        for name, found in zip(classes[1:], numbers[title]["classes"][1:]):
            there = found["components"] is not None
            rows.append([title, name, f"{100 * found['pixels']:.2f}", f"{100 * found['images']:.0f}"]
                        + ([f"{found['components']:.1f}", f"{found['median_area_px']:.0f}", "{:.2f}, {:.2f}".format(*found["centre"])] if there else ["–"] * 3))
    return {"head": ["set", "class", "% of pixels", "% of images", "parts per image", "median part, px", "mean centre y, x"], "rows": rows}, numbers


def name_of(switch_t):
    return {None: "other real images", 0: "large only", 1000: "small only"}.get(switch_t, f"switch_t {switch_t}")


def draw_sets(setting, used, count, progress):
    """{(step, switch_t): pairs}: those of RUN/samples, drawn with the switch `used`; the same seeds with every other switch; and the extremes
    and `used` from each older checkpoint. Only switches that both stages were trained for, which is all with --t-range full, and
    checkpoints that both stages have.
    """
    steps, sets = sorted(set.intersection(*(set(steps_of(setting.run / stage)) for stage in STAGES))), {}
    newest = load_stage(setting.run / "large", "large")["step"]     # the newest whole one
    for step in [*(s for s in steps if s < newest), newest]:
        try:
            generator = DefectGen.load(setting.run, setting.device, None if step == newest else step)
        except ValueError as error:
            if step == newest:
                raise
            progress(f"left out: {error}")
            continue
        for switch_t in sorted({used, *SWITCHES} if step == newest else {0, used, 1000}):
            if (step, switch_t) == (newest, used):
                sets[step, switch_t] = [part[:count] for part in setting.drawn]
                continue
            try:
                sets[step, switch_t] = generator.sample(list(range(count)), switch_t=switch_t)
            except ValueError:                                      # a stage was not trained for this switch
                continue
        progress(f"drawn from the checkpoint at step {step}: {', '.join(name_of(s) for at, s in sets if at == step)}")
    return sets, newest


def measures(images, masks, seen_masks, training, reference, features):
    """One number for each of MEASURES: of pictures, beside held-out real ones and the training images with their variants.

    seen_masks are what a segmenter trained on the real images predicts for the pictures.
    """
    fake, real, seen = features(images), features(reference[0]), features(training[0])
    side = min(images.shape[2:]) // 4
    crops = [defect_crops(*pairs, side)[0] for pairs in ((images, masks), training, reference)]
    new = novelty(images, training[0], reference[0])
    coverage, density = coverage_density(real, fake)
    return [statistics.mean(sliced_wasserstein(images, reference[0])), 1000 * kid(fake, real), 100 * coverage, density,
            intra_cluster_diversity(fake, seen), new.median().item(), 100 * copy_share(new),
            novelty(*crops).median().item() if len(crops[0]) else math.nan, shape_distance(images, reference[0]).mean().item(),
            100 * mask_fit(seen_masks, masks).nanmean().item()]


def curves(numbers, newest):
    """[(file, picture, caption)]: measures against switch_t, and novelty against training steps, where there are two points or more."""
    sets = {switch_t: values for (step, switch_t), values in numbers.items() if step == newest and switch_t is not None}
    scales = {"novelty": 1, "copies %": 100, "shape": 1, "coverage %": 100, "mask fit %": 100}
    lines = {name.removesuffix(" %"): [statistics.mean(values[name]) / scale for values in sets.values()] for name, scale in scales.items()}
    plots = [("switch.png", plot(list(sets), lines),
              "Measures against switch_t: 0 is the large network alone, 1000 the small one; percentages as shares of 1")] if len(sets) > 1 else []
    steps = sorted({step for step, _ in numbers})
    always = [s for s in sets if all((step, s) in numbers for step in steps)]
    lines = {name_of(s): [statistics.mean(numbers[step, s]["novelty"]) for step in steps] for s in always}
    return plots + ([("training.png", plot(steps, lines), "Median novelty against training steps: 0 is a copy, 1 as new as a real photo")]
                    if len(steps) > 1 and always else [])


def generation(settings, progress):
    """Generated beside real: how far apart they are, what is copied, what masks hold; for each switch and checkpoint that the run has."""
    setting, = settings
    args, features = setting.args, Features(device=setting.device)
    train, test = (part.subset(part.defective()).tensors() for part in (setting.train, setting.test))
    reference, others = ([part[i::2] for part in test] for i in (0, 1))
    training = variants(*train, setting.config["augment"])
    used = read_json(setting.run / "samples" / "config.json")["switch_t"]
    count = min(len(setting.drawn[0]), 8 if args.quick else 64)
    drawn, newest = draw_sets(setting, used, count, progress)
    sets = {(newest, None): others, **drawn}

    # one segmenter judges the masks of all sets
    predicted = train_and_predict(setting, "deeplabv3+", setting.real, len(setting.classes), 0, 3 * args.steps,
                                  torch.cat([images for images, _ in sets.values()])).split([len(masks) for _, masks in sets.values()])
    progress(f"masks judged by DeepLabV3+, {3 * args.steps} steps on the training images")
    groups, numbers, cells = max(1, min(args.seeds, count // 8)), {}, {}
    for (key, (images, masks)), seen_masks in zip(sets.items(), predicted):
        parts = [measures(images[i::groups], masks[i::groups], seen_masks[i::groups], training, reference, features) for i in range(groups)]
        numbers[key] = dict(zip(MEASURES, zip(*parts)))
        cells[key] = ["–" if any(map(math.isnan, v)) else spread(v, 2) for v in zip(*parts)]
        progress(f"step {key[0]}, {name_of(key[1])}: novelty {cells[key][MEASURES.index('novelty')]}")

    final = {switch_t: pairs for (step, switch_t), pairs in drawn.items() if step == newest}
    table, shares = class_table(setting.classes, {"training": train[1], "held out": test[1], **{name_of(s): masks for s, (_, masks) in final.items()}})
    tables = [{"caption": "Distances", "head": ["set", *MEASURES], "rows": [[name_of(s), *row] for (step, s), row in cells.items() if step == newest]},
              {"caption": "Masks of images with defects", **table}]
    if any(step != newest for step, _ in drawn):
        tables.insert(1, {"caption": "Distances over training", "head": ["steps", "set", *MEASURES],
                          "rows": [[step, name_of(s), *row] for (step, s), row in cells.items() if s in (0, used, 1000)]})
    return {
        "title": "Generation",
        "text": [f"{count} generated pairs, {len(train[0])} training images ({len(training[0])} with the variants of --augment) and {len(reference[0])} held-out images "
                 f"as reference, {len(others[0])} more in the first row; all with defects. Mean ± standard deviation over {groups} parts of each set.",
                 f"Patch distance: sliced Wasserstein, 0 best. KID, coverage, density (1 best) and diversity in features of {features.name}. Novelty: distance to "
                 f"the nearest training image, held-out images have 1, a copy 0; below {COPY_BELOW} it counts as a copy. Shape: distance of the outlines, real ones have 1. "
                 f"Mask fit: IoU of the defects with what DeepLabV3+ sees after {3 * args.steps} steps on the real training images.",
                 "Empty masks: " + ", ".join(f"{name} {100 * found['empty']:.0f} %" for name, found in shares.items()) + ".",
                 *dropped(setting.run / "samples")],
        "tables": tables,
        "figures": generation_figures(setting, final, used, train, test, training) + [setting.figure(*parts) for parts in curves(numbers, newest)],
        "numbers": {"measures": {step: {name_of(s): values for (at, s), values in numbers.items() if at == step} for step, _ in sorted(drawn)},
                    "masks": shares, "generated": count,
                    "training": len(train[0]), "held_out": len(test[0])}}


def dropped(samples):
    """What sample.py left out at the user's wish, as a list of no or one sentence."""
    if not (samples / "dropped.json").exists():
        return []
    reasons = Counter(read_json(samples / "dropped.json").values())
    return [f"sample.py dropped {sum(reasons.values())} pairs: {', '.join(f'{n} {reason}' for reason, n in reasons.most_common())}."]


def generation_figures(setting, sets, used, train, test, training):
    """Sheets: generated pairs with their nearest training images, every switch from the same noise, trajectories, real images."""
    images, masks = sets[used]
    show = range(0, len(images), max(1, len(images) // 8))[:8]
    nearest = [distances(images[i:i + 1], training[0], light).argmin().item() for i in show]
    own = [("generated", [images[i] for i in show]), ("its mask", [overlay(images[i], masks[i]) for i in show])]
    copies = own + [("nearest training", [training[0][i] for i in nearest]), ("its mask", [overlay(training[0][i], training[1][i]) for i in nearest])]
    same_noise = [row for switch_t, (images, masks) in sets.items()
                  for row in ((name_of(switch_t), [images[i] for i in show]), ("its mask", [overlay(images[i], masks[i]) for i in show]))]
    real = [(name, [overlay(images[i], masks[i]) for i in range(0, len(images), max(1, len(images) // 8))][:8])
            for name, (images, masks) in (("training", train), ("held out", test))]
    generator, rows = DefectGen.load(setting.run, setting.device), []
    for seed in range(3):
        titles, parts = strip(partial(generator.sample, [seed], switch_t=used), len(setting.classes), used, most=10)
        rows += [(f"{name}, seed {seed}", pictures) for name, pictures in parts]
    sheets = [("nearest.png", copies, (), "Generated pairs, and the training image nearest to each"),
              ("trajectories.png", rows, titles, f"Denoising, handed over at t = {used}: x_t, and the image and mask predicted from it"),
              ("real.png", real, (), "Real images with their masks")]
    if len(sets) > 1:
        sheets.insert(1, ("switches.png", same_noise, (), "The same noise, handed over at another timestep"))
    return [setting.figure(file, sheet(rows, titles, classes=setting.classes), caption) for file, rows, titles, caption in sheets]


# --- segmentation ---

def mean_spread(values):
    """'51.2 ± 0.8': mean of fractions in percent, and their sample standard deviation over seeds."""
    return spread([100 * v for v in values], 1)


def digest(*values):
    """A short name for settings and tensors: the same ones, the same name."""
    hashed = hashlib.sha256()
    for value in values:
        hashed.update(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else json.dumps(value).encode())
    return hashed.hexdigest()[:16]


def train_and_predict(setting, arch, pairs, num_classes, seed, steps, images):
    """Masks that a segmenter trained on pairs = (images, masks) predicts for `images`.

    A finished cell of the tables is kept in RUN/cells and not computed again while everything that made it is the same.
    """
    args = setting.args
    made_by = dict(arch=arch, num_classes=num_classes, seed=seed, steps=steps, weights=args.backbone_weights, bf16=setting.bf16)
    path = setting.run / "cells" / f"{arch.replace(':', '_')}_{digest(made_by, *pairs, images)}.pt"
    if path.exists():
        try:
            return torch.load(path, weights_only=True)["masks"]
        except Exception:
            print(f"{path}: damaged, computed again")
    net = build(arch, num_classes, seed)
    if args.backbone_weights:
        load_backbone(net, args.backbone_weights)
    fit(net.to(setting.device), *pairs, steps, seed=seed, bf16=setting.bf16)
    masks = predict(net, images, bf16=setting.bf16)
    write_atomically(path, lambda p: torch.save({"made_by": made_by, "masks": masks}, p))
    return masks


def object_scores(setting, pools, progress):
    """Train every network on every pool with every seed: {(arch, pool): [score per seed]}, and the last seed's masks."""
    num_classes, scores, shown = len(setting.classes), {}, {}
    for arch in setting.args.arch:
        for pool, pairs in pools.items():
            scores[arch, pool] = []
            for seed in range(setting.args.seeds):
                shown[arch, pool] = train_and_predict(setting, arch, pairs, num_classes, seed, setting.args.steps, setting.scored[0])
                score = miou(confusion_matrix(shown[arch, pool], setting.scored[1], num_classes))
                scores[arch, pool].append(score)
                progress(f"{setting.test.name}, {arch}, {pool}, seed {seed}: mIoU {100 * score['miou']:.1f} %")
    return scores, shown


def comparison(named_scores, archs, measure):
    """One row per network; for each object, and for their mean, without | with | difference of a measure, paired by seed."""
    head, rows = ["network"], [[arch] for arch in archs]
    columns = [{key: [score[measure] for score in seeds] for key, seeds in scores.items()} for scores in named_scores.values()]
    names = list(named_scores)
    if len(columns) > 1:
        columns.append({key: [statistics.mean(values) for values in zip(*(c[key] for c in columns))] for key in columns[0]})
        names.append("mean of objects")
    for name, column in zip(names, columns):
        head += [f"{name}: real", "real + generated", "difference"]
        for row in rows:
            without, with_ = column[row[0], "real"], column[row[0], "real + generated"]
            row += [mean_spread(without), mean_spread(with_), mean_spread([b - a for a, b in zip(without, with_)])]
    return {"head": head, "rows": rows}


def segmentation(settings, progress):
    """mIoU on real images, trained on real images alone and on real + generated ones, at the same number of optimiser steps."""
    args, named_scores, texts, tables, figures = settings[0].args, {}, [], [], []
    for setting in settings:
        count = min(1, len(setting.drawn[0]) / len(setting.real[0]))                # 1:1, near the best ratio in the paper's ablation
        pools = {"real": setting.real, "real + generated": mix(setting.real, setting.drawn, count)}
        scores, shown = object_scores(setting, pools, progress)
        name = setting.run.name if setting.test.name in named_scores else setting.test.name
        named_scores[name] = scores

        absent = [setting.classes[k] for k in next(iter(scores.values()))[0]["absent"]]
        texts.append(f"{name}: {len(setting.real[0])} real images, without and with {len(pools['real + generated'][0]) - len(setting.real[0])} "
                     f"generated pairs; scored on {len(setting.scored[0])} real images."
                     + (f" No pixel of {', '.join(absent)} in them: left out of the means." if absent else ""))
        rows = [[*key] + ["–" if math.isnan(values[0]) else mean_spread(values) for values in zip(*(score["iou"] for score in seeds))]
                for key, seeds in scores.items()]
        tables.append({"caption": f"{name}: IoU per class in %", "head": ["network", "trained on", *setting.classes], "rows": rows})

        defects, titles = setting.test.defective(), ["image", "truth"] + [a + (" +" if p != "real" else "") for a, p in shown]
        wrong = sum((masks != setting.scored[1]).flatten(1).sum(1) for masks in shown.values())
        worst = sorted(range(len(wrong)), key=lambda i: -wrong[i])[:6]
        file = name.replace(":", "_")
        for word, indices in (("evenly chosen", defects[::max(1, len(defects) // 6)][:6]), ("with the most wrong pixels", worst)):
            picture = sheet(setting.pictures(shown.values(), indices), titles, setting.classes)
            figures.append(setting.figure(f"segmentation_{file}_{word.split()[0]}.png", picture,
                                          f"{name}, images {word}: predictions of the last seed; + was trained on real + generated"))
        if args.ratios:
            table, figure = ratio_sweep(setting, name, file, progress)
            tables.append(table)
            figures.append(figure)
    captions = {"miou": "mIoU over the defect classes in %", "miou_with_background": "mIoU with background in %", "pixel_accuracy": "Pixel accuracy in %"}
    tables = [{"caption": caption, **comparison(named_scores, args.arch, measure)} for measure, caption in captions.items()] + tables
    return {
        "title": "Segmentation",
        "text": [*texts, f"{args.steps} optimiser steps of 8 images with and without generated pairs, the last weights are scored; backbone weights: "
                 f"{args.backbone_weights or 'none'}. Mean ± standard deviation over {args.seeds} seeds; the difference is paired by seed. "
                 "One confusion matrix over all scoring images."],
        "tables": tables, "figures": figures,
        "numbers": {name: {" | ".join(key): seeds for key, seeds in scores.items()} for name, scores in named_scores.items()}}


def ratio_sweep(setting, name, file, progress):
    """mIoU against the number of generated pairs per real one: a table and a plot with one line per network."""
    pools = {f"{ratio:g} %": mix(setting.real, setting.drawn, ratio / 100) for ratio in (0, *setting.args.ratios)}
    scores, _ = object_scores(setting, pools, progress)
    values = {arch: [[score["miou"] for score in scores[arch, pool]] for pool in pools] for arch in setting.args.arch}
    lines = {arch: [100 * statistics.mean(v) for v in column] for arch, column in values.items()}
    caption = f"{name}: mIoU in % against generated pairs per real one"
    return ({"caption": caption, "head": ["network", *pools], "rows": [[arch, *map(mean_spread, column)] for arch, column in values.items()]},
            setting.figure(f"ratios_{file}.png", plot((0, *setting.args.ratios), lines), caption))


def plot(x, lines, size=(640, 360)):
    """Lines {name: values at x} as a PIL picture with axes from the least to the most value."""
    picture, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    pen, (left, top, right, bottom) = ImageDraw.Draw(picture), (60, 20, size[0] - 140, size[1] - 40)
    low, high = (f(v for values in lines.values() for v in values) for f in (min, max))
    at = lambda a, v: (left + (right - left) * (a - x[0]) / ((x[-1] - x[0]) or 1), bottom - (bottom - top) * (v - low) / ((high - low) or 1))
    pen.rectangle((left, top, right, bottom), outline="gray")
    for value in (low, (low + high) / 2, high):
        pen.text((left - 8, at(x[0], value)[1]), f"{value:.1f}", "gray", font, anchor="rm")
    for a in x:
        pen.text((at(a, low)[0], bottom + 8), f"{a:g}", "gray", font, anchor="ma")
    for i, (name, values) in enumerate(lines.items(), 1):
        colour = tuple(PALETTE[i].tolist())
        pen.line([at(a, v) for a, v in zip(x, values)], colour, 3)
        pen.text((right + 10, top + 18 * i), name, colour, font)
    return picture


# --- inspection ---

def inspection(settings, progress):
    """Recall and false positive rate of verdicts: segmenters trained on the original and on the spectrum annotation."""
    setting, = settings
    name = setting.args.standard or setting.test.name.split(":")[-1]
    if not setting.args.standard and not (name in STANDARDS and {c for rule in STANDARDS[name]["rules"] for c in rule["classes"]}
                                          <= set(setting.classes)):
        return {"title": "Inspection", "tables": [], "figures": [], "numbers": {},
                "text": [f"Not run: there is no standard for {name} with these classes. Write one (README, 'Verdicts') and pass --standard FILE."]}
    standard = load_standard(name, setting.classes)
    names = [s.name for s in setting.test.samples]
    truth = [verdict(judge(setting.test.read(i)[1].numpy(), standard, setting.classes, image)) for i, image in enumerate(names)]
    progress(f"truth from masks at native size: {truth.count('reject')} of {len(truth)} are to be rejected")

    exact = setting.real
    drawn = str(setting.data).startswith("drawn:")
    old = drawn or setting.args.original
    coarse = setting.open(setting.config["split"], "original").tensors() if old else (exact[0], (exact[1] > 0).to(torch.uint8))
    ways = {"original": (coarse, 2, lambda mask, image: "reject" if mask.any() else "accept"),
            "spectrum": (exact, len(setting.classes), lambda mask, image: verdict(judge(mask, standard, setting.classes, image)))}
    rows, numbers = [], {}
    for way, (pairs, num_classes, decide) in ways.items():
        results = numbers[way] = []
        for seed in range(setting.args.seeds):
            pred = train_and_predict(setting, "deeplabv3+", pairs, num_classes, seed, setting.args.steps, setting.scored[0])
            pred = [unfit(mask, setting.test.native_size(i), setting.fit) for i, mask in enumerate(pred)]
            results.append(recall_fpr(truth, [decide(mask, image) for mask, image in zip(pred, names)]))
            progress(f"{way} annotation, seed {seed}")
        rates = [[result[rate] for result in results] for rate in ("recall", "fpr")]
        rows.append([way] + ["–" if None in values else mean_spread(values) for values in rates]
                    + [" / ".join(str(result[key]) for result in results) for key in ("tp", "fn", "fp", "tn")])
    native, (h, w) = math.prod(standard.native_size), pred[0].shape
    return {
        "title": "Inspection",
        "text": [f"Standard: {'; '.join(rule.name for rule in standard.rules)}; any other defect: {standard.unnamed}. "
                 f"Truth: exact masks at native size; {truth.count('reject')} of {len(truth)} scoring images are to be rejected.",
                 "Original annotation: one binary mask per image, "
                 + ("coarse, the most conspicuous defect only" if drawn else f"those of {setting.args.original}" if old else "all classes merged")
                 + "; any predicted defect rejects. Spectrum annotation: the standard decides.",
                 f"Predictions are {h}x{w}: one of their pixels counts {native / (h * w):.0f} native ones; smaller limits cannot be met."
                 + {"squash": "", "pad": " Their padding was cut off.",
                    "crop": " What lies outside the crop was not seen and counts as no defect."}[setting.fit]],
        "tables": [{"caption": f"Verdicts of DeepLabV3+, {setting.args.seeds} seeds", "rows": rows,
                    "head": ["annotation", "recall %", "false positive rate %", "tp", "fn", "fp", "tn"]}],
        "figures": [], "numbers": numbers}


# --- report ---

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #8886; padding: .25rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, caption { text-align: left }
caption { font-weight: 600 }
img { max-width: 100% }
figure { margin: 1rem 0 }
figcaption, .small { color: #888; font-size: .9em }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } }
"""


def html_table(table):
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row)
    return (f"<table><caption>{html.escape(table['caption'])}</caption><tr>{cells('th', table['head'])}</tr>"
            + "".join(f"<tr>{cells('td', row)}</tr>" for row in table["rows"]) + "</table>")


def write_report(run, metrics):
    """One self-contained page: settings, then text, tables and pictures of every experiment in metrics."""
    title = f"Defect-Gen: {html.escape(run.name)}"
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
             f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    for result in metrics.values():
        settings = "; ".join(f"{k} {v}" for k, v in result["settings"].items())
        parts.append(f"<h2>{html.escape(result['title'])}</h2>" + "".join(f"<p>{html.escape(t)}</p>" for t in result["text"]))
        parts += [html_table(t) for t in result["tables"]]
        for figure in result["figures"]:
            data = base64.b64encode((run / "figures" / figure["file"]).read_bytes()).decode()
            caption = html.escape(figure["caption"])
            parts.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>")
        parts.append(f"<p class=small>{html.escape(settings)}</p>")
    write_atomically(run / "report.html", lambda p: p.write_text("".join(parts), encoding="utf-8"))


# --- command ---

EXPERIMENTS = {"generation": generation, "segmentation": segmentation, "inspection": inspection}


def parse_args(argv=None):
    """The flags, checked; --run, --data and --arch as lists, --ratios as numbers."""
    parser = argparse.ArgumentParser(description="Run the experiments of a trained run and write its report.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"{' | '.join(EXPERIMENTS)} (default: all). "
                        "speed --help explains another, which needs no run")
    parser.add_argument("--run", action="append", help="run folder with generated pairs in RUN/samples; given several times, the "
                        "segmentation has columns for each and for their mean (default: runs/demo)")
    parser.add_argument("--data", action="append", help="the data set, once for each --run (default: the one the run was trained on)")
    parser.add_argument("--out", help="where the report goes (default: the run folder; of several: their names joined by +)")
    parser.add_argument("--original", metavar="MVTEC_DIR", help="MVTec AD's folder: the inspection compares with its masks (data: DS-MVTec)")
    parser.add_argument("--split", default="test", help="images to score on: a list of split.json, or test (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be read, instead of stopping; names them")
    parser.add_argument("--seeds", type=int, default=2, help="segmenters trained per cell (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each segmenter (default: %(default)s)")
    parser.add_argument("--arch", default="deeplabv3+,segformer", help=f"networks of the segmentation, joined by commas: {', '.join(ARCHS)}, "
                        "or all; deeplabv3+:resnet50 names a backbone (default: %(default)s)")
    parser.add_argument("--ratios", help="also compare these percentages of generated to real pairs, like 20,50,100,200,300")
    parser.add_argument("--backbone-weights", metavar="FILE", help="state dict for the backbone, or imagenet; see segment.py (default: none)")
    parser.add_argument("--standard", help="JSON file or name of the standard for the inspection (default: that of the object)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 steps, 8 scoring images: shows that everything runs; "
                        "writes to OUT/quick")
    args = parser.parse_args(argv)
    args.run = args.run or ["runs/demo"]
    args.data = args.data or [None] * len(args.run)
    args.arch = list(ARCHS) if args.arch == "all" else args.arch.split(",")
    args.experiments = args.experiments or (list(EXPERIMENTS) if len(args.run) == 1 else ["segmentation"])
    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"unknown experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}, and speed, which stands alone")
    for arch in args.arch:
        check_arch(arch)
    if len(args.run) > 1 and args.experiments != ["segmentation"]:
        raise ValueError(f"only the segmentation takes several --run, not {', '.join(args.experiments)}")
    if len(args.data) != len(args.run):
        raise ValueError(f"--data was given {len(args.data)} times and --run {len(args.run)} times; give one for each run, or none")
    try:
        args.ratios = [float(ratio) for ratio in args.ratios.split(",")] if args.ratios else []
    except ValueError:
        raise ValueError(f"--ratios {args.ratios}: expected percentages joined by commas, like 20,50,100") from None
    if args.seeds < 1 or args.steps < 1:
        raise ValueError("--seeds and --steps must be at least 1")
    if args.quick:
        args.seeds, args.steps = 1, 2
    return args


def evaluate(args):
    """Run the experiments one after the other; each is in metrics.json and report.html as soon as it is finished."""
    runs = [Path(run) for run in args.run]
    out = Path(args.out) if args.out else runs[0] if len(runs) == 1 else runs[0].parent / "+".join(run.name for run in runs)
    out = out / "quick" if args.quick else out      # never in the place of numbers that mean something
    settings = [Setting(args, run, data, out) for run, data in zip(runs, args.data)]
    path = out / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    for name in args.experiments:
        start = time.perf_counter()
        print(f"--- {name}", flush=True)

        def progress(text):
            print(f"{time.perf_counter() - start:6.0f} s  {text}", flush=True)

        result = EXPERIMENTS[name](settings, progress)
        result["text"] += [setting.splits for setting in settings]
        result["settings"] = {
            "runs": ", ".join(args.run), "data": ", ".join(setting.data for setting in settings), "scoring split": args.split,
            "size": " and ".join("x".join(map(str, setting.size)) for setting in settings), "segmenter steps": args.steps,
            "seeds": f"0 to {args.seeds - 1}", "time": f"{time.perf_counter() - start:.0f} s",
            "machine": machine(settings[0].device), **({"quick": "the numbers mean nothing"} if args.quick else {})}
        metrics[name] = result
        write_json(path, metrics)
        write_report(out, {key: metrics[key] for key in EXPERIMENTS if key in metrics})
        for text in result["text"]:
            print(text)
        for table in result["tables"]:
            print_table(table)
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        run_main(lambda: benchmark.speed(benchmark.parse_args(sys.argv[2:])))
    run_main(lambda: evaluate(parse_args()))
