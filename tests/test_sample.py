"""Pairs are written as a data set, once each, named by the seed that they are a function of."""
import re
import shutil
from contextlib import nullcontext

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
    return [int(s.name.removeprefix("generated/")) for s in open_dataset(folder).samples]


def test_a_data_set_comes_out_of_which_each_pair_is_a_function_of_its_seed(trained, tmp_path, capsys):
    flags = ["--run", trained, "--seeds", "0-3,17", "--sampler", "ddpm", "--num-steps", 3, "--size", 16, 32]
    together, alone = tmp_path / "together", tmp_path / "alone"
    go(*flags, "--out", together)
    said = capsys.readouterr().out
    assert f"5 pairs in {together}" in said
    masks = [open_dataset(together).read_mask(i) > 0 for i in range(5)]
    share = 100 * np.mean([mask.mean() for mask in masks])
    assert f"{share:.2f} % of the pixels are defects\ntrained on: 0 % empty, 10.42 %" in said   # 80 px
    data = open_dataset(together)
    assert data.classes == ("background", "crack", "dirt") and seeds_in(together) == [0, 1, 2, 3, 17]
    assert data[0][0].shape == (3, 16, 32) and len({data[i][0].numpy().tobytes() for i in range(5)}) == 5
    config = read_json(together / "config.json")
    assert config["steps_trained"] == {"large": 4, "small": 4} and config["num_steps"] == 3
    go(*flags, "--out", alone, "--batch-size", 1)
    assert_same_files(alone, together)


def test_what_is_there_is_skipped_and_what_is_missing_is_drawn_the_same(trained, tmp_path):
    out, flags = tmp_path / "out", ["--run", trained, "--count", 3, "--num-steps", 3]
    go(*flags, "--out", out)
    before = shutil.copytree(out, tmp_path / "before")
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/generated/*")}
    (out / "mask/generated/000001_mask.png").unlink()
    go(*flags, "--out", out)
    again = {path.name[:6] for path in times if path.stat().st_mtime_ns != times[path]}
    assert again == {"000001"} and len(times) == 9
    assert_same_files(out, before)


def test_other_settings_or_checkpoints_do_not_mix_into_one_folder(trained, tmp_path):
    moved, out = shutil.copytree(trained, tmp_path / "moved"), tmp_path / "out"
    go("--run", trained, "--count", 1, "--num-steps", 3, "--out", out)
    flags = ["--run", moved, "--count", 2, "--num-steps", 3, "--batch-size", 1, "--out", out]
    go(*flags)
    for other in ["--num-steps", 4], ["--defect", "crack"], ["--size", 32, 32], []:
        if not other:                                           # other checkpoints
            (moved / "small/step_000004.pt").unlink()
        with pytest.raises(ValueError, match="out holds what was made with other settings or checkpoints"):
            go(*flags, *other)
    assert seeds_in(out) == [0, 1]


def test_seeds_are_ranges_and_numbers_each_once():
    assert sample.parse_seeds("2,1-3, 5") == [2, 1, 3, 5]
    with pytest.raises(ValueError, match="--judge is for painting: add --photos or --masks"):
        sample.parse_args(["--judge", "segment.pt"])
    with pytest.raises(ValueError, match="--num-steps is for drawing alone: leave it out"):
        sample.parse_args(["--photos", "good", "--num-steps", "9"])


@pytest.mark.parametrize("flags, message", [
    (["--seeds", "3-1"], "--seeds 3-1"), (["--seeds", "a"], "--seeds a"), (["--count", "0"], "at least 1"),
    (["--num-steps", "0"], "num_steps is 0"), (["--size", "18", "18"], "18x"),
    (["--run", "nowhere"], "no such folder"), (["--device", "gpu"], "--device gpu"),
    (["--switch-t", "0"], "asks the large stage at t = 0, but it knows 350 <= t < 1000: use 350 to 450"),
    (["--defect", "scratch"], "--defect scratch: .* draws crack, dirt")])
def test_bad_flags_are_one_sentence_and_leave_no_folder(trained, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("--run", trained, "--out", tmp_path / "out", "--count", 1, "--num-steps", 2, *flags)
    assert not (tmp_path / "out").exists()


# --- only some pairs ---

@pytest.mark.parametrize("flags, seeds", [
    (["--min-area-px", 1], [1, 3, 5]), (["--max-area-px", 0, "--batch-size", 1], [0, 2, 4]),
    (["--defect", "crack"], [1, 3, 5]), (["--defect", "dirt"], [7]),
    (["--defect", "crack", "--min-area-px", 5, "--max-area-px", 9, "--batch-size", 16], [5, 9]),
    (["--seeds", "0-9", "--defect", "crack"], [1, 3, 5, 9])])
def test_the_first_pairs_that_fit_are_kept_of_given_seeds_all(trained, tmp_path, monkeypatch, flags, seeds):
    def in_place_of_a_generator(self, seeds, *how):
        """Even seeds are empty, odd ones have as many pixels of crack as the seed, but of dirt if it is 7."""
        masks = torch.zeros(len(seeds), 16, 16, dtype=torch.uint8)
        for mask, seed in zip(masks, seeds):
            mask.view(-1)[:seed % 2 * seed] = 1 + (seed == 7)
        return masks[:, None].expand(-1, 3, -1, -1), masks

    monkeypatch.setattr(sample.DefectGen, "sample", in_place_of_a_generator)
    monkeypatch.setattr(sample, "DRAWS", 5)
    command = ["--run", trained, "--count", 3, "--batch-size", 4, "--out", tmp_path, *flags]
    too_few = pytest.raises(ValueError, match=f"only {len(seeds)} of 15 pairs drawn are as asked for")
    for _ in range(2):                                          # the second finds them there
        with too_few if len(seeds) < 3 else nullcontext():
            go(*command)
        assert seeds_in(tmp_path) == seeds


# --- what breaks ---

def command(run, out):
    return ["sample.py", "--run", run, "--count", 6, "--num-steps", 3, "--batch-size", 2, "--out", out]


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """What a command wrote that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    status, said = program().run(*command(trained, out))
    assert status == 0, said
    return out


# what happens when a file is whole under its temporary name; a pair's image comes after its masks
BREAK = """
import os, signal
def replace(old, new, whole=os.replace):
    if str(new).endswith("{file}"):
        {what}
    whole(old, new)
os.replace = replace
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("file, what, status, reason, pairs", [
    ("image/generated/000002.png", "os.kill(os.getpid(), signal.SIGINT)", 1, "interrupted", 2),
    ("image/generated/000002.png", "os.kill(os.getpid(), signal.SIGTERM)", -15, "", 2),
    ("image/generated/000002.png", "raise OSError(28, 'No space left')", 1,
     "error: .*000002.png: cannot be written .*No space left", 2),
    ("mask/generated/000003_mask.png", KILL, -9, "", 3), ("config.json", KILL, -9, "", 0),
    ("sheet.png", KILL, -9, "", 6)])
def test_a_command_that_was_stopped_leaves_whole_pairs_and_goes_on(trained, undisturbed, tmp_path, file, what,
                                                                   status, reason, pairs):
    ended, said = program().run(*command(trained, tmp_path), fault=BREAK.format(file=file, what=what))
    assert ended == status and re.search(reason, said) and "Traceback" not in said, said
    images = sorted(tmp_path.glob("image/generated/0*"))
    assert [path.stem for path in images] == [f"{seed:06d}" for seed in range(pairs)]
    for image in images:
        parts = [picture(part).shape[:2] for part in pair_paths(tmp_path, image.stem, "generated")]
        assert parts == [(16, 16)] * 3                          # image, mask and colour mask
    ended, said = program().run(*command(trained, tmp_path))
    assert ended == 0, said
    assert_same_files(tmp_path, undisturbed)
