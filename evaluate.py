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
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from functools import cached_property, partial
from pathlib import Path

import torch

import benchmark
import segment
from benchmark import machine
from datasets import (data_options, describe, has_bf16, open_dataset, overlay, pick_device, print_table, read_json, run_main, sheet, unfit,
                      write_atomically, write_image, write_json)
from defect_gen import STAGES, DefectGen, load_stage, open_training, steps_of, strip
from inspect_rules import STANDARDS, load_standard, printable, recall_fpr, verdict
from metrics import (COPY_BELOW, Features, copy_share, coverage_density, defect_crops, distances, intra_cluster_diversity, kid, light, mask_fit,
                     mask_statistics, novelty, shape_distance, sliced_wasserstein, variants)
from report import mean_spread, plot, spread, versions, write_report
from segment import ARCHS, build, check_arch, confusion_matrix, fit, load_backbone, masks_at, miou, mix, predict
from simulation import (BINARY, LEVELS, SIDES, Line, area_standard, best_limit, confidence, curve_table, floor_table, gallery, interval, percent,
                        pooled, rule_table, seed_table, verdict_table, working_points)


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

    def split_rows(self, label):
        """(data, kind, training images, scoring images) of each kind."""
        parts = [Counter(sample.kind for sample in part.samples) for part in (self.train, self.test)]
        return [[label, kind, *(part[kind] for part in parts)] for kind in sorted({*parts[0], *parts[1]})]

    def figure(self, name, picture, caption):
        """Write a picture beside the report and return the record that the report shows it by."""
        write_image(self.out / "figures" / name, picture)
        return {"file": name, "caption": caption}

    def pictures(self, predictions, indices):
        """Rows of a sheet: image, truth and each prediction for some of the scoring images."""
        images, target = self.scored
        return [(printable(self.test.samples[i].kind), [images[i]] + [overlay(images[i], masks[i]) for masks in (target, *predictions)]) for i in indices]


def counted(n, word):
    return f"{n} {word}{'s' * (n != 1)}"


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


def draw_sets(setting, how, count, progress):
    """{(step, switch_t): pairs}: those of RUN/samples; the same seeds with every other switch; and from each older checkpoint with the
    extremes and the switch of RUN/samples. Only switches that both stages were trained for, which is all with --t-range full, and
    checkpoints that both stages have. how: the config.json of RUN/samples.
    """
    used, seeds = how["switch_t"], [int(Path(sample.name).name) for sample in setting.generated.samples[:count]]
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
        if step == newest and generator.fingerprint != how["weights"]:
            raise ValueError(f"{setting.run / 'samples'} was drawn from other weights than the checkpoint at step {step}: remove it and run sample.py again")
        for switch_t in sorted({used, *SWITCHES} if step == newest else {0, used, 1000}):
            if (step, switch_t) == (newest, used):
                sets[step, switch_t] = [part[:count] for part in setting.drawn]
                continue
            if tuple(how["size"]) != setting.size:                      # RUN/samples was resized to be read; others would not be
                continue
            try:
                sets[step, switch_t] = generator.sample(seeds, how["num_steps"], how["sampler"], how["spacing"], switch_t)
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
    if len(test[0]) < 4:
        return {"title": "Generation", "tables": [], "figures": [], "numbers": {},
                "text": [f"Not run: {len(test[0])} held-out images with a defect are too few to compare with; it takes 4."]}
    reference, others = ([part[i::2] for part in test] for i in (0, 1))
    training = variants(*train, setting.config["augment"])
    how = read_json(setting.run / "samples" / "config.json")
    used, count = how["switch_t"], min(len(setting.drawn[0]), 8 if args.quick else 64)
    drawn, newest = draw_sets(setting, how, count, progress)
    sets = {(newest, None): others, **drawn}

    # one segmenter judges the masks of all sets
    predicted = train_and_predict(setting, "deeplabv3+", setting.real, len(setting.classes), 0, 2 * args.steps,
                                  torch.cat([images for images, _ in sets.values()])).split([len(masks) for _, masks in sets.values()])
    progress(f"masks judged by DeepLabV3+, {2 * args.steps} steps on the training images")
    groups, numbers, cells = max(1, min(args.seeds, count // 8, len(others[0]))), {}, {}
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
    judged = dict(zip(MEASURES, cells[newest, used]))
    return {
        "title": "Generation",
        "summary": f"Generation: {judged['copies %']} % of {count} generated pictures count as copies of training images, their novelty is {judged['novelty']} "
                   f"(held-out photos: 1), and their masks fit the pictures to {judged['mask fit %']} %.",
        "text": [f"{count} generated pairs, {len(train[0])} training images ({len(training[0])} with the variants of --augment) and {len(reference[0])} held-out images "
                 f"as reference, {len(others[0])} more in the first row; all with defects. Mean ± standard deviation over {groups} parts of each set.",
                 f"Patch distance: sliced Wasserstein, 0 best. KID, coverage, density (1 best) and diversity in features of {features.name}. Novelty: distance to "
                 f"the nearest training image, held-out images have 1, a copy 0; below {COPY_BELOW} it counts as a copy. Shape: distance of the outlines, real ones have 1. "
                 f"Mask fit: IoU of the defects with what DeepLabV3+ sees after {2 * args.steps} steps on the real training images.",
                 "Empty masks: " + ", ".join(f"{name} {100 * found['empty']:.0f} %" for name, found in shares.items()) + ".",
                 *dropped(setting.run / "samples", used)],
        "tables": tables,
        "figures": generation_figures(setting, final, used, train, test, training) + [setting.figure(*parts) for parts in curves(numbers, newest)],
        "numbers": {"measures": {step: {name_of(s): values for (at, s), values in numbers.items() if at == step} for step, _ in sorted(drawn)},
                    "masks": shares, "generated": count,
                    "training": len(train[0]), "held_out": len(test[0])}}


def dropped(samples, used):
    """What sample.py left out at the user's wish, as a list of no or one sentence."""
    if not (samples / "dropped.json").exists():
        return []
    reasons = Counter(read_json(samples / "dropped.json").values())
    return [f"sample.py dropped {sum(reasons.values())} pairs: {', '.join(f'{n} {reason}' for reason, n in reasons.most_common())}. "
            f"The row of {name_of(used)} shows what was kept, the other rows the same seeds without a choice."]


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

def digest(*values):
    """A short name for settings and tensors: the same ones, the same name."""
    hashed = hashlib.sha256()
    for value in values:
        hashed.update(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else json.dumps(value).encode())
    return hashed.hexdigest()[:16]


INSPECTOR = "deeplabv3+"        # the inspection's network


def train_and_predict(setting, arch, pairs, num_classes, seed, steps, images, odds=False):
    """Masks that a segmenter trained on pairs = (images, masks) predicts for `images`; of the INSPECTOR, if asked, the `odds` of segment.py.

    A finished cell of the tables is kept in RUN/cells and not computed again while everything that made it is the same.
    """
    args = setting.args
    made_by = dict(arch=arch, num_classes=num_classes, seed=seed, steps=steps, weights=args.backbone_weights, bf16=setting.bf16)
    file = f"{arch.replace(':', '_')}_{digest(made_by, *pairs, images)}.pt"
    path = setting.run / "cells" / (f"odds_{file}" if odds else file)
    if path.exists():
        try:
            return torch.load(path, weights_only=True)["masks"]
        except Exception:
            print(f"{path}: damaged, computed again")
    net = build(arch, num_classes, seed)
    if args.backbone_weights:
        load_backbone(net, args.backbone_weights)
    fit(net.to(setting.device), *pairs, steps, seed=seed, bf16=setting.bf16)
    masks = predict(net, images, bf16=setting.bf16, read=segment.odds if arch == INSPECTOR else segment.likeliest)
    for name, kept in ((f"odds_{file}", masks), (file, masks_at(masks))) if arch == INSPECTOR else ((file, masks),):
        write_atomically(setting.run / "cells" / name, lambda p: torch.save({"made_by": made_by, "masks": kept}, p))
    return masks if odds or arch != INSPECTOR else masks_at(masks)


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


def names_of(settings):
    """A name for each run that no other has: its data's, else its folder's."""
    names = []
    for setting in settings:
        names.append(next(n for n in (setting.test.name, setting.run.name, f"{setting.run.name} {len(names) + 1}") if n not in names))
    return names


def file_words(names):
    """A short word for file names for each of several names, all different; names of folders may be long and hold anything."""
    words = []
    for word in (re.sub(r"\W+", "_", name)[:40] for name in names):
        words.append(word if word not in words else f"{word}_{len(words) + 1}")
    return words


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
    for setting, name, file in zip(settings, names := names_of(settings), file_words(names)):
        count = min(1, len(setting.drawn[0]) / len(setting.real[0]))                # 1:1, near the best ratio in the paper's ablation
        pools = {"real": setting.real, "real + generated": mix(setting.real, setting.drawn, count)}
        scores, shown = object_scores(setting, pools, progress)
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
    gains = {arch: [statistics.mean(with_["miou"] - without["miou"] for with_, without in zip(scores[arch, "real + generated"], scores[arch, "real"]))
                    for scores in named_scores.values()] for arch in args.arch}
    return {
        "title": "Segmentation",
        "summary": f"Segmentation of {', '.join(named_scores)}, {counted(args.seeds, 'seed')}: generated pairs change the mIoU by "
                   + ", ".join(f"{100 * statistics.mean(gain):+.1f} points ({arch})" for arch, gain in gains.items()) + ".",
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


# --- inspection ---

def standard_of(setting, given):
    """The standard to judge by: the given one, else that of the object if its classes are there, else None."""
    name = given or setting.test.name.split(":")[-1]
    if not given and not (name in STANDARDS and {c for rule in STANDARDS[name]["rules"] for c in rule["classes"]} <= set(setting.classes)):
        return None
    return load_standard(name, setting.classes)


def same_images(dataset, others):
    """The part of dataset that has the images of others, in their order; None if one is missing."""
    place = {sample.name: i for i, sample in enumerate(dataset.samples)}
    return dataset.subset([place[s.name] for s in others.samples]) if all(s.name in place for s in others.samples) else None


def inspect_line(setting, name, standard, progress):
    """The simulated line of one run's product: (Line with every way judged, sentences on its readings, pictures of the gallery)."""
    args, drawn = setting.args, str(setting.data).startswith("drawn:")
    line = Line(name, setting.test, standard, setting.classes, setting.fit, sorted({*((side, side) for side in SIDES), setting.size}))
    progress(f"{name}: truth from masks at native size: {line.truth.count('reject')} of {len(line.truth)} are to be rejected")
    learned = Line(name, setting.train, standard, setting.classes, setting.fit)     # of the training images: to choose the limit on

    old, merged = drawn or args.original, lambda masks: (masks > 0).to(torch.uint8)
    coarse = setting.open(setting.config["split"], "original").tensors() if old else (setting.real[0], merged(setting.real[1]))
    ratio = min(1, len(setting.drawn[0]) / len(setting.real[0]))
    pools = {"original": (coarse, 2), "spectrum": (setting.real, len(setting.classes)),
             "spectrum + generated": (mix(setting.real, setting.drawn, ratio), len(setting.classes))}
    train = partial(train_and_predict, setting, INSPECTOR, steps=args.steps, odds=True)
    for labels, (pairs, num_classes) in pools.items():
        for seed in range(args.seeds):
            if labels == "original":
                found = train(pairs, num_classes, seed, images=torch.cat([setting.real[0], setting.scored[0]]))
                of_training, found = found[:len(setting.real[0])], found[len(setting.real[0]):]
                any_defect = area_standard(standard, 0)
                findings = learned.judge(masks_at(of_training).numpy(), any_defect, BINARY)
                line.limits[seed] = best_limit([sum(f.area_px for f in those) for those in findings], learned.truth)
                line.add("original: any defect", seed, found, any_defect, BINARY)
                line.add("original: best area", seed, found, area_standard(standard, line.limits[seed]), BINARY)
            else:                                                   # the same cells as the segmentation's
                found = train(pairs, num_classes, seed, images=setting.scored[0])
                line.add(f"{labels}: standard", seed, found, standard, setting.classes)
                if (labels, seed) == ("spectrum", 0):
                    pictures = gallery(line, "spectrum: standard", 0, found)
            progress(f"{name}, {labels} labels, seed {seed}")

    perfect = same_images(setting.open(args.split, "original"), setting.test) if old else None
    perfect = perfect.tensors()[1] if perfect else merged(setting.scored[1])
    rates = recall_fpr(line.truth, map(verdict, line.judge(perfect.numpy(), area_standard(standard, 0), BINARY)))
    h, w = unfit(perfect[0].numpy(), line.natives[0], setting.fit).shape
    native = math.prod(standard.native_size or line.natives[0])
    odd = [f"{a}x{b}" for a, b in dict.fromkeys(line.natives) if standard.native_size and (a, b) != standard.native_size]
    texts = [
        f"{name}: standard {standard.name}: {'; '.join(rule.name for rule in standard.rules)}; any other defect: {standard.unnamed}. "
        f"Truth: exact masks at native size; {line.truth.count('reject')} of {len(line.truth)} scoring images are to be rejected, and "
        f"{learned.truth.count('reject')} of the {len(learned.truth)} training images"
        + (f". Photos of {', '.join(odd[:3])} are scaled to the standard's {'x'.join(map(str, standard.native_size))}." if odd else "."),
        f"{name}, original labels: one binary mask per image, "
        + ("coarse, the most conspicuous defect only" if drawn else f"those of {args.original}" if old else "all classes merged")
        + f". Their masks themselves at {'x'.join(map(str, setting.size))}, as a perfect segmenter would predict them, any defect rejecting: recall "
          f"{percent(rates['recall'])} %, false alarms {percent(rates['fpr'])} %. The best areas: "
        + ", ".join(f"{limit:.0f}" for limit in line.limits.values()) + f" px (seeds 0 to {args.seeds - 1}).",
        f"{name}: predictions are {h}x{w}: one of their pixels counts {native / (h * w):.0f} native ones; smaller limits cannot be met."
        + {"squash": "", "pad": " Their padding was cut off.",
           "crop": " What lies outside the crop was not seen and counts as no defect."}[setting.fit]]
    return line, texts, pictures


INSPECTION_TEXT = [
    "Four ways through the line. Original labels: any predicted defect rejects, or an area of a limit or more, in native px; the limit is the one with the largest "
    "recall - false positive rate (Youden) of the segmenter's predictions on its own training images, of equals the smallest, for each product and seed. Spectrum labels: the "
    "standard decides. Spectrum + generated: the same, with up to one generated pair for each real one, and as many optimiser steps.",
    "Recall: rejected among those to be rejected; false alarms: rejected among the others. ± is the standard deviation over seeds; intervals are exact binomial ones "
    "(Clopper-Pearson) of the counts of all seeds. They take verdicts as independent; but each image comes back with each seed, so they are too narrow for new products.",
    "Confidence: p / (p + background) of a pixel's likeliest defect class; at 50 % the masks are the segmenter's own, which all other tables use. The best area stays as chosen there.",
    "Gallery: segmenters of the spectrum labels, seed 0; each product with its exact and then its predicted mask, outlined in red where a rule rejects and in green where not."]


def inspection(settings, progress):
    """Recall and false positive rate of verdicts: segmenters of the original, the spectrum and the spectrum + generated labels."""
    args, lines, texts, pictures, not_run = settings[0].args, [], [], [], []
    for setting, name, file, given in zip(settings, names := names_of(settings), file_words(names), args.standard):
        standard = standard_of(setting, given)
        if standard is None:
            not_run.append(f"Not run: there is no standard for {name} with these classes. Write one (README, 'Verdicts') and pass --standard FILE.")
            continue
        line, text, gallery_pictures = inspect_line(setting, name, standard, progress)
        lines.append(line)
        texts += text
        pictures += [{**setting.figure(f"verdict_{file}_{end}", picture, caption), "gallery": True} for end, picture, caption in gallery_pictures]
        if not (args.original or str(setting.data).startswith("drawn:")):
            not_run.append(f"Inspection, {name}: the data set's older binary masks (--original); all classes merged stand in for them.")
    if not lines:
        return {"title": "Inspection", "text": not_run, "tables": [], "figures": [], "numbers": {}, "not_run": [f"Inspection: {t}" for t in not_run]}
    points, marked = working_points(lines), {line.name: setting.size for line in lines for setting in settings if setting.test is line.dataset}
    together = {way: pooled([rates for line in lines for rates in line.per_seed(way)]) for way in lines[0].ways}
    return {
        "title": "Inspection", "summary": inspection_summary(lines, together, args.seeds), "not_run": not_run, "text": [*texts, *INSPECTION_TEXT],
        "tables": [verdict_table(lines), floor_table(lines, marked), rule_table(lines), curve_table(points), seed_table(lines)],
        "figures": inspection_curves(settings[0], points) + pictures,
        "numbers": {"products": {line.name: {way: line.per_seed(way) for way in line.ways} for line in lines}, "pooled": together,
                    "limits": {line.name: line.limits for line in lines},
                    "floors": {line.name: {"x".join(map(str, size)): rates for size, rates in line.floors.items()} for line in lines},
                    "curves": {way: [[c, rates["recall"], rates["fpr"]] for c, rates in curve] for way, curve in points.items()}}}


def inspection_summary(lines, together, seeds):
    """The finding in a sentence: what the labels change."""
    said = {way: f"{percent(r['recall'])} % of what the standard rejects is rejected ({interval(r['intervals']['recall'])}), with "
                 f"{percent(r['fpr'])} % false alarms ({interval(r['intervals']['fpr'])})" for way, r in together.items()}
    return (f"Inspection of {', '.join(line.name for line in lines)}, {counted(seeds, 'seed')}: with the spectrum labels and the standard "
            f"{said['spectrum: standard']}; with the original labels, where any defect rejects, {said['original: any defect']}.")


def inspection_curves(setting, points):
    """Recall against false alarms, and both against the confidence that a pixel needs; none where a rate is undefined."""
    if any(None in (rates["recall"], rates["fpr"]) for curve in points.values() for _, rates in curve):
        return []
    against = {way: [(100 * rates["fpr"], 100 * rates["recall"]) for _, rates in curve] for way, curve in points.items()}
    right = max(1, *(x for curve in against.values() for x, _ in curve))
    lines = {f"{way.split(':')[0]}, {word}": [100 * rates[rate] for _, rates in points[way]]
             for way in points if way.startswith("spectrum") for word, rate in (("recall", "recall"), ("alarms", "fpr"))}
    labels = [f"{confidence(level):.3g}" if level % 2 == 0 else "" for level in LEVELS]
    return [setting.figure("working_points.png", plot([0, right / 2, right], against, labels=["0", f"{right / 2:.0f}", f"{right:.0f}"]),
                           "Recall in % (upwards) against false alarms in % (to the right), a point for each confidence; all products and seeds"),
            setting.figure("confidence.png", plot(LEVELS, lines, labels=labels),
                           "Recall and false alarms in % (upwards) against the confidence in % that a pixel needs to be a defect (to the right)")]


# --- command ---

EXPERIMENTS = {"generation": generation, "segmentation": segmentation, "inspection": inspection}


def parse_args(argv=None):
    """The flags, checked; --run, --data and --arch as lists, --ratios as numbers."""
    parser = argparse.ArgumentParser(description="Run the experiments of a trained run and write its report.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"{' | '.join(EXPERIMENTS)} (default: all). "
                        "speed --help explains another, which needs no run")
    parser.add_argument("--run", action="append", help="run folder with generated pairs in RUN/samples; given several times, the "
                        "segmentation and the inspection show each and all together (default: runs/demo)")
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
    parser.add_argument("--standard", action="append", help="JSON file or name of the standard for the inspection, once for all or once for "
                        "each --run (default: that of the object)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 steps, 8 scoring images: shows that everything runs; "
                        "writes to OUT/quick")
    args = parser.parse_args(argv)
    args.run = args.run or ["runs/demo"]
    args.data = args.data or [None] * len(args.run)
    args.arch = list(ARCHS) if args.arch == "all" else args.arch.split(",")
    args.experiments = args.experiments or [name for name in EXPERIMENTS if len(args.run) == 1 or name != "generation"]
    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"unknown experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}, and speed, which stands alone")
    for arch in args.arch:
        check_arch(arch)
    if len(args.run) > 1 and "generation" in args.experiments:
        raise ValueError("the generation takes one --run; only segmentation and inspection take several")
    if len(args.data) != len(args.run):
        raise ValueError(f"--data was given {len(args.data)} times and --run {len(args.run)} times; give one for each run, or none")
    args.standard = args.standard or [None]
    if len(args.standard) not in (1, len(args.run)):
        raise ValueError(f"--standard was given {len(args.standard)} times and --run {len(args.run)} times; give one for each run, one for all, or none")
    args.standard = args.standard * (len(args.run) if len(args.standard) == 1 else 1)
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
        result["split"] = [row for setting, label in zip(settings, names_of(settings)) for row in setting.split_rows(label)]
        result["settings"] = {
            "runs": ", ".join(args.run), "data": ", ".join(setting.data for setting in settings), "scoring split": args.split,
            "size": " and ".join("x".join(map(str, setting.size)) for setting in settings), "segmenter steps": args.steps,
            "seeds": f"0 to {args.seeds - 1}", "time": f"{time.perf_counter() - start:.0f} s",
            "standard": ", ".join(dict.fromkeys(map(str, filter(None, args.standard)))) or "the object's", "versions": versions(),
            "backbone weights": args.backbone_weights or "none", "machine": machine(settings[0].device), **({"quick": "the numbers mean nothing"} if args.quick else {})}
        metrics[name] = result
        write_json(path, metrics)
        write_report(out, metrics)
        for text in result["text"]:
            print(text)
        for table in result["tables"]:
            print_table(table)
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        run_main(lambda: benchmark.speed(benchmark.parse_args(sys.argv[2:])))
    run_main(lambda: evaluate(parse_args()))
