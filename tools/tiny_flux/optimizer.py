"""Muon for the hidden matrices, AdamW for everything else.

Muon replaces the momentum of a matrix by its nearest orthogonal one, found by a few Newton-Schulz steps; on
small transformers it needs about half the steps of Adam. Equal shapes are stacked, so that a step is a
handful of batched products instead of a thousand small kernels.
"""

from __future__ import annotations

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest (semi-)orthogonal matrices of [n, rows, cols], to the accuracy that Muon needs."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon whose updates have the root mean square of Adam's (0.2), so that Adam's learning rates fit."""

    def __init__(
        self, params: list[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ):
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for param in params:
            by_shape.setdefault(param.shape, []).append(param)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradient = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - momentum)
            update = orthogonalize(gradient.lerp(state["momentum"], momentum))
            scale = 0.2 * max(params[0].shape) ** 0.5
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-lr * scale)


class Optimizer:
    """Both optimizers behind one face, with a common factor on their learning rates."""

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float):
        matrices, rest = [], []
        for name, param in model.named_parameters():
            # Modulation (norm*.linear) starts at zero and is no mixing of tokens: Adam's.
            hidden = param.ndim == 2 and "blocks." in name and ".norm" not in name
            (matrices if hidden else rest).append(param)
        cuda = rest[0].is_cuda
        self.params = matrices + rest
        self.parts = [
            Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda),
        ]
        for part in self.parts:
            for group in part.param_groups:
                group["base_lr"] = group["lr"]

    def step(self, factor: float) -> None:
        """Clips the gradients, steps with `factor` times the learning rates and drops the gradients."""
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * factor
            part.step()
            part.zero_grad(set_to_none=True)
