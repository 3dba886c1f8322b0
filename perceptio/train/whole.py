"""The model as it stands between two steps, for rank 0 to ask: weights whole under every ZeRO stage, and left as they
were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def whole(engine: Any, model: nn.Module) -> Iterator[None]:
    """Every rank enters it after a step; inside, rank 0 may run `model` alone, without gradients.

    Under ZeRO-3 weights are gathered on every rank, so that each device needs room for all of them, and DeepSpeed's
    hooks are set aside: they would cut a module's weights again once it has run, and then wait for the other ranks.
    Afterwards weights, random state and each module's mode are what they were; gradients are not touched. A bit of a
    weight that changes inside is lost under ZeRO-3, and kept on one rank alone under the others: do not train inside.
    """
    import deepspeed  # in the workers alone: it takes seconds, and prints as it comes

    modes = [(part, part.training) for part in model.modules()]
    devices = [engine.device] if engine.device.type == "cuda" else []
    sharded = engine.zero_optimization_stage() == 3
    with (
        torch.random.fork_rng(devices=devices),
        deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=sharded),
        _without_hooks(engine.optimizer.parameter_offload if sharded else None),
    ):
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """Takes the hooks of ZeRO-3 out of all modules, and puts them back where they stood among others."""
    handles = [] if offload is None else [*offload.forward_hooks, *offload.backward_hooks]
    before: dict[int, tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = {}
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        before.setdefault(id(hooks), (hooks, OrderedDict(hooks)))
        del hooks[handle.id]
    try:
        yield
    finally:
        for hooks, all_of_them in before.values():
            hooks.clear()
            hooks.update(all_of_them)
