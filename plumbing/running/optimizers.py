"""AdamW by torch's fused kernel, with a learning rate for each kind of parameter."""

import torch


class AdamW:
    """AdamW ("Decoupled Weight Decay Regularization", Loshchilov and Hutter 2019, algorithm 2), in the form of
    torch.optim.AdamW. groups: dicts with `params` and `weight_decay`. torch's own class imports the compiler at its
    first step, which takes a second: a third of a small run's start."""

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
                    count = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            states = [self.state[p] for p in params]
            averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            gradients = [p.grad for p in params]
            beta1, beta2 = group["betas"]
            options = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
            options |= {"eps": 1e-8, "amsgrad": False, "maximize": False}
            torch._fused_adamw_(params, gradients, averages, squares, [], steps, **options)

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


def build_optimizers(config, model, left_out=()) -> list[AdamW]:
    """Of the parameters that train, without those in `left_out`. Each group knows its peak learning rate."""
    # LoRA+ ("LoRA+: Efficient Low Rank Adaptation of Large Models", Hayou et al. 2024, https://arxiv.org/abs/2402.12354):
    # B, which starts at zero, takes larger steps than A. Biases go with B, as in the authors' code and in PEFT.
    ratio = config.lora_plus if config.rank else 1.0
    matrices = []
    matrices_B = []
    vectors = []  # biases and LayerNorm's weights: they are not decayed
    for name, p in model.named_parameters():
        if not p.requires_grad or any(p is other for other in left_out):
            continue
        if ratio != 1 and name.endswith("lora_B"):
            matrices_B.append(p)
        elif p.ndim >= 2:
            matrices.append(p)
        else:
            vectors.append(p)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr": config.lr},
        {"params": matrices_B, "weight_decay": config.weight_decay, "lr": config.lr * ratio},
        {"params": vectors, "weight_decay": 0.0, "lr": config.lr * ratio},
    ]
    groups = [group | {"peak_lr": group["lr"]} for group in groups if group["params"]]
    return [AdamW(groups, config.lr, (config.beta1, config.beta2))]
