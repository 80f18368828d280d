"""Mask2Former, the third network of the paper's table (experiments.paper_table).

    python -m experiments.mask2former --arch mask2former --data FOLDER --size 128 128      as segment.py

References: Mask2Former, Cheng et al. 2022, arXiv 2112.01527; its pixel decoder is that of Deformable DETR,
Zhu et al. 2021, arXiv 2010.04159.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets import run_main
from segment import ARCHS, IGNORE, DeepLabV3Plus, Segmenter, attend, main, padded, resnet, resnet_features


# --- the network ---
# Tokens travel as (B, N, C): the pixels of three maps, stride 32, 16 and 8, one map after the other.

def sine_position(h: int, w: int, dim: int) -> torch.Tensor:
    """(h w, dim): dim / 4 sines and cosines of y, then of x. Both run from 0 to 2 pi over the map; the
    frequencies from 1 down to 10^-4.
    """
    period = 10_000 ** (torch.arange(dim // 4) / (dim // 4))

    def code(n):
        angle = torch.arange(1, n + 1)[:, None] * (2 * math.pi / n) / period
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)                      # (n, dim / 2)
    return torch.cat([code(h).repeat_interleave(w, 0), code(w).repeat(h, 1)], dim=1)


def deformable_attention(value, places, weights, sizes) -> torch.Tensor:
    """Weighted sum over maps and points of what each head finds at its places (Deformable DETR, eq. 3).

    Args:
        value:   (B, sum of h w, heads, C), the pixels of maps of `sizes` [(h, w), ...], one after the other.
        places:  (B, N, heads, maps, points, 2), x and y, 0 to 1 over the map; around it is zero.
        weights: (B, N, heads, maps, points).
    Returns: (B, N, heads C).
    """
    B, N, num_heads = places.shape[:3]
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)                      # (B heads, N, maps, points, 2)
    weights, total = weights.transpose(1, 2).flatten(0, 1)[:, None], 0         # (B heads, 1, N, maps, points)
    for i, (pixels, (h, w)) in enumerate(zip(value.split([h * w for h, w in sizes], dim=1), sizes)):
        pixels = pixels.permute(0, 2, 3, 1).reshape(B * num_heads, -1, h, w).to(grid.dtype)
        found = F.grid_sample(pixels, grid[:, :, i], align_corners=False)            # (B heads, C, N, points)
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
        # Each head starts with its own direction, and looks 1, 2, ... pixels far.
        angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = (ray / ray.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, points + 1)[:, None]
        self.offsets.bias.data = ray.expand(*self.shape, 2).flatten().clone()

    def forward(self, x, position, centre, sizes):                 # centre (N, 2): x, y of the pixels, 0 to 1
        query, extent = x + position, torch.tensor([(w, h) for h, w in sizes], device=x.device)
        offsets = self.offsets(query).float().unflatten(-1, (*self.shape, 2)) / extent[:, None]
        places = centre[:, None, None, None] + offsets
        weights = self.weights(query).float().unflatten(-1, (self.shape[0], -1)).softmax(-1)
        weights = weights.unflatten(-1, self.shape[1:])
        value = self.value(x).unflatten(-1, (self.shape[0], -1))
        x = self.norm1(x + self.out(deformable_attention(value, places, weights, sizes)))
        return self.norm2(x + self.ffn(x))


class PixelDecoder(nn.Module):
    """Lets the maps at stride 32, 16 and 8 exchange what they see; embeds each pixel at stride 4."""

    def __init__(self, channels, dim: int, layers: int):
        super().__init__()
        def conv_gn(c_in, kernel=1):
            return nn.Sequential(nn.Conv2d(c_in, dim, kernel, padding=kernel // 2, bias=False),
                                 nn.GroupNorm(32, dim))
        self.project = nn.ModuleList(conv_gn(c) for c in channels[:0:-1])                   # stride 32, 16, 8
        self.level = nn.Parameter(torch.randn(3, dim))
        self.layers = nn.ModuleList(DeformableLayer(dim) for _ in range(layers))
        self.low = conv_gn(channels[0])
        self.join = nn.Sequential(conv_gn(dim, 3), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, features):
        """Four maps, stride 4 to 32 -> (tokens, their positions, their sizes), each for three maps, and
        pixels (B, C, H/4, W/4).
        """
        maps = [project(feature) for project, feature in zip(self.project, features[:0:-1])]
        sizes = [m.shape[-2:] for m in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        position = torch.cat([sine_position(*size, x.shape[-1]).to(x.device) + level
                              for size, level in zip(sizes, self.level)])
        centre = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
                            for h, w in sizes]).flip(1).to(x.device)
        for layer in self.layers:
            x = layer(x, position, centre, sizes)
        counts, low = [h * w for h, w in sizes], self.low(features[0])
        tokens = x.split(counts, dim=1)
        deep = tokens[2].transpose(1, 2).unflatten(2, sizes[2])                                # stride 8
        deep = F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return tokens, position.split(counts), sizes, self.join(low + deep)


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
    """Where a query may look, (B, 1, Q, H W) bool: the pixels that its mask logits (B, Q, h, w) claim in a
    map of `size`, or all if it claims none.
    """
    seen = F.interpolate(masks.detach(), size=size, mode="bilinear", align_corners=False).flatten(2) >= 0
    return (seen | ~seen.any(-1, keepdim=True))[:, None]


def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs of least total cost, min(n, m) of them, by the Hungarian method.

    Potentials u, v keep cost - u - v >= 0, and 0 on the pairs; each row adds its shortest path to a free
    column (Dijkstra): O(n^2 m).
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
        while column >= 0:                                                     # swap the pairs along the path
            row_of[column] = start if before[column] < 0 else row_of[before[column]]
            column = before[column]
    columns = np.flatnonzero(row_of >= 0)
    return row_of[columns], columns


def draw_points(target: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of `count` random pixels per image of (B, H, W), none of them IGNORE unless all are.

    Returns: places (B, count, 2), x and y, -1 to 1 over the image as in grid_sample; classes (B, count).
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
    """Queries that each claim a mask and name its class, by masked attention to three maps in turn.

    A class that occurs in an image is one segment, background too. Unlike the paper's: 3 deformable layers
    instead of 6, and 20 queries (2 K if that is more) instead of 100, for a handful of classes; as many
    points as the masks have pixels, 1024 to 12544, instead of 12544, each the centre of a pixel; losses
    averaged over the layers, not summed (AdamW does not see the factor).
    """

    lr, backbones, no_object = 3e-4, DeepLabV3Plus.backbones, 0.1

    def __init__(self, num_classes: int, backbone: str = "resnet18", dim: int = 256, pixel_layers: int = 3,
                 layers: int = 9):
        super().__init__()
        self.num_classes, self.backbone_name = num_classes, backbone
        self.backbone = resnet(backbone)
        self.pixel_decoder = PixelDecoder([self.backbone.width // n for n in (8, 4, 2, 1)], dim, pixel_layers)
        self.queries, self.query_position = (nn.Parameter(torch.randn(max(20, 2 * num_classes), dim))
                                             for _ in range(2))
        self.layers, self.norm = nn.ModuleList(QueryLayer(dim) for _ in range(layers)), nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes + 1)                     # the last class is "no object"
        self.embed = mlp(dim, dim, dim, dim)

    def predictions(self, x):
        """Class logits (L, B, Q, K + 1) and mask logits (L, B, Q, H/4, W/4), before and after each layer."""
        tokens, position, sizes, pixels = self.pixel_decoder(resnet_features(self.backbone, x))
        queries, classes, masks = self.queries.expand(len(x), -1, -1), [], []
        for i in range(len(self.layers) + 1):
            if i > 0:
                level = (i - 1) % 3
                queries = self.layers[i - 1](queries, self.query_position, tokens[level], position[level],
                                             claimed(masks[-1], sizes[level]))
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
        """Give every class that occurs to the query that fits it best.

        Args:    classes (L, B, Q, K + 1); masks (L, B, Q, P), logits at the points; truth (B, P);
                 present (B, K) bool.
        Returns: (4, pairs): layer, image, query and class of each.
        """
        truth = (truth[..., None] == torch.arange(self.num_classes, device=truth.device)).float()  # (B, P, K)
        chance = masks.sigmoid()
        # The binary cross-entropy of each query with each class, (L, B, Q, K).
        binary = (F.softplus(masks).sum(-1, keepdim=True) - masks @ truth) / masks.shape[-1]
        dice = dice_loss(chance @ truth, chance.sum(-1, keepdim=True) + truth.sum(1)[:, None])
        cost = 5 * binary + 5 * dice - 2 * classes.softmax(-1)[..., :-1]
        cost, present = cost.nan_to_num(0, 0, 0).double().cpu().numpy(), present.cpu().numpy()
        pairs = []
        for layer, image in np.ndindex(cost.shape[:2]):
            there = np.flatnonzero(present[image])
            queries, found = assign(cost[layer, image][:, there])
            pairs += [(layer, image, *pair) for pair in zip(queries, there[found])]
        return torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 4).T, device=classes.device)

    def loss(self, x, target):
        """2 cross-entropy of the classes + 5 (binary cross-entropy + Dice) of the masks at P points, of which
        three quarters are where the mask is least sure.
        """
        classes, masks = self.predictions(padded(x, mode="replicate"))
        target = padded(target, value=IGNORE)
        K, P = self.num_classes, min(12544, max(1024, target[0].numel() // 16))
        places, truth = draw_points(target, 3 * P + P // 4)
        present = torch.zeros(len(x), IGNORE + 1, device=x.device).scatter_(1, target.flatten(1), 1)
        present = present[:, :K] > 0
        found = read_points(masks.detach().transpose(0, 1).flatten(1, 2), places[:, :P])         # (B, L Q, P)
        found = found.unflatten(1, (len(masks), -1)).transpose(0, 1)
        layer, image, query, k = self.match(classes, found, truth[:, :P], present)

        labels = torch.full(classes.shape[:3], K, device=x.device)
        labels[:, ~present.any(1)] = IGNORE
        labels[layer, image, query] = k
        weights = (labels != IGNORE) * torch.where(labels == K, self.no_object, 1.0)
        cross_entropy = F.cross_entropy(classes.flatten(0, 2), labels.flatten(), ignore_index=IGNORE,
                                        reduction="none")
        cross_entropy = (cross_entropy * weights.flatten()).sum() / weights.sum().clamp(min=1e-6)

        # From here one row per pair.
        masks, places, truth = masks[layer, image, query][:, None], places[image], truth[image]
        with torch.no_grad():
            unsure = read_points(masks, places[:, :3 * P])[:, 0].abs().topk(P - P // 4, largest=False).indices
        others = torch.arange(3 * P, 3 * P + P // 4, device=x.device).expand(len(k), -1)
        index = torch.cat([unsure, others], dim=1)
        found = read_points(masks, places.gather(1, index[..., None].expand(-1, -1, 2)))[:, 0]    # (pairs, P)
        truth = (truth.gather(1, index) == k[:, None]).float()
        binary = F.binary_cross_entropy_with_logits(found, truth, reduction="none").mean(1)
        chance = found.sigmoid()
        dice = dice_loss((chance * truth).sum(1), (chance + truth).sum(1))
        return 2 * cross_entropy + 5 * (binary + dice).sum() / max(1, len(k))


ARCHS["mask2former"] = Mask2Former


if __name__ == "__main__":
    run_main(main)                              # segment.py's own command, which now knows the network
