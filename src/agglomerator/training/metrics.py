"""The metrics of a run, which add up over batches: losses, accuracies, class means, islands,
the class of each image."""

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from agglomerator.islands.scores import IslandScores, PositionShare


class ClassMeans(Metric):
    """The mean embedding of each class, brought to unit length.

    Args:
        n_classes: number of classes.
        width: of an embedding, contr_dim.
    """

    full_state_update = False

    def __init__(self, n_classes, width):
        super().__init__()
        self.add_state("sums", torch.zeros(n_classes, width), dist_reduce_fx="sum")

    def update(self, embedding, labels):
        """Add embeddings (N, width) to the sums of their classes, labels (N,)."""
        self.sums.index_add_(0, labels.to(self.sums.device), embedding.detach().to(self.sums))

    def compute(self):
        """Return (n_classes, width), rows of unit length, or 0 for a class without images."""
        return F.normalize(self.sums, dim=-1)


class Predictions(Metric):
    """The most probable class of each image, in data-set order, whatever the order of the batches.

    Args:
        n_images: of the data set. Each comes once, or not at all.

    Example:
        >>> import torch
        >>> predictions = Predictions(9)
        >>> predictions.update(torch.tensor([7, 3]), torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
        >>> predictions.compute()
        (tensor([3, 7]), tensor([0, 1]), tensor([1.0000, 0.7500]))
    """

    full_state_update = False

    def __init__(self, n_images):
        super().__init__()
        self.add_state("probability", torch.zeros(n_images), dist_reduce_fx="sum")
        zeros = torch.zeros(n_images, dtype=torch.int64)
        self.add_state("predicted", zeros, dist_reduce_fx="sum")
        self.add_state("came", zeros.clone(), dist_reduce_fx="sum")

    def update(self, rows, probabilities):
        """Take in probabilities (B, n_classes) of images with indices (B,) in the data set."""
        self.probability[rows], self.predicted[rows] = probabilities.float().max(1)
        self.came[rows] = 1

    def compute(self):
        """Indices of the images that came, their classes and probabilities, each (N,), on the
        CPU."""
        rows = self.came.cpu().nonzero()[:, 0]
        return rows, self.predicted.cpu()[rows], self.probability.cpu()[rows]


def in_top5(logits, labels):
    """Which labels (B,) are among the five greatest of logits (B, n_classes), as 0 or 1: none whose
    logit is -inf, of a class without a mean."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return (best.any(1) & logits.gather(1, labels[:, None])[:, 0].isfinite()).float()


class RunMetrics(nn.Module):
    """All metrics of a run.

    They stay in float32 when the network is converted to 16 bits: in bfloat16, sums over a
    thousand steps are wrong by a factor.

    Args:
        n_classes: number of classes of the data set.
        width: of an embedding.
        levels: K, of a column.
    """

    def __init__(self, n_classes, width, levels):
        super().__init__()

        def mean():
            return MeanMetric(nan_strategy="disable")

        def accuracy():
            return MulticlassAccuracy(n_classes, average="micro", validate_args=False)

        self.class_means = ClassMeans(n_classes, width)
        self.train_loss, self.train_accuracy, self.train_agreement = mean(), accuracy(), mean()
        # Lightning's own mean over processes is wrong where some have fewer images than others.
        self.val_loss, self.val_accuracy = mean(), accuracy()
        self.test_loss, self.top5 = mean(), mean()
        self.confusion = MulticlassConfusionMatrix(n_classes, validate_args=False)
        self.islands, self.position = IslandScores(levels), PositionShare()

    def _apply(self, fn, recurse=True):
        # `fn` may change the type and the device of a tensor; follow it to the device alone.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def of_epoch(self):
        """The metrics of a training epoch, which start anew with each."""
        return self.class_means, self.train_loss, self.train_accuracy, self.train_agreement

    def sums_of_epoch(self):
        """The sums of a training epoch, as pairs of a metric and the name of its state."""
        return [(metric, name) for metric in self.of_epoch() for name in metric.metric_state]

    def take_up(self, sums, rank, processes):
        """Go on with the sums of an interrupted epoch.

        Args:
            sums: a tensor for each of `sums_of_epoch`, with those of all processes before.
            rank: of this process.
            processes: how many there are now.

        Raises:
            ValueError: a tensor does not fit.
        """
        for (metric, name), of_processes in zip(self.sums_of_epoch(), sums, strict=False):
            own = getattr(metric, name)
            if of_processes.shape[1:] != own.shape or not of_processes.is_contiguous():
                raise ValueError(f"epoch_so_far: no {tuple(own.shape)} a process for {name}")
            if len(of_processes) == processes:
                mine = of_processes[rank]
            else:
                mine = of_processes.sum(0) * (rank == 0)
            setattr(metric, name, mine.to(own))
