"""Random number generator state as data: Python, numpy, torch CPU and every CUDA device.

Restore it last, just before the first batch: building a model draws numbers too.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Literal

Devices = Literal["all", "current"]


def capture_rng(cuda: Devices = "all") -> dict[str, object]:
    """Current state of the global generators as JSON values and uint8 tensors.

    `cuda` says whose generators on GPUs: of all that the process sees, or of the current device
    alone, which suits one process a GPU: the state then fits a launch on another number of them.
    numpy's is included when numpy is imported, CUDA's when CUDA has been initialised (capturing
    never creates a CUDA context).
    """
    import torch

    version, internal, gauss = random.getstate()
    state: dict[str, object] = {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "torch_cpu": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        import numpy as np

        name, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)
        state["numpy"] = {
            "name": str(name),
            "keys": [int(key) for key in keys],
            "pos": int(pos),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        }
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available() and initialized:
        state["torch_cuda"] = [torch.cuda.get_rng_state(device) for device in _devices(cuda)]
    return state


def restore_rng(state: Mapping[str, object], cuda: Devices = "all") -> None:
    """Put back what `capture_rng` returned.

    With `cuda="current"` the current device's generator takes the first stored state of a GPU,
    however many there are. Raises ValueError when the state is malformed, or with `cuda="all"` when
    it is of more CUDA devices than this process sees.
    """
    import torch

    try:
        python = state["python"]
        torch_cpu = state["torch_cpu"]
        assert isinstance(python, Mapping)
        assert isinstance(torch_cpu, torch.Tensor)
        random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
        torch.set_rng_state(torch_cpu)
        if "numpy" in state:
            import numpy as np

            numpy_state = state["numpy"]
            assert isinstance(numpy_state, Mapping)
            np.random.set_state(
                (
                    numpy_state["name"],
                    np.array(numpy_state["keys"], dtype=np.uint32),
                    numpy_state["pos"],
                    numpy_state["has_gauss"],
                    numpy_state["cached_gaussian"],
                )
            )
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"this is not a state that `capture_rng` returned: {error!r}") from error
    stored = state.get("torch_cuda")
    if isinstance(stored, list) and stored and torch.cuda.is_available():
        devices = _devices(cuda)
        if cuda == "all" and len(stored) > len(devices):
            raise ValueError(
                f"the RNG state is of {len(stored)} CUDA devices and this process sees "
                f'{len(devices)}; resume on as many, or use `RngState("current")` in a program '
                "of one process a GPU"
            )
        for device, value in zip(devices, stored, strict=False):
            torch.cuda.set_rng_state(value, device)


def _devices(cuda: Devices) -> list[int]:
    import torch

    if cuda == "current":
        return [torch.cuda.current_device()]
    return list(range(torch.cuda.device_count()))


class RngState:
    """The global generators as an object to put into the saved mapping; restored last.

    `cuda` as in `capture_rng` and `restore_rng`.
    """

    def __init__(self, cuda: Devices = "all") -> None:
        self._cuda = cuda

    def state_dict(self) -> dict[str, object]:
        return capture_rng(self._cuda)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        restore_rng(state, self._cuda)
