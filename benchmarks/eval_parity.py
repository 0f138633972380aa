"""Our likelihoods beside lm-evaluation-harness' own `hf` model: equal scores.

    uv run --extra eval --with accelerate benchmarks/eval_parity.py --task-dir data/evals
    uv run --extra eval --with accelerate benchmarks/eval_parity.py --task-dir data/evals \\
        --run runs/hero --device cuda --write docs/RESULTS.md
    uv run --extra eval --with accelerate benchmarks/eval_parity.py --quick

The newest checkpoint of `--run`, or a small model of random weights made on the spot, is exported
for transformers and scored in float32 by the harness' `hf` model on every item of every task; by
the harness with our model class; and by us alone. Every metric must agree to four digits. With
GPT-2's tokenizer the harness' model holds 50,304 logits for every token: that is for GPUs. The
pairs of GPT-2 tokens that both read are compared in any case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matilda_data import load_tokenizer, transformers_files
from matilda_model import ModelConfig, Transformer, export_transformers
from matilda_train import load_run_model
from matilda_train.evals import DatasetCoder, HarnessModel, ScoredTransformer, encode_pairs
from matilda_train.evals.harness import evaluate_harness, harness_task, require_harness
from matilda_train.evals.task_files import TaskFile, read_tasks
from matilda_train.evals.task_scores import score_tasks
from matilda_train.hardware import choose_device, device_name
from matilda_train.provenance import package_version
from matilda_train.report.section import replace_section

TASKS = ("hellaswag", "arc_easy", "piqa", "lambada_openai", "sciq", "winogrande")
DIGITS = 1e-4
CHECK_TEXT = "The heart has — for all that — its reasons, 1,024.5 of them."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task-dir", type=Path, help="folder of task files")
    parser.add_argument("--limit", type=int, help="first items of each task only")
    parser.add_argument("--run", type=Path, help="a run, instead of random weights")
    parser.add_argument("--tokenizer", choices=("byte", "gpt2"), default="byte")
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness' own model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="made-up items; under a minute")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--peer-dir", type=Path, help="not used: the peer is a package")
    args = parser.parse_args()
    require_harness()
    os.environ["DISABLE_MULTIPROC"] = "1"  # no pool of processes for the bootstrap
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.task_dir = made_up_tasks(Path(folder) / "tasks")
        if args.task_dir is None:
            parser.error("give --task-dir or --quick")
        tasks = read_tasks(args.task_dir, TASKS, limit=args.limit)
        results = compare(tasks, args, Path(folder))
    text = describe(results)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.write:
        replace_section(args.write, "equal scores", f"## Equal scores\n\n{text}", title="Results")
    return 0 if results["equal"] else 1


def compare(tasks: list[TaskFile], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The scores of the three ways, with their seconds."""
    from lm_eval.models.huggingface import HFLM

    device = choose_device(args.device)
    if args.run is not None:
        model, tokenizer = load_run_model(args.run, device=args.device)
        model.compute_dtype = torch.float32
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        model = random_model(tokenizer.vocab_size).to(device)
    ids = torch.from_numpy(tokenizer.encode(CHECK_TEXT).astype(np.int64))[None]
    export_transformers(
        model,
        folder / "model",
        ids,
        eos_token_id=tokenizer.eot_id,
        tokenizer_files=transformers_files(tokenizer, max_length=model.config.max_seq_len),
        check_text=CHECK_TEXT,
    )
    made = [harness_task(task) for task in tasks]
    scored, coder = ScoredTransformer(model), DatasetCoder(tokenizer)
    hf = HFLM(
        pretrained=str(folder / "model"),
        device=str(device),
        dtype="float32",
        batch_size=args.batch_size,
        trust_remote_code=True,  # ours, written just now
    )
    seconds: dict[str, float] = {}

    def timed(name: str, score: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = score()
        seconds[name] = time.perf_counter() - began
        return found

    ours = timed("ours", lambda: score_tasks(scored, coder, tasks))
    own = {score.name: score.metrics() for score in ours}
    adapted = timed(
        "harness, our class", lambda: evaluate_harness(HarnessModel(scored, coder), made)
    )
    theirs = timed("harness, hf", lambda: evaluate_harness(hf, made))
    differences = {
        f"{task} {name}": abs(found[task][name] - own[task][name]) / max(abs(own[task][name]), 1e-2)
        for found in (theirs, adapted)
        for task in own
        for name in ("items", *compared(found[task]))
    }
    pairs = compared_pairs(tasks, folder)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "run": None if args.run is None else args.run.name,
        "tokenizer": tokenizer.name,
        "shape": {"parameters": model.config.n_params, "max_seq_len": model.config.max_seq_len},
        "items": sum(len(task.items) for task in tasks),
        "sequences": sum(len(item.texts) for task in tasks for item in task.items),
        "gpt2_pairs_equal": pairs,
        "scores": {task: {"hf": theirs[task], "ours": own[task]} for task in own},
        "largest_difference": max(differences.values()),
        "equal": max(differences.values()) < DIGITS and pairs,
        "seconds": seconds,
        "hardware": device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": {n: package_version(n) for n in ("lm_eval", "transformers", "torch")},
    }


def compared(metrics: dict[str, Any]) -> list[str]:
    """Metrics with a formula; the error of the perplexity is drawn at random by the harness."""
    left_out = ("items", "task_version", "perplexity_stderr")
    return [name for name in metrics if name not in left_out]


def random_model(vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        max_seq_len=1280,
        embed_init_std=0.25,
    )
    return Transformer(config).eval()


def compared_pairs(tasks: list[TaskFile], folder: Path) -> bool:
    """Whether the harness' model and ours read the same GPT-2 tokens for every answer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer("gpt2")
    (folder / "gpt2").mkdir()
    for name, content in transformers_files(tokenizer).items():
        (folder / "gpt2" / name).write_text(content, encoding="utf-8")
    (folder / "gpt2" / "config.json").write_text('{"model_type": "qwen3"}')
    theirs = HFLM.__new__(HFLM)
    theirs.tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    theirs.backend, theirs.add_bos_token, theirs.custom_prefix_token_id = "causal", None, None
    texts = [text for task in tasks for item in task.items for text in item.texts]
    ours = encode_pairs(DatasetCoder(tokenizer), texts)
    return all(
        (list(pair.context), list(pair.continuation)) == theirs._encode_pair(*text)
        for pair, text in zip(ours, texts, strict=True)
    )


def describe(results: dict[str, Any]) -> str:
    rows = [
        "| task | items | metric | harness, `hf` | ours |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for task, scores in results["scores"].items():
        for name in compared(scores["hf"]):
            if name.endswith("_stderr"):
                continue
            cells = []
            for way in ("hf", "ours"):
                found = scores[way]
                cells.append(f"{found[name]:.6g} ± {found[name + '_stderr']:.4g}")
            rows.append(
                f"| {task} | {scores['ours']['items']:,.0f} | {name} | {cells[0]} | {cells[1]} |"
            )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    model = "A model of random weights" if results["run"] is None else "A run"
    tokens = "are the same" if results["gpt2_pairs_equal"] else "DIFFER"
    return "\n".join(
        [
            f"{model} ({results['shape']['parameters']:,} parameters, "
            f"{results['tokenizer']} tokenizer, longest sequence "
            f"{results['shape']['max_seq_len']}) on {results['items']:,} items "
            f"({results['sequences']:,} answers). Largest difference of any metric or standard "
            f"error, relative: {results['largest_difference']:.1e}"
            f"{'' if results['equal'] else ' (NOT EQUAL)'}. The perplexity's error is drawn at "
            "random by the harness and follows from a formula here. GPT-2's tokens of every answer "
            f"{tokens}.",
            "",
            *rows,
            "",
            f"`{results['command']}`; {results['hardware']}, {results['threads']} threads, "
            f"{versions}.",
        ]
    )


def made_up_tasks(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    words = ["the", "heart", "tree", "river,", "light", "falls.", "Ünter", "don't", "3.5"]

    def text(n: int) -> str:
        return " ".join(draw.choice(words) for _ in range(n))

    for task in TASKS:
        lines = []
        for _ in range(12):
            item: dict[str, Any] = {"context": text(9), "choices": [text(2), text(3)], "label": 1}
            if task == "winogrande":
                item |= {"contexts": [text(3), text(4)], "continuation": text(2)}
            elif task == "lambada_openai":
                item = {"context": text(20), "continuation": f" {text(1)}"}
            lines.append(json.dumps(item) + "\n")
        (folder / f"{task}_val.jsonl").write_text("".join(lines))
    return folder


if __name__ == "__main__":
    sys.exit(main())
