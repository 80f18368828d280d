"""Pairs are written as a data set, once each, named by their seed."""
import shutil
import subprocess
import sys

import pytest
import torch

import sample
from conftest import ROOT, picture
from datasets import open_dataset, read_json
from defect_gen import checkpoints


def go(*flags):
    sample.draw_pairs(sample.parse_args([*map(str, flags)]))


def test_a_data_set_comes_out_and_is_read_back(trained, tmp_path, capsys):
    go("--run", trained, "--seeds", "0-4,17", "--num-steps", 3, "--out", tmp_path)
    data = open_dataset(tmp_path)
    assert [s.name for s in data.samples] == [f"generated/{n:06d}" for n in (0, 1, 2, 3, 4, 17)]
    assert data.classes == ("background", "crack", "dirt") and data[0][0].shape == (3, 16, 16)
    assert picture(tmp_path / "sheet.png").std() > 0
    assert "6 pairs in" in capsys.readouterr().out


def test_what_is_there_is_skipped_and_what_is_missing_is_drawn_the_same(trained, tmp_path, capsys):
    go("--run", trained, "--count", 3, "--num-steps", 3, "--out", tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("generated/*")}
    (tmp_path / "mask/generated/000001_mask.png").unlink()
    go("--run", trained, "--count", 3, "--num-steps", 3, "--out", tmp_path)
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("generated/*")}
    assert {p: b for p, (b, _) in before.items()} == {p: b for p, (b, _) in after.items()}
    assert {p.name for p in before if before[p][1] == after[p][1]} == {n for p in before for n in [p.name] if "000001" not in n}
    assert "2 of 3 pairs are there already" in capsys.readouterr().out


def test_other_settings_do_not_mix_into_one_folder(trained, tmp_path):
    go("--run", trained, "--count", 1, "--num-steps", 3, "--out", tmp_path)
    with pytest.raises(ValueError, match="drawn with other settings"):
        go("--run", trained, "--count", 1, "--num-steps", 4, "--out", tmp_path)


def test_a_refused_command_leaves_the_folder_usable_and_a_run_may_be_moved(trained, tmp_path):
    with pytest.raises(ValueError, match="2000"):
        go("--run", trained, "--count", 1, "--num-steps", 2000, "--out", tmp_path / "out")
    go("--run", trained, "--count", 1, "--num-steps", 3, "--out", tmp_path / "out")
    moved = shutil.copytree(trained, tmp_path / "moved")
    go("--run", moved, "--count", 2, "--num-steps", 3, "--out", tmp_path / "out")
    path = checkpoints(moved / "small")[-1]
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["ema"].values())).add_(1)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="other settings or weights"):
        go("--run", moved, "--count", 3, "--num-steps", 3, "--out", tmp_path / "out")


@pytest.mark.parametrize("text, seeds", [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5,2-3", [1, 5, 2, 3]), ("2,1-3", [2, 1, 3])])
def test_seeds_are_ranges_and_numbers(text, seeds):
    assert sample.parse_seeds(text) == seeds


@pytest.mark.parametrize("flags, message", [
    (["--seeds", "3-1"], "--seeds 3-1"), (["--seeds", "a"], "--seeds a"), (["--count", "0"], "at least 1"), (["--num-steps", "0"], "at least 1"),
    (["--num-steps", "1001"], "1001"), (["--size", "18", "18"], "18x18"), (["--run", "nowhere"], "no such folder"), (["--device", "nothing"], "--device nothing")])
def test_bad_flags_are_one_sentence(trained, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("--run", trained, "--out", tmp_path / "out", "--count", 1, "--num-steps", 2, *flags)


def test_a_run_with_one_stage_draws_nothing(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(copy / "large")
    with pytest.raises(FileNotFoundError, match="no checkpoint of the large stage"):
        go("--run", copy)
    assert not (copy / "samples").exists()


def test_another_size_than_trained(trained, tmp_path):
    go("--run", trained, "--count", 2, "--num-steps", 2, "--size", 16, 32, "--out", tmp_path)
    assert torch.stack([open_dataset(tmp_path)[i][1] for i in range(2)]).shape == (2, 16, 32)


def test_processes_share_the_seeds_and_write_the_files_of_one(trained, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    go("--run", trained, "--count", 5, "--num-steps", 3, "--out", alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", ROOT / "sample.py", "--run", trained, "--count", "5",
               "--num-steps", "3", "--device", "cpu", "--out", shared]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    files = {p.relative_to(alone): p.read_bytes() for p in alone.rglob("*") if p.is_file()}
    assert files == {p.relative_to(shared): p.read_bytes() for p in shared.rglob("*") if p.is_file()} and len(files) == 5 * 3 + 3
    assert len({data for path, data in files.items() if path.parts[0] == "image"}) == 5        # or any seed would do
    assert result.stdout.count("5 pairs in") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_missing_is_shared_evenly_wherever_the_gaps_are(trained, tmp_path, monkeypatch, rank):
    go("--run", trained, "--seeds", "0,2,4,6", "--num-steps", 2, "--out", tmp_path)      # all that the first of two processes would draw
    asked, waits = [], []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sample.dist, "init_process_group", lambda backend, timeout: waits.append(timeout.days))
    monkeypatch.setattr(sample.dist, "barrier", lambda: None)
    monkeypatch.setattr(sample.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(sample, "draw_missing", lambda generator, seeds, *rest, **options: asked.extend(seeds))
    monkeypatch.setattr(sample, "finish", lambda *arguments: None)
    go("--run", trained, "--count", 8, "--num-steps", 2, "--out", tmp_path)
    assert asked == [[1, 5], [3, 7]][rank] and waits == [30]


def test_a_full_memory_halves_the_batch_and_loses_nothing(trained, tmp_path, monkeypatch, capsys):
    asked, draw = [], sample.DefectGen.sample

    def small_device(self, seeds, *args):
        asked.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("full")
        return draw(self, seeds, *args)

    monkeypatch.setattr(sample.DefectGen, "sample", small_device)
    go("--run", trained, "--count", 5, "--batch-size", 8, "--num-steps", 3, "--out", tmp_path)
    assert asked == [5, 4, 2, 2, 1] and len(open_dataset(tmp_path)) == 5
    assert "going on with 2 pairs at a time" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_ends_the_command(trained, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(sample, "write_pair", full)
    with pytest.raises(OSError, match="No space left"):
        go("--run", trained, "--count", 3, "--num-steps", 3, "--out", tmp_path)


# --- only some pairs ---

def halves(self, seeds, *args):
    """In place of a generator: even seeds are empty, odd ones have a square of class 1 with as many pixels as the seed; 5 and 9 copy a training image."""
    masks, images = torch.zeros(len(seeds), 16, 16, dtype=torch.uint8), torch.zeros(len(seeds), 3, 16, 16, dtype=torch.uint8)
    train = sample.open_training("", self.config, (16, 16))
    for i, seed in enumerate(seeds):
        images[i] = train[0][0] if seed in (5, 9) else torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(seed))
        masks[i].view(-1)[:seed % 2 * seed] = 1 + (seed == 7)
    return images, masks


def kept(folder):
    return [int(s.name[-6:]) for s in open_dataset(folder).samples]


@pytest.mark.parametrize("flags, seeds, dropped", [
    (["--no-empty"], [1, 3, 5], {0: "empty", 2: "empty", 4: "empty"}),
    (["--kind", "crack", "--min-area-px", 4, "--max-area-px", 9], [5, 9],
     {**{n: "without crack" for n in (0, 2, 4, 6, 7, 8, 10, 12, 14)}, **{n: "below 4 px" for n in (1, 3)}, **{n: "above 9 px" for n in (11, 13)}}),
    (["--kind", "dirt"], [7], {n: "without dirt" for n in range(15) if n != 7}),
    (["--no-empty", "--min-novelty", 0.5], [1, 3, 7], {**{n: "empty" for n in (0, 2, 4, 6)}, 5: "copies"})])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_wishes_keep_the_first_pairs_that_fulfil_them(trained, tmp_path, monkeypatch, flags, seeds, dropped, batch_size):
    monkeypatch.setattr(sample.DefectGen, "sample", halves)
    command = ["--run", trained, "--count", 3, "--max-draws", 15, "--batch-size", batch_size, "--out", tmp_path, *flags]
    if len(seeds) < 3:
        with pytest.raises(ValueError, match=f"only {len(seeds)} of --count 3 pairs after 15 draws, which are kept"):
            go(*command)
    else:
        go(*command)
    found = {int(seed): reason for seed, reason in read_json(tmp_path / "dropped.json").items()}
    assert kept(tmp_path) == seeds and {n: found[n] for n in dropped} == dropped
    assert all(n > seeds[-1] for n in set(found) - set(dropped))                   # drawn with the last batch


def test_what_was_decided_is_not_drawn_again(trained, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sample.DefectGen, "sample", lambda self, seeds, *args: asked.extend(seeds) or halves(self, seeds))
    command = ["--run", trained, "--no-empty", "--batch-size", 2, "--out", tmp_path, "--count"]
    go(*command, 2)
    go(*command, 2)
    assert asked == [0, 1, 2, 3] and "2 of 4 pairs wanted (50 %), dropped: 2 empty" in capsys.readouterr().out
    go(*command, 3)
    assert asked == [0, 1, 2, 3, 4, 5] and kept(tmp_path) == [1, 3, 5]
    with pytest.raises(ValueError, match="drawn with other settings"):
        go(*command[:2], "--batch-size", 2, "--out", tmp_path, "--count", 3)


def test_a_mask_that_does_not_fit_its_image_is_dropped(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.DefectGen, "sample", halves)
    monkeypatch.setattr(sample, "fit", lambda net, images, masks, steps, **options: trainings.append((len(images), steps)))
    monkeypatch.setattr(sample, "predict", lambda net, images: (torch.arange(256).view(1, 16, 16) < 5).long().expand(len(images), -1, -1))
    trainings = []
    go("--run", trained, "--seeds", "1-9", "--min-fit", 0.6, "--out", tmp_path)
    assert trainings == [(15, sample.FIT_STEPS)] and kept(tmp_path) == [3, 5, 7]      # 5 pixels seen: IoU 3/5, 1, 5/7
    assert set(read_json(tmp_path / "dropped.json").values()) == {"whose mask does not fit"}


@pytest.mark.parametrize("flags, message", [
    (["--kind", "scratch"], "--kind scratch: .* draws crack, dirt"), (["--min-fit", 2], "--min-fit is 2"), (["--min-novelty", -1], "--min-novelty is -1"),
    (["--min-area-px", 9, "--max-area-px", 3], "--min-area-px 9 is more than --max-area-px 3")])
def test_impossible_wishes_are_one_sentence(trained, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        go("--run", trained, "--count", 2, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_wishes_are_for_one_process(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="--no-empty draws until enough pairs are wanted"):
        go("--run", trained, "--no-empty", "--out", tmp_path / "out")


def test_limits_of_0_are_limits_and_the_last_batch_is_decided_no_further_than_needed(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample.DefectGen, "sample", halves)
    go("--run", trained, "--count", 3, "--max-area-px", 0, "--batch-size", 16, "--out", tmp_path)
    assert kept(tmp_path) == [0, 2, 4] and set(read_json(tmp_path / "dropped.json")) == {"1", "3"}
    assert "3 of 5 pairs wanted (60 %), dropped: 2 above 0 px" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max-draws is 0"):
        go("--run", trained, "--no-empty", "--max-draws", 0)
