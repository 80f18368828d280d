"""How good generated pictures are: like real ones, unlike the training images, diverse, whole, with the right masks.

    python metrics.py                                  what every number says of drawn pills and of spoilt copies of them

Images are uint8 (N, C, H, W), masks uint8 (N, H, W) of class indices, features (N, D) as the class Features makes them. A number alone says
little: give it beside the same number for held-out real images, and with the extractor's name where it is one of features.
"""
import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from datasets import open_dataset, print_table, run_main

COPY_BELOW = 0.5    # half as new as a real photo. Copies of drawn products with noise of 10 grey levels have novelty 0.3, blurred ones 0.4
                    # (thin zippers 0.7); 0 to 3 % of held-out images lie below, but 29 % where they vary as magnetic tiles do


# --- patches ---

def check_alike(images, others):
    """Raise ValueError unless both have the same (C, H, W)."""
    if images.shape[1:] != others.shape[1:]:
        raise ValueError(f"images are {tuple(images.shape[1:])} and the reference {tuple(others.shape[1:])}: read both alike")


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

    Random directions in the space of patch x patch x C pixels are 1x1 convolutions over patches, that is, filters; along each the distance
    of two distributions is a comparison of sorted values. Unlike the source every patch counts, not a random part of them, so that equal
    sets have distance 0 in any order; and one unit is the standard deviation of the reference along the direction, so that every scale
    weighs the same. There are fewer levels where the smallest picture would have no patch.

    Returns: list of floats, finest scale first. 0: the same patches; about 1: as far apart as one picture's patches among themselves.
    """
    check_alike(images, reference)
    levels = min(levels, 1 + int(math.log2(min(images.shape[2:]) / patch)))
    directions = torch.randn(projections, images.shape[1], patch, patch, generator=torch.Generator().manual_seed(seed))
    directions /= directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    distances = []
    for a, b in zip(*(laplacian_pyramid(part.float() / 255, levels) for part in (images, reference))):
        a, b = (F.conv2d(part, directions).transpose(0, 1).flatten(1) for part in (a, b))              # (projections, N patches)
        distances.append((wasserstein(a, b) / b.std(1).clamp(min=1e-6)).mean().item())
    return distances


# --- features ---

class Features:
    """uint8 images -> float32 (N, D) on the CPU: the space in which distributions are compared. `name` says which one, for the report.

    Without a file, D = 192: mean activations of the first two stages of a ResNet-18 with fixed random weights. Random embeddings say more
    than ImageNet's where pictures look unlike ImageNet (Naeem et al. 2020, arXiv 2002.09797). Two stages, since FID of blurred pills is
    then 14 times that of two real sets, with all four twice. BatchNorm stays an identity: activations keep in range without it.
    With `weights`, a file of torchvision's inception_v3 state dict, D = 2048: its pool features at 299 px. Published FID and KID have other
    Inception weights (TensorFlow's): compare within a table, not with papers.
    """

    def __init__(self, weights=None, device="cpu"):
        with torch.random.fork_rng(devices=[]):                      # the caller's random numbers stay what they were
            torch.default_generator.manual_seed(0)
            net = models.resnet18() if weights is None else models.inception_v3(init_weights=False)
        if weights is None:
            name, stages = "random ResNet-18", [nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1), net.layer2]
        else:
            try:
                net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except Exception as error:      # torch raises many types for a file that is something else; to the user they are one fact
                reason = " ".join(str(error).split(". ")[0].split())[:160]
                raise ValueError(f"{weights} is no state dict of torchvision's inception_v3 ({reason}): pass one, such as "
                                 "inception_v3_google-0cc3c7bd.pth, or no file for random features") from None
            net.fc = nn.Unflatten(1, (-1, 1, 1))                     # the pooled features, as maps of one pixel
            name, stages = f"Inception-v3 ({Path(weights).name})", [nn.Sequential(v2.Resize((299, 299)), net)]
        self.name, self.device, self.stages = name, device, nn.ModuleList(stages).eval().to(device)

    @torch.no_grad()
    def __call__(self, images):
        rows = []
        for x in images.split(16):
            x, means = x.to(self.device).float().expand(-1, 3, -1, -1) / 127.5 - 1, []
            for stage in self.stages:
                x = stage(x)
                means.append(x.mean((2, 3)))
            rows.append(torch.cat(means, 1).cpu())
        return torch.cat(rows)


def kid(a, b):
    """Kernel distance of features (N, D), (M, D): unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018,
    arXiv 1801.01401), of all pairs, where the source averages over random subsets.

    0 on average for sets of one distribution, at any N and M, so also below 0; nan for a single image.
    """
    def kernel(x, y):
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return (sum(within) - 2 * kernel(a, b).mean()).item()


def fid(a, b):
    """Frechet distance of the Gaussians fitted to features (N, D), (M, D) (Heusel et al. 2017, arXiv 1706.08500); 0 for equal sets.

        |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr(sqrt(S_a S_b))

    With S = R'R the last trace is the sum of the singular values of R_a R_b': no root of a singular matrix, no D x D where images are few.
    Biased upwards for few images, the more the fewer: compare equal N only, and let N exceed D before it means much.
    """
    a, b = a.double(), b.double()
    r_a, r_b = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(max(1, len(x) - 1)), mode="r").R for x in (a, b))
    traces = r_a.square().sum() + r_b.square().sum() - 2 * torch.linalg.matrix_norm(r_a @ r_b.T, "nuc")
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).clamp(min=0).item()


def coverage_density(real, fake, k=5):
    """(coverage, density) of features (N, D), (M, D) (Naeem et al. 2020, arXiv 2002.09797). The ball of a real image reaches to its k-th
    nearest other, or to the last; its rim is outside, as in the released code.

    coverage: share of real images with a fake one in their ball, 0 to 1: is all there that is in the real set?
    density: number of balls that a fake image lies in, over k: about 1 for real ones, more where fakes crowd in dense places, 0 far away.
    """
    k, apart = min(k, len(real) - 1), partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")     # exact: ties stay ties
    radius = apart(real, real).kthvalue(k + 1).values                                   # + 1: the nearest is the image itself
    inside = apart(real, fake) < radius[:, None]                                        # (N, M)
    return inside.any(1).double().mean().item(), (inside.double().sum(0).mean() / k).item()


def intra_cluster_diversity(generated, training):
    """Mean distance between generated images that share their nearest training image, in features (N, D), (M, D), averaged over the
    training images that two or more share; nan without such. The recipe of intra-cluster LPIPS (Ojha et al. 2021, arXiv 2104.06820), with
    Euclidean distance of features in LPIPS's place. 0: what is nearest to a training image is all the same, as copies are.
    """
    nearest = torch.cdist(generated, training).argmin(1)
    clusters = [generated[nearest == i] for i in nearest.unique() if (nearest == i).sum() > 1]
    return torch.stack([F.pdist(c).mean() for c in clusters]).mean().item() if clusters else math.nan


# --- copies and shape: distances between pictures ---

def variants(images, masks, names):
    """The images and masks in every way that datasets.augment can lay them with `names`, in blocks of N, as they are first.

    flip: both axes, alone and together, which is a half turn; turn: quarters, halves where H != W. A crop has no finite list of results
    and is left out: what is a crop of a training image counts as new. Pair i of the result is made from pair i % N.
    """
    axes, square = [(), (-1,), (-2,), (-2, -1)] if "flip" in names else [()], images.shape[-2] == images.shape[-1]
    turns = [k for k in range(4 if "turn" in names else 1) if (k < 2 or "flip" not in names) and (k % 2 == 0 or square)]
    return tuple(torch.cat([part.rot90(turn, (-2, -1)).flip(axis) for turn in turns for axis in axes]) for part in (images, masks))


def defect_crops(images, masks, side):
    """Squares (K, C, side, side) around the centre of the box that holds all defect pixels of a mask, moved inside the image, and the
    indices (K,) of their images: those without a defect have none.
    """
    size = masks.shape[1:]
    if side > min(size):
        raise ValueError(f"crops of {side} px do not fit into images of {size[0]}x{size[1]}: choose at most {min(size)}")
    kept, crops = (masks > 0).flatten(1).any(1).nonzero().flatten(), []
    for i in kept:
        middle = [(v.min() + v.max() + 1).item() // 2 for v in masks[i].nonzero(as_tuple=True)]
        top, left = (min(max(0, m - side // 2), n - side) for m, n in zip(middle, size))
        crops.append(images[i, :, top:top + side, left:left + side])
    return torch.stack(crops) if crops else images.new_zeros(0, images.shape[1], side, side), kept


light = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True)    # half the grain: copies with noise, or blurred, pass for 0.5 new without it
heavy = partial(F.adaptive_avg_pool2d, output_size=8)           # leaves outline, place and shading of a product, no texture


def distances(images, others, low_pass):
    """Root mean square difference in grey levels of all pairs of low-passed images: (N, M) float64."""
    check_alike(images, others)
    a, b = (low_pass(part.float()).flatten(1).double() for part in (images, others))
    square = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T      # exact for quarters of whole numbers: a copy is at 0
    return (square / a.shape[1]).clamp(min=0).sqrt()


def novelty(generated, training, held_out):
    """Distance of each generated image to its nearest training image, over the median of that distance for held-out real images: (N,).

    0: a copy; 1: as new as a real photo; below COPY_BELOW it counts as a copy (copy_share). Pass the training images with their variants:
    a flipped copy is one. Bland images lie near everything and come out low as well: look at them.
    """
    unit = distances(held_out, training, light).amin(1).quantile(0.5)
    if unit == 0:
        raise ValueError("half of the held-out images are training images, which makes no unit of novelty: hold out others")
    return distances(generated, training, light).amin(1) / unit


def copy_share(values, threshold=COPY_BELOW):
    """Share of images whose novelty is below the threshold. Held-out images of varied products have a share too: give it beside."""
    return (values < threshold).double().mean().item()


def nearest_ratio(generated, training):
    """Distance of each generated image to the nearest training image, over the mean distance to the next five, or those there are: (N,).

    0: a copy; 1: none is nearer than others. Needs no held-out images. Carlini et al. 2023 (arXiv 2301.13188) so tell copies, with 50.
    """
    d = distances(generated, training, light).sort(1).values
    return d[:, 0] / d[:, 1:6].mean(1).clamp(min=1e-9)


def shape_distance(images, reference):
    """Distance of each image to its nearest reference image when little but the product's outline is left (means of 8 x 8 areas), over
    the mean of that distance among the reference images, each to its nearest other: (N,). A definition of our own.

    Its mean is about 1 for further real images, more where the outline is broken, and unmoved by fine texture. Take held-out images, at
    least two, as reference: among a few training photos near-duplicates make the unit too small, and copies of them would have 0.
    """
    among = distances(reference, reference, heavy).fill_diagonal_(math.inf)
    return distances(images, reference, heavy).amin(1) / among.amin(1).mean()


# --- masks ---

def mask_fit(predicted, masks):
    """How well each mask fits its image, judged by the masks (N, H, W) that a segmenter predicts from the images: (N,).

    Intersection over union of the pixels of any defect: 1 where both mark the same, 0 where they are apart, nan where neither marks any.
    A segmenter errs as well: give the mean for real pairs beside.
    """
    a, b = predicted > 0, masks > 0
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)


def components(hits):
    """8-connected components of bool (N, H, W): int64 labels, 0 outside, else 1 + the largest pixel index of the component.

    Each round pixels take over the largest label around, hand it to the pixel that their old label names, and read what the one that the
    new label names was given: a way of n pixels takes about log n rounds, not n.
    """
    labels = (torch.arange(1, hits[0].numel() + 1).view(hits[0].shape) * hits).flatten(1)
    while True:
        grown = (F.max_pool2d(labels.view(hits.shape), 3, 1, 1) * hits).flatten(1)
        given = F.pad(grown, (1, 0)).scatter_reduce(1, labels, grown, "amax")                # place 0 is that of the label 0
        grown = given.gather(1, given)[:, 1:]
        if torch.equal(grown, labels):
            return labels.view(hits.shape)
        labels = grown


def mask_statistics(masks, num_classes):
    """What masks look like: {"empty": share of masks without a defect, "classes": [one dict per class, background first]}.

    pixels, images: share of the pixels, and of the images with at least one. Of those images: components, their mean number of 8-connected
    parts; median_area_px of a part; centre, the mean (y, x) of the pixels in 0 .. 1; None for background and classes that never occur.
    """
    (n, h, w), classes = masks.shape, []
    for k in range(num_classes):
        hits = masks == k
        there = hits[hits.flatten(1).any(1)]
        found = dict(pixels=hits.double().mean().item(), images=len(there) / n, components=None, median_area_px=None, centre=None)
        if k and len(there):
            areas = torch.cat([labels[labels > 0].unique(return_counts=True)[1] for labels in components(there)])
            _, y, x = there.nonzero(as_tuple=True)
            found.update(components=len(areas) / len(there), median_area_px=areas.double().quantile(0.5).item(),
                         centre=((y + 0.5).mean().item() / h, (x + 0.5).mean().item() / w))
        classes.append(found)
    return {"empty": (masks == 0).flatten(1).all(1).double().mean().item(), "classes": classes}


def main():
    parser = argparse.ArgumentParser(description="What the metrics say of drawn pills and of spoilt copies of them.")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: %(default)s)")
    parser.add_argument("--inception", metavar="FILE", help="torchvision's inception_v3 state dict (default: random features)")
    args = parser.parse_args()
    size, features, rng = args.size, Features(args.inception), torch.Generator().manual_seed(0)
    training, test = (open_dataset("drawn:pill", (size, size), split).tensors()[0] for split in ("train", "test"))
    held_out = test[::3]                                            # 35, as many as there are for training
    noise, order = torch.randn(held_out.shape, generator=rng), torch.randperm(size * size, generator=rng)
    spoilt = {"the same": held_out, "other pills": test[1::3], "blurred": F.avg_pool2d(held_out.float(), 3, 1, 1).byte(),
              "with noise of 10 grey levels": (held_out + 10 * noise).clamp(0, 255).byte(),
              "pixels shuffled": held_out.flatten(2)[..., order].view(held_out.shape),
              "copies of training": training[::3].repeat(3, 1, 1, 1), "quadrants swapped": held_out.roll((size // 2, size // 2), (2, 3))}
    rows, real, seen = [], features(held_out), features(training)
    for name, images in spoilt.items():
        fake, new = features(images), novelty(images, training, held_out)
        scales = sliced_wasserstein(images, held_out, projections=16)
        numbers = scales + [1000 * kid(fake, real), 1000 * fid(fake, real), *coverage_density(real, fake), intra_cluster_diversity(fake, seen)]
        numbers += [new.median(), copy_share(new), nearest_ratio(images, training).median(), shape_distance(images, held_out).mean()]
        rows.append([name] + [f"{number:.2f}" for number in numbers])
    print_table({"caption": f"{len(held_out)} pictures of {size} px beside as many drawn pills; features: {features.name}", "rows": rows,
                 "head": ["", *["fine", "middle", "coarse"][:len(scales)], *"1000*KID 1000*FID coverage density diversity novelty copies ratio shape".split()]})


if __name__ == "__main__":
    run_main(main)
