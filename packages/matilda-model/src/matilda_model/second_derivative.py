"""What a gradient of our own says when it is itself to be differentiated."""

from __future__ import annotations

import torch


def refuse_second_derivative() -> None:
    """Called in a custom backward pass: RuntimeError under `create_graph=True`.

    Such a pass returns values that were saved, or a kernel's, which torch takes for constants: a
    second derivative would lack their curvature without a word.
    """
    # gradients are taken with grad mode off; on means that a graph of the gradient was asked for
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "second derivatives (`create_graph=True`) need back ends that torch differentiates: "
            'choose `loss` "plain", `attention` "math", `matmul` "plain" and `norm` "plain"'
        )
