"""Every fault at every stage of a publication: what happens, and what a second run makes of it.

The tests assert the rules; scripts/hub_faults.py prints the table of docs/hub_faults.md.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass

from server import Hub

from hf_attn.errors import PublishFailed
from hf_attn.hub.pack import Plan
from hf_attn.hub.upload import Published, Target, _upload

REPO = "someone/model"
STAGES = {
    "create the repository": ("POST", r"^/api/repos/create$", 0),
    "read the repository": ("GET", r"^/api/models/someone/model$", 0),
    "read the branch": ("GET", r"/revision/main$", 0),
    "list the files": ("GET", r"/tree/", 0),
    "list the tags": ("GET", r"/refs$", 0),
    "announce the files": ("POST", r"/preupload/", 0),
    "ask where to upload": ("POST", r"/objects/batch$", 0),
    "upload": ("PUT", r"^/lfs-store/", 0),
    "confirm the upload": ("POST", r"^/lfs-verify$", 0),
    "validate the card": ("POST", r"^/api/validate-yaml$", 0),
    "commit": ("POST", r"/commit/", 0),
    "verify the commit": ("GET", r"/tree/", 1),
    "tag": ("POST", r"/tag/", 0),
}
"""Stage -> method and path of its request, and how many such requests come before."""
FAULTS = (401, 403, 409, 412, 429, 503, "close", "lost", "truncate")
WORDS = {"close": "closed socket", "lost": "done, answer lost", "truncate": "truncated answer", "kill -9 before": "kill -9, before it is done", "kill -9 after": "kill -9, after it is done"}  # fmt: skip
ALWAYS = 1000
TARGET = Target(REPO, tag="v1")


@dataclass
class Outcome:
    """First run with the fault, second run without."""

    stage: str
    fault: str
    often: str
    first: str
    half_published: bool
    second: str
    commits: int
    complete: bool
    message: str = ""

    @property
    def sound(self) -> bool:
        """Nothing half-published, nothing lost, nothing done twice."""
        return not self.half_published and self.complete and self.commits == 2


def run(hub: Hub, plan: Plan) -> Published:
    return _upload(plan, TARGET)


def wanted(plan: Plan) -> dict[str, bytes]:
    return {entry["path"]: (plan.folder / entry["path"]).read_bytes() for entry in plan.files}


def held(hub: Hub) -> dict[str, bytes]:
    """What main holds, without what every new repository has."""
    if REPO not in hub.repos:
        return {}
    return {path: content for path, content in hub.files(REPO).items() if path != ".gitattributes"}


def faulty(plan: Plan, stage: str, kind: int | str, often: str, install) -> Outcome:
    """Publish with a fault at a stage, then again without; `install(hub)` points the client at the server."""
    with Hub() as hub:
        install(hub)
        method, path, skip = STAGES[stage]
        headers = {"Retry-After": "1"} if kind == 429 else {}
        hub.fail(method, path, kind, count=1 if often == "once" else ALWAYS, skip=skip, headers=headers)
        message = ""
        try:
            first = run(hub, plan).state
        except PublishFailed as error:
            first, message = f"refused while {error.stage}", str(error)
        return _second(hub, plan, Outcome(stage, str(kind), often, first, False, "", 0, False, message))


def killed(plan: Plan, stage: str, when: str, install) -> Outcome:
    """Publish in a process that is killed at a stage, then again."""
    with Hub() as hub:
        install(hub)
        method, path, skip = STAGES[stage]
        child, known = [0], threading.Event()

        def kill(_, now: str) -> None:
            if now == when and known.wait(5):
                os.kill(child[0], signal.SIGKILL)

        hub.fail(method, path, kill, skip=skip)
        child[0] = os.fork()
        if child[0] == 0:
            try:
                run(hub, plan)
            finally:
                os._exit(0)
        known.set()
        _, status = os.waitpid(child[0], 0)
        first = "killed" if os.WIFSIGNALED(status) else f"exit {status}"
        hub.faults.clear()
        return _second(hub, plan, Outcome(stage, f"kill -9 {when}", "once", first, False, "", 0, False))


def _second(hub: Hub, plan: Plan, outcome: Outcome) -> Outcome:
    after = held(hub)
    outcome.half_published = bool(after) and after != wanted(plan)
    hub.faults.clear()
    outcome.second = run(hub, plan).state
    outcome.commits = len(hub.titles(REPO))
    outcome.complete = held(hub) == wanted(plan) and hub.repos[REPO].tags.get("v1") == hub.repos[REPO].refs["main"]
    return outcome
