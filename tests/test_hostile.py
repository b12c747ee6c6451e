"""Broken and hostile input by a seeded fuzzer: it is read, or refused in one line, soon, in little
memory, and nothing of it is run."""

import copy
import dataclasses
import gzip
import io
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from absl.flags import FLAGS
from conftest import ROOT, SMALL, contents, run_main, weights
from PIL import Image

from agglomerator import cli
from agglomerator.commands import dispatch
from agglomerator.config import FIELDS, INPUT_SETTINGS, MODEL_SETTINGS, Settings
from agglomerator.data import registry
from agglomerator.data.decode import read_image
from agglomerator.data.sets.smallnorb import NAMES, read_matrix
from agglomerator.data.sets.torchvision_sets import files_of
from agglomerator.islands.projection import Projection
from agglomerator.plan import complete_from_checkpoint, complete_from_data
from agglomerator.runs import checkpoints
from agglomerator.util.errors import UserError

SECONDS = 20
MEGABYTES = 1200


@pytest.fixture(autouse=True)
def within_bounds():
    """No test of this file takes up much more memory than there was in use before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < MEGABYTES * 2**10, f"{more / 2**10:.0f} MB"


def too_long(*_):
    raise AssertionError(f"takes more than {SECONDS} s")


def attempt(function, *arguments, **keywords):
    """Whether it succeeds; that it else refuses in one line is demanded."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*arguments, **keywords)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable(), repr(str(error))
        return False
    finally:
        signal.alarm(0)
    return True


def damaged(content, draw):
    """Bytes with some fault: bits flipped, cut short, parts doubled, lost or overwritten."""
    content = bytearray(content)
    place, length = draw.randrange(len(content)), draw.randrange(1, 64)
    kind = draw.randrange(7)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        del content[place : place + length]
    elif kind == 2:
        content[place:place] = content[place : place + length]
    elif kind == 3:
        content[place : place + 4] = struct.pack("<I", draw.choice((0, 1, 2**31, 2**32 - 1)))
    elif kind == 4:
        content[place : place + length] = draw.randbytes(length)
    else:
        # Headers are where the faults are that matter.
        span = len(content) if kind == 5 else min(len(content), 256)
        for _ in range(draw.randrange(1, 9)):
            content[draw.randrange(span)] ^= 1 << draw.randrange(8)
    return bytes(content)


def refused(draw, path, content, function, *arguments, times):
    """Damages a file so many times and looks what a function makes of it: how often it refused."""
    count = 0
    for _ in range(times):
        path.write_bytes(damaged(content, draw))
        count += not attempt(function, *arguments)
    path.write_bytes(content)
    return count


# Checkpoints

TINY = dict(image_size=8, conv_image_size=2, n_channels=1, patch_dim=4, contr_dim=4)
NUMBERS = [None, True, -1, 0, 2**31, 2**62, 1e308, float("nan"), "x", "\x00\n", [], {}, {"a": 1}]
TENSORS = [
    torch.zeros(0),
    torch.zeros(()),
    torch.zeros(4, 2),
    torch.zeros(1).expand(2**15, 2**15),
    torch.zeros(1, dtype=torch.int64).expand(4, 2**40),
    torch.zeros(3, dtype=torch.complex64),
    torch.eye(3).to_sparse(),
    torch.zeros(4, 4, device="meta"),
    torch.full((4, 4), torch.nan),
]
REMOVED = object()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The settings of a tiny run, and its checkpoint."""
    settings = Settings(
        **TINY,
        dataset="digits",
        exp_name="tiny",
        output_dir=str(tmp_path_factory.mktemp("tiny")),
        batch_size=32,
        limit_train=2,
        limit_val=1,
        max_epochs=1,
        lr_speed=4,
        logger="none",
        accelerator="cpu",
    )
    return settings, dispatch.train(settings, {"dataset"})


def use(path):
    """What a test of a checkpoint does with it before it looks at any data."""
    checkpoint = checkpoints.read(path)
    settings = complete_from_checkpoint(Settings(dataset="digits"), {"dataset"}, checkpoint)
    settings = complete_from_data(settings, set())
    wanted = dataclasses.asdict(settings)
    names = *MODEL_SETTINGS, *INPUT_SETTINGS
    model = checkpoints.build(checkpoint, **{name: wanted[name] for name in names})
    if settings.n_iters < 100:
        model(torch.rand(2, settings.n_channels, settings.image_size, settings.image_size))


def places(content, at=()):
    """The ways to all values inside dictionaries and lists."""
    if at:
        yield at
    for key in content if isinstance(content, dict) else range(len(content)):
        if isinstance(content[key], dict | list):
            yield from places(content[key], (*at, key))
        else:
            yield (*at, key)


def changed(content, at, value):
    """A copy with another value at a place."""
    content = copy.copy(content)
    if len(at) > 1:
        content[at[0]] = changed(content[at[0]], at[1:], value)
    elif value is REMOVED:
        del content[at[0]]
    else:
        content[at[0]] = value
    return content


@pytest.mark.slow
def test_damaged_checkpoints(trained, tmp_path):
    draw, path, whole = random.Random(1), tmp_path / "x.ckpt", trained[1].read_bytes()
    assert refused(draw, path, whole, use, path, times=150) > 100

    for _ in range(250):  # a damaged pickle in an archive that is whole
        with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                content = source.read(name)
                if name.endswith("data.pkl"):
                    content = damaged(content, draw)
                target.writestr(name, content)
        attempt(use, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_safetensors(content, path):
    flags = content["hyper_parameters"]
    told = {name: str(flags[name]) for name in MODEL_SETTINGS}
    safetensors.torch.save_file(content["state_dict"], path, told)


@pytest.mark.parametrize("save", [save_legacy, save_safetensors])
@pytest.mark.slow
def test_damaged_checkpoints_of_other_formats(trained, tmp_path, save):
    draw, path = random.Random(9), tmp_path / "x.ckpt"
    save(torch.load(trained[1], weights_only=True), path)
    assert attempt(use, path)
    assert refused(draw, path, path.read_bytes(), use, path, times=300) > 100
    whole, head = path.read_bytes(), 4000  # what is said of the tensors, without their data
    for _ in range(300):
        path.write_bytes(damaged(whole[:head], draw) + whole[head:])
        attempt(use, path)


def test_older_file_with_a_tensor_that_has_no_data(trained, tmp_path):
    path = tmp_path / "x.pth"
    save_legacy({"state_dict": {"a": torch.ones(4), "b": torch.ones(4)}}, path)
    whole, keys = path.read_bytes(), io.BytesIO(path.read_bytes())
    for _ in range(4):
        pickletools.dis(keys, out=io.StringIO())
    start = keys.tell()
    order = pickle.load(keys)
    path.write_bytes(whole[:start] + pickle.dumps(order[:1], 2) + whole[keys.tell() :])
    assert not attempt(checkpoints.load, path, "--load_checkpoint_dir=x.pth")


@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_wrappers_that_hold_themselves(tmp_path, save):
    content = {}
    content["model"] = content
    save(content, tmp_path / "x.pth")
    assert not attempt(use, tmp_path / "x.pth")


@pytest.mark.parametrize("length", [2**40, 2**63, 100, 0])
def test_safetensors_that_claim_too_much(tmp_path, length):
    head = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + head)
    assert not attempt(use, tmp_path / "x")
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(head)) + head)
    assert not attempt(use, tmp_path / "x")


@pytest.mark.parametrize("mode", ["train", "test", "freeze", "islands"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_used_for_nothing(trained, tmp_path, mode, value):
    settings, path = trained
    hostile = tmp_path / "x.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.top_down.net.2.bias"][3] = value
    torch.save(content, hostile)
    s = settings.replace(load_checkpoint_dir=str(hostile), output_dir=str(tmp_path / "out"))
    for resume in (False, True) if mode == "train" else (False,):
        with pytest.raises(UserError, match="top_down.net.2.bias.*not finite"):
            getattr(dispatch, mode)(s.replace(resume_training=resume, max_epochs=2), {"dataset"})
    assert not (tmp_path / "out").exists()


def test_results_that_are_not_finite_are_no_figures(trained, tmp_path):
    """Weights may be finite and what the network makes of an image not."""
    settings, path = trained
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.image_to_tokens.0.block.1.running_var"].fill_(-1.0)
    torch.save(content, tmp_path / "x.ckpt")
    s = settings.replace(load_checkpoint_dir=str(tmp_path / "x.ckpt"), output_dir=str(tmp_path))
    for command in (dispatch.test, dispatch.islands, dispatch.freeze):
        with pytest.raises(UserError, match="not finite"):
            command(s.replace(mode=command.__name__), {"dataset"})
    ends = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert not ends & {".json", ".npy", ".npz", ".png"}


@pytest.mark.slow
def test_checkpoints_with_values_of_other_kinds(trained, tmp_path):
    draw, path = random.Random(2), tmp_path / "x.ckpt"
    whole = torch.load(trained[1], weights_only=True)
    savers = torch.save, save_legacy
    everywhere = [
        at for at in places(whole) if at[0] in ("state_dict", "hyper_parameters", "epoch")
    ]
    for _ in range(500):
        value, save = draw.choice([*NUMBERS, *TENSORS, REMOVED]), draw.choice(savers)
        at = draw.choice(everywhere)
        save(changed(whole, at, value), path)
        succeeded = attempt(use, path)
        if at[0] == "epoch":  # nobody reads it
            assert succeeded, value
        elif at == ("state_dict",):
            assert not succeeded, value
        elif at[0] == "state_dict" and "num_batches_tracked" not in at[1]:
            assert succeeded == fits(value, whole["state_dict"][at[1]]), (at, value)


def fits(value, weight):
    """Whether a value can take the place of a weight."""
    return isinstance(value, torch.Tensor) and value.shape == weight.shape


@pytest.mark.slow
def test_going_on_from_values_of_other_kinds(trained, tmp_path):
    settings, path = trained
    draw, whole = random.Random(3), torch.load(path, weights_only=True)
    hostile = tmp_path / "x.ckpt"
    going_on = settings.replace(
        max_epochs=2,
        resume_training=True,
        load_checkpoint_dir=str(hostile),
        output_dir=str(tmp_path),
    )
    states = [at for at in places(whole) if at[0] not in ("state_dict", "hyper_parameters")]
    by_part = {part: [at for at in states if at[0] == part] for part in {at[0] for at in states}}
    last = tmp_path / "tiny" / "checkpoints" / "last.ckpt"
    for _ in range(80):
        at = draw.choice(by_part[draw.choice(sorted(by_part))])
        value = draw.choice([*NUMBERS, *TENSORS[:5], REMOVED])
        torch.save(changed(whole, at, value), hostile)
        succeeded = attempt(dispatch.train, going_on, {"dataset"})
        if at[0] in ("hparams_name", "began_from"):  # notes, by which nothing is computed
            assert succeeded, (at, value)
        elif at[0] in ("pytorch-lightning_version", "epoch_so_far"):
            assert not succeeded, (at, value)
        if succeeded and last.is_file():
            assert all(x.isfinite().all() for x in weights(last).values()), (at, value)


def test_archive_that_unpacks_to_more_than_the_memory(trained, tmp_path):
    path = tmp_path / "bomb.ckpt"
    with (
        zipfile.ZipFile(trained[1]) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, bytes(2**28) if name.endswith("data/0") else source.read(name))
    assert path.stat().st_size < 2**20
    assert not attempt(use, path)


# Flagfiles

VALUES = ["", "0", "-1", "1e400", "nan", "inf", "9" * 30, "9" * 5000, "None", "maybe", "\x00", "é",
          "0x10", "1_000", "1e-400", "[]", "a" * 10000]  # fmt: skip


@pytest.fixture
def parse():
    """Reads a flagfile as the program does."""
    if "patch_dim" not in FLAGS:
        cli.define()

    def parse(path):
        FLAGS.unparse_flags()
        for name in FLAGS:
            FLAGS[name].unparse()
        cli.parse(["main.py", f"--flagfile={path}"])

    yield parse
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()


def test_damaged_flagfiles(parse, tmp_path):
    draw, path = random.Random(4), tmp_path / "x.cfg"
    whole = (ROOT / "config" / "config_digits.cfg").read_bytes()
    assert 50 < refused(draw, path, whole, parse, path, times=300) < 300

    names = [*FIELDS, "flagfile", "undefok", "nosupervise", "unknown"]
    for _ in range(300):
        lines = (f"--{draw.choice(names)}={draw.choice(VALUES)}\n" for _ in range(3))
        path.write_text("".join(lines))
        attempt(parse, path)


def test_flagfiles_that_name_each_other(parse, tmp_path):
    (tmp_path / "circle.cfg").write_text(f"--flagfile={tmp_path / 'circle.cfg'}\n--levels=3\n")
    assert attempt(parse, tmp_path / "circle.cfg")
    for i in range(2000):
        (tmp_path / str(i)).write_text(f"--flagfile={tmp_path / str(i + 1)}\n")
    assert not attempt(parse, tmp_path / "0")
    assert not attempt(parse, tmp_path)


# Data sets


def read_all(settings):
    registry._READ.clear()
    for split in ("train", "test"):
        registry.read_split(settings, split)
    registry._READ.clear()


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def matrix(array):
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
    shape = [*array.shape, 1, 1][: max(3, array.ndim)]
    return struct.pack(f"<{2 + len(shape)}I", magic, array.ndim, *shape) + array.tobytes()


def test_damaged_idx(tmp_path):
    draw, raw = random.Random(5), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    files = {}
    for split, n in (("train", 12), ("t10k", 4)):
        files[raw / f"{split}-images-idx3-ubyte"] = idx(np.zeros((n, 28, 28), np.uint8))
        files[raw / f"{split}-labels-idx1-ubyte"] = idx(np.zeros(n, np.uint8))
    for path, content in files.items():
        path.write_bytes(content)
    size = dict(image_size=28, conv_image_size=7, n_channels=1)
    settings = Settings(dataset="MNIST", data_dir=str(tmp_path), **size)
    assert attempt(read_all, settings)
    for path, content in files.items():
        assert refused(draw, path, content, read_all, settings, times=50) > 10

    for shape in ((2**31, 28, 28), (2**31, 0, 28), (0, 28, 28), (12, 28, 0), (1, 12, 784)):
        path, content = next(iter(files.items()))
        path.write_bytes(content[:4] + struct.pack(">3I", *shape) + content[16:])
        assert not attempt(read_all, settings)
        path.write_bytes(content[:4] + struct.pack(">3I", *shape))
        assert not attempt(read_all, settings)


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_smallnorb(tmp_path, packed):
    draw, folder = random.Random(6), tmp_path / "smallNORB"
    folder.mkdir()
    parts = np.zeros((4, 2, 9, 9), np.uint8), np.zeros(4, np.int32), np.zeros((4, 4), np.int32)
    files = {}
    for train in (True, False):
        for part, array in zip(("dat", "cat", "info"), parts, strict=True):
            name = NAMES[train].format(part) + (".gz" if packed else "")
            files[folder / name] = gzip.compress(matrix(array)) if packed else matrix(array)
    for path, content in files.items():
        path.write_bytes(content)
    settings = Settings(dataset="smallNORB", data_dir=str(tmp_path), n_channels=1, n_classes=5)
    assert attempt(read_all, settings)
    for path, content in files.items():
        assert refused(draw, path, content, read_all, settings, times=25) > 5

    path = next(iter(files))
    for shape in ((2**31, 2, 96, 96), (2**31, 2, 0, 0), (4, 2, 0, 9), (0, 2, 9, 9)):
        head = struct.pack("<6I", 0x1E3D4C55, 4, *shape)
        path.write_bytes(gzip.compress(head) if packed else head)
        assert not attempt(read_all, settings)


@pytest.mark.slow
def test_packed_matrix_that_unpacks_to_more_than_smallnorb(tmp_path):
    path = tmp_path / "bomb.mat.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(struct.pack("<6I", 0x1E3D4C55, 4, 2**29, 1, 1, 1))
        for _ in range(2**5):
            file.write(bytes(2**24))
    assert not attempt(read_matrix, path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_images(tmp_path, form):
    draw, path, file = random.Random(form), tmp_path / "image", io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    assert refused(draw, path, file.getvalue(), read_image, path, 16, 3, times=80) > 5


def test_postscript_is_not_run(tmp_path):
    path = tmp_path / "image.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    assert not attempt(read_image, path, 16, 3)


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_batches_of_a_stranger_are_not_unpickled(tmp_path, name):
    marker = tmp_path / "marker"
    for path, _ in files_of(name, tmp_path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({"data": Marker(marker), "labels": []}))
    assert not attempt(read_all, Settings(dataset=name, data_dir=str(tmp_path)))
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


# What an earlier run has left


def test_damaged_projection_is_no_projection(tmp_path):
    draw, path = random.Random(8), tmp_path / "projection.npz"
    levels = torch.randn(3, 4, 2, 8)
    Projection.fit(levels).save(path)
    for _ in range(200):
        content = path.read_bytes()
        path.write_bytes(damaged(content, draw))
        found = Projection.load(path, 2, 8)
        assert found is None or found.colours(levels).shape == (3, 2, 2, 2, 3)
        path.write_bytes(content)
    np.savez(path, mean=np.array(Marker(tmp_path / "marker"), dtype=object))
    assert Projection.load(path, 2, 8) is None
    assert not (tmp_path / "marker").exists()


# The program itself


@pytest.mark.parametrize("what", ["checkpoint", "flagfile", "resume", "size", "data"])
def test_program_refuses_in_one_line_and_loses_nothing(trained, tmp_path, what):
    settings, path = trained
    whole = torch.load(path, weights_only=True)
    output = shutil.copytree(settings.output_dir, tmp_path / "output")
    hostile = tmp_path / "hostile"
    flags = {
        "checkpoint": ["--mode=test", f"--load_checkpoint_dir={hostile}"],
        "flagfile": [f"--flagfile={hostile}"],
        "resume": ["--resume_training", "--max_epochs=9", f"--load_checkpoint_dir={hostile}"],
        "size": ["--patch_dim=1000000"],
        "data": ["--dataset=MNIST", "--image_size=28", "--conv_image_size=7"],
    }[what]
    if what == "checkpoint":
        torch.save(changed(whole, ("hyper_parameters", "iters"), "4\n\x1b[31m"), hostile)
    elif what == "resume":
        torch.save(changed(whole, ("optimizer_states",), []), hostile)
    else:
        hostile.write_bytes(bytes(range(256)))
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(bytes(range(99)))
    before = contents(output / "tiny" / "checkpoints")
    result = run_main(
        *SMALL,
        *(f"--{name}={value}" for name, value in TINY.items()),
        "--exp_name=tiny",
        f"--output_dir={output}",
        f"--data_dir={tmp_path}",
        *flags,
        ok=False,
    )
    assert result.status == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.removesuffix("\n").isprintable()
    assert before <= contents(output / "tiny")
