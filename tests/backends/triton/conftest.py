"""What compiles kernels is left out under Triton's interpreter, which compiles and launches nothing."""

import os

collect_ignore = (
    ["test_compile_kernels.py", "test_launch_cache.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
)
