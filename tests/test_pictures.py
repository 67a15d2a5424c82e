"""Pictures end to end: a small ViT that learned digits 0 to 4 is adapted to 5 to 9, from files, and stored."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.errors import ConfigError, DataError, MismatchError, UnsupportedError
from onebase.serve.engine import Engine
from onebase.serve.settings import ServeSettings
from onebase.store import Store

SIZE = 8


@pytest.fixture(scope="module")
def digits():
    """Real scans of written digits: images (1797, 8, 8) in 0 to 255, and what they show."""
    found = load_digits()
    return (found.images * 15.9375).astype("uint8"), found.target


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """A base that learned the digits 0 to 4, as transformers saves it."""
    images, labels = digits
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIZE, patch_size=2, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_labels=5,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    pixels = torch.from_numpy(images[labels < 5]).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    targets = torch.from_numpy(labels[labels < 5])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(250):
        pick = torch.randint(len(pixels), (64,), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(pixels[pick]).logits, targets[pick])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
    where = tmp_path_factory.mktemp("base") / "tiny-vit"
    model.save_pretrained(where)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """A folder of pictures, one folder per class."""
    images, labels = digits
    where = tmp_path_factory.mktemp("data") / "late-digits"
    for i, (image, label) in enumerate(zip(images, labels)):
        if label >= 5:
            (where / f"digit-{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(where / f"digit-{label}" / f"{i}.png")
    return where


def test_a_folder_of_pictures_is_trained_stored_loaded_and_asked(folder, pictures):
    """The adapter beats the frozen base, answers alike after loading, and mixed rows equal rows alone."""
    base = ob.load_base(folder)
    data = ob.load_data(pictures)
    assert (data.kind, data.labels) == ("image-classification", tuple(f"digit-{i}" for i in range(5, 10)))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    run = ob.train(base, data, "lora(rank=8)", name="digits", epochs=6, seed=0)
    assert run.value > run.base_value and run.test.low > 0, (run.value, run.base_value, run.test)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    files = list(data.test["image"])
    found = base.predict(files, adapter="digits")
    right = sum(p.label == label for p, label in zip(found, data.test.label))
    assert right / len(files) == pytest.approx(run.value)

    other = ob.load_base(folder)
    other.load("digits")
    other.add("prompt", "prompt(length=2)", task=other.adapters["digits"].task, seed=1)
    again = other.predict(files, adapter="digits")
    assert [p.label for p in again] == [p.label for p in found]
    assert all(a.probabilities == pytest.approx(b.probabilities, abs=1e-5) for a, b in zip(again, found))
    names = ["digits", None, "prompt"] * 4
    mixed = other.predict([files[i // 3] for i in range(12)], adapter=names)
    for i, (one, name) in enumerate(zip(mixed, names)):
        (alone,) = other.predict(files[i // 3], adapter=name)
        if name is None:
            assert torch.allclose(one.embedding, alone.embedding, atol=1e-5)
        else:
            assert one.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    with Image.open(files[0]) as image:
        (held,) = other.predict([image], adapter="digits")
    assert held.probabilities == pytest.approx(again[0].probabilities, abs=1e-6)


def test_many_jobs_on_pictures_equal_each_alone(folder, pictures):
    """Joint training on one data set of pictures gives what training alone gives.

    Both keep one dtype and one kernel for attention: what is chosen by measurement may differ from run to run.
    """
    data = ob.load_data(pictures, limit=60)
    settings = {"epochs": 2, "seed": 3, "dtype": "float32", "attention": "keep"}
    alone = {}
    for method in ("lora(rank=2, dropout=0.0)", "bottleneck(size=4)"):
        with ob.load_base(folder) as base:
            run = ob.train(base, data, method, **settings)
            alone[method] = {k: v.clone() for k, v in base.adapters[run.name].tensors().items()}
    with ob.load_base(folder) as base:
        runs = ob.train_many(base, [ob.Job(data, method, **settings) for method in alone])
        for run, method in zip(runs, alone):
            for name, tensor in base.adapters[run.name].tensors().items():
                assert torch.allclose(tensor, alone[method][name], atol=1e-4), (method, name)


def test_the_command_line_reads_pictures(folder, pictures, tmp_path):
    """check, train and predict take a table of files beside it, and paths."""
    run = CliRunner().invoke
    table = tmp_path / "table"
    shutil.copytree(pictures, table / "files")
    rows = [f"files/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(pictures.rglob("*.png"))[::6]]
    (table / "data.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    checked = run(app, ["check", str(table / "data.csv"), "--json", "-b", str(folder)])
    assert checked.exit_code == 0, checked.output
    trained = run(
        app, ["train", "-b", str(folder), "-d", str(table / "data.csv"), "--name", "d", "--epochs", "1", "--json"]
    )
    assert trained.exit_code == 0, trained.output
    some = [str(table / row.split(",")[0]) for row in rows[:3]]
    asked = run(app, ["predict", "-a", "d", "--json", *some])
    assert asked.exit_code == 0, asked.output
    answers = json.loads(asked.stdout)["rows"]
    assert [row["text"] for row in answers] == some
    assert all(row["predictions"]["d"]["label"].startswith("digit-") for row in answers)
    scored = run(app, ["eval", "d", "-d", str(table / "data.csv"), "--json"])
    assert scored.exit_code == 0, scored.output


def test_the_digest_is_of_pixels_not_of_places(pictures, tmp_path):
    """The same pictures elsewhere are the same data; a changed one is not."""
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    assert ob.load_data(moved).digest == ob.load_data(pictures).digest
    first = min(moved.rglob("*.png"))
    Image.new("L", (SIZE, SIZE), 200).save(first)
    assert ob.load_data(moved).digest != ob.load_data(pictures).digest


def test_splits_are_folders_too(pictures, tmp_path):
    """train/class/file with validation and test beside it; a split without train is refused."""
    for split, part in (("train", slice(0, 20)), ("valid", slice(20, 24)), ("test", slice(24, 28))):
        for kind in sorted(pictures.iterdir()):
            (tmp_path / "split" / split / kind.name).mkdir(parents=True)
            for file in sorted(kind.iterdir())[part]:
                shutil.copy(file, tmp_path / "split" / split / kind.name)
    data = ob.load_data(tmp_path / "split")
    assert [len(data.train), len(data.validation), len(data.test)] == [100, 20, 20] and not data.splits_made
    shutil.rmtree(tmp_path / "split" / "train")
    with pytest.raises(DataError, match="none for train"):
        ob.load_data(tmp_path / "split")


def test_broken_pictures_are_named_by_file_and_line(pictures, tmp_path):
    """A missing, a cut-off and a false picture are one error that names each."""
    good = min(pictures.rglob("*.png"))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    shutil.copy(good, tmp_path / "good.png")
    (tmp_path / "data.csv").write_text("image,label\ngood.png,a\nlost.png,b\ncut.png,a\ntext.png,b\n")
    with pytest.raises(DataError) as error:
        ob.load_data(tmp_path / "data.csv")
    for line, name in ((3, "lost.png"), (4, "cut.png"), (5, "text.png")):
        assert f"line {line}" in str(error.value) and name in str(error.value)


def test_what_does_not_fit_is_refused_by_name(folder, pictures, tmp_path):
    """Text on a ViT, pictures on a text base, another processor, and a base without one."""
    base = ob.load_base(folder)
    rows = [{"text": f"{word} {i}", "label": word} for i in range(20) for word in ("good", "bad")]
    with pytest.raises(UnsupportedError, match="reads images"):
        ob.train(base, rows, "lora")
    with pytest.raises(DataError, match="no such file"):
        base.predict(["nowhere.png"])
    with pytest.raises(ConfigError, match="template"):
        ob.train(base, ob.load_data(pictures, limit=20), template="{text}!")
    ob.train(base, ob.load_data(pictures, limit=20), "lora(rank=2)", name="small", epochs=1)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_normalize=False).save_pretrained(changed)
    with pytest.raises(MismatchError, match="image processor"):
        ob.load_base(changed).load("small")
    (changed / "preprocessor_config.json").unlink()
    bare = ob.load_base(changed)
    with pytest.raises(UnsupportedError, match="preprocessor_config"):
        ob.train(bare, ob.load_data(pictures, limit=20), "lora")
    with pytest.raises(UnsupportedError, match="reads images"):
        Engine(base, ServeSettings())
    assert [stored.ref for stored in Store().list()] == ["small@1"]


def test_processor_of_a_model_built_by_hand(pictures):
    """Base(model, processor=...) reads files too, in grey where the model has one channel."""
    model = ViTModel(
        ViTConfig(
            image_size=SIZE, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_channels=1,
        )
    ).eval()  # fmt: skip
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5])
    file = min(pictures.rglob("*.png"))
    with ob.Base(model, processor=processor) as base:
        (found,) = base.predict(str(file))
        with Image.open(file) as image:
            pixels = torch.tensor(list(image.convert("L").tobytes())).reshape(1, 1, SIZE, SIZE) / 127.5 - 1
        plain = base.vectors({"pixel_values": pixels}, None, base.anatomy.pooling)[0]
        assert torch.allclose(found.embedding, plain, atol=1e-5)
