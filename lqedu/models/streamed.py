"""A dense model that stays in its files: modules without memory, filled part by part; ``21-serving``.

The modules are built on torch's meta device, where a tensor has a shape and no bytes. Embeddings, one decoder block, or the
final norm and the head are filled from the shards when they are asked for, and emptied afterwards.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lqedu.errors import CheckpointError, UnsupportedModelError
from lqedu.models.anatomy import block_list, describe
from lqedu.models.load import (
    check_device,
    check_dtype,
    empty_model,
    local_folder,
    read_config,
    read_tokenizer,
    tensors_sha256,
)
from lqedu.models.shards import Shards

_COMPUTED = ("rotary_emb.inv_freq",)  # buffers of old files that a model computes for itself


class StreamedModel:
    """A causal language model of which only the parts that are asked for are in memory.

    Attributes:
        model: the modules, in evaluation mode, their parameters on the meta device.
        tokenizer: of the model.
        tied: whether the head shares the embedding's weight.

    Args:
        name_or_path: as for :func:`lqedu.load_model`, a dense model.
        dtype, device: of the parts that are filled, as for :func:`lqedu.load_model`.

    Raises:
        UsageError, UnsupportedModelError, MissingDependencyError: as :func:`lqedu.load_model`.
        CheckpointError: weights that are missing, truncated, of another model or outside of the folder; no tensor has been
            read then.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device, self.dtype = check_device(device), check_dtype(dtype)
        folder = local_folder(str(name_or_path))
        self.model = empty_model(folder, read_config(folder), dtype, name=str(name_or_path), device=self.device)
        self._anatomy = describe(self.model)
        self._shards = Shards(folder)
        self._head, self._embedding = f"{self._anatomy.head}.weight", f"{self._anatomy.embeddings[0]}.weight"
        self.tied = self._is_tied()
        self.model.config.tie_word_embeddings = self.tied
        self._check_names(folder)
        self.tokenizer = self.model.lqedu_tokenizer = read_tokenizer(folder)
        if self.tied:
            self._tie(self.model)

    def sha256(self, check: Callable[[str, Tensor], object] = lambda name, tensor: None) -> str:
        """:func:`lqedu.models.weights_sha256` of the whole model, which reads every tensor once, one at a time.

        Args:
            check: called with the name and the values of each tensor, on the CPU, before anything is computed with it.
        """

        def read() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(self.model.state_dict()):
                tensor = self._shards.read(self._stored(name), dtype=self.dtype)
                check(name, tensor)
                yield name, tensor
                del tensor  # before the next one is read

        return tensors_sha256(read())

    def fill_embeddings(self, model: nn.Module) -> None:
        """Fill what is before the first block. ``model`` is this one's or a copy of it, here and below."""
        self._fill(model, self._anatomy.embeddings)
        if self.tied:
            self._tie(model)

    def release_embeddings(self, model: nn.Module) -> None:
        """Empty them again; a head that still shares the weight goes on sharing it."""
        shared = self.shares(model)
        for name in (*self._anatomy.embeddings, self._anatomy.head):
            model.get_submodule(name).to("meta")
        if shared:
            self._tie(model)

    def fill_head(self, model: nn.Module) -> None:
        """Fill the final norm, and a head that does not share the embedding's weight now (it may have done so before)."""
        self._fill(model, (self._anatomy.final_norm, *(() if self.shares(model) else (self._anatomy.head,))))

    def release_head(self, model: nn.Module) -> None:
        """Empty the final norm and the head again."""
        model.get_submodule(self._anatomy.final_norm).to("meta")
        if not self.shares(model):
            model.get_submodule(self._anatomy.head).to("meta")

    def blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        """The decoder blocks, in order, each filled when it is asked for and emptied when the next one is."""
        for index, block in enumerate(block_list(model)):
            self._fill(model, (f"{self._anatomy.blocks}.{index}",))
            yield block
            block.to("meta")

    def shares(self, model: nn.Module) -> bool:
        """Whether the head shares the embedding's weight, as it is now."""
        return model.get_submodule(self._anatomy.head).weight is model.get_input_embeddings().weight

    def _tie(self, model: nn.Module) -> None:
        model.get_submodule(self._anatomy.head).weight = model.get_input_embeddings().weight

    def _fill(self, model: nn.Module, parts: Iterable[str]) -> None:
        for part in parts:
            for name in [f"{part}.{name}" for name, _ in model.get_submodule(part).named_parameters()]:
                owner, _, attribute = name.rpartition(".")
                tensor = self._shards.read(self._stored(name), self.device, self.dtype)
                setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))

    def _stored(self, name: str) -> str:
        return self._embedding if self.tied and name == self._head else name

    def _is_tied(self) -> bool:
        """As transformers decides: the configuration says so, and the files hold no head, or the embedding once more."""
        if not self.model.config.tie_word_embeddings:
            return False
        if self._head not in self._shards or self._embedding not in self._shards:
            return True
        head, embedding = self._shards[self._head], self._shards[self._embedding]
        return head.shape == embedding.shape and torch.equal(
            self._shards.read(self._head), self._shards.read(self._embedding)
        )

    def _check_names(self, folder: Path) -> None:
        """Compare the files' tensors with the model's: names, shapes, and dtypes that can be weights."""
        want = {self._stored(name): tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        parts = (self._anatomy.blocks, *self._anatomy.embeddings, self._anatomy.final_norm, self._anatomy.head)
        homeless = sorted(name for name in want if not name.startswith(tuple(f"{part}." for part in parts)))
        if homeless:
            raise UnsupportedModelError(
                f"{homeless[0]} is neither embedding, block, final norm nor head; load the model"
            )
        ignored = {name for name in self._shards if name.endswith(_COMPUTED)} | ({self._head} if self.tied else set())
        problems = [f"lack {name}" for name in sorted(set(want) - set(self._shards))]
        problems += [f"hold {name} besides" for name in sorted(set(self._shards) - set(want) - ignored)]
        for name in sorted(set(want) & set(self._shards)):
            found = self._shards[name]
            if found.shape != want[name]:
                problems.append(f"hold {name} of shape {list(found.shape)}, not {list(want[name])}")
            elif found.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                problems.append(f"hold {name} in {str(found.dtype).removeprefix('torch.')}, which is no dense weight")
        if problems:
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise CheckpointError(
                f"the weights of {folder} do not belong to its configuration: they {problems[0]}{more}; fetch them again"
            )
