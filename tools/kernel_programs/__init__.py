"""Random programs for the compiled kernels, under sanitizers and between guard pages, against plain Python.

python -m tools.kernel_programs --programs 1000 --seed 1 --builds quick
python -m tools.kernel_programs --seed 1 --only 417 --builds gcc-haswell
python -m tools.kernel_programs --mutants
"""
