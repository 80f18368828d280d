"""Painted defects: where, of what class, in which photo; nothing else of the photo changes."""
import csv
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from datasets import open_dataset, write_image
from diffusion import rng
from inspect_rules import read_json


def paint(run, *flags):
    sample.paint_pairs(sample.parse_args(["--run", str(run), "--count", "4", *map(str, flags)]))
    out = Path(flags[flags.index("--out") + 1]) if "--out" in flags else run / "painted"
    return read_json(out / "source.json"), open_dataset(out)


@pytest.fixture
def painter(trained, tmp_path, monkeypatch):
    """A copy of the run; four steps of training paint with seams, which here may be."""
    monkeypatch.setattr(sample, "MAX_SEAM", math.inf)
    monkeypatch.setattr(sample.DefectGen.paint, "__defaults__", (2,))
    return shutil.copytree(trained, tmp_path / "run")


def test_painted_pairs_differ_from_the_photo_in_the_region_alone_and_say_what_they_are(painter, data, capsys):
    records, pairs = paint(painter, "--photos", data)
    photos = open_dataset(data)
    place = {photo.name: i for i, photo in enumerate(photos.samples)}
    for i, (name, record) in enumerate(records.items()):
        (image, mask), (photo, none) = pairs[i], photos[place[record["photo"]]]
        assert record["photo"].startswith("good/") and not none.any()
        top, left, height, width = record["box"]
        inside = torch.zeros_like(mask)
        inside[top:top + height, left:left + width] = 1
        assert mask.any() and torch.equal(mask, mask * inside)
        changed = (image != photo).any(0).nonzero()
        assert changed.amin(0).tolist() >= [0, 0] and 0 < len(changed) < mask.numel()
        assert set(mask.unique().tolist()) == {0, 1 + i % 2}        # classes take turns
    assert list(csv.reader(open(painter / "painted/scores.csv")))[0] == ["pair", *sample.SCORES]
    assert "4 of 4 pairs painted" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in (painter / "painted/image").rglob("*.png")}
    assert paint(painter, "--photos", data)[0] == records           # nothing is painted again
    assert before == {path: path.stat().st_mtime_ns for path in (painter / "painted/image").rglob("*.png")}


def test_masks_by_hand_lie_where_they_were_drawn_and_large_photos_keep_their_own_pixels(painter, tmp_path):
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    random = np.random.default_rng(0)
    large = random.integers(90, 160, (3, 150, 200), np.uint8)       # the run draws 16x16
    write_image(photos / "a.png", large)
    mask = np.zeros((150, 200), np.uint8)
    mask[60:80, 50:90] = 2
    write_image(masks / "a_mask.png", mask[None])
    records, pairs = paint(painter, "--photos", photos, "--masks", masks, "--count", 1)
    image, drawn = pairs[0]
    assert records["000000"]["photo"] == "a" and set(drawn.unique().tolist()) == {0, 2}
    overlap = ((drawn == 2) & torch.from_numpy(mask == 2)).sum() / (drawn == 2).sum()
    assert overlap > 0.6                                            # a pixel of 16x16 is 9x12 here
    changed = (image != torch.from_numpy(large)).any(0)
    assert changed[60:80, 50:90].any() and not changed[:40].any() and not changed[:, 120:].any()


def test_a_wished_class_and_place(painter, data, tmp_path):
    where = np.zeros((24, 32), np.uint8)
    where[:, 16:] = 255
    write_image(tmp_path / "where.png", where[None])
    _, pairs = paint(painter, "--photos", data, "--defect", "dirt", "--where", tmp_path / "where.png")
    masks = torch.stack([pairs[i][1] for i in range(4)])
    assert set(masks.unique().tolist()) == {0, 2} and not masks[:, :, :16].any()


def test_defects_that_a_photo_has_stay_labelled(painter, data, tmp_path):
    folder = tmp_path / "cracks"
    shutil.copytree(data / "image/crack", folder / "image/crack")
    shutil.copytree(data / "mask/crack", folder / "mask/crack")
    shutil.copy(data / "classes.json", folder)
    records, pairs = paint(painter, "--photos", folder, "--defect", "dirt")
    photos = open_dataset(folder)
    place = {photo.name: i for i, photo in enumerate(photos.samples)}
    for i, record in enumerate(records.values()):
        old = photos[place[record["photo"]]][1]
        assert torch.equal(pairs[i][1] == 1, old == 1) and (pairs[i][1] == 2).any()


def test_without_photos_whole_pictures_are_drawn_for_the_masks(painter, data):
    records, pairs = paint(painter, "--masks", "training", "--defect", "dirt")
    assert [record["tries"] for record in records.values()] == [1] * 4
    images, masks = zip(*(pairs[i] for i in range(4)))
    assert all(set(mask.unique().tolist()) == {0, 2} for mask in masks)
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_grey_photos_are_read_as_colour_and_colour_is_refused_by_a_grey_run(tmp_path):
    write_image(tmp_path / "grey/a.png", np.full((3, 20, 20), 90, np.uint8))
    write_image(tmp_path / "red/a.png", np.full((3, 20, 20), [[[90]], [[0]], [[0]]], np.uint8))

    def opened(name, channels):
        generator = SimpleNamespace(config={"channels": channels, "white": None}, classes=("background", "a"))
        return sample.open_photos(SimpleNamespace(photos=str(tmp_path / name), run="RUN"), generator)
    assert opened("grey", 3)[0][0].shape == (3, 20, 20) and opened("grey", 1)[0][0].shape == (1, 20, 20)
    with pytest.raises(ValueError, match="red: are in colour, but RUN was trained on grey ones;"):
        opened("red", 1)


@pytest.mark.parametrize("flags, message", [
    (["--photos", "empty"], "no photos in this folder"),
    (["--photos", "drawn:pill"], "has the classes .*, but .* was trained with background, crack, dirt"),
    (["--defect", "scratch"], "--defect scratch: .* draws crack, dirt"),
    (["--masks", "empty"], "expected training, generated or a folder"),
    (["--masks", "wide"], "mask.png is 7x9; expected 24x32, as the photo good/000, or 16x16"),
    (["--where", "black.png"], "no defect painted in 5 tries for each of 4; .*'no room': 20")])
def test_what_does_not_fit_is_a_sentence(painter, data, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_image("wide/000_mask.png", np.ones((1, 7, 9), np.uint8))
    write_image("black.png", np.zeros((1, 24, 32), np.uint8))
    with pytest.raises(ValueError, match=message):
        paint(painter, *([] if "--photos" in flags else ["--photos", data]), *flags)


def test_a_judge_scores_the_fit_and_what_fits_badly_is_painted_again(painter, data, tmp_path, monkeypatch):
    shown = iter([0.1, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9])
    saved = {"classes": open_dataset(data).classes}
    monkeypatch.setattr(sample, "load_segmenter", lambda path, device: (lambda images: images[:, 0], saved))
    monkeypatch.setattr(sample, "mask_fit", lambda seen, masks: torch.tensor([next(shown)]))
    records, _ = paint(painter, "--photos", data, "--judge", "segment.pt", "--min-fit", 0.5)
    assert {int(name): record["tries"] for name, record in records.items()} == {0: 2, 1: 1, 3: 1}
    assert all(record["fit"] == pytest.approx(0.9) for record in records.values())


def test_a_moved_defect_keeps_its_middle_on_the_centres_and_all_of_it_in_the_room():
    shape, centres, room = (torch.zeros(40, 50, dtype=torch.bool) for _ in range(3))
    image, any_size = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.tensor([1, 2000])
    shape[3:9, 4:14], centres[20, 10:40], room[10:30] = True, True, True
    areas = []
    for seed in range(40):
        mask = sample.moved(shape, image, None, centres, room, seed % 2 == 0, any_size, rng(seed))
        assert room[mask].all() and abs(mask.nonzero().double().mean(0)[0] - 20) <= 1
        areas.append(mask.sum().item() / shape.sum().item())
    assert 0.35 < min(areas) < 0.75 < 1.35 < max(areas) < 2.5        # half to double the area
    assert sample.moved(shape, image, image, centres, torch.zeros_like(room), True, any_size, rng(0)) is None


def test_a_defect_is_laid_where_the_photo_looks_as_its_surroundings_do():
    everywhere = torch.ones(48, 64, dtype=torch.bool)
    image, photo = torch.zeros(1, 48, 64), torch.zeros(1, 48, 64)
    image[:, :, 20:28], photo[:, :, 40:48] = 200, 200               # a track; the defect breaks it
    shape = torch.zeros(48, 64, dtype=torch.bool)
    shape[10:16, 20:28] = True
    for seed in range(8):
        down, right = sample.lay(shape, image, photo, everywhere, everywhere, rng(seed))
        assert abs(right - 20) <= 4                                 # the nearest of 50 places
        mask = sample.moved(shape, image, photo, everywhere, everywhere, False, shape.sum()[None], rng(seed))
        assert abs(mask.nonzero().double().mean(0)[1] - 43.5) <= 4 and abs(mask.sum() - shape.sum()) <= 12
    rights = {sample.lay(shape, image, None, everywhere, everywhere, rng(seed))[1] for seed in range(8)}
    assert max(rights) - min(rights) > 20                           # without a photo: anywhere


def test_a_seam_is_1_where_nothing_changed_and_more_where_the_border_shows():
    photo = torch.randint(90, 110, (1, 20, 20), generator=rng(0)).byte()
    region = torch.zeros(20, 20, dtype=torch.bool)
    region[5:15, 5:15] = True
    assert sample.seam(photo, photo, region) == 1
    assert sample.seam(torch.where(region, photo + 60, photo), photo, region) > 5


def test_a_change_is_added_to_the_large_photo_inside_the_region_alone():
    photo = torch.randint(60, 120, (3, 80, 120), generator=rng(0)).byte()
    before, region = torch.full((3, 8, 12), 90, dtype=torch.uint8), torch.zeros(8, 12, dtype=torch.bool)
    region[2:4, 5:7] = True
    after = torch.where(region, before + 50, before)
    assert torch.equal(sample.put_back(photo, before, before, region), photo)
    painted = sample.put_back(photo, before, after, region)
    inside = torch.zeros(80, 120, dtype=torch.bool)
    inside[20:40, 50:70] = True
    assert torch.equal(painted[:, ~inside], photo[:, ~inside])
    assert (painted[:, 28:32, 58:62] - photo[:, 28:32, 58:62] == 50).all()     # its grain is there
