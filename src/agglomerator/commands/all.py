"""`--mode=all`: stage one, stage two and test in turn."""

from agglomerator.commands.evaluate import test
from agglomerator.commands.report import how_to_go_on
from agglomerator.commands.train import done_before, train
from agglomerator.plan import complete_from_checkpoint
from agglomerator.runs import checkpoints
from agglomerator.runs.folder import RunFolder
from agglomerator.runs.resume import Stopped
from agglomerator.util import distributed
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say


def run_all(settings, given):
    """Stage one, stage two from its best checkpoint, test, with a picture of the islands; with
    --resume_training from where this was stopped."""
    if settings.load_checkpoint_dir is not None:  # the name of the run may follow from it
        start = checkpoints.read(settings.load_checkpoint_dir)
        settings = complete_from_checkpoint(settings, given, start)
    try:
        say("Stage one: contrastive pre-training")
        stage_one = settings.replace(supervise=False, finetune=False)
        best = done_before(stage_one) or train(stage_one, given, advise=False)
        say("Stage two: the classifier")
        stage_two = settings.replace(supervise=True)
        last = RunFolder(stage_two).last
        resume = settings.resume_training and last.is_file() and began_from(last, best)
        start = last if resume else best
        stage_two = stage_two.replace(resume_training=resume, load_checkpoint_dir=str(start))
        best = done_before(stage_two) or train(stage_two, given, advise=False)
    except Stopped as stopped:
        stopped.go_on = how_to_go_on(settings)
        raise
    distributed.leave_process_group()
    say("Test")
    test(settings.replace(plot_islands=True, load_checkpoint_dir=str(best)), given)


def began_from(path, start):
    """Whether the training of one checkpoint began from the weights of another."""
    weights = checkpoints.read(start).weights
    try:
        return checkpoints.read(path).began_from == checkpoints.fingerprint(weights)
    except UserError:
        if path.is_file():
            raise
        return False  # another process has found so, and moved it
