"""Random models of a few thousand weights, one of each supported type, for tests that need a whole model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
_ODD = {  # sizes that differ from each other, so that a wrong axis cannot pass
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _ODD | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": _LLAMA | {"tie_word_embeddings": True},
    "mistral": _LLAMA | {"sliding_window": None},
    "qwen2": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "qwen3": _LLAMA | {"head_dim": 12},  # heads that do not add up to the hidden size
    "opt": _ODD | {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32, "dropout": 0.5},
}
TYPES = tuple(CONFIGS)


def tiny_model(model_type: str, *, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A model in evaluation mode whose every parameter, norms and biases too, is random and far from its default."""
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.3 * noise)
    return model.eval()


def tiny_windows(count: int = 3, length: int = 11, *, seed: int = 1) -> torch.Tensor:
    """Token ids of that vocabulary."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
