import csv
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program, small_run, weights

PNG = b"\x89PNG\r\n\x1a\n"


def metrics(folder, stage="contrastive"):
    """Column name -> [(step, value)] of the run's metrics.csv."""
    with (folder / "logs" / stage / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        for name in rows[0]
    }


def changed(before, after):
    """Names of the tensors that differ, without their common prefix."""
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def epochs_said(result):
    return [int(number) for number in re.findall(r"^epoch (\d+)/", result.stdout, re.MULTILINE)]


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stage_one_says_how_it_went_and_what_comes_next(stage_one):
    assert epochs_said(stage_one) == [1, 2]
    for line in stage_one.stdout.splitlines():
        if line.startswith("epoch"):
            assert all(word in line for word in ("train_loss", "val_loss", "val_acc", "images/s"))
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "flags.cfg"):
        assert (stage_one.output / "small" / name).is_file()
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "metrics.csv"):
        assert name in stage_one.stdout
    assert "\nNext: " in stage_one.stdout


def test_metrics_are_written_without_any_logger(stage_one):
    found = metrics(stage_one.output / "small")
    for name in ("val_loss", "val_acc", "wl", "wBU", "wTD", "wA", "train_loss_epoch"):
        assert len(found[name]) == 2, name
    assert all(0 <= value <= 1 for _, value in found["val_acc"])
    assert "learning_rate" in found
    assert found["wl"] != [(step, 0.25) for step, _ in found["wl"]]


def test_schedule_counts_accumulated_batches_and_holds_its_last_value(stage_one):
    found = metrics(stage_one.output / "small")
    rates = dict(
        found["learning_rate"]
    )  # 1150 images: 35 batches of 32, so 12 steps of 3 batches an epoch
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=12)
    expected = []
    for _ in range(12):
        expected += schedule.get_last_lr()
        optimizer.step()
        if len(expected) < 12:
            schedule.step()
    assert max(rates) >= 12 > min(rates)
    for step, rate in rates.items():
        assert rate == pytest.approx(expected[min(step, 11)])


@pytest.mark.slow
def test_the_next_command_trains_the_classifier(stage_one, tmp_path):
    (line,) = (line for line in stage_one.stdout.splitlines() if line.startswith("Next: "))
    words = shlex.split(line.removeprefix("Next: "))
    found = ROOT / words[0] if "/" in words[0] else shutil.which(words[0])
    assert Path(found) == Path(sys.executable)
    assert words[1] == "src/main.py"
    before = everything_below(stage_one.output / "small" / "checkpoints")
    flags = [f"--output_dir={tmp_path}", "--max_epochs=1", "--limit_train=2", "--noplot_islands"]
    result = run_program(*words[2:], *flags)
    assert "supervised training: 1 epochs" in result.stdout
    assert (tmp_path / "small" / "checkpoints" / "supervised_best.ckpt").is_file()
    assert everything_below(stage_one.output / "small" / "checkpoints") == before


def test_stage_two_changes_the_classifier_alone(stage_one_checkpoint, stage_two):
    checkpoints = stage_two.output / "small" / "checkpoints"
    after = weights(checkpoints / "supervised_last.ckpt")
    names = changed(weights(stage_one_checkpoint), after)
    assert names == {name for name in after if "classification_head" in name}
    found = metrics(stage_two.output / "small", "supervised")
    assert {"train_acc", "val_acc", "val_loss"} <= found.keys()


def test_stage_two_is_the_same_with_resume_training(stage_one_checkpoint, stage_two, tmp_path):
    result = small_run(
        tmp_path,
        "--exp_name=small",
        "--max_epochs=2",
        "--lr_speed=2",
        "--limit_train=4",
        "--resume_training",
        "--supervise",
        f"--load_checkpoint_dir={stage_one_checkpoint}",
    )
    assert epochs_said(result) == [1, 2]
    name = "small/checkpoints/supervised_last.ckpt"
    assert not changed(weights(stage_two.output / name), weights(tmp_path / name))


def test_finetune_lets_everything_learn(stage_one_checkpoint, tmp_path):
    small_run(
        tmp_path,
        "--exp_name=small",
        "--max_epochs=1",
        "--limit_train=2",
        "--finetune",
        f"--load_checkpoint_dir={stage_one_checkpoint}",
    )
    after = weights(tmp_path / "small" / "checkpoints" / "finetuned_last.ckpt")
    assert changed(weights(stage_one_checkpoint), after) == set(after)


def test_a_run_goes_on_and_a_new_one_puts_the_earlier_aside(tmp_path):
    flags = "--exp_name=again", "--lr_speed=4", "--limit_train=12", "--limit_val=2"
    folder = tmp_path / "again"
    small_run(tmp_path, *flags, "--max_epochs=2")
    first, tested = metrics(folder), b"{}"
    (folder / "test_contrastive.json").write_bytes(tested)

    result = small_run(tmp_path, *flags, "--max_epochs=3", "--resume_training")
    assert epochs_said(result) == [3]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (2, 36)
    tracked = {int(v) for k, v in last["state_dict"].items() if "num_batches_tracked" in k}
    assert tracked == {36}  # it went on in training mode
    assert (
        f"The figures of the network as it was were moved to {folder / 'earlier'}" in result.stdout
    )
    (moved,) = everything_below(folder / "earlier").values()
    assert moved == tested and not (folder / "test_contrastive.json").exists()
    shutil.rmtree(folder / "earlier")
    found = metrics(folder)
    assert found["val_loss"][:2] == first["val_loss"]
    assert len(found["val_loss"]) == 3

    small_run(tmp_path / "whole", *flags, "--max_epochs=3")
    whole = weights(tmp_path / "whole" / "again" / "checkpoints" / "last.ckpt")
    assert not changed(whole, weights(folder / "checkpoints" / "last.ckpt"))

    before = everything_below(folder)
    result = small_run(tmp_path, *flags, "--max_epochs=3", "--resume_training")
    done, following = result.stdout.splitlines()
    assert done.startswith("It is done: ") and "has done 3 epochs; " in done
    best = folder / "checkpoints" / "best.ckpt"
    assert following.startswith("Next: ") and f"--load_checkpoint_dir={best}" in following
    assert everything_below(folder) == before

    kept = {path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    kept |= {(folder / n).read_bytes() for n in ("logs/contrastive/metrics.csv", "flags.cfg")}
    result = small_run(tmp_path, *flags, "--max_epochs=1")
    assert "moved to" in result.stdout
    assert kept <= set(everything_below(folder / "earlier").values())
    assert len(metrics(folder)["val_loss"]) == 1


def test_the_best_of_a_training_that_goes_on_elsewhere_is_kept(stage_one_checkpoint, tmp_path):
    """The first epochs are told to have been better than any can be."""
    checkpoints = tmp_path / "one"
    checkpoints.mkdir()
    best = shutil.copy(stage_one_checkpoint, checkpoints / "best.ckpt")
    content = torch.load(stage_one_checkpoint.with_name("last.ckpt"), weights_only=True)
    (state,) = (s for name, s in content["callbacks"].items() if name.startswith("BestCheckpoint"))
    state["best_model_score"] = torch.tensor(2.0)
    torch.save(content, checkpoints / "last.ckpt")
    flags = "--exp_name=two", "--max_epochs=3", "--limit_train=4", "--resume_training"
    result = small_run(tmp_path, *flags, f"--load_checkpoint_dir={checkpoints / 'last.ckpt'}")
    kept = tmp_path / "two" / "checkpoints" / "best.ckpt"
    assert f"The best so far, {best}, was copied to {kept}." in result.stdout
    assert kept.read_bytes() == best.read_bytes() and epochs_said(result) == [3]


def test_the_narrowest_blind_network_in_bfloat16_without_validation(tmp_path):
    flags = "--patch_dim=2", "--precision=bf16-true", "--limit_val=0", "--limit_train=2"
    flags += "--iters=1", "--max_epochs=1", "--plot_islands"
    result = small_run(tmp_path, "--exp_name=narrow", *flags)
    assert "the image reaches the top level of 2 only at state 2" in result.stdout
    assert "best        none: nothing was validated" in result.stdout
    folder = tmp_path / "narrow"
    last = folder / "checkpoints" / "last.ckpt"
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    best = shutil.copy(last, last.with_name("best.ckpt"))  # of an earlier training
    result = small_run(tmp_path, "--exp_name=narrow", *flags, f"--load_checkpoint_dir={best}")
    assert "best        none: nothing was validated" in result.stdout
    assert f"--load_checkpoint_dir={last}" in result.stdout.splitlines()[-1]
    small_run(
        tmp_path,
        "--exp_name=narrow",
        "--mode=test",
        "--patch_dim=2",
        "--limit_test=1",
        "--plot_islands",
        f"--load_checkpoint_dir={last}",
    )
    assert (folder / "islands" / "contrastive_test.png").read_bytes().startswith(PNG)


def test_mode_all_runs_both_stages_and_the_test(tmp_path):
    result = small_run(
        tmp_path,
        "--exp_name=all",
        "--mode=all",
        "--max_epochs=1",
        "--limit_train=4",
        "--supervised_epochs=2",
        "--limit_test=2",
        program=run_program,
    )
    assert epochs_said(result) == [1, 1, 2]
    assert "top-1" in result.stdout
    for name in ("best.ckpt", "last.ckpt", "supervised_best.ckpt", "supervised_last.ckpt"):
        assert (tmp_path / "all" / "checkpoints" / name).is_file()
    assert (tmp_path / "all" / "test_supervised.json").is_file()
    assert (tmp_path / "all" / "islands" / "supervised_test.png").read_bytes().startswith(PNG)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no compiler")
@pytest.mark.slow
def test_compiled_network_learns_and_its_checkpoint_is_like_any_other(tmp_path, stage_one):
    flags = "--compile", "--exp_name=compiled", "--iters=2", "--limit_train=2", "--limit_val=0"
    small_run(tmp_path, *flags, "--max_epochs=1", "--lr_speed=1")
    found = weights(tmp_path / "compiled" / "checkpoints" / "last.ckpt")
    other = weights(stage_one.output / "small" / "checkpoints" / "best.ckpt")
    assert changed(other, found) >= {
        "model.wl",
        "model.init_levels",
        "model.bottom_up.net.2.weight",
    }


def test_agreement_falls_where_it_is_asked_for(tmp_path):
    flags = "--exp_name=small", "--agreement=5", "--augmentation=mirror", "--max_epochs=3"
    network = "--local_consensus_radius=1", "--consensus_temperature=0.1", "--conv_image_size=8"
    small_run(tmp_path, *flags, *network, "--lr_speed=3", "--limit_train=10", "--limit_val=1")
    agreement = [value for _, value in metrics(tmp_path / "small")["train_agreement_epoch"]]
    assert len(agreement) == 3
    assert agreement[-1] < 0.8 * agreement[0]


def test_of_checkpoints_that_validation_finds_equal_the_latest_is_best(
    tmp_path, stage_one_checkpoint
):
    flags = "--supervise", f"--load_checkpoint_dir={stage_one_checkpoint}", "--limit_train=2"
    few = "--exp_name=equal", "--learning_rate=1e-12", "--max_epochs=3", "--lr_speed=3"
    small_run(tmp_path, *flags, *few)
    assert len({value for _, value in metrics(tmp_path / "equal", "supervised")["val_acc"]}) == 1
    path = tmp_path / "equal" / "checkpoints" / "supervised_best.ckpt"
    assert torch.load(path, weights_only=True)["epochs_done"] == 3
