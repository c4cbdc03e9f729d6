"""Small float64 networks whose Hessian can be written out in full."""

import torch
from torch import nn
from torch.nn import functional


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.pointwise = nn.Conv2d(3, 4, 1, stride=2, bias=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x)))
        return self.head(self.drop(torch.tanh(self.pointwise(x)).mean((2, 3))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.norm(x).mean(1))


def _mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))


def network(kind):
    """(model, data): a float64 model in training mode and one batch of 8."""
    torch.manual_seed(3)
    model, inputs = {
        "mlp": lambda: (_mlp(), torch.randn(8, 5, dtype=torch.float64)),
        "conv": lambda: (ConvNet(), torch.randn(8, 2, 4, 4, dtype=torch.float64)),
        "attention": lambda: (Attention(), torch.randint(0, 7, (8, 5))),
    }[kind]()
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that differ from the batch's, so that the mode matters
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model, (inputs, torch.randint(0, 3, (8,)))


def dense_hessian(model, loss_fn, data, names=None, train=False):
    """The Hessian by torch.func, row by row: independent of the code under test."""
    inputs, targets = data
    names = [name for name, _ in model.named_parameters()] if names is None else list(names)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [parameters[name].shape for name in names]
    was_training = model.training
    model.train(train)

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        chosen = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss_fn(torch.func.functional_call(model, {**parameters, **chosen}, (inputs,)), targets)

    flat = torch.cat([parameters[name].reshape(-1) for name in names])
    H = torch.autograd.functional.hessian(loss, flat)
    model.train(was_training)
    return H
