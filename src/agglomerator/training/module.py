"""The two stages of training: pre-training, contrastive or masked, then a classifier."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch.optim.lr_scheduler import OneCycleLR

from agglomerator.data.composites import compose
from agglomerator.data.transforms import send
from agglomerator.model.heads import start_from_means
from agglomerator.training.agreement import agreement_loss
from agglomerator.training.losses import supervised_contrastive_loss
from agglomerator.training.masked import hidden_pixel_loss, level_cosine_loss
from agglomerator.training.metrics import Predictions, RunMetrics
from agglomerator.training.optim import Muon
from agglomerator.training.pairs import unit_maps
from agglomerator.training.pieces import composite_loss, island_loss
from agglomerator.training.teacher import Teacher
from agglomerator.util.distributed import gather
from agglomerator.util.precision import upcast, without_autocast
from agglomerator.util.random import seeded_generator
from agglomerator.util.terminal import say


class OneCycle(OneCycleLR):
    """The one-cycle schedule, which holds its last value after its end."""

    def step(self, epoch=None):
        if self.last_epoch + 1 < self.total_steps:
            super().step(epoch)


class LitAgglomerator(LightningModule):
    """One stage of training, validation and test of a network.

    - Contrastive: the supervised contrastive loss of two augmented views of every image. With
      --agreement the loss that asks for islands is added; if that is of composites, the second view
      is the image's figure on another ground. The accuracy is that of the nearest
      class mean in the embedding.
    - Masked: the mean squared error of the pixels of hidden patches, predicted from level 0. It
      knows no classes, and learns no head.
    - Supervised: cross-entropy. Only the classifier learns; the rest behaves as in evaluation.
    - Finetuned: cross-entropy. Everything learns.

    Args:
        model: the `Agglomerator`.
        settings: of the run.
        data: the `ImageDataModule` that makes views of the batches.
        own_classifier: the network's classifier knows the classes of the data.
    """

    def __init__(self, model, settings, data, own_classifier=True):
        super().__init__()
        self.stage = settings.stage
        self.by_class_means = not settings.classifies or not own_classifier
        self.save_hyperparameters(dataclasses.asdict(settings) | {"stage": self.stage})
        self.model = model
        self.settings = settings
        self.data = data
        self.metrics = RunMetrics(len(data.classes), settings.embedding_dim, settings.levels)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self._learns(name.partition(".")[0])
        self.first_step = self._compiled = None
        self.began_from = None  # fingerprint of the weights
        self.starts_from_means = False  # of the classes, in stage two
        self.teacher = None
        if settings.is_taught:
            self.teacher = Teacher(copy.deepcopy(model).eval())
        self.train()  # a network from a checkpoint comes in evaluation mode

    def _learns(self, part):
        """Whether a part of the network learns in this stage."""
        classifier = "classification_head_from_contr"
        if self.stage == "supervised":
            return part == classifier
        idle = {"contrastive": [classifier], "masked": [classifier, "contrastive_head"]}
        return part not in idle.get(self.stage, ["masked"])

    def train(self, mode=True):
        super().train(mode)
        if self.stage == "supervised":
            self.model.eval()
        return self

    def training_step(self, batch, batch_idx):
        images, labels = batch
        generator = self._generator(batch_idx)
        torch.manual_seed(generator.initial_seed())  # for dropout
        if self.stage == "contrastive":
            loss, embedding = self._contrast(images, labels, generator)
            self.metrics.class_means.update(embedding, labels.repeat(2))
        elif self.stage == "masked":
            loss = self._reconstruct(self.data.augmented_view(images, generator), generator)
        else:
            logits = self.logits(self._embed(self.data.augmented_view(images, generator)))
            loss = F.cross_entropy(upcast(logits), labels)
            accuracy = self.metrics.train_accuracy
            accuracy(logits, labels)
            self.log("train_acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        self._log_step("train_loss", loss)
        return loss

    def _log_step(self, name, value):
        """Log the mean over processes of a scalar, for this step and over the epoch."""
        metric = getattr(self.metrics, name)
        metric(gather(value.detach()[None]).mean())
        self.log(name, metric, on_step=True, on_epoch=True)

    def _generator(self, batch_idx):
        """A generator that depends on seed, epoch, batch and process alone. In evaluation it does
        not depend on the epoch, so that epochs can be compared."""
        epoch, evaluates = (self.current_epoch, 0) if self.training else (0, 1)
        return seeded_generator(self.settings.seed, epoch, batch_idx, self.global_rank, evaluates)

    def _contrast(self, images, labels, generator):
        """The contrastive loss of images (B, C, H, W), and embeddings (2B, contr_dim) of their two
        views."""
        s = self.settings
        if s.agreement and s.agreement_cue == "composites":
            embedding, apart = self._composites(images, generator)
            loss = supervised_contrastive_loss(
                embedding, labels.repeat(2), s.temperature, across_processes=self.training
            )
        else:
            islands, twice = None, images.repeat(2, 1, 1, 1)
            if s.is_taught:
                islands = self._taught(images).repeat(2, 1, 1, 1)
                views, islands = self.data.labelled_view(twice, islands, generator)
            else:
                views = self.data.augmented_view(twice, generator)
            compiled = self._compiled is not None and self.training
            compare = self._compiled if compiled else self.compare
            loss, embedding, levels = compare(views, labels.repeat(2))
            if islands is not None:
                apart = island_loss(unit_maps(levels), islands, generator)
            elif s.agreement:
                apart = agreement_loss(levels, self.data.colours(views), generator)
        if s.agreement:
            loss = loss + s.agreement * apart
            if self.training:
                self._log_step("train_agreement", apart)
        return loss, embedding

    def _taught(self, images):
        """The islands (B, K, S, S) of images that the teacher tells; in evaluation the network
        itself is the teacher."""
        teacher = self.teacher if self.training else Teacher(self.model)
        return teacher.islands(self.data.view(images))

    def _reconstruct(self, views, generator):
        """The loss of the pixels of hidden patches of views (B, C, H, W)."""
        hidden = self.model.masked.draw(len(views), generator, views.device)
        pixels, states = self.model.reconstruct(views, hidden)
        loss = hidden_pixel_loss(pixels, views, hidden)
        if self.settings.level_cosine:
            loss = loss + self.settings.level_cosine * level_cosine_loss(self.model, states)
        return loss

    def _composites(self, images, generator):
        """Embeddings (2B, contr_dim) of a view of each image, and of its figure on the ground of
        another; and the loss of the islands in composites of the views."""
        views = self.data.augmented_view(images, generator)
        embedding, states = self.model.with_levels(views)
        seen, colours = unit_maps(states.detach()), self.data.colours(views)
        own = not self.training or self.current_epoch >= self.settings.max_epochs / 3
        made, pieces = compose(colours, seen, generator, own)
        of_composites, states = self.model.with_levels(self.data.view(made))
        apart = composite_loss(unit_maps(states), pieces, generator)
        return torch.cat((embedding, of_composites[: len(images)])), apart

    def compare(self, views, labels):
        """The contrastive loss of views (N, C, H, W) with labels (N,), their embeddings
        (N, contr_dim), and with --agreement the last state, else None."""
        s, levels = self.settings, None
        if s.agreement:
            embedding, levels = self.model.with_levels(views)
        else:
            embedding = self.model(views)
        across = self.training
        return (
            supervised_contrastive_loss(embedding, labels, s.temperature, across_processes=across),
            embedding,
            levels,
        )

    def compile_steps(self, device, processes=1):
        """Compile what a training step computes from views on.

        In stage one the network and its loss become one graph, and so does their backward pass. A
        GPU replays both as CUDA graphs, unless gradients of several batches add up: those would lie
        in memory that the next replay writes. Several processes exchange embeddings in the loss,
        which is left out there.
        """
        if self.stage == "masked":
            self.model.reconstruct = torch.compile(self.model.reconstruct)
            return
        if self.stage != "contrastive" or processes > 1:
            if self.settings.agreement and self.stage == "contrastive":
                self.model.with_levels = torch.compile(self.model.with_levels)
            else:
                self.model.compile()
            return
        replayed = device.type == "cuda" and self.settings.accumulate == 1
        mode = "reduce-overhead" if replayed else "default"
        self._compiled = torch.compile(self.compare, fullgraph=True, dynamic=False, mode=mode)

    def on_fit_start(self):
        if self.settings.compile:
            self.compile_steps(self.trainer.strategy.root_device, self.trainer.world_size)
        if self.starts_from_means:
            self._start_from_means()

    @torch.no_grad()
    def _start_from_means(self):
        """Begin with a classifier that tells the nearest class mean of the training images."""
        self.eval()
        means, subset = self.metrics.class_means, self.data.limited("train")
        with self.trainer.precision_plugin.forward_context():
            for images, labels in self.data.in_order(subset):
                images = send(images, self.device)
                means.update(self.model(self.data.view(images)), labels)
        head = self.model.classification_head_from_contr
        start_from_means(head, means.compute(), 1 / self.settings.temperature)
        for weight in head.parameters():
            weight.copy_(gather(weight[None])[0])  # the same to the last bit in all processes
        means.reset()
        self.train()
        say(
            f"The classifier begins from the class means of {len(subset)} training images "
            "(--classifier_start)."
        )

    @property
    def classified_by(self):
        """What names the class of an image."""
        return "nearest class mean" if self.by_class_means else "classifier"

    def _embed(self, views):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "supervised"):
            return self.model(views)

    def logits(self, embedding):
        """Logits of the classifier, or in stage one the cosines to the class means, which also
        replace a classifier of other classes: embedding (B, contr_dim) -> (B, n_classes)."""
        if self.by_class_means:
            means = self.metrics.class_means.compute()
            with without_autocast(embedding.device):
                cosines = embedding.float() @ means.mT
            return cosines.masked_fill(~means.any(1), -torch.inf)  # a class without images
        return self.model.classification_head_from_contr(embedding)

    def probabilities(self, logits):
        """Probabilities of the classes (B, n_classes). Cosines to the class means become some as
        the contrastive loss makes them of cosines, by its temperature."""
        temperature = self.settings.temperature if self.by_class_means else 1
        return (upcast(logits) / temperature).softmax(1)

    def on_train_start(self):
        """Check the resumed optimizer: with too small a state it would write beyond its memory."""
        self.first_step = self.global_step
        (optimizer,) = self.trainer.optimizers
        if self.trainer.ckpt_path and self.global_step and not optimizer.state:
            raise ValueError("the state of the optimizer is missing")
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                fits = value.layout == parameter.layout and value.shape == parameter.shape
                if name != "step" and not fits:
                    raise ValueError(f"the optimizer's {name} does not fit the network")

    @property
    def steps_made(self):
        """Optimizer steps since this process began to train."""
        return 0 if self.first_step is None else self.global_step - self.first_step

    def on_train_epoch_start(self):
        for metric in self.metrics.of_epoch():
            metric.reset()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["hyper_parameters"] |= self.data.origin()
        checkpoint["epochs_done"] = self.trainer.fit_loop.epoch_progress.current.processed
        checkpoint["began_from"] = self.began_from
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.model.state_dict()
        sums = self.metrics.sums_of_epoch()
        checkpoint["epoch_so_far"] = [gather(getattr(*sum)[None]).cpu() for sum in sums]

    def on_load_checkpoint(self, checkpoint):
        """Take over the teacher, and the sums of an interrupted epoch."""
        self.began_from = checkpoint.get("began_from")
        if self.teacher is not None:
            if "teacher" not in checkpoint:
                raise ValueError("the teacher is missing")
            self.teacher.model.load_state_dict(checkpoint["teacher"])
        for (holder, name), of_processes in zip(
            self.metrics.sums_of_epoch(), checkpoint.get("epoch_so_far", ()), strict=False
        ):
            own = getattr(holder, name)
            if of_processes.shape[1:] != own.shape or not of_processes.is_contiguous():
                raise ValueError(f"epoch_so_far: no {tuple(own.shape)} a process for {name}")
            if len(of_processes) == self.trainer.world_size:
                mine = of_processes[self.global_rank]
            else:
                mine = of_processes.sum(0) * (self.global_rank == 0)
            setattr(holder, name, mine.to(own))

    def on_train_epoch_end(self):
        mixing = {name: getattr(self.model, name) for name in self.model.mixing_names}
        self.log_dict(mixing)

    def on_validation_epoch_start(self):
        self.metrics.islands.reset()

    def validation_step(self, batch, batch_idx):
        loss, logits, levels = self._evaluate(batch, batch_idx)
        metrics = self.metrics
        metrics.islands.update_states(levels, **self.settings.found_by)
        metrics.val_loss(loss.expand(len(batch[1])))
        self.log("val_loss", metrics.val_loss, prog_bar=True)
        if self.stage != "masked":
            metrics.val_accuracy(logits, batch[1])
            self.log("val_acc", metrics.val_accuracy, prog_bar=True)

    def on_validation_epoch_end(self):
        for level, scores in enumerate(self.metrics.islands.compute()):
            named = {f"val_islands_{name}_{level}": score for name, score in scores.items()}
            self.log_dict(named)

    def on_test_start(self):
        images = len(self.data.test.dataset)
        self.metrics.predictions = Predictions(images).to(self.device)

    def test_step(self, batch, batch_idx):
        images, rows = batch
        batch = images, self.data.test_labels(rows)
        loss, logits, levels = self._evaluate(batch, batch_idx, self.settings.test_time_flip)
        metrics = self.metrics
        metrics.predictions.update(rows, self.probabilities(logits))
        metrics.islands.update_states(levels, **self.settings.found_by)
        metrics.position.update(levels)
        metrics.confusion(logits, batch[1])
        metrics.top5(logits, batch[1])
        metrics.test_loss(loss.expand(len(batch[1])))
        self.log("test_loss", metrics.test_loss)

    def _evaluate(self, batch, batch_idx, flip=False):
        """The loss, the logits (B, n_classes), and the last state (B, n, K, d). With `flip` the
        logits are the mean of those of an image and its mirror image."""
        images, labels = batch
        views = self.data.view(images)
        embedding, levels = self.model.with_levels(views)
        logits = self.logits(embedding)
        if flip:
            logits = (logits + self.logits(self.model(views.flip(-1)))) / 2
        if self.stage == "contrastive":
            loss, _ = self._contrast(images, labels, self._generator(batch_idx))
        elif self.stage == "masked":
            loss = self._reconstruct(views, self._generator(batch_idx))
        else:
            loss = F.cross_entropy(upcast(logits), labels)
        return loss, logits, levels

    def reconstruct(self, views):
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

    def predict_step(self, batch, batch_idx):
        images, labels = batch
        return self.model(self.data.view(images)).float().cpu(), labels.cpu()

    def build_optimizer(self):
        """The optimizer of the settings, over all weights that learn."""
        s = self.settings
        options = {
            "lr": s.learning_rate,
            "weight_decay": s.weight_decay,
            "fused": self.device.type != "mps",
        }
        if s.optimizer == "muon":
            return Muon(self.model, **options)
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **options)

    def configure_optimizers(self):
        s, optimizer = self.settings, self.build_optimizer()
        steps = self.trainer.estimated_stepping_batches // self.trainer.max_epochs
        total = max(s.lr_speed * steps, 2)
        schedule = OneCycle(optimizer, max_lr=s.learning_rate, total_steps=total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
