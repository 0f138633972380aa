"""Our adapter, the harness' own `hf` model and our own task files: the same numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval", reason="needs the eval extra")
pytest.importorskip("transformers", reason="needs the eval extra")
pytest.importorskip("accelerate", reason="the harness' own model needs accelerate")

from matilda_data import load_tokenizer, transformers_files
from matilda_model import ModelConfig, Transformer, export_transformers
from matilda_train.evals.encoding import DatasetCoder, encode_pairs
from matilda_train.evals.harness import evaluate_harness, harness_task
from matilda_train.evals.harness_model import HarnessModel
from matilda_train.evals.scoring import ScoredTransformer
from matilda_train.evals.task_files import TaskFile, read_tasks
from matilda_train.evals.task_scores import score_tasks
from matilda_train.evals.transformers_folder import load_folder

pytestmark = pytest.mark.filterwarnings("default")  # the harness and what it imports warn a lot

ITEMS = 24
TASKS = ("hellaswag", "lambada_openai", "winogrande")
WORDS = [
    "the",
    "a",
    "heart",
    "river,",
    "runs",
    "falls.",
    "Ünter",
    "and",
    "日本",
    "don't",
    "3.5",
    "\n",
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=320,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        max_seq_len=96,
        embed_init_std=0.3,
    )
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Qwen3 of transformers."""
    out = tmp_path_factory.mktemp("export") / "model"
    tokenizer = load_tokenizer("byte")
    text = "The heart has — ünder all — reasons."
    ids = torch.from_numpy(tokenizer.encode(text).astype(np.int64))[None]
    export_transformers(
        model,
        out,
        ids,
        eos_token_id=tokenizer.eot_id,
        tokenizer_files=transformers_files(tokenizer, max_length=96),
        check_text=text,
    )
    return out


@pytest.fixture(scope="module")
def tasks(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> list[TaskFile]:
    """Made-up items of every kind, with stray spaces, line breaks, and texts past 96 tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(5)

    def text(low: int, high: int) -> str:
        return (
            " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high))).strip(" ") or "x"
        )

    def likeliest(context: str) -> str:
        ids = load_tokenizer("byte").encode(context).tolist()[-95:]
        with torch.no_grad():
            return chr(int(model(torch.tensor([ids]))[0, -1, :128].argmax()))

    def item(task: str) -> dict[str, Any]:
        if task == "lambada_openai":
            context = text(3, 30)
            return {"context": context, "continuation": draw.choice([likeliest(context), " a"])}
        if task == "winogrande":
            contexts = [text(2, 9) + draw.choice(["", " "]) for _ in range(2)]
            return {"contexts": contexts, "continuation": text(1, 5), "label": draw.randrange(2)}
        n = draw.randint(2, 5)
        choices = [text(1, 6) + draw.choice(["", " "]) for _ in range(n)]
        return {"context": text(2, 30), "choices": choices, "label": draw.randrange(n)}

    for task in TASKS:
        rows = [json.dumps(item(task)) for _ in range(ITEMS)]
        (folder / f"{task}_val.jsonl").write_text("\n".join(rows) + "\n")
    return read_tasks(folder, TASKS)


@pytest.fixture(scope="module")
def own_scores(model: Transformer, tasks: list[TaskFile]) -> dict[str, dict[str, float]]:
    coder = DatasetCoder(load_tokenizer("byte"))
    scores = score_tasks(ScoredTransformer(model), coder, tasks)
    return {score.name: score.metrics() for score in scores}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The harness would start a pool of processes to draw bootstrap samples."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return


def assert_equal(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, float]]) -> None:
    """To four digits in every metric that the harness gives."""
    assert theirs.keys() == ours.keys()
    for task, metrics in theirs.items():
        compared = {name for name in metrics if name != "task_version"}
        assert {"items", "acc", "acc_stderr"} <= compared
        assert compared <= ours[task].keys()
        for name in compared - {"perplexity_stderr"}:  # drawn at random there
            assert metrics[name] == pytest.approx(ours[task][name], rel=1e-4, abs=1e-6), (
                task,
                name,
            )


@pytest.mark.usefixtures("one_process")
def test_our_adapter_gives_the_scores_of_the_harness_own_model(
    model: Transformer,
    folder: Path,
    tasks: list[TaskFile],
    own_scores: dict[str, dict[str, float]],
) -> None:
    from lm_eval.models.huggingface import HFLM

    made = [harness_task(task) for task in tasks]
    theirs = evaluate_harness(
        HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8), made
    )
    coder = DatasetCoder(load_tokenizer("byte"))
    adapted = evaluate_harness(HarnessModel(ScoredTransformer(model), coder), made)
    assert_equal(theirs, own_scores)
    assert_equal(adapted, own_scores)
    assert own_scores["lambada_openai"]["acc"] not in (0.0, 1.0)  # so that greedy is compared


def test_a_transformers_folder_is_scored_alike(
    folder: Path, tasks: list[TaskFile], own_scores: dict[str, dict[str, float]]
) -> None:
    scored, coder = load_folder(folder, device=torch.device("cpu"), dtype=torch.float32)
    assert (scored.max_seq_len, coder.eot_id) == (96, 256)
    scores = score_tasks(scored, coder, tasks)
    assert_equal({score.name: score.metrics() for score in scores}, own_scores)


@pytest.mark.usefixtures("one_process")
def test_rolling_likelihood_and_generation_are_those_of_the_harness_own_model(
    model: Transformer, folder: Path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    ours = HarnessModel(ScoredTransformer(model), DatasetCoder(load_tokenizer("byte")))

    def requests(kind: Any, arguments: list[Any]) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=each, idx=i)
            for i, each in enumerate(arguments)
        ]

    texts = requests(
        "loglikelihood_rolling", [("",), ("short",), (" ".join(map(str, range(80))),), ("e" * 96,)]
    )
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), rtol=1e-5
    )
    # What greedy decoding writes in the middle is a stop text that it surely meets.
    plain = {"max_gen_toks": 24, "do_sample": False}
    prompts = ["The heart", "a" * 200, "日本"]
    whole = requests("generate_until", [(prompt, {**plain, "until": []}) for prompt in prompts])
    written = ours.generate_until(whole)
    assert written == theirs.generate_until(whole)
    stops = [{**plain, "until": [text[8:10] or "\n"]} for text in written]
    stopped = requests("generate_until", list(zip(prompts, stops, strict=True)))
    shorter = ours.generate_until(stopped)
    assert shorter == theirs.generate_until(stopped)
    assert any(len(short) < len(text) for short, text in zip(shorter, written, strict=True))


def test_a_sampled_answer_is_the_same_whatever_else_is_asked(model: Transformer) -> None:
    from lm_eval.api.instance import Instance

    ours = HarnessModel(ScoredTransformer(model), DatasetCoder(load_tokenizer("byte")))
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "until": []}

    def ask(*prompts: str) -> list[str]:
        return ours.generate_until(
            [
                Instance(request_type="generate_until", doc={}, arguments=(each, options), idx=i)
                for i, each in enumerate(prompts)
            ]
        )

    many = ask("The heart", *(f"{i} of" for i in range(70)), "a river", "The heart")
    assert ask("a river", "The heart", "The heart") == [many[71], many[0], many[72]]
    assert many[0] != many[72]  # asked again, it is another draw
    assert len(set(many)) > 60


@pytest.fixture(scope="module", params=["byte", "gpt2"])
def coders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DatasetCoder, Any]:
    """Our tokenizer, and a model of the harness around transformers' reading of its export."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in transformers_files(tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    theirs = HFLM.__new__(HFLM)
    theirs.tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs.backend, theirs.add_bos_token, theirs.custom_prefix_token_id = "causal", None, None
    theirs.enable_thinking = False
    theirs._loglikelihood_tokens = lambda requests, **_: requests
    return DatasetCoder(tokenizer), theirs


pieces = st.lists(
    st.sampled_from([" ", "  ", "\n", "\t", "the", "heart", "'s", "12", "—", "日", "é", ".", " x"]),
    max_size=6,
).map("".join)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(
    texts=st.lists(st.tuples(pieces, pieces.map(lambda text: text + "a")), min_size=1, max_size=3)
)
def test_pairs_are_encoded_as_the_harness_own_model_does(
    coders: tuple[DatasetCoder, Any], texts: list[tuple[str, str]]
) -> None:
    from lm_eval.api.instance import Instance

    ours, theirs = coders
    # A context of nothing but spaces makes the harness fail.
    texts = [(context if context.strip() else "", continuation) for context, continuation in texts]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=text, idx=i)
        for i, text in enumerate(texts)
    ]
    expected = [(given, scored) for _, given, scored in theirs.loglikelihood(requests, True)]
    assert [(list(p.context), list(p.continuation)) for p in encode_pairs(ours, texts)] == expected
