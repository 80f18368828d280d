"""Train one stage of Defect-Gen on a handful of photos with masks.

    python train.py --stage large                       the drawn pill, minutes on two CPU cores
    python train.py --stage small
    python train.py --stage large --data FOLDER --out runs/mine --size 256 256 --preset paper
    python train.py --stage large --resume --steps 20000            continue: the same flags, and a higher step count
    torchrun --nproc_per_node=4 train.py --stage large ...          one process per GPU; --batch-size is that of all together

Everything random is a function of (seed, step), so a resumed run continues bit for bit where it stopped (on a CPU). How many
processes or micro-batches share a step's batch changes nothing but the rounding, so either may be another one after --resume.
"""
import argparse
import csv
import math
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, nullcontext, redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets import (MEMORY_LIMIT, add_data_flags, augment, check_compiler, claimed, data_options, describe, has_bf16, ignore_signals,
                      interruptible, open_dataset, overlay, pick_device, read_names, remove_leftovers, run_main, same_command, sheet, world,
                      write_atomically, write_image, write_json)
from defect_gen import STAGES, SWITCH_T, checkpoints, decode, encode, load_stage, save_stage
from diffusion import q_sample, rng, sample, schedule, timesteps, to_x_start, training_loss
from unet import LARGE, SMALL, Block, UNet, check_size, count_parameters, receptive_field

PRESETS = {
    # 64x64 on two CPU cores in minutes: demo, tests and teaching. fp32, for in so narrow networks casting costs more than bf16 saves
    "tiny": dict(size=(64, 64), steps=900, batch_size=4, lr=1e-3, weight_decay=0.0, ema=0.995, warmup=50, save_every=450, bf16=False,
                 t_range="own",
                 large=dict(channels=32, multipliers=(1, 1, 2, 4), num_res_blocks=1, attention_levels=(3,), middle=True),
                 small=dict(channels=32, multipliers=(1, 2), num_res_blocks=1, attention_levels=(), middle=False)),
    # the released configuration (its yaml files): 256x256, AdamW 1e-4, weight decay 0.002, batch 2, 160k steps, EMA 0.9999
    "paper": dict(size=(256, 256), steps=160_000, batch_size=2, lr=1e-4, weight_decay=0.002, ema=0.9999, warmup=0, save_every=10_000,
                  t_range="full", large=LARGE, small=SMALL),
}
T_MARGIN = 50                   # own timesteps reach this far beyond SWITCH_T: the switch may be moved a little when sampling
LOG_EVERY = 10                  # steps between readings of the loss: each one waits for the device
STUCK_AFTER = 500               # steps after which the loss must have moved; a run that learns has less than half of its first loss by then
QUARTERS = ["loss_q1", "loss_q2", "loss_q3", "loss_q4"]         # loss by quarter of [0, T): which steps a stage is good at
COLUMNS = ["step", "loss", *QUARTERS, "lr", "images_per_s", "grad_norm"]        # grad_norm: of this step, before it is clipped to 1


def number_or_auto(text):
    """The value of --batch-size."""
    if text != "auto" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return text if text == "auto" else int(text)


def parse_args(argv=None):
    """The flags, checked; those left out take the value of the preset."""
    parser = argparse.ArgumentParser(description="Train one stage of Defect-Gen.", epilog="Flags left out take the preset's value.")
    parser.add_argument("--stage", required=True, choices=STAGES, help="which of the two networks")
    add_data_flags(parser, split="train")
    parser.add_argument("--out", default="runs/demo", help="run folder; this stage writes to OUT/<stage> (default: %(default)s)")
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="default values of the flags below (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="images are resized to this")
    parser.add_argument("--steps", type=int, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=number_or_auto, help="images per step, of all processes and micro-batches together; "
                        "auto: try which power of two fills the GPU, times processes and micro-batches")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each step in N micro-batches, one after the "
                        "other: the same step in less memory (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="keep fewer activations and compute them again for the gradient: "
                        "the same step in less memory and more time")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile: minutes at the start, faster steps")
    parser.add_argument("--lr", type=float, help="learning rate of AdamW")
    parser.add_argument("--augment", type=read_names, default=[], metavar="NAMES", help="change images and masks at random: some of "
                        "flip,turn,crop, where the product may lie that way (default: none)")
    parser.add_argument("--depth", type=int, choices=range(7), metavar="N", help="down-samplings of the network: fewer see less of the "
                        "image (python unet.py prints how much; default: the preset's)")
    parser.add_argument("--norm", default="group", choices=["group", "local"], help="of the network: GroupNorm, or one of each pixel by itself, "
                        "which keeps what lies outside the receptive field out (default: %(default)s)")
    parser.add_argument("--target", default="x0", choices=["x0", "eps", "v"], help="what the network predicts (default: %(default)s)")
    parser.add_argument("--t-range", choices=["own", "full"], help="timesteps to train at: all, or the stage's own side of the switch at "
                        f"{SWITCH_T} and {T_MARGIN} beyond it; full allows any --switch-t when sampling")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, noise and timesteps (default: %(default)s)")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints with a picture of samples")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints to keep (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision (default: the preset's, else by device)")
    parser.add_argument("--deterministic", action="store_true", help="only algorithms that give the same bits twice: slower on a GPU, "
                        "nothing new on a CPU")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in OUT/<stage>")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None and name not in STAGES:
            setattr(args, name, value)
    for name in ("steps", "batch_size", "accumulate", "save_every", "keep", "lr"):
        if getattr(args, name) != "auto" and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be above 0")
    return args


# --- data ---

def order(num_images, start, count, seed):
    """Positions start .. start + count - 1 of an endless stream of shuffled epochs: every image comes up equally often."""
    positions = range(start, start + count)
    epochs = {p // num_images: None for p in positions}
    shuffled = {e: torch.randperm(num_images, generator=rng(seed, 1, e)).tolist() for e in epochs}
    return [shuffled[p // num_images][p % num_images] for p in positions]


def decoded_bytes(dataset):
    """What all images and masks take as uint8."""
    return len(dataset) * (dataset.channels + 1) * math.prod(dataset.size)


def batches(dataset, first_step, steps, batch_size, seed, device, share=slice(None)):
    """Yield the slice `share` of each step's (images, masks) on the device. Small data are kept there, workers load larger ones."""
    def indices():
        for step in range(first_step, steps):
            yield order(len(dataset), step * batch_size, batch_size, seed)[share]

    size = decoded_bytes(dataset)
    if size <= MEMORY_LIMIT:
        print(f"data: {len(dataset)} images, {size / 2**20:.1f} MiB decoded once and kept on {device} (limit {MEMORY_LIMIT >> 30} GiB)")
        images, masks = (part.to(device) for part in dataset.tensors())
        yield from ((images[index], masks[index]) for index in indices())
    else:
        print(f"data: {len(dataset)} images, {size / 2**30:.1f} GiB, loaded by worker processes (limit {MEMORY_LIMIT >> 30} GiB)")
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=list(indices()), num_workers=min(4, os.cpu_count()),
                                             pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
        yield from ([part.to(device, non_blocking=True) for part in batch] for batch in loader)


def augment_each(images, masks, names, seed, step, first):
    """augment, with a generator for each image by its place in the whole batch, of which these begin at `first`."""
    places = range(first, first + len(images))
    pairs = [augment(i[None], m[None], names, rng(seed, 4, step, place)) for i, m, place in zip(images, masks, places)]
    return [torch.cat(parts) for parts in zip(*pairs)]


# --- pictures while training ---

def preview(net, stage, config, images, masks, device, alphas_cumprod):
    """A sheet of 8 samples of this stage's EMA weights, from fixed seeds.

    The large stage draws from noise, as far down as it was trained. The small one is only ever used below switch_t: it denoises
    training images from there.
    """
    def denoise(x_t, t):
        with torch.autocast(device.type, torch.bfloat16, enabled=config["bf16"]):
            output = net(x_t, t)
        return to_x_start(output.float(), x_t, t, alphas_cumprod, config["target"])

    num_classes = len(config["classes"])
    start = encode(images, masks, num_classes)
    noise = torch.randn(start.shape, generator=rng(config["seed"], 3)).to(device)
    steps = [t for t in timesteps(config["T"], 20, "logsnr", alphas_cumprod) if t >= config["t_range"][0]]
    if stage == "small":
        steps = [t for t in steps if t < SWITCH_T]
        noise = q_sample(start, torch.full((len(start),), steps[0], device=device), noise, alphas_cumprod)
    drawn, drawn_masks = (part.cpu() for part in decode(sample(denoise, noise, steps, alphas_cumprod), num_classes))
    rows = [("image", list(drawn)), ("mask", [overlay(i, m) for i, m in zip(drawn, drawn_masks)])]
    if stage == "small":
        rows.insert(0, (f"t={steps[0]}", list(decode(noise, num_classes)[0].cpu())))
    return sheet(rows, classes=config["classes"])


# --- memory and many devices ---

def recompute_activations(net):
    """Let each block keep its inputs only and compute the rest again for the gradient. A copy made later would use net's weights."""
    for module in net.modules():
        if isinstance(module, Block):
            module.forward = partial(torch.utils.checkpoint.checkpoint, module.forward, use_reentrant=False)


def largest_batch(attempt):
    """The largest power of two for which attempt(size), and all before it, did not raise torch.OutOfMemoryError."""
    size = 1
    try:
        while True:
            attempt(size)
            size *= 2
    except torch.OutOfMemoryError:
        if size == 1:
            raise ValueError("--batch-size auto: not even one image fits into the memory; lower --size or try --checkpointing") from None
    return size // 2


def probe_batch(net, image_losses, channels, size, device):
    """How many images (channels, *size) a step can take at once, found by trying; the same in all processes."""
    if device.type != "cuda":
        raise ValueError(f"--batch-size auto tries out the memory of a CUDA device, but the device is {device}; give a number")

    def attempt(count):
        x_start = torch.zeros(count, channels, *size, device=device)
        image_losses(net, x_start, torch.zeros(count, dtype=torch.int64, device=device), x_start).mean().backward()

    torch.cuda.set_per_process_memory_fraction(0.8)                 # headroom: AdamW's averages come with the first step
    count = torch.tensor(largest_batch(attempt), device=device)
    torch.cuda.set_per_process_memory_fraction(1.0)
    net.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    if world()[1] > 1:
        dist.all_reduce(count, dist.ReduceOp.MIN)
    return count.item()


# --- the loop ---

def prepare(args):
    """Open the data and settle the configuration; what can be wrong with flags and data is found out before the first step."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")             # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    device = pick_device(args.device)
    if args.compile:
        check_compiler()
    dataset = open_dataset(args.data, tuple(args.size), args.split, **data_options(args))
    print(describe(dataset))
    defects = dataset.defective()
    if not defects:
        raise ValueError(f"--data {args.data}, split {args.split}: only products without defects; there is nothing to learn to draw")
    dataset = dataset.subset(defects)
    network = dict(PRESETS[args.preset][args.stage], norm=args.norm)
    if args.depth is not None:                                      # wider levels first, then more of the widest
        widths = network["multipliers"]
        network["multipliers"] = (widths + widths[-1:] * args.depth)[:args.depth + 1]
    check_size(*args.size, depth=len(network["multipliers"]) - 1)
    if decoded_bytes(dataset) > MEMORY_LIMIT:
        dataset.check()                                             # smaller data are decoded, and so checked, as a whole
    bf16 = has_bf16(device) if args.bf16 is None else args.bf16
    config = dict(vars(args), size=list(args.size), classes=list(dataset.classes), channels=dataset.channels, T=1000,
                  schedule="cosine", bf16=bf16, device=str(device), images=[s.name for s in dataset.samples])
    own = {"large": [SWITCH_T - T_MARGIN, config["T"]], "small": [0, SWITCH_T + T_MARGIN]}
    config["t_range"] = own[args.stage] if args.t_range == "own" else [0, config["T"]]
    del config["resume"]
    return dataset, device, network, config


def restore(folder, args, config, net, ema, optimizer):
    """Load the newest whole checkpoint into the three; return its step and totals. Settings that shape the weights must be the same."""
    checkpoint = load_stage(folder, args.stage)
    free = ("steps", "save_every", "keep", "device", "bf16", "out", "data", "skip_bad", "images", "accumulate", "checkpointing", "compile",
            "deterministic")
    old = {"t_range": [0, config["T"]], "norm": "group", **checkpoint["config"]}     # once, there was no choice
    if config["batch_size"] == "auto":
        config["batch_size"] = old["batch_size"]                    # as it was found at the start
    if old["images"] != config["images"]:                           # the folder may have moved, its images must be the same
        raise ValueError(f"{folder} was trained on {len(old['images'])} images and --data {args.data}, split {args.split}, now names "
                         f"{len(config['images'])}, not the same ones; use the old data, or another --out")
    changed = [f"{k} was {old.get(k)} and is {config[k]}" for k in config if k not in free and old.get(k) != config[k]]
    if changed:
        raise ValueError(f"{folder}: cannot resume with other settings: {'; '.join(changed)}. Use the old ones, or another --out")
    net.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, state in optimizer.state.items():                # fused AdamW reads them in the order of memory, which must be one
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.empty_like(parameter).copy_(state[name])
    return checkpoint["step"], checkpoint.get("totals")


def read_log(path):
    """The whole rows of a log.csv; a killed process may have left half of one."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and (row.get("step") or "").isdecimal()]


def open_log(path, first_step):
    """log.csv with the rows up to first_step kept: a resumed run leaves neither gaps nor doubles."""
    def write(temporary):
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= first_step)

    rows = read_log(path)
    write_atomically(path, write)
    return path.open("a", newline="")


def is_stuck(rows):
    """Whether the loss of the last 100 steps is still above nine tenths of the first one in the log; not known without the beginning."""
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    recent = [loss for step, loss in zip(steps, losses) if step > steps[-1] - 100]
    return steps[0] <= LOG_EVERY and sum(recent) / len(recent) > 0.9 * losses[0]


def other_stage(args, stage):
    """The flags that train the other stage on the same images."""
    flags = {"stage": stage, "data": args.data, "object": args.object, "layout": args.layout, "split": args.split, "fit": args.fit,
             "out": args.out, "preset": args.preset, "target": args.target, "t-range": args.t_range}
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))] + [
        "--size", *map(str, args.size)] + ["--skip-bad"] * args.skip_bad


def train(args):
    """Train args.stage to args.steps, from the start or from its newest whole checkpoint; see parse_args.

    Returns None, or 128 + the number of the signal that ended it early with a checkpoint, which is a command's exit status.
    """
    with ExitStack() as held:                                       # the folder, the signals and the log, given back however this ends
        return train_stage(args, held)


def train_stage(args, held):
    rank, processes = world()
    dataset, device, network, config = prepare(args)
    folder = Path(args.out) / args.stage
    begun = folder.is_dir()
    if rank == 0 and begun:                                         # before its checkpoints are looked at
        held.enter_context(claimed(folder))
    if not args.resume and checkpoints(folder):
        raise ValueError(f"{folder} already holds {checkpoints(folder)[-1].name}: --resume continues it, another --out starts a new run")
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(args.seed)                                    # initial weights only; the steps have streams of their own
    # channels last is the faster layout, but for GroupNorm's backward pass in bf16 on CPUs, which is ten times slower so
    layout = torch.contiguous_format if config["bf16"] and device.type == "cpu" else torch.channels_last
    net = UNet(dataset.channels + len(dataset.classes), **network).to(device, memory_format=layout)
    ema = deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    first_step, totals = restore(folder, args, config, net, ema, optimizer) if args.resume else (0, None)
    alphas_cumprod = schedule(config["T"], config["schedule"])

    def image_losses(model, x_start, t, noise):
        with torch.autocast(device.type, torch.bfloat16, enabled=config["bf16"]):
            return training_loss(model, x_start, t, noise, alphas_cumprod, args.target)

    if args.checkpointing:
        recompute_activations(net)
    if config["batch_size"] == "auto":
        count = probe_batch(net, image_losses, dataset.channels + len(dataset.classes), args.size, device)
        config["batch_size"] = count * args.accumulate * processes
        print(f"--batch-size auto: {config['batch_size']}")
    batch_size, parts = config["batch_size"], processes * args.accumulate
    if batch_size % parts:
        advice = ("a resumed run keeps its batch size, so change one of these" if first_step else
                  f"use a multiple of {parts}, like {math.ceil(batch_size / parts) * parts}")
        raise ValueError(f"--batch-size {batch_size} does not divide into {parts} equal parts (processes: {processes}, micro-batches of "
                         f"each: {args.accumulate}); {advice}")
    share = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)         # this process's part of each batch
    if args.compile:
        net.compile()                                               # in place: the names of the weights stay
    model = DistributedDataParallel(net) if processes > 1 else net

    field = receptive_field(net)
    print(f"{args.stage}: {count_parameters(net) / 1e6:.2f} M parameters, receptive field "
          f"{'the whole image' if field == math.inf else f'{field} px'}, images {args.size[0]}x{args.size[1]}, "
          f"{len(dataset.classes)} classes, {device}, {'bf16' if config['bf16'] else 'fp32'}")
    if args.stage == "small" and field >= max(args.size) and rank == 0:
        print(f"warning: the small network sees the whole image ({field} px): it can memorise it; use larger images", file=sys.stderr)
    if first_step >= args.steps:
        print(f"{folder} has {first_step} steps already; raise --steps to go on")
        return
    if rank == 0:
        if not begun:                                               # a refused command leaves no folder behind
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(claimed(folder))
        remove_leftovers(folder)
        for path in checkpoints(folder):
            if int(path.stem.split("_")[1]) > first_step:           # damaged, or it had been loaded: --keep must not count it
                path.rename(f"{path}.damaged")
        write_json(folder / "config.json", config)

    eight = dataset.subset([i * len(dataset) // 8 for i in range(8)]).tensors()     # for the small stage's previews
    parameters, averaged = list(net.parameters()), list(ema.parameters())
    # loss sums and counts by quarter of [0, T) since the last row of the log, from all processes once they are in the checkpoint
    totals = torch.zeros(2, 4, device=device) if totals is None or rank > 0 else totals.to(device)
    log = held.enter_context(open_log(folder / "log.csv", first_step) if rank == 0 else open(os.devnull, "w"))
    writer = csv.writer(log)
    received = held.enter_context(interruptible())
    bar = tqdm(total=args.steps, initial=first_step, unit="step", desc=args.stage, mininterval=1, disable=rank > 0)
    clock, last = time.perf_counter(), first_step
    for step, (images, masks) in enumerate(batches(dataset, first_step, args.steps, batch_size, args.seed, device, share), first_step):
        if args.augment:
            images, masks = augment_each(images, masks, args.augment, args.seed, step, share.start)
        x_start = encode(images, masks, len(dataset.classes))
        random = rng(args.seed, 2, step)                            # for the whole batch: all processes draw the same and take their share
        t = torch.randint(*config["t_range"], (batch_size,), generator=random)[share].to(device)
        noise = torch.randn(batch_size, *x_start.shape[1:], generator=random)[share].to(device)
        lr = args.lr * min(1.0, (step + 1) / max(args.warmup, 1))   # never of the total: --steps can be raised later
        for group in optimizer.param_groups:
            group["lr"] = lr

        micro_batches = zip(*(part.chunk(args.accumulate) for part in (x_start, t, noise)))
        for i, (x_start, t, noise) in enumerate(micro_batches, 1):  # the processes average their gradients once, in the last
            with model.no_sync() if processes > 1 and i < args.accumulate else nullcontext():
                losses = image_losses(model, x_start, t, noise)
                (losses.mean() / args.accumulate).backward()
            totals.index_add_(1, t * 4 // config["T"], torch.stack([losses.detach(), torch.ones_like(losses)]))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step))             # warm-up: the average of 100 steps is not mostly step 0
        with torch.no_grad():                                       # or the average would keep the graph of every step
            torch._foreach_lerp_(averaged, parameters, 1 - decay)

        done = step + 1
        save = done % args.save_every == 0 or done == args.steps
        row = done % LOG_EVERY == 0 or save
        stopped = received[0] if received and processes == 1 else 0
        if row or stopped:                                          # before saving too: no checkpoint with a broken loss
            if processes > 1:
                dist.all_reduce(totals)                             # all read the same loss, so all stop where it is broken
                stopped = torch.tensor(received[0] if received else 0, device=device)
                dist.all_reduce(stopped, dist.ReduceOp.MAX)         # and all stop at the step where one was told to
                stopped = stopped.item()
            sums, counts = totals.tolist()
            loss, norm = sum(sums) / sum(counts), norm.item()
            if not math.isfinite(loss + norm):
                good = checkpoints(folder)[-1:] or ["none yet"]
                raise ValueError(f"the loss is {loss} at step {done}, learning rate {lr:g}, gradient norm {norm:g}; the last good checkpoint: "
                                 f"{good[0]}. Try a lower --lr or --no-bf16")
        if row:
            totals.zero_()
            now = time.perf_counter()
            rate = (done - last) * batch_size / (now - clock)
            clock, last = now, done
            quarters = [f"{s / c:.6f}" if c else "" for s, c in zip(sums, counts)]
            writer.writerow([done, f"{loss:.6f}", *quarters, f"{lr:g}", f"{rate:.2f}", f"{norm:.4g}"])
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.1f}")
        if rank == 0 and (save or stopped):
            log.flush()
            save_stage(folder / f"step_{done:06d}.pt", args.stage, net, ema, optimizer, done, config, totals.cpu())
            for old in checkpoints(folder)[:-args.keep]:
                old.unlink()
        if stopped and done < args.steps:
            if processes > 1:
                dist.barrier()                                      # torchrun ends all when the first has gone
            bar.close()
            print(f"stopped by {signal.Signals(stopped).name} at step {done}, checkpoint {checkpoints(folder)[-1]}\n"
                  f"continue: {same_command('--resume')}")
            return 128 + stopped
        if rank == 0 and done % STUCK_AFTER == 0:
            log.flush()
            if is_stuck(read_log(folder / "log.csv")):
                print(f"warning: the loss has not moved in {done} steps, it is {loss:.4f}; try another --lr, and look at the data with "
                      f"python datasets.py", file=sys.stderr)
        if save and rank == 0:
            picture = preview(ema, args.stage, config, *(part.to(device) for part in eight), device, alphas_cumprod)
            write_image(folder / f"samples_{done:06d}.png", picture)
            clock = time.perf_counter()
    bar.close()
    if rank > 0:
        return
    print(f"{args.stage} stage: {args.steps} steps, checkpoint {checkpoints(folder)[-1]}, "
          f"picture {folder / f'samples_{args.steps:06d}.png'}")
    other = STAGES[1 - STAGES.index(args.stage)]
    print("next:", shlex.join(["python", "sample.py", "--run", args.out] if checkpoints(Path(args.out) / other) else
                              ["python", "train.py", *other_stage(args, other)]))


def main():
    """Train alone, or as one of the processes of torchrun, of which the first speaks for all."""
    rank, processes = world()
    with redirect_stdout(open(os.devnull, "w")) if rank > 0 else nullcontext():
        status = train(parse_args())
    if processes > 1:                                               # not after an error: the others may be lost
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run_main(main)
