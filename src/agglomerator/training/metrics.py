"""What adds up over the batches of a run: losses, accuracies, class means, islands."""

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from agglomerator.islands.scores import IslandScores


class ClassMeans(Metric):
    """Directions of the mean embedding of each class.

    Args:
        n_classes: number of classes.
        width: of an embedding.
    """

    full_state_update = False

    def __init__(self, n_classes, width):
        super().__init__()
        self.add_state("sums", torch.zeros(n_classes, width), dist_reduce_fx="sum")

    def update(self, embedding, labels):
        """Take in embeddings (N, width) with labels (N,)."""
        self.sums.index_add_(0, labels.to(self.sums.device), embedding.detach().to(self.sums))

    def compute(self):
        """(n_classes, width) of unit length; zero for a class without images."""
        return F.normalize(self.sums, dim=-1)


class RunMetrics(nn.Module):
    """All metrics of a run. They stay in float32 whatever the network is converted to: sums over
    a thousand steps in bfloat16 are wrong by a factor.

    Args:
        n_classes: number of classes of the data set.
        width: of an embedding.
        levels: of a column.
    """

    def __init__(self, n_classes, width, levels):
        super().__init__()

        def mean():
            return MeanMetric(nan_strategy="disable")

        def accuracy(top_k=1):
            return MulticlassAccuracy(n_classes, top_k, average="micro", validate_args=False)

        self.class_means = ClassMeans(n_classes, width)
        self.train_loss, self.train_accuracy, self.train_agreement = mean(), accuracy(), mean()
        # What Lightning makes of a mean over processes with unequal shares is not exact.
        self.val_loss, self.val_accuracy = mean(), accuracy()
        self.test_loss, self.top5 = mean(), accuracy(min(5, n_classes))
        self.confusion = MulticlassConfusionMatrix(n_classes, validate_args=False)
        self.islands = IslandScores(levels)

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def of_epoch(self):
        """The metrics of one training epoch."""
        return self.class_means, self.train_loss, self.train_accuracy, self.train_agreement

    def sums_of_epoch(self):
        """What adds up over a training epoch: pairs of a metric and the name of its state."""
        return [(metric, name) for metric in self.of_epoch() for name in metric.metric_state]
