"""What runs only in the peers' own environment is not collected here."""

collect_ignore = [
    "make_export_goldens.py", "make_goldens.py", "make_hqq_goldens.py", "make_zeroshot_goldens.py", "model_quality.py",
]  # fmt: skip
