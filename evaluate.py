"""The experiments: are the generated pairs right, do they help a segmenter, and do better masks give better verdicts?

    python evaluate.py                              generation, segmentation and inspection on runs/demo
    python evaluate.py segmentation --run runs/mine --seeds 3
    python evaluate.py --quick                      a run-through in a minute; its numbers mean nothing

Training images are those the generator saw (the run's split); scoring images (--split) are others, which is checked.
Results go to RUN/metrics.json, RUN/figures/ and RUN/report.html; experiments that were run before stay in the report.
"""
import argparse
import base64
import html
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torchvision

from datasets import (data_options, describe, has_bf16, open_dataset, overlay, pick_device, read_json, run_main, sheet, unfit,
                      write_atomically, write_image, write_json)
from inspect_rules import STANDARDS, judge, load_standard, recall_fpr, verdict
from segment import ARCHS, build, confusion_matrix, fit, miou, predict


class Setting:
    """What all experiments share: the run, its training images, the scoring images and the generated pairs."""

    def __init__(self, args):
        self.args, self.run = args, Path(args.run)
        if not (self.run / "large" / "config.json").exists():
            raise FileNotFoundError(f"--run {args.run}: no trained run there; train first: python train.py --stage large --out {args.run}")
        self.config = read_json(self.run / "large" / "config.json")
        self.size, self.classes = tuple(self.config["size"]), tuple(self.config["classes"])
        self.device = pick_device(args.device)
        self.bf16 = self.device.type == "cuda" and has_bf16(self.device)      # on CPUs autocast slows the segmenters
        self.data, self.fit = args.data or self.config["data"], self.config.get("fit", "squash")
        self.train, self.test = self.open(self.config["split"]), self.open(args.split)
        files = [{s.name if s.image is None else s.image.resolve() for s in part.samples} for part in (self.train, self.test)]
        shared = {str(file) for file in files[0] & files[1]}
        if shared:
            raise ValueError(f"--split {args.split} shares {len(shared)} images with the training split {self.config['split']} "
                             f"({sorted(shared)[0]}, ...); scores on training images prove nothing, choose another split")
        if self.train.classes != self.classes:
            raise ValueError(f"{self.data} has the classes {', '.join(self.train.classes)}, but {self.run} was trained with "
                             f"{', '.join(self.classes)}")
        self.splits = (f"{self.train.name}: trained on {len(self.train)} images ({self.train.split_rule}), scored on others, "
                       f"{len(self.test)} of {self.test.split_rule}.")
        print(describe(self.train), describe(self.test), sep="\n")
        if args.quick:
            self.test = self.test.subset(range(0, len(self.test), max(1, len(self.test) // 8)))
        samples = self.run / "samples"
        if not (samples / "classes.json").exists():
            raise FileNotFoundError(f"{samples}: no generated pairs; draw them first: python sample.py --run {self.run}")
        self.generated = open_dataset(samples, self.size)
        self.predicted = {}         # (arch, trained on, seed) -> masks: the inspection reuses what the segmentation trained

    def open(self, split, annotation="spectrum"):
        """The part of the data that a split names, read as the run read it."""
        original = self.args.original if annotation == "original" else None
        return open_dataset(self.data, self.size, split, annotation=annotation, original=original, **data_options(self.config))

    def figure(self, name, picture, caption):
        """Write a picture beside the report and return the record that the report shows it by."""
        write_image(self.run / "figures" / name, picture)
        return {"file": name, "caption": caption}


# --- generation ---

def nearest(images, others):
    """For each of images (N, C, H, W): index of its nearest in others, and their root mean square distance in grey levels."""
    distance = torch.cdist(images.flatten(1).float(), others.flatten(1).float()) / math.sqrt(images[0].numel())
    return distance.min(1).indices.tolist(), distance.min(1).values.tolist()


def class_table(classes, named_masks):
    """Rows of (class, share of pixels and of images that hold it, for each named set of masks), and the same as numbers."""
    head = ["class"] + [f"{name}: {what}" for name in named_masks for what in ("% of pixels", "% of images")]
    rows, numbers = [], {}
    for k, name in enumerate(classes):
        hits = [(m == k).flatten(1).double() for m in named_masks.values()]
        shares = [(100 * hit.mean().item(), 100 * hit.amax(1).mean().item()) for hit in hits]
        rows.append([name] + [f"{value:.2f}" for pair in shares for value in pair])
        numbers[name] = {title: dict(pixels_percent=p, images_percent=i) for title, (p, i) in zip(named_masks, shares)}
    return {"head": head, "rows": rows}, numbers


def generation(setting, progress):
    """Generated beside real: pictures, nearest training images, and the share of each class."""
    train, test = (part.subset(part.defective()).tensors() for part in (setting.train, setting.test))
    drawn = setting.generated.tensors()
    table, shares = class_table(setting.classes, {"training": train[1], "held out": test[1], "generated": drawn[1]})

    index, to_training = nearest(drawn[0], train[0])
    _, held_out = nearest(test[0], train[0])
    progress(f"nearest training image of {len(drawn[0])} generated and {len(test[0])} held-out images")
    show = range(0, len(drawn[0]), max(1, len(drawn[0]) // 8))[:8]
    copies = [index[i] for i in show]
    rows = [("generated", [drawn[0][i] for i in show]), ("its mask", [overlay(drawn[0][i], drawn[1][i]) for i in show]),
            ("nearest training", [train[0][i] for i in copies]), ("its mask", [overlay(train[0][i], train[1][i]) for i in copies])]
    real = [(name, [overlay(images[i], masks[i]) for i in range(0, len(images), max(1, len(images) // 8))][:8])
            for name, (images, masks) in (("training", train), ("held out", test))]
    empty = (drawn[1] == 0).flatten(1).all(1).double().mean().item()
    distances = {"generated": statistics.median(to_training), "held out": statistics.median(held_out)}
    return {
        "title": "Generation",
        "text": [f"{len(drawn[0])} generated pairs, {len(train[0])} training and {len(test[0])} held-out images with defects.",
                 "Median distance to the nearest training image (root mean square, grey levels of 255): "
                 f"generated {distances['generated']:.1f}, held-out real images {distances['held out']:.1f}. "
                 "A copy has 0. Well below the held-out value, the pictures repeat training images or are bland: look at them.",
                 f"{100 * empty:.0f} % of the generated pairs have an empty mask."],
        "tables": [{"caption": "Share of each class, images with defects", **table}],
        "figures": [setting.figure("nearest.png", sheet(rows, classes=setting.classes), "Generated pairs, and the training image "
                                                                                        "nearest to each"),
                    setting.figure("real.png", sheet(real, classes=setting.classes), "Real images with their masks")],
        "numbers": {"classes": shares, "empty_share": empty, "median_distance_to_training": distances,
                    "generated": len(drawn[0]), "training": len(train[0]), "held_out": len(test[0])}}


# --- segmentation ---

def mean_spread(values):
    """'51.2 ± 0.8': mean of fractions in percent, and their sample standard deviation over seeds."""
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def train_and_predict(setting, arch, pool, images, masks, num_classes, seed):
    """Masks that a segmenter trained on (images, masks), the data called `pool`, predicts for the scoring images."""
    if (arch, pool, seed) not in setting.predicted:
        net = build(arch, num_classes, seed).to(setting.device)
        fit(net, images, masks, setting.args.steps, seed=seed, bf16=setting.bf16)
        setting.predicted[arch, pool, seed] = predict(net, setting.test.tensors()[0], bf16=setting.bf16)
    return setting.predicted[arch, pool, seed]


def segmentation(setting, progress):
    """mIoU on real images, trained on real images alone and on real + generated ones, at the same number of optimiser steps."""
    real, drawn, (images, target) = setting.train.tensors(), setting.generated.tensors(), setting.test.tensors()
    count = min(len(real[0]), len(drawn[0]))                        # 1:1, near the best ratio in the paper's ablation
    pools = {"real": real, "real + generated": [torch.cat([r, d[:count]]) for r, d in zip(real, drawn)]}
    seeds, num_classes = range(setting.args.seeds), len(setting.classes)
    rows, per_class, numbers, shown = [], [], {}, {}
    for arch in ARCHS:
        numbers[arch] = {}
        for pool, pairs in pools.items():
            scores = numbers[arch][pool] = []
            for seed in seeds:
                shown[arch, pool] = train_and_predict(setting, arch, pool, *pairs, num_classes, seed)
                scores.append(miou(confusion_matrix(shown[arch, pool], target, num_classes)))
                progress(f"{arch}, {pool}, seed {seed}: mIoU {100 * scores[-1]['miou']:.1f} %")
            iou = [[score["iou"][k] for score in scores] for k in range(num_classes)]
            per_class.append([arch, pool] + ["–" if math.isnan(values[0]) else mean_spread(values) for values in iou])
        without, with_ = ([score["miou"] for score in numbers[arch][pool]] for pool in pools)
        rows.append([arch, mean_spread(without), mean_spread(with_), mean_spread([b - a for a, b in zip(without, with_)])]
                    + [mean_spread([score["miou_with_background"] for score in numbers[arch][pool]]) for pool in pools])

    absent = [setting.classes[k] for k in scores[0]["absent"]]
    defects = setting.test.defective()
    pictures = [(setting.test.samples[i].kind, [images[i]] + [overlay(images[i], m[i]) for m in (target, *shown.values())])
                for i in defects[::max(1, len(defects) // 8)][:8]]
    titles = ["image", "truth"] + [arch + (" +" if pool != "real" else "") for arch, pool in shown]
    head = ["network", "real", "real + generated", "difference", "real, with background", "real + generated, with background"]
    return {
        "title": "Segmentation",
        "text": [f"Trained on {len(real[0])} real images, without and with {count} generated pairs, {setting.args.steps} optimiser steps "
                 f"of 8 images either way; scored on {len(images)} real images. No pretrained backbone.",
                 f"Mean ± standard deviation over {len(seeds)} seeds; the difference is paired by seed. mIoU is over the defect classes, "
                 "from one confusion matrix over all scoring images."]
                + ([f"No pixel of {', '.join(absent)} in the scoring images: left out of the means."] if absent else []),
        "tables": [{"caption": "mIoU in %", "head": head, "rows": rows},
                   {"caption": "IoU per class in %", "head": ["network", "trained on", *setting.classes], "rows": per_class}],
        "figures": [setting.figure("segmentation.png", sheet(pictures, titles, setting.classes),
                                   "Predictions of the last seed; + was trained on real + generated")],
        "numbers": numbers}


# --- inspection ---

def inspection(setting, progress):
    """Recall and false positive rate of verdicts: segmenters trained on the original and on the spectrum annotation."""
    name = setting.args.standard or setting.test.name.split(":")[-1]
    if name not in STANDARDS and not Path(name).is_file():
        return {"title": "Inspection", "tables": [], "figures": [], "numbers": {},
                "text": [f"Not run: there is no standard for {name}. Write one (README, 'Verdicts') and pass --standard FILE."]}
    standard = load_standard(name, setting.classes)
    names = [s.name for s in setting.test.samples]
    truth = [verdict(judge(setting.test.read(i)[1].numpy(), standard, setting.classes, image)) for i, image in enumerate(names)]
    progress(f"truth from masks at native size: {truth.count('reject')} of {len(truth)} are to be rejected")

    exact = setting.train.tensors()
    drawn = str(setting.data).startswith("drawn:")
    old = drawn or setting.args.original
    coarse = setting.open(setting.config["split"], "original").tensors() if old else (exact[0], (exact[1] > 0).to(torch.uint8))
    ways = {"original": ("original annotation", coarse, 2, lambda mask, image: "reject" if mask.any() else "accept"),
            "spectrum": ("real", exact, len(setting.classes),
                         lambda mask, image: verdict(judge(mask, standard, setting.classes, image)))}
    rows, numbers = [], {}
    for way, (pool, pairs, num_classes, decide) in ways.items():
        results = numbers[way] = []
        for seed in range(setting.args.seeds):
            pred = train_and_predict(setting, "deeplabv3+", pool, *pairs, num_classes, seed)
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
    parser = argparse.ArgumentParser(description="Run the experiments of a trained run and write its report.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"{' | '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--run", default="runs/demo", help="run folder with generated pairs in RUN/samples (default: %(default)s)")
    parser.add_argument("--data", help="the data set (default: the one the run was trained on)")
    parser.add_argument("--original", metavar="MVTEC_DIR", help="MVTec AD's folder: the inspection compares with its masks (data: DS-MVTec)")
    parser.add_argument("--split", default="test", help="images to score on: a list of split.json, or test (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="segmenters trained per cell (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each segmenter (default: %(default)s)")
    parser.add_argument("--standard", help="JSON file or name of the standard for the inspection (default: that of the object)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 steps, 8 scoring images: shows that everything runs")
    args = parser.parse_args(argv)
    unknown = [e for e in args.experiments if e not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"unknown experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if args.seeds < 1 or args.steps < 1:
        raise ValueError("--seeds and --steps must be at least 1")
    if args.quick:
        args.seeds, args.steps = 1, 2
    return args


def evaluate(args):
    setting = Setting(args)
    path = setting.run / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    for name in args.experiments or EXPERIMENTS:
        start = time.perf_counter()
        print(f"--- {name}", flush=True)

        def progress(text):
            print(f"{time.perf_counter() - start:6.0f} s  {text}", flush=True)

        result = EXPERIMENTS[name](setting, progress)
        result["text"].append(setting.splits)
        result["settings"] = {
            "data": setting.data, "training split": setting.config["split"], "scoring split": args.split, "size": setting.size,
            "segmenter steps": args.steps, "seeds": f"0 to {args.seeds - 1}", "time": f"{time.perf_counter() - start:.0f} s",
            "device": f"{setting.device} ({platform.machine()}, {torch.get_num_threads()} threads)", "torch": torch.__version__,
            "torchvision": torchvision.__version__, **({"quick": "the numbers mean nothing"} if args.quick else {})}
        metrics[name] = result
        write_json(path, metrics)                   # after each experiment: what is finished is kept
        write_report(setting.run, {key: metrics[key] for key in EXPERIMENTS if key in metrics})
        for text in result["text"]:
            print(text)
        for table in result["tables"]:
            print_table(table)
    print(f"report: {setting.run / 'report.html'}")


def print_table(table):
    rows = [table["head"], *table["rows"]]
    widths = [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
    print(table["caption"])
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    run_main(lambda: evaluate(parse_args()))
