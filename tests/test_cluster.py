"""The launch files of scripts/cluster, run with stand-ins for the launchers that write down what they were given."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from unitok.cli import parse
from unitok.commands.train import stage_config
from unitok.core.errors import UserError

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "scripts" / "cluster"
SCRIPTS = ["deepspeed.sh", "torchrun.sh", "slurm.sbatch"]
STAGES = ["tokenizer", "codes", "warmup", "pretrain", "sft"]
# Writes its name and arguments, one a line; `srun` then runs them as rank 1 of 2, with the program `python` below.
STAND_IN = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" >> "$SAID"\n'
SRUN = STAND_IN + (
    'export SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=2\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
)
PYTHON = STAND_IN + (
    'printf "%s\\n" "RANK=$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >> "$SAID"\n'
    "[[ -z ${RANK_WAITS:-} ]] && exit ${CODE:-0}\n"
    # a rank that ends with that code when it is told to; the signal goes to the script above it too
    'trap "exit $RANK_WAITS" TERM\n'
    "kill -TERM -- -$(ps -o pgid= $$ | tr -d ' ')\nsleep 1\n"
)
SCONTROL = STAND_IN + '[[ $1 == show ]] && printf "node-0\\nnode-1\\n"\nexit 0\n'

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash, in which the launch scripts are written")


def run(tmp_path: Path, script: str, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit code, what the stand-ins were given, and the error output."""
    programs = {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "torchrun": STAND_IN, "deepspeed": STAND_IN}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said.txt"
    said.write_text("")
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), "HOME": str(tmp_path)} | environment
    done = subprocess.run(
        ["bash", str(CLUSTER / script), *arguments],
        env=given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    return done.returncode, said.read_text().splitlines(), done.stderr


@pytest.mark.parametrize("script", ["stages.sh", *SCRIPTS])
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_launched_exists(tmp_path, script, stage):
    """The script is there, its options are options of the command line, the configuration takes the settings."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_SUBMIT_DIR": str(ROOT)}
    more = ["--batch-size", "8"] if stage == "codes" else ["seed=3"]
    code, said, errors = run(tmp_path, script, stage, *more, **slurm)
    assert code == 0, errors
    if stage == "codes":
        launcher = {
            "torchrun.sh": ["--master_port", "29500", "-m", "unitok"],
            "deepspeed.sh": ["--module", "--no_local_rank", "unitok"],
        }
        before = launcher.get(script, ["-m", "unitok"])  # srun's ranks run python itself
        assert said[said.index("data") - len(before) : said.index("data")] == before
        command = said[said.index("data") :]
        command = command[: next((i for i, word in enumerate(command) if word.startswith(("RANK=", "python"))), None)]
        assert parse(command).batch_size == 8
        return
    script_name = f"scripts/train_{'tokenizer' if stage == 'tokenizer' else 'mllm'}.py"
    words = said[said.index(script_name) :]
    assert (ROOT / words[0]).is_file() and words[1] == "--config" and (ROOT / words[2]).is_file()
    overrides = [word for word in words[3 : words.index("seed=3") + 1]]
    config = stage_config(script_name.split("_")[1].removesuffix(".py"), str(ROOT / words[2]), overrides)
    assert config.seed == 3
    assert stage not in ("warmup", "pretrain", "sft") or config.recipe == stage


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_stage(tmp_path, script):
    code, said, errors = run(tmp_path, script, "pretain", SLURM_SUBMIT_DIR=str(ROOT))
    assert code == 2 and "stage 'pretain': expected tokenizer, codes, warmup, pretrain or sft" in errors
    assert "srun" not in said and "torchrun" not in said and "deepspeed" not in said


def test_hostfile_is_what_deepspeed_reads(tmp_path):
    deepspeed = pytest.importorskip("deepspeed.launcher.runner")
    assert deepspeed.fetch_hostfile(str(CLUSTER / "hostfile")) == {"node-0": 8, "node-1": 8}
    code, said, _ = run(tmp_path, "deepspeed.sh", "pretrain", HOSTS="my_hosts", PORT="123")
    assert code == 0 and said[:5] == ["deepspeed", "--hostfile", "my_hosts", "--master_port", "123"]


def test_torchrun_takes_its_numbers_from_either_environment(tmp_path):
    operator = {
        "PET_NNODES": "4",
        "PET_NODE_RANK": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_MASTER_ADDR": "job-master-0",
        "PET_MASTER_PORT": "23456",
    }
    by_hand = {"NODES": "4", "NODE_RANK": "2", "GPUS": "8", "MASTER": "job-master-0", "PORT": "23456"}
    both = [run(tmp_path, "torchrun.sh", "sft", **numbers)[1] for numbers in (operator, by_hand)]
    expected = "torchrun --nnodes 4 --node_rank 2 --nproc_per_node 8 --master_addr job-master-0 --master_port 23456"
    assert both[0] == both[1] and both[0][:11] == expected.split()


def test_torchrun_options_are_those_of_torch():
    from torch.distributed.run import parse_args

    parsed = parse_args(
        "--nnodes 4 --node_rank 2 --nproc_per_node 8 --master_addr a --master_port 1 scripts/train_mllm.py x=1".split()
    )
    assert (parsed.nnodes, parsed.node_rank, parsed.training_script) == ("4", 2, "scripts/train_mllm.py")


@pytest.mark.parametrize(("ended", "requeued"), [("0", False), ("75", True), ("2", False), ("143", False)])
def test_slurm_ranks_and_requeue(tmp_path, ended, requeued):
    """Ranks get the names that a launcher sets; only a run that saved and wants to go on returns to the queue. srun's
    SIGTERM after another rank's failure (143) is none."""
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_SUBMIT_DIR": str(ROOT), "CODE": ended}
    code, said, errors = run(tmp_path, "slurm.sbatch", "pretrain", **slurm)
    assert code == int(ended), errors
    assert "RANK=1 1 2 node-0 20041" in said
    assert ("requeue" in said) == requeued and (not requeued or said[-2:] == ["requeue", "41"])


@pytest.mark.parametrize(("stage", "ended", "together"), [("pretrain", 75, 1), ("pretrain", 143, 1), ("codes", 75, 0)])
def test_slurm_script_outlives_a_signal_that_its_ranks_hear(tmp_path, stage, ended, together):
    """SIGTERM to the whole process group, as a preemption sends it: the rank ends by its handler, or while it imports
    without one (143), and the job goes back. Ranks of extraction do not end with one that fails."""
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n", "SLURM_SUBMIT_DIR": str(ROOT), "RANK_WAITS": str(ended)}
    code, said, errors = run(tmp_path, "slurm.sbatch", stage, **slurm)
    assert code == ended, errors
    assert said[-2:] == ["requeue", "41"] and f"--kill-on-bad-exit={together}" in said


def test_kubernetes_job():
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    hosts = job["spec"]["pytorchReplicaSpecs"]
    assert set(hosts) == {"Master", "Worker"} and hosts["Master"]["template"] == hosts["Worker"]["template"]
    pod = hosts["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch" and (ROOT / container["command"][1]).is_file()
    assert container["args"][0] in STAGES
    grace = int({one["name"]: one["value"] for one in container["env"]}["GRACE"])
    assert pod["terminationGracePeriodSeconds"] > grace
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_stage_config_refuses_a_typing_error():
    """Guards the check above: settings that do not exist would be seen."""
    with pytest.raises(UserError):
        stage_config("mllm", "mllm/llama2_7b_sft.yaml", ["sedd=3"])
