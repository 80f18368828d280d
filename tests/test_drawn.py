"""The drawn products: the same at every size, exact in area, on both sides of each limit of the paper."""
import numpy as np
import pytest

from data.drawn import DRAWN, draw, drawn_kind

LIMITS = [("pill", "contamination", 4000), ("pill", "color", 300), ("wood", "color", 250),
          ("wood", "liquid", 1000), ("zipper", "fabric_border", 4800), ("zipper", "fabric_interior", 4800)]
NO_LIMIT = [("pill", "crack"), ("pill", "scratch"), ("pill", "faulty_imprint"), ("wood", "crack"),
            ("wood", "hole"), ("wood", "scratch"), ("zipper", "broken_teeth"), ("zipper", "split_teeth"),
            ("zipper", "squeezed_teeth")]
each_product = pytest.mark.parametrize("name", DRAWN)


def pictures(name, kind, count):
    """The indices of the first `count` pictures of a kind."""
    kinds = DRAWN[name].kinds
    return range(kinds.index(kind), count * len(kinds), len(kinds))


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
def test_each_kind_holds_its_own_class_and_combined_holds_several(name):
    for i, kind in enumerate(DRAWN[name].kinds):
        expected = set() if kind == "good" else {i + 1}
        for index in pictures(name, kind, 3):
            _, mask, original, drawn, _ = draw(name, 0, index, (200, 200))
            found = set(np.unique(mask).tolist()) - {0}
            assert drawn == kind and original.any() == (kind != "good")
            assert len(found) >= 2 if kind == "combined" else found == expected


@each_product
def test_the_original_annotation_is_coarse_and_marks_one_defect(name):
    for index in range(3 * len(DRAWN[name].kinds)):
        _, mask, original, kind, _ = draw(name, 0, index, (200, 200))
        assert set(np.unique(original)) <= {0, 1}
        if original.any():
            for axis in (0, 1):                                     # in one piece
                assert (np.diff(np.flatnonzero(original.any(axis))) == 1).all()
            inside = mask[original > 0]
            assert (inside > 0).any() and (inside == 0).any()
            assert kind == "combined" or (inside > 0).sum() >= 0.3 * (mask > 0).sum()


@each_product
def test_captions_name_every_class_in_the_mask(name):
    for index in range(4 * len(DRAWN[name].kinds)):
        _, mask, _, kind, caption = draw(name, 2, index, (64, 96))
        assert all(DRAWN[name].classes[c].replace("_", " ") in caption for c in np.unique(mask) if c)
        assert caption.startswith("A ") and caption.endswith(".")
        assert ("flawless" in caption) == (kind == "good")


@pytest.mark.parametrize("name, kind, limit_px", LIMITS)
def test_areas_lie_on_both_sides_of_the_limit(name, kind, limit_px):
    index = DRAWN[name].classes.index(kind)
    scale = DRAWN[name].native[0] ** 2 / 400 ** 2                   # native px that a pixel stands for
    areas = [(draw(name, 0, i, (400, 400))[1] == index).sum() * scale for i in pictures(name, kind, 8)]
    assert 0.15 * limit_px < min(areas) < limit_px < max(areas)


@pytest.mark.parametrize("name, kind", NO_LIMIT)
def test_defects_without_a_limit_can_be_seen_at_64_px(name, kind):
    areas = [(draw(name, 0, i, (64, 64))[1] > 0).sum() for i in pictures(name, kind, 12)]
    assert np.mean(np.array(areas) >= 6) > 0.9 and np.median(areas) >= 10
