"""Training steps of the networks of config/, to be counted and timed."""

import dataclasses
import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from agglomerator import Agglomerator, cli
from agglomerator.data.module import ImageDataModule
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_trainer

CONFIG = Path(__file__).parents[1] / "config"


def settings_of(name, *flags):
    """The `Settings` of config/config_<name>.cfg, with further flags."""
    if "patch_dim" not in cli.FLAGS:
        cli.define()
    cli.FLAGS.unparse_flags()
    settings, _ = cli.parse(["main", f"--flagfile={CONFIG}/config_{name}.cfg", *flags])
    cli.FLAGS.unparse_flags()
    return settings


class Trained(Callback):
    """A short training of a network of config/ on digits, by the Trainer of the program.

    Args:
        name: of the flagfile, without "config_".
        accelerator: by Lightning's names.
        folder: for its files.
        flags: that change those of the flagfile.

    Attributes:
        watching: `Operations` to read at the end of every step.
    """

    def __init__(self, name, accelerator, folder, *flags):
        small = f"--accelerator={accelerator}", f"--output_dir={folder}", "--limit_val=0"
        small += "--dataset=digits", "--batch_size=32", "--max_epochs=1", "--logger=none"
        self.settings = s = settings_of(name, *small, *flags)
        data = ImageDataModule(s)
        data.setup()
        model = Agglomerator(**dataclasses.asdict(s))
        self.module = LitAgglomerator(model, s, data)
        self.watching, self.seen, self.times = None, [], []

    def fit(self):
        trainer = build_trainer(self.settings, True, [self])
        trainer.fit(self.module, datamodule=self.module.data)

    def on_train_batch_start(self, *_):
        self.times.append(time.perf_counter())
        if self.watching is not None:
            w = self.watching
            self.seen.append({"total": w.total, "reads": w.reads, "made": w.made})

    @property
    def n_steps(self):
        return len(self.times)

    @property
    def images_a_second(self):
        """Over the second half of the steps, the first of which may wait for kernels to load."""
        half = len(self.times) // 2
        return (
            self.settings.batch_size
            * (len(self.times) - 1 - half)
            / (self.times[-1] - self.times[half])
        )

    def a_step(self):
        """What a step counts on average, from the third to the last."""
        first, last = self.seen[2], self.seen[-1]
        return {name: (last[name] - first[name]) / (len(self.seen) - 3) for name in last}


_MODULES = {}


class Step:
    """A training step of a network of config/, on random images.

    The network is made once for each name, device and flags: its weights go on from step to step.

    Args:
        name: of the flagfile, without "config_".
        batch: images; two views of each, or as many as the network learns from.
        how: "eager", "compiled" as by --compile, "kernels" for the same without CUDA graphs.
        device: "cuda" or "cpu".
        flags: that change those of the flagfile.
    """

    def __init__(self, name, batch, how="eager", device="cuda", flags=()):
        s = settings_of(name, *flags)
        if (name, device, flags) not in _MODULES:
            torch.manual_seed(0)
            model = Agglomerator(**dataclasses.asdict(s))
            _MODULES[name, device, flags] = LitAgglomerator(model, s, ImageDataModule(s)).to(device)
        self.module = module = _MODULES[name, device, flags]
        module.contrast._compiled = None
        if how == "compiled":  # on a GPU by CUDA graphs
            module.compile_steps(torch.device(device))
        elif how == "kernels":
            module.contrast.compile(replayed=False)
        shape = batch, s.n_channels, s.image_size, s.image_size
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.batch = images, torch.randint(s.n_classes, (batch,), device=device)
        views = module.data.view(images.repeat(s.n_views, 1, 1, 1))
        module.data.augmented_view = lambda *_: views
        self.optimizer, self.device = module.build_optimizer(), device

    def __call__(self):
        self.optimizer.zero_grad()
        self.module.training_step(self.batch, 0).backward()
        self._move()

    def _move(self):
        with torch.autocast(self.device, enabled=False):
            self.optimizer.step()

    def captured(self, warm_up=3):
        """The same as one CUDA graph, to be called. A learning rate in it does not change."""

        def step():
            self.optimizer.zero_grad()
            self.module.contrast(*self.batch, None, 0)[0].backward()
            self._move()

        for group in self.optimizer.param_groups:
            group["capturable"] = True
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph):
            step()
        return graph.replay
