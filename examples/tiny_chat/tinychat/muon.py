"""The optimizer: Muon on the matrices, AdamW on the embedding and the norms, with float32 masters of bfloat16 weights.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers") replaces a matrix's momentum by its nearest orthogonal
matrix, by five Newton-Schulz steps; matrices of one shape are done in one batched product. A step costs about 22 GFLOP
for 4M parameters. State is tensors with names only, so that a checkpoint needs no pickle.
"""

from concurrent.futures import Executor

import torch
from torch import Tensor, nn

_NS_A, _NS_B, _NS_C = 3.4445, -4.7750, 2.0315
_ADAM_BETA1, _ADAM_BETA2, _ADAM_EPSILON = 0.9, 0.98, 1e-8
_MUON_MOMENTUM = 0.95


def orthogonalize(updates: Tensor) -> Tensor:
    """Approximate nearest orthogonal matrices of updates [n, rows, columns], in bfloat16."""
    x = updates.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = _NS_A * x + (_NS_B * gram + _NS_C * gram @ gram) @ x
    nearest: Tensor = x if wide else x.mT
    return nearest


class MuonAdam:
    """Updates `model`'s bfloat16 parameters from float32 masters; `muon_rate` and `adam_rate` are peak rates."""

    def __init__(self, model: nn.Module, *, muon_rate: float, adam_rate: float, weight_decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._rates = (muon_rate, adam_rate)
        self._decay = weight_decay
        self.masters = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self._by_shape: dict[tuple[int, ...], list[str]] = {}
        self._adam_names = []
        for name, parameter in self._parameters.items():
            if parameter.dim() == 2 and "embed" not in name:
                self._by_shape.setdefault(tuple(parameter.shape), []).append(name)
            else:
                self._adam_names.append(name)
        self.variance = {name: torch.zeros_like(self.masters[name]) for name in self._adam_names}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], number: int, scale: float, pool: Executor) -> None:
        """Apply float32 gradients; `number` counts from 1, `scale` in [0, 1] is the schedule's factor.

        Parts of at most six matrices run on the pool's threads.
        """
        parts = [names[start : start + 6] for names in self._by_shape.values() for start in range(0, len(names), 6)]
        work = [pool.submit(self._muon_step, names, gradients, self._rates[0] * scale) for names in parts]
        for name in self._adam_names:
            self._adam_step(name, gradients[name], number, self._rates[1] * scale)
        for part in work:
            part.result()
        for name, parameter in self._parameters.items():
            parameter.copy_(self.masters[name])

    @torch.no_grad()
    def _muon_step(self, names: list[str], gradients: dict[str, Tensor], rate: float) -> None:
        updates = []
        for name in names:
            self.momentum[name].lerp_(gradients[name], 1.0 - _MUON_MOMENTUM)
            updates.append(torch.lerp(gradients[name], self.momentum[name], _MUON_MOMENTUM))
        rows, columns = updates[0].shape
        # A tall matrix gets the factor sqrt(rows / columns), so that outputs of all layers move by the same size.
        rate_of_shape = rate * max(1.0, rows / columns) ** 0.5
        for name, update in zip(names, orthogonalize(torch.stack(updates)), strict=True):
            self.masters[name].mul_(1.0 - rate * self._decay).add_(update.float(), alpha=-rate_of_shape)

    def _adam_step(self, name: str, gradient: Tensor, number: int, rate: float) -> None:
        first = self.momentum[name].lerp_(gradient, 1.0 - _ADAM_BETA1)
        second = self.variance[name].lerp_(gradient.square(), 1.0 - _ADAM_BETA2)
        first = first / (1.0 - _ADAM_BETA1**number)
        second = second / (1.0 - _ADAM_BETA2**number)
        self.masters[name].add_(first / (second.sqrt() + _ADAM_EPSILON), alpha=-rate)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs."""
        named = {"master": self.masters, "momentum": self.momentum, "variance": self.variance}
        return {f"{kind}/{name}": tensor for kind, tensors in named.items() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `state()` back; KeyError names what is missing."""
        for key, tensor in self.state().items():
            tensor.copy_(state[key])
        for name, parameter in self._parameters.items():
            parameter.copy_(self.masters[name])
