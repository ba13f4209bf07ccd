"""Runs random programs through the compiled kernels, and compares the results with plain Python.

    python -m tools.kernel_programs --programs 1000 --seed 1 --builds quick
    python -m tools.kernel_programs --seed 1 --only 417 --builds gcc-haswell
    python -m tools.kernel_programs --mutants

The kernels run under sanitizers and between guard pages, which detect accesses outside of their memory.
"""
