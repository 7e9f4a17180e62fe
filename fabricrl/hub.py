"""Puts a run on the Hugging Face Hub: its best and its newest checkpoint, and a page that says what it is."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fabricrl.compare import make_group, plot, read_log
from fabricrl.utils import hub
from fabricrl.utils.checkpoint import BEST, copy_without_buffer, load_checkpoint
from fabricrl.utils.errors import ConfigError, RunError, from_here

CARD = """---
library_name: fabricrl
pipeline_tag: reinforcement-learning
tags:
- reinforcement-learning
- deep-reinforcement-learning
- fabricrl
- {algo}
- {env_id}
model-index:
- name: {title}
  results:
  - task:
      type: reinforcement-learning
      name: reinforcement-learning
    dataset:
      type: {env_id}
      name: {env_id}
    metrics:
    - type: mean_reward
      name: mean_reward
      value: {best}
      verified: false
---

# {algo_name} on {env_name}

A policy trained with fabricrl.

| checkpoint | steps | return, mean ± standard deviation | over |
|-|-|-|-|
{rows}
{pictures}
## Use it

```python
import fabricrl

policy = fabricrl.load("hf://{repository}/checkpoints/{best_file}")
action = policy(obs)  # as the environment gives it
```

`pip install 'fabricrl[hub]'` brings what downloads it. To watch it play, and to go on training it:

```
fabricrl evaluate hf://{repository} --episodes 1 --render
{resume}
```

## Train it again

```
{command}
```

`args.json` has all arguments.
"""


class Figure(NamedTuple):
    """Returns of a checkpoint's policy: mean, standard deviation, and the episodes that they are of, in words."""

    file: str
    step: int
    mean: float
    std: float
    episodes: str


def upload(folder: Path, owner: str | None, command: str) -> None:
    """Uploads a run's folder to a repository that is named after environment and run; a failure is a warning.

    Args:
        owner: a user or an organisation on the Hub; None: the owner of the token.
        command: the command line that trains it again.
    """
    name = hub.repository_name(*folder.absolute().parts[-2:])
    try:
        repository = hub.create(name, owner)
        with tempfile.TemporaryDirectory() as temporary:
            gather(folder, Path(temporary), repository, command)
            address = hub.send(Path(temporary), repository)
    except (RunError, OSError) as error:  # the run itself is on disk
        print(f"warning: {from_here(folder)} was not uploaded: {from_here(error)}", file=sys.stderr, flush=True)
        return
    print(f"uploaded to {address}; fabricrl.load('hf://{repository}') takes it back", file=sys.stderr, flush=True)


def gather(folder: Path, target: Path, repository: str, command: str) -> None:
    """Writes into `target` what the repository is to have of a run.

    Raises:
        CheckpointError: the run has no checkpoint that can be read.
        OutputError, OSError: something cannot be written.
    """
    _, newest = load_checkpoint(folder)
    means, stds = (_entries(folder, f"eval/return_{name}") for name in ("mean", "std"))
    figures = []
    for source in (newest.with_name(BEST), newest):
        if source.exists():
            state = copy_without_buffer(source, target / "checkpoints" / source.name)
            figures.append(figure(source.name, state, means, stds))
    shutil.copyfile(folder / "args.json", target / "args.json")
    pictures = ""
    if draw(folder, target / "curve.png"):
        pictures += "\n![learning curve](curve.png)\n"
    videos = sorted((folder / "videos").rglob("*.mp4"), key=lambda path: path.stat().st_mtime)
    if videos:
        shutil.copyfile(videos[-1], target / "replay.mp4")  # the name that the Hub's pages look for
        pictures += "\n[Video](replay.mp4)\n"
    text = card(figures, state, repository, command, pictures)
    (target / "README.md").write_text(text, encoding="utf-8")


def figure(file: str, state: dict[str, Any], means: dict[int, float], stds: dict[int, float]) -> Figure:
    """The evaluation of a checkpoint, or if there was none at its step, the episodes of training before it.

    Args:
        means, stds: of the returns of evaluations, by their steps.
    """
    step = state["global_step"]
    if step in means and step in stds:
        count = state["args"]["eval_episodes"]
        return Figure(file, step, means[step], stds[step], f"{count} greedy episodes of an evaluation")
    returns = np.array(state.get("episodes", {}).get("returns", []))
    mean, std = (float(returns.mean()), float(returns.std())) if len(returns) else (float("nan"),) * 2
    return Figure(file, step, mean, std, f"the last {len(returns)} episodes of training")


def _entries(folder: Path, tag: str) -> dict[int, float]:
    """Step → value of a tag, as the log has it."""
    try:
        log = read_log(folder, tag)
    except ConfigError:  # it has nothing of it, or is kept elsewhere
        return {}
    return dict(zip(log.steps.tolist(), log.returns.tolist(), strict=True))


def draw(folder: Path, path: Path) -> bool:
    """Draws the learning curve, and beside it that of evaluations; returns if there is something to draw."""
    groups = []
    for tag, name in (("", "training"), ("eval/return_mean", "evaluations")):
        try:
            log = read_log(folder, tag)
        except ConfigError:  # the log is kept elsewhere, or no episode has ended
            continue
        groups.append(make_group(log.arguments["env_id"], name, [log]))
    if groups:
        plot(groups, path, "return")
    return bool(groups)


def card(figures: list[Figure], state: dict[str, Any], repository: str, command: str, pictures: str) -> str:
    """The repository's page, with the Hub's metadata in front: https://huggingface.co/docs/hub/model-cards."""
    algo, env_id, best = state["algo"], state["args"]["env_id"], figures[0]
    table = [f"| `{f.file}` | {f.step} | {f.mean:.2f} ± {f.std:.2f} | {f.episodes} |" for f in figures]
    resume = [*command.split()[:2], "--resume", f"hf://{repository}", "--total-timesteps", str(2 * figures[-1].step)]
    resume += ["--allow-empty-buffer"] * ("checkpoint_buffer" in state["args"])
    return CARD.format(
        algo=json.dumps(algo), env_id=json.dumps(env_id), title=json.dumps(f"{algo} {env_id}"),
        best=json.dumps(f"{best.mean:.2f} +/- {best.std:.2f}"), best_file=best.file,
        algo_name=algo.replace("_", " "), env_name=env_id, rows="\n".join(table), pictures=pictures,
        repository=repository, command=command, resume=" ".join(resume),
    )  # fmt: skip
