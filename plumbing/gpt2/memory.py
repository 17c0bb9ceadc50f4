"""How much memory a training takes, before minutes are spent on one that does not fit.

python -m plumbing.gpt2.memory        the table of docs/speed.md
"""

import torch

ACTIVATIONS = {"LoRA": 33, "full": 55}  # bytes a token, layer and unit of width, in half precision (measured)
# What trains: float32 with its gradient, AdamW's two moments and, for the backward pass, a copy in half precision.
TRAINED = 4 + 4 + 8 + 2  # bytes a parameter
SHAPES = {  # n_layer, n_embd, parameters in millions
    "gpt2": (12, 768, 124),
    "gpt2-medium": (24, 1024, 355),
    "gpt2-large": (36, 1280, 774),
    "gpt2-xl": (48, 1600, 1558),
}
CARDS = {"T4": 15, "A10, L4": 22, "A100 40": 39, "A100 80, H100": 79}  # GB that a program gets


def activations_bytes(n_layer: int, n_embd: int, tokens: int, scored: int, kind: str) -> int:
    """What the backward pass needs of a batch: the layers' activations, and the scored places' logits."""
    return ACTIVATIONS[kind] * n_embd * n_layer * tokens + 14 * 50257 * scored


def check_weights(model, device: str) -> None:
    """Raises ValueError if weights, gradients and moments alone are more than the GPU has free: a smaller batch would
    not help."""
    if not device.startswith("cuda"):
        return
    free, _ = torch.cuda.mem_get_info(device)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = frozen + TRAINED * n_trained
    if needed > free:
        advice = "a lower --rank" if frozen else "--rank=16, which trains 2 % of them"
        raise ValueError(
            f"the weights with gradients and AdamW's moments take {needed / 1e9:.1f} GB, {device} has "
            f"{free / 1e9:.1f} GB free: type {advice}, or a smaller --init_from"
        )


def training_bytes(name: str, kind: str, batch_size: int = 32, length: int = 60) -> int:
    """Training of a base by this name: kind "LoRA", of rank 128 in the attention, or "full"."""
    n_layer, n_embd, millions = SHAPES[name]
    n_base = millions * 10**6
    n_lora = n_layer * 128 * (n_embd + 3 * n_embd + n_embd + n_embd)  # A and B of QKV and projection
    weights = 2 * n_base + TRAINED * n_lora if kind == "LoRA" else TRAINED * n_base
    return weights + activations_bytes(n_layer, n_embd, batch_size * length, 2 * batch_size, kind)


if __name__ == "__main__":
    print("| base | training | GB | fits |\n| --- | --- | --- | --- |")
    for name in SHAPES:
        for kind, what in (("LoRA", "LoRA, r = 128"), ("full", "every weight")):
            total = training_bytes(name, kind) / 1e9
            fits = next((f"{card} and larger" for card, gb in CARDS.items() if total < 0.9 * gb), "none")
            print(f"| {name} | {what} | {total:.1f} | {fits} |")
