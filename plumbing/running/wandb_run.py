"""wandb is never worth a run: where it fails, a line says so and training goes on."""

import os

from plumbing.program.errors import first_line
from plumbing.program.settings import settings_of


class WandbRun:
    """The first process's run on Weights & Biases, if it is wanted and can be had. Otherwise methods do nothing."""

    def __init__(self, config, is_first: bool):
        self.run = None
        if is_first and config.wandb_log:
            self.run = self._try(self._start, config)
        elif is_first and config.wandb_run_name:
            print(f"note: wandb_run_name={config.wandb_run_name} is not used: type --wandb_log=True to log there")

    def log(self, values: dict, step: int) -> None:
        if self.run:
            self._try(self.run.log, values, step=step)

    def finish(self) -> None:
        if self.run:
            self._try(self.run.finish)

    def _start(self, config):
        import wandb

        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")
        # On a terminal, without a key, wandb would wait for one for ever. It asks a dumb terminal nothing.
        terminal = os.environ.get("TERM", "")
        os.environ["TERM"] = "dumb"
        try:
            return wandb.init(
                project=config.wandb_project,
                name=config.wandb_run_name or os.path.basename(os.path.normpath(config.out_dir)),
                dir=config.out_dir,
                config=settings_of(config),
            )
        finally:
            os.environ["TERM"] = terminal

    def _try(self, function, *args, **options):
        try:
            return function(*args, **options)
        except Exception as e:  # no key, no network, its service gone
            print(f"note: wandb is off ({first_line(e)}); wandb login stores a key, WANDB_MODE=offline needs none")
            self.run = None
