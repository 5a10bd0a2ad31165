"""Tiny random models of every supported architecture, built offline in milliseconds."""

import torch
from torch import nn

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "opt")


def tiny_model(
    architecture: str = "llama", *, seed: int = 0, blocks: int = 2, gqa: bool = True, tied: bool = False
) -> nn.Module:
    """A causal language model with hidden size 64 and a vocabulary of 128; weights large enough to matter."""
    import transformers

    shared = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": blocks, "tie_word_embeddings": tied}
    rotary = {
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if gqa else 4,
        "max_position_embeddings": 128,
    }
    config = {
        "llama": lambda: transformers.LlamaConfig(**shared, **rotary),
        "mistral": lambda: transformers.MistralConfig(**shared, **rotary, sliding_window=None),
        "qwen2": lambda: transformers.Qwen2Config(**shared, **rotary),
        "qwen3": lambda: transformers.Qwen3Config(**shared, **rotary, head_dim=16),
        "opt": lambda: transformers.OPTConfig(
            **shared, ffn_dim=96, num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=64
        ),
    }[architecture]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # all of it: from_config draws from the global generator
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                0.3 * noise if parameter.dim() > 1 else float("norm" in name and "weight" in name) + 0.1 * noise
            )
    return model.requires_grad_(False).eval()


def tiny_windows(count: int = 4, length: int = 32, *, seed: int = 0) -> torch.Tensor:
    """Random token ids [count, length] for the tiny models."""
    return torch.randint(128, (count, length), generator=torch.Generator().manual_seed(seed))
