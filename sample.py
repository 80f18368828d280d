"""Draw image + mask pairs from a trained run and write them as a data set.

    python sample.py                                    64 pairs from runs/demo into runs/demo/samples
    python sample.py --run runs/mine --seeds 100-199 --num-steps 50
    python sample.py --run runs/mine --count 1000
    python sample.py --run runs/mine --count 50 --kind crack --min-area-px 20        draws until 50 pairs have what is wished for
    torchrun --nproc_per_node=4 -- sample.py --run runs/mine --count 1000       each process draws every fourth of what is missing

A picture is a function of its seed: 000017.png is the same alone or in a batch. Pairs that are already there are skipped, so an
interrupted command is simply run again. Ctrl-C and SIGTERM let the pairs that are being written become whole.
"""
import argparse
import math
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from datasets import (check_compiler, data_options, has_bf16, interruptible, open_dataset, overlay, pair_paths, pick_device, read_image, read_json,
                      read_mask, remove_leftovers, run_main, same_command, sheet, world, write_classes, write_image, write_json, write_pair)
from defect_gen import SWITCH_T, DefectGen, open_training
from metrics import COPY_BELOW, mask_fit, novelty, variants
from segment import build, fit, predict
from unet import check_size

KIND = "generated"      # one folder for all: a pair's classes are in its mask
WISHES = "kind", "no_empty", "min_area_px", "max_area_px", "min_novelty", "min_fit"
FIT_STEPS = 300         # of the segmenter that judges masks
LEFT_S = 3600           # a temporary file this old is nobody's any more; younger ones may be another process's


def parse_seeds(text):
    """'0-3,8' -> [0, 1, 2, 3, 8]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds {text}: expected seeds and ranges from low to high, like 0-63 or 1,5,10-20")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


def parse_args(argv=None):
    """The flags, checked."""
    parser = argparse.ArgumentParser(description="Draw image + mask pairs from a trained run.")
    parser.add_argument("--run", default="runs/demo", help="run folder with both stages (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, help="how many pairs: seeds 0 .. COUNT-1 (default: %(default)s)")
    parser.add_argument("--seeds", help="draw these instead: ranges and numbers, like 0-63 or 1,5,10-20")
    parser.add_argument("--num-steps", type=int, default=20, help="network calls per picture (default: %(default)s)")
    parser.add_argument("--sampler", default="dpm++", choices=["dpm++", "ddim", "ddpm"], help="default: %(default)s")
    parser.add_argument("--spacing", default="logsnr", choices=["logsnr", "quadratic", "even"],
                        help="of the timesteps (default: %(default)s)")
    parser.add_argument("--switch-t", type=int, default=SWITCH_T,
                        help="the large network owns t >= SWITCH_T; with a run of --t-range full 0 is large alone, 1000 small alone (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="default: the size trained at")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs drawn at a time, fewer if the device's memory is too small "
                        "(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the networks first: pays for many pairs on a GPU")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--out", help="data set to write (default: RUN/samples)")
    wanted = parser.add_argument_group("keep only some pairs", "With these --count pairs are kept, of as many as that takes; what was dropped is "
                                       "counted and stays in OUT/dropped.json, so that the same command goes on where it stopped.")
    wanted.add_argument("--kind", metavar="CLASS", help="whose mask has this class")
    wanted.add_argument("--no-empty", action="store_true", help="whose mask is not empty")
    wanted.add_argument("--min-area-px", type=int, default=0, metavar="N", help="with at least so many pixels of --kind, or else of all defects")
    wanted.add_argument("--max-area-px", type=int, metavar="N", help="with at most so many")
    wanted.add_argument("--min-novelty", type=float, metavar="X", help=f"at least so new: 0 is a copy of a training image, 1 as new as a held-out photo; "
                        f"{COPY_BELOW} drops what the report calls a copy")
    wanted.add_argument("--min-fit", type=float, metavar="X", help="whose mask fits its image: IoU, 0 to 1, with what a segmenter sees that was "
                        "trained on the run's training images")
    wanted.add_argument("--max-draws", type=int, metavar="N", help="give up after so many (default: 50 for each of --count)")
    args = parser.parse_args(argv)
    if args.count < 1 or args.batch_size < 1 or args.num_steps < 1:
        raise ValueError("--count, --batch-size and --num-steps must be at least 1")
    for name, value in (("min-novelty", args.min_novelty), ("min-fit", args.min_fit)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name} is {value}, but must be above 0 and at most 1")
    if args.max_area_px is not None and not args.min_area_px <= args.max_area_px:
        raise ValueError(f"--min-area-px {args.min_area_px} is more than --max-area-px {args.max_area_px}")
    if args.max_draws is not None and args.max_draws < 1:
        raise ValueError(f"--max-draws is {args.max_draws}, but must be at least 1")
    wishes = {name: getattr(args, name) for name in WISHES}
    args.wishes = {name: value for name, value in wishes.items() if value or (name, value) == ("max_area_px", 0)}
    return args


# --- which pairs are kept ---

class Judge:
    """Says of pairs why they are not wanted: judge(images, masks) -> a list of reasons, None for those that are.

    Copies and masks are judged beside the images that the run was trained on, which must be where they were.
    """

    def __init__(self, wishes, generator, run, size):
        self.classes, self.wishes, config = generator.classes, wishes, generator.config
        kind = wishes.get("kind")
        if kind is not None and kind not in self.classes[1:]:
            raise ValueError(f"--kind {kind}: {run} draws {', '.join(self.classes[1:])}")
        if "min_novelty" in wishes or "min_fit" in wishes:
            train = open_training(run, config, size)
        if "min_novelty" in wishes:
            self.training, _ = variants(*train.subset(train.defective()).tensors(), config["augment"])
            test = open_dataset(config["data"], size, "test", **data_options(config))
            if not test.defective():
                raise ValueError(f"--min-novelty compares with held-out photos, but the split test of {config['data']} has none with a defect")
            self.held_out, _ = test.subset(test.defective()).tensors()
        if "min_fit" in wishes:
            print(f"training a segmenter on {len(train)} images, {FIT_STEPS} steps, to judge the masks")
            self.segmenter = build("deeplabv3+", len(self.classes)).to(generator.device)
            fit(self.segmenter, *train.tensors(), FIT_STEPS, bf16=has_bf16(generator.device), progress=True)

    def __call__(self, images, masks):
        """images uint8 (N, C, H, W), masks uint8 (N, H, W)."""
        kind, least, most = self.wishes.get("kind"), self.wishes.get("min_area_px", 0), self.wishes.get("max_area_px", math.inf)
        hits = masks > 0 if kind is None else masks == self.classes.index(kind)
        areas, empty = hits.flatten(1).sum(1), ~(masks > 0).flatten(1).any(1)
        checks = [("without " + str(kind), (areas == 0) & (kind is not None)), ("empty", empty & ("no_empty" in self.wishes)),
                  (f"below {least} px", areas < least), (f"above {most} px", areas > most)]
        if "min_novelty" in self.wishes:
            checks.append(("copies", novelty(images, self.training, self.held_out) < self.wishes["min_novelty"]))
        if "min_fit" in self.wishes:
            checks.append(("whose mask does not fit", ~(mask_fit(predict(self.segmenter, images), masks) >= self.wishes["min_fit"])))
        return [next((reason for reason, failed in checks if failed[i]), None) for i in range(len(masks))]


# --- drawing ---

def draw_pairs(args):
    """Draw the pairs that --out lacks and write them, then a contact sheet of the first 32. Processes of torchrun share the seeds out.

    Returns None, or 128 + the number of the signal that ended it early, which is a command's exit status.
    """
    rank, processes = world()
    if args.wishes and processes > 1:
        raise ValueError(f"--{next(iter(args.wishes)).replace('_', '-')} draws until enough pairs are wanted, seed by seed: use one process, not torchrun")
    seeds = parse_seeds(args.seeds) if args.seeds else list(range((args.max_draws or 50 * args.count) if args.wishes else args.count))
    generator = DefectGen.load(args.run, pick_device(args.device))
    if args.compile:
        check_compiler()
        generator.large.compile()
        generator.small.compile()
    size = tuple(args.size or generator.size)
    check_size(*size, depth=max(generator.large.depth, generator.small.depth))
    out = Path(args.out or Path(args.run) / "samples")
    generator.steps(args.num_steps, args.spacing, args.switch_t)          # refuses what does not go, before writing
    settings = dict(num_steps=args.num_steps, sampler=args.sampler, spacing=args.spacing, switch_t=args.switch_t, size=list(size),
                    weights=generator.fingerprint, **args.wishes)
    if (out / "config.json").exists() and read_json(out / "config.json") != settings:
        raise ValueError(f"{out} holds pairs drawn with other settings or weights (see its config.json); choose another --out or remove that folder")
    judge = Judge(args.wishes, generator, args.run, size) if args.wishes else None
    missing = [s for s in seeds if not is_there(out, s)]
    if processes > 1:                                                           # from here all know what is missing, and none has begun
        dist.init_process_group("gloo", timeout=timedelta(days=30))             # only to wait for each other at the end, however long
    if rank == 0:
        for folder in {out, *(path.parent for path in pair_paths(out, "", KIND))}:
            remove_leftovers(folder, LEFT_S)
        write_classes(out, generator.classes)
        write_json(out / "config.json", settings)
        print(f"settings: {settings}")
        if not judge and len(missing) < len(seeds):
            print(f"{len(seeds) - len(missing)} of {len(seeds)} pairs are there already")

    with interruptible() as received:
        if judge:
            kept = draw_wanted(generator, judge, seeds, out, size, args, received)
        else:
            draw_missing(generator, missing[rank::processes], out, size, args, received, quiet=rank > 0)
    if received:
        if rank == 0:
            print(f"stopped by {signal.Signals(received[0]).name}; the pairs in {out} are whole\ncontinue: {same_command()}")
        return 128 + received[0]
    if judge:
        if kept:
            finish(generator, kept, out, args.run)
        if len(kept) < args.count and not args.seeds:
            raise ValueError(f"only {len(kept)} of --count {args.count} pairs after {len(seeds)} draws, which are kept; raise --max-draws, or wish for less")
        return
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        finish(generator, seeds, out, args.run)


def is_there(out, seed):
    return all(path.exists() for path in pair_paths(out, f"{seed:06d}", KIND))


def draw_missing(generator, seeds, out, size, args, received, quiet):
    """Draw and write pairs, batch by batch; the pictures of one batch are compressed and written while the next is drawn."""
    writing = []
    with tqdm(total=len(seeds), unit="pair", disable=quiet) as bar, ThreadPoolExecutor(2) as pool:
        for chunk, pairs in drawn_batches(generator, seeds, size, args, received):
            for written in writing:
                written.result()                                                # a full disk is reported here
            writing = [pool.submit(write_pair, out, f"{seed:06d}", image, mask, KIND) for seed, image, mask in zip(chunk, *pairs)]
            bar.update(len(chunk))
        for written in writing:
            written.result()


class Interrupted(Exception):
    """Leaves a batch that is being drawn."""


def drawn_batches(generator, seeds, size, args, received):
    """Yield (seeds, (images, masks)) of args.batch_size seeds at a time, of fewer from where the device's memory is full.

    Ends, within a batch too, when a signal is in `received`.
    """
    def on_step(*state):
        if received:
            raise Interrupted

    batch_size, start = args.batch_size, 0
    while start < len(seeds) and not received:
        chunk = seeds[start:start + batch_size]
        try:
            pairs = generator.sample(chunk, args.num_steps, args.sampler, args.spacing, args.switch_t, size, batch_size, on_step)
        except Interrupted:
            return
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = (batch_size + 1) // 2
            print(f"the device's memory is full: going on with {batch_size} pairs at a time")
            continue
        yield chunk, pairs
        start += len(chunk)


def draw_wanted(generator, judge, seeds, out, size, args, received):
    """Draw seed by seed until --count pairs are wanted, or the --seeds end; write those and return their seeds.

    What was decided before is not drawn again: a pair is there, or its seed is in OUT/dropped.json with the reason.
    """
    path, count = out / "dropped.json", len(seeds) if args.seeds else args.count
    dropped = read_json(path) if path.exists() else {}
    kept = [seed for seed in seeds if is_there(out, seed)][:count]
    undecided = [seed for seed in seeds if str(seed) not in dropped and not is_there(out, seed)] if len(kept) < count else []
    with tqdm(total=count, initial=len(kept), unit="pair") as bar:
        for chunk, (images, masks) in drawn_batches(generator, undecided, size, args, received):
            for seed, image, mask, reason in zip(chunk, images, masks, judge(images, masks)):
                if len(kept) == count:
                    break
                if reason:
                    dropped[str(seed)] = reason
                else:
                    write_pair(out, f"{seed:06d}", image, mask, KIND)
                    kept.append(seed)
                    bar.update()
            write_json(path, dropped)
            if len(kept) == count:
                break
    decided = seeds[:1 + max(map(seeds.index, kept))] if len(kept) == count else seeds
    reasons = Counter(dropped[str(seed)] for seed in decided if str(seed) in dropped)
    drawn = len(kept) + sum(reasons.values())
    print(f"{len(kept)} of {drawn} pairs wanted ({100 * len(kept) / max(1, drawn):.0f} %), dropped: "
          + (", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "none"))
    return kept


def finish(generator, seeds, out, run):
    """The contact sheet of the first 32 pairs, and what to do next."""
    first = [pair_paths(out, f"{s:06d}", KIND)[:2] for s in seeds[:32]]
    pairs = [(read_image(i, generator.config["channels"]), read_mask(m, generator.classes)) for i, m in first]
    rows = []
    for start in range(0, len(pairs), 8):
        rows += [("image", [i for i, _ in pairs[start:start + 8]]), ("mask", [overlay(i, m) for i, m in pairs[start:start + 8]])]
    write_image(out / "sheet.png", sheet(rows, classes=generator.classes))
    print(f"{len(seeds)} pairs in {out}, contact sheet {out / 'sheet.png'}")
    if out == Path(run) / "samples":
        print(f"next: python evaluate.py --run {run}")


if __name__ == "__main__":
    run_main(lambda: draw_pairs(parse_args()))
