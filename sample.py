"""Draw image + mask pairs from a trained run and write them as a data set.

    python sample.py                                    64 pairs from runs/demo into runs/demo/samples
    python sample.py --min-area-px 1                    64 pairs that have a defect
    python sample.py --run runs/mine --seeds 100-199 --num-steps 50
    python sample.py --run runs/mine --count 50 --defect crack --min-area-px 20     draws until 50 pairs fit

A picture is a function of its seed: 000017.png is the same alone or in a batch. Pairs that are already there
are skipped, so an interrupted command is simply run again; several machines share the work by their --seeds.
"""
import argparse
import math
import re
from pathlib import Path

from tqdm import tqdm

from datasets import (open_dataset, overlay, pair_paths, pick_device, run_main, sheet, write_classes,
                      write_image, write_json, write_pair)
from defect_gen import NUM_STEPS, SWITCH_T, DefectGen
from diffusion import METHODS, SPACINGS
from inspect_rules import read_json
from unet import check_size

KIND = "generated"      # one folder for all: a pair's classes are in its mask
DRAWS = 50              # for each pair of --count at most, where only some are wanted


def parse_seeds(text):
    """'0-3,8' -> [0, 1, 2, 3, 8]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds {text}: expected seeds and ranges, like 0-63 or 1,5,10-20")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


def parse_args(argv=None):
    """The flags, checked; --seeds as a list."""
    parser = argparse.ArgumentParser(description="Draw image + mask pairs from a trained run.")
    parser.add_argument("--run", default="runs/demo", help="folder with both stages (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, help="how many pairs (default: %(default)s)")
    parser.add_argument("--seeds", help="draw these seeds, like 0-63 or 1,5,10-20 (default: 0, 1, 2, ...)")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="timesteps from noise to picture: "
                        "with few, rare defects come too rarely; with two sizes the small network visits its "
                        "own again (default: %(default)s)")
    parser.add_argument("--sampler", default="dpm++", choices=METHODS, help="default: %(default)s")
    parser.add_argument("--spacing", default="logsnr", choices=SPACINGS, help="default: %(default)s")
    parser.add_argument("--switch-t", type=int, default=SWITCH_T, help="the large network owns t >= this; 0: "
                        "large alone, 1000: small alone, for --t-range full (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="also larger than the photos "
                        "trained on: the picture then shows more of the product (default: theirs)")
    parser.add_argument("--batch-size", type=int, help="pairs at a time (default: 16 of 256x256 px, fewer of "
                        "larger ones)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--out", help="data set to write (default: RUN/samples)")
    parser.add_argument("--defect", metavar="CLASS", help="keep only pairs whose mask has this class")
    parser.add_argument("--min-area-px", type=int, default=0, help="keep only pairs with so many pixels of "
                        "--defect, or of all defects")
    parser.add_argument("--max-area-px", type=int, help="keep only pairs with at most so many")
    args = parser.parse_args(argv)
    if args.count < 1 or args.batch_size is not None and args.batch_size < 1:
        raise ValueError("--count and --batch-size must be at least 1")
    args.seeds = parse_seeds(args.seeds) if args.seeds else None
    return args


def wanted(masks, args, classes):
    """(N,) bool: whether a pair's mask (N, H, W) has the asked area of --defect, or of all defects."""
    found = masks == classes.index(args.defect) if args.defect else masks > 0
    area = found.flatten(1).sum(1)
    least = max(args.min_area_px, 1 if args.defect else 0)
    most = math.inf if args.max_area_px is None else args.max_area_px
    return (area >= least) & (area <= most)


def draw_pairs(args):
    """Draw the pairs that --out lacks and write them, then a contact sheet of the first 32."""
    generator = DefectGen.load(args.run, pick_device(args.device))
    size, out = tuple(args.size or generator.size), Path(args.out or Path(args.run) / "samples")
    one_size = generator.plan_size == generator.size
    check_size(*size, depth=max(generator.large.depth * one_size, generator.small.depth))
    how = args.num_steps, args.sampler, args.spacing, args.switch_t
    generator.timesteps(args.num_steps, args.spacing, args.switch_t)    # refused before writing
    if args.defect and args.defect not in generator.classes[1:]:
        raise ValueError(f"--defect {args.defect}: {args.run} draws {', '.join(generator.classes[1:])}")
    names = "num_steps", "sampler", "spacing", "switch_t", "defect", "min_area_px", "max_area_px"
    settings = {name: getattr(args, name) for name in names}
    settings.update(size=list(size), steps_trained=generator.steps_trained)
    if (out / "config.json").exists() and read_json(out / "config.json") != settings:
        raise ValueError(f"{out} holds pairs of other settings or checkpoints, see its config.json; "
                         f"remove it, or choose another --out")
    write_classes(out, generator.classes)
    write_json(out / "config.json", settings)

    batch_size = args.batch_size or min(16, max(1, 16 * 256 ** 2 // math.prod(size)))
    choosy = args.defect or args.min_area_px or args.max_area_px is not None
    seeds = args.seeds or list(range(args.count * (DRAWS if choosy else 1)))
    count = len(seeds) if args.seeds else args.count
    missing = [s for s in seeds if not all(path.exists() for path in pair_paths(out, f"{s:06d}", KIND))]
    kept = len(seeds) - len(missing)
    with tqdm(total=count, initial=kept, unit="pair") as bar:
        while missing and kept < count:
            batch, missing = missing[:batch_size], missing[batch_size:]
            images, masks = generator.sample(batch, *how, size, batch_size)
            for i in wanted(masks, args, generator.classes).nonzero().flatten().tolist()[:count - kept]:
                write_pair(out, f"{batch[i]:06d}", images[i], masks[i], KIND)
                kept += 1
                bar.update()
    if kept < count and not args.seeds or not kept:
        raise ValueError(f"only {kept} of {len(seeds)} pairs drawn are as asked for, in {out}; ask for less")

    pairs = open_dataset(out, size)
    images, masks = pairs.subset(range(min(32, len(pairs)))).tensors()
    rows = []
    for first in range(0, len(images), 8):
        eight = slice(first, first + 8)
        rows += [("image", list(images[eight])), ("mask", list(map(overlay, images[eight], masks[eight])))]
    write_image(out / "sheet.png", sheet(rows, classes=generator.classes))
    drawn = f" of {len(seeds) - len(missing)} drawn" if choosy else ""
    print(f"{kept} pairs{drawn} in {out}, contact sheet {out / 'sheet.png'}")
    if out == Path(args.run) / "samples":
        print(f"next: python evaluate.py --run {args.run}")


if __name__ == "__main__":
    run_main(lambda: draw_pairs(parse_args()))
