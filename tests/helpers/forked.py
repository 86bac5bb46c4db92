"""Modules that are run in forks of a process which has imported their libraries already.

A fork has its own process id, arguments, environment, session and standard streams, and is a child
of the process that started it, so that signals, waiting and exit codes are those of a new
interpreter. It differs in one thing that a test could notice: its hashes of strings have the seed
of the other forks.

Processes that a fork starts, such as the ranks of torchrun and the steps of `rounds`, are forks
again. What cannot be one, since a variable differs that is read while libraries are imported, is
started as usual.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parents[2]
OF_RUNS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # variables of every run
# Environment of runs, before a library or a test sets anything: conftest imports this module first.
BEGINNING = {**os.environ, **OF_RUNS}
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans below a process become its children
SPARE = 200  # descriptors from here on are free
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which a process that forks ignores
HANDLERS = {signum: signal.getsignal(signum) for signum in STOPS}
LARGEST = 1 << 20  # bytes of a request
MODULES = re.compile(r"lit_prefopt\..+|tests\.helpers\..+|torch\.distributed\.run")
OWN = re.compile(
    # read when a run begins or later, not when a library is imported
    r"(LOCAL|GROUP|ROLE|NODE|WORLD|MASTER|TORCHELASTIC|PYTEST)_\w+|RANK|TORCH_NCCL_ASYNC_\w+|"
    r"PL_GLOBAL_SEED|PL_SEED_WORKERS|LIT_PREFOPT_PARENT"
)
LIBRARIES = ["diffusers", "torch.distributed.run", "torch.utils.tensorboard"]
LIBRARIES += ["diffusers.schedulers.scheduling_unipc_multistep"]  # with those it is compatible with
START = subprocess.Popen._execute_child  # type: ignore[attr-defined]
PARAMETERS = inspect.signature(START)


@dataclass
class Request:
    """What a fork becomes.

    Args:
        module: Module that runs as `__main__`.
        arguments: Its arguments.
        environment: Environment variables.
        descriptors: Descriptors of the files that come with the request, in their order.
        unbuffered: Whether output is written line by line.
        new_session: Whether it is the first of a session.
        group: Process group to join, 0 for one of its own, -1 for that of the process before.
    """

    module: str
    arguments: list[str]
    environment: dict[str, str]
    descriptors: list[int]
    unbuffered: bool
    new_session: bool
    group: int


class Server:
    """Client of a process that forks.

    Args:
        channel: Socket to it.
        known: Values that the environment variables of a fork may have.
    """

    def __init__(self, channel: socket.socket, known: Sequence[Mapping[str, str]]) -> None:
        self.channel, self.known = channel, known

    def request(self, options: Mapping[str, Any]) -> Request | None:
        """Return the request for what `subprocess.Popen` starts; None where it cannot be a fork."""
        command = [] if isinstance(options["args"], str | bytes) else list(options["args"])
        unbuffered = command[1:2] == ["-u"]
        if unbuffered:
            del command[1]
        if command[:2] != [sys.executable, "-m"] or not MODULES.fullmatch("".join(command[2:3])):
            return None
        plain = ("executable", "preexec_fn", "shell", "gid", "gids", "uid")
        if any(options[name] for name in plain) or options["umask"] >= 0:
            return None
        environment = dict(os.environ if options["env"] is None else options["env"])
        if not self.has(environment) or Path(options["cwd"] or os.getcwd()).resolve() != ROOT:
            return None
        return Request(
            module=command[2],
            arguments=command[3:],
            environment=environment,
            descriptors=[0, 1, 2, *options["pass_fds"]],
            unbuffered=unbuffered,
            new_session=bool(options["start_new_session"]),
            group=options["process_group"],
        )

    def has(self, environment: Mapping[str, str]) -> bool:
        """Return whether the libraries were imported in this environment."""
        names = {*environment, *self.known[0]}
        return all(
            OWN.fullmatch(name) or any(environment.get(name) == one.get(name) for one in self.known)
            for name in names
        )

    def fork(self, request: Request, files: list[int]) -> int:
        """Return the process id of a new fork, a child of this process."""
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        try:
            socket.send_fds(self.channel, [json.dumps(asdict(request)).encode()], files)
            answer = self.channel.recv(LARGEST)
        finally:
            prctl(SUBREAPER, 0, 0, 0, 0)
        if not answer:
            raise RuntimeError("The process that forks has ended; its errors say why.")
        return int(answer)

    def execute(self, process: Any, *args: Any) -> None:
        """Start a process as `Popen._execute_child` does, whose arguments these are."""
        options = PARAMETERS.bind(process, *args).arguments
        request = self.request(options)
        if request is None:
            START(process, *args)
            return
        pipes = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        process.pid = self.fork(request, [*files, *options["pass_fds"]])
        process._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(options[name] for name in ends))


class ForkedPopen(subprocess.Popen):
    """`subprocess.Popen`, whose process is a fork where it can be one."""

    process: subprocess.Popen | None = None  # it ends with this one, whose socket closes
    server: Server | None = None

    def _execute_child(self, *args: Any) -> None:
        if sys.platform != "linux":
            START(self, *args)
            return
        if ForkedPopen.server is None:
            ForkedPopen.process, ForkedPopen.server = _start()
        ForkedPopen.server.execute(self, *args)


def _start() -> tuple[subprocess.Popen, Server]:
    """Start the process that forks."""
    ours, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.helpers.forked", str(others.fileno())]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=BEGINNING,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[others.fileno()],
    )
    others.close()
    added = ours.recv(LARGEST)  # variables that libraries set when they are imported
    if not added:
        raise RuntimeError("The process that forks ended while it imported libraries.")
    return process, Server(ours, [BEGINNING, json.loads(added)])


def import_libraries() -> None:
    """Import what runs import, all classes that recipes name, and what a parser imports."""
    from lit_prefopt.utils.postponed import postpone_bitsandbytes

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command line does
    postpone_bitsandbytes()
    for name in LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("lit_prefopt.commands.help_pages").import_classes()
    from lit_prefopt.cli import main

    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        main(["fit", "--config", "toy-diffusion-dpo", "--print_config"])  # reads signatures, once


def serve(channel: socket.socket) -> tuple[Request, list[int]]:
    """Fork at every request until the other end is closed; returns in the forks alone."""
    while True:
        message, files, *_ = socket.recv_fds(channel, LARGEST, 32)
        if not message:
            os._exit(0)
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            raise RuntimeError(f"A process of {len(threads)} threads cannot be forked.")
        ours, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        between = os.fork()
        if not between:
            pid = os.fork()
            if pid:
                others.send(str(pid).encode())
                os._exit(0)  # which makes the fork an orphan, so a child of the subreaper
            others.recv(1)  # until it is
            for end in (ours, others, channel):
                end.close()
            return Request(**json.loads(message)), files
        os.waitpid(between, 0)
        ours.send(b".")
        channel.send(ours.recv(LARGEST))
        for end in (ours, others):
            end.close()
        for file in files:
            os.close(file)


def next_fork(channel: socket.socket) -> tuple[Request, list[int], socket.socket]:
    """Return, in a fork, its request, its files and a socket to a process that it can fork from.

    That one is forked first, before the fork has threads.
    """
    for signum in HANDLERS:
        signal.signal(signum, signal.SIG_IGN)
    while True:
        request, files = serve(channel)
        if request.new_session:
            os.setsid()
        elif request.group >= 0:
            os.setpgid(0, request.group)
        ours, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            others.close()
            return request, files, ours
        ours.close()
        for file in files:
            os.close(file)
        channel = others


def become(request: Request, files: list[int], added: Mapping[str, str]) -> None:
    """Set the streams, signals, environment and seeds of a fork to those of a new interpreter."""
    for signum, handler in HANDLERS.items():
        signal.signal(signum, handler)
    spare = [fcntl.fcntl(file, fcntl.F_DUPFD, SPARE) for file in files]
    for file in files:
        os.close(file)
    for file, descriptor in zip(spare, request.descriptors, strict=True):
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update({**request.environment, **added})
    if "LOCAL_RANK" in os.environ:  # the kernel shows the environment of the first process
        Path("/proc/self/comm").write_text(f"rank {os.environ['LOCAL_RANK']}")
    sys.stdout.reconfigure(line_buffering=request.unbuffered)
    sys.stderr.reconfigure(line_buffering=False)  # it is written through
    numpy.random.seed()  # noqa: NPY002 - Python's own generator is seeded anew in every fork


def run_forks(channel: socket.socket) -> None:
    """Import the libraries, fork at every request, and run the module in the forks."""
    before = dict(os.environ)
    import_libraries()
    known = before, dict(os.environ)
    added = {name: value for name, value in known[1].items() if before.get(name) != value}
    gc.freeze()
    channel.send(json.dumps(known[1]).encode())
    request, files, other = next_fork(channel)
    become(request, files, added)
    server = Server(other, known)
    subprocess.Popen._execute_child = lambda *args: server.execute(*args)  # type: ignore[attr-defined]
    sys.argv[1:] = request.arguments
    sys.modules.pop(request.module, None)
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_forks(socket.socket(fileno=int(sys.argv[1])))
