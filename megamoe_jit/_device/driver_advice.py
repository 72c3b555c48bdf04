"""What it means that the driver does not start, by the code that it answers with, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """About one code.

    Attributes:
        cause: what is wrong, as far as the code tells.
        step: what to do.
        here: whether there is a driver that ought to work; else this is a machine without GPUs.
    """

    cause: str
    step: str
    here: bool = True


_LOG = "`dmesg | grep -i nvrm` says more"
_BY_CODE = {
    3: Advice(
        "the driver was shut down, or this process was forked from one that used it",
        "start a new process; if it stays, reload the kernel modules (`modprobe nvidia nvidia_uvm`) or reboot",
    ),
    34: Advice(
        "the libcuda.so.1 that is found is the stub of a CUDA toolkit, which is for linking alone",
        "take .../lib64/stubs out of LD_LIBRARY_PATH; then the driver's own library is found where there is one",
        here=False,
    ),
    46: Advice(
        "the GPU is busy or not available: another process has it in exclusive mode, MIG has no instances, or it is "
        "not ready for confidential computing",
        "`nvidia-smi -q -d COMPUTE` shows the mode, `nvidia-smi mig -lgi` the instances; end that process, or make one",
    ),
    100: Advice(
        "the driver is there, but no GPU is visible to this process",
        "look at CUDA_VISIBLE_DEVICES; run a container with GPUs (`--gpus all`), a job with one allotted",
        here=False,
    ),
    101: Advice(
        "a GPU that was asked for does not exist",
        "correct CUDA_VISIBLE_DEVICES: `nvidia-smi -L` lists numbers, UUIDs and MIG instances",
    ),
    304: Advice(
        "the operating system refused what the driver asked for",
        "look at the rights of /dev/nvidia* (in a container: its device rules) and at `ulimit -a`; " + _LOG,
    ),
    802: Advice(
        "the NVSwitch fabric of this machine is not up: the fabric manager does not run, or is of another version",
        "`systemctl status nvidia-fabricmanager`; start it, in the exact version of the driver",
    ),
    803: Advice(
        "the kernel module and libcuda.so.1 are of different driver versions, most often after an update",
        "reboot, or unload and load the nvidia modules; in a container remove a libcuda.so of its own",
    ),
    804: Advice(
        "a forward-compatibility libcuda (the package cuda-compat) is in use, which this GPU's driver does not support",
        "take the compat folder out of LD_LIBRARY_PATH, or update the driver",
    ),
    805: Advice(
        "CUDA MPS is asked for, but its control daemon does not answer",
        "start it (`nvidia-cuda-mps-control -d`), or unset CUDA_MPS_PIPE_DIRECTORY",
    ),
    999: Advice(
        "the driver failed without a reason; often the module nvidia_uvm is not loaded or is stuck, as after a suspend",
        "`modprobe -r nvidia_uvm && modprobe nvidia_uvm`, or reboot; " + _LOG,
    ),
}


def advice(code: int) -> Advice:
    """What to say of a code; of one that is not known, where to look."""
    return _BY_CODE.get(code, Advice("the driver does not start", f"see whether `nvidia-smi` works; {_LOG}"))
