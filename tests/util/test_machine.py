import pytest

from agglomerator.config import Settings
from agglomerator.util.machine import device_of, devices_of, processes_here


@pytest.mark.parametrize(
    "flags, processes",
    [
        ({}, 1),
        (dict(accelerator="cpu", num_gpus=4), 1),
        (dict(accelerator="cpu", devices="3"), 3),
        (dict(accelerator="cpu", devices="3", num_nodes=2), 3),
        (dict(accelerator="cpu", devices="auto"), 1),
        (dict(devices="0,3"), 2),
        (dict(devices="1,"), 1),
        (dict(devices="3", mode="all"), 3),
        (dict(devices="3", mode="test"), 1),
        (dict(devices="3", mode="freeze"), 1),
        (dict(devices="0"), 1),  # which Lightning refuses
    ],
)
def test_processes_that_share_this_machine(flags, processes):
    assert processes_here(Settings(**{"accelerator": "cpu"} | flags)) == processes


def test_torchrun_says_how_many(monkeypatch):
    said = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    settings = Settings(devices="2")
    assert processes_here(settings) == 4 and devices_of(settings) == (4, 2)


def test_a_test_runs_on_the_first_of_the_listed_devices(monkeypatch):
    monkeypatch.setattr("agglomerator.util.machine.count_gpus", lambda accelerator: 0)
    assert device_of(Settings(devices="3,1")) == 1
    monkeypatch.setattr("agglomerator.util.machine.count_gpus", lambda accelerator: 4)
    found = [device_of(Settings(devices=each)) for each in ("3,1", "2,", "2", "auto", None)]
    assert found == [[3], [2], 1, 1, 1]
