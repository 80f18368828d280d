"""The paper's table: do pairs help segmenters, and more than what costs nothing?

    python -m experiments.paper_table --run runs/demo --pools real pasted two-stage painted
    python -m experiments.paper_table --run runs/steel --photos FOLDER --split few_shot --size 96 96

Segmenters are trained on the run's photos and as many pairs again of one pool, and scored on the test photos:

    real          the photos alone, augmented as in every pool (segment.random_view)
    more real     other photos of --more, or more drawn ones: the upper bound
    pasted        defects copied from the photos, pasted anywhere on the product with a feathered border
    pasted where  likewise, where training defects of the class lie and the photo looks as their surroundings
    foreign       a texture of the photos, enlarged, in blots of Perlin noise (any defect: one class)
    large         plans of the large stage, enlarged
    two-stage     what sample.py draws
    for masks     what sample.py --masks training draws: whole pictures, all classes alike
    painted       what sample.py --photos paints
    judged        likewise, those alone of which the segmenter of --judge sees the defect (IoU of MIN_FIT)
    half          two-stage and pasted, half of each
    relabelled    two-stage, the masks redrawn by a segmenter of all photos, those scored on too: a bound that
                  tells wrong masks from wrong pictures

Optimiser steps, batches, backbone and views are the same in all. Pools are data sets in RUN/pools, cells are
kept in --out: an interrupted command is run again and goes on.
"""
import argparse
import math
import platform
import statistics
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

import evaluate
import sample
from datasets import (DrawnDataset, begin, fingerprint, has_bf16, open_dataset, pair_paths, run_main,
                      write_json, write_pair)
from defect_gen import DefectGen
from diffusion import rng
from evaluate import TrainedRun, merged, print_table, spread
from experiments import mask2former                                         # adds itself to segment.ARCHS
from experiments.paint import paste
from inspect_rules import read_json
from segment import ARCHS, confusion_matrix, draw_table, miou, mix, predict

POOLS = ("real", "more real", "pasted", "pasted where", "foreign", "large", "two-stage", "for masks",
         "painted", "judged", "half", "relabelled")
MIN_FIT = "0.2"         # of the pool "judged"; its judge has learned from the run's training photos alone
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by N, two-sided


def blots(size, generator):
    """bool (H, W): Perlin-like noise, smooth at four scales, above a threshold that leaves 2 to 15 %."""
    noise = torch.zeros(1, 1, *size)
    for cells in (2, 4, 8, 16):
        octave = torch.randn(1, 1, cells, cells, generator=generator)
        noise += F.interpolate(octave, size, mode="bicubic") / cells
    share = 0.02 + 0.13 * torch.rand((), generator=generator).item()
    return noise[0, 0] > noise.flatten().quantile(1 - share)


def foreign(photo, texture, room, generator):
    """(image, mask): blots of another photo's texture, enlarged by 3, half transparent (as DRAEM, 2021)."""
    height, width = size = photo.shape[1:]
    mask = blots(size, generator) & room
    large = F.interpolate(texture[None, :, :height // 3, :width // 3].float(), size, mode="bilinear")[0]
    opacity = 0.3 + 0.7 * torch.rand((), generator=generator)
    image = torch.where(mask, (1 - opacity) * photo + opacity * large, photo.float())
    return image.round().byte(), mask


def pasted_pair(painter, name, seed):
    """One pair of the pools that need no generator, or None where 50 places have no room."""
    wishes, size = painter.wishes, painter.generator.size
    classes = list(wishes.donors)
    k, random = classes[seed % len(classes)], rng(seed, sample.PLACE)
    _, photo, old = painter.read(int(torch.randint(1 << 20, (), generator=random)), 0, size)
    room = wishes.room & (old == 0)
    images, shapes = wishes.donors[k]
    donor = int(torch.randint(len(images), (), generator=random))
    if name == "foreign":
        image, mask = foreign(photo, images[donor], room, random)
        return image, old + mask.byte()                                     # some class: all are merged
    anywhere = name == "pasted"
    centres = room if anywhere else room & shapes.any(0)
    found = paste(photo, images[donor], shapes[donor], centres, room, random, anywhere)
    return found and (found[0], old + found[1].byte() * k)


def make_pool(args, run, name, count, block):
    """The folder of a pool with `count` pairs, made where it is missing; block: sampling seeds of its own."""
    out, first = Path(run) / "pools" / f"{name.replace(' ', '_')}_{block}", block * 10_000
    count *= 2 if name in ("painted", "judged") else 1                      # not every photo has room
    seeds = ["--run", run, "--seeds", f"{first}-{first + count - 1}", "--out", str(out)]
    photos = ["--photos", args.photos, "--split", args.split]
    if name in ("large", "two-stage"):
        sample.draw_pairs(sample.parse_args([*seeds, *(["--switch-t", "0"] if name == "large" else [])]))
    elif name in ("for masks", "painted", "judged"):
        into = ["--masks", "training"] if name == "for masks" else photos
        judge = ["--judge", args.judge, "--min-fit", MIN_FIT] if name == "judged" else []
        sample.paint_pairs(sample.parse_args([*seeds, *into, *judge]))
    else:
        painter = sample.Painter(sample.parse_args([*seeds, *photos]), DefectGen.load(run))
        begin(out, painter.generator.classes, {"photos": args.photos, "split": args.split, "pool": name})
        for seed in range(first, first + count):
            if not pair_paths(out, f"{seed:06d}", name)[1].exists():
                tries = (pasted_pair(painter, name, seed + sample.RETRY * n) for n in range(sample.TRIES))
                pair = next(filter(None, tries), None)
                if pair:
                    write_pair(out, f"{seed:06d}", *pair, name)
    return out


class Bench(TrainedRun):
    """A run at the segmenters' size, with pools of pairs."""

    def __init__(self, flags, run):
        weights = ["--backbone-weights", flags.backbone_weights] if flags.backbone_weights else []
        given = ["--run", run, *weights, *(["--quick"] if flags.quick else [])]
        super().__init__(evaluate.parse_args(given), flags.size)
        self.flags, self.run = flags, run

    def others(self):
        """Photos for "more real": those of --more; drawn ones that no split has."""
        if not isinstance(self.train, DrawnDataset):
            return self.open(self.flags.more)
        dataset = DrawnDataset(self.train.product, self.train.coarse, range(100, 200))
        dataset.size = self.size
        return dataset

    @cache
    def pairs(self, name, block):
        """(images, masks) of a pool."""
        count = math.ceil(max(self.flags.ratios) * len(self.real[0]))
        if name == "more real":
            other, mine = self.others(), {sample.name for sample in self.train.samples}
            free = [i for i in other.defective() if other.samples[i].name not in mine]
            if not free:
                raise ValueError(f"--more {self.flags.more}: {self.data} has no photo there but those "
                                 "trained on; name another split, or leave 'more real' out of --pools")
            order = torch.randperm(len(free), generator=rng(block)).tolist()
            return other.subset([free[i] for i in order[:count]]).tensors()
        if name == "half":
            halves = [tuple(part[:count // 2] for part in self.pairs(each, block))
                      for each in ("two-stage", "pasted")]
            return tuple(map(torch.cat, zip(*halves)))
        if name == "relabelled":
            photos, masks = map(torch.cat, zip(self.real, self.scored))
            net = self.network(evaluate.INSPECTOR, photos, masks, None, len(self.classes), 0,
                               2 * self.flags.steps)
            images = self.pairs("two-stage", block)[0]
            return images, predict(net, images, bf16=has_bf16(self.device))
        return open_dataset(make_pool(self.flags, self.run, name, count, block), self.size).tensors()

    @cache
    def pixels(self, name, block):
        """What a cell of the pool was made from."""
        return fingerprint(*self.real, *self.scored, *(() if name == "real" else self.pairs(name, block)))

    def score(self, arch, name, ratio, block, seed):
        """{"any", "iou", "miou"} in % of one segmenter: `any` merges the classes, foreign knows no others."""
        images, masks, table = *self.real, draw_table(self.real[1])
        if name != "real":
            extra = self.pairs(name, block)
            images, masks, table = mix(self.real, extra, min(ratio, len(extra[0]) / len(self.real[0])), block)
        truth, num_classes = self.scored[1], len(self.classes)
        if name == "foreign":
            masks, truth, num_classes = merged(masks), merged(truth), 2
        net = self.network(arch, images, masks, table, num_classes, seed, self.flags.steps)
        seen = predict(net, self.scored[0], bf16=has_bf16(self.device))
        of_any = miou(confusion_matrix(merged(seen), merged(truth), 2))
        each = miou(confusion_matrix(seen, truth, num_classes))
        return {"any": 100 * of_any["miou"], "iou": [100 * value for value in each["iou"]],
                **({} if name == "foreign" else {"miou": 100 * each["miou"]})}


def difference(found, base, measure):
    """(mean, half of its 95 % interval) of measure's gain over `base`, paired by the segmenter's seed.

    found: {(block, seed): score}; base: {(0, seed): score}. Blocks of one seed are averaged first: N is the
    number of seeds.
    """
    seeds = sorted({seed for _, seed in found})
    gains = [statistics.mean(found[b, s].get(measure, math.nan) for b, s in found if s == seed)
             - base[0, seed][measure] for seed in seeds]
    deviation = torch.tensor(gains, dtype=torch.float64).std().item() if len(gains) > 1 else math.nan
    return statistics.mean(gains), T_95.get(len(gains), math.nan) * deviation / math.sqrt(len(gains))


def rows_of(bench, arch, found):
    """Rows of the table: {(pool, ratio): {(block, seed): score}}."""
    base, rows = found["real", 0], []
    for (name, ratio), cells in found.items():
        row = [bench.run, arch, name, f"{ratio:g}"]
        for measure in ("miou", "any"):
            gain, half = difference(cells, base, measure)
            known = name != "real" and not math.isnan(gain)                 # foreign has no classes
            row += [spread([cell.get(measure, math.nan) for cell in cells.values()], 1),
                    f"{gain:+.1f} ± {half:.1f}" if known else "–"]
        rows.append(row)
    return rows


def parse_args():
    parser = argparse.ArgumentParser(description="The paper's table: networks x data sets x pools of pairs.")
    add = parser.add_argument
    add("--run", action="append", help="run with both stages; repeatable (default: runs/demo)")
    add("--photos", default="drawn:pill", help="to paint and paste into, see sample.py (default: "
        "%(default)s)")
    add("--split", default="train", help="of --photos: none that is scored on (default: %(default)s)")
    add("--more", default="train", help="split of the run's data that holds more photos (default: "
        "%(default)s)")
    add("--arch", nargs="+", default=list(ARCHS), help="networks (default: all three)")
    add("--pools", nargs="+", choices=POOLS, help="default: all, \"judged\" only with --judge")
    add("--judge", metavar="FILE", help="segment.pt of segment.py, of the run's training photos")
    add("--ratios", type=float, nargs="+", default=[1.0], help="pairs for each real photo (default: 1)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="of the segmenters (default: the run's)")
    add("--steps", type=int, default=500, help="optimiser steps of each (default: %(default)s)")
    add("--seeds", type=int, default=3, help="segmenters of each kind (default: %(default)s)")
    add("--blocks", type=int, default=2, help="of sampling seeds for each pool (default: %(default)s)")
    add("--backbone-weights", metavar="FILE", help="see segment.py (default: random)")
    add("--out", type=Path, default=Path("runs/paper_table.json"), help="default: %(default)s")
    add("--quick", action="store_true", help="two steps, one seed; its numbers mean nothing, none is kept")
    args = parser.parse_args()
    args.run = args.run or ["runs/demo"]
    args.pools = args.pools or [name for name in POOLS if args.judge or name != "judged"]
    if "judged" in args.pools and not args.judge:
        raise ValueError("--pools judged takes a segmenter to judge by: --judge segment.pt")
    if args.quick:
        args.steps, args.seeds, args.blocks, args.ratios = 2, 1, 1, [0.1]
    return args


def main():
    args = parse_args()
    cells, rows = read_json(args.out)["cells"] if args.out.exists() and not args.quick else {}, []
    settings = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for run in args.run:
        bench = Bench(args, run)
        for arch in args.arch:
            found = {}
            wanted = [(name, ratio) for name in args.pools
                      for ratio in ([0] if name == "real" else args.ratios)]
            for (name, ratio), seed in ((pool, seed) for seed in range(args.seeds) for pool in wanted):
                for block in range(1 if name == "real" else args.blocks):
                    pixels = bench.pixels(name, block)
                    key = f"{run}|{arch}|{name}|{ratio:g}|{block}|{seed}|{args.steps}|{pixels}"
                    key += f"|{args.backbone_weights}" if args.backbone_weights else ""
                    if key not in cells:
                        cells[key] = bench.score(arch, name, ratio, block, seed)
                        if not args.quick:
                            write_json(args.out, {"settings": settings, "cells": cells})
                        print(f"{run}, {arch}, {name} {ratio:g}, block {block}, seed {seed}: any defect "
                              f"{cells[key]['any']:.1f} %", flush=True)
                    found.setdefault((name, ratio), {})[block, seed] = cells[key]
            rows += rows_of(bench, arch, found)
    print_table({"caption": f"IoU in % after {args.steps} steps; gains paired by seed, ± a 95 % interval",
                 "head": ["run", "network", "+ pool", "ratio", "mIoU", "gain", "any defect", "gain"],
                 "rows": rows})


if __name__ == "__main__":
    run_main(main)
