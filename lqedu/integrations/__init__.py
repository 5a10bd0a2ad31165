"""Other people's programs running lqedu's models: transformers, lm-eval, vLLM, QServe. Chapter ``21-serving``.

Nothing is imported here: each module needs its own program, and says so where that is missing.
"""
