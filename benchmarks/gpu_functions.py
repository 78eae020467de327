"""The functions that measurements of gpu_plan.py name; imported by the process that measures."""

import gpu_kernels
import gpu_models

FUNCTIONS = {
    function.__name__: function
    for function in (
        gpu_kernels.check_scan, gpu_kernels.check_conv, gpu_kernels.check_tokens, gpu_kernels.time_scan,
        gpu_kernels.time_conv, gpu_kernels.time_tokens, gpu_kernels.time_attention, gpu_kernels.bits_of_kernels,
        gpu_models.step, gpu_models.images_per_second, gpu_models.bits_of_steps,
    )
}  # fmt: skip
