"""The Hugging Face Hub: what a run uploads, and what comes back, by a stand-in that speaks the Hub's file protocol.

It is written from the protocol that huggingface_hub's requests follow: creation of a repository, `preupload`, Git LFS
batches, `commit` as NDJSON, trees, revisions and `resolve`.
"""

import base64
import hashlib
import importlib.util
import json
import logging
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch

import fabricrl
from fabricrl import evaluate, export
from fabricrl.algos.names import command
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.run import parse
from fabricrl.algos.sac.sac import main as sac
from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.errors import CheckpointError, ConfigError
from fabricrl.utils.hub import MOST_NAMED, SOURCE, repository_name
from tests.conftest import Trained

Train = Callable[..., Trained]
needs_package = pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="needs the extra hub")
TOKEN = "hf_standin"
SMALL = ("--num-envs", 2, "--num-steps", 64, "--total-timesteps", 512, "--checkpoint-every", 256)


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        commits: of each repository, the files of each commit, by its name; heads: revision → commit.
        objects: contents of large files by their SHA-256; requests: method and path of each, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, dict[str, str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{repository} {len(self.commits[repository])}".encode()).hexdigest()
        self.commits[repository][name] = files
        self.heads[repository]["main"] = name
        return name

    def files(self, repository: str) -> dict[str, bytes]:
        """Those of the newest commit."""
        return self.commits[repository][self.heads[repository]["main"]]

    def find(self, repository: str, revision: str) -> str | None:
        commits = self.commits[repository]
        return revision if revision in commits else self.heads[repository].get(revision)


class Answer(BaseHTTPRequestHandler):
    """Answers of the Hub, as far as models need them."""

    server: Hub
    protocol_version = "HTTP/1.0"  # no connection outlives its answer, nor the server

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def reply(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def route(self) -> None:
        self.server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, may_write = unquote(urlsplit(self.path).path), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if match := re.fullmatch("/objects/([0-9a-f]{64})", path):  # the store, which checks what it is given
            assert self.command == "PUT"
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.server.objects[match[1]] = body
            return self.reply()
        if self.command == "POST" and not may_write:
            return self.refuse(401, "", "Invalid username or password.")
        for pattern, answer in self.ROUTES:
            if match := re.fullmatch(pattern, path):
                repository = match.groupdict().get("repository")
                if repository is not None and repository not in self.server.commits:
                    return self.refuse(404 if may_write else 401, "RepoNotFound", "Repository not found")
                return answer(self, body, **match.groupdict())
        return self.refuse(404, "", f"no such page: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        if wanted.get("organization") == "nobody":
            return self.refuse(403, "", "You don't have the rights to create a model under the namespace nobody")
        repository = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        exists = repository in self.server.commits
        if not exists:
            self.server.commits[repository], self.server.heads[repository] = {}, {}
            self.server.commit(repository, {".gitattributes": b"*.ckpt filter=lfs\n"})
        return self.reply({"url": f"{self.server.url}/{repository}", "name": repository}, 409 if exists else 200)

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.reply({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repository: str, revision: str) -> None:
        files = [
            {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
            for f in json.loads(body)["files"]
            for mode in ["lfs" if f["path"].endswith((".ckpt", ".png", ".mp4")) else "regular"]
        ]
        self.reply({"files": files})

    def batch(self, body: bytes, repository: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}", "header": {}}}
            objects.append(item if known else item | {"actions": upload})
        self.reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def commit(self, body: bytes, repository: str, revision: str) -> None:
        files = dict(self.server.files(repository))
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                assert key == "header"
        name = self.server.commit(repository, files)
        self.reply({"commitUrl": f"{self.server.url}/{repository}/commit/{name}", "commitOid": name})

    def info(self, body: bytes, repository: str, revision: str | None) -> None:
        if (commit := self.server.find(repository, revision or "main")) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in self.server.commits[repository][commit]]
        about = {"id": repository, "modelId": repository, "sha": commit, "private": False, "tags": []}
        return self.reply(about | {"downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, body: bytes, repository: str, revision: str) -> None:
        if (commit := self.server.find(repository, revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = self.server.commits[repository][commit]
        return self.reply(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        )

    def resolve(self, body: bytes, repository: str, revision: str, file: str) -> None:
        if (commit := self.server.find(repository, revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if (data := self.server.commits[repository][commit].get(file)) is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.reply(data, X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    ROUTES = (
        ("/api/repos/create", create),
        ("/api/validate-yaml", validate),
        (r"/api/models/(?P<repository>[^/]+/[^/]+)/preupload/(?P<revision>.+)", preupload),
        (r"/api/models/(?P<repository>[^/]+/[^/]+)/commit/(?P<revision>.+)", commit),
        (r"/api/models/(?P<repository>[^/]+/[^/]+)/tree/(?P<revision>.+)", tree),
        (r"/api/models/(?P<repository>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", info),
        (r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        (r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)", resolve),
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which huggingface_hub takes for the Hub; its cache is empty."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the environment when it is imported
    server = Hub()
    settings = {"ENDPOINT": server.url, "HOME": str(tmp_path / "hub"), "TOKEN": TOKEN, "HUB_DISABLE_XET": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"HF_{name}", value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    logging.getLogger("huggingface_hub").handlers.clear()  # which write to what pytest has closed
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def uploaded(trained: Trained) -> str:
    """The repository that a run says it has been uploaded to."""
    (name,) = re.findall(r"uploaded to http://127\.0\.0\.1:\d+/(\S+);", trained.output)
    return name


@needs_package
def test_a_run_is_uploaded_with_a_page_and_its_policy_comes_back(ppo: Train, hub: Hub) -> None:
    run = ppo(*SMALL, "--upload-model", "--eval-every", 256, "--eval-episodes", 4, "--logger", "csv")
    repository, step = uploaded(run), "checkpoints/step_000000000512.ckpt"
    files = hub.files(repository)
    assert run.code == 0
    assert repository.startswith("me/CartPole-v1-ppo_")
    assert set(files) == {
        ".gitattributes", "README.md", "args.json", "curve.png", "checkpoints/best.ckpt", step
    }  # fmt: skip
    assert files["curve.png"].startswith(b"\x89PNG")
    assert json.loads(files["args.json"]) == run.args

    from huggingface_hub import ModelCard

    card = ModelCard(files["README.md"].decode())
    (result,) = card.data.eval_results
    assert card.data.library_name == "fabricrl"
    assert {"reinforcement-learning", "ppo", "CartPole-v1"} <= set(card.data.tags)
    assert (result.task_type, result.dataset_type) == ("reinforcement-learning", "CartPole-v1")
    header, *lines = (run.folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    figures = {
        int(r["step"]): [float(r[f"eval/return_{name}"]) for name in ("mean", "std")]
        for r in rows
        if r["eval/return_mean"]
    }
    assert set(figures) == {256, 512}
    best = load_checkpoint(run.folder / "checkpoints" / "best.ckpt")[0]["global_step"]
    assert figures[best][0] == max(mean for mean, _ in figures.values())
    assert result.metric_value == "{:.2f} +/- {:.2f}".format(*figures[best])
    assert "| `step_000000000512.ckpt` | 512 | {:.2f} ± {:.2f} | 4 greedy".format(*figures[512]) in card.text
    assert "\nfabricrl ppo --env-id CartPole-v1 --num-envs 2 --total-timesteps 512 --eval-every 256" in card.text

    local, source = fabricrl.load(run.folder), f"hf://{repository}"
    assert fabricrl.load(source).path.name == Path(step).name
    for path, policy in ((source, local), (f"{source}/checkpoints/best.ckpt", fabricrl.load(_best(run)))):
        loaded = fabricrl.load(path)
        assert loaded.global_step == policy.global_step
        for name, value in policy.agent.state_dict().items():
            assert torch.equal(loaded.agent.state_dict()[name], value), name
        obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
        assert np.array_equal(loaded(obs), policy(obs))


def _best(run: Trained) -> Path:
    return run.folder / "checkpoints" / "best.ckpt"


@needs_package
def test_without_evaluations_the_page_has_the_returns_of_training(ppo: Train, hub: Hub) -> None:
    run = ppo(*SMALL, "--upload-model")
    returns = np.array(run.state["episodes"]["returns"])
    figure = f"{returns.mean():.2f} ± {returns.std():.2f} | the last {len(returns)} episodes of training"
    text = hub.files(uploaded(run))["README.md"].decode()
    assert len(returns) > 3
    assert f"| `step_000000000512.ckpt` | 512 | {figure} |" in text


@needs_package
def test_the_replay_buffer_stays_at_home_and_training_goes_on_elsewhere(train: Train, hub: Hub) -> None:
    small = ("--env-id", "Pendulum-v1", "--hidden-sizes", 8, "--learning-starts", 64, "--batch-size", 8)
    run = train(sac, *small, "--buffer-size", 4096, "--total-timesteps", 80, "--upload-model")
    assert run.state["shard"] is not None
    assert run.state["args"]["upload_model"]
    source = f"hf://{uploaded(run)}"
    state, path = load_checkpoint(source)
    assert state["shard"] is None
    assert not state["args"]["upload_model"]  # who goes on from it has not asked for that
    assert path.stat().st_size < run.checkpoint.stat().st_size
    assert state.keys() == run.state.keys()
    for part in state.keys() - {"shard", "args"}:
        assert str(state[part]) == str(run.state[part]), part

    with pytest.raises(CheckpointError, match="--allow-empty-buffer"):
        train(sac, "--resume", source, "--total-timesteps", 160)
    (line,) = re.findall(r"^fabricrl sac (--resume .*)$", hub.files(uploaded(run))["README.md"].decode(), re.MULTILINE)
    assert line == f"--resume {source} --total-timesteps 160 --allow-empty-buffer"
    with pytest.raises(CheckpointError):
        fabricrl.load(f"{source}/args.json")  # from here on the cache looks like the folder of a run
    resumed = train(sac, *line.split())
    assert resumed.result["steps"] == "160"
    assert resumed.folder != run.folder
    assert resumed.folder.parent == run.folder.parent  # not in the cache of the Hub
    assert "uploaded" not in resumed.output


@needs_package
def test_an_upload_replaces_the_one_before_which_stays_as_a_revision(ppo: Train, hub: Hub) -> None:
    run = ppo(*SMALL)
    repository = uploaded(ppo("--resume", run.folder, "--upload-model"))  # nothing is left to do but that
    before = hub.heads[repository]["main"]
    hub.heads[repository] |= {"v1": before, "refs/pr/1": before}
    assert uploaded(ppo("--resume", run.folder, "--total-timesteps", 1024, "--upload-model")) == repository
    steps = [file for file in hub.files(repository) if "step_" in file]
    assert steps == ["checkpoints/step_000000001024.ckpt"]
    source = f"hf://{repository}"
    assert fabricrl.load(source).global_step == 1024
    for revision in ("v1", before, "refs/pr/1"):
        assert fabricrl.load(f"{source}@{revision}").global_step == 512
        assert fabricrl.load(f"{source}@{revision}/checkpoints/best.ckpt").global_step <= 512


@needs_package
def test_commands_take_a_checkpoint_from_the_hub_and_write_here(
    ppo: Train,
    hub: Hub,
    script: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run = ppo(*SMALL, "--upload-model", "--capture-video", "--video-every", 5)
    repository, here = uploaded(run), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    newest = max((run.folder / "videos").rglob("*.mp4"), key=lambda path: path.stat().st_mtime)
    assert hub.files(repository)["replay.mp4"] == newest.read_bytes()
    assert "(replay.mp4)" in hub.files(repository)["README.md"].decode()

    def result(main: Callable[[], int], *arguments: object) -> Any:
        assert script(main, *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    few = ("--episodes", 3)
    assert result(evaluate.main, f"hf://{repository}", *few) == result(evaluate.main, run.folder, *few)
    assert result(export.main, f"hf://{repository}", "--format", "pt2")["file"] == "step_000000000512.pt2"
    assert result(export.main, f"hf://{repository}/checkpoints/best.ckpt", "--format", "pt2")["file"] == "best.pt2"
    result(evaluate.main, f"hf://{repository}", "--episodes", 1, "--mode", "greedy", "--capture-video")
    assert sorted(path.name for path in here.iterdir()) == ["best.pt2", "step_000000000512.pt2", "videos"]


@needs_package
def test_what_the_hub_does_not_have_or_give_is_told_in_one_line(
    ppo: Train, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = uploaded(ppo(*SMALL, "--upload-model"))
    cases = {
        "hf://me/nothing": "no such repository",
        "hf://me/nothing/checkpoints/best.ckpt": "no such repository",
        f"hf://{repository}@v7": "no such revision",
        f"hf://{repository}@v7/checkpoints/best.ckpt": "no such revision",
        f"hf://{repository}/checkpoints/worst.ckpt": "no such file",
        f"hf://{repository}/README.md": "was not written by fabricrl",
    }
    for source, reason in cases.items():
        with pytest.raises(CheckpointError, match=reason) as caught:
            fabricrl.load(source)
        assert "\n" not in str(caught.value)
    for source in ("hf://", "hf://me", "hf://me/", "hf://me/repo@", "hf:///repo", "hf://me/re po", "hf://me/a@b@c"):
        with pytest.raises(ConfigError, match="must be hf://user/repository"):
            fabricrl.load(source)
    hub.commits["me/empty"], hub.heads["me/empty"] = {}, {}
    hub.commit("me/empty", {"README.md": b"nothing"})
    with pytest.raises(CheckpointError, match="hf://me/empty has no checkpoints/step"):
        fabricrl.load("hf://me/empty")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*\[hub\]"):
        fabricrl.load(f"hf://{repository}")


@needs_package
def test_without_a_connection_the_cache_serves(ppo: Train, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = uploaded(ppo(*SMALL, "--upload-model"))
    step = fabricrl.load(f"hf://{repository}").global_step
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    assert fabricrl.load(f"hf://{repository}").global_step == step
    for source in ("hf://me/other", "hf://me/other/checkpoints/best.ckpt"):
        with pytest.raises(CheckpointError, match="cannot be reached"):
            fabricrl.load(source)
    failed = ppo(*SMALL, "--upload-model")
    assert failed.code == 0
    assert re.search(r"^warning: .* was not uploaded: .*$", failed.output, re.MULTILINE)
    assert fabricrl.load(failed.folder).global_step == step


@needs_package
def test_an_upload_that_is_refused_is_a_warning(ppo: Train, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ppo(*SMALL, "--upload-model", "--hf-entity", "nobody")
    assert refused.code == 0
    assert re.search(r"^warning: .* was not uploaded: the Hub does not let you \(403\)", refused.output, re.MULTILINE)
    hub.requests.clear()
    assert "uploaded" not in ppo(*SMALL).output
    assert hub.requests == []  # unless it was asked for, nothing is sent


@needs_package
def test_names_of_runs_become_names_that_the_hub_allows() -> None:
    from huggingface_hub.utils import validate_repo_id

    stamp = "20261122-140732"
    for parts in (
        ("CartPole-v1", f"ppo_1_{stamp}"),
        ("ALE_Pong-v5", f"ppo_num-envs=16_learning-rate=0.001_norm-obs_1_{stamp}"),
        ("my..env--v0", f"-.ppo{'_hidden-sizes=64-64' * 8}_and-3-more_1_{stamp}-12"),
        ("Grüße", f"a.-_b_{stamp}"),
    ):
        name = repository_name(*parts)
        validate_repo_id(f"me/{name}")
        assert len(name) <= MOST_NAMED
        assert stamp in name
        assert SOURCE.fullmatch(f"hf://me/{name}")


def test_the_command_of_a_run_gives_its_arguments_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"env_id": "Pendulum-v1", "seed": 3, "learning_rate": 1e-3, "norm_obs": True, "anneal_lr": False},
        {"env_kwargs": '{"g": 9.8, "name": "it\'s"}', "stop_at_return": -200.0, "eval_every": 1000},
        {"hidden_sizes": (8, 8), "num_threads": None, "devices": "2", "info_keys": ("a", "b")},
    ]
    for kind in (PPOArgs, PPODecoupledArgs):
        for setting in settings:
            args = kind(**setting, upload_model=True, hf_entity="me", log_dir="/home/me/logs")
            words = shlex.split(command(args, "ppo"))
            assert words[:2] == ["fabricrl", "ppo" if kind is PPOArgs else "ppo-decoupled"]
            assert "/home/me/logs" not in words
            monkeypatch.setattr(sys, "argv", words[1:])
            again = parse(kind, "ppo")
            assert again == kind(**setting)
