"""Where the time of a step goes: every millisecond in a group, what belongs to none under its own name.

On a CPU the groups hold the operators' own time, without that of the operators they call; the step runs in one
thread, so that all of them together are the step. On a GPU they hold the time of kernels, each counted for the
operator that started it, and what is left of the step is a row of its own: nothing ran then.

An operator belongs to who is responsible (a scan with all that it calls, the optimizer, the loss), else to what it
does (a matrix product, a copy), else to the module in which it ran; one of backward ran where the operator of forward
did whose gradient it is. What torch.compile generates goes by its kernels' names, which say what was fused.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from zigflow.nn import LayerNorm, RMSNorm

STEP = "benchmark: step"
LOSS, AVERAGES = "benchmark: loss", "benchmark: averages"
_MODULE = "benchmark: module "
REST, IDLE, OVERLAP = "not attributed", "no kernel runs", "kernels at the same time"

# Who is responsible, for everything that happens inside: group, pattern of an operator or a scope around it.
_NODE = r"(GeneratedBackwardFor_)?zigflow(::|_)\w*"
_OWNERS = [
    ("selective scan, backward", _NODE + r"scan(_backward|_default\w*Backward)"),
    ("selective scan, forward", _NODE + r"scan"),
    ("convolution, backward", _NODE + r"conv(_backward|_default\w*Backward)"),
    ("convolution, forward", _NODE + r"conv"),
    ("scan orders (gathers)", r"_Permute(Backward)?$"),
    ("norms, modulation, residual sums", _NODE + r"(add_norm_modulate|gated_add)"),
    ("attention", r"aten::_?scaled_dot_product|ScaledDotProduct\w*Backward"),
    ("optimizer", r"Optimizer\."),
    ("averages of the weights", AVERAGES),
    ("loss", LOSS),
]
# What an operator does by itself.
_OPERATORS = [
    ("matrix products", r"aten::(addmm|mm|bmm|baddbmm|matmul|linear|addmv|mv)$"),
    ("2-D convolutions", r"aten::\w*(conv|im2col|col2im)"),
    ("scan orders (gathers)", r"aten::(index|index_select|index_put_?|_index_put_impl_|gather|scatter\w*)$"),
    ("copies and casts", r"aten::(copy_|_to_copy|to|clone|contiguous)$|Memcpy"),
]
# What starts no kernel, and takes time on a CPU alone.
_OVERHEAD = [
    ("views and allocation", r"aten::(view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|as_strided|expand|"
     r"squeeze|unsqueeze|select|slice|split\w*|chunk|unbind|narrow|unflatten|flatten|detach\w*|alias|empty\w*|"
     r"new_empty\w*|resize_|result_type)$|detach$"),
    ("compiled code outside kernels", r"Torch-Compiled|TorchDynamo|Pregraph|## Call|AOTDispatcher|CompiledFunction"),
    ("autograd engine", r"autograd::engine|\w*Backward\d*$|torch::autograd|Autograd"),
    ("Python between operators", r"benchmark: (step|module)"),
]  # fmt: skip
_NORMS = "norms, modulation, residual sums"
_OF_NORMS = re.compile(
    r"aten::(add|sub|mul|div|neg|pow|square|mean|sum|rsqrt|sqrt|var|native_layer_norm|layer_norm|rms_norm|_fused_rms_norm|silu)"
)
_IN_NORMS = re.compile(_MODULE + r"(\w*Block|\w*Norm|FinalLayer|SharedModulation|Sequential|SiLU)$")
# Of kernels that no operator is known to have started.
_KERNELS = [
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|splitK|triton_tem_fused\w*mm"),
    ("attention", r"flash|fmha|attention"),
    ("copies and casts", r"Memcpy"),
]
_GENERATED = re.compile(r"(?:graph_\d+_)?((?:cpp|triton_(?!tem)\w+?)_fused_\w+?)(?:_\d+)?$")


def group_of(operators: list[str], kernel: str | None = None) -> str:
    """The group of an operator's own time, or of a kernel's.

    Args:
        operators: names of the operator and of all that it ran in, outwards; of a kernel those around its start.
        kernel: its name; None for an operator.
    """
    own = kernel if kernel is not None else operators[0]
    generated = _GENERATED.match(own)
    if generated:
        return f"generated: {generated[1]}"
    for group, pattern in _OWNERS:
        if any(re.match(pattern, name) for name in operators):
            return group
    operator = operators[0] if operators else ""
    for group, pattern in _OPERATORS if kernel is not None else _OPERATORS + _OVERHEAD:
        if re.match(pattern, operator):
            return group
    scope = next((name for name in operators if name.startswith(_MODULE)), "")
    if _OF_NORMS.match(operator) and _IN_NORMS.match(scope):
        return _NORMS
    if kernel is not None:
        for group, pattern in _KERNELS:
            if re.search(pattern, kernel, flags=re.IGNORECASE):
                return group
    # An operator's name says more than that of its kernel.
    return f"other: {operator if '::' in operator and 'autograd' not in operator else own[:80]}"


@contextmanager
def scopes(model: nn.Module) -> Iterator[None]:
    """Name the modules that eager operators run in; what is compiled stays as it is."""
    with ExitStack() as stack:
        compiled = {
            part
            for module in model.modules()
            if module._compiled_call_impl is not None
            for part in module.modules()
        }
        for module in model.modules():
            # A norm with hooks is called for what it is, without them it is part of a kernel: leave norms alone.
            if module in compiled or isinstance(module, LayerNorm | RMSNorm):
                continue
            open_scopes: list[record_function] = []

            def enter(module, args, scopes=open_scopes):
                scopes.append(record_function(_MODULE + type(module).__name__))
                scopes[-1].__enter__()

            def leave(module, args, output, scopes=open_scopes):
                scopes.pop().__exit__(None, None, None)

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def profiled(
    step: Callable[[], object], model: nn.Module, device: torch.device, steps: int, seconds: float
) -> dict:
    """Profile ``steps`` calls of ``step`` and account for them, see ``account``.

    Args:
        step: a whole training or inference step of ``model``, warm.
        seconds: one step took without the profiler.
    """
    on_gpu = device.type == "cuda"
    wait = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # The first steps under the profiler take longer, as its records move what is allocated: they are thrown away.
    plan = schedule(wait=0, warmup=steps, active=steps, repeat=1)
    with scopes(model), profile(activities=activities, schedule=plan, acc_events=True) as profiler:
        for _ in range(2 * steps):
            with record_function(STEP):
                step()
                wait()
            profiler.step()
    return account(profiler.events(), on_gpu, steps, seconds)


def account(events, on_gpu: bool, steps: int, seconds: float) -> dict:
    """A table whose rows sum to the step.

    The step is, on a CPU, the profiled one, longer than one without the profiler; on a GPU the one without, ``seconds``
    long, as the profiler delays the start of kernels and not the kernels.
    """
    roots = [e for e in events if e.name == STEP and e.device_type.name == "CPU"]
    whole = sum(e.cpu_time_total for e in roots) / 1e3 / steps
    made = {}
    for event in events:
        # The number counts nodes: the last operator that has one made its node.
        if event.sequence_nr >= 0 and "Backward" not in event.name and "autograd::" not in event.name:
            made[event.sequence_nr] = event
    rows = defaultdict(lambda: [0.0, 0])
    for names, kernel, microseconds in (_kernels if on_gpu else _own_times)(events, made):
        row = rows[group_of(names, kernel)]
        row[0] += microseconds / 1e3 / steps
        row[1] += 1
    whole_step = 1e3 * seconds if on_gpu else whole
    busy = sum(ms for ms, _ in rows.values())
    if on_gpu:
        union = _union(_device_events(events)) / 1e3 / steps
        rows[IDLE] = [whole_step - union, 0]
        if busy - union > 1e-6:
            rows[OVERLAP] = [union - busy, 0]
    rows[REST] = [whole_step - sum(ms for ms, _ in rows.values()), 0]
    ordered = sorted(rows.items(), key=lambda item: -item[1][0])
    return {
        "time": "of kernels" if on_gpu else "of operators without those they call, and of Python between",
        "step_ms": round(whole_step, 4),
        "step_ms_without_profiler": round(1e3 * seconds, 4),
        "steps": steps,
        "rows": [
            {
                "group": group,
                "ms": round(ms, 4),
                "share": round(ms / whole_step, 6),
                "events": round(count / steps, 1),
            }
            for group, (ms, count) in ordered
        ],
    }


def _own_times(events, made):
    """(Names, None, microseconds) of every operator of the steps."""
    for event in events:
        if event.device_type.name != "CPU" or event.is_async:
            continue
        chain = list(_chain(event, made))
        if STEP in chain:
            yield chain, None, event.self_cpu_time_total


def _kernels(events, made):
    """(Names of the operators around its start, its own, microseconds) of every kernel."""
    found = _device_events(events)
    known, total = defaultdict(float), defaultdict(float)
    real = {event.name for event in found}
    for event in events:
        for kernel in event.kernels:
            if kernel.name in real:
                known[kernel.name] += kernel.duration
                yield list(_chain(event, made)), kernel.name, kernel.duration
    for event in found:
        total[event.name] += event.time_range.elapsed_us()
    for name, microseconds in total.items():
        if microseconds - known[name] > 1e-3:
            yield [], name, microseconds - known[name]


def _device_events(events):
    """Kernels, copies and fills; the profiler repeats scopes as if they ran on the device."""
    scopes = {e.name for e in events if e.device_type.name == "CPU" and e.is_user_annotation}
    return [
        e
        for e in events
        if e.device_type.name == "CUDA"
        and not (e.is_user_annotation or e.name in scopes or e.name.startswith("benchmark: "))
    ]


def _union(events) -> float:
    """Microseconds in which at least one of them runs."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _chain(event, made) -> Iterator[str]:
    """Names of an operator and of all around it; of backward then those of the forward that made its node."""
    number = -1
    while event is not None:
        yield event.name
        if event.name.startswith("autograd::engine::evaluate_function"):
            number = event.sequence_nr
        event = event.cpu_parent
    if number in made:
        origin = made[number].cpu_parent
        while origin is not None:
            yield origin.name
            origin = origin.cpu_parent


def text_of(table: dict) -> str:
    """The table as lines for a terminal."""
    head = f"{table['step_ms']:10.3f} ms  100.0 %  a step, {table['time']}"
    return "\n".join(
        [head, *(f"{r['ms']:10.3f} ms  {100 * r['share']:5.1f} %  {r['group']}" for r in table["rows"])]
    )
