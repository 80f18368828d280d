"""Segmenters for the question "do generated defects help?": DeepLabV3+ and SegFormer MiT-B0.

    python segment.py --data drawn:pill --arch segformer        # train one, print IoU, write runs/segment/
    python segment.py --predict PHOTOS --out MASKS              # masks of its segment.pt for new photos

A network takes (B, 3, H, W) ImageNet-normalised images (see to_input) of any H, W and returns (B, K, H, W)
scores, the highest of which is the prediction; K = num_classes counts background. Masks are class indices;
255 (IGNORE) marks pixels that neither loss nor score counts.

References: DeepLabV3+ Chen et al. 2018, arXiv 1802.02611; SegFormer Xie et al. 2021, arXiv 2105.15203.
"""
import argparse
import math
import pickle
import re
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from datasets import (IGNORE, add_data_flags, as_tensor, begin, defects, describe, fingerprint, gaps,
                      has_bf16, images_in, listed, open_dataset, open_picture, overlay, pair_paths,
                      pick_device, run_main, sheet, to_mode, white_of, write_atomically, write_image,
                      write_json)
from inspect_rules import IMAGE_SUFFIXES


def padded(x: torch.Tensor, **how) -> torch.Tensor:
    """Pad right and bottom to multiples of 32, at least 64: at stride 32 BatchNorm needs several pixels."""
    h, w = x.shape[-2:]
    return F.pad(x, (0, max(-w % 32, 64 - w), 0, max(-h % 32, 64 - h)), **how)


class Segmenter(nn.Module):
    """What all networks share. One defines `logits`: (B, 3, H, W) of multiples of 32 -> (B, K, H/s, W/s)."""

    lr = 1e-3                               # of `fit`, unless told otherwise
    backbones, backbone_name = (), None     # torchvision's names to choose from, and the one chosen
    renamings = [(r"^(?!fc\.)", "backbone.")]       # of published weights; fc is the head for ImageNet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        x = padded(x, mode="replicate")
        scores = F.interpolate(self.logits(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return scores[..., :h, :w]

    def our_names(self, state: dict) -> dict:
        """A published state dict under the names of this network."""
        for pattern, replacement in self.renamings:
            state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
        return state

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy + soft Dice averaged over the classes that occur in `target` (B, H, W) int64.

        A defect of 20 pixels hardly moves a cross-entropy over 4096; Dice counts per class, so it weighs as
        much as the background. Tried on spots, scratches and stains of 9 to 80 px (DeepLabV3+ / SegFormer):
        mIoU 0.20 / 0.28 with cross-entropy alone, 0.54 / 0.48 with both.
        """
        logits = self(x).float()
        valid = target != IGNORE                                          # a mean is NaN where nothing is
        cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        truth = F.one_hot(target.where(valid, 0), logits.shape[1]).permute(0, 3, 1, 2) * valid[:, None]
        prob = logits.softmax(1) * valid[:, None]
        overlap, total = (prob * truth).sum((0, 2, 3)), (prob + truth).sum((0, 2, 3))          # (K,)
        present = truth.sum((0, 2, 3)) > 0
        dice = 1 - 2 * overlap / total.clamp(min=1e-6)
        return cross_entropy / valid.sum().clamp(min=1) + (dice * present).sum() / present.sum().clamp(min=1)


# --- DeepLabV3+ ---

def resnet(name: str) -> nn.Module:
    net = torchvision.models.get_model(name)
    net.width, net.fc = net.fc.in_features, nn.Identity()                         # channels of its last stage
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
    depthwise = nn.Conv2d(c_in, c_in, 3, padding=dilation, dilation=dilation, groups=c_in, bias=False)
    return nn.Sequential(depthwise, *conv_bn_relu(c_in, c_out))


def dilate(stage: nn.Module) -> None:
    """Double a ResNet stage's resolution: dilation for stride, which torchvision refuses for resnet18."""
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
            elif conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated separable 3x3 and the image mean, joined by a 1x1.

    The image branch has a bias, not the paper's BatchNorm: one value of a batch of 1 has no variance.
    """

    def __init__(self, c_in: int, c_out: int = 256, rates=(6, 12, 18)):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(c_in, c_out)])
        self.branches.extend(separable(c_in, c_out, rate) for rate in rates)
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_in, c_out, 1), nn.ReLU())
        self.join = nn.Sequential(conv_bn_relu(c_out * (len(rates) + 2), c_out), nn.Dropout(0.1))

    def forward(self, x):
        image = self.image(x).expand(-1, -1, *x.shape[-2:])
        return self.join(torch.cat([branch(x) for branch in self.branches] + [image], dim=1))


class DeepLabV3Plus(Segmenter):
    """ResNet at output stride 16 -> ASPP; joined at stride 4 with early features for sharp edges."""

    backbones = "resnet18", "resnet50"

    def __init__(self, num_classes: int, backbone: str = "resnet18"):
        super().__init__()
        self.num_classes, self.backbone_name = num_classes, backbone
        self.backbone = resnet(backbone)
        dilate(self.backbone.layer4)
        self.aspp = ASPP(self.backbone.width)
        self.low = conv_bn_relu(self.backbone.width // 8, 48)
        self.decoder = nn.Sequential(separable(256 + 48, 256), separable(256, 256))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def logits(self, x):
        low, *_, deep = resnet_features(self.backbone, x)                                   # strides 4 and 16
        low = self.low(low)
        deep = F.interpolate(self.aspp(deep), size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.decoder(torch.cat([deep, low], dim=1)))


# --- SegFormer ---
# Features travel as (B, H, W, C): Linear and LayerNorm act on the last axis, convolutions through `spatial`.
# LayerNorm eps is PyTorch's 1e-5, as in Hugging Face's model, whose layer_norm_eps=1e-6 is never read.

def spatial(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to (B, H, W, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbedding(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(c_in, c_out, kernel, stride, padding)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x):
        return self.norm(spatial(self.proj, x))


def attend(q, k, v, num_heads: int, mask=None) -> torch.Tensor:
    """Multi-head attention of (B, N, C) to (B, M, C); mask (B, 1, N, M): True where a query may look."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, C)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class EfficientAttention(nn.Module):
    """Self-attention of every pixel to a map that is coarser by `reduction` in height and width."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.reduce = PatchEmbedding(dim, dim, reduction, reduction, 0) if reduction > 1 else nn.Identity()

    def forward(self, x):
        tokens, coarse = x.flatten(1, 2), self.reduce(x).flatten(1, 2)        # (B, H W, C), (B, H W / R^2, C)
        found = attend(self.q(tokens), self.k(coarse), self.v(coarse), self.num_heads)
        return self.out(found).reshape(x.shape)


class MixFFN(nn.Module):
    """Pixel-wise MLP with a depthwise 3x3 inside, whose zero padding tells a pixel where it is."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = 4 * dim
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x):
        return self.fc2(F.gelu(spatial(self.dwconv, self.fc1(x))))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, reduction: int, drop: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = EfficientAttention(dim, num_heads, reduction)
        self.ffn = MixFFN(dim)
        self.drop = torchvision.ops.StochasticDepth(drop, mode="row")

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.ffn(self.norm2(x)))


class MiT(nn.Module):
    """Mix Transformer B0: four stages of two blocks, stride 4 to 32; stochastic depth grows from 0 to 0.1."""

    dims, num_heads, reductions = (32, 64, 160, 256), (1, 2, 5, 8), (8, 4, 2, 1)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for i, (dim, num_heads, reduction) in enumerate(zip(self.dims, self.num_heads, self.reductions)):
            patch = PatchEmbedding(self.dims[i - 1], dim, 3, 2, 1) if i else PatchEmbedding(3, dim, 7, 4, 3)
            blocks = [TransformerBlock(dim, num_heads, reduction, 0.1 * (2 * i + j) / 7) for j in range(2)]
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
        return features                                                                 # 4 x (B, H/s, W/s, C)


# Names of Hugging Face's nvidia/mit-b0 and nvidia/segformer-b0-* -> ours, applied in this order.
MIT_NAMES = [
    (r"^segformer\.encoder\.", "backbone."),
    (r"patch_embeddings\.(\d)\.proj\.", r"stages.\1.0.proj."),
    (r"patch_embeddings\.(\d)\.layer_norm\.", r"stages.\1.0.norm."),
    (r"block\.(\d)\.0\.", r"stages.\1.1."), (r"block\.(\d)\.1\.", r"stages.\1.2."),
    (r"backbone\.layer_norm\.(\d)\.", r"backbone.stages.\1.3."),
    (r"\.layer_norm_([12])\.", r".norm\1."), (r"attention\.self\.(q|k|v)[a-z]+\.", r"attention.\1."),
    (r"attention\.self\.sr\.", "attention.reduce.proj."),
    (r"attention\.self\.layer_norm\.", "attention.reduce.norm."),
    (r"attention\.output\.dense\.", "attention.out."),
    (r"mlp\.dense([12])\.", r"ffn.fc\1."), (r"mlp\.dwconv\.dwconv\.", "ffn.dwconv."),
    (r"^decode_head\.linear_c\.(\d)\.proj\.", r"linears.\1."), (r"^decode_head\.linear_fuse\.", "fuse.0."),
    (r"^decode_head\.batch_norm\.", "fuse.1."), (r"^decode_head\.classifier\.", "classifier.")]


class SegFormer(Segmenter):
    """MiT-B0 and the all-MLP head: bring the four maps to 256 channels and stride 4, join them, classify."""

    renamings = MIT_NAMES

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
        maps = [F.interpolate(m, size=maps[0].shape[-2:], mode="bilinear", align_corners=False) for m in maps]
        joined = self.fuse(torch.cat(maps[::-1], dim=1))                # deepest first, as published
        return self.classifier(self.dropout(joined))


# --- build ---

ARCHS = {"deeplabv3+": DeepLabV3Plus, "segformer": SegFormer}       # experiments/mask2former.py adds a third


def check_arch(arch: str) -> None:
    """Raise ValueError unless `arch` names one of ARCHS, alone or with a backbone: deeplabv3+:resnet50."""
    known = [*ARCHS, *(f"{name}:{backbone}" for name in ARCHS for backbone in ARCHS[name].backbones)]
    if arch not in known:
        raise ValueError(f"no architecture {arch!r}: choose one of {', '.join(known)}")


def build(arch: str, num_classes: int, seed: int = 0, **options) -> Segmenter:
    """A network with random weights that depend on `seed` alone. `options` are its own, e.g. a width.

    Weights lie channels last in memory: with such images the ResNets are a tenth faster, on CPUs too.
    """
    check_arch(arch)
    name, *backbone = arch.split(":")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ARCHS[name](num_classes, *backbone, **options).to(memory_format=torch.channels_last)


def read_state(source: str | Path, backbone_name: str | None) -> dict:
    """The state dict in a file, or for "imagenet" torchvision's of `backbone_name`."""
    if source != "imagenet":
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
            return dict(state.get("state_dict", state).items())                # some come inside a checkpoint
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            raise ValueError(f"{source} is no state dict written by torch.save") from error
    if backbone_name is None:
        raise ValueError("torchvision has no ImageNet weights of SegFormer: pass the file pytorch_model.bin "
                         "of nvidia/mit-b0 on Hugging Face")
    weights = torchvision.models.get_model_weights(backbone_name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no ImageNet weights of {backbone_name}, neither here nor by download ({error}): "
                         f"fetch {weights.url} and pass the file") from error


def load_backbone(net: Segmenter, source: str | Path) -> str:
    """Load published weights into net.backbone, and into a head for as many classes; say what was loaded.

    source: "imagenet", a file of torchvision (ResNets) or of Hugging Face (nvidia/mit-b0, segformer-b0-*).
    """
    state = net.our_names(read_state(source, net.backbone_name))
    theirs, ours = ({f"{name} {tuple(value.shape)}" for name, value in part.items()}
                    for part in (state, net.state_dict()))
    head = {each for each in theirs if not each.startswith("backbone.")}
    with_head = bool(head) and head <= ours
    if not with_head:
        state = {name: value for name, value in state.items() if name.startswith("backbone.")}
        theirs, ours = theirs - head, {each for each in ours if each.startswith("backbone.")}
    missing = sorted(each for each in ours - theirs if "num_batches_tracked" not in each)  # not in old files
    if missing or theirs - ours:
        raise ValueError(f"{source} does not fit {type(net).__name__}'s backbone: missing {listed(missing)}; "
                         f"not wanted {listed(sorted(theirs - ours))}")
    net.load_state_dict(state, strict=False)                               # a backbone alone is not all of it
    return f"{source}, backbone {'and head' if with_head else 'only'}"


# --- training and prediction ---

def to_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 1 or 3, H, W) in 0..255 -> (B, 3, H, W) float, normalised as ImageNet, channels last as `build`."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {tuple(images.shape)}, expected (N, 1 or 3, H, W)")
    normal = normalize(images.expand(-1, 3, -1, -1) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return normal.contiguous(memory_format=torch.channels_last)


def draw_table(masks: torch.Tensor) -> torch.Tensor:
    """(rows, N): a row for each defect class that occurs, and one for none: 1 for the images that have it."""
    defect = defects(masks)
    has = [(masks == k).flatten(1).any(1) for k in masks[defect].unique()]
    rows = torch.stack([~defect.flatten(1).any(1), *has]).float().cpu()
    return rows[rows.any(1)]


def draw_indices(table: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a row, then an image of it: what is on one photo comes up as often as what is on fifty."""
    rows = torch.randint(len(table), (batch_size,), generator=generator)
    return torch.multinomial(table[rows], 1, generator=generator)[:, 0]


def mix(real: tuple, generated: tuple, ratio: float, seed: int = 0) -> tuple:
    """All real pairs and `ratio` times as many generated ones, none twice; a larger ratio only adds.

    Returns: images, masks, and the table to draw them by: generated pairs come up `ratio` times as often as
             real ones, whatever they show, and among either all classes alike.
    """
    count, there = round(ratio * len(real[0])), len(generated[0])
    if not 0 <= count <= there:
        raise ValueError(f"{ratio:g} generated pairs for each of {len(real[0])} real ones are {count}, "
                         f"but there are {there}: generate more or lower the ratio")
    index = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:count]
    groups = real, tuple(part[index] for part in generated)
    tables = [draw_table(masks) for _, masks in groups]
    # chance of each image to be drawn from its group alone, times the group's size
    row = torch.cat([table.shape[1] * (table / table.sum(1, keepdim=True)).mean(0) for table in tables])
    return (*(torch.cat(parts) for parts in zip(*groups)), row[None])


def random_view(images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator) -> tuple:
    """Flips, zoom by 0.75 to 1.5 at a random place, contrast and brightness; one draw per image.

    Args:    images (B, C, H, W) in 0..255, masks (B, H, W) class index.
    Returns: float images in 0..255, int64 masks; what lies outside the photo is IGNORE.
    """
    u = torch.rand(len(images), 7, generator=generator).to(images.device)
    window = 1 / (0.75 * 2 ** u[:, :1])                                        # side seen / side of the photo
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, [0, 1], [0, 1]] = torch.where(u[:, 1:3] < 0.5, -window, window)
    theta[:, :, 2] = (2 * u[:, 3:5] - 1) * (1 - window).abs()
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    outside = masks[:, None].float() - IGNORE                                     # padded with 0, i.e. IGNORE
    masks = F.grid_sample(outside, grid, mode="nearest", align_corners=False)[:, 0] + IGNORE
    contrast, brightness = (u[:, i, None, None, None] for i in (5, 6))
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (0.8 + 0.4 * contrast) + mean + 255 * (0.2 * brightness - 0.1)
    return images.clamp(0, 255), masks.long()


def fit(net: Segmenter, images: torch.Tensor, masks: torch.Tensor, steps: int, batch_size: int = 8,
        lr: float | None = None, seed: int = 0, bf16: bool = False, progress: bool = False,
        table: torch.Tensor | None = None) -> list[float]:
    """Train `net` in place with AdamW: the learning rate warms up over a tenth of the steps and decays to 0.

    All randomness is a function of (seed, step); the same call gives the same weights bit for bit on the CPU
    (on CUDA up to rounding: the bilinear up-sampling adds its gradients in any order).

    Args:    images (N, 1 or 3, H, W) uint8, masks (N, H, W) class index or 255: both go to the network's
             device. lr: None takes net.lr. table (rows, N): draws images, as of draw_table(masks) if None.
    Returns: the loss of each step.
    Raises:  ValueError for masks that do not fit, FloatingPointError when the loss is no longer a number.
    """
    if len(images) != len(masks) or images.shape[-2:] != masks.shape[-2:] or len(images) == 0:
        raise ValueError(f"images are {tuple(images.shape)} and masks {tuple(masks.shape)}: they must fit")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"{steps} steps with a batch of {batch_size}: both must be at least 1")
    device = next(net.parameters()).device
    images, masks = images.to(device), masks.to(device)
    check_classes(masks, net.num_classes, "masks")
    table = draw_table(masks) if table is None else table
    lr, warmup, losses = net.lr if lr is None else lr, max(1, steps // 10), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, fused=True)
    net.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):     # of dropout
        for step in tqdm(range(steps), desc="segmenter", disable=not progress):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            torch.manual_seed(seed * 1_000_003 + step)
            index = draw_indices(table, batch_size, generator).to(device)
            x, target = random_view(images[index], masks[index], generator)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup) * (1 - step / steps) ** 0.9
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = net.loss(to_input(x), target)
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 49 or step == steps - 1:                # not each step: looking waits for the GPU
                for at, value in enumerate(torch.stack(losses).tolist()):
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the loss is {value} at step {at}: try a smaller lr")
    net.eval()
    return torch.stack(losses).tolist()


@torch.inference_mode()
def predict(net: Segmenter, images: torch.Tensor, batch_size: int = 16, bf16: bool = False) -> torch.Tensor:
    """(N, 1 or 3, H, W) uint8 -> (N, H, W) uint8 class index, on the CPU. Puts the network into eval mode."""
    net.eval()
    device, masks = next(net.parameters()).device, []
    for batch in images.split(batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            masks.append(net(to_input(batch.to(device))).argmax(1).to(torch.uint8).cpu())
    return torch.cat(masks)


def load_segmenter(path, device="cpu"):
    """The network that `python segment.py` wrote, as (images -> masks, what it wrote beside the weights).

    Images uint8 (N, C, H, W) of any size are shown to it at the size that it was trained at; masks are uint8
    (N, H, W). Raises ValueError for other files.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        net = build(**saved["build"])
        net.load_state_dict(saved["model"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; train a segmenter first: "
                                "python segment.py --data FOLDER --out FOLDER") from None
    except OSError:
        raise
    except Exception as error:      # the reader raises many types; to the user they are one fact
        raise ValueError(f"{path}: damaged, or not written by segment.py ({str(error)[:80]})") from None
    if "iou" not in saved:
        raise ValueError(f"{path}: of an older segment.py; train it again")
    device = torch.device(device)
    net.to(device)

    def masks_of(images):
        small = F.interpolate(images.float(), saved["size"], mode="bilinear", antialias=True).round().byte()
        masks = predict(net, small, bf16=has_bf16(device))
        return F.interpolate(masks[:, None], images.shape[2:], mode="nearest-exact")[:, 0]
    return masks_of, saved


# --- score ---

def check_classes(masks: torch.Tensor, num_classes: int, name: str) -> None:
    wrong = masks[(masks != IGNORE) & ((masks < 0) | (masks >= num_classes))]
    if len(wrong):
        raise ValueError(f"{name} hold the values {wrong.unique().tolist()}, but the classes are "
                         f"0..{num_classes - 1} (and {IGNORE} = ignore): are they 0/255 or colour masks?")


def confusion_matrix(pred: torch.Tensor, target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(K, K) int64 pixel counts, [target, pred]. Matrices of several sets add up."""
    valid = target != IGNORE
    pred, target = pred[valid].long(), target[valid].long()
    check_classes(target, num_classes, "targets")
    return torch.bincount(target * num_classes + pred, minlength=num_classes ** 2).view(2 * [num_classes])


def miou(confusion: torch.Tensor) -> dict:
    """Intersection over union of a whole set: {"iou": K floats, "miou": mean over defect classes,
    "miou_with_background"}. A class that no target pixel has is left out of the means, its IoU is nan; pixels
    wrongly given to it still count as misses of their true class.
    """
    confusion = confusion.double()
    hit, target = confusion.diag(), confusion.sum(1)
    iou = hit / (target + confusion.sum(0) - hit)
    iou[target == 0] = math.nan
    return {"iou": iou.tolist(), "miou": iou[1:].nanmean().item(),
            "miou_with_background": iou.nanmean().item()}


# --- command ---

def predict_photos(args):
    """Masks of native size for a folder of photos, in args.out, with overlays and links to the photos."""
    out, photos = Path(args.out), images_in(Path(args.predict))
    masks_of, saved = load_segmenter(args.weights, pick_device(args.device))
    if not photos:
        raise ValueError(f"--predict {args.predict}: no photos in this folder, or no such folder")
    begin(out, saved["classes"], {"weights": fingerprint(Path(args.weights))})
    if missed := [name for name, iou in zip(saved["classes"][1:], saved["iou"][1:]) if not iou]:
        print(f"warning: this segmenter found no {', '.join(missed)} in its test photos; train it for longer")
    white = saved["white"] or white_of(photos.values())
    if white != saved["white"]:
        print(f"warning: photos of 16 bits, but this segmenter learned from 8: white is taken to be {white}")
    for (kind, stem), path in tqdm(photos.items(), unit="photo"):
        link, mask_path, *_ = pair_paths(out, stem, kind)
        link.parent.mkdir(parents=True, exist_ok=True)
        for end in IMAGE_SUFFIXES:
            if (old := link.with_suffix(end)).is_symlink():             # to an earlier photo of this name
                old.unlink()
        with suppress(OSError):                                         # not possible on every disk
            link.with_suffix(path.suffix.lower()).symlink_to(path.resolve())    # what verdicts are drawn on
        image = as_tensor(to_mode(open_picture(path), 3, white))
        mask = masks_of(image[None])[0]
        write_image(out / "overlay" / kind / f"{stem}.png", overlay(image, mask))
        write_image(mask_path, mask[None])
    print(f"{len(photos)} masks in {out}; next: python inspect_rules.py --standard NAME --masks {out}")


def train_and_score(args):
    """Train a segmenter, score it on --test-split, and write it with pictures to args.out."""
    device, out = pick_device(args.device), Path(args.out)
    train, test = (open_dataset(args.data, args.size, split, args.object)
                   for split in (args.split, args.test_split))
    config = {"arch": args.arch, "num_classes": len(train.classes), "seed": args.seed}
    net, bf16 = build(**config), has_bf16(device)
    loaded = load_backbone(net, args.backbone_weights) if args.backbone_weights else "none, random"
    count = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{args.arch}, {count:.1f} M parameters, backbone weights: {loaded}, on {device}", describe(train),
          describe(test), f"images are {args.size[0]}x{args.size[1]}",
          *(f"warning: {sentence}" for sentence in gaps(train)), sep="\n")
    pairs = train.tensors()
    fit(net.to(device), *pairs, args.steps, args.batch_size, args.lr, args.seed, bf16, progress=True)
    images, target = test.tensors()
    pred = predict(net, images, bf16=bf16)
    score = miou(confusion_matrix(pred, target, len(test.classes)))
    for name, iou in zip(train.classes, score["iou"]):
        print(f"  {name:<24}{'no pixel in ' + args.test_split if math.isnan(iou) else f'{iou:.4f}'}")
    print(f"miou {score['miou']:.4f}  miou_with_background {score['miou_with_background']:.4f}")
    write_json(out / "segment.json", {"settings": vars(args), "classes": train.classes, **score})
    saved = {"build": config, "model": net.cpu().state_dict(), "classes": list(train.classes),
             "size": args.size, "white": train.white, "iou": score["iou"]}
    write_atomically(out / "segment.pt", lambda path: torch.save(saved, path))
    rows = [(test.samples[i].kind, [images[i], overlay(images[i], target[i]), overlay(images[i], pred[i])])
            for i in range(0, len(test), math.ceil(len(test) / 12))]
    write_image(out / "predictions.png", sheet(rows, ("image", "truth", "prediction"), train.classes))
    print(f"wrote {out}/segment.json, segment.pt, predictions.png")


def main():
    parser = argparse.ArgumentParser(description="Train and score one segmenter, or predict new photos.")
    add_data_flags(parser, split="train")
    add = parser.add_argument
    add("--test-split", default="test", help="the images to score on (default: %(default)s)")
    add("--arch", default="segformer", help="or deeplabv3+, deeplabv3+:resnet50 (default: %(default)s)")
    add("--size", type=int, nargs=2, default=[64, 64], metavar=("H", "W"), help="of images")
    add("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="images per step (default: %(default)s)")
    add("--lr", type=float, help="learning rate of AdamW (default: 1e-3)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--backbone-weights", metavar="FILE", help="or imagenet: torchvision's")
    add("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator if there is one)")
    add("--out", default="runs/segment", help="default: %(default)s")
    add("--predict", metavar="PHOTOS", help="do not train: write masks of this folder's photos to --out")
    add("--weights", default="runs/segment/segment.pt", metavar="FILE", help="of --predict (default: "
        "%(default)s)")
    args = parser.parse_args()
    (predict_photos if args.predict else train_and_score)(args)


if __name__ == "__main__":
    run_main(main)
