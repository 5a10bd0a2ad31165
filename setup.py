"""Which packages there are; everything else is in pyproject.toml.

A file of its own because pyproject.toml can either search for packages or list them, and the recorded results of the
book (book/results) travel with the package as lqedu/_results: on Colab a chapter has no checkout to read them from.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(".", include=["lqedu*"]), *find_packages("kernels"), "lqedu._results"],
    package_dir={"lqedu_kernels": "kernels/lqedu_kernels", "lqedu._results": "book/results"},
    package_data={
        "lqedu.viz": ["*.mjs", "*.css"],
        "lqedu._results": ["*.json", "*.csv", "matrix/*/*.json"],
        "lqedu_kernels": ["configs/*.json", "tables/*.json", "bench/*.md", "bench/notes/*.md"],
    },
    include_package_data=False,
)
