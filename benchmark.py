"""What the networks cost on this machine, each beside a reference timed in the same run. python evaluate.py speed calls it.

    python benchmark.py                                the same, every part
    python benchmark.py --part training --quick

Ratios are the message: machines differ and are noisy, so the calls of a table are made in turn and medians compared.
"""
import argparse
import copy
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from datasets import data_options, open_dataset, pick_device, print_table, read_json, run_main, write_json
from defect_gen import STAGES, DefectGen, checkpoints
from diffusion import schedule, training_loss
from metrics import sliced_wasserstein
from segment import ARCHS, build, check_arch, to_input
from unet import LARGE, SMALL, Attention, Block, UNet, count_flops, count_parameters


# --- clock ---

def in_turn(calls, rounds):
    """Median seconds of each of {name: function}, called in turn after one warm-up each: a noisy neighbour slows all alike."""
    times = {name: [] for name in calls}
    for lap in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def wait(device):
    """Let an accelerator finish what it was given, or the clock measures how fast work is handed over."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device):
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{device} ({name}), torch {torch.__version__}, torchvision {torchvision.__version__}"


# --- the generator's networks, as released and as here ---

class ReleasedAttention(Attention):
    """The released attention: all products in memory, softmax in fp32, computed again in the backward pass."""

    def forward(self, x):
        return checkpoint(self.plain, x, use_reentrant=False) if torch.is_grad_enabled() else self.plain(x)

    def plain(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).unbind(1)
        scale = (C // self.heads) ** -0.25
        weights = torch.einsum("bhct,bhcs->bhts", q * scale, k * scale).float().softmax(-1).to(v.dtype)
        return x + self.out(torch.einsum("bhts,bhcs->bhct", weights, v).reshape(B, C, H, W))


class ReleasedBlock(Block):
    """The released block: SiLU as a product."""

    def forward(self, x, emb):
        silu, modulation = lambda h: h * torch.sigmoid(h), self.modulation(emb)[:, :, None, None]
        h = self.conv1(silu(self.norm1(x)))
        if modulation.shape[1] == h.shape[1]:
            h = self.norm2(h + modulation)
        else:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(silu(h))))


def released(net):
    """A copy of a UNet with the same weights that computes as the released code does."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if type(module) in (Attention, Block):
            module.__class__ = {Attention: ReleasedAttention, Block: ReleasedBlock}[type(module)]
    return net


def training_step(net, x_start, ours, bf16):
    """A function that makes one optimiser step on x_start: as train.py does, or with the released code's loops and waits."""
    device, alphas_cumprod, ema = x_start.device, schedule(), copy.deepcopy(net)
    parameters, averaged = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, **(dict(fused=True) if ours else dict(foreach=False)))

    def step():
        t, noise = torch.randint(1000, (len(x_start),)).to(device), torch.randn(x_start.shape).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = training_loss(net, x_start, t, noise, alphas_cumprod).mean()
        loss.backward()
        if ours:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=ours)
        with torch.no_grad():
            if ours:
                torch._foreach_lerp_(averaged, parameters, 1e-4)
            else:
                for a, p in zip(averaged, parameters):
                    a.mul_(0.9999).add_(p, alpha=1e-4)
                loss.item()
        wait(device)
    return step


def kept_for_backward(net, x_start):
    """Bytes of activations that one forward pass keeps for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x_start, 500).mean()
    del loss
    return sum(size for place, size in storages.items() if place not in weights)


def matrix_rate(device, dtype):
    """FLOP/s of a product of square matrices, the most the device gives to convolutions."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)

    def product():
        a @ a
        wait(device)
    return 2 * n ** 3 / in_turn({"": product}, 5)[""]


def training_speed(args, device):
    """A training step and a denoising call of both networks: released code, ours in fp32, ours in bf16."""
    full = device.type == "cuda" and not args.quick
    shapes = [(64, 32), (256, 2), (256, 16)] if full else [(64, 2)] if args.quick else [(64, 4), (256, 1)]
    rates = {bf16: matrix_rate(device, torch.bfloat16 if bf16 else torch.float32) for bf16 in (False, True)}
    rows, numbers = [], {"matrix_rate_fp32": rates[False], "matrix_rate_bf16": rates[True], "rows": []}
    for name, network in (("large", LARGE), ("small", SMALL)):
        network = network if full else dict(network, channels=32 if args.quick else 64)
        ours = UNet(7, **network).to(device, memory_format=torch.channels_last)
        theirs = released(ours)
        for size, batch in shapes:
            x, calls = torch.randn(batch, 7, size, size, device=device), {}
            flops = batch * count_flops(ours, size, size)
            for way, net, bf16 in (("released", theirs, False), ("fp32", ours, False), ("bf16", ours, True)):
                def denoise(net=net, bf16=bf16, way=way):
                    with torch.no_grad() if way == "released" else torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        net(x, 500)
                    wait(device)

                calls["train", way], calls["denoise", way] = training_step(net, x, net is ours, bf16), denoise
            try:
                times = in_turn(calls, 1 if args.quick else 3)
            except torch.OutOfMemoryError:
                rows.append([f"{name}, {network['channels']} channels", "", f"{size}x{size}, {batch}", "does not fit", "", "", "", "", ""])
                continue
            for what in ("train", "denoise"):
                row = {way: times[what, way] for way in ("released", "fp32", "bf16")}
                best = min("fp32", "bf16", key=row.get)
                share = flops * (3 if what == "train" else 1) / row[best] / rates[best == "bf16"]
                numbers["rows"].append(dict(network=name, what=what, size=size, batch=batch, channels=network["channels"], seconds=row,
                                            flops=flops, share_of_matrix_rate=share))
                rows.append([f"{name}, {network['channels']} channels", what, f"{size}x{size}, {batch}", f"{1000 * row['released']:.0f}"]
                            + [f"{1000 * row[way]:.0f} ({row['released'] / row[way]:.2f}x)" for way in ("fp32", "bf16")] + [f"{100 * share:.0f} %"])
            kept = [kept_for_backward(net, x) for net in (theirs, ours)]
            numbers["rows"][-2]["bytes_kept"] = kept
            rows[-2] += [f"{kept[0] / 2**20:.0f}", f"{kept[1] / 2**20:.0f}"]
            rows[-1] += ["", ""]
    caption = (f"Both networks, medians of calls in turn: milliseconds (speed-up over the released code). A product of matrices reaches {rates[False] / 1e9:.0f} GFLOP/s in fp32 "
               f"and {rates[True] / 1e9:.0f} in bf16 here")
    return {"caption": caption, "rows": rows, "head": ["network", "call", "size, batch", "released", "fp32", "bf16", "share of that rate",
                                                       "fp32 MiB kept for backward, released", "ours"]}, numbers


def size_speed(args, device):
    """What a denoising call costs by size and batch."""
    sizes, batches = ((32, 64), (1, 4)) if args.quick else ((64, 128, 256), (1, 4))
    rows, numbers = [], []
    for name, network in (("large", LARGE), ("small", SMALL)):
        net = UNet(7, **dict(network, channels=32)).to(device, memory_format=torch.channels_last)
        calls = {}
        for size in sizes:
            for batch in batches:
                @torch.inference_mode()
                def call(x=torch.randn(batch, 7, size, size, device=device)):
                    net(x, 500)
                    wait(device)
                calls[size, batch] = call
        times = in_turn(calls, 3)
        for batch in batches:
            seconds = [times[size, batch] / batch for size in sizes]
            rows.append([f"{name}, 32 channels", batch] + [f"{1000 * s:.1f} ({1e9 * s / size**2:.0f})" for s, size in zip(seconds, sizes)])
            numbers.append(dict(network=name, batch=batch, sizes=sizes, seconds_per_image=seconds))
    return {"caption": "One denoising call, medians of calls in turn: milliseconds per image (nanoseconds per pixel)", "head": ["network", "batch", *(f"{s}x{s}" for s in sizes)], "rows": rows}, numbers


def sampling_speed(args, device):
    """Few steps against 1000 on a trained run: time, distance to the same pictures drawn in 1000 steps and to real ones, share of defects."""
    run = Path(args.run)
    if not all(checkpoints(run / stage) for stage in STAGES):
        return {"caption": f"Sampling: not measured, there is no trained run in {run}; train one, or name it by --run", "head": [], "rows": []}, None
    generator, groups, per_group = DefectGen.load(run, device), 1 if args.quick else 3, 2 if args.quick else 8
    config = generator.config
    real = [open_dataset(config["data"], generator.size, split, **data_options(config)) for split in (config["split"], "test")]
    real = [torch.cat(parts) for parts in zip(*(part.subset(part.defective()).tensors() for part in real))]
    long = 20 if args.quick else 1000
    ways = [("ddpm", long, "even"), ("ddim", long, "even"), ("ddim", 50, "even"), ("ddim", 20, "even"), ("dpm++", 20, "even"),
            ("dpm++", 20, "quadratic"), ("dpm++", 10, "logsnr"), ("dpm++", 20, "logsnr")]
    rows, numbers, first = [], [], None
    spread = lambda values, digits: " ± ".join(f"{f(values):.{digits}f}" for f in (statistics.mean, statistics.stdev)[:len(values)])
    for sampler, steps, spacing in ways:
        start, images, masks = time.perf_counter(), [], []
        for group in range(groups):
            seeds = list(range(group * per_group, (group + 1) * per_group))
            drawn = generator.sample(seeds, steps, sampler, spacing)
            images.append(drawn[0])
            masks.append(drawn[1])
        seconds = (time.perf_counter() - start) / (groups * per_group)
        if sampler == "ddim" and steps == long:
            first = torch.cat(images).float()
        to_long = (torch.cat(images) - first).square().mean().sqrt().item() if first is not None else math.nan
        distance = [statistics.mean(sliced_wasserstein(part, real[0])) for part in images]
        share = [100 * (part > 0).double().mean().item() for part in masks]
        numbers.append(dict(sampler=sampler, steps=steps, spacing=spacing, seconds_per_image=seconds, rms_to_long=to_long, distance=distance, defect_percent=share))
        rows.append([f"{sampler}, {spacing}", steps, f"{1 / seconds:.2f} ({numbers[0]['seconds_per_image'] / seconds:.1f}x)",
                     "" if math.isnan(to_long) else f"{to_long:.1f}", spread(distance, 3), spread(share, 2)])
    share = 100 * (real[1] > 0).double().mean().item()
    caption = f"Sampling {groups} x {per_group} pairs from {run}; {share:.2f} % of real pixels are defects; distance: sliced Wasserstein to real images"
    return {"caption": caption, "rows": rows, "head": ["sampler", "steps", "images/s", f"grey levels to ddim {long}", "distance", "% defect pixels"]}, numbers


# --- segmenters, beside published ones ---

def published_segmenters(num_classes):
    """Well-known implementations beside which ours are timed, as far as they are installed; nothing here needs them.

    Returns: {name of ours: [(name, net, scores of (net, x), loss of (net, x, target))]}
    """
    cross_entropy = lambda scores: lambda net, x, target: F.cross_entropy(scores(net, x).float(), target)
    found = {}
    try:
        import segmentation_models_pytorch as smp
        scores = lambda net, x: net(x)
        net = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=num_classes)
        found["deeplabv3+"] = [("segmentation_models.pytorch", net, scores, cross_entropy(scores))]
    except ImportError:
        pass
    try:
        from transformers import (Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SegformerConfig,
                                  SegformerForSemanticSegmentation, SwinConfig)
    except ImportError:
        return found
    scores = lambda net, x: F.interpolate(net(pixel_values=x).logits, size=x.shape[-2:], mode="bilinear")
    found["segformer"] = [("transformers", SegformerForSemanticSegmentation(SegformerConfig(num_labels=num_classes)), scores, cross_entropy(scores))]

    def query_scores(net, x):
        out = net(pixel_values=x)
        masks = F.interpolate(out.masks_queries_logits, size=x.shape[-2:], mode="bilinear").sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", out.class_queries_logits.softmax(-1)[..., :-1], masks)

    def query_loss(net, x, target):
        labels = [t.unique() for t in target]
        return net(pixel_values=x, mask_labels=[(t == k[:, None, None]).float() for t, k in zip(target, labels)], class_labels=labels).loss

    stages = [f"stage{i}" for i in range(1, 5)]
    for name, sizes in (("transformers, same size", dict(encoder_layers=3, num_queries=20, backbone_config=ResNetConfig(
            layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], out_features=stages))),
            ("transformers, Swin-T", dict(backbone_config=SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0.3, out_features=stages)))):
        net = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(num_labels=num_classes, **sizes))
        found.setdefault("mask2former", []).append((name, net, query_scores, query_loss))
    return found


def segmenter_speed(args, device):
    """Milliseconds per training step of 4 images and per image predicted, of each network and of published ones beside it."""
    size, rounds = (64, 1) if args.quick else (256, 3)
    images, masks = (part.to(device) for part in open_dataset("drawn:pill", (size, size)).subset(range(4)).tensors())
    num_classes, x, target, rows, numbers = int(masks.max()) + 1, to_input(images), masks.long(), [], {}
    others = published_segmenters(num_classes)
    for arch in args.arch:
        nets = [("", build(arch, num_classes), lambda net, x: net(x), lambda net, x, target: net.loss(x, target)), *others.get(arch, [])]
        calls = {}
        for name, net, scores, loss in nets:
            optimizer = torch.optim.AdamW(net.to(device).parameters(), lr=1e-6, fused=True)
            for bf16 in (False, True):
                def step(net=net, loss=loss, optimizer=optimizer, bf16=bf16):
                    net.train()
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        value = loss(net, x, target)
                    value.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    wait(device)

                @torch.inference_mode()
                def image(net=net, scores=scores, bf16=bf16):
                    net.eval()
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        scores(net, x)
                    wait(device)

                calls[name, "train", bf16], calls[name, "predict", bf16] = step, image
        times = in_turn(calls, rounds)
        for name, net, scores, _ in nets:
            with FlopCounterMode(display=False) as counter:
                scores(net.eval(), x[:1])
            took = [1000 * times[name, what, bf16] / parts for what, parts in (("train", 1), ("predict", len(x))) for bf16 in (False, True)]
            title = f"  {name}" if name else arch
            flops, parameters = counter.get_total_flops(), count_parameters(net)
            ratio = [times[name, *key] / times["", *key] for key in (("train", False), ("train", True), ("predict", False), ("predict", True))]
            numbers[f"{arch} {name}".strip()] = dict(parameters=parameters, flops_per_image=flops, ms=took, over_ours=ratio)
            rows.append([title, f"{parameters / 1e6:.1f} M", f"{flops / 1e9:.1f}"] + [f"{ms:.0f} ({r:.2f}x)" if name else f"{ms:.0f}" for ms, r in zip(took, ratio)])
    return ({"caption": f"Segmenters at {size}x{size}, medians of calls in turn: milliseconds, and (a published implementation over ours in the same run)", "rows": rows,
             "head": ["network", "parameters", "GFLOP per image", "step of 4, fp32", "bf16", "image predicted, fp32", "bf16"]}, numbers)


PARTS = {"training": training_speed, "size": size_speed, "sampling": sampling_speed, "segmentation": segmenter_speed}


def parse_args(argv=None):
    """The flags, checked; --arch as a list."""
    parser = argparse.ArgumentParser(prog="evaluate.py speed", description="What the networks cost on this machine, each beside a reference.")
    parser.add_argument("--part", action="append", choices=PARTS, help="can be repeated (default: all)")
    parser.add_argument("--run", default="runs/demo", help="trained run for the part sampling (default: %(default)s)")
    parser.add_argument("--arch", default=",".join(ARCHS), help="networks of the part segmentation, joined by commas (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--out", default="runs", help="speed.json is written there (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smaller, fewer and in minutes; writes OUT/quick/speed.json")
    args = parser.parse_args(argv)
    args.arch = args.arch.split(",")
    for arch in args.arch:
        check_arch(arch)
    return args


def speed(args):
    """Print the tables of args.part, or of all, and write them to OUT/speed.json."""
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32     # or the matrix rate would be of other arithmetic than the convolutions'
    path = Path(args.out) / ("quick/speed.json" if args.quick else "speed.json")
    numbers = read_json(path) if path.exists() else {}
    for part in args.part or PARTS:
        table, measured = PARTS[part](args, device)
        print_table(table)
        numbers[part] = {"machine": machine(device), "measured": measured, "table": table}
        write_json(path, numbers)                                               # at once: a part that fails costs no other
    print(f"{machine(device)}\nnumbers: {path}")


if __name__ == "__main__":
    run_main(lambda: speed(parse_args()))
