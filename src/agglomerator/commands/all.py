"""`--mode=all`: stage one, stage two and test in turn."""

from agglomerator.commands.evaluate import test
from agglomerator.commands.report import how_to_go_on
from agglomerator.commands.train import done_before, train
from agglomerator.data import registry
from agglomerator.plan import complete_from_checkpoint, stage_one, stage_two
from agglomerator.runs.checkpoints import read
from agglomerator.runs.signals import Stopped
from agglomerator.training.length import complete_from_images
from agglomerator.util import distributed
from agglomerator.util.terminal import say


def run_all(settings, given):
    """Stage one, stage two from its best checkpoint, test, with a picture of the islands; with
    --resume_training from where this was stopped."""
    start = None
    if settings.load_checkpoint_dir is not None:  # the name of the run may follow from it
        start = read(settings.load_checkpoint_dir)
        settings = complete_from_checkpoint(settings, given, start)
    settings = complete_from_images(settings, given, start)
    try:
        registry.classes_of(settings.replace(supervise=True))  # of which stage two needs some
        registry.check_test(settings)
        one = stage_one(settings)
        say(f"Stage one: {one.stage} pre-training")
        best = done_before(one, given) or train(one, given, advise=False)
        say("Stage two: the classifier")
        two = stage_two(settings, best)
        best = done_before(two, given) or train(two, given, advise=False)
    except Stopped as stopped:
        stopped.go_on = how_to_go_on(settings)
        raise
    distributed.leave_process_group()
    say("Test")
    test(settings.replace(plot_islands=True, load_checkpoint_dir=str(best)), given)
