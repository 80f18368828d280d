"""Claims about experiments/mask2former.py: the parts against loops and brute force."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segment
from experiments import mask2former
from segment import IGNORE, build, fit, predict
from test_segment import randomised, squares

SMALL = dict(layers=3, pixel_layers=1)          # fewer layers of the same kind, for time


def test_it_learns_the_same_from_the_same_seed_ignored_pixels_are_finite_and_nan_is_named():
    images, masks = squares(2, 32)
    nets = [build("mask2former", 3, **SMALL) for _ in range(2)]
    losses = [fit(net, images, masks, 12, batch_size=2, lr=5e-4) for net in nets]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert torch.equal(*(predict(net, images) for net in nets))
    assert nets[0].loss(segment.to_input(images), torch.full((2, 32, 32), IGNORE)).isfinite()
    nets[0].queries.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0"):
        fit(nets[0], images, masks, 1)


def test_deformable_attention_equals_a_loop_over_its_formula():
    rng = torch.Generator().manual_seed(0)
    B, N, heads, C, points, sizes = 2, 3, 2, 4, 2, [(2, 3), (4, 5)]
    value = torch.randn(B, sum(h * w for h, w in sizes), heads, C, generator=rng)
    places = 1.4 * torch.rand(B, N, heads, len(sizes), points, 2, generator=rng) - 0.2         # some outside
    weights = torch.rand(B, N, heads, len(sizes), points, generator=rng)
    expected = torch.zeros(B, N, heads, C)
    for b, n, head, p in itertools.product(range(B), range(N), range(heads), range(points)):
        start = 0
        for i, (h, w) in enumerate(sizes):
            x, y = (places[b, n, head, i, p] * torch.tensor([w, h]) - 0.5).tolist()
            for row, column in itertools.product(range(h), range(w)):  # bilinear: a tent around each pixel
                tent = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                pixel = value[b, start + row * w + column, head]
                expected[b, n, head] += weights[b, n, head, i, p] * tent * pixel
            start += h * w
    found = mask2former.deformable_attention(value, places, weights, sizes)
    torch.testing.assert_close(found, expected.flatten(2))


def test_a_new_deformable_layer_looks_one_to_four_pixels_along_a_direction_per_head(monkeypatch):
    seen = []
    monkeypatch.setattr(mask2former, "deformable_attention",
                        lambda value, *asked: seen.extend(asked) or value.flatten(2))
    x = torch.rand(1, 21, 16)
    mask2former.DeformableLayer(16)(x, x, torch.full((21, 2), 0.5), [(1, 1), (2, 2), (4, 4)])
    places, weights, _ = seen
    offsets = (places - 0.5)[0, 0] * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)   # (heads, maps, points, 2)
    torch.testing.assert_close(offsets.abs().amax(-1), torch.arange(1.0, 5).expand(8, 3, 4))     # in pixels
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 12))


@pytest.mark.parametrize("rows, columns", list(itertools.product(range(5), range(1, 6))))
def test_assignment_is_as_cheap_as_the_best_of_all(rows, columns):
    random = np.random.default_rng(rows * 10 + columns)
    for trial in range(20):
        cost = random.normal(size=(rows, columns))
        cost = cost if trial % 2 else np.round(cost)                            # ties
        r, c = mask2former.assign(cost)
        assert len(r) == len(c) == min(rows, columns) == len(set(r.tolist())) == len(set(c.tolist()))
        wide = cost if rows <= columns else cost.T
        best = min(sum(wide[i, j] for i, j in enumerate(order))
                   for order in itertools.permutations(range(wide.shape[1]), len(wide)))
        assert cost[r, c].sum() == pytest.approx(best)


def test_masked_attention_sees_what_a_query_claims_and_everything_if_that_is_nothing():
    masks = torch.full((1, 2, 4, 4), -1.0)
    masks[0, 0, :2, :2] = 1
    seen = mask2former.claimed(masks, (2, 2))
    assert seen.tolist() == [[[[True, False, False, False], [True] * 4]]]
    x, q = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    out = segment.attend(q, x, x, 2, seen)
    torch.testing.assert_close(out[0, 0], x[0, 0])  # one pixel seen: its value
    torch.testing.assert_close(out[0, 1], segment.attend(q, x, x, 2)[0, 1])


def test_points_are_pixel_centres_that_count_and_are_read_there():
    rng = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 6, 9), generator=rng)
    target[0, :, 4:] = IGNORE
    torch.manual_seed(0)
    places, classes = mask2former.draw_points(target, 500)
    assert IGNORE not in classes
    read = mask2former.read_points(target[:, None].float(), places)
    torch.testing.assert_close(read[:, 0], classes.float())
    for i, area in enumerate((6 * 4, 6 * 9)):  # every pixel that counts, about as often
        count = torch.unique(places[i], dim=0, return_counts=True)[1]
        assert len(count) == area and count.max() < 4 * 500 / area
    assert (mask2former.draw_points(torch.full((1, 2, 2), IGNORE), 5)[1] == IGNORE).all()


def test_score_is_class_chance_times_mask_summed_over_queries():
    net, x = randomised(build("mask2former", 3, **SMALL)), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        classes, masks = (p[-1, 0] for p in net.predictions(x))
        expected = torch.zeros(3, 64, 96)
        for q in range(len(masks)):
            chance = F.interpolate(masks[None, q:q + 1], size=(64, 96), mode="bilinear")[0, 0].sigmoid()
            for k in range(3):
                expected[k] += classes[q].softmax(0)[k] * chance
        torch.testing.assert_close(net(x)[0], expected)


def test_perfect_queries_cost_nothing_and_swapped_classes_do(monkeypatch):
    """Three queries that know the truth: the loss is 0 but for the smoothing of Dice, in any order."""
    net, target = build("mask2former", 3, **SMALL), squares(2)[1].long()
    target = F.pad(target, (0, 16, 0, 16), value=IGNORE)
    masks = torch.stack([(target == k) * 40.0 - 20 for k in (2, 0, 1)], dim=1)[None]     # (L = 1, B, Q, H, W)
    classes = torch.full((1, 2, 3, 4), -20.0)
    for query, k in enumerate((2, 0, 1)):
        classes[:, 0, query, k] = 20
        classes[:, 1, query, k if k == 0 else 3] = 20  # the second image holds background alone
    monkeypatch.setattr(net, "predictions", lambda x: (classes, masks))
    x = torch.rand(2, 3, 64, 64)
    assert net.loss(x, target).item() < 1e-3
    target[0] = torch.where(target[0] == 1, 2, torch.where(target[0] == 2, 1, target[0]))
    assert net.loss(x, target).item() > 5
