"""What a run stands on: device, processes, optimizers, exact resume, signals, wandb."""
