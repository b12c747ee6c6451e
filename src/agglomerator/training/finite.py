"""Ends a training whose numbers are no longer finite, before a checkpoint holds them."""

from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from agglomerator.util.distributed import gather
from agglomerator.util.errors import SharedError

EVERY = 10
SMALLEST_SCALE = 2.0**-20


class StopUnlessFinite(Callback):
    """Stops at a loss, gradient or weight that is not finite. The weights before it are kept.

    To read a number from an accelerator is to wait for it. So the fault stays there as a flag,
    which makes fused optimizers skip this step and all later ones, as loss scaling does. The flag
    is read every 10 steps, before every validation and before every checkpoint. Loss scaling
    (16-mixed) skips gradients that overflow and goes on with a smaller scale; with it the loss and
    the scale are judged instead.

    Raises:
        SharedError: in any hook, at the same step in all processes.
    """

    def on_train_start(self, trainer, module):
        self.fault = torch.zeros(1, device=module.device, dtype=torch.float32)  # 1 after a fault
        self.n_sound = torch.zeros_like(self.fault)  # steps without a fault since the last look
        self.steps = [(trainer.global_step, 0.0)]  # number and learning rate; first the one before

    def on_before_backward(self, trainer, module, loss):
        self._judge([loss])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        fused = optimizer.defaults["fused"]
        self.steps.append((trainer.global_step + 1, optimizer.param_groups[0]["lr"]))
        if _scaler(trainer) is None:
            self._judge([p.grad for p in module.parameters() if p.grad is not None])
            if fused:
                optimizer.found_inf = self.fault[0]
        self.n_sound += 1 - self.fault
        if not fused:
            self._look(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.steps) > EVERY:
            self._look(trainer, module)

    def on_validation_start(self, trainer, module):
        self._look(trainer, module)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self._judge(module.parameters())  # finite gradients can still lead to weights that are not
        self._look(trainer, module)

    @torch.no_grad()
    def _judge(self, tensors):
        largest = torch.nn.utils.get_total_norm(tensors, torch.inf)
        self.fault = torch.maximum(self.fault, (~largest.isfinite()).to(self.fault))

    def _look(self, trainer, module):
        scaler = _scaler(trainer)
        if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
            self.fault.fill_(1)
        fault, n_sound = gather(self.fault).max(), gather(self.n_sound).min()
        if not fault:
            self.n_sound.zero_()
            self.steps = self.steps[-1:]
            return
        step, rate = self.steps[min(int(n_sound) + 1, len(self.steps) - 1)]
        s = module.settings
        less = f"a smaller --{s.flag_of('learning_rate')} than {s.learning_rate}"
        if s.precision != "32-true":
            less += f", or --precision=32-true instead of {s.precision}"
        raise SharedError(
            f"step {step} (epoch {trainer.current_epoch + 1}, learning rate {rate:.3g}): the loss, "
            f"a gradient or a weight is no longer finite; use {less}. {_last_good(trainer)}"
        )


def _scaler(trainer):
    return getattr(trainer.precision_plugin, "scaler", None)


def _last_good(trainer):
    """A sentence about the newest checkpoint."""
    names = "best_model_path", "path"  # of Lightning's callbacks, and of others
    paths = [getattr(c, name, None) for c in trainer.checkpoint_callbacks for name in names]
    paths.append(trainer.ckpt_path)
    paths = [Path(path) for path in paths if path and Path(path).is_file()]
    if not paths:
        return "No checkpoint was written before it."
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    return f"The last good checkpoint is {newest}: start from it by --load_checkpoint_dir={newest}"
