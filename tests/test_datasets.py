"""Folders are read as they are on disk: paired by stem, every image mode, and faults named in one sentence."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from conftest import run_audit
from datasets import (AUGMENTATIONS, FITS, audit, augment, bench, colorize, few_shot_split, fingerprint, natural, near_duplicates,
                      open_dataset, overlay, pair_paths, placed, read_image, read_mask, sheet, unfit, write_classes, write_image, write_pair)
from diffusion import rng

CLASSES = ("background", "crack", "dirt")


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def make_folder(root, kinds=("crack", "dirt"), count=3, size=(24, 32), masks=True):
    """A Defect Spectrum folder with `count` images per kind; the mask of image i of kind k is a square of class k + 1."""
    rng = np.random.default_rng(0)
    for k, kind in enumerate(kinds):
        for i in range(count):
            save(root / f"image/{kind}/{i:03d}.png", rng.integers(0, 256, (*size, 3)))
            mask = np.zeros(size, np.uint8)
            mask[4 + i:12 + i, 4:12] = k + 1
            if masks:
                save(root / f"mask/{kind}/{i:03d}_mask.png", mask)
    save(root / "image/good/000.png", rng.integers(0, 256, (*size, 3)))
    write_classes(root, CLASSES)
    return root


def test_defect_spectrum_is_read_pixel_for_pixel(tmp_path):
    data = open_dataset(make_folder(tmp_path / "bolt"))
    assert (data.name, data.classes, len(data), data.channels) == ("bolt", CLASSES, 7, 3)
    for i, sample in enumerate(data.samples):
        image, mask = data[i]
        assert image.shape == (3, 24, 32) and image.dtype == torch.uint8 and mask.dtype == torch.int64
        assert np.array_equal(image, np.array(Image.open(sample.image)).transpose(2, 0, 1))
        if sample.kind == "good":
            assert mask.sum() == 0
        else:
            assert np.array_equal(mask, np.array(Image.open(sample.mask))) and mask.sum() > 0
    assert data.native_size(0) == (24, 32)


def test_mvtec_masks_get_the_class_of_their_kind(tmp_path):
    for kind in ("cut", "hole"):
        save(tmp_path / f"test/{kind}/000.png", np.zeros((8, 8, 3)))
        save(tmp_path / f"ground_truth/{kind}/000_mask.png", np.pad(np.full((2, 2), 255), 3))
    save(tmp_path / "test/good/000.png", np.zeros((8, 8, 3)))
    data = open_dataset(tmp_path)
    assert data.classes == ("background", "cut", "hole")
    assert {s.kind: data[i][1].unique().tolist() for i, s in enumerate(data.samples)} == {"cut": [0, 1], "hole": [0, 2], "good": [0]}


def test_pairs_go_by_stem_in_natural_order_and_strays_are_skipped(tmp_path):
    root = make_folder(tmp_path, kinds=("crack",), count=1)
    for n, stem in enumerate(["2", "10"]):
        save(root / f"image/crack/{stem}.JPG", np.full((24, 32, 3), 50 * n))
        save(root / f"mask/crack/{stem}_mask.png", np.full((24, 32), n + 1))
    (root / "image/crack/.DS_Store").write_text("x")
    (root / "image/crack/notes.md").write_text("x")
    (root / "image/.hidden").mkdir()
    data = open_dataset(root)
    assert [s.name for s in data.samples] == ["crack/000", "crack/2", "crack/10", "good/000"]
    assert [data[i][1].max().item() for i in (1, 2)] == [1, 2]
    assert sorted(["1836", "472", "a10", "a9"], key=natural) == ["472", "1836", "a9", "a10"]


@pytest.mark.parametrize("mode, expected", [("L", 200), ("RGB", 200), ("RGBA", 200), ("P", 200), ("LA", 200), ("1", 255), ("I;16", 200), ("CMYK", 200)])
def test_every_image_mode_becomes_uint8(tmp_path, mode, expected):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((6, 4), 200 * 257, np.uint16)).save(path)
    else:
        Image.fromarray(np.full((6, 4), expected, np.uint8)).convert(mode).save(path)
    for channels in (1, 3):
        image = read_image(path, channels)
        assert image.shape == (channels, 6, 4) and image.dtype == np.uint8 and abs(int(image.mean()) - expected) <= 1


def test_an_exif_rotated_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                # turn by 90 degrees
    save(tmp_path / "image/crack/0.jpg", np.zeros((8, 16, 3)), exif=exif)
    save(tmp_path / "mask/crack/0_mask.png", np.ones((16, 8)))
    data = open_dataset(tmp_path)
    assert data.native_size(0) == (16, 8) and data[0][0].shape == (3, 16, 8)


def test_grey_files_give_one_channel_and_one_colour_file_makes_three(tmp_path):
    save(tmp_path / "image/crack/0.png", np.zeros((8, 8)))
    save(tmp_path / "mask/crack/0_mask.png", np.ones((8, 8)))
    assert open_dataset(tmp_path).channels == 1
    save(tmp_path / "image/crack/1.png", np.zeros((8, 8, 3)))
    save(tmp_path / "mask/crack/1_mask.png", np.ones((8, 8)))
    assert open_dataset(tmp_path)[0][0].shape == (3, 8, 8)


def test_masks_are_resized_nearest_only(tmp_path):
    data = open_dataset(make_folder(tmp_path), size=(16, 20))
    images, masks = data.tensors()
    assert images.shape == (7, 3, 16, 20) and masks.shape == (7, 16, 20)
    for i in range(len(data)):
        native = set(data.read(i)[1].unique().tolist())
        assert set(masks[i].unique().tolist()) <= native            # a blend of 0 and 2 would be 1


def test_few_shot_split_takes_the_first_n_of_each_kind(tmp_path):
    data = open_dataset(make_folder(tmp_path, count=12))
    train, rest = few_shot_split(data, 5)
    assert [data.samples[i].name for i in train] == [f"{k}/{i:03d}" for k in ("crack", "dirt") for i in range(5)] + ["good/000"]
    assert sorted(train + rest) == list(range(len(data)))
    assert len(open_dataset(tmp_path, split="train")) == 11 and len(open_dataset(tmp_path, split="test")) == 14


def test_split_json_wins(tmp_path):
    root = make_folder(tmp_path)
    (root / "split.json").write_text(json.dumps({"train": ["dirt/002"], "test": ["crack/000", "good/000"], "none": []}))
    assert [s.name for s in open_dataset(root, split="test").samples] == ["crack/000", "good/000"]
    with pytest.raises(ValueError, match="no split 'val'; there are train, test"):
        open_dataset(root, split="val")
    with pytest.raises(ValueError, match="'none' .* is empty"):
        open_dataset(root, split="none")
    (root / "split.json").write_text('{"train": ["dirt/999"]}')
    with pytest.raises(ValueError, match="no such images.*dirt/999"):
        open_dataset(root, split="train")


def test_a_written_pair_is_read_back(tmp_path):
    image, mask = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8), torch.randint(0, 3, (8, 12))
    write_pair(tmp_path, "000017", image, mask, "generated")
    write_classes(tmp_path, CLASSES)
    data = open_dataset(tmp_path)
    assert data.samples[0].name == "generated/000017" and data.classes == CLASSES
    assert torch.equal(data[0][0], image) and torch.equal(data[0][1], mask)
    assert Image.open(pair_paths(tmp_path, "000017", "generated")[1]).mode == "L"       # a palette PNG misleads OpenCV
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.suffix]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", np.zeros((1, 4, 4), np.uint8))
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_image(tmp_path / "a.png", np.ones((1, 4, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and read_image(tmp_path / "a.png", 1).max() == 0


# --- bad input: one sentence that says what came and what to do ---

def test_missing_empty_and_unknown_folders(tmp_path):
    (tmp_path / "bolt").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder; .* holds .*bolt"):
        open_dataset(tmp_path / "bold")
    with pytest.raises(ValueError, match=r"(?s)no known layout.*Found none.*Defect Spectrum.*MVTec AD"):
        open_dataset(tmp_path / "bolt")
    (tmp_path / "bolt/image/crack").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        open_dataset(tmp_path / "bolt")
    with pytest.raises(ValueError, match="unknown drawn object 'tablet'; there are drawn:pill"):
        open_dataset("drawn:tablet")
    with pytest.raises(FileNotFoundError, match="bolt"):
        open_dataset(tmp_path, object="nut")


def test_unpaired_files_are_listed_both_ways(tmp_path):
    root = make_folder(tmp_path)
    (root / "mask/crack/001_mask.png").unlink()
    (root / "image/dirt/002.png").unlink()
    with pytest.raises(ValueError, match=r"without a mask \(1\): image/crack/001.png; masks without an image \(1\): mask/dirt/002_mask.png"):
        open_dataset(root)


def bad_mask(root, array):
    save(root / "mask/crack/001_mask.png", array)
    return open_dataset(root, size=(16, 16))


@pytest.mark.parametrize("array, message", [
    (np.pad(np.full((8, 8), 255), ((8, 8), (8, 16))), "binary 0/255 mask"),
    (np.zeros((24, 32, 3)), "is RGB"),
    (np.full((24, 32), 7), r"values \[7\] but the class list has 0..2 \(background, crack, dirt\)"),
    (np.ones((20, 32)), "24x32 but its mask .* is 20x32"),
])
def test_wrong_masks_are_named(tmp_path, array, message):
    data = bad_mask(make_folder(tmp_path), array)
    with pytest.raises(ValueError, match=message) as error:
        data.tensors()
    assert "001" in str(error.value) and "1 of 7 samples" in str(error.value)


def test_truncated_and_foreign_files_are_named_all_at_once(tmp_path):
    root = make_folder(tmp_path)
    whole = (root / "image/crack/000.png").read_bytes()
    (root / "image/crack/000.png").write_bytes(whole[:len(whole) // 2])
    (root / "image/dirt/000.png").write_text("not a picture")
    (root / "image/dirt/001.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 7 samples") as error:
        open_dataset(root, size=(16, 16)).tensors()
    assert all(name in str(error.value) for name in ("crack/000.png", "dirt/000.png", "dirt/001.png"))
    report = audit(open_dataset(root))
    assert len(report["problems"]) == 3 and sum(report["sizes"].values()) == 4


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    root, real_open = make_folder(tmp_path), open

    def refuse(file, *arguments, **options):                        # what the system says to all but root
        if str(file).endswith("image/crack/000.png"):
            raise PermissionError(13, "Permission denied")
        return real_open(file, *arguments, **options)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match="crack/000.png: cannot be read as an image .*Permission denied"):
        open_dataset(root, size=(16, 16)).tensors()


@pytest.mark.parametrize("text", ["[1, 2]", '{"0": "background", "2": "crack"}', "{"])
def test_a_broken_class_table_is_named(tmp_path, text):
    root = make_folder(tmp_path)
    (root / "classes.json").write_text(text)
    with pytest.raises(ValueError, match="classes.json"):
        open_dataset(root)


def test_without_classes_json_the_masks_decide_and_0_255_is_refused(tmp_path):
    root = make_folder(tmp_path)
    (root / "classes.json").unlink()
    assert open_dataset(root).classes == ("background", "class_1", "class_2")
    save(root / "mask/crack/001_mask.png", np.full((24, 32), 255))
    with pytest.raises(ValueError, match="value 255.*0/255"):
        open_dataset(root)


# --- fitting into a size ---

def photo_and_mask(tmp_path, size):
    """A picture that is its own mask, so that image and mask can be compared after any change."""
    mask = np.zeros(size, np.uint8)
    mask[size[0] // 4:size[0] // 2, size[1] // 3:] = 1
    save(tmp_path / "image/crack/0.png", mask * 255)
    save(tmp_path / "mask/crack/0_mask.png", mask)
    write_classes(tmp_path, CLASSES)
    return mask


@pytest.mark.parametrize("native", [(24, 72), (72, 24), (48, 48), (7, 5)])
@pytest.mark.parametrize("fit", FITS)
def test_fit_keeps_image_and_mask_together_and_unfit_takes_it_back(tmp_path, native, fit):
    mask = photo_and_mask(tmp_path, native)
    image, fitted = open_dataset(tmp_path, (16, 16), fit=fit)[0]
    height, width, top, left = placed(native, (16, 16), fit)
    inside = np.zeros((16, 16), bool)
    inside[max(0, top):top + height, max(0, left):left + width] = True
    assert image.shape == (1, 16, 16) and fitted.shape == (16, 16) and ((image[0] > 127) == (fitted > 0))[inside].float().mean() > 0.9
    assert not fitted[~inside].any() and len(image[0][~inside].unique()) <= 1           # one colour, no defect
    assert {"squash": (height, width) == (16, 16), "pad": inside.any(0).all() or inside.any(1).all(), "crop": inside.all()}[fit]
    if fit != "squash":
        assert abs(height / width - native[0] / native[1]) < 0.15 * native[0] / native[1]
    whole = unfit(fitted, native, fit)
    assert whole.shape == (height, width)
    if fit != "crop":                                   # a crop's outside was not seen; else the share of the defect is the native one
        assert abs(whole.mean() - mask.mean()) < 0.12


# --- augmentation ---

@pytest.mark.parametrize("names", [["flip"], ["turn"], ["crop"], list(AUGMENTATIONS)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_augmentation_moves_image_and_mask_together(names, size):
    masks = torch.zeros(40, *size, dtype=torch.uint8)
    masks[:, 1:size[0] // 2, 2:size[1] // 3] = 1
    images = masks[:, None] * 255
    changed, moved = augment(images, masks, names, rng(0, 4, 7))
    assert changed.shape == images.shape and moved.shape == masks.shape and changed.dtype == moved.dtype == torch.uint8
    assert type(changed) is type(moved) is torch.Tensor and set(moved.unique().tolist()) <= {0, 1}
    agree = ((changed[:, 0] > 127) == (moved > 0)).float().mean()
    assert agree == 1 if "crop" not in names else agree > 0.94      # a resized image is blended, its mask is not
    assert len({m.numpy().tobytes() for m in moved}) > (1 if names != ["crop"] else 5)
    if "crop" not in names:
        assert (moved.flatten(1).sum(1) == masks.flatten(1).sum(1)).all()
    again = augment(images, masks, names, rng(0, 4, 7))
    assert torch.equal(again[0], changed) and torch.equal(again[1], moved)
    assert not torch.equal(augment(images, masks, names, rng(0, 4, 8))[1], moved)


# --- pictures and the audit ---

def test_near_duplicates_are_found_and_different_pictures_are_not():
    random = np.random.default_rng(0)
    images = [np.asarray(Image.fromarray(random.integers(0, 256, (12, 12), np.uint8)).resize((64, 48), Image.BICUBIC))[None] for _ in range(40)]
    prints = {str(i): fingerprint(image) for i, image in enumerate(images)}
    prints["brighter"] = fingerprint((images[3] * 0.9 + 20).astype(np.uint8))
    found = near_duplicates(prints, [str(i) for i in range(20)], [*map(str, range(20, 40)), "brighter"])
    assert [pair[:2] for pair in found] == [("3", "brighter")] and near_duplicates(prints, ["1"], []) == []


def test_bench_and_commands_of_the_audit(tmp_path, capsys):
    root = make_folder(tmp_path / "bolt", count=6)
    bench(open_dataset(root), sizes=(16,))
    table = capsys.readouterr().out.split("fit in memory")[1].split()
    assert table[0] == "16x16" and all(float(rate) > 0 for rate in table[1:5]) and table[5] == str(datasets.MEMORY_LIMIT // (4 * 256))
    with pytest.raises(ValueError, match="drawn data have none"):
        bench(open_dataset("drawn:pill"))
    assert "256x256" in run_audit("--data", root, "--bench")
    (root / "image/crack/000.png").write_bytes(b"x")
    assert "crack/000.png" in run_audit("--data", root, "--sheet", tmp_path / "sheet.png", code=1) and (tmp_path / "sheet.png").exists()


def test_audit_counts_what_was_written(tmp_path):
    root = make_folder(tmp_path)
    both = np.zeros((24, 32), np.uint8)
    both[0, :5], both[1, :7] = 1, 2
    save(root / "mask/crack/001_mask.png", both)
    report = audit(open_dataset(root))
    assert report["kinds"] == {"crack": 3, "dirt": 3, "good": 1} and report["several_types"] == 1 and not report["problems"]
    crack = report["classes"]["crack"]
    assert (crack["pixels"], crack["images"], crack["area"]) == (2 * 64 + 5, 3, [5, 64, 64]) and report["classes"]["dirt"]["pixels"] == 3 * 64 + 7


def test_a_mask_of_zeros_and_ones_is_no_binary_mask(tmp_path):
    save(tmp_path / "m.png", np.array([[0, 1]]))
    with pytest.raises(ValueError, match="this one is 0 to 1; are its values class indices"):
        read_mask(tmp_path / "m.png", CLASSES, label=1)


@pytest.mark.parametrize("text", ["[1]", "[]", '{"train": null}', '{"train": [["a"]]}'])
def test_a_split_of_another_shape_is_a_sentence(tmp_path, text):
    root = make_folder(tmp_path)
    (root / "split.json").write_text(text)
    with pytest.raises(ValueError, match="split.json: expected"):
        open_dataset(root, split="train")


def test_every_class_has_a_colour_and_only_background_is_black():
    colours = colorize(np.arange(40, dtype=np.uint8)[None])
    assert not colours[:, 0, 0].any() and colours[:, 0, 1:].any(0).all()


def test_not_a_number_becomes_null(tmp_path):
    datasets.write_json(tmp_path / "a.json", {"iou": [0.5, float("nan")], "n": {"x": (1, 2)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"iou": [0.5, None], "n": {"x": [1, 2]}}


def test_an_empty_mask_in_a_kind_folder_is_no_defect(tmp_path):
    root = make_folder(tmp_path)
    save(root / "mask/crack/001_mask.png", np.zeros((24, 32)))
    data = open_dataset(root)
    assert "crack/001" not in [data.samples[i].name for i in data.defective()] and len(data.defective()) == 5


def test_overlay_changes_defects_only():
    image, mask = np.full((1, 4, 4), 100, np.uint8), np.zeros((4, 4), np.uint8)
    mask[1, 2] = 1
    laid = overlay(image, mask)
    assert laid.shape == (3, 4, 4) and (laid != 100).any(0).sum() == 1 and colorize(mask)[:, 1, 2].any()
    assert sheet([("row", [image, laid])], ("a", "b"), CLASSES).width > 200


def test_colour_mask_bits_and_16_bit_masks(tmp_path):
    Image.fromarray(np.full((4, 4), 2, np.uint16)).save(tmp_path / "wide.png")
    assert read_mask(tmp_path / "wide.png", CLASSES).max() == 2
    palette = Image.fromarray(np.full((4, 4), 2, np.uint8), "P")
    palette.putpalette([9] * 768)
    palette.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png", CLASSES).max() == 2           # the raw index, not the colour
    save(tmp_path / "grey_edges.png", np.array([[0, 127, 128, 255]]))
    assert read_mask(tmp_path / "grey_edges.png", CLASSES, label=2).tolist() == [[0, 0, 2, 2]]
