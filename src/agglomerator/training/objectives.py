"""What stage one asks of a batch of images: contrast, and with it islands, or hidden pixels."""

import copy

import torch

from agglomerator.data.composites import compose
from agglomerator.training.losses.colour import agreement_loss
from agglomerator.training.losses.contrastive import prototype_loss, supervised_contrastive_loss
from agglomerator.training.losses.masked import hidden_pixel_loss, level_cosine_loss
from agglomerator.training.losses.pairs import unit_maps
from agglomerator.training.losses.pieces import composite_loss, taught_loss
from agglomerator.training.teacher import Teacher
from agglomerator.util.precision import upcast
from agglomerator.util.random import seeded_generator

PROTOTYPES = 4.0  # weight of their loss beside that of the views


class Contrast:
    """The supervised contrastive loss of two augmented views of every image, and with --agreement
    the loss that asks for islands. If that is of composites, the second view is the image's figure
    on another ground.

    With --prototypes the views are compared with the prototypes of the classes too. Then V, the
    number of views, is 1 instead of 2; with composites it stays 2.

    Args:
        model: the `Agglomerator`.
        settings: of the run.
        data: the `ImageDataModule` that makes views.
        own_classes: the prototypes are of the classes of the data.
    """

    def __init__(self, model, settings, data, own_classes=True):
        self.model, self.settings, self.data = model, settings, data
        self.own_classes = own_classes
        self.teacher = Teacher(copy.deepcopy(model).eval()) if settings.is_taught else None
        self._compiled = None

    def __call__(self, images, labels, generator, epoch=None, iters=None):
        """The loss of images (B, C, H, W) with labels (B,).

        Args:
            generator: of all draws, on the CPU.
            epoch: of the training; None in evaluation.
            iters: number of iterations of the column loop; None for that of the settings.

        Returns:
            The loss, embeddings (V B, contr_dim) of the views, and the part of the loss that asks
            for islands, before it is weighted, or None.
        """
        s, training = self.settings, epoch is not None
        # Evaluation always has two: of one, only images with another of their class would count.
        n_views = s.n_views if training else 2
        labels = labels.repeat(n_views)
        if s.composes:
            own = not training or epoch >= s.lr_speed / 3
            embedding, apart = self._composites(images, generator, own, iters)
            loss = self._loss(embedding, labels, training)
        else:
            views, islands = self._views(images, generator, n_views, training)
            compare = self.compare if self._compiled is None or not training else self._compiled
            loss, embedding, levels = compare(views, labels, training, iters)
            apart = None
            if islands is not None:
                apart = taught_loss(unit_maps(levels), islands, generator)
            elif s.agreement:
                apart = agreement_loss(levels, self.data.colours(views), generator)
        if apart is not None:
            loss = loss + s.agreement * apart
        return loss, embedding, apart

    def _views(self, images, generator, n_views, training):
        """The views of the images (V B, C, H, W), and their islands (V B, K, S, S) where a network
        teaches them, else None. In evaluation the network teaches itself."""
        repeated = images.repeat(n_views, 1, 1, 1)
        if not self.settings.is_taught:
            return self.data.augmented_view(repeated, generator), None
        teacher = self.teacher if training else Teacher(self.model)
        islands = teacher.islands(self.data.view(images)).repeat(n_views, 1, 1, 1)
        return self.data.labelled_view(repeated, islands, generator)

    def _composites(self, images, generator, own, iters):
        """Embeddings (2B, contr_dim) of a view of each image, and of its figure on the ground of
        another; and the loss of the islands in composites of the views."""
        views = self.data.augmented_view(images, generator)
        embedding, states = self.model.with_levels(views, iters)
        seen, colours = unit_maps(states.detach()), self.data.colours(views)
        made, pieces = compose(colours, seen, generator, own)
        of_composites, states = self.model.with_levels(self.data.view(made), iters)
        apart = composite_loss(unit_maps(states), pieces, generator)
        return torch.cat((embedding, of_composites[: len(images)])), apart

    def compare(self, views, labels, across=True, iters=None):
        """The contrastive loss of views (N, C, H, W) with labels (N,), their embeddings
        (N, contr_dim), and with --agreement the last state, else None, after `iters` iterations.
        With `across`, all processes share their embeddings."""
        levels = None
        if self.settings.agreement:
            embedding, levels = self.model.with_levels(views, iters)
        else:
            embedding = self.model(views, iters)
        return self._loss(embedding, labels, across), embedding, levels

    def _loss(self, embedding, labels, across):
        tau, prototypes = self.settings.temperature, self.model.prototypes
        loss = supervised_contrastive_loss(embedding, labels, tau, across_processes=across)
        if prototypes is not None and self.own_classes:
            loss = loss + PROTOTYPES * prototype_loss(embedding, labels, prototypes, tau)
        return loss

    def compile(self, replayed):
        """Make one graph of the network and its contrastive loss, and one of their backward pass.

        Args:
            replayed: as CUDA graphs, on a GPU; not where gradients of several batches add up, which
                would lie in memory that the next replay writes.
        """
        mode = "reduce-overhead" if replayed else "default"
        self._compiled = torch.compile(self.compare, fullgraph=True, dynamic=False, mode=mode)


class Reconstruction:
    """The mean squared error of the pixels of hidden patches, predicted from level 0, and with
    --level_cosine how far the levels' inputs are from them.

    Args:
        model: the `Agglomerator`, with --pretraining=masked.
        settings: of the run.
    """

    def __init__(self, model, settings):
        self.model, self.settings = model, settings

    def __call__(self, views, generator, iters=None):
        """The loss of views (B, C, H, W). `iters` as in `Contrast`."""
        hidden = self.model.masked.draw(len(views), generator, views.device)
        pixels, states = self.model.reconstruct(views, hidden, iters)
        loss = hidden_pixel_loss(pixels, views, hidden)
        if self.settings.level_cosine:
            across = self.model.training  # in evaluation processes may have unequal batches
            cosines = level_cosine_loss(self.model, states, across)
            loss = loss + self.settings.level_cosine * cosines
        return loss

    def show(self, views):
        """Hide patches of views (B, C, H, W), always the same ones, and predict them.

        Returns:
            (hidden, pixels, errors): (B, H, W) bool; (B, C, H, W), normalised as the views are; and
            (B,), the mean squared error of the hidden pixels of each image.
        """
        generator = seeded_generator(self.settings.seed)
        hidden = self.model.masked.draw(len(views), generator, views.device)
        pixels = upcast(self.model.reconstruct(views, hidden)[0])
        each = zip(*(x.split(1) for x in (pixels, views, hidden)), strict=True)
        return hidden, pixels, torch.stack([hidden_pixel_loss(*one) for one in each])

    def compile(self):
        self.model.reconstruct = torch.compile(self.model.reconstruct)
