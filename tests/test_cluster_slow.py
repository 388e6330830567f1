"""Two hosts as network namespaces joined by a virtual cable: both launchers and both stages give what one host gives.

Needs root and `ip` (iproute2); skipped with the reason where there is neither.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from stages import STAGES, run_stage, write_configs

from unitok.core.runlog import read_log

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
INTERFACE, ADDRESSES, PORT = "uthost0", ("10.213.7.1", "10.213.7.2"), "29555"
# Two steps, the second with the discriminator; clipping joins all gradients in one norm over both hosts.
OPTIONS = ["steps=2", "ema_decay=null", "engine.gradient_clipping=1.0"]
STAGE_OPTIONS = {"tokenizer": ["discriminator.start_step=1"], "mllm": []}
LAUNCHES = [("torchrun", 2), ("deepspeed", 3)]
SECONDS = 240


def why_not() -> str | None:
    """What a machine lacks for network namespaces."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "no `ip` command (iproute2)"
    if os.geteuid() != 0:
        return "not root: network namespaces cannot be made"
    probe = f"utprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"`ip netns add` fails here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces, each with the interface INTERFACE and one of ADDRESSES."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"two hosts: {reason}")
    with two_hosts() as names:
        yield names


@contextmanager
def two_hosts(prefix: str = "ut") -> Iterator[list[str]]:
    names = [f"{prefix}{os.getpid()}h{number}" for number in range(2)]
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        cable = ["link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE]
        _ip(*cable, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in (INTERFACE, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:  # the cable goes with its namespaces, once no process is left in them
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for process in found.split():
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def launch_command(tool: str, node: int, hostfile: Path) -> list[str]:
    """As scripts/cluster starts it on host number `node`, one rank a host."""
    program = str(Path(sys.executable).parent / tool)
    master = ["--master_addr", ADDRESSES[0], "--master_port", PORT]
    if tool == "torchrun":
        return [program, "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node), *master]
    return [program, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node), *master]


def run_on_hosts(hosts: list[str], tool: str, folder: Path, arguments: list[str]) -> None:
    """One launcher in each namespace; assert that both end well, and end both whatever happens."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    own = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
    processes = []
    try:
        for node, host in enumerate(hosts):
            command = ["ip", "netns", "exec", host, *launch_command(tool, node, hostfile), *arguments]
            with (folder / f"host{node}.txt").open("w") as output:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
    said = "\n".join((folder / f"host{node}.txt").read_text()[-3000:] for node in range(2))
    assert codes == [0, 0], said


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_configs(tmp_path_factory.mktemp("hosts"))


@pytest.mark.parametrize(("tool", "zero"), LAUNCHES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_hosts_are_one(
    hosts: list[str], files: dict[str, Path], tmp_path: Path, stage: str, tool: str, zero: int
) -> None:
    """Logged losses and exported weights of two hosts are those of one host with two ranks, bit for bit."""
    options = [*OPTIONS, *STAGE_OPTIONS[stage], f"engine.zero_stage={zero}"]
    expected = run_ranks(2, run_stage, stage, files[stage], tmp_path / "one", 2, options)[0]
    own = [f"output_dir={tmp_path / 'two'}", "engine.micro_batch_size=2", "device=cpu"]
    script = [f"scripts/train_{stage}.py", "--config", str(files[stage]), *options, *own]
    run_on_hosts(hosts, tool, tmp_path, script)
    log = read_log(tmp_path / "two" / "log.jsonl")
    assert [record["step"] for record in log] == [1, 2]
    assert log == expected
    if stage == "tokenizer":
        assert "discriminator" in log[1] and "discriminator" not in log[0]
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_namespaces_are_gone_after_a_failure(hosts: list[str]) -> None:
    """A test that fails inside leaves neither namespace nor process behind."""
    with pytest.raises(RuntimeError), two_hosts("utfail") as names:
        command = ["ip", "netns", "exec", names[0], "cat"]
        echo = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert echo.stdin and echo.stdout
        echo.stdin.write("inside\n")  # what answers has entered the namespace
        assert echo.stdout.readline() == "inside\n"
        raise RuntimeError
    with echo:
        assert echo.wait(timeout=10) == -signal.SIGKILL
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in listed for name in names)
