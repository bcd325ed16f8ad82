"""How memory is handed out where the processor is the device.

XLA asks for the working memory of a program each time it runs, and the C library gives blocks of that size back to the
system at once: the next run finds every page of it missing, and has it cleared again. `tools/benchmarks/benchmark.py
train` times training steps both ways.
"""

import ctypes
import glob
import os

# What the drivers of accelerators put there: NVIDIA, WSL, AMD, TPU (two kinds of driver).
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
# Of <malloc.h>: how many blocks of their own from the system; free memory at the heap's end; how the heap grows.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
_NEVER, _GROWTH_BYTES = -1, 256 << 20
KEEP = "IMAGEGPT_JAX_KEEP_MEMORY"  # environment variable: 0 leaves memory to the C library


def on_processor() -> bool:
    """Whether JAX is going to compute on the processor: it is told to, or there is nothing else. Touches no device."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms.split(",")[0] == "cpu" if platforms else not any(map(glob.glob, _ACCELERATORS))


def keep() -> bool:
    """Has a process that computes on the processor keep the memory it is given; before JAX has touched a device.

    What a program frees is used again, so the process stays as large as it was at its largest. On one device, programs
    then run on the thread that calls them: the heap that is kept is the main thread's.

    Returns:
      whether it is so now: not beside an accelerator, nor under another C library than GNU's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or os.environ.get(KEEP) == "0" or not on_processor():
        return False
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROWTH_BYTES))
    return all(mallopt(name, value) for name, value in settings)
