"""AdamW with a schedule, its state as flat named tensors.

Every trainable parameter takes part in every step and has state from the start, so the number of steps is one number
and the state of a resumed optimizer is the state it was saved with, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from learner.policy import whole
from leeway.config import TrainingOptions
from leeway.config.learner import Schedule

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """The optimizer of one model."""

    def __init__(self, model: nn.Module, options: TrainingOptions) -> None:
        self._options = options
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.num_steps = 0
        # Biases, norms and gates are not decayed.
        matrices = [parameter for parameter in self._parameters.values() if parameter.dim() >= 2]
        vectors = [parameter for parameter in self._parameters.values() if parameter.dim() < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": options.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.epsilon,
            fused=True,
        )
        for parameter in self._parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        options = self._options
        return scheduled_learning_rate(
            options.schedule,
            options.learning_rate,
            options.learning_rate_floor,
            options.warmup_steps,
            options.decay_steps or 0,
            self.num_steps + 1,
        )

    def zero_gradients(self) -> None:
        """Every gradient becomes zero."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The L2 norm over all gradients; not finite as soon as one entry is not."""
        return whole(torch.nn.utils.get_total_norm(self._gradients()))

    def step(self, gradient_norm: Tensor) -> None:
        """Scale gradients down to the largest norm allowed, and move the parameters."""
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._options.max_gradient_norm, gradient_norm)
        self._adamw.step()
        self.num_steps += 1

    def state(self) -> dict[str, Tensor]:
        """The moments by name: `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, the optimizer's own memory."""
        return {
            f"{moment}.{name}": self._adamw.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
        }

    def resume(self, num_steps: int) -> None:
        """Go on from `num_steps`, after the tensors of `state` were filled."""
        self.num_steps = num_steps
        for parameter in self._parameters.values():
            self._adamw.state[parameter]["step"].fill_(num_steps)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]


def scheduled_learning_rate(
    schedule: Schedule, learning_rate: float, floor: float, warmup_steps: int, decay_steps: int, step: int
) -> float:
    """The learning rate of the step-th optimizer step, counted from 1.

        warm-up     step <= W: learning_rate * step / W
        progress    p = min((step - W) / (D - W), 1)
        constant    learning_rate
        linear      floor + (learning_rate - floor) * (1 - p)
        cosine      floor + (learning_rate - floor) * (1 + cos(pi p)) / 2        (SGDR, arXiv 1608.03983, one period)

    Args:
        schedule: its name.
        learning_rate: the highest, reached at the end of the warm-up.
        floor: the lowest, from step D on; unused by constant.
        warmup_steps: W; 0 for none.
        decay_steps: D > W; unused by constant.
        step: from 1.

    Example:
        cosine, learning rate 1, floor .1, W = 10, D = 110: .5 at step 5, 1 at 10, .55 at 60, .1 from 110 on.
    """
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    if schedule == "constant":
        return learning_rate
    progress = min((step - warmup_steps) / (decay_steps - warmup_steps), 1.0)
    share = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (learning_rate - floor) * share
