"""What a newcomer gets wrong is answered by a ValueError that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matilda_model import KVCache, ModelConfig, Transformer, generate, linear_cross_entropy

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32
)  # fmt: skip
IDS_BT = torch.arange(20).view(2, 10)


def made(**change: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**vars(CONFIG), **change}))


@pytest.mark.parametrize("shape", [(10,), (2, 5, 2), ()])
def test_ids_are_rows(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`input_ids_BT` has shape .*: give rows of ids"):
        made()(ids)
    with pytest.raises(ValueError, match="`input_ids_BT` has shape"):
        made()(ids, ids)


@pytest.mark.parametrize("shape", [(1,), (2, 1), (3,)])
def test_places_are_one_a_row(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`places_B` has shape .* each of the 2 rows"):
        made()(IDS_BT, places_B=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_is_of_the_batch(rows: int) -> None:
    cache = KVCache(CONFIG, rows, 16, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=f"holds {rows} rows and ids of 2 are given"):
        made()(IDS_BT, cache=cache)
    assert cache.filled == 0


@pytest.mark.parametrize("loss", ["fused", "fused_quack"])
def test_a_loss_of_cuda_says_so_on_a_cpu(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"'{loss}' runs on CUDA only: use 'plain' or 'auto'"):
        made(loss=loss)(IDS_BT, IDS_BT)


@pytest.mark.parametrize("attention", ["cudnn", "fa4", "fa4_joint"])
def test_an_attention_of_cuda_says_so_on_a_cpu(attention: str) -> None:
    with pytest.raises(ValueError, match=f"'{attention}' runs on CUDA only: use 'auto' or 'math'"):
        made(attention=attention)(IDS_BT)


def test_flash_attention_that_is_not_installed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matilda_model import flash4

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(flash4.importlib, "import_module", missing)
    flash4._interface.cache_clear()
    with pytest.raises(ValueError, match=r"matilda-model\[hopper\]"):
        flash4._interface()


@pytest.mark.parametrize("pattern", [1, ["S", "L"], None])
def test_a_window_pattern_is_text(pattern: Any) -> None:
    with pytest.raises(ValueError, match="`window_pattern` must be made of L and S"):
        made(window=4, window_pattern=pattern)


def test_hidden_states_of_a_loss_are_rows() -> None:
    h_BTD, weight_VD = torch.zeros(2, 2, 8), torch.zeros(16, 8)
    with pytest.raises(ValueError, match=r"\(2, 2, 8\) are no rows: flatten them to \[N, D\]"):
        linear_cross_entropy(h_BTD, weight_VD, torch.tensor([1, 2]))


def test_counts_of_tokens_are_integers() -> None:
    with pytest.raises(ValueError, match="`max_new_tokens` must be an integer"):
        generate(made(), [1, 2], max_new_tokens=2.0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"`vocab_limit` must be in 1\.\.64, an integer"):
        generate(made(), [1, 2], max_new_tokens=2, vocab_limit=10.5)  # type: ignore[call-overload]


def test_a_state_assigned_to_a_model_on_the_meta_device_completes_it() -> None:
    model = made()
    with torch.device("meta"):
        other = made()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(IDS_BT), model(IDS_BT))
    assert other.cos.device == model.cos.device
