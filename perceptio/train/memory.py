"""What a model's training holds on one worker before any activation: weights, gradients, the optimizer's state."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

MASTERS_AND_MOMENTS = 12  # bytes a trained parameter: AdamW's two moments and the weights that it moves, in fp32
SUMS = 4  # of micro-batches' gradients, in fp32, where the gradients themselves are not


class ModelStates(NamedTuple):
    """Bytes on one worker's device; what is offloaded to the machine's memory instead is in `offloaded`."""

    weights: int
    gradients: int
    optimizer: int
    offloaded: int

    @property
    def on_device(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Parameters(NamedTuple):
    """Numbers of a model's parameters, each counted once; `largest` is of those that one module holds itself."""

    all: int
    trained: int
    largest: int


def count(model: nn.Module) -> Parameters:
    """The model's parameters; it may lie on torch's meta device, without a byte of them."""
    every = list(model.parameters())
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return Parameters(sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad), max(own))


def model_states(
    parameters: Parameters,
    *,
    world: int,
    stage: Literal[1, 2, 3],
    precision: str,
    offload: Literal["none", "optimizer", "all"] = "none",
) -> ModelStates:
    """The bytes under ZeRO, by DeepSpeed's own rule for its stage 2 and AdamW, with frozen parts and fp32 beside it.

    Stage 1 cuts the optimizer's state by the number of workers, 2 gradients too, 3 all, and then holds the largest
    module's weights and gradients whole. Buffers of communication, and fragments between blocks, come on top. A
    `precision` of "auto" or "bf16_autocast" has weights in fp32, as "fp32" has.
    """
    each, sums = (2, SUMS) if precision == "bf16" else (4, 0)
    cut = world if stage == 3 else 1
    weights = each * parameters.all // cut
    gradients = (each + sums) * parameters.trained // (1 if stage == 1 else world)
    optimizer = MASTERS_AND_MOMENTS * parameters.trained // world
    whole = 2 * each * parameters.largest if stage == 3 else 0
    if offload == "all":
        return ModelStates(whole, 0, 0, weights + gradients + optimizer)
    if offload == "optimizer":
        return ModelStates(weights + whole, 0, 0, gradients + optimizer)
    return ModelStates(weights + whole, gradients, optimizer, 0)
