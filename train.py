"""Fine-tunes GPT-2 with LoRA (or, with rank=0, all of its weights), evaluates, saves, logs.

    python train.py configs/finetune_params_config.py --rank=16
    python train.py --init_from=resume --out_dir=out
    torchrun --standalone --nproc_per_node=2 train.py configs/finetune_params_config.py

In out_dir: adapter_model.safetensors and adapter_config.json (the best adapter, PEFT's format) or, without
LoRA, model.safetensors and config.json; checkpoint.pt (to resume from), train_config.json, metrics.jsonl,
loss.png.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import RESUMED, configure, fingerprint, one_line_errors
from dataloader import make_loader
from lora import (
    ADAPTER_WEIGHTS,
    add_to_check,
    mark_only_lora_as_trainable,
    parameter_report,
    save_adapter,
    whole_file,
    write_json,
)
from model import GPT, GPTConfig, context_size, keep_memory, pick_device, pick_dtype

CHECKPOINT = "checkpoint.pt"


class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = config.device
        if self.world > 1:
            if config.batch_size < self.world:
                raise ValueError(
                    f"batch_size={config.batch_size}: type at least one example for each of {self.world} processes"
                )
            on_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
            if on_cuda:
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if on_cuda else "gloo")
        self.device = pick_device(self.device)
        self.first = self.rank == 0

    def sum(self, values):
        """Sum over the processes of a list of floats."""
        if self.world == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()

    def sum_gradients(self, params):
        """One reduction for all of them: the gradient of the global batch, on every process."""
        if self.world == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        for p, part in zip(params, flat.split([p.numel() for p in params])):
            p.grad = part.view_as(p)


def also_trained(config):
    """The regular expression of the parameters trained beside LoRA's; a classifier's new head is always."""
    head = [r"^score\."] if config.task == "classify" else []
    return "|".join(head + ([config.trainable] if config.trainable else [])) or None


def build_model(config, device, dtype, n_classes=0):
    """The base model of a config on its device, with fresh adapters, the right parameters trainable."""
    lora = {"lora_rank": config.rank, "lora_alpha": config.alpha, "lora_targets": config.lora_targets}
    lora["n_classes"] = n_classes
    lora |= {"lora_dropout": config.dropout} if config.rank else {"dropout": config.dropout}
    if config.init_from == "scratch":
        if config.rank:
            raise ValueError("init_from=scratch trains every weight: type --rank=0")
        sizes = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd", "block_size")}
        model = GPT(GPTConfig(**sizes, **lora))
    else:
        # What is frozen is stored in the compute dtype from the start; what trains stays float32.
        frozen = config.rank and config.lora_bias == "none" and not also_trained(config)
        model = GPT.from_pretrained(config.init_from, dtype=dtype if frozen else torch.float32, **lora)
    if config.rank or config.trainable:
        mark_only_lora_as_trainable(model, config.lora_bias, also_trained(config))
    return model.to(device).set_dtype(dtype)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) by torch's fused kernel, and in the form of torch's own class.
    That one imports the compiler at its first step, which takes a second, a third of a small run's start."""

    def __init__(self, groups, lr, betas):
        self.param_groups = [{"lr": lr, "betas": betas, **group} for group in groups]
        self.state = {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)} | moments
            step, m, v = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(step, 1)
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            options = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": decay, "eps": 1e-8}
            gradients = [p.grad for p in params]
            torch._fused_adamw_(params, gradients, m, v, [], step, **options, amsgrad=False, maximize=False)

    def zero_grad(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = None

    def state_dict(self):
        places = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        groups = [group | {"params": [places[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": {places[p]: state for p, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved):
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in saved["state"].items():
            self.state[params[i]] = {name: tensor.to(params[i].device) for name, tensor in state.items()}
        for group, values in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update(values | {"params": group["params"]})


def build_optimizers(config, model):
    """AdamW, with Muon for the blocks' matrices if the config asks for it. Each group knows its peak rate."""
    if config.muon_lr and config.rank:
        raise ValueError(f"muon_lr={config.muon_lr}: Muon is for whole matrices; type --rank=0, or --muon_lr=0")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in trained if config.muon_lr and p.ndim == 2 and ".h." in n]
    rest = [p for _, p in trained if all(p is not m for m in muon)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [AdamW([g for g in groups if g["params"]], config.lr, (config.beta1, config.beta2))]
    if muon:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"muon_lr={config.muon_lr}: torch {torch.__version__} has no Muon (2.9 has); type --muon_lr=0"
            )
        optimizers.append(torch.optim.Muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def schedule(config, it):
    """The learning rate at update `it` as a share of its peak: a linear rise, a plateau, a linear fall to 0."""
    rise = (it + 1) / max(1, config.warmup_iters)
    fall = (config.max_iters - it) / max(1.0, config.decay_share * config.max_iters)
    return min(1.0, rise, fall)


def batch_loss(model, batch, n_sampled=0):
    """Mean loss over a batch's targets. The prompts' shared prefix goes through the model once, with its
    gradient, and every row continues from it."""
    options = {"prefix": batch.prefix, "class_weights": batch.class_weights, "n_sampled": n_sampled}
    return model(batch.idx, batch.targets, **options)[1]


@torch.no_grad()
def evaluate(config, model, loader, processes, split="validation"):
    """Mean loss over the split's targets (or over about eval_iters batches of it, evenly spread)."""
    model.eval()
    batches = loader.order(split, loader.eval_batch_size)
    if config.eval_iters:
        batches = batches[:: max(1, len(batches) // config.eval_iters)][: config.eval_iters]
    total, count = 0.0, 0
    for indices in batches[processes.rank :: processes.world]:
        n = loader.n_scored(split, indices)
        total += batch_loss(model, loader.batch(split, indices).to(processes.device)).item() * n
        count += n
    model.train()
    total, count = processes.sum([total, count])
    return total / count


def train_update(config, model, loader, processes, indices, it, scaler):
    """Gradients of the global batch `indices` into .grad; returns its mean loss."""
    # Chance depends on the update alone, so a resumed run draws the same and no random state is stored.
    torch.manual_seed((config.seed * 1_000_003 + it * 1009 + processes.rank) % 2**63)
    n_global, loss = loader.n_scored("train", indices), 0.0
    for start in range(0, len(indices), config.batch_size):
        mine = indices[start : start + config.batch_size][processes.rank :: processes.world]
        if len(mine):
            share = loader.n_scored("train", mine) / n_global  # so every scored token weighs the same
            part = batch_loss(model, loader.batch("train", mine).to(processes.device), config.n_sampled) * share
            scaler.scale(part).backward()
            loss += part.detach()
    return loss


def lock(config):
    """A file that keeps a second run out of out_dir until this process ends. Raises ValueError if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    os.makedirs(config.out_dir, exist_ok=True)
    f = open(os.path.join(config.out_dir, ".lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise ValueError(f"out_dir={config.out_dir}: another run is writing there; type another --out_dir") from e
    return f


def checksum(state):
    """SHA-256 of nested dicts and lists of tensors and plain values: torch.load does not notice a changed bit."""
    check = hashlib.sha256()

    def add(path, value):
        if torch.is_tensor(value):
            add_to_check(check, path, value.cpu())
        elif isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                add(f"{path}/{key}", item)
        else:
            check.update(f"{path} {value!r}".encode())

    add("", state)
    return check.hexdigest()


def save_checkpoint(config, model, optimizers, scaler, progress):
    """All that a resumed run needs, in one file, so that no instant leaves half of it. Raises OSError, with the
    room that is needed, if it cannot be written."""
    state = {
        "progress": progress,
        "trained": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
        "optimizers": [o.state_dict() for o in optimizers],
        "scaler": scaler.state_dict(),
    }
    path = os.path.join(config.out_dir, CHECKPOINT)
    try:
        with whole_file(path) as f:
            torch.save(state | {"sha256": checksum(state)}, f)
    except (OSError, RuntimeError) as e:  # torch's writer wraps some
        moments = sum(
            t.nbytes for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)
        )
        room = (sum(p.nbytes for p in state["trained"].values()) + moments) / 1e6
        reason = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise OSError(
            f"{path} could not be written, it takes {room:.0f} MB beside the last one, which is whole ({reason})"
        ) from e


def load_checkpoint(config, model, optimizers, scaler):
    """The progress of out_dir's checkpoint, whose state goes into the arguments; that of a new run if there is
    none."""
    path = os.path.join(config.out_dir, CHECKPOINT)
    if not config.resume or not os.path.exists(path):
        return {"iter": 0, "best": None, "losses": [], "metrics": []}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop("sha256") != checksum(state):
            raise ValueError("its content is not what was written, SHA-256 differs")
        trained = state["trained"]
    except Exception as e:  # zip, pickle and torch each raise their own
        reason = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise ValueError(f"{path} is damaged ({reason}); start again with another --out_dir") from e
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    different = ours.keys() ^ trained.keys() or [n for n in ours if ours[n].shape != trained[n].shape]
    if different:
        raise ValueError(f"{path} was made for another model: {sorted(different)[0]} differs")
    with torch.no_grad():
        for name, param in ours.items():
            param.copy_(trained[name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        kept = [{k: g[k] for k in ("peak_lr", "weight_decay", "betas") if k in g} for g in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, values in zip(optimizer.param_groups, kept):
            group.update(values)  # an --lr typed on resuming wins
    scaler.load_state_dict(state["scaler"])
    return state["progress"]


def save_best(config, model, dtype):
    """The adapter in PEFT's format or, without LoRA, the model in Hugging Face's."""
    if config.rank:
        save_adapter(model, config.out_dir, config.init_from, config.lora_bias, also_trained(config))
    else:
        model.save_pretrained(config.out_dir, dtype=dtype)


def label_ends(ax, ends):
    """Names at the right ends of lines, (x, y, name, color) each, a line's height apart."""
    (low, high), place = ax.get_ylim(), -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + 0.07 * (high - low))
        style = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        ax.annotate(name, (x, place), (6, 0), color=color, **style)


def draw_curves(ax, curves, colors, what):
    """Losses over updates, {name: [points, ...]}: each name stands at its curve's end, the steep start is cut off."""
    seen = [y for lines in curves.values() for points in lines for x, y in points if x >= 0.2 * points[-1][0]]
    margin = 0.12 * (max(seen) - min(seen) or max(seen))
    ax.set(xlabel="update", ylabel=f"{what} (nats per scored token)", ylim=(min(seen) - margin, max(seen) + margin))
    for lines, color in zip(curves.values(), colors):
        for points in lines:
            ax.plot(*zip(*points), color=color, marker="o", markersize=2.5, linewidth=1.4)
    label_ends(ax, [(*lines[0][-1], name, color) for (name, lines), color in zip(curves.items(), colors)])
    ax.spines[["top", "right"]].set_visible(False)


def plot_losses(metrics, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    keys = {"training": "train_loss", "validation": "val_loss"}
    curves = {name: [[(m["iter"], m[k]) for m in metrics if m.get(k) is not None]] for name, k in keys.items()}
    draw_curves(ax, curves, ("#0072B2", "#D55E00"), "loss")
    best = min(metrics, key=lambda m: m["val_loss"])
    ax.plot(best["iter"], best["val_loss"], "o", color="#D55E00", markersize=9, fillstyle="none")
    title = f"best validation loss {best['val_loss']:.4f} at update {best['iter']}"
    if metrics[0]["val_loss"] > ax.get_ylim()[1]:
        title += f"; {metrics[0]['val_loss']:.2f} at update {metrics[0]['iter']}, above this plot"
    ax.set_title(title, loc="left", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


class Wandb:
    """A wandb run, where it is asked for and can be had; where it fails a line says so, and training goes on."""

    def __init__(self, config, wanted):
        self.run = self._call(self._start, config) if wanted else None

    def _call(self, function, *args, **options):
        try:
            return function(*args, **options)
        except Exception as e:  # no key, no network, its service gone: never worth a run
            reason = (str(e) or type(e).__name__).splitlines()[0]
            print(f"note: wandb is off ({reason}); WANDB_MODE=offline needs no account")
            self.run = None

    def _start(self, config):
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")  # seconds
        name = config.wandb_run_name or os.path.basename(os.path.normpath(config.out_dir))
        options = {"dir": config.out_dir, "config": vars(config), "settings": wandb.Settings(init_timeout=30)}
        return wandb.init(project=config.wandb_project, name=name, **options)

    def log(self, values, it):
        if self.run:
            self._call(self.run.log, values, step=it)

    def finish(self):
        if self.run:
            self._call(self.run.finish)


def train(config):
    """Runs the training of a config. Returns the metrics of its evaluations; exits on signals."""
    keep_memory()
    with one_line_errors():
        processes = Processes(config)
        dtype = pick_dtype(processes.device, config.dtype)
        torch.manual_seed(config.seed)
        loader = make_loader(config, context_size(config.init_from) or config.block_size)
        n_classes = len(loader.label_names) if config.task == "classify" else 0
        model = build_model(config, processes.device, dtype, n_classes)
        optimizers = build_optimizers(config, model)
        scaler = torch.amp.GradScaler(processes.device.split(":")[0], enabled=dtype == torch.float16)
        progress = load_checkpoint(config, model, optimizers, scaler)
        if processes.first:
            os.makedirs(config.out_dir, exist_ok=True)
            if not config.resume:
                for old in (CHECKPOINT, "metrics.jsonl"):  # or a resume would go on with another run's
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(config.out_dir, old))
                settings = dataclasses.asdict(config)
                write_json(os.path.join(config.out_dir, RESUMED), settings | {"sha256": fingerprint(settings)})
    say = tqdm.write if processes.first else lambda text: None
    it, metrics = progress["iter"], progress["metrics"]
    run = Wandb(config, config.wandb_log and processes.first)
    params = [p for p in model.parameters() if p.requires_grad]
    say(parameter_report(model))
    global_batch = config.batch_size * config.gradient_accumulation_steps
    n_batches = loader.n_batches("train", global_batch)
    name = str(dtype).removeprefix("torch.")
    say(f"{processes.device} {name}, {n_batches} updates an epoch, from update {it} to {config.max_iters}")
    if config.compile:
        model.compile(dynamic=True)

    asked_to_stop = []

    def remember(number, frame):
        asked_to_stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the update to end

    def save():
        nonlocal saved_at
        saved_at = it
        if processes.first:
            progress["iter"] = it
            save_checkpoint(config, model, optimizers, scaler, progress)

    def diverged(what):
        if processes.first:
            print(
                f"error: {what} at update {it}; the last good checkpoint is in {config.out_dir}; "
                f"try a lower --lr than {config.lr:g}",
                file=sys.stderr,
            )
        sys.exit(3)

    saved_at = None
    handlers = {sig: signal.signal(sig, remember) for sig in (signal.SIGINT, signal.SIGTERM)}

    bar = tqdm(total=config.max_iters, initial=it, disable=None if processes.first else True, unit="update")
    epoch, order, began, first_it = None, None, time.time(), it
    while True:
        # --- evaluation, the best weights, a checkpoint
        last = it >= config.max_iters
        if (it % config.eval_interval == 0 or last) and not (metrics and metrics[-1]["iter"] == it):
            seconds, losses = time.time() - began, progress["losses"]
            val_loss = evaluate(config, model, loader, processes)
            if not math.isfinite(val_loss):
                diverged(f"validation loss {val_loss}")
            m = {"iter": it, "epoch": it / n_batches, "val_loss": val_loss}
            if losses:
                m["train_loss"] = sum(losses) / len(losses)
                m["examples_per_s"] = (it - first_it) * global_batch / seconds
            if scaler.is_enabled():
                m["skipped"] = float(progress.get("skipped", 0))  # updates since the start, for infinite gradients
            if config.task == "pretrain":
                m["bits_per_byte"] = loader.bits_per_byte("validation", val_loss)
                m["tokens"] = it * global_batch * loader.context
            metrics.append(m)
            say(f"update {it}: " + ", ".join(f"{k} {v:.4f}" for k, v in m.items() if isinstance(v, float)))
            if processes.first and (progress["best"] is None or val_loss < progress["best"]):
                progress["best"] = val_loss
                save_best(config, model, dtype)
            if processes.first:
                with whole_file(os.path.join(config.out_dir, "metrics.jsonl")) as f:
                    f.writelines((json.dumps(m) + "\n").encode() for m in metrics)
            progress["losses"] = []
            save()
            run.log(m, it)
            began, first_it = time.time(), it
        if last:
            break

        # --- one update
        if epoch != it // n_batches:
            epoch = it // n_batches
            order = loader.order("train", global_batch, epoch)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * schedule(config, it)
        loss = train_update(config, model, loader, processes, order[it % n_batches], it, scaler)
        processes.sum_gradients(params)
        loss, stop = processes.sum([float(loss), float(bool(asked_to_stop))])
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf))
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            diverged(f"loss {loss}, gradient norm {norm}")
        if (stop or (config.save_interval and it % config.save_interval == 0)) and saved_at != it:
            save()  # here, where these weights are known to give a finite gradient
        if stop:
            say(
                f"stopped at update {it}, saved; to go on: "
                f"python train.py --init_from=resume --out_dir={config.out_dir}"
            )
            sys.exit(128 + (asked_to_stop or [signal.SIGTERM])[0])
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.update()
        progress["skipped"] = progress.get("skipped", 0) + (scaler.get_scale() < scale)  # float16 overflowed
        progress["losses"].append(loss)
        it += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    bar.close()
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    if processes.first:
        plot_losses(metrics, os.path.join(config.out_dir, "loss.png"))
        path = os.path.join(config.out_dir, ADAPTER_WEIGHTS if config.rank else "model.safetensors")
        say(f"best validation loss {progress['best']:.4f}, plotted in {config.out_dir}/loss.png")
        say(f"saved: {path} ({os.path.getsize(path) / 1e6:.2f} MB)")
    run.finish()
    if processes.world > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    config = configure(sys.argv[1:])
    with one_line_errors():
        held = lock(config) if int(os.environ.get("RANK", 0)) == 0 else None
    try:
        train(config)
    except OSError as e:
        print(f"error: {e}; --init_from=resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except (torch.OutOfMemoryError, RuntimeError) as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        half = next((n for n in range(config.batch_size // 2, 0, -1) if config.batch_size % n == 0), 1)
        double = config.gradient_accumulation_steps * (config.batch_size // half)
        print(
            f"error: out of memory; the same training in smaller pieces: --batch_size={half} "
            f"--gradient_accumulation_steps={double}",
            file=sys.stderr,
        )
        sys.exit(2)
