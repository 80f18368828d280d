"""Segmenters for the question "do generated defects help?": DeepLabV3+, SegFormer MiT-B0 and Mask2Former, trained and scored in one way.

    python segment.py --data drawn:pill --arch segformer        # train one, print IoU per class, write runs/segment/

A network takes (B, 3, H, W) ImageNet-normalised images (see to_input) of any H, W and returns (B, K, H, W) scores, the highest of which
is the prediction; K = num_classes counts background. Masks are class indices; 255 (IGNORE) marks pixels that neither loss nor score counts.
A saved network comes back with

    saved = torch.load("segment.pt", weights_only=True)
    net = build(**saved["build"]); net.load_state_dict(saved["model"])

References:
    DeepLabV3+  Chen et al. 2018, arXiv 1802.02611
    SegFormer   Xie et al. 2021, arXiv 2105.15203
    Mask2Former Cheng et al. 2022, arXiv 2112.01527; its pixel decoder is that of Deformable DETR, Zhu et al. 2021, arXiv 2010.04159
"""
import argparse
import math
import pickle
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth
from tqdm import tqdm

from datasets import (add_data_flags, data_options, describe, has_bf16, listed, open_dataset, overlay, pick_device, run_main, sheet,
                      write_atomically, write_image, write_json)

IGNORE = 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def padded(x: torch.Tensor, **how) -> torch.Tensor:
    """Pad right and bottom to multiples of 32, and to 64 at least: BatchNorm at stride 32 needs more than one pixel to train on."""
    h, w = x.shape[-2:]
    return F.pad(x, (0, max(-w % 32, 64 - w), 0, max(-h % 32, 64 - h)), **how)


class Segmenter(nn.Module):
    """What all networks share. A network defines `logits`: (B, 3, H, W), H and W multiples of 32 -> (B, K, H/s, W/s), s its own.

    `lr` is what `fit` trains it with unless told otherwise, `architecture` the torchvision name of its backbone, if it is one.
    """

    lr, architecture = 1e-3, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        x = padded(x, mode="replicate")
        return F.interpolate(self.logits(x), size=x.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w]

    def our_names(self, state: dict) -> dict:
        """A published backbone's state dict under the names of this network."""
        return {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}

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

RESNETS = "resnet18", "resnet50"


def resnet(name: str) -> nn.Module:
    if name not in RESNETS:
        raise ValueError(f"no backbone {name!r}: choose {' or '.join(RESNETS)}")
    net = getattr(torchvision.models, name)(weights=None)
    net.width, net.fc = net.fc.in_features, nn.Identity()                                      # channels of its last stage
    return net


def resnet_features(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The maps after its four stages."""
    features = [net.maxpool(net.relu(net.bn1(net.conv1(x))))]
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        features.append(stage(features[-1]))
    return features[1:]


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
        self.num_classes, self.architecture = num_classes, backbone
        self.backbone = resnet(backbone)
        dilate(self.backbone.layer4)
        self.aspp = ASPP(self.backbone.width)
        self.low = conv_bn_relu(self.backbone.width // 8, 48)
        self.decoder = nn.Sequential(separable(256 + 48, 256), separable(256, 256))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def logits(self, x):
        low, *_, deep = resnet_features(self.backbone, x)                                      # strides 4 and 16
        low = self.low(low)
        deep = F.interpolate(self.aspp(deep), size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.decoder(torch.cat([deep, low], dim=1)))


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


def attend(q, k, v, num_heads: int, mask=None) -> torch.Tensor:
    """Multi-head attention of queries (B, N, C) to keys and values (B, M, C); mask (B, 1, N, M) is True where a query may look."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))             # (B, heads, N, C / heads)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class EfficientAttention(nn.Module):
    """Self-attention of every pixel to an R x R times coarser map: H W (H W / R^2) products instead of (H W)^2."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.reduce = PatchEmbedding(dim, dim, reduction, reduction, padding=0) if reduction > 1 else nn.Identity()

    def forward(self, x):
        tokens, coarse = x.flatten(1, 2), self.reduce(x).flatten(1, 2)                         # (B, H W, C), (B, H W / R^2, C)
        return self.out(attend(self.q(tokens), self.k(coarse), self.v(coarse), self.num_heads)).reshape(x.shape)


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


MIT_NAMES = [                                                # pattern -> ours, in this order; 1-based numbers become 0-based
    (r"^(segformer\.|backbone\.)?(encoder\.)?(?!decode_head)", "backbone."),
    (r"^(\w+)\.(patch_embed|block|norm|linear_c)(\d)\.", lambda m: f"{m[1]}.{m[2]}.{int(m[3]) - 1}."),        # original release
    (r"^backbone\.(patch_embed|patch_embeddings|block|layer_norm|norm)\.(\d)\.", r"backbone.stages.\2.\1."),   # and transformers 4
    (r"(stages\.\d)\.patch_embed(dings)?\.", r"\1.0."), (r"(stages\.\d\.0)\.layer_norm\.", r"\1.norm."),
    (r"(stages\.\d)\.blocks?\.(\d)\.", lambda m: f"{m[1]}.{int(m[2]) + 1}."), (r"(stages\.\d)\.(layer_)?norm\.", r"\1.3."),
    (r"\.(layer_norm_1|layernorm_before)\.", ".norm1."), (r"\.(layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.(attn|attention\.self)\.", ".attention."), (r"attention\.([qkv])(uery|ey|alue|_proj)\.", r"attention.\1."),
    (r"attention\.(output\.dense|o_proj|proj)\.", "attention.out."),
    (r"attention\.(sequence_reduction\.sequence_reduction|sr)\.", "attention.reduce.proj."),
    (r"attention\.(sequence_reduction\.layer_norm|layer_norm|norm)\.", "attention.reduce.norm."),
    (r"mlp\.(dense|fc)(\d)\.", r"ffn.fc\2."), (r"mlp\.dwconv\.dwconv\.", "ffn.dwconv."),
    (r"^decode_head\.linear_(c|projections)\.(\d)\.proj\.", r"linears.\2."), (r"^decode_head\.(classifier|linear_pred)\.", "classifier."),
    (r"^decode_head\.(batch_norm|linear_fuse\.bn)\.", "fuse.1."), (r"^decode_head\.linear_fuse\.(conv\.)?", "fuse.0.")]


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

    def our_names(self, state):
        """From Hugging Face's names (transformers 4, as published, and 5) or those of the original release; heads of classifiers go."""
        ours = {}
        for name, value in state.items():
            if name.startswith(("classifier.", "head.", "decode_head.conv_seg.")):
                continue
            for pattern, replacement in MIT_NAMES:
                name = re.sub(pattern, replacement, name)
            if ".kv." in name:
                ours[name.replace(".kv.", ".k.")], ours[name.replace(".kv.", ".v.")] = value.chunk(2)
            else:
                ours[name] = value
        return ours

    def logits(self, x):
        features = self.backbone(x)
        maps = [linear(feature).permute(0, 3, 1, 2) for linear, feature in zip(self.linears, features)]
        size = maps[0].shape[-2:]                                                              # stride 4
        maps = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps]
        return self.classifier(self.dropout(self.fuse(torch.cat(maps[::-1], dim=1))))          # deepest first, as published


# --- Mask2Former ---
# Tokens travel as (B, N, C): the pixels of three maps, stride 32, 16 and 8, one map after the other.

def sine_position(h: int, w: int, dim: int) -> torch.Tensor:
    """(h w, dim): dim / 4 sines and cosines of y, then of x, both 0 to 2 pi over the map, at frequencies from 1 down to 10^-4."""
    def code(n):
        angle = torch.arange(1, n + 1)[:, None] * (2 * math.pi / n) / 10_000 ** (torch.arange(dim // 4) / (dim // 4))
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)                      # (n, dim / 2)
    return torch.cat([code(h).repeat_interleave(w, 0), code(w).repeat(h, 1)], dim=1)


def deformable_attention(value, places, weights, sizes) -> torch.Tensor:
    """Weighted sum over maps and points of what each head finds at its places (Deformable DETR, eq. 3).

    Args:
        value: (B, sum of h w, heads, C), the pixels of maps of `sizes` [(h, w), ...], one map after the other.
        places: (B, N, heads, maps, points, 2), x and y, 0 to 1 over the map, zero around it.   weights: (B, N, heads, maps, points).
    Returns: (B, N, heads C).
    """
    B, N, num_heads = places.shape[:3]
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)                                      # (B heads, N, maps, points, 2)
    weights, total = weights.transpose(1, 2).flatten(0, 1)[:, None], 0                         # (B heads, 1, N, maps, points)
    for i, (pixels, (h, w)) in enumerate(zip(value.split([h * w for h, w in sizes], dim=1), sizes)):
        pixels = pixels.permute(0, 2, 3, 1).reshape(B * num_heads, -1, h, w).to(grid.dtype)
        found = F.grid_sample(pixels, grid[:, :, i], align_corners=False)                      # (B heads, C, N, points)
        total = total + (found * weights[:, :, :, i]).sum(-1)
    return total.view(B, -1, N).transpose(1, 2)


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class DeformableLayer(nn.Module):
    """Every pixel looks at `points` places in each map, found and weighed by itself, then passes an MLP."""

    def __init__(self, dim: int, num_heads: int = 8, maps: int = 3, points: int = 4):
        super().__init__()
        self.shape = (num_heads, maps, points)
        self.offsets, self.weights = (nn.Linear(dim, num_heads * maps * points * n) for n in (2, 1))
        self.value, self.out, self.ffn = nn.Linear(dim, dim), nn.Linear(dim, dim), mlp(dim, 4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)
        angle = torch.arange(num_heads) * (2 * math.pi / num_heads)                            # each head starts with its own direction,
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)                                  # at 1 .. points pixels
        ray = (ray / ray.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, points + 1)[:, None]
        self.offsets.bias.data = ray.expand(*self.shape, 2).flatten().clone()

    def forward(self, x, position, centre, sizes):                                             # centre (N, 2): x, y of the pixels, 0 to 1
        query, extent = x + position, torch.tensor([(w, h) for h, w in sizes], device=x.device)
        places = centre[:, None, None, None] + self.offsets(query).float().unflatten(-1, (*self.shape, 2)) / extent[:, None]
        weights = self.weights(query).float().unflatten(-1, (self.shape[0], -1)).softmax(-1).unflatten(-1, self.shape[1:])
        value = self.value(x).unflatten(-1, (self.shape[0], -1))
        x = self.norm1(x + self.out(deformable_attention(value, places, weights, sizes)))
        return self.norm2(x + self.ffn(x))


class PixelDecoder(nn.Module):
    """Lets the maps at stride 32, 16 and 8 exchange what they see; then, with the one at stride 4, an embedding per pixel there."""

    def __init__(self, channels, dim: int, layers: int):
        super().__init__()
        def conv_gn(c_in, kernel=1):
            return nn.Sequential(nn.Conv2d(c_in, dim, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(32, dim))
        self.project = nn.ModuleList(conv_gn(c) for c in channels[:0:-1])                      # stride 32, 16, 8
        self.level = nn.Parameter(torch.randn(3, dim))
        self.layers = nn.ModuleList(DeformableLayer(dim) for _ in range(layers))
        self.low, self.join = conv_gn(channels[0]), nn.Sequential(conv_gn(dim, 3), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, features):
        """Four maps, stride 4 to 32 -> tokens, their positions and their sizes, each for three maps; pixels (B, C, H/4, W/4)."""
        maps = [project(feature) for project, feature in zip(self.project, features[:0:-1])]
        x, sizes = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1), [m.shape[-2:] for m in maps]
        position = torch.cat([sine_position(*size, x.shape[-1]).to(x.device) + level for size, level in zip(sizes, self.level)])
        centre = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in sizes]
        centre = torch.cat(centre).to(x.device)
        for layer in self.layers:
            x = layer(x, position, centre, sizes)
        counts, low = [h * w for h, w in sizes], self.low(features[0])
        tokens = x.split(counts, dim=1)
        deep = tokens[2].transpose(1, 2).unflatten(2, sizes[2])                                # stride 8
        pixels = self.join(low + F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False))
        return tokens, position.split(counts), sizes, pixels


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        return self.out(attend(self.q(query), self.k(key), self.v(value), self.num_heads, mask))


class QueryLayer(nn.Module):
    """The queries look at the pixels they claim, then at each other, then pass an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.cross, self.own, self.ffn = Attention(dim), Attention(dim), mlp(dim, 8 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, x_position, tokens, position, mask):
        x = self.norms[0](x + self.cross(x + x_position, tokens + position, tokens, mask))
        x = self.norms[1](x + self.own(x + x_position, x + x_position, x))
        return self.norms[2](x + self.ffn(x))


def claimed(masks: torch.Tensor, size) -> torch.Tensor:
    """Where a query may look: the pixels of a map that its mask logits (B, Q, h, w) claim, or all if none. (B, 1, Q, H W) bool."""
    seen = F.interpolate(masks.detach(), size=size, mode="bilinear", align_corners=False).flatten(2) >= 0
    return (seen | ~seen.any(-1, keepdim=True))[:, None]


def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs of least total cost, min(n, m) of them: the Hungarian method by shortest augmenting paths.

    Potentials u, v keep cost - u - v >= 0, and 0 on the pairs; each row adds its shortest path to a free column (Dijkstra): O(n^2 m).
    """
    if len(cost) > cost.shape[1]:
        return assign(cost.T)[::-1]
    n, m = cost.shape
    u, v, row_of = np.zeros(n), np.zeros(m), np.full(m, -1)
    for start in range(n):
        length, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, column, reach = start, -1, 0.0
        while row >= 0:
            through = reach + cost[row] - u[row] - v
            shorter = ~done & (through < length)
            length[shorter], before[shorter] = through[shorter], column
            column = int(np.where(done, np.inf, length).argmin())
            reach, row, done[column] = length[column], row_of[column], True
        done[column] = False
        u[start] += reach
        u[row_of[done]] += reach - length[done]
        v[done] -= reach - length[done]
        while column >= 0:                                                                     # swap the pairs along the path
            row_of[column] = start if before[column] < 0 else row_of[before[column]]
            column = before[column]
    columns = np.flatnonzero(row_of >= 0)
    return row_of[columns], columns


def draw_points(target: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of `count` random pixels per image of (B, H, W), none of them IGNORE unless all are.

    Returns: places (B, count, 2), x and y, -1 to 1 over the image as grid_sample counts; their classes (B, count).
    """
    h, w = target.shape[1:]
    valid = (target != IGNORE).flatten(1)
    index = torch.multinomial((valid | ~valid.any(1, keepdim=True)).float(), count, replacement=True)
    places = torch.stack([(2 * (index % w) + 1) / w, (2 * (index // w) + 1) / h], dim=-1) - 1
    return places, target.flatten(1).gather(1, index)


def read_points(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Bilinear values of (B, C, h, w) at (B, P, 2) -> (B, C, P)."""
    return F.grid_sample(maps, places[:, None], padding_mode="border", align_corners=False)[:, :, 0]


def dice_loss(both, either):
    """From sum of chance x truth and sum of chance + truth over the points, with one point of each added."""
    return 1 - (2 * both + 1) / (either + 1)


class Mask2Former(Segmenter):
    """Queries that each claim a mask and name its class: masked attention to three maps in turn, every layer judged.

    A class that occurs in an image is one segment, background too. Unlike the paper's: 3 deformable layers instead of 6, and 20 queries
    (2 K if that is more) instead of 100, for a handful of classes; as many points as the masks have pixels, 1024 to 12544, instead of
    12544, each the centre of a pixel; losses averaged over the layers, not summed (AdamW does not see the factor).
    """

    lr, no_object = 3e-4, 0.1

    def __init__(self, num_classes: int, backbone: str = "resnet18", dim: int = 256, pixel_layers: int = 3, layers: int = 9):
        super().__init__()
        self.num_classes, self.architecture = num_classes, backbone
        self.backbone = resnet(backbone)
        self.pixel_decoder = PixelDecoder([self.backbone.width // n for n in (8, 4, 2, 1)], dim, pixel_layers)
        self.queries, self.query_position = (nn.Parameter(torch.randn(max(20, 2 * num_classes), dim)) for _ in range(2))
        self.layers, self.norm = nn.ModuleList(QueryLayer(dim) for _ in range(layers)), nn.LayerNorm(dim)
        self.classifier, self.embed = nn.Linear(dim, num_classes + 1), mlp(dim, dim, dim, dim)  # the last class is "no object"

    def predictions(self, x):
        """Class logits (L, B, Q, K + 1) and mask logits (L, B, Q, H/4, W/4) of the bare queries and after each layer."""
        tokens, position, sizes, pixels = self.pixel_decoder(resnet_features(self.backbone, x))
        queries, classes, masks = self.queries.expand(len(x), -1, -1), [], []
        for i in range(len(self.layers) + 1):
            if i > 0:
                level = (i - 1) % 3
                seen = claimed(masks[-1], sizes[level])
                queries = self.layers[i - 1](queries, self.query_position, tokens[level], position[level], seen)
            normed = self.norm(queries)
            classes.append(self.classifier(normed).float())
            masks.append(torch.einsum("bqc,bchw->bqhw", self.embed(normed), pixels).float())
        return torch.stack(classes), torch.stack(masks)

    def logits(self, x):
        """Scores, not logits: the chance of each class times the mask, summed over the queries."""
        classes, masks = (p[-1] for p in self.predictions(x))
        masks = F.interpolate(masks, size=x.shape[-2:], mode="bilinear", align_corners=False).sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], masks)

    @torch.no_grad()
    def match(self, classes, masks, truth, present):
        """Give every class that occurs to the query that fits it best: indices (layer, image, query, class) of the pairs.

        Args: classes (L, B, Q, K + 1); masks (L, B, Q, P), logits at the points; truth (B, P); present (B, K) bool.
        """
        truth = (truth[..., None] == torch.arange(self.num_classes, device=truth.device)).float()      # (B, P, K)
        chance = masks.sigmoid()
        binary = (F.softplus(masks).sum(-1, keepdim=True) - masks @ truth) / masks.shape[-1]           # cross-entropy (L, B, Q, K)
        dice = dice_loss(chance @ truth, chance.sum(-1, keepdim=True) + truth.sum(1)[:, None])
        cost = 5 * binary + 5 * dice - 2 * classes.softmax(-1)[..., :-1]
        cost, present = cost.nan_to_num(0, 0, 0).double().cpu().numpy(), present.cpu().numpy()         # `fit` stops at NaN
        pairs = []
        for layer, image in np.ndindex(cost.shape[:2]):
            there = np.flatnonzero(present[image])
            queries, found = assign(cost[layer, image][:, there])
            pairs += [(layer, image, *pair) for pair in zip(queries, there[found])]
        return torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 4).T, device=classes.device)

    def loss(self, x, target):
        """2 cross-entropy of the classes + 5 (binary cross-entropy + Dice) of the masks at P points, 3/4 of them where it is unsure."""
        classes, masks = self.predictions(padded(x, mode="replicate"))
        target = padded(target, value=IGNORE)
        K, P = self.num_classes, min(12544, max(1024, target[0].numel() // 16))
        places, truth = draw_points(target, 3 * P + P // 4)
        present = torch.zeros(len(x), IGNORE + 1, device=x.device).scatter_(1, target.flatten(1), 1)[:, :K] > 0
        found = read_points(masks.detach().transpose(0, 1).flatten(1, 2), places[:, :P])               # (B, L Q, P)
        found = found.unflatten(1, (len(masks), -1)).transpose(0, 1)
        layer, image, query, k = self.match(classes, found, truth[:, :P], present)

        labels = torch.full(classes.shape[:3], K, device=x.device)
        labels[:, ~present.any(1)] = IGNORE
        labels[layer, image, query] = k
        weights = (labels != IGNORE) * torch.where(labels == K, self.no_object, 1.0)
        cross_entropy = F.cross_entropy(classes.flatten(0, 2), labels.flatten(), ignore_index=IGNORE, reduction="none")
        cross_entropy = (cross_entropy * weights.flatten()).sum() / weights.sum().clamp(min=1e-6)

        masks, places, truth = masks[layer, image, query][:, None], places[image], truth[image]        # a row per pair
        with torch.no_grad():
            unsure = read_points(masks, places[:, :3 * P])[:, 0].abs().topk(P - P // 4, largest=False).indices
        index = torch.cat([unsure, torch.arange(3 * P, 3 * P + P // 4, device=x.device).expand(len(k), -1)], dim=1)
        found = read_points(masks, places.gather(1, index[..., None].expand(-1, -1, 2)))[:, 0]         # (pairs, P)
        truth = (truth.gather(1, index) == k[:, None]).float()
        binary, chance = F.binary_cross_entropy_with_logits(found, truth, reduction="none").mean(1), found.sigmoid()
        dice = dice_loss((chance * truth).sum(1), (chance + truth).sum(1))
        return 2 * cross_entropy + 5 * (binary + dice).sum() / max(1, len(k))


# --- build ---

ARCHS = {"deeplabv3+": DeepLabV3Plus, "segformer": SegFormer, "mask2former": Mask2Former}


def check_arch(arch: str) -> None:
    """Raise ValueError unless `arch` is a name of ARCHS, or one with a ResNet backbone and that backbone: deeplabv3+:resnet50."""
    name, colon, backbone = arch.partition(":")
    if name not in ARCHS:
        raise ValueError(f"no architecture {arch!r}: choose one of {', '.join(ARCHS)}; the first and the last take a backbone, like "
                         "deeplabv3+:resnet50")
    if colon and (name == "segformer" or backbone not in RESNETS):
        raise ValueError(f"no architecture {arch!r}: " + ("SegFormer has one backbone, MiT-B0" if name == "segformer" else
                                                          f"no backbone {backbone!r}, choose {' or '.join(RESNETS)}"))


def build(arch: str, num_classes: int, seed: int = 0, **options) -> Segmenter:
    """A network with random weights that depend on `seed` alone. `options` are its own, e.g. the width of its layers, dim=64.

    Weights lie channels last in memory: with such images the ResNets are a tenth faster, on CPUs too.
    """
    check_arch(arch)
    name, colon, backbone = arch.partition(":")
    if colon:
        options["backbone"] = backbone
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ARCHS[name](num_classes, **options).to(memory_format=torch.channels_last)


def read_state(source: str | Path, architecture: str | None) -> dict:
    """The state dict in a file, or for "imagenet" torchvision's of `architecture`, from its cache or the network."""
    if source != "imagenet":
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
            return dict(state.get("state_dict", state).items())                                # some come inside a checkpoint
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            raise ValueError(f"{source} is no state dict written by torch.save") from error
    if architecture is None:
        raise ValueError("torchvision has no ImageNet weights for SegFormer: pass the file pytorch_model.bin of nvidia/mit-b0 on Hugging "
                         "Face, or mit_b0.pth of the original release")
    weights = torchvision.models.get_model_weights(architecture).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no ImageNet weights of {architecture}, neither here nor by download ({error}): fetch {weights.url} on another "
                         f"machine and pass the file, or put it into {torch.hub.get_dir()}/checkpoints") from error


def load_backbone(net: Segmenter, source: str | Path) -> str:
    """Load published weights into net.backbone, and into the head where the file has one for as many classes; say what was loaded.

    `source` is "imagenet" or a file: torchvision's ResNets for DeepLabV3+ and Mask2Former; for SegFormer those of Hugging Face
    (nvidia/mit-b0, nvidia/segformer-b0-*) or of the original release.
    """
    state, own = net.our_names(read_state(source, net.architecture)), net.state_dict()
    head = [name for name in state if not name.startswith("backbone.")]
    fits = all(name in own and own[name].shape == state[name].shape for name in head)
    state = {name: value for name, value in state.items() if fits or name not in head}
    wanted = {name for name in own if (head and fits) or name.startswith("backbone.")}
    wanted -= {name for name in wanted if name.endswith("num_batches_tracked") and name not in state}       # old files lack them
    shapes = [f"{name} of {tuple(state[name].shape)} instead of {tuple(own[name].shape)}" for name in state
              if name in wanted and state[name].shape != own[name].shape]
    missing, extra = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or extra or shapes:
        raise ValueError(f"{source} does not fit {type(net).__name__}'s backbone: missing {listed(missing)}; not wanted {listed(extra)}; "
                         f"of another shape {listed(shapes)}")
    net.load_state_dict(state, strict=False)                                                   # a backbone alone is not all of it
    return f"{source}, backbone " + ("and head" if head and fits else "only, its head is for other classes" if head else "only")


# --- training and prediction ---

def to_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 1 or 3, H, W) in 0..255 -> (B, 3, H, W) float, normalised as ImageNet; grey is repeated; channels last, as `build`."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {tuple(images.shape)}, expected (N, 1 or 3, H, W): drop or merge the other channels")
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def mix(real: tuple, synthetic: tuple, ratio: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, masks) of all real pairs and `ratio` times as many synthetic ones, none twice; with one seed a larger ratio only adds."""
    count, there = round(ratio * len(real[0])), len(synthetic[0])
    if not 0 <= count <= there:
        raise ValueError(f"{ratio:g} synthetic pairs per real one are {count} for {len(real[0])} real ones, but there are {there}: "
                         "generate more or lower the ratio")
    if real[0].shape[1:] != synthetic[0].shape[1:]:
        raise ValueError(f"real images are {tuple(real[0].shape[1:])} and synthetic ones {tuple(synthetic[0].shape[1:])}: read both alike")
    index = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:count]
    return tuple(torch.cat([r, s[index]]) for r, s in zip(real, synthetic))


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


SCHEDULES = {"poly": lambda done: (1 - done) ** 0.9, "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2}   # of the share done


def fit(net: Segmenter, images: torch.Tensor, masks: torch.Tensor, steps: int, batch_size: int = 8, lr: float | None = None,
        seed: int = 0, bf16: bool = False, progress: bool = False, sample_weight: torch.Tensor | None = None,
        schedule: str = "poly") -> dict:
    """Train `net` in place with AdamW; the learning rate warms up over a tenth of the steps while it decays to 0, see SCHEDULES.

    All randomness is a function of (seed, step); the same call gives the same weights bit for bit on the CPU (on CUDA up to rounding:
    the bilinear up-sampling adds its gradients in any order).

    Args:
        images: (N, 1 or 3, H, W) uint8.    masks: (N, H, W) int, class index or 255. Both are kept on the network's device.
        lr: None takes the network's own, net.lr.
        sample_weight: (N,) how readily an image is drawn among those of its class, e.g. to weigh real against generated ones.
    Returns: {"losses": one float per step, "time_s": float}
    Raises:  ValueError for masks that do not fit, FloatingPointError when the loss is no longer a number.
    """
    if len(images) != len(masks) or images.shape[-2:] != masks.shape[-2:] or len(images) == 0:
        raise ValueError(f"images are {tuple(images.shape)} and masks {tuple(masks.shape)}: need one mask per image, of its size")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"{steps} steps with a batch of {batch_size}: both must be at least 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
    device, start = next(net.parameters()).device, time.perf_counter()
    images, masks = images.to(device), masks.to(device)
    check_classes(masks, net.num_classes, "masks")
    table = draw_table(masks, net.num_classes, sample_weight)
    lr = net.lr if lr is None else lr
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
                group["lr"] = lr * min(1, (step + 1) / warmup) * SCHEDULES[schedule](step / steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = net.loss(to_input(x), target)
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 49 or step == steps - 1:                                           # not each step: looking waits for the GPU
                values = torch.stack(losses).tolist()
                bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
                if bad is not None:
                    raise FloatingPointError(f"the loss is {values[bad]} at step {bad} of {steps} with lr {lr:g}: try a smaller lr")
    net.eval()
    return {"losses": values, "time_s": time.perf_counter() - start}


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """(B, K, H, W) -> (B, H, W) class index."""
    return logits.argmax(1)


EVEN, PER_E = 128, 16


def odds(logits: torch.Tensor) -> torch.Tensor:
    """(B, K, H, W) -> (B, 2, H, W): the likeliest defect class, and its log-odds against the background as a byte.

    The byte is 128 + 16 log(p_class / p_background), rounded down and cut to 0..255: EVEN and above are the pixels that argmax gives to a defect.
    """
    best, kind = logits[:, 1:].float().max(1)
    level = (EVEN + PER_E * (best - logits[:, 0].float())).floor().clamp(0, 255)
    level = torch.where(logits.argmax(1) > 0, level.clamp(min=EVEN), level.clamp(max=EVEN - 1))       # ties as argmax has them
    return torch.stack([kind + 1, level.to(kind.dtype)], 1)


def masks_at(found: torch.Tensor, log_odds: float = 0) -> torch.Tensor:
    """Masks (N, H, W) from predictions read as `odds` (N, 2, H, W): a defect needs p_class / p_background >= e ** log_odds. 0: as argmax."""
    return found[:, 0] * (found[:, 1] >= EVEN + PER_E * log_odds)


@torch.inference_mode()
def predict(net: Segmenter, images: torch.Tensor, batch_size: int = 16, bf16: bool = False, read=likeliest) -> torch.Tensor:
    """(N, 1 or 3, H, W) uint8 -> (N, H, W) uint8 class index, or what `read` makes of the logits, on the CPU. Puts the network into eval mode."""
    net.eval()
    device = next(net.parameters()).device
    masks = []
    for batch in images.split(batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            masks.append(read(net(to_input(batch.to(device)))).to(torch.uint8).cpu())
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
    parser.add_argument("--arch", default="segformer", help=f"{' | '.join(ARCHS)}, or one with a larger backbone: deeplabv3+:resnet50, "
                        "mask2former:resnet50 (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"), help="resize to this (default: 64 64)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate of AdamW (default: 1e-3, mask2former 3e-4)")
    parser.add_argument("--schedule", default="poly", choices=SCHEDULES, help="how the learning rate decays (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, drawing and augmentation (default: %(default)s)")
    parser.add_argument("--backbone-weights", metavar="FILE", help="published weights, or imagenet: torchvision's (default: none)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/segment"), help="where results go (default: %(default)s)")
    args = parser.parse_args()

    device = pick_device(args.device)
    train, test = (open_dataset(args.data, tuple(args.size), split, **data_options(args)) for split in (args.split, args.test_split))
    config = {"arch": args.arch, "num_classes": len(train.classes), "seed": args.seed}
    net = build(**config)
    loaded = load_backbone(net, args.backbone_weights) if args.backbone_weights else "none, random"
    net.to(device)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.arch}, {parameters / 1e6:.1f} M parameters, backbone weights: {loaded}, on {device}\n"
          f"{describe(train)}\n{describe(test)}\nimages are {args.size[0]}x{args.size[1]}")

    bf16 = has_bf16(device)
    fitted = fit(net, *train.tensors(), args.steps, args.batch_size, args.lr, args.seed, bf16, progress=True,
                 schedule=args.schedule)
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
        "backbone_weights": loaded, "device": str(device), "bf16": bf16, "parameters": parameters,
        "train_images": len(train), "test_images": len(test), "iou": iou, **means, "absent": [train.classes[i] for i in score["absent"]],
        "last_loss": fitted["losses"][-1], "train_time_s": round(fitted["time_s"], 1)})
    saved = {"build": config, "model": net.cpu().state_dict(), "classes": list(train.classes), "size": list(args.size)}
    write_atomically(args.out / "segment.pt", lambda path: torch.save(saved, path))
    rows = [(test.samples[i].kind, [images[i], overlay(images[i], target[i]), overlay(images[i], pred[i])])
            for i in range(0, len(test), math.ceil(len(test) / 12))]
    write_image(args.out / "predictions.png", sheet(rows, ("image", "truth", "prediction"), train.classes))
    print(f"wrote {args.out}/segment.json, segment.pt, predictions.png")


if __name__ == "__main__":
    run_main(main)
