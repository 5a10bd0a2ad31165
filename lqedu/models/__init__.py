"""Models: how they are loaded, and where their linear layers are."""

from lqedu.models.anatomy import Anatomy, Stage, block_list, describe, linears
from lqedu.models.load import load_model, weights_sha256

__all__ = ["Anatomy", "Stage", "block_list", "describe", "linears", "load_model", "weights_sha256"]
