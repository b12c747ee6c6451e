"""Runs that are killed and gone on with end as if nothing had happened."""

import json
import math
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    contents,
    rows,
    run_main,
    run_program,
    run_words,
    same_weights,
    slow,
    small_run,
    steps_done,
    wait_until,
    weights,
)
from PIL import Image

from agglomerator.commands import report
from agglomerator.config import Settings
from agglomerator.hierarchy import figures
from agglomerator.runs import record
from agglomerator.runs.folder import RunFolder
from agglomerator.runs.metrics_file import keep_metrics

SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM] * 2 + [signal.SIGINT, signal.SIGUSR1]
STAGES = {"contrastive": "", "supervised": "supervised_"}


def start(words, program=("src/main.py",), **options):
    """Start the program with these flags; its output goes nowhere until it ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, text=True, **pipes,
    )  # fmt: skip


def with_fault(fault):
    """The program with a few lines of Python that run before it and bring the fault about."""
    lines = f"import os, signal, sys; sys.path.insert(0, 'src')\n{fault}"
    return "-c", f"{lines}\nimport main\nmain.app.run(main.main, flags_parser=main.parse)"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    flags = [*SMALL, "--mode=all", "--exp_name=run", "--accumulate=2", "--max_epochs=4"]
    flags += ["--lr_speed=4", "--supervised_epochs=8", "--validate_every=2"]
    run_program(*flags, f"--output_dir={tmp_path / 'whole'}")
    whole, folder = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    total = steps_done(whole)[0]  # 18 steps an epoch
    assert total == 12 * 18

    generator = random.Random(6)
    signals = generator.sample(SIGNALS, len(SIGNALS))
    targets = sorted(generator.sample(range(1, int(0.8 * total)), len(signals)))
    flags += [f"--output_dir={tmp_path / 'parts'}", "--checkpoint_every=0.002"]
    words, middles = flags, 0
    for signum, target in zip(signals, targets, strict=True):
        before = steps_done(folder)[0]
        process = start(words)
        wait_until(lambda: steps_done(folder)[0] >= max(target, before + 1), process)  # noqa: B023
        time.sleep(generator.uniform(0, 0.15))
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=60)
        assert "Traceback" not in stderr, stderr
        words = [*flags, "--resume_training"]
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
        else:
            assert process.returncode == 128 + signum, stdout + stderr
            (line,) = (line for line in stdout.splitlines() if line.startswith("Stopped"))
            assert line.startswith(f"Stopped by {signum.name}. Go on by: ")
            words = shlex.split(line.partition("Go on by: ")[2])[2:]
        middles += steps_done(folder)[1]
    assert middles >= 3
    run_program(*words)

    for stage, prefix in STAGES.items():
        assert rows(folder, stage) == rows(whole, stage)
        for name in ("best", "last"):
            path = f"checkpoints/{prefix}{name}.ckpt"
            assert same_weights(folder / path, whole / path)
    figures = [json.loads((run / "test_supervised.json").read_text()) for run in (folder, whole)]
    assert figures[0] | {"checkpoint": ""} == figures[1] | {"checkpoint": ""}

    parts = json.loads((folder / "run.json").read_text())
    parts += json.loads((folder / "supervised_run.json").read_text())
    outcomes = [part["outcome"] for part in parts]
    # A signal may have come between the stages.
    assert len(signals) <= len(outcomes) <= len(signals) + 2
    assert 0 < outcomes.count(None) <= signals.count(signal.SIGKILL)
    assert 0 < outcomes.count("stopped by SIGTERM") <= signals.count(signal.SIGTERM)
    assert outcomes.count("finished") == 2
    names = {"command", "seed", "git", "machine", "python", "packages", "flags", "started", "ended"}
    assert all(names < part.keys() for part in parts)
    assert parts[0]["packages"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.slow
def test_a_full_disk_costs_nothing_and_is_told_in_one_line(tmp_path):
    flags = *SMALL, "--exp_name=full", "--max_epochs=2", "--lr_speed=2", "--limit_train=6"
    small_run(tmp_path, *flags[len(SMALL) :])
    folder = tmp_path / "full"
    kept = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    size = max(map(len, kept.values()))

    words = [*flags, f"--output_dir={tmp_path}", "--max_epochs=3", "--resume_training"]
    done = run_program(*words, ok=False, limits={resource.RLIMIT_FSIZE: size // 2})
    assert done.status == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "best.ckpt" in done.stderr or "last.ckpt" in done.stderr
    assert "Go on by: " in done.stdout
    assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == kept
    assert json.loads((folder / "run.json").read_text())[-1]["outcome"]

    run_main(*words)
    assert [row["epoch"] for row in rows(folder, "contrastive") if row["val_loss"]] == [
        "0",
        "1",
        "2",
    ]


SIGNAL_AT_THE_END = """
from agglomerator.runs.checkpoint_callbacks import LastCheckpoint
end = LastCheckpoint.on_train_end
def with_signal(self, *words):
    end(self, *words)
    os.kill(os.getpid(), signal.SIGTERM)
LastCheckpoint.on_train_end = with_signal
"""


@pytest.mark.slow
def test_a_signal_after_the_last_step_of_stage_one_ends_the_run_there(tmp_path):
    flags = [*SMALL, "--mode=all", "--exp_name=end", f"--output_dir={tmp_path}"]
    flags += ["--max_epochs=1", "--limit_train=2", "--limit_test=1"]
    process = start(flags, with_fault(SIGNAL_AT_THE_END))
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    (line,) = (line for line in stdout.splitlines() if line.startswith("Stopped"))
    assert not stderr and not (tmp_path / "end" / "checkpoints" / "supervised_last.ckpt").exists()
    assert " --resume_training --mode=all" in line
    result = run_main(*flags, "--resume_training")
    assert result.stdout.count("training: ") == 1 and "top-1" in result.stdout


@pytest.mark.slow
def test_muon_goes_on_as_if_it_had_not_stopped(tmp_path):
    flags = "--exp_name=muon", "--optimizer=muon", "--lr_speed=2", "--limit_train=4"
    small_run(tmp_path / "whole", *flags, "--max_epochs=2")
    small_run(tmp_path, *flags, "--max_epochs=1")
    going_on = "--max_epochs=2", "--resume_training"
    small_run(tmp_path, *flags, *going_on, program=run_program)
    last = "muon/checkpoints/last.ckpt"
    assert same_weights(tmp_path / last, tmp_path / "whole" / last)


def test_a_job_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    flags = "--exp_name=new", "--max_epochs=1", "--limit_train=2", "--resume_training"
    result = small_run(tmp_path, *flags)
    last = tmp_path / "new" / "checkpoints" / "last.ckpt"
    assert f"there is no {last} yet; begins from the start" in result.stdout
    assert last.is_file()


def test_going_on_from_before_the_end_keeps_what_was_later(tmp_path):
    flags = "--exp_name=back", "--limit_train=4", "--limit_val=2", "--lr_speed=3"
    folder = tmp_path / "back"
    best, last = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    small_run(tmp_path, *flags, "--max_epochs=1")
    early = best.read_bytes()
    small_run(tmp_path, *flags, "--max_epochs=3", "--resume_training")
    late, all_rows = last.read_bytes(), rows(folder, "contrastive")
    best.write_bytes(early)  # as if the first epoch had been the best
    going_on = "--resume_training", f"--load_checkpoint_dir={best}"
    result = small_run(tmp_path, *flags, "--max_epochs=3", *going_on)
    (kept,) = (folder / "earlier").iterdir()
    assert f"is kept in {kept}" in result.stdout
    kept_last = kept / "checkpoints" / "last.ckpt"
    assert kept_last.read_bytes() == late and same_weights(kept_last, last)
    assert rows(folder, "contrastive") == rows(kept, "contrastive") == all_rows

    before = last.read_bytes()
    message = run_main(
        *SMALL, f"--output_dir={tmp_path}", *flags, "--max_epochs=9", "--resume_training",
        "--optimizer=muon", ok=False,
    ).stderr  # fmt: skip
    assert message.startswith("error: --optimizer=muon: ") and message.count("\n") == 1
    assert last.read_bytes() == before and rows(folder, "contrastive") == all_rows


@pytest.mark.slow
def test_a_run_begun_on_an_apple_gpu_goes_on_here(tmp_path):
    flags = "--exp_name=mps", "--limit_train=3", "--limit_val=1", "--lr_speed=2"
    small_run(tmp_path / "whole", *flags, "--max_epochs=2")
    small_run(tmp_path, *flags, "--max_epochs=1")
    last = tmp_path / "mps" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        group["fused"] = False  # which that device has not
    torch.save(content, last)
    small_run(tmp_path, *flags, "--max_epochs=2", "--resume_training")
    assert same_weights(last, tmp_path / "whole" / "mps" / "checkpoints" / "last.ckpt")


def test_weights_alone_are_refused_before_anything_is_moved(stage_one_checkpoint, tmp_path):
    folder = shutil.copytree(stage_one_checkpoint.parents[1], tmp_path / "small")
    whole = torch.load(stage_one_checkpoint, weights_only=True)
    names = "state_dict", "hyper_parameters", "epoch", "global_step", "pytorch-lightning_version"
    torch.save({name: whole[name] for name in names}, tmp_path / "weights.ckpt")
    flags = *SMALL, "--exp_name=small", f"--output_dir={tmp_path}", "--max_epochs=9"
    going_on = "--resume_training", f"--load_checkpoint_dir={tmp_path / 'weights.ckpt'}"
    message = run_main(*flags, *going_on, ok=False).stderr
    assert message.startswith("error: --resume_training: ") and message.count("\n") == 1
    assert "weights alone" in message and not (folder / "earlier").exists()


@pytest.mark.slow
def test_stage_two_goes_on_only_with_its_own_stage_one(tmp_path):
    flags = "--exp_name=all", "--max_epochs=1", "--limit_train=2", "--limit_test=1"
    folder = tmp_path / "all"
    best, last = (folder / "checkpoints" / name for name in ("best.ckpt", "supervised_last.ckpt"))
    small_run(tmp_path, *flags, "--mode=all")
    os.utime(last, (1, 1))  # times tell nothing: files are copied
    result = small_run(tmp_path, *flags, "--mode=all", "--resume_training")
    assert result.stdout.count("It is done: ") == 2
    small_run(tmp_path, *flags, "--seed=1")
    os.utime(last)
    result = small_run(tmp_path, *flags, "--mode=all", "--resume_training")
    assert result.stdout.count("It is done: ") == 1
    one, two = weights(best), weights(last)
    assert all(torch.equal(one[n], two[n]) for n in one if "classification" not in n)


def test_a_finished_job_says_so_and_what_comes_next(tmp_path, stage_one_checkpoint):
    words = [*SMALL, "--exp_name=done", f"--output_dir={tmp_path}", "--limit_train=2"]
    words += ["--supervise", "--supervised_epochs=1", "--supervised_learning_rate=0.01"]
    last = tmp_path / "done" / "checkpoints" / "supervised_last.ckpt"
    run_words(*words, f"--load_checkpoint_dir={stage_one_checkpoint}")
    before = contents(tmp_path)
    said, following = run_words(*words, "--resume_training").splitlines()
    assert said.startswith(f"It is done: {last} has done 1 epochs; ")
    assert "more than --supervised_epochs=1" in said
    best = last.with_name("supervised_best.ckpt")
    assert following.endswith(f"--supervise --load_checkpoint_dir={best} --mode=test")
    assert contents(tmp_path) == before
    changed = "--resume_training", "--supervised_learning_rate=0.5", "--patch_dim=32", "--seed=42"
    _, width, rate, _ = run_words(*words, *changed).splitlines()
    start = f"{last} was trained with"
    assert width.startswith(f"--patch_dim=32: {start} 16; ")
    assert rate.startswith(f"--supervised_learning_rate=0.5: {start} 0.01; ")
    assert contents(tmp_path) == before

    words += ["--resume_training", "--supervised_epochs=2", "--supervised_learning_rate=0.5"]
    said = run_words(*words)
    assert "--supervised_learning_rate: the resumed run keeps 0.01." in said
    assert "learning rate up to 0.01" in said and "minutes since it went on" in said
    stored = torch.load(last, weights_only=True)["hyper_parameters"]
    assert stored["learning_rate"] == stored["supervised_learning_rate"] == 0.01
    text = (tmp_path / "done" / "supervised_flags.cfg").read_text()
    assert "--learning_rate=0.01\n" in text and "--supervised_learning_rate=0.01\n" in text


@pytest.mark.slow
def test_an_unnamed_run_is_called_as_the_data_set_of_its_checkpoint(stage_one_checkpoint, tmp_path):
    words = ["--logger=none", f"--output_dir={tmp_path}", "--limit_train=2", "--limit_test=1"]
    words += [f"--load_checkpoint_dir={stage_one_checkpoint}", "--batch_size=32", "--max_epochs=1"]
    said = run_words(*words, "--mode=all")
    assert "top-1" in said and [path.name for path in tmp_path.iterdir()] == ["digits"]
    said = run_words(*words, "--mode=all", "--resume_training")
    assert said.count("It is done: ") == 2
    said = run_words(*words, "--supervise", "--resume_training")
    assert f"moved to {tmp_path / 'digits' / 'earlier'}" in said
    (line,) = (line for line in said.splitlines() if line.startswith("Next: "))
    assert "--exp_name=digits" in line and [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    "where, what",
    [
        ("closed pipe", "--help"),
        ("/dev/full", "--help"),
        ("nowhere", "--help"),
        slow("closed pipe", "--max_epochs=1"),
        slow("/dev/full", "--max_epochs=1"),
        slow("nowhere", "--max_epochs=1"),
    ],
)
def test_output_that_nobody_takes_costs_nothing(tmp_path, where, what):
    flags = *SMALL, "--exp_name=mute", f"--output_dir={tmp_path}", "--limit_train=2", what
    if where == "closed pipe":
        process = start(flags)
        process.stdout.close()
        process.stdout = None
    elif where == "nowhere":
        process = start(flags, stdout=None, preexec_fn=lambda: os.close(1))
    else:
        with open(where, "w") as full:
            process = start(flags, stdout=full)
    stderr = process.communicate(timeout=100)[1]
    assert process.returncode == 0 and not stderr
    last = tmp_path / "mute" / "checkpoints" / "last.ckpt"
    assert last.is_file() == (what != "--help")


LOST_WORKER = """
import multiprocessing, threading, time
from agglomerator.data.sets import folder
folder.MEMORY_SHARE = 0  # images are read when they are needed
def kill():
    while not multiprocessing.active_children():
        time.sleep(0.01)
    multiprocessing.active_children()[0].kill()
threading.Thread(target=kill, daemon=True).start()
"""


@pytest.mark.slow
def test_a_lost_process_that_reads_images_is_told_in_one_line(tmp_path):
    for split, name in ((s, n) for s in ("train", "test") for n in ("a", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(40):
            Image.new("L", (16, 16), i).save(tmp_path / split / name / f"{i}.png")
    flags = [*SMALL, "--dataset=ImageFolder", f"--data_dir={tmp_path}", "--exp_name=lost"]
    flags += [f"--output_dir={tmp_path / 'output'}", "--num_workers=2", "--max_epochs=1000"]
    process = start(flags, with_fault(LOST_WORKER))
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 2, stderr
    assert stderr.startswith("error: --num_workers=2: ") and stderr.count("\n") == 1, stderr
    assert "Stopped. " in stdout


@pytest.mark.slow
def test_two_runs_of_one_name_at_once_do_not_meet(tmp_path):
    flags = [*SMALL, "--exp_name=one", f"--output_dir={tmp_path}", "--max_epochs=500"]
    first = start([*flags, "--checkpoint_every=0"])
    try:
        last = tmp_path / "one" / "checkpoints" / "last.ckpt"
        wait_until(last.is_file, first)
        message = run_main(*flags, "--max_epochs=1", ok=False).stderr
        assert message.startswith("error: --exp_name=one: ") and message.count("\n") == 1
        assert f"process {first.pid}" in message
        test = [*flags, "--mode=test", f"--load_checkpoint_dir={last}"]
        run_program(*test)  # a training does not keep others from looking
    finally:
        first.kill()
        first.communicate()
    steps = torch.load(last, weights_only=True)["global_step"]
    more = run_program(*flags, f"--max_epochs={steps // 35 + 2}", "--resume_training")
    assert "contrastive training: " in more.stdout
    kept = {path.name for path in (tmp_path / "one" / "earlier").rglob("*.*")}
    assert "test_contrastive.json" in kept  # of the network as it was
    assert not kept & {"last.ckpt", "run.json", "metrics.csv"}


@pytest.mark.parametrize("torn", ["", "0,0.5,1", "0,0.5,1,\x00", "1,0.5,12\n"])
def test_metrics_are_kept_up_to_a_step_whatever_the_last_line(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss,step\n0,0.25,9\n0,,9\n" + torn)
    keep_metrics(path, 10)
    assert path.read_text().split() == ["epoch,loss,step", "0,0.25,9", "0,,9"]
    path.write_text("epoch,lo")
    keep_metrics(path, 10)
    assert not path.exists()


def test_json_has_null_for_what_is_not_known(tmp_path):
    """NaN and Infinity, which Python would write, are no JSON."""
    unknown = {"a": np.nan, "b": [1.5, (np.float64("inf"), -math.inf)], "c": {"d": math.nan}}
    known = {"a": None, "b": [1.5, [None, None]], "c": {"d": None}}
    counts = [[1, 0], [0, 1]]
    shown = {"dataset": "digits", "top1": 1.0, "images": 2, "confusion_matrix": counts}
    folder = RunFolder(Settings(output_dir=str(tmp_path), exp_name="run", supervise=True))
    report.write_test(folder, unknown | shown, ["0", "1"])
    figures.write(folder, unknown, {})
    record.write(folder.path / "run.json", [unknown])
    wanted = {"test_supervised": known | shown, "embedding": known, "run": [known]}
    for name, content in wanted.items():
        assert json.loads(
            (folder.path / f"{name}.json").read_text(), parse_constant=pytest.fail
        ) == (content)


def test_the_best_checkpoint_stays_the_best(tmp_path):
    """Whatever the resumed run asks for, and however bad what it learns."""
    flags = "--exp_name=run", "--lr_speed=6", "--limit_train=8"
    one = small_run(tmp_path, *flags, "--max_epochs=3").stdout
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    before = best.read_bytes()
    spoil = torch.load(best.with_name("last.ckpt"), weights_only=True)
    spoil["state_dict"]["model.contrastive_head.10.weight"].zero_()
    torch.save(spoil, best.with_name("last.ckpt"))
    more = "--validate_every=2", "--monitor=val_loss", "--limit_train=1", "--resume_training"
    two = small_run(tmp_path, *flags, "--max_epochs=6", *more).stdout
    assert "--monitor: the resumed run keeps val_acc." in two
    assert best.read_bytes() == before
    assert [("val_acc" in line) for line in (one + two).splitlines() if line[:6] == "epoch "] == [
        True, True, True, True, False, True,
    ]  # fmt: skip
