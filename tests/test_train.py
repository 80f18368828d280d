"""Training resumes bit for bit, shares a batch without a trace, survives faults and refuses bad flags."""
import csv
import json
import math
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import train
from commands import AT_CALL, program
from conftest import ROOT, TINY, make_data, picture, run
from datasets import open_dataset, write_classes
from defect_gen import STAGES, Joint, checkpoints, load_stage
from diffusion import rng
from inspect_rules import read_json


def go(*flags):
    return train.train(train.parse_args([*map(str, flags)]))


def log_of(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same(out, wanted, atol=0.0):
    """The small stages of two runs: the same weights, averages and optimiser."""
    ours, theirs = (load_stage(folder / "small", "small") for folder in (out, wanted))
    assert ours["step"] == theirs["step"]
    for part in ("model", "ema"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=atol)
    for key, state in ours["optimizer"]["state"].items():
        torch.testing.assert_close(state, theirs["optimizer"]["state"][key], rtol=0, atol=atol)


def assert_same_log(out, wanted, stops=()):
    """The same log but for its speed, with a row more at each of `stops`, which splits a mean loss in two."""
    ours, theirs = log_of(out / "small"), log_of(wanted / "small")
    steps = [int(row["step"]) for row in theirs]
    assert [int(row["step"]) for row in ours] == sorted({*steps, *stops})
    before = last = total = 0
    for row in ours:
        step, loss = int(row["step"]), float(row["loss"])
        total, last = total + loss * (step - last), step
        if step in steps:
            other = theirs[steps.index(step)]
            assert total / (step - before) == pytest.approx(float(other["loss"]), abs=2e-6)
            split = [stop for stop in stops if before < stop < step]
            same = ["lr", "grad_norm"] if split else [name for name in row if name != "images_per_s"]
            assert all(row[name] == other[name] for name in same)
            before, total = step, 0


# --- what is learned ---

@pytest.mark.parametrize("augment", [[], ["--augment", "flip", "turn"]])
def test_9_steps_and_11_more_are_20_bit_for_bit(data, tmp_path, augment):
    flags = ["--stage", "small", "--data", data, *TINY, "--save-every", 4, *augment]
    go(*flags, "--out", tmp_path / "whole", "--steps", 20)
    go(*flags, "--out", tmp_path / "parts", "--steps", 9)
    go(*flags, "--out", tmp_path / "parts", "--steps", 20, "--resume")
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert_same_log(tmp_path / "parts", tmp_path / "whole", stops=[9])


def test_augmentation_is_stored_and_changes_what_is_learned(data, tmp_path, capsys):
    flags, weights = ["--stage", "small", "--data", data, *TINY], []
    for name, extra in {"plain": [], "augmented": ["--augment", "flip"]}.items():
        go(*flags, "--out", tmp_path / name, *extra)
        checkpoint = load_stage(tmp_path / name / "small", "small")
        weights.append(torch.cat([value.flatten() for value in checkpoint["model"].values()]))
    assert not torch.equal(*weights) and checkpoint["config"]["augment"] == ["flip"]
    with pytest.raises(ValueError, match=r"augment was \['flip'\] and is \[\]"):
        go(*flags, "--out", tmp_path / "augmented", "--resume", "--steps", 6)
    with pytest.raises(SystemExit):
        train.parse_args(["--stage", "small", "--augment", "flip", "spin"])
    assert "invalid choice: 'spin'" in capsys.readouterr().err


def test_every_image_comes_up_equally_often_whatever_the_batch():
    stream = train.order(7, 0, 70, seed=3)
    assert set(Counter(stream).values()) == {10} and stream[:7] != stream[7:14]
    assert stream == sum((train.order(7, start, 5, seed=3) for start in range(0, 70, 5)), [])
    assert stream != train.order(7, 0, 70, seed=4)


def batches(data, steps, *flags, share=slice(None)):
    """Of steps 3 to 3 + steps - 1."""
    args = train.parse_args(["--stage", "small", "--batch-size", "6", "--steps", str(3 + steps), *flags])
    return list(train.batches(open_dataset(data, (16, 16)), 3, args, torch.device("cpu"), share))


def test_large_data_come_through_workers_in_the_same_order(data, monkeypatch, capsys):
    in_memory = batches(data, 3, "--augment", "flip")
    monkeypatch.setattr(train, "MEMORY_LIMIT", 0)
    for ours, loaded in zip(in_memory, batches(data, 3, "--augment", "flip"), strict=True):
        assert all(map(torch.equal, ours, loaded)) and [part.dtype for part in loaded] == [torch.uint8] * 2
    assert "loaded by worker processes" in capsys.readouterr().out


def test_an_image_is_augmented_alike_in_any_share(data):
    plain, augmented = batches(data, 1), batches(data, 1, "--augment", "flip", "turn")
    assert not torch.equal(plain[0][0], augmented[0][0])
    share = batches(data, 1, "--augment", "flip", "turn", share=slice(4, 6))
    assert all(torch.equal(part, whole[4:]) for part, whole in zip(share[0], augmented[0]))


@pytest.mark.parametrize("stage, low, high", [("large", 350, 1000), ("small", 0, 450)])
def test_a_stage_trains_at_its_own_timesteps_only(data, tmp_path, monkeypatch, stage, low, high):
    seen, drawn_at, loss, sample = [], [], train.training_loss, train.sample

    def watched(net, x_start, t, *rest):
        seen.extend(t.tolist())
        return loss(net, x_start, t, *rest)

    def watched_sample(denoise, x_T, steps, *rest, **limits):
        drawn_at.extend(steps)
        return sample(denoise, x_T, steps, *rest, **limits)

    monkeypatch.setattr(train, "training_loss", watched)
    monkeypatch.setattr(train, "sample", watched_sample)
    flags = ["--stage", stage, "--data", data, "--out", tmp_path, *TINY, "--steps", 2, "--batch-size", 128]
    go(*flags)
    assert len(seen) == 256 and low <= min(seen) < low + 25 and high - 25 <= max(seen) < high
    assert low <= min(drawn_at) and max(drawn_at) < high
    assert load_stage(tmp_path / stage, stage)["config"]["t_range"] == [low, high]
    missing = [name for name in train.QUARTERS if not log_of(tmp_path / stage)[0][name]]
    assert missing == (["loss_q1"] if stage == "large" else ["loss_q3", "loss_q4"])
    with pytest.raises(ValueError, match=rf"t_range was \[{low}, {high}\] and is \[0, 1000\]"):
        go(*flags, "--t-range", "full", "--resume", "--steps", 6)


def test_windows_are_random_and_as_many_hold_a_defect_as_was_asked():
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[3:5, 25:28] = 1

    def windows(side, share, count=400):
        random = rng(0)
        return [train.window(mask, side, share, random) for _ in range(count)]

    for side in (1, 8, 20):
        found = windows(side, 1.0)
        assert all(mask[rows, columns].any() and mask[rows, columns].shape == (side, side)
                   for rows, columns in found)
        assert len({(rows.start, columns.start) for rows, columns in found}) >= (6 if side == 1 else 5)
    anywhere = [(rows.start, columns.start) for rows, columns in windows(8, 0.0)]
    assert (min(anywhere), max(anywhere)) == ((0, 0), (12, 22))
    some = sum(bool(mask[rows, columns].any()) for rows, columns in windows(8, 0.5)) / 400
    by_chance = sum(bool(mask[rows, columns].any()) for rows, columns in windows(8, 0.0)) / 400
    assert some == pytest.approx(0.5 + 0.5 * by_chance, abs=0.08)
    assert train.window(mask, 24, 1.0, rng(0))[0] == slice(0, 24)               # higher than the photo


def test_a_stage_trains_on_windows_of_its_photos(data, tmp_path, capsys):
    flags = ["--stage", "small", "--data", data, "--out", tmp_path, *TINY, "--size", 32, 48, "--crop", 16]
    args = train.parse_args([str(flag) for flag in flags])
    dataset = open_dataset(data, (32, 48), "train")
    (images, masks), *_ = train.batches(dataset.subset(dataset.defective()), 0, args, torch.device("cpu"))
    assert images.shape == (2, 3, 16, 16) and masks.shape == (2, 16, 16)
    go(*flags)
    assert "sees 45 px of 32x48 in windows of 16 px" in (said := capsys.readouterr().out)
    assert "warning: the network sees more than a window" in said
    assert picture(tmp_path / "small/samples_000004.png").shape[1] > 8 * 48      # pictures of the whole
    with pytest.raises(ValueError, match="--crop 15: the net halves it 1 times, use multiples of 2"):
        go(*flags[:-1], 15, "--resume")


def test_soft_masks_hold_the_share_of_each_class_in_a_pixel(data, tmp_path):
    joint, masks = Joint({"mean": [0] * 3, "std": [1] * 3}, 3), torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[0, :2, :4] = 1                                        # half of the first of four pixels
    x_start = train.encode(joint, torch.zeros(1, 3, 8, 8), masks, {"soft_masks": True})
    assert x_start.shape == (1, 6, 2, 2)
    assert x_start[0, 3:, 0, 0].tolist() == [0, 0, -1] and (x_start[0, 4].flatten()[1:] == -1).all()
    go("--stage", "large", "--data", data, "--out", tmp_path, *TINY, "--soft-masks")
    assert load_stage(tmp_path / "large", "large")["config"]["size"] == [16, 16]
    assert picture(tmp_path / "large/samples_000004.png").shape[1] > 8 * 16


def test_presets_say_what_each_stage_gets():
    large, small = (train.parse_args(["--stage", stage, "--preset", "laptop"]) for stage in STAGES)
    assert (large.size, large.crop, large.t_range) == ((64, 64), None, "full")
    assert (small.size, small.crop, small.t_range) == ((256, 256), 96, "own")
    assert train.parse_args(["--stage", "small", "--preset", "laptop", "--crop", "64"]).crop == 64


@pytest.mark.parametrize("depth, multipliers", [(0, [1]), (1, [1, 2]), (3, [1, 2, 2, 2])])
def test_depth_takes_levels_away_or_repeats_the_widest(data, tmp_path, depth, multipliers):
    go("--stage", "small", "--data", data, "--out", tmp_path, *TINY, "--steps", 1, "--depth", depth)
    assert load_stage(tmp_path / "small", "small")["network"]["multipliers"] == multipliers


def test_a_single_grey_image_trains(tmp_path):
    for path, value in (("image/crack/0.png", 90), ("mask/crack/0_mask.png", 1)):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.fromarray(np.full((16, 16), value, np.uint8)).save(tmp_path / path)
    write_classes(tmp_path, ("background", "crack"))
    go("--stage", "small", "--data", tmp_path, "--out", tmp_path / "run", *TINY)
    assert load_stage(tmp_path / "run/small", "small")["config"]["channels"] == 1


def test_the_average_keeps_no_graph(data, tmp_path, monkeypatch):
    kept, save = [], train.save_stage
    monkeypatch.setattr(train, "save_stage", lambda *a: kept.extend(a[2].parameters()) or save(*a))
    go("--stage", "small", "--data", data, "--out", tmp_path, *TINY)
    assert kept and not any(p.requires_grad or p.grad_fn for p in kept)     # else memory grows with each step


def test_a_checkpoint_with_another_memory_layout_resumes_the_same(data, tmp_path):
    """Fused AdamW reads weights and averages in the order of memory; ours are saved channels last."""
    flags = ["--stage", "small", "--data", data, *TINY]
    go(*flags, "--out", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b/small/step_000004.pt"
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["optimizer"]["state"].values()
    assert not all(state["exp_avg"].is_contiguous() for state in states)
    for state in states:
        state.update({name: state[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    torch.save(checkpoint, path)
    for name in "ab":
        go(*flags, "--out", tmp_path / name, "--steps", 8, "--resume")
    assert_same(tmp_path / "a", tmp_path / "b")


# --- what a run leaves, and what it refuses ---

def test_what_a_run_leaves_behind(trained):
    folder = trained / "large"
    assert [path.name for path in checkpoints(folder).values()] == ["step_000002.pt", "step_000004.pt"]
    assert picture(folder / "samples_000004.png").std() > 0
    config = read_json(folder / "config.json")
    assert config["classes"] == ["background", "crack", "dirt"] and config["size"] == [16, 16]
    assert len(config["images"]) == 10                              # no good ones
    assert config == json.loads(json.dumps(load_stage(folder, "large")["config"]))
    row = log_of(folder)[0]
    assert list(row) == train.COLUMNS and float(row["loss"]) > 0


def test_the_log_has_the_gradient_norm_before_clipping(data, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)) or norms[-1])
    go("--stage", "small", "--data", data, "--out", tmp_path, *TINY)
    assert [row["grad_norm"] for row in log_of(tmp_path / "small")] == [f"{norms[i]:.4g}" for i in (1, 3)]


def test_keep_says_how_many_checkpoints_stay(data, tmp_path):
    flags = [*TINY, "--steps", 5, "--save-every", 1, "--keep", 3]
    go("--stage", "small", "--data", data, "--out", tmp_path, *flags)
    assert list(checkpoints(tmp_path / "small")) == [3, 4, 5]


def test_the_next_command_is_named(data, tmp_path, capsys):
    for stage, following in (("small", "the same command with --stage large"), ("large", "python sample.py")):
        go("--stage", stage, "--data", data, "--out", tmp_path, *TINY, "--steps", 1)
        assert f"next: {following}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--size", "18", "16"], "18x16"), (["--size", "16", "20"], "16x20"), (["--lr", "-1"], "--lr is -1"),
    (["--data", "nowhere"], "no such folder"), (["--data", "drawn:tablet"], "unknown drawn object"),
    (["--split", "val"], "no split 'val'; there are train, test"), (["--steps", "0"], "--steps is 0"),
    (["--device", "nothing"], "--device nothing"), (["--resume"], "no checkpoint of the large stage"),
    (["--batch-size", "4", "--accumulate", "3"], "--batch-size 4 does not divide into 3 equal parts")])
def test_bad_flags_are_one_sentence_and_leave_no_folder(data, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("--stage", "large", "--data", data, "--out", tmp_path / "run", *TINY, *flags)
    assert not (tmp_path / "run").exists()


def test_only_good_products_cannot_be_trained_on(tmp_path):
    make_data(tmp_path / "good", kinds=("good",))
    with pytest.raises(ValueError, match="no photo has a defect to learn"):
        go("--stage", "large", "--data", tmp_path / "good", "--out", tmp_path / "run", *TINY)


def test_errors_reach_the_user_without_a_traceback(tmp_path):
    result = run("train.py", "--stage", "large", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "no such folder" in result.stderr


def test_a_finished_run_is_not_overwritten_and_other_settings_are_named(trained, data, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    before = (copy / "large/step_000004.pt").read_bytes()
    flags = ["--stage", "large", "--data", data, "--out", copy, *TINY]
    with pytest.raises(ValueError, match="large holds checkpoints: --resume continues them, another --out"):
        go(*flags)
    with pytest.raises(ValueError, match="cannot resume with other settings: seed was 0 and is 1$"):
        go(*flags, "--resume", "--lr", 0.5, "--seed", 1, "--save-every", 9, "--keep", 9, "--steps", 9)
    go(*flags, "--resume")
    assert "has 4 steps already; raise --steps" in capsys.readouterr().out
    assert (copy / "large/step_000004.pt").read_bytes() == before


def test_data_may_move_but_other_images_are_noticed_on_resume(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "bolt")
    flags = ["--stage", "small", "--out", tmp_path / "run", *TINY]
    go(*flags, "--data", data, "--steps", 2)
    go(*flags, "--data", copy, "--resume")
    for folder, end in (("image", ""), ("mask", "_mask")):
        (copy / folder / f"crack/000{end}.png").rename(copy / folder / f"crack/900{end}.png")
    with pytest.raises(ValueError, match="no longer names the 10 images of the start"):
        go(*flags, "--data", copy, "--resume", "--steps", 6)


def test_a_loss_or_gradient_that_is_no_number_stops_before_it_is_saved(data, tmp_path, monkeypatch):
    loss, clip, calls = train.training_loss, torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(train, "training_loss",
                        lambda *a: calls.append(0) or loss(*a) * (math.nan if len(calls) > 2 else 1))
    flags = ["--stage", "small", "--data", data, *TINY]
    with pytest.raises(ValueError, match="at step 4 the loss is nan .* Try a lower --lr"):
        go(*flags, "--out", tmp_path / "a")
    assert list(checkpoints(tmp_path / "a/small")) == [2]
    monkeypatch.setattr(train, "training_loss", loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) * float("inf"))
    with pytest.raises(ValueError, match="at step 2 .* the gradient inf"):
        go(*flags, "--out", tmp_path / "b")
    assert not checkpoints(tmp_path / "b/small")


# --- one step in several parts ---

@pytest.fixture
def unclipped(monkeypatch):
    """Clipping and AdamW both hide a gradient that is N times too large; AdamW's averages then show it."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.zeros(()))


def test_micro_batches_are_the_same_step(data, tmp_path, monkeypatch, unclipped):
    sizes, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: sizes.append(len(a[1])) or loss(*a))
    flags = ["--stage", "small", "--data", data, *TINY, "--batch-size", 4]
    go(*flags, "--out", tmp_path / "whole")
    go(*flags, "--out", tmp_path / "parts", "--steps", 2, "--accumulate", 4)
    go(*flags, "--out", tmp_path / "parts", "--accumulate", 2, "--resume")
    assert sizes == [4] * 4 + [1] * 8 + [2] * 4
    assert_same(tmp_path / "parts", tmp_path / "whole", atol=1e-5)


WORKER = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import datasets, defect_gen, torch
torch.nn.utils.clip_grad_norm_ = lambda parameters, most: torch.zeros(())
if os.environ["RANK"] == "1":                                   # only the first process writes
    defect_gen.save_stage = datasets.write_json = datasets.write_image = None
{fault}
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def torchrun(folder, *flags, fault=""):
    """train.py without clipping in two processes: (exit status, output)."""
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), fault=fault))
    return program().run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                         folder / "worker.py", *flags)


def test_two_processes_are_one(data, tmp_path, unclipped):
    flags = ["--stage", "small", "--data", data, *TINY, "--batch-size", 4, "--augment", "flip", "turn"]
    go(*flags, "--out", tmp_path / "one")
    status, said = torchrun(tmp_path, *flags, "--out", tmp_path / "two", "--accumulate", 2)
    assert status == 0 and said.count("next: ") == said.count("parameters, sees") == 1, said
    assert_same(tmp_path / "two", tmp_path / "one", atol=1e-5)
    config = load_stage(tmp_path / "two/small", "small")["config"]
    assert config["batch_size"] == 4 and config == read_json(tmp_path / "two/small/config.json")
    for row, wanted in zip(log_of(tmp_path / "two/small"), log_of(tmp_path / "one/small"), strict=True):
        for name in ("step", "lr", "loss", *train.QUARTERS):
            assert float(row[name] or -1) == pytest.approx(float(wanted[name] or -1), abs=2e-6)


def test_a_broken_loss_of_one_process_stops_all(data, tmp_path):
    """Here the two are forked, with what torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    broken = "return loss(*arguments) * float('nan' if os.environ['RANK'] == '1' else 1)"
    told = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    pids = [program().start("train.py", "--stage", "small", "--data", data, *TINY, "--out", tmp_path,
                            fault=AT_CALL.format(call=4, what=broken), RANK=rank, LOCAL_RANK=rank, **told)
            for rank in (0, 1)]
    for pid in pids:
        status, said = program().wait(pid)
        assert status == 1 and "error: at step 4 the loss is nan" in said, said
    assert list(checkpoints(tmp_path / "small")) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_survives_a_killed_process_and_goes_on_with_fewer(data, tmp_path, unclipped, name):
    flags = ["--stage", "small", "--data", data, *TINY, "--batch-size", 4]
    go(*flags, "--out", tmp_path / "whole", "--steps", 8)
    go(*flags, "--out", tmp_path / "run", "--steps", 2)
    fault = AT_CALL.format(call=4, what=f"os.environ['RANK'] == '1' and {kill(name)}")
    more = ["--out", tmp_path / "run", "--steps", 8, "--resume"]
    status, said = torchrun(tmp_path, *flags, *more, fault=fault)
    assert status != 0 and name in said, said
    assert load_stage(tmp_path / "run/small", "small")["step"] == 4         # step 5 is lost
    go(*flags, *more)
    assert_same(tmp_path / "run", tmp_path / "whole", atol=1e-5)
    assert [row["step"] for row in log_of(tmp_path / "run/small")] == ["2", "4", "6", "8"]


# --- what breaks: real signals, kills and full disks ---

def command(data, out, *more):
    return ["train.py", "--stage", "small", "--data", data, "--out", out, *TINY, "--steps", 26,
            "--save-every", 12, *more]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of 26 steps that nothing happened to, and the seconds it took."""
    out, start = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    status, said = program().run(*command(data, out))
    assert status == 0, said
    return out, min(5, time.perf_counter() - start)


def kill(name):
    return f"os.kill(os.getpid(), signal.{name})"


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_training_with_a_checkpoint_that_goes_on(data, undisturbed, tmp_path, name, status):
    for stop, resume in ((5, []), (16, ["--resume"])):      # the second hits the resumed run
        fault = AT_CALL.format(call=stop - 5 * len(resume), what=kill(name))
        ended, said = program().run(*command(data, tmp_path, *resume), fault=fault)
        assert ended == status and f"stopped by {name}; continue with the same command and --" in said, said
        assert "Traceback" not in said and list(checkpoints(tmp_path / "small"))[-1] == stop
    ended, said = program().run(*command(data, tmp_path, "--resume"))
    assert ended == 0, said
    assert_same(tmp_path, undisturbed[0])
    assert_same_log(tmp_path, undisturbed[0], stops=[5, 16])


@pytest.mark.parametrize("name, status, said", [("SIGINT", 1, "interrupted"), ("SIGTERM", -15, "")])
def test_a_second_signal_stops_at_once(data, tmp_path, name, status, said):
    twice = AT_CALL.format(call=14, what=f"{kill(name)}; {kill(name)}")
    ended, output = program().run(*command(data, tmp_path), fault=twice)
    assert ended == status and said in output and "Traceback" not in output
    assert list(checkpoints(tmp_path / "small")) == [12]


def test_ctrl_c_reaches_the_workers_of_the_loader_as_well(data, undisturbed, tmp_path):
    go_on = "train.MEMORY_LIMIT = 0\ntrain.run_main(train.main)"
    stop = "os.setpgrp()" + AT_CALL.format(call=5, what="os.killpg(0, signal.SIGINT)")
    fault = f"import os, train\n{stop}train.training_loss = faulty\n{go_on}"
    ended, said = program().run(*command(data, tmp_path), fault=fault)
    assert ended == 130 and "Traceback" not in said, said
    ended, said = program().run(*command(data, tmp_path, "--resume"), fault="import train\n" + go_on)
    assert ended == 0, said
    assert_same(tmp_path, undisturbed[0])


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_training_killed_at_random_moments_ends_with_the_same_bits(data, undisturbed, tmp_path, moments):
    wanted, duration = undisturbed
    draw = random.Random(moments)

    def resume():
        return ["--resume"] * bool(checkpoints(tmp_path / "small"))

    for _ in range(moments):
        pid = program().start(*command(data, tmp_path, *resume()))
        time.sleep(draw.uniform(0.1, 0.9) * duration)
        os.kill(pid, signal.SIGKILL)
        status, said = program().wait(pid)
        assert status in (0, -signal.SIGKILL), said
        if resume():
            assert load_stage(tmp_path / "small", "small")["step"] in (12, 24, 26)
        if status == 0:
            assert_same(tmp_path, wanted)
            shutil.rmtree(tmp_path / "small")
    status, said = program().run(*command(data, tmp_path, *resume()))
    assert status == 0, said
    assert_same(tmp_path, wanted)
    assert_same_log(tmp_path, wanted)
    assert not list((tmp_path / "small").glob(".*"))


HALF = """
import os, signal, torch
def save(checkpoint, path, whole=torch.save):
    whole(checkpoint, path)
    if checkpoint["step"] == 24:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
READ_ONLY = """
import os
def refuse(old, new, replace=os.replace):
    if str(new).endswith("24.pt"):
        raise PermissionError(13, "Permission denied")
    replace(old, new)
os.replace = refuse
"""


@pytest.mark.parametrize("fault, status", [(HALF, -9), (FULL, 1), (READ_ONLY, 1)],
                         ids=["killed", "full", "read-only"])
def test_a_checkpoint_that_is_not_written_leaves_the_old_one(data, undisturbed, tmp_path, fault, status):
    assert program().run(*command(data, tmp_path, "--steps", 12))[0] == 0
    ended, said = program().run(*command(data, tmp_path, "--resume"), fault=fault)
    assert ended == status and "Traceback" not in said, said
    if status == 1:
        assert "step_000024.pt: cannot be written" in said and "before is unchanged" in said
    assert load_stage(tmp_path / "small", "small")["step"] == 12
    with (tmp_path / "small/log.csv").open("a") as log:
        log.write("25,0.4")                                         # half a row
    ended, said = program().run(*command(data, tmp_path, "--resume"))
    assert ended == 0 and not list((tmp_path / "small").glob(".*")), said
    assert_same(tmp_path, undisturbed[0])
    assert_same_log(tmp_path, undisturbed[0])
