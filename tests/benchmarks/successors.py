"""The published model beside what its successors added, on the same data in the same time.

    python tests/benchmarks/successors.py --data_dir DIR [--minutes 60] [FLAGS]

DIR is a folder of images with classes, such as CIFAR-10's; PartWhole is drawn. Every row trains
both stages for so many minutes, or so many views, with the same tokenizer, columns and levels, and
is tested. Of the views a contrastive row spends a fifth on its classifier, a masked one half on
fine-tuning. --minutes are turned into views by the pace of some first batches; on a machine with
other work --views is fair. FLAGS of the program change all rows, as --limit_test=500.

Columns: error on the test images; by level, lowest first, islands an image (cosine of at least
0.8), total variation of directions; where masks are known, foreground ARI and IoU with the parts at
level 0, with the objects at the top level; views trained on, in all; views/s in stage one; minutes
of both stages.

At 60000 views in bfloat16, each row on a busy core of a Xeon with AMX, one seed (CIFAR-10's images
as a folder, and PartWhole):

                              error    islands         TV   parts  parts  object  views/s
                                                              ARI    IoU     IoU
    CIFAR-10
    published                 63.5%  44.8 43.7  0.96 0.97                             317
    masked                    51.2%  24.0 28.1  0.84 0.87                             303
    agreement                 62.6%  45.7 42.7  0.96 0.96                             183
    agreement, repelled       63.0%  43.7 41.4  0.95 0.95                             155
    dissimilarity head        71.5%  50.2 45.7  1.00 0.97                             228
    project's best, classes   32.0%  38.4 42.1  0.88 0.93                             246
    project's best, islands   29.1%    8.6 1.7  0.59 0.36                             142
    PartWhole
    published                 11.5%  42.7 43.5  0.96 0.98   0.150  0.303   0.162      337
    masked                     2.5%  32.2 35.5  0.89 0.89   0.163  0.286   0.175      350
    agreement                 11.3%  43.8 45.1  0.97 0.99   0.149  0.301   0.155      219
    agreement, repelled        8.6%  45.0 44.3  0.98 0.99   0.143  0.302   0.156      159
    dissimilarity head        90.0%  55.7 46.3  1.07 0.99   0.126  0.305   0.082      241
    project's best, classes    0.0%  46.1 45.0  0.93 0.95   0.137  0.293   0.139      231
    project's best, islands    0.0%   18.1 4.0  0.62 0.42   0.304  0.372   0.579      145

masked does better than published: all its weights learn in half of its views. Agreement among
columns makes no larger islands, and no clear difference in error; the dissimilarity head learns
least (on PartWhole nothing) in so short a time. Of the project's two rows the one with a loss that
asks for islands errs no more; it also mirrors images without shifting them, which is easier.
"""

import argparse
import contextlib
import csv
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from agglomerator import cli  # noqa: E402
from agglomerator.commands.dispatch import run  # noqa: E402
from agglomerator.data.module import ImageDataModule  # noqa: E402

PROBE = 12  # batches that tell the pace
NETWORK = (
    "--image_size=32", "--conv_image_size=8", "--patch_size=1", "--patch_dim=32", "--levels=2",
    "--tokenizer=vgg", "--tokenizer_width=16", "--tokenizer_depth=2", "--contr_dim=128",
)  # fmt: skip
TRAINING = (
    "--augmentation=flip", "--batch_size=64", "--dropout=0.1", "--learning_rate=0.002",
    "--val_share=0.04", "--logger=none", "--limit_val=4",
)  # fmt: skip
BEST = "--optimizer=muon", "--learning_rate=0.012", "--weight_decay=0.05", "--temperature=0.1"
BEST += "--head=grid", "--head_side=4", "--prototypes=true"
ROWS = {
    "published": (),
    "masked": ("--pretraining=masked", "--finetune"),
    "masked, level cosines 0.1": ("--pretraining=masked", "--finetune", "--level_cosine=0.1"),
    "agreement": ("--consensus=agreement",),
    "agreement, repelled": ("--consensus=agreement_repel",),
    "dissimilarity head": ("--head=dissimilarity",),
    "agreement and dissimilarity": ("--consensus=agreement", "--head=dissimilarity"),
    "project's best, classes": BEST,
    "project's best, islands": (*BEST, "--agreement=10", "--consensus_temperature=0.05",
                                "--local_consensus_radius=2", "--augmentation=mirror"),
}  # fmt: skip
DATA = {
    "PartWhole": ("--dataset=PartWhole",),
    "folder": ("--dataset=ImageFolder",),
}


def settings_of(words):
    cli.FLAGS.unparse_flags()
    return cli.parse(["main", *words])


def train(words):
    """Run the program in this process, which then keeps the data; what it says, and seconds."""
    began, said = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(said):
        run(*settings_of(words))
    return said.getvalue(), time.perf_counter() - began


def pace(folder, stage):
    """Images a second at the end of a stage, from its metrics."""
    with (folder / "logs" / stage / "metrics.csv").open(newline="") as file:
        return [float(row["images/s"]) for row in csv.DictReader(file) if row["images/s"]][-1]


def length(images, settings, whole):
    """Flags for a stage that sees so many images of a whole training set: epochs and batches."""
    batches = max(1, round(images / settings.batch_size))
    epochs = -(-batches // (whole // settings.batch_size))
    return [f"--max_epochs={epochs}", f"--limit_train={round(batches / epochs)}"]


def measure(words, name, args, whole):
    """One row: a dictionary of figures."""
    folder = Path(args.output_dir) / name.replace(" ", "_").replace("'", "").replace(",", "")
    words = [*words, f"--output_dir={folder.parent}", f"--exp_name={folder.name}"]
    settings, _ = settings_of(words)
    stage = settings.pretraining
    masked = stage == "masked"
    # Views of an image in stage one, and its share of all views.
    each, share = (1, 0.5) if masked else (settings.n_views, 0.8)
    views = args.views
    if views is None:
        one_stage = [word for word in words if word != "--finetune"]
        few = f"--limit_train={PROBE}", "--max_epochs=1", "--limit_val=0"
        train([*one_stage, *few])
        views = args.minutes * 60 * pace(folder, stage) * each
        shutil.rmtree(folder)
    one = length(share * views / each, settings, whole)
    two = length((1 - share) * views, settings, whole)
    last = f"--load_checkpoint_dir={folder}/checkpoints/{'masked_' * masked}last.ckpt"
    seconds = train([*(word for word in words if word != "--finetune"), *one])[1]
    seconds += train([*words, *([] if masked else ["--supervise"]), *two, last])[1]
    second = "finetuned" if masked else "supervised"
    of_test = f"--load_checkpoint_dir={folder}/checkpoints/{second}_last.ckpt"
    train([*words, "--mode=test", of_test])
    record = json.loads((folder / f"test_{second}.json").read_text())
    levels = record["islands"]["rows"][: settings.levels]
    figures = {
        "error": f"{record['error']:.1%}",
        "islands": " ".join(f"{level['number']:.1f}" for level in levels),
        "TV": " ".join(f"{level['total_variation']:.2f}" for level in levels),
    }
    if "parts_ari" in levels[0]:
        figures["parts ARI"] = f"{levels[0]['parts_ari']:.3f}"
        figures["parts IoU"] = f"{levels[0]['parts_iou']:.3f}"
        figures["object IoU"] = f"{levels[-1]['objects_iou']:.3f}"
    return figures | {
        "views": f"{views:.0f}",
        "views/s": f"{pace(folder, stage) * each:.0f}",
        "minutes": f"{seconds / 60:.1f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="of a row")
    parser.add_argument("--views", type=int, help="of a row, instead of minutes")
    parser.add_argument("--data_dir", help="folder of images with classes; without it PartWhole")
    parser.add_argument("--only", default=",".join(DATA), help="folder, PartWhole")
    parser.add_argument("--rows", help="names of rows, with ; between them; without it all")
    parser.add_argument("--output_dir", help="kept; without it a temporary folder")
    args, flags = parser.parse_known_args()
    cli.define()
    temporary = tempfile.TemporaryDirectory()
    args.output_dir = top = args.output_dir or temporary.name
    for kind in args.only.split(","):
        if kind == "folder" and args.data_dir is None:
            continue
        of_data = [*DATA[kind], *NETWORK, *TRAINING]
        of_data += [f"--data_dir={args.data_dir}"] * (args.data_dir is not None)
        data = ImageDataModule(settings_of([*of_data, *flags])[0])
        data.prepare_data()
        data.setup()
        args.output_dir = Path(top) / kind
        print(f"\n{kind}: {len(data.train)} images to train on", flush=True)
        rows = args.rows.split(";") if args.rows else list(ROWS)
        for name in rows:
            own = ROWS[name]
            figures = measure([*of_data, *flags, *own], name, args, len(data.train))
            if name == rows[0]:
                print(f"{'':<28}" + "".join(f"{title:>12}" for title in figures))
            print(f"{name:<28}" + "".join(f"{x:>12}" for x in figures.values()), flush=True)


if __name__ == "__main__":
    main()
