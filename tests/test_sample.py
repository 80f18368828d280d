"""Pairs are written as a data set, once each, named by the seed that they are a function of."""
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import sample
from commands import program
from conftest import picture
from datasets import open_dataset, pair_paths
from inspect_rules import read_json


def go(*flags):
    sample.draw_pairs(sample.parse_args([*map(str, flags)]))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(folder, wanted):
    """Alike byte for byte, but images may differ by one grey level: batches round otherwise."""
    ours, theirs = files(folder), files(wanted)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name.startswith("image/") or name == "sheet.png":
            assert np.abs(picture(folder / name).astype(int) - picture(wanted / name)).max() <= 1, name
        else:
            assert ours[name] == theirs[name], name


def seeds_in(folder):
    return [int(s.name[-6:]) for s in open_dataset(folder).samples]


def test_a_data_set_comes_out_and_is_read_back(trained, tmp_path, capsys):
    go("--run", trained, "--seeds", "0-4,17", "--num-steps", 3, "--out", tmp_path)
    data = open_dataset(tmp_path)
    assert [s.name for s in data.samples] == [f"generated/{n:06d}" for n in (0, 1, 2, 3, 4, 17)]
    assert data.classes == ("background", "crack", "dirt") and data[0][0].shape == (3, 16, 16)
    assert picture(tmp_path / "sheet.png").std() > 0
    config = read_json(tmp_path / "config.json")
    assert config["steps_trained"] == {"large": 4, "small": 4} and config["num_steps"] == 3
    assert f"6 pairs in {tmp_path}" in capsys.readouterr().out


def test_a_pair_is_a_function_of_its_seed_and_not_of_its_batch(trained, tmp_path):
    flags = ["--run", trained, "--seeds", "0-4", "--sampler", "ddpm", "--num-steps", 3]
    go(*flags, "--out", tmp_path / "together")
    go(*flags, "--out", tmp_path / "alone", "--batch-size", 1)
    assert_same_files(tmp_path / "alone", tmp_path / "together")
    images = {name: content for name, content in files(tmp_path / "alone").items() if "image/" in name}
    assert len(images) == len(set(images.values())) == 5


def test_what_is_there_is_skipped_and_what_is_missing_is_drawn_the_same(trained, tmp_path):
    flags = ["--run", trained, "--count", 3, "--num-steps", 3, "--out", tmp_path]
    go(*flags)
    shutil.copytree(tmp_path, tmp_path / "before")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/generated/*")}
    (tmp_path / "mask/generated/000001_mask.png").unlink()
    go(*flags)
    again = {path.name[:6] for path in times if path.stat().st_mtime_ns != times[path]}
    assert again == {"000001"} and len(times) == 9
    before = shutil.move(tmp_path / "before", tmp_path.with_name("before"))
    assert_same_files(tmp_path, before)


def test_other_settings_or_checkpoints_do_not_mix_into_one_folder(trained, tmp_path):
    go("--run", trained, "--count", 1, "--num-steps", 3, "--out", tmp_path / "out")
    moved = shutil.copytree(trained, tmp_path / "moved")
    go("--run", moved, "--count", 2, "--num-steps", 3, "--batch-size", 1, "--out", tmp_path / "out")
    for flags in (["--num-steps", 4], ["--defect", "crack"], ["--size", 32, 32]):
        with pytest.raises(ValueError, match="out holds pairs of other settings or checkpoints"):
            go("--run", moved, "--count", 1, "--num-steps", 3, "--out", tmp_path / "out", *flags)
    (moved / "small/step_000004.pt").unlink()
    with pytest.raises(ValueError, match="out holds pairs of other settings or checkpoints"):
        go("--run", moved, "--count", 3, "--num-steps", 3, "--out", tmp_path / "out")
    assert len(open_dataset(tmp_path / "out")) == 2


@pytest.mark.parametrize("text, seeds", [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5, 2-3", [1, 5, 2, 3]),
                                         ("2,1-3", [2, 1, 3])])
def test_seeds_are_ranges_and_numbers(text, seeds):
    assert sample.parse_seeds(text) == seeds


@pytest.mark.parametrize("flags, message", [
    (["--seeds", "3-1"], "--seeds 3-1"), (["--seeds", "a"], "--seeds a"), (["--count", "0"], "at least 1"),
    (["--num-steps", "0"], "num_steps is 0"),
    (["--num-steps", "1001"], "1001"), (["--size", "18", "18"], "18x"),
    (["--run", "nowhere"], "no such folder"), (["--device", "nothing"], "--device nothing"),
    (["--switch-t", "0"], "asks the large stage at t = 0, but it knows 350 <= t < 1000: use 350 to 450"),
    (["--defect", "scratch"], "--defect scratch: .* draws crack, dirt")])
def test_bad_flags_are_one_sentence_and_leave_no_folder(trained, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("--run", trained, "--out", tmp_path / "out", "--count", 1, "--num-steps", 2, *flags)
    assert not (tmp_path / "out").exists()


def test_a_run_with_one_stage_draws_nothing(trained, tmp_path):
    shutil.copytree(trained / "small", tmp_path / "run/small")
    with pytest.raises(FileNotFoundError, match="no checkpoint of the large stage; train it with: python"):
        go("--run", tmp_path / "run")
    assert not (tmp_path / "run/samples").exists()


def test_another_size_than_trained(trained, tmp_path):
    go("--run", trained, "--count", 2, "--num-steps", 2, "--size", 16, 32, "--out", tmp_path)
    assert open_dataset(tmp_path, (16, 32)).tensors()[1].shape == (2, 16, 32)


# --- only some pairs ---

def in_place_of_a_generator(self, seeds, *how):
    """Even seeds are empty, odd ones have as many pixels of crack as the seed; those of seed 7 are dirt."""
    masks = torch.zeros(len(seeds), 16, 16, dtype=torch.uint8)
    for mask, seed in zip(masks, seeds):
        mask.view(-1)[:seed % 2 * seed] = 1 + (seed == 7)
    return masks[:, None].expand(-1, 3, -1, -1), masks


@pytest.mark.parametrize("flags, seeds", [
    (["--min-area-px", 1], [1, 3, 5]), (["--max-area-px", 0], [0, 2, 4]), (["--min-area-px", 7], [7, 9, 11]),
    (["--defect", "crack"], [1, 3, 5]), (["--defect", "dirt"], [7]),
    (["--defect", "crack", "--min-area-px", 5, "--max-area-px", 9], [5, 9])])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_first_pairs_that_fit_are_kept(trained, tmp_path, monkeypatch, flags, seeds, batch_size):
    monkeypatch.setattr(sample.DefectGen, "sample", in_place_of_a_generator)
    monkeypatch.setattr(sample, "DRAWS", 5)
    command = ["--run", trained, "--count", 3, "--batch-size", batch_size, "--out", tmp_path, *flags]
    if len(seeds) < 3:
        with pytest.raises(ValueError, match=f"only {len(seeds)} of 15 pairs drawn are as asked for"):
            go(*command)
    else:
        go(*command)
    assert seeds_in(tmp_path) == seeds
    before = files(tmp_path)
    with pytest.raises(ValueError) if len(seeds) < 3 else monkeypatch.context():
        go(*command)
    assert files(tmp_path) == before


def test_of_given_seeds_all_that_fit_are_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.DefectGen, "sample", in_place_of_a_generator)
    go("--run", trained, "--seeds", "0-9", "--defect", "crack", "--out", tmp_path)
    assert seeds_in(tmp_path) == [1, 3, 5, 9]


# --- what breaks ---

def command(run, out, *more):
    return ["sample.py", "--run", run, "--count", 8, "--num-steps", 4, "--batch-size", 2, "--out", out, *more]


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """What a command wrote that nothing happened to, and the seconds it took."""
    out, start = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    status, said = program().run(*command(trained, out))
    assert status == 0, said
    return out, min(5, time.perf_counter() - start)


def assert_whole_pairs(folder):
    """Every image that is there has its mask and colour mask, and all can be read."""
    for path in (folder / "image").rglob("[!.]*.png"):
        parts = [picture(part).shape[:2] for part in pair_paths(folder, path.stem, "generated")]
        assert parts == [(16, 16)] * 3


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sampling_killed_at_random_moments_writes_the_same_files(trained, undisturbed, tmp_path, moments):
    wanted, duration = undisturbed
    draw = random.Random(moments)
    for i in range(moments):
        pid = program().start(*command(trained, tmp_path))
        time.sleep(draw.uniform(0.1, 0.9) * duration)
        os.kill(pid, (signal.SIGKILL, signal.SIGTERM)[i % 2])
        program().wait(pid)
        assert_whole_pairs(tmp_path)
    status, said = program().run(*command(trained, tmp_path))
    assert status == 0, said
    assert_same_files(tmp_path, wanted)


# when a pair's mask is written, but not its image: what stops the third pair there
BREAK = """
import os, signal
def replace(old, new, whole=os.replace):
    if str(new).endswith("generated/000002.png"):
        {}
    whole(old, new)
os.replace = replace
"""


@pytest.mark.parametrize("what, status, reason", [
    ("os.kill(os.getpid(), signal.SIGINT)", 1, "interrupted"),
    ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ("raise OSError(28, 'No space left')", 1, "error: .*000002.png: cannot be written .*No space left")])
def test_a_pair_that_is_cut_off_has_no_image(trained, undisturbed, tmp_path, what, status, reason):
    ended, said = program().run(*command(trained, tmp_path), fault=BREAK.format(what))
    assert ended == status and re.search(reason, said) and "Traceback" not in said, said
    images = sorted(path.name for path in (tmp_path / "image/generated").glob("0*"))
    assert images == ["000000.png", "000001.png"]
    assert_whole_pairs(tmp_path)
    ended, said = program().run(*command(trained, tmp_path))
    assert ended == 0, said
    assert_same_files(tmp_path, undisturbed[0])
