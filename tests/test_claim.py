"""The measures that the claim's experiment adds are exact where the answer is known; it runs and goes on."""
import json
import math
import statistics

import pytest
import torch

from experiments import claim
from experiments.claim import Features, coverage_density, defect_crops, intra_cluster_diversity, kid


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (20, 3, 17, 40)])
def test_random_features_of_any_size_depend_on_the_image_alone(shape):
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    before = torch.get_rng_state()
    features = Features()
    assert torch.equal(torch.get_rng_state(), before)               # the caller's random numbers stay
    torch.manual_seed(2)
    again = Features()(images)
    assert again.shape == (shape[0], 192) and torch.equal(again, features(images)) and again.std() > 0.1
    torch.testing.assert_close(features(images[1:2]), again[1:2])


def test_kid_equals_the_double_loop_and_is_0_on_average_for_one_distribution():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=rng), torch.randn(7, 3, generator=rng) + 1

    def kernel(x, y):
        return (sum(float(u) * float(v) for u, v in zip(x, y)) / 3 + 1) ** 3

    def within(x):
        pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(pairs) / len(pairs)
    between = sum(kernel(x, y) for x in a for y in b) / 35
    assert kid(a, b) == pytest.approx(within(a) + within(b) - 2 * between, rel=1e-6)
    draws = [kid(torch.randn(10, 3, generator=rng), torch.randn(6, 3, generator=rng)) for _ in range(400)]
    assert abs(statistics.mean(draws)) < 3 * statistics.stdev(draws) / 20 and min(draws) < 0
    assert math.isnan(kid(a[:1], b))


def test_coverage_and_density_equal_their_definition():
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(30, 2, generator=rng), 0.5 * torch.randn(20, 2, generator=rng)
    radius = [sorted((x - y).norm().item() for y in real)[3] for x in real]
    inside = [[(x - y).norm().item() < r for y in fake] for x, r in zip(real, radius)]
    coverage, density = coverage_density(real, fake, k=3)
    assert coverage == pytest.approx(sum(any(row) for row in inside) / 30)
    assert density == pytest.approx(sum(map(sum, inside)) / (3 * 20))
    assert coverage_density(real, real) == (1, 1) == coverage_density(real[:3], real[:3])
    assert coverage_density(real, fake + 100) == (0, 0)


def test_diversity_is_0_for_copies_and_the_mean_distance_inside_clusters_otherwise():
    training = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    assert intra_cluster_diversity(training.repeat(3, 1), training) == 0
    generated = torch.tensor([[0.0, 1.0], [0.0, -1.0], [10.0, 0.0], [10.0, 4.0], [10.0, 8.0], [20.0, 9.0]])
    assert intra_cluster_diversity(generated, training) == pytest.approx((2 + (4 + 4 + 8) / 3) / 2)
    assert math.isnan(intra_cluster_diversity(training, training))


def test_defect_crops_are_centred_clamped_and_left_out_where_there_is_nothing():
    images, masks = torch.arange(4 * 8 * 10).view(4, 1, 8, 10), torch.zeros(4, 8, 10, dtype=torch.uint8)
    masks[0, 2:5, 4:9], masks[1, 0, 0], masks[3, 7, 0], masks[3, 7, 9] = 1, 2, 1, 3
    crops = defect_crops(images, masks, 4)
    for crop, image, (top, left) in zip(crops, images[[0, 1, 3]], ((1, 4), (0, 0), (4, 3)), strict=True):
        assert torch.equal(crop, image[:, top:top + 4, left:left + 4])
    assert defect_crops(images, torch.zeros_like(masks), 4).shape == (0, 1, 4, 4)


@pytest.mark.slow
def test_a_run_through_measures_every_switch_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claim", "--quick", "--out", str(tmp_path)])
    claim.main()
    results = json.loads((tmp_path / "quick/claim.json").read_text())
    assert list(results["pill25"]) == ["4", "2"] and len(results["pill25"]["4"]) == 1 + len(claim.SWITCHES)
    first = capsys.readouterr().out
    monkeypatch.setattr(claim, "measure_all", None)                 # nothing is measured again
    claim.main()
    assert json.loads((tmp_path / "quick/claim.json").read_text()) == results and "25 pills" in first
