"""Pairs are written as a data set, once each, named by their seed."""
import shutil
import subprocess
import sys

import pytest
import torch

import sample
from conftest import ROOT, picture
from datasets import open_dataset
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
