"""The drawn products: the same at every size, exact in area, on both sides of every limit of the paper's standards."""
import numpy as np
import pytest

from drawn import DRAWN, draw, drawn_kind

LIMITS = [("pill", "contamination", 4000), ("pill", "color", 300), ("wood", "color", 250), ("wood", "liquid", 1000),
          ("zipper", "fabric_border", 4800), ("zipper", "fabric_interior", 4800)]
NO_LIMIT = [("pill", "crack"), ("pill", "scratch"), ("pill", "faulty_imprint"), ("wood", "crack"), ("wood", "hole"),
            ("wood", "scratch"), ("zipper", "broken_teeth"), ("zipper", "split_teeth"), ("zipper", "squeezed_teeth")]


def pictures(name, kind, count):
    """The indices of the first `count` pictures of a kind."""
    kinds = DRAWN[name].kinds
    return range(kinds.index(kind), count * len(kinds), len(kinds))


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_a_function_of_product_seed_and_index(name):
    first, again, other = draw(name, 0, 5, (64, 64)), draw(name, 0, 5, (64, 64)), draw(name, 1, 5, (64, 64))
    assert all(np.array_equal(a, b) for a, b in zip(first[:3], again[:3])) and first[3:] == again[3:]
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("name", DRAWN)
def test_types_shapes_and_kinds(name):
    image, mask, original, kind, caption = draw(name, 0, 2, (48, 96))
    assert image.shape == (48, 96, 3) and mask.shape == original.shape == (48, 96)
    assert image.dtype == mask.dtype == original.dtype == np.uint8
    assert kind == drawn_kind(name, 2) == DRAWN[name].kinds[2]
    assert draw(name, 0, 6)[1].shape == DRAWN[name].native
    with pytest.raises(ValueError, match="pill, zipper, wood"):
        draw("cable", 0, 0)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_small_masks_are_the_native_mask_sampled(name, size):
    for index in (1, 3, 5):
        native, small = draw(name, 3, index), draw(name, 3, index, size)
        rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(size, native[1].shape))
        for whole, sampled in zip(native[1:3], small[1:3]):
            a, b = whole[np.ix_(rows, columns)], sampled
            assert (a != b).sum() <= 3 + 0.1 * (b > 0).sum()                   # pixels on the very edge may differ
        assert native[3:] == small[3:]


@pytest.mark.parametrize("name", DRAWN)
def test_small_images_are_the_native_image_shrunk(name):
    native, small = draw(name, 0, 3)[0], draw(name, 0, 3, (64, 64))[0]
    step = native.shape[0] / 64
    rows = (np.arange(native.shape[0]) / step).astype(int)
    shrunk = np.zeros((64, 64, 3))
    np.add.at(shrunk, (rows[:, None], rows[None]), native)
    shrunk /= np.bincount(rows)[:, None, None] * np.bincount(rows)[None, :, None]
    assert np.abs(shrunk - small).mean() < 8                                   # of 255
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("name", DRAWN)
def test_each_kind_holds_its_own_class_and_combined_holds_several(name):
    for i, kind in enumerate(DRAWN[name].kinds):
        for index in pictures(name, kind, 3):
            _, mask, original, kind_, _ = draw(name, 0, index, (200, 200))
            found = set(np.unique(mask).tolist()) - {0}
            assert kind_ == kind
            assert len(found) >= 2 if kind == "combined" else found == (set() if kind == "good" else {i + 1})
            assert original.any() == (kind != "good")


@pytest.mark.parametrize("name", DRAWN)
def test_the_original_annotation_is_coarse_and_marks_one_defect(name):
    for index in range(3 * len(DRAWN[name].kinds)):
        _, mask, original, kind, _ = draw(name, 0, index, (200, 200))
        assert set(np.unique(original)) <= {0, 1}
        if original.any():
            rows, columns = np.nonzero(original.any(1))[0], np.nonzero(original.any(0))[0]
            assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1))      # in one piece
            assert np.array_equal(columns, np.arange(columns[0], columns[-1] + 1))
            inside = mask[original > 0]
            assert (inside > 0).any() and (inside == 0).any()
            assert kind == "combined" or (inside > 0).sum() >= 0.3 * (mask > 0).sum()


@pytest.mark.parametrize("name", DRAWN)
def test_captions_name_every_class_in_the_mask(name):
    for index in range(4 * len(DRAWN[name].kinds)):
        _, mask, _, kind, caption = draw(name, 2, index, (64, 96))
        for c in set(np.unique(mask).tolist()) - {0}:
            assert DRAWN[name].classes[c].replace("_", " ") in caption
        assert caption.startswith("A ") and caption.endswith(".") and ("flawless" in caption) == (kind == "good")


@pytest.mark.parametrize("name, kind, limit_px", LIMITS)
def test_areas_lie_on_both_sides_of_the_limit(name, kind, limit_px):
    index = DRAWN[name].classes.index(kind)
    scale = DRAWN[name].native[0] ** 2 / 400 ** 2                              # native px that a pixel stands for
    areas = [(draw(name, 0, i, (400, 400))[1] == index).sum() * scale for i in pictures(name, kind, 8)]
    assert min(areas) < limit_px < max(areas)
    assert all(area > 0.15 * limit_px for area in areas)


@pytest.mark.parametrize("name, kind", NO_LIMIT)
def test_defects_without_a_limit_can_be_seen_at_64_px(name, kind):
    areas = [(draw(name, 0, i, (64, 64))[1] > 0).sum() for i in pictures(name, kind, 12)]
    assert np.mean(np.array(areas) >= 6) > 0.9 and np.median(areas) >= 10
