"""Draw image + mask pairs from a trained run and write them as a data set.

    python sample.py                                    64 pairs from runs/demo into runs/demo/samples
    python sample.py --min-area-px 1 --out defects      64 pairs that have a defect
    python sample.py --run runs/mine --seeds 100-199 --num-steps 50
    python sample.py --run runs/mine --count 50 --defect crack --min-area-px 20     draws until 50 pairs fit
    python sample.py --run runs/mine --count 50 --defect crack --photos good        paints cracks into photos
    python sample.py --run runs/mine --count 50 --defect crack --masks training     whole pictures for masks

A picture is a function of its seed: 000017.png is the same alone or in a batch. Pairs that are already there
are skipped, so an interrupted command is simply run again; several machines share the work by their --seeds.
"""
import argparse
import contextlib
import csv
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import rotate
from tqdm import tqdm

from datasets import (DefectDataset, Sample, as_tensor, begin, channels_of, defects, find_objects,
                      fingerprint, images_in, open_dataset, open_picture, overlay, pair_paths, pick_device,
                      run_main, sheet, to_mode, write_image, write_json, write_pair)
from defect_gen import GUIDANCE, GUIDED_FROM, NUM_STEPS, PAINT_STEPS, REPEATS, SWITCH_T, DefectGen
from diffusion import METHODS, SPACINGS, rng
from evaluate import defect_crops, distances, halved, mask_fit
from inspect_rules import read_json
from segment import load_segmenter
from unet import check_size

KIND, PAINTED = "generated", "painted"      # one folder for all: a pair's classes are in its mask
MASKS = "training", "generated"
SCORES = "photo", "mask", "tries", "seam", "novelty", "fit"
TRIES = 5               # for each painted pair: other photos, places and noise
MAX_SEAM = 2.0          # what the border of a region may show, see seam()
RETRY, PLACE = 1 << 20, 5                   # between the seeds of a pair's tries; for its place
DRAWING = "size", "num_steps", "sampler", "spacing", "switch_t", "batch_size", "min_area_px", "max_area_px"
PAINTING = "split", "where", "judge", "min_fit"     # flags that are read in one of the two ways alone
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
    add = parser.add_argument
    add("--run", default="runs/demo", help="folder with both stages (default: %(default)s)")
    add("--count", type=int, default=64, help="how many pairs, without --seeds (default: %(default)s)")
    add("--seeds", help="draw these seeds, like 0-63 or 1,5,10-20 (default: 0, 1, 2, ...)")
    add("--num-steps", type=int, default=NUM_STEPS, help="timesteps from noise to picture; with few, rare "
        "defects come too rarely (default: %(default)s)")
    add("--sampler", default="dpm++", choices=METHODS, help="default: %(default)s")
    add("--spacing", default="logsnr", choices=SPACINGS, help="default: %(default)s")
    add("--switch-t", type=int, default=SWITCH_T, help="the small network draws at t < this; 0: none of it, "
        "1000: all of it, for --t-range full (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="larger shows more around (default: the run's)")
    add("--batch-size", type=int, help="pairs at a time (default: 16 of 256x256 px, fewer of larger ones)")
    add("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add("--out", help="data set to write (default: RUN/samples, or RUN/painted)")
    add("--defect", metavar="CLASS", help="keep only pairs whose mask has this class")
    add("--min-area-px", type=int, default=0, help="only pairs with at least so many px of it, or of all")
    add("--max-area-px", type=int, help="keep only pairs with at most so many")
    add = parser.add_argument_group("painting one defect into each photo; of --defect if given").add_argument
    add("--photos", metavar="FOLDER", help="good photos, or a data set: then its photos without a defect, or "
        "all, whose defects stay labelled")
    add("--split", help="of --photos where it is a data set (default: all)")
    add("--masks", metavar="FOLDER", help="training: defects trained on, moved (default); generated: of "
        "pairs drawn for it; or index masks; without --photos whole pictures are drawn for them")
    add("--where", metavar="PNG", help="all defects lie where it is white (default: near those trained on)")
    add("--judge", metavar="FILE", help="segment.pt of segment.py: scores how far it sees the wanted mask")
    add("--min-fit", type=float, default=0.0, metavar="IOU", help="paint again what --judge scores lower")
    args = parser.parse_args(argv)
    args.paint = bool(args.photos or args.masks)
    args.masks = args.masks or "training"
    for name in DRAWING if args.paint else PAINTING:
        if getattr(args, name) != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is for drawing alone: leave it out with --photos and --masks"
                             if args.paint else f"{flag} is for painting: add --photos or --masks")
    if args.min_fit and not args.judge:
        raise ValueError("--min-fit is of the scores of --judge: name its segment.pt")
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


def open_run(args):
    """The generator of --run. Raises where --defect is none of its classes."""
    generator = DefectGen.load(args.run, pick_device(args.device))
    if args.defect and args.defect not in generator.classes[1:]:
        raise ValueError(f"--defect {args.defect}: {args.run} draws {', '.join(generator.classes[1:])}")
    return generator


def settings(args, names, generator):
    """What the pairs of a folder are made with: flags, and the networks, known by their last layers."""
    last = [net.output[-1].weight.detach().cpu() for net in (generator.large, generator.small)]
    weights = fingerprint(*(layer.bfloat16().float() for layer in last))    # as any machine rounds them
    flags = {name: getattr(args, name) for name in names}
    return {**flags, "steps_trained": generator.steps_trained, "weights": weights}


def write_sheet(out, pairs, photos=()):
    """Write OUT/sheet.png: the first 32 pairs of an opened data set, below the photos painted into."""
    images, masks = pairs.subset(range(min(32, len(pairs)))).tensors()
    shown = {"photo": photos, "image": images, "mask": list(map(overlay, images, masks))}
    rows = [(caption, pictures[first:first + 8]) for first in range(0, len(images), 8)
            for caption, pictures in shown.items() if len(pictures)]
    write_image(out / "sheet.png", sheet(rows, classes=pairs.classes))


def mask_shares(dataset):
    """'3 % empty, 16.31 % of the pixels are defects': what the masks of a data set hold."""
    masks = [defects(dataset.read_mask(i)) for i in range(len(dataset))]
    empty, share = np.mean([not mask.any() for mask in masks]), np.mean([mask.mean() for mask in masks])
    return f"{100 * empty:.0f} % empty, {100 * share:.2f} % of the pixels are defects"


def draw_pairs(args):
    """Draw the pairs that --out lacks and write them, then a contact sheet of the first 32."""
    generator = open_run(args)
    size, out = tuple(args.size or generator.size), Path(args.out or Path(args.run) / "samples")
    one_size = generator.plan_size == generator.size
    check_size(*size, depth=max(generator.large.depth * one_size, generator.small.depth))
    how = args.num_steps, args.sampler, args.spacing, args.switch_t
    generator.timesteps(args.num_steps, args.spacing, args.switch_t)    # refused before writing
    names = "num_steps", "sampler", "spacing", "switch_t", "defect", "min_area_px", "max_area_px"
    begin(out, generator.classes, {**settings(args, names, generator), "size": list(size)})

    batch_size = args.batch_size or min(16, max(1, 16 * 256 ** 2 // math.prod(size)))
    choosy, drawn = args.defect or args.min_area_px or args.max_area_px is not None, 0
    seeds = args.seeds or list(range(args.count * (DRAWS if choosy else 1)))
    count = len(seeds) if args.seeds else args.count
    missing = [s for s in seeds if not all(path.exists() for path in pair_paths(out, f"{s:06d}", KIND))]
    kept = len(seeds) - len(missing)
    with tqdm(total=count, initial=kept, unit="pair") as bar:
        while missing and kept < count:
            batch, missing = missing[:batch_size], missing[batch_size:]
            images, masks = generator.sample(batch, *how, size, batch_size)
            drawn += len(batch)
            for i in wanted(masks, args, generator.classes).nonzero().flatten().tolist()[:count - kept]:
                write_pair(out, f"{batch[i]:06d}", images[i], masks[i], KIND)
                kept += 1
                bar.update()
    if not kept or kept < count and not args.seeds:             # of --seeds some may fall short
        raise ValueError(f"only {kept} of {len(seeds)} pairs drawn are as asked for, in {out}; ask for less")

    pairs, config = open_dataset(out, size), generator.config
    write_sheet(out, pairs)
    print(f"masks: {mask_shares(pairs)}")
    with contextlib.suppress(OSError, ValueError):                  # the photos may lie on another machine
        train = open_dataset(config["data"], split=config["split"], object=config["object"])
        print(f"trained on: {mask_shares(train.subset(train.defective()))}")
    print(f"{kept} pairs in {out}, {drawn} drawn now, contact sheet {out / 'sheet.png'}")
    if out == Path(args.run) / "samples":
        print(f"next: python evaluate.py --run {args.run}")


# --- painting: a defect where it is wanted ---

def open_photos(args, generator):
    """The photos to paint into: a folder's; or a data set's without a defect, or all if each has one."""
    spec, channels = args.photos, generator.config["channels"]
    if spec.startswith("drawn:") or find_objects(Path(spec)):
        photos = open_dataset(spec, split=args.split)
        if photos.classes != generator.classes:
            raise ValueError(f"--photos {spec} has the classes {', '.join(photos.classes)}, but {args.run} "
                             f"was trained with {', '.join(generator.classes)}")
        defective = photos.defective()
        photos = photos.subset(sorted(set(range(len(photos))) - set(defective)) or defective)
    else:
        samples = [Sample(stem, path) for (_, stem), path in images_in(Path(spec)).items()]
        photos = DefectDataset(spec, generator.classes, samples, channels_of(samples))
    if not len(photos):
        raise ValueError(f"--photos {spec}: no photos in this folder")
    photos.white = generator.config["white"] or photos.white
    if photos.channels > channels:
        raise ValueError(f"--photos {spec}: are in colour, but {args.run} was trained on grey ones; convert "
                         "them to grey")
    photos.channels = channels                                      # grey ones are read as colour
    return photos


def grown(region, by):
    """A region, bool (H, W), and all within `by` px of it along the axes and diagonals."""
    return F.max_pool2d(region[None].float(), 2 * by + 1, 1, by)[0] > 0


def reach(size):
    """How far around a defect its surroundings go, in px, on a photo of (H, W)."""
    return max(2, min(size) // 16)


def lay(shape, around, photo, centres, room, generator):
    """(down, right): how to move a defect, bool (h, w), within a photo; None where no place of 50 has room.

    Its middle comes to lie on `centres`, all of it on `room`, both bool (H, W), where `photo` (C, H, W) looks
    most as the defect's surroundings do: split teeth belong on teeth. around: its own photo (C, h, w), nan
    where nothing is known. Without a photo to compare with, the first place that has room.
    """
    at, places, found = shape.nonzero(), centres.nonzero(), []
    near = (grown(shape, reach(room.shape)) & ~shape & ~around[0].isnan()).nonzero()
    if not len(at) or not len(places):
        return None
    size, middle = torch.tensor(room.shape), (at.amin(0) + at.amax(0)) // 2
    for i in torch.randint(len(places), (50,), generator=generator):
        shift = places[i] - middle
        there = at + shift
        if (there < 0).any() or (there >= size).any() or not room[there.unbind(1)].all():
            continue
        if photo is None:
            return tuple(shift.tolist())
        inside = near[((near + shift >= 0) & (near + shift < size)).all(1)]
        difference = (photo[:, *(inside + shift).T] - around[:, *inside.T]).abs().mean(0)
        unlike = difference.sum().item() + 128 * (len(near) - len(inside))      # outside: half of all levels
        found.append((unlike, tuple(shift.tolist())))
    return min(found)[1] if found else None


def moved(shape, image, photo, centres, room, turns, areas, generator):
    """One defect, bool (H, W), turned, resized and laid into a photo, see lay(); None where it has no room.

    image: the photo (C, H, W) that has it. turns: by any angle, else by 10 degrees at most. areas: of the
    defects of its class, px: it becomes no smaller and no larger than they are.
    """
    angle, growth = (torch.rand(2, generator=generator) * 2 - 1).tolist()
    least, most = (math.sqrt(area / shape.sum()) for area in areas.aminmax())
    factor = min(max(2 ** (growth / 2), least), most)
    by = reach(room.shape)
    rows, columns = (slice(max(0, at.min() - by), at.max() + 1 + by) for at in shape.nonzero().T)
    both = torch.cat([shape[None], image])[:, rows, columns].float()
    both = rotate(both, angle * (180 if turns else 10), expand=True, fill=[-1.0])     # by nearest
    both = F.interpolate(both[None], [max(1, round(n * factor)) for n in both.shape[1:]])[0]
    piece, around = both[0] > 0, both[1:].where(both[0] >= 0, math.nan)
    shift = lay(piece, around, photo, centres, room, generator)
    if shift is None:
        return None
    mask = torch.zeros_like(room)
    mask[(piece.nonzero() + torch.tensor(shift)).unbind(1)] = True
    return mask


class Wishes:
    """Which defect goes where: --masks.

    training: the pixels of one class in a training mask, moved to where the photo looks as around them;
    classes take turns. generated: those of pairs drawn for it, or of plans. A folder: its index masks, that
    of the photo's own name if there is one. None may lie outside `room`.
    """

    def __init__(self, args, generator):
        self.args, self.generator, config = args, generator, generator.config
        train = open_dataset(config["data"], generator.size, config["split"], config["object"])
        self.train = train.subset(train.defective()).tensors()
        names = [args.defect] if args.defect else generator.classes[1:]
        found = {k: (self.train[1] == k).flatten(1).any(1) for k in map(generator.classes.index, names)}
        self.donors = {k: (self.train[0][has], self.train[1][has] == k)         # photos, where they have it
                       for k, has in found.items() if has.any()}
        files = {} if args.masks in MASKS else images_in(Path(args.masks))
        samples = [Sample(stem.removesuffix("_mask"), None, path) for (_, stem), path in files.items()]
        self.given = DefectDataset(args.masks, generator.classes, samples, channels=3)
        if not samples and args.masks not in MASKS:
            raise ValueError(f"--masks {args.masks}: expected {', '.join(MASKS)} or a folder of index masks")
        if not self.donors and args.masks == "training":
            raise ValueError(f"--defect {args.defect}: no mask that {args.run} was trained on has it")
        self.room = grown(defects(self.train[1]).any(0), min(generator.size) // 16)
        if args.where:
            where = to_mode(open_picture(args.where), 1).resize(generator.size[::-1])
            self.room = as_tensor(where)[0] >= 128

    def mask(self, name, native, photo, labelled, number, seed):
        """(mask uint8 (H, W) of the run's size or None where it has no room, its source) for one photo.

        name, native: of the photo, its size; photo: uint8 (C, H, W), None if it is to be drawn too; labelled:
        bool (H, W), the defects it has; number: the pair's, by which classes and files take turns.
        """
        random, room, size = rng(seed, PLACE), self.room & ~labelled, self.generator.size
        if self.args.masks == "training":
            k = list(self.donors)[number % len(self.donors)]
            images, shapes = self.donors[k]
            centres = room if self.args.where else room & shapes.any(0)
            i, turns = torch.randint(len(shapes), (), generator=random), self.generator.config["augment"]
            areas, on = shapes.flatten(1).sum(1), images[i] if photo is None else photo
            mask = moved(shapes[i], images[i], on, centres, room, "turn" in turns, areas, random)
            return (None if mask is None else mask.byte() * k), "training"
        if self.args.masks == "generated":
            switch_t = 0 if self.generator.plan_size != self.generator.size else SWITCH_T     # 0: the plan
            mask, source = self.generator.sample([seed], switch_t=switch_t)[1][0], "generated"
        else:
            names = [sample.name for sample in self.given.samples]
            stem = name.rpartition("/")[2]
            i = names.index(stem) if stem in names else number % len(names)
            mask, source = torch.from_numpy(self.given.read_mask(i)), str(self.given.samples[i].mask)
            if tuple(mask.shape) not in (size, native):
                raise ValueError(f"{source} is {mask.shape[0]}x{mask.shape[1]}; expected "
                                 f"{native[0]}x{native[1]}, as the photo {name}, or {size[0]}x{size[1]}")
            mask = F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
        if self.args.defect:
            mask = mask * (mask == self.generator.classes.index(self.args.defect))
        return mask if mask.any() and room[mask > 0].all() else None, source


def put_back(photo, before, after, region):
    """A photo uint8 (C, H, W) with what painting changed in its copy of (h, w), inside the region (h, w).

    The change is enlarged and added, so the photo's own grain stays; it ends at the region's border.
    """
    size = tuple(photo.shape[1:])
    share = F.interpolate(region[None, None].float(), size, mode="bilinear")[0, 0]     # at the border a half
    rows, columns = (slice(at.min(), at.max() + 1) for at in (share > 0.5).nonzero().T)
    change = F.interpolate((after.float() - before)[None], size, mode="bilinear")[0, :, rows, columns]
    change *= (2 * share[rows, columns] - 1).clamp(min=0)
    painted = photo.clone()
    painted[:, rows, columns] = (photo[:, rows, columns] + change).round().clamp(0, 255).byte()
    return painted


def steps_across(image, region):
    """Differences of neighbours of which the border of the region lies between, in grey levels: (N,)."""
    return torch.cat([image.float().diff(dim=axis).abs().mean(0)[region.diff(dim=axis)] for axis in (-1, -2)])


def seam(after, before, region):
    """Mean difference of neighbours across the region's border, over that in the photo; 1: as it was."""
    return (steps_across(after, region).mean() / steps_across(before, region).mean().clamp(min=0.5)).item()


class Painter:
    """Paints wished defects into photos and says how well: see paint_pairs."""

    def __init__(self, args, generator):
        self.generator, self.min_fit, self.side = generator, args.min_fit, min(generator.size) // 4
        self.photos = open_photos(args, generator) if args.photos else None
        self.wishes = Wishes(args, generator)
        self.judge = None
        if args.judge:
            self.judge, saved = load_segmenter(args.judge, generator.device)
            if tuple(saved["classes"]) != generator.classes:
                raise ValueError(f"--judge {args.judge} knows {', '.join(saved['classes'])}, but {args.run} "
                                 f"draws {', '.join(generator.classes)}")
        self.crops = defect_crops(*self.wishes.train, self.side)    # novelty is in units of their distances
        among = distances(self.crops, self.crops, halved).fill_diagonal_(math.inf)
        self.unit = among.amin(1).median().nan_to_num(posinf=math.nan)      # nan: there is but one

    def read(self, seed, n, size=None):
        """(name, photo, its mask) for try n of a seed; without --photos a black one of the run's size."""
        if self.photos:
            i = (seed + n) % len(self.photos)
            return self.photos.samples[i].name, *self.photos.read(i, size)
        black = torch.zeros(self.generator.config["channels"], *self.generator.size, dtype=torch.uint8)
        return "", black, torch.zeros_like(black[0])

    def paint(self, before, old, mask, seed):
        """(image, region) of a photo of the run's size with the mask `old`, to which a defect's is added."""
        region = old == 0
        if self.photos:
            region &= grown(mask > 0, min(mask.shape) // 32)
        return self.generator.paint(before[None], (old + mask)[None], region[None], [seed])[0], region

    def attempt(self, seed, n):
        """(photo, mask, record) of try n, native; or a few words why there is none."""
        name, photo, labels = self.read(seed, n)
        _, before, old = self.read(seed, n, self.generator.size)
        own = seed + RETRY * n
        photo_seen = before if self.photos else None
        mask, source = self.wishes.mask(name, tuple(labels.shape), photo_seen, old > 0, seed, own)
        if mask is None:
            return "no room"
        after, region = self.paint(before, old, mask, own)
        crop = defect_crops(after[None], mask[None], self.side)
        record = {"photo": name, "mask": source, "seed": own, "tries": n + 1,
                  "novelty": (distances(crop, self.crops, halved).min() / self.unit).item()}
        if self.photos:
            record["seam"] = seam(after, before, region)
        if self.judge:
            record["fit"] = mask_fit(self.judge(after[None]), mask[None])[0].item()
        if record.get("seam", 0) > MAX_SEAM or record.get("fit", 1) < self.min_fit:
            return "low score"
        wide = F.interpolate(mask[None, None], tuple(labels.shape), mode="nearest-exact")[0, 0]
        if not wide.any():
            return "below a pixel"
        at = wide.nonzero()
        record["box"] = [*at.amin(0).tolist(), *(at.amax(0) - at.amin(0) + 1).tolist()]
        return put_back(photo, before, after, region), torch.where(wide > 0, wide, labels), record


def paint_pairs(args):
    """Paint a defect into photos, one for each seed; write the pairs, source.json and scores.csv."""
    generator = open_run(args)
    painter, out = Painter(args, generator), Path(args.out or Path(args.run) / "painted")
    names = "photos", "split", "masks", "where", "judge", "min_fit", "defect"
    how = {"steps": [PAINT_STEPS, REPEATS], "guidance": [GUIDANCE, GUIDED_FROM]}
    begin(out, generator.classes, {**settings(args, names, generator), **how})
    source = out / "source.json"
    records, seeds = read_json(source) if source.exists() else {}, args.seeds or list(range(args.count))
    failed = Counter()
    for seed in tqdm([seed for seed in seeds if f"{seed:06d}" not in records], unit="pair"):
        for n in range(TRIES):
            pair = painter.attempt(seed, n)
            if not isinstance(pair, str):
                break
            failed[pair] += 1
        else:
            continue
        image, mask, records[f"{seed:06d}"] = pair
        write_pair(out, f"{seed:06d}", image, mask, PAINTED)
        write_json(source, records)
    with open(out / "scores.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["pair", *SCORES])
        table.writerows([name, *map(record.get, SCORES)] for name, record in records.items())
    said = f"; tries that failed: {dict(failed)}" if failed else ""
    if not records:
        raise ValueError(f"no defect painted in {TRIES} tries for each of {len(seeds)}{said}; see --where, "
                         "--min-fit")
    first = sorted(records)[:32] if painter.photos else []
    photos = [painter.read(int(name), records[name]["tries"] - 1, generator.size)[1] for name in first]
    write_sheet(out, open_dataset(out, generator.size), photos)
    done = sum(f"{seed:06d}" in records for seed in seeds)
    print(f"{done} of {len(seeds)} pairs painted in {out}, {out / 'sheet.png'}{said}")


def main():
    args = parse_args()
    (paint_pairs if args.paint else draw_pairs)(args)


if __name__ == "__main__":
    run_main(main)
