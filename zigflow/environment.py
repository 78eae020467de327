"""The environment variables that the code reads, each with its meaning; torch-free.

``docs/environment.md`` and the report of ``doctor`` are made from this list, and a test holds it against the source.
"""

from dataclasses import dataclass

__all__ = ["VARIABLES", "Variable"]


@dataclass(frozen=True)
class Variable:
    """One variable.

    Attributes:
        name: as it is exported.
        text: what it does; one line, without a full stop.
        kind: "zigflow" (of ours), "run" (names the run, or how its processes were started) or "package" (of a package
            or tool that is used here).
        secret: its value is never shown.
    """

    name: str
    text: str
    kind: str
    secret: bool = False


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "ZIGFLOW_BACKEND",
        "kernel backend of every operation that has it: reference, torch, cpu, triton, cuda_package; else auto",
        "zigflow",
    ),
    Variable(
        "ZIGFLOW_CACHE",
        "folder of compiled kernels; else XDG_CACHE_HOME/zigflow, else ~/.cache/zigflow",
        "zigflow",
    ),
    Variable(
        "ZIGFLOW_CXXFLAGS",
        "more flags for the C++ compiler; kernels are compiled anew for other flags",
        "zigflow",
    ),
    Variable(
        "ZIGFLOW_PLUGINS",
        "files of your own that every command loads, as plugins=[FILE.py] does; separated as the folders of PATH are",
        "zigflow",
    ),
    Variable(
        "RUN_ID",
        "name of the run: its folder is outputs/JOB/RUN_ID; the same on every machine of a run",
        "run",
    ),
    Variable("SLURM_JOB_ID", "name of the run where RUN_ID is not set", "run"),
    Variable(
        "TORCHELASTIC_RUN_ID", "torchrun's name of the run, taken where the two above are not set", "run"
    ),
    Variable("WORLD_SIZE", "processes of the run, set by accelerate launch and torchrun", "run"),
    Variable("RANK", "number of this process, set by the launcher; 0 writes logs and results", "run"),
    Variable("LOCAL_RANK", "number of this process on its machine, set by the launcher", "run"),
    Variable("LOCAL_WORLD_SIZE", "processes on this machine, set by torchrun", "run"),
    Variable("GROUP_WORLD_SIZE", "machines of the run, set by torchrun", "run"),
    Variable("MASTER_ADDR", "machine where the processes meet; set without WORLD_SIZE it is an error", "run"),
    Variable("MASTER_PORT", "port where the processes meet", "run"),
    Variable(
        "SLURM_STEP_NUM_TASKS",
        "processes that srun started; more than one without WORLD_SIZE is an error",
        "run",
    ),
    Variable(
        "OMPI_COMM_WORLD_SIZE",
        "processes that mpirun started; more than one without WORLD_SIZE is an error",
        "run",
    ),
    Variable("PMI_SIZE", "as OMPI_COMM_WORLD_SIZE, of other MPI libraries", "run"),
    Variable("MV2_COMM_WORLD_SIZE", "as OMPI_COMM_WORLD_SIZE, of MVAPICH", "run"),
    Variable(
        "ACCELERATE_MIXED_PRECISION",
        "precision that accelerate was told; the key mixed_precision goes before it",
        "run",
    ),
    Variable("ACCELERATE_USE_CPU", "true: accelerate was told to use the CPU", "run"),
    Variable("ACCELERATE_DYNAMO_BACKEND", "inductor: loop.compile=true by default", "run"),
    Variable(
        "ACCELERATE_DYNAMO_MODE",
        "another mode than the default is refused: blocks are compiled one by one",
        "run",
    ),
    Variable("ACCELERATE_DYNAMO_USE_DYNAMIC", "true is refused: blocks are compiled for their shapes", "run"),
    Variable("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "default of grad_accum", "run"),
    Variable("ACCELERATE_GRADIENT_CLIPPING", "default of max_grad_norm", "run"),
    Variable("ACCELERATE_USE_FSDP", "true is refused: loop.shard=true shards parameters here", "run"),
    Variable("ACCELERATE_USE_DEEPSPEED", "true is refused: loop.shard=true shards parameters here", "run"),
    Variable("ACCELERATE_USE_MEGATRON_LM", "true is refused: loop.shard=true shards parameters here", "run"),
    Variable(
        "ACCELERATE_USE_PARALLELISM_CONFIG", "true is refused: loop.shard=true shards parameters here", "run"
    ),
    Variable("OMP_NUM_THREADS", "threads of a CPU process; the key loop.threads goes before it", "package"),
    Variable("CUDA_VISIBLE_DEVICES", "GPUs that a process sees", "package"),
    Variable("CXX", "the C++ compiler; else c++, g++ or clang++", "package"),
    Variable("XDG_CACHE_HOME", "folder of caches, where ZIGFLOW_CACHE is not set", "package"),
    Variable("TRITON_INTERPRET", "1: Triton kernels are interpreted, without a GPU", "package"),
    Variable("GLIBC_TUNABLES", "glibc.malloc settings there: freed memory is then left to them", "package"),
    Variable("HYDRA_FULL_ERROR", "1: an error is shown with its traceback instead of in one line", "package"),
    Variable("WANDB_API_KEY", "key of wandb; it never stands in a configuration", "package", secret=True),
    Variable("WANDB_MODE", "online, offline or disabled, where wandb.mode=null", "package"),
    Variable("WANDB_BASE_URL", "address of a wandb server of one's own", "package"),
    Variable("NETRC", "file of log-ins in which a key of wandb is sought; else ~/.netrc", "package"),
)
