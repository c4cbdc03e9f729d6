"""Torch's fused transformer paths, which read layers' weights instead of calling the layers."""

from torch import nn


def leave_fast_paths(model: nn.Module) -> None:
    """Keeps torch's transformer layers on the path that calls their linear layers, and off nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
