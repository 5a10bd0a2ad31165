"""Copies of a model that cost no memory."""

import copy

from torch import nn


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """New modules around the same tensors: replacing a layer or a parameter of the copy leaves the model alone.

    The tokenizer that :func:`lqedu.load_model` left with the model is shared too: a copy of its vocabulary takes longer
    than all else.
    """
    shared = [*model.parameters(), *model.buffers(), getattr(model, "lqedu_tokenizer", None)]
    return copy.deepcopy(model, memo={id(kept): kept for kept in shared})
