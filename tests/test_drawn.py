"""The drawn products: the same at every size, exact in area, on both sides of each limit of the paper."""
import numpy as np
import pytest

from data.drawn import DRAWN, draw, drawn_kind

LIMITS = {"pill": {"contamination": 4000, "color": 300}, "wood": {"color": 250, "liquid": 1000},
          "zipper": {"fabric_border": 4800, "fabric_interior": 4800}}
each_product = pytest.mark.parametrize("name", DRAWN)


@each_product
def test_a_picture_is_a_function_of_product_seed_and_index(name):
    first, again, other = (draw(name, seed, 2, (48, 96)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and not np.array_equal(first[0], other[0])
    image, mask, original, kind, _ = first
    assert image.shape == (48, 96, 3) and mask.shape == original.shape == (48, 96)
    assert image.dtype == mask.dtype == original.dtype == np.uint8
    assert kind == drawn_kind(name, 2) == DRAWN[name].kinds[2]
    with pytest.raises(ValueError, match="pill, zipper, wood"):
        draw("cable", 0, 0)


@each_product
def test_small_pictures_are_the_native_one_shrunk(name):
    for index in (1, 3, 5):
        native = draw(name, 3, index)
        assert native[1].shape == DRAWN[name].native
        for size in ((64, 64), (96, 160)):
            small, full = draw(name, 3, index, size), native[1].shape
            rows, columns = (((np.arange(n) + 0.5) * whole / n).astype(int) for n, whole in zip(size, full))
            for whole, sampled in zip(native[1:3], small[1:3]):     # pixels on the very edge may differ
                assert (whole[np.ix_(rows, columns)] != sampled).sum() <= 3 + 0.1 * (sampled > 0).sum()
            assert native[3:] == small[3:]
    cell, shrunk = (np.arange(len(native[0])) * 64 / len(native[0])).astype(int), np.zeros((64, 64, 3))
    np.add.at(shrunk, (cell[:, None], cell), native[0])
    shrunk /= np.bincount(cell)[:, None, None] * np.bincount(cell)[:, None]
    small = draw(name, 3, index, (64, 64))[0]
    assert np.abs(shrunk - small).mean() < 8                        # of 255
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.95


@each_product
def test_masks_hold_the_class_of_their_kind_and_captions_name_it(name):
    """The original annotation is coarse, in one piece, and marks one defect."""
    kinds, classes = DRAWN[name].kinds, DRAWN[name].classes
    for index in range(4 * len(kinds)):
        _, mask, original, kind, caption = draw(name, 0, index, (200, 200))
        found = set(np.unique(mask).tolist()) - {0}
        assert kind == kinds[index % len(kinds)]
        assert original.any() == (kind != "good") and original.max() <= 1
        expected = {kinds.index(kind) + 1} if kind in classes else set()
        assert len(found) >= 2 if kind == "combined" else found == expected
        assert all(classes[c].replace("_", " ") in caption for c in found)
        assert caption.startswith("A ") and caption.endswith(".")
        assert ("flawless" in caption) == (kind == "good")
        if original.any():
            for axis in (0, 1):                                     # in one piece
                assert (np.diff(np.flatnonzero(original.any(axis))) == 1).all()
            inside = mask[original > 0]
            assert (inside > 0).any() and (inside == 0).any()
            assert kind == "combined" or (inside > 0).sum() >= 0.3 * (mask > 0).sum()


@each_product
def test_areas_lie_on_both_sides_of_each_limit_and_other_defects_can_be_seen_at_64_px(name):
    kinds, classes = DRAWN[name].kinds, DRAWN[name].classes
    scale = DRAWN[name].native[0] ** 2 / 400 ** 2                   # native px that a pixel stands for
    for k, kind in enumerate(kinds):
        if kind in LIMITS[name]:
            masks = [draw(name, 0, i, (400, 400))[1] for i in range(k, 8 * len(kinds), len(kinds))]
            areas = [(mask == classes.index(kind)).sum() * scale for mask in masks]
            limit_px = LIMITS[name][kind]
            assert 0.15 * limit_px < min(areas) < limit_px < max(areas)
        elif kind in classes:                                       # neither combined nor good
            masks = [draw(name, 0, i, (64, 64))[1] for i in range(k, 12 * len(kinds), len(kinds))]
            areas = [(mask > 0).sum() for mask in masks]
            assert np.mean(np.array(areas) >= 6) > 0.9 and np.median(areas) >= 10
