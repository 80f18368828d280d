"""Painted defects beside real and pasted ones: does a segmenter see what was wanted, does the border show?

    python -m experiments.paint --run runs/demo --photos drawn:pill --count 16
    python -m experiments.paint --run runs/mine --photos FOLDER --split train --count 64

For each class: defects of the training photos, moved, are painted into the photos; copied and pasted into the
same photos with a feathered border, the baseline; and real held-out pairs with the class. Judges are
DeepLabV3+ trained on the run's training photos. Writes OUT/paint.json and OUT/paint_CLASS.png.
"""
import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import evaluate
from datasets import overlay, run_main, sheet, write_image, write_json
from defect_gen import DefectGen
from diffusion import rng
from evaluate import INSPECTOR, TrainedRun, mask_fit, print_table, spread
from sample import RETRY, TRIES, Painter, grown, lay, parse_args, steps_across
from segment import predict

VARIETY = 10            # seeds of one region


def paste(photo, image, shape, centres, room, generator, anywhere=False):
    """Copy a defect, bool (H, W), from a training image into a photo: (image, mask), or None without room.

    Its border is feathered over 2 px outside the mask. For its place see sample.lay; anywhere: the first one.
    """
    shift = lay(shape, image.float(), None if anywhere else photo, centres, room, generator)
    if shift is None:
        return None
    alpha = F.avg_pool2d(grown(shape, 1)[None].float(), 3, 1, 1)[0].maximum(shape.float())
    source, alpha = (part.roll(shift, (-2, -1)) for part in (image.float(), alpha))
    return (alpha * source + (1 - alpha) * photo).round().byte(), shape.roll(shift, (0, 1))


def border(image, region):
    """Mean difference of neighbours across a region's border, over that of the picture outside it."""
    others = []
    for axis in (-1, -2):
        outside = ~region.narrow(axis, 1, region.shape[axis] - 1) & ~region.diff(dim=axis)
        others.append(image.float().diff(dim=axis).abs().mean(0)[outside])
    return (steps_across(image, region).mean() / torch.cat(others).mean().clamp(min=0.5)).item()


def sets_of(painter, turn, k, count, test):
    """{name: (images, masks)} of class k, whose turn it is: painted, pasted into the same photos, real."""
    wishes, size = painter.wishes, painter.generator.size
    (images, shapes), painted, pasted = wishes.donors[k], [], []
    for seed in range(count):
        for n in range(TRIES):
            own, (name, photo, old) = seed + RETRY * n, painter.read(seed, n, size)
            wanted, _ = wishes.mask(name, size, photo, old > 0, turn, own)
            if wanted is None:
                continue
            painted.append((painter.paint(photo, old, wanted, own)[0], old + wanted))
            room = wishes.room & (old == 0)
            donor = own % len(shapes)
            found = paste(photo, images[donor], shapes[donor], room & shapes.any(0), room, rng(own))
            if found:
                pasted.append((found[0], old + found[1].byte() * k))
            break
    has = (test[1] == k).flatten(1).any(1)
    real = test[0][has][:count], test[1][has][:count]
    return {"real": real, **{name: tuple(map(torch.stack, zip(*pairs)))
                             for name, pairs in (("painted", painted), ("pasted", pasted)) if pairs}}


def score(pairs, k, judges, size):
    """{name: values of the judges or pairs} of one set of class k."""
    images, masks = pairs
    fits, seen = [], []
    for judge in judges:
        said = judge(images)
        fits.append(100 * mask_fit(said, masks).nanmean().item())
        votes = torch.stack([((said == c) & (masks == k)).flatten(1).sum(1) for c in range(1, size)])
        seen.append(100 * ((votes.argmax(0) == k - 1) & (votes.sum(0) > 0)).double().mean().item())
    borders = [border(image, grown(mask == k, min(mask.shape) // 32)) for image, mask in zip(images, masks)]
    return {"pairs": len(images), "fit %": fits, "class seen %": seen, "border": borders}


def variety(painter, turn, k):
    """Mean deviation in grey levels, inside one region, of what VARIETY seeds paint for one mask."""
    size = painter.generator.size
    for i in range(len(painter.photos)):
        photo, old = painter.photos.read(i, size)
        wanted, _ = painter.wishes.mask("", size, photo, old > 0, turn, i)
        if wanted is not None:
            inside = (wanted > 0).expand(VARIETY, *size)
            images = painter.generator.paint(photo.expand(VARIETY, *photo.shape), inside.byte() * k, inside,
                                             range(VARIETY))
            return images.float().std(0)[:, wanted > 0].mean().item()
    return math.nan


def measure_class(painter, turn, k, judges, args, test):
    """Rows of the table, and a sheet: painted pairs, those with the lowest fit last."""
    generator = painter.generator
    sets = sets_of(painter, turn, k, args.count, test)
    rows, numbers = [], {}
    for name, pairs in sets.items():
        numbers[name] = result = score(pairs, k, judges, len(generator.classes))
        cells = [spread(result[column], 1) for column in ("fit %", "class seen %")]
        result["variety"] = variety(painter, turn, k) if name == "painted" else math.nan
        rows.append([generator.classes[k], name, result["pairs"], *cells, spread(result["border"], 2),
                     spread([result["variety"]], 1)])
    pictures = []
    for name, (images, masks) in sets.items():
        order = mask_fit(judges[0](images), masks).nan_to_num(0).argsort(descending=True)
        shown = order[torch.linspace(0, len(order) - 1, min(8, len(order))).long()]
        pictures += [(name, list(images[shown])), ("mask", list(map(overlay, images[shown], masks[shown])))]
    write_image(args.out / f"paint_{generator.classes[k]}.png", sheet(pictures, classes=generator.classes))
    return rows, numbers


def main():
    parser = argparse.ArgumentParser(description="Measure painted defects beside real and pasted ones.")
    parser.add_argument("--run", default="runs/demo", help="a run with both stages (default: %(default)s)")
    parser.add_argument("--photos", default="drawn:pill", help="to paint into, see sample.py (default: "
                        "%(default)s)")
    parser.add_argument("--split", help="of --photos (default: all)")
    parser.add_argument("--count", type=int, default=64, help="pairs of each class (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each judge (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="judges (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/paint"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one pair, one judge of two steps: shows that "
                        "everything runs")
    args = parser.parse_args()
    if args.quick:
        args.count, args.steps, args.seeds, args.out = 1, 2, 1, args.out / "quick"
    generator = DefectGen.load(args.run)
    run, classes, judges = TrainedRun(evaluate.parse_args(["--run", args.run])), generator.classes, []
    held_out = tuple(part[run.test.defective()] for part in run.scored)
    for seed in range(args.seeds):
        net = run.network(INSPECTOR, *run.real, None, len(classes), seed, args.steps)
        judges.append(partial(predict, net))
        print(f"judge {seed + 1} of {args.seeds} trained", flush=True)
    words = ["--run", args.run, "--photos", args.photos, *(["--split", args.split] if args.split else [])]
    painter, rows, numbers = Painter(parse_args(words), generator), [], {}
    for turn, k in enumerate(painter.wishes.donors):                # the classes with a training defect
        more, numbers[classes[k]] = measure_class(painter, turn, k, judges, args, held_out)
        rows += more
        table = {"caption": f"{args.run}, photos of {args.photos}; judges: {args.steps} steps", "rows": rows,
                 "head": ["class", "", "pairs", "fit %", "class seen %", "border", "variety"]}
        write_json(args.out / "paint.json", {"table": table, "numbers": numbers})
        print(f"{classes[k]} is done", flush=True)
    print_table(table)
    print(f"numbers and pictures: {args.out}")


if __name__ == "__main__":
    run_main(main)
