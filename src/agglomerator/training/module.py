"""The two stages of training: pre-training, contrastive or masked, then a classifier."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule

from agglomerator.data.transforms import send
from agglomerator.model.heads import start_from_means
from agglomerator.training.metrics import Predictions, RunMetrics, in_top5
from agglomerator.training.objectives import Contrast, Reconstruction
from agglomerator.training.optim import Muon, OneCycle, can_fuse
from agglomerator.util.distributed import gather
from agglomerator.util.precision import upcast, without_autocast
from agglomerator.util.random import seeded_generator
from agglomerator.util.terminal import say


class LitAgglomerator(LightningModule):
    """One stage of training, validation and test of a network.

    - Contrastive: the supervised contrastive loss of two augmented views of every image, and what
      --prototypes and --agreement add (`Contrast`). The accuracy is that of the nearest class mean
      in the embedding.
    - Masked: the mean squared error of the pixels of hidden patches, predicted from level 0. It
      knows no classes, and learns no head.
    - Supervised: cross-entropy. Only the classifier learns; the rest behaves as in evaluation.
    - Finetuned: cross-entropy. Everything learns.

    Args:
        model: the `Agglomerator`.
        settings: of the run.
        data: the `ImageDataModule` that makes views of the batches.
        own_classifier: the network's classifier, and its prototypes, know the classes of the data.
        began_from: fingerprint of the weights that the training begins from, or None.
        starts_from: what the classifier of stage two begins from, "class_means" or "prototypes";
            None for the weights that it has.
    """

    def __init__(
        self, model, settings, data, own_classifier=True, began_from=None, starts_from=None
    ):
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
        self.contrast = Contrast(model, settings, data, own_classifier)
        self.reconstruction = Reconstruction(model, settings)
        self.first_step = None
        self.began_from, self.starts_from = began_from, starts_from
        self.train()  # a network from a checkpoint comes in evaluation mode

    def _learns(self, part):
        """Whether a part of the network learns in this stage."""
        classifier = "classification_head_from_contr"
        if self.stage == "supervised":
            return part == classifier
        idle = {"contrastive": [classifier], "masked": [classifier, "contrastive_head"]}
        return part not in idle.get(self.stage, ["masked", "prototypes"])

    def train(self, mode=True):
        super().train(mode)
        if self.stage == "supervised":
            self.model.eval()
        return self

    def training_step(self, batch, batch_idx):
        images, labels = batch
        generator = self._generator(batch_idx)
        torch.manual_seed(generator.initial_seed())  # for dropout
        iters = self._iters(batch_idx)
        if self.stage == "contrastive":
            loss, embedding, apart = self.contrast(
                images, labels, generator, self.current_epoch, iters
            )
            if apart is not None:
                self._log_step("train_agreement", apart)
            self.metrics.class_means.update(embedding, labels.repeat(self.settings.n_views))
        elif self.stage == "masked":
            views = self.data.augmented_view(images, generator)
            loss = self.reconstruction(views, generator, iters)
        else:
            views = self.data.augmented_view(images, generator)
            with torch.set_grad_enabled(self.stage != "supervised"):
                embedding = self.model(views, iters)
            logits = self.logits(embedding)
            loss = F.cross_entropy(upcast(logits), labels)
            accuracy = self.metrics.train_accuracy
            accuracy(logits, labels)
            self.log("train_acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        self._log_step("train_loss", loss)
        share = self._share_in_step(batch_idx)
        return loss if share == 1 else loss * share

    def _share_in_step(self, batch_idx):
        """The weight of a batch's loss. Lightning divides by `accumulate`, also in the last step of
        an epoch, which may have fewer batches."""
        several = self.settings.accumulate
        if several == 1:
            return 1
        batches = self.trainer.num_training_batches
        left = batches % several
        return several / left if left and batch_idx >= batches - left else 1

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

    def _iters(self, batch_idx):
        """How many iterations a batch of training has, the same in all processes."""
        s = self.settings
        if not s.iters_spread or self.stage == "supervised":
            return s.n_iters
        generator = np.random.default_rng((s.seed, self.current_epoch, batch_idx))
        return s.n_iters + int(generator.integers(-s.iters_spread, s.iters_spread + 1))

    def compile_steps(self, device, processes=1):
        """Compile what a training step computes from views on.

        With several processes, in which the loss exchanges embeddings, with composites, and in
        stage two that is the network alone; else see `Contrast.compile` and
        `Reconstruction.compile`.
        """
        most = 2 * self.settings.iters_spread + 2  # one for each number of iterations, one to spare
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, most)
        # As without compilation: what stays out of autocast does so in the backward pass, too.
        torch._functorch.config.backward_pass_autocast = "off"
        if self.stage == "masked":
            self.reconstruction.compile()
        elif self.stage == "contrastive" and processes == 1 and not self.settings.composes:
            self.contrast.compile(replayed=device.type == "cuda" and self.settings.accumulate == 1)
        elif self.stage == "contrastive" and self.settings.agreement:
            self.model.with_levels = torch.compile(self.model.with_levels)
        else:
            self.model.compile()

    def on_fit_start(self):
        if self.settings.compile:
            self.compile_steps(self.trainer.strategy.root_device, self.trainer.world_size)
        if self.starts_from is not None:
            self._start_classifier()

    @torch.no_grad()
    def _start_classifier(self):
        """Initialise the classifier to predict the nearest prototype, or the nearest class mean of
        the training images."""
        head = self.model.classification_head_from_contr
        if self.starts_from == "prototypes":
            towards, of = F.normalize(self.model.prototypes, dim=-1), "prototypes"
        else:
            subset = self.data.limited("train")
            towards = self._class_means(subset)
            of = f"class means of {len(subset)} training images"
        start_from_means(head, towards, 1 / self.settings.temperature)
        for weight in head.parameters():
            weight.copy_(gather(weight[None])[0])  # the same to the last bit in all processes
        say(f"The classifier begins from the {of} (--classifier_start).")

    def _class_means(self, subset):
        """The mean embeddings (n_classes, contr_dim) of images, of unit length."""
        self.eval()
        means = self.metrics.class_means
        with self.trainer.precision_plugin.forward_context():
            for images, labels in self.data.in_order(subset):
                images = send(images, self.device)
                means.update(self.model(self.data.view(images)), labels)
        found = means.compute()
        means.reset()
        self.train()
        return found

    @property
    def classified_by(self):
        """What names the class of an image."""
        return "nearest class mean" if self.by_class_means else "classifier"

    def logits(self, embedding):
        """Logits of the classifier, or in stage one the cosines to the class means, which also
        replace a classifier of other classes: embedding (B, contr_dim) -> (B, n_classes)."""
        if self.by_class_means:
            means = self.metrics.class_means.compute()
            with without_autocast(embedding.device):
                cosines = embedding.float() @ means.mT
            return cosines.masked_fill(~means.any(1), -torch.inf)  # a class without images
        head = self.model.classification_head_from_contr
        with without_autocast(embedding.device):  # as freeze does
            return head(embedding.to(next(head.parameters()).dtype))

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
        checkpoint["processes"] = self.trainer.world_size
        if self.contrast.teacher is not None:
            checkpoint["teacher"] = self.contrast.teacher.model.state_dict()
        sums = self.metrics.sums_of_epoch()
        checkpoint["epoch_so_far"] = [gather(getattr(*sum)[None]).cpu() for sum in sums]

    def on_load_checkpoint(self, checkpoint):
        """Take over the teacher, and the sums of an interrupted epoch; have the optimizer work as
        this device can."""
        self.began_from = checkpoint.get("began_from")
        before, now = checkpoint.get("processes"), self.trainer.world_size
        if before not in (None, now):
            say(
                f"The training was stopped in {before} processes and goes on in {now}: its batch "
                "is another one now, and an epoch that it had begun repeats or leaves out images."
            )
        fused = can_fuse(self.trainer.strategy.root_device)
        for optimizer in checkpoint.get("optimizer_states", ()):
            for group in optimizer["param_groups"]:
                group["fused"] = fused
        if self.contrast.teacher is not None:
            if "teacher" not in checkpoint:
                raise ValueError("the teacher is missing")
            self.contrast.teacher.model.load_state_dict(checkpoint["teacher"])
        self.metrics.take_up(checkpoint.get("epoch_so_far", ()), self.global_rank, now)

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
        metrics.top5(in_top5(logits, batch[1]))
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
            loss = self.contrast(images, labels, self._generator(batch_idx))[0]
        elif self.stage == "masked":
            loss = self.reconstruction(views, self._generator(batch_idx))
        else:
            loss = F.cross_entropy(upcast(logits), labels)
        return loss, logits, levels

    def predict_step(self, batch, batch_idx):
        images, labels = batch
        return self.model(self.data.view(images)).float().cpu(), labels.cpu()

    def build_optimizer(self):
        """The optimizer of the settings, over all weights that learn."""
        s = self.settings
        options = {
            "lr": s.learning_rate,
            "weight_decay": s.weight_decay,
            "fused": can_fuse(self.device),
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
