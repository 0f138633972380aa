"""Partitions, merging, quotas, the fast backend and Ray: always the same bytes."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import matilda_data.engine as engine_module
import matilda_data.fast as fast_module
import matilda_data.inputs as inputs_module
from matilda_data import DataError, Manifest, TextSource, load_tokenizer, open_dataset, prepare_text
from matilda_data.documents import ReadOptions
from matilda_data.packer import PackOptions, SourceParts, select
from matilda_data.parts import encode_unit
from matilda_data.prepare import Settings


def contents(data_dir: Path) -> dict[str, str]:
    return {
        path.relative_to(data_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in data_dir.rglob("*")
        if path.is_file()
    }


def prepare(corpus: object, out: Path, **options: object) -> Manifest:
    base = {"tokenizer": "byte", "shard_tokens": 4000, "val_fraction": 0.2, "workers": 1}
    return prepare_text(corpus, out, **{**base, **options})  # type: ignore[arg-type]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """About twenty units of the corpus."""
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 3000)


@pytest.mark.usefixtures("small_units")
def test_partitions_merge_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in range(3)]
    for i, part in enumerate(parts):
        prepare(corpus, part, partition=(i, 3))
        with pytest.raises(DataError, match="incomplete"):
            open_dataset(part)
    work = [(part / ".prepare" / "journal.jsonl").read_bytes().count(b"\n") for part in parts]
    assert min(work) > 1
    done: list[int] = []
    prepare(corpus, tmp_path / "out", merge=parts, progress=lambda row: done.append(row.documents))
    assert done[0] == 60
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # A partition that is missing is done here instead.
    prepare(corpus, tmp_path / "two", merge=parts[:2])
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")
    with pytest.raises(DataError, match="holds no partition's work"):
        prepare(corpus, tmp_path / "none", merge=[tmp_path / "nowhere"])
    # Its parts would be of no use, and all would be done again here in silence.
    with pytest.raises(DataError, match=r"part0' was prepared with `tokenizer_sha256`"):
        prepare(corpus, tmp_path / "none", merge=parts, tokenizer="gpt2")
    with pytest.raises(DataError, match=r"part0' was prepared with `text_policy`"):
        prepare(corpus, tmp_path / "none", merge=parts, invalid_utf8="replace")
    with pytest.raises(DataError, match=r"`partition` is \(3, 3\)"):
        prepare(corpus, tmp_path / "none", partition=(3, 3))


@pytest.mark.usefixtures("small_units")
def test_damaged_partition_is_done_again_when_merged(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "whole")
    prepare(corpus, tmp_path / "part", partition=(0, 2))
    victim = sorted((tmp_path / "part" / ".prepare" / "parts").glob("*.tokens"))[0]
    victim.write_bytes(victim.read_bytes()[:-2])
    prepare(corpus, tmp_path / "out", merge=[tmp_path / "part"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_units")
def test_unfinished_work_is_not_given_up_for_other_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(corpus, tmp_path / "whole")
    other = tmp_path / "other"
    other.mkdir()
    (other / "other.txt").write_text("another text")
    out = tmp_path / "out"
    prepare(corpus, out, partition=(0, 2), command="prepare corpus")
    before = contents(out)
    monkeypatch.setattr(engine_module, "TEXT_WORTH_KEEPING", 1)
    said = (
        r"out' holds [\d,]+ tokens of an unfinished preparation of other inputs; finish that with "
        r"its own command \(`prepare corpus`\), choose another output directory, or delete it"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=said):
            prepare(other, out, command="prepare other")
        assert contents(out) == before
    prepare(corpus, out)
    assert contents(out) == contents(tmp_path / "whole")
    # What shares some of the text goes on with it, and other options are no slip of the hand.
    for options in ({"exclude": ["z.jsonl"]}, {"invalid_utf8": "replace"}):
        again = tmp_path / next(iter(options))
        prepare(corpus, again, partition=(0, 2))
        assert prepare(corpus, again, **options).shards
    little = tmp_path / "little"
    prepare(corpus, little, partition=(0, 2))
    monkeypatch.undo()
    assert len(prepare(other, little).shards) == 1


def test_token_quota_cuts_at_a_document_and_ignores_what_follows(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 3000)
    settings = Settings(
        tokenizer="byte",
        shard_tokens=4000,
        val_fraction=0.2,
        workers=1,
        runner="local",
        backend="auto",
        deduplicate=True,
        read=ReadOptions(),
    )
    units = inputs_module.plan_units(inputs_module.find_files([corpus], exclude=(), include=None))
    records = [
        encode_unit(
            unit,
            unit.key(settings.unit_settings()),
            tmp_path,
            tokenizer="byte",
            backend="auto",
            options=ReadOptions(),
        )
        for unit in units
    ]

    def chosen(n_units: int, quota: int | None) -> tuple[list[list[bool]], int, bool]:
        source = SourceParts(
            name="s", weight=1, origin={}, records=records[:n_units], train_tokens=quota
        )
        again = SourceParts(name="t", weight=1, origin={}, records=records[:n_units])
        first, second = select([source, again], tmp_path, settings.pack)
        masks = [mask.tolist() for mask in (*first.train, *first.val)]
        if quota is None:
            assert not any(mask.any() for mask in (*second.train, *second.val))
        return masks, first.train_tokens, first.satisfied

    _, total, satisfied = chosen(len(units), None)
    assert satisfied
    quota = total // 2
    _, tokens, satisfied = chosen(len(units), quota)
    assert satisfied
    assert quota <= tokens < quota + 2000
    fewer = next(n for n in range(len(units)) if chosen(n, quota)[2])
    assert fewer < len(units)
    assert chosen(fewer, quota)[1] == tokens
    assert chosen(len(units), total + 1)[2] is False


def test_duplicates_of_what_a_quota_cut_off_are_kept(tmp_path: Path) -> None:
    options = PackOptions(shard_tokens=4000, val_threshold=0, deduplicate=True)
    for i, text in enumerate(["one", "two", "three"]):
        (tmp_path / f"{i}.txt").write_text(text)
    units = inputs_module.plan_units(inputs_module.find_files([tmp_path], exclude=(), include=None))
    record = encode_unit(
        units[0], "key", tmp_path, tokenizer="byte", backend="auto", options=ReadOptions()
    )
    cut = SourceParts(name="a", weight=1, origin={}, records=[record], train_tokens=5)
    rest = SourceParts(name="b", weight=1, origin={}, records=[record])
    first, second = select([cut, rest], tmp_path, options)
    assert first.train[0].tolist() == [True, True, False]
    assert second.train[0].tolist() == [False, False, True]


def test_selections_of_all_parts_share_one_array(corpus: Path, tmp_path: Path) -> None:
    # A view keeps its whole array: one array a part would be documents × parts of memory.
    options = PackOptions(shard_tokens=4000, val_threshold=1 << 62, deduplicate=True)
    units = inputs_module.plan_units(
        inputs_module.find_files([corpus / "a", corpus / "z.jsonl"], exclude=(), include=None)
    )
    records = [
        encode_unit(unit, f"{i}", tmp_path, tokenizer="byte", backend="auto", options=ReadOptions())
        for i, unit in enumerate([*units, *units])
    ]
    (selection,) = select(
        [SourceParts(name="s", weight=1, origin={}, records=records)], tmp_path, options
    )
    for masks in (selection.train, selection.val):
        assert len(masks) == 2 * len(units) >= 4
        assert all(mask.base is masks[0].base is not None for mask in masks)
        assert len(masks[0].base) == sum(len(mask) for mask in masks) == 120


def test_backends_are_named_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = load_tokenizer("gpt2")
    assert load_tokenizer("byte").batch_encoder("fastokens")[1] == "byte"
    assert gpt2.batch_encoder("tiktoken")[1] == "tiktoken"
    with pytest.raises(DataError, match="unknown backend 'rust'"):
        gpt2.batch_encoder("rust")
    monkeypatch.setattr(fast_module.importlib, "import_module", _absent)
    assert gpt2.batch_encoder("auto")[1] == "tiktoken"
    with pytest.raises(DataError, match=r"pip install 'matilda-data\[fast\]'"):
        gpt2.batch_encoder("fastokens")


def _absent(name: str) -> object:
    raise ImportError(name)


class WrongTokenizer:
    """A stand-in for fastokens that is right on the parity text and wrong elsewhere."""

    wrong_from_start = False

    class Tokenizer:
        @staticmethod
        def from_json_str(tokenizer: str) -> object:
            assert json.loads(tokenizer)["model"]["vocab"]["Ġthe"] == 262
            return WrongTokenizer()

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        ids, lengths = load_tokenizer("gpt2")._one_by_one(texts)
        wrong = ids.astype("<u4")
        if self.wrong_from_start or texts != list(fast_module.PARITY_TEXTS):
            wrong = wrong + 1
        return wrong.tobytes(), np.cumsum([0, *lengths]).astype("<u8").tobytes()


def test_fast_backend_that_disagrees_is_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = load_tokenizer("gpt2")
    texts = ["some text", "and more of it"]
    expected = gpt2.batch_encoder("tiktoken")[0](texts)[0].tolist()
    monkeypatch.setattr(fast_module.importlib, "import_module", lambda name: WrongTokenizer)
    encode, used = gpt2.batch_encoder("auto")
    assert used == "fastokens"
    assert encode(texts)[0].tolist() == expected  # found in the batch, encoded by tiktoken
    assert "differs from tiktoken" in caplog.text
    monkeypatch.setattr(WrongTokenizer, "wrong_from_start", True)
    assert gpt2.batch_encoder("auto")[1] == "tiktoken"


@pytest.mark.skipif(importlib.util.find_spec("fastokens") is None, reason="fastokens not installed")
def test_fastokens_gives_the_same_data_set(corpus: Path, tmp_path: Path) -> None:
    sources = [TextSource(name="all", inputs=corpus)]
    for backend in ("tiktoken", "fastokens"):
        prepare(sources, tmp_path / backend, tokenizer="gpt2", backend=backend)
    assert contents(tmp_path / "tiktoken") == contents(tmp_path / "fastokens")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray not installed")
@pytest.mark.usefixtures("small_units")
@pytest.mark.filterwarnings("ignore")
def test_ray_cluster_that_loses_a_node_gives_the_same_data_set(
    corpus: Path, tmp_path: Path
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    prepare(corpus, tmp_path / "whole")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=2)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        seen: list[int] = []

        def progress(row: object) -> None:
            seen.append(1)
            if len(seen) == 4:
                cluster.remove_node(doomed, allow_graceful=False)

        prepare(corpus, tmp_path / "out", runner="ray", progress=progress)
        assert len(seen) > 8
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_file_system_without_locks_is_told_as_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    # A mock, as a file system without locks can be mounted by root alone.
    monkeypatch.setattr(engine_module.fcntl, "flock", no_locks)
    told = r"cannot lock '.*/out/\.prepare/lock': Function not implemented; choose a directory"
    with pytest.raises(DataError, match=told):
        prepare(corpus, tmp_path / "out")


def test_unknown_or_missing_runner_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`runner` is 'slurm'"):
        prepare(corpus, tmp_path / "out", runner="slurm")
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(DataError, match=r"pip install 'matilda-data\[ray\]'"):
            prepare(corpus, tmp_path / "out", runner="ray")
        assert not (tmp_path / "out").exists()
