"""How far two sets of pictures are apart, without any network. Images are uint8 (N, C, H, W).

    python metrics.py                                  what the distance says of drawn pills, blurred, noisy and shuffled ones
"""
import argparse
import math

import torch
import torch.nn.functional as F

from datasets import open_dataset, print_table


def laplacian_pyramid(images, levels):
    """Float images (N, C, H, W) -> detail at each scale, finest first, and the small picture that is left; their sum is the image."""
    pyramid = []
    for _ in range(levels - 1):
        small = F.avg_pool2d(images, 2)
        pyramid.append(images - F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False))
        images = small
    return pyramid + [images]


def wasserstein(a, b, points=1024):
    """1-Wasserstein distance of samples along the last axis: (..., n), (..., m) -> (...), from `points` quantiles of each."""
    at = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    a, b = (v.sort(-1).values[..., (at * v.shape[-1]).long()] for v in (a, b))
    return (a - b).abs().mean(-1)


def sliced_wasserstein(images, reference, levels=3, patch=7, projections=64, seed=0):
    """Sliced Wasserstein distance between all patches of two sets, per scale of a Laplacian pyramid (Karras et al. 2018, sec. 5).

    Random directions in the space of patch x patch x C pixels are 1x1 convolutions over patches, that is, filters; along each the
    distance of two distributions is a comparison of sorted values. Unlike the source every patch counts, not a random part of them, so that equal
    sets have distance 0 in any order; and one unit is the standard deviation of the reference along the direction, so that every
    scale weighs the same. There are fewer levels where the smallest picture would have no patch.

    Returns: list of floats, finest scale first. 0: the same patches; about 1: as far apart as one picture's patches among themselves.
    """
    if images.shape[1:] != reference.shape[1:]:
        raise ValueError(f"images are {tuple(images.shape[1:])} and the reference {tuple(reference.shape[1:])}: read both alike")
    levels = min(levels, 1 + int(math.log2(min(images.shape[2:]) / patch)))
    directions = torch.randn(projections, images.shape[1], patch, patch, generator=torch.Generator().manual_seed(seed))
    directions /= directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    distances = []
    for a, b in zip(*(laplacian_pyramid(part.float() / 255, levels) for part in (images, reference))):
        a, b = (F.conv2d(part, directions).transpose(0, 1).flatten(1) for part in (a, b))              # (projections, N patches)
        distances.append((wasserstein(a, b) / b.std(1).clamp(min=1e-6)).mean().item())
    return distances


def main():
    parser = argparse.ArgumentParser(description="What the sliced Wasserstein distance says of drawn pills and spoilt copies of them.")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: %(default)s)")
    size = parser.parse_args().size
    train, test = (open_dataset("drawn:pill", (size, size), split).tensors()[0] for split in ("train", "test"))
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(size * size, generator=torch.Generator().manual_seed(0))
    spoilt = {"the same": test, "other pills": train, "blurred": F.avg_pool2d(test.float(), 3, 1, 1), "with noise of 10 grey levels":
              (test + 10 * noise).clamp(0, 255), "pixels shuffled": test.flatten(2)[..., order].view(test.shape)}
    rows = [[name] + [f"{d:.3f}" for d in sliced_wasserstein(images, test)] for name, images in spoilt.items()]
    print_table({"caption": f"distance to {len(test)} drawn pills of {size} px", "head": ["", "fine", "middle", "coarse"][:len(rows[0])], "rows": rows})


if __name__ == "__main__":
    main()
