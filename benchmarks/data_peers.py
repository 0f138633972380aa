"""One system, one task, one process: `python benchmarks/data_peers.py SYSTEM TASK CORPUS WORK`.

Prints one JSON object. Tasks: `prepare` (CORPUS, a .jsonl of texts, to tokens in WORK), `load`
(shuffled batches of what `prepare` left in WORK), `resume` (the first batch after restoring a state
near the end of the epoch). `benchmarks/data.py` runs them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN = 2048
BATCH = 16
LOAD_SECONDS = float(os.environ.get("DATA_BENCH_SECONDS", "4"))


def texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tiktoken_encoder() -> Callable[[str], np.ndarray]:
    """tiktoken's fastest path, as a careful user of any peer would call it."""
    from matilda_data import load_tokenizer

    tokenizer = load_tokenizer("gpt2")
    eot = np.array([tokenizer.eot_id], dtype=np.uint16)
    return lambda text: np.concatenate([eot, tokenizer.encode(text)])


def blocks(corpus: Path) -> Iterator[np.ndarray]:
    """Tokens of all documents end to end, in samples of SEQ_LEN + 1."""
    encode = tiktoken_encoder()
    rest = np.empty(0, dtype=np.uint16)
    for text in texts(corpus):
        rest = np.concatenate([rest, encode(text)])
        whole = len(rest) // (SEQ_LEN + 1) * (SEQ_LEN + 1)
        yield from rest[:whole].reshape(-1, SEQ_LEN + 1)
        rest = rest[whole:]


class Matilda:
    """This repository."""

    backend = "auto"

    def prepare(self, corpus: Path, work: Path) -> dict[str, Any]:
        from matilda_data import load_tokenizer, prepare_text

        used = load_tokenizer("gpt2").batch_encoder(self.backend)[1]
        prepare_text(corpus, work / "out", val_fraction=0, workers=1, backend=self.backend)
        return {"tokenizer": used}

    def stream(self, work: Path) -> Any:
        from matilda_data import BinStream

        return BinStream(work / "out", seq_len=SEQ_LEN, seed=0)

    def batches(self, work: Path) -> Iterator[Any]:
        stream = self.stream(work)
        while True:
            yield stream.take(BATCH)

    def resume(self, work: Path) -> Callable[[], Any]:
        return self.resume_at(work, 1.0)

    def resume_at(self, work: Path, epochs: float) -> Callable[[], Any]:
        stream = self.stream(work)
        place = max(int(stream.n_windows * epochs) - BATCH, 0)
        state = {**stream.state_dict(), "next_sample": place}

        def again() -> Any:
            fresh = self.stream(work)
            fresh.load_state_dict(state)
            return fresh.take(BATCH)

        return again


class MatildaTiktoken(Matilda):
    """This repository without the `fast` extra."""

    backend = "tiktoken"


def litdata_tokenize(path: str) -> Iterator[Any]:
    """At module level because litdata pickles it."""
    import torch

    encode = tiktoken_encoder()
    for text in texts(Path(path)):
        yield torch.from_numpy(encode(text).astype(np.int32))


class LitData:
    """litdata: `optimize` with a TokensLoader, StreamingDataLoader."""

    def prepare(self, corpus: Path, work: Path) -> dict[str, Any]:
        from litdata import TokensLoader, optimize

        optimize(
            fn=litdata_tokenize,
            inputs=[str(corpus)],
            output_dir=str(work / "out"),
            chunk_size=(SEQ_LEN + 1) * 8192,
            item_loader=TokensLoader(),
            num_workers=1,
        )
        return {"tokenizer": "tiktoken"}

    def loader(self, work: Path) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        dataset = StreamingDataset(
            str(work / "out"), item_loader=TokensLoader(block_size=SEQ_LEN + 1), shuffle=True
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)

    def batches(self, work: Path) -> Iterator[Any]:
        loader = self.loader(work)
        while True:
            yield from loader

    def resume(self, work: Path) -> Callable[[], Any]:
        return resume_at_the_end(lambda: self.loader(work))


class Mosaic:
    """mosaicml-streaming: MDSWriter of ndarray samples, StreamingDataset, torch DataLoader."""

    def prepare(self, corpus: Path, work: Path) -> dict[str, Any]:
        from streaming import MDSWriter

        columns = {"tokens": f"ndarray:uint16:{SEQ_LEN + 1}"}
        with MDSWriter(out=str(work / "out"), columns=columns) as writer:
            for sample in blocks(corpus):
                writer.write({"tokens": np.ascontiguousarray(sample)})
        return {"tokenizer": "tiktoken"}

    def loader(self, work: Path) -> Any:
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(
            local=str(work / "out"), shuffle=True, shuffle_seed=0, batch_size=BATCH
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)

    def batches(self, work: Path) -> Iterator[Any]:
        loader = self.loader(work)
        while True:
            yield from loader

    def resume(self, work: Path) -> Callable[[], Any]:
        from streaming.base.util import clean_stale_shared_memory

        loader = self.loader(work)
        iterator = iter(loader)
        for _ in range(len(loader) - 2):
            next(iterator)
        state = loader.state_dict()
        del iterator, loader
        clean_stale_shared_memory()

        def again() -> Any:
            fresh = self.loader(work)
            fresh.load_state_dict(state)
            return next(iter(fresh))

        return again


class TorchData:
    """Hugging Face `datasets` (Arrow, map) and torchdata's StatefulDataLoader."""

    def prepare(self, corpus: Path, work: Path) -> dict[str, Any]:
        import datasets

        encode = tiktoken_encoder()
        datasets.disable_progress_bars()
        lines = datasets.load_dataset(
            "json", data_files=str(corpus), split="train", cache_dir=str(work / "cache")
        )

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
            tokens = np.concatenate([encode(text) for text in batch["text"]])
            whole = len(tokens) // (SEQ_LEN + 1) * (SEQ_LEN + 1)
            return {"tokens": list(tokens[:whole].reshape(-1, SEQ_LEN + 1))}

        features = datasets.Features(
            {"tokens": datasets.Sequence(datasets.Value("uint16"), length=SEQ_LEN + 1)}
        )
        done = lines.map(
            tokenize, batched=True, remove_columns=lines.column_names, features=features
        )
        done.save_to_disk(str(work / "out"))
        return {"tokenizer": "tiktoken"}

    def loader(self, work: Path) -> Any:
        import datasets
        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        dataset = datasets.load_from_disk(str(work / "out")).with_format("numpy")
        generator = torch.Generator().manual_seed(0)
        return StatefulDataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=BATCH,
            shuffle=True,
            generator=generator,
            collate_fn=lambda rows: np.stack([row["tokens"] for row in rows]),
        )

    def batches(self, work: Path) -> Iterator[Any]:
        loader = self.loader(work)
        while True:
            yield from loader

    def resume(self, work: Path) -> Callable[[], Any]:
        return resume_at_the_end(lambda: self.loader(work))


def gpt2_encoding() -> Any:
    """tiktoken's GPT-2 with its end-of-text token, without a download."""
    import base64

    import tiktoken

    from matilda_data.tokenizer import GPT2_EOT, GPT2_PATTERN, gpt2_ranks_file

    pairs = (line.split() for line in gpt2_ranks_file().splitlines() if line)
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
        special_tokens={"<|endoftext|>": GPT2_EOT},
    )


class Datatrove:
    """datatrove: JsonlReader and DocumentTokenizer (`tokenizers`), DatatroveFolderDataset."""

    def prepare(self, corpus: Path, work: Path) -> dict[str, Any]:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer

        tokenizer = work / "tokenizer.json"
        tokenizer.write_text(self.tokenizer_json())
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(str(corpus.parent), glob_pattern=corpus.name),
                DocumentTokenizer(
                    str(work / "out"),
                    tokenizer_name_or_path=str(tokenizer),
                    eos_token="<|endoftext|>",
                    batch_size=1000,
                    shuffle_documents=False,
                ),
            ],
            tasks=1,
            workers=1,
            logging_dir=str(work / "logs"),
        ).run()
        return {"tokenizer": "tokenizers"}

    @staticmethod
    def tokenizer_json() -> str:
        from matilda_data import load_tokenizer
        from matilda_data.fast import tokenizer_json
        from matilda_data.tokenizer import GPT2_EOT, gpt2_splits

        value = json.loads(tokenizer_json(load_tokenizer("gpt2")._ranks or {}, gpt2_splits()))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        eot = {"id": GPT2_EOT, "content": "<|endoftext|>", "special": True, **flags}
        return json.dumps({**value, "added_tokens": [eot]})

    def loader(self, work: Path) -> Any:
        import torch
        from datatrove.utils.dataset import DatatroveFolderDataset
        from torchdata.stateful_dataloader import StatefulDataLoader

        dataset = DatatroveFolderDataset(str(work / "out"), seq_len=SEQ_LEN, shuffle=False)
        generator = torch.Generator().manual_seed(0)
        return StatefulDataLoader(dataset, batch_size=BATCH, shuffle=True, generator=generator)

    def batches(self, work: Path) -> Iterator[Any]:
        loader = self.loader(work)
        while True:
            yield from loader

    def resume(self, work: Path) -> Callable[[], Any]:
        return resume_at_the_end(lambda: self.loader(work))


class Nanochat:
    """nanochat's loader, which tokenizes on the way; `--peer-dir` has its checkout."""

    def prepare(self, corpus: Path, work: Path) -> dict[str, Any]:
        """Only the tokenizing its loader does, from memory to memory."""
        import pyarrow
        import pyarrow.parquet

        data = self.base(work) / "base_data_climbmix"
        data.mkdir(parents=True)
        rows = list(texts(corpus))
        cpu, wall = cpu_seconds(), time.perf_counter()
        tokenizer = self.tokenizer()
        bos = tokenizer.get_bos_token_id()
        for first in range(0, len(rows), 128):
            tokenizer.encode(rows[first : first + 128], prepend=bos, num_threads=1)
        spent = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
        for number, part in enumerate((rows, rows[:64])):  # its last file is the held-out one
            pyarrow.parquet.write_table(
                pyarrow.table({"text": part}), data / f"shard_{number:05d}.parquet", 1024
            )
        return {"tokenizer": "tiktoken, in memory", "spent": spent}

    @staticmethod
    def base(work: Path) -> Path:
        os.environ["NANOCHAT_BASE_DIR"] = str(work)
        return work

    @staticmethod
    def tokenizer() -> Any:
        from nanochat.tokenizer import RustBPETokenizer

        return RustBPETokenizer(gpt2_encoding(), "<|endoftext|>")

    def batches(self, work: Path, state: dict[str, int] | None = None) -> Iterator[Any]:
        self.base(work)
        from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit

        batches: Iterator[Any] = tokenizing_distributed_data_loader_with_state_bos_bestfit(
            self.tokenizer(),
            BATCH,
            SEQ_LEN,
            "train",
            tokenizer_threads=1,
            device="cpu",
            resume_state_dict=state,
        )
        return batches

    def resume(self, work: Path) -> Callable[[], Any]:
        """Approximate, by row group, as nanochat has it."""
        import pyarrow.parquet

        file = self.base(work) / "base_data_climbmix" / "shard_00000.parquet"
        last = pyarrow.parquet.ParquetFile(file).num_row_groups - 2
        return lambda: next(self.batches(work, {"pq_idx": 0, "rg_idx": max(last, 0), "epoch": 1}))


def resume_at_the_end(make: Callable[[], Any]) -> Callable[[], Any]:
    """A call that restores a state from near the end of the epoch and reads one batch."""
    loader = make()
    iterator = iter(loader)
    for _ in range(len(loader) - 2):
        next(iterator)
    state = loader.state_dict()

    def again() -> Any:
        fresh = make()
        fresh.load_state_dict(state)
        return next(iter(fresh))

    return again


SYSTEMS: dict[str, type[Any]] = {
    "matilda": Matilda,
    "matilda-tiktoken": MatildaTiktoken,
    "litdata": LitData,
    "mosaicml-streaming": Mosaic,
    "datasets+torchdata": TorchData,
    "datatrove": Datatrove,
    "nanochat": Nanochat,
}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_megabytes() -> float:
    """Largest resident memory of this process; `ru_maxrss` would include the parent's at fork."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1e3


def milliseconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=SYSTEMS, metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("task", choices=("prepare", "load", "resume"), help="what is measured")
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help=".jsonl of texts")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of the tokens")
    args = parser.parse_args()
    name, task, corpus, work = args.system, args.task, args.corpus, args.work
    work.mkdir(parents=True, exist_ok=True)
    system = SYSTEMS[name]()
    result: dict[str, Any] = {}
    if task == "prepare":
        size = sum(len(text.encode()) for text in texts(corpus))
        tiktoken_encoder()
        cpu, wall = cpu_seconds(), time.perf_counter()
        result.update(system.prepare(corpus, work))
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        if (spent := result.pop("spent", None)) is not None:
            cpu, wall = spent["cpu"], spent["wall"]
        result |= {"text_mb_per_cpu_s": size / cpu / 1e6, "text_mb_per_s": size / wall / 1e6}
    elif task == "load":
        batches = system.batches(work)
        for _ in range(20):
            next(batches)
        count, cpu, wall = 0, cpu_seconds(), time.perf_counter()
        while time.perf_counter() - wall < LOAD_SECONDS:
            next(batches)
            count += 1
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        result = {
            "tokens_per_cpu_s": count * BATCH * SEQ_LEN / cpu,
            "tokens_per_s": count * BATCH * SEQ_LEN / wall,
            "batches_per_s": count / wall,
            "batches_per_cpu_s": count / cpu,
        }
    elif task == "resume":
        again = system.resume(work)
        cpu, wall = cpu_seconds(), time.perf_counter()
        again()
        result = {
            "resume_ms": 1e3 * (time.perf_counter() - wall),
            "resume_cpu_ms": 1e3 * (cpu_seconds() - cpu),
        }
        if hasattr(system, "resume_at"):
            result["resume_ms_by_epochs"] = {
                str(epochs): milliseconds(system.resume_at(work, epochs))
                for epochs in (0.0, 0.5, 1.0, 3.7, 1000.25)
            }
    print("\n" + json.dumps({**result, "peak_rss_mb": peak_megabytes()}), flush=True)
    os._exit(0)  # some peers leave threads that hold the process


if __name__ == "__main__":
    main()
