"""The distances are exact where the answer is known."""
import math

import pytest
import torch

from conftest import run
from metrics import laplacian_pyramid, sliced_wasserstein, wasserstein


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


def test_small_pictures_have_fewer_scales_and_a_table():
    result = run("metrics.py", "--size", 24)
    assert result.returncode == 0 and "middle" in result.stdout and "coarse" not in result.stdout, result.stderr
