"""Draw image + mask pairs from a trained run and write them as a data set.

    python sample.py                                    64 pairs from runs/demo into runs/demo/samples
    python sample.py --run runs/mine --seeds 100-199 --num-steps 50
    python sample.py --run runs/mine --count 1000
    torchrun --nproc_per_node=4 -- sample.py --run runs/mine --count 1000       each process draws every fourth of what is missing

A picture is a function of its seed: 000017.png is the same alone or in a batch. Pairs that are already there are skipped, so an
interrupted command is simply run again.
"""
import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from datasets import (check_compiler, overlay, pair_paths, pick_device, read_image, read_json, read_mask, run_main, sheet, world,
                      write_classes, write_image, write_json, write_pair)
from defect_gen import SWITCH_T, DefectGen
from unet import check_size

KIND = "generated"      # one folder for all: a pair's classes are in its mask


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
    args = parser.parse_args(argv)
    if args.count < 1 or args.batch_size < 1 or args.num_steps < 1:
        raise ValueError("--count, --batch-size and --num-steps must be at least 1")
    return args


def draw_pairs(args):
    """Draw the pairs that --out lacks and write them, then a contact sheet of the first 32. Processes of torchrun share the seeds out."""
    rank, processes = world()
    seeds = parse_seeds(args.seeds) if args.seeds else list(range(args.count))
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
                    weights=generator.fingerprint)
    if (out / "config.json").exists() and read_json(out / "config.json") != settings:
        raise ValueError(f"{out} holds pairs drawn with other settings or weights (see its config.json); choose another --out or remove that folder")
    missing = [s for s in seeds if not all(p.exists() for p in pair_paths(out, f"{s:06d}", KIND))]
    if processes > 1:                                                           # from here all know what is missing, and none has begun
        dist.init_process_group("gloo", timeout=timedelta(days=30))             # only to wait for each other at the end, however long
    if rank == 0:
        write_classes(out, generator.classes)
        write_json(out / "config.json", settings)
        print(f"settings: {settings}")
        if len(missing) < len(seeds):
            print(f"{len(seeds) - len(missing)} of {len(seeds)} pairs are there already")

    draw_missing(generator, missing[rank::processes], out, size, args, quiet=rank > 0)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        finish(generator, seeds, out, args.run)


def draw_missing(generator, seeds, out, size, args, quiet):
    """Draw and write pairs, batch by batch; the pictures of one batch are compressed and written while the next is drawn."""
    batch_size, start, writing = args.batch_size, 0, []
    with tqdm(total=len(seeds), unit="pair", disable=quiet) as bar, ThreadPoolExecutor(2) as pool:
        while start < len(seeds):
            chunk = seeds[start:start + batch_size]
            try:
                pairs = generator.sample(chunk, args.num_steps, args.sampler, args.spacing, args.switch_t, size, batch_size)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size = (batch_size + 1) // 2
                print(f"the device's memory is full: going on with {batch_size} pairs at a time")
                continue
            for written in writing:
                written.result()                                                # a full disk is reported here
            writing = [pool.submit(write_pair, out, f"{seed:06d}", image, mask, KIND) for seed, image, mask in zip(chunk, *pairs)]
            start += len(chunk)
            bar.update(len(chunk))
        for written in writing:
            written.result()


def finish(generator, seeds, out, run):
    """The contact sheet of the first 32 pairs, and what to do next."""
    first = [pair_paths(out, f"{s:06d}", KIND)[:2] for s in seeds[:32]]
    pairs = [(read_image(i, generator.config["channels"]), read_mask(m, generator.classes)) for i, m in first]
    rows = []
    for start in range(0, len(pairs), 8):
        rows += [("image", [i for i, _ in pairs[start:start + 8]]), ("mask", [overlay(i, m) for i, m in pairs[start:start + 8]])]
    write_image(out / "sheet.png", sheet(rows, classes=generator.classes))
    print(f"{len(seeds)} pairs in {out}, contact sheet {out / 'sheet.png'}")
    print(f"next: python evaluate.py --run {run}")


if __name__ == "__main__":
    run_main(lambda: draw_pairs(parse_args()))
