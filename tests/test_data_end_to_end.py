"""Text and hub to a mixture that is verified, traced and trained on, by commands a user types."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_data import BinStream, documents_of, open_dataset, verify
from matilda_data.cli import main as matilda_data
from matilda_train.config_load import load_config
from matilda_train.data_source import open_streams

ROOT = Path(__file__).resolve().parent.parent
HUB = ROOT / "packages" / "matilda-data" / "tests" / "hub_server.py"


def app(name: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "apps" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    assert done.returncode == 0, done.stderr
    return done


def write_part(path: Path, kind: str, documents: int) -> None:
    draw = random.Random(kind)
    words = {
        "prose": ["the", "river", "ran", "under", "trees"],
        "code": ["def", "x", "=", "(", ")"],
    }
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(draw.choices(words[kind], k=120)) + f" {number}\n"
            row = {"text": text, "id": f"{kind}/{number}", "source": f"made up {kind}"}
            file.write(json.dumps(row) + "\n")


def test_mixture_is_prepared_in_parts_verified_traced_and_trained_on(
    tmp_path: Path, tiny_config: Path, server: TrainServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("edu-0", "prose"), ("edu-1", "prose"), ("code-0", "code")):
        write_part(tmp_path / f"{name}.jsonl", kind, 80)
    command = [
        *("--source", "prose=83", tmp_path / "edu-*.jsonl", "--source", "code=17"),
        *(tmp_path / "code-*.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1"),
    ]
    mix = tmp_path / "mix"
    app("prepare_text.py", *command, "--out-dir", mix)
    parts = [tmp_path / f"part-{number}" for number in range(2)]
    for number, part in enumerate(parts):
        said = app("prepare_text.py", *command, "--out-dir", part, "--partition", f"{number}/2")
        assert "--merge" in said.stdout
    app("prepare_text.py", *command, "--out-dir", tmp_path / "joined", "--merge", *parts)
    assert verify(tmp_path / "joined", deep=True).data_id == verify(mix, deep=True).data_id

    stream = BinStream(mix, seq_len=32, seed=0)
    sources = stream.positions(0, 1000)[0]
    assert [int((sources == number).sum()) for number in range(2)] == [830, 170]
    options = f"--seq-len 32 --seed 0 --sample 7 --text {shlex.quote(str(mix))}"
    assert matilda_data(["trace", *shlex.split(options)]) == 0
    traced = capsys.readouterr().out
    (span, *_) = documents_of(stream, 7)
    assert repr(span.id) in traced
    assert f"(made up {span.source})" in traced
    assert span.text.split("\n")[0] in traced

    annealed = load_config(tiny_config, ['data.mix=["prose=1", "2: prose=1,code=1"]'])
    first = open_streams(annealed, mix)[0]
    border = 2 * annealed.batch_size
    assert not first.positions(0, border)[0].any()
    assert first.positions(border, 100)[0].sum() == 50
    with pytest.raises(ValueError, match=r"`data\.mix`: 'soon' is no duration"):
        open_streams(load_config(tiny_config, ['data.mix=["soon: prose=1"]']), mix)

    held_out = open_streams(load_config(tiny_config, ["eval.tokens=640"]), mix)[1]
    whole = BinStream(mix, seq_len=32, seed=0, split="val", shuffle=False)
    assert held_out.n_windows == whole.n_windows > 20
    (numbers, starts), (_, all_starts) = held_out.positions(0, 20), whole.positions(0, 10**4)
    assert set(numbers.tolist()) == {0, 1}  # both sources, though the code is at the end
    spread = [number * whole.n_windows // 20 for number in range(20)]
    assert starts.tolist() == all_starts[spread].tolist()

    run = tmp_path / "run"
    assert server.run(tiny_config, run, mix) == 0, server.log.read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss_nats"] for row in rows if "loss_nats" in row]
    assert losses[-1] < losses[0]
    assert open_dataset(mix).data_id in (run / "run.json").read_text()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A local hub with the three parts of the SmolLM corpus, and a Software Heritage store."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "root"
    (root / "blobs").mkdir(parents=True)
    repository = root / "org" / "corpus"
    draw = random.Random(3)
    configs = []
    for config in ("fineweb-edu-dedup", "cosmopedia-v2", "python-edu"):
        (repository / config).mkdir(parents=True)
        rows = []
        for number in range(120):
            text = f"{config} {number} " + " ".join(
                draw.choices(["a", "tree", "of", "x = 1"], k=90)
            )
            if config == "python-edu":
                raw = text.encode()
                blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False)
                (root / "blobs" / blob.hexdigest()).write_bytes(raw)
                rows.append({"blob_id": blob.hexdigest(), "repo_name": f"someone/{number}"})
            else:
                rows.append({"text": text, "id": f"{config}-{number}"})
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), repository / config / "train-00000-of-00001.parquet"
        )
        files = [{"split": "train", "path": f"{config}/train-*"}]
        configs.append({"config_name": config, "data_files": files})
    # JSON is YAML.
    (repository / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    process = subprocess.Popen([sys.executable, str(HUB), str(root), "0"])
    while not (root / "port").exists() or not (root / "port").read_text():
        assert process.poll() is None
    yield root, f"http://127.0.0.1:{(root / 'port').read_text()}"
    process.kill()
    process.wait()


def test_smollm_75_15_10_comes_whole_from_hub_and_software_heritage(
    hub: tuple[Path, str], tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    root, address = hub
    out = tmp_path / "mix"
    app(
        "prepare_smollm.py",
        *("--out-dir", out, "--dataset", "org/corpus", "--revision", "main"),
        *("--mix", "75/15/10", "--target-tokens", "20000", "--tokenizer", "byte"),
        *("--blob-url", address + "/blobs/{blob_id}", "--val-fraction", "0.05"),
        HF_ENDPOINT=address,
        HF_HOME=str(tmp_path / "home"),
    )
    verify(out, deep=True)
    train = open_dataset(out)
    sources = {source.name: source for source in train.sources}
    assert {name: source.weight for name, source in sources.items()} == {
        "fineweb-edu-dedup": 75,
        "cosmopedia-v2": 15,
        "python-edu": 10,
    }
    longest = 600
    for name, share in (
        ("fineweb-edu-dedup", 15000),
        ("cosmopedia-v2", 3000),
        ("python-edu", 2000),
    ):
        assert share <= sources[name].n_tokens < share + longest, name
    stream = BinStream(train, seq_len=64, seed=1, weights={"python-edu": 1})
    span = documents_of(stream, 0)[0]
    assert (root / "blobs" / span.id).read_bytes().decode().find(span.text) >= 0
    assert span.origin.startswith("someone/")
