"""train_config.json in the folder of a run: its settings, and what it has found out."""

import glob
import hashlib
import json
import os

from plumbing.program.errors import UserError
from plumbing.program.files import write_json
from plumbing.program.settings import settings_of

RUN_CONFIG = "train_config.json"


def write_run(config, facts: dict) -> None:
    """With a SHA-256, so that a file that was changed by hand or damaged is refused on resuming."""
    values = settings_of(config) | {"facts": facts}
    write_json(os.path.join(config.out_dir, RUN_CONFIG), values | {"sha256": fingerprint(values)})


def read_run(out_dir: str) -> tuple[dict, dict]:
    """(settings, facts) of the run in out_dir. UserError if there is no run, or a damaged one."""
    path = os.path.join(out_dir, RUN_CONFIG)
    try:
        with open(path, encoding="utf-8") as f:
            stored = json.load(f)
        if stored.pop("sha256", None) not in (None, fingerprint(stored)):
            raise UserError(f"{path} was changed or damaged; to change a setting, type it as a flag")
        if "init_from" not in stored:
            raise UserError(f"{path} is damaged: no init_from in it")
        return stored, stored.pop("facts", None) or {}
    except FileNotFoundError:
        folder = os.path.dirname(os.path.normpath(out_dir))
        paths = glob.glob(os.path.join(glob.escape(folder), "*", RUN_CONFIG))
        newest = sorted(paths, key=os.path.getmtime, reverse=True)[:5]
        others = f"; there are runs in: {', '.join(map(os.path.dirname, newest))}" if newest else ""
        raise UserError(
            f"init_from=resume: no run to resume in {out_dir} ({RUN_CONFIG} is missing){others}; type its --out_dir"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from e


def fingerprint(values: dict) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# --- what is typed on resuming ----------------------------------------------------------------------


def refuse_changes(typed, stored, fixed, out_dir):
    """UserError for a typed setting that would make another run of the stored one."""
    for key in fixed:
        if key in typed and typed[key] != stored.get(key, typed[key]):
            advice = "drop the flag, or start another run with another --out_dir"
            raise UserError(f"--{key}={typed[key]}: the run in {out_dir} has {key}={stored[key]}; {advice}")


def find_changes(settings: dict, stored: dict) -> list[str]:
    """The keys in which a run's settings differ from stored ones. Its folder may have been moved."""
    keys = [key for key in settings if key in stored and key not in ("out_dir", "auto_resume")]
    return [key for key in keys if settings[key] != stored[key]]


def refuse_another_run(config, stored, out_dir):
    """UserError where auto_resume would go on with a run of other settings."""
    settings = settings_of(config)
    changes = [f"{key}={settings[key]} ({stored[key]} there)" for key in find_changes(settings, stored)]
    if changes:
        advice = "type those, or another --out_dir for another run"
        raise UserError(f"auto_resume: the run in {out_dir} has other settings: {', '.join(changes)}; {advice}")
