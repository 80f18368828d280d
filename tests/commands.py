"""Commands as real processes without seconds of imports: a warm process forks itself for each of them."""
import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT

SERVER = """
import importlib, json, os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import torch, torch._dynamo                                     # an optimiser would import the second
torch.set_num_threads(1)
for name in {warm!r}:
    importlib.import_module(name)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        signal.alarm(900)                                       # nothing waits for ever
        signal.signal(signal.SIGINT, signal.default_int_handler)    # background jobs ignore it
        log = os.open({logs!r} + "/" + str(os.getpid()), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(job["environment"])
        script, *sys.argv[1:] = job["command"]
        exec(job["fault"])
        if script == "-m":
            script = sys.argv.pop(1)
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = script
            runpy.run_path(script, run_name="__main__")
        sys.exit()
    print(child, flush=True)
"""


class Commands:
    """Runs `python COMMAND` in a folder: run() -> (exit status, output), or start() -> pid and wait(pid).

    fault: Python that the process runs first, to break something: it may change what scripts import. A
    script itself is read anew, so that it runs as a user's does.
    """

    def __init__(self, folder, warm):
        self.logs = tempfile.TemporaryDirectory()
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(warm=warm, logs=self.logs.name)], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        atexit.register(self.server.communicate)                # closes its stdin, which ends it

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *command, fault="", **environment):
        environment = {name: str(value) for name, value in environment.items()}
        return self.ask(command=[*map(str, command)], fault=fault, environment=environment)

    def wait(self, pid):
        status = self.ask(wait=pid)
        return status, (Path(self.logs.name) / str(pid)).read_text()

    def run(self, *command, **how):
        return self.wait(self.start(*command, **how))


@functools.cache
def program():
    """The commands of this checkout."""
    return Commands(ROOT, ["sample", "train"])
