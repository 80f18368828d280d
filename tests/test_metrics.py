"""The distances are exact where the answer is known."""
import math
import statistics

import pytest
import torch
from torchvision.models import inception_v3

from datasets import augment
from conftest import run
from metrics import (Features, components, copy_share, coverage_density, defect_crops, fid, intra_cluster_diversity, kid, laplacian_pyramid,
                     main, mask_fit, mask_statistics, nearest_ratio, novelty, shape_distance, sliced_wasserstein, variants, wasserstein)


def test_the_pyramid_adds_up_to_the_image():
    images = torch.rand(2, 3, 16, 24)
    fine, middle, small = laplacian_pyramid(images, 3)
    up = lambda x: torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fine + up(middle + up(small)), images)
    assert small.shape == (2, 3, 4, 6)
    flat = laplacian_pyramid(torch.full((1, 1, 16, 16), 0.5), 3)
    assert all(detail.abs().max() < 1e-6 for detail in flat[:2]) and flat[2].mean() == 0.5


def test_wasserstein_of_gaussians_of_a_shift_and_of_sets_of_other_sizes():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200_000, generator=rng) for _ in range(2))
    assert wasserstein(a, b + 3).item() == pytest.approx(3, abs=0.02)                       # disjoint or not: the shift
    assert wasserstein(a, 2 * b).item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)  # E|z| of a standard normal
    assert wasserstein(a, a[torch.randperm(len(a), generator=rng)]) == 0
    assert wasserstein(torch.arange(4.0), torch.arange(4.0).repeat_interleave(5)) == 0
    assert wasserstein(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0])) == 0.5


def test_equal_sets_in_any_order_are_at_distance_0_and_what_is_lost_shows_at_its_scale():
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=rng).to(torch.uint8)
    assert sliced_wasserstein(images.flip(0), images) == [0, 0, 0]
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1)
    fine, middle, coarse = sliced_wasserstein(blurred, images)
    assert fine > 2 * coarse and fine > 0.3
    brighter = sliced_wasserstein(images.float() + 10, images)
    assert brighter[0] < 0.01 and brighter[2] > 0.1                                         # a shift is no detail
    with pytest.raises(ValueError, match=r"images are \(3, 32, 32\) and the reference \(3, 16, 16\)"):
        sliced_wasserstein(images, images[:, :, ::2, ::2])

# --- features and what is computed from them ---

RANDOM = torch.Generator().manual_seed(5)
PICTURES = torch.nn.functional.interpolate(torch.randint(0, 256, (12, 3, 6, 6), generator=RANDOM).float(), size=24, mode="bilinear").byte()


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (20, 3, 17, 40)])
def test_random_features_of_any_size_depend_on_the_image_alone(shape):
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    features = Features()
    assert torch.equal(torch.get_rng_state(), before) and features.name == "random ResNet-18"
    torch.manual_seed(2)                                                                     # another one: the same network
    vectors, again = features(images), Features()(images.flip(0)).flip(0)
    assert vectors.shape == (len(images), 192) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, again)
    if shape[1] == 1:
        torch.testing.assert_close(features(images.expand(-1, 3, -1, -1)), vectors)


def test_random_features_neither_vanish_nor_blow_up_and_tell_images_apart():
    vectors = Features()(PICTURES)
    for stage in vectors.split([64, 128], 1):
        assert 0.1 < stage.square().mean().sqrt() < 1 and stage.std(0).mean() > 0.01
    other = Features()(PICTURES.flatten(2).sort(-1).values.view(PICTURES.shape))            # the same pixels in another order
    assert kid(vectors, other) > 20 * abs(kid(vectors[::2], vectors[1::2]))


def test_inception_features_are_the_pooled_ones_of_the_file(tmp_path):
    with torch.random.fork_rng(devices=[]):
        net = inception_v3(init_weights=False).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    features, pooled = Features(tmp_path / "weights.pth"), []
    net.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    image = torch.nn.functional.interpolate(PICTURES[:1].float(), (299, 299)).byte()
    with torch.no_grad():
        net(image / 127.5 - 1)
    torch.testing.assert_close(features(image), pooled[0], rtol=1e-3, atol=0)
    assert features(PICTURES[:2, :1]).shape == (2, 2048)
    assert pooled[0].shape == (1, 2048) and features.name == "Inception-v3 (weights.pth)"

    (tmp_path / "weights.pth").unlink()                                                      # 100 MB

    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for file, reason in (("other.pth", "Missing key"), ("text.pth", ""), ("absent.pth", "No such file")):
        with pytest.raises(ValueError, match=rf"{file} is no state dict of torchvision's inception_v3 \(.*{reason}.*\): pass one") as error:
            Features(tmp_path / file)
        assert "\n" not in str(error.value)


def test_kid_equals_the_double_loop_and_is_0_on_average_for_one_distribution():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=rng), torch.randn(7, 3, generator=rng) + 1
    kernel = lambda x, y: (sum(float(u) * float(v) for u, v in zip(x, y)) / 3 + 1) ** 3
    within = [sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1)) for x in (a, b)]
    between = sum(kernel(x, y) for x in a for y in b) / 35
    assert kid(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-6)
    draws = [kid(torch.randn(10, 3, generator=rng), torch.randn(6, 3, generator=rng)) for _ in range(400)]
    mean, spread = statistics.mean(draws), statistics.stdev(draws) / 20
    assert abs(mean) < 3 * spread and min(draws) < 0 and kid(a, b) > 10 * spread
    assert math.isnan(kid(a[:1], b))


def diagonal(mean, deviation):
    """Points whose sample mean and covariance are exactly `mean` and diag(deviation^2)."""
    axes = torch.diag(torch.tensor(deviation, dtype=torch.float64)) * math.sqrt((2 * len(deviation) - 1) / 2)
    return torch.cat([axes, -axes]) + torch.tensor(mean)


def test_fid_is_exact_for_diagonal_gaussians_and_0_for_equal_sets():
    a, b = diagonal([0, 1, 2], [1, 2, 3]), diagonal([1, 1, 0], [2, 2, 5])
    assert fid(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, abs=1e-9)                          # shifts and differences of deviations, squared
    assert fid(a, diagonal([0, 1, 1002], [1, 2, 3])) == pytest.approx(1e6)
    rng = torch.Generator().manual_seed(0)
    for n, m in ((40, 30), (4, 3), (4, 30), (1, 1)):                                         # more and fewer images than D = 8
        a, b = torch.randn(n, 8, generator=rng).double(), 2 * torch.randn(m, 8, generator=rng).double() + 1
        covariances = [x.T.cov() if len(x) > 1 else torch.zeros(8, 8).double() for x in (a, b)]
        root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
        expected = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * root
        assert fid(a, b) == pytest.approx(expected.item(), abs=1e-4) == fid(b, a)
        assert fid(a, a.flip(0)) < 1e-9


def test_coverage_and_density_equal_their_definition():
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(30, 2, generator=rng), 0.5 * torch.randn(20, 2, generator=rng)
    radius = [sorted((x - y).norm().item() for y in real)[3] for x in real]
    inside = [[(x - y).norm().item() < r for y in fake] for x, r in zip(real, radius)]
    coverage, density = coverage_density(real, fake, k=3)
    assert coverage == pytest.approx(sum(any(row) for row in inside) / 30)
    assert density == pytest.approx(sum(map(sum, inside)) / (3 * 20))
    assert 0 < coverage < 1 < density                                                       # fakes crowd in the middle
    assert coverage_density(real, real) == (1, 1) == coverage_density(real[:3], real[:3])   # k no more than the others there are
    assert coverage_density(real, fake + 100) == (0, 0)
    assert coverage_density(real, real[:1].repeat(9, 1))[0] < 0.5


def test_diversity_is_0_for_copies_and_the_mean_distance_inside_clusters_otherwise():
    training = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    assert intra_cluster_diversity(training.repeat(3, 1), training) == 0
    generated = torch.tensor([[0.0, 1.0], [0.0, -1.0], [10.0, 0.0], [10.0, 4.0], [10.0, 8.0], [20.0, 9.0]])
    assert intra_cluster_diversity(generated, training) == pytest.approx((2 + (4 + 4 + 8) / 3) / 2)      # the last is alone
    assert math.isnan(intra_cluster_diversity(training, training))


# --- copies and shape ---

@pytest.mark.parametrize("names", [[], ["flip"], ["turn"], ["flip", "turn"]])
@pytest.mark.parametrize("size", [(4, 4), (4, 6)])
def test_variants_are_what_augment_draws_each_once(names, size):
    image, mask = torch.arange(3 * size[0] * size[1]).byte().view(1, 3, *size), torch.arange(size[0] * size[1]).byte().view(1, *size)
    rng = torch.Generator().manual_seed(0)
    drawn = [augment(image, mask, names, rng) for _ in range(100)]
    expected = {(tuple(i.flatten().tolist()), tuple(m.flatten().tolist())) for i, m in drawn}
    images, masks = variants(image, mask, names)
    assert {(tuple(i.flatten().tolist()), tuple(m.flatten().tolist())) for i, m in zip(images, masks)} == expected
    assert len(images) == len(expected) and torch.equal(images[:1], image)
    both = variants(torch.cat([image, image + 1]), mask.repeat(2, 1, 1), names)[0]
    assert torch.equal(both[::2], images) and torch.equal(both[1::2], images + 1)           # pair i is made from pair i % N


def test_novelty_is_0_for_copies_1_for_held_out_images_and_in_units_of_them():
    training, held_out = PICTURES[:6], PICTURES[6:]
    assert novelty(training, training, held_out).tolist() == [0] * 6
    flipped = training.flip(-1)
    assert novelty(flipped, training, held_out).min() > 0.5
    assert novelty(flipped, variants(training, training[:, 0], ["flip"])[0], held_out).tolist() == [0] * 6
    assert novelty(held_out, training, held_out).quantile(0.5) == pytest.approx(1)
    flat = lambda *values: torch.tensor(values).byte().view(-1, 1, 1, 1).expand(-1, 3, 5, 4)         # distances are differences
    assert novelty(flat(100, 96, 110, 200), flat(100, 180), flat(98, 104, 108)).tolist() == [0, 1, 2.5, 5]
    edge = torch.cat([training[..., :-1], 255 - training[..., -1:]], -1)                    # the last of an odd number of columns counts
    assert novelty(edge[..., 1:], training[..., 1:], held_out[..., 1:]).min() > 0
    grain = 10 * (-1) ** (torch.arange(24)[:, None] + torch.arange(24))
    assert novelty(grain + torch.full((1, 3, 24, 24), 100), torch.full((1, 3, 24, 24), 100), held_out) == 0      # grain alone is not new
    noise = 10 * torch.randn(training.shape, generator=torch.Generator().manual_seed(0))
    noisy = novelty((training + noise).clamp(0, 255).byte(), training, held_out)
    assert 0 < noisy.min() and copy_share(noisy) == 1 and copy_share(novelty(held_out, training, held_out)) == 0
    assert copy_share(torch.tensor([0, 0.49, 0.5, 2])) == 0.5 and copy_share(torch.tensor([1, 2]), threshold=2) == 0.5
    with pytest.raises(ValueError, match="half of the held-out images are training images"):
        novelty(held_out, training, training)
    with pytest.raises(ValueError, match="read both alike"):
        novelty(held_out[:, :1], training, held_out)


def test_nearest_ratio():
    flat = lambda *values: torch.tensor(values).byte().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    training = flat(0, 10, 20, 30, 40, 50, 250)
    ratio = nearest_ratio(flat(0, 10, 200, 255), training)
    assert ratio.tolist() == pytest.approx([0, 0, 50 / (150 + 160 + 170 + 180 + 190) * 5, 5 / (205 + 215 + 225 + 235 + 245) * 5])
    assert nearest_ratio(flat(5), flat(0, 20)).item() == pytest.approx(5 / 15)              # fewer than five others
    assert nearest_ratio(flat(7), flat(7, 7)) == 0


def test_defect_crops_are_centred_clamped_and_left_out_where_there_is_nothing():
    images = torch.arange(4 * 8 * 10).view(4, 1, 8, 10)
    masks = torch.zeros(4, 8, 10, dtype=torch.uint8)
    masks[0, 2:5, 4:9], masks[1, 0, 0], masks[3, 7, 0], masks[3, 7, 9] = 1, 2, 1, 3
    crops, kept = defect_crops(images, masks, 4)
    assert kept.tolist() == [0, 1, 3]
    for crop, image, (top, left) in zip(crops, images[kept], ((1, 4), (0, 0), (4, 3))):
        assert torch.equal(crop, image[:, top:top + 4, left:left + 4])
    assert defect_crops(images, torch.zeros_like(masks), 4)[0].shape == (0, 1, 4, 4)
    with pytest.raises(ValueError, match="crops of 9 px do not fit into images of 8x10: choose at most 8"):
        defect_crops(images, masks, 9)


def test_shape_distance_grows_with_a_broken_outline_and_not_with_texture():
    rng = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centres = 16 + 2 * torch.randn(40, 2, generator=rng)
    discs = torch.stack([100 + 100 * ((y - a) ** 2 + (x - b) ** 2 < 80) for a, b in centres])[:, None].float()
    images = (discs + 5 * torch.randn(discs.shape, generator=rng)).clamp(0, 255).byte()
    images, reference = images[:20], images[20:]
    real = shape_distance(images, reference).mean().item()
    assert real == pytest.approx(1, abs=0.2)
    assert shape_distance(images.roll((16, 16), (2, 3)), reference).mean() > 3 * real
    noisy = (images + 15 * torch.randn(images.shape, generator=rng)).clamp(0, 255).byte()
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1, count_include_pad=False)
    for texture in (noisy, blurred):
        assert shape_distance(texture, reference).mean().item() == pytest.approx(real, abs=0.12)
    assert shape_distance(reference, reference).tolist() == [0] * 20


# --- masks ---

def flooded(hit):
    """The definition of components() for one mask: flood fill from every pixel."""
    height, width = hit.shape
    labels = torch.zeros(height, width, dtype=torch.int64)
    for start in hit.nonzero().tolist():
        if labels[tuple(start)] == 0:
            seen, stack = {tuple(start)}, [tuple(start)]
            while stack:
                i, j = stack.pop()
                near = [(a, b) for a in range(max(0, i - 1), min(height, i + 2)) for b in range(max(0, j - 1), min(width, j + 2))]
                new = {p for p in near if hit[p]} - seen
                seen |= new
                stack += new
            for p in seen:
                labels[p] = 1 + max(a * width + b for a, b in seen)
    return labels


def test_components_equal_a_flood_fill():
    rng = torch.Generator().manual_seed(0)
    hits = torch.rand(6, 13, 17, generator=rng) < torch.tensor([0, 0.2, 0.35, 0.5, 0.7, 1]).view(6, 1, 1)
    snake = torch.zeros(1, 13, 17, dtype=torch.bool)                                        # there and back: a long way
    snake[0, ::2] = True
    snake[0, 1::4, -1] = snake[0, 3::4, 0] = True
    hits = torch.cat([hits, snake, torch.eye(17)[None, :13].bool()])                        # and a diagonal: one piece, being 8-connected
    labels = components(hits)
    assert torch.equal(labels, torch.stack([flooded(hit) for hit in hits]))
    assert [len(label.unique()) - 1 for label in labels[-2:]] == [1, 1] and labels[2].unique().numel() > 5


def test_mask_fit_is_the_overlap_of_any_defect():
    masks, seen = torch.zeros(4, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, :2], seen[0, :2] = 1, 2                                # the same place, another class
    masks[1, :2], seen[1, 1:3] = 1, 1                               # 4 of 12 pixels
    masks[2, 0] = 3
    assert torch.equal(mask_fit(seen, masks)[:3], torch.tensor([1, 1 / 3, 0])) and mask_fit(seen, masks)[3].isnan()


def test_mask_statistics():
    masks = torch.zeros(4, 10, 20, dtype=torch.uint8)
    masks[0, 0:2, 0:4], masks[0, 5, 19], masks[0, 9, 10:13] = 1, 1, 1                       # areas 8, 1, 3
    masks[1, 4:6, 8:12] = 1                                                                 # area 8
    masks[1, 0:1, 0:20] = 2
    found = mask_statistics(masks, 4)
    assert found["empty"] == 0.5
    background, crack, dirt, absent = found["classes"]
    assert crack["pixels"] == pytest.approx(20 / 800) and crack["images"] == 0.5
    assert crack["components"] == 2 and crack["median_area_px"] == 5.5
    centre = [(8 * 1 + 5.5 + 3 * 9.5 + 8 * 5) / 20 / 10, (8 * 2 + 19.5 + 3 * 11.5 + 8 * 10) / 20 / 20]
    assert crack["centre"] == pytest.approx(centre)
    assert dirt == {"pixels": pytest.approx(20 / 800), "images": 0.25, "components": 1, "median_area_px": 20,
                    "centre": pytest.approx((0.05, 0.5))}
    assert absent == {"pixels": 0, "images": 0, "components": None, "median_area_px": None, "centre": None}
    assert background == {**absent, "pixels": pytest.approx(760 / 800), "images": 1}


def test_the_demonstration_prints_every_number(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["metrics.py", "--size", "32"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and "random ResNet-18" in lines[0]
    assert lines[1].split() == "fine middle coarse 1000*KID 1000*FID coverage density diversity novelty copies ratio shape".split()
    assert [line.split()[-2:] for line in lines if line.strip().startswith("copies of")][0][0] == "0.00"


def test_small_pictures_have_fewer_scales_and_a_table():
    result = run("metrics.py", "--size", 24)
    assert result.returncode == 0 and "middle" in result.stdout and "coarse" not in result.stdout, result.stderr
