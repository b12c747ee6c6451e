"""Settings: devices and arithmetic."""

from dataclasses import dataclass

from agglomerator.config.field import setting


@dataclass(frozen=True)
class MachineSettings:
    """Devices and arithmetic."""

    num_gpus: int = setting(
        1, "Number of GPUs of this machine to use. Without a GPU, training runs on the CPU.", low=1
    )
    num_nodes: int = setting(1, "Number of machines that train together.", low=1)
    accelerator: str = setting(
        "auto", "Kind of device, by Lightning's names: auto, cpu, cuda, mps, ..."
    )
    devices: str | None = setting(
        None,
        "Number or list of devices, as Lightning takes them (auto, 2, '0,3'). It overrides "
        "num_gpus. Test and freeze use one device, the first of a list.",
    )
    strategy: str = setting(
        "auto", "How several processes share the training, by Lightning's names: auto, ddp, ..."
    )
    precision: str = setting(
        "32-true",
        "Number format of the computation, by Lightning's names: 32-true, bf16-mixed, ... "
        "bf16-mixed is faster where the hardware supports it. tf32, which is not Lightning's: "
        "float32 with faster products on an NVIDIA GPU, to about 3 digits.",
    )
