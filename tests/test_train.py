"""Training resumes bit for bit, shares a batch without a trace, logs what it did, and refuses bad flags before the first step."""
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

import train
from conftest import ROOT, TINY, make_data, picture, run
from defect_gen import checkpoints, load_stage


def go(*flags):
    train.train(train.parse_args([*map(str, flags)]))


def assert_same(folder, wanted, atol=1e-5):
    """Both runs' small stage: the same weights, averages and gradients up to rounding; returns the checkpoint of `folder`."""
    ours, theirs = (load_stage(path / "small", "small") for path in (folder, wanted))
    for part in ("model", "ema"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=atol)
    for key, state in ours["optimizer"]["state"].items():
        torch.testing.assert_close(state["exp_avg"], theirs["optimizer"]["state"][key]["exp_avg"], rtol=0, atol=atol)
    return ours


@pytest.fixture
def unclipped(monkeypatch):
    """Clipping and AdamW both hide a gradient that is N times too large; without clipping AdamW's averages show it."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, max_norm: torch.zeros(()))


@pytest.mark.parametrize("augment", ["", "flip,turn,crop"])
def test_9_steps_and_11_more_are_20_bit_for_bit(data, tmp_path, augment):
    flags = ["--stage", "small", "--data", data, *TINY, "--augment", augment]
    go(*flags, "--out", tmp_path / "whole", "--steps", 20)
    go(*flags, "--out", tmp_path / "parts", "--steps", 9)
    go(*flags, "--out", tmp_path / "parts", "--steps", 20, "--resume")
    whole, parts = (load_stage(tmp_path / name / "small", "small") for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, parts[part][key]) for key, value in whole[part].items())
    for key, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][key][name]) for name, value in state.items())
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "parts/small/log.csv").open())]
    assert steps == sorted({9, *range(2, 21, 2)})                   # no gap, no double


def test_augmentation_and_fit_are_stored_and_change_what_is_learned(data, tmp_path, capsys):
    flags = ["--stage", "small", "--data", data, *TINY]
    weights = {}
    for name, extra in {"plain": [], "augmented": ["--augment", "flip"], "padded": ["--fit", "pad"]}.items():
        go(*flags, "--out", tmp_path / name, *extra)
        checkpoint = load_stage(tmp_path / name / "small", "small")
        weights[name] = torch.cat([value.flatten() for value in checkpoint["model"].values()])
    assert not any(torch.equal(weights["plain"], weights[name]) for name in ("augmented", "padded"))
    assert checkpoint["config"]["fit"] == "pad" and checkpoint["config"]["augment"] == [] and "limit 4 GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fit was pad and is squash"):
        go(*flags, "--out", tmp_path / "padded", "--resume", "--steps", 6)
    with pytest.raises(SystemExit):
        train.parse_args(["--stage", "small", "--augment", "flip,spin"])
    assert "there are flip, turn, crop" in capsys.readouterr().err


def test_every_image_comes_up_equally_often_whatever_the_batch():
    stream = train.order(7, 0, 70, seed=3)
    assert set(Counter(stream).values()) == {10} and stream[:7] != stream[7:14]
    assert stream == sum((train.order(7, start, 5, seed=3) for start in range(0, 70, 5)), [])
    assert stream != train.order(7, 0, 70, seed=4)


def test_what_a_run_leaves_behind(trained):
    folder = trained / "large"
    assert [p.name for p in checkpoints(folder)] == ["step_000002.pt", "step_000004.pt"]
    assert picture(folder / "samples_000004.png").std() > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["classes"] == ["background", "crack", "dirt"] and config["size"] == [16, 16] and len(config["images"]) == 10  # no good ones
    row = next(csv.DictReader((folder / "log.csv").open()))
    assert float(row["loss"]) > 0 and set(train.QUARTERS) < set(row)


def test_grey_and_single_images_train(tmp_path):
    from test_datasets import save
    import numpy as np
    save(tmp_path / "grey/image/crack/0.png", np.zeros((16, 16)))
    save(tmp_path / "grey/mask/crack/0_mask.png", np.ones((16, 16)))
    go("--stage", "large", "--data", tmp_path / "grey", "--out", tmp_path / "run", *TINY)
    assert load_stage(tmp_path / "run/large", "large")["config"]["channels"] == 1


def test_large_data_come_through_workers_in_the_same_order(data, tmp_path, monkeypatch):
    from datasets import open_dataset
    dataset = open_dataset(data, (16, 16))
    arguments = (dataset, 3, 5, 4, 0, torch.device("cpu"))
    in_memory = list(train.batches(*arguments))
    monkeypatch.setattr(train, "MEMORY_LIMIT", 0)
    for (images, masks), (loaded, loaded_masks) in zip(in_memory, train.batches(*arguments), strict=True):
        assert torch.equal(images, loaded) and torch.equal(masks.long(), loaded_masks)


@pytest.mark.parametrize("flags, message", [
    (["--size", "18", "16"], "18x16"),
    (["--size", "16", "20"], r"--size 16 (16|24)"),
    (["--data", "nowhere"], "no such folder"),
    (["--data", "drawn:tablet"], "unknown drawn object"),
    (["--split", "val"], "no split 'val'; there are train, test"),
    (["--steps", "0"], "--steps is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--device", "nothing"], "--device nothing"),
    (["--resume"], "no checkpoint of the large stage"),
])
def test_bad_flags_are_one_sentence(data, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("--stage", "large", "--data", data, "--out", tmp_path / "run", *TINY, *flags)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten_and_other_settings_are_named(trained, data, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    before = checkpoints(copy / "large")[-1].read_bytes()
    flags = ["--stage", "large", "--data", data, "--out", copy, *TINY]
    with pytest.raises(ValueError, match="already holds step_000004.pt: --resume continues it"):
        go(*flags)
    with pytest.raises(ValueError, match="cannot resume with other settings: lr was 0.001 and is 0.5"):
        go(*flags, "--resume", "--lr", 0.5)
    go(*flags, "--resume")                                          # nothing left to do
    assert checkpoints(copy / "large")[-1].read_bytes() == before


def test_the_average_keeps_no_graph(data, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(train, "save_stage", lambda path, stage, net, ema, *rest, save=train.save_stage: kept.extend(ema.parameters())
                        or save(path, stage, net, ema, *rest))
    go("--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY)
    assert kept and not any(p.requires_grad or p.grad_fn for p in kept)         # else memory grows with every step


def test_other_images_in_the_folder_are_noticed_on_resume(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "bolt")
    flags = ["--stage", "small", "--data", copy, "--out", tmp_path / "run", *TINY]
    go(*flags)
    for folder, end in (("image", ""), ("mask", "_mask")):
        shutil.move(copy / folder / "crack" / f"000{end}.png", copy / folder / "crack" / f"900{end}.png")
    with pytest.raises(ValueError, match="was trained on 10 images .* not the same ones"):
        go(*flags, "--resume", "--steps", 6)


# --- which timesteps ---

@pytest.mark.parametrize("stage, low, high", [("large", 350, 1000), ("small", 0, 450)])
def test_a_stage_trains_at_its_own_timesteps_only(data, tmp_path, monkeypatch, stage, low, high):
    seen, loss, drawn_at, sample = [], train.training_loss, [], train.sample
    monkeypatch.setattr(train, "training_loss", lambda net, x_start, t, *rest: seen.extend(t.tolist()) or loss(net, x_start, t, *rest))
    monkeypatch.setattr(train, "sample", lambda denoise, x, steps, *rest: drawn_at.extend(steps) or sample(denoise, x, steps, *rest))
    flags = ["--stage", stage, "--data", data, "--out", tmp_path / "run", *TINY, "--batch-size", 64]
    go(*flags)
    assert len(seen) == 256 and low <= min(seen) < low + 25 and high - 25 <= max(seen) < high
    assert low <= min(drawn_at) and max(drawn_at) < high
    assert load_stage(tmp_path / "run" / stage, stage)["config"]["t_range"] == [low, high]
    row = next(csv.DictReader((tmp_path / "run" / stage / "log.csv").open()))
    assert [name for name in train.QUARTERS if not row[name]] == (["loss_q1"] if stage == "large" else ["loss_q3", "loss_q4"])
    with pytest.raises(ValueError, match=rf"t_range was \[{low}, {high}\] and is \[0, 1000\]"):
        go(*flags, "--t-range", "full", "--resume", "--steps", 6)


@pytest.mark.parametrize("depth, multipliers", [(0, [1]), (1, [1, 2]), (3, [1, 2, 2, 2])])
def test_depth_takes_levels_away_or_repeats_the_widest(data, tmp_path, depth, multipliers):
    go("--stage", "small", "--data", data, "--out", tmp_path, *TINY, "--depth", depth)
    assert load_stage(tmp_path / "small", "small")["network"]["multipliers"] == multipliers


def test_a_checkpoint_from_before_t_range_resumes(trained, data, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    path = checkpoints(copy / "small")[-1]
    checkpoint = torch.load(path, weights_only=True)
    for name in ("t_range", "accumulate", "checkpointing", "compile"):
        del checkpoint["config"][name]
    torch.save(checkpoint, path)
    go("--stage", "small", "--data", data, "--out", copy, *TINY, "--steps", 6, "--resume", "--t-range", "full")
    assert load_stage(copy / "small", "small")["step"] == 6


# --- memory: the same steps in another way ---

def test_micro_batches_are_the_same_step(data, tmp_path, monkeypatch, unclipped, capsys):
    sizes, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda net, x_start, *rest: sizes.append(len(x_start)) or loss(net, x_start, *rest))
    flags = ["--stage", "small", "--data", data, *TINY, "--batch-size", 4]
    go(*flags, "--out", tmp_path / "whole")
    go(*flags, "--out", tmp_path / "parts", "--steps", 2, "--accumulate", 4)
    go(*flags, "--out", tmp_path / "parts", "--accumulate", 2, "--resume")
    assert sizes == [4] * 4 + [1] * 8 + [2] * 4
    assert_same(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ValueError, match="--batch-size 4 does not divide into 3 equal parts .* use a multiple of 3, like 6"):
        go(*flags, "--out", tmp_path / "thirds", "--accumulate", 3)
    with pytest.raises(ValueError, match="does not divide into 3 .* a resumed run keeps its batch size"):
        go(*flags, "--out", tmp_path / "whole", "--accumulate", 3, "--resume", "--steps", 6)
    with pytest.raises(SystemExit):
        train.parse_args(["--stage", "small", "--batch-size", "many"])
    assert "'many' is neither a number nor auto" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["large", "small"])
def test_checkpointing_computes_blocks_twice_and_changes_nothing(data, trained, tmp_path, monkeypatch, stage):
    calls, forward = [], train.Block.forward
    monkeypatch.setattr(train.Block, "forward", lambda self, x, emb: calls.append(torch.is_grad_enabled()) or forward(self, x, emb))
    flags = ["--stage", stage, "--data", data, *TINY]
    counts = []
    for name, extra in {"plain": [], "again": ["--checkpointing"]}.items():
        calls.clear()
        go(*flags, "--out", tmp_path / name, *extra)
        counts.append(sum(calls))                                   # not those of the previews
    assert counts[1] == 2 * counts[0]
    plain, again = (load_stage(tmp_path / name / stage, stage) for name in ("plain", "again"))
    for part in ("model", "ema"):
        assert plain[part].keys() == again[part].keys() and all(torch.equal(value, again[part][key]) for key, value in plain[part].items())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_the_same(data, tmp_path, monkeypatch, unclipped):
    network = dict(channels=4, multipliers=(1,), num_res_blocks=1, attention_levels=(), middle=False)       # compiles in seconds
    monkeypatch.setitem(train.PRESETS["tiny"], "small", network)
    flags = ["--stage", "small", "--data", data, *TINY]
    go(*flags, "--out", tmp_path / "eager")
    compiled = torch._dynamo.utils.counters
    compiled.clear()
    go(*flags, "--out", tmp_path / "compiled", "--compile")
    assert compiled["stats"]["unique_graphs"] == 1                  # whole, and once: no graph break, no compilation per step
    assert_same(tmp_path / "compiled", tmp_path / "eager")


def test_compile_without_a_compiler_is_a_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs a C"):
        go("--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY, "--compile")


@pytest.mark.parametrize("room, batch_size", [(1, 1), (5, 4), (8, 8), (100, 64)])
def test_the_largest_batch_that_fits(room, batch_size):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError
    assert train.largest_batch(attempt) == batch_size and tried[-1] == 2 * batch_size


def test_batch_size_auto_is_stored_and_kept_on_resume(data, tmp_path, monkeypatch):
    def full(size):
        raise torch.OutOfMemoryError
    with pytest.raises(ValueError, match="not even one image fits"):
        train.largest_batch(full)
    flags = ["--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY, "--batch-size", "auto", "--accumulate", 2]
    with pytest.raises(ValueError, match="--batch-size auto tries out the memory of a CUDA device, but the device is cpu; give a number"):
        go(*flags)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(train, "probe_batch", lambda *arguments: 3)
    go(*flags)
    assert load_stage(tmp_path / "run/small", "small")["config"]["batch_size"] == 6
    monkeypatch.setattr(train, "probe_batch", lambda *arguments: 99)
    go(*flags, "--resume", "--steps", 6)
    assert load_stage(tmp_path / "run/small", "small")["config"]["batch_size"] == 6


# --- several processes ---

WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
torch.nn.utils.clip_grad_norm_ = lambda parameters, max_norm: torch.zeros(())
if train.world()[0] > 0:                # only the first process writes
    train.write_json = train.save_stage = train.write_image = None
loss, calls = train.training_loss, []

def faulty(*arguments):
    calls.append(0)
    fault = {fault!r} if train.world()[0] == 1 and len(calls) == {call} else None
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*arguments) * (float("nan") if fault == "nan" else 1)

train.training_loss = faulty
train.run_main(train.main)
"""


def torchrun(script, *flags):
    """Two processes on this machine; the finished process of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def worker(tmp_path, fault, call):
    """train.py without clipping, whose second process has a fault at that call of the loss."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), fault=fault, call=call))
    return tmp_path / "worker.py"


def test_two_processes_are_one(data, tmp_path):
    flags = ["--stage", "small", "--data", data, *TINY, "--batch-size", 4, "--augment", "flip,turn,crop"]
    go(*flags, "--out", tmp_path / "one")
    result = torchrun("train.py", *flags, "--out", tmp_path / "two", "--accumulate", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("next: python train.py") == 1 and result.stdout.count("layout") == 1
    config = assert_same(tmp_path / "two", tmp_path / "one")["config"]
    assert config["batch_size"] == 4 and config == json.loads((tmp_path / "two/small/config.json").read_text())
    one, two = (list(csv.DictReader((tmp_path / name / "small/log.csv").open())) for name in ("one", "two"))
    assert len(two) == len(one) == 2
    for row, wanted in zip(two, one):
        assert row["step"] == wanted["step"] and row["lr"] == wanted["lr"]
        for name in ("loss", *train.QUARTERS):
            assert bool(row[name]) == bool(wanted[name]) and float(row[name] or 0) == pytest.approx(float(wanted[name] or 0), abs=2e-6)


def test_a_run_survives_a_killed_process_and_goes_on_with_fewer_or_more(data, tmp_path, unclipped):
    flags = ["--stage", "small", "--data", data, *TINY, "--batch-size", 4]
    go(*flags, "--out", tmp_path / "whole", "--steps", 8)
    go(*flags, "--out", tmp_path / "run", "--steps", 2)
    result = torchrun(worker(tmp_path, "kill", 4), *flags, "--out", tmp_path / "run", "--steps", 8, "--resume")
    assert result.returncode != 0 and "SIGKILL" in result.stderr
    assert load_stage(tmp_path / "run/small", "small")["step"] == 4
    go(*flags, "--out", tmp_path / "run", "--steps", 8, "--resume")
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert [row["step"] for row in csv.DictReader((tmp_path / "run/small/log.csv").open())] == ["2", "4", "6", "8"]


def test_a_broken_loss_of_one_process_stops_all(data, tmp_path):
    result = torchrun(worker(tmp_path, "nan", 4), "--stage", "small", "--data", data, *TINY, "--out", tmp_path / "run")
    assert result.returncode != 0 and result.stderr.count("error: the loss is nan at step 4") == 2, result.stderr
    assert [p.name for p in checkpoints(tmp_path / "run/small")] == ["step_000002.pt"]


def test_an_image_is_augmented_alike_in_any_share(data):
    from datasets import open_dataset
    dataset = open_dataset(data, (16, 16))
    (images, masks), = train.batches(dataset, 3, 4, 6, 0, torch.device("cpu"))
    (half, half_masks), = train.batches(dataset, 3, 4, 6, 0, torch.device("cpu"), slice(4, 6))
    assert torch.equal(half, images[4:]) and torch.equal(half_masks, masks[4:])
    images, masks = train.augment_each(images, masks, ["flip", "crop"], 0, 3, 0)
    half, half_masks = train.augment_each(half, half_masks, ["flip", "crop"], 0, 3, 4)
    assert torch.equal(half, images[4:]) and torch.equal(half_masks, masks[4:])


def test_the_next_command_keeps_the_flags(data, tmp_path, capsys):
    go("--stage", "small", "--data", data, "--out", tmp_path / "run", *TINY, "--target", "v")
    following = capsys.readouterr().out.split("next: python train.py ")[1].split()
    args = train.parse_args(following)
    assert (args.stage, args.size, args.data, args.out, args.target) == ("large", [16, 16], str(data), str(tmp_path / "run"), "v")


def test_only_good_products_cannot_be_trained_on(tmp_path):
    make_data(tmp_path / "good", kinds=("good",))
    with pytest.raises(ValueError, match="only products without defects"):
        go("--stage", "large", "--data", tmp_path / "good", "--out", tmp_path / "run", *TINY)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    loss = train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: loss(*a) * (float("nan") if seen.append(0) or len(seen) > 2 else 1))
    seen = []
    with pytest.raises(ValueError, match="loss is nan at step 4"):
        go("--stage", "large", "--data", data, "--out", tmp_path / "run", *TINY)
    assert [p.name for p in checkpoints(tmp_path / "run/large")] == ["step_000002.pt"]


def test_errors_reach_the_user_without_a_traceback(tmp_path):
    result = run("train.py", "--stage", "large", "--data", tmp_path / "nowhere")
    assert result.returncode == 2 and "Traceback" not in result.stderr and "no such folder" in result.stderr


def test_a_checkpoint_with_another_memory_layout_resumes_the_same(data, tmp_path):
    flags = ["--stage", "small", "--data", data, *TINY]             # fused AdamW reads weights and averages in the order of memory
    go(*flags, "--out", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = checkpoints(tmp_path / "b/small")[-1]
    checkpoint = torch.load(path, weights_only=True)
    averages = [state[name] for state in checkpoint["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert not all(value.is_contiguous() for value in averages)     # saved channels last
    for state in checkpoint["optimizer"]["state"].values():
        state.update({name: state[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    torch.save(checkpoint, path)
    for name in "ab":
        go(*flags, "--out", tmp_path / name, "--steps", 8, "--resume")
    assert_same(tmp_path / "a", tmp_path / "b", atol=0)


def test_keep_says_how_many_checkpoints_stay(data, tmp_path):
    train.train(train.parse_args(["--stage", "small", "--data", str(data), "--out", str(tmp_path), *TINY, "--steps", "5", "--save-every", "1", "--keep", "3"]))
    assert [path.name for path in checkpoints(tmp_path / "small")] == ["step_000003.pt", "step_000004.pt", "step_000005.pt"]


def test_norm_is_kept_in_the_checkpoint_and_on_resume(data, tmp_path):
    flags = ["--stage", "small", "--data", str(data), "--out", str(tmp_path), *TINY, "--norm", "local"]
    train.train(train.parse_args(flags))
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in train.UNet(**load_stage(tmp_path / "small", "small")["network"]).modules())
    with pytest.raises(ValueError, match="norm was local and is group"):
        train.train(train.parse_args([*flags[:-2], "--resume", "--steps", "6"]))
