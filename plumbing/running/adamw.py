"""AdamW by torch's fused kernel. torch's own class imports the compiler at its first step, which takes a second: a
third of a small run's start."""

import torch


class AdamW:
    """AdamW ("Decoupled Weight Decay Regularization", Loshchilov and Hutter 2019, algorithm 2), in the form of
    torch.optim.AdamW. groups: dicts with `params` and `weight_decay`."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        self.param_groups = [{"lr": lr, "betas": betas, **group} for group in groups]
        self.state = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p] = new_state(p)
            steps = [self.state[p]["step"] for p in params]
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        for p in self._params():
            p.grad = None

    def state_dict(self) -> dict:
        """As torch's: parameters are named by their place."""
        place = {p: i for i, p in enumerate(self._params())}
        groups = [group | {"params": [place[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": {place[p]: state for p, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        params = self._params()
        for i, state in saved["state"].items():
            self.state[params[i]] = {name: tensor.to(params[i].device) for name, tensor in state.items()}
        for group, values in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update(values | {"params": group["params"]})

    def _params(self):
        return [p for group in self.param_groups for p in group["params"]]


def new_state(p):
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }
