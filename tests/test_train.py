"""Training resumes bit for bit, shares a batch without a trace, survives faults and refuses bad flags."""
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest
import torch

import train
from commands import program
from conftest import ROOT, TINY, make_data, picture
from datasets import open_dataset, write_classes, write_json, write_pair
from defect_gen import STAGES, Joint, checkpoints, load_stage
from diffusion import rng
from inspect_rules import read_json


def command(data, out, *more):
    return ["--stage", "small", "--data", str(data), "--out", str(out), *TINY, *map(str, more)]


def go(*flags):
    return train.train(train.parse_args([*map(str, flags)]))


@pytest.fixture
def fit(data, tmp_path):
    """fit("a", *flags) trains the small stage, unless flags say another, into the run tmp_path / "a"."""
    def fit(name, *flags):
        go(*command(data, tmp_path / name, *flags))
        return tmp_path / name
    return fit


def log_of(run, stage="small"):
    with (run / stage / "log.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same(run, wanted, atol=0.0):
    """The small stages of two runs: the same weights, averages, optimiser, and log but for its speed."""
    ours, theirs = (load_stage(folder / "small", "small") for folder in (run, wanted))
    for part in ("step", "model", "ema", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=atol)
    for row, other in zip(log_of(run), log_of(wanted), strict=True):
        for name in row.keys() - {"images_per_s"}:
            value, wanted_value = (float(cells[name] or -1) for cells in (row, other))
            assert value == pytest.approx(wanted_value, rel=0, abs=min(atol, 2e-6)), name


# --- what is learned ---

def test_10_steps_and_10_more_are_20_bit_for_bit_however_a_checkpoint_lies_in_memory(fit):
    """Fused AdamW reads weights and averages in the order of memory; ours are saved channels last."""
    flags = ["--save-every", 4, "--augment", "flip", "turn"]
    whole, parts = fit("whole", "--steps", 20, *flags), fit("parts", "--steps", 10, *flags)
    path = checkpoints(parts / "small")[10]
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["optimizer"]["state"].values()
    assert not all(state["exp_avg"].is_contiguous() for state in states)
    for state in states:
        state.update({name: state[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    torch.save(checkpoint, path)
    assert_same(fit("parts", "--steps", 20, *flags, "--resume"), whole)


def test_averages_and_learning_rate_warm_up_and_the_log_has_the_norm_before_clipping(fit, monkeypatch):
    kept, save, norms, clip = [], train.save_stage, [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(train, "save_stage", lambda *a: kept.extend(a[2].parameters()) or save(*a))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)) or norms[-1])
    run = fit("run", "--steps", 5, "--save-every", 1, "--keep", 3)
    assert list(checkpoints(run / "small")) == [3, 4, 5]
    old, new = (load_stage(run / "small", "small", step) for step in (4, 5))
    for key, average in new["ema"].items():
        wanted = old["ema"][key].lerp(new["model"][key], 1 - 5 / 14)            # step 4: (1 + 4) / (10 + 4)
        torch.testing.assert_close(average, wanted, rtol=0, atol=3e-7)
    assert not any(p.requires_grad or p.grad_fn for p in kept)  # else memory grows with each step
    assert [float(row["lr"]) for row in log_of(run)] == pytest.approx([n / 50 * 1e-3 for n in range(1, 6)])
    assert [row["grad_norm"] for row in log_of(run)] == [f"{norm:.4g}" for norm in norms]


def test_a_decaying_rate_falls_along_the_steps_and_a_resumed_run_follows_the_longer_curve(fit):
    rates = [float(row["lr"]) for row in log_of(fit("run", "--steps", 4, "--save-every", 1, "--lr-decay"))]
    halves = [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]
    assert rates == pytest.approx([1e-3 * (n + 1) / 50 * half for n, half in enumerate(halves)], rel=1e-4)
    longer = fit("run", "--steps", 6, "--save-every", 1, "--lr-decay", "--resume")
    assert float(log_of(longer)[4]["lr"]) == pytest.approx(1e-3 * 5 / 50 / 4, rel=1e-4)  # cos(4/6 pi) = -1/2
    last = train.learning_rate(999, train.parse_args(["--stage", "large", "--lr-decay", "--steps", "1000"]))
    assert 0 < last < 3e-9


def test_every_image_comes_up_equally_often_whatever_the_batch():
    stream = train.order(7, 0, 70, seed=3)
    assert set(Counter(stream).values()) == {10} and stream[:7] != stream[7:14]
    assert stream == sum((train.order(7, start, 5, seed=3) for start in range(0, 70, 5)), [])
    assert stream != train.order(7, 0, 70, seed=4)


def test_a_batch_is_the_same_in_shares_and_through_the_workers_for_large_data(data, monkeypatch, capsys):
    def batches(share=slice(None), indices=range(15)):
        dataset = open_dataset(data, (16, 16), "train").subset(indices)
        flags = command(data, "", "--batch-size", 6, "--steps", 6, "--augment", "flip", "turn")
        return list(train.batches(dataset, 3, train.parse_args(flags), torch.device("cpu"), share))

    one_image = batches(indices=[0])[0][0]
    assert (one_image != one_image[:1]).any()                   # not all augmented alike
    augmented, share = batches(), batches(share=slice(4, 6))
    monkeypatch.setattr(train, "MEMORY_LIMIT", 0)
    loaded = batches()
    assert "loaded by worker processes" in capsys.readouterr().out
    for whole, part, other in zip(augmented, share, loaded, strict=True):
        assert all(torch.equal(a[4:], b) and torch.equal(a, c) and c.dtype == torch.uint8
                   for a, b, c in zip(whole, part, other))


@pytest.mark.parametrize("stage, low, high, empty", [
    ("large", 350, 1000, ["loss_q1"]), ("small", 0, 450, ["loss_q3", "loss_q4"])])
def test_a_stage_trains_at_its_own_timesteps_only(fit, monkeypatch, stage, low, high, empty):
    seen, drawn_at, loss, sample = [], [], train.training_loss, train.sample
    monkeypatch.setattr(train, "training_loss", lambda *a: seen.extend(a[2].tolist()) or loss(*a))
    monkeypatch.setattr(train, "sample", lambda *a, **how: drawn_at.extend(a[2]) or sample(*a, **how))
    run = fit("run", "--stage", stage, "--size", 8, 8, "--steps", 2, "--batch-size", 128)
    assert len(seen) == 256 and low <= min(seen) < low + 25 and high - 25 <= max(seen) < high
    assert seen[:128] != seen[128:]                             # fresh ones in each step
    assert low <= min(drawn_at) and max(drawn_at) < high        # the preview
    assert load_stage(run / stage, stage)["config"]["t_range"] == [low, high]
    assert [name for name in train.QUARTERS if not log_of(run, stage)[0][name]] == empty


def test_windows_are_random_and_as_many_hold_a_defect_as_was_asked():
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[3:5, 25:28] = 1

    def windows(side, share):
        """({corner}, share that holds a defect) of 400"""
        random = rng(0)
        found = [tuple(train.window(mask, side, share, random)) for _ in range(400)]
        assert all(mask[window].shape == (side, side) for window in found)
        corners = {(rows.start, columns.start) for rows, columns in found}
        return corners, sum(bool(mask[window].any()) for window in found) / 400

    for side, places in (1, 6), (8, 5), (20, 5):
        corners, share = windows(side, 1.0)
        assert share == 1 and len(corners) >= places
    corners, by_chance = windows(8, 0.0)
    assert (min(corners), max(corners)) == ((0, 0), (12, 22))
    assert windows(8, 0.5)[1] == pytest.approx(0.5 + 0.5 * by_chance, abs=0.08)
    assert train.window(mask, 24, 1.0, rng(0))[0] == slice(0, 24)               # higher than the photo


def test_a_stage_trains_on_windows_and_draws_whole_pictures(fit, monkeypatch, capsys):
    shapes, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: shapes.append(tuple(a[1].shape)) or loss(*a))
    run = fit("run", "--size", 32, 48, "--crop", 16)
    assert shapes == [(2, 6, 16, 16)] * 4
    assert "sees 45 px of 32x48 in windows of 16 px" in (said := capsys.readouterr().out)
    assert "warning: the network sees more than a window" in said
    assert picture(run / "small/samples_000004.png").shape[1] > 8 * 48


def test_soft_masks_hold_the_share_of_each_class_in_a_pixel(data, tmp_path):
    joint, masks = Joint({"mean": [0] * 3, "std": [1] * 3}, 3), torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[0, :2, :4] = 1                                        # half of the first of four pixels
    x_start = train.encode(joint, torch.zeros(1, 3, 8, 8), masks, {"soft_masks": True})
    assert x_start.shape == (1, 6, 2, 2)
    assert x_start[0, 3:, 0, 0].tolist() == [0, 0, -1] and (x_start[0, 4].flatten()[1:] == -1).all()
    dataset, _, config, _ = train.prepare(train.parse_args(command(data, tmp_path, "--soft-masks")), 1)
    assert config["size"] == [16, 16] and dataset.size == (64, 64)


def test_flags_win_over_the_preset_and_depth_takes_levels_away_or_repeats_the_widest(data, tmp_path):
    laptop = [train.parse_args(["--stage", stage, "--preset", "laptop", "--lr", "2"]) for stage in STAGES]
    assert [(args.size, args.crop, args.lr) for args in laptop] == [((64, 64), None, 2), ((256, 256), 96, 2)]
    for depth, multipliers in (0, [1]), (1, [1, 2]), (3, [1, 2, 2, 2]):
        args = train.parse_args(command(data, tmp_path, "--depth", depth))
        assert list(train.prepare(args, 1)[1]["multipliers"]) == multipliers


# --- what a run leaves, and what it refuses ---

def test_what_a_run_leaves_behind(trained):
    folder = trained / "large"
    assert [path.name for path in checkpoints(folder).values()] == ["step_000002.pt", "step_000004.pt"]
    assert picture(folder / "samples_000004.png").std() > 0
    config = read_json(folder / "config.json")
    assert config["classes"] == ["background", "crack", "dirt"] and config["size"] == [16, 16]
    assert len(config["images"]) == 10                              # no good ones
    assert config == json.loads(json.dumps(load_stage(folder, "large")["config"]))
    row = log_of(trained, "large")[0]
    assert list(row) == train.COLUMNS and float(row["loss"]) > 0


def test_what_a_size_and_a_split_leave_out_is_said_before_training(tmp_path, capsys):
    for kind, value, side in ("crack", 1, 1), ("dirt", 2, 40):
        mask = np.zeros((96, 96), np.uint8)
        mask[20:20 + side, 20:20 + side] = value
        write_pair(tmp_path, "0", np.full((1, 96, 96), 90, np.uint8), mask, kind)
    write_classes(tmp_path, ("background", "crack", "dirt"))
    write_json(tmp_path / "split.json", {"train": ["crack/0"]})
    for flags, small in ((), True), (("--soft-masks", "--size", "24", "24"), False):    # 4 x 24: all of them
        train.prepare(train.parse_args(command(tmp_path, tmp_path / "run", *flags)), 1)
        said = capsys.readouterr().out
        assert "warning: no photo of the kinds dirt in split train\n" in said
        assert ("warning: no pixel of the classes crack, dirt in split train\n" in said) == small
        assert ("warning: 1 of 1 masks lose a defect at 16x16: crack/0; --size " in said) == small


def test_a_single_grey_image_trains_and_the_next_command_is_named(tmp_path, capsys):
    write_pair(tmp_path, "0", np.full((1, 16, 16), 90, np.uint8), np.ones((16, 16), np.uint8), "crack")
    write_classes(tmp_path, ("background", "crack"))
    for stage, following in (("small", "the same command with --stage large"), ("large", "python sample.py")):
        go(*command(tmp_path, tmp_path / "run", "--stage", stage, "--steps", 1, "--soft-masks"))
        assert load_stage(tmp_path / "run" / stage, stage)["config"]["channels"] == 1
        assert f"next: {following}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--size", "18", "16"], "18x16"), (["--steps", "0"], "--steps is 0"), (["--lr", "-1"], "--lr is -1"),
    (["--data", "nowhere"], "no such folder"), (["--data", "drawn:tablet"], "unknown drawn object"),
    (["--split", "val"], "no split 'val'; there are train, test"), (["--device", "gpu"], "--device gpu"),
    (["--resume"], "no checkpoint of the large stage"), (["--defect-share", "2"], "--defect-share is 2.0"),
    (["--batch-size", "4", "--accumulate", "3"], "4 does not divide into 3 equal parts .*: take a multiple"),
    (["--crop", "16"], "--crop 16 is for a small stage without"),
    (["--stage", "small", "--crop", "15"], "--crop 15: the net halves it 1 times, use multiples of 2")])
def test_bad_flags_are_one_sentence_and_leave_no_folder(data, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go(*command(data, tmp_path / "run", "--stage", "large", *flags))
    assert not (tmp_path / "run").exists()


def test_only_good_products_cannot_be_trained_on_and_say_so_without_a_traceback(tmp_path):
    make_data(tmp_path / "good", kinds=("good",))
    status, said = program().run("train.py", *command(tmp_path / "good", tmp_path / "run"))
    assert status == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ") and "no photo has a defect to learn" in said


def test_a_stage_that_will_not_fit_the_other_is_refused_before_it_trains(trained, data, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "small")
    with pytest.raises(ValueError, match=r"the stages differ in augment \(\[\] and \['flip'\]\)"):
        go(*command(data, run, "--stage", "small", "--augment", "flip"))
    assert not (run / "small").exists()


def test_a_run_is_not_overwritten_and_goes_on_with_the_same_settings_and_images(trained, data, tmp_path,
                                                                                capsys):
    run, moved = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(data, tmp_path / "moved")
    before = (run / "large/step_000004.pt").read_bytes()
    flags = command(data, run, "--stage", "large")
    with pytest.raises(ValueError, match="large holds checkpoints: --resume continues them, another --out"):
        go(*flags)
    changed = r"augment was \[\] and is \['flip'\]; t_range was .* and is \[0, 1000\]; seed was 0 and is 1"
    changed += "; give the old ones, or another --out$"
    with pytest.raises(ValueError, match=f"cannot resume with other settings: {changed}"):
        go(*flags, "--resume", "--augment", "flip", "--t-range", "full", "--seed", 1, "--lr", 1, "--keep", 9)
    go(*flags, "--resume", "--data", moved)
    assert "has 4 steps already; raise --steps" in capsys.readouterr().out
    for name in "image/crack/{}.png", "mask/crack/{}_mask.png":
        (moved / name.format("000")).rename(moved / name.format("900"))
    with pytest.raises(ValueError, match="no longer names the 10 images of the start"):
        go(*flags, "--resume", "--data", moved)
    assert (run / "large/step_000004.pt").read_bytes() == before


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(fit, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *a: calls.append(0) or clip(*a) * (math.inf if len(calls) > 2 else 1))
    with pytest.raises(ValueError, match="at step 4 .* the gradient inf; .* Try a lower --lr or --no-bf16"):
        fit("run")
    assert list(checkpoints(tmp_path / "run/small")) == [2]


# --- one step in several parts ---

@pytest.fixture
def unclipped(monkeypatch):
    """Clipping and AdamW both hide a gradient that is N times too large; AdamW's averages then show it."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.zeros(()))


def test_micro_batches_are_the_same_step(fit, monkeypatch, unclipped):
    sizes, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: sizes.append(len(a[1])) or loss(*a))
    whole, parts = fit("whole", "--batch-size", 4), fit("parts", "--batch-size", 4, "--accumulate", 2)
    assert sizes == [4] * 4 + [2] * 8
    assert_same(parts, whole, atol=1e-5)


# what a training command does to itself at the n-th call of its loss
AT_CALL = """
import diffusion, os, resource, signal
loss, calls = diffusion.training_loss, []
def faulty(*arguments):
    calls.append(0)
    if len(calls) == {call}:
        {what}
    return loss(*arguments)
diffusion.training_loss = faulty
"""
ONE_WRITES = """
import os, datasets, defect_gen, torch
torch.nn.utils.clip_grad_norm_ = lambda parameters, most: torch.zeros(())               # as in `unclipped`
if os.environ["RANK"] == "1":
    defect_gen.save_stage = datasets.write_json = datasets.write_image = None
"""


def kill(name):
    return f"os.kill(os.getpid(), signal.{name})"


def two_processes(*flags, fault):
    """[(exit status, output)] of train.py forked twice, with what torchrun would tell the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
    pids = [program().start("train.py", *flags, fault=fault, RANK=rank, LOCAL_RANK=rank, **told)
            for rank in (0, 1)]
    return [program().wait(pid) for pid in pids]


def test_two_processes_are_one(data, tmp_path, fit, unclipped):
    flags = ["--batch-size", 4, "--augment", "flip", "turn"]
    ended = two_processes(*command(data, tmp_path / "two", *flags, "--accumulate", 2), fault=ONE_WRITES)
    assert [status for status, said in ended] == [0, 0], ended
    assert [said.count("next: ") + said.count("parameters, sees") for status, said in ended] == [2, 0]
    assert_same(tmp_path / "two", fit("one", *flags), atol=1e-5)
    config = load_stage(tmp_path / "two/small", "small")["config"]
    assert config["batch_size"] == 4 and config == read_json(tmp_path / "two/small/config.json")


def test_a_broken_loss_of_one_process_stops_all(data, tmp_path):
    broken = "return loss(*arguments) * float('nan' if os.environ['RANK'] == '1' else 1)"
    for status, said in two_processes(*command(data, tmp_path), fault=AT_CALL.format(call=4, what=broken)):
        assert status == 1 and "error: at step 4 the loss is nan" in said, said
    assert list(checkpoints(tmp_path / "small")) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_survives_a_killed_process_of_torchrun_and_goes_on_with_fewer(data, tmp_path, fit, name):
    fault = AT_CALL.format(call=4, what=f"os.environ['RANK'] == '1' and {kill(name)}")
    (tmp_path / "worker.py").write_text(f"{fault}\nimport train\ntrain.run_main(train.main)")
    fit("run", "--batch-size", 4, "--steps", 2)
    more = ["--batch-size", 4, "--steps", 8, "--resume"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    status, said = program().run(*torchrun, tmp_path / "worker.py", *command(data, tmp_path / "run", *more),
                                 PYTHONPATH=ROOT)
    assert status != 0 and name in said, said
    assert load_stage(tmp_path / "run/small", "small")["step"] == 4         # step 5 is lost
    assert_same(fit("run", *more), fit("whole", "--batch-size", 4, "--steps", 8), atol=1e-5)


# --- what breaks: real signals, kills and full disks ---

def long(data, out, *more):
    return ["train.py", *command(data, out, "--steps", 14, "--save-every", 6, *more)]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of 14 steps that nothing happened to, and the seconds it took."""
    out, start = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    status, said = program().run(*long(data, out))
    assert status == 0, said
    return out, time.perf_counter() - start


HALF = """
import os, signal, torch
def save(checkpoint, path, whole=torch.save):
    whole(checkpoint, path)
    if checkpoint["step"] == 12:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
FULL = AT_CALL.format(call=7, what="resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))")
WITH_WORKERS = f"""
import os
os.setpgrp()
{AT_CALL.format(call=10, what="os.killpg(0, signal.SIGINT)")}
import train
train.MEMORY_LIMIT, train.training_loss = 0, faulty
train.run_main(train.main)
"""


@pytest.mark.parametrize("fault, status, words, left", [
    (AT_CALL.format(call=10, what=kill("SIGINT")), 130, "stopped by SIGINT; continue .*--resume", [6, 10]),
    (AT_CALL.format(call=10, what=kill("SIGTERM")), 143, "stopped by SIGTERM; continue .*--resume", [6, 10]),
    (AT_CALL.format(call=10, what=f"{kill('SIGINT')}; {kill('SIGINT')}"), 1, "interrupted", [6]),
    (WITH_WORKERS, 130, "loaded by worker processes", [6, 10]),
    (AT_CALL.format(call=10, what=kill("SIGKILL")), -9, "", [6]), (HALF, -9, "", [6]),
    (FULL, 1, "step_000012.pt: cannot be written .* before is unchanged", [6])],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice", "Ctrl-C with workers", "killed", "killed while saving",
         "full disk"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(data, undisturbed, tmp_path, fault, status, words,
                                                           left):
    ended, said = program().run(*long(data, tmp_path), fault=fault)
    assert ended == status and re.search(words, said) and "Traceback" not in said, said
    assert list(checkpoints(tmp_path / "small")) == left
    with (tmp_path / "small/log.csv").open("a") as log:
        log.write("13,0.4")                                     # half a row
    ended, said = program().run(*long(data, tmp_path, "--resume"))
    assert ended == 0, said
    assert_same(tmp_path, undisturbed[0])
    assert not list((tmp_path / "small").glob(".*"))            # temporary files


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_with_the_same_bits(data, undisturbed, tmp_path):
    draw, folder = random.Random(0), tmp_path / "small"

    def words():
        return long(data, tmp_path, *["--resume"] * bool(checkpoints(folder)))

    for _ in range(20):
        pid = program().start(*words())
        time.sleep(draw.uniform(0.1, 0.9) * undisturbed[1])
        os.kill(pid, signal.SIGKILL)
        status, said = program().wait(pid)
        assert status in (0, -signal.SIGKILL), said
        if status == 0:                                         # it had ended before
            shutil.rmtree(folder)
    status, said = program().run(*words())
    assert status == 0, said
    assert_same(tmp_path, undisturbed[0])
