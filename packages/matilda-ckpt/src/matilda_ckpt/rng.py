"""Random number generator state as data: Python, numpy, torch CPU and every CUDA device.

Restore it last, just before the first batch: building a model draws numbers too.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping


def capture_rng() -> dict[str, object]:
    """Current state of the global generators as JSON values and uint8 tensors.

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
        state["torch_cuda"] = [
            torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())
        ]
    return state


def restore_rng(state: Mapping[str, object]) -> None:
    """Put back what `capture_rng` returned.

    Raises ValueError when the state is malformed, or was captured on another number of CUDA
    devices than this process sees (a single stored device fits any number).
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
        count = torch.cuda.device_count()
        if len(stored) > count:
            raise ValueError(
                f"the RNG state is of {len(stored)} CUDA devices and this process sees {count}; "
                "resume on as many, or drop `torch_cuda` from the state"
            )
        for device, value in enumerate(stored):
            torch.cuda.set_rng_state(value, device)


class RngState:
    """The global generators as an object to put into the saved mapping; restored last."""

    def state_dict(self) -> dict[str, object]:
        return capture_rng()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        restore_rng(state)
