"""Speed of the kernels beside their peers, measured in one process: ``python -m lqedu_kernels.bench --op all``."""
