"""Segmenters for the question "do generated defects help?": DeepLabV3+ and SegFormer MiT-B0, trained and scored in one way.

    python segment.py --data drawn:pill --arch segformer        # train one, print IoU per class, write runs/segment/

A network takes (B, 3, H, W) ImageNet-normalised images (see to_input) of any H, W and returns (B, K, H, W) logits; K = num_classes
counts background. Masks are class indices; 255 (IGNORE) marks pixels that neither the loss nor the score counts.
A saved network comes back with

    saved = torch.load("segment.pt", weights_only=True)
    net = build(**saved["build"]); net.load_state_dict(saved["model"])

References:
    DeepLabV3+  Chen et al. 2018, arXiv 1802.02611
    SegFormer   Xie et al. 2021, arXiv 2105.15203
"""
import argparse
import math
import pickle
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth
from tqdm import tqdm

from datasets import (add_data_flags, data_options, describe, has_bf16, open_dataset, overlay, pick_device, run_main, sheet,
                      write_atomically, write_image, write_json)

IGNORE = 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """What all networks share. A network defines `logits`: (B, 3, H, W), H and W multiples of 32 -> (B, K, H/s, W/s), s its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % 32, 0, -h % 32), mode="replicate")
        return F.interpolate(self.logits(x), size=x.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w]

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy + soft Dice averaged over the classes that occur in `target` (B, H, W) int64.

        A defect of 20 pixels hardly moves a cross-entropy over 4096; Dice counts per class, so it weighs as much as the background.
        Tried on spots of 9 px, scratches of 12 px and stains of 80 px in 64x64 (DeepLabV3+ / SegFormer, 150 / 250 steps, lr 5e-4): mIoU
        0.20 / 0.28 with cross-entropy alone, 0.54 / 0.48 with both. Weights by inverse root frequency on top: 0.59 / 0.45, no clear gain.
        """
        logits = self(x).float()
        valid = target != IGNORE
        pixels = valid.sum().clamp(min=1)                                                      # a mean is NaN where all is ignored
        cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / pixels
        truth = F.one_hot(target.where(valid, 0), logits.shape[1]).permute(0, 3, 1, 2) * valid[:, None]  # (B, K, H, W)
        prob = logits.softmax(1) * valid[:, None]
        overlap, total = (prob * truth).sum((0, 2, 3)), (prob + truth).sum((0, 2, 3))          # (K,)
        present = truth.sum((0, 2, 3)) > 0
        dice = 1 - 2 * overlap / total.clamp(min=1e-6)
        return cross_entropy + (dice * present).sum() / present.sum().clamp(min=1)


# --- DeepLabV3+ ---

def conv_bn_relu(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def separable(c_in: int, c_out: int, dilation: int = 1) -> nn.Sequential:
    """Depthwise 3x3, then pointwise 1x1 with norm and ReLU."""
    depthwise = nn.Conv2d(c_in, c_in, 3, padding=dilation, dilation=dilation, groups=c_in, bias=False)
    return nn.Sequential(depthwise, *conv_bn_relu(c_in, c_out))


def dilate(stage: nn.Module) -> None:
    """Take the stride 2 out of a ResNet stage and dilate what follows it, in place: same weights, same field of view, twice the resolution.

    Every second output pixel stays what it was. torchvision's replace_stride_with_dilation does the same but refuses BasicBlock.
    """
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
            elif conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated separable 3x3 and the image mean, side by side, then joined by a 1x1.

    The image branch has a bias instead of the BatchNorm of the paper: it sees one value per image and channel, from which a batch of 1
    (a single photo, the last one on a GPU) has no variance to take.
    """

    def __init__(self, c_in: int, c_out: int = 256, rates=(6, 12, 18)):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(c_in, c_out)] + [separable(c_in, c_out, rate) for rate in rates])
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_in, c_out, 1), nn.ReLU())
        self.join = nn.Sequential(conv_bn_relu(c_out * (len(rates) + 2), c_out), nn.Dropout(0.1))

    def forward(self, x):
        image = self.image(x).expand(-1, -1, *x.shape[-2:])
        return self.join(torch.cat([branch(x) for branch in self.branches] + [image], dim=1))


class DeepLabV3Plus(Segmenter):
    """ResNet at output stride 16 -> ASPP; joined at stride 4 with early features for sharp edges."""

    def __init__(self, num_classes: int, backbone: str = "resnet18"):
        super().__init__()
        if backbone not in ("resnet18", "resnet50"):
            raise ValueError(f"no backbone {backbone!r} for deeplabv3+: choose resnet18 or resnet50")
        self.num_classes = num_classes
        self.backbone = getattr(torchvision.models, backbone)(weights=None)
        deep, low = self.backbone.fc.in_features, self.backbone.fc.in_features // 8
        self.backbone.fc = nn.Identity()
        dilate(self.backbone.layer4)
        self.aspp = ASPP(deep)
        self.low = conv_bn_relu(low, 48)
        self.decoder = nn.Sequential(separable(256 + 48, 256), separable(256, 256))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def logits(self, x):
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        low = net.layer1(x)                                                                    # stride 4
        x = self.aspp(net.layer4(net.layer3(net.layer2(low))))                                 # stride 16
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.decoder(torch.cat([x, self.low(low)], dim=1)))


# --- SegFormer ---
# Features travel as (B, H, W, C): Linear and LayerNorm act on the last axis, convolutions through `spatial`.
# LayerNorm eps is PyTorch's 1e-5 everywhere, as in Hugging Face's model, whose layer_norm_eps=1e-6 is never read.

def spatial(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to (B, H, W, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbedding(nn.Module):
    """A strided convolution, then LayerNorm. Patches overlap where the kernel is larger than the stride."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(c_in, c_out, kernel, stride, padding)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x):
        return self.norm(spatial(self.proj, x))


class EfficientAttention(nn.Module):
    """Self-attention of every pixel to an R x R times coarser map: H W (H W / R^2) products instead of (H W)^2."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.reduce = PatchEmbedding(dim, dim, reduction, reduction, padding=0) if reduction > 1 else nn.Identity()

    def forward(self, x):
        def heads(tokens):                                                                     # (B, heads, H W, C / heads)
            return tokens.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        coarse = self.reduce(x)                                                                # (B, H/R, W/R, C)
        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(coarse)), heads(self.v(coarse)))
        return self.out(y.transpose(1, 2).reshape(x.shape))


class MixFFN(nn.Module):
    """Pixel-wise MLP with a depthwise 3x3 inside; its zero padding is what tells a pixel where it is (no position code)."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        hidden = dim * expansion
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x):
        return self.fc2(F.gelu(spatial(self.dwconv, self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, reduction: int, drop: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = EfficientAttention(dim, num_heads, reduction)
        self.ffn = MixFFN(dim)
        self.drop = StochasticDepth(drop, mode="row")

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.ffn(self.norm2(x)))


class MiT(nn.Module):
    """Mix Transformer B0: four stages of two blocks, at stride 4, 8, 16, 32. Stochastic depth grows linearly from 0 to 0.1."""

    dims, num_heads, reductions = (32, 64, 160, 256), (1, 2, 5, 8), (8, 4, 2, 1)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for i, (dim, num_heads, reduction) in enumerate(zip(self.dims, self.num_heads, self.reductions)):
            patch = PatchEmbedding(3, dim, 7, 4, 3) if i == 0 else PatchEmbedding(self.dims[i - 1], dim, 3, 2, 1)
            blocks = [Block(dim, num_heads, reduction, drop=0.1 * (2 * i + j) / 7) for j in range(2)]
            self.stages.append(nn.Sequential(patch, *blocks, nn.LayerNorm(dim)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):                                                                      # (B, 3, H, W)
        x, features = x.permute(0, 2, 3, 1), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features                                                                        # 4 x (B, H/s, W/s, C)


class SegFormer(Segmenter):
    """MiT-B0 and the all-MLP head: bring the four maps to 256 channels and stride 4, join them, classify."""

    def __init__(self, num_classes: int, width: int = 256):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = MiT()
        self.linears = nn.ModuleList(nn.Linear(dim, width) for dim in MiT.dims)
        self.fuse = conv_bn_relu(width * len(MiT.dims), width)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def logits(self, x):
        features = self.backbone(x)
        maps = [linear(feature).permute(0, 3, 1, 2) for linear, feature in zip(self.linears, features)]
        size = maps[0].shape[-2:]                                                              # stride 4
        maps = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps]
        return self.classifier(self.dropout(self.fuse(torch.cat(maps[::-1], dim=1))))          # deepest first, as published


# --- build ---

ARCHS = {"deeplabv3+": DeepLabV3Plus, "segformer": SegFormer}


def build(arch: str, num_classes: int, seed: int = 0, **options) -> Segmenter:
    """A network with random weights that depend on `seed` alone. `options` are its own, e.g. backbone="resnet50"."""
    if arch not in ARCHS:
        raise ValueError(f"no architecture {arch!r}: choose one of {', '.join(ARCHS)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ARCHS[arch](num_classes, **options)


def load_backbone(net: Segmenter, file: str | Path) -> None:
    """Load a state dict into net.backbone: for DeepLabV3+ one of torchvision's ResNet files (its classifier, fc.*, is left out)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise ValueError(f"{file} is no state dict written by torch.save") from error
    try:
        # strict=False only to word the error ourselves. Dropping the dict's version also lets old files lack num_batches_tracked.
        missing, unexpected = net.backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {type(net).__name__}'s backbone: {' '.join(str(error).split())}") from error
    if missing or unexpected:
        raise ValueError(f"{file} does not fit {type(net).__name__}'s backbone: "
                         f"missing {', '.join(missing) or 'nothing'}; not wanted {', '.join(unexpected) or 'nothing'}")


# --- training and prediction ---

def to_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 1 or 3, H, W) in 0..255 -> (B, 3, H, W) float, normalised as ImageNet; grey is repeated."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {tuple(images.shape)}, expected (N, 1 or 3, H, W): drop or merge the other channels")
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


def draw_table(masks: torch.Tensor, num_classes: int, sample_weight: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, N): a row per class that occurs, holding the weights of the images that have it, and a row of the images without defect."""
    weight = torch.ones(len(masks)) if sample_weight is None else sample_weight.cpu().float()
    has = torch.stack([(masks == k).flatten(1).any(1) for k in range(num_classes)]).cpu()              # (K, N)
    has[0] = ~has[1:].any(0)
    table = has * weight
    return table[table.sum(1) > 0]


def draw(table: torch.Tensor, batch_size: int, rng: torch.Generator) -> torch.Tensor:
    """Draw a class, then an image that has it, so that a defect seen on one photo comes up as often as one seen on fifty."""
    rows = torch.randint(len(table), (batch_size,), generator=rng)
    return torch.multinomial(table[rows], 1, generator=rng)[:, 0]


def augment(images: torch.Tensor, masks: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Flips, zoom by 0.75 to 1.5 at a random place, contrast and brightness; one draw per image.

    Args:    images (B, C, H, W) in 0..255, masks (B, H, W) class index.
    Returns: float images in 0..255, int64 masks; what lies outside the photo is IGNORE. Masks are only ever sampled nearest.
    """
    B, device = len(images), images.device
    u = torch.rand(B, 7, generator=rng)
    window = 1 / (0.75 * 2 ** u[:, :1])                                                        # side seen / side of the photo
    theta = torch.zeros(B, 2, 3)
    theta[:, [0, 1], [0, 1]] = torch.where(u[:, 1:3] < 0.5, -window, window)
    theta[:, :, 2] = (2 * u[:, 3:5] - 1) * (1 - window).abs()
    grid = F.affine_grid(theta, (B, 1, *images.shape[-2:]), align_corners=False).to(device)
    images = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    outside = masks[:, None].float() - IGNORE                                                  # padded with 0, i.e. IGNORE
    masks = F.grid_sample(outside, grid, mode="nearest", align_corners=False)[:, 0] + IGNORE
    contrast, brightness = 0.8 + 0.4 * u[:, 5], 255 * (0.2 * u[:, 6] - 0.1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast.to(device).view(-1, 1, 1, 1) + mean + brightness.to(device).view(-1, 1, 1, 1)
    return images.clamp(0, 255), masks.long()


def fit(net: Segmenter, images: torch.Tensor, masks: torch.Tensor, steps: int, batch_size: int = 8, lr: float = 1e-3,
        seed: int = 0, bf16: bool = False, progress: bool = False, sample_weight: torch.Tensor | None = None) -> dict:
    """Train `net` in place with AdamW, warm-up over a tenth of the steps and (1 - step / steps)^0.9 decay.

    All randomness is a function of (seed, step); the same call gives the same weights bit for bit on the CPU (on CUDA up to rounding:
    the bilinear up-sampling adds its gradients in any order).

    Args:
        images: (N, 1 or 3, H, W) uint8.    masks: (N, H, W) int, class index or 255. Both are kept on the network's device.
        sample_weight: (N,) how readily an image is drawn among those of its class, e.g. to weigh real against generated ones.
    Returns: {"losses": one float per step, "time_s": float}
    Raises:  ValueError for masks that do not fit, FloatingPointError when the loss is no longer a number.
    """
    if len(images) != len(masks) or images.shape[-2:] != masks.shape[-2:] or len(images) == 0:
        raise ValueError(f"images are {tuple(images.shape)} and masks {tuple(masks.shape)}: need one mask per image, of its size")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"{steps} steps with a batch of {batch_size}: both must be at least 1")
    device, start = next(net.parameters()).device, time.perf_counter()
    images, masks = images.to(device), masks.to(device)
    check_classes(masks, net.num_classes, "masks")
    table = draw_table(masks, net.num_classes, sample_weight)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, fused=True)
    net.train()
    losses, warmup = [], max(1, steps // 10)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):             # for dropout and stochastic depth
        for step in tqdm(range(steps), desc="segmenter", disable=not progress):
            rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
            torch.manual_seed(seed * 1_000_003 + step)
            index = draw(table, batch_size, rng).to(device)
            x, target = augment(images[index], masks[index], rng)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup) * (1 - step / steps) ** 0.9
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = net.loss(to_input(x), target)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step} of {steps} with lr {lr:g}: try a smaller lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    net.eval()
    return {"losses": losses, "time_s": time.perf_counter() - start}


@torch.inference_mode()
def predict(net: Segmenter, images: torch.Tensor, batch_size: int = 16, bf16: bool = False) -> torch.Tensor:
    """(N, 1 or 3, H, W) uint8 -> (N, H, W) uint8 class index, on the CPU. Puts the network into eval mode."""
    net.eval()
    device = next(net.parameters()).device
    masks = []
    for batch in images.split(batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            masks.append(net(to_input(batch.to(device))).argmax(1).to(torch.uint8).cpu())
    return torch.cat(masks)


# --- score ---

def check_classes(masks: torch.Tensor, num_classes: int, name: str) -> None:
    wrong = masks[(masks != IGNORE) & ((masks < 0) | (masks >= num_classes))]
    if len(wrong):
        raise ValueError(f"{name} hold the values {wrong.unique().tolist()}, but there are {num_classes} classes, 0..{num_classes - 1} "
                         f"(and {IGNORE} = ignore): are they 0/255 or colour masks, or is num_classes too small?")


def confusion_matrix(pred: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int = IGNORE) -> torch.Tensor:
    """(K, K) int64 pixel counts, [target, pred]. Matrices of several sets add up."""
    valid = target != ignore_index
    pred, target = pred[valid].long(), target[valid].long()
    check_classes(target, num_classes, "targets")
    check_classes(pred, num_classes, "predictions")
    return torch.bincount(target * num_classes + pred, minlength=num_classes ** 2).view(num_classes, num_classes)


def miou(confusion: torch.Tensor) -> dict:
    """Intersection over union from one confusion matrix over the whole set (not a mean over images).

    A class that no target pixel has is left out of the means and named in "absent", its IoU is nan; pixels wrongly given to it still
    count as misses of their true class.

    Returns: {"iou": K floats, "miou": mean over defect classes, "miou_with_background", "pixel_accuracy", "absent": class indices}
    """
    confusion = confusion.double()
    hit, target = confusion.diag(), confusion.sum(1)
    iou = hit / (target + confusion.sum(0) - hit)
    iou[target == 0] = math.nan
    return {"iou": iou.tolist(), "miou": iou[1:].nanmean().item(), "miou_with_background": iou.nanmean().item(),
            "pixel_accuracy": (hit.sum() / confusion.sum()).item(), "absent": (target == 0).nonzero().flatten().tolist()}


# --- command ---

def main():
    parser = argparse.ArgumentParser(description="Train one segmenter and score it: IoU per class, and pictures of what it sees.")
    add_data_flags(parser, split="train")
    parser.add_argument("--test-split", default="test", help="the images to score on (default: %(default)s)")
    parser.add_argument("--arch", default="segformer", help=f"{' | '.join(ARCHS)} (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"), help="resize to this (default: 64 64)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, drawing and augmentation (default: %(default)s)")
    parser.add_argument("--backbone-weights", metavar="FILE", help="state dict, e.g. torchvision's resnet18 (default: none)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/segment"), help="where results go (default: %(default)s)")
    args = parser.parse_args()

    device = pick_device(args.device)
    train, test = (open_dataset(args.data, tuple(args.size), split, **data_options(args)) for split in (args.split, args.test_split))
    config = {"arch": args.arch, "num_classes": len(train.classes), "seed": args.seed}
    net = build(**config)
    if args.backbone_weights:
        load_backbone(net, args.backbone_weights)
    net.to(device)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.arch}, {parameters / 1e6:.1f} M parameters, backbone weights: {args.backbone_weights or 'none, random'}, on {device}\n"
          f"{describe(train)}\n{describe(test)}\nimages are {args.size[0]}x{args.size[1]}")

    bf16 = device.type == "cuda" and has_bf16(device)      # on CPUs autocast was slower at 64 to 256 px (depthwise convolutions)
    fitted = fit(net, *train.tensors(), args.steps, args.batch_size, args.lr, args.seed, bf16, progress=True)
    images, target = test.tensors()
    pred = predict(net, images, bf16=bf16)
    score = miou(confusion_matrix(pred, target, len(test.classes)))

    def number(value):                                                                         # JSON has no nan
        return None if math.isnan(value) else round(value, 4)

    iou = {name: number(value) for name, value in zip(train.classes, score["iou"])}
    for name, value in iou.items():
        print(f"  {name:<24}{'–' if value is None else f'{value:.3f}':>7}")
    means = {name: number(score[name]) for name in ("miou", "miou_with_background", "pixel_accuracy")}
    print("  ".join(f"{name} {value}" for name, value in means.items()))
    if score["absent"]:
        print(f"– no pixel of this class in {args.test_split}: left out of the means")

    write_json(args.out / "segment.json", {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "device": str(device), "bf16": bf16, "parameters": parameters, "train_images": len(train), "test_images": len(test),
        "iou": iou, **means, "absent": [train.classes[i] for i in score["absent"]],
        "last_loss": fitted["losses"][-1], "train_time_s": round(fitted["time_s"], 1)})
    saved = {"build": config, "model": net.cpu().state_dict(), "classes": list(train.classes), "size": list(args.size)}
    write_atomically(args.out / "segment.pt", lambda path: torch.save(saved, path))
    rows = [(test.samples[i].kind, [images[i], overlay(images[i], target[i]), overlay(images[i], pred[i])])
            for i in range(0, len(test), math.ceil(len(test) / 12))]
    write_image(args.out / "predictions.png", sheet(rows, ("image", "truth", "prediction"), train.classes))
    print(f"wrote {args.out}/segment.json, segment.pt, predictions.png")


if __name__ == "__main__":
    run_main(main)
