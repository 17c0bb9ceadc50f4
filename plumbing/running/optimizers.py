"""Which optimizer takes which parameter: AdamW all of them or, next to Muon, the rest."""

import torch

from plumbing.running.adamw import AdamW


def build_optimizers(config, model) -> list:
    """AdamW and, with muon_lr > 0, Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the
    blocks' matrices. Each group knows its peak learning rate. Raises ValueError where Muon cannot be had."""
    if config.muon_lr and config.rank:
        raise ValueError(f"muon_lr={config.muon_lr}: Muon is for whole matrices; type --rank=0, or --muon_lr=0")
    if config.muon_lr and not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"muon_lr={config.muon_lr}: torch {torch.__version__} has no Muon (2.9 has); type --muon_lr=0"
        )
    # LoRA+ ("LoRA+: Efficient Low Rank Adaptation of Large Models", Hayou et al. 2024, https://arxiv.org/abs/2402.12354):
    # B, which starts at zero, takes larger steps than A. Biases go with B, as in the authors' code and in PEFT.
    ratio = config.lora_plus if config.rank else 1.0
    for_muon = []
    matrices = []
    matrices_B = []
    vectors = []  # biases and LayerNorm's weights: they are not decayed
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if config.muon_lr and p.ndim == 2 and ".h." in name:
            for_muon.append(p)
        elif ratio != 1 and name.endswith("lora_B"):
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
    groups = [group for group in groups if group["params"]]
    optimizers = [AdamW(groups, config.lr, (config.beta1, config.beta2))]
    if for_muon:
        optimizers.append(torch.optim.Muon(for_muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
