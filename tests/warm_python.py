"""A `python` for tests of whole scripts: it hands the command to a process that has imported everything.

`warm_python.py FOLDER` is the server, which writes FOLDER/python (also as python3, torchrun) and says that
it is ready. That program takes what follows `python` on a command line, and has the command's files,
environment, signals and status. What Python's own options would change (but for -u) it leaves to the real
interpreter.
"""

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path

import psutil

CLIENT = """#!{python} -ISE
import array, json, os, signal, socket, sys
words = sys.argv[1:]
while words[:1] == ["-u"]:
    del words[0]
if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = dict(words=words, cwd=os.getcwd(), environment=dict(os.environ))
    files = array.array("i", [0, 1, 2])
    server.sendmsg([b"j"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    server.sendall(json.dumps(job).encode() + b"\\n")
    answers = server.makefile()
    child = int(answers.readline())
    def forward(number, frame):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, forward)
    status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def main(folder: Path) -> None:
    """Serve until the parent closes standard input."""
    from tests import warm_server

    warm_server.import_all()
    address, program = folder / "socket", folder / "python"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen(64)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        for file in (server, woken, sys.stdin):
            ready.register(file, selectors.EVENT_READ)
        program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
        (folder / "python3").symlink_to(program)
        (folder / "torchrun").write_text(
            f'#!/bin/sh\nexec {program} -m torch.distributed.run "$@"\n'
        )
        (folder / "torchrun").chmod(0o755)
        print("ready", flush=True)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is server:
                    client = server.accept()[0]
                    child = start(client, program)
                    clients[child] = client
                    ready.register(client, selectors.EVENT_READ, child)
                elif key.fileobj is woken:
                    woken.recv(4096)
                    for child, status in ended():
                        with contextlib.suppress(KeyError):
                            ready.unregister(clients[child])
                        answer(clients.pop(child), status)
                else:  # the client was killed
                    ready.unregister(key.fileobj)
                    kill_all(key.data)


def start(client: socket.socket, program: Path) -> int:
    """Fork a process that runs a client's command; give its id."""
    files = array.array("i")
    size = socket.CMSG_SPACE(3 * files.itemsize)
    _, ancillary, _, _ = client.recvmsg(1, size)
    files.frombytes(ancillary[0][2])
    job = json.loads(client.makefile().readline())
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        answer(client, child, last=False)
        return child
    from tests import warm_server

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, file in enumerate(files):
        os.dup2(file, target)
    sys.executable = str(program)  # what it starts in turn is as quick
    warm_server.be(job, {})


def kill_all(child: int) -> None:
    """Kill a process and what it has started: with a client, a test kills all that descends from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(child)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def ended() -> list[tuple[int, int]]:
    """Processes that have ended, and their statuses."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((child[0], os.waitstatus_to_exitcode(child[1])))
    return found


def answer(client: socket.socket, number: int, *, last: bool = True) -> None:
    """Send a number, unless nobody is there."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(b"%d\n" % number)
    if last:
        client.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, "")  # the place of the programs' folder
    main(Path(sys.argv[1]))
