"""Weights & Biases in a process of its own (`follower.py`).

In: the arguments of `wandb.init`, and rows of metrics. Out: a wandb run in the run folder, with the sampled eval pairs
of each evaluation as a table; offline where its host does not answer, or refuses the key.
Cost: one request before the start, for at most PROBE_S seconds.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

from rmtool.training.eval_samples import COLUMNS, read_samples
from rmtool.training.follower import FAILED, LOST, STARTED, Say, follow_run, reason

PROBE_S = 3.0
SAMPLES = "eval/samples"


class WandbRun:
    """A wandb run that has started."""

    def __init__(self, run: Any, table: Any, logged: int, folder: Path):
        self.run, self.table, self.folder = run, table, folder
        # A run that goes on has the steps before; one that is offline cannot know which, so far.
        self.first = run.step if run.resumed else logged + 1

    def log(self, row: dict[str, Any]) -> None:
        step = int(row["step"])
        samples = read_samples(self.folder, step) if "eval/rm/loss" in row else []
        table = {SAMPLES: self.table(columns=list(COLUMNS), data=samples)} if samples else {}
        self.run.log(row | table, step=step)

    def finish(self, completed: bool) -> None:
        self.run.finish(exit_code=0 if completed else 1)


def start(given: dict[str, Any], say: Say) -> WandbRun:
    """Start the wandb run, offline if it is not to be had online, and say where it is."""
    os.environ["WANDB_SILENT"] = "true"  # its warnings, too: the notices say what there is to say
    import wandb

    init, timeout_s = given["init"], given["start_s"]
    settings, lost, run = wandb.setup().settings, "", None
    online = settings.mode == "online"
    try:
        lost = refusal(settings, wandb) if online else ""
        run = None if lost else _init(wandb, init, timeout_s)
    except Exception as error:
        if not online:
            raise
        lost = reason(error)
        wandb.teardown(1)  # else the id of the run counts as in use
    if run is None:
        run = _init(wandb, {**init, "mode": "offline"}, timeout_s)
    if run.disabled:
        say(STARTED, f"wandb: disabled by its settings, {FAILED}")
    elif run.offline:
        why = lost or "WANDB_MODE=offline"
        upload = f"upload later with `wandb sync {init['dir']}/wandb/offline-run-*`"
        say(LOST if lost else STARTED, f"wandb: offline ({why}); {upload}")
    else:
        say(STARTED, f"wandb: {run.url}")
    return WandbRun(run, wandb.Table, given["logged"], Path(given["metrics"]).parent)


def _init(wandb: Any, init: dict[str, Any], timeout_s: float) -> Any:
    # The figures of a process are those of the training process, whose child this is.
    settings = wandb.Settings(init_timeout=timeout_s, silent=True, console="off", x_stats_pid=os.getppid())
    return wandb.init(**init, settings=settings)


def refusal(settings: Any, wandb: Any) -> str:
    """Ask the host of wandb, for at most PROBE_S seconds, whether it takes the key; return why not."""
    key = wandb.api.api_key
    if not key:
        return "no API key"
    answers: list[str] = []
    asks = threading.Thread(target=lambda: answers.append(_ask(settings, key)), daemon=True)
    asks.start()  # no timeout of requests is one for the whole request, names included
    asks.join(PROBE_S)
    answer = answers[0] if answers else f"no answer within {PROBE_S:g} s"
    return answer and f"{settings.base_url}: {answer}"


def _ask(settings: Any, key: str) -> str:
    """Make the smallest request that needs a key; return what is wrong, if it is."""
    import requests

    found = {"http": settings.http_proxy, "https": settings.https_proxy}
    try:
        response = requests.post(
            f"{settings.base_url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", key),
            headers=settings.x_extra_http_headers,
            proxies={name: proxy for name, proxy in found.items() if proxy},
            verify=not settings.insecure_disable_ssl,
            timeout=PROBE_S,
            allow_redirects=False,
            stream=True,
        )
    except requests.exceptions.SSLError:  # it answers; wandb reads other certificates
        return ""
    except requests.Timeout:
        return f"no answer within {PROBE_S:g} s"
    except (requests.RequestException, ValueError) as error:  # the last words of several nested messages
        known = re.findall(r"\[Errno -?\d+\] ([^)'\"]+)", str(error))
        return known[-1] if known else type(error).__name__
    if response.status_code in (401, 403):
        return f"API key refused, HTTP {response.status_code}"
    return f"HTTP {response.status_code}" if response.status_code >= 500 else ""


if __name__ == "__main__":
    follow_run("wandb", start)
