"""What the networks cost on this machine, each beside a reference that is timed in the same run.

    python -m experiments.speed                                   everything; size and sampling need a run
    python -m experiments.speed --part training --quick           one part, in a minute
    python -m experiments.speed --part sampling --run runs/mine

Ratios are the message: machines differ and are noisy, so the calls of a table are made in turn and medians
are compared. The tables go to OUT/speed.json.
"""
import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from datasets import open_dataset, pick_device, run_main, write_json
from defect_gen import DefectGen
from diffusion import schedule, training_loss
from evaluate import print_table, sliced_wasserstein, spread
from inspect_rules import read_json
from unet import LARGE, SMALL, Attention, Block, UNet, count_flops


# --- clock ---

def in_turn(calls, rounds, device):
    """Median seconds of each of {name: function}, called in turn, so that a noisy neighbour slows all alike.

    One call of each comes before, unmeasured. An accelerator is waited for: else the clock would measure how
    fast work is handed over.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


# --- the generator's networks, as the released code has them ---

class ReleasedAttention(Attention):
    """The released attention: all products in memory, softmax in fp32, all of it twice in training."""

    def forward(self, x):
        return checkpoint(self.plain, x, use_reentrant=False) if torch.is_grad_enabled() else self.plain(x)

    def plain(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).unbind(1)
        scale = (C // self.heads) ** -0.25
        products = torch.einsum("bhct,bhcs->bhts", q * scale, k * scale)
        weights = products.float().softmax(-1).to(v.dtype)
        return x + self.out(torch.einsum("bhts,bhcs->bhct", weights, v).reshape(B, C, H, W))


class ReleasedBlock(Block):
    """The released block: SiLU as a product."""

    def forward(self, x, emb):
        h = self.norm1(x)
        h, modulation = self.conv1(h * torch.sigmoid(h)), self.modulation(emb)[:, :, None, None]
        if modulation.shape[1] == h.shape[1]:
            h = self.norm2(h + modulation)
        else:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(h * torch.sigmoid(h))))


def released(net):
    """A copy of a UNet with the same weights that computes as the released code does."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if type(module) in (Attention, Block):
            module.__class__ = {Attention: ReleasedAttention, Block: ReleasedBlock}[type(module)]
    return net


def loss_of(net, x_start, alphas_cumprod):
    t = torch.randint(1000, (len(x_start),)).to(x_start.device)
    noise = torch.randn(x_start.shape).to(x_start.device)
    weights = torch.full(x_start.shape[1:2], 1 / x_start.shape[1], device=x_start.device)
    return training_loss(net, x_start, t, noise, alphas_cumprod, "x0", weights).mean()


def our_step(net, x_start, bf16):
    """A function that makes one optimiser step on x_start (B, C, H, W), as train.py does."""
    alphas_cumprod, ema = schedule(), copy.deepcopy(net)
    parameters, averages = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step():
        with torch.autocast(x_start.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(net, x_start, alphas_cumprod)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1e-4)
    return step


def released_step(net, x_start):
    """The same with the released code's loops over parameters and its wait for the loss."""
    alphas_cumprod, ema = schedule(), copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, foreach=False)

    def step():
        loss = loss_of(net, x_start, alphas_cumprod)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), net.parameters()):
                average.mul_(0.9999).add_(parameter, alpha=1e-4)
        loss.item()
    return step


def denoising(net, x, bf16=False):
    """A function that denoises x once."""
    @torch.inference_mode()
    def call():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            net(x, 500)
    return call


# --- the parts: each returns a table {"caption", "head", "rows"} ---

def matrix_rate(device, dtype):
    """FLOP/s of a product of square matrices, the most that the device gives to convolutions."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / in_turn({"": lambda: a @ a}, 5, device)[""]


def training(args, device):
    """A training step and a denoising call of both networks, as released and ours, in fp32 and bf16."""
    shapes = [(64, 32), (256, 2)] if device.type == "cuda" else [(64, 4), (256, 1)]
    width = {} if device.type == "cuda" else {"channels": 64}
    if args.quick:
        width, shapes = {"channels": 32}, [(64, 2)]
    rates = {"fp32": matrix_rate(device, torch.float32), "bf16": matrix_rate(device, torch.bfloat16)}
    rows = []
    for name, network in (("large", {**LARGE, **width}), ("small", {**SMALL, **width})):
        ours = UNet(7, **network).to(device, memory_format=torch.channels_last)
        theirs = released(ours)
        for side, batch in shapes:
            x, flops = torch.randn(batch, 7, side, side, device=device), batch * count_flops(ours, side, side)
            steps = {"released": released_step(theirs, x), "fp32": our_step(ours, x, bf16=False),
                     "bf16": our_step(ours, x, bf16=True)}
            calls = {"released": denoising(theirs, x), "fp32": denoising(ours, x),
                     "bf16": denoising(ours, x, bf16=True)}
            for what, functions, passes in (("train", steps, 3), ("denoise", calls, 1)):
                s = in_turn(functions, args.rounds, device)
                best = min("fp32", "bf16", key=s.get)
                share = passes * flops / s[best] / rates[best]
                ratios = [f"{1000 * s[way]:.0f} ({s['released'] / s[way]:.2f}x)" for way in ("fp32", "bf16")]
                rows.append([f"{name}, {side}x{side}, {batch}", what, f"{1000 * s['released']:.0f}", *ratios,
                             f"{100 * share:.0f} %"])
    return {"caption": f"Networks of {network['channels']} channels, ms (speed-up over the released code); "
                       f"products of matrices: {rates['fp32'] / 1e9:.0f} GFLOP/s, bf16 "
                       f"{rates['bf16'] / 1e9:.0f}", "rows": rows,
            "head": ["network, size, batch", "call", "released", "fp32", "bf16", "share of that"]}


def size(args, device):
    """Pairs of one run, larger and larger: seconds and peak memory of `python sample.py` of its own."""
    generator, rows = DefectGen.load(args.run, device), []
    with tempfile.TemporaryDirectory() as folder:
        for factor in (1, 2) if args.quick else (1, 2, 4, 8):
            height, width = (factor * n for n in generator.size)
            seconds, memory = [], []
            for count in (1, 2):                                    # the second pair costs no start-up
                command = [sys.executable, "sample.py", "--run", args.run, "--size", str(height), str(width),
                           "--device", str(device), "--batch-size", "1", "--count", str(count),
                           "--out", f"{folder}/{factor}_{count}"]
                start = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, usage = os.wait4(process.pid, 0)
                if status:
                    raise ValueError(f"{' '.join(command)} failed")
                seconds.append(time.perf_counter() - start)
                memory.append(usage.ru_maxrss / 1024)
            pair = seconds[1] - seconds[0]
            rows.append([f"{height}x{width}", f"{pair:.1f}", f"{1e6 * pair / height / width:.1f}",
                         f"{memory[1]:.0f}"])
    return {"caption": f"Pairs of {args.run}, drawn alone", "rows": rows,
            "head": ["size", "seconds a pair", "microseconds a pixel", "peak memory of the process, MiB"]}


def sampling(args, device):
    """Few steps against 1000 on a run: time, distance to the pictures of 1000 and to photos, defects."""
    generator, long = DefectGen.load(args.run, device), 20 if args.quick else 1000
    config = generator.config
    splits = [open_dataset(config["data"], generator.size, split, config["object"])
              for split in (config["split"], "test")]
    pairs = [part.subset(part.defective()).tensors() for part in splits]
    photos, truths = (torch.cat(parts) for parts in zip(*pairs))
    seeds = [[0, 1]] if args.quick else [list(range(first, first + 16)) for first in (0, 16, 32)]
    rows, reference, longest = [], None, None
    for sampler, steps, spacing in (("ddim", long, "even"), ("ddpm", long, "even"), ("ddim", 50, "even"),
                                    ("ddim", 20, "even"), ("dpm++", 20, "even"), ("dpm++", 20, "logsnr"),
                                    ("dpm++", 10, "logsnr")):
        start = time.perf_counter()
        sets = [generator.sample(part, steps, sampler, spacing) for part in seeds]
        seconds = (time.perf_counter() - start) / sum(map(len, seeds))
        pictures = torch.cat([images for images, _ in sets]).float()
        if reference is None:
            reference, longest = pictures, seconds
        rms = (pictures - reference).square().mean().sqrt().item()
        distance = [statistics.mean(sliced_wasserstein(images, photos)) for images, _ in sets]
        share = [100 * (masks > 0).double().mean().item() for _, masks in sets]
        rows.append([f"{sampler}, {spacing}", steps, f"{1 / seconds:.2f} ({longest / seconds:.1f}x)",
                     f"{rms:.1f}", spread(distance, 3), spread(share, 2)])
    real = 100 * (truths > 0).double().mean()
    return {"caption": f"Sampling from {args.run}; distance: sliced Wasserstein to photos, whose pixels are "
                       f"{real:.2f} % defects", "rows": rows,
            "head": ["sampler", "steps", "images/s", f"rms grey levels to ddim {long}", "distance",
                     "% defect pixels"]}


# --- command ---

PARTS = {"training": training, "size": size, "sampling": sampling}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="What the networks cost here, each beside a reference.")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (default: all)")
    parser.add_argument("--run", default="runs/demo", help="trained, for sampling (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--out", default="runs", help="speed.json goes there (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small and few; OUT/quick/speed.json")
    args = parser.parse_args(argv)
    args.part = args.part or list(PARTS)
    args.rounds = 1 if args.quick else 3
    return args


def speed(args):
    """Print the tables of args.part; each is written when it is measured, beside those of other parts."""
    device, path = pick_device(args.device), Path(args.out) / ("quick" if args.quick else "") / "speed.json"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32     # products as convolutions
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    measured = read_json(path) if path.exists() else {}
    for part in args.part:
        table = PARTS[part](args, device)
        print_table(table)
        measured[part] = {"machine": machine, **table}
        write_json(path, measured)
    print(f"{machine}; tables: {path}")


if __name__ == "__main__":
    run_main(lambda: speed(parse_args()))
