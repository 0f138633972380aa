"""Clocks, power, temperature and throttling of the GPU, as the driver's NVML reports them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

__all__ = ["GpuHealth", "throttle_reasons"]

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h); idling and set clocks are no throttling.
REASONS = {
    0x0000000000000004: "power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000010: "sync boost",
    0x0000000000000020: "temperature (software)",
    0x0000000000000040: "temperature (hardware)",
    0x0000000000000080: "power brake",
}


class GpuHealth:
    """The newest sample of one GPU; taken by a thread, so that the loop never waits for NVML.

    Says nothing (`read()` is empty) without a GPU, without `nvidia-ml-py`
    (`pip install 'matilda-train[nvml]'`), and where the driver refuses.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._thread: ThreadPoolExecutor | None = None
        if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
            return
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu-health")
        self._sample: Future[dict[str, Any]] = self._thread.submit(self._take)

    def read(self) -> dict[str, Any]:
        """The newest sample if there is a new one; the next is taken while training goes on."""
        if self._thread is None or not self._sample.done():
            return {}
        sample = self._sample.result()
        if sample:
            self._sample = self._thread.submit(self._take)
        else:
            self.close()
        return sample

    def close(self) -> None:
        """Take no more samples."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def _take(self) -> dict[str, Any]:
        """One sample; what the driver does not tell is left out, no driver leaves all out."""
        import pynvml

        if self._handle is None:
            try:
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
            except pynvml.NVMLError:
                return {}
        gpu = self._handle
        questions: dict[str, Callable[[], Any]] = {
            "gpu_sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "gpu_power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "gpu_temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(
                gpu, pynvml.NVML_TEMPERATURE_GPU
            ),
            "gpu_throttle_reasons": lambda: throttle_reasons(
                pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
            ),
        }
        sample = {}
        for field, ask in questions.items():
            # old drivers lack some functions, virtual GPUs refuse some questions
            with suppress(pynvml.NVMLError, AttributeError):
                sample[field] = ask()
        return sample


def throttle_reasons(bits: int) -> str:
    """The names of NVML's reasons for lower clocks, comma-separated; empty for none."""
    return ", ".join(name for bit, name in REASONS.items() if bits & bit)
