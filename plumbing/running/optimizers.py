"""AdamW with a learning rate for each kind of parameter."""

from plumbing.running.adamw import AdamW


def build_optimizers(config, model, left_out=()) -> list:
    """[AdamW] of the parameters that train, without those in `left_out`. Each group knows its peak learning rate."""
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
