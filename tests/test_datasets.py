"""Folders are read as they lie on disk: paired by stem, every image mode, faults named in one sentence."""
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from conftest import make_data, picture
from datasets import (AUGMENTATIONS, CLASS_TABLES, GOOD_KINDS, LABELS, audit, augment, colorize, find_dataset,
                      find_objects, listing, open_dataset, overlay, pair_paths, sheet, write_atomically,
                      write_classes, write_image, write_json, write_pair)
from diffusion import rng

CLASSES = ("background", "crack", "dirt")
KINDS = {"crack": (1,), "dirt": (2,), "combined": (2, 1), "good": ()}
ON_DISK = {     # photos and masks of every layout; {kind} is a folder or, in flat ones, a part of the name
    "defect spectrum": ("image/{kind}/{n:03d}.png", "mask/{kind}/{n:03d}_mask.png"),
    "flat": ("image/{n}{kind}.JPG", "mask/{n}{kind}_mask.png"),
    "images, masks": ("images/{kind}/photo {n}.bmp", "masks/{kind}/photo {n}.png"),
    "flat images, masks": ("images/{n}_{kind}.webp", "masks/{n}_{kind}_mask.png"),
    "mvtec": ("test/{kind}/{n:03d}.png", "ground_truth/{kind}/{n:03d}_mask.png")}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
PHOTO = Image.fromarray(PIXELS)


def save(path, content, **options):
    """Write bytes as they are, or a picture: a PIL image or an array of grey levels or RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Image.Image):
        content.save(path, **options)
    else:
        Image.fromarray(np.asarray(content, np.uint8)).save(path, **options)
    return path


def build(root, layout, count=7):
    """Write a data set; returns {sample name: (photo, mask file or None, the mask to be read)}."""
    written, noise, flat = {}, np.random.default_rng(0), layout.startswith("flat")
    for kind, values in KINDS.items():
        for n in range(count) if (layout, kind) != ("mvtec", "combined") else ():
            photo, mask_path = (root / path.format(kind=kind, n=n) for path in ON_DISK[layout])
            save(photo, noise.integers(0, 256, (24, 32, 3)))
            mask = np.zeros((24, 32), np.uint8)
            for value in values:
                mask[2 + n:6 + 2 * n, 10 * value:10 * value + 8] = value
            if values or flat:
                save(mask_path, (mask > 0) * 255 if layout == "mvtec" else mask)
            name = photo.stem if flat else f"{kind}/{photo.stem}"
            written[name] = photo, mask_path if values or flat else None, mask
    if layout != "mvtec":
        write_classes(root, CLASSES)
    for stray in (root / ".DS_Store", photo.with_name(".hidden.png"), photo.with_name("notes.md")):
        stray.write_text("x")
    return written


def says(words, function, *arguments, **options):
    """The call is refused with a sentence that holds these words."""
    with pytest.raises((ValueError, OSError), match=words):
        function(*arguments, **options)


def names(*arguments, **options):
    return [sample.name for sample in open_dataset(*arguments, **options).samples]


@pytest.mark.parametrize("layout", ON_DISK)
def test_each_layout_is_read_pixel_for_pixel_resized_split_by_a_rule_and_counted(tmp_path, layout):
    root, flat = tmp_path / "bolt", layout.startswith("flat")
    written = build(root, layout)
    masks, count = {name: mask for name, (_, _, mask) in written.items()}, len(written)
    data = open_dataset(root)
    assert (data.name, data.classes, data.channels, data.problems) == ("bolt", CLASSES, 3, [])
    assert sorted(s.name for s in data.samples) == sorted(written)
    small = open_dataset(root, (13, 20)).tensors()          # photos bilinear, masks nearest
    rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in ((13, 24), (20, 32)))
    for (image, mask), sample, small_image, small_mask in zip(data, data.samples, *small, strict=True):
        photo, native = Image.open(written[sample.name][0]), masks[sample.name]
        assert {part.dtype for part in (image, mask, small_image, small_mask)} == {torch.uint8}
        assert np.array_equal(image.permute(1, 2, 0), photo) and np.array_equal(mask, native)
        assert np.array_equal(small_image.permute(1, 2, 0), photo.resize((20, 13), Image.BILINEAR))
        assert np.array_equal(small_mask, native[np.ix_(rows, columns)])        # a blend of 0 and 2 is 1
        assert sample.kind == ("" if flat else sample.image.parent.name)
    assert data.defective() == [i for i, s in enumerate(data.samples) if masks[s.name].any()]

    train, rule = open_dataset(root, split="train"), "class" if flat else "kind"
    chosen = [s.name for s in train.samples]
    assert sorted(chosen + names(root, split="test")) == sorted(written)
    assert f"images (split train: the first 5 images of each {rule} train), " in datasets.describe(train)
    for k in (1, 2) if flat else ():
        assert set([s.name for s in data.samples if (masks[s.name] == k).any()][:5]) <= set(chosen)
    assert flat or [name[-1] for name in chosen] == [*"01234"] * (count // 7)

    report = audit(data)
    assert (report["images"], report["sizes"], report["problems"]) == (count, {"24x32": count}, [])
    assert report["annotated"] == sum(mask.any() for mask in masks.values())
    assert report["several_classes"] == sum(len(np.unique(mask)) > 2 for mask in masks.values())
    for k, name in enumerate(CLASSES):
        assert sorted(report["classes"][name]) == sorted((m == k).sum() for m in masks.values() if k in m)
    assert set(report["kinds"].values()) == {count if flat else 7}

    victims = [files[k] for k, files in zip((1, 0), [*written.values()][4:])]       # a mask and a photo
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:-40])
    sentence = f"(?s)2 of {count} samples of .* cannot be used.*{victims[0]}.*{victims[1]}"
    says(sentence, open_dataset(root, (16, 20)).tensors)
    report = audit(open_dataset(root))
    assert all(str(path) in problem for path, (_, problem) in zip(victims, report["problems"], strict=True))
    assert sum(report["sizes"].values()) == count - 2


def test_random_trees_pair_by_stem(tmp_path):
    """40 random folders: what is read is what has a partner, and what has none is named."""
    for trial in range(40):
        draw, root, there = random.Random(trial), tmp_path / str(trial), {}
        for kind in draw.sample(["crack", "good", "ok", "a b", "10", "2", ""], 3):
            for stem in draw.sample(["0", "000", "1_mask", "x.y", "Z", "007"], 4):
                there[kind, stem] = image, mask = draw.random() < 0.8, draw.random() < 0.7
                if image:
                    save(root / f"image/{kind}/{stem}.{draw.choice(['png', 'JPG', 'bmp'])}", np.zeros((8, 8)))
                if mask:
                    save(root / f"mask/{kind}/{stem}_mask.png", np.ones((8, 8)))
        write_classes(root, ("background", "x"))
        if (root / "image").is_dir():
            data = find_dataset(root)
            paired = {f"{kind}/{stem}".lstrip("/"): mask for (kind, stem), (image, mask) in there.items()
                      if image and (mask or kind in GOOD_KINDS)}
            assert {s.name: s.mask is not None for s in data.samples} == paired
            assert all(s.mask is None or s.mask.stem == f"{s.image.stem}_mask" for s in data.samples)
            assert len(data.problems) == sum(image or mask for image, mask in there.values()) - len(paired)


def test_files_without_a_partner_are_listed_both_ways_and_two_files_of_one_stem(tmp_path):
    root = make_data(tmp_path, count=3)
    (root / "mask/crack/001_mask.png").unlink()
    (root / "image/dirt/002.png").unlink()
    shutil.copy(root / "image/crack/000.png", root / "image/crack/000.bmp")
    for split in None, "train":
        says(r"3 files find no partner of their name: image/crack/000.png \(no mask\), image/crack/001.png "
             r"\(no mask\), mask/dirt/002_mask.png \(no image\)", open_dataset, root, split=split)


def test_two_annotations_of_the_same_photos_share_one_split_by_name(tmp_path):
    """The older one lacks a mask: it is refused, for a split without that photo would move others into it."""
    exact, older = (tmp_path / layout for layout in ("defect spectrum", "mvtec"))
    for root in exact, older:
        build(root, root.name)
    shutil.rmtree(exact / "image/combined"), shutil.rmtree(exact / "mask/combined")
    assert names(exact, split="train") == names(older, split="train") and len(names(older, split="test")) == 6
    (older / "ground_truth/crack/001_mask.png").unlink()
    for split in None, "train", "test":
        says(r"1 files find no partner .*: test/crack/001.png \(no mask\)", open_dataset, older, split=split)


def test_the_order_is_natural_and_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    stems, iterdir = ["9", "010", "10", "472", "1836", "A", "B", "a9", "a10", "a", "a²", "b"], Path.iterdir
    for stem in stems:
        save(tmp_path / f"{stem}.png", np.zeros((2, 2)))
    for backwards in False, True:
        monkeypatch.setattr(Path, "iterdir", lambda self: sorted(iterdir(self), reverse=backwards))
        assert [path.stem for path in listing(tmp_path)] == stems


def test_split_json_wins_and_its_names_do_not_leave_the_folder(tmp_path):
    root = make_data(tmp_path / "bolt", count=3)
    shutil.copytree(root, tmp_path / "secret")
    splits = {"train": ["dirt/002"], "test": ["crack/000", "good/000"], "none": []}
    write_json(root / "split.json", splits)
    assert names(root, split="test") == splits["test"]
    assert open_dataset(root, split="test").split_rule == "split test: split.json or folders"
    write_json(root / "split.json", {"test": splits["test"][::-1]})     # the order of a list changes nothing
    assert names(root, split="test") == splits["test"]
    write_json(root / "split.json", splits)
    says("bolt has no split 'val'; there are train, test, none", open_dataset, root, split="val")
    says("the split 'none' of bolt is empty", open_dataset, root, split="none")
    for name in ("dirt/999", "../../secret/image/crack/000", "/etc/passwd", "crack/../crack/000"):
        write_json(root / "split.json", {"train": [name]})
        words = f"split.json, 'train': 1 images are not there: {name}. A name is like crack/000"
        says(words, open_dataset, root, split="train")


def test_json_of_another_shape_is_a_sentence(tmp_path):
    make_data(tmp_path, count=1)
    for name, texts in {
            "split.json": ["[1]", "[]", '{"train": null}', '{"train": [["a"]]}', "[" * 100_000, "1" * 10_000],
            "classes.json": ["[1, 2]", '{"0": "background", "2": "crack"}', '{"0": "crack"}', "{"]}.items():
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else "{}"
        for text in texts:
            (tmp_path / name).write_text(text)
            says(f"{name}: (expected|cannot be read as JSON)", open_dataset, tmp_path, split="train")
        (tmp_path / name).write_text(before)


def test_tables_are_shipped_overridden_by_classes_json_and_else_counted_from_the_masks(tmp_path):
    assert {**CLASS_TABLES, **LABELS} == CLASS_TABLES and len(CLASS_TABLES) == 15 + 6 + 3
    assert [len(CLASS_TABLES[name]) for name in ("cable", "hazelnut", "toothbrush", "Ring")] == [9, 5, 4, 5]
    pill, bolt = (make_data(tmp_path / name, count=24, size=(48, 48)) for name in ("pill", "bolt"))
    assert open_dataset(pill).classes == CLASSES and len(open_dataset(pill)) == 72      # own data: all of it
    for root in pill, bolt:
        (root / "classes.json").unlink()
    data = open_dataset(pill)
    assert data.classes == LABELS["pill"] and len(data) == 24 + 24 + 2          # 22 good ones are metal nuts
    assert "left out, photos of another product: good/000, good/001" in datasets.describe(data)
    save(tmp_path / "ad/pill/test/good/000.png", PIXELS)
    (tmp_path / "ad/pill/ground_truth").mkdir()
    assert len(open_dataset(tmp_path / "ad")) == 1                  # MVTec AD itself has pills there
    assert open_dataset(bolt).classes == ("background", "class_1", "class_2")
    save(bolt / "mask/crack/001_mask.png", np.full((48, 48), 255))
    says(f"{bolt}: .* the value 255 .*python data/convert.py {bolt} --out NEW", open_dataset, bolt)


def test_a_root_lists_its_objects_and_what_is_not_there_is_a_sentence(tmp_path):
    paths = ["DS-MVTec/pill", "DS-MVTec/wood", "DS-VISION/Wood", "other/wood", "pill"]
    for path in paths:
        build(tmp_path / path, "images, masks", count=1)
    assert list(find_objects(tmp_path)) == paths
    says(f"holds several; choose one with --object: {', '.join(paths)}", open_dataset, tmp_path)
    says("--object tablet: not in .*; there are DS-MVTec/pill", open_dataset, tmp_path, object="tablet")
    says("holds several; .*: DS-MVTec/wood, other/wood", open_dataset, tmp_path, object="wood")
    for name, folder in (("Wood", "DS-VISION/Wood"), ("other/wood", "other/wood"), ("pill", "pill")):
        assert open_dataset(tmp_path, object=name).samples[0].image.is_relative_to(tmp_path / folder)
    assert open_dataset(tmp_path / "DS-VISION").name == "Wood"                      # only one there

    (tmp_path / "bolt/empty").mkdir(parents=True)
    says("--data .*bold: no such folder; .* holds DS-MVTec, ", open_dataset, tmp_path / "bold")
    says("(?s)no layout that is read.*Defect Spectrum.*MVTec AD.*convert.py", open_dataset, tmp_path / "bolt")
    (tmp_path / "bolt/image/crack").mkdir(parents=True)
    says("bolt: no images in it; expected", open_dataset, tmp_path / "bolt")
    says("unknown drawn object 'drawn:tablet'; there are drawn:pill, ", open_dataset, "drawn:tablet")
    says("--size 0 4: height and width must be at least 1", open_dataset, "drawn:pill", (0, 4))


@pytest.mark.parametrize("spec, classes", [("drawn:pill", LABELS["pill"][:6]),
                                           ("drawn:pill:original", ("background", "defect"))])
def test_drawn_products_are_a_data_set_in_both_annotations(spec, classes):
    data = open_dataset(spec, (48, 64), "train")
    images, masks = data.tensors()
    assert data.classes[:len(classes)] == classes and images.shape == (35, 3, 48, 64)
    assert images.dtype == masks.dtype == torch.uint8 and masks.unique().tolist() == [*range(len(classes))]
    assert {data.samples[i].kind for i in data.defective()} == {s.kind for s in data.samples} - {"good"}
    assert data.read_mask(0).dtype == np.uint8 and data.read_mask(0).shape == (800, 800)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "I;16", "I", "F", "CMYK"])
def test_every_image_mode_becomes_uint8(tmp_path, mode):
    value, ending = 255 if mode == "1" else 200, "tif" if mode in ("I", "F", "CMYK") else "png"
    wide = Image.fromarray(np.full((6, 4), value * 257, np.uint16))
    save(tmp_path / f"image/good/x.{ending}",
         wide if mode == "I;16" else Image.new("L", (4, 6), value).convert(mode))
    data = open_dataset(tmp_path)
    for data.channels in (1, 3):
        image, _ = data[0]
        assert image.shape == (data.channels, 6, 4) and image.dtype == torch.uint8
        assert (image.int() - value).abs().max() <= 1


def test_grey_files_give_one_channel_and_one_colour_file_makes_three(tmp_path):
    grey, colour = np.zeros((8, 8, 3)), np.zeros((8, 8, 3))
    colour[3, 4] = 1, 0, 0
    for stem, image, channels in (("0", grey[..., 0], 1), ("1", grey, 1), ("2", colour, 3), ("3", grey, 3)):
        save(tmp_path / f"image/good/{stem}.png", image)
        assert open_dataset(tmp_path)[0][0].shape == (channels, 8, 8)


def test_a_listing_opens_one_file_only_to_see_that_it_is_in_colour(data, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    assert len(open_dataset(data, (16, 16))) == 24 and len(opened) == 1


def test_grey_photos_are_looked_at_by_several_threads_until_one_is_in_colour(tmp_path, monkeypatch):
    def looked_at(path):
        threads.append(threading.current_thread())
        time.sleep(0.005)
        return path.stem != coloured
    for n in range(200):
        save(tmp_path / f"image/good/{n}.png", b"")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(datasets, "is_grey", looked_at)
    for coloured, channels, most in (("", 1, 200), ("199", 3, 200), ("7", 3, 199)):
        threads = []
        assert open_dataset(tmp_path).channels == channels and len(threads) <= most
        assert len(set(threads)) > 2 or most < 200


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6                                                              # by 90 degrees
WORDS = np.full((2, 3, 3), 500, ">u2").tobytes()                # of 16 bits each, in colour
DEEP = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)),
                                   (b"IDAT", zlib.compress(b"\0" + WORDS[:18] + b"\0" + WORDS[18:])),
                                   (b"IEND", b"")))
NAN = Image.fromarray(np.full((24, 32), np.nan, np.float32))
PICTURES = {                    # name: (bytes, what is read: pixels or a shape; or the words of the error)
    "truncated.png": (encoded(PHOTO, "PNG")[:900], "truncated"),
    "empty.png": (b"", "cannot identify image file"),
    "jpeg called.png": (encoded(PHOTO, "JPEG"), (3, 24, 32)),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), (3, 24, 32)),
    "turned.jpg": (encoded(PHOTO, "JPEG", exif=TURNED), (3, 32, 24)),
    "turned.png": (encoded(PHOTO, "PNG", exif=TURNED), np.rot90(PIXELS, -1)),
    "animated.png": (encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]), PIXELS),
    "not a number.tif": (encoded(NAN, "TIFF"), (1, 24, 32)),
    "one.png": (encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"), PIXELS[:1, :1]),
    "long.png": (encoded(PHOTO.resize((30_000, 2)), "PNG"), (3, 2, 30_000))}


@pytest.mark.parametrize("name", PICTURES)
def test_strange_pictures_are_read_or_named_with_the_reason(tmp_path, name):
    content, expected = PICTURES[name]
    path = save(tmp_path / "image/good" / name, content)
    data = open_dataset(tmp_path, (8, 8))
    if isinstance(expected, str):
        says(f"{path}: cannot be read as an image .*{expected}.*; replace or remove it", data.tensors)
    else:
        pixels = data.read(0)[0]
        assert data.tensors()[0].shape[2:] == (8, 8)
        assert pixels.shape == expected if isinstance(expected, tuple) else np.array_equal(
            pixels.permute(1, 2, 0), expected)


def test_colour_of_16_bits_is_refused(tmp_path):
    path = save(tmp_path / "image/good/deep.png", b"\x89PNG\r\n\x1a\n" + DEEP)
    says(f"{path}: is colour of 16 bits, .* only 8 can be read; save it", open_dataset(tmp_path).tensors)


PALETTE = Image.fromarray(np.full((24, 32), 2, np.uint8), "P")
PALETTE.putpalette([9] * 768)


@pytest.mark.parametrize("layout, mask, expected", [            # what is read, or the words of the error
    ("defect spectrum", Image.fromarray(np.full((24, 32), 2, np.uint16)), 2),
    ("defect spectrum", PALETTE, 2),                                            # the index, not the colour
    ("defect spectrum", np.pad(np.full((8, 8), 255), ((8, 8), (8, 16))), "binary 0/255 mask"),
    ("defect spectrum", PHOTO, "is RGB"),
    ("defect spectrum", np.full((24, 32), 7), r"has the values \[7\] but the classes are 0..2 "
                                              r"\(background, crack, dirt\); add those to classes.json"),
    ("defect spectrum", np.ones((20, 32)), "is 24x32 but its mask is 20x32; they must have the same size"),
    ("mvtec", np.tile([0, 127, 128, 255], (24, 8)), np.tile([0, 0, 2, 2], (24, 8))),
    ("defect spectrum", np.full((24, 32, 3), 2), 2),                            # equal channels
    ("mvtec", np.full((24, 32, 3), 200), 2),
    ("mvtec", np.eye(24, 32), 2 * np.eye(24, 32)),                              # 0/1 in place of 0/255
    ("defect spectrum", np.tile([0, 2, 255, 2], (24, 8)), np.tile([0, 2, 255, 2], (24, 8))),    # 255: ignored
    ("mvtec", PHOTO, "is RGB")])
def test_masks_are_read_as_indices_or_from_128_on_and_wrong_ones_are_named(tmp_path, layout, mask, expected):
    save(build(tmp_path, layout, count=1)["dirt/000"][1], mask)
    data = open_dataset(tmp_path, (16, 16))
    if isinstance(expected, str):
        says(f"(?s)1 of {len(data)} samples.*dirt/000.*{expected}", data.tensors)
    else:
        read = data.read_mask([s.name for s in data.samples].index("dirt/000"))
        assert read.dtype == np.uint8 and np.array_equal(read, np.broadcast_to(expected, (24, 32)))


@pytest.mark.filterwarnings("ignore")                           # Pillow's, on odd metadata
@pytest.mark.parametrize("name", [*(f"image/crack/0.{end}" for end in ("png", "jpeg", "tiff", "webp", "bmp")),
                                  "mask/crack/0_mask.png", "classes.json", "split.json"])
def test_30_damaged_files_give_sentences_or_data_and_nothing_else(tmp_path, name):
    save(tmp_path / (name if "image" in name else "image/crack/0.png"), PIXELS)
    save(tmp_path / "mask/crack/0_mask.png", PIXELS[..., 0] % 3)
    write_classes(tmp_path, CLASSES)
    write_json(tmp_path / "split.json", {"train": ["crack/0"], "test": []})
    content, draw, refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    for _ in range(30):
        damaged = bytearray(content[:draw.choice((None, draw.randrange(16, len(content))))])
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            images, masks = open_dataset(tmp_path, (16, 16), "train").tensors()
            assert images.shape[2:] == (16, 16) and masks.max() < 3
        except ValueError as error:
            assert Path(name).name in str(error)
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize("chosen, square, oblong", [([], 1, 1), (["flip"], 4, 4), (["turn"], 4, 2),
                                                    (list(AUGMENTATIONS), 8, 4)])
def test_augmentation_moves_image_and_mask_alike_and_reaches_every_pose(chosen, square, oblong):
    for size, poses in ((16, 16), square), ((8, 24), oblong):
        mask = torch.zeros(size, dtype=torch.uint8)
        mask[1:size[0] // 2, 2:size[1] // 3] = 1
        image, seen = torch.stack([mask * 255, mask * 7]), []
        for seed in range(200):
            changed, moved = augment(image, mask, chosen, rng(seed))
            assert changed.dtype == moved.dtype == torch.uint8 and moved.shape == mask.shape
            assert torch.equal(changed, torch.stack([moved * 255, moved * 7]))
            assert torch.equal(augment(image, mask, chosen, rng(seed))[1], moved)
            seen.append(moved.numpy().tobytes())
        assert len(set(seen)) == poses and min(map(seen.count, seen)) > 100 / poses     # about equally often


def test_a_written_pair_is_read_back(tmp_path):
    image = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8)
    mask = torch.randint(0, 3, (8, 12), dtype=torch.uint8)
    write_pair(tmp_path, "000017", image, mask, "generated")
    write_classes(tmp_path, CLASSES)
    data = open_dataset(tmp_path)
    assert data.samples[0].name == "generated/000017" and data.classes == CLASSES
    assert torch.equal(data[0][0], image) and torch.equal(data[0][1], mask)
    _, mask_path, colours = pair_paths(tmp_path, "000017", "generated")
    assert Image.open(mask_path).mode == "L"                                    # a palette misleads OpenCV
    assert np.array_equal(picture(colours), colorize(mask).transpose(1, 2, 0))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4   # nothing temporary


@pytest.mark.parametrize("write", [
    lambda path: write_image(path, PIXELS.transpose(2, 0, 1)),
    lambda path: write_json(path, [0.5, float("nan"), *range(9000)]),
    lambda path: write_atomically(path, lambda p: torch.save(torch.rand(9000), p))])
def test_a_full_disk_keeps_the_old_file_and_is_a_sentence(tmp_path, write):
    path, limits = tmp_path / "a", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        says(f"{path}: cannot be written .*; what was there before is unchanged", write, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"
    write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.stat().st_size > 2000
    assert path.read_bytes()[:1] != b"[" or json.loads(path.read_text())[:3] == [0.5, None, 0]   # NaN is null


def test_overlay_changes_defects_only_and_only_background_is_black():
    image, mask = np.full((1, 4, 4), 100, np.uint8), np.zeros((4, 4), np.uint8)
    mask[1, 2] = 1
    laid = overlay(image, mask)
    assert laid.shape == (3, 4, 4) and np.array_equal((laid != 100).any(0), mask > 0)
    assert sheet([("row", [image, laid])], ("a", "b"), CLASSES).width > 200
    colours = colorize(np.arange(40, dtype=np.uint8)[None])
    assert not colours[:, 0, 0].any() and colours[:, 0, 1:].any(0).all()


def test_the_command_audits_every_object_names_what_is_wrong_and_goes_on(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        make_data(tmp_path / name, count=4)
    save(tmp_path / "a/mask/crack/000_mask.png", np.full((24, 32), 7))
    save(tmp_path / "a/mask/crack/001_mask.png", np.zeros((24, 32)))
    save(tmp_path / "a/image/dirt/003.png", b"x")
    save(tmp_path / "a/mask/crack/99_mask.png", np.ones((24, 32)))
    command = ["datasets.py", "--data", str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command)
    assert datasets.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.glob("*.png"))                     # pictures are written where told
    problems = [line for line in lines if line.startswith("  problem: ")]
    for words in "000_mask.png: mask has the values [7]", "003.png: cannot be read", "99_mask.png (no image)":
        assert [words in problem for problem in problems].count(True) == 1
    assert sum(line.endswith("crack/001_mask.png: the mask is empty") for line in lines) == 1
    assert lines[-2].split() == ["a", "12", "5", "0", "3"] and lines[-1].split() == ["b", "12", "8", "0", "0"]
    command += ["--sheet", str(tmp_path / "sheet.png")]
    assert datasets.main() == 1
    assert picture(tmp_path / "sheet_a.png").shape[1] == picture(tmp_path / "sheet_b.png").shape[1] > 4 * 200
    command += ["--object", "b"]
    assert datasets.main() == 0 and (tmp_path / "sheet.png").exists()


# --- the audit: what looks wrong is asked about ---

def square(value, top=40, left=50, side=20, size=(96, 128)):
    mask = np.zeros(size, np.uint8)
    mask[top:top + side, left:left + side] = value
    return mask


def enlarged(how, value=5):
    return Image.fromarray(square(value)).resize((32, 24), Image.NEAREST).resize((128, 96), how)


@pytest.mark.parametrize("mask, words", [
    (enlarged(Image.BILINEAR, 2), "edges pass through the classes in between"),
    (enlarged(Image.BILINEAR), "edges pass through the classes in between"), (enlarged(Image.NEAREST), None),
    (Image.open(io.BytesIO(encoded(Image.fromarray(square(5)), "JPEG"))), "edges pass through"),
    (1 - square(1), "nearly all of the mask is defect; is it inverted?"), (square(5, 0, 0, 84), None),
    (square(1) | square(2, 10, 70) | square(255, 0, 0), "255 beside class indices is not to be scored")])
def test_the_audit_asks_once_about_masks_that_look_wrong_with_count_and_three_examples(tmp_path, mask, words):
    for n in range(5):
        save(tmp_path / f"images/{n}.png", PHOTO.resize((128, 96)))
        save(tmp_path / f"masks/{n}.png", mask)
    write_classes(tmp_path, ["background", *"abcdefghi"])
    warnings = [line for line in audit(open_dataset(tmp_path))["warnings"] if "no pixel" not in line]
    assert len(warnings) == (words is not None)
    assert all(line.startswith("5 files, 0, 1, 2 and 2 more; of the first: ") and words in line
               for line in warnings)


def test_ignored_pixels_are_no_class_no_defect_and_grey(tmp_path):
    for n, value in enumerate((1, 2, 0)):
        save(tmp_path / f"images/{n}.png", PHOTO.resize((128, 96)))
        save(tmp_path / f"masks/{n}.png", square(value) | square(255 if value else 0, 0, 0))
    data = open_dataset(tmp_path, (48, 64))
    assert data.classes == ("background", "class_1", "class_2") and data.defective() == [0, 1]
    image, mask = data[0]
    assert [(mask == k).sum().item() for k in (1, 255)] == [100, 100]           # carried through resizing
    assert (colorize(mask)[:, mask == 255] == 128).all()
    assert audit(data)["classes"] == {"background": [96 * 128 - 800] * 2 + [96 * 128], "class_1": [400],
                                      "class_2": [400]}


def test_photos_of_12_bits_are_read_at_one_depth_for_the_whole_set_which_is_said(tmp_path):
    for n, value in enumerate((200, 4000)):                     # alone the first would be taken for 8 bits
        save(tmp_path / f"image/good/{n}.png", Image.fromarray(np.full((8, 8), value, np.uint16)))
    data = open_dataset(tmp_path)
    assert [data[i][0].max().item() for i in (0, 1)] == [round(200 / 4095 * 255), round(4000 / 4095 * 255)]
    assert "warning: white is 4095 here, by the brightest photos" in datasets.describe(data)
    hot = np.full((100, 120), 200, np.uint16)
    hot[5, 5] = 65535                                           # a broken pixel of the camera
    save(tmp_path / "image/good/2.png", Image.fromarray(hot))
    assert open_dataset(tmp_path).white == 4095
    save(tmp_path / "image/good/0.png", PHOTO)
    says("1.png: is 16-bit grey among photos in colour", open_dataset(tmp_path).tensors)
    save(tmp_path / "floats/image/good/0.tif", Image.fromarray(np.full((8, 8), 0.2, np.float32)))
    assert open_dataset(tmp_path / "floats")[0][0].unique().tolist() == [51]


def test_what_a_size_and_a_split_lose_is_counted_with_the_size_that_keeps_it(tmp_path):
    for n, side in enumerate((2, 3, 40)):
        save(tmp_path / f"image/{'ab'[n > 1]}/{n}.png", PHOTO.resize((128, 96)))
        save(tmp_path / f"mask/{'ab'[n > 1]}/{n}_mask.png", square(1 + n // 2, 41, 51, side))
    write_classes(tmp_path, CLASSES)
    write_json(tmp_path / "split.json", {"train": ["a/0", "a/1"], "test": ["b/2"]})
    assert datasets.gaps(open_dataset(tmp_path)) == []
    *lost, small = datasets.gaps(open_dataset(tmp_path, (12, 16), "train"))
    assert lost == ["no photo of the kinds b in split train",
                    "no pixel of the classes crack, dirt in split train"]
    words = "2 of 2 masks lose a defect at 12x16: a/0, a/1; --size (.*) (.*) keeps all"
    height, width = map(int, re.fullmatch(words, small).groups())
    assert all(open_dataset(tmp_path, (height, width), "train")[i][1].any() for i in (0, 1)) and height < 96
    save(tmp_path / "mask/b/2_mask.png", np.zeros((96, 128)))                       # nothing at all
    assert datasets.gaps(open_dataset(tmp_path, split="test")) == [
        "no photo of the kinds a in split test", "no pixel of the classes crack, dirt in split test"]


def test_indices_that_jpeg_has_changed_are_named_as_such(tmp_path):
    save(tmp_path / "images/0.png", PIXELS)
    save(tmp_path / "masks/0.jpg", np.eye(24, 32) * 60)
    write_classes(tmp_path, CLASSES)
    says("0.jpg: JPEG changes class indices; export masks anew as PNG", open_dataset(tmp_path).read_mask, 0)


def test_folders_are_read_however_deep_and_a_photo_of_both_splits_is_refused(tmp_path):
    for name in ("a/0", "a/b/c/1", "a/b/c/d/2"):
        save(tmp_path / f"images/{name}.png", PIXELS)
        save(tmp_path / f"masks/{name}.png", np.eye(24, 32))
    (tmp_path / "images/a/up").symlink_to("..")                     # leads in circles
    assert names(tmp_path) == ["a/0", "a/b/c/1", "a/b/c/d/2"]
    write_json(tmp_path / "split.json", {"train": ["a/0"], "few": ["a/0"], "test": ["a/b/c/1", "a/0.png"]})
    says("split.json: both train and test have a/0; take them out of one", open_dataset, tmp_path)


def test_good_photos_of_a_line_of_their_own_are_good(tmp_path):
    for name in ("line1/crack/0", "line1/good/0", "good/0"):
        save(tmp_path / f"images/{name}.png", PIXELS)
    save(tmp_path / "masks/line1/crack/0.png", np.eye(24, 32))
    data = open_dataset(tmp_path)
    assert [data.samples[i].name for i in data.defective()] == ["line1/crack/0"]


@pytest.mark.parametrize("folders, splits", [
    (("train", "val"), {"train": 3, "val": 3, "test": 3}),
    (("train", "testing"), {"train": 3, "test": 3}),
    (("Training/crack", "test/good"), {"train": 3, "test": 3}),
    (("training_set", "dev"), {"train": 3, "val": 3, "test": 3}),
    (("train_1", "test1"), {"train": 3, "test": 3}),
    (("trainval", "holdout-set"), {"train": 3, "test": 3}),
    (("train2017", "Test Set"), {"train": 3, "test": 3}),
    (("train_images", "val_images"), {"train": 3, "val": 3, "test": 3}),
    (("train", "crack"), None), (("val", "crack"), None)])      # a split, or a kind?
def test_folders_called_train_val_test_are_splits_unless_split_json_says_otherwise(tmp_path, folders, splits):
    for folder, n in ((folder, n) for folder in folders for n in range(3)):
        save(tmp_path / f"images/{folder}/{n}.png", PIXELS)
        save(tmp_path / f"masks/{folder}/{n}.png", np.eye(24, 32))
    if splits is None:
        words = r"images: crack lie beside the folder of a split \((train|val)\); move .*split.json"
        says(words, open_dataset, tmp_path)
    else:
        data = open_dataset(tmp_path)
        assert {name: len(part) for name, part in data.splits.items()} == splits
        assert data.kinds == {folder.partition("/")[2] for folder in folders}
        assert len(open_dataset(tmp_path, split="train")) == 3
    write_json(tmp_path / "split.json", {"train": [f"{folders[0]}/0"]})
    assert names(tmp_path, split="train") == [f"{folders[0]}/0"]


def test_folders_of_splits_inside_kinds_do_not_train(tmp_path):
    for folder in ("crack/train", "crack/test"):
        save(tmp_path / f"images/{folder}/0.png", PIXELS)
        save(tmp_path / f"masks/{folder}/0.png", np.eye(24, 32))
    says("folders of splits inside kinds: crack/test, crack/train. .*convert.py", open_dataset, tmp_path)


def test_folders_of_splits_with_images_and_masks_in_each_are_converted(tmp_path):
    for folder in ("train/images", "train/masks", "Val/images", "Val/masks"):
        save(tmp_path / f"bolt/{folder}/0.png", np.eye(24, 32))
    says("holds Val, train: splits of one object. .*convert.py .*bolt --out", open_dataset, tmp_path / "bolt")


def test_json_of_windows_and_system_files_are_read_past(tmp_path):
    root = make_data(tmp_path / "bolt", count=2)
    shutil.copytree(root, tmp_path / "__MACOSX/bolt")
    for name in "Thumbs.db", "desktop.ini", ".DS_Store":
        (root / "image/crack" / name).write_text("x")
    (root / "split.json").write_bytes('\ufeff{"train":\r\n["crack\\\\000.PNG", "dirt/001"]}'.encode())
    (root / "classes.json").write_bytes('\ufeff["background",\r\n"tear", "stain"]'.encode())
    data = open_dataset(tmp_path, split="train")
    assert [sample.name for sample in data.samples] == ["crack/000", "dirt/001"]
    assert data.classes == ("background", "tear", "stain")


def test_the_contact_sheet_shows_each_class_whole_and_zoomed_to_its_defect(tmp_path):
    for n, value in enumerate((1, 1, 2)):
        save(tmp_path / f"images/{n}.png", np.full((300, 400), 90))
        save(tmp_path / f"masks/{n}.png", square(value, 250, 350, 12, (300, 400)))
    sheet = np.array(datasets.contact_sheet(open_dataset(tmp_path), tile=200))
    reds, greens = ((sheet[20:-24] == overlay([[[90]]], [[k]]).ravel()).all(-1) for k in (1, 2))
    assert 1000 < reds[:, -204:].sum() > 20 * reds[:, :-204].sum() > 0          # of 200x200; in the whole 36
    assert greens.sum() == reds.sum() and greens[:204].sum() == reds[204:].sum() == 0
